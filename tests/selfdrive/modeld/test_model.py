import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings, strategies as st

from fair_bundle import CLASSES, write_bundle
from openpilot.cereal import log
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.heads import depth as depth_head, segmentation as segmentation_head
from openpilot.selfdrive.modeld.fair.heads.segmentation import decode_runs, encode_runs
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import class_map_from_message, depth_from_message
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner


def camera(r):
  stride, y_height, _, size = nv12_info(1344, 760)
  return (1344, 760, stride, stride * y_height), r.integers(0, 256, size, dtype=np.uint8)


def test_runner_equals_onnxruntime_and_reuses_its_outputs(tmp_path):
  r = np.random.default_rng(1)
  b = write_bundle(tmp_path / "b")
  runner = OnnxRunner(b, b.graphs[0])
  session = onnxruntime.InferenceSession(str(b.path / "scene.onnx"), providers=["CPUExecutionProvider"])
  kept = None
  for _ in range(3):
    x = r.integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)
    out = runner.run({"frame": x})
    for got, want in zip(
      (out["depth"], out["segmentation"]), session.run(["depth", "segmentation"], {"frame": x}), strict=True
    ):
      np.testing.assert_allclose(
        got, want, rtol=1e-6, atol=1e-6
      )  # the same kernels; another thread count may sum in another order
    assert kept is None or all(out[k] is kept[k] for k in out)
    kept = dict(out)


def test_depth_head_against_float64():
  r = np.random.default_rng(2)
  raw, valid = r.normal(2, 1, (1, 1, 64, 128)).astype(np.float32), r.random((256, 512)) < 0.9
  d = depth_head.decode(raw, {"parameters": {"activation": "exp", "metric": True}}, valid, 1.22)
  want = np.exp(raw[0, 0].astype(np.float64))
  want[~valid[1::4, 1::4]] = np.nan  # the view pixel at 4i + 1.5, rounded down
  np.testing.assert_allclose(d.z, want, rtol=1e-6)  # float32
  assert d.metric and raw.max() < 11 and not np.isnan(raw).any()


def test_segmentation_head_against_float64():
  r = np.random.default_rng(3)
  raw, valid = r.normal(0, 3, (1, 5, 64, 128)).astype(np.float32), r.random((256, 512)) < 0.9
  s = segmentation_head.decode(raw, {"classes": CLASSES}, valid)
  p = np.exp(raw[0].astype(np.float64))
  p /= p.sum(0)
  want = p.argmax(0)
  ok = valid[1::4, 1::4]
  assert (s.class_map[ok] == want[ok]).all() and (s.class_map[~ok] == 255).all()
  for k in range(5):
    assert s.class_prob[k] == pytest.approx(p[k][ok & (want == k)].mean(), rel=1e-5)  # float32 exponentials
  assert s.runs is not None and all((a == b).all() for a, b in zip(s.runs, encode_runs(s.class_map), strict=True))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_runs_round_trip(h, w, seed, levels):
  m = np.random.default_rng(seed).integers(0, levels, (h, w)).astype(np.uint8)
  values, lengths = encode_runs(m)
  assert (values[1:] != values[:-1]).all()
  assert (decode_runs(values, lengths, h, w) == m).all()


def test_long_runs_are_split():
  m = np.zeros((400, 500), np.uint8)
  m[:, -1] = 3
  values, lengths = encode_runs(m)
  assert lengths.dtype == np.uint16 and lengths.astype(int).sum() == m.size and len(lengths) == 5
  assert (decode_runs(values, lengths, 400, 500) == m).all()
  with pytest.raises(ValueError, match="runs cover"):
    decode_runs(values[1:], lengths[1:], 400, 500)


def test_messages_hold_what_the_heads_made(tmp_path):
  r = np.random.default_rng(4)
  layout, buf = camera(r)
  model = FairModel(write_bundle(tmp_path / "b"))
  model.set_camera(*layout)
  assert model.set_calibration([0.0, 0.01, -0.02])
  sent = dict(model.process(buf, 7, 100, 200))
  d, s = sent["fairDepth"].fairDepth, sent["fairSegmentation"].fairSegmentation
  assert (d.frameId, d.timestampEof, d.bundle, d.metric) == (7, 200, "tiny", True) and sent["fairDepth"].valid
  x = np.concatenate([model.warp.warp(buf)[None]]).astype(np.float64)
  pooled = x.reshape(1, 6, 64, 2, 128, 2).mean((3, 5))
  want = np.exp(pooled.sum(1)[0] / 255 / 2 + 1)
  np.testing.assert_allclose(depth_from_message(d), want, rtol=6e-4)  # float16 in the message
  assert class_map_from_message(s).shape == (64, 128) and list(s.classes) == CLASSES
  assert len(sent["fairDepth"].to_bytes()) < 40_000


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_mark_the_frame_and_the_model_goes_on(tmp_path, bad):
  r = np.random.default_rng(5)
  layout, buf = camera(r)
  model = FairModel(write_bundle(tmp_path / "b", nan=True, bad=bad))
  model.set_camera(*layout)
  for i in range(3):
    sent = model.process(buf, i, 0, 1)
    assert len(sent) == 2 and not any(m.valid for _, m in sent)
  _, state = model.state_message()
  assert (
    model.invalid == 3
    and "NaN" in state.fairState.fault
    and state.fairState.framesInvalid == 3
    and not state.fairState.graphs[0].valid
  )


def test_nonsense_calibration_is_refused(tmp_path):
  model = FairModel(write_bundle(tmp_path / "b"))
  model.set_camera(*camera(np.random.default_rng(0))[0])
  for bad in ([np.nan, 0, 0], [0, 2.0, 0], [0, 0], []):
    assert not model.set_calibration(bad)
  assert model.rpy is None
  assert (
    model.set_calibration([0, 0.02, 0]) and not model.set_calibration([0, 0.02, 1e-6]) and model.set_calibration(None)
  )


def test_without_clock_equal_input_gives_equal_bytes(tmp_path):
  layout, buf = camera(np.random.default_rng(6))
  out = []
  for _ in range(2):
    model = FairModel(write_bundle(tmp_path / "b"))
    model.set_camera(*layout)
    messages = model.process(buf, 1, 2, 3) + [model.state_message()]
    for _, m in messages:
      m.logMonoTime = 5
    out.append([m.to_bytes() for _, m in messages])
  assert out[0] == out[1]
  with log.Event.from_bytes(out[0][0]) as e:
    assert e.fairDepth.modelExecutionTime == 0
