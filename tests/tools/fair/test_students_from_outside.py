"""Everything that a student learns with can be added by another package: a class set, a size, a head and a task,
without a file of this one being edited. What is registered here is taken out again."""

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from label_fixture import FRAME, group_of
from torch import nn

from openpilot.selfdrive.modeld.fair.frames import pack_rgb
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import StudentSpec
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.sizes import SIZES, Size, register as register_size
from openpilot.tools.fair.students.student import HEADS, Head, build, register_head
from openpilot.tools.fair.tasks import TASKS, Task, register
from openpilot.tools.fair.teacher import Label
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import UserError

N = 6
CLASSES = """
name: farm
classes:
- {name: field, role: ground, aliases: [meadow]}
- {name: sheep, role: movable, boxes: true, weight: 3.0}
ignored: [sky]
"""


class WetnessHead(nn.Module):
  """How wet the road is, a number a frame."""

  def __init__(self, channels: int):
    super().__init__()
    self.out = nn.Linear(channels, 1)

  def forward(self, maps):
    return {"wetness": self.out(maps[32].mean((2, 3)))}


def wetness_targets(said, a, r):
  return {"wetness": np.array([[np.nan if x is None else float(x[0])] for x in said.values], np.float32)}


def wetness_loss(model, out, batch):
  if "wetness" not in batch:
    return {}
  known = torch.isfinite(batch["wetness"])
  return {"l1": ((out["wetness"] - batch["wetness"].nan_to_num(0.0)).abs() * known).sum() / known.sum().clamp(min=1)}


WETNESS = Task(
  name="wetness",
  head="wetness",
  wanted="a teacher of wetness: your own",
  teaches=lambda label, classes: label.name == "wetness",
  targets=wetness_targets,
  loss=wetness_loss,
  fills={"wetness": np.nan},
  outputs=("wetness",),
  decode={"wetness": {"head": "wetness", "parameters": {}}},
)


@pytest.fixture
def registered() -> Iterator[None]:
  register_size("pico", Size("mobilenetv4_conv_small_050", 24, 16, 8, 16, 24, 32, 8, 16))
  register_head("wetness", Head(lambda spec, size: WetnessHead(size.neck), budget=2_000_000))
  register(WETNESS)
  yield
  del SIZES["pico"], HEADS["wetness"], TASKS["wetness"]


def write(root):
  """A store by somebody's teacher: maps and boxes by names of their own, and how wet it is."""
  store = LabelStore(root, create=True)
  labels = [
    Label("maps", "dense", "uint8", (64, 128), "class", ("sky", "meadow", "sheep")),
    Label("boxes", "boxes", unit="px", classes=("sheep",)),
    Label("wetness", "dense", "float32", (1,)),
  ]
  ids = np.repeat(np.array([0, 1, 2], np.uint8), [24, 24, 16])[:, None].repeat(128, 1)
  boxes = {k: np.full(N, v, np.float32) for k, v in zip(("x0", "y0", "x1", "y1"), (40, 60, 140, 160), strict=True)}
  boxes |= {"frame": np.arange(N), "score": np.ones(N, np.float32), "cls": np.zeros(N, np.int16)}
  for route in ("00000001--aaaaaaaaaa", "00000002--bbbbbbbbbb"):
    rgb = np.random.default_rng(0).integers(0, 256, (256, 512, 3), dtype=np.uint8)
    group_of(store, f"{route}--0", "frames", FRAME, N, "").write_chunk(0, {"frame": np.stack([pack_rgb(rgb)] * N)})
    wet = np.linspace(0, 1, N, dtype=np.float32)[:, None]
    said = {"maps": np.stack([ids] * N), "boxes": boxes, "wetness": wet}
    group_of(store, f"{route}--0", "farmer", labels, N).write_chunk(0, said)


def learn(monkeypatch, tmp_path, student, out, *args):
  common = "--labels", tmp_path / "s", "--student", student, "--out", tmp_path / out, "--steps", 2, "--batch", 2
  words = *common, "--clip", 1, "--eval-every", 2, "--workers", 0, *args
  monkeypatch.setattr(sys, "argv", ["distill", *map(str, words)])
  distill.main()
  return load_checkpoint(tmp_path / out / "last.pt")


def test_a_class_set_a_size_a_head_and_a_task_train(tmp_path, monkeypatch, capsys, registered):
  write(tmp_path / "s")
  (tmp_path / "farm.yaml").write_text(CLASSES)
  state = learn(monkeypatch, tmp_path, "objects-pico", "run", "--classes", tmp_path / "farm.yaml")
  config = Config.from_dict(state["config"])
  assert config.tasks == ["objects", "segmentation"] and config.classes.maps == ("field", "sheep")
  assert "'sky' by farmer are left out" in capsys.readouterr().err and state["step"] == 2
  assert config.spec.size == "pico" and state["model"]["class_weights"].tolist() == [1, 3]
  before, after = build(config.spec).state_dict(), state["model"]
  assert all(f"student.{k}" in after and after[f"student.{k}"].shape == v.shape for k, v in before.items())

  state = learn(monkeypatch, tmp_path, "wetness-pico", "wet")
  assert state["config"]["tasks"] == ["wetness"]
  torch.manual_seed(0)
  fresh = build(StudentSpec("wetness", "pico")).state_dict()["wetness.out.weight"]
  assert not torch.equal(state["model"]["student.wetness.out.weight"], fresh)  # it has learned
  entry = export_onnx(build(StudentSpec("wetness", "pico")), tmp_path / "x.onnx", WETNESS.outputs)
  assert entry["outputs"] == [
    {"name": "wetness", "shape": [1, 1], "dtype": "float32", "head": "wetness", "parameters": {}}
  ]


def test_names_that_are_taken_are_refused(registered):
  with pytest.raises(UserError, match="a task 'wetness' already"):
    register(WETNESS)
  with pytest.raises(UserError, match="a head 'depth' already"):
    register_head("depth", HEADS["wetness"])
  with pytest.raises(UserError, match="a size 'pico' already"):
    register_size("pico", SIZES["nano"])
