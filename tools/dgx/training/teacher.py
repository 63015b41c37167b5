"""openpilot's driving models as teachers: run over clips with the memory that modeld gives them, parsed as openpilot
parses them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openpilot.tools.dgx.training.constants import ACTION_T_LEN, FRAME_SHAPE, FRAME_SKIP
from openpilot.tools.dgx.training.history import History
from openpilot.tools.dgx.training.model import hash_file
from openpilot.tools.dgx.training.outputs import parse_outputs, read_slices
from openpilot.tools.dgx.training.runners import Runner, open_runner
from openpilot.tools.lib.errors import UserError

NAMES = {"input_imgs": "img", "big_input_imgs": "big_img"}  # as models until 2025 call them
KNOWN = (
  "img",
  "big_img",
  "desire_pulse",
  "desire",
  "traffic_convention",
  "action_t",
  "features_buffer",
  "lateral_control_params",
)
LATERAL_DELAY = 0.2  # s, where a clip does not say


def inputs_of(runner: Runner) -> dict[str, tuple[int, ...]]:
  return {NAMES.get(v.name, v.name): tuple(int(d) if isinstance(d, int) else 1 for d in v.shape) for v in runner.inputs}


class Part:
  """One ONNX file: its runner, its slices, its inputs under openpilot's present names."""

  def __init__(self, path: Path, provider: str | None, device: str | None, precision: str | None, batch: int):
    self.path, self.slices = path, read_slices(path)
    self.runner = open_runner(path, provider, device, precision, batch)
    self.shapes = inputs_of(self.runner)
    odd = sorted(set(self.shapes) - set(KNOWN))
    if odd:
      raise UserError(
        f"{path} wants the inputs {', '.join(odd)}, which clips do not have; take a driving model of openpilot 0.10 "
        "or later"
      )

  def run(self, x: Mapping[str, Tensor]) -> Tensor:
    vector = self.runner.run({v.name: x[NAMES.get(v.name, v.name)] for v in self.runner.inputs})
    return vector.reshape(len(vector), -1)


class DrivingTeacher:
  """A single supercombo; or a vision file and the policies that read its features, in any order; or any ONNX file with
  output_slices whose inputs are of these.

  `provider`: of runners.PROVIDERS, None: the best here. `batch`: drives that will be labeled at once, which TensorRT
  wants to know before. Raises UserError where the files do not make a driving model."""

  def __init__(
    self,
    paths: str | Path | Sequence[str | Path],
    provider: str | None = None,
    device: str | None = None,
    precision: str | None = None,
    batch: int = 1,
  ):
    several = [paths] if isinstance(paths, (str, Path)) else list(paths)
    self.parts = [Part(Path(p), provider, device, precision, batch) for p in several]
    self.vision = next((p for p in self.parts if "img" in p.shapes), None)
    if self.vision is None or sum("img" in p.shapes for p in self.parts) > 1:
      raise UserError(
        f"of {', '.join(p.path.name for p in self.parts)} exactly one must take images; give a supercombo, or a vision "
        "file and its policy"
      )
    self.policies = [p for p in self.parts if p is not self.vision]
    self.single = "features_buffer" in self.vision.shapes
    if (self.single or self.policies) and "hidden_state" not in self.vision.slices:
      raise UserError(f"{self.vision.path} has no hidden_state among its outputs, and so no memory; take another file")
    if self.single and self.policies:
      raise UserError(
        f"{self.vision.path} is a whole supercombo; leave out {', '.join(p.path.name for p in self.policies)}"
      )
    self.shapes = {k: v for p in reversed(self.parts) for k, v in p.shapes.items()}
    self.hashes = [hash_file(p.path) for p in self.parts]
    self.device = self.vision.runner.device

  @torch.no_grad()
  def step(self, history: History, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step of every drive: inputs of history.see -> parsed outputs (B, ...). The feature goes into the history."""
    assert self.vision is not None
    vector = self.vision.run(inputs)
    out = parse_outputs(vector, self.vision.slices)
    if "hidden_state" in out:
      history.remember(out["hidden_state"])
    for policy in self.policies:
      more = policy.run({**inputs, "features_buffer": history.features_buffer()})
      out.update(parse_outputs(more, policy.slices))
    return out

  def label(self, clip: Mapping[str, Any]) -> dict[str, Tensor]:
    """A clip, or a batch of them with a leading axis B: frames and big_frames (T, 6 or 12, 128, 256) uint8 (12: paired,
    and then steps are 5 Hz, else 20 Hz), desire (T, 8) as pulses, traffic_convention (2,), and where there are action_t
    (2,), speed (T,). -> parsed outputs (T, ...), or (B, T, ...)."""
    frames = torch.as_tensor(clip["frames"])
    batched = frames.dim() == 5
    x = {
      k: torch.as_tensor(clip[k])
      for k in ("frames", "big_frames", "desire", "traffic_convention", "action_t", "speed")
      if k in clip
    }
    x = x if batched else {k: v[None] for k, v in x.items()}
    b, t, channels = x["frames"].shape[:3]
    if x["frames"].shape[3:] != FRAME_SHAPE[1:] or channels not in (FRAME_SHAPE[0], 2 * FRAME_SHAPE[0]):
      raise UserError(f"a clip's frames are {tuple(frames.shape)}; the driving model takes (T, 6 or 12, 128, 256)")
    every = FRAME_SKIP if channels == FRAME_SHAPE[0] else 1
    big = x.get("big_frames", x["frames"])
    action = x.get("action_t", torch.full((b, ACTION_T_LEN), LATERAL_DELAY))
    history = History(self.shapes, b, self.device, every=every, includes_present=not self.single)
    steps: list[dict[str, Tensor]] = []
    for i in range(t):
      inputs = history.see(x["frames"][:, i], big[:, i], x["desire"][:, i], x["traffic_convention"], action)
      if "lateral_control_params" in self.shapes:
        speed = x["speed"][:, i] if "speed" in x else torch.zeros(b)
        inputs["lateral_control_params"] = torch.stack([speed, torch.full_like(speed, LATERAL_DELAY)], 1).float()
      steps.append(self.step(history, inputs))
    out = {k: torch.stack([s[k] for s in steps], 1) for k in steps[0]}
    return out if batched else {k: v[0] for k, v in out.items()}


class TensorRTEngine:
  """One ONNX file of any inputs in TensorRT, or where that is not here in ONNX Runtime, which is said on stderr. A
  driving model with its memory and parsed outputs is DrivingTeacher. Raises UserError."""

  def __init__(self, path: str | Path, device: str | None = None, precision: str | None = None, batch: int = 1):
    self.runner: Runner = open_runner(path, None, device, precision, batch)

  def __call__(self, *inputs: Tensor, **named: Tensor) -> Tensor:
    """The inputs (B, ...) in the file's order, or by name -> the first output (B, N) float32. Raises UserError."""
    names = [v.name for v in self.runner.inputs]
    given = {**dict(zip(names, inputs, strict=False)), **named}
    if len(inputs) > len(names) or set(given) != set(names):
      raise UserError(f"{len(inputs)} inputs and {', '.join(named) or 'none by name'}; the file has {', '.join(names)}")
    return self.runner.run(given)
