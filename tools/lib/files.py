"""Reading files that came from elsewhere: ordinary ones, of a size that is looked at first; JSON, YAML and arrays without code."""

import json
import math
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.lib.errors import UserError

MB = 1 << 20
JSON_LIMIT, YAML_LIMIT, ARRAYS_LIMIT = 256 * MB, MB, 1024 * MB
MANY = 10_000_000   # entries of one table or list


def printable(text: object, most: int = 200) -> str:
  """A name or text of a file as it may go to a terminal: one line, no escape codes, not endless."""
  plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
  return plain if len(plain) <= most else plain[: most // 2] + "..." + plain[-most // 3 :]


def ordinary(path: str | Path, limit: float = math.inf) -> Path:
  """The path, if it is an ordinary file of at most `limit` bytes: a pipe would be waited for, a device read, for ever. Raises FileNotFoundError, UserError."""
  about = os.stat(path)
  if not stat.S_ISREG(about.st_mode):
    raise UserError(f"{printable(path)} is no ordinary file; copy the file itself")
  if about.st_size > limit:
    raise UserError(f"{printable(path)} has {about.st_size} bytes, more than the {limit:.0f} that such a file may have")
  return Path(path)


def read_bytes(path: str | Path, limit: int = JSON_LIMIT) -> bytes:
  """Raises OSError where it cannot be read, UserError where it is no ordinary file or larger than `limit`."""
  with open(ordinary(path, limit), "rb") as f:
    data = f.read(limit + 1)
  if len(data) > limit:   # it grew
    raise UserError(f"{printable(path)} has over {limit} bytes, more than such a file may have")
  return data


def read_json(path: str | Path, limit: int = JSON_LIMIT) -> Any:
  """Raises OSError, UserError (see read_bytes), and ValueError where it is no JSON; nested too deeply counts as none."""
  try:
    return json.loads(read_bytes(path, limit))
  except RecursionError:
    raise ValueError("it is nested too deeply") from None


def read_yaml(path: str | Path, limit: int = YAML_LIMIT) -> Any:
  """Plain values only. Raises OSError, UserError, and ValueError where it is no YAML, is nested too deeply, or has aliases: few lines make gigabytes."""
  import yaml

  class Loader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
      if self.check_event(yaml.AliasEvent):
        raise yaml.YAMLError("it has aliases (*name), which are not read; write the values out")
      return super().compose_node(parent, index)

  try:
    return yaml.load(read_bytes(path, limit), Loader)   # a SafeLoader: no objects
  except RecursionError:
    raise ValueError("it is nested too deeply") from None
  except yaml.YAMLError as e:
    raise ValueError(printable(e)) from None


def read_header(f: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
  """Shape and dtype that an .npy claims. Raises ValueError: numpy's reader of headers raises what Python's own parser does."""
  try:
    version = np.lib.format.read_magic(f)
    shape, _, dtype = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version](f)
    return shape, dtype
  except (OSError, MemoryError):
    raise
  except Exception as e:
    raise ValueError(f"it holds what is no array ({printable(e, 80)})") from None


def read_arrays(path: str | Path, limit: int = ARRAYS_LIMIT) -> dict[str, np.ndarray]:
  """An .npz of at most `limit` bytes when unpacked, no objects in it. Raises OSError, UserError, ValueError."""
  try:
    with zipfile.ZipFile(ordinary(path, limit)) as z:
      total = 0
      for member in z.infolist():
        with z.open(member) as f:
          shape, dtype = read_header(f)
        if dtype.hasobject or min(shape, default=0) < 0:
          raise ValueError(f"{printable(member.filename)} holds objects, which are code, or is of an impossible shape")
        total += math.prod(shape) * dtype.itemsize
        if total > limit:
          raise UserError(f"{printable(path)} holds arrays of over {limit} bytes, more than such a file may have")
    with np.load(path, allow_pickle=False) as arrays:
      return dict(arrays)
  except (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError, zipfile.zlib.error) as e:  # type: ignore[attr-defined]
    raise ValueError(f"it is no whole .npz ({printable(e)})") from None
