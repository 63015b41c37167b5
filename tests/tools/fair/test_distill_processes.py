"""A distillation run on two processes of a CPU is one run: one student, the same in both, and one of them speaks and
writes."""

import json

import pytest
import torch
from label_fixture import LABELS, write_store
from torchrun import torchrun

from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.students.student import build

pytestmark = pytest.mark.slow

# one route teaches depth, the other classes: a process whose clip is of the wrong one has labels of the other's alone
SCRIPT = """
import sys
from pathlib import Path
import torch
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.config import Config, Stage
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.lib.errors import cli
root, out = map(Path, sys.argv[1:])
def main():
  stages = [Stage(6, tasks=["depth"], freeze=["backbone"]), Stage(2)]
  config = Config("unified-nano", ["depth", "segmentation"], steps=8, batch=2, clip=1, warmup=2, eval_every=4,
                  stages=stages, learned_weights=True)
  train = Clips(root, config.tasks, 1)
  run = Run(config, train, train, out, "labels", workers=0)
  skipped, real = [], type(run.distiller).forward
  def forward(self, batch, tasks=()):
    parts = real(self, batch, tasks)
    skipped.append(len(parts) == 1)
    return parts
  type(run.distiller).forward = forward
  run.fit()
  assert run.accelerator.num_processes == 2
  found = {"parameters": dict(run.distiller.named_parameters()), "losses": torch.from_numpy(run.clip_losses)}
  torch.save({**found, "order": run.order, "skipped": skipped}, out / f"rank{run.accelerator.process_index}.pt")
raise SystemExit(cli(main)())
"""


def test_two_processes_make_one_run(tmp_path):
  write_store(tmp_path / "s")
  out = tmp_path / "run"
  words = [
    "--labels",
    tmp_path / "s",
    "--student",
    "unified-nano",
    "--out",
    out,
    "--steps",
    4,
    "--clip",
    2,
    "--batch",
    4,
    "--eval-every",
    2,
    "--warmup",
    2,
  ]
  r = torchrun(2, "-m", "openpilot.tools.fair.distillation.distill", *words, "--workers", 1)
  assert r.returncode == 0, r.stderr[-3000:]
  assert r.stdout.count("parameters, learns") == 1 and r.stdout.count("held-out losses") == 1
  lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines if "val" in x] == [2, 4]
  state = torch.load(out / "last.pt", weights_only=True)
  assert state["step"] == 4 and all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())
  r = torchrun(2, "-m", "openpilot.tools.fair.distillation.distill", *words, "--batch", 2)
  assert r.returncode != 0 and r.stderr.count("error: ") == 1 and "raise --batch-size to 4 at least" in r.stderr


def test_both_have_the_same_student_and_know_the_same_losses(tmp_path):
  write_store(tmp_path / "s", routes=("00000001--aaaaaaaaaa",), labels=LABELS[:1], n=12)
  write_store(tmp_path / "s", routes=("00000002--bbbbbbbbbb",), labels=LABELS[1:2], n=12)
  (tmp_path / "script.py").write_text(SCRIPT)
  (tmp_path / "run").mkdir()
  r = torchrun(2, tmp_path / "script.py", tmp_path / "s", tmp_path / "run")
  assert r.returncode == 0, r.stderr[-3000:]
  a, b = (torch.load(tmp_path / "run" / f"rank{k}.pt", weights_only=True) for k in (0, 1))
  assert a["order"] == b["order"] and torch.equal(a["losses"], b["losses"]) and a["losses"].any()
  assert all(torch.equal(a["parameters"][k], b["parameters"][k]) for k in a["parameters"])
  assert a["skipped"] == b["skipped"] and not all(a["skipped"])  # both learn from what either has


def test_nothing_to_learn_from_is_a_zero_that_reaches_all(rng):
  model = Distiller(build("depth-nano"), ["depth"], {})
  frame = torch.from_numpy(rng.integers(0, 256, (2, 6, 128, 256), dtype="uint8"))
  parts = model({"frame": frame, "valid": torch.ones(2, 64, 128, dtype=torch.bool)})
  assert list(parts) == ["total"] and not parts["total"].detach().any()
  parts["total"].backward()
  assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
