"""Which channels go together, what they are worth, which are chosen; and that a student without them is what the whole
one is when they are silent."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from student_inputs import assert_close, randomise, some_inputs
from torch import nn

from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.optimize.pruning import (
  LEAST,
  ROUND,
  Group,
  Plan,
  apply,
  choose,
  count_positions,
  make_plan,
  silence,
  values,
)
from openpilot.tools.fair.spec import InputSpec, StudentSpec
from openpilot.tools.fair.students.list_students import macs
from openpilot.tools.fair.students.student import HEADS, Head, build, parameters, spec_of
from openpilot.tools.fair.students.widths import narrow, widths_of
from openpilot.tools.lib.errors import UserError

SMALL = InputSpec("model_frame", 64, 96)
TOWER = Group("depth.depth.0.1.0", 32, ("depth.depth.1",), ("depth.depth.0.1.0", "depth.depth.0.1.1"))


@pytest.fixture(scope="module")
def depth():
  torch.manual_seed(0)
  return randomise(build(spec_of("depth-nano", input=SMALL)))


def pruned_of(student, plan, kept):
  out = copy.deepcopy(student)
  apply(out, plan, kept)
  return out


def assert_the_same_as_silent(student, plan, kept):
  quiet, pruned = copy.deepcopy(student), pruned_of(student, plan, kept)
  silence(quiet, plan, kept)
  inputs = some_inputs(student)
  if "lanes_points" in inputs:
    picture = student.spec.input
    inputs["lanes_points"] *= torch.tensor([picture.width / 560, picture.height / 300])
  with torch.no_grad():
    got, want, before = pruned(**inputs), quiet(**inputs), student(**inputs)
  for name in want:
    assert_close(name, got[name].numpy(), want[name].numpy(), 1e-4)
  # something went that counted
  assert any(not torch.allclose(before[n], want[n], atol=1e-3) for n in want)
  return pruned


def test_a_layer_without_channels_is_the_layer_with_silent_ones_and_widths_build_it(depth):
  """By hand, without the package that finds groups."""
  keep = torch.tensor([0, 1, 2, 5, 7, 8, 9, 30])
  pruned = assert_the_same_as_silent(depth, Plan([TOWER]), {TOWER.name: keep})
  widths = widths_of(pruned, depth)
  assert widths == {"depth.depth.0.1.0": [0, 8], "depth.depth.0.1.1": [8, 8], "depth.depth.1": [8, 0]}
  cells = SMALL.height // 8 * (SMALL.width // 8)
  assert macs(depth) - macs(pruned) == cells * (56 * 24 + 24 * 4)  # of the tower, and of the four quarters
  assert parameters(depth) - parameters(pruned) == 56 * 24 + 2 * 24 + 24 * 4
  said = Config("depth-nano", ["depth"], input=SMALL, widths=widths)
  spec = StudentSpec.from_dict(
    Config.from_dict({**vars(said), "input": SMALL.to_dict(), "classes": None}).spec.to_dict()
  )
  assert spec.widths == widths
  again = build(spec).eval()
  again.load_state_dict(pruned.state_dict())
  frame = some_inputs(depth)["frame"]
  assert torch.equal(again(frame)["depth"], pruned(frame)["depth"])
  assert "widths" not in depth.spec.to_dict()


@pytest.mark.parametrize(
  ("widths", "match"),
  [
    ({"depth.nowhere": [8, 8]}, "'depth.nowhere' is no convolution and no norm of this student"),
    ({"depth": [8, 8]}, "'depth' is no convolution"),
    ({"depth.depth.1": [33, 0]}, r"depth.depth.1 cannot have \[33, 0\] inputs and outputs, it has up to \[32, 1\]"),
    ({"depth.depth.1": [-1, 0]}, "cannot have"),
    ({"depth.depth.1": [8]}, "cannot have"),
    ({"depth.depth.1": [True, 0]}, "cannot have"),
    ({"depth.depth.1": [8, 0]}, "widths do not fit each other"),
  ],
)
def test_widths_of_another_student_are_refused(widths, match):
  with pytest.raises(UserError, match=match):
    build(replace(spec_of("depth-nano", input=SMALL), widths=widths))


def test_depthwise_and_turned_layers_are_cut_on_both_sides():
  layers = nn.ModuleDict(
    {"deep": nn.Conv2d(6, 6, 3, groups=6), "back": nn.ConvTranspose2d(6, 4, 2, 2), "norm": nn.BatchNorm2d(6)}
  )
  whole = copy.deepcopy(layers)
  said = {"deep": [3, 3], "back": [3, 2], "norm": [3, 3]}
  narrow(layers, said)
  x = torch.randn(1, 3, 5, 5)
  with torch.no_grad():
    got = layers["back"](layers["norm"](layers["deep"](x)))
    wide = whole["norm"](whole["deep"](torch.cat([x, torch.zeros_like(x)], 1)))
    wide[:, 3:] = 0
    norm = (layers["deep"](x) - layers["deep"](x).mean((0, 2, 3), keepdim=True)).shape
  assert got.shape == (1, 2, 6, 6) and norm == (1, 3, 3, 3)
  with torch.no_grad():
    assert torch.allclose(got, whole["back"](wide)[:, :2], atol=1e-6)
  assert widths_of(layers, whole) == said


def test_what_a_channel_is_worth_is_the_loss_without_it_to_first_order(depth):
  """The norm's output times a gate: the gradient at 1 is minus the change."""
  frame = some_inputs(depth, b=2)["frame"]
  student = copy.deepcopy(depth)
  gate = torch.ones(32, requires_grad=True)
  hook = student.get_submodule("depth.depth.0.1.1").register_forward_hook(
    lambda m, args, out: out * gate.view(1, -1, 1, 1)
  )
  want = torch.zeros(32)
  for k in range(2):
    (slope,) = torch.autograd.grad(student(frame[k : k + 1])["depth"].square().mean(), gate)
    want += slope**2
  hook.remove()
  found = values(student, [TOWER], (student(frame[k : k + 1])["depth"].square().mean() for k in range(2)))
  assert found[TOWER.name].shape == (32,) and torch.allclose(found[TOWER.name], want, rtol=1e-3, atol=1e-9)
  assert all(p.grad is None for p in student.parameters())


