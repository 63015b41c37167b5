"""Which folder an export may write, and the exchange of an old bundle for the new one: nothing that is no bundle is
ever deleted."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from openpilot.selfdrive.modeld.fair.artifact import FOREIGN
from openpilot.selfdrive.modeld.fair.bundle import MANIFEST, schema, violation
from openpilot.tools.lib.errors import UserError

CARD = "README.md"


def foreign(folder: Path) -> str | None:
  """What makes `folder` something else than a bundle, in words; None where it is one, whole or damaged, or is empty."""
  there = sorted(folder.iterdir())
  if not there:
    return None
  try:
    manifest = json.loads((folder / MANIFEST).read_text())
    own = {MANIFEST, CARD, *manifest["sha256"], *(g["file"] for g in manifest["graphs"])}
  except FileNotFoundError:
    return f"has no {MANIFEST}, but {there[0].name}"
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    return f"has a {MANIFEST} of something else"
  more = [
    p.name
    for p in there
    if not (p.is_file() and not p.is_symlink() and p.name in own) and not (p.name == FOREIGN and p.is_dir())
  ]
  return f"has {more[0]}, which is no part of the bundle" if more else None


def check_out(out: Path, run: Path) -> None:
  """Raises UserError where `out` is not there to be written or replaced: a file, a link, the run or what it lies in, a
  folder with anything but a bundle, or one whose name no bundle may have."""
  if not out.name or out.name == "..":
    raise UserError(f"--output {out} names no folder of the bundle's own; give one, as models/NAME")
  if violation(out.name, schema()["properties"]["name"]):
    raise UserError(
      f"--output {out}: a bundle is called as its folder is, and '{out.name}' is no name of one: a to z, 0 to 9, '_', "
      "'.', '-', the first a letter or a digit, at most 64"
    )
  whole, source = out.resolve(), run.resolve()
  if whole == source or whole in source.parents:
    raise UserError(
      f"--output {out} {'is' if whole == source else 'holds'} the run {run}, which would be lost; choose another "
      "folder, as models/NAME"
    )
  if out.is_symlink() or (out.exists() and not out.is_dir()):
    raise UserError(f"--output {out} is {'a link' if out.is_symlink() else 'a file'}; choose a folder, as models/NAME")
  if not out.exists():
    return
  if (why := foreign(out)) is not None:
    inside = next(out.glob(f"*/{MANIFEST}"), None)
    hint = (
      f"; it holds bundles, as {inside.parent.name}: name one of its own, as {out / 'NAME'}"
      if inside is not None
      else ""
    )
    raise UserError(
      f"--output {out} {why}, and would be replaced "
      f"whole{hint or '; choose a new or an empty folder, or one that holds a bundle'}"
    )


@contextlib.contextmanager
def new_bundle(out: Path, run: Path) -> Iterator[Path]:
  """A folder beside `out` to fill, which takes its place when the block ends well, and is removed when it does not. The
  old bundle is moved aside before the new one comes, and deleted behind it, so that at no moment both are gone. Raises
  UserError as check_out() does."""
  check_out(out, run)
  out.parent.mkdir(parents=True, exist_ok=True)
  folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
  aside = out.with_name(f".{out.name}.old{os.getpid()}")
  try:
    yield folder
    check_out(out, run)  # again: it took minutes
    folder.chmod(0o755)
    old = out.exists()
    if old:
      out.rename(aside)
    try:
      folder.rename(out)
    except OSError:
      if old:
        aside.rename(out)
      raise
    if old:
      shutil.rmtree(aside)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
