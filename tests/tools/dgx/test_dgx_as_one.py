"""openpilot's network taught by several processes is that of one: the same losses, whatever the number, also where it
changes on the way."""

import json

import pytest
from torchrun import torchrun

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from openpilot.tools.dgx.training.config import Config
from openpilot.tools.dgx.training.shards import DrivingClips, read_dataset, split
from openpilot.tools.dgx.training.run import LAST, Run
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import cli
data, base, out = map(Path, sys.argv[1:])
kill = os.environ.get("KILL", "").split(",")  # rank, step
def main():
  config = Config(epochs=1, batch_size=5, clip=2, lr=1e-3, val_share=0.0, dora_rank=4, accumulate=2, augment=True)
  train, _, _ = split(read_dataset(data)[1], config.clip, 1, 0.0)
  train.clips = train.clips[:20]
  run = Run(config, base, None, None, train, None, out)
  if (out / LAST).exists():
    run.load(load_checkpoint(out / LAST))
  real, losses, report = DrivingClips.__getitem__, run.losses, run.report
  def read(self, i):
    with open(out / f"seen-{os.getpid()}.jsonl", "a") as f:
      f.write(json.dumps([run.step, int(i)]) + "\\n")
    return real(self, i)
  DrivingClips.__getitem__ = read
  def losses_(batch):
    if kill == [str(run.rank), str(run.step)]:
      os.kill(os.getpid(), signal.SIGKILL)
    return losses(batch)
  def report_():
    if run.rank == 0:
      with open(out / "losses.jsonl", "a") as f:
        f.write(json.dumps([run.step, run.values]) + "\\n")
    report()
  run.losses, run.report = losses_, report_
  run.fit()
raise SystemExit(cli(main)())
"""


def test_several_processes_have_the_losses_of_one_also_after_one_was_killed(data, base, tmp_path):
  """Batches of five in two pieces each, varied: of two processes 3 and 2 clips, of four 2, 1, 1, 1. The first one of
  two is killed in its third step of four; four go on."""
  (tmp_path / "script.py").write_text(SCRIPT)

  def learn(processes, name, **env):
    (tmp_path / name).mkdir(exist_ok=True)
    return torchrun(processes, tmp_path / "script.py", data, base, tmp_path / name, **env)

  def losses(name):
    return dict(json.loads(x) for x in (tmp_path / name / "losses.jsonl").read_text().splitlines())

  r = learn(1, "one")
  assert r.returncode == 0, r.stderr[-3000:]
  r = learn(2, "more", KILL="0,2")
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  assert "a process of this run is gone" in r.stderr and "saved at step 2: the same command" in r.stderr
  before = [json.loads(x) for p in (tmp_path / "more").glob("seen-*") for x in p.read_text().splitlines()]
  for p in (tmp_path / "more").glob("seen-*"):
    p.unlink()
  r = learn(4, "more")
  assert r.returncode == 0, r.stderr[-3000:]
  after = [json.loads(x) for p in (tmp_path / "more").glob("seen-*") for x in p.read_text().splitlines()]
  assert {step for step, _ in after} == {2, 3}
  assert sorted(i for step, i in [x for x in before if x[0] < 2] + after) == list(range(20))  # each clip once
  found, want = losses("more"), losses("one")
  assert sorted(want) == sorted(found) == [1, 2, 3, 4] and len(want[1]) > 2
  for step, parts in want.items():
    assert found[step] == pytest.approx(parts, rel=1e-3), step
