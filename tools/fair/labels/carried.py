"""The labels that a data set carries, as a teacher says them: so they are stored, resumed and repaired like any
other's."""

import hashlib
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.oriented import upright
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.placement import place_boxes, place_ids, place_mask, place_polygons
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.sources.source import Said
from openpilot.tools.fair.maps import classes_to_map
from openpilot.tools.fair.spec import UNKNOWN, InputSpec, plain
from openpilot.tools.fair.teacher import Clip, Label, Labels, State
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import IGNORE, MAP_H, MAP_W

COLUMNS = {"x0": np.float32, "y0": np.float32, "x1": np.float32, "y1": np.float32, "score": np.float32, "cls": np.int16}
ORIENTED = ("cx", "cy", "w", "h", "angle")  # columns beside them


def with_unknown(names: tuple[str, ...]) -> tuple[str, ...]:
  """The same, with a name of what counts nowhere behind them where none has it."""
  return names if any(plain(n) in UNKNOWN for n in names) else (*names, UNKNOWN[0])


class CarriedLabels:
  """The labels of one part's pictures, placed in an input. Class maps of an RGB input are kept at its full size, of a
  model frame at that of a student's maps."""

  stateful, wants, model_id = False, "none", ""

  def __init__(self, name: str, part: Pictures, spec: InputSpec):
    self.name, self.part, self.spec, self.license = name, part, spec, part.license
    self.labels: list[Label] = []
    c, size = part.carries, (spec.height, spec.width)
    if c.boxes is not None and c.oriented:
      self.labels.append(Label("oriented", "boxes", unit="px", classes=with_unknown(c.boxes)))
    elif c.boxes is not None:
      self.labels.append(Label("objects", "boxes", shape=size if c.masks else (), unit="px", classes=c.boxes))
    if c.maps is not None:
      shape = size if spec.kind == "rgb" else (MAP_H, MAP_W)
      self.labels.append(Label("segmentation", "dense", "uint8", shape, "class", c.maps))
    self.rows = {e.frame_id: r for r, e in enumerate(part.entries)}
    self.checkpoint_hash = self._hash()

  def _hash(self) -> str:
    """Of all that is said, as it will be placed: the pictures' own hash is the part's."""
    h = hashlib.sha256()
    for r in range(len(self.part.entries)):
      said = self.part.said(r)
      h.update(said.boxes.tobytes() + said.cls.tobytes() + (b"" if said.ids is None else said.ids.tobytes()))
      for more in (said.oriented, said.difficult):
        h.update(b"" if more is None else more.tobytes())
      for m in said.masks:
        if isinstance(m, dict):
          h.update(m["counts"].encode())
        elif m is not None:
          for array in m if isinstance(m, list) else [m]:
            h.update(np.ascontiguousarray(array).tobytes())
    return h.hexdigest()

  def prepare(self, height: int, width: int) -> None: ...

  def settings(self) -> dict[str, Any]:
    return {}

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    out: Labels = {}
    said = [self.part.said(self.rows[f]) for f in clip.frame_ids]
    matrices = [self.spec.fit(*self.part.size(self.rows[f])) for f in clip.frame_ids]
    for label in self.labels:
      if label.kind == "dense":
        out[label.name] = np.stack([self._map(s.ids, label) for s in said])
      elif label.name == "oriented":
        out[label.name] = self._oriented(said, matrices, label)
      else:
        out[label.name] = self._table(said, matrices, label)
    return out, None

  def _map(self, ids: np.ndarray | None, label: Label) -> np.ndarray:
    if ids is None:
      return np.full(label.shape, IGNORE, np.uint8)
    placed = place_ids(ids, self.spec.fit(*ids.shape[::-1]), self.spec.width, self.spec.height, IGNORE)
    return placed if placed.shape == label.shape else classes_to_map(placed, len(label.classes))

  def _table(self, said: list[Any], matrices: list[np.ndarray], label: Label) -> dict[str, Any]:
    frame = np.repeat(np.arange(len(said)), [len(s.boxes) for s in said])
    boxes = np.concatenate([place_boxes(s.boxes, m) for s, m in zip(said, matrices, strict=True)])
    cls = np.concatenate([s.cls for s in said])
    values = dict(zip(COLUMNS, (*boxes.T, np.ones(len(cls)), cls), strict=True))
    table: dict[str, Any] = {"frame": frame.astype(np.int32), **{k: v.astype(COLUMNS[k]) for k, v in values.items()}}
    if label.shape:
      table["rle"] = [
        self._mask(m, matrix)
        for s, matrix in zip(said, matrices, strict=True)
        for m in (s.masks or [None] * len(s.boxes))
      ]
    return table

  def _oriented(self, said: list[Said], matrices: list[np.ndarray], label: Label) -> dict[str, Any]:
    """Upright boxes cut at the input's border, and the oriented ones as they are. What is difficult is unknown."""
    matrix = np.repeat(matrices, [len(s.boxes) for s in said], axis=0).reshape(-1, 3, 3)
    boxes = np.concatenate([s.oriented for s in said if s.oriented is not None]).reshape(-1, 5)
    scale = np.stack([matrix[:, 0, 0], matrix[:, 1, 1]], 1)
    if not np.allclose(scale[:, 0], scale[:, 1]):
      raise UserError("oriented boxes need pictures that are scaled alike in both directions")
    cls, difficult = (np.concatenate(x) for x in zip(*((s.cls, s.difficult) for s in said), strict=True))
    boxes[:, :2] = boxes[:, :2] * scale + matrix[:, :2, 2]
    boxes[:, 2:4] *= scale
    edges = np.array([self.spec.width, self.spec.height] * 2) - 0.5
    cut = np.clip(upright(boxes), -0.5, edges)
    keep = (cut[:, 2:] > cut[:, :2]).all(1)
    cls = np.where(difficult, next(k for k, n in enumerate(label.classes) if plain(n) in UNKNOWN), cls)
    frame = np.repeat(np.arange(len(said)), [len(s.boxes) for s in said])
    values = dict(zip((*COLUMNS, *ORIENTED), (*cut.T, np.ones(len(cls)), cls, *boxes.T), strict=True))
    table = {"frame": frame.astype(np.int32), **{k: v.astype(COLUMNS.get(k, np.float32)) for k, v in values.items()}}
    return {k: v[keep] for k, v in table.items()}

  def _mask(self, mask: Any, matrix: np.ndarray) -> str:
    """'' where none is said."""
    w, h = self.spec.width, self.spec.height
    if mask is None:
      return ""
    if isinstance(mask, list):
      return place_polygons(mask, matrix, w, h)
    if isinstance(mask, dict):  # one at a time: of a large picture many would take all memory
      mask = rle.decode(mask["counts"], *mask["size"])
    return place_mask(mask, self.spec.fit(*mask.shape[::-1]), w, h)
