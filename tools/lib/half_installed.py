"""Run by tools/op.sh after an installation that was killed. pip regards a package as installed once its metadata is
there, and would leave it incomplete.

Removes the metadata of each package of this environment whose files are not all there in full, so that pip installs it
anew, and where there is one, op.sh's own notes of what is installed. Imports nothing of ours: nothing may be installed
yet."""

import csv
import shutil
import sys
import sysconfig
from pathlib import Path


def half_installed(site: Path) -> list[Path]:
  """site: a site-packages folder -> the .dist-info folders in it whose RECORD is missing, or names a file that is
  missing or of another size."""
  return [info for info in sorted(site.glob("*.dist-info")) if not _whole(site, info)]


def _whole(site: Path, info: Path) -> bool:
  try:
    rows = list(csv.reader((info / "RECORD").read_text().splitlines()))
    return (info / "INSTALLER").is_file() and all(
      not size or (site / name).stat().st_size == int(size) for name, _, size in rows
    )  # pip writes INSTALLER last
  except (OSError, ValueError):
    return False


if __name__ == "__main__":
  for info in half_installed(Path(sysconfig.get_paths()["purelib"])):
    print(f"{info.name.removesuffix('.dist-info')} is half installed; it will be installed again")
    shutil.rmtree(info)
    for note in Path(sys.prefix).glob(".installed-*"):
      note.unlink()
