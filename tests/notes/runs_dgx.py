"""dgx_training.md: its functions beside ours, on small networks."""

from types import SimpleNamespace

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from note_blocks import Block, runs, same_call
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from openpilot.tools.dgx.training.constants import OUTPUT_SIZE
from openpilot.tools.dgx.training.dora import DoRALayer, apply_dora
from openpilot.tools.dgx.training.export import export_to_onnx, merge_dora_weights
from openpilot.tools.dgx.training.losses import compute_loss, laplacian_nll_loss
from openpilot.tools.dgx.training.reference import ReferenceDriving
from openpilot.tools.dgx.training.teacher import TensorRTEngine
from openpilot.tools.dgx.training.train import train_epoch

NOTE = "dgx_training.md"


class Ready(nn.Module):
  """A Module whose subclasses need not call its constructor, as the note's does not."""

  def __new__(cls, *args, **kwargs):
    self = super().__new__(cls)
    nn.Module.__init__(self)
    return self


COMMON = {
  "torch": torch,
  "F": F,
  "nn": SimpleNamespace(Module=Ready, Parameter=nn.Parameter),
  "in_features": 6,
  "out_features": 5,
}


def save_engine(path: str, inputs: dict[str, tuple[int, ...]], out: int) -> None:
  """One dense layer over the means of images and the vectors: any number of examples."""
  r = np.random.default_rng(0)
  nodes, parts, width = [], [], 0
  for name, shape in inputs.items():
    if len(shape) == 3:
      nodes.append(helper.make_node("GlobalAveragePool", [name], [f"{name}_mean"]))
    nodes.append(helper.make_node("Flatten", [f"{name}_mean" if len(shape) == 3 else name], [f"{name}_flat"]))
    parts.append(f"{name}_flat")
    width += shape[0]
  nodes.append(helper.make_node("Concat", parts, ["all"], axis=1))
  nodes.append(helper.make_node("MatMul", ["all", "weight"], ["out"]))
  graph = helper.make_graph(
    nodes,
    "engine",
    [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", *s]) for n, s in inputs.items()],
    [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", out])],
    [numpy_helper.from_array(r.normal(size=(width, out)).astype(np.float32), "weight")],
  )
  onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), path)


@runs(NOTE, 1)
def engines(block: Block) -> None:
  save_engine("driving_vision.onnx", {"frames": (12, 128, 256)}, 512)
  save_engine("driving_policy.onnx", {"features": (512,), "desire": (8,)}, 33 * 2)
  frames, desire = torch.rand(3, 12, 128, 256), torch.eye(8)[:3]
  names = block.run(TensorRTEngine=TensorRTEngine, frames=frames, desire=desire)
  assert names["features"].shape == (3, 512) and names["targets"].reshape(3, 33, 2).isfinite().all()
  w = numpy_helper.to_array(onnx.load("driving_vision.onnx").graph.initializer[0])
  np.testing.assert_allclose(names["features"], frames.mean((2, 3)).numpy() @ w, rtol=1e-3, atol=1e-3)


def twins(theirs: type[nn.Module]) -> tuple[nn.Module, DoRALayer]:
  """The note's layer and ours, of the same base and the same adapter."""
  base = nn.Linear(6, 5, bias=False)
  note, ours = theirs(base, rank=2), DoRALayer(nn.Linear(6, 5, bias=False), rank=2)
  adapter = ours.adapter()
  assert adapter is not None
  with torch.no_grad():
    note.lora_A.normal_(std=0.3)
    note.lora_B.normal_(std=0.3)
    note.magnitude.mul_(1.3)
    ours.base_weight().copy_(base.weight)
    for p, q in ((adapter.a, note.lora_A), (adapter.b, note.lora_B), (adapter.m, note.magnitude)):
      assert p.shape == q.shape
      p.copy_(q)
  return note, ours


@runs(NOTE, 2)
def dora_layer(block: Block) -> None:
  theirs = block.run(**COMMON)["DoRALayer"]
  same_call(DoRALayer.__init__, theirs.__init__)
  note, ours = twins(theirs)
  x = torch.randn(4, 6)
  torch.testing.assert_close(ours(x), note(x))


