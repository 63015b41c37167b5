"""Which frames are taken and which graphs run: rate, heat, phase, budget. No process and no real clock; test_faults.py
has those."""

import gc
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from fair_bundle import lanes_graph, manifest, objects_graph, write_bundle, write_graphs
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.plan import make_plan
from openpilot.selfdrive.modeld.fair.schedule import CAMERA_RATE, HEAT, JUMPED, REORDERED, FrameSchedule, Verdict

W, H = 1344, 760
STRIDE, Y_HEIGHT, _, SIZE = nv12_info(W, H)
PERIOD_NS = 50_000_000


def verdicts(schedule, ids):
  return [schedule.look(i, i * PERIOD_NS)[0] for i in ids]


def taken(schedule, ids):
  return [i for i in ids if schedule.look(i, i * PERIOD_NS)[0] is Verdict.TAKE]


@pytest.mark.parametrize("rate", [1, 4, 5, 7.5, 10, 15, 20])
def test_rate(rate):
  s = FrameSchedule({"rate": rate})
  got = taken(s, range(100, 2100))
  assert (
    abs(len(got) - 2000 * rate / CAMERA_RATE) <= 1
    and s.dropped == 0
    and s.received == 2000
    and s.not_due == 2000 - len(got)
  )
  assert set(np.diff(got).tolist()) <= {int(s.step), int(np.ceil(s.step))}  # evenly, not in bursts
  assert (
    FrameSchedule({"rate": rate}).budget == pytest.approx(1 / rate)
    and FrameSchedule({"rate": rate, "budget_ms": 30}).budget == 0.03
  )


def test_heat_lowers_the_rate_and_cold_restores_it():
  s = FrameSchedule({"rate": 10})
  counts = {}
  start = 0
  for status in ("ok", "overheated", "critical", "nose", "ok"):
    s.heat(status)
    counts[status] = len(taken(s, range(start, start + 400)))
    start += 400
  assert counts == {"ok": 200, "overheated": 100, "critical": 50, "nose": 200}
  assert set(HEAT) <= {"ok", "overheated", "critical"}


def test_missing_frames_are_drops_only_where_they_were_due():
  s = FrameSchedule({})
  assert verdicts(s, [5, 6, 9]) == [Verdict.TAKE] * 3 and (s.received, s.dropped, s.not_due) == (5, 2, 0)
  s = FrameSchedule({"rate": 5})  # every fourth: of 2..9 that are gone 4 and 8 were due; 10 comes in place of 8
  assert verdicts(s, [0, 1, 10, 11, 12]) == [Verdict.TAKE, Verdict.NOT_DUE, Verdict.TAKE, Verdict.NOT_DUE, Verdict.TAKE]
  assert (s.received, s.dropped, s.not_due) == (13, 1, 9)


def test_duplicates_old_frames_and_new_streams():
  s = FrameSchedule({})
  assert verdicts(s, [7, 7, 9, 8, 9, 10]) == [
    Verdict.TAKE,
    Verdict.AGAIN,
    Verdict.TAKE,
    Verdict.OLD,
    Verdict.AGAIN,
    Verdict.TAKE,
  ]
  assert (s.received, s.dropped) == (4, 1)  # 8 was given up when 9 came; that it came after all is no second drop
  assert (
    s.look(3, 100 * PERIOD_NS)[0] is Verdict.TAKE
  )  # a number that falls with a time that does not: the camera began anew
  assert s.look(3 + JUMPED, 101 * PERIOD_NS) == (Verdict.TAKE, 0) and s.dropped == 1
  assert s.look(3 + JUMPED - REORDERED, 0)[0] is Verdict.TAKE  # a route that is played again: far back in both
  s.begin()
  assert s.look(3, 0)[0] is Verdict.TAKE


def test_a_clock_that_jumps_changes_nothing():
  a, b = FrameSchedule({"rate": 10}), FrameSchedule({"rate": 10})
  r = np.random.default_rng(0)
  for i in range(500):
    assert a.look(i, i * PERIOD_NS) == b.look(i, int(r.integers(0, 2**63)))
  assert (a.received, a.dropped, a.not_due) == (b.received, b.dropped, b.not_due)


@settings(max_examples=100, deadline=None)
@given(
  st.lists(
    st.tuples(st.integers(0, 2**32 - 1) | st.integers(0, 40), st.integers(0, 2**64 - 1) | st.integers(0, 40)),
    max_size=60,
  ),
  st.floats(1, 20),
  st.sampled_from(["ok", "overheated", "critical"]),
)
def test_any_numbers_and_times_leave_the_counts_true(frames, rate, heat):
  s = FrameSchedule({"rate": rate})
  s.heat(heat)
  took = old_or_again = 0
  for frame_id, eof in frames:
    verdict, missed = s.look(frame_id, eof)
    took += verdict is Verdict.TAKE
    old_or_again += verdict in (Verdict.OLD, Verdict.AGAIN)
    assert missed >= 0
  assert s.received == took + s.dropped + s.not_due
  assert not frames or took >= 1 or old_or_again


