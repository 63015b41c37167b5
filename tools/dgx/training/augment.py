"""One change of each clip of a batch, the same along the clip: mirrored in half of them, and light, contrast, color and
noise of all.

What is left becomes right in pictures, path, motion, desire and the side that traffic keeps to. Pictures are not moved
otherwise: their geometry is calibrated."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpilot.tools.dgx.training.constants import DESIRE_LEN, FRAME_SHAPE

# Columns that change their sign: y of positions, velocities and accelerations, roll and yaw of angles and rates
PLAN_SIGNS = (1, -1, 1) * 3 + (-1, 1, -1) * 2
POSE_SIGNS = (1, -1, 1, -1, 1, -1)
MIRRORED_DESIRE = (0, 2, 1, 4, 3, 6, 5, 7)  # turn, lane change, keep: left for right
MIRRORED_PLANES = (2, 3, 0, 1, 4, 5)  # even for odd columns of Y
IMAGES = ("frames", "big_frames")


def mirror_images(x: Tensor) -> Tensor:
  """(..., 6 k, 128, 256) packed frames, left for right."""
  planes = [k * FRAME_SHAPE[0] + p for k in range(x.shape[-3] // FRAME_SHAPE[0]) for p in MIRRORED_PLANES]
  return x.flip(-1)[..., planes, :, :]


def mirror(clips: dict[str, Any]) -> dict[str, Any]:
  """A batch of clips (shards.DrivingClips) as seen in a mirror. What has no left and right stays."""
  assert DESIRE_LEN == len(MIRRORED_DESIRE)
  out = dict(clips)
  out.update({k: mirror_images(clips[k]) for k in IMAGES if k in clips})
  for name, signs in (("plan", PLAN_SIGNS), ("pose", POSE_SIGNS), ("rpy", (-1, 1, -1))):
    if name in clips:
      out[name] = clips[name] * torch.tensor(signs, dtype=clips[name].dtype)
  for name in ("traffic_convention", "blinkers"):
    if name in clips:
      out[name] = clips[name].flip(-1)
  if "desire" in clips:
    out["desire"] = clips["desire"][..., list(MIRRORED_DESIRE)]
  if "steering" in clips:
    out["steering"] = -clips["steering"]
  return out


def light(x: Tensor, r: np.random.Generator) -> Tensor:
  """(T, 6 k, 128, 256) uint8 -> the same clip in other light: gamma, contrast and brightness of Y, strength of U and V,
  noise of all."""
  gamma, gain, bias, chroma, noise = (
    np.exp(r.normal(0, 0.25)),
    np.exp(r.normal(0, 0.2)),
    r.normal(0, 8),
    r.uniform(0.5, 1.4),
    r.choice([0.0, 0.0, 3.0, 6.0]),
  )
  level = np.arange(256) / 255
  luma = (level**gamma * 255 * gain + bias).clip(0, 255).round().astype(np.uint8)
  color = ((level * 255 - 128) * chroma + 128).clip(0, 255).round().astype(np.uint8)
  planes = x.numpy().reshape(-1, *FRAME_SHAPE)
  out = np.empty_like(planes)
  for k in range(FRAME_SHAPE[0]):
    np.take(luma if k < 4 else color, planes[:, k], out=out[:, k])
  # one pattern for the whole clip, since drawing it is dear, but elsewhere in each frame: noise that stands still says
  # that the car does
  if noise:
    pattern = (r.standard_normal(FRAME_SHAPE, np.float32) * np.float32(noise)).astype(np.int16)
    for frame, (dy, dx) in zip(out, r.integers(0, FRAME_SHAPE[1:], (len(out), 2)), strict=True):
      frame[:] = (frame + np.roll(pattern, (dy, dx), (1, 2))).clip(0, 255)
  return torch.from_numpy(out.reshape(x.shape))


def augment(batch: dict[str, Any], r: np.random.Generator, part: slice = slice(None), of: int = 0) -> dict[str, Any]:
  """A batch of clips, changed; a function of the batch and of `r` alone. part: which clips of a larger batch of `of`
  these are: they are changed as they are there."""
  out = dict(batch)
  n = of or len(batch["frames"])
  flipped = torch.from_numpy(r.uniform(size=n) < 0.5)[part]
  other = mirror({k: v for k, v in batch.items() if torch.is_tensor(v)})
  for k, v in other.items():
    if v is not batch[k]:
      out[k] = torch.where(flipped.reshape(-1, *[1] * (v.dim() - 1)), v, batch[k])
  seeds = r.integers(1 << 31, size=n)[part]
  for k in IMAGES:  # both cameras of a clip in the same light
    out[k] = torch.stack([light(x, np.random.default_rng(int(s))) for x, s in zip(out[k], seeds, strict=True)])
  return out
