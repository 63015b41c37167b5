"""Single pictures: what a teacher is shown of them, and the way of its labels into the input that they are stored in.
Each picture lies in both in its own way."""

from typing import Any

import cv2
import numpy as np

from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import COORDINATES, Label, Teacher
from openpilot.tools.sim.truth import IGNORE


def fits_pictures(teacher: Teacher) -> bool:
  """Whether it is given single pictures as it likes them, and its dense labels of them may have any size; else the
  input as it is stored, letterboxed."""
  return hasattr(teacher, "sees") and not getattr(teacher, "letterboxed", False)


def canvas_of(teacher: Teacher, spec: InputSpec, size: tuple[int, int] | None = None) -> Canvas:
  """What `teacher` is shown of pictures that are stored as `spec`: `size` (width, height), or as it likes it best;
  always the whole picture."""
  wants = getattr(teacher, "wants", "rgb")
  if wants != "rgb":
    return Canvas(wants, spec.width, spec.height, letterbox=spec.letterbox, pad=spec.pad, input=spec)
  if size is not None:
    return Canvas("rgb", size[0], size[1], pad=spec.pad, input=spec)
  if not hasattr(teacher, "picture_size"):
    return Canvas("rgb", spec.width, spec.height, letterbox=spec.letterbox, pad=spec.pad, input=spec)
  width, height = teacher.picture_size(spec.width, spec.height)
  letterbox = not getattr(teacher, "stretches", False)
  return Canvas("rgb", width, height, letterbox=letterbox, pad=spec.pad, input=spec)


def input_label(label: Label, spec: InputSpec, whole: bool) -> Label:
  """A label as a teacher says it -> as it is stored, of the input. whole: a dense one may have any size, and gets that
  of its kind; others keep theirs, which covers the input as it covered the canvas."""
  if label.kind != "dense" or not whole:
    return label
  full, half = (spec.height, spec.width), (spec.height // 2, spec.width // 2)
  shape = {"class": full, "probability": half, "m": half, "relative": half, "std": half}
  size = shape.get(label.unit, (spec.height // 16, spec.width // 16))
  return Label(**{**vars(label), "shape": (*label.shape[:-2], *size)})


class Refit:
  """From a canvas to an input. Coordinates count at pixel centers; maps cover all of theirs."""

  def __init__(self, canvas: Canvas, spec: InputSpec):
    self.canvas, self.spec = canvas, spec

  def scales(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 2) pictures' widths and heights -> (N, 2) pixels of the canvas, and of the input, for one of the picture,
    along x and y."""
    on_canvas, in_input = (np.array([np.diag(x.fit(*s))[:2] for s in sizes.tolist()]) for x in (self.canvas, self.spec))
    return on_canvas.reshape(-1, 2), in_input.reshape(-1, 2)

  def table(self, table: dict[str, Any], sizes: np.ndarray) -> dict[str, Any]:
    """sizes: (M, 2) of the picture of each row. Boxes are cut at their picture's border; what lies beside it is
    dropped."""
    on_canvas, in_input = self.scales(sizes)
    ratio = in_input / on_canvas
    out = {
      k: ((np.asarray(v, np.float64) + 0.5) * ratio[:, COORDINATES[k]] - 0.5).astype(np.float32)
      if k in COORDINATES
      else v
      for k, v in table.items()
    }
    if "x0" not in out or not len(sizes):
      return out
    for axis, names in enumerate((("x0", "x1"), ("y0", "y1"))):
      end = (sizes[:, axis] * in_input[:, axis] - 0.5).astype(np.float32)
      for name in names:
        out[name] = np.clip(out[name], np.float32(-0.5), end)
    keep = np.flatnonzero((out["x1"] > out["x0"]) & (out["y1"] > out["y0"]))
    if len(keep) == len(sizes):
      return out
    return {k: [v[i] for i in keep] if isinstance(v, list) else np.asarray(v)[keep] for k, v in out.items()}

  def dense(self, said: Label, stored: Label, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(N, ..., h, w) over the canvas -> (N, *stored.shape). Class ids and depth of the nearest pixel, else bilinear, of
    twice the size and averaged; in the padding 0, of class ids 255."""
    on_canvas, in_input = self.scales(sizes)
    shown, whole = (np.array([c.width, c.height]) for c in (self.canvas, self.spec))
    # of the canvas's width and height, what the input's are
    reach = whole * on_canvas / in_input / shown
    if said.shape == stored.shape and np.allclose(reach, 1, atol=1e-9):
      return x
    (h, w), (rows, columns) = x.shape[-2:], stored.shape[-2:]
    exact = stored.unit in ("class", "m", "relative", "std")
    fine = 1 if exact else 2
    out = np.empty((len(x), *stored.shape), x.dtype)
    for i, (rx, ry) in enumerate(reach):
      u = ((np.arange(columns * fine) + 0.5) * rx * w / (columns * fine) - 0.5).astype(np.float32)
      v = ((np.arange(rows * fine) + 0.5) * ry * h / (rows * fine) - 0.5).astype(np.float32)
      xs, ys = np.meshgrid(u, v)
      inside = (xs <= w - 0.5) & (ys <= h - 0.5)
      for plane, to in zip(x[i].reshape(-1, h, w), out[i].reshape(-1, rows, columns), strict=True):
        kind = plane.dtype if plane.dtype == np.uint8 else np.float32
        how = cv2.INTER_NEAREST if exact else cv2.INTER_LINEAR
        moved = cv2.remap(plane.astype(kind), xs, ys, how, borderMode=cv2.BORDER_REPLICATE)
        moved = np.where(inside, moved, IGNORE if stored.unit == "class" else 0)
        to[:] = moved if fine == 1 else moved.reshape(rows, 2, columns, 2).mean(axis=(1, 3))
    if stored.unit == "probability":
      out = (np.round(out.astype(np.float32) * 256) / 256).astype(
        x.dtype
      )  # finer would be noise that does not compress
    return out
