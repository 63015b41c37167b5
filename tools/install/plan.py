"""The overlay as a plan in memory: each file before and after. It is written only when all of it fits, and restored
where writing fails."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from openpilot.selfdrive.modeld.fair.artifact import write_atomic
from openpilot.selfdrive.modeld.fair.bundle import DEFAULT, MANIFEST, BundleError, load_bundle
from openpilot.tools.install.blocks import Damaged, Missing, insert, strip
from openpilot.tools.install.edits import FileEdit, Refused, file_edits
from openpilot.tools.install.layout import (
  Layout,
  blob_hash,
  committed,
  committed_hashes,
  decode,
  ignored,
  plain,
  read,
  unmerged,
)
from openpilot.tools.lib.errors import UserError

HERE = Path(__file__).resolve().parents[2]
LIST = "overlay.json"  # in the installed folder: what was installed, with hashes
LEFT_BEHIND = ("__pycache__", "compiled", "built")


@dataclass
class Change:
  name: str
  before: bytes | None  # None: not there
  after: bytes | None
  what: str  # in words


@dataclass
class Plan:
  layout: Layout
  changes: list[Change] = field(default_factory=list)
  notes: list[str] = field(default_factory=list)
  folders: list[Path] = field(default_factory=list)  # of derived files, to be removed on --uninstall
  laid: bool = False  # something of ours is installed already
  bundles: list[str] = field(default_factory=list)

  def add(self, name: str, before: bytes | None, after: bytes | None, what: str) -> None:
    if before != after:
      self.changes.append(Change(name, before, after, what))


@dataclass(frozen=True)
class Laid:
  """The contents of the checkout's overlay.json. Where upstream has moved its code into openpilot/, an older one may be
  left."""

  lists: tuple[str, ...]
  files: dict[str, str]  # name -> sha256
  edited: tuple[str, ...]

  def bundles(self) -> list[str]:
    return sorted({n.split("/")[-2] for n in self.files if n.endswith(f"/{MANIFEST}")})


def sha(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def read_lists(layout: Layout) -> Laid:
  lists: list[str] = []
  files: dict[str, str] = {}
  edited: list[str] = []
  for where in [layout, Layout(layout.root, "")] if layout.package else [layout]:
    name = f"{where.folder}/{LIST}"
    data = read(plain(layout, name))
    if data is None:
      continue
    try:
      said = json.loads(decode(name, data))
      good = all(isinstance(v, str) for v in said["files"].values()) and all(isinstance(n, str) for n in said["edited"])
      good = good and all(n.startswith((f"{where.folder}/", f"{where.models}/")) for n in said["files"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      good = False
    if not good:
      raise UserError(f"{name} is not the overlay's list; restore it from git: git checkout -- {name}")
    lists.append(name)
    files |= said["files"]
    edited += said["edited"]
  for n in (*files, *edited):
    plain(layout, n)
  return Laid(tuple(lists), files, tuple(edited))


# *** openpilot's files ***


def pristine(layout: Layout, edit: FileEdit, head: bytes | None) -> tuple[bytes | None, str]:
  """(the file's bytes, its text without our blocks). Raises UserError where it has changes that are not committed."""
  data = read(plain(layout, edit.name))
  try:
    text = strip(decode(edit.name, data or b""), edit.comment)
    was = strip(decode(f"{edit.name} in HEAD", head or b""), edit.comment)
  except Damaged as e:
    raise UserError(f"{edit.name}: {e}; restore the file from git, or repair its marks") from None
  if text != was:
    raise UserError(f"{edit.name} has changes that are not committed; commit or stash them first, nothing was written")
  return data, text


def plan_edits(plan: Plan, laid: Laid, lay: bool) -> list[str]:
  """Adds the edits, or their removal. Returns the names of the files that then have a block."""
  edits = file_edits(plan.layout)
  known = {e.name for e in edits}
  edits += [
    FileEdit(n, lambda text: [], "//" if n.endswith((".h", ".cc")) else "#", needed=False)
    for n in laid.edited
    if n not in known
  ]
  conflicts, heads = unmerged(plan.layout), committed(plan.layout, [e.name for e in edits])
  with_block = []
  for e in edits:
    if e.name in conflicts:
      raise UserError(f"{e.name} is in the middle of a merge; finish the merge first")
    there = plain(plan.layout, e.name).is_file()
    if not there and not e.new:
      if lay and e.needed:
        raise UserError(f"{e.name} is missing; is this a complete openpilot checkout?")
      if lay and e.name in known:
        plan.notes.append(f"{e.name} is not there: left alone")
      continue
    data, text = pristine(plan.layout, e, heads.get(e.name))
    plan.laid |= data is not None and data != text.encode()
    new = text
    if lay:
      try:
        new = insert(text, e.edit(text), e.comment)
      except Missing as m:
        if e.needed:
          raise UserError(f"{e.name}: did not find {m}; nothing was written") from None
        plan.notes.append(f"{e.name}: did not find {m}: left alone")
      except Refused as r:
        raise UserError(f"{e.name}: {r}") from None
    if new != text:
      with_block.append(e.name)
    after = None if not new and e.new and e.name not in heads else new.encode()
    plan.add(e.name, data, after, "edit" if lay else "take out")
  return with_block


# *** the folder and its bundles ***


def folder_files(source: Path, target: str) -> dict[str, bytes]:
  """target/... -> bytes of a folder's files, without files that are built from them."""
  found = {}
  for path in sorted(source.rglob("*")):
    inside = path.relative_to(source)
    if (
      path.is_file()
      and not any(p in LEFT_BEHIND or p.startswith(".") for p in inside.parts)
      and path.suffix != ".pyc"
      and inside.name != LIST
    ):
      found[f"{target}/{inside.as_posix()}"] = path.read_bytes()
  return found


def bundle_files(layout: Layout, laid: Laid, wanted: list[str] | None) -> tuple[list[str], dict[str, bytes]]:
  """(names of the bundles, their files). wanted: names in models/ or folders; None: the installed ones, else the
  default one."""
  kept = laid.bundles()
  names: list[str] = []
  files: dict[str, bytes] = {}
  for given in wanted or kept or [DEFAULT]:
    source = Path(given) if "/" in given else HERE / "models" / given
    if not wanted and given in kept and not source.is_dir():
      # the user's own bundle: the installed copy stays
      source = layout.root / next(n for n in laid.files if n.endswith(f"/{given}/{MANIFEST}")).rsplit("/", 1)[0]
    try:
      bundle = load_bundle(source)
    except BundleError as e:
      raise UserError(f"--bundle {given}: {e}") from None
    name = bundle.path.resolve().name
    if name in names:
      raise UserError(f"--bundle {given}: a bundle named {name} is chosen already")
    names.append(name)
    there = folder_files(bundle.path, f"{layout.models}/{name}")
    files |= {n: d for n, d in there.items() if n.rsplit("/", 1)[1] in {MANIFEST, *bundle.manifest["sha256"]}}
  return names, files


def plan_files(plan: Plan, laid: Laid, wanted: dict[str, bytes]) -> None:
  """Adds new, changed and removed files of our own. Raises UserError where a file that would be lost is neither as
  installed nor committed."""
  layout = plan.layout
  head = committed_hashes(layout, sorted({str(Path(n).parent) for n in {*wanted, *laid.files}}))
  for name in sorted({*wanted, *laid.files}):
    data, new = read(plain(layout, name)), wanted.get(name)
    if data is None and new is None:
      continue
    plan.laid |= data is not None and name in laid.files
    as_laid = (
      data is None
      or data == new
      or sha(data) == laid.files.get(name)
      or (name in head and blob_hash(data, head[name]) == head[name])
    )
    if not as_laid:
      known = (
        "was changed since it was installed" if name in laid.files else "is there already and is not the overlay's"
      )
      raise UserError(f"{name} {known}, and that is not committed; commit it or remove it first, nothing was written")
    plan.add(name, data, new, "remove" if new is None else "add" if data is None else "renew")


# *** the whole ***


def plan_overlay(layout: Layout, bundles: list[str] | None = None) -> Plan:
  laid = read_lists(layout)
  plan = Plan(layout, laid=bool(laid.lists))
  edited = plan_edits(plan, laid, lay=True)
  plan.bundles, files = bundle_files(layout, laid, bundles)
  files |= folder_files(HERE / "selfdrive/modeld/fair", layout.folder)
  plan_files(plan, laid, files)
  if hidden := ignored(layout, sorted(files)):
    raise UserError(
      f"{hidden[0]} would be ignored by the checkout's .gitignore, and {len(hidden) - 1} more; remove that rule first"
    )
  said = {
    "about": "What tools/op.sh overlay of openpilot-fair installed here; --uninstall reads it.",
    "edited": sorted(edited),
    "files": {n: sha(d) for n, d in sorted(files.items())},
  }
  name = f"{layout.folder}/{LIST}"
  change = Change(name, read(plain(layout, name)), (json.dumps(said, indent=1) + "\n").encode(), "list")
  if change.before != change.after:
    plan.changes.insert(
      0 if change.before is None else len(plan.changes), change
    )  # written first where nothing is installed: after a kill in the middle it can still be undone
  plan_lists(plan, [n for n in laid.lists if n != name])
  return plan


def plan_uninstall(layout: Layout) -> Plan:
  laid = read_lists(layout)
  plan = Plan(layout, laid=bool(laid.lists))
  if not laid.lists and (layout.root / layout.folder).exists():
    raise UserError(
      f"{layout.folder}/{LIST} is gone, the list of what was installed; run the overlay once without "
      "--uninstall, or remove the folder by hand"
    )
  plan_edits(plan, laid, lay=False)
  plan_files(plan, laid, {})
  plan_lists(plan, laid.lists)
  return plan


def plan_lists(plan: Plan, gone: Iterable[str]) -> None:
  """Removal of the lists, last of all, and of what was built beside each removed file."""
  for name in gone:
    plan.add(name, read(plain(plan.layout, name)), None, "remove")
  folders = {str(Path(c.name).parent) for c in plan.changes if c.what == "remove"}
  plan.folders = [
    p
    for folder in sorted(folders)
    for left in LEFT_BEHIND
    if (p := plan.layout.root / folder / left).is_dir() and not p.is_symlink()
  ]


def carry_out(plan: Plan) -> None:
  """Writes all changes, each file atomically. On any failure, Ctrl-C included, every file is restored; those that
  cannot be are named. Raises UserError."""
  root, done, made = plan.layout.root, [], []
  try:
    for c in plan.changes:
      path = plain(plan.layout, c.name)
      if read(path) != c.before:
        raise UserError(f"{c.name} changed while the overlay was planned; run it again")
      for p in [p for p in reversed(path.parents) if root in p.parents and not p.exists()]:
        p.mkdir()
        made.append(p)
      done.append((c, path.stat().st_mode & 0o777 if c.before is not None else 0))
      put(path, c.after)
  except BaseException as e:
    lost = []
    for c, mode in reversed(done):
      try:
        if read(root / c.name) != c.before:
          put(root / c.name, c.before, mode)
      except OSError:
        lost.append(c.name)
    for p in reversed(made):
      with contextlib.suppress(OSError):  # not empty: a file in it could not be removed
        p.rmdir()
    if lost:
      raise UserError(f"{e}; and these could not be restored, take them from git: {', '.join(lost)}") from e
    if isinstance(e, OSError):
      raise UserError(f"{c.name}: {e.strerror}; everything was restored") from e
    raise
  try:
    remove_derived(plan)
  except OSError as e:
    raise UserError(f"{e.filename}: {e.strerror}; all else is done, remove that by hand") from e


def put(path: Path, data: bytes | None, mode: int = 0) -> None:
  if data is None:
    path.unlink(missing_ok=True)
  else:
    mode = mode or (path.stat().st_mode & 0o777 if path.exists() else 0o755 if data.startswith(b"#!") else 0o644)
    write_atomic(path, data, mode)


def remove_derived(plan: Plan) -> None:
  """Removes empty folders, and on --uninstall what was built from ours."""
  for folder in plan.folders:
    for path in sorted(folder.rglob("*"), reverse=True):
      path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()
  gone = {plan.layout.root / c.name for c in plan.changes if c.after is None}
  for folder in sorted({p for path in gone for p in path.parents if plan.layout.root in p.parents}, reverse=True):
    if folder.is_dir() and not any(folder.iterdir()):
      os.rmdir(folder)
