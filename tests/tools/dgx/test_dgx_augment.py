"""Clips in a mirror are clips of the mirrored world; other light changes pictures alone; and a network that is told its
speed starts straight on at it."""

import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.frames import pack_rgb
from openpilot.tools.dgx.training.augment import augment, mirror
from openpilot.tools.dgx.training.constants import T_IDXS, output_slices
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.dgx.training.outputs import parse_outputs
from openpilot.tools.dgx.training.paths import DrivenPath
from openpilot.tools.dgx.training.reference import SPEED_INPUT, ReferenceDriving, sample_inputs, save_reference


def drive(seed: int, side: int) -> dict[str, torch.Tensor]:
  """A drive of random motion, side 1, or its mirror image, side -1, made from the mirrored motion: velocities across
  and turns about x and z are negated."""
  r = np.random.default_rng(seed)
  t = np.arange(0, 14, 0.1)
  a, b = r.normal(size=3), r.normal(size=3)
  v = np.stack([12 + np.sin(t), side * 0.3 * np.sin(t + a[0]), 0.1 * np.sin(t + a[1])], -1)
  w = np.stack([side * 0.02 * np.sin(t + b[0]), 0.03 * np.sin(t + b[1]), side * 0.2 * np.sin(0.5 * t + b[2])], -1)
  path, now = DrivenPath(t, v, w), np.array([1.0, 1.2])
  rgb = r.integers(0, 256, (2, 2, 256, 512, 3), dtype=np.uint8)[..., ::side, :]
  frames = torch.from_numpy(
    np.stack([np.concatenate([pack_rgb(np.ascontiguousarray(x)) for x in pair]) for pair in rgb])
  )
  desire = torch.zeros(2, 8)
  desire[0, 3 if side > 0 else 4], desire[1, 7] = 1, 1
  return {
    "frames": frames,
    "big_frames": frames,
    "plan": torch.from_numpy(path.plan(now)),
    "pose": torch.from_numpy(np.concatenate(path.state(now), -1)),
    "desire": desire,
    "traffic_convention": torch.tensor([1.0, 0.0][::side]),
    "blinkers": torch.tensor([[1.0, 0.0][::side]] * 2),
    "steering": torch.full((2,), 5.0 * side),
    "rpy": torch.tensor([0.01 * side, 0.02, 0.03 * side]),
    "speed": torch.full((2,), 12.0),
  }


def batch_of(*clips: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  return torch.utils.data.default_collate(list(clips))


def test_a_mirrored_clip_is_the_mirrored_drive():
  seen, truth = mirror(batch_of(drive(0, 1), drive(1, 1))), batch_of(drive(0, -1), drive(1, -1))
  for name, want in truth.items():
    if want.dtype == torch.uint8:
      color = (seen[name].int() - want.int()).abs()
      assert color[:, :, :4].max() == 0 and color.max() <= 1, (
        name
      )  # colors are means of four pixels, summed in another order
    else:
      torch.testing.assert_close(seen[name], want, atol=1e-5, rtol=1e-5, msg=name)
  twice = mirror(seen)
  assert all(torch.equal(twice[k], v) for k, v in batch_of(drive(0, 1), drive(1, 1)).items())


def test_augmenting_is_a_function_of_the_seed_and_keeps_what_is_true():
  batch = batch_of(*(drive(k, 1) for k in range(6)))
  a, b, other = (augment(batch, np.random.default_rng(s)) for s in (3, 3, 4))
  assert all(torch.equal(a[k], b[k]) for k in batch) and not torch.equal(a["frames"], other["frames"])
  turned = mirror(batch)
  flips = [torch.equal(a["plan"][i], turned["plan"][i]) for i in range(6)]
  assert 0 < sum(flips) < 6
  for i, flipped in enumerate(flips):
    want = turned if flipped else batch
    assert all(torch.equal(a[k][i], want[k][i]) for k in batch if k not in ("frames", "big_frames"))
    # brighter or darker, noisier or not: still the same picture
    x, y = a["frames"][i, :, :4].double().flatten(), want["frames"][i, :, :4].double().flatten()
    assert torch.corrcoef(torch.stack([x, y]))[0, 1] > 0.9
    assert torch.equal(a["frames"][i], a["big_frames"][i])  # one light for both cameras


def test_a_network_that_knows_its_speed_starts_straight_on(tmp_path):
  network, x = ReferenceDriving(seed=1, speed=True).eval(), sample_inputs(2, seed=1, speed=True)
  x[SPEED_INPUT][:, 0] = torch.tensor([4.0, 25.0])
  t = torch.tensor(T_IDXS)
  with torch.no_grad():
    plan = parse_outputs(network(**x), output_slices())["plan"]
  for k, v in enumerate((4.0, 25.0)):
    assert ((plan[k, :, 0] - v * t).abs() <= 0.6 * (0.05 + 0.2 * t + 0.5 * t**2)).all()
    assert (plan[k, :, 1].abs() <= 0.6 * (1 + 8 * t) * (0.1 + v / 12)).all()
  path = save_reference(tmp_path / "speed.onnx", network)
  module = load_onnx(path).eval()
  assert [v.name for v in module.inputs][-1] == SPEED_INPUT
  with torch.no_grad():
    torch.testing.assert_close(module(**x)["outputs"], network(**x), atol=1e-4, rtol=1e-4)
