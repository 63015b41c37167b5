"""Teachers that see the whole picture of the camera, as they were made for, and what they say of it in the model view.

A teacher that has `sees = "picture"` is given the camera's image at its own size, or at that of `picture_size(width,
height)`; or, where it has `as_fine`, so many times as fine as the view would be, or with sides of `short_side` or of at
most `long_side` pixels. Its labels are warped into the view by the segment's calibration: boxes, points, masks, maps.
Where the view reaches beyond the picture, maps repeat its border (class ids are 255): the valid mask of the segment's
camera leaves those pixels out of losses and metrics, as it does for the frame itself."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from openpilot.common.transformations.camera import view_frame_from_device_frame
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, scaled
from openpilot.selfdrive.modeld.fair.heads.depth import map_centers
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.views import SegmentView, view_intrinsics
from openpilot.tools.fair.teacher import Label, Teacher
from openpilot.tools.lib.framereader import Planes
from openpilot.tools.sim.truth import IGNORE

MAP_SHAPE = (VIEW_H // 2, VIEW_W // 2)  # of probabilities and depth in the view
FEATURE_SHAPE = (VIEW_H // 16, VIEW_W // 16)
MIN_SHOWN = 0.3  # of a box's area that the view must show: less of a thing is not told as that thing
MOST_OF_VIEW = 4  # times the view's pixels, of a picture that is as fine as the view
SEES = ("picture", "view")


def sees_picture(teacher: Teacher, sees: str | None) -> bool:
  """Whether the whole picture is what `teacher` is shown. sees: one of SEES, or None: what it was made for."""
  if getattr(teacher, "wants", "rgb") != "rgb":
    return False
  own = getattr(teacher, "sees", "view")
  return own == "picture" and sees != "view"


def size_of_picture(teacher: Teacher, view: SegmentView, name: str = "medmodel") -> tuple[int, int]:
  """(width, height) at which a teacher is given this camera's picture: even numbers, as color is halved. name: of the
  model view."""
  if hasattr(teacher, "picture_size"):
    w, h = teacher.picture_size(view.width, view.height)
    return max(2, w // 2 * 2), max(2, h // 2 * 2)
  size, fine = np.array([view.width, view.height], np.float64), getattr(teacher, "as_fine", None)
  if (short := getattr(teacher, "short_side", None)) is not None:
    size *= short / size.min()
  elif fine is not None:
    focal = view_intrinsics(name, VIEW_W, VIEW_H)[0, 0] / view.intrinsics[0, 0]
    size *= fine * min(focal, (MOST_OF_VIEW * VIEW_W * VIEW_H / size.prod()) ** 0.5)
  elif (long := getattr(teacher, "long_side", None)) is not None:
    size *= min(1, long / size.max())
  else:
    return view.width // 2 * 2, view.height // 2 * 2
  step = math.lcm(2, getattr(teacher, "patch", 2))  # so that a ViT resizes nothing
  width, height = np.maximum(np.rint(size / step), 1).astype(int) * step
  return int(width), int(height)


def view_label(label: Label) -> Label:
  """A label of the picture -> as it is stored, of the view."""
  if label.kind == "boxes":
    return Label(**{**vars(label), "shape": (VIEW_H, VIEW_W) if label.shape else ()})
  if label.kind != "dense":
    return label
  shape = {"class": (VIEW_H, VIEW_W), "probability": MAP_SHAPE, "m": MAP_SHAPE, "relative": MAP_SHAPE, "std": MAP_SHAPE}
  return Label(**{**vars(label), "shape": (*label.shape[:-2], *shape.get(label.unit, FEATURE_SHAPE))})


class PictureWarp:
  """One segment's picture at width x height, as a teacher sees it, and the way of its labels into the view `name`. For
  one thread: it reuses its memory."""

  def __init__(self, view: SegmentView, name: str, width: int, height: int):
    self.width, self.height = width, height
    sx, sy = width / view.width, height / view.height
    self.intrinsics = scaled(view.intrinsics, sx, sy)
    self.picture_from_view = get_warp_matrix(view.rpy, self.intrinsics, name == "sbigmodel")  # (3, 3), up to scale
    self.view_from_picture = np.linalg.inv(self.picture_from_view)
    # the camera's z of a point one meter along the view's optical axis, for each view pixel: row of R K^-1
    self.z_row = (
      view_frame_from_device_frame
      @ rot_from_euler(view.rpy)
      @ view_frame_from_device_frame.T
      @ np.linalg.inv(view_intrinsics(name, VIEW_W, VIEW_H))
    )[2]
    self.yuv = np.empty((height * 3 // 2, width), np.uint8)
    self._maps: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

  def rgb_of(self, planes: Planes, out: np.ndarray | None = None) -> np.ndarray:
    """Planes as a decoder has them -> (height, width, 3) uint8 RGB, in `out` where given."""
    u, v = self.yuv[self.height :].reshape(2, self.height // 2, self.width // 2)
    for plane, to in zip(planes, (self.yuv[: self.height], u, v), strict=True):
      h, w = to.shape
      if plane.shape[0] >= 2 * h or plane.shape[1] >= 2 * w:
        to[:] = cv2.resize(plane, (w, h), interpolation=cv2.INTER_AREA)
      elif plane.shape != to.shape:
        to[:] = cv2.resize(plane, (w, h), interpolation=cv2.INTER_LINEAR)
      else:
        to[:] = plane
    return cv2.cvtColor(self.yuv, cv2.COLOR_YUV2RGB_I420, out)

  def points(self, xy: np.ndarray) -> np.ndarray:
    """(..., 2) pixels of the picture -> of the 512x256 view, float64, both at pixel centers; nan behind the view."""
    p = xy.astype(np.float64) @ self.view_from_picture[:, :2].T + self.view_from_picture[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
      # the inverse's scale is free: the picture's middle is before the camera
      sign = np.sign(self.view_from_picture[2] @ [self.width / 2, self.height / 2, 1])
      return np.where(p[..., 2:] * sign > 0, p[..., :2] / p[..., 2:], np.nan)

  def table(self, label: Label, table: dict[str, Any]) -> dict[str, Any]:
    """Of boxes the upright ones about what their corners become, cut at the view's border, and only those of which it
    shows a part; their masks; points, which are not visible outside the view. Raises nothing."""
    out = dict(table)
    if "x0" in table:
      box = np.stack([np.asarray(table[k], np.float64) for k in ("x0", "y0", "x1", "y1")], axis=1)
      corner = self.points(box[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
      low, high = corner.min(axis=1), corner.max(axis=1)
      edge = np.array([VIEW_W, VIEW_H]) - 0.5
      a, b = np.clip(low, -0.5, edge), np.clip(high, -0.5, edge)
      with np.errstate(invalid="ignore"):
        keep = np.prod(b - a, axis=1) >= MIN_SHOWN * np.prod(high - low, axis=1)
        keep &= (b > a).all(axis=1)
      out.update(x0=a[:, 0], y0=a[:, 1], x1=b[:, 0], y1=b[:, 1])
      if "rle" in table and label.shape:
        shown = zip(table["rle"], keep, strict=True)
        out["rle"] = [self.mask(text, label.shape) if k and text else text for text, k in shown]
      kept = np.flatnonzero(keep)
      return {k: [v[i] for i in kept] if isinstance(v, list) else np.asarray(v)[kept] for k, v in out.items()}
    if "x" in table:
      xy = self.points(np.stack([np.asarray(table["x"]), np.asarray(table["y"])], axis=1))
      inside = (xy >= -0.5).all(axis=1) & (xy <= np.array([VIEW_W, VIEW_H]) - 0.5).all(axis=1)
      out["x"], out["y"] = np.nan_to_num(xy[:, 0], nan=-1e4), np.nan_to_num(xy[:, 1], nan=-1e4)
      if "visible" in table:
        out["visible"] = np.asarray(table["visible"]) & inside
    return out

  def mask(self, text: str, shape: tuple[int, ...]) -> str:
    seen = rle.decode(text, *shape[-2:]).astype(np.uint8)
    return rle.encode((cv2.remap(seen, *self.maps(seen.shape, (VIEW_H, VIEW_W)), cv2.INTER_NEAREST) > 0)[None])[0]

  def maps(self, shape: Sequence[int], to: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where in a map of the picture with `shape` (h, w) the pixels of a map of the view with shape `to` are: x, y
    float32 at pixel centers; both maps cover all of theirs."""
    key = (*shape[-2:], *to[-2:])
    if key not in self._maps:
      (h, w), (rows, columns) = shape[-2:], to[-2:]
      u, v = np.meshgrid(*map_centers(rows, columns))
      p = self.picture_from_view @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
      with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(p[2] > 0, p[:2] / p[2], -1e4)
      x = ((q[0] + 0.5) * w / self.width - 0.5).reshape(u.shape).astype(np.float32)
      y = ((q[1] + 0.5) * h / self.height - 0.5).reshape(u.shape).astype(np.float32)
      self._maps[key] = x, y
    return self._maps[key]

  def z_scale(self, to: Sequence[int]) -> np.ndarray:
    """(h, w) float32: depth along the view's axis over that along the camera's, at the pixels of a map of the view."""
    rows, columns = to[-2:]
    u, v = np.meshgrid(*map_centers(rows, columns))
    return (1 / (self.z_row[0] * u + self.z_row[1] * v + self.z_row[2])).astype(np.float32)

  def dense(self, label: Label, x: np.ndarray) -> np.ndarray:
    """(T, ..., h, w) of the picture -> (T, ..., *view_label(label).shape[-2:]). Class ids of the nearest pixel, 255
    outside; depth in meters, its standard deviation and relative inverse depth as nearest, too: between two surfaces
    there is none; else bilinear, of twice the size and averaged where the view shows less than the picture has."""
    to = view_label(label).shape[-2:]
    x = np.asarray(x)
    flat = x.reshape(-1, *x.shape[-2:])
    if label.unit in ("class", "m", "relative", "std"):
      at = self.maps(x.shape, to)
      border: dict[str, Any] = (
        {"borderMode": cv2.BORDER_CONSTANT, "borderValue": IGNORE}
        if label.unit == "class"
        else {"borderMode": cv2.BORDER_REPLICATE}
      )
      kind = flat.dtype if label.unit == "class" else np.float32
      out = np.stack([cv2.remap(m.astype(kind), *at, cv2.INTER_NEAREST, **border) for m in flat])
      if label.unit == "m":
        out *= self.z_scale(to)
    else:
      at = self.maps(x.shape, (2 * to[0], 2 * to[1]))
      fine = [cv2.remap(m.astype(np.float32), *at, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for m in flat]
      out = np.stack(fine).reshape(len(flat), to[0], 2, to[1], 2).mean(axis=(2, 4))
      if label.unit == "probability":
        out = np.round(out * 256) / 256  # finer would be noise that does not compress
    return out.reshape(*x.shape[:-2], *to)
