"""Whole models with DoRA: what is adapted, merging, several adapters, quantization-aware training, and files in both
directions with PEFT."""

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from dora_fixture import CLOSE, needs_peft, peft, relative, stir
from safetensors.torch import load_file, save_file
from torch import nn

from openpilot.tools.learn.adapters.apply import (
  adapter_parameters,
  apply_dora,
  check_rank,
  clipped,
  merge,
  set_adapter,
  unload,
  unmerge,
)
from openpilot.tools.learn.adapters.files import base_hash, load_adapter, save_adapter
from openpilot.tools.learn.adapters.layers import DoRALinear, dora_layers
from openpilot.tools.lib.errors import UserError


class Net(nn.Module):
  def __init__(self):
    super().__init__()
    self.vision = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 24))
    self.gru = nn.GRU(24, 24, batch_first=True)
    self.policy = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 8))
    self.head = nn.Conv2d(16, 4, 1)

  def forward(self, x):
    f = self.vision(x)
    return self.policy(self.gru(f[:, None])[0][:, 0]), self.head(self.vision[0](x))


class PeftNet(nn.Module):
  """What PEFT can adapt too."""

  def __init__(self):
    super().__init__()
    self.conv = nn.Conv2d(3, 6, 3, 2, 1)
    self.blocks = nn.ModuleList([nn.Linear(96, 40), nn.Linear(40, 40), nn.Linear(40, 5)])

  def forward(self, x):
    x = F.relu(self.conv(x)).flatten(1)
    for b in self.blocks:
      x = torch.tanh(b(x))
    return x


def test_default_targets_clipping_and_freezing():
  net = Net()
  assert apply_dora(net, 16) == ["gru", "policy.0", "policy.2"]
  ranks = {n: layer.adapters["default"][layer.names[0]].b.shape[1] for n, layer in dora_layers(net).items()}
  assert ranks == {"gru": 16, "policy.0": 16, "policy.2": 8}
  assert {id(p) for p in net.parameters() if p.requires_grad} == {id(p) for p in adapter_parameters(net)}


def test_bad_input():
  with pytest.raises(UserError, match=r"rank 16 is larger than policy.2, which takes at most 8"):
    apply_dora(Net(), 16, clip_rank=False)
  net = Net()
  with pytest.raises(UserError, match="nothing to adapt under no_such"):
    apply_dora(net, 4, targets=["policy.0", "no_such"])
  assert not dora_layers(net) and all(q.requires_grad for q in net.parameters())  # refused before anything changed
  with pytest.raises(UserError, match="a rank is at least 1"):
    apply_dora(net, 0)
  apply_dora(net, 4)
  with pytest.raises(UserError, match="not in use"):
    apply_dora(net, 4)
  with pytest.raises(UserError, match="no adapter 'b'"):
    set_adapter(net, "b")
  merge(net)
  with pytest.raises(UserError, match="unmerge"):
    set_adapter(net, None)


def test_ranks_that_make_no_sense_are_refused_and_clipped_ones_said():
  net = nn.Sequential(nn.Linear(24, 24), nn.Conv2d(24, 40, 3, groups=2))
  size, every = sum(p.numel() for p in net.parameters()), ["0", "1"]
  counts = {r: trained(net, r, every) for r in range(1, 25)}
  best = max(r for r, n in counts.items() if n < size)
  assert best < 20  # the largest that the convolution takes: A, B and m outweigh the network before
  check_rank(net, best, every)
  with pytest.raises(
    UserError,
    match=rf"rank {best + 1} is too large: {counts[best + 1]:,} parameters .* {size:,} of the base; .* sensible rank "
    rf"is {best}$",
  ):
    check_rank(net, best + 1, every)
  net = Net()
  with pytest.raises(
    UserError, match="rank 9 is too large: no layer to adapt takes more than 8; the largest sensible rank is 8"
  ):
    check_rank(net, 9, ["policy.2"])
  with pytest.raises(UserError, match="largest sensible rank is 4"):
    check_rank(net, 100000, ["head"])
  with pytest.raises(UserError, match="nothing to adapt"):
    check_rank(net, 4, ["nowhere"])
  with pytest.raises(UserError, match="every rank is: train all parameters"):
    check_rank(nn.Sequential(nn.Linear(2, 2)), 1)
  assert not dora_layers(net) and all(q.requires_grad for q in net.parameters())  # a look changes nothing
  apply_dora(net, 8)
  assert clipped(net, 8) == ""
  net = Net()
  apply_dora(net, 30, targets=["gru", "policy.*", "head"])
  assert clipped(net, 30) == "rank clipped on 4 of 4 layers, to 4..24: gru, policy.0, policy.2, head"


