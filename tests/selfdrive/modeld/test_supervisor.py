"""What a worker can do to its supervisor, and the supervisor's end: mostly with workers of a few lines; then the real
one, with graphs that never return."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fair_bundle import write_bundle, write_loop
from fair_rig import DEADLINE, Rig, children, wait
from openpilot.selfdrive.modeld.fair import child
from openpilot.selfdrive.modeld.fair.supervisor import BACKOFF, MAX_BACKOFF

ROOT = Path(__file__).resolve().parents[3]
linux = pytest.mark.skipif(sys.platform != "linux", reason="by /proc and prctl")

RUN = """
import json, sys
from openpilot.selfdrive.modeld.fair import fairmodeld, supervisor
settings = json.loads(sys.argv[1])
supervisor.BACKOFF = settings.pop("backoff", 0.05)
supervisor.LIMITS.update(settings.pop("limits", {}))
if "worker" in settings:
  command = [sys.executable, "-P", "-c", settings.pop("worker")]
  trial = lambda path, runner: [sys.executable, "-P", "-c", path]
  raise SystemExit(supervisor.Supervisor(command, trial, **settings).run())
raise SystemExit(fairmodeld.main(sys.argv[2:]))
"""
LINKED = """
import os, signal, sys, time
from openpilot.selfdrive.modeld.fair.link import Link
signal.signal(signal.SIGINT, lambda *_: os._exit(0))
link = Link()
print("begins", os.getpid(), link.ends, link.ended, link.refused, file=sys.stderr, flush=True)
def live():
  while True:
    link.beat()
    time.sleep(.02)
"""


class Run:
  """A supervisor with a worker of a few lines, and what both say."""

  def __init__(self, tmp_path, worker, **settings):
    self.log = tmp_path / "stderr"
    with open(self.log, "wb") as f:
      self.proc = subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps({"worker": LINKED + worker, **settings})], stderr=f, cwd=ROOT
      )

  def said(self):
    return self.log.read_text(errors="replace")

  def begun(self, n):
    """Until the n-th worker begins: all pids."""
    return wait(
      lambda: (
        len(pids := [int(w.split()[1]) for w in self.said().splitlines() if w.startswith("begins ")]) >= n and pids
      ),
      f"{n} workers",
    )

  def says(self, text):
    wait(lambda: text in self.said() or self.proc.poll() is not None, f"'{text}'")
    assert text in self.said(), self.said()
    assert self.proc.poll() is None

  def end(self, sig=signal.SIGINT):
    if self.proc.poll() is None:
      self.proc.send_signal(sig)
    code = self.proc.wait(DEADLINE)
    assert not any(gone(p) is False for p in self.begun(0) or [])
    return code


@pytest.fixture
def run(tmp_path):
  runs = []

  def begin(worker, **settings):
    runs.append(Run(tmp_path, worker, **settings))
    return runs[-1]

  yield begin
  for r in runs:
    assert r.end() == 0 and "Traceback" not in r.said(), r.said()


def gone(pid):
  """Whether no such process runs; a zombie is none."""
  try:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
  except OSError:
    return True


def test_the_supervisor_holds_nothing_that_can_fail():
  code = """
import sys, openpilot.selfdrive.modeld.fair.fairmodeld
print(*{'numpy', 'capnp', 'onnxruntime', 'tinygrad'} & set(sys.modules))
"""
  assert (
    subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    == ""
  )


# *** what a worker can do ***


@linux
def test_killed_again_and_again(run):
  r = run("live()")
  for n in range(1, 5):
    pid = r.begun(n)[-1]
    assert len(children(r.proc.pid)) == 1  # no zombie of those before
    os.kill(pid, signal.SIGKILL)
  r.begun(5)
  lines = [w for w in r.said().splitlines() if w.startswith("begins ")]
  assert " 0  {}" in lines[0] and f" 4 the process before this one {child.ended(-signal.SIGKILL)} {{}}" in lines[4]
  waits = [float(w.split()[-2]) for w in r.said().splitlines() if "starting again in" in w]
  assert waits == pytest.approx([0.05, 0.1, 0.2, 0.4]) and BACKOFF == 0.5 and MAX_BACKOFF == 10.0


def test_an_end_is_told_with_what_it_mostly_means():
  assert (
    child.ended(-signal.SIGKILL)
    == "was killed by SIGKILL (out of memory, by hand, or RLIMIT_RTTIME at real-time priority; dmesg tells of memory)"
  )
  assert child.ended(-signal.SIGXCPU) == "was killed by SIGXCPU (3 s at real-time priority without once waiting)"
  assert child.ended(-signal.SIGSEGV) == "was killed by SIGSEGV" and child.ended(3) == "ended with exit code 3"


@linux
def test_who_never_waits_at_real_time_priority_is_told_from_the_others(run):
  """The kernel's soft limit sends SIGXCPU, its hard one SIGKILL, which could be anybody's."""
  r = run("""
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
print("limits", soft, hard, file=sys.stderr, flush=True)
resource.setrlimit(resource.RLIMIT_RTTIME, (200_000, hard))
try:
  os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except PermissionError:
  print("not permitted", file=sys.stderr, flush=True)
  live()
