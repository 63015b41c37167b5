"""Colors of classes, identities and depth in pictures for people."""

import colorsys
import hashlib
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

Color = tuple[int, int, int]
# of the first classes that have a role; of further ones, and those without a role, the name decides
ROLE_COLORS: dict[str, tuple[Color, ...]] = {
  "ground": ((70, 110, 255),),
  "marking": ((255, 220, 0),),
  "movable": ((255, 50, 50), (40, 230, 90)),
}
TINT = 0.4
NEAR, FAR = 2.0, 120.0  # meters, ends of the depth colors
TURBO = (matplotlib.colormaps["turbo"](np.linspace(1, 0, 256))[:, :3] * 255).astype(np.uint8)  # near is red


def name_color(name: str) -> Color:
  """Of a class: the same for one name on every machine."""
  hue, strong, light = (v / 255 for v in hashlib.md5(name.encode(), usedforsecurity=False).digest()[:3])
  r, g, b = colorsys.hsv_to_rgb(hue, 0.45 + 0.5 * strong, 0.6 + 0.4 * light)
  return round(r * 255), round(g * 255), round(b * 255)


def class_colors(names: Sequence[str], roles: Mapping[str, str]) -> dict[str, Color]:
  """Classes in their order -> the color of each that is drawn: all but background. roles: {class: role}."""
  left = {role: list(colors) for role, colors in ROLE_COLORS.items()}
  out = {}
  for name in names:
    role = roles.get(name, "")
    if role != "background":
      out[name] = left[role].pop(0) if left.get(role) else name_color(name)
  return out


def track_color(identity: int) -> Color:
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
