"""The runner of TFLite variants, by a stand-in of LiteRT; files that are none, or of another graph, are one line."""

import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tflite_mock
from fair_bundle import write_bundle
from openpilot.selfdrive.modeld.fair.bundle import BundleError, write_manifest
from openpilot.selfdrive.modeld.fair.runners import file_of, make_runner, open_runner
from openpilot.selfdrive.modeld.fair.runners import onnx as onnx_runner
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

FRAME = {"frame": np.full((1, 6, 128, 256), 100, np.uint8)}


def with_tflite(folder, change=None):
  """Depth is 1 more in float, 2 more in 8 bits, so that it shows which one runs."""
  bundle = write_bundle(folder)
  graph = bundle.graphs[0]
  graph["variants"] = []
  for k, (target, precision) in enumerate((("tflite", "float32"), ("tflite-int8", "int8")), 1):
    model = onnx.load(str(folder / "scene.onnx"))
    bias = next(i for i in model.graph.initializer if i.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(k), "bias"))
    if change is not None:
      change(model)
    onnx.save(model, str(folder / f"{target}.tflite"))
    graph["variants"].append({"target": target, "file": f"{target}.tflite", "precision": precision})
  return write_manifest(folder, bundle.manifest)


@pytest.mark.parametrize("target, more, what", [("tflite", 1, "LiteRT, float32"), ("tflite-int8", 2, "LiteRT, int8")])
def test_each_name_runs_its_own_file(tmp_path, monkeypatch, capfd, target, more, what):
  tflite_mock.install(monkeypatch)
  bundle = with_tflite(tmp_path / "b")
  graph = bundle.graphs[0]
  runner, want = make_runner(target, bundle, graph), OnnxRunner(bundle, graph).run(FRAME)
  got = runner.run(FRAME)
  assert runner.what == what and list(got) == ["depth", "segmentation"]
  np.testing.assert_allclose(got["depth"] - want["depth"], more, atol=1e-4)
  np.testing.assert_array_equal(got["segmentation"], want["segmentation"])
  assert runner.run(FRAME)["depth"] is got["depth"]
  assert file_of(graph, target) == f"{target}.tflite" and file_of(graph, "onnx") == "scene.onnx"
  assert capfd.readouterr().err == ""  # ONNX Runtime says nothing of variants that are not its


def test_what_another_processor_runs_names_its_own_variants_alone(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(onnx_runner, "TOLD", set())
  monkeypatch.setattr(onnx_runner, "targets", lambda: ("aarch64",))
  monkeypatch.setattr("openpilot.selfdrive.modeld.fair.cpu.targets", lambda: ("aarch64",))
  bundle = with_tflite(tmp_path / "b")
  manifest = bundle.manifest
  manifest["graphs"][0]["variants"].append({"target": "x86", "file": "scene.onnx", "precision": "int8"})
  bundle = write_manifest(bundle.path, manifest)
  OnnxRunner(bundle, bundle.graphs[0])
  assert "are for x86, this processor is aarch64" in capfd.readouterr().err


def test_what_is_not_here_is_one_line(tmp_path, monkeypatch):
  bundle = write_bundle(tmp_path / "plain")
  with pytest.raises(BundleError, match=r"graph 'scene' has no variant for tflite-int8; `op optimize --format tflite`"):
    make_runner("tflite-int8", bundle, bundle.graphs[0])
  bundle = with_tflite(tmp_path / "b")
  monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
  monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
  with pytest.raises(BundleError, match=r"tflite needs the package ai-edge-litert: pip install -e \.\[tflite\]"):
    make_runner("tflite", bundle, bundle.graphs[0])


def rename(model):
  for value in (*model.graph.output, *(n for n in model.graph.node)):
    if isinstance(value, onnx.NodeProto):
      value.output[:] = ["deep" if o == "depth" else o for o in value.output]
    elif value.name == "depth":
      value.name = "deep"


def narrow(model):
  model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 128
  for value in model.graph.output:
    value.type.tensor_type.shape.dim[3].dim_value = 64


@pytest.mark.parametrize(
  "change, match",
  [
    (rename, r"has .*no as output 'depth'|has \(.*\) as output 'deep', the manifest none"),
    (narrow, r"has \(\[1, 6, 128, 128\], 'uint8'\) as input 'frame', the manifest \(\[1, 6, 128, 256\], 'uint8'\)"),
  ],
)
def test_a_file_of_another_graph_is_one_line(tmp_path, monkeypatch, change, match):
  tflite_mock.install(monkeypatch)
  bundle = with_tflite(tmp_path / "b", change)
  with pytest.raises(BundleError, match=match) as e:
    make_runner("tflite", bundle, bundle.graphs[0])
  assert "\n" not in str(e.value) and "make it again" in str(e.value)


def test_a_file_that_is_none_and_what_runs_in_its_place(tmp_path, monkeypatch, capfd):
  tflite_mock.install(monkeypatch)
  bundle = with_tflite(tmp_path / "b")
  (bundle.path / "tflite.tflite").write_bytes(b"no network")
  with pytest.raises(BundleError, match="has sha256"):
    make_runner("tflite", bundle, bundle.graphs[0])
  bundle = write_manifest(bundle.path, bundle.manifest)
  with pytest.raises(BundleError, match=r"tflite\.tflite is no TFLite network: Model provided"):
    make_runner("tflite", bundle, bundle.graphs[0])
  assert open_runner(bundle, bundle.graphs[0], "tflite").what == "ONNX Runtime"
  assert "runs in ONNX Runtime; tflite: " in capfd.readouterr().err
