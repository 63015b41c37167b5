"""Which channels of a student go: groups of channels that only go together, what each is worth to the losses, and a
choice that reaches a number of multiply-adds."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from openpilot.tools.fair.students.student import Student
from openpilot.tools.fair.students.widths import BatchNorm, cut, depthwise, sides
from openpilot.tools.lib.errors import UserError

ROUND = 8  # channels that go at once: what is left is a multiple of it, as processors' vectors are
LEAST = 0.25  # of a group stays
CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)


@dataclass(frozen=True)
class Group:
  """Channels that go together, named by a layer that makes them. inputs, outputs: layers that have them on that side,
  channel for channel."""

  name: str
  channels: int
  inputs: tuple[str, ...]
  outputs: tuple[str, ...]


@dataclass
class Plan:
  """groups: that may lose channels. left: reason -> names of those that may not. positions: of a layer, how often one
  of its kernels is applied to a frame."""

  groups: list[Group]
  left: dict[str, list[str]] = field(default_factory=dict)
  positions: dict[str, int] = field(default_factory=dict)


Kept = dict[str, Tensor]  # name of a group -> its channels that stay, ascending


def count_positions(student: Student) -> dict[str, int]:
  found: dict[str, int] = {}

  def hook(name: str) -> Callable[..., None]:
    def count(m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
      seen = args[0] if isinstance(m, nn.ConvTranspose2d) else out
      assert isinstance(m, CONVOLUTIONS)
      found[name] = seen.shape[-2] * seen.shape[-1] * m.kernel_size[0] * m.kernel_size[1]

    return count

  hooks = [m.register_forward_hook(hook(n)) for n, m in student.named_modules() if isinstance(m, CONVOLUTIONS)]
  with torch.no_grad():
    student.apart(student.inputs()["frame"])
  for h in hooks:
    h.remove()
  return found


def make_plan(student: Student) -> Plan:
  """By torch-pruning's graph of what depends on what. Raises UserError where the package is not there."""
  try:
    import torch_pruning
  except ImportError as e:
    raise UserError(f"pruning needs the package torch-pruning ({e}): pip install -e '.[train]'") from None
  student = copy.deepcopy(student).eval()
  for p in student.parameters():
    p.requires_grad_(True)  # the graph is read off the gradients' one
  plan, names = Plan([], {}, count_positions(student)), {m: n for n, m in student.named_modules()}
  graph = torch_pruning.DependencyGraph()
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of parameters beside the layers: see below
    graph.build_dependency(
      student, example_inputs=student.inputs()["frame"], forward_fn=lambda model, frame: model.apart(frame, every=True)
    )
  fixed, seen = set(student.fixed()), set[str]()
  for name in plan.positions:
    layer = student.get_submodule(name)
    if name in seen or depthwise(layer):
      continue
    channels = sides(layer)[1]
    if layer not in graph.module2node:
      plan.left.setdefault("read by no output", []).append(name)
      continue
    if name in fixed:
      plan.left.setdefault("outputs, state or tokens", []).append(name)
      continue
    group = graph.get_pruning_group(layer, torch_pruning.prune_conv_out_channels, idxs=list(range(channels)))
    made: dict[bool, list[str]] = {False: [], True: []}  # by whether it is an output
    why = ""
    for dependency, channel in group:
      target, out = dependency.target.module, graph.is_out_channel_pruning_fn(dependency.handler)
      if target not in names:  # an operation without weights; or a parameter of none of the layers
        why = why or ("a parameter beside the layers" if isinstance(target, nn.Parameter) else "")
        continue
      if not isinstance(target, (*CONVOLUTIONS, BatchNorm)):
        why = why or "read or made by what is no convolution"
      elif list(channel) != list(range(channels)):
        why = why or "joined, split or turned channels"
      made[out].append(names[target])
    outputs, inputs = (tuple(dict.fromkeys(made[side])) for side in (True, False))
    seen.update(outputs)
    if fixed & set(outputs):
      why = "outputs, state or tokens"
    elif not any(isinstance(student.get_submodule(n), BatchNorm) for n in outputs):
      why = why or "no norm to tell what they are worth"
    elif channels <= ROUND:
      why = why or f"{ROUND} channels or fewer"
    if why:
      plan.left.setdefault(why, []).append(name)
    else:
      plan.groups.append(Group(name, channels, inputs, outputs))
  return plan


