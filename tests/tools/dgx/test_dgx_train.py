"""The training loop on small data and a small network: what learns, what is saved, going on bit for bit, and bad
input."""

import dataclasses
import json
import os
import pickle
import re
import signal
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from driving_fixture import write_data

from openpilot.tools.dgx.training import train as training
from openpilot.tools.dgx.training.config import Config, rate
from openpilot.tools.learn.adapters.apply import adapter_parameters
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.dgx.training.reference import SPEED_INPUT
from openpilot.tools.dgx.training.shards import DrivingClips, read_dataset, split
from openpilot.tools.dgx.training.student import Student
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.dgx.training.train import BEST, LAST, Run
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import FILE

SMALL = Config(epochs=2, batch_size=3, clip=2, lr=1e-3, val_share=0.5, dora_rank=4)


def make_run(data: Path, base: Path, out: Path, config: Config = SMALL, teacher: DrivingTeacher | None = None) -> Run:
  out.mkdir(exist_ok=True, parents=True)
  train, val, _ = split(read_dataset(data)[1], config.clip, config.hop or None, config.val_share)
  return Run(config, base, None, teacher, train, val, out)


def command(monkeypatch, *words) -> int:
  monkeypatch.setattr("sys.argv", ["train", *map(str, words)])
  return cli(training.main)()


@pytest.mark.slow
def test_losses_fall_and_only_the_adapter_learns(data, base, tmp_path):
  config = dataclasses.replace(SMALL, epochs=3, lr=4e-3)
  run = make_run(data, base, tmp_path, config)
  frozen = {n: p.clone() for n, p in run.student.model.named_parameters() if n not in run.learned}
  start = run.evaluate()
  assert {id(p) for p in run.learned.values()} == {id(p) for p in adapter_parameters(run.student.model)}
  end = run.fit()
  assert end["total"] < start["total"] and end["path_2s"] < start["path_2s"]
  now = dict(run.student.model.named_parameters())
  assert all(torch.equal(now[n], p) for n, p in frozen.items())
  lines = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
  assert [x["epoch"] for x in lines] == [1, 2, 3]
  best = load_checkpoint(tmp_path / BEST)
  assert best["val"]["total"] == min(x["val"]["total"] for x in lines)
  assert set(best) == {"base", "base_hash", "adapter", "dora", "epoch", "step", "config", "val"}
  assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
  # on this data, whose roads are arcs, the rival knows all
  assert end["constant_curvature_3s"] < 0.01


@pytest.mark.slow
def test_going_on_is_bit_for_bit_the_unbroken_run(data, base, tmp_path, monkeypatch):
  config = dataclasses.replace(SMALL, dora_dropout=0.1, batch_size=2)
  whole = make_run(data, base, tmp_path / "whole", config)
  whole.fit()
  broken = make_run(data, base, tmp_path / "broken", config)
  step_on = broken.step_on

  def stops(batch):
    out = step_on(batch)
    if broken.step == 0:  # Ctrl-C in the middle of the first step
      os.kill(os.getpid(), signal.SIGINT)
    return out

  monkeypatch.setattr(broken, "step_on", stops)
  with pytest.raises(KeyboardInterrupt):
    broken.fit()
  state = load_checkpoint(tmp_path / "broken" / LAST)
  assert state["step"] == 1 and state["at"] == 1 and broken.steps_per_epoch > 1
  again = make_run(data, base, tmp_path / "broken", config)
  again.load(state)
  again.fit()
  a, b = (load_checkpoint(tmp_path / k / LAST) for k in ("whole", "broken"))
  assert a["step"] == b["step"] == 2 * whole.steps_per_epoch
  assert all(torch.equal(a["adapter"][n], b["adapter"][n]) for n in a["adapter"])
  assert a["val"] == b["val"] and a["best"] == b["best"] and a["sums"] == b["sums"]
  assert all(
    torch.equal(x["exp_avg_sq"], y["exp_avg_sq"])
    for x, y in zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
  )