def two_layers():
  """16 channels that cost 100 multiply-adds each, behind them 24 that cost 900 with all of the first."""
  net: nn.Module = nn.ModuleDict({"a": nn.Conv2d(4, 16, 1), "b": nn.Conv2d(16, 24, 1), "c": nn.Conv2d(24, 2, 1)})
  return net, Plan([Group("a", 16, ("b",), ("a",)), Group("b", 24, ("c",), ("b",))], {}, {"a": 25, "b": 50, "c": 50})


def test_what_goes_is_what_costs_least_for_what_it_saves():
  net, plan = two_layers()
  whole = {"a": torch.arange(16), "b": torch.arange(24)}
  worth = {"a": torch.arange(16.0), "b": torch.full((24,), 3.0)}
  # eight of a: worth 28, saves 8 * (100 + 1200); eight of b: 24, saves 8 * (800 + 100); a's are the better bargain
  kept, saved = choose(net, plan, whole, worth, 1)
  # only one multiply-add is asked for: what it costs is all that counts
  assert len(kept["b"]) == 16 and len(kept["a"]) == 16 and saved == 8 * 900
  kept, saved = choose(net, plan, whole, worth, 10400)
  assert kept["a"].tolist() == list(range(8, 16)) and len(kept["b"]) == 24 and saved == 10400
  kept, saved = choose(net, plan, whole, worth, 10**9)  # until a quarter, or eight, is left
  assert len(kept["a"]) == len(kept["b"]) == 8 and saved == 16 * (100 + 1200) + 24 * 100 - 8 * (100 + 400) - 8 * 100
  again, more = choose(net, plan, kept, {k: torch.ones(8) for k in kept}, 1)  # nothing is left to go
  assert more == 0 and all(torch.equal(again[k], kept[k]) for k in kept)


