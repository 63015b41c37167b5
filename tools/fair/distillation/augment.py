"""One random change of a clip, geometric and photometric, applied alike to its frames and to all of its labels.

The geometric change is affine, of the picture's pixels, by default the 512x256 view's: x' = A x. Where it enlarges the
picture by s, things look s times nearer to a camera whose focal length is fixed: metric depth is divided by s. Pixels
that come from outside the view, or from outside the camera's image, count nowhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import cv2
import numpy as np

from openpilot.common.transformations.model import medmodel_intrinsics, sbigmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import luma_of, pack_rgb, packed, unpack_rgb
from openpilot.tools.fair.distillation.light import HIGH, LOW, NO_LIGHT, Light, draw_light, lit, not_darker, stored
from openpilot.tools.fair.distillation.pixels import apply
from openpilot.tools.fair.spec import InputSpec

IDENTITY = np.eye(3)


@dataclass
class Augmentation:
  matrix: np.ndarray  # (3, 3) from the view's pixels to the augmented view's
  zoom: float
  gain: float = 1.0
  bias: float = 0.0  # of luma, in steps of 255
  gamma: float = 1.0
  chroma: float = 1.0
  tint: tuple[float, float] = (0.0, 0.0)
  noise: float = 0.0
  blur: float = 0.0
  light: Light = NO_LIGHT
  seed: int = 0
  pixels: tuple[tuple[str, float], ...] = ()  # changes of pixels.py: name, strength
  picture: InputSpec = field(default_factory=InputSpec)

  @property
  def is_none(self) -> bool:
    same = [f for f in fields(self) if f.name not in ("matrix", "zoom", "seed", "picture")]
    return not self.is_geometric and all(getattr(self, f.name) == f.default for f in same)

  @property
  def is_geometric(self) -> bool:
    return not np.array_equal(self.matrix, IDENTITY)


NONE = Augmentation(IDENTITY, 1.0)


def none(picture: InputSpec) -> Augmentation:
  return replace(NONE, picture=picture)


def horizon(picture: InputSpec) -> float:
  """Its row in a level camera's picture, pixels; of a picture of any camera, its middle."""
  if picture.kind == "rgb":
    return picture.height / 2
  view = sbigmodel_intrinsics if picture.view == "sbigmodel" else medmodel_intrinsics
  return float(view[1, 2]) * picture.height / 256


ZOOM = 0.9, 1.35


def draw(
  r: np.random.Generator,
  mirror: bool = True,
  picture: InputSpec | None = None,
  strength: float = 1.0,
  zoom_range: tuple[float, float] | None = None,
  pixels: Sequence[tuple[str, float, float]] = (),
) -> Augmentation:
  """mirror=False where labels are a ViT's features: its grid of a mirrored picture is not the mirrored grid (position
  embeddings). strength: of the changes of light, from 1: light.py. zoom_range: by which the picture is scaled, where
  its camera's focal length is not known: then always. pixels: further changes of the frame: name, share of frames,
  strength."""
  picture = picture or InputSpec()
  least, most = zoom_range or ZOOM
  width, height = picture.width / 512, picture.height / 256  # of the view's
  matrix, zoom = IDENTITY.copy(), 1.0
  if r.uniform() < 0.7 or zoom_range is not None:
    zoom = float(np.exp(r.uniform(np.log(least), np.log(most))))
    roll = r.normal(0, 0.015)
    c, s = zoom * np.cos(roll), zoom * np.sin(roll)
    cx, cy = (picture.width - 1) / 2, horizon(picture) + r.uniform(-10, 40) * height
    shift = r.uniform(-20, 20) * width, r.uniform(-8, 8) * height
    matrix = np.array([[c, -s, cx - c * cx + s * cy + shift[0]], [s, c, cy - s * cx - c * cy + shift[1]], [0, 0, 1]])
  if mirror and r.uniform() < 0.5:
    matrix = np.array([[-1.0, 0, picture.width - 1], [0, 1, 0], [0, 0, 1]]) @ matrix
  s = strength
  a = Augmentation(
    matrix,
    zoom,
    gain=float(np.exp(r.normal(0, 0.2 * s))),
    bias=float(r.normal(0, 0.04 * s)),
    gamma=float(np.exp(r.normal(0, 0.15 * s))),
    chroma=float(r.uniform(0.5 / s, 1.4 * s**0.5)),
    tint=(float(r.normal(0, 3 * s**0.5)), float(r.normal(0, 3 * s**0.5))),
    noise=float(r.choice([0.0, 2.0, 6.0])),
    blur=float(r.choice([0.0, 0.0, 0.6, 1.2])),
    seed=int(r.integers(1 << 31)),
    picture=picture,
  )
  if s != 1:
    a = replace(a, gain=bounded(a), light=draw_light(r, s))
  a.pixels = tuple((n, float(r.uniform(0.3, 1) * full)) for n, share, full in pixels if r.uniform() < share)
  return a


def turned(a: Augmentation, degrees: float) -> Augmentation:
  """The same, and then turned about the picture's center: positive ones turn x towards y."""
  c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  x, y = (a.picture.width - 1) / 2, (a.picture.height - 1) / 2
  turn = np.array([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y], [0, 0, 1]])
  return replace(a, matrix=turn @ a.matrix)


def bounded(a: Augmentation) -> float:
  """The gain that keeps a middle gray one: a picture of which nothing is left teaches nothing."""
  gray = 0.5**a.gamma
  return float(np.clip(a.gain, (LOW - a.bias) / gray, (HIGH - a.bias) / gray))