@runs(NOTE, 3)
def winner_takes_all(block: Block) -> None:
  theirs = block.run(**COMMON)["laplacian_nll_loss"]
  same_call(laplacian_nll_loss, theirs)
  mean, std = torch.randn(2, 4, 33, 2, requires_grad=True), torch.rand(2, 4, 33, 2) + 0.1
  target = torch.randn(2, 33, 2)
  ours, grads = laplacian_nll_loss(mean, std, target), []
  for loss in (ours, theirs(mean, std, target)):
    torch.testing.assert_close(loss, ours)
    grads += torch.autograd.grad(loss, mean)
  torch.testing.assert_close(*grads)
  assert (grads[0].flatten(2).abs().sum(2) > 0).sum().item() == 2  # one hypothesis of each example


class Stepwise(nn.Module):
  """A student of one moment, its memory handed on: a driving network's vector, and what it remembers."""

  def __init__(self):
    super().__init__()
    self.see, self.head = nn.Linear(12 + 8 + 2, 16), nn.Linear(16, OUTPUT_SIZE)

  def forward(self, frames, desire, traffic, hidden):
    x = self.see(torch.cat([frames.mean((2, 3)), desire, traffic], 1))
    hidden = torch.tanh(x if hidden is None else x + hidden)
    return self.head(hidden), hidden


@runs(NOTE, 4)
def epoch(block: Block) -> None:
  theirs = block.run(torch=torch, compute_loss=compute_loss)["train_epoch"]
  same_call(train_epoch, theirs)
  student = Stepwise()
  apply_dora(student, 2)
  learned = {n: p for n, p in student.named_parameters() if p.requires_grad}
  before = {n: p.detach().clone() for n, p in student.named_parameters()}
  wanted = torch.randn(2, 3, OUTPUT_SIZE)
  teacher = SimpleNamespace(vision=lambda frames: frames.mean((3, 4)), policy=lambda features, desire, traffic: wanted)
  batch = {"frames": torch.rand(2, 3, 12, 8, 16), "desire": torch.rand(2, 3, 8), "traffic": torch.rand(2, 2)}
  optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)

  def loss() -> float:
    with torch.no_grad():
      return float(
        compute_loss(student(batch["frames"][:, 0], batch["desire"][:, 0], batch["traffic"], None)[0], wanted[:, 0])
      )

  first = loss()
  theirs(student, teacher, [batch] * 3, optimizer, torch.device("cpu"))
  assert loss() < first
  assert {n for n, p in student.named_parameters() if not torch.equal(p, before[n])} == set(learned)


@runs(NOTE, 5)
def merge_and_export(block: Block) -> None:
  class Layer(nn.Module):
    def __init__(self, base: nn.Linear, rank: int):
      super().__init__()
      self.base_weight, self.magnitude = base.weight, nn.Parameter(base.weight.detach().norm(dim=1))
      self.lora_A, self.lora_B = nn.Parameter(torch.zeros(rank, 6)), nn.Parameter(torch.zeros(5, rank))

  names = block.run(torch=torch, DoRALayer=Layer)
  same_call(merge_dora_weights, names["merge_dora_weights"])
  same_call(export_to_onnx, names["export_to_onnx"])
  note, ours = twins(Layer)
  model = nn.Sequential(ours)
  with torch.no_grad():
    assert names["merge_dora_weights"](nn.Sequential(note)) is None and merge_dora_weights(model) is None
  assert type(model[0]) is nn.Linear
  torch.testing.assert_close(model[0].weight, note.base_weight)
  export_to_onnx(ReferenceDriving(), "driving.onnx")
  graph = onnx.load("driving.onnx")
  shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.graph.input}
  assert shapes["img"] == shapes["big_img"] == [1, 12, 128, 256] and shapes["traffic_convention"] == [1, 2]
  assert shapes["desire_pulse"][-1] == 8 and graph.opset_import[0].version == 14