def trained(net: nn.Module, rank: int, targets: list[str]) -> int:
  net = copy.deepcopy(net)
  apply_dora(net, rank, targets=targets)
  return sum(p.numel() for p in adapter_parameters(net))


def test_a_layer_under_two_names_is_adapted_once():
  class Tied(nn.Module):
    def __init__(self):
      super().__init__()
      self.a = nn.Linear(4, 4)
      self.b = self.a
      self.c = nn.Linear(4, 4)
      self.c.weight = self.a.weight

  net = Tied()
  h, c = base_hash(net), net.c.weight.clone()
  assert apply_dora(net, 2, targets=["a"]) == ["a"] and net.a is net.b and isinstance(net.b, DoRALinear)
  stir(net)
  merge(net)
  assert torch.equal(net.c.weight, c) and base_hash(net) == h  # a layer that shared the weight keeps its own
  unmerge(net)
  assert net.a.base_layer.weight is net.c.weight


def test_merge_unmerge_and_several_adapters():
  net, x = Net().eval(), torch.randn(2, 3, 8, 8)
  with torch.no_grad():
    base = net(x)[0]
    before = {n: p.clone() for n, p in net.state_dict().items()}
    h = base_hash(net)
    results = {}
    for name in ("town", "rain"):
      apply_dora(net, 4, 8, name=name)
      stir(net)
      results[name] = net(x)[0]
    assert relative(results["town"], results["rain"]) > 1e-2
    for name, want in (("town", results["town"]), (None, base), ("rain", results["rain"])):
      set_adapter(net, name)
      assert torch.equal(net(x)[0], want)
      merge(net)
      assert base_hash(net) == h
      assert relative(net(x)[0], want) < CLOSE
      unmerge(net)
      assert torch.equal(net(x)[0], want)
    unload(net)
    assert not dora_layers(net) and net.state_dict().keys() == before.keys()
    assert relative(net(x)[0], results["rain"]) < CLOSE
    assert base_hash(net) != h


def test_merged_exports_to_onnx(tmp_path):
  """The file of an adapted network has the operators and shapes of the base's, and computes what the network did before
  merging."""
  x, files = torch.randn(1, 3, 8, 8), []
  net = Net().eval()
  for name in ("base", "adapted"):
    if name == "adapted":
      apply_dora(net, 4, targets=["gru", "policy.*", "head"])
      stir(net)
      with torch.no_grad():
        want = net(x)
      unload(net)
    files.append(tmp_path / f"{name}.onnx")
    torch.onnx.export(net, (x,), files[-1], opset_version=14, dynamo=False, input_names=["x"])
  ops = [[(n.op_type, len(n.input)) for n in onnx.load(f).graph.node] for f in files]
  assert ops[0] == ops[1] and ("GRU", 6) in ops[1]
  got = onnxruntime.InferenceSession(files[1], providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b.numpy(), atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(
  "make, shape",
  [
    (lambda: nn.Linear(12, 10), (4, 12)),
    (lambda: nn.Conv2d(4, 10, 3), (2, 4, 6, 6)),
    (lambda: nn.GRU(12, 10), (5, 2, 12)),
  ],
)
def test_quantization_aware_training(make, shape):
  """With a fake-quantized weight the forward pass is exactly that of the exported, quantized layer; gradients reach A,
  B and m."""
  net = nn.ModuleDict({"l": make()})
  apply_dora(net, 4, targets=["l"])
  stir(net)
  layer = net["l"]

  def quantize(w):
    return torch.fake_quantize_per_channel_affine(
      w, w.detach().flatten(1).abs().amax(1) / 127, torch.zeros(len(w), dtype=torch.int32), 0, -127, 127
    )

  x = torch.randn(shape)
  with torch.no_grad():
    plain = layer(x)
  layer.fake_quant = quantize
  y = layer(x)
  first = y[0] if isinstance(y, tuple) else y
  first.square().sum().backward()
  assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in adapter_parameters(net))
  unload(net)
  with torch.no_grad():
    for n in layer.names:
      getattr(net["l"], n).copy_(quantize(getattr(net["l"], n)))
    want = net["l"](x)
  want = want[0] if isinstance(want, tuple) else want
  assert relative(first, want) < CLOSE
  assert 1e-4 < relative(first, plain[0] if isinstance(plain, tuple) else plain) < 0.1


