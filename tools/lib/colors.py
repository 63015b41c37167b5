"""Colors of classes, identities and depth in pictures for people."""

import colorsys

import matplotlib
import numpy as np

CLASS_COLORS = {"road": (70, 110, 255), "lane": (255, 220, 0), "vehicle": (255, 50, 50), "pedestrian": (40, 230, 90)}
OTHER_COLOR = (200, 80, 220)  # of classes without a color of their own
TINT = 0.4
NEAR, FAR = 2.0, 120.0  # meters, ends of the depth colors
TURBO = (matplotlib.colormaps["turbo"](np.linspace(1, 0, 256))[:, :3] * 255).astype(np.uint8)  # near is red


def track_color(identity: int) -> tuple[int, int, int]:
  """One of a track, the same in every frame; neighbors differ."""
  r, g, b = colorsys.hsv_to_rgb(identity * 0.381966 % 1.0, 0.75, 1.0)
  return round(r * 255), round(g * 255), round(b * 255)


def depth_scale(meters: float | np.ndarray) -> np.ndarray:
  """Meters -> 0 (NEAR) to 1 (FAR), logarithmic."""
  return np.log(np.clip(meters, NEAR, FAR) / NEAR) / np.log(FAR / NEAR)


def depth_picture(z: np.ndarray) -> np.ndarray:
  """(H, W) meters -> (H, W, 3) uint8, logarithmic from red, near, to blue, far; black where there is none."""
  picture = TURBO[(depth_scale(np.nan_to_num(z, nan=NEAR)) * 255).astype(np.uint8)]
  picture[~np.isfinite(z)] = 0
  return picture
