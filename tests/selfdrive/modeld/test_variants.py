"""Graphs in 8 bits: each processor takes its own, and where there is none the float graph runs, which is said."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fair_bundle import write_bundle
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair import cpu
from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle, write_manifest
from openpilot.selfdrive.modeld.fair.compile_graph import parity
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.runners import onnx as runner_module
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

FRAME = {"frame": np.full((1, 6, 128, 256), 100, np.uint8)}


def entry(target, file):
  calibration = {"data": "some", "frames": 8, "segments": 2, "method": "by hand"}
  kind = {"target": target, "file": file, "precision": "int8", "activations": "uint8", "weight_bits": 8}
  return {**kind, "calibration": calibration, "float": [{"why": "it is last", "nodes": ["out"]}]}


def with_variants(folder, *targets):
  """Of the float graph's depth 1 more, 2 more, ...: so that it shows which one runs."""
  bundle = write_bundle(folder)
  manifest = {**bundle.manifest}
  manifest["graphs"][0]["variants"] = []
  for k, target in enumerate(targets, 1):
    model = onnx.load(str(folder / "scene.onnx"))
    bias = next(i for i in model.graph.initializer if i.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(k), "bias"))
    onnx.save(model, str(folder / f"{target}.onnx"))
    manifest["graphs"][0]["variants"].append(entry(target, f"{target}.onnx"))
  return write_manifest(folder, manifest)


@pytest.fixture(autouse=True)
def anew(monkeypatch):
  monkeypatch.setattr(runner_module, "TOLD", set())


def on(monkeypatch, *targets):
  monkeypatch.setattr(cpu, "targets", lambda: targets)
  monkeypatch.setattr(runner_module, "targets", lambda: targets)


def depth(bundle, **kwargs):
  return float(OnnxRunner(bundle, bundle.graphs[0], **kwargs).run(FRAME)["depth"][0, 0, 0, 0])


def test_each_processor_takes_its_own(tmp_path, monkeypatch, capfd):
  bundle = with_variants(tmp_path / "b", "x86", "x86-vnni")
  for targets, more, what in (
    (("x86-vnni", "x86"), 2, "ONNX Runtime, int8 for x86-vnni"),
    (("x86",), 1, "ONNX Runtime, int8 for x86"),
  ):
    on(monkeypatch, *targets)
    assert depth(bundle) - depth(bundle, variants=False) == pytest.approx(more, abs=1e-5)
    assert OnnxRunner(bundle, bundle.graphs[0]).what == what
  assert capfd.readouterr().err == ""


def test_another_processor_runs_the_float_graph_and_says_so_once(tmp_path, monkeypatch, capfd):
  bundle = with_variants(tmp_path / "b", "x86-vnni")
  on(monkeypatch, "aarch64")
  assert depth(bundle) == depth(bundle) == depth(bundle, variants=False)
  said = capfd.readouterr().err
  assert said.count("\n") == 1 and "runs in float" in said and "are for x86-vnni, this processor is aarch64" in said
  assert OnnxRunner(bundle, bundle.graphs[0]).what == "ONNX Runtime"


def test_what_is_compiled_is_the_float_graph(tmp_path, monkeypatch):
  """Its likeness is judged by the float graph, too: a tenth of what 8 bits change would not pass."""
  bundle = with_variants(tmp_path / "b", "x86")
  on(monkeypatch, "x86")
  runner = OnnxRunner(bundle, bundle.graphs[0], variants=False)
  from openpilot.selfdrive.modeld.fair.parity import sample_inputs

  got = runner.run(sample_inputs(bundle.graphs[0], 2))
  assert parity(bundle, bundle.graphs[0], "tinygrad-cpu", got) == 0
  assert bundle.onnx(bundle.graphs[0]) == (bundle.path / "scene.onnx").read_bytes()


@pytest.mark.parametrize(
  ("machine", "flags", "found"),
  [
    ("x86_64", "fpu avx2 avx512_vnni", ("x86-vnni", "x86")),
    ("AMD64", "fpu avx2 avx_vnni", ("x86-vnni", "x86")),
    ("x86_64", "fpu avx2 avx512f", ("x86",)),
    ("x86_64", None, ("x86",)),
    ("aarch64", "", ("aarch64",)),
    ("arm64", None, ("aarch64",)),
    ("riscv64", "", ()),
  ],
)
def test_what_this_processor_is(tmp_path, monkeypatch, machine, flags, found):
  path = tmp_path / "cpuinfo"
  if flags is not None:
    path.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 1\n")
  monkeypatch.setattr(cpu, "CPUINFO", path)
  monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
  cpu.targets.cache_clear()
  try:
    assert cpu.targets() == found
  finally:
    cpu.targets.cache_clear()


def test_two_variants_for_one_target_and_a_file_without_a_hash(tmp_path):
  bundle = with_variants(tmp_path / "b", "x86")
  manifest = json.loads((bundle.path / "manifest.json").read_text())
  manifest["graphs"][0]["variants"] *= 2
  (bundle.path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(BundleError, match="two variants for one target"):
    load_bundle(bundle.path)
  manifest["graphs"][0]["variants"].pop()
  del manifest["sha256"]["x86.onnx"]
  (bundle.path / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(BundleError, match=r"no hash of x86\.onnx"):
    load_bundle(bundle.path)


def test_a_variant_that_was_changed_is_refused(tmp_path):
  bundle = with_variants(tmp_path / "b", "x86")
  (bundle.path / "x86.onnx").write_bytes((bundle.path / "scene.onnx").read_bytes())
  with pytest.raises(BundleError, match=r"x86\.onnx has sha256"):
    load_bundle(bundle.path)


def test_the_same_frames_give_the_same_bytes(tmp_path, monkeypatch):
  bundle = with_variants(tmp_path / "b", "x86")
  on(monkeypatch, "x86")
  r = np.random.default_rng(0)
  stride, y_height, _, size = nv12_info(1344, 760)
  frames = r.integers(0, 256, (3, size), dtype=np.uint8)
  said = []
  for _ in range(2):
    model = FairModel(bundle)
    model.set_camera(1344, 760, stride, stride * y_height)
    sent = [m for k, f in enumerate(frames) for m in model.process(f, k, 0, k * 50_000_000)]
    for _, message in sent:
      message.logMonoTime = 0  # when it was made
    said.append([(service, message.to_bytes()) for service, message in sent])
  assert said[0] == said[1] and len(said[0]) == 5  # fairDepth of two of three frames, fairSegmentation of all
