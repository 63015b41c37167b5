"""The picture that a teacher is shown, or that is stored, and who draws it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.spec import InputSpec


@dataclass(frozen=True)
class Canvas:
  """The picture that a teacher is given, or that is stored.

  wants: 'rgb', (height, width, 3) uint8; 'frame', what `input` says students see, as stored; 'none', no picture.
  view: of a route's camera, which view is rendered. letterbox, pad: of pictures, as InputSpec's."""

  wants: str = "rgb"
  width: int = VIEW_W
  height: int = VIEW_H
  view: str = "medmodel"
  letterbox: bool = True
  pad: int = 114
  input: InputSpec = field(default_factory=InputSpec)

  @property
  def shape(self) -> tuple[int, ...]:
    return {"none": (0,), "frame": self.input.shape}.get(self.wants, (self.height, self.width, 3))

  def fit(self, width: int, height: int) -> np.ndarray:
    """(3, 3) float64 from the pixels of a picture of this size to the canvas's, as InputSpec.fit()."""
    sx, sy = self.width / width, self.height / height
    if self.letterbox:
      sx = sy = min(sx, sy)
    return np.array([[sx, 0, 0.5 * sx - 0.5], [0, sy, 0.5 * sy - 0.5], [0, 0, 1]])


class Renderer(Protocol):
  """Draws the frames of one part. For one thread at a time."""

  def read(self, rows: list[int]) -> Iterator[tuple[int, Any]]:
    """(row, undrawn picture) of the rows asked for, in order; fewer where some cannot be read."""

  def draw(self, picture: Any, out: np.ndarray) -> np.ndarray: ...
