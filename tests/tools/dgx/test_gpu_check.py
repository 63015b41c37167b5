"""The skeleton of `dgx gpu-check`, its steps stood for by tiny ones: time limits, what is left out and why, and that a
failure stops no other."""

import json
import os
import time

import pytest

from openpilot.tools.dgx import gpu_check as module
from openpilot.tools.dgx.gpu_check import Step
from openpilot.tools.lib.errors import UserError


def step(name, code, limit=600.0, **kwargs):
  return Step(name, ("-c", code), limit, **kwargs)


WELL = 'import json; json.dump({"ms": 1.25, "batch": 16}, open("%s.json", "w"))'


@pytest.fixture
def here(tmp_path, monkeypatch):
  """run(steps) -> what is in the JSON by name, and the error that it ends with."""
  monkeypatch.setattr(module.tensorrt, "missing", lambda: "TensorRT is not installed; pip install tensorrt")

  def run(*steps, **kwargs):
    monkeypatch.setattr(module, "all_steps", lambda args, gpu: list(steps))
    error = None
    try:
      module.run(module.Options(tmp_path / "out", **kwargs))
    except UserError as e:
      error = str(e)
    results = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    return {d["name"]: d for d in results["steps"]}, error, results

  return run


def test_what_fails_or_hangs_stops_no_other(here, capsys):
  found, error, results = here(
    step("one step", WELL % "one-step"),
    step("bad", "import sys; print('error: no such weights', file=sys.stderr); sys.exit(2)"),
    step("hangs", "import time; time.sleep(60)", 0.5),
    step("engine", "1/0", needs="tensorrt"),
    step("of it", "1/0", after="bad"),
    step("last", "pass"),
  )
  assert {k: d["status"] for k, d in found.items()} == {
    "one step": "done",
    "bad": "failed",
    "hangs": "too long",
    "engine": "left out",
    "of it": "left out",
    "last": "done",
  }
  assert found["one step"]["numbers"] == {"ms": 1.25, "batch": 16} and found["last"]["numbers"] == {}
  assert found["bad"]["why"] == "exit code 2: no such weights"
  assert found["hangs"]["why"].startswith("not within")
  assert found["engine"]["why"] == "TensorRT is not installed; pip install tensorrt"
  assert found["of it"]["why"] == "'bad' was not done"
  assert error == "1 steps failed, 1 took too long; the others were measured"
  table = capsys.readouterr().out
  assert results["device"] in table and "ms 1.25, batch 16" in table and "no such weights" in table


def test_what_a_step_started_ends_with_it(here, tmp_path):
  """It holds the step's output open, for which nobody waits."""
  code = "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); open('pid', 'w').write(str(p.pid)); p.wait()"
  found, _, _ = here(step("slow", code, 3.0))
  assert found["slow"]["status"] == "too long" and found["slow"]["seconds"] < 300
  pid = tmp_path / "out" / "pid"
  if not pid.exists():
    pytest.skip("this machine did not even start it within 3 s")
  with pytest.raises(ProcessLookupError):
    for _ in range(1000):  # until init has seen that it is dead
      os.kill(int(pid.read_text()), 0)
      time.sleep(0.02)


def test_numbers_of_an_earlier_run_are_not_told_again(here, tmp_path):
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "last.json").write_text('{"ms": 7}')
  found, error, _ = here(step("last", "pass"))
  assert found["last"]["numbers"] == {} and error is None


def test_all_together_have_a_limit_on_a_gpu(here, monkeypatch):
  monkeypatch.setattr(module.hardware, "describe", lambda: {"gpu": "H0", "machine": "x", "cpus": 1, "memory_gb": 1})
  monkeypatch.setattr(module.hardware, "one_line", lambda: "1 x H0")
  found, error, results = here(step("long", "import time; time.sleep(60)"), step("late", "pass"), seconds=2.0)
  assert results["device"] == "H0" and found["long"]["status"] == "too long"
  assert found["late"]["why"] == "the 2 s were over" and error is not None


def test_only_some_of_the_steps(here):
  a, b = step("a", "pass"), step("b", "1/0")
  assert list(here(a, b, only=("a",))[0]) == ["a"]
  with pytest.raises(UserError, match="--only c: there are a, b"):
    module.chosen([a, b], ("a", "c"))


@pytest.mark.parametrize("gpu", [True, False])
def test_the_steps_themselves(tmp_path, gpu):
  """Each has a name of its own, follows one that is there, and is known to gpu_steps.py or is a command."""
  from openpilot.tools.dgx.gpu_steps import RUN

  steps = module.all_steps(module.Options(tmp_path, bundle="fair_unified_small"), gpu)
  names = [s.name for s in steps]
  assert len(set(names)) == len(names) and all(s.after in ("", *names) for s in steps)
  assert {s.words[2] for s in steps if s.words[1] == module.STEPS} == set(RUN)
  assert {s.needs for s in steps} == {"", "tensorrt", "grounding-dino"}
  for s in steps:
    if s.name.startswith("train "):
      assert len(s.words) > 3 and s.words[1].startswith("openpilot.tools.")


def test_every_trainer_takes_its_words(tmp_path):
  import importlib

  from openpilot.tools.lib.options import parse

  for s in module.all_steps(module.Options(tmp_path, grounding_dino=tmp_path), True):
    if s.name.startswith("train "):
      parse(importlib.import_module(s.words[1]).Options, None, s.name, list(s.words[2:]))
