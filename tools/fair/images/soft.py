"""Any teacher of boxes as a teacher of students: what it found, of at least a score, and beside it all that it scored.
Stored once a picture, and read in every epoch."""

from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.detr.experiment import is_detr
from openpilot.tools.fair.grounded_sam.experiment import read_experiment
from openpilot.tools.fair.labels.collector import take
from openpilot.tools.fair.options import options_of
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.tasks.objects import SCORES
from openpilot.tools.fair.teacher import Clip, Label, Labels, State, Teacher
from openpilot.tools.lib.errors import UserError

FLOOR = 0.05  # score of what is kept at all


class SoftTeacher:
  """inner: the teacher. score: from which on what it says is an object."""

  def __init__(self, inner: Teacher, score: float):
    self.inner, self.score = inner, score
    self.name, self.model_id, self.license = inner.name, inner.model_id, inner.license
    self.checkpoint_hash, self.stateful = inner.checkpoint_hash, inner.stateful
    self.labels: list[Label] = []

  def __getattr__(self, name: str) -> Any:
    if name == "inner":
      raise AttributeError(name)  # of a copy that is being made
    return getattr(self.inner, name)

  def prepare(self, height: int, width: int) -> None:
    self.inner.prepare(height, width)
    self.labels = []
    for x in self.inner.labels:
      self.labels.append(x)
      if self.adds(x):
        self.labels.append(Label(f"{x.name}_scores", "boxes", unit=SCORES, classes=x.classes))

  def adds(self, label: Label) -> bool:
    """Whether its scores are a label of their own here, and not already the teacher's."""
    return label.kind == "boxes" and not any(x.unit == SCORES for x in self.inner.labels)

  def settings(self) -> dict[str, Any]:
    return {"teacher": self.inner.settings(), "score": self.score}

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    said, state = self.inner.label(clip, state)
    out: Labels = {}
    for x in self.inner.labels:
      if not self.adds(x):
        out[x.name] = said[x.name]
        continue
      table = said[x.name]
      keep = np.flatnonzero(np.asarray(table["score"]) >= self.score)
      out[x.name] = take(table, keep, np.asarray(table["frame"])[keep])
      out[f"{x.name}_scores"] = {k: v for k, v in table.items() if k not in ("rle", "track")}
    return out, state


def load_soft(name: str, weights: str | None, score: float, accepted: tuple[str, ...], **more: Any) -> SoftTeacher:
  """A registered teacher that keeps what it is unsure of, where it can be told to. Raises UserError."""
  if "score" in options_of(name):
    more = {"score": FLOOR, **more}
  return SoftTeacher(load_teacher(name, weights, accepted, **more), score)


def load_experiment(
  folder: Path, score: float, accepted: tuple[str, ...], device: str | None, told: tuple[str, ...] = ()
) -> SoftTeacher:
  """What `images train-teacher` tuned, adapters merged, with its scores of all classes and its feature map. told:
  KEY=VALUE, or TEACHER.KEY=VALUE, as detector=NAME where there is SAM alone. Or what `images train-detr` made. Raises
  UserError."""
  detr = is_detr(folder)
  if not detr and not (folder / "metadata.json").is_file():
    raise UserError(
      f"--teacher-dir {folder}: it is no folder of `tools/op.sh images train-teacher` or train-detr: no metadata.json"
    )
  there = options_of(str(folder))
  scores = not detr and "class_scores" in there and "grounding_dino" in read_experiment(folder).teachers
  more: dict[str, Any] = {"score": score if scores else FLOOR, "class_scores": scores, "features": True}
  for item in told:
    key, equals, text = item.partition("=")
    key = key.rpartition(".")[2]
    if not equals or key not in there:
      raise UserError(f"--option {item}: the teacher of {folder} has {', '.join(there)}; write KEY=VALUE")
    more[key] = there[key].parse(text)
  more = {k: v for k, v in more.items() if k in there}
  return SoftTeacher(load_teacher(str(folder), None, accepted, device=device, **more), score)
