"""Grounding DINO and SAM as a registered teacher: tuned, by the name of an experiment's folder, or as published, by the
classes that are asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.detr.teacher import to_table
from openpilot.tools.fair.grounded_sam.detector import Answer
from openpilot.tools.fair.grounded_sam.experiment import is_experiment
from openpilot.tools.fair.grounded_sam.two_stage import GroundedSAM
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import (
  Clip,
  Entry,
  Label,
  Labels,
  State,
  Teacher,
  check_least,
  failure_is_said,
  helper_settings,
  joint_hash,
  joint_license,
  load_helper,
)
from openpilot.tools.lib.errors import UserError
from openpilot.tools.learn.memory import halve_on_oom


SCORED = 0.05  # a class's score of a box that says anything


class GroundedSamTeacher:
  """path: an experiment's folder; or a base of Grounding DINO, asked for `classes`.

  score: boxes below are dropped. features: also the network's map, of stride 16. class_scores: also a table of unit
  "score": a row for each box and class of at least SCORED, whether the box is an object or not. detector: a registered
  teacher of boxes in place of Grounding DINO, for an experiment that has SAM alone. sam: weights of a SAM beside an
  untuned base."""

  stateful = False
  sees = "picture"
  whole = False
  ASKS_OTHERS = True

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    device: str | None = None,
    classes: tuple[str, ...] = (),
    score: float = 0.3,
    batch: int = 4,
    features: bool = False,
    class_scores: bool = False,
    detector: str | None = None,
    sam: str | None = None,
    load: Callable[..., Teacher] = load_teacher,
  ):
    assert path is not None
    check_least(name, 1, batch=batch)
    check_least(name, 0, score=score)
    self.name, self.license = name, entry.license
    tuned = is_experiment(path)
    self.model_id = path.name if tuned else entry.weights or path.name
    if tuned:
      if classes or sam:
        raise UserError(f"teacher '{name}' was tuned; it knows its classes and its SAM: leave out these options")
      self.model = GroundedSAM.of(path, device)
    else:
      if not classes:
        raise UserError(
          f'teacher \'{name}\' must be told what to look for: --option "{name}.classes=car,traffic light"'
        )
      self.model = GroundedSAM(grounding_dino_base=path, sam_base=sam, classes=classes, device=device)
    self.checkpoint_hash = self.model.checkpoint_hash
    self.classes, self.threshold, self.at_most, self.wants_features = self.model.classes, score, batch, features
    if class_scores and not self.model.has_boxes:
      raise UserError(f"teacher '{name}' has no Grounding DINO, whose class_scores these would be")
    self.wants_scores = class_scores
    self.helper: Teacher | None = None
    if detector is not None:
      self.helper = load_helper(load, detector, None, device)
      self.license = joint_license(name, entry.license, self.helper.license)
      self.checkpoint_hash = joint_hash(self.checkpoint_hash, self.helper)
    elif not self.model.has_boxes:
      raise UserError(
        f"teacher '{name}' has SAM alone, which wants boxes: name a teacher of boxes, --option EXPERIMENT.detector=NAME"
      )
    self.labels: list[Label] = []
    self.size = [0, 0]

  def prepare(self, height: int, width: int) -> None:
    self.size = [height, width]
    classes = self.classes
    if self.helper is not None:
      self.helper.prepare(height, width)
      found = [b for b in self.helper.labels if b.kind == "boxes"]
      if not found:
        raise UserError(f"teacher '{self.helper.name}' gives no boxes; choose another detector for '{self.name}'")
      self.found, classes = found[0].name, found[0].classes
    if self.model.has_masks:
      self.labels = [Label("objects", "boxes", shape=(height, width), unit="px", classes=classes)]
    else:
      self.labels = [Label("boxes", "boxes", unit="px", classes=classes)]
    if self.wants_scores:
      self.labels.append(Label("class_scores", "boxes", unit="score", classes=self.classes))
    if self.wants_features:
      with failure_is_said(self.name):  # pictures so small that a network has no map of them
        shape = self.model.features([np.zeros((3, height, width), np.uint8)])[0].shape
      self.labels.append(Label("features", "dense", shape=shape))

  def settings(self) -> dict[str, Any]:
    d, s = self.model.detector, self.model.segmenter
    return {
      "asked": None if d is None or d.prompts is None else d.prompts.settings(),
      "pictures": [None if d is None else d.pictures.config, None if s is None else s.said],
      "score": self.threshold,
      "detector": helper_settings(self.helper) if self.helper is not None else None,
      "features": self.wants_features,
      "class_scores": SCORED if self.wants_scores else None,
      "size": self.size,
    }

  def answers(self, rgb: np.ndarray) -> list[tuple[Answer, Answer]]:
    """(T, 3, H, W) uint8 -> of each frame its objects, and all boxes that have a score of a class."""
    least = min(SCORED, self.threshold) if self.wants_scores else self.threshold
    out = []
    for x, a in zip(rgb, self.model.detect(list(rgb), least), strict=True):
      found = a.take(np.flatnonzero(a.scores > self.threshold))
      if self.model.segmenter is not None:
        found.masks = self.model.segmenter.segment(x, found.boxes)
      out.append((found, a))
    return out

  def asked_for(self, clip: Clip) -> list[Answer]:
    """Masks of the boxes that another teacher finds."""
    assert self.helper is not None
    table = self.helper.label(clip)[0][self.found]
    out = []
    for t, x in enumerate(clip.rgb):
      rows = np.flatnonzero(table["frame"] == t)
      # a table's integers are pixel centers, a teacher's box counts from the corner
      boxes = np.stack([np.asarray(table[k])[rows] for k in ("x0", "y0", "x1", "y1")], 1).astype(np.float32) + 0.5
      boxes = np.clip(boxes, 0, np.array([x.shape[2], x.shape[1]] * 2, np.float32))
      whole = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
      rows, boxes = rows[whole], boxes[whole]
      scores, classes = (np.asarray(table[k])[rows] for k in ("score", "cls"))
      masks = self.model.segment([x], [boxes])[0] if self.model.has_masks else None
      out.append(Answer(boxes, scores, classes, np.zeros((len(rows), 0), np.float32), masks))
    return out

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    said: list[Answer] = []
    if self.helper is not None:
      found = self.asked_for(clip)
    else:
      parts = range(0, len(clip.rgb), self.at_most)
      both = [a for i in parts for a in halve_on_oom(self.answers, clip.rgb[i : i + self.at_most])]
      found, said = [a for a, _ in both], [b for _, b in both]
    h, w = clip.rgb.shape[-2:]
    if self.model.has_masks:
      for a in found:  # a box whose mask is empty is none
        assert a.masks is not None
        seen = a.masks.any((1, 2))
        a.boxes, a.scores, a.classes, a.masks = a.boxes[seen], a.scores[seen], a.classes[seen], a.masks[seen]
    table: dict[str, Any] = to_table([(a.boxes, a.scores, a.classes) for a in found], h, w)
    out: Labels = {self.labels[0].name: table}
    if self.model.has_masks:
      table["rle"] = [text for a in found if a.masks is not None for text in rle.encode(a.masks)]
    if self.wants_scores:
      rows = [np.nonzero(a.class_scores >= SCORED) for a in said]
      out["class_scores"] = to_table(
        [(a.boxes[i], a.class_scores[i, c], c) for a, (i, c) in zip(said, rows, strict=True)], h, w
      )
    if self.wants_features:
      out["features"] = np.stack(self.model.features(list(clip.rgb))).astype(np.float16)
    return out, None
