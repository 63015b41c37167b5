"""The reference network that starts from constant curvature: its path is a drive's, and untrained it sees turns in
pictures and remembers speeds."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

from openpilot.tools.dgx.training.augment import light
from openpilot.tools.dgx.training.constants import FEATURE_LEN, INPUTS, T_IDXS, output_slices
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.dgx.training.outputs import parse_outputs
from openpilot.tools.dgx.training.paths import DrivenPath, constant_curvature
from openpilot.tools.dgx.training.reference import SPEED_INPUT, sample_inputs, save_reference
from openpilot.tools.dgx.training.reference_turn import REACH, SETTLING, TurnDriving, arc, correlate

T = torch.tensor(T_IDXS, dtype=torch.float64)


def column(*numbers: float) -> torch.Tensor:
  return torch.tensor(numbers, dtype=torch.float64)[:, None]


def packed(y: np.ndarray) -> np.ndarray:
  """(256, 512) brightness -> (6, 128, 256) as frames are packed, without color."""
  gray = np.full((128, 256), 128.0)
  return (
    np.stack([y[0::2, 0::2], y[1::2, 0::2], y[0::2, 1::2], y[1::2, 1::2], gray, gray])
    .round()
    .clip(0, 255)
    .astype(np.uint8)
  )


def pair(pixels: int, seed: int = 0) -> torch.Tensor:
  """(1, 12, 128, 256): a rough wall of blobs, and the same so many pixels further to the left."""
  r = np.random.default_rng(seed)
  rough = r.normal(size=(256, 1024))
  for axis in (0, 1):
    rough = sum(np.roll(rough, k, axis) for k in range(-3, 4))
  wall = 120 + 30 * rough / rough.std()
  return torch.from_numpy(np.concatenate([packed(wall[:, 256:768]), packed(wall[:, 256 + pixels : 768 + pixels])]))[
    None
  ]


def test_correlating_is_each_product_with_the_neighbors_along_the_row():
  r = np.random.default_rng(0)
  a, b = (r.normal(size=(2, 3, 4, 9)) for _ in range(2))
  want = np.zeros((2, 5, 4, 9))
  for d in range(-2, 3):
    for x in range(max(0, -d), min(9, 9 - d)):
      want[:, d + 2, :, x] = (a[..., x] * b[..., x + d]).sum(1)
  np.testing.assert_allclose(correlate(torch.from_numpy(a), torch.from_numpy(b), 2).numpy(), want, atol=1e-12)


def test_an_arc_without_acceleration_is_the_constant_curvature_path():
  v, w = np.array([3.0, 12.0, 30.0]), np.array([0.3, -0.1, 0.05])
  pose = np.stack([v, *[0 * v] * 4, w], -1)
  got = arc(column(*v), column(*w), column(0, 0, 0), T).numpy()
  np.testing.assert_allclose(got[..., :2], constant_curvature(pose)[..., :2], atol=2e-4)


def test_an_arc_is_the_drive_that_it_says():
  """Of a car whose acceleration fades while its wheels stay turned, in all 15 columns."""
  v0, w0, a0 = 10.0, 0.15, -1.5
  t = np.arange(0, 11, 0.005)
  v = v0 + a0 * SETTLING * (1 - np.exp(-t / SETTLING))
  zero = 0 * t
  drive = DrivenPath(t, np.stack([v, zero, zero], -1), np.stack([zero, zero, w0 / v0 * v], -1)).plan(np.zeros(1))[0]
  got = arc(column(v0), column(w0), column(a0), T).numpy()[0]
  np.testing.assert_allclose(got[:, :6], drive[:, :6], atol=5e-3)
  np.testing.assert_allclose(got[:, 9:], drive[:, 9:], atol=2e-3)
  inside = np.array(T_IDXS) >= 0.25  # the drive's accelerations are differences over half a second
  np.testing.assert_allclose(got[inside, 6:9], drive[inside, 6:9], atol=2e-2)


def test_braking_ends_in_standing_not_in_reverse():
  plan = arc(column(2.0, 0.0), column(0.1, 0.0), column(-6.0, -1.0), T).numpy()
  assert (np.diff(plan[0, :, 0]) > 0).all() and (plan[0, :, 3] > 0).all()
  assert np.abs(plan[1]).max() == 0


@pytest.mark.parametrize("pixels", [-28, -8, 0, 8, 28])
def test_untrained_it_sees_how_fast_the_car_turns(pixels):
  """The wall moves as far in the wide view as a turn moves it there, which is half as far as in the narrow one. Within
  a fifth, or a fifth of a cell."""
  x = sample_inputs(1, speed=True)
  x["img"], x["big_img"] = pair(2 * pixels), pair(pixels)
  with torch.no_grad():
    out = parse_outputs(TurnDriving(seed=1).eval()(**x), output_slices())
  turn = 2 * pixels / 910 / 0.2
  seen = float(out["hidden_state"][0, FEATURE_LEN - 2]) / 2
  assert abs(seen - turn) < 0.009 + 0.2 * abs(turn)
  if pixels:  # and so its path bends that way, as far as a path's does
    y, want = float(out["plan"][0, 16, 1]), float(arc(column(12), column(turn), column(0), T)[0, 16, 1])
    assert 0.5 < y / want < 1.6


def test_it_remembers_speeds():
  """12 m/s, and a little less in each step before: it goes on to gain. Without a past it does not."""
  network, slices = TurnDriving(seed=2).eval(), output_slices()
  x = sample_inputs(1, seed=2, speed=True)
  x["features_buffer"].zero_()
  after = {}
  with torch.no_grad():
    for gain in (0.0, 1.5):
      past = []
      for k in range(REACH, 0, -1):
        y = {**x, SPEED_INPUT: torch.tensor([[12 - 0.2 * gain * k, 0.2]])}
        past.append(parse_outputs(network(**y), slices)["hidden_state"])
      y = {
        **x,
        SPEED_INPUT: torch.tensor([[12.0, 0.2]]),
        "features_buffer": torch.cat([x["features_buffer"][:, REACH:], torch.stack(past, 1)], 1),
      }
      after[gain] = parse_outputs(network(**y), slices)
      told = after[gain]["hidden_state"][0, -4:]
      assert (
        float(told[0]) == 1
        and float(told[1]) == pytest.approx(12 / 20)
        and float(told[3]) == pytest.approx(gain / 4, abs=1e-4)
      )
  expected = float(arc(column(12), column(0), column(1.5), T)[0, 17, 0] - 12 * T[17])  # m after 2.8 s
  assert float(after[1.5]["plan"][0, 17, 0] - after[0.0]["plan"][0, 17, 0]) == pytest.approx(expected, rel=0.15)


@pytest.mark.slow
def test_as_a_file_it_is_the_same_network_alone_and_in_a_batch(tmp_path):
  network = TurnDriving(seed=3).eval()
  path = save_reference(tmp_path / "turn.onnx", network)
  module = load_onnx(path).eval()
  assert [v.name for v in module.inputs] == [*INPUTS, SPEED_INPUT]
  x = sample_inputs(3, seed=3, speed=True)
  x[SPEED_INPUT][:, 0] = torch.tensor([0.0, 8.0, 25.0])
  with torch.no_grad():
    want = network(**x)
    torch.testing.assert_close(module(**x)["outputs"], want, atol=1e-4, rtol=1e-4)
  session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  for k in range(3):
    got = session.run(None, {n: v[k : k + 1].numpy() for n, v in x.items()})[0]
    np.testing.assert_allclose(got, want[k : k + 1].numpy(), atol=2e-3, rtol=1e-3)


def test_noise_of_augmented_clips_does_not_stand_still():
  """A pattern that stays where it is while the world moves would teach that cars stand."""
  flat = torch.full((4, 12, 128, 256), 120, dtype=torch.uint8)
  noisy = [light(flat, np.random.default_rng(s)) for s in range(12)]
  noisy = [x for x in noisy if x[0, 0].double().std() > 1]
  assert noisy
  for x in noisy:
    before, now = x[0, 0].double().flatten(), x[0, 6].double().flatten()
    assert abs(float(torch.corrcoef(torch.stack([before, now]))[0, 1])) < 0.1
