"""Whose code an artifact is: this machine's, by a MAC with a key that only its owner can read, or the openpilot tree's,
by a list that its build left in it.

A bundle is data and may come from anywhere; what was compiled from it is code, and lies elsewhere."""

import contextlib
import hashlib
import hmac
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import BundleError, read_file

KEY_SIZE = 32  # bytes
PURPOSE = b"openpilot-fair artifact\0"
CODE = Path(__file__).resolve()
BUILT = CODE.parent / "built"  # where the tree's build puts its artifacts, beside the code: a folder for each manifest
LIST = "artifacts.json"  # in each of them: {sidecar's name: its sha256}
MAX_LIST = 1 << 16  # bytes


class TrustError(ValueError):
  """One line: what is not trusted, and what to do."""


def data_root() -> Path:
  """Where this machine keeps what it compiled, and its key: /data/fair on a device, in the user's cache on a PC, or
  FAIR_DATA_DIR."""
  if said := os.environ.get("FAIR_DATA_DIR"):
    return Path(said)
  if os.path.isfile("/TICI"):  # as openpilot knows its device
    return Path("/data/fair")
  return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "openpilot-fair"


def private_folder() -> Path:
  """data_root(), made where it is not there, which nobody else may write to. Raises TrustError."""
  root = data_root()
  try:
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    st = root.stat()
    if st.st_uid != os.geteuid():
      raise TrustError(f"{root} belongs to another user; set FAIR_DATA_DIR to a folder of your own")
    if st.st_mode & 0o022:
      root.chmod(stat.S_IMODE(st.st_mode) & ~0o022)
  except OSError as e:
    raise TrustError(f"{root} cannot be used: {e.strerror}") from None
  return root


def make_key(path: Path) -> None:
  """All or nothing; of two processes that make it at once the first one's stays."""
  fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=".key")  # mode 0600
  try:
    with os.fdopen(fd, "wb") as f:
      f.write(os.urandom(KEY_SIZE))
      f.flush()
      os.fsync(f.fileno())
    with contextlib.suppress(FileExistsError):
      os.link(tmp, path)
  finally:
    os.unlink(tmp)


def machine_key(make: bool = False) -> bytes:
  """KEY_SIZE bytes that this user alone can read. make: where there is none. Raises TrustError, also on one that others
  could have read or put there."""
  path = private_folder() / "key"
  try:
    if make and not os.path.lexists(path):
      make_key(path)
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
  except FileNotFoundError:
    raise TrustError(f"nothing was compiled here yet: there is no {path}") from None
  except OSError as e:
    raise TrustError(f"{path} cannot be used: {e.strerror}") from None
  with os.fdopen(fd, "rb") as f:
    st = os.fstat(fd)
    wrong = (
      "is no file"
      if not stat.S_ISREG(st.st_mode)
      else "belongs to another user"
      if st.st_uid != os.geteuid()
      else f"can be read or written by others (mode {stat.S_IMODE(st.st_mode):04o})"
      if st.st_mode & 0o077
      else f"has {st.st_size} bytes, not {KEY_SIZE}"
      if st.st_size != KEY_SIZE
      else None
    )
    if wrong is not None:
      raise TrustError(f"{path} {wrong}; delete it, and compile again")
    return f.read(KEY_SIZE)


def mac(said: dict[str, Any], make: bool = False) -> str:
  """HMAC-SHA256 of what a sidecar says, its own entry left out."""
  text = json.dumps({k: v for k, v in said.items() if k != "mac"}, sort_keys=True, separators=(",", ":"))
  return hmac.new(machine_key(make), PURPOSE + text.encode(), hashlib.sha256).hexdigest()


def in_tree(folder: Path) -> bool:
  return folder.resolve().parent == BUILT


def as_the_code(path: Path, code: Path) -> None:
  """Raises TrustError where `path` is a link, of another owner than the code, or open to more writers."""
  st, ours = path.lstat(), code.stat()
  if stat.S_ISLNK(st.st_mode) or st.st_uid != ours.st_uid or st.st_mode & 0o022 & ~ours.st_mode:
    raise TrustError(
      f"{path} is not as the code beside it: a link, of another owner, or writable by more; build the tree again"
    )


def listed(folder: Path, name: str) -> str | None:
  """sha256 of a sidecar in a folder of the tree's build, by its list; None where the list has none. Raises TrustError,
  and FileNotFoundError without a list."""
  for path, code in ((BUILT, CODE.parent), (folder, CODE.parent), (folder / LIST, CODE)):
    as_the_code(path, code)
  try:
    found = json.loads(read_file(folder / LIST, MAX_LIST))
  except (BundleError, ValueError, RecursionError) as e:
    raise TrustError(f"{folder / LIST} is no list of artifacts ({str(e)[:100]}); build the tree again") from None
  value = found.get(name) if isinstance(found, dict) else None
  return value if isinstance(value, str) else None
