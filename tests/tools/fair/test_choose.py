"""Which layers go back to float: of the task that loses, in groups that share a tensor."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from openpilot.tools.fair.optimize.choose import MOVED, Net, more_float, variances
from openpilot.tools.fair.optimize.sensitivity import Source

SIZE = [1, 4, 8, 8]


@pytest.fixture(scope="module")
def net():
  """x -> stem -> 'b' -> one, and two, which is added to it -> 's' -> three -> last; and of 'b' a head -> 'h' -> say."""
  conv = {
    "stem": ("x", "a"),
    "one": ("b", "c"),
    "two": ("c", "d"),
    "three": ("s", "e"),
    "last": ("e", "depth"),
    "head": ("b", "h"),
    "say": ("h", "boxes"),
  }
  nodes = [helper.make_node("Conv", [i, "w"], [o], k) for k, (i, o) in conv.items()]
  nodes.insert(1, helper.make_node("Relu", ["a"], ["b"], "relu"))
  nodes.insert(4, helper.make_node("Add", ["c", "d"], ["s"], "add"))
  value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, SIZE) for n in "abcdesh"]
  ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, SIZE) for n in ("x", "depth", "boxes")]
  weights = [numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w")]
  graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], weights, value_info=value)
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
  onnx.checker.check_model(model)
  return Net(model, ["last", "say"])


def sources(**errors):
  """By tensor: what it does to depth and to the boxes."""
  return [("g", Source(t, None, dict(zip(("depth", "boxes"), e, strict=True)))) for t, e in errors.items()]


def names(back):
  return {layer for _, layer in back}


def test_a_tensor_is_rounded_until_all_that_touch_it_are_float(net):
  assert set(net.layers) == {"stem", "one", "two", "three", "head"}
  everything = {"x", "b", "c", "d", "s", "e", "h"}
  assert net.rounded(frozenset()) == everything
  assert net.rounded(frozenset({"stem"})) == everything - {"x"}  # those that read 'b' round it
  assert net.rounded(frozenset({"stem", "one", "head"})) == {"c", "d", "s", "e"}
  assert net.silencing("b", frozenset()) == {"stem", "one", "head"}  # beyond its activation
  assert net.silencing("h", frozenset()) == {"head"}
  # the sum is float where nobody in 8 bits reads it
  assert net.silencing("s", frozenset()) == {"three"} and "s" not in net.rounded(frozenset({"three"}))
  assert net.silencing("c", frozenset({"head"})) >= {"head", "one", "two"}


def test_layers_that_lie_together_cost_fewer_ways_to_float_and_back(net):
  values = 4 * 8 * 8
  macs = values * 4  # of each layer
  assert net.layers == dict.fromkeys(("stem", "one", "two", "three", "head"), macs)
  assert net.cost(frozenset()) == 0
  assert net.cost(frozenset({"one"})) == macs + MOVED * 2 * values  # 'b' and 'c'
  assert net.cost(frozenset({"head"})) == macs + MOVED * values  # 'b': what the last layer reads is float
  # between them 'b' is float
  assert net.cost(frozenset({"stem", "one", "head"})) == 3 * macs + MOVED * values


def test_what_goes_back_is_of_the_task_that_loses_too_much(net):
  found = sources(h=(0.0, 0.5), e=(0.1, 0.0), c=(0.01, 0.01))
  nets = {"g": net}
  assert variances(found) == {"depth": pytest.approx(0.0101), "boxes": pytest.approx(0.2501)}
  # the boxes are worst of all, and nobody asks for them
  back = more_float(nets, found, frozenset(), {"depth": 0.5})
  assert names(back) == {"three"}
  assert names(more_float(nets, found, back, {"boxes": 0.5})) == {"three", "head"}
  assert more_float(nets, found, frozenset(), {}) == frozenset()


def test_layers_that_share_a_tensor_go_together_and_only_where_that_pays(net):
  found = sources(b=(0.1, 0.1), e=(0.05, 0.0))
  # half of the variance is not to be had without 'b', whose three layers go
  assert names(more_float({"g": net}, found, frozenset(), {"depth": 0.5})) >= {"stem", "one", "head"}
  # a fifth is, of 'e' alone
  assert names(more_float({"g": net}, found, frozenset(), {"depth": 0.8})) == {"three"}


def test_where_nothing_helps_it_ends(net):
  everything = frozenset(("g", layer) for layer in net.layers)
  found = sources(b=(0.1, 0.1), e=(0.05, 0.0))
  assert more_float({"g": net}, found, everything, {"depth": 0.5}) == everything
  assert more_float({"g": net}, found, frozenset(), {"another": 0.5}) == frozenset()
  assert more_float({"g": net}, found, frozenset(), {"depth": 0.0}) <= everything