class Clock:
  """Advances by what its runners cost."""

  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class Costly:
  def __init__(self, runner, clock, cost):
    self.runner, self.clock, self.cost, self.runs = runner, clock, cost, []

  def run(self, inputs):
    self.clock.now += self.cost
    self.runs.append(self.clock.now)
    return self.runner.run(inputs)


def rig(tmp_path, costs, **entry):
  """A bundle with one 'scene' graph per cost (s) -> model, clock, costly runners."""
  write_bundle(tmp_path)
  graphs = []
  for k, more in enumerate(entry.pop("graphs", [{}] * len(costs))):
    graphs.append({**manifest()["graphs"][0], "name": f"g{k}", **more})
  bundle = write_graphs(tmp_path, graphs)
  bundle.manifest.update(entry)
  clock = Clock()
  model = FairModel(bundle, clock)
  model.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT)
  for k, cost in enumerate(costs):
    model.runners[f"g{k}"] = Costly(model.runners[f"g{k}"], clock, cost)
  return model, clock


def frame(model, t):
  return model.process(np.full(SIZE, 100, np.uint8), t, 0, t * PERIOD_NS)


def ran(model, t):
  before = {n: s.runs for n, s in model.stats.items()}
  sent = frame(model, t)
  out = [n for n, s in model.stats.items() if s.runs > before[n]]
  assert ("fairSegmentation" in dict(sent)) == bool(out)
  return out


def test_phases_spread_heavy_graphs_over_frames(tmp_path):
  model, _ = rig(tmp_path, [0.01] * 3, graphs=[{"period": 2}, {"period": 2, "phase": 1}, {"period": 3, "phase": 2}])
  assert [ran(model, t) for t in range(6)] == [["g0"], ["g1"], ["g0", "g2"], ["g1"], ["g0"], ["g1", "g2"]]


def test_heads_have_turns_of_their_own(tmp_path):
  model, _ = rig(tmp_path, [0.01])
  graph = model.plans[0].graph
  graph["outputs"][1].update(period=3, phase=1)
  model.plans[0] = make_plan("here", graph)
  assert ["fairSegmentation" in dict(frame(model, t)) for t in range(6)] == [False, True, False] * 2
  assert model.stats["g0"].runs == 6


def test_a_graph_without_room_is_put_off_not_forgotten(tmp_path):
  model, _ = rig(tmp_path, [0.03, 0.03, 0.01], budget_ms=50)
  assert ran(model, 0) == ["g0", "g1"]  # what g1 takes is not known yet; after it the budget is over
  rows = [ran(model, t) for t in range(1, 13)]
  assert all(len(r) < 3 for r in rows)
  runs = {n: s.runs for n, s in model.stats.items()}
  assert min(runs.values()) >= 6, runs  # they alternate by themselves
  _, state = model.state_message()
  s = state.fairState
  assert [g.late for g in s.graphs] == [model.stats[f"g{k}"].late for k in range(3)] and sum(
    g.late for g in s.graphs
  ) >= 12
  assert s.framesLate == 13 and s.budget == pytest.approx(0.05) and s.rate == 20 and state.valid


def test_a_graph_larger_than_the_budget_still_runs_and_is_counted(tmp_path):
  model, _ = rig(tmp_path, [0.08])
  assert [ran(model, t) for t in range(3)] == [["g0"]] * 3 and model.late == 3
  model, _ = rig(tmp_path, [0.08], rate=10)
  assert [ran(model, t) for t in range(3)] == [["g0"]] * 3 and model.late == 0  # its budget is the period of its rate


def test_without_a_clock_nothing_is_late(tmp_path):
  write_bundle(tmp_path)
  model = FairModel(write_graphs(tmp_path, [manifest()["graphs"][0]]))
  model.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT)
  model.schedule.budget = 1e-9
  frame(model, 0)
  assert model.late == 0


def test_a_lower_rate_is_no_gap(tmp_path):
  graph = lanes_graph(tmp_path)
  model = FairModel(write_graphs(tmp_path, [graph]))
  model.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT)
  model.schedule.rate = 2.0
  for t in range(0, 50, 10):
    frame(model, t)
  assert model.plans[0].inputs["lanes_template"].max() == 5


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda g: g.update(phase=1), r"graph 'lanes' has the phase 1 of a period of 1"),
    (lambda g: g["outputs"][0].update(period=2), "their outputs have no period"),
    (lambda g: g["outputs"][1].update(period=3, phase=3), "output 'lanes_visible' has the phase 3 of a period of 3"),
    (
      lambda g: g["outputs"][1].update(parameters={"part": "points"}),
      "two outputs are part 'points' of the head 'lanes'",
    ),
    (
      lambda g: g["outputs"][1].update(parameters={"part": "nose"}),
      "'lanes_visible' is part 'nose' of the head 'lanes'",
    ),
  ],
)
def test_turns_and_parts_that_cannot_be_are_refused(tmp_path, change, message):
  graph = lanes_graph(tmp_path)
  change(graph)
  with pytest.raises(BundleError, match=message):
    FairModel(write_graphs(tmp_path, [graph]))


