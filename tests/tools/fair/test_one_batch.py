"""Batch norms and outputs of several processes, as one process has them. Whole trainers:
test_distill_as_one.py, test_dgx_as_one.py."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional
from torchrun import torchrun

from openpilot.tools.learn import one_batch
from openpilot.tools.learn.one_batch import norms_of_all

SHAPES = ((7, 3), (4, 3, 5), (6, 3, 4, 5))
NET = """
import sys
import torch
import torch.distributed as dist
from openpilot.tools.learn.one_batch import gathered_outputs, norms_of_all
from openpilot.tools.lib.errors import cli
x, world = torch.load(sys.argv[1]), int(sys.argv[2])
def net():
  torch.manual_seed(0)
  norm = torch.nn.BatchNorm2d(4)
  return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), norm, torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1))
def loss(out):  # no mean over examples
  return (out["a"] ** 2).sum().sqrt() + out["b"][0].std()
def outputs(y):
  return {"a": y, "b": [y.reshape(-1, 2, *y.shape[1:]).mean((1, 2, 3, 4))]}  # of frames, of clips of two
def main():
  model, rank = net(), 0
  if world == 1:
    loss(outputs(model(x))).backward()
  else:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    clips = [list(range(k, 5, world)) for k in range(world)]  # uneven shares
    model = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    with norms_of_all():
      own = model(x.reshape(5, 2, *x.shape[1:])[clips[rank]].flatten(0, 1))
    whole = gathered_outputs(outputs(own), [2 * len(c) for c in clips], [len(c) for c in clips])
    assert len(whole["a"]) == 10 and len(whole["b"][0]) == 5
    loss(whole).backward()
    model = model.module
    dist.barrier()
  if rank == 0:
    torch.save({**{k: p.grad for k, p in model.named_parameters()}, **dict(model.named_buffers())}, sys.argv[3])
raise SystemExit(cli(main)())
"""


def test_a_norm_of_one_process_is_torchs(rng):
  dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
  try:
    for shape in SHAPES:
      x = torch.from_numpy(rng.normal(2, 3, shape)).float()
      made = []
      for ours in (False, True):
        torch.manual_seed(0)
        norm = torch.nn.BatchNorm2d(3) if len(shape) == 4 else torch.nn.BatchNorm1d(3)
        torch.nn.init.normal_(norm.weight)
        own = x.clone().requires_grad_()
        if ours:
          with norms_of_all():
            out = norm(own)
        else:
          out = norm(own)
        out.sin().sum().backward()
        assert norm.eval()(own).isfinite().all()  # its own statistics
        made.append((out, own.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var))
      for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert functional.batch_norm is one_batch.TORCH_S
  finally:
    dist.destroy_process_group()


@pytest.mark.slow
def test_gradients_of_several_processes_are_those_of_one(tmp_path, rng):
  torch.save(torch.from_numpy(rng.normal(1, 2, (10, 3, 6, 7))).float(), tmp_path / "x.pt")
  (tmp_path / "net.py").write_text(NET)
  for world in (1, 2, 3):
    r = torchrun(world, tmp_path / "net.py", tmp_path / "x.pt", world, tmp_path / f"{world}.pt")
    assert r.returncode == 0, r.stderr[-3000:]
  want = torch.load(tmp_path / "1.pt")
  for world in (2, 3):
    found = torch.load(tmp_path / f"{world}.pt")
    assert found.keys() == want.keys()
    for k, v in want.items():
      torch.testing.assert_close(found[k], v, rtol=1e-4, atol=1e-5, msg=lambda m, k=k: f"{k}: {m}")
