"""The training loop on a line through points: what is learned, logged and saved, going on, and what is said where it
goes wrong."""

import json
import math
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrun import torchrun

from openpilot.tools.learn import loop
from openpilot.tools.learn.checkpoint import load_checkpoint, same_run
from openpilot.tools.learn.loop import Loop
from openpilot.tools.learn.processes import make_accelerator
from openpilot.tools.learn.schedule import averaged, follow, learning_rate
from openpilot.tools.lib.errors import UserError

README = Path(__file__).resolve().parents[3] / "tools" / "learn" / "README.md"


class Line(Loop):
  """y = 2 x + 1, in epochs of three steps, with dropout, whose draws a resumed run must repeat."""

  def __init__(self, out: Path, steps: int = 8, accumulate: int = 1, dropout: float = 0.2, **more):
    out.mkdir(parents=True, exist_ok=True)
    super().__init__(out, steps, **{"lr": 0.05, "warmup": 2, "eval_every": 4, "log_every": 2, **more})
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(dropout), torch.nn.Linear(8, 1))
    self.prepare(model, torch.optim.AdamW(model.parameters()), ema=0.9)
    self.accumulate, self.bad, self.mute, self.epochs = accumulate, -1, set[int](), 0

  def batches(self):
    self.epochs += 1
    for step in range(self.step, min(self.steps, self.step - self.step % 3 + 3)):
      x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
      yield step, x * (math.nan if step == self.bad else 1), 2 * x[:, :1] + 1

  def pieces(self, batch):
    step, x, y = batch
    n = len(x) // self.accumulate
    return [(step, x[i : i + n], y[i : i + n]) for i in range(0, len(x), n)]

  def losses(self, batch):
    step, x, y = batch
    loss = (self.model(x) - y).square().mean() / self.accumulate
    return {"square": loss, "total": loss} if step not in self.mute else {"total": 0 * loss}

  def taught(self, parts):
    return len(parts) > 1

  def names(self, batch):
    return [f"batch {batch[0]}"]

  def evaluate(self):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(99))
    return {"total": float((self.ema(x) - 2 * x[:, :1] - 1).square().mean())}


def equal(a, b) -> bool:
  if torch.is_tensor(a):
    return torch.equal(a, b)
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
  if isinstance(a, list):
    return len(a) == len(b) and all(map(equal, a, b))
  return a == b


def test_the_readmes_trainer_learns_and_goes_on(tmp_path):
  (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
  code, run = block.split("\n\n\n")
  names = {"Loop": Loop, "Path": Path, "torch": torch, "load_checkpoint": load_checkpoint}
  exec(code, names)
  exec(run, {**names, "out": tmp_path, "resume": False})
  last = load_checkpoint(tmp_path / "last.pt")
  assert last["step"] == 200 and last["best"] < 0.05
  weight, bias = last["ema"]["weight"], last["ema"]["bias"]
  assert float(weight) == pytest.approx(2, abs=0.1) and float(bias) == pytest.approx(1, abs=0.1)
  assert {p.name for p in tmp_path.iterdir()} == {"best.pt", "last.pt", "log.jsonl"}
  exec(run, {**names, "out": tmp_path, "resume": True})  # complete: nothing is done again
  assert equal(load_checkpoint(tmp_path / "last.pt"), last)
  assert len(run.splitlines()) + len(code.splitlines()) <= 25


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [2, 4, 5])  # before, at and after an evaluation
def test_a_stopped_run_goes_on_as_the_unbroken_one(tmp_path, which, at):
  whole, broken = Line(tmp_path / "a"), Line(tmp_path / "b")
  whole.fit()
  update, before = broken.update_ema, signal.getsignal(which)

  def stop():
    update()
    if broken.step == at:
      os.kill(os.getpid(), which)

  broken.update_ema = stop
  with pytest.raises(KeyboardInterrupt):
    broken.fit()
  assert signal.getsignal(which) is before
  state = load_checkpoint(tmp_path / "b" / "last.pt")
  assert state["step"] == at
  again = Line(tmp_path / "b")
  again.load(state)
  again.fit()
  a, b = (load_checkpoint(tmp_path / k / "last.pt") for k in "ab")
  assert a["step"] == 8 and equal(a, b) and again.metrics == whole.metrics
  lines = [[json.loads(x) for x in (tmp_path / k / "log.jsonl").read_text().splitlines()] for k in "ab"]
  for x in [*lines[0], *lines[1]]:
    for timing in ("wait", "seconds"):
      x.pop(timing, None)
  assert lines[0] == lines[1] and [x["step"] for x in lines[0] if "val" in x] == [4, 8]
  assert [x["step"] for x in lines[0] if "loss" in x] == [2, 4, 6, 8] and "square" in lines[0][0]


