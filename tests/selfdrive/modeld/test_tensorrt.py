"""Engines of TensorRT 10 and 11, by a stand-in for both: which calls are made with what, and what is kept beside a
plan. On a GPU none of it has run."""

import json

import numpy as np
import onnx
import pytest

import tensorrt_mock
from fair_bundle import lanes_graph, write_graphs
from openpilot.selfdrive.modeld.fair.artifact import ArtifactError, folder_of
from openpilot.selfdrive.modeld.fair.bundle import write_manifest
from openpilot.selfdrive.modeld.fair.compile import lacking
from openpilot.selfdrive.modeld.fair.parity import sample_inputs
from openpilot.selfdrive.modeld.fair.runners import open_runner, tensorrt
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

TYPED, PLAIN = 2, 0  # of create_network in 10


@pytest.fixture
def bundle(tmp_path):
  (tmp_path / "b").mkdir()
  return write_graphs(tmp_path / "b", [lanes_graph(tmp_path / "b")])


def with_variant(bundle, precision):
  """Its own file again, as a variant for TensorRT, with something in it that tells it apart."""
  graph = bundle.graphs[0]
  model = onnx.load_from_string(bundle.onnx(graph))
  model.doc_string = precision
  onnx.save(model, str(bundle.path / "typed.onnx"))
  graph["variants"] = [{"target": "tensorrt", "file": "typed.onnx", "precision": precision}]
  made = write_manifest(bundle.path, bundle.manifest)
  return made, made.graphs[0]["variants"][0]


def said_of(bundle):
  return json.loads((folder_of(bundle) / "lanes.tensorrt.json").read_text())


def test_an_engine_is_built_kept_and_run(bundle, monkeypatch):
  """All but the GPU: addresses, copies, state and slots, the sidecar's keys."""
  graph = bundle.graphs[0]
  trt, cuda = tensorrt_mock.install(monkeypatch, bundle, graph)
  tensorrt.build_engine(bundle, graph)
  said = said_of(bundle)
  assert (said["gpu"], said["precision"], said["tensorrt"], said["parity"]) == ("no GPU", "float16", "10.13", 0.0)
  assert trt.calls == [("create_network", PLAIN), ("workspace", tensorrt.WORKSPACE), ("set_flag", "fp16")]
  runner = open_runner(bundle, graph, "tensorrt")
  x = sample_inputs(graph, 3)
  got, want = runner.run(x), OnnxRunner(bundle, graph).run(x)
  assert runner.what == "TensorRT 10.13 (no GPU, float16)" and all(np.array_equal(got[k], w) for k, w in want.items())
  assert runner.run(x)["lanes_visible"] is got["lanes_visible"]
  del runner
  assert not cuda.memory  # what was allocated is given back
  with pytest.raises(ArtifactError, match="was built for precision"):
    tensorrt.TensorRTRunner(bundle, graph, precision="float32")
  monkeypatch.setattr(tensorrt, "package_version", lambda package: "11.4")
  with pytest.raises(ArtifactError, match=r"was built for tensorrt 10\.13, here it is 11\.4; build it again"):
    tensorrt.TensorRTRunner(bundle, graph)


@pytest.mark.parametrize("version, flags", [("10.13", TYPED), ("11.4", PLAIN)])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_a_variant_keeps_its_types(bundle, monkeypatch, version, flags, precision):
  """In 10 a flag of the network asks for it; in 11 there is none, nor any of the builder's."""
  bundle, variant = with_variant(bundle, precision)
  graph = bundle.graphs[0]
  trt, _ = tensorrt_mock.install(monkeypatch, bundle, graph, version, variant)
  tensorrt.build_engine(bundle, graph)
  assert trt.calls == [("create_network", flags), ("workspace", tensorrt.WORKSPACE)]
  assert trt.parsed.doc_string == precision  # the variant's file, not the graph's
  assert (said_of(bundle)["precision"], said_of(bundle)["tensorrt"]) == (precision, version)
  assert open_runner(bundle, graph, "tensorrt").what == f"TensorRT {version} (no GPU, {precision})"


def test_without_a_variant_11_takes_the_graph_as_it_is(bundle, monkeypatch):
  graph = bundle.graphs[0]
  trt, _ = tensorrt_mock.install(monkeypatch, bundle, graph, "11.4")
  tensorrt.build_engine(bundle, graph)
  assert trt.calls == [("create_network", PLAIN), ("workspace", tensorrt.WORKSPACE)]
  assert said_of(bundle)["precision"] == tensorrt.usual_precision(graph) == "float32"
  with pytest.raises(ArtifactError, match=r"TensorRT 11\.4 keeps a graph's own types; .*op optimize --target tensorrt"):
    tensorrt.build_engine(bundle, graph, precision="float16")


def test_in_float32_10_is_not_asked_for_less(bundle, monkeypatch):
  graph = bundle.graphs[0]
  trt, _ = tensorrt_mock.install(monkeypatch, bundle, graph)
  tensorrt.build_engine(bundle, graph, precision="float32")
  assert trt.calls == [("create_network", TYPED), ("workspace", tensorrt.WORKSPACE)]


def test_an_engine_of_the_graph_before_its_variant_is_lacking(bundle, monkeypatch):
  """What fairmodeld asks before it compiles: precision is of each graph."""
  made, variant = with_variant(bundle, "int8")
  graph = made.graphs[0]
  tensorrt_mock.install(monkeypatch, made, graph, "10.13", variant)
  assert lacking(made, "tensorrt") == "tensorrt"
  tensorrt.build_engine(made, graph)
  assert lacking(made, "tensorrt") is None
  monkeypatch.setattr(tensorrt, "package_version", lambda package: "11.4")
  assert lacking(made, "tensorrt") == "tensorrt"


def test_a_plan_that_is_far_off_is_not_kept(bundle, monkeypatch):
  made, variant = with_variant(bundle, "float16")
  graph = made.graphs[0]
  tensorrt_mock.install(monkeypatch, made, graph, "11.4", variant)
  monkeypatch.setattr(tensorrt, "differences", lambda got, want: {"x": 0.06})
  with pytest.raises(ArtifactError, match=r"typed\.onnx in TensorRT, float16, is off from ONNX Runtime by 0\.06"):
    tensorrt.build_engine(made, graph)
  assert not (folder_of(made) / "lanes.tensorrt.json").exists()
