#!/usr/bin/env python3
"""A training step (forward and backward, gradients for A, B, m and the input) of our DoRA beside PEFT's LoRA and DoRA,
in turns, in the same run.

python tests/bench/bench_dora.py [--rounds 30] [--tokens 1024] [--rank 16] [--device cpu] [--dtype float32] [--layer
768x3072 ...]

Prints the medians of the paired ratios with their quartiles, and the bytes that autograd keeps for the backward pass
beside the input, weights and parameters."""

import argparse
import time

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np
import peft
import torch
from torch import nn

from openpilot.tools.learn.adapters.apply import apply_dora
from openpilot.tools.learn.adapters.layers import dora_layers

KINDS = ("ours", "peft-dora", "peft-lora")


def build(kind: str, layer: nn.Linear, rank: int, dropout: float) -> nn.Module:
  torch.manual_seed(0)
  model: nn.Module = nn.Sequential(
    nn.Linear(layer.in_features, layer.out_features, device=layer.weight.device, dtype=layer.weight.dtype)
  )
  model.load_state_dict({f"0.{n}": t for n, t in layer.state_dict().items()})
  if kind == "ours":
    apply_dora(model, rank, targets=["0"], dropout=dropout)
    b = [a.b for x in dora_layers(model).values() for a in x.adapters["default"].values()]
  else:
    config = peft.LoraConfig(
      r=rank, lora_alpha=rank, lora_dropout=dropout, use_dora=kind == "peft-dora", target_modules=["0"]
    )
    model = peft.get_peft_model(model, config)
    b = [p for n, p in model.named_parameters() if "lora_B" in n]
  for p in b:
    nn.init.normal_(p, std=0.01)
  return model.train()


def sync(device: str) -> None:
  if device != "cpu":
    torch.cuda.synchronize()


def step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> float:
  """Seconds of one step."""
  model.zero_grad()
  x.grad = None
  sync(x.device.type)
  t = time.perf_counter()
  model(x).backward(g)
  sync(x.device.type)
  return time.perf_counter() - t


def kept(model: nn.Module, x: torch.Tensor) -> int:
  """Bytes of distinct tensors that one forward pass saves, less the input and what the model holds anyway."""
  own = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
  saved: dict[int, torch.UntypedStorage] = {}

  def pack(t):
    s = t.untyped_storage()
    if s.data_ptr() not in own:
      saved[s.data_ptr()] = s  # held, so that no address comes twice
    return t

  with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
    y = model(x)
  del y
  return sum(s.nbytes() for s in saved.values())


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--layer", nargs="+", default=["768x3072", "1024x4096"])
  p.add_argument("--tokens", type=int, default=1024)
  p.add_argument("--rank", type=int, default=16)
  p.add_argument("--rounds", type=int, default=30)
  p.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
  p.add_argument("--device", default="cpu")
  p.add_argument("--dtype", default="float32")
  p.add_argument("--threads", type=int, default=1)
  args = p.parse_args()
  torch.set_num_threads(args.threads)
  name = torch.cuda.get_device_name() if args.device != "cpu" else f"CPU, {args.threads} threads"
  print(
    f"{name}, {args.dtype}, {args.tokens} tokens, rank {args.rank}, {args.rounds} interleaved rounds; torch "
    f"{torch.__version__}, peft {peft.__version__}"
  )
  for size in args.layer:
    i, o = map(int, size.split("x"))
    layer = nn.Linear(i, o, device=args.device, dtype=getattr(torch, args.dtype))
    x = torch.randn(args.tokens, i, device=args.device, dtype=layer.weight.dtype, requires_grad=True)
    g = torch.randn(args.tokens, o, device=args.device, dtype=layer.weight.dtype)
    for dropout in args.dropout:
      models = {k: build(k, layer, args.rank, dropout) for k in KINDS}
      for m in models.values():
        step(m, x, g)
        step(m, x, g)
      times = {
        k: np.array(t)
        for k, t in zip(
          KINDS, zip(*([step(models[k], x, g) for k in KINDS] for _ in range(args.rounds)), strict=True), strict=True
        )
      }
      line = ", ".join(f"{k} {1e3 * t.min():.2f} ms" for k, t in times.items())
      print(f"{size}, dropout {dropout}: min {line}")
      for rival in KINDS[1:]:
        low, mid, high = np.percentile(times["ours"] / times[rival], [25, 50, 75])
        print(f"  ours / {rival}: {mid:.3f} ({low:.3f} to {high:.3f})")
      print("  kept for backward: " + ", ".join(f"{k} {kept(m, x) / 2**20:.2f} MiB" for k, m in models.items()))


if __name__ == "__main__":
  main()
