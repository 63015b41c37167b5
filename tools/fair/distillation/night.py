"""Clips by day made to clips by night, for `--night`: labels say where the lights are.

The sky goes dark. The car's own low beams light the road and what stands on it, as far as its depth says, or the road
plane where that is not known; lamps along the street light a little of everything. Vehicles have tail lights or
headlights, or, where they are near, none; the road mirrors them. Above the horizon lamps, signs and windows shine that
are no vehicles'. Labels stay what they were by day. Lengths are in heights of the camera above the road."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from openpilot.common.transformations.model import medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import luma_of, packed
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
from openpilot.tools.fair.distillation.augment import none
from openpilot.tools.fair.distillation.data import RawClip
from openpilot.tools.fair.spec import InputSpec, street_classes
from openpilot.tools.fair.tasks import TASKS

GAMMA = 2.2
DARK = 60.0  # mean luma: darker clips are of a night already
FARTHEST = 60.0  # heights: how far the road is drawn
BESIDE = 16.0  # heights: where what stands at no known distance is taken to stand
UNLIT = 24.0  # view pixels: a lower vehicle without lights would not be seen
TINY = 4.0  # view pixels: a lower vehicle's lights are one
WHITE, AMBER, RED, GREEN, BLUE = range(5)
COLOR = np.array([(4, -2), (-34, 16), (-24, 76), (-10, -40), (45, -18)], np.float32)  # U and V less 128


@dataclass
class Scene:
  """What labels say of one frame. Maps are (h, w), a quarter of the picture's."""

  z: np.ndarray  # float32 heights along the optical axis, nan unknown
  sky: np.ndarray  # bool
  vehicles: np.ndarray  # (N, 4) x0 y0 x1 y1, the picture's pixels


def called(name: str, classes: Sequence[str]) -> list[int]:
  """Places of the classes that are a class of the streets' by their name or an alias of it, as car is a vehicle."""
  return [k for k, n in enumerate(classes) if (c := street_classes().find(n)) is not None and c.name == name]


def scenes(clip: RawClip, picture: InputSpec) -> list[Scene]:
  """One of each frame. What no label tells is not there: no sky, no vehicles, no depth."""
  steps, r = len(clip.frames), np.random.default_rng(0)
  said, still = clip.said, none(picture)
  boxed = "detector" if "detector" in said else "objects"  # both are taught by boxes
  told = {
    k: v for t in ("depth", "segmentation", boxed) if t in said for k, v in TASKS[t].targets(said[t], still, r).items()
  }
  z = np.full((steps, *picture.map_shape), np.nan, np.float32)
  sky = np.zeros(z.shape, bool)
  boxes: list[np.ndarray] = [np.zeros((0, 4), np.float32)] * steps
  if "depth" in told:
    unit = 1.0 if said["depth"].height is not None else DEFAULT_HEIGHT
    z = np.where(told["metric"][:, None, None], told["depth"] / unit, np.nan).astype(np.float32)
  if "segmentation" in told:
    sky = told["segmentation"][:, called("sky", said["segmentation"].classes.maps)].sum(axis=1) > 0.5
  if "objects" in told:
    mine = called("vehicle", said[boxed].classes.boxes)
    boxes = [
      b if o is None else o["boxes"][np.isin(o["cls"], mine)] for b, o in zip(boxes, told["objects"], strict=True)
    ]
  return [Scene(*s) for s in zip(z, sky, boxes, strict=True)]


