"""A drive of a turned camera, what a teacher is shown of it, and where its labels lie in the view by a homography
written down here: for the tests of teachers that see whole pictures."""

import cv2
import numpy as np

from openpilot.common.transformations.camera import view_frame_from_device_frame as VIEW
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.fair.labels.labeling import run_teacher
from openpilot.tools.fair.labels.picture import PictureWarp
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.videowriter import VideoWriter

RPY = np.array([0.02, -0.035, 0.05])
W, H, N = 526, 330, 2


def turned_view(folder):
  """A smooth texture that moves, seen by comma's small camera, which is turned by RPY."""
  path = folder / "drive.mp4"
  texture = cv2.resize(np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8), (W + 20, H))
  with VideoWriter(path, W, H, 15, 10) as v:
    for i in range(N):
      v.write(np.ascontiguousarray(texture[:, 5 * i : 5 * i + W]))
  (view,) = find_views([str(path)], None, "road", 1, None)
  view.rpy = RPY
  return view


def shown(view, width, height):
  """The clip that a teacher of whole pictures of that size is given."""
  renderer = view.renderer(Canvas("rgb", width, height, "medmodel"), PictureWarp(view, "medmodel", width, height))
  out = np.zeros((N, height, width, 3), np.uint8)
  for row, image in renderer.read(list(range(N))):
    renderer.draw(image, out[row])
  entries = view.entries
  k = np.diag([width / W, height / H, 1]) @ view.intrinsics
  k[:2, 2] += [0.5 * width / W - 0.5, 0.5 * height / H - 0.5]  # pixels count from their centers
  return Clip(out.transpose(0, 3, 1, 2), k, RPY, [e.frame_id for e in entries], [e.timestamp_eof for e in entries])


def homography(clip):
  """(3, 3) from the view's pixels to the picture's."""
  turn = VIEW @ rot_from_euler(clip.rpy) @ VIEW.T
  return clip.intrinsics @ turn @ np.linalg.inv(medmodel_intrinsics)


def places(clip, rows, columns, shape):
  """x, y in a map with `shape` over the picture of the centers of a map (rows, columns) over the view."""
  u, v = (np.arange(columns) + 0.5) * 512 / columns - 0.5, (np.arange(rows) + 0.5) * 256 / rows - 0.5
  grid = np.stack([*np.meshgrid(u, v), np.ones((rows, columns))]).reshape(3, -1)
  x, y, z = homography(clip) @ grid
  height, width = clip.rgb.shape[2:]
  scale = np.array([shape[-1] / width, shape[-2] / height])[:, None]
  return ((np.stack([x / z, y / z]) + 0.5) * scale - 0.5).reshape(2, rows, columns)


def bilinear(x, at):
  """x (..., h, w) at places (2, rows, columns), the border's value outside."""
  h, w = x.shape[-2:]
  u, v = np.clip(at[0], 0, w - 1), np.clip(at[1], 0, h - 1)
  i, j = np.minimum(u.astype(int), w - 2), np.minimum(v.astype(int), h - 2)
  a, b = u - i, v - j
  top = x[..., j, i] * (1 - a) + x[..., j, i + 1] * a
  return top * (1 - b) + (x[..., j + 1, i] * (1 - a) + x[..., j + 1, i + 1] * a) * b


def nearest(x, at):
  """-> values, and where no other pixel is nearly as near."""
  h, w = x.shape[-2:]
  u, v = np.clip(np.rint(at[0]).astype(int), 0, w - 1), np.clip(np.rint(at[1]).astype(int), 0, h - 1)
  clear = (np.abs(at - np.floor(at) - 0.5) > 0.05).all(axis=0)
  return x[..., v, u], clear


def outside(clip):
  """(256, 512) bool: pixels of the view that the camera does not see; and all but those at the edge."""
  at = places(clip, 256, 512, clip.rgb.shape[2:])
  height, width = clip.rgb.shape[2:]
  beside = np.maximum(np.maximum(-0.5 - at[0], at[0] - width + 0.5), np.maximum(-0.5 - at[1], at[1] - height + 0.5))
  return beside > 0, np.abs(beside) > 1.5


def labeled(teacher, view, store, **more):
  """The group, and what the teacher says itself of the pictures that it is given."""
  (group,) = run_teacher(teacher, [view], store, progress=False, **more)
  size = group.meta["picture"]["width"], group.meta["picture"]["height"]
  clip = shown(view, *size)
  teacher.prepare(size[1], size[0])
  return group, clip, teacher.label(clip, None)[0]


def check_masks(group, clip, said):
  """The masks of 'objects', beside the nearest pixel's of those that the teacher says."""
  table, own = group.table("objects").to_pydict(), said["objects"]
  assert len(table["track"]) and set(table["track"]) <= set(own["track"].tolist())
  at = places(clip, 256, 512, clip.rgb.shape[2:])
  beside, _ = outside(clip)
  for row, track, text in zip(table["row"], table["track"], table["rle"], strict=True):
    n = int(np.flatnonzero((own["frame"] == row) & (own["track"] == track))[0])
    want, clear = nearest(rle.decode(own["rle"][n], *clip.rgb.shape[2:]), at)
    clear &= ~beside
    got = rle.decode(text, 256, 512)
    assert clear.mean() > 0.4 and (got[clear] == want[clear]).mean() > 0.999
