"""The mean of runs: their weights' own, a run that is exported and distilled on, and what it refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from label_fixture import taught, write_store

from openpilot.tools.fair.bundle.export import load_student
from openpilot.tools.fair.distillation import average
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import UserError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Two runs of one student, the second from the first on other routes, and a student of another kind."""
  root = tmp_path_factory.mktemp("average")
  write_store(root / "a", ("one",), 4)
  write_store(root / "b", ("two",), 4)
  short = ["--steps", 2, "--batch-size", 2, "--lr", 0.01]
  taught(root / "a", root / "first", *short)
  taught(root / "b", root / "second", *short, "--steps", 3, "--init", root / "first")
  taught(root / "a", root / "other", *short, "--backbone", "mobilenetv2_100_same")
  return root


def options(runs, names, output, **more):
  return average.Options(runs=tuple(runs / n for n in names), output=runs / output, **more)


def test_a_mean_is_one_and_says_what_both_were_shown(runs):
  out = average.run(options(runs, ("first", "second"), "mean", weights="1,3"))
  states = [load_student(runs / n)[0].state_dict() for n in ("first", "second")]
  mean, config, state = load_student(out)
  assert config.steps == 0 and config.student == "depth-nano"
  changed = 0
  for name, got in mean.state_dict().items():
    a, b = (s[name] for s in states)
    want = 0.25 * a.numpy().astype(np.float64) + 0.75 * b.numpy() if a.is_floating_point() else b.numpy()
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-6, atol=1e-9, err_msg=name)
    changed += not torch.equal(a, got)
  assert changed
  assert state["trained"]["segments"] == ["one--0", "two--0"] and [h["steps"] for h in state["history"]] == [2, 3]
  log = json.loads((out / "log.jsonl").read_text())
  assert log["average"]["weights"] == [0.25, 0.75]
  assert taught(runs / "a", runs / "on", "--steps", 1, "--batch-size", 2, "--init", out)["step"] == 1
  assert [h["steps"] for h in load_checkpoint(runs / "on/best.pt")["history"]] == [2, 3, 1]


@pytest.mark.parametrize(
  ("names", "more", "said"),
  [
    (("first",), {}, "wants two runs"),
    (("first", "other"), {}, "is of another student than"),
    (("first", "second"), {"weights": "1"}, "--weights 1: write 2 numbers"),
    (("first", "second"), {"weights": "1,nan"}, "--weights 1,nan"),
    (("first", "second"), {"weights": "0,0"}, "--weights 0,0"),
    (("first", "nowhere"), {}, "nowhere"),
  ],
)
def test_bad_input_is_one_line_and_nothing_is_written(runs, names, more, said):
  with pytest.raises(UserError, match=said) as e:
    average.run(options(runs, names, "not", **more))
  assert "\n" not in str(e.value) and not (runs / "not").exists()


def test_a_folder_that_is_full_and_a_run_that_goes_on_are_refused(runs, monkeypatch, capsys):
  with pytest.raises(UserError, match="there is something already"):
    average.run(options(runs, ("first", "second"), "first"))
  shutil.copytree(runs / "second", runs / "half")
  state = torch.load(runs / "half/last.pt", weights_only=True)
  torch.save({**state, "step": 1}, runs / "half/last.pt")
  words = [str(runs / "first"), str(runs / "half"), "--output", str(runs / "not")]
  monkeypatch.setattr(sys, "argv", ["average", *words])
  with pytest.raises(UserError, match="is at step 1 of 3"):
    average.main()
  monkeypatch.setattr(sys, "argv", ["average", words[0], str(runs / "second"), "--output", str(runs / "mean2")])
  average.main()
  assert "the mean of 2 runs; next, `tools/op.sh export" in capsys.readouterr().out