def test_a_training_on_a_cpu_keeps_what_it_frees_and_learns_the_same(tmp_path, monkeypatch):
  asked: list[int] = []
  keep, said = loop.keep_freed, []
  for name, also in (("given back", lambda: None), ("kept", keep)):
    monkeypatch.setattr(loop, "keep_freed", lambda also=also: (asked.append(1), also()))
    run = Line(tmp_path / name, 3)
    run.fit()
    said.append(load_checkpoint(tmp_path / name / "last.pt"))
  assert len(asked) == 2 * (run.accelerator.device.type == "cpu") and equal(*said)


def test_best_is_the_best_and_last_the_last(tmp_path, monkeypatch):
  run, scores = Line(tmp_path, steps=6, eval_every=1), iter([5.0, 3.0, 4.0, 3.0, math.nan, 3.5])
  monkeypatch.setattr(run, "evaluate", lambda: {"total": next(scores)})
  run.fit()
  best, last = load_checkpoint(tmp_path / "best.pt"), load_checkpoint(tmp_path / "last.pt")
  assert best["step"] == 4 and best["best"] == last["best"] == 3.0 and last["step"] == 6
  nothing = Line(tmp_path / "n", steps=2)
  monkeypatch.setattr(nothing, "evaluate", dict)  # nothing is held out: the last is the best
  assert nothing.fit() == {} and load_checkpoint(tmp_path / "n" / "best.pt")["step"] == 2
  none = Line(tmp_path / "z", steps=0)
  none.fit()
  assert load_checkpoint(tmp_path / "z" / "last.pt")["step"] == load_checkpoint(tmp_path / "z" / "best.pt")["step"] == 0


def test_parts_that_a_piece_lacks_stay(tmp_path):
  run, names = Line(tmp_path, accumulate=2), iter("ab")
  real = run.losses

  def losses(piece):
    total = real(piece)["total"]
    return {next(names): total, "total": total}

  run.losses = losses
  values = run.step_on(next(iter(run.batches())))
  assert values.keys() == {"a", "b", "total"} and values["total"] == pytest.approx(values["a"] + values["b"])


def test_pieces_of_a_batch_are_the_batch(tmp_path):
  runs = [Line(tmp_path / str(n), accumulate=n, dropout=0.0) for n in (1, 3)]
  values = [r.step_on(next(iter(r.batches()))) for r in runs]
  assert values[0] == pytest.approx(values[1], rel=1e-5)
  a, b = ([p.grad for p in r.unwrapped.parameters()] for r in runs)
  assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(a, b, strict=True)) and a[0].abs().max() > 0


def test_what_is_not_finite_is_named_and_changes_nothing(tmp_path):
  run = Line(tmp_path)
  run.bad = 5
  said = r"the loss \(square, total\) of step 5 is not finite on batch 5; the last good checkpoint is .*last\.pt"
  with pytest.raises(UserError, match=said):
    run.fit()
  assert load_checkpoint(tmp_path / "last.pt")["step"] == 4
  before = [p.clone() for p in run.unwrapped.parameters()]
  assert all(torch.isfinite(p).all() for p in before)
  bad = Line(tmp_path / "g")
  weight = bad.unwrapped[0].weight
  before = weight.detach().clone()
  weight.register_hook(lambda g: g * math.inf)
  with pytest.raises(UserError, match="the gradient of step 0 is not finite on batch 0; no checkpoint was written yet"):
    bad.fit()
  assert torch.equal(weight.detach(), before)


def test_a_step_that_teaches_nothing_counts_and_changes_nothing(tmp_path):
  run = Line(tmp_path, steps=3)
  run.mute = {0, 1, 2}
  before = {k: v.clone() for k, v in run.unwrapped.state_dict().items()}
  run.fit()
  state = load_checkpoint(tmp_path / "last.pt")
  assert state["step"] == 3 and equal(state["model"], before) and equal(state["ema"], before)
  assert "loss" not in (tmp_path / "log.jsonl").read_text() if (tmp_path / "log.jsonl").exists() else True
  other = Line(tmp_path / "b", steps=3)
  other.mute = {1}
  other.fit()
  assert int(load_checkpoint(tmp_path / "b" / "last.pt")["optimizer"]["state"][0]["step"]) == 2


@pytest.mark.parametrize(
  "error",
  [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried ..."),
  ],
)
def test_out_of_memory_says_what_to_lower(tmp_path, monkeypatch, error):
  run = Line(tmp_path)

  def full(_):
    raise error

  monkeypatch.setattr(run, "losses", full)
  with pytest.raises(UserError, match="the memory does not hold a batch; lower --batch-size"):
    run.fit()
  monkeypatch.setattr(run, "losses", lambda _: torch.zeros(2) @ torch.zeros(3))  # another error is none of these
  with pytest.raises(RuntimeError, match="size"):
    run.fit()