while True:
  pass
""")
  r.begun(1)
  wait(lambda: "not permitted" in r.said() or "its process" in r.said(), "an end")
  assert "limits 3000000 4000000" in r.said()
  if "not permitted" in r.said():
    pytest.skip("real-time priority is not permitted here")
  r.says("its process was killed by SIGXCPU (3 s at real-time priority without once waiting)")


@linux
def test_a_runner_that_crashes(run):
  r = run("import ctypes; link.beat(); ctypes.string_at(0)")
  r.begun(3)
  r.says("its process was killed by SIGSEGV; starting again")


def test_a_worker_that_raises(run):
  r = run("link.beat(); os._exit(7)")
  r.says("its process ended with exit code 7; starting again")


@linux
def test_memory_that_is_its_own(run):
  """RLIMIT_DATA: at once, however fast it takes it."""
  r = run(
    """
link.beat()
kept = []
try:
  while True:
    kept.append(bytearray(b'x' * 10_000_000))
except MemoryError:
  held = int(open('/proc/self/statm').read().split()[1]) * 4096
  print('refused at', held, file=sys.stderr, flush=True)
  live()
""",
    memory=200_000_000,
  )
  r.says("refused at")
  assert int(r.said().split("refused at")[1].split()[0]) < 230_000_000
  r.says("of the 200 MB that it may and was ended")  # at its limit it would fail for ever
  r.begun(2)


@linux
def test_memory_that_is_shared(run):
  r = run(
    """
import mmap
m = mmap.mmap(-1, 300_000_000)
link.beat()
for i in range(0, len(m), 4096): m[i] = 1
live()
""",
    memory=200_000_000,
  )
  r.says("of the 200 MB that it may and was ended")
  r.begun(2)


def test_a_bundle_that_hangs_is_refused_in_the_end(run):
  r = run(
    """
if "abc" in link.refused:
  link.beat()
  live()
link.loading("abc")
while True: pass
""",
    limits={"load": 0.3},
  )
  r.says("its process did not load its bundle within 0.3 s and was ended")
  r.begun(3)
  r.says("{'abc': 'hung 2 times: it did not load its bundle within 0.3 s'}")
  assert r.said().count("starting again") == 2


@linux
def test_silent_at_the_start_and_in_a_frame(run):
  r = run(
    """
if link.ends == 0: time.sleep(600)
link.running("abc")
if link.ends == 1: time.sleep(600)
live()
""",
    limits={"start": 1.5, "run": 1.0},
  )
  r.says("did not start within 1.5 s and was ended")
  r.says("did not come back from a frame within 1 s and was ended")
  pid = r.begun(3)[-1]
  time.sleep(1.5)
  assert not gone(pid)  # one that beats stays


@linux
def test_a_pipe_that_is_closed(run):
  r = run("link.beat(); os.close(link.write); time.sleep(600)")
  r.says("closed its pipe and was ended")


@linux
def test_what_it_left_behind_goes_with_it(run, tmp_path):
  r = run(f"""
