"""Training on two processes of a CPU: one that is interrupted takes the other along, and the run is saved at the step
that both have done."""

import pytest
import torch
from torchrun import torchrun

pytestmark = pytest.mark.slow

SCRIPT = """
import os, signal, sys
from pathlib import Path
from openpilot.tools.dgx.training.config import Config
from openpilot.tools.dgx.training.shards import read_dataset, split
from openpilot.tools.dgx.training.train import Run
from openpilot.tools.lib.errors import cli
data, base, out = map(Path, sys.argv[1:])
def main():
  config = Config(epochs=3, batch_size=2, clip=2, lr=1e-3, val_share=0.5, dora_rank=4)
  train, val, _ = split(read_dataset(data)[1], config.clip, None, config.val_share)
  run = Run(config, base, None, None, train, val, out)
  assert run.accelerator.num_processes == 2
  real = run.step_on
  def step_on(batch):
    if run.step == 1 and run.accelerator.process_index == 1:
      os.kill(os.getpid(), getattr(signal, os.environ["HOW"]))
    return real(batch)
  run.step_on = step_on
  try:
    run.fit()
  except KeyboardInterrupt:
    (out / f"stopped{run.accelerator.process_index}").write_text(str(run.step))
raise SystemExit(cli(main)())
"""


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM"])
def test_an_interrupt_of_one_process_stops_and_saves_both(data, base, tmp_path, monkeypatch, how):
  monkeypatch.setenv("HOW", how)
  (tmp_path / "script.py").write_text(SCRIPT)
  out = tmp_path / "run"
  out.mkdir()
  r = torchrun(2, tmp_path / "script.py", data, base, out)
  assert r.returncode == 0, r.stderr[-3000:]
  assert (out / "stopped0").read_text() == (out / "stopped1").read_text() == "2"
  assert torch.load(out / "last.pt", weights_only=True)["step"] == 2
  assert (r.stdout + r.stderr).count("stopped at step 2, saved") == 1


def test_two_processes_speak_as_one(data, tmp_path):
  out = tmp_path / "run"
  words = ["--data", data, "--output", out, "--epochs", 1, "--batch-size", 2, "--clip", 2, "--dora-rank", 4]
  r = torchrun(2, "-m", "openpilot.tools.dgx.training.train", *words)
  assert r.returncode == 0, r.stderr[-3000:]
  assert r.stderr.count("warning: no --base") == 1 and r.stdout.count("next, `") == 1
  assert (out / "reference.onnx").exists() and (out / "best_model.pt").exists()
  r = torchrun(2, "-m", "openpilot.tools.dgx.training.train", *words)
  assert r.returncode != 0 and r.stderr.count("error: ") == r.stderr.count("is of a run there; add --resume") == 1


def test_what_one_process_alone_warns_of_is_said(tmp_path):
  (tmp_path / "script.py").write_text("""
from openpilot.tools.learn.processes import gathered_objects, is_first, made_by_the_first, one_run
from openpilot.tools.lib.errors import cli, warn
def main():
  warn("before")
  with one_run():
    made_by_the_first(list)
    warn("of both")
    if not is_first():
      print("not heard")
      warn("of the second")
    gathered_objects(0)
raise SystemExit(cli(main)())
""")
  r = torchrun(2, tmp_path / "script.py")
  assert r.returncode == 0, r.stderr[-3000:]
  said = [r.stderr.count(f"warning: {x}") for x in ("before", "of both", "of the second")]
  assert said == [2, 1, 1], r.stderr[-3000:]
  assert not r.stdout
