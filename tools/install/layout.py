"""Where files are in an openpilot checkout of either layout, and which of them git has committed or ignores."""

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from openpilot.tools.lib.errors import UserError

MAX_TEXT = 8 << 20  # bytes of a file that is edited


@dataclass(frozen=True)
class Layout:
  root: Path  # the checkout
  package: str  # "openpilot/" since June 2026, before that ""

  @property
  def name(self) -> str:
    return "nested layout (openpilot/ holds the code)" if self.package else "root layout (openpilot/ holds links)"

  @property
  def folder(self) -> str:
    return f"{self.package}selfdrive/modeld/fair"

  @property
  def models(self) -> str:
    return f"{self.package}models"

  def first(self, *names: str) -> str | None:
    """The first of these files, named from the package, that exists."""
    return next((self.package + n for n in names if (self.root / self.package / n).is_file()), None)


def git(root: Path, *args: str, stdin: bytes = b"", ok: tuple[int, ...] = (0,)) -> bytes:
  """git's output; the checkout's hooks and file system monitor are not run. Raises UserError with git's message where
  it fails."""
  command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", "-c", "core.quotepath=false", *args]
  try:
    r = subprocess.run(command, input=stdin, capture_output=True, check=False)
  except FileNotFoundError:
    raise UserError("git is not on the path; the overlay needs it to see what is committed") from None
  if r.returncode not in ok:
    raise UserError(
      f"git {args[0]} in {root}: {r.stderr.decode(errors='replace').strip() or f'exit code {r.returncode}'}"
    )
  return r.stdout


def find_layout(path: Path) -> Layout:
  """The checkout at `path`. Raises UserError where there is none, or where it is no git checkout of its own."""
  if not path.is_dir():
    raise UserError(f"{path} is no folder; give the folder of an openpilot checkout")
  root = path.resolve()
  nested = root / "openpilot" / "cereal" / "log.capnp"
  if nested.is_file() and not nested.parent.is_symlink():
    layout = Layout(root, "openpilot/")
  elif (root / "cereal" / "log.capnp").is_file():
    layout = Layout(root, "")
  else:
    raise UserError(
      f"{path} is no openpilot checkout: neither openpilot/cereal/log.capnp nor cereal/log.capnp is there"
    )
  if (root / layout.folder).exists() and (root / layout.folder).samefile(
    Path(__file__).resolve().parents[2] / "selfdrive/modeld/fair"
  ):
    raise UserError(f"{path} is this project itself; give the folder of an openpilot checkout")
  try:
    top = Path(os.fsdecode(git(root, "rev-parse", "--show-toplevel").rstrip(b"\n")))
  except UserError as e:
    raise UserError(
      f"{path} is no git checkout ({e}); git init and commit it first, so that the overlay can be seen and undone"
    ) from None
  if top.resolve() != root:
    raise UserError(f"{path} lies inside the git checkout {top}; give that, or git init and commit it on its own")
  if not git(root, "rev-parse", "--verify", "--quiet", "HEAD", ok=(0, 1)):
    raise UserError(f"nothing is committed in {path}; commit it first, so that the overlay can be seen and undone")
  return layout


def plain(layout: Layout, name: str) -> Path:
  """The path of a file of the checkout. Raises UserError where a link leads elsewhere, or where it is no plain file."""
  parts = name.split("/")
  if ".." in parts or "" in parts or not name.isprintable():
    raise UserError(f"{name!r} is not a file of the checkout")
  path = layout.root
  for part in parts:
    path = path / part
    if path.is_symlink():
      raise UserError(f"{path} is a link; the overlay writes only plain files of the checkout")
  if path.exists() and not path.is_file():
    raise UserError(f"{path} is no plain file")
  return path


def read(path: Path) -> bytes | None:
  """The file's bytes, None where there is none."""
  try:
    return path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    return None


def decode(name: str, data: bytes) -> str:
  if len(data) > MAX_TEXT:
    raise UserError(f"{name} has {len(data)} bytes, too many for a source file")
  if b"\r" in data:
    raise UserError(f"{name} has Windows line ends; check it out with core.autocrlf=false")
  try:
    return data.decode()
  except UnicodeDecodeError as e:
    raise UserError(f"{name} is not UTF-8 at byte {e.start}") from None


def committed(layout: Layout, names: list[str]) -> dict[str, bytes]:
  """name -> bytes of those of the files that are in HEAD."""
  out = git(layout.root, "cat-file", "--batch", stdin="".join(f"HEAD:{n}\n" for n in names).encode())
  found, at = {}, 0
  for name in names:
    end = out.index(b"\n", at)
    about, at = out[at:end], end + 1
    if about.endswith(b" missing"):
      continue
    kind, size = about.split()[-2:]
    if kind == b"blob":
      found[name] = out[at : at + int(size)]
    at += int(size) + 1
  return found


def committed_hashes(layout: Layout, folders: list[str]) -> dict[str, str]:
  """name -> git's hash of all files of these folders in HEAD."""
  out = git(layout.root, "ls-tree", "-r", "-z", "HEAD", "--", *folders)
  entries = [e.split("\t", 1) for e in out.decode(errors="surrogateescape").split("\0") if e]
  return {name: about.split()[2] for about, name in entries}


def blob_hash(data: bytes, like: str) -> str:
  """git's hash of a file's bytes, SHA-1 or SHA-256 as `like`."""
  kind = "sha256" if len(like) == 64 else "sha1"
  return hashlib.new(kind, b"blob %d\0" % len(data) + data).hexdigest()


def unmerged(layout: Layout) -> set[str]:
  out = git(layout.root, "ls-files", "--unmerged", "-z").decode(errors="surrogateescape")
  return {e.split("\t", 1)[1] for e in out.split("\0") if e}


def ignored(layout: Layout, names: list[str]) -> list[str]:
  """Those of the files that the checkout's .gitignore hides from git."""
  if not names:
    return []
  stdin = "\0".join(names).encode(errors="surrogateescape")
  return [
    n
    for n in git(layout.root, "check-ignore", "-z", "--stdin", stdin=stdin, ok=(0, 1))
    .decode(errors="surrogateescape")
    .split("\0")
    if n
  ]
