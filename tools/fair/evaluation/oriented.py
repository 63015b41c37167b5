"""Oriented boxes in frames: read from labels, said by a student, judged by DOTA's rules (images/oriented_score.py)."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.metrics import known, ratio
from openpilot.tools.fair.evaluation.scenes import Scene
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.images.oriented_score import Boxes, Matched, averages, joined, curves_of, match
from openpilot.tools.fair.labels.carried import ORIENTED
from openpilot.tools.fair.rotated import rotated_iou
from openpilot.tools.fair.spec import UNKNOWN, plain
from openpilot.tools.fair.tasks.oriented import drawn
from openpilot.tools.fair.teacher import Label

SURE = 0.3  # score from which a box is drawn


class OrientedBoxes:
  """In each class the best score first, a box is right where its rotated IoU with the object that it overlaps most is
  above 0.5 and no better one took that object (DOTA_devkit). ap50: VOC 2007's mean over 11 recalls, as DOTA's figures
  are; ap50_area, ap75_area and ap: areas under the curve at 0.5, 0.75, and the mean over 0.50 to 0.95; recall,
  precision: of all classes, of boxes of at least the score from which the student counts them. What is found on
  something difficult, or on what nobody knows, counts nowhere."""

  draws = 200  # of the bootstrap

  def __init__(self, names: Sequence[str], score: float):
    self.names, self.score = list(names), score
    self.matched: list[list[Matched]] = [[] for _ in self.names]

  @classmethod
  def pooled(cls, parts: Sequence[Self]) -> Self:
    out = cls(parts[0].names, parts[0].score)
    for k in range(len(out.names)):
      for p in parts:
        if len(p.matched[k]) > 1:
          p.matched[k] = [joined(p.matched[k])]
        out.matched[k] += p.matched[k]
    return out

  def add(self, found: Boxes, truth: Boxes) -> float:
    """-> 1 - F1 at `score`, nan where nothing is there and nothing was found."""
    table = [rotated_iou(found.boxes, truth.boxes)]
    made = [match([truth], [found], k, table) for k in range(len(self.names))]
    for kept, m in zip(self.matched, made, strict=True):
      kept.append(m)
    right, wrong, positives = self._counts(made)
    total = right + wrong + positives
    return 1 - 2 * right / total if total else float("nan")

  def _counts(self, made: Sequence[Matched]) -> tuple[int, int, int]:
    right, wrong = (sum(int(getattr(m, k)[0][m.scores >= self.score].sum()) for m in made) for k in ("right", "wrong"))
    return right, wrong, sum(m.positives for m in made)

  def result(self) -> dict[str, float]:
    made = [joined(m) for m in self.matched if m]
    each = [averages(curves_of(m)) for m in made if m.positives]
    if not each:
      return {}
    right, wrong, positives = self._counts(made)
    means = {k: float(np.mean([e[k] for e in each])) for k in each[0]}
    return known({**means, "recall": ratio(right, positives), "precision": ratio(right, right + wrong)})

  def reported(self) -> dict[str, float]:
    return self.result()


def read_oriented(x: Labels, labels: list[Label], row: int, s: Scene) -> None:
  label, table = labels[0], x.reader.table(x.group, labels[0].name, row)
  number = np.asarray(table["cls"], np.int64)
  cls = np.asarray(x.index["oriented"])[number]
  unknown = np.isin(number, [k for k, n in enumerate(label.classes) if plain(n) in UNKNOWN])
  told = "objects" in x.by_task  # which reads the upright boxes of the same label, and has said what it leaves out
  for k in number[(cls < 0) & ~unknown].tolist() if not told else ():
    x.compared.leave_out(x.name, label.classes[k], "oriented boxes", 1)
  keep = unknown | (cls >= 0)
  boxes = np.stack([np.asarray(table[k], np.float64) for k in ORIENTED], 1).reshape(-1, 5)
  s.more["oriented"] = Boxes(boxes[keep], cls[keep], difficult=np.zeros(int(keep.sum()), bool), unknown=unknown[keep])


def decode_oriented(student: Student, found: Any, frame_id: int, s: Scene) -> None:
  """Of the classes that are compared."""
  cls = student.table(found.classes, "boxes")[found.class_ids]
  keep = cls >= 0
  s.more["oriented"] = Boxes(found.boxes[keep].astype(np.float64), cls[keep], found.scores[keep])


def draw_oriented(rgb: np.ndarray, s: Scene, compared: Compared) -> np.ndarray | None:
  said = s.more.get("oriented")
  if said is None:
    return None
  sure = said.cls >= 0
  if len(said.scores):
    sure &= said.scores >= SURE
  return drawn(rgb, said.boxes[sure], said.cls[sure], compared.names("boxes"))
