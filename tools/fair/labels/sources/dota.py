"""DOTA's folders: images/, and in labelTxt*/ a text file for each picture, a line for each object:
x1 y1 x2 y2 x3 y3 x4 y4 category difficult, pixels counted from the corner. Or a folder of such parts, as train/ and
val/."""

from collections import Counter
from pathlib import Path

import numpy as np

from openpilot.tools.fair.labels.sources.coco import Annotation, said_of, say_counts
from openpilot.tools.fair.labels.sources.pictures import Carries, Pictures, Still, below, look_at, plain_name
from openpilot.tools.fair.labels.sources.source import Said, SourceOptions
from openpilot.tools.fair.labels.sources.yolo import LABELS_LIMIT, SPLITS
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import LONG, MANY, read_bytes
from openpilot.tools.lib.pictures import find_pictures

LABELS = "labelTxt*"
HEAD = ("imagesource:", "gsd:")  # lines before the objects
FARTHEST = 1e6  # pixels


def read_labels(path: Path, width: int, height: int, left_out: Counter[str]) -> list[tuple[str, np.ndarray, bool]]:
  """-> (category, (4, 2) corners, difficult) of each object of one picture. What is no label is counted."""
  out = []
  for line in read_bytes(path, LABELS_LIMIT).decode("utf-8", "replace").splitlines():
    words = line.split()
    if not words or line.strip().startswith(HEAD):
      continue
    try:
      values = [float(w) for w in words[:8]]
      difficult = int(words[9]) if len(words) > 9 else 0  # some cut pictures have none
    except ValueError:
      values, difficult = [], 0
    if len(words) not in (9, 10) or len(values) != 8 or not all(abs(v) < FARTHEST for v in values):  # nan neither
      left_out["lines that are no object of DOTA's"] += 1
      continue
    corners = np.array(values).reshape(4, 2)
    low, high = corners.min(0), corners.max(0)
    if (np.minimum(high, [width, height]) <= np.maximum(low, 0)).any():
      left_out["objects that are empty, or outside the picture"] += 1
      continue
    out.append((words[8], corners, difficult > 0))
  return out


class DotaPart(Pictures):
  def said(self, row: int) -> Said:
    still = self.stills[row]
    said = said_of(still.more, still)
    said.difficult = np.array([a.crowd for a in still.more], bool)
    return said


def labels_in(folder: Path) -> Path | None:
  """Its folder of labels; of several, as labelTxt-v1.0 and -v1.5, the last by name."""
  found = sorted(p for p in folder.glob(LABELS) if p.is_dir())
  return found[-1] if found else None


def is_dota(path: Path) -> bool:
  return path.is_dir() and any(labels_in(f) is not None for f in (path, *(path / s for s in SPLITS)))


def folders_of(path: Path, images: Path | None) -> dict[str, Path]:
  """Its parts by name; one without a name where it holds the labels itself. Raises UserError."""
  own = labels_in(path) is not None
  folders = {"": path} if own else {s: path / s for s in SPLITS if labels_in(path / s) is not None}
  if not folders:
    raise UserError(f"{path} is no DOTA folder: it holds no labelTxt/, and no train/labelTxt/")
  if images is not None and len(folders) > 1:
    raise UserError(f"{path} has {len(folders)} parts, and --images names one folder; name the parts one by one")
  return folders


def files_of(folder: Path, images: Path | None) -> tuple[dict[Path, Path], Path]:
  """A part's pictures with their files of labels, which may not be there, and the folder that they lie below. What has
  no partner is said. Raises UserError where there are none."""
  texts = labels_in(folder)
  assert texts is not None
  there = images or (folder / "images")
  files = find_pictures(there) if there.is_dir() else []
  if not files:
    raise UserError(f"{folder}: no pictures in {there}; name their folder with --images")
  labels = {f: texts / f"{f.stem}.txt" for f in files}
  without = sum(not t.is_file() for t in labels.values())
  if without == len(files):
    raise UserError(f"{folder}: none of {len(files)} pictures has its labels, as {labels[files[0]]}")
  if without:
    warn(f"{folder}: {without} of {len(files)} pictures have no file of labels: nothing is on them")
  strays = sorted(p.name for p in texts.glob("*.txt") if p not in set(labels.values()))
  if strays:
    warn(f"{folder}: {len(strays)} files of labels have no picture, as {printable(strays[0], LONG)}")
  return labels, there


class Dota:
  says = (
    "a DOTA folder: images/ and labelTxt/, or train/, val/ and test/ of these (--images: pictures that lie elsewhere)"
  )

  def accepts(self, path: str, options: SourceOptions) -> bool:
    return is_dota(Path(path))

  def open(self, paths: list[str], options: SourceOptions) -> list[Pictures]:
    return [part for p in paths for part in self._open(Path(p), options)]

  def _open(self, path: Path, options: SourceOptions) -> list[Pictures]:
    folders = folders_of(path, options.images)
    read = {split: self._read(folder, options) for split, folder in folders.items()}
    names = sorted({name for stills, _ in read.values() for s in stills for name, _, _ in s.more})
    if not names or len(names) > MANY:
      raise UserError(f"{path}: no object can be used")
    parts: list[Pictures] = []
    own = options.name or plain_name(path.resolve().name)
    for split, (stills, folder) in read.items():
      for s in stills:
        s.more = [
          Annotation(names.index(name), (*p.min(0).tolist(), *p.max(0).tolist()), [p], difficult)
          for name, p, difficult in s.more
        ]
      name = f"{own}-{split}" if split else own
      parts.append(DotaPart(name, folder, stills, options.license, Carries(boxes=tuple(names), masks=True)))
    if n := sum(a.crowd for p in parts for s in p.stills for a in s.more):
      warn(f"{path}: {n} objects are marked difficult: as oriented boxes they teach nothing and need not be found")
    return parts

  def _read(self, folder: Path, options: SourceOptions) -> tuple[list[Still], Path]:
    """-> pictures with what is said of each, and the folder that they lie below."""
    labels, there = files_of(folder, options.images)
    stills = look_at([(f, below(f, there), None) for f in labels], str(folder))
    left_out: Counter[str] = Counter()
    for s in stills:
      s.more = read_labels(labels[s.path], s.width, s.height, left_out) if labels[s.path].is_file() else []
    say_counts(folder, left_out)
    return stills, there
