"""Compiled artefacts of a bundle: a pickled jit (or an engine) and, beside it, a sidecar of hashes that says what it was built from.

A pickle is code. Bytes are handed out only after their SHA-256 was found to be the sidecar's, and those very bytes are handed out; the file is not read twice.
Large ones are cut as openpilot cuts its own (openpilot/common/file_chunker.py).
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import Bundle

FOLDER = "compiled"  # in the bundle's own: it goes with the bundle and is no part of it
CHUNK_SIZE = 45 * 1024 * 1024  # openpilot's, under what its hosts take as one file
FORMAT = 2
SUFFIX = {"tensorrt": "engine"}  # of a target's files; else pkl
TINYGRAD_FILES = ("device.py", "dtype.py", "engine/jit.py", "engine/realize.py", "runtime/ops_cpu.py", "uop/ops.py")  # what a pickled jit is made of


class ArtefactError(ValueError):
  """An artefact that must not be used. The message says why, and what to do."""


def folder_of(bundle: Bundle, folder: Path | None = None) -> Path:
  return bundle.path / FOLDER if folder is None else folder


def stem(graph: str, target: str) -> str:
  return f"{graph}.{target}"


@cache
def package_version(package: str) -> str:
  """The installed package's version, '' where there is none; of tinygrad with a hash of what its pickles depend on: checkouts of one version differ."""
  spec = importlib.util.find_spec(package)
  if spec is None:
    return ""
  try:
    version = importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:  # openpilot's submodule, on the path without being installed
    version = "0"
  if package == "tinygrad" and spec.origin is not None:
    h = hashlib.sha256()
    for name in TINYGRAD_FILES:
      with contextlib.suppress(OSError):
        h.update((Path(spec.origin).parent / name).read_bytes())
    version += f"+{h.hexdigest()[:8]}"
  return version


@cache
def machine() -> str:
  """What machine code depends on: the architecture, and of the CPU's abilities a hash, where the system lists them."""
  with contextlib.suppress(OSError):
    for line in Path("/proc/cpuinfo").read_text().splitlines():
      if line.startswith(("flags", "Features")):
        return f"{platform.machine()}+{hashlib.sha256(line.encode()).hexdigest()[:8]}"
  return platform.machine()


def write_atomic(path: Path, data: bytes | memoryview, mode: int = 0o644) -> None:
  """All or nothing, and safe from a loss of power: a car is switched off when it is."""
  tmp = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with open(tmp, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    tmp.chmod(mode)
    os.replace(tmp, path)
  finally:
    tmp.unlink(missing_ok=True)


def write_artefact(folder: Path, name: str, blob: bytes, about: dict[str, Any], chunk_size: int = CHUNK_SIZE) -> Path:
  """blob -> <name>.pkl, or its chunks, then the sidecar <name>.json: what is read in between fails its hash. Returns the sidecar's path.

  about: what must hold for the artefact to be used, see read_artefact(), and its target.
  """
  folder.mkdir(parents=True, exist_ok=True)
  file, n = f"{name}.{SUFFIX.get(about['target'], 'pkl')}", max(1, -(-len(blob) // chunk_size))
  names = [file] if n == 1 else [f"{file}.chunk{i + 1:02d}of{n:02d}" for i in range(n)]
  view = memoryview(blob)
  for i, part in enumerate(names):
    write_atomic(folder / part, view[i * chunk_size : (i + 1) * chunk_size])
  manifest = f"{file}.chunkmanifest"
  if n > 1:
    write_atomic(folder / manifest, str(n).encode())
  sidecar = folder / f"{name}.json"
  said = {"format": FORMAT, **about, "size": len(blob), "sha256": hashlib.sha256(blob).hexdigest(), "files": names}
  write_atomic(sidecar, (json.dumps(said, indent=1) + "\n").encode())
  for old in folder.glob(f"{file}*"):
    if old.name not in names and not (n > 1 and old.name == manifest):
      old.unlink(missing_ok=True)
  return sidecar


def read_sidecar(folder: Path, name: str) -> dict[str, Any]:
  path = folder / f"{name}.json"
  try:
    said = json.loads(path.read_bytes())
  except FileNotFoundError:
    raise ArtefactError(f"no artefact {path}; build it with compile.py") from None
  except (OSError, ValueError) as e:
    raise ArtefactError(f"{path} is not readable JSON ({e}); build it again with compile.py") from None
  files = said.get("files") if isinstance(said, dict) else None
  if not isinstance(files, list) or not files or not all(isinstance(f, str) and f.startswith(f"{name}.") and "/" not in f for f in files):
    raise ArtefactError(f"{path} names no files of its own; build it again with compile.py")
  return said


def read_artefact(bundle: Bundle, graph: str, target: str, must: dict[str, Any], folder: Path | None = None) -> tuple[bytes, dict[str, Any]]:
  """(bytes, sidecar) of a graph's artefact, checked. must: entries that the sidecar has to agree with, besides the manifest's hash, graph, target and format.

  Raises ArtefactError where it is absent, of another manifest or another machine or version, or where its bytes are not those that were written.
  """
  folder, name = folder_of(bundle, folder), stem(graph, target)
  said = read_sidecar(folder, name)
  for key, wanted in {"format": FORMAT, "manifest": bundle.manifest_hash, "graph": graph, "target": target, **must}.items():
    if said.get(key) != wanted:
      was = str(said.get(key))[:40]
      raise ArtefactError(f"{folder / name}.json was built for {key} {was}, here it is {str(wanted)[:40]}; build it again with compile.py")
  try:
    blob = b"".join((folder / f).read_bytes() for f in said["files"])
  except OSError as e:
    raise ArtefactError(f"{folder / name}: {e.strerror} of {Path(e.filename or '').name}; build it again with compile.py") from None
  actual = hashlib.sha256(blob).hexdigest()
  if actual != said.get("sha256"):
    wanted = str(said.get("sha256"))[:12]
    raise ArtefactError(f"{folder / said['files'][0]} has sha256 {actual[:12]}..., its sidecar says {wanted}...; it was not opened: build it again")
  return blob, said
