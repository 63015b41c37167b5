"""DoRA against PEFT's, against float64 references written out here, and on disk in both directions.

"Relative" is the largest difference over the largest value of what is compared with, both in fp32 unless said
otherwise."""

import pytest
import torch
import torch.nn.functional as F
from dora_fixture import CLOSE, needs_peft, peft, relative, stir
from torch import nn

from openpilot.tools.learn.adapters.apply import adapter_parameters, apply_dora, merge
from openpilot.tools.learn.adapters.layers import DoRAConv2d, DoRAGRU
from openpilot.tools.learn.adapters.lowrank import Adapter, DoRAProduct


def twin(layer: nn.Module, rank: int):
  """Ours and PEFT's on the same layer with the same A, B, m: (our model, PEFT's model, [(ours, PEFT's)])."""
  ours = nn.Sequential(nn.Sequential(), layer)
  apply_dora(ours, rank, 2 * rank, targets=["1"], clip_rank=False)
  stir(ours)
  base = ours[1].base_layer
  bare = (
    type(base)(base.in_features, base.out_features)
    if isinstance(base, nn.Linear)
    else nn.Conv2d(
      base.in_channels, base.out_channels, base.kernel_size, base.stride, base.padding, bias=base.bias is not None
    )
  )
  bare.load_state_dict(base.state_dict())
  config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=True, target_modules=["1"])
  theirs = peft.get_peft_model(nn.Sequential(nn.Sequential(), bare), config)
  x, mine = theirs.base_model.model[1], ours[1].adapters["default"]["weight"]
  pairs = [
    (mine.a, x.lora_A["default"].weight),
    (mine.b, x.lora_B["default"].weight),
    (mine.m, x.lora_magnitude_vector["default"].weight),
  ]
  with torch.no_grad():
    for a, b in pairs:
      b.copy_(a.view(b.shape))
  return ours, theirs, pairs


def assert_same_step(ours, theirs, pairs, x):
  x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
  y1, y2 = ours(x1), theirs(x2)
  g = torch.randn_like(y1)
  y1.backward(g)
  y2.backward(g)
  found = {
    "y": (y1, y2),
    "dx": (x1.grad, x2.grad),
    **{n: (a.grad, b.grad.view(a.shape)) for n, (a, b) in zip(("dA", "dB", "dm"), pairs, strict=True)},
  }
  assert {n: e for n, (a, b) in found.items() if not (e := relative(a, b)) < CLOSE} == {}


@needs_peft
@pytest.mark.parametrize("rank", [1, 2, 8, 16, 33, 64])
def test_linear_is_pefts(rank):
  assert_same_step(*twin(nn.Linear(96, 160), rank), torch.randn(3, 41, 96))


@needs_peft
@pytest.mark.parametrize(
  "rank, kernel, stride, padding", [(1, 3, 1, 1), (8, 3, 2, 1), (16, 1, 1, 0), (64, (3, 5), (2, 1), (0, 2))]
)
def test_conv2d_is_pefts(rank, kernel, stride, padding):
  assert_same_step(*twin(nn.Conv2d(24, 64, kernel, stride, padding), rank), torch.randn(2, 24, 13, 17))


def test_function_gradients_in_float64():
  """Finite differences, with the scale c an input: the norm is a constant, as it should be."""
  x, w, a, b, c, bias = (
    torch.randn(s, dtype=torch.float64, requires_grad=s != (4, 3))
    for s in ((5, 7, 3), (4, 3), (2, 3), (4, 2), (4,), (4,))
  )
  mask = torch.rand(35, 3) > 0.3
  for m in (None, mask):
    assert torch.autograd.gradcheck(
      lambda x, a, b, c, bias, m=m: DoRAProduct.apply(x, w, a, b, c, bias, m, 0.7), (x, a, b, c, bias)
    )


