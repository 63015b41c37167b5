"""A bundle's weights come back out of its graph, and training goes on from them."""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm", reason="students are built on timm")

from label_fixture import write_store
from student_inputs import assert_close, randomise, some_inputs

from openpilot.selfdrive.modeld.fair.bundle import load_bundle, write_manifest
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.students.onnx_export import export_onnx, store_half
from openpilot.tools.fair.students.onnx_import import import_onnx, plain_norms, settle_norms, student_of
from openpilot.tools.fair.students.student import build, spec_of
from openpilot.tools.lib.errors import UserError

MODELS = Path(__file__).resolve().parents[3] / "models"


def imported(name, path, seed=5, backbone=None):
  torch.manual_seed(seed)
  student = build(spec_of(name, backbone=backbone))
  plain_norms(student)
  weights = import_onnx(student, path)
  student.load_state_dict(weights, strict=False)
  return student.eval(), weights


@pytest.mark.parametrize(
  "name, backbone",
  [("unified-nano", None), ("depth-nano", "vit_tiny_patch16_224"), ("objects-nano", "efficientvit_b0")],
)
def test_what_was_exported_comes_back(name, backbone, tmp_path):
  torch.manual_seed(0)
  student = randomise(build(name, backbone))
  export_onnx(student, tmp_path / "s.onnx")
  other, weights = imported(name, tmp_path / "s.onnx", backbone=backbone)
  lost = {k for k in student.state_dict() if k not in weights}
  unused = {f"detector.logits.0.{x}" for x in ("weight", "bias")}  # only training uses those
  assert lost == (unused if name == "unified-nano" else set())
  folded = {n for n, m in student.named_modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.Conv2d))}
  for k, v in weights.items():
    if k.rpartition(".")[0] not in folded:
      assert torch.allclose(v, student.state_dict()[k], rtol=2e-6, atol=0), (
        k
      )  # scaled there and back: a bit or two of float32
  inputs = some_inputs(student)
  for out, want in student(**inputs).items():
    assert_close(out, other(**inputs)[out].detach().numpy(), want.detach().numpy(), 1e-4)
  # statistics of real inputs change nothing when they are used, and training mode finds them as they are
  g = torch.Generator().manual_seed(7)
  frames = torch.randint(0, 256, (4, 6, 128, 256), generator=g, dtype=torch.uint8)
  before = other.encode(frames)[0]
  settle_norms(other, frames)
  after, training = other.encode(frames)[0], other.train().encode(frames)[0]
  for out, want in before.items():
    assert_close(out, after[out].detach().numpy(), want.detach().numpy(), 1e-3)
    assert_close(out, training[out].detach().numpy(), want.detach().numpy(), 1e-3)


def test_half_weights_come_back_as_halves(tmp_path):
  student = randomise(build("depth-nano"))
  export_onnx(student, tmp_path / "s.onnx", ("depth",))
  assert store_half(tmp_path / "s.onnx")
  other, weights = imported("depth-nano", tmp_path / "s.onnx")
  assert not [k for k in weights if k.startswith("depth.features")]
  inputs = some_inputs(student)
  got = onnxruntime.InferenceSession(str(tmp_path / "s.onnx")).run(
    ["depth"], {k: v.numpy() for k, v in inputs.items()}
  )[0]
  assert_close("depth", other(**inputs)["depth"].detach().numpy(), got, 1e-4)


def test_what_is_no_such_graph_is_refused(tmp_path):
  student = build("depth-nano").eval()
  (tmp_path / "noise.onnx").write_bytes(b"noise")
  with pytest.raises(UserError, match="no ONNX file"):
    import_onnx(student, tmp_path / "noise.onnx")
  export_onnx(student, tmp_path / "s.onnx")
  with pytest.raises(UserError, match="puts out 'depth', which objects-nano does not"):
    import_onnx(build("objects-nano"), tmp_path / "s.onnx")
  with pytest.raises(UserError, match=r"has a constant .* where depth-small has"):
    import_onnx(build("depth-small"), tmp_path / "s.onnx")
  with pytest.raises(UserError, match="is not the graph of depth-nano"):
    import_onnx(build("depth-nano", "efficientvit_b0"), tmp_path / "s.onnx")


def test_training_goes_on_from_a_bundle(tmp_path, monkeypatch):
  write_store(tmp_path / "s")
  torch.manual_seed(0)
  student = randomise(build("depth-nano"))
  (tmp_path / "b").mkdir()
  graph = export_onnx(student, tmp_path / "b/depth-nano.onnx", ("depth",))
  teacher = {"model": "dinov3", "checkpoint_hash": "0", "licence": "DINOv3"}
  manifest = {
    "name": "b",
    "version": "1",
    "size": "nano",
    "view": "medmodel",
    "streams": ["narrowRoad"],
    "graphs": [graph],
    "metrics": [],
  }
  manifest["provenance"] = {
    "teachers": [teacher],
    "data": ["some"],
    "licence": "DINOv3",
    "checkpoint_hash": "",
    "git_commit": "0",
  }
  write_manifest(tmp_path / "b", manifest)

  def run(init, *more):
    argv = [
      "distill",
      "--labels",
      tmp_path / "s",
      "--student",
      "depth-nano",
      "--out",
      tmp_path / "run",
      "--init",
      init,
      "--steps",
      0,
      "--workers",
      0,
      "--no-per-height",
      *more,
    ]
    monkeypatch.setattr(sys, "argv", [str(a) for a in argv])
    distill.main()

  with pytest.raises(UserError, match="--accept-license DINOv3"):
    run(tmp_path / "b")
  run(tmp_path / "b", "--accept-license", "DINOv3")
  state = load_checkpoint(tmp_path / "run/best.pt")
  assert "DINOv3" in {t["licence"] for t in state["provenance"]}
  learned = build("depth-nano").eval()
  learned.load_state_dict({k.removeprefix("student."): v for k, v in state["ema"].items() if k.startswith("student.")})
  inputs = some_inputs(student)
  assert_close("depth", learned(**inputs)["depth"].detach().numpy(), student(**inputs)["depth"].detach().numpy(), 1e-3)
  graph["name"] = "mine"
  write_manifest(tmp_path / "b", manifest)
  shutil.rmtree(tmp_path / "run")
  with pytest.raises(UserError, match="'mine' is none of the students"):
    run(tmp_path / "b")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(p.parent.name for p in MODELS.glob("fair_*/manifest.json")))
def test_what_ships_can_be_trained_on(name):
  """Its graph is still that of this code's student; its weights are all there."""
  bundle = load_bundle(MODELS / name)
  graph = bundle.graphs[0]
  student, _ = student_of(bundle, graph)
  student.eval()
  inputs = some_inputs(student)
  names = [o["name"] for o in graph["outputs"]]
  session = onnxruntime.InferenceSession(bundle.onnx(graph))
  given = {i.name for i in session.get_inputs()}
  want = session.run(names, {k: v.numpy() for k, v in inputs.items() if k in given})
  out = student(**inputs)
  for k, w in zip(names, want, strict=True):
    assert_close(k, out[k].detach().numpy(), np.asarray(w), 1e-4)