def test_no_batches_is_said(tmp_path, monkeypatch):
  run = Line(tmp_path)
  monkeypatch.setattr(run, "batches", list)
  with pytest.raises(UserError, match="no batch to learn from"):
    run.fit()


def test_epochs_are_asked_for_one_by_one(tmp_path):
  run = Line(tmp_path)
  run.fit()
  assert run.epochs == 3  # three, three, two steps


@pytest.mark.parametrize(("warmup", "floor"), [(0, 0.02), (5, 0.1)])
def test_the_rate_is_torchs_cosine_after_a_linear_rise(warmup, floor):
  p = torch.nn.Parameter(torch.zeros(1))
  optimizer = torch.optim.SGD([p], lr=0.3)
  reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40 - warmup, eta_min=0.3 * floor)
  for step in range(40):
    got = learning_rate(0.3, step, 40, warmup, floor=floor, start=warmup)
    if step < warmup:
      assert got == pytest.approx(0.3 * (step + 1) / warmup)
      continue
    assert got == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    optimizer.step()
    reference.step()
  assert learning_rate(0.3, 39, 40, 0, "constant") == 0.3 and learning_rate(0.3, 0, 40, 4, "constant") == 0.3 / 4
  with pytest.raises(ValueError, match="no shape 'square'"):
    learning_rate(1.0, 0, 1, shape="square")


def test_the_average_is_that_of_the_weights():
  model = torch.nn.BatchNorm1d(3)
  average = averaged(model)
  want = {k: v.double().numpy().copy() for k, v in model.state_dict().items()}
  r = np.random.default_rng(0)
  for step in range(1, 30):
    with torch.no_grad():
      for p in model.parameters():
        p.copy_(torch.from_numpy(r.normal(size=3)))
    model(torch.from_numpy(r.normal(size=(4, 3))).float())
    follow(average, model, 0.7, step)
    decay = min(0.7, (1 + step) / (10 + step))
    for k, v in model.state_dict().items():
      want[k] = decay * want[k] + (1 - decay) * v.double().numpy() if v.is_floating_point() else v.numpy()
  for k, v in average.state_dict().items():
    assert np.allclose(v.numpy(), want[k], atol=1e-5), k
  assert not average.training and not any(p.requires_grad for p in average.parameters())


def test_a_checkpoint_of_another_run_says_what_differs(tmp_path):
  same_run(tmp_path, {"a": 1, "b": [1]}, {"a": 1, "b": [1]})
  with pytest.raises(UserError, match=r"is of another run: a 1 then, 2 now, c None then, 3 now; give the same, or"):
    same_run(tmp_path, {"a": 1, "b": 0}, {"a": 2, "b": 0, "c": 3})


def test_trackers_see_steps_and_evaluations(tmp_path, monkeypatch):
  run = Line(tmp_path, steps=4, accelerator=make_accelerator("no", (), tmp_path, cpu=True))
  seen = []
  monkeypatch.setattr(run.accelerator, "log", lambda values, step: seen.append((step, set(values))))
  run.fit()
  assert seen == [(2, {"loss", "square"}), (4, {"loss", "square"}), (4, {"val/total"})]


TWO = """
import math, sys
from pathlib import Path
import torch
from openpilot.tools.learn.loop import Loop
from openpilot.tools.lib.errors import cli
class Line(Loop):
  def __init__(self, out):
    super().__init__(out, 6, eval_every=2)
    model = torch.nn.Linear(2, 1)
    self.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
  def batches(self):
    for step in range(self.step, self.steps):
      bad = step == 3 and self.accelerator.process_index == 1
      yield step, torch.full((2, 2), math.nan if bad else 1.0)
  def losses(self, batch):
    return {"total": self.model(batch[1]).mean()}
  def names(self, batch):
    return [f"batch {batch[0]} of {self.accelerator.process_index}"]
def main():
  Line(Path(sys.argv[1])).fit()
raise SystemExit(cli(main)())
"""


@pytest.mark.slow
def test_what_one_process_finds_not_finite_stops_both_and_is_said_once(tmp_path):
  (tmp_path / "script.py").write_text(TWO)
  (tmp_path / "run").mkdir()
  r = torchrun(2, tmp_path / "script.py", tmp_path / "run")
  assert r.returncode != 0 and r.stderr.count("error: the loss") == 1
  assert "the loss (total) of step 3 is not finite on batch 3 of 1; the last good checkpoint is" in r.stderr
  assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2
