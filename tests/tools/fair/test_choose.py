"""Which layers go back to float: of the task that loses, in groups that share a tensor."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from openpilot.tools.fair.optimize import search
from openpilot.tools.fair.optimize.choose import (
  MOVED,
  RESIZED,
  TAP,
  TAP_APART,
  VALUE,
  Net,
  more_float,
  not_worth,
  variances,
)
from openpilot.tools.fair.optimize.sensitivity import Source

SIZE = [1, 64, 8, 8]


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
  weights = [numpy_helper.from_array(np.ones((64, 64, 1, 1), np.float32), "w")]
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
  values = 64 * 8 * 8
  macs, way = values * 64, MOVED * values  # of each layer, of each tensor
  assert net.layers == dict.fromkeys(("stem", "one", "two", "three", "head"), macs)
  assert set(net.saved.values()) == {macs + VALUE * values - TAP * 64}
  saved = net.saved["one"]
  assert net.cost(frozenset()) == 3 * way  # 'x', and what the last layers read, 'e' and 'h'
  assert net.cost(frozenset({"one"})) == saved + 7 * way  # and 'b', 'c'; the sum is float: 'd', 's'
  assert net.cost(frozenset({"head"})) == saved + 3 * way  # 'b' in place of 'h'
  # between them 'b' is float
  assert net.cost(frozenset({"stem", "one", "head"})) == 3 * saved + 4 * way  # 'c', 'd', 's', 'e'


def test_what_is_slower_in_8_bits_is_float_from_the_start():
  """A picture of 6 channels -> stem -> apart, of 16 channels, -> up -> wide -> last: windows of few channels, and a
  Resize, take longer in 8 bits; a layer of 96 channels does not."""
  sizes = {"x": [6, 32, 64], "a": [16, 16, 32], "b": [16, 16, 32], "u": [16, 32, 64], "y": [4, 32, 64]}
  sizes |= {"c": [96, 32, 64], "d": [96, 32, 64]}
  weights = {"stem": (16, 6, 3, 3), "apart": (16, 1, 3, 3), "wide": (96, 16, 1, 1), "more": (96, 96, 3, 3)}
  weights["last"] = (4, 96, 1, 1)

  def conv(name, i, o, **more):
    return helper.make_node("Conv", [i, f"w_{name}"], [o], name, **more)

  around = {"pads": [1, 1, 1, 1]}
  nodes = [
    conv("stem", "x", "a", strides=[2, 2], **around),
    conv("apart", "a", "b", group=16, **around),
    helper.make_node("Resize", ["b", "", "scales"], ["u"], "up", mode="nearest"),
    conv("wide", "u", "c"),
    conv("more", "c", "d", **around),
    conv("last", "d", "y"),
  ]
  infos = {k: helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, [1, *v]) for k, v in sizes.items()}
  constants = [numpy_helper.from_array(np.ones(v, np.float32), f"w_{k}") for k, v in weights.items()]
  constants.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
  graph = helper.make_graph(
    nodes, "few", [infos["x"]], [infos["y"]], constants, value_info=[infos[k] for k in ("a", "b", "u", "c", "d")]
  )
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
  onnx.checker.check_model(model)
  net = Net(model, ["last"])
  assert net.saved["stem"] == 16 * 16 * 32 * 6 * 9 + VALUE * 16 * 16 * 32 - TAP * 9 * 16 * 32 < 0
  assert net.saved["apart"] == VALUE * 16 * 16 * 32 - TAP_APART * 9 * 16 * 32
  assert net.cost(frozenset()) == MOVED * (6 * 32 * 64 + 96 * 32 * 64) + RESIZED * 16 * 32 * 64
  # 'apart' alone would be faster in float, but what goes to 8 bits behind its Resize is four times as much
  assert net.saved["apart"] < 0 and names(not_worth({"g": net})) == {"stem"}


def test_slow_layers_are_of_the_processor_that_this_is_known_of(net, monkeypatch):
  graphs = search.Graphs.__new__(search.Graphs)
  graphs.nets = {"g": net}
  for found, want in (({"stem"}, {"stem"}), (set(net.layers), set())):  # where all are, it is for the size
    graphs.slow_known = None
    monkeypatch.setattr(search, "not_worth", lambda nets, found=found: frozenset(("g", layer) for layer in found))
    assert names(graphs.slow("x86-vnni")) == want and graphs.slow("aarch64") == graphs.slow("tensorrt") == frozenset()


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
