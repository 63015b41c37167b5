"""Networks adapted by several processes are those of one: the same losses, whatever the number, also where it changes
on the way."""

import json

import numpy as np
import pytest
import torch
from label_fixture import LABELS, group_of, write_store
from test_distill_as_one import assert_alike, losses_of, seen
from torchrun import torchrun

from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.trainer import Run as DistillRun
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.teacher import Label

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from openpilot.tools.dgx.dense import dora_distillation
from openpilot.tools.dgx.dense.dora_run import Run
from openpilot.tools.lib.errors import cli
out = Path(sys.argv[sys.argv.index("--output") + 1])
kill = os.environ.get("KILL", "").split(",")  # rank, step
def losses(self, batch, real=Run.losses):
  out.mkdir(parents=True, exist_ok=True)  # the first process may not have come to it
  with open(out / f"seen-{os.getpid()}.jsonl", "a") as f:
    f.write(json.dumps([self.step, batch[0]["clips"]]) + "\\n")
  parts = real(self, batch)
  if kill == [str(self.rank), str(self.step)]:
    os.kill(os.getpid(), signal.SIGKILL)
  return parts
Run.losses = losses
raise SystemExit(cli(dora_distillation.main)())
"""


@pytest.fixture(scope="module")
def adapt(tmp_path_factory, base, data):
  """(network, processes, folder, words, environment) -> what torchrun said. Of two routes one has depth,
  both have features; a third is held out. A driving network learns the path, too."""
  root = tmp_path_factory.mktemp("as_one")
  routes = [f"0000000{k}--aaaaaaaaaa" for k in range(3)]
  write_store(root / "s", routes[:1], labels=LABELS[:1])
  write_store(root / "val", routes[2:], labels=LABELS[:1])
  write_store(root / "s", routes[1:2], labels=LABELS[1:2])
  store, r = LabelStore(root / "s"), np.random.default_rng(0)
  for route in routes[:2]:
    g = group_of(store, f"{route}--0", "dense", [Label("features", "dense", "float16", (8, 8, 16))], 16)
    for k in range(g.chunk_count):
      g.write_chunk(k, {"features": r.normal(size=(len(g.rows(k)), 8, 8, 16)).astype(np.float16)})
  config = Config(student="depth-nano", tasks=["depth"], steps=1, batch=2, warmup=1, eval_every=1)
  (root / "student").mkdir()
  DistillRun(config, Clips(root / "s", ["depth"], 1), None, root / "student", "labels", workers=0).fit()
  (root / "script.py").write_text(SCRIPT)
  words = {"driving": ["--base", base, "--data", data, "--clip", 2], "student": ["--student", root / "student"]}

  def adapt(network, processes, out, *more, **env):
    told = [
      "--labels",
      root / "s",
      "--val",
      root / "val",
      "--output",
      out,
      *words[network],
      "--workers",
      0,
      "--dora-rank",
      2,
      *more,
    ]
    return torchrun(processes, root / "script.py", *told, **env)

  return adapt


@pytest.mark.parametrize("network", ["driving", "student"])
def test_two_and_four_processes_have_the_losses_of_one(adapt, tmp_path, network):
  """Of two steps, the second of what the first has learned. How far outputs moved from the base's is rounding at first,
  whose signs are gradients."""
  found = {}
  for processes in (1, 2, 4):
    out = tmp_path / str(processes)
    r = adapt(network, processes, out, "--batch-size", 5, "--steps", 2)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count("\nbesides") == r.stdout.count(": next, ") == 1
    found[processes] = losses_of(out)
  want = found[1]
  moved = {n: [parts.pop("keep") for parts in losses.values() if "keep" in parts] for n, losses in found.items()}
  assert list(want) == [1, 2] and {"features/features", "depth/silog"} <= set(want[1])
  assert ("path" in want[1]) == (len(moved[1]) == 2) == (network == "driving")  # a student's outputs may move
  for processes in (2, 4):
    assert_alike(found[processes], want, 2e-3)
    if network == "driving":
      assert moved[processes][0] < 1e-5 and moved[processes][1] == pytest.approx(moved[1][1], rel=0.5)


def test_the_first_is_killed_and_another_number_goes_on(adapt, tmp_path):
  """An epoch of three steps: one of two is killed in its second, and four go on."""
  out, told = tmp_path / "run", ["--batch-size", 4, "--steps", 3]
  r = adapt("driving", 2, out, *told, KILL="0,1")
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  assert f"a process of this run is gone; {out / 'resume.pt'} is saved at step 1: the same" in r.stderr
  assert torch.load(out / "resume.pt", weights_only=True)["step"] == 1
  for p in out.glob("seen-*.jsonl"):  # of the step that was not done
    p.write_text("".join(x + "\n" for x in p.read_text().splitlines() if json.loads(x)[0] < 1))
  r = adapt("driving", 4, out, *told, "--resume")
  assert r.returncode == 0, r.stderr[-3000:]
  assert seen(out, range(3)) == list(range(12))  # each clip once


def test_what_is_wrong_is_said_once(adapt, tmp_path):
  r = adapt("driving", 2, tmp_path / "run", "--batch-size", 1)
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  assert "--batch-size 1 is fewer clips than there are processes (2)" in r.stderr
