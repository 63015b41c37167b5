"""What a graph costs on the comma four: counted by hand where that is possible, made by Mesa's compiler where tinymesa
is installed."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from openpilot.selfdrive.modeld.fair.bundle import write_manifest
from openpilot.tools.fair.comma_four import report
from openpilot.tools.fair.comma_four.adreno import DEVICE, FLAGS
from openpilot.tools.fair.comma_four.cost import Cost, count, over_budget, read_budgets, read_gpu, seconds, total
from openpilot.tools.lib.errors import UserError, cli


def save(path, nodes, x, outputs, weights):
  """A graph with one float input `x` of that shape."""
  graph = helper.make_graph(
    nodes,
    path.stem,
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
    [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
    [
      numpy_helper.from_array(np.asarray(np.random.default_rng(0).normal(size=s), np.float32), n)
      for n, s in weights.items()
    ],
  )
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
  model.ir_version = 8
  onnx.save(model, str(path))
  return path


@pytest.mark.parametrize(
  "op, x, out, weight, attributes, macs",
  [
    (
      "Conv",
      [1, 6, 8, 16],
      [1, 10, 4, 8],
      (10, 6, 3, 3),
      {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
      10 * 4 * 8 * 6 * 9,
    ),
    (
      "Conv",
      [1, 6, 8, 16],
      [1, 6, 8, 16],
      (6, 1, 3, 3),
      {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "group": 6},
      6 * 8 * 16 * 9,
    ),
    (
      "ConvTranspose",
      [1, 4, 5, 5],
      [1, 3, 10, 10],
      (4, 3, 2, 2),
      {"kernel_shape": [2, 2], "strides": [2, 2]},
      4 * 5 * 5 * 3 * 4,
    ),
    ("Gemm", [2, 7], [2, 5], (7, 5), {}, 2 * 7 * 5),
    ("Gemm", [7, 2], [2, 5], (7, 5), {"transA": 1}, 2 * 7 * 5),
    ("MatMul", [3, 2, 7], [3, 2, 5], (3, 7, 5), {}, 3 * 2 * 7 * 5),
  ],
)
def test_multiply_accumulates_by_hand(tmp_path, op, x, out, weight, attributes, macs):
  path = save(
    tmp_path / "g.onnx", [helper.make_node(op, ["x", "w"], ["y"], **attributes)], x, {"y": out}, {"w": weight}
  )
  assert count(path) == (int(np.prod(weight)), macs)


def test_multiply_accumulates_of_a_chain(tmp_path):
  """The shape between the two is inferred."""
  nodes = [
    helper.make_node("Conv", ["x", "a"], ["h"]),
    helper.make_node("Relu", ["h"], ["r"]),
    helper.make_node("Conv", ["r", "b"], ["y"]),
  ]
  path = save(tmp_path / "g.onnx", nodes, [1, 3, 4, 4], {"y": [1, 2, 4, 4]}, {"a": (5, 3, 1, 1), "b": (2, 5, 1, 1)})
  assert count(path) == (25, 16 * (15 + 10))


@pytest.mark.slow
def test_a_student_is_counted_as_torch_counts_it(tmp_path):
  """Against the list of students, which asks torch's own counter."""
  pytest.importorskip("torch")
  from openpilot.tools.fair.students.onnx_export import export_onnx
  from openpilot.tools.fair.students.list_students import build, macs

  student = build("depth-nano").eval()
  export_onnx(student, tmp_path / "g.onnx")
  assert count(tmp_path / "g.onnx")[1] == pytest.approx(macs(student), rel=0.01)


def test_shapes_that_are_not_inferred_are_those_of_a_run(tmp_path):
  """A reshape to the shape of something else's result, which ONNX's inference does not follow."""
  nodes = [
    helper.make_node("NonZero", ["w"], ["at"]),
    helper.make_node("Shape", ["at"], ["s"]),
    helper.make_node("Reshape", ["x", "s"], ["r"]),
    helper.make_node("MatMul", ["r", "v"], ["y"]),
  ]
  path = save(tmp_path / "g.onnx", nodes, [2, 35], {"y": [2, 4]}, {"w": (5, 7), "v": (35, 4)})
  assert count(path) == (35 + 140, 2 * 35 * 4)