def apply(student: Student, plan: Plan, kept: Mapping[str, Tensor]) -> None:
  """Leaves only these channels, in place."""
  layers: dict[str, list[Tensor | None]] = {}
  for g in plan.groups:
    if len(kept[g.name]) < g.channels:
      for side, names in enumerate((g.inputs, g.outputs)):
        for name in names:
          layers.setdefault(name, [None, None])[side] = kept[g.name]
  for name, (inputs, outputs) in layers.items():
    cut(student.get_submodule(name), inputs, outputs)


def silence(student: Student, plan: Plan, kept: Mapping[str, Tensor]) -> None:
  """The same without new shapes, in place: channels that do not stay are 0 wherever they come out of a norm or a
  convolution. Both compute the same."""
  with torch.no_grad():
    for g in plan.groups:
      gone = torch.ones(g.channels, dtype=torch.bool)
      gone[kept[g.name]] = False
      for name in g.outputs:
        layer = student.get_submodule(name)
        for p in layer.parameters(recurse=False):
          (p.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) and p.dim() > 1 else p)[gone] = 0


def macs_of(layer: nn.Module, positions: int, inputs: int, outputs: int) -> int:
  assert isinstance(layer, CONVOLUTIONS)
  return positions * (outputs if depthwise(layer) else inputs * outputs // layer.groups)


def values(
  student: Student, groups: Sequence[Group], losses: Iterable[Tensor], kept: Kept | None = None
) -> dict[str, Tensor]:
  """What each channel that the student has (`kept`, by default all) is worth, float32: the square of how much a loss
  would change, to first order, were the channel 0 where it comes out of a norm; the sum over `losses`, each of which is
  asked for and forgotten in turn (Molchanov and others, arXiv:1906.10771, at the norms)."""
  out = {g.name: torch.zeros(g.channels if kept is None else len(kept[g.name])) for g in groups}
  for loss in losses:
    student.zero_grad()
    loss.backward()
    for g in groups:
      change = torch.zeros_like(out[g.name])
      for name in g.outputs:
        norm = student.get_submodule(name)
        if isinstance(norm, BatchNorm) and norm.weight.grad is not None and norm.bias.grad is not None:
          change = change + norm.weight.detach() * norm.weight.grad + norm.bias.detach() * norm.bias.grad
      out[g.name] += change.detach() ** 2
  student.zero_grad()
  return out


def choose(student: Student, plan: Plan, kept: Kept, worth: Mapping[str, Tensor], remove: int) -> tuple[Kept, int]:
  """Takes ROUND channels at a time out of the group where that costs the losses least for the multiply-adds that it
  saves, until `remove` are saved, or nothing more may go.

  student: the whole one. kept: what stays so far; worth: of each of these channels. -> what stays now, and how many
  multiply-adds were saved."""
  kept, saved = dict(kept), 0
  # the least worth first; all of a group were measured at once
  order = {g.name: kept[g.name][torch.argsort(worth[g.name], stable=True)] for g in plan.groups}
  cost = {g.name: torch.sort(worth[g.name], stable=True).values for g in plan.groups}
  taken = {g.name: 0 for g in plan.groups}
  width = {n: list(sides(student.get_submodule(n))) for n in plan.positions}
  touched: dict[str, list[tuple[str, int]]] = {g.name: [] for g in plan.groups}
  for g in plan.groups:
    for side, names in enumerate((g.inputs, g.outputs)):
      for n in names:
        if n in width:
          width[n][side] = len(kept[g.name])
          touched[g.name].append((n, side))
          if depthwise(student.get_submodule(n)):
            width[n] = [len(kept[g.name])] * 2

  def macs(name: str) -> int:
    return sum(
      macs_of(student.get_submodule(n), plan.positions[n], *width[n])
      for n in dict.fromkeys(n for n, _ in touched[name])
    )

  def narrower(name: str, by: int) -> None:
    for n, side in touched[name]:
      both = depthwise(student.get_submodule(n))
      for s in (0, 1) if both else (side,):
        width[n][s] -= by

  while saved < remove:
    best: tuple[float, str, int, int] | None = None
    for g in plan.groups:
      left = len(order[g.name]) - taken[g.name]
      step = left % ROUND or ROUND
      if left - step < max(ROUND, LEAST * g.channels):
        continue
      before = macs(g.name)
      narrower(g.name, step)
      gain = before - macs(g.name)
      narrower(g.name, -step)
      at = taken[g.name]
      price = float(cost[g.name][at : at + step].sum()) / min(gain, remove - saved)
      if best is None or price < best[0]:
        best = price, g.name, step, gain
    if best is None:
      break
    _, name, step, gain = best
    narrower(name, step)
    taken[name] += step
    saved += gain
  for g in plan.groups:
    kept[g.name] = torch.sort(order[g.name][taken[g.name] :]).values
  return kept, saved