class Lights:
  """What shines by itself, in linear light in which 1 is the brightest that the camera tells; a plane a color."""

  def __init__(self, h: int, w: int) -> None:
    self.planes = np.zeros((len(COLOR), h, w), np.float32)

  def add(self, color: int, x: float, y: float, sx: float, sy: float, peak: float) -> None:
    """A Gaussian, sx and sy pixels wide."""
    h, w = self.planes.shape[1:]
    x0, x1 = max(0, int(x - 4 * sx)), min(w, int(x + 4 * sx) + 2)
    y0, y1 = max(0, int(y - 4 * sy)), min(h, int(y + 4 * sy) + 2)
    if x0 < x1 and y0 < y1:
      gx = np.exp(-(((np.arange(x0, x1) - x) / sx) ** 2) / 2)
      gy = np.exp(-(((np.arange(y0, y1) - y) / sy) ** 2) / 2)
      self.planes[color, y0:y1, x0:x1] += (peak * gy[:, None] * gx).astype(np.float32)

  def lamp(self, color: int, x: float, y: float, size: float, peak: float, halo: float) -> None:
    """A light and what the lens makes of it. halo: share of its peak, around."""
    self.add(color, x, y, size, size, peak)
    self.add(color, x, y, 4 * size + 1, 4 * size + 1, peak * halo)

  def panel(self, color: int, x0: float, y0: float, x1: float, y1: float, level: float) -> None:
    self.planes[color, max(0, int(y0)) : max(0, int(y1) + 1), max(0, int(x0)) : max(0, int(x1) + 1)] += level


def chance(r: np.random.Generator, least: float, most: float) -> float:
  """Between two positive numbers, each factor as likely."""
  return float(np.exp(r.uniform(np.log(least), np.log(most))))