def test_adapter_file(tmp_path):
  net, x = Net().eval(), torch.randn(2, 3, 8, 8)
  fresh = Net().eval()
  fresh.load_state_dict(net.state_dict())
  h = base_hash(net)
  names = apply_dora(net, 16, 8, targets=["gru", "policy.*", "head"], dropout=0.1)
  stir(net)
  save_adapter(net, tmp_path / "a", h)
  with safe_open(tmp_path / "a/adapter_model.safetensors", "pt") as f:
    assert f.metadata()["base_hash"] == h
    assert sum(f.get_tensor(k).numel() for k in f.keys()) == sum(p.numel() for p in adapter_parameters(net))
  assert sorted(load_adapter(fresh, tmp_path / "a", base_hash(fresh))) == sorted(names)
  with torch.no_grad():
    for a, b in zip(fresh(x), net(x), strict=True):
      assert torch.equal(a, b)
  assert fresh.policy[0].adapters["default"]["weight"].dropout == 0.1
  load_adapter(fresh, tmp_path / "a", h, name="second")
  assert sorted(fresh.gru.adapters) == ["default", "second"] and fresh.gru.active == "second"
  other = Net()
  with pytest.raises(UserError, match="trained on another base"):
    load_adapter(other, tmp_path / "a", base_hash(other))
  assert not dora_layers(other) and all(q.requires_grad for q in other.parameters())


def test_damaged_adapters_are_refused(tmp_path):
  net = PeftNet()
  h = base_hash(net)
  apply_dora(net, 4, targets=["conv", "blocks.*"])
  folder = tmp_path / "a"
  save_adapter(net, folder, h)
  config, tensors = folder / "adapter_config.json", folder / "adapter_model.safetensors"
  good = config.read_text(), tensors.read_bytes()
  for change, message in (
    ({"use_dora": False}, "only DoRA"),
    ({"lora_bias": True}, "lora_bias"),
    ({"peft_type": "IA3"}, "only DoRA"),
  ):
    config.write_text(json.dumps({**json.loads(good[0]), **change}))
    with pytest.raises(UserError, match=message):
      load_adapter(PeftNet(), folder, h)
  config.write_text(good[0])
  save_file({**load_file(tensors), "base_model.model.conv.lora_magnitude_vector": torch.full((6,), torch.nan)}, tensors)
  with pytest.raises(UserError, match="not finite"):
    load_adapter(PeftNet(), folder, h)
  save_file({k: v for k, v in load_file(tensors).items() if not k.endswith("conv.lora_magnitude_vector")}, tensors)
  with pytest.raises(UserError, match="lacks lora_magnitude_vector"):
    load_adapter(PeftNet(), folder, h)
  config.write_text("{")
  with pytest.raises(UserError, match="cannot be read"):
    load_adapter(PeftNet(), folder, h)
  config.write_text(good[0])
  tensors.write_bytes(good[1][:100])
  with pytest.raises(UserError, match="cannot be read"):
    load_adapter(PeftNet(), folder, h)
  tensors.write_bytes(good[1])
  with pytest.raises(UserError, match="does not fit"):
    load_adapter(Net(), folder, h)
  with pytest.raises(UserError, match="cannot be read"):
    load_adapter(net, tmp_path / "nowhere", h)


