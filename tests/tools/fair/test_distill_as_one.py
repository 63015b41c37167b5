"""Students taught by several processes are those of one: the same losses at every step, whatever the number, also where
it changes on the way; and one process that is killed costs a step."""

import json

import pytest
import torch
from label_fixture import write_store
from torchrun import torchrun

from openpilot.tools.fair.distillation.batch import Batches, labels_of, together
from openpilot.tools.fair.distillation.data import Clips

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import cli
root, out, more = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
kill = os.environ.get("KILL", "").split(",")  # rank, step
def main():
  config = Config(**{"student": "unified-nano", "warmup": 2, "eval_every": 100, "learned_weights": True, **more})
  run = Run(config, Clips(root, config.tasks, config.clip), None, out, "labels", workers=0)
  run.log_every = 1
  if (out / "last.pt").exists():
    run.load(load_checkpoint(out / "last.pt"))
  rank, real = run.accelerator.process_index, run.losses
  def losses(batch):
    with open(out / f"seen-{os.getpid()}.jsonl", "a") as f:
      f.write(json.dumps([run.step, batch["clips"]]) + "\\n")
    parts = real(batch)
    if kill == [str(rank), str(run.step)]:
      os.kill(os.getpid(), signal.SIGKILL)
    return parts
  run.losses = losses
  run.fit()
raise SystemExit(cli(main)())
"""


@pytest.fixture(scope="module")
def learn(tmp_path_factory):
  """(processes, folder, options of Config, and of the environment) -> what torchrun said."""
  root = tmp_path_factory.mktemp("as_one")
  write_store(root / "s", routes=[f"0000000{k}--aaaaaaaaaa" for k in range(3)], n=8)
  (root / "script.py").write_text(SCRIPT)

  def learn(processes, out, env=None, **more):
    out.mkdir(exist_ok=True)
    return torchrun(processes, root / "script.py", root / "s", out, json.dumps(more), **(env or {}))

  return learn


def losses_of(out):
  """step -> the loss and its parts."""
  lines = [json.loads(x) for x in (out / "log.jsonl").read_text().splitlines()]
  kept = {x["step"]: {k: v for k, v in x.items() if k not in ("step", "wait", "seconds")} for x in lines if "loss" in x}
  return dict(sorted(kept.items()))


def seen(out, steps):
  """Clips of the steps that were done, of all processes of all starts."""
  lines = [json.loads(x) for p in out.glob("seen-*.jsonl") for x in p.read_text().splitlines()]
  return sorted(c for step, clips in lines if step in steps for c in clips)


def assert_alike(found, want, rtol):
  assert found.keys() == want.keys()
  for step, parts in want.items():
    assert found[step].keys() == parts.keys()
    for k, v in parts.items():
      assert found[step][k] == pytest.approx(v, rel=rtol, abs=1e-5), (step, k)


@pytest.mark.slow
def test_two_and_four_processes_have_the_losses_of_one(learn, tmp_path):
  """Of the same weights. With what makes a loss no mean over clips: several tasks with unknown pixels and boxes, batch
  norms, learned weights, and shares that are not alike; and changes by which each clip is varied. Gradients:
  test_one_batch.py."""
  told = {"tasks": ["depth", "segmentation", "objects"], "steps": 1, "batch": 5, "clip": 1}
  for processes in (1, 2, 4):
    r = learn(processes, tmp_path / str(processes), **told)
    assert r.returncode == 0, r.stderr[-3000:]
  want = losses_of(tmp_path / "1")
  assert len(want) == 1 and len(want[1]) > 6
  for processes in ("2", "4"):
    assert_alike(losses_of(tmp_path / processes), want, 1e-3)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_it_with_one_line_and_another_number_goes_on(learn, tmp_path):
  """An epoch of four steps, of 24 clips: one of two is killed in its third, and one process goes on.
  test_dgx_as_one.py goes on with more."""
  told = {"tasks": ["segmentation"], "steps": 4, "batch": 6, "clip": 1}
  r = learn(1, tmp_path / "one", **told)
  assert r.returncode == 0, r.stderr[-3000:]
  out = tmp_path / "killed"
  r = learn(2, out, {"KILL": "1,2"}, **told)
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  assert f"a process of this run is gone; {out / 'last.pt'} is saved at step 2: the same" in r.stderr
  assert "Traceback" not in r.stderr.split("error: ")[0]
  assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
  for p in out.glob("seen-*.jsonl"):  # of the step that was not done
    p.write_text("".join(x + "\n" for x in p.read_text().splitlines() if json.loads(x)[0] < 2))
  r = learn(1, out, **told)
  assert r.returncode == 0, r.stderr[-3000:]
  assert seen(out, range(4)) == list(range(24))  # each clip once
  assert_alike(losses_of(out), losses_of(tmp_path / "one"), 0.05)


def test_labels_of_shares_are_those_of_the_whole(tmp_path):
  """Also what the clips of one share do not have."""
  store = tmp_path / "s"
  write_store(store, n=6)
  clips = Clips(store, ["depth", "segmentation", "objects", "lanes"], 2)
  data, which = Batches(clips, 3, True), [0, 3, 5, 7, 9]
  want = data[(4, which, True)]
  shares = [data[(4, which[k::2], True, list(range(5))[k::2])] for k in range(2)]
  for key in ("depth", "points"):  # a share whose clips have none
    del shares[1][key]
  made = [together([labels_of(s) for s in shares], k, shares[k]) for k in range(2)]
  whole = made[0]["whole"]
  assert whole["frames"] == [6, 4] and whole["counts"] == [3, 2] and made[0]["whole"].keys() == made[1]["whole"].keys()
  assert whole["clip"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
  order = [0, 2, 4, 1, 3]  # of the whole's clips in the step
  frames = [2 * c + t for c in order for t in (0, 1)]
  assert torch.equal(whole["segmentation"], want["segmentation"][frames])
  assert torch.equal(whole["depth"][:6], want["depth"][frames[:6]]) and whole["depth"].shape == want["depth"].shape
  assert whole["points"].shape == want["points"].shape and len(made[1]["points"]) == 2
  assert [o["boxes"].tolist() for o in whole["objects"]] == [want["objects"][f]["boxes"].tolist() for f in frames]
  assert torch.equal(torch.cat([s["frame"] for s in shares]), want["frame"][frames])
