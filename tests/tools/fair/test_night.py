"""Clips by day made clips by night: light is where labels say that it is, and labels stay as they are."""

import numpy as np
import pytest

from openpilot.selfdrive.modeld.fair.frames import luma_of, pack_rgb
from openpilot.tools.fair.distillation.data import RawClip
from openpilot.tools.fair.distillation.night import DARK, Night, Scene, by_night, called, is_dark, scenes
from openpilot.tools.fair.spec import InputSpec, street_classes
from openpilot.tools.fair.tasks import TASKS, say
from openpilot.tools.fair.teacher import Label

PICTURE, HORIZON = InputSpec(), 48
BOXES = np.array([(120, 40, 180, 90), (300, 44, 340, 76)], np.float32)  # an oncoming one, and one ahead


def table(boxes: np.ndarray, cls: int = 0) -> dict[str, np.ndarray]:
  sides = {k: boxes[:, i] for i, k in enumerate(("x0", "y0", "x1", "y1"))}
  return {**sides, "cls": np.full(len(boxes), cls), "score": np.ones(len(boxes), np.float32)}


def clip(luma: int = 140, boxes: np.ndarray = BOXES, steps: int = 2) -> RawClip:
  """A gray road under a bright sky, with gray vehicles on it."""
  classes = street_classes()
  rgb = np.full((256, 512, 3), luma, np.uint8)
  rgb[:HORIZON] = min(luma + 80, 255)
  maps = np.zeros((64, 128), np.uint8)
  maps[: HORIZON // 4] = 1
  label = Label("maps", "dense", "uint8", (64, 128), "class", ("road", "sky"))
  things = Label("boxes", "boxes", classes=("vehicle", "person"))
  said = {
    "segmentation": say([label], [maps] * steps, TASKS["segmentation"], classes),
    "objects": say([things], [table(boxes)] * steps, TASKS["objects"], classes),
  }
  return RawClip("a", np.repeat(pack_rgb(rgb)[None], steps, 0), np.ones((256, 512), bool), said)


def night(seed: int) -> Night:
  """Of which sides are known, and in which nothing else shines."""
  out = Night(np.random.default_rng(seed), PICTURE)
  out.oncoming, out.parked, out.others, out.noise, out.tail, out.head, out.wet = 0.5, 2.0, 0, 0.0, 1.0, 5.0, 0.0
  return out


@pytest.mark.parametrize("seed", range(6))
def test_vehicles_have_their_lights_and_the_sky_is_dark(seed):
  scene = scenes(clip(), PICTURE)[0]
  assert scene.sky[:11].all() and not scene.sky[13:].any() and np.array_equal(scene.vehicles, BOXES)
  frame = night(seed).frame(clip().frames[0], scene, 0)
  y, uv = luma_of(frame), frame[4:].transpose(1, 2, 0)
  for x0, y0, x1, y1 in BOXES.astype(int):
    inside = y[y0:y1, x0:x1]
    assert inside.max() > 200 and inside.max() > 1.5 * np.median(y[100:200])  # brighter than the road
  red = uv[..., 1].astype(int) - 128
  front, rear = (red[int(a[1]) // 2 : int(a[3]) // 2, int(a[0]) // 2 : int(a[2]) // 2] for a in BOXES)
  assert rear.max() > 35 and front.max() < 15
  assert np.median(y[:30]) < 60 and np.median(y[:30]) < np.median(y[200:])


@pytest.mark.parametrize("seed", range(6))
def test_beams_light_the_road_ahead_more_than_beside_and_more_near_than_far(seed):
  which = night(seed)
  which.street = 0.0
  lit = which.lit(Scene(np.full((64, 128), np.nan, np.float32), np.zeros((64, 128), bool), np.zeros((0, 4))))
  assert lit.min() >= 0 and np.isfinite(lit).all()
  assert lit[240, 256] > lit[60, 256] and lit[90, 256] > lit[90, 8]
  near = np.full((64, 128), 4.0, np.float32)  # a wall, as far as known, is lit more than what is taken to stand behind
  walled = which.lit(Scene(near, np.zeros((64, 128), bool), np.zeros((0, 4))))
  assert walled[52, 256] > lit[52, 256]


def test_nothing_shines_below_the_horizon_where_no_vehicle_is():
  none = np.zeros((0, 4), np.float32)
  for seed in range(20):
    which = Night(np.random.default_rng(seed), PICTURE)
    planes = which.lights(Scene(np.full((64, 128), np.nan), np.zeros((64, 128), bool), none)).planes
    assert planes[:, 100:].max() < 0.02 and planes[:, :HORIZON].max() > 0.02


def test_a_night_is_the_same_again_and_leaves_labels_and_dark_clips_alone():
  day = clip()
  before, boxes = day.frames.copy(), [{k: v.copy() for k, v in t.items()} for t in day.said["objects"].values]
  a, b = (by_night(day, np.random.default_rng(3), PICTURE) for _ in range(2))
  assert a.shape == day.frames.shape and a.dtype == np.uint8 and np.array_equal(a, b)
  assert not np.array_equal(a, by_night(day, np.random.default_rng(4), PICTURE))
  assert np.array_equal(day.frames, before) and a[:, :4].mean() < before[:, :4].mean()
  assert all(np.array_equal(t[k], u[k]) for t, u in zip(boxes, day.said["objects"].values, strict=True) for k in t)
  assert not np.array_equal(a[0], a[1])  # noise
  dark = clip(int(DARK) - 40)
  assert is_dark(dark.frames) and by_night(dark, np.random.default_rng(3), PICTURE) is dark.frames


def test_what_labels_do_not_say_is_not_made_up():
  """Without boxes nothing has lights; a frame that nobody labeled is dark all the same."""
  day = clip()
  day.said["objects"].values[0] = None
  person = Label("boxes", "boxes", classes=("vehicle", "person"))
  day.said["detector"] = say([person], [table(BOXES, 1)] * 2, TASKS["detector"], street_classes())
  first, second = scenes(day, PICTURE)
  assert not len(first.vehicles) and np.isnan(second.z).all()
  assert called("vehicle", ("person", "car", "cone", "Truck")) == [1, 3] and called("sky", ("road",)) == []
  day.said.clear()
  assert by_night(day, np.random.default_rng(1), PICTURE)[:, :4].mean() < day.frames[:, :4].mean()
