"""openpilot's parameter store: one file per key under <root>/<prefix>, written atomically. An openpilot checkout's own
Params takes this one's place."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, NamedTuple


class ParamKeyFlag(IntFlag):
  PERSISTENT = 0x02
  CLEAR_ON_MANAGER_START = 0x04
  CLEAR_ON_ONROAD_TRANSITION = 0x08
  CLEAR_ON_OFFROAD_TRANSITION = 0x10
  DONT_LOG = 0x20
  DEVELOPMENT_ONLY = 0x40
  CLEAR_ON_IGNITION_ON = 0x80
  ALL = 0xFFFFFFFF


class ParamKeyType(IntEnum):
  STRING = 0
  BOOL = 1
  INT = 2
  FLOAT = 3
  TIME = 4
  JSON = 5
  BYTES = 6


class Key(NamedTuple):
  flags: ParamKeyFlag
  type: ParamKeyType
  default: Any = None


_P, _T = ParamKeyFlag, ParamKeyType
KEYS: dict[str, Key] = {
  "CarParams": Key(_P.CLEAR_ON_MANAGER_START | _P.CLEAR_ON_ONROAD_TRANSITION, _T.BYTES),
  "DongleId": Key(_P.PERSISTENT, _T.STRING),
  "FairBundle": Key(_P.PERSISTENT, _T.STRING),
  "FairEnabled": Key(_P.PERSISTENT, _T.BOOL, False),
  "FairLogDense": Key(_P.PERSISTENT, _T.BOOL, False),
  "FairRunner": Key(_P.PERSISTENT, _T.STRING),
  "IsOffroad": Key(_P.CLEAR_ON_MANAGER_START, _T.BOOL),
  "IsOnroad": Key(_P.CLEAR_ON_MANAGER_START, _T.BOOL),
}

ENCODE: dict[ParamKeyType, tuple[tuple[type, ...], Callable[[Any], bytes]]] = {
  _T.STRING: ((str,), str.encode),
  _T.BOOL: ((bool,), lambda v: b"1" if v else b"0"),
  _T.INT: ((int,), lambda v: str(v).encode()),
  _T.FLOAT: ((float, int), lambda v: str(float(v)).encode()),
  _T.TIME: ((datetime.datetime,), lambda v: v.isoformat().encode()),
  _T.JSON: ((dict, list), lambda v: json.dumps(v).encode()),
  _T.BYTES: ((bytes,), bytes),
}
DECODE: dict[ParamKeyType, Callable[[bytes], Any]] = {
  _T.STRING: bytes.decode,
  _T.BOOL: lambda b: b == b"1",
  _T.INT: int,
  _T.FLOAT: float,
  _T.TIME: lambda b: datetime.datetime.fromisoformat(b.decode()),
  _T.JSON: json.loads,
  _T.BYTES: bytes,
}


class UnknownKeyName(Exception):
  """The key is not in the registry above."""


class Params:
  def __init__(self, d: str | None = None):
    """Raises OSError where the folder cannot be made."""
    try:
      root = Path(d or os.environ.get("PARAMS_ROOT") or Path.home() / ".comma" / "params")
      self.path = root / (os.environ.get("OPENPILOT_PREFIX") or "d")
      self.path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as e:  # Path.home() has no OSError for a user without a home folder
      why = e.strerror if isinstance(e, OSError) else str(e)
      raise OSError(
        getattr(e, "errno", None) or errno.ENOENT,
        f"no folder for the params ({why}); set HOME or PARAMS_ROOT to one that can be written",
        getattr(e, "filename", None),
      ) from None
    self.lock_path = root / f".lock-{self.path.name}"

  def check_key(self, key: str | bytes) -> str:
    key = key.decode() if isinstance(key, bytes) else key
    if key not in KEYS:
      raise UnknownKeyName(key)
    return key

  def all_keys(self) -> list[str]:
    return sorted(KEYS)

  def get_type(self, key: str) -> ParamKeyType:
    return KEYS[self.check_key(key)].type

  def get_default_value(self, key: str) -> Any:
    return KEYS[self.check_key(key)].default

  def get_param_path(self, key: str = "") -> str:
    return str(self.path / key)

  def get(self, key: str, block: bool = False, return_default: bool = False) -> Any:
    """The typed value; None (or the default, if asked for) where there is none or it cannot be read as its type.
    block=True waits until there is one."""
    spec = KEYS[self.check_key(key)]
    while True:
      try:
        raw = (self.path / key).read_bytes()
      except FileNotFoundError:
        raw = None
      if raw is not None or not block:
        break
      time.sleep(0.05)
    default = spec.default if return_default else None
    if raw is None:
      return default
    try:
      return DECODE[spec.type](raw)
    except ValueError:
      return default

  def get_bool(self, key: str, block: bool = False) -> bool:
    return bool(self.get(key, block=block, return_default=True))

  def put(self, key: str, value: Any, block: bool = False) -> None:
    """Atomic: a reader sees the old value or the new one, also after a crash. Writes before it returns, whatever
    `block` says.

    Raises TypeError on a wrong type."""
    kinds, encode = ENCODE[KEYS[self.check_key(key)].type]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      raise TypeError(f"'{key}' takes {kinds[0].__name__}, got {type(value).__name__}")
    with self._lock():
      fd, tmp = tempfile.mkstemp(dir=self.path, prefix=".tmp")
      try:
        with os.fdopen(fd, "wb") as f:
          f.write(encode(value))
          f.flush()
          os.fsync(f.fileno())
        os.replace(tmp, self.path / key)
      except BaseException:
        with contextlib.suppress(FileNotFoundError):
          os.unlink(tmp)
        raise
      self._sync()

  def put_bool(self, key: str, value: bool, block: bool = False) -> None:
    self.put(key, bool(value), block)

  def remove(self, key: str) -> None:
    with self._lock():
      (self.path / self.check_key(key)).unlink(missing_ok=True)
      self._sync()

  def clear_all(self, flag: ParamKeyFlag = ParamKeyFlag.ALL) -> None:
    with self._lock():
      for key, spec in KEYS.items():
        if spec.flags & flag:
          (self.path / key).unlink(missing_ok=True)
      for leftover in self.path.glob(".tmp*"):  # of a writer that was killed; none writes while we hold the lock
        leftover.unlink(missing_ok=True)
      self._sync()

  @contextlib.contextmanager
  def _lock(self):
    with open(self.lock_path, "a") as f:
      fcntl.flock(f, fcntl.LOCK_EX)
      yield

  def _sync(self) -> None:
    fd = os.open(self.path, os.O_RDONLY)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)
