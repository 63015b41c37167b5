"""Compiled artifacts of a bundle: a pickled jit (or an engine) and, beside it, a sidecar of hashes that says what it
was built from.

A pickle is code, so none comes with a bundle: they lie where this machine keeps its own, or in the tree whose build
made them (trust.py). Bytes are handed out only after the sidecar was found to be ours and their SHA-256 to be the
sidecar's, and those very bytes are handed out; the file is not read twice. Large ones are cut as openpilot cuts its own
(openpilot/common/file_chunker.py)."""

import contextlib
import hashlib
import hmac
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from functools import cache
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, read_file
from openpilot.selfdrive.modeld.fair.trust import (
  BUILT,
  LIST,
  TrustError,
  data_root,
  in_tree,
  listed,
  mac,
  private_folder,
)

FOREIGN = "compiled"  # in a bundle's folder, as they once came: never looked into
KEPT = 8  # manifests whose artifacts are kept; older ones are deleted
MAX_SIDECAR, MAX_SIZE, MAX_REASON = 1 << 16, 2 << 30, 300  # bytes, bytes, characters
CHUNK_SIZE = 45 * 1024 * 1024  # openpilot's, under what its hosts take as one file
FORMAT = 3
SUFFIX = {"tensorrt": "engine"}  # of a target's files; else pkl
TINYGRAD_FILES = (
  "device.py",
  "dtype.py",
  "engine/jit.py",
  "engine/realize.py",
  "runtime/ops_cpu.py",
  "uop/ops.py",
)  # what a pickled jit is made of


class ArtifactError(ValueError):
  """An artifact that must not be used. The message says why, and what to do."""


def folder_of(bundle: Bundle, folder: Path | None = None) -> Path:
  """Where a bundle's artifacts are written, by default on this machine's own side."""
  return data_root() / "artifacts" / key_of(bundle) if folder is None else folder


def key_of(bundle: Bundle) -> str:
  return bundle.manifest_hash[:32]


def tree_folder(bundle: Bundle) -> Path:
  """Where the tree's own build puts them."""
  return BUILT / key_of(bundle)


def ignored(path: Path) -> str | None:
  """What to say of a folder of artifacts that came with a bundle; None where there is none."""
  return (
    f"{path / FOREIGN} came with the bundle and is ignored: what runs here is compiled here"
    if (path / FOREIGN).exists()
    else None
  )


def stem(graph: str, target: str) -> str:
  return f"{graph}.{target}"


@cache
def package_version(package: str) -> str:
  """The installed package's version, '' where there is none; of tinygrad with a hash of what its pickles depend on:
  checkouts of one version differ."""
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


def write_artifact(folder: Path, name: str, blob: bytes, about: dict[str, Any], chunk_size: int = CHUNK_SIZE) -> Path:
  """blob -> <name>.pkl, or its chunks, then the sidecar <name>.json: what is read in between fails its hash. Returns
  the sidecar's path.

  about: what must hold for the artifact to be used, see read_artifact(), and its target."""
  tree = in_tree(folder)
  if not tree:
    private_folder()
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
  if not tree:
    said["mac"] = mac(said, make=True)
  text = (json.dumps(said, indent=1) + "\n").encode()
  write_atomic(sidecar, text)
  if tree:
    there: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
      there = json.loads((folder / LIST).read_text())
    write_atomic(
      folder / LIST, (json.dumps({**there, sidecar.name: hashlib.sha256(text).hexdigest()}, indent=1) + "\n").encode()
    )
  for old in folder.glob(f"{file}*"):
    if old.name not in names and not (n > 1 and old.name == manifest):
      old.unlink(missing_ok=True)
  return sidecar


def prune(folder: Path) -> list[Path]:
  """Deletes what was compiled of older manifests than the KEPT newest, beside `folder`, which stays. -> what went."""

  def age(p: Path) -> float:
    return p.stat().st_mtime if p != folder else float("inf")

  gone = sorted((p for p in folder.parent.iterdir() if p.is_dir() and not p.is_symlink()), key=age, reverse=True)[KEPT:]
  for path in gone:
    shutil.rmtree(path, ignore_errors=True)
  return gone