@pytest.mark.parametrize("backbone", [None, pytest.param("mobilenetv2_100_same", marks=pytest.mark.slow)])
def test_all_heads_are_pruned_together_and_contracts_are_kept(backbone, rng):
  pytest.importorskip("torch_pruning", reason="the package that finds groups")
  torch.manual_seed(0)
  student = randomise(build(spec_of("unified-nano", input=SMALL, backbone=backbone)))
  plan = make_plan(student)
  of = {n: g for g in plan.groups for n in g.outputs}
  neck = of["neck.smooth.8.0"]
  assert {"depth.depth.0.0.0", "objects.tower.0.0.0", "detector.detail.0"} <= set(neck.outputs)
  assert {"lanes.context", "lanes.coarse", "detector.project16.0"} <= set(neck.inputs)
  fixed = plan.left["outputs, state or tokens"]
  assert (
    {"depth.depth.1", "objects.heat", "objects.proto", "objects.segmentation"} <= set(fixed) == set(student.fixed())
  )
  assert set(of["objects.tower.1.1.0"].inputs) == {f"objects.{n}" for n in student.objects.fixed}
  worth = {g.name: torch.from_numpy(rng.uniform(size=g.channels).astype(np.float32)) for g in plan.groups}
  whole = {g.name: torch.arange(g.channels) for g in plan.groups}
  wanted = int(0.4 * sum(macs_by_hand(student).values()))
  kept, saved = choose(student, plan, whole, worth, wanted)
  pruned = assert_the_same_as_silent(student, plan, kept)
  assert saved >= wanted and macs(student) - macs(pruned) == saved
  for g in plan.groups:
    n = len(kept[g.name])
    assert n == g.channels or (n % ROUND == 0 and n >= LEAST * g.channels)
  assert [x.shape for x in pruned.inputs().values()] == [x.shape for x in student.inputs().values()]


def macs_by_hand(student):
  """Of convolutions."""
  positions = count_positions(student)
  return {n: k * student.get_submodule(n).weight[:, :, 0, 0].numel() for n, k in positions.items()}


def test_a_head_that_says_nothing_of_its_layers_stays_whole(depth, monkeypatch):
  monkeypatch.delattr(type(depth.depth), "fixed")
  assert {"depth.depth.0.0.0", "depth.depth.0.1.0", "depth.depth.1"} <= set(depth.fixed())


class Pooled(nn.Module):
  """A head from outside: its only layer is no convolution, and it reads the coarsest map alone."""

  def __init__(self, neck):
    super().__init__()
    self.out = nn.Linear(neck, 1)

  def forward(self, maps):
    return {"pooled": self.out(maps[32].mean((2, 3)))}


def test_what_a_head_from_outside_reads_stays_and_what_nobody_reads_goes_with_the_rest(monkeypatch):
  pytest.importorskip("torch_pruning", reason="the package that finds groups")
  monkeypatch.setitem(HEADS, "pooled", Head(lambda spec, size: Pooled(size.neck)))
  student = randomise(build(spec_of("pooled-nano", input=SMALL)))
  plan = make_plan(student)
  assert "neck.smooth.32.0" in plan.left["read or made by what is no convolution"]
  assert any("neck.lateral.8.0" in g.inputs for g in plan.groups)  # nobody reads it, but it reads the backbone
  whole = {g.name: torch.arange(g.channels) for g in plan.groups}
  kept, _ = choose(student, plan, whole, {g.name: torch.ones(g.channels) for g in plan.groups}, macs(student))
  assert_the_same_as_silent(student, plan, kept)


def test_without_the_package_it_is_said(depth, monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "torch_pruning", None)
  with pytest.raises(UserError, match="pruning needs the package torch-pruning"):
    make_plan(depth)