def grid_matrix(w: int, h: int, picture: InputSpec | None = None) -> np.ndarray:
  """(3, 3) from the picture's pixels, by default the view's, to those of a grid of w x h that covers all of it; both
  are counted from pixel centers."""
  picture = picture or InputSpec()
  sx, sy = w / picture.width, h / picture.height
  return np.array([[sx, 0, sx / 2 - 0.5], [0, sy, sy / 2 - 0.5], [0, 0, 1]])


def warp_grid(
  a: Augmentation, grid: np.ndarray, linear: bool, fill: float = 0.0, size: tuple[int, int] | None = None
) -> np.ndarray:
  """grid (h, w) or (h, w, C up to any) over the whole view -> the same of the augmented view; what comes from outside
  is `fill`. size: (width, height) of what comes out, where a geometric change is asked for: sampled at its pixels'
  centers, not averaged over them."""
  if not a.is_geometric:
    return grid
  h, w = grid.shape[:2]
  to = size or (w, h)
  m = (grid_matrix(to[0], to[1], a.picture) @ a.matrix @ np.linalg.inv(grid_matrix(w, h, a.picture)))[:2]
  w, h = size or (w, h)
  flags = cv2.INTER_LINEAR if linear else cv2.INTER_NEAREST
  if grid.ndim == 3 and grid.shape[2] > 4:  # OpenCV's borders have up to four channels
    return np.stack(
      [
        cv2.warpAffine(np.ascontiguousarray(grid[..., c]), m, (w, h), flags=flags, borderValue=fill)
        for c in range(grid.shape[2])
      ],
      axis=-1,
    )
  return cv2.warpAffine(np.ascontiguousarray(grid), m, (w, h), flags=flags, borderValue=[fill] * 4).reshape(
    h, w, *grid.shape[2:]
  )


def warp_points(a: Augmentation, xy: np.ndarray) -> np.ndarray:
  """(..., 2) pixels of the view -> of the augmented view."""
  return xy @ a.matrix[:2, :2].T + a.matrix[:2, 2]


def warp_boxes(a: Augmentation, boxes: np.ndarray) -> np.ndarray:
  """(N, 4) x0 y0 x1 y1 -> the upright boxes around what they become, not cut at the view's border."""
  corners = warp_points(a, boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])
  return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def warp_frame(a: Augmentation, frame: np.ndarray, t: int = 0) -> np.ndarray:
  """(*a.picture.shape) uint8 -> the same, changed. t: of the clip, so that noise differs from frame to frame."""
  if a.pixels and a.picture.kind == "model_frame":
    return pack_rgb(with_pixels(a, unpack_rgb(warp_frame(replace(a, pixels=()), frame, t)), t))
  if a.picture.kind == "rgb":
    rgb = np.ascontiguousarray(frame.transpose(1, 2, 0))
    if a.is_geometric:
      size = a.picture.width, a.picture.height
      rgb = cv2.warpAffine(rgb, a.matrix[:2], size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    rgb = with_pixels(a, rgb, t)
    ycc = cv2.cvtColor(rgb, cv2.COLOR_RGB2YCrCb)
    planes = changed_luma(a, ycc[..., 0], t), *(changed_chroma(a, ycc[..., 1 + k], 1 - k) for k in range(2))
    return np.ascontiguousarray(cv2.cvtColor(np.stack(planes, -1), cv2.COLOR_YCrCb2RGB).transpose(2, 0, 1))
  w, h = a.picture.width, a.picture.height
  y, uv = luma_of(frame), np.ascontiguousarray(frame[4:].transpose(1, 2, 0))
  if a.is_geometric:
    y = cv2.warpAffine(y, a.matrix[:2], (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    g = grid_matrix(w // 2, h // 2, a.picture)
    uv = cv2.warpAffine(
      uv,
      (g @ a.matrix @ np.linalg.inv(g))[:2],
      (w // 2, h // 2),
      flags=cv2.INTER_LINEAR,
      borderMode=cv2.BORDER_REPLICATE,
    )
  return packed(changed_luma(a, y, t), *(changed_chroma(a, uv[..., k], k) for k in range(2)))


def with_pixels(a: Augmentation, rgb: np.ndarray, t: int) -> np.ndarray:
  for k, (name, strength) in enumerate(a.pixels):
    rgb = apply(name, rgb, (a.seed + 7919 * t + 104729 * k) % (1 << 31), strength)
  return rgb


def changed_luma(a: Augmentation, y: np.ndarray, t: int) -> np.ndarray:
  """(h, w) uint8 -> the same: what falls in, blur, gamma, gain, noise, and how it is kept."""
  y = lit(a.light, y)
  if a.blur:
    y = cv2.GaussianBlur(y, (0, 0), a.blur)
  level = np.arange(256, dtype=np.float32) / 255
  gain = a.gain if a.light == NO_LIGHT else not_darker(y, a.gain, a.gamma, a.bias)
  y = cv2.LUT(y, np.clip(255 * (gain * level**a.gamma + a.bias) + 0.5, 0, 255).astype(np.uint8))
  if a.noise:
    r = np.random.default_rng([a.seed, t])
    y = cv2.add(y, (r.standard_normal(y.shape, np.float32) * a.noise).astype(np.int16), dtype=cv2.CV_8U)
  return stored(a.light, y)


def changed_chroma(a: Augmentation, plane: np.ndarray, k: int) -> np.ndarray:
  """(h, w) uint8 -> the same. k: 0 U, 1 V."""
  centered = np.arange(256, dtype=np.float32) - 128
  table = np.clip(128 + a.chroma * centered + a.tint[k] + 0.5, 0, 255).astype(np.uint8)
  return stored(a.light, cv2.LUT(np.ascontiguousarray(plane), table))
