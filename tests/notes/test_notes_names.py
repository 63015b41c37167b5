"""The names that people know from papers and notes: each is ours, and says what ours says."""

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import sam2_models
from cotracker_models import known_video
from dino_models import images
from openpilot.tools.dgx.training.constants import INPUTS, OUTPUT_SIZE, output_slices
from openpilot.tools.dgx.training.dora import DoRAGRU, DoRALayer, DoRALinear, apply_dora
from openpilot.tools.dgx.training.export import export_to_onnx, merge_dora_weights
from openpilot.tools.dgx.training.losses import compute_loss, driving_loss
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.dgx.training.outputs import parse_outputs, read_slices
from openpilot.tools.dgx.training.reference import ReferenceDriving, sample_inputs, save_reference
from openpilot.tools.dgx.training.runners import OrtRunner
from openpilot.tools.dgx.training.teacher import TensorRTEngine
from openpilot.tools.fair.cotracker.cotracker import CoTracker
from openpilot.tools.fair.cotracker.inference import LaneTracker
from openpilot.tools.fair.dinov2 import teacher as dinov2_teacher
from openpilot.tools.fair.dinov2.inference import DINOv2Wrapper
from openpilot.tools.fair.dinov3.config import DinoV3Config
from openpilot.tools.fair.dinov3.teacher import DinoV3Teacher
from openpilot.tools.fair.distillation.losses import soft_label_loss
from openpilot.tools.fair.distillation.soft_labels import DistillationTrainer
from openpilot.tools.fair.sam.inference import SAM2VideoWrapper
from openpilot.tools.fair.students.dinov2_student import DINOv2Student
from openpilot.tools.fair.students.student import parameters
from openpilot.tools.lib.errors import UserError


def test_the_bridge_is_the_teacher(at_home):
  from dinov3_bridge.config import DinoV3Config as BridgeConfig
  from dinov3_bridge.model import DinoV3Teacher as BridgeTeacher

  assert BridgeConfig is DinoV3Config and BridgeTeacher is DinoV3Teacher
  assert BridgeTeacher(config=BridgeConfig(root="dinov3"), device="cpu").cfg.channels == 1024


def test_dinov2_takes_the_head_that_lies_beside_it(at_home, capsys):
  wrapper = DINOv2Wrapper(device="cpu")
  assert "dinov2_vitb14_kitti_linear_head.pth, trained to 80 m" in capsys.readouterr().err
  plain = dinov2_teacher.DINOv2Wrapper(device="cpu", depth_head=at_home.weights / "dinov2_vitb14_kitti_linear_head.pth")
  x = images(28, 42)
  depth = wrapper.estimate_depth(x)
  assert depth.shape == (2, 1, 28, 42) and torch.equal(depth, plain.estimate_depth(x))
  assert wrapper.checkpoint_hash == plain.checkpoint_hash and wrapper.depth_unit == "m"
  # nobody's head is guessed for other weights, and none is made up
  alone = DINOv2Wrapper(weights=at_home.weights / "dinov2-base", device="cpu")
  with pytest.raises(UserError, match="no depth head"):
    alone.estimate_depth(x)


def test_a_dinov2_student():
  student = DINOv2Student("nano").eval()
  with torch.no_grad():
    out = student(torch.zeros(2, 6, 128, 256, dtype=torch.uint8))
  assert {k: tuple(v.shape) for k, v in out.items()} == {"features": (2, 64, 16, 32), "depth": (2, 1, 64, 128)}
  assert parameters(student) < 5_000_000


def test_sam2_gives_masks_alone(at_home):
  wrapper = SAM2VideoWrapper(device="cpu")
  rgb = sam2_models.frames(3)
  masks = wrapper.track_objects(rgb, sam2_models.BOXES)
  whole, ids, _ = wrapper.predictor.track_objects(rgb, sam2_models.BOXES)
  assert masks.shape == (3, 2, sam2_models.H, sam2_models.W) and masks.dtype == bool and len(ids) == 2
  assert np.array_equal(masks, whole) and masks.any()


def test_cotracker_takes_its_own_packages_video(at_home):
  tracker = LaneTracker(device="cpu")
  assert isinstance(tracker, CoTracker) and tracker.mode == "v2"
  video, points = known_video(9, 2, 1), np.array([[10.0, 10.0], [30.0, 40.0]])
  want = tracker.track_lane_points(torch.from_numpy(video), torch.from_numpy(points))
  tracks, visible = tracker.track_lane_points(torch.from_numpy(video)[None].float(), torch.from_numpy(points))
  assert tracks.shape == (9, 2, 2) and visible.shape == (9, 2)
  assert torch.equal(tracks, want[0]) and torch.equal(visible, want[1])
  for wrong in (
    torch.rand(1, 9, 3, 96, 128),
    torch.from_numpy(video)[None] + 0.5,
    torch.zeros(2, 9, 3, 96, 128),
    torch.ones(1, 9, 3, 96, 128),
  ):
    with pytest.raises(UserError, match="whole numbers of 0 to 255"):
      tracker.track_lane_points(wrong, points)