def test_an_earlier_versions_checkpoint_between_epoch_and_evaluation_goes_on(data, base, tmp_path):
  """Such a run was stopped after an epoch's last step, before it was evaluated."""
  config = dataclasses.replace(SMALL, batch_size=2)
  whole = make_run(data, base, tmp_path / "whole", config)
  whole.fit()
  broken = make_run(data, base, tmp_path / "broken", config)
  per_epoch = broken.steps_per_epoch
  for _ in range(2):  # after the first epoch's last step, and after the second's
    for batch in broken.batches():
      broken.values = broken.step_on(batch)
      broken.step, broken.at = broken.step + 1, broken.at + 1
      for k, v in broken.values.items():
        broken.sums[k] = broken.sums.get(k, 0.0) + v
    assert broken.at == per_epoch
    state = {**broken.state(), "scaler": None}
    broken = make_run(data, base, tmp_path / "broken", config)
    broken.load(state)
    if broken.step < broken.steps:
      broken.steps = broken.step
      broken.fit()
      broken.steps = whole.steps
      assert (broken.epoch, broken.at, broken.sums) == (1, 0, {})
  broken.fit()
  a, b = (load_checkpoint(tmp_path / k / LAST) for k in ("whole", "broken"))
  assert a["step"] == b["step"] and a["epoch"] == b["epoch"] == 2
  assert all(torch.allclose(a["adapter"][n], b["adapter"][n], atol=1e-6) for n in a["adapter"])
  assert b["val"]["total"] == pytest.approx(a["val"]["total"], rel=1e-5)
  assert b["best"] == pytest.approx(a["best"], rel=1e-5)


class Says:
  """A teacher that is sure of some clips' leads and lines and of others' not at all, and says nothing (NaN) of parts:
  by a clip's first pixel."""

  def __init__(self, base):
    self.inner = DrivingTeacher(base, device="cpu")

  def label(self, batch):
    out = self.inner.label(batch)
    k = batch["frames"][:, 0, 0, 0, 0].float() % 7  # (B,)
    out["lead_prob"] = (
      torch.stack([k / 7, k * 0 + 0.01, 1 - k / 7], -1)[:, None].expand_as(out["lead_prob"]).contiguous()
    )
    out["lane_lines_prob"] = (k / 7)[:, None, None].expand_as(out["lane_lines_prob"]).contiguous()
    out["desire_state"] = torch.where((k > 3)[:, None, None], torch.nan, out["desire_state"])
    for name in (
      "road_edges",
      "pose",
      "wide_from_device_euler",
      "road_transform",
      "action",
    ):  # away from what the base says: there the sign is rounding's
      out[name] = out[name] + 1
    out["plan"] = torch.where((k > 4)[:, None, None, None], torch.nan, out["plan"]) + 3
    return {**out, "lead": out["lead"] + 5, "lane_lines": out["lane_lines"] + k[:, None, None, None, None]}


@pytest.mark.parametrize("taught", [False, True])
def test_parts_of_a_batch_are_the_batch(data, base, tmp_path, taught):
  """Losses and gradients of several parts are those of the whole, however unevenly their clips teach: driven paths that
  end, a teacher that is unsure."""
  config = dataclasses.replace(SMALL, lr=1e-3, weights={"desire_state": 0.3, "lead": 0.5})
  results = []
  for n in (1, 2, 5):
    run = make_run(
      data, base, tmp_path / str(n), dataclasses.replace(config, accumulate=n), Says(base) if taught else None
    )
    clips = DrivingClips(run.train.shards, 2)
    batch = torch.utils.data.default_collate([clips[i] for i in range(5)])
    batch["plan"][1], batch["plan"][2, :, 5:] = torch.nan, torch.nan
    batch["pose"][3] = torch.nan
    batch["frames"][:, :, 0, 0, 0] = torch.tensor([1, 5, 2, 6, 3], dtype=torch.uint8)[:, None]
    values = run.step_on(batch)
    results.append((values, torch.cat([p.grad.flatten() for p in run.learned.values() if p.grad is not None])))
  (whole, gradient), *others = results
  assert gradient.abs().max() > 0 and ("teacher/lead" in whole) == taught
  for values, other in others:
    assert values.keys() == whole.keys() and all(
      values[k] == pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in whole.items()
    )
    assert (gradient - other).abs().max() < 1e-4 * gradient.abs().max()


