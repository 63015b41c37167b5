"""process-replay --runner: the named file runs, or one line says why it cannot."""

import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import tflite_mock
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, BundleError, find_bundle, write_manifest
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.replay import process_replay
from openpilot.tools.replay.runner import named_runner
from openpilot.tools.sim.write_route import write_route


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
  """scene-nano, and a variant that says half of its depth's logarithm."""
  there, folder = find_bundle("scene-nano", MODELS_DIR), tmp_path_factory.mktemp("bundle")
  graph = there.graphs[0]
  model = onnx.load_from_string(there.onnx(graph))
  (folder / graph["file"]).write_bytes(there.onnx(graph))
  out = next(o for o in model.graph.output if o.name == "depth")
  last = next(n for n in model.graph.node if out.name in n.output)
  last.output[list(last.output).index(out.name)] = "whole_depth"
  model.graph.initializer.append(numpy_helper.from_array(np.float32(0.5), "half"))
  model.graph.node.append(onnx.helper.make_node("Mul", ["whole_depth", "half"], [out.name], "halved"))
  onnx.save(model, str(folder / "scene.tflite"))
  graph["variants"] = [{"target": "tflite", "file": "scene.tflite", "precision": "float32"}]
  return write_manifest(folder, there.manifest)


@pytest.fixture(scope="module")
def route(tmp_path_factory):
  return write_route(tmp_path_factory.mktemp("route"), seed=3, seconds=0.3)


def replayed(monkeypatch, route, bundle, out, *words):
  argv = ["process_replay", str(route), "--bundle", str(bundle.path), "--output", str(out), *words]
  monkeypatch.setattr("sys.argv", argv)
  process_replay.main()
  return [np.frombuffer(e.fairDepth.data, np.float16) for e in LogReader(out) if e.which() == "fairDepth"]


def test_the_named_runner_runs(monkeypatch, tmp_path, route, bundle):
  tflite_mock.install(monkeypatch)
  whole = replayed(monkeypatch, route, bundle, tmp_path / "a.zst")
  half = replayed(monkeypatch, route, bundle, tmp_path / "b.zst", "--runner", "tflite")
  assert len(whole) == len(half) > 1
  for a, b in zip(whole, half, strict=True):
    # the network says its logarithm; both are float16
    np.testing.assert_allclose(b.astype(np.float32) ** 2, a.astype(np.float32), rtol=5e-3)


@pytest.mark.parametrize(
  "name, match", [("tflite-int8", "has no variant for tflite-int8"), ("coreml", r"--runner coreml: there are .*onnx")]
)
def test_one_that_cannot_run_is_one_line(monkeypatch, tmp_path, route, bundle, name, match):
  tflite_mock.install(monkeypatch)
  with pytest.raises((UserError, BundleError), match=match) as e:
    replayed(monkeypatch, route, bundle, tmp_path / "c.zst", "--runner", name)
  assert "\n" not in str(e.value) and not (tmp_path / "c.zst").exists()


def test_a_package_that_is_not_there(monkeypatch, bundle):
  for name in ("ai_edge_litert", "ai_edge_litert.interpreter"):  # another test may have imported it
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(BundleError, match="tflite needs the package ai-edge-litert"):
    named_runner("tflite", bundle, bundle.graphs[0])