def test_soft_labels_and_features_of_a_trainer():
  trainer = DistillationTrainer(torch.nn.Linear(3, 5), torch.nn.Linear(3, 5))
  assert not trainer.teacher.training and trainer.student.training and trainer.temperature == 4.0
  q, p, y = torch.randn(6, 5), torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
  assert torch.equal(trainer.distillation_loss(q, p, y), soft_label_loss(q, p, y, 4.0, 0.7))
  mine, theirs = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 8, 3, 3, requires_grad=True)
  loss = trainer.feature_distillation_loss(mine, theirs)
  assert loss.shape == () and trainer.projector is not None
  loss.backward()
  assert mine.grad is not None and theirs.grad is None
  own = trainer.projector
  trainer.feature_distillation_loss(mine, theirs)
  assert trainer.projector is own


@pytest.mark.parametrize(
  "layer, x", [(torch.nn.Linear(6, 5), torch.randn(3, 6)), (torch.nn.Conv2d(4, 8, 3), torch.randn(1, 4, 5, 5))]
)
def test_a_dora_layer_of_any_layer(layer, x):
  adapted = DoRALayer(layer, rank=2)
  assert isinstance(adapted, DoRALayer) and type(adapted) is not DoRALayer
  torch.testing.assert_close(adapted(x), layer(x))  # it begins as nothing
  adapter = adapted.adapter()
  assert adapter is not None and adapter.b.shape[1] == 2 and not layer.weight.requires_grad
  assert {n.split(".")[-1] for n, p in adapted.named_parameters() if p.requires_grad} == {"a", "b", "m"}


def test_a_dora_layers_rank_and_kind():
  adapted = DoRALayer(torch.nn.Linear(6, 5))
  assert type(adapted) is DoRALinear and adapted.adapter().b.shape[1] == 5  # 16, and what the layer takes
  gru = DoRALayer(torch.nn.GRU(4, 3), rank=2)
  assert type(gru) is DoRAGRU and set(gru.names) == {"weight_ih_l0", "weight_hh_l0"}
  with pytest.raises(UserError, match="LayerNorm cannot be adapted; Linear, Conv2d, GRU can"):
    DoRALayer(torch.nn.LayerNorm(4))


def test_a_dora_layer_is_m_times_the_direction():
  layer = DoRALayer(torch.nn.Linear(6, 5), rank=2)
  a, base = layer.adapter(), layer.base_layer
  with torch.no_grad():
    a.b.normal_()
    a.m.mul_(1.5)
  x, v = torch.randn(3, 6), base.weight + a.b @ a.a
  torch.testing.assert_close(layer(x), x @ (a.m[:, None] * v / v.norm(dim=1, keepdim=True)).T + base.bias)


def stir(model: torch.nn.Module) -> None:
  with torch.no_grad():
    for m in model.modules():
      if isinstance(m, DoRALayer):
        for a in m.adapters["default"].values():
          a.b.normal_(std=0.1)


def test_merged_weights_say_the_same():
  model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
  apply_dora(model, 2)
  stir(model)
  x = torch.randn(3, 6)
  want = model(x)
  assert merge_dora_weights(model) is None
  assert [type(m) for m in model] == [torch.nn.Linear, torch.nn.ReLU, torch.nn.Linear]
  torch.testing.assert_close(model(x), want)


@pytest.fixture(scope="module")
def driving(tmp_path_factory):
  return save_reference(tmp_path_factory.mktemp("base") / "reference.onnx")


def test_export_keeps_the_interface(driving, tmp_path):
  model = load_onnx(driving)
  apply_dora(model, 2, targets=["*heads.plan*"])
  stir(model)
  export_to_onnx(model, tmp_path / "tuned.onnx")
  assert any(isinstance(m, DoRALayer) for m in model.modules())  # as it was
  x = sample_inputs(seed=3)
  with torch.no_grad():
    want = model(**x)["outputs"]
  got = OrtRunner(tmp_path / "tuned.onnx", "cpu").run(x)
  assert float((got - want).abs().max() / want.abs().max()) < 1e-4
  assert float((OrtRunner(driving, "cpu").run(x) - want).abs().max()) > 1e-2
  assert read_slices(tmp_path / "tuned.onnx") == read_slices(driving)
  graph = onnx.load(str(tmp_path / "tuned.onnx"))
  assert {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in graph.graph.input} == {
    k: shape for k, (shape, _) in INPUTS.items()
  }
  assert graph.opset_import[0].version == 14


def test_a_module_of_openpilots_inputs_is_exported_too(tmp_path):
  export_to_onnx(ReferenceDriving(1), tmp_path / "own.onnx")
  assert read_slices(tmp_path / "own.onnx") == output_slices()


def test_an_engine_takes_inputs_in_order_or_by_name(driving, capsys):
  engine, x = TensorRTEngine(driving, device="cpu"), sample_inputs(2)
  out = engine(*x.values())
  assert out.shape == (2, OUTPUT_SIZE) and out.dtype == torch.float32
  assert torch.equal(engine(**x), out) and "ONNX Runtime" in capsys.readouterr().err
  with pytest.raises(UserError, match="the file has img, big_img"):
    engine(x["img"])


def test_the_loss_of_a_step():
  a, b = torch.randn(2, OUTPUT_SIZE, requires_grad=True), torch.randn(2, OUTPUT_SIZE)
  parsed = [parse_outputs(x, output_slices()) for x in (a, b)]
  loss = compute_loss(a, b)
  assert loss.shape == () and torch.equal(loss, driving_loss(*parsed)["total"])
  assert torch.equal(compute_loss(*parsed), loss)
  loss.backward()
  assert a.grad is not None and a.grad.isfinite().all()
