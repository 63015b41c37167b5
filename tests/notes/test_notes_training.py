"""train_epoch, and DoRADistillation taught by a live teacher, without a label store."""

import pytest

torch = pytest.importorskip("torch")

from dino_models import images
from openpilot.tools.dgx.dense.dora_distillation import WEIGHTS, DoRADistillation, Settings
from openpilot.tools.dgx.training.dora import adapter_parameters, apply_dora
from openpilot.tools.dgx.training.losses import WEIGHTS as DRIVING_WEIGHTS
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.student import Student
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.dgx.training.train import train_epoch
from openpilot.tools.fair.dinov2.inference import DINOv2Wrapper
from openpilot.tools.fair.students.dinov2_student import DINOv2Student
from openpilot.tools.lib.errors import UserError


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
  folder = tmp_path_factory.mktemp("networks")
  return [save_reference(folder / f"{seed}.onnx", seed=seed) for seed in (0, 1)]


def clips(batch=2, steps=2):
  return {
    "frames": torch.randint(0, 256, (batch, steps, 12, 128, 256), dtype=torch.uint8),
    "desire": torch.zeros(batch, steps, 8),
    "traffic": torch.tensor([[1.0, 0.0]]).repeat(batch, 1),
  }


def test_an_epoch_moves_the_adapter_alone_and_towards_the_teacher(networks):
  model = load_onnx(networks[0])
  apply_dora(model, 4, targets=["*heads.plan*"])
  student = Student(model, None, DRIVING_WEIGHTS, path_weight=0.0, teacher_weight=1.0)
  teacher = DrivingTeacher(networks[1], "onnxruntime", "cpu")
  learned = adapter_parameters(model)
  frozen = {n: p.clone() for n, p in student.named_parameters() if not p.requires_grad}
  optimizer = torch.optim.AdamW(learned, lr=3e-3)
  loader = [clips()] * 3
  first = train_epoch(student, teacher, loader, optimizer, torch.device("cpu"))
  last = train_epoch(student, teacher, loader, optimizer, torch.device("cpu"))
  assert last["teacher/plan"] < first["teacher/plan"] and last["total"] < first["total"]
  now = dict(student.named_parameters())
  assert (
    frozen
    and all(torch.equal(now[n], p) for n, p in frozen.items())
    and not any(torch.equal(p.detach(), torch.zeros_like(p)) for p in learned)
  )


def test_a_loss_that_is_not_finite_takes_no_step(networks):
  model = load_onnx(networks[0])
  apply_dora(model, 2, targets=["*heads.plan*"])
  student = Student(model, None, DRIVING_WEIGHTS, 1.0, 0.0)
  learned = adapter_parameters(model)
  before = [p.detach().clone() for p in learned]
  learned[0].data.fill_(float("inf"))
  batch = {**clips(1, 1), "plan": torch.zeros(1, 1, 33, 15), "pose": torch.zeros(1, 1, 6)}
  with pytest.raises(UserError, match="the loss of batch 0 is not finite"):
    train_epoch(student, None, [batch], torch.optim.SGD(learned, 1e-3), "cpu")
  assert all(torch.equal(a, b) for a, b in zip(before[1:], learned[1:], strict=True))


def settings(**weights):
  return Settings(dora_rank=2, weights={**WEIGHTS, "path": 0.0, **weights})


def narrow(at_home, **options):
  return DINOv2Wrapper(weights=at_home.weights / "narrow", device="cpu", **options)


def steps(model, count, *args):
  model.train()
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
  losses = []
  for _ in range(count):
    loss = model.train_step(*args)
    if not losses:
      optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
  return losses


def test_a_student_learns_from_a_live_dinov2(at_home):
  model = DoRADistillation(
    DINOv2Student("nano"), narrow(at_home, depth_head=at_home.weights / "narrow_head.pth"), settings=settings()
  )
  assert model.distiller.tasks == ["features", "depth"]
  frozen = {n: p.clone() for n, p in model.network.named_parameters() if not p.requires_grad}
  rgb = images(256, 512, 2)
  losses = steps(model, 4, rgb)
  assert losses[-1] < losses[0]
  now = dict(model.network.named_parameters())
  assert frozen and all(torch.equal(now[n], p) for n, p in frozen.items())
  # what is given goes before what the teacher says
  exact = torch.full((2, 64, 128), 20.0)
  with torch.no_grad():
    assert float(model.train_step(rgb, {"depth": exact})) != float(model.train_step(rgb))
  with pytest.raises(UserError, match="targets has plan; a student learns features, depth"):
    model.train_step(rgb, {"plan": exact})
  with pytest.raises(UserError, match="this network learns from"):
    model.train_step(rgb[:, :, :128])


def test_a_driving_network_learns_from_a_live_dinov2_and_the_drive(at_home, networks):
  model = DoRADistillation(load_onnx(networks[0]), narrow(at_home), settings=settings(path=1.0, keep=0.0))
  rgb = images(256, 512, 2)[:, None].expand(-1, 2, -1, -1, -1)
  with torch.no_grad():
    alone = float(model.train_step(rgb))
    both = model.train_step(rgb, {"plan": torch.zeros(2, 33, 15)})
  assert both.shape == () and float(both) != alone
  losses = steps(model, 3, rgb)
  assert losses[-1] < losses[0]


def test_what_cannot_teach_is_refused(at_home):
  with pytest.raises(UserError, match="nothing to learn"):
    DoRADistillation(DINOv2Student("nano"))
  model = DoRADistillation(DINOv2Student("nano"), None, ["depth"], settings())
  with pytest.raises(UserError, match="wants a fair_teacher"):
    model.train_step(images(256, 512, 1))
