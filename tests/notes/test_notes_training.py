"""train_epoch, and DoRADistillation taught by a live teacher, without a label store."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dino_models import images
from openpilot.selfdrive.modeld.fair.frames import pack_rgb
from openpilot.tools.dgx.dense.dora_distillation import WEIGHTS, DoRADistillation, Settings
from openpilot.tools.dgx.dense.live import live_batch, parsed, taught
from openpilot.tools.dgx.training.constants import OUTPUT_SIZE, output_slices
from openpilot.tools.dgx.training.dora import adapter_parameters, apply_dora
from openpilot.tools.dgx.training.losses import WEIGHTS as DRIVING_WEIGHTS
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.dgx.training.outputs import parse_outputs
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


def test_an_epochs_steps_are_gradient_descents(networks):
  model = load_onnx(networks[0])
  apply_dora(model, 2, targets=["*heads.plan*"])
  student = Student(model, None, DRIVING_WEIGHTS, 1.0, 0.0)
  learned = adapter_parameters(model)
  start = [p.detach().clone() for p in learned]
  batches = [{**clips(1, 1), "plan": torch.randn(1, 1, 33, 15), "pose": torch.randn(1, 1, 6)} for _ in range(2)]
  for b in batches:
    whole = {**b, "traffic_convention": b["traffic"], "big_frames": b["frames"], "action_t": torch.tensor([[0.2, 0.2]])}
    grads = torch.autograd.grad(student(whole)["total"], learned)
    norm = torch.cat([g.flatten() for g in grads]).norm()
    with torch.no_grad():
      for p, g in zip(learned, grads, strict=True):
        p -= 0.1 * g * min(1.0, 1.0 / float(norm))
  want = [p.detach().clone() for p in learned]
  with torch.no_grad():
    for p, v in zip(learned, start, strict=True):
      p.copy_(v)
  train_epoch(student, None, batches, torch.optim.SGD(learned, 0.1), "cpu")
  for p, v, s in zip(learned, want, start, strict=True):
    torch.testing.assert_close(p.detach() - s, v - s, rtol=1e-3, atol=1e-6)


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


def test_a_live_batch_is_the_teachers_word_on_the_last_moment(at_home):
  teacher = narrow(at_home, depth_head=at_home.weights / "narrow_head.pth")
  assert taught(teacher, ("features", "depth", "x")) == {"features": (32, 18, 37), "depth": (1, 256, 512)}
  before, now = images(256, 512, 2, seed=1), images(256, 512, 2, seed=2)
  batch = live_batch(teacher, torch.stack([before, now], 1), True)
  packed = [torch.from_numpy(np.stack([pack_rgb(x) for x in v.permute(0, 2, 3, 1).numpy()])) for v in (before, now)]
  assert batch["frame"].shape == (2, 24, 128, 256)
  assert torch.equal(batch["frame"][:, :6], packed[0]) and torch.equal(batch["frame"][:, 6:12], packed[1])
  alone = live_batch(teacher, now, False)
  assert torch.equal(alone["frame"], packed[1]) and alone["clip"].tolist() == [0, 1] and alone["valid"].all()
  said = teacher.encode(now)
  for b in (batch, alone):
    assert torch.equal(b["features"], said["features"]) and b["metric"].tolist() == [True, True]
    # bilinear in inverse depth: the mean of each cell's four inner pixels
    inverse = 1 / said["depth"][:, 0].double()
    want = 4 / (inverse[:, 1::4, 1::4] + inverse[:, 1::4, 2::4] + inverse[:, 2::4, 1::4] + inverse[:, 2::4, 2::4])
    torch.testing.assert_close(b["depth"].double(), want, rtol=1e-4, atol=1e-4)


def test_a_driving_networks_outputs_are_parsed_as_its_vector_is():
  vector, slices = torch.randn(2, OUTPUT_SIZE), output_slices()
  got, want = parsed({k: vector[:, s] for k, s in slices.items()}, slices), parse_outputs(vector, slices)
  assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_what_cannot_teach_is_refused(at_home):
  with pytest.raises(UserError, match="nothing to learn"):
    DoRADistillation(DINOv2Student("nano"))
  model = DoRADistillation(DINOv2Student("nano"), None, ["depth"], settings())
  with pytest.raises(UserError, match="wants a fair_teacher"):
    model.train_step(images(256, 512, 1))
