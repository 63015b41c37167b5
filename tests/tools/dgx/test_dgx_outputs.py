"""The flat vector: slices out of the file's metadata, and the parser beside openpilot's rules written out number by
number."""

import base64
import pickle

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from openpilot.tools.dgx.training.constants import IDX_N, OUTPUT_SIZE, PLAN_WIDTH, T_IDXS, X_IDXS, output_slices
from openpilot.tools.dgx.training.outputs import decode_slices, encode_slices, parse_outputs, read_slices
from openpilot.tools.lib.errors import UserError


class Evil:
  def __reduce__(self):
    return (print, ("code ran",))


def model_file(path, metadata, size=4):
  node = helper.make_node("Identity", ["x"], ["outputs"])
  info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, size]) for n in ("x", "outputs")]
  model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]))
  for k, v in metadata.items():
    model.metadata_props.add(key=k, value=v)
  onnx.save(model, str(path))
  return path


def test_indices_are_openpilots():
  assert T_IDXS[0] == 0 and T_IDXS[32] == 10 and T_IDXS[16] == 2.5
  assert X_IDXS[32] == 192 and X_IDXS[1] == pytest.approx(0.1875)


def test_slices_round_trip(tmp_path):
  want = {"a": slice(0, 3), "b": slice(3, 4)}
  assert read_slices(model_file(tmp_path / "m.onnx", {"output_slices": encode_slices(want)})) == want
  stepless = {"a": slice(0, 3, None)}
  assert (
    decode_slices(base64.b64encode(pickle.dumps(stepless, protocol=2)).decode()) == stepless
  )  # python 2's name of builtins


@pytest.mark.parametrize(
  "content",
  [
    Evil(),
    {"a": Evil()},
    {"a": np.int64(3)},
    {"a": [0, 3]},
    {"a": slice(0, "3")},
    {3: slice(0, 3)},
    {"a": slice(2, 1)},
    {"a": slice(0, True)},
    {},
    [slice(0, 3)],
    "text",
  ],
)
def test_anything_but_a_dict_of_slices_is_refused(content, capsys):
  with pytest.raises(UserError, match="output_slices are"):
    decode_slices(base64.b64encode(pickle.dumps(content)).decode())
  assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["not base64!", "", base64.b64encode(b"no pickle").decode()])
def test_broken_slices_are_refused(text):
  with pytest.raises(UserError, match="output_slices"):
    decode_slices(text)


def test_files_without_sound_slices_are_refused(tmp_path):
  with pytest.raises(UserError, match="no output_slices"):
    read_slices(model_file(tmp_path / "m.onnx", {}))
  with pytest.raises(UserError, match="reach 9, its output has 4"):
    read_slices(model_file(tmp_path / "m.onnx", {"output_slices": encode_slices({"a": slice(0, 9)})}))
  with pytest.raises(UserError, match="there is no"):
    read_slices(tmp_path / "none.onnx")
  (tmp_path / "lfs.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(UserError, match="git-lfs"):
    read_slices(tmp_path / "lfs.onnx")


def test_parsed_as_openpilot_does():
  """Each number by hand: means, exp of log-scales held at 11, odd lane probabilities, sigmoid held at -11, softmax, the
  likeliest of the leads' hypotheses."""
  r = np.random.default_rng(3)
  slices = output_slices()
  v = r.normal(0, 3, (2, OUTPUT_SIZE)).astype(np.float32)
  v[0, slices["pose"].start + 6] = 40.0
  v[0, slices["meta"].start] = -40.0
  out = parse_outputs(v.copy(), slices)
  pose = v[:, slices["pose"]]
  assert np.array_equal(out["pose"], pose[:, :6])
  np.testing.assert_allclose(out["pose_stds"], np.exp(np.minimum(pose[:, 6:], 11)), rtol=1e-6)
  np.testing.assert_allclose(out["meta"][0, 0], 1 / (1 + np.exp(11.0)), rtol=1e-5)
  plan = v[:, slices["plan"]]
  assert np.array_equal(out["plan"], plan[:, : IDX_N * PLAN_WIDTH].reshape(2, IDX_N, PLAN_WIDTH))
  assert out["lane_lines"].shape == (2, 4, IDX_N, 2) and out["road_edges_stds"].shape == (2, 2, IDX_N, 2)
  state = v[1, slices["desire_state"]].astype(np.float64)
  np.testing.assert_allclose(out["desire_state"][1], np.exp(state) / np.exp(state).sum(), rtol=1e-5)
  assert out["desire_pred"].shape == (2, 4, 8)
  np.testing.assert_allclose(out["desire_pred"].sum(-1), 1, rtol=1e-5)
  lead = v[:, slices["lead"]].reshape(2, 2, 51)
  for b in range(2):
    for k in range(3):
      winner = lead[b, :, 48 + k].argmax()
      assert np.array_equal(out["lead"][b, k], lead[b, winner, :24].reshape(6, 4))
      p = np.exp(lead[b, :, 48 + k].astype(np.float64))
      np.testing.assert_allclose(out["lead_weights"][b, :, k], p / p.sum(), rtol=1e-4, atol=1e-7)
  assert np.array_equal(out["hidden_state"], v[:, slices["hidden_state"]])


def test_several_plans_come_best_first():
  r = np.random.default_rng(1)
  size = IDX_N * PLAN_WIDTH
  raw = r.normal(size=(1, 5, 2 * size + 1)).astype(np.float32)
  raw[0, :, -1] = [0, 2, -1, 5, 1]
  out = parse_outputs(raw.reshape(1, -1), {"plan": slice(0, raw.size)})
  assert np.array_equal(out["plan"][0], raw[0, 3, :size].reshape(IDX_N, PLAN_WIDTH))
  assert np.array_equal(out["plan_hypotheses"][0, 1], raw[0, 1, :size].reshape(IDX_N, PLAN_WIDTH))
  assert (np.diff(out["plan_weights"][0, :, 0]) < 0).all() and out["plan_weights"].shape == (1, 5, 1)


def test_leads_without_hypotheses_and_raw_actions():
  v = np.arange(146, dtype=np.float32)[None] / 100
  out = parse_outputs(v, {"lead": slice(0, 144), "action": slice(144, 146)})
  assert np.array_equal(out["lead"], v[:, :72].reshape(1, 3, 6, 4))
  np.testing.assert_allclose(out["lead_stds"], np.exp(v[:, 72:144]).reshape(1, 3, 6, 4), rtol=1e-6)
  assert np.array_equal(out["action"], v[:, 144:])


def test_numpy_and_torch_agree_and_torch_learns():
  slices = output_slices()
  v = np.random.default_rng(0).normal(0, 2, (3, OUTPUT_SIZE)).astype(np.float32)
  x = torch.tensor(v, requires_grad=True)
  a, b = parse_outputs(v.copy(), slices), parse_outputs(x, slices)
  assert a.keys() == b.keys()
  for k in a:
    assert a[k].shape == tuple(b[k].shape), k
    np.testing.assert_allclose(b[k].detach().numpy(), a[k], rtol=2e-6, atol=1e-7, err_msg=k)
  sum(b[k].sum() for k in ("plan", "plan_stds", "lead", "meta", "hidden_state")).backward()
  assert (x.grad[:, slices["plan"]] != 0).all() and (x.grad[:, slices["pose"]] == 0).all()


def test_a_slice_of_another_version_is_named():
  with pytest.raises(UserError, match="'plan' has 7 numbers"):
    parse_outputs(np.zeros((1, 7), np.float32), {"plan": slice(0, 7)})
