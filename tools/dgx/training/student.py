"""The student along a clip: openpilot's network run step by step with the memory that modeld gives it, and what its
outputs cost."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from openpilot.tools.dgx.training.history import History
from openpilot.tools.dgx.training.losses import amount, driving_loss
from openpilot.tools.dgx.training.model import OnnxModule
from openpilot.tools.dgx.training.outputs import model_slices, parse_outputs
from openpilot.tools.dgx.training.teacher import KNOWN, LATERAL_DELAY, NAMES
from openpilot.tools.lib.errors import UserError

DRIVEN = ("plan", "pose")  # targets that the drive itself gives


def shapes_of(model: OnnxModule) -> dict[str, tuple[int, ...]]:
  """The inputs' shapes under openpilot's present names. Raises UserError for inputs that clips do not have."""
  shapes = {NAMES.get(v.name, v.name): tuple(d if isinstance(d, int) else 1 for d in v.shape) for v in model.inputs}
  odd = sorted(set(shapes) - set(KNOWN))
  if odd:
    raise UserError(
      f"{model.where} wants the inputs {', '.join(odd)}, which clips do not have; take a driving model of openpilot "
      "0.10 or later"
    )
  return shapes


class Student(nn.Module):
  """model: a supercombo, or a policy, for which `vision`, frozen, makes the features. burn_in: steps at a clip's start
  that only fill the memory."""

  def __init__(
    self,
    model: OnnxModule,
    vision: OnnxModule | None,
    weights: Mapping[str, float],
    path_weight: float,
    teacher_weight: float,
    burn_in: int = 0,
  ):
    super().__init__()
    self.model, self.vision = model, vision
    if vision is not None:
      vision.eval().requires_grad_(False)
    self.weights, self.path_weight, self.teacher_weight, self.burn_in = (
      dict(weights),
      path_weight,
      teacher_weight,
      burn_in,
    )
    self.slices = model_slices(model.base, model.where)
    self.vision_slices = {} if vision is None else model_slices(vision.base, vision.where)
    self.shapes = {**({} if vision is None else shapes_of(vision)), **shapes_of(model)}
    if "img" not in self.shapes:
      raise UserError(
        f"{model.where} takes no images: it is a policy; give the network that makes its features with --vision"
      )
    if "hidden_state" not in (self.slices if vision is None else self.vision_slices):
      raise UserError(
        f"{(vision or model).where} has no hidden_state among its outputs, and so no memory; take another file"
      )

  def train(self, mode: bool = True) -> "Student":
    """Batch norms keep the base's statistics: they are not what is learned, and one clip's frames are too alike to make
    new ones."""
    super().train(mode)
    for m in self.modules():
      if isinstance(m, nn.modules.batchnorm._BatchNorm):
        m.eval()
    return self

  @staticmethod
  def vector(model: OnnxModule, x: Mapping[str, Tensor]) -> Tensor:
    out = model(**{v.name: x[NAMES.get(v.name, v.name)] for v in model.inputs})[model.outputs[0].name]
    return out.reshape(len(out), -1)

  def run(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """A batch of clips (shards.DrivingClips) -> parsed outputs (B, ...) of each step. Gradients flow back through the
    features that are carried."""
    frames, big, desire = batch["frames"], batch["big_frames"], batch["desire"]
    b, steps = frames.shape[:2]
    history = History(self.shapes, b, frames.device, every=1, includes_present=self.vision is not None)
    for i in range(steps):
      with torch.set_grad_enabled(torch.is_grad_enabled() and i >= self.burn_in):
        x = history.see(frames[:, i], big[:, i], desire[:, i], batch["traffic_convention"], batch["action_t"])
        if "lateral_control_params" in self.shapes:
          x["lateral_control_params"] = torch.stack(
            [batch["speed"][:, i], torch.full_like(batch["speed"][:, i], LATERAL_DELAY)], 1
          )
        seen: dict[str, Tensor] = {}
        if self.vision is not None:
          with torch.no_grad():
            seen = parse_outputs(self.vector(self.vision, x).float(), self.vision_slices)
          history.remember(seen["hidden_state"])
          x["features_buffer"] = history.features_buffer()
        out = parse_outputs(self.vector(self.model, x).float(), self.slices)
        if self.vision is None:
          history.remember(out["hidden_state"])
      yield {**seen, **out}

  def targets(self, batch: Mapping[str, Any], i: int) -> dict[str, dict[str, Tensor]]:
    """Of step i: 'driven' and 'teacher', as far as they weigh anything."""
    out = {}
    if self.path_weight:
      out["driven"] = {k: batch[k][:, i] for k in DRIVEN}
    if "labels" in batch and self.teacher_weight:
      out["teacher"] = {k: v[:, i] for k, v in batch["labels"].items()}
    return out

  def amounts(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """{'driven/plan': (T,), ...}: by how much each target teaches in each step, for `shares` of losses()."""
    steps = range(self.burn_in, batch["frames"].shape[1])
    found: dict[str, list[Tensor]] = {}
    for i in steps:
      for kind, targets in self.targets(batch, i).items():
        for name in targets:
          if self.weights.get(name) or (name == "plan" and self.weights.get("plan_weights")):
            found.setdefault(f"{kind}/{name}", []).append(amount(name, targets))
    return {k: torch.stack(v) for k, v in found.items()}

  def losses(self, outputs: list[dict[str, Tensor]], batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """-> the mean over the steps of each part, 'driven/plan', 'teacher/lead', ..., and 'total'. batch["labels"]: a
    teacher's, (B, T, ...). batch["shares"]: of a part of a larger batch, what of each of its amounts() is here: the
    losses of all parts are then, in sum, those of the whole."""
    sums: dict[str, list[Tensor]] = {}
    shares: Mapping[str, Tensor] | None = batch.get("shares")
    for i, out in enumerate(outputs[self.burn_in :], self.burn_in):
      for kind, targets in self.targets(batch, i).items():
        parts = driving_loss(out, targets, self.weights)
        if shares is not None:
          del parts["total"]
          parts = {
            k: v * shares[f"{kind}/{'plan' if k == 'plan_weights' else k}"][i - self.burn_in] for k, v in parts.items()
          }
          parts["total"] = torch.stack([self.weights[k] * v for k, v in parts.items()]).sum()
        for k, v in parts.items():
          sums.setdefault(f"{kind}/{k}", []).append(v)
    means = {k: torch.stack(v).mean() for k, v in sums.items()}
    whole = [
      w * means.pop(k)
      for k, w in (("driven/total", self.path_weight), ("teacher/total", self.teacher_weight))
      if k in means
    ]
    return {**means, "total": torch.stack(whole).sum()}

  def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return self.losses(list(self.run(batch)), batch)