def test_another_bundle_goes_on_with_ids_counts_and_calibration(tmp_path):
  raw = {"heat": np.full((1, 3, 32, 64), -9, np.float32), "box": np.full((1, 4, 32, 64), 20, np.float32)}
  raw["heat"][0, 0, 10, 20] = 1
  models = []
  for name in ("old", "new"):
    folder = tmp_path / name
    folder.mkdir()
    models.append(FairModel(write_graphs(folder, [objects_graph(folder, raw)], name)))
  old, new = models
  old.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT)
  old.set_calibration([0.0, 0.02, 0.01], 1.4)
  for t in range(4):
    ids = [o.trackId for o in dict(frame(old, t))["fairObjects"].fairObjects.objects]
  new.follow(old)
  new.set_camera(W, H, STRIDE, STRIDE * Y_HEIGHT)
  assert new.rpy is old.rpy and new.ground.height == 1.4 and new.frames == 4
  for t in range(4, 8):
    sent = dict(frame(new, t))["fairObjects"].fairObjects
  assert [o.trackId > max(ids) for o in sent.objects] == [True] and sent.objects[0].age < 4 and sent.bundle == "new"


def test_decoding_that_fails_costs_its_graph_alone(tmp_path, monkeypatch):
  model, _ = rig(tmp_path, [0.01, 0.01])
  decode = model._decode

  def fail(plan, *args):
    if plan.graph["name"] == "g0":
      raise ZeroDivisionError("a head\nwith a flaw")
    return decode(plan, *args)

  monkeypatch.setattr(model, "_decode", fail)
  sent = frame(model, 0)
  assert "fairSegmentation" in dict(sent) and all(m.valid for _, m in sent)
  assert model.faults == 1 and model.fault == "outputs of graph 'g0' cannot be decoded at frame 0: a head"
  assert not model.stats["g0"].valid and model.stats["g1"].valid and model.invalid == 1


# *** as openpilot's daemons: core, priority, no garbage collection in a frame ***

REALTIME = """
import gc, os, sys
isfile = os.path.isfile
os.path.isfile = lambda p: True if p == "/TICI" else isfile(p)
if sys.argv[1] == "pc":
  os.path.isfile = isfile
if sys.argv[1] == "nobody":
  os.path.isfile = isfile
from openpilot.selfdrive.modeld.fair.ipc import config_realtime_process
from openpilot.selfdrive.modeld.fair.worker import PRIORITY
if sys.argv[1] == "nobody" and os.getuid() == 0:
  os.setuid(65534)
core = max(os.sched_getaffinity(0))
try:
  config_realtime_process(core, PRIORITY)
except PermissionError:
  print("no rights")
  sys.exit()
fifo, pinned = os.sched_getscheduler(0) == os.SCHED_FIFO, os.sched_getaffinity(0) == {core}
print(gc.isenabled(), fifo, os.sched_getparam(0).sched_priority, pinned)
"""


def realtime(where):
  r = subprocess.run([sys.executable, "-c", REALTIME, where], capture_output=True, text=True, timeout=60)
  assert r.returncode == 0, r.stderr
  return r.stdout.split()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="core affinity is Linux's")
def test_core_and_priority_on_a_device():
  got = realtime("device")
  if got == ["no", "rights"]:
    pytest.skip("this machine gives no real-time priority")
  assert got == ["False", "True", "50", "True"]


@pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="scheduling policies are Linux's")
@pytest.mark.parametrize("who", ["pc", "nobody"])
def test_on_a_pc_nothing_needs_rights(who):
  got = realtime(who)
  assert got[:3] == ["False", "False", "0"]


def test_priority_is_below_modelds():
  from openpilot.common.realtime import Priority
  from openpilot.selfdrive.modeld.fair.worker import PRIORITY

  assert 0 < PRIORITY < Priority.MODEL


def test_garbage_goes_between_frames_and_what_lives_is_not_looked_at(tmp_path, prefix):
  """fairState's collection finds a cycle of any age, and costs nothing for what the bundle made."""
  from openpilot.selfdrive.modeld.fair.worker import FairModeld

  daemon = FairModeld(lambda: tmp_path, None)
  try:
    daemon.take(FairModel(write_bundle(tmp_path)))
    assert gc.get_freeze_count() > 1000
    a = SimpleNamespace()
    a.self = a
    gc.collect(0)
    gc.collect(1)  # it is old now
    alive = len(gc.get_objects())
    del a
    daemon.send_state("running")
    assert len(gc.get_objects()) <= alive
  finally:
    gc.unfreeze()
    daemon.pm.close()
    daemon.inbox.sm.close()