def dense(adapter: Adapter, w: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
  """The plain form in float64, and the leaves that learn."""
  leaves = [p.detach().double().requires_grad_() for p in (adapter.a, adapter.b, adapter.m)]
  a, b, m = leaves
  g = adapter.groups
  delta = torch.cat([bi.flatten(1) @ ai.flatten(1) for ai, bi in zip(a.chunk(g), b.chunk(g), strict=True)])
  v = w.detach().double() + adapter.scaling * delta.view(w.shape)
  norm = v.detach().flatten(1).pow(2).sum(1).sqrt()
  return v * (m / norm).view(-1, *(1,) * (w.ndim - 1)), leaves


@pytest.mark.parametrize(
  "groups, stride, padding, dilation, mode",
  [(1, 1, 2, 2, "zeros"), (4, 2, 1, 1, "zeros"), (8, 1, 1, 1, "zeros"), (2, 1, 1, 1, "reflect")],
)
def test_conv2d_groups_dilation_and_padding(groups, stride, padding, dilation, mode):
  model = nn.Sequential(nn.Conv2d(8, 16, 3, stride, padding, dilation, groups, padding_mode=mode))
  apply_dora(model, 4, targets=["0"])
  stir(model)
  layer = model[0]
  assert isinstance(layer, DoRAConv2d)
  adapter = layer.adapters["default"]["weight"]
  weight, leaves = dense(adapter, layer.base_layer.weight)
  x = torch.randn(2, 8, 9, 11)
  y = model(x)
  ref = F.conv2d(
    F.pad(x.double(), (1,) * 4, mode=mode) if mode != "zeros" else x.double(),
    weight,
    layer.base_layer.bias.double(),
    stride,
    padding if mode == "zeros" else 0,
    dilation,
    groups,
  )
  g = torch.randn_like(y)
  y.backward(g)
  ref.backward(g.double())
  assert relative(y, ref) < CLOSE
  for p, q in zip((adapter.a, adapter.b, adapter.m), leaves, strict=True):
    assert relative(p.grad, q.grad) < 2e-6


def gru_reference(base: nn.GRU, weights: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """The published equations, step by step, in float64. x (B, T, in) -> (B, T, H * directions), (layers * directions, B,
  H)."""
  last = []
  for k in range(base.num_layers):
    outs = []
    for suffix in (f"l{k}", f"l{k}_reverse")[: 2 if base.bidirectional else 1]:
      wi, wh = weights[f"weight_ih_{suffix}"], weights[f"weight_hh_{suffix}"]
      bi, bh = (getattr(base, f"bias_{n}_{suffix}").detach().double() for n in ("ih", "hh"))
      h, seq = x.new_zeros(len(x), base.hidden_size), []
      steps = range(x.shape[1])
      for t in reversed(steps) if "reverse" in suffix else steps:
        (ir, iz, inew), (hr, hz, hn) = (x[:, t] @ wi.T + bi).chunk(3, 1), (h @ wh.T + bh).chunk(3, 1)
        r, z = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
        h = (1 - z) * torch.tanh(inew + r * hn) + z * h
        seq.append(h)
      last.append(h)
      outs.append(torch.stack(seq[::-1] if "reverse" in suffix else seq, 1))
    x = torch.cat(outs, -1)
  return x, torch.stack(last)


@pytest.mark.parametrize("layers, both", [(1, False), (2, True)])
def test_gru_against_float64(layers, both):
  model = nn.ModuleDict({"gru": nn.GRU(12, 20, layers, batch_first=True, bidirectional=both)})
  assert apply_dora(model, 4, 8) == ["gru"]
  stir(model)
  layer = model["gru"]
  assert isinstance(layer, DoRAGRU)
  parts = {n: dense(layer.adapters["default"][n], getattr(layer.base_layer, n)) for n in layer.names}
  x = torch.randn(3, 9, 12)
  y, h = layer(x)
  ref, ref_h = gru_reference(layer.base_layer, {n: w for n, (w, _) in parts.items()}, x.double())
  g = torch.randn_like(y)
  (y * g).sum().backward()
  (ref * g.double()).sum().backward()
  # 9 steps of sigmoid and tanh in fp32 against float64: a few units of 6e-8 each.
  assert relative(y, ref) < 2e-6 and relative(h, ref_h) < 2e-6
  for n, (_, leaves) in parts.items():
    adapter = layer.adapters["default"][n]
    for p, q in zip((adapter.a, adapter.b, adapter.m), leaves, strict=True):
      assert relative(p.grad, q.grad) < 3e-6, n
  assert layer.base_layer.weight_ih_l0.grad is None
  with torch.no_grad():
    merge(model)
    assert relative(layer(x)[0], y) < CLOSE


@pytest.mark.parametrize("layer, shape", [(nn.Linear(6, 5), (4, 6)), (nn.Conv2d(6, 5, 3), (2, 6, 5, 5))])
def test_zero_rows_stay_finite(layer, shape):
  with torch.no_grad():
    layer.weight[2] = 0
  model = nn.Sequential(layer)
  apply_dora(model, 2, targets=["0"])
  for stirred in (False, True):
    if stirred:
      with torch.no_grad():
        model[0].adapters["default"]["weight"].b.normal_()
    y = model(torch.randn(shape))
    y.square().sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in adapter_parameters(model))
    assert torch.equal(y.select(1, 2), layer.bias[2].expand_as(y.select(1, 2)))


def test_norm_where_the_update_cancels_the_weight():
  """The factored sum has lost its digits there; the rows are computed directly."""
  w = torch.randn(12, 3) @ torch.randn(3, 40)
  u, s, v = torch.linalg.svd(w, full_matrices=False)
  adapter = Adapter.new(w, 3, 1.0)
  with torch.no_grad():
    adapter.a.copy_(v[:3])
    adapter.b.copy_(-(1 - 1e-3) * u[:, :3] * s[:3])
    adapter.b[6:] *= -1
  with torch.no_grad():
    exact = (w.double() + adapter.b.double() @ adapter.a.double()).norm(dim=1)
    error = (adapter.norm(w) - exact).abs() / exact
  # A thousandth of the weight is left: fp32's rounding of W and BA themselves is then 1e-4 of it. The factored sum
  # alone would be off by tens of per cent.
  assert float(error.max()) < 1e-3 and float(error[6:].max()) < CLOSE


def test_dropout_is_on_the_low_rank_path_only():
  model = nn.Sequential(nn.Linear(30, 20))
  apply_dora(model, 4, dropout=0.5, targets=["0"])
  x = torch.randn(200, 30)
  base = model[0].base_layer
  with torch.no_grad():
    assert relative(model(x), base(x)) < CLOSE  # B is zero: nothing is dropped from the base's path
  stir(model)
  adapter = model[0].adapters["default"]["weight"]
  x.requires_grad_()
  y = model(x)
  # Rows of y say which mask was drawn: compare with autograd's own on a mask drawn from the same seed.
  torch.manual_seed(7)
  y = model(x)
  torch.manual_seed(7)
  mask = torch.empty(200, 30, dtype=torch.bool).bernoulli_(0.5)
  g = torch.randn_like(y)
  grads = torch.autograd.grad(y, [x, *adapter.parameters()], g)
  ref = (
    adapter.scale(base.weight)
    * (F.linear(x, base.weight) + adapter.scaling * (x * mask / 0.5) @ adapter.a.T @ adapter.b.T)
    + base.bias
  )
  assert relative(y, ref) < CLOSE
  for p, q in zip(grads, torch.autograd.grad(ref, [x, *adapter.parameters()], g), strict=True):
    assert relative(p, q) < 2e-6
  model.eval()
  assert torch.equal(model(x), model(x)) and 0.4 < float(mask.float().mean()) < 0.6


def test_norm_stays_fp32_under_autocast():
  model = nn.Sequential(nn.Linear(64, 48))
  apply_dora(model, 8, targets=["0"])
  stir(model)
  layer = model[0]
  adapter = layer.adapters["default"]["weight"]
  exact = adapter.norm(layer.base_layer.weight)
  x = torch.randn(32, 64)
  full = model(x)
  with torch.autocast("cpu", torch.bfloat16):
    norm = adapter.norm(layer.base_layer.weight)
    y = model(x)
    y.float().square().sum().backward()
  assert norm.dtype == torch.float32 and torch.equal(norm, exact)
  assert y.dtype == torch.bfloat16 and relative(y, full) < 0.02
  assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in adapter_parameters(model))
  half = nn.Linear(64, 48).bfloat16()
  wide = Adapter.new(half.weight, 8, 1.0)
  assert (
    wide.norm(half.weight).dtype == torch.float32
    and relative(wide.norm(half.weight), half.weight.double().norm(dim=1)) < CLOSE
  )
