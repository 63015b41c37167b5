"""Zeros around a picture become the padding of the convolutions behind them, on export and on the way back."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optimize_fixture import chain
from openpilot.tools.fair.optimize.sensitivity import run_all
from openpilot.tools.fair.students.onnx_pads import fold_pads


def padded(r, pads=(0, 0, 0, 1, 0, 0, 2, 1), value=0.0, outputs=("a", "b"), mode="constant"):
  weights = {k: r.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32) for k in ("wa", "wb")}
  weights |= {"pads": np.array(pads, np.int64), "value": np.array(value, np.float32)}
  pad = onnx.helper.make_node("Pad", ["x", "pads", "value"], ["p"], "pad", mode=mode)
  conv = [
    onnx.helper.make_node("Conv", ["p", "wa"], ["a"], "a", pads=[1, 0, 0, 1]),
    onnx.helper.make_node("Conv", ["p", "wb"], ["b"], "b", strides=[2, 2]),
  ]
  return chain([pad, *conv], weights, outputs)


def test_zeros_around_a_picture_become_padding_of_the_convolutions():
  r = np.random.default_rng(0)
  model = padded(r)
  x = {"x": r.normal(0, 1, (1, 4, 9, 12)).astype(np.float32)}
  want = run_all(model.SerializeToString(), [x])[0]
  assert fold_pads(model) == 1
  assert [n.op_type for n in model.graph.node] == ["Conv", "Conv"]
  assert [list(a.ints) for n in model.graph.node for a in n.attribute if a.name == "pads"] == [
    [1, 1, 2, 2],
    [0, 1, 2, 1],
  ]
  got = run_all(model.SerializeToString(), [x])[0]
  for name in want:
    np.testing.assert_allclose(got[name], want[name], atol=1e-5)


@pytest.mark.parametrize(
  "kind",
  [
    {"value": 1.0},
    {"mode": "reflect"},
    {"pads": (0, 1, 0, 0, 0, 0, 0, 0)},
    {"pads": (0, 0, -1, 0, 0, 0, 0, 0)},
    {"outputs": ("a", "b", "p")},
  ],
)
def test_other_pads_stay(kind):
  if kind.get("pads", ())[1:2] == (1,):  # a channel of zeros: the convolutions are of one more
    kind = {**kind, "pads": (0, 1, 0, 0, 0, -1, 0, 0)}
  model = padded(np.random.default_rng(0), **kind)
  before = model.SerializeToString()
  assert fold_pads(model) == 0
  assert model.SerializeToString() == before


def counted(count):
  """A Pad as torch's exporter writes it: its zeros are counted by nodes, two behind the picture's ends; `count` of
  zeros are put before them."""
  node, one = onnx.helper.make_node, np.array([1], np.int64)
  weights = {"w": np.ones((4, 4, 3, 3), np.float32), "ends": np.array([2, 0, 1, 0], np.int64), "count": one * count}
  weights |= {"two": np.array([-1, 2], np.int64), "first": one * -1, "stop": one * -(2**62), "dim": one * 0}
  weights |= {"flat": one * -1}
  nodes = [
    node("ConstantOfShape", ["count"], ["none"], value=numpy_helper.from_array(one * 0)),
    node("Concat", ["ends", "none"], ["all"], axis=0),
    node("Reshape", ["all", "two"], ["rows"]),
    node("Slice", ["rows", "first", "stop", "dim", "first"], ["turned"]),
    node("Transpose", ["turned"], ["columns"], perm=[1, 0]),
    node("Reshape", ["columns", "flat"], ["pads"]),
    node("Pad", ["x", "pads"], ["p"]),
    node("Conv", ["p", "w"], ["a"]),
  ]
  return chain(nodes, weights, ["a"])


def test_zeros_that_are_counted_by_nodes():
  """[right, left, bottom, top, then the channels' and the batch's] turned: the exporter's own way round."""
  model = counted(4)
  x = {"x": np.random.default_rng(0).normal(0, 1, (1, 4, 9, 12)).astype(np.float32)}
  want = run_all(model.SerializeToString(), [x])[0]["a"]
  assert fold_pads(model) == 1 and [n.op_type for n in model.graph.node] == ["Conv"]
  assert [i.name for i in model.graph.initializer] == ["w"]
  np.testing.assert_allclose(run_all(model.SerializeToString(), [x])[0]["a"], want, atol=1e-5)


@pytest.mark.parametrize("count", [2**50, -1])
def test_a_graph_that_counts_without_end_is_left_as_it_is(count):
  model = counted(count)
  before = model.SerializeToString()
  assert fold_pads(model) == 0 and model.SerializeToString() == before


def student(path):
  torch = pytest.importorskip("torch")
  pytest.importorskip("timm", reason="students are built on timm")
  from openpilot.tools.fair.students.onnx_export import export_onnx
  from openpilot.tools.fair.students.student import build

  torch.manual_seed(0)
  made = build("depth-nano", "mobilenet_edgetpu_100_same")
  export_onnx(made, path, ("depth",))
  return made, {n.op_type for n in onnx.load(str(path)).graph.node}


def test_a_students_graph_has_no_pads(tmp_path):
  assert "Pad" not in student(tmp_path / "s.onnx")[1]


@pytest.mark.slow
def test_a_graph_from_before_comes_back_too(tmp_path, monkeypatch):
  with monkeypatch.context() as m:
    m.setattr("openpilot.tools.fair.students.onnx_export.without_pads", lambda path: None)
    made, kinds = student(tmp_path / "former.onnx")
  assert "Pad" in kinds
  from openpilot.tools.fair.students.onnx_import import import_onnx

  student(tmp_path / "now.onnx")
  former, now = (import_onnx(made, tmp_path / f"{k}.onnx") for k in ("former", "now"))
  assert former.keys() == now.keys() and len(former) > 50
  for k, v in former.items():
    assert np.array_equal(v.numpy(), now[k].numpy()), k
