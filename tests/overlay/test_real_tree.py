"""The whole of it in the openpilot checkout that OPENPILOT_DIR names: see real_tree.py, which tells what it wants of
it."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import real_tree

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_in_a_real_openpilot(tmp_path):
  if not os.environ.get("OPENPILOT_DIR"):
    pytest.skip("OPENPILOT_DIR is not set: a clean, built openpilot checkout")
  done = subprocess.run(
    [sys.executable, str(HERE / "real_tree.py"), "--out", str(tmp_path)], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_checkout_it_says_what_it_wants(tmp_path):
  env = {k: v for k, v in os.environ.items() if not k.startswith("OPENPILOT_")}
  done = subprocess.run([sys.executable, str(HERE / "real_tree.py")], capture_output=True, text=True, env=env)
  assert done.returncode == 2 and "set OPENPILOT_DIR" in done.stderr
  done = subprocess.run(
    [sys.executable, str(HERE / "real_tree.py"), str(tmp_path)], capture_output=True, text=True, env=env
  )
  assert done.returncode == 2 and "OPENPILOT_PYTHON" in done.stderr


# *** what the scripts in the checkout find when all is well, and what must not pass ***

LIVE = {
  "loggerd": {"messages": 820, "mb_per_minute": {"all": 0.3, "fairObjects": 0.02}},
  "resumed_after_s": 6.0,
  "real_time": True,
  "frames": 400,
  "frames_answered": 400,
  "messages": {"fairObjects": 400},
  "kills": 6,
  "submaster_seen": {"fairObjects": 400},
  "invalid": {},
  "cpu_ms_per_frame": 14.0,
  "memory_mb": 240.0,
  "memory_own_mb": 150.0,
  "manager_states": 65,
  "should_but_does_not": 0,
  "stand_in_frames": 400,
  "frame_drop_perc_max": 0.0,
  "stopped_in_s": 1.0,
  "left_running": [],
  "faults": [
    "the process before this one was ended by SIGSEGV; held 900 MB; did not come back from a frame and was ended"
  ],
  "said": "".join(f"fault: {f}\n" for f in real_tree.FAULTS),
}
REPLAY = {
  "sent": 600,
  "first_answer_s": 0.5,
  "frames": 580,
  "answered": 578,
  "invalid": {"fairState": 1},
  "alive": True,
  "resumed_messages": 20,
  "camera": "526x330",
  "cpu_ms_per_frame": 15.0,
  "loggerd": None,
  "mb_per_minute": {"all": 0.2},
}
TWICE = {
  "frames": 120,
  "answered": 120,
  "messages": {"fairObjects": 120},
  "invalid": 0,
  "differences": [],
  "equal": True,
  "one_changed_is_seen": True,
}
DRIVEN = {"names": {}, "states": {"enabled": 596}}
EVENTS = {
  "equal": True,
  "ours_in_states": 65,
  "drive": "made",
  "without": DRIVEN,
  "with": DRIVEN,
  "fairmodeld dead": DRIVEN,
  "plannerd dead": {"names": {"processNotRunning": 1}, "states": {}},
}
OFF, ALL = {"messages": {"fairObjects": 0}}, {"should_but_does_not": 11}


class Told(real_tree.Tree):
  """A checkout whose scripts find what a test says; bad: (check, field, value) that one of them finds."""

  bad: tuple[str, str, object] | None = None

  def check(self, script, name, *args, timeout=240.0):
    found = (
      REPLAY
      if script == "cpp_replay.py"
      else TWICE
      if name == "process_replay"
      else EVENTS
      if script == "replays.py"
      else LIVE
    )
    found = {**copy.deepcopy(found), **(OFF if name == "off" else ALL if name == "killed-all" else {})}
    if self.bad and name == self.bad[0]:
      found[self.bad[1]] = self.bad[2]
    return found


@pytest.fixture(autouse=True)
def no_bundle_is_written(monkeypatch):
  monkeypatch.setattr(real_tree, "loop_bundle", lambda models: models / "loop")


def results(tmp_path, step, bad=None):
  replay = tmp_path / "tools/replay"
  replay.mkdir(parents=True)
  (replay / "replay").touch()
  (replay / "replay.cc").write_text("// begin openpilot-fair")
  tree = Told(tmp_path, sys.executable, tmp_path, tmp_path / "route", 20.0)
  tree.bad = bad
  real_tree.STEPS[step](tree)
  return {result for _, result, _ in tree.rows}


@pytest.mark.parametrize("step", ["frames", "replay", "process_replay", "kill", "faults"])
def test_all_is_well(tmp_path, step):
  assert results(tmp_path, step) == {"ok"}


SMALL, BIG = ({"messages": n, "mb_per_minute": {"all": mb, "fairObjects": 0.02}} for n, mb in ((30, 0.3), (820, 1.3)))
BAD = [
  *(
    ("frames", "frames", *b)
    for b in (
      ("frames", 0),
      ("frames_answered", 370),
      ("frames_answered", 0),
      ("invalid", {"fairLanes": 1}),
      ("should_but_does_not", 1),
      ("left_running", [7]),
      ("submaster_seen", {}),
      ("manager_states", 0),
      ("stopped_in_s", 6.0),
      ("loggerd", SMALL),
      ("loggerd", BIG),
    )
  ),
  *(
    ("replay", name, *b)
    for name in ("replay--block", "replayno--block")
    for b in (
      ("frames", 0),
      ("answered", 560),
      ("sent", 20),
      ("first_answer_s", 9.0),
      ("alive", False),
      ("invalid", {"fairLanes": 2}),
      ("mb_per_minute", {"all": 1.2}),
    )
  ),
  ("replay", "replayno--block", "resumed_messages", 0),
  *(
    ("process_replay", "process_replay", *b)
    for b in (("equal", False), ("answered", 119), ("invalid", 1), ("one_changed_is_seen", False), ("frames", 0))
  ),
  *(
    ("kill", "killed", *b)
    for b in (
      ("should_but_does_not", 1),
      ("manager_states", 0),
      ("kills", 2),
      ("frames_answered", 0),
      ("left_running", [7]),
    )
  ),
  *(
    ("kill", "selfdrived-killed", *b)
    for b in (
      ("equal", False),
      ("ours_in_states", 0),
      ("without", {"names": {}, "states": {"disabled": 600}}),
      ("plannerd dead", {"names": {}}),
      ("fairmodeld dead", {"names": {"processNotRunning": 1}}),
    )
  ),
  ("kill", "killed-all", "should_but_does_not", 0),
  *(
    ("faults", name, *b)
    for name in ("off", *real_tree.FAULTS, "loop", "displaced")
    for b in (("stand_in_frames", 380), ("frame_drop_perc_max", 4.0))
  ),
  *(
    ("faults", name, *b)
    for name in (*real_tree.FAULTS, "loop")
    for b in (("should_but_does_not", 1), ("manager_states", 0), ("left_running", [7]))
  ),
  *(("faults", name, "said", "") for name in real_tree.FAULTS),
  *(("faults", name, "faults", []) for name in ("spin", "leak", "hang", "crash", "loop")),
  *(("faults", f"selfdrived-{name}", "equal", False) for name in (*real_tree.FAULTS, "loop")),
  ("faults", "off", "messages", {"fairObjects": 1}),
  ("faults", "displaced", "resumed_after_s", None),
]


@pytest.mark.parametrize(("step", "name", "what", "value"), BAD, ids=lambda v: str(v)[:24])
def test_each_check_can_fail(tmp_path, step, name, what, value):
  assert "NOT OK" in results(tmp_path, step, (name, what, value))


def test_own_tests_are_compared_one_by_one(tmp_path):
  """As many pass as before and one more; but another one of them."""
  before = {"a": "ok", "b": "ok", "broken": "ERROR"}
  for after, result in (
    ({**before, "new": "ok"}, "ok"),
    ({**before, "b": "ERROR", "c": "ok", "new": "ok"}, "NOT OK"),
    (before, "NOT OK"),
    ({"a": "ok", "new": "ok", "c": "ok", "d": "ok"}, "NOT OK"),
    ({**before, "new": "FAIL"}, "NOT OK"),
  ):
    tree = Told(tmp_path, sys.executable, tmp_path, None, 20.0)
    real_tree.compared(tree, before, after)
    assert [r for _, r, _ in tree.rows] == [result], after


def test_lint_may_say_no_more_than_before(tmp_path):
  old = "error: their.py\n"
  fine, new = (True, ""), "error: selfdrive/modeld/fair/a.py\n"
  for ruff, ty, result in (
    (fine, old, "ok"),
    ((False, "x"), old, "NOT OK"),
    (fine, new, "NOT OK"),
    (fine, old * 2, "NOT OK"),
  ):
    tree = Told(tmp_path, sys.executable, tmp_path, None, 20.0)
    tree.lint_before = {"ruff": (True, ""), "ty": (False, old)}
    real_tree.compare_lint(tree, {"ruff": ruff, "ty": (False, ty)})
    assert result == ("NOT OK" if any(r == "NOT OK" for _, r, _ in tree.rows) else "ok"), (ruff, ty)