def test_bad_graphs_are_refused(tmp_path):
  (tmp_path / "lfs.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(UserError, match="is not an ONNX graph"):
    count(tmp_path / "lfs.onnx")
  path = save(
    tmp_path / "g.onnx",
    [helper.make_node("MatMul", ["x", "w"], ["y"])],
    ["batch", 7],
    {"y": ["batch", 5]},
    {"w": (7, 5)},
  )
  with pytest.raises(UserError, match="are not fixed"):
    count(path)


def kernel(**more):
  return {
    "name": "k",
    "instructions": 10,
    "registers": 3,
    "half_registers": 1,
    "spilled": 0,
    "read": 0,
    "written": 0,
    "flops": 0,
    **more,
  }


def test_time_is_the_slower_of_arithmetic_and_memory():
  gpu = {"flops_per_s": 1e9, "bytes_per_s": 1e6}
  assert seconds(kernel(flops=5e8), gpu, 0.5) == pytest.approx(1.0)
  assert seconds(kernel(read=1e5, written=1e5), gpu, 0.1) == pytest.approx(2.0)
  assert seconds(kernel(flops=5e8, read=2e5, written=0), gpu, 1.0) == pytest.approx(0.5)


def test_the_gpus_peaks_have_sources():
  gpu = read_gpu()
  assert gpu["flops_per_s"] == pytest.approx(2 * 512 * 710e6, rel=1e-3) and gpu["bytes_per_s"] == pytest.approx(
    4 * 2 * 3733e6, rel=2e-3
  )
  assert gpu["share"] == [0.1, 0.5] and ".org/" in gpu["flops_source"] and ".org/" in gpu["bytes_source"]


def test_budgets(tmp_path):
  budgets = {"default": {"macs": 10, "bytes": 100, "kernels": 2}, "big": {"macs": 1000, "bytes": 100, "kernels": 2}}
  cost = Cost(parameters=1, macs=11, kernels=2, read=60, written=41, flops=0)
  assert over_budget("small", cost, budgets) == [
    "graph 'small' has 11 macs, its budget is 10",
    "graph 'small' has 101 bytes, its budget is 100",
  ]
  assert over_budget("big", cost, budgets) == ["graph 'big' has 101 bytes, its budget is 100"]
  assert over_budget("big", Cost(1, 1000, 2, 60, 40, 0), budgets) == []  # exactly the budget is within it
  for text, says in (
    ("{", "no readable"),
    ('{"a": {}}', "no budget 'default'"),
    ('{"default": {"macs": 1}}', "needs macs, bytes and kernels"),
    ('{"default": {"macs": 1, "bytes": -1, "kernels": 1}}', "needs macs"),
  ):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(UserError, match=says):
      read_budgets(tmp_path / "b.json")
  assert read_budgets()["default"]["kernels"] > 0


def bundle_of(folder, kernels=8):
  """A bundle with one graph: a convolution."""
  folder.mkdir()
  node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
  save(folder / "net.onnx", [node], [1, 4, 16, 32], {"y": [1, kernels, 16, 32]}, {"w": (kernels, 4, 3, 3)})
  side = {
    "inputs": [{"name": "x", "shape": [1, 4, 16, 32], "dtype": "float32"}],
    "outputs": [{"name": "y", "shape": [1, kernels, 16, 32], "dtype": "float32"}],
  }
  write_manifest(
    folder,
    {
      "name": "net",
      "version": "1",
      "size": "tiny",
      "view": "medmodel",
      "streams": ["narrowRoad"],
      "metrics": [],
      "graphs": [{"name": "net", "file": "net.onnx", "period": 1, **side}],
      "provenance": {"teachers": [], "data": [], "licence": "MIT", "git_commit": "none"},
    },
  )
  return folder


def run(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["compile", *map(str, words)])
  return cli(report.main, (ValueError,))()


def test_report_and_budget_of_known_kernels(tmp_path, monkeypatch, capsys):
  bundle = bundle_of(tmp_path / "b")
  kernels = [
    kernel(name="slow", flops=727_000_000, read=1000, written=3000),
    kernel(name="fast", read=29_900, spilled=64),
  ]
  monkeypatch.setattr(report, "lower", lambda path, timeout: [dict(k) for k in kernels])
  assert run(monkeypatch, bundle, "--target", "comma-four", "--report", "--json", tmp_path / "r.json") == 0
  said = capsys.readouterr().out
  # 1 ms at the whole rate, and 1 us at the whole bandwidth: ten times that at 10%, twice at 50%
  assert "2 kernels of 20 instructions, 0.73 GFLOP, 0.0 MB read, 0.0 MB written, 2.0 to 10.0 ms" in said
  lines = said.splitlines()
  assert (
    lines[2].split()[:3] == ["slow", "10", "3"]
    and lines[2].endswith("2000 to 10000")
    and lines[3].endswith("2 to   10  spills 64 B")
  )
  assert "NOT measured, not calibrated" in said and "DEBUG=2 python -m openpilot.selfdrive.modeld.fair.compile" in said
  (graph,) = json.loads((tmp_path / "r.json").read_text())["graphs"]
  assert (
    graph["macs"] == 8 * 16 * 32 * 4 * 9
    and graph["bytes"] == 33_900
    and graph["seconds"] == pytest.approx([0.01001, 0.002002])
  )
  assert run(monkeypatch, bundle, "--target", "comma-four", "--report", "--kernels", 1) == 0
  assert "and 1 more" in capsys.readouterr().out
  (tmp_path / "budgets.json").write_text(json.dumps({"default": {"macs": 147_455, "bytes": 33_900, "kernels": 1}}))
  assert run(monkeypatch, bundle, "--target", "comma-four", "--budgets", tmp_path / "budgets.json") == 2
  error = capsys.readouterr().err
  assert (
    error.count("\n") == 1
    and "has 147,456 macs, its budget is 147,455; graph 'net' has 2 kernels, its budget is 1" in error
  )


@pytest.mark.parametrize(
  "words, says",
  [
    (["nowhere", "--target", "comma-four"], "there is no nowhere"),
    ([".", "--target", "comma-four"], "has no readable manifest.json"),
    ([".", "--target", "comma-four", "--kernels", "0"], "are over zero"),
  ],
)
def test_bad_words(tmp_path, monkeypatch, capsys, words, says):
  monkeypatch.chdir(tmp_path)
  assert run(monkeypatch, *words) == 2
  error = capsys.readouterr().err
  assert says in error and error.count("\n") == 1


def test_without_tinymesa_one_line(tmp_path, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tinymesa" else object())
  with pytest.raises(UserError, match="tinymesa is not installed"):
    report.lower(tmp_path / "x.onnx")


def test_flags_are_openpilots():
  assert {k: v for k, v in FLAGS.items() if k != "DEV"} == {
    "IMAGE": "1",
    "FLOAT16": "1",
    "NOLOCALS": "1",
    "JIT_BATCH_SIZE": "0",
    "OPENPILOT_HACKS": "1",
  }
  assert DEVICE == "NULL:IR3:a630,IMAGE_PITCH_ALIGNMENT=64"


@pytest.mark.slow
def test_adreno_code_is_made_here(tmp_path):
  """Two convolutions and what lies between them: kernels with instructions and registers, bytes that are at least those
  of weights, input and output."""
  if importlib.util.find_spec("tinymesa") is None or importlib.util.find_spec("tinygrad") is None:
    pytest.skip("tinygrad and tinymesa make the comma four's machine code; they are not installed")
  nodes = [
    helper.make_node("Conv", ["x", "a"], ["h"], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["h"], ["r"]),
    helper.make_node("Conv", ["r", "b"], ["y"]),
  ]
  path = save(tmp_path / "g.onnx", nodes, [1, 4, 16, 32], {"y": [1, 8, 16, 32]}, {"a": (8, 4, 3, 3), "b": (8, 8, 1, 1)})
  kernels = report.lower(path, 600)
  cost = total(Path(path), kernels)
  assert 2 <= cost.kernels <= 6 and cost.macs == 512 * (8 * 36 + 64)
  assert all(
    k["instructions"] > 10
    and 0 < k["registers"] <= 48
    and k["code"] > 0
    and k["written"] > 0
    and k["name"].isprintable()
    for k in kernels
  )
  assert cost.flops >= 2 * cost.macs and cost.flops < 3 * cost.macs
  assert (
    cost.read >= 4 * 512 * 2 and cost.written >= 8 * 512 * 4
  )  # at least the input in halves, and the output, which is float32
  assert any(k["textures"] for k in kernels)  # images, as openpilot's flags ask for


@pytest.mark.slow
def test_a_padded_image_is_read_once_and_blocks_hold_no_zeros(tmp_path):
  """A 1 x 1 convolution reads all its channels for each group of four that it says: from an image whose rows are
  padded. A transposed one of 2 x 2 is as much work as its multiply-adds."""
  if importlib.util.find_spec("tinymesa") is None or importlib.util.find_spec("tinygrad") is None:
    pytest.skip("tinygrad and tinymesa make the comma four's machine code; they are not installed")
  nodes = [
    helper.make_node("Conv", ["x", "a"], ["p"]),
    helper.make_node("ConvTranspose", ["p", "up"], ["q"], strides=[2, 2]),
    helper.make_node("Conv", ["q", "b"], ["y"]),
  ]
  weights = {"a": (16, 16, 1, 1), "up": (16, 16, 2, 2), "b": (16, 16, 1, 1)}
  path = save(tmp_path / "net.onnx", nodes, [1, 16, 32, 64], {"y": [1, 16, 64, 128]}, weights)
  kernels = report.lower(path, 600)
  small, large = 16 * 32 * 64, 16 * 64 * 128  # numbers
  # x is float32, what is between float16 or float32, y float32: each is written once and read once, or not at all
  most = 4 * (2 * small + 2 * small + 2 * large + large) + 4 * sum(int(np.prod(s)) for s in weights.values())
  assert sum(k["read"] + k["written"] for k in kernels) <= 1.1 * most
  macs = small * 16 + small * 16 * 4 + large * 16
  assert sum(k["flops"] for k in kernels) < 2.5 * macs
