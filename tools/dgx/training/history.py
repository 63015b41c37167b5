"""What modeld remembers between frames, for one or several drives at once: frames, desires and the model's own
features."""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from openpilot.tools.dgx.training.constants import DESIRE_LEN, FRAME_SKIP, FRAME_SHAPE, HISTORY

FULL_RATE = 50  # from this many entries on a buffer is of every frame, not of every fourth (models until 2025)


class History:
  """Queues as modeld has them, zeros at the start. With `every=1` (data at 5 Hz) an entry a step; with 4 (data at 20
  Hz) every fourth is given to the model.

  Features are kept as they come, with their gradients: call detach() where backpropagation through time shall end."""

  def __init__(
    self,
    shapes: Mapping[str, tuple[int, ...]],
    batch: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    every: int = FRAME_SKIP,
    includes_present: bool = False,
  ):
    """shapes: of the model's inputs, for the buffers' lengths. includes_present: the policy of a vision and policy pair
    is given the current feature too."""
    self.shapes, self.batch, self.device, self.dtype, self.includes_present = (
      dict(shapes),
      batch,
      torch.device(device),
      dtype,
      includes_present,
    )
    features, desires = self.shapes.get("features_buffer", (1, HISTORY, 512)), self.desire_shape()
    self.features_every = 1 if features[1] >= FULL_RATE else every
    self.desire_every = 1 if desires[1] >= FULL_RATE else every
    self.zero = torch.zeros(batch, features[2], device=self.device, dtype=dtype)
    self.features: deque[Tensor] = deque(
      [self.zero] * (features[1] * self.features_every), features[1] * self.features_every
    )
    none = torch.zeros(batch, DESIRE_LEN, device=self.device, dtype=dtype)
    self.desires: deque[Tensor] = deque([none] * (desires[1] * self.desire_every), desires[1] * self.desire_every)
    self.every = every
    black = torch.zeros(batch, *FRAME_SHAPE, device=self.device, dtype=torch.uint8)
    self.frames: dict[str, deque[Tensor]] = {k: deque([black] * (every + 1), every + 1) for k in ("img", "big_img")}

  def desire_shape(self) -> tuple[int, ...]:
    return next((s for k, s in self.shapes.items() if k in ("desire_pulse", "desire")), (1, HISTORY + 1, DESIRE_LEN))

  def see(
    self, frame: Tensor, big_frame: Tensor, desire: Tensor, traffic_convention: Tensor, action_t: Tensor
  ) -> dict[str, Tensor]:
    """One step's frames of both cameras, (B, 6, 128, 256) uint8, or (B, 12, ...) where they are paired already; the
    desire's pulse (B, 8), traffic_convention (B, 2), action_t (B, 2) -> the model's inputs."""
    images = {}
    for k, f in (("img", frame), ("big_img", big_frame)):
      f = f.to(self.device)
      if f.shape[1] == FRAME_SHAPE[0]:
        self.frames[k].append(f)
        f = torch.cat([self.frames[k][0], f], 1)
      images[k] = f
    self.desires.append(desire.to(self.device, self.dtype))
    pulses = torch.stack(list(self.desires), 1)
    pulses = pulses.reshape(self.batch, -1, self.desire_every, DESIRE_LEN).amax(2)
    out = {
      **images,
      "desire_pulse": pulses,
      "desire": pulses,
      "traffic_convention": traffic_convention.to(self.device, self.dtype),
      "action_t": action_t.to(self.device, self.dtype),
    }
    if not self.includes_present:
      out["features_buffer"] = self.features_buffer()
    return {k: v for k, v in out.items() if k in self.shapes}

  def features_buffer(self) -> Tensor:
    """(B, N, 512): of 4 N, ... 8, 4 frames ago; where the present is included, of 4 (N - 1), ... 4, 0."""
    k = self.features_every
    return torch.stack(list(self.features)[k - 1 :: k] if self.includes_present else list(self.features)[::k], 1)

  def remember(self, hidden_state: Tensor) -> None:
    """The current frame's feature (B, 512): where the present is included before the policy runs, else after the model
    ran."""
    self.features.append(hidden_state.to(self.dtype))

  def detach(self) -> None:
    self.features = deque((f.detach() for f in self.features), self.features.maxlen)