import subprocess
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open({str(tmp_path / "left")!r}, "a") as f: f.write(f"{{p.pid}} ")
link.beat()
os._exit(3)
""")
  r.begun(3)
  left = (tmp_path / "left").read_text().split()
  wait(lambda: all(gone(int(p)) for p in left[:2]), "end of what the first two left")


@linux
def test_it_yields_to_others_and_is_the_first_to_go(run):
  r = run("live()", memory=500_000_000)
  pid = r.begun(1)[0]
  limits = {w[:25].strip(): w[25:].split()[:2] for w in Path(f"/proc/{pid}/limits").read_text().splitlines()}
  assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
  assert limits["Max data size"] == ["500000000", "500000000"] and limits["Max core file size"] == ["0", "0"]
  assert limits["Max realtime timeout"] == [str(child.RT_LIMIT), str(child.RT_LIMIT + child.RT_GRACE)]
  assert os.getpriority(os.PRIO_PROCESS, pid) == os.getpriority(os.PRIO_PROCESS, 0) + 5 and os.getpgid(
    pid
  ) == pid != os.getpgid(r.proc.pid)


# *** the supervisor's own end ***


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on(run, tmp_path, sig):
  r = run(f"""
import signal
def end(s, _):
  with open({str(tmp_path / "got")!r}, "w") as f: f.write(signal.Signals(s).name)
  raise SystemExit
signal.signal(signal.SIGINT, end); signal.signal(signal.SIGTERM, end)
print("ready", file=sys.stderr, flush=True)
live()
""")
  r.says("ready")
  assert r.end(sig) == 0 and (tmp_path / "got").read_text() == sig.name


@linux
def test_a_worker_that_hears_no_signal_is_killed(run):
  r = run(
    """
import signal
for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.SIG_IGN)
print("ready", file=sys.stderr, flush=True)
while True: pass
""",
    grace=0.2,
  )
  r.says("ready")
  pid = r.begun(1)[0]
  assert r.end() == 0 and gone(pid)


@linux
def test_the_worker_dies_with_its_supervisor(tmp_path):
  r = Run(tmp_path, "while True: pass")
  pid = r.begun(1)[0]
  r.proc.kill()
  r.proc.wait()
  wait(lambda: gone(pid), "the worker's end")


def test_by_hand_what_cannot_begin_ends_it(tmp_path):
  hangs = "link.loading('a'); time.sleep(600)"
  for worker, code, said in (
    ("sys.exit(2)", 2, ""),
    ("sys.exit(0)", 0, ""),
    (hangs, 2, "error: the process did not load its bundle"),
  ):
    r = Run(tmp_path, worker, by_hand=True, limits={"load": 0.2})
    assert r.proc.wait(DEADLINE) == code and said in r.said() and r.said().count("\n") == 1 + bool(said)
  r = Run(tmp_path, "link.beat(); time.sleep(.5); sys.exit(2)", by_hand=True)  # once it ran, it is kept running
  r.begun(2)
  assert r.end() == 0


def test_a_trial_run_is_told(run):
  r = run(
    """
link.beat()
for path in (
  "print('ok abc')", "print('error: no graph'); raise SystemExit(2)", "import os; os.kill(os.getpid(), 11)",
  "while True: pass", "print('no')",
):
  link.try_out(path, None)
  while (a := link.answer()) is None:
    link.beat()
    time.sleep(.02)
  assert a["path"] == path
  print("answer", a["hash"], a["error"], file=sys.stderr, flush=True)
live()
""",
    limits={"trial": 4.0},  # a busy machine starts a process in one
  )
  r.says("its trial run ended with exit code 0")
  assert [w.removeprefix("answer ") for w in r.said().splitlines() if w.startswith("answer")] == [
    "abc None",
    "None no graph",
    "None its trial run was killed by SIGSEGV",
    "None its trial run did not end within 4 s",
    "None its trial run ended with exit code 0",
  ]


def test_nothing_of_the_working_folder_is_run(tmp_path):
  """Neither by the worker nor by a trial run: a route's folder may hold a numpy.py."""
  for name in ("numpy", "capnp", "json", "onnxruntime"):
    (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)")
  env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | {"PYTHONPATH": str(ROOT)}
  for module, *args in (["fairmodeld", "--bundle", "nowhere"], ["trial", "nowhere"]):
    r = subprocess.run(
      child.python(f"openpilot.selfdrive.modeld.fair.{module}", *args),
      cwd=tmp_path,
      env=env,
      capture_output=True,
      text=True,
    )
    assert r.returncode == 2 and "no bundle at nowhere" in r.stderr + r.stdout
  assert not (tmp_path / "ran").exists()
  assert child.environment(PYTHONPATH=f"{os.pathsep}.{os.pathsep}/a")["PYTHONPATH"].split(os.pathsep) == [
    str(ROOT),
    "/a",
  ]