def note_failure(folder: Path, name: str, why: str | None) -> None:
  """Keeps why a graph could not be compiled, for whoever misses its artifact; None: it could."""
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.failed"
    if why is None:
      path.unlink(missing_ok=True)
    else:
      write_atomic(path, why[:MAX_REASON].encode())


def why_not(folder: Path, name: str) -> str:
  """What compiling said when it failed, '' where it did not."""
  with contextlib.suppress(OSError, BundleError):
    return f" (compiling it failed: {read_file(folder / f'{name}.failed', 4 * MAX_REASON).decode(errors='replace')})"
  return ""


def read_sidecar(folder: Path, name: str) -> dict[str, Any]:
  """What a sidecar says, after it was found to be this machine's or the tree's own. Raises ArtifactError."""
  path = folder / f"{name}.json"
  try:
    if not path.is_file():
      raise ArtifactError(
        f"no artifact {path}{why_not(folder, name)}; build it with compile.py, a device does while it is offroad"
      )
    raw = read_file(path, MAX_SIDECAR)
    said = json.loads(raw)
  except ArtifactError:
    raise
  except (OSError, ValueError, RecursionError) as e:
    raise ArtifactError(f"{path} is not readable JSON ({str(e)[:100]}); build it again with compile.py") from None
  files = said.get("files") if isinstance(said, dict) else None
  if (
    not isinstance(files, list)
    or not files
    or not all(isinstance(f, str) and f.startswith(f"{name}.") and "/" not in f for f in files)
  ):
    raise ArtifactError(f"{path} names no files of its own; build it again with compile.py")
  try:
    if in_tree(folder):
      ours = listed(folder, path.name) == hashlib.sha256(raw).hexdigest()
    else:
      ours = hmac.compare_digest(str(said.get("mac")).encode(), mac(said).encode())
  except (TrustError, OSError) as e:
    raise ArtifactError(f"{path} is not trusted: {e}") from None
  if not ours:
    raise ArtifactError(
      f"{path} was not written {'by the build of this tree' if in_tree(folder) else 'on this machine'}; it was not "
      "opened: build it again"
    )
  return said


def read_artifact(
  bundle: Bundle, graph: str, target: str, must: dict[str, Any], folder: Path | None = None
) -> tuple[bytes, dict[str, Any]]:
  """(bytes, sidecar) of a graph's artifact, checked. must: entries that the sidecar has to agree with, besides the
  manifest's hash, graph, target and format.

  folder: where it is; by default this machine's own, else the tree's. Raises ArtifactError where it is absent, not
  ours, of another manifest, machine or version, or where its bytes are not those that were written."""
  if folder is None:
    try:
      return read_artifact(bundle, graph, target, must, folder_of(bundle))
    except ArtifactError:
      if not (tree_folder(bundle) / f"{stem(graph, target)}.json").is_file():
        raise
      return read_artifact(bundle, graph, target, must, tree_folder(bundle))
  name = stem(graph, target)
  said = read_sidecar(folder, name)
  for key, wanted in {
    "format": FORMAT,
    "manifest": bundle.manifest_hash,
    "graph": graph,
    "target": target,
    **must,
  }.items():
    if said.get(key) != wanted:
      was = str(said.get(key))[:40]
      raise ArtifactError(
        f"{folder / name}.json was built for {key} {was}, here it is {str(wanted)[:40]}; build it again with compile.py"
      )
  left = min(MAX_SIZE, int(said["size"]))
  parts = []
  for f in said["files"]:
    try:
      parts.append(read_file(folder / f, left))
    except BundleError as e:
      raise ArtifactError(f"{e}; build it again with compile.py") from None
    left -= len(parts[-1])
  blob = b"".join(parts)
  actual = hashlib.sha256(blob).hexdigest()
  if actual != said.get("sha256"):
    wanted = str(said.get("sha256"))[:12]
    raise ArtifactError(
      f"{folder / said['files'][0]} has sha256 {actual[:12]}..., its sidecar says {wanted}...; it was not opened: "
      "build it again"
    )
  return blob, said
