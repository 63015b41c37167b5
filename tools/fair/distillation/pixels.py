"""What light, weather and cameras do to a picture's pixels, in numpy and OpenCV. Nothing moves: labels stay as they
are.

Each takes (h, w, 3) uint8 RGB, a random generator and a strength, 0 (nothing) to 1 (the most that a label outlives),
and gives the same shape. `apply` runs one by its name."""

from collections.abc import Callable

import cv2
import numpy as np

Change = Callable[[np.ndarray, np.random.Generator, float], np.ndarray]


def lut(rgb: np.ndarray, table: np.ndarray) -> np.ndarray:
  """table: (256,) or (256, 3) float of new values."""
  t = np.clip(table + 0.5, 0, 255).astype(np.uint8)
  return cv2.LUT(rgb, np.ascontiguousarray(t.reshape(256, 1, -1)) if t.ndim > 1 else t)


LEVELS = np.arange(256, dtype=np.float32)


def dark(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Little light: darker, and darker still in the shadows."""
  gain, gamma = 1 - r.uniform(0.3, 0.75) * s, 1 + r.uniform(0, 0.8) * s
  return lut(rgb, 255 * gain * (LEVELS / 255) ** gamma)


def bright(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Overexposed: lights are cut off."""
  return lut(rgb, LEVELS * (1 + r.uniform(0.2, 0.9) * s) + r.uniform(0, 40) * s)


def exposure(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Gain, contrast and gamma, both ways."""
  gain, gamma = np.exp(r.normal(0, 0.25 * s)), np.exp(r.normal(0, 0.3 * s))
  contrast = np.exp(r.normal(0, 0.25 * s))
  return lut(rgb, 128 + contrast * (255 * gain * (LEVELS / 255) ** gamma - 128))


def color(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """White balance and saturation."""
  tint = 1 + r.uniform(-0.25, 0.25, 3) * s
  out = lut(rgb, LEVELS[:, None] * tint)
  gray = cv2.cvtColor(cv2.cvtColor(out, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
  k = float(1 + r.uniform(-0.7, 0.5) * s)
  return cv2.addWeighted(out, k, gray, 1 - k, 0)


def noise(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """A sensor's: more where it is light (photons), some everywhere (reading)."""
  x = rgb.astype(np.float32)
  grain = r.standard_normal(rgb.shape, np.float32)
  return np.clip(x + grain * (np.sqrt(x) * np.float32(1.6 * s) + np.float32(6 * s)) + 0.5, 0, 255).astype(np.uint8)


def defocus(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  return cv2.GaussianBlur(rgb, (0, 0), max(0.05, float(r.uniform(0.4, 2.2) * s * scale_of(rgb))))


def motion(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """The camera moved, or the thing, straight on while the shutter was open."""
  length = max(1, round(float(r.uniform(3, 13) * s * scale_of(rgb))))
  if length < 2:
    return rgb
  kernel = np.zeros((length, length), np.float32)
  a, c = r.uniform(0, np.pi), (length - 1) / 2
  for t in np.linspace(-c, c, 4 * length):
    kernel[round(c + t * np.sin(a)), round(c + t * np.cos(a))] += 1
  return cv2.filter2D(rgb, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REPLICATE)


def scale_of(rgb: np.ndarray) -> float:
  """What a pixel of a picture of 640 is here."""
  return max(rgb.shape[:2]) / 640


def low_resolution(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  h, w = rgb.shape[:2]
  k = 1 + r.uniform(0.3, 2.0) * s
  small = cv2.resize(rgb, (max(1, round(w / k)), max(1, round(h / k))), interpolation=cv2.INTER_AREA)
  return cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR)


def jpeg(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  quality = round(95 - r.uniform(10, 75) * s)
  done, data = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, int(quality)])
  return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR)) if done else rgb


def sharpen(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  k = float(r.uniform(0.3, 1.2) * s)
  return cv2.addWeighted(rgb, 1 + k, cv2.GaussianBlur(rgb, (0, 0), 1.2), -k, 0)


def ramp(h: int, w: int, r: np.random.Generator) -> np.ndarray:
  """(h, w, 1) float32 0..1, smooth, of a random direction."""
  a = r.uniform(0, 2 * np.pi)
  y, x = np.linspace(-0.5, 0.5, h, dtype=np.float32)[:, None], np.linspace(-0.5, 0.5, w, dtype=np.float32)
  return np.clip(0.5 + 0.7 * (x * np.float32(np.cos(a)) + y * np.float32(np.sin(a))), 0, 1)[..., None]


def blend(rgb: np.ndarray, to: np.ndarray | float, share: np.ndarray) -> np.ndarray:
  """share: (h, w, 1) float32 of `to`."""
  return np.clip(rgb + (to - rgb.astype(np.float32)) * share + 0.5, 0, 255).astype(np.uint8)


def fog(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Thicker above, where things are farther."""
  h, w = rgb.shape[:2]
  depth = np.linspace(1, 0.35, h, dtype=np.float32)[:, None, None] * np.ones((1, w, 1), np.float32)
  uneven = 0.8 + 0.4 * ramp(h, w, r)
  return blend(rgb, float(r.uniform(170, 225)), np.clip(depth * uneven * np.float32(r.uniform(0.25, 0.75) * s), 0, 0.9))


def rain(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Streaks of one direction, a darker and softer picture."""
  h, w = rgb.shape[:2]
  layer = np.zeros((h, w), np.uint8)
  slant, length = r.uniform(-0.35, 0.35), scale_of(rgb) * r.uniform(10, 28)
  xs, ys = r.uniform(0, w, n := max(1, int(260 * s))), r.uniform(-length, h, n)
  lengths = length * r.uniform(0.6, 1.4, n)
  for x, y, k in zip(xs, ys, lengths, strict=True):
    cv2.line(layer, (int(x), int(y)), (int(x + slant * k), int(y + k)), int(r.integers(120, 220)), 1, cv2.LINE_AA)
  share = (layer.astype(np.float32) / 255 * np.float32(0.7))[..., None]
  return blend(lut(cv2.GaussianBlur(rgb, (0, 0), 0.3 + 0.6 * s), LEVELS * (1 - 0.25 * s)), 215.0, share)


def snow(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  h, w = rgb.shape[:2]
  layer: np.ndarray = np.zeros((h, w), np.float32)
  n = max(1, int(320 * s))
  for x, y, k in zip(r.integers(0, w, n), r.integers(0, h, n), r.uniform(0.6, 2.2, n), strict=True):
    cv2.circle(layer, (int(x), int(y)), max(1, round(k * scale_of(rgb))), 1.0, -1, cv2.LINE_AA)
  return blend(rgb, 240.0, (cv2.GaussianBlur(layer, (0, 0), 0.8) * np.float32(0.8))[..., None])


def shadow(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Of something beside the picture: a soft-edged quadrilateral."""
  h, w = rgb.shape[:2]
  layer: np.ndarray = np.zeros((h, w), np.float32)
  corners = np.stack([r.uniform(-0.3, 1.3, 4) * w, r.uniform(-0.3, 1.3, 4) * h], 1)
  cv2.fillConvexPoly(layer, cv2.convexHull(corners.astype(np.int32)), 1.0)
  layer = cv2.GaussianBlur(layer, (0, 0), max(1.0, 6 * scale_of(rgb)))
  return blend(rgb, 0.0, (layer * np.float32(r.uniform(0.25, 0.7) * s))[..., None])


def glare(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """A light in or beside the picture, and the veil that it lays over the lens."""
  h, w = rgb.shape[:2]
  x, y = r.uniform(-0.1, 1.1) * w, r.uniform(-0.2, 0.6) * h
  reach = np.float32(max(h, w) * r.uniform(0.2, 0.6))
  yy, xx = np.arange(h, dtype=np.float32)[:, None], np.arange(w, dtype=np.float32)
  near = np.exp(-((xx - np.float32(x)) ** 2 + (yy - np.float32(y)) ** 2) / (2 * reach**2))
  return blend(rgb, 250.0, (np.clip(near * np.float32(0.9 * s) + np.float32(0.12 * s), 0, 0.95))[..., None])


def backlit(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Light from behind: what is dark sinks, what is light blooms."""
  k = r.uniform(0.3, 0.9) * s
  curve = 255 * ((1 - k) * (LEVELS / 255) + k * np.clip(1.35 * (LEVELS / 255) ** 2.2, 0, 1))
  out = lut(rgb, curve)
  light = cv2.GaussianBlur(np.where(rgb > 200, rgb, 0).astype(np.uint8), (0, 0), max(1.0, 8 * scale_of(rgb)))
  return cv2.addWeighted(out, 1.0, light, 0.5 * float(k), 0)


def highlights(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Spots that mirror a lamp, as metal and glass have them."""
  h, w = rgb.shape[:2]
  layer: np.ndarray = np.zeros((h, w), np.float32)
  for _ in range(1 + int(r.integers(0, 1 + int(5 * s)))):
    axes = tuple(max(1, int(v)) for v in r.uniform(0.01, 0.06, 2) * max(h, w) * (0.5 + s))
    at = int(r.uniform(0, w)), int(r.uniform(0, h))
    cv2.ellipse(layer, at, axes, float(r.uniform(0, 180)), 0, 360, float(r.uniform(0.4, 0.9)), -1)
  layer = cv2.GaussianBlur(layer, (0, 0), max(1.0, 4 * scale_of(rgb)))
  return blend(rgb, 255.0, (layer * np.float32(s))[..., None])


def fade(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Contrast lost, as behind a pane."""
  k = float(r.uniform(0.2, 0.65) * s)
  return lut(rgb, LEVELS * (1 - k) + k * float(r.uniform(90, 180)))


def banding(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Rows lighter and darker: a lamp that flickers while a rolling shutter runs."""
  h = len(rgb)
  wave = 1 + 0.3 * s * np.sin(np.linspace(0, r.uniform(4, 30), h) + r.uniform(0, 6.3))
  return np.clip(rgb * wave[:, None, None].astype(np.float32) + 0.5, 0, 255).astype(np.uint8)


def vignette(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Corners darker, as wide lenses make them."""
  h, w = rgb.shape[:2]
  y, x = np.linspace(-1, 1, h, dtype=np.float32)[:, None], np.linspace(-1, 1, w, dtype=np.float32)
  return blend(rgb, 0.0, (np.clip((x * x + y * y) * np.float32(0.35 * r.uniform(0.5, 1) * s), 0, 0.9))[..., None])


def patches(rgb: np.ndarray, r: np.random.Generator, s: float) -> np.ndarray:
  """Small things in front: patches of the picture's own pixels at other places."""
  h, w = rgb.shape[:2]
  out = rgb.copy()
  for _ in range(1 + int(4 * s)):
    ph, pw = (max(2, int(v)) for v in r.uniform(0.02, 0.09, 2) * [h, w])
    y, x, v, u = (int(r.integers(0, max(1, n))) for n in (h - ph, w - pw, h - ph, w - pw))
    out[y : y + ph, x : x + pw] = rgb[v : v + ph, u : u + pw]
  return out


CHANGES: dict[str, Change] = {
  f.__name__: f
  for f in (
    dark,
    bright,
    exposure,
    color,
    noise,
    defocus,
    motion,
    low_resolution,
    jpeg,
    sharpen,
    fog,
    rain,
    snow,
    shadow,
    glare,
    backlit,
    highlights,
    fade,
    banding,
    vignette,
    patches,
  )
}


def apply(name: str, rgb: np.ndarray, seed: int, strength: float) -> np.ndarray:
  """The same every time. Raises KeyError where there is no such change."""
  return CHANGES[name](rgb, np.random.default_rng(seed), float(np.clip(strength, 0, 1)))
