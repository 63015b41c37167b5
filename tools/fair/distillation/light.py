"""Stronger changes of light and sharpness, for `--light` above 1: what other cameras, weathers and hours do to a
picture. It is not made dark: a middle gray stays one (LOW, HIGH), and a dark frame's mean does not fall."""

from dataclasses import dataclass

import cv2
import numpy as np

MOST = 4.0  # the strongest
LOW, HIGH = 0.22, 0.85  # what a gray of 0.5 may become
SPOT = 4  # flares are found and drawn at a quarter of the size


@dataclass(frozen=True)
class Light:
  """None of it, by default. All of a clip's frames get the same."""

  contrast: float = 1.0  # around the frame's mean
  ramp: tuple[float, float] = (0.0, 0.0)  # of luma's factor, from the middle to the right and the lower border
  vignette: float = 0.0  # share of light that the corners lose
  flare: float = 0.0  # of a bright spot's excess over its surroundings: how much goes into the disc around it
  radius: float = 1.0  # of the disc, in 1/64 of the picture's height
  ghost: bool = False  # a second, fainter disc opposite the picture's middle
  shrink: float = 1.0  # the picture is made smaller by it, and as large again
  quality: int = 0  # of JPEG, 1 to 100; 0: none


NO_LIGHT = Light()


def draw_light(r: np.random.Generator, strength: float) -> Light:
  """strength: above 1, to MOST."""
  k = min(strength - 1, MOST - 1)
  often = min(1.0, k) * 0.35  # of each kind

  def now() -> bool:
    return bool(r.uniform() < often)

  contrast = float(np.exp(np.clip(r.normal(0, 0.15 * k), -0.5, 0.5)))
  right, down = (float(x) for x in r.uniform(-0.25, 0.25, 2) * min(k, 2))
  ramp = (right, down) if now() else (0.0, 0.0)
  vignette = float(r.uniform(0.15, 0.35) * min(k, 2)) if now() else 0.0
  flare, radius, ghost = float(r.uniform(0.3, 0.8) * k), float(r.uniform(3.0, 12.0)), bool(r.uniform() < 0.4)
  has_flare = now()
  shrink = float(r.uniform(1.5, min(3.0, 2 + 0.5 * k))) if now() else 1.0
  quality = int(r.integers(max(8, int(40 - 12 * k)), 60)) if now() else 0
  return Light(contrast, ramp, vignette, flare * has_flare, radius, ghost and has_flare, shrink, quality)


def lit(light: Light, y: np.ndarray) -> np.ndarray:
  """(h, w) uint8 luma -> the same: light as it falls in."""
  h, w = y.shape
  if light.vignette or any(light.ramp):
    gy, gx = np.mgrid[-1 : 1 : 1j * h, -1 : 1 : 1j * w].astype(np.float32)
    factor = (1 + light.ramp[0] * gx + light.ramp[1] * gy) * (1 - light.vignette * (gx**2 + gy**2) / 2)
    y = np.clip(y * (factor / factor.mean()) + 0.5, 0, 255).astype(np.uint8)
  if light.contrast != 1:
    level, mean = np.arange(256, dtype=np.float32), np.float32(y.mean())
    y = cv2.LUT(y, np.clip(mean + light.contrast * (level - mean) + 0.5, 0, 255).astype(np.uint8))
  if light.flare:
    glow = cv2.GaussianBlur(cv2.resize(glare(light, y), (w, h), interpolation=cv2.INTER_LINEAR), (0, 0), 2)
    y = np.clip(y + glow + 0.5, 0, 255).astype(np.uint8)
  return y


def not_darker(y: np.ndarray, gain: float, gamma: float, bias: float) -> float:
  """(h, w) uint8 -> the gain, raised, to 3 at most, where the mean of a dark frame would fall."""
  mean = max(float(y.mean()) / 255, 1e-3)
  return max(gain, min((min(mean, LOW / 2) - bias) / mean**gamma, 3.0))


def glare(light: Light, y: np.ndarray) -> np.ndarray:
  """(h, w) uint8 -> (h / SPOT, w / SPOT) float32, luma that discs around bright spots add. Bright areas, as the sky,
  are no spots."""
  h, w = y.shape
  small = cv2.resize(y, (w // SPOT, h // SPOT), interpolation=cv2.INTER_AREA)
  spots = cv2.morphologyEx(small, cv2.MORPH_TOPHAT, np.ones((7, 7), np.uint8)).astype(np.float32)
  spots[(small < 205) | (spots < 60)] = 0
  size = max(1, round(light.radius * h / 64 / SPOT))
  far = np.hypot(*np.mgrid[-2 * size : 2 * size + 1, -2 * size : 2 * size + 1]).astype(np.float32)
  disc = np.clip(size + 0.5 - far, 0, 1)
  soft = 0.6 * disc + 0.4 * np.clip(1 - far / (2 * size), 0, 1)
  out = cv2.filter2D(spots, -1, soft / 4, borderType=cv2.BORDER_CONSTANT)
  if light.ghost:
    out = out + 0.3 * cv2.filter2D(spots[::-1, ::-1].copy(), -1, disc / 4, borderType=cv2.BORDER_CONSTANT)
  return np.minimum(light.flare * out, 100)


def stored(light: Light, plane: np.ndarray) -> np.ndarray:
  """(h, w) uint8 -> the same: what a smaller sensor and compression leave of it. After all else, noise too."""
  h, w = plane.shape
  if light.shrink != 1:
    size = max(1, round(w / light.shrink)), max(1, round(h / light.shrink))
    plane = cv2.resize(cv2.resize(plane, size, interpolation=cv2.INTER_AREA), (w, h), interpolation=cv2.INTER_LINEAR)
  if light.quality:
    data = cv2.imencode(".jpg", plane, [cv2.IMWRITE_JPEG_QUALITY, light.quality])[1]
    plane = np.asarray(cv2.imdecode(data, cv2.IMREAD_GRAYSCALE))
  return plane
