"""Sizes of students, by name: a registry that other packages may add to."""

from dataclasses import dataclass

from openpilot.tools.lib.errors import UserError


@dataclass(frozen=True)
class Size:
  """backbone: of timm. All else are channels."""

  backbone: str
  neck: int  # of the pyramid
  dense: int  # of the depth head
  branch: int  # of the tracker's stride-4 map
  features: int  # of the map that DINO's features are distilled into
  tower: int  # of the object head
  tokens: int  # of the detector
  template: int  # of the tracker's stride-8 map
  tracker: int  # of the tracker's memory


SIZES: dict[str, Size] = {}


def register(name: str, size: Size) -> None:
  """Every head then has a student HEAD-name. Raises UserError where the name is taken by another size."""
  if SIZES.setdefault(name, size) != size:
    raise UserError(f"there is a size '{name}' already; give yours another name")


register(
  "nano",
  Size(
    "mobilenetv4_conv_small_050",
    neck=56,
    dense=32,
    branch=16,
    features=64,
    tower=48,
    tokens=128,
    template=24,
    tracker=48,
  ),
)
register(
  "small",
  Size(
    "mobilenetv4_conv_small", neck=96, dense=48, branch=16, features=128, tower=64, tokens=128, template=32, tracker=64
  ),
)
register(
  "base",
  Size(
    "mobilenetv4_conv_medium",
    neck=144,
    dense=64,
    branch=32,
    features=192,
    tower=96,
    tokens=128,
    template=48,
    tracker=96,
  ),
)
