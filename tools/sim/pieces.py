"""What a stretch of road is put together from."""

from dataclasses import dataclass

SOLID, DASHED, DOUBLE = 1, 2, 3
KINDS = {SOLID: "solid", DASHED: "dashed", DOUBLE: "double"}
VEHICLE, PEDESTRIAN = 3, 4  # as render.CLASSES
PLAIN, BODY, CABIN, WHEEL, FOLIAGE, BUILDING = range(6)


@dataclass(frozen=True)
class Line:
  d: float
  kind: int
  rgb: tuple[float, float, float]
  wear: float
  dash: float
  period: float


@dataclass(frozen=True)
class Actor:
  """Something that moves: s = s0 + v t, wrapped around the ego's window; each wrap is a new actor with a new
  identity."""

  cls: int
  s0: float
  v: float
  d: float
  sway: float
  size: tuple[float, float, float]  # length, width, height
  rgb: tuple[float, float, float]
  shape: int  # 0 car, 1 van, 2 truck
  cross: float  # m/s across the road, pedestrians only