def test_features_are_carried(data, base):
  """The second step's plan depends on the first step's picture, and not on what comes after; burnt-in steps teach
  nothing."""
  student = Student(load_onnx(base), None, {"plan": 1.0}, 1.0, 1.0).eval()
  batch = torch.utils.data.default_collate([DrivingClips(read_dataset(data)[1], 3)[0]])
  other = {**batch, "frames": batch["frames"].clone()}
  other["frames"][:, 0] = 255 - other["frames"][:, 0]
  with torch.no_grad():
    a, b = [o["plan"] for o in student.run(batch)], [o["plan"] for o in student.run(other)]
  assert all(not torch.equal(x, y) for x, y in zip(a, b, strict=True))
  other["frames"] = batch["frames"].clone()
  other["frames"][:, 2] = 0
  with torch.no_grad():
    b = [o["plan"] for o in student.run(other)]
  assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[2], b[2])
  burnt = Student(student.model, None, {"plan": 1.0}, 1.0, 1.0, burn_in=2)
  out = list(burnt.run(batch))
  assert [o["plan"].requires_grad for o in out] == [False, False, True]
  assert burnt.losses(out, batch)["total"] != student.losses(out, batch)["total"]


def test_a_teacher_that_is_the_student_costs_what_certainty_is_worth(data, base):
  """Labels by the base itself, run by ONNX Runtime: means agree, so that only the losses' constants are left; another
  net's labels cost more."""
  weights = {"plan": 0.0, "lane_lines": 1.0, "lead": 1.0, "road_edges": 1.0}
  student = Student(load_onnx(base), None, weights, 0.0, 1.0).eval()
  batch = torch.utils.data.default_collate([DrivingClips(read_dataset(data)[1], 2)[i] for i in range(2)])
  labels = DrivingTeacher(base, device="cpu").label(batch)
  assert labels["plan"].shape == (2, 2, 33, 15)
  with torch.no_grad():
    own = student({**batch, "labels": labels})
    off = student({**batch, "labels": {**labels, "lane_lines": labels["lane_lines"] + 1.0}})
  assert float(own["total"]) < 1e-3 and float(off["teacher/lane_lines"]) == pytest.approx(1.0, abs=1e-3)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good(data, base, tmp_path):
  run = make_run(data, base, tmp_path, dataclasses.replace(SMALL, epochs=1))
  run.fit()
  good = (tmp_path / LAST).read_bytes()
  again = make_run(data, base, tmp_path, SMALL)
  kept = {n: p.clone() for n, p in again.learned.items() if not torch.isnan(p).any()}
  frozen = next(p for n, p in again.student.model.named_parameters() if n not in again.learned)
  frozen.data.fill_(float("nan"))
  with pytest.raises(
    UserError, match=r"of step 0 is not finite on 00000001--aaaaaaaaaa--0; the last good checkpoint is .*last.pt"
  ):
    again.fit()
  assert (tmp_path / LAST).read_bytes() == good
  assert all(torch.equal(again.learned[n], p) for n, p in kept.items())


@pytest.mark.parametrize(
  "error",
  [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried ..."),
  ],
)
def test_out_of_memory_says_what_to_lower(data, base, tmp_path, monkeypatch, error):
  run = make_run(data, base, tmp_path)

  def full(_):
    raise error

  monkeypatch.setattr(run.student, "forward", full)
  with pytest.raises(
    UserError, match="does not hold 3 clips of 2 steps in 1 parts; raise --accumulate, or lower --batch-size or --clip"
  ):
    run.fit()


def test_rate():
  config = Config(lr=1.0, warmup=0.1)
  r = [rate(config, s, 100) for s in range(100)]
  assert r[0] == pytest.approx(0.1) and r[9] == r[10] == pytest.approx(1.0)
  assert all(a >= b for a, b in pairwise(r[10:])) and 0.01 <= r[-1] < 0.02