# *** the real worker ***


def supervised(**settings):
  return [sys.executable, "-c", RUN, json.dumps(settings)]


@linux
def test_killed_and_fairState_says_why(tmp_path, prefix):
  rig = Rig(write_bundle(tmp_path / "tiny").path)
  try:
    rig.camera()
    for n in (1, 2):
      rig.flows()
      os.kill(rig.worker, signal.SIGKILL)
      rig.until(lambda sm, n=n: sm["fairState"].faultCount == n, "fairState of the next")
      assert rig.sm["fairState"].fault == f"the process before this one {child.ended(-signal.SIGKILL)}"
    rig.flows()
  finally:
    err = rig.close()
  assert rig.proc.returncode == 0 and "Traceback" not in err
  assert not any((tmp_path / "params" / prefix).iterdir())  # it writes no param


@pytest.mark.slow
def test_a_new_bundle_that_never_returns_is_refused_and_the_old_one_goes_on(tmp_path, prefix):
  rig = Rig(write_bundle(tmp_path / "tiny").path, command=supervised(limits={"trial": 2.0}))
  try:
    rig.camera()
    rig.flows()
    write_loop(tmp_path / "loop", "loop")
    (tmp_path / "tiny").rename(tmp_path / "old")
    (tmp_path / "loop").rename(tmp_path / "tiny")
    rig.fault("bundle 'tiny' goes on: its trial run did not end within 2 s")
    rig.flows()
    assert rig.sm["fairState"].bundle == "tiny" and rig.sm["fairState"].faultCount == 1
  finally:
    rig.close()


@pytest.mark.slow
def test_a_frame_that_never_ends(tmp_path, prefix):
  """Its trial frames return, that one does not: the worker is ended and started again; the second time its bundle is
  refused, until it is another one."""
  rig = Rig(write_loop(tmp_path / "tiny", level=77).path, command=supervised(limits={"run": 4.0}))
  try:
    rig.camera()
    rig.level = 10
    rig.flows()
    first, rig.level = rig.worker, 77
    rig.until(lambda _: first not in children(rig.proc.pid), "end of a worker that hangs")
    rig.level = 10
    rig.fault("the process before this one did not come back from a frame within 4 s and was ended")
    rig.level = 77
    rig.fault(
      "bundle 'tiny' hung 2 times: it did not come back from a frame within 4 s; it is refused until its files change"
    )
    write_bundle(tmp_path / "tiny", name="again")
    rig.until(lambda sm: sm["fairState"].bundle == "again", "a bundle that runs")
    rig.flows()
  finally:
    rig.close()


def test_the_worker_gets_what_msgq_sets_by_c_alone():
  """process_replay's fake events: without them a worker waits for real ones, and the replay for ever."""
  code = """
import ctypes, os
ctypes.CDLL(None).setenv(b"CEREAL_FAKE_PREFIX", b"replay", 1)
from openpilot.selfdrive.modeld.fair.child import environment
assert "CEREAL_FAKE_PREFIX" not in os.environ
assert environment()["CEREAL_FAKE_PREFIX"] == "replay" and "CEREAL_FAKE" not in environment()
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


FLOOD = """
import signal
from openpilot.selfdrive.modeld.fair import supervisor
s = supervisor.Supervisor([], lambda *_: [])
def turn(wake):
  for _ in range(70_000):   # more than a pipe holds
    signal.raise_signal(signal.SIGTERM)
  return 5
s.turn = turn
print(s.run(), s.signals)
"""


@linux
def test_a_flood_of_signals_is_counted_in_silence():
  r = subprocess.run([sys.executable, "-c", FLOOD], cwd=ROOT, capture_output=True, text=True)
  assert (r.stdout, r.stderr) == ("5 70000\n", "")