def test_models_can_be_copied_checkpointed_and_compiled():
  net, x = Net().eval(), torch.randn(2, 3, 8, 8)
  apply_dora(net, 4, targets=["gru", "policy.*", "head"])
  stir(net)
  want = net(x)
  twin_net = copy.deepcopy(net)
  with torch.no_grad():
    for p in adapter_parameters(net):
      p.add_(1)
  assert torch.equal(twin_net(x)[0], want[0]) and not torch.equal(net(x)[0], want[0])
  net.load_state_dict(twin_net.state_dict())
  assert torch.equal(net(x)[0], want[0])
  with torch.no_grad():  # another base in place: the cached squares of the old one do not stay
    net.policy[0].base_layer.weight.mul_(3)
    adapter, w = net.policy[0].adapters["default"]["weight"], net.policy[0].base_layer.weight
    assert (
      relative(adapter.norm(w), (w.double() + adapter.scaling * adapter.b.double() @ adapter.a.double()).norm(dim=1))
      < CLOSE
    )
  layer = twin_net.policy[0]
  v = torch.randn(5, 24, requires_grad=True)
  grads = torch.autograd.grad(layer(v).square().sum(), [v, *layer.adapters.parameters()])
  compiled = torch.compile(layer, backend="aot_eager")
  for a, b in zip(
    torch.autograd.grad(compiled(v).square().sum(), [v, *layer.adapters.parameters()]), grads, strict=True
  ):
    assert relative(a, b) < CLOSE


@needs_peft
def test_ours_loads_into_peft(tmp_path):
  """With a rank clipped in one layer only, and a module whose name ends like another's."""
  net, x = PeftNet().eval(), torch.randn(3, 3, 8, 8)
  base = PeftNet().eval()
  base.load_state_dict(net.state_dict())
  apply_dora(net, 16, 24, targets=["conv", "blocks.0", "blocks.2"])
  stir(net)
  save_adapter(net, tmp_path, base_hash(net))
  theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
  adapted = [n for n, _ in theirs.named_modules() if n.endswith(".lora_magnitude_vector")]
  assert len(adapted) == 3
  with torch.no_grad():
    assert relative(theirs(x), net(x)) < CLOSE
    assert relative(theirs(x), theirs.get_base_model().eval()(x)) == 0.0
    merge(net)
    assert relative(theirs.merge_and_unload()(x), net(x)) < CLOSE


@needs_peft
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_loads_into_ours(tmp_path, rslora):
  net, x = PeftNet().eval(), torch.randn(3, 3, 8, 8)
  mine = PeftNet().eval()
  mine.load_state_dict(net.state_dict())
  config = peft.LoraConfig(
    r=8,
    lora_alpha=12,
    use_dora=True,
    use_rslora=rslora,
    target_modules=["conv", "0", "1", "2"],
    lora_dropout=0.1,
    rank_pattern={"blocks.1": 3},
    alpha_pattern={"2": 5},
  )
  theirs = peft.get_peft_model(net, config).eval()
  with torch.no_grad():
    for n, p in theirs.named_parameters():
      if "lora_B" in n or "magnitude" in n:
        p.add_(0.1 * torch.randn_like(p))
    want = theirs(x)
  theirs.save_pretrained(tmp_path)
  names = load_adapter(mine, tmp_path, "any")
  assert sorted(names) == ["blocks.0", "blocks.1", "blocks.2", "conv"]
  assert mine.blocks[1].adapters["default"]["weight"].b.shape[1] == 3
  with torch.no_grad():
    assert relative(mine(x), want) < CLOSE


def test_share_of_a_full_size_model():
  """Parameters of A, B and m at the default rank over all parameters of the base, for a network of the size of
  openpilot's (30 M: 61 MB of fp16), with its dense policy, recurrence and heads adapted. Counted on shapes, without
  memory."""
  with torch.device("meta"):
    vision = nn.Sequential(
      *[nn.Conv2d(c, 2 * c, 3) for c in (64, 128, 256, 512)],
      *[nn.Conv2d(1024, 1024, 3) for _ in range(2)],
      nn.Conv2d(1024, 512, 1),
    )
    heads = nn.ModuleList([nn.Linear(512, n) for n in (990, 528, 264, 102)])
    net = nn.ModuleDict({"vision": vision, "gru": nn.GRU(512, 512), "policy": nn.Linear(512, 512), "heads": heads})
    base = sum(p.numel() for p in net.parameters())
    apply_dora(net)
  share = sum(p.numel() for p in adapter_parameters(net)) / base
  assert 25e6 < base < 35e6 and len(dora_layers(net)) == 6
  assert share < 0.01