def test_the_command(data, base, tmp_path, monkeypatch, capsys):
  """All of it as typed: reference, table, checkpoints, resume, export's reading of the checkpoint."""
  words = [
    "--data",
    data,
    "--clip",
    2,
    "--batch-size",
    3,
    "--val-share",
    0.5,
    "--workers",
    0,
    "--output",
    tmp_path / "o",
    "--dora-rank",
    4,
    "--reference",
  ]
  assert command(monkeypatch, *words, "--epochs", 1) == 0
  out = capsys.readouterr().out
  assert "DoRA rank 4" in out and "held-out path after 3 s" in out and "trainable" in out
  assert {p.name for p in (tmp_path / "o").iterdir()} == {
    BEST,
    LAST,
    "adapter",
    "reference.onnx",
    "train_log.jsonl",
    FILE,
  }
  assert command(monkeypatch, *words, "--epochs", 1) == 2
  assert "add --resume" in capsys.readouterr().err
  assert command(monkeypatch, *words, "--epochs", 2, "--resume") == 2
  assert "epochs 1 then, 2 now" in capsys.readouterr().err
  assert command(monkeypatch, *words, "--epochs", 1, "--resume") == 0
  assert command(monkeypatch, "--config", tmp_path / "o", "--base", base) == 2
  assert "--base and --reference: give one of them" in capsys.readouterr().err
  assert command(monkeypatch, "--config", tmp_path / "o") == 2
  assert "add --resume" in capsys.readouterr().err
  assert command(monkeypatch, "--config", tmp_path / "o", "--resume") == 0
  assert command(monkeypatch, "--config", tmp_path / "o", "--output", tmp_path / "again") == 0
  first, again = (load_checkpoint(tmp_path / k / LAST)["adapter"] for k in ("o", "again"))
  assert all(torch.equal(first[k], again[k]) for k in first) and first.keys() == again.keys()
  from openpilot.tools.dgx.training.export import load_student, read_checkpoint

  state = read_checkpoint(tmp_path / "o" / BEST)
  student = load_student(state, Path(state["base"]))
  own = dict(student.named_parameters())
  assert all(torch.equal(own[n], t) for n, t in state["adapter"].items()) and len(state["adapter"]) > 10


def test_the_table_names_what_was_clipped(data, base, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(Run, "fit", lambda self: {})
  words = ["--data", data, "--base", base, "--clip", 2, "--workers", 0, "--output"]
  assert command(monkeypatch, *words, tmp_path / "a") == 0
  assert re.search(
    r"rank clipped on 7 of 31 layers, to 3\.\.12: net\.heads\.pose\.out, .* and 3 more$", capsys.readouterr().out, re.M
  )
  assert command(monkeypatch, *words, tmp_path / "b", "--dora-rank", 2) == 0
  assert "rank 2 on 31 layers" in (out := capsys.readouterr().out) and "clipped" not in out


def test_trackers(data, base, tmp_path, monkeypatch, capsys):
  """One that is not there is said at once, and not left out."""
  words = ["--data", data, "--base", base, "--output", tmp_path / "o", "--clip", 2, "--workers", 0, "--trackers"]
  assert command(monkeypatch, *words, "tensorboard,wandb") == 2
  assert capsys.readouterr().err.strip() == "error: --trackers wandb: there are tensorboard, trackio"
  monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "tensorboard" else None)
  assert command(monkeypatch, *words, "tensorboard, trackio") == 2
  assert (
    capsys.readouterr().err.strip()
    == "error: --trackers trackio is not installed: `pip install -e .[track]` brings tensorboard and trackio"
  )
  assert not (tmp_path / "o").exists()
  given = []
  monkeypatch.setattr(training, "Run", lambda *a: given.append(a[-1]) or stop())

  def stop():
    raise UserError("enough")

  assert command(monkeypatch, *words, "tensorboard") == 2 and given == [("tensorboard",)]
  assert command(monkeypatch, *words, "") == 2 and given[1:] == [()]


def test_full_training_moves_everything(data, base, tmp_path):
  run = make_run(data, base, tmp_path, dataclasses.replace(SMALL, epochs=1, full=True))
  before = {n: p.clone() for n, p in run.learned.items()}
  assert sum(p.numel() for p in run.learned.values()) == run.size
  run.fit()
  assert sum(not torch.equal(before[n], p) for n, p in run.learned.items()) > 0.5 * len(before)
  best = load_checkpoint(tmp_path / BEST)
  assert best["dora"] is None and set(best["adapter"]) == set(before)


