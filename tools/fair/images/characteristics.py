"""What is known of the things in pictures, of the light, the camera, the background and the distance, and how pictures
are varied for it. Where nobody says it, it is guessed from the data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpilot.tools.lib.errors import UserError

INTENSITY = {"low": 0.5, "medium": 0.75, "high": 1.0}
GEOMETRY = ("flip", "rotate", "shear", "scale", "shift", "perspective", "elastic", "lens", "rolling")


@dataclass(frozen=True)
class Step:
  """A change, one of GEOMETRY or of distillation/pixels.py, of a picture in `share` of all, up to `strength` of the
  most that there is."""

  name: str
  share: float
  strength: float


def steps(**named: tuple[float, float]) -> tuple[Step, ...]:
  return tuple(Step(k, *v) for k, v in named.items())


ALWAYS = steps(flip=(0.5, 1), exposure=(0.5, 0.5), color=(0.3, 0.5), shift=(0.5, 0.4), scale=(0.5, 0.35))
# group -> characteristic -> what is added; of a change that several add the larger share and strength count
CHARACTERISTICS: dict[str, dict[str, tuple[Step, ...]]] = {
  "object": {
    "small": steps(scale=(0.7, 0.6), low_resolution=(0.2, 0.4), shift=(0.7, 0.6)),
    "large": steps(scale=(0.5, 0.5), patches=(0.3, 0.6), shift=(0.5, 0.8)),
    "thin": steps(rotate=(0.5, 0.3), shear=(0.3, 0.4), sharpen=(0.2, 0.5)),
    "deformable": steps(elastic=(0.5, 0.7), shear=(0.4, 0.6), perspective=(0.3, 0.5)),
    "reflective": steps(highlights=(0.5, 0.8), exposure=(0.7, 0.8), color=(0.4, 0.6)),
    "transparent": steps(fade=(0.5, 0.7), highlights=(0.3, 0.5), color=(0.5, 0.7)),
    "textured": steps(sharpen=(0.3, 0.7), defocus=(0.2, 0.4), noise=(0.3, 0.4)),
  },
  "light": {
    "low": steps(dark=(0.5, 0.9), noise=(0.5, 0.8), color=(0.4, 0.7)),
    "bright": steps(bright=(0.5, 0.7), glare=(0.2, 0.6)),
    "changing": steps(exposure=(0.8, 1), shadow=(0.4, 0.8), banding=(0.15, 0.6), dark=(0.2, 0.6), bright=(0.2, 0.6)),
    "backlit": steps(backlit=(0.5, 0.9), glare=(0.3, 0.8)),
  },
  "camera": {
    "static": (),
    "moving": steps(motion=(0.4, 0.8), perspective=(0.3, 0.5), rotate=(0.4, 0.2), defocus=(0.2, 0.5)),
    "fisheye": steps(lens=(0.6, 0.9), vignette=(0.3, 0.7)),
    "rolling_shutter": steps(rolling=(0.5, 0.8), motion=(0.2, 0.5), banding=(0.1, 0.4)),
  },
  "background": {
    "plain": steps(color=(0.5, 0.7)),
    "cluttered": steps(patches=(0.4, 0.7)),
    "changing": steps(color=(0.5, 0.8), patches=(0.3, 0.6), exposure=(0.6, 0.7)),
    "outdoor": steps(fog=(0.15, 0.7), rain=(0.15, 0.7), snow=(0.05, 0.6), shadow=(0.3, 0.8), glare=(0.1, 0.6)),
  },
  "distance": {
    "near": steps(scale=(0.6, 0.6), shift=(0.6, 0.8)),
    "far": steps(scale=(0.6, 0.7), low_resolution=(0.3, 0.6), fade=(0.15, 0.4)),
    "varying": steps(scale=(0.8, 1.0), shift=(0.6, 0.7)),
  },
}


def read(said: Sequence[str]) -> dict[str, list[str]]:
  """["object=small,thin", "light=low"] -> {group: [characteristic]}. Raises UserError."""
  out: dict[str, list[str]] = {}
  for item in said:
    group, equals, names = item.partition("=")
    group = group.strip().lower()
    if group not in CHARACTERISTICS or not equals:
      raise UserError(f"'{item}': write GROUP=NAME,..., of {', '.join(CHARACTERISTICS)}, as object=small,thin")
    for name in filter(None, (n.strip().lower().replace("-", "_").replace(" ", "_") for n in names.split(","))):
      check(group, name)
      out.setdefault(group, []).append(name)
  return out


def check(group: str, name: str) -> None:
  """Raises UserError."""
  if group not in CHARACTERISTICS:
    raise UserError(f"no characteristics of '{group}'; there are those of {', '.join(CHARACTERISTICS)}")
  if name not in CHARACTERISTICS[group]:
    raise UserError(f"{group} '{name}' is not known; there are {', '.join(CHARACTERISTICS[group])}")


def plan(said: Mapping[str, Sequence[str]], intensity: str = "medium") -> list[Step]:
  """Of all that is said, each change once, geometry first. Raises UserError."""
  if intensity not in INTENSITY:
    raise UserError(f"intensity '{intensity}'; there are {', '.join(INTENSITY)}")
  wanted = list(ALWAYS)
  for group, names in said.items():
    for name in names:
      check(group, name)
      wanted += CHARACTERISTICS[group][name]
  share: dict[str, float] = {}
  strength: dict[str, float] = {}
  for s in wanted:
    share[s.name], strength[s.name] = max(share.get(s.name, 0), s.share), max(strength.get(s.name, 0), s.strength)
  k = INTENSITY[intensity]
  ordered = [*(n for n in GEOMETRY if n in share), *(n for n in share if n not in GEOMETRY)]
  return [Step(n, round(share[n] * min(1, k / 0.75), 3), round(strength[n] * k, 3)) for n in ordered]


# *** guessing ***

SMALL, LARGE, THIN, DARK, LIGHT = 0.06, 0.5, 4.0, 75.0, 180.0
UNEVEN, SPREAD, BLURRED, PLAIN, CLUTTERED = 45.0, 4.0, 40.0, 0.03, 0.16
PIXELS = 480  # of the longer side, in which pictures are looked at


def spread(count: int, most: int) -> list[int]:
  """At most `most` of `count`, evenly."""
  return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int)).tolist()


@dataclass
class Looks:
  """Of some pictures: medians and shares of what is measured."""

  size: float  # root of a box's share of its picture
  spread: float  # of the sizes within a class: the ninth tenth over the first
  thin: float  # share of boxes whose sides are 1 to THIN or more
  light: float  # mean gray, 0..255
  changes: float  # deviation of the pictures' mean grays
  sharp: float  # variance of the Laplacian
  edges: float  # share of pixels on edges
  pictures: int


def look(pictures: Sequence[np.ndarray], boxes: Sequence[np.ndarray], classes: Sequence[np.ndarray]) -> Looks:
  """pictures (h, w, 3) uint8, their boxes (N, 4) x0 y0 x1 y1 and classes (N,)."""
  import cv2

  grays, sharps, edges, sizes, thin, kinds = [], [], [], [], [], []
  for rgb, b, c in zip(pictures, boxes, classes, strict=True):
    h, w = rgb.shape[:2]
    k = min(1.0, PIXELS / max(h, w))
    small = cv2.resize(rgb, (max(1, round(w * k)), max(1, round(h * k))), interpolation=cv2.INTER_AREA)
    gray = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)
    grays.append(float(gray.mean()))
    sharps.append(float(cv2.Laplacian(gray, cv2.CV_32F).var()))
    edges.append(float((cv2.Canny(gray, 60, 160) > 0).mean()))
    side = np.maximum(b.reshape(-1, 4)[:, 2:] - b.reshape(-1, 4)[:, :2], 1e-6)
    sizes.append(np.sqrt(side.prod(1) / (w * h)))
    thin.append(side.max(1) / side.min(1) >= THIN)
    kinds.append(np.asarray(c))
  size, kind = np.concatenate([*sizes, np.zeros(0)]), np.concatenate([*kinds, np.zeros(0)])
  spreads = [
    float(np.quantile(own, 0.9) / np.quantile(own, 0.1)) for k in np.unique(kind) if len(own := size[kind == k]) >= 10
  ]
  return Looks(
    size=float(np.median(size)) if len(size) else 0.2,
    spread=float(np.median(spreads)) if spreads else 1.0,
    thin=float(np.mean(np.concatenate([*thin, np.zeros(0, bool)]))) if len(size) else 0.0,
    light=float(np.median(grays)),
    changes=float(np.std(grays)),
    sharp=float(np.median(sharps)),
    edges=float(np.median(edges)),
    pictures=len(grays),
  )


def guess(x: Looks) -> tuple[dict[str, list[str]], list[str]]:
  """-> {group: [characteristic]}, and a line of the reason for each."""
  found: dict[str, list[str]] = {}
  why: list[str] = []

  def say(group: str, name: str, reason: str) -> None:
    found.setdefault(group, []).append(name)
    why.append(f"{group} {name}: {reason}")

  if x.size < SMALL:
    say("object", "small", f"half of the boxes are below {x.size:.1%} of their picture's side")
  if x.size > LARGE:
    say("object", "large", f"half of the boxes are above {x.size:.0%} of their picture's side")
  if x.thin > 0.3:
    say("object", "thin", f"{x.thin:.0%} of the boxes have sides of 1 to {THIN:g} or more")
  if x.light < DARK:
    say("light", "low", f"half of the pictures have a mean gray below {x.light:.0f}")
  if x.light > LIGHT:
    say("light", "bright", f"half of the pictures have a mean gray above {x.light:.0f}")
  if x.changes > UNEVEN:
    say("light", "changing", f"their mean grays differ by {x.changes:.0f}")
  if x.sharp < BLURRED:
    say("camera", "moving", f"they are blurred: half have a variance of the Laplacian below {x.sharp:.0f}")
  if x.edges < PLAIN:
    say("background", "plain", f"{x.edges:.1%} of the pixels lie on edges")
  if x.edges > CLUTTERED:
    say("background", "cluttered", f"{x.edges:.0%} of the pixels lie on edges")
  if x.spread > SPREAD:
    say("distance", "varying", f"boxes of one class differ in size by {x.spread:.1f}")
  return found, why


def to_dict(said: Mapping[str, Sequence[str]], intensity: str, planned: Sequence[Step]) -> dict[str, Any]:
  """As it is saved."""
  changes = {s.name: {"share": s.share, "strength": s.strength} for s in planned}
  return {"characteristics": {k: list(v) for k, v in said.items()}, "intensity": intensity, "changes": changes}