class Night:
  """One night, drawn: all frames of a clip are lit by it."""

  def __init__(self, r: np.random.Generator, picture: InputSpec):
    self.picture, self.seed = picture, int(r.integers(1 << 31))
    view = sbigmodel_intrinsics if picture.view == "sbigmodel" else medmodel_intrinsics
    self.f, self.row = view[0, 0] * picture.width / 512, view[1, 2] * picture.height / 256  # the horizon's row
    # shares of the width: left of the one vehicles come towards us, right of the other near ones are parked
    self.oncoming, self.parked = r.normal(0.42, 0.12), r.normal(1.0, 0.25)
    self.reach, self.beam = chance(r, 5, 20), (r.uniform(1.0, 2.5), r.uniform(0.12, 0.35))  # heights; width and slope
    self.above, self.street = chance(r, 0.03, 0.3), chance(r, 0.004, 0.25)  # of the beams' light: above the cut, lamps'
    self.pools = cv2.resize(np.exp(r.normal(0, 0.7, (5, 6))).astype(np.float32), (picture.width, picture.height))
    self.sky, self.glow = chance(r, 3e-4, 6e-3), chance(r, 1e-3, 0.02)
    self.exposure = float(r.uniform(0.12, 0.3))  # mean luma below the horizon
    self.color, self.tint = float(r.uniform(0.3, 0.9)), (float(r.uniform(-9, 2)), float(r.uniform(-2, 6)))
    self.noise, self.wet = float(r.uniform(0.5, 5)), float(max(0, r.uniform(-0.1, 0.25)))
    self.tail, self.head, self.halo = chance(r, 0.25, 4), chance(r, 1.5, 20), chance(r, 0.01, 0.08)
    self.others = int(r.poisson(9))

  def lit(self, scene: Scene) -> np.ndarray:
    """(h, w) float32: how much light falls on what is seen at each pixel; the beams' own, near by, is 1."""
    w, h = self.picture.width, self.picture.height
    z = cv2.resize(scene.z, (w, h), interpolation=cv2.INTER_NEAREST)
    v, u = (np.arange(h, dtype=np.float32) - self.row)[:, None], np.arange(w, dtype=np.float32) - (w - 1) / 2
    plane = np.where(v > self.f / FARTHEST, self.f / np.maximum(v, 1), BESIDE).astype(np.float32)
    z = np.where(np.isfinite(z) & (z > 0.5), z, plane)
    up = 1 - v * z / self.f
    width = self.beam[0] + self.beam[1] * z
    cut = self.above * np.exp(-np.maximum(up - 0.5, 0) / 2)
    vertical = cut + (1 - cut) / (1 + np.exp((up - 0.5) * 12))
    return (
      vertical * np.exp(-((u * z / self.f / width) ** 2) / 2) / (1 + (z / self.reach) ** 2) + self.street * self.pools
    )

  def lights(self, scene: Scene) -> Lights:
    w, h = self.picture.width, self.picture.height
    out, scale = Lights(h, w), h / 256
    for x0, y0, x1, y1 in scene.vehicles.astype(float):
      wide, high, middle = x1 - x0, y1 - y0, (x0 + x1) / 2
      if middle > self.parked * w and high > UNLIT * scale:
        continue
      front = middle < self.oncoming * w
      color, peak = (WHITE, self.head) if front else (RED, self.tail)
      size, y = max(0.6 * scale, (0.05 if front else 0.045) * high), y0 + (0.62 if front else 0.5) * high
      for x in (middle,) if high < TINY * scale else (x0 + 0.14 * wide, x1 - 0.14 * wide):
        out.lamp(color, x, y, size, peak, self.halo)
        out.add(color, x, 2 * y1 - y, 1.5 * size + 0.5, 0.35 * high + 1, self.wet * min(peak, 2) * 0.3)
      if not front and high > 8 * scale:
        out.add(WHITE, middle, y + 0.18 * high, 0.08 * wide, 0.03 * high + 0.3, 0.15)  # the number plate
    r = np.random.default_rng(self.seed)
    for _ in range(self.others):
      x, y, color = r.uniform(0, w), r.uniform(0, self.row + 1), int(r.choice(5, p=(0.45, 0.3, 0.1, 0.07, 0.08)))
      size, peak, kind = scale * chance(r, 0.4, 1.6), chance(r, 0.1, 4), r.uniform()
      if ((scene.vehicles[:, :2] <= (x, y)) & ((x, y) <= scene.vehicles[:, 2:])).all(axis=1).any():
        continue
      if kind < 0.75:
        out.lamp(color, x, y, size, peak, self.halo)
      else:
        out.panel(color, x, y - 4 * size, x + r.uniform(3, 12) * size, y, min(peak, 0.8))
    return out

  def frame(self, frame: np.ndarray, scene: Scene, t: int) -> np.ndarray:
    """(6, h / 2, w / 2) uint8 model frame -> the same, by night. t: of the clip."""
    y, uv = luma_of(frame), frame[4:].transpose(1, 2, 0)
    h, w = y.shape
    below = slice(int(self.row) + 8, None)
    day = (y.astype(np.float32) / 255) ** GAMMA
    seen = day * self.lit(scene)
    seen *= (self.exposure / max(float((seen[below] ** (1 / GAMMA)).mean()), 1e-3)) ** GAMMA
    sky = cv2.resize(scene.sky.astype(np.float32), (w, h), interpolation=cv2.INTER_LINEAR)
    v = (self.row - np.arange(h, dtype=np.float32))[:, None]
    seen = seen * (1 - sky) + sky * (self.sky + self.glow * np.exp(-np.maximum(v, 0) * 256 / h / 12))
    planes = self.lights(scene).planes
    shining = planes.sum(0)
    luma = 255 * np.minimum(seen + shining, 1) ** (1 / GAMMA)
    r = np.random.default_rng([self.seed, t])
    luma += r.standard_normal(luma.shape, np.float32) * self.noise * (0.3 + np.sqrt(luma / 255))
    half = (w // 2, h // 2)
    share = [cv2.resize(p / (seen + shining + 2e-3), half, interpolation=cv2.INTER_AREA) for p in planes]
    own = np.maximum(1 - sum(share), 0)[..., None]
    bright = np.minimum(cv2.resize(luma, half, interpolation=cv2.INTER_AREA) / 60, 1)[..., None]
    body = self.color * (uv.astype(np.float32) - 128) + np.array(self.tint, np.float32)
    color = own * bright * body + np.tensordot(np.stack(share, -1), COLOR, 1) * bright
    return np.clip(packed(luma, *(128 + color).transpose(2, 0, 1)) + 0.5, 0, 255).astype(np.uint8)


def is_dark(frames: np.ndarray) -> bool:
  """(T, 6, h / 2, w / 2) uint8."""
  return float(frames[:, :4].mean()) < DARK


def by_night(clip: RawClip, r: np.random.Generator, picture: InputSpec) -> np.ndarray:
  """A clip of model frames -> its frames by night, (T, 6, h / 2, w / 2) uint8; as they are where they are dark."""
  if is_dark(clip.frames):
    return clip.frames
  night = Night(r, picture)
  return np.stack(
    [night.frame(f, s, t) for t, (f, s) in enumerate(zip(clip.frames, scenes(clip, picture), strict=True))]
  )