def test_bad_input(data, base, tmp_path, monkeypatch, capsys):
  def refused(*words) -> str:
    assert command(monkeypatch, *words) == 2
    err = capsys.readouterr().err.strip().splitlines()
    return err[-1]

  assert "no training data" in refused("--data", tmp_path, "--output", tmp_path)
  good = ["--data", data, "--output", tmp_path / "x", "--base", base, "--workers", 0]
  assert "no clip of 40 steps" in refused(*good, "--clip", 40)
  assert "no loss speed" in refused(*good, "--weight", "speed=1", "--clip", 2)
  assert "LOSS=NUMBER" in refused(*good, "--weight", "plan")
  assert "nothing to learn from" in refused(*good, "--path-weight", 0)
  assert "batch_size" in refused(*good, "--batch-size", 0)
  assert "nothing to adapt" in refused(*good, "--targets", "nowhere", "--clip", 2)
  assert "leave --resume out" in refused(*good, "--resume")
  size = sum(p.numel() for p in load_onnx(base).parameters())
  most = re.search(
    r"rank 100000 is too large: .*; the largest sensible rank is (\d+)$",
    refused(*good, "--clip", 2, "--dora-rank", 100000),
  )
  assert most is not None
  assert f"parameters would be trained beside {size:,} of the base" in refused(
    *good, "--clip", 2, "--dora-rank", int(most[1]) + 1
  )

  class Code:
    def __reduce__(self):
      return (os.mkdir, (str(tmp_path / "ran"),))

  (tmp_path / "x").mkdir(exist_ok=True)
  (tmp_path / "x" / LAST).write_bytes(pickle.dumps(Code()))
  assert "holds code" in refused(*good, "--resume") and not (tmp_path / "ran").exists()


def test_checkpoints_of_another_base_are_refused(data, base, reference, tmp_path):
  run = make_run(data, base, tmp_path, dataclasses.replace(SMALL, epochs=1))
  run.fit()
  with pytest.raises(UserError, match=r"is of another run: base .* then, .* now; give the same"):
    make_run(data, reference, tmp_path, dataclasses.replace(SMALL, epochs=1)).load(load_checkpoint(tmp_path / LAST))
  with pytest.raises(UserError, match="no checkpoint to go on from"):
    run.load(load_checkpoint(tmp_path / BEST))


@pytest.mark.slow
def test_a_reference_that_sees_turns_is_trained_whole(data, tmp_path, monkeypatch):
  words = [
    "--data",
    data,
    "--clip",
    2,
    "--batch-size",
    2,
    "--val-share",
    0.5,
    "--workers",
    0,
    "--epochs",
    1,
    "--full",
    "--augment",
    "--reference",
    "turn",
  ]
  assert command(monkeypatch, *words, "--output", tmp_path / "o") == 0
  module = load_onnx(tmp_path / "o" / "reference.onnx")
  assert [v.name for v in module.inputs][-1] == SPEED_INPUT
  learned = torch.load(tmp_path / "o" / BEST, weights_only=True)["adapter"]
  before = dict(module.named_parameters())
  moved = {k for k, v in learned.items() if not torch.equal(v, before[k])}
  assert set(learned) == set(before) and len(moved) > 0.5 * len(before)


def test_the_last_segment_of_a_route_is_that_of_the_highest_number(tmp_path):
  """Not the last by its name, which of twelve segments is the 9th."""
  write_data(tmp_path / "d", segments=12)
  _, shards = read_dataset(tmp_path / "d")
  assert [int(s.name.rpartition("--")[2]) for s in shards] == list(range(12))
  train, val, how = split(shards, 2, None, 0.1)
  assert how == "the last 1 of 12 segments of the only route held out"
  assert [s.name for s in val.shards] == [shards[-1].name] and val.shards[0].name.endswith("--11")
  assert len(train.shards) == 11


def test_judging_by_what_is_learned_is_said(data, base, tmp_path, monkeypatch, capsys):
  words = ["--data", data, "--val", data, "--base", base, "--epochs", 1, "--batch-size", 2, "--clip", 2, "--workers", 0]
  assert command(monkeypatch, *words, "--output", tmp_path / "r") == 0
  assert "--val has 2 of the segments that are learned from" in capsys.readouterr().err
