#!/usr/bin/env python3
"""The whole of it in a real openpilot checkout: lays fairmodeld in, builds what that changes, runs it under openpilot's
own programs, and takes it out again.

OPENPILOT_DIR=~/openpilot python tests/overlay/real_tree.py

python tests/overlay/real_tree.py ~/openpilot --route ~/routes/ROUTE --only frames,replay

The checkout is the user's: clean (no changes that are not committed), set up and built as its own README says. Its
Python is .venv/bin/python in it, or OPENPILOT_PYTHON. With --route FOLDER/ROUTE (a folder with segments ROUTE--0,
ROUTE--1 ... that hold qlog and qcamera.ts) its frames and messages are used, and openpilot's own replay plays it;
without, a drawn road. What the checks write lies in --out. Prints a table; exit code 1 where something is not as it
must be."""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SERVICES = "fairState,fairDepth,fairObjects,fairSegmentation,fairLanes,fairFeatures"
FAULTS = ("spin", "leak", "flood", "hang", "crash")
FAULT_SEEN = {"spin": "ended", "leak": "MB", "hang": "ended", "crash": "SIGSEGV"}  # what fairState says afterwards, too
SUBMODULES = ("msgq_repo", "opendbc_repo", "rednose_repo", "tinygrad_repo", "teleoprtc_repo")
ANSWERED = 580 / 589  # of the frames from openpilot's own replay
LOG_MB = 1.0  # a minute of all our services in the rlog
STOPS = 5.0  # s that the manager gives a process to end


class Failed(Exception):
  """A check could not be carried out; the message says what came."""


@dataclass
class Tree:
  root: Path
  python: str
  out: Path
  route: Path | None
  seconds: float
  rows: list[tuple[str, str, str]] = field(default_factory=list)
  lint_before: dict[str, tuple[bool, str]] | None = None

  @property
  def package(self) -> str:
    return "openpilot/" if (self.root / "openpilot/cereal/log.capnp").is_file() else ""

  def env(self) -> dict[str, str]:
    path = [self.root, *(self.root / s for s in SUBMODULES if (self.root / s).is_dir())]
    bin_folder = str(Path(self.python).absolute().parent)
    more = {
      "PYTHONPATH": os.pathsep.join(map(str, path)),
      "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
      "OMP_NUM_THREADS": "1",
      "PWD": str(self.root),
    }
    return {**{k: v for k, v in os.environ.items() if k not in ("OPENPILOT_PREFIX", "VIRTUAL_ENV")}, **more}

  def logs(self) -> list[Path]:
    """Of the route's first two segments, the rlog, else the qlog: selfdrived's drive."""
    segments = sorted(self.route.parent.glob(f"{self.route.name}--*"))[:2] if self.route else []
    return [max(found) for folder in segments if (found := list(folder.glob("[qr]log*")))]

  def run(
    self, command: list[str], timeout: float, check: bool = True, more: dict[str, str] | None = None
  ) -> subprocess.CompletedProcess[str]:
    """A command in the checkout, in its environment."""
    try:
      done = subprocess.run(
        command,
        cwd=self.root,
        env={**self.env(), **(more or {})},
        timeout=timeout,
        capture_output=True,
        text=True,
        errors="replace",
      )
    except subprocess.TimeoutExpired as e:
      raise Failed(f"{' '.join(command[:3])} did not end within {timeout:g} s") from e
    except FileNotFoundError as e:
      raise Failed(f"{command[0]} is not there") from e
    if check and done.returncode:
      raise Failed(f"{' '.join(command[:3])}: exit code {done.returncode}: {last_lines(done.stdout + done.stderr)}")
    return done

  def check(self, script: str, name: str, *args: str, timeout: float = 240) -> dict[str, Any]:
    """Runs a script of in_tree/; what it found."""
    out = self.out / name
    done = self.run([self.python, str(HERE / "in_tree" / script), *args, "--out", str(out)], timeout, check=False)
    out.mkdir(exist_ok=True, parents=True)
    (out / "said.txt").write_text(done.stdout + done.stderr)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
      raise Failed(f"{script} said nothing: {last_lines(done.stderr)}")
    return {**json.loads(found[-1].removeprefix("RESULT ")), "said": done.stdout + done.stderr}

  def git(self, *args: str) -> str:
    return self.run(["git", *args], 60).stdout

  def row(self, what: str, ok: bool | None, figure: str) -> None:
    """ok: None where the check was left out; the figure says why."""
    result = "left out" if ok is None else "ok" if ok else "NOT OK"
    self.rows.append((what, result, figure))
    print(f"{result:8} {what}: {figure}", flush=True)

  @property
  def linter(self) -> Path:
    return self.root / "scripts/lint/lint.sh"


def last_lines(text: str, n: int = 3) -> str:
  return " | ".join(line for line in text.strip().splitlines()[-n:])


def overlay(tree: Tree, *args: str) -> subprocess.CompletedProcess[str]:
  env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
  return subprocess.run(
    [sys.executable, "-m", "openpilot.tools.install.overlay", str(tree.root), *args],
    env=env,
    capture_output=True,
    text=True,
    cwd=tree.out,
  )


# *** the checks, in their order ***


def own_tests(tree: Tree) -> dict[str, str]:
  """The checkout's own tests of what is edited: each by its name -> "ok", "skipped", "FAIL", "ERROR".

  unittest runs them where they are written for it (since July 2026), pytest before. Not tools/test_runner.py: on Python
  3.12.1, whose unittest ends a skipped test that it did not begin, it loses the batch around that test."""
  p = tree.package
  targets = [f"{p}cereal/messaging/tests", f"{p}common/tests/test_params.py", f"{p}system/manager/test/test_manager.py"]
  files = [
    f
    for t in targets
    for f in (sorted((tree.root / t).glob("test_*.py")) if (tree.root / t).is_dir() else [tree.root / t])
    if f.exists()
  ]
  names = [str(f.relative_to(tree.root)) for f in files]
  if (tree.root / "tools/test_runner.py").is_file():
    command = ["-m", "unittest", "-v", *(n.removesuffix(".py").replace("/", ".") for n in names)]
    pattern = re.compile(r"^(\w+ \([\w.]+\))(.*?)(?=^\w+ \([\w.]+\)|^={20}|^-{20}|\Z)", re.M | re.S)
  else:
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-o", "addopts=", *names]
    pattern = re.compile(r"^(\S+::\S+)([^\n]*)$", re.M)
  done = tree.run([tree.python, *command], 600, check=False)
  text = done.stdout + done.stderr
  (tree.out / f"own_tests{len(list(tree.out.glob('own_tests*')))}.txt").write_text(text)
  found: dict[str, str] = {}
  for name, rest in pattern.findall(text):
    if (result := re.findall(r"\b(ok|skipped|FAIL|ERROR|PASSED|SKIPPED|FAILED)\b", rest)) and name not in found:
      found[name] = {"PASSED": "ok", "SKIPPED": "skipped", "FAILED": "FAIL"}.get(result[-1], result[-1])
  if not found:
    raise Failed(f"its own tests did not run: {last_lines(text)}")
  return found


def compared(tree: Tree, before: dict[str, str], after: dict[str, str]) -> None:
  """Each test that passed passes; tests are numbered by the services, of which there are more now."""
  worse = [name for name, result in before.items() if result == "ok" and after.get(name) != "ok"]
  failing = [
    name for name, result in after.items() if result not in ("ok", "skipped") and before.get(name) in (None, "ok")
  ]
  tree.row(
    "its own tests of messaging, params and manager",
    not worse and not failing and len(after) > len(before),
    f"before: {words(before)}; after: {words(after)}"
    + (f"; worse: {', '.join(sorted({*worse, *failing})[:5])}" if worse or failing else ""),
  )


def words(results: dict[str, str]) -> str:
  return ", ".join(f"{n} {what}" for what, n in Counter(results.values()).items())


def build(tree: Tree) -> None:
  p = tree.package
  targets = [f"{p}common", f"{p}cereal", "msgq_repo", "fair"]
  targets += [t for t in (f"{p}tools/replay/replay", f"{p}system/loggerd/loggerd") if (tree.root / t).is_file()]
  begin = time.monotonic()
  done = tree.run(
    [
      str(Path(tree.python).parent / "scons") if (Path(tree.python).parent / "scons").is_file() else "scons",
      "-j2",
      *targets,
    ],
    3600,
  )
  (tree.out / "scons.txt").write_text(done.stdout + done.stderr)
  compiled = [line for line in done.stdout.splitlines() if "graph '" in line]
  built = [
    f for f in (tree.root / f"{p}selfdrive/modeld/fair/built").rglob("*") if f.is_file() and ".stamps" not in f.parts
  ]
  tree.row(
    "scons of schema, params and bundle",
    bool(built) and done.stdout.rstrip().endswith("done building targets."),
    f"{time.monotonic() - begin:.0f} s; {len(built)} files in built/; "
    f"{'; '.join(compiled) or 'nothing was to be compiled'}",
  )


def installed(tree: Tree) -> None:
  first = overlay(tree, "--check")
  untouched = not tree.git("status", "--short")
  done = overlay(tree)
  if done.returncode:
    raise Failed(f"overlay: {last_lines(done.stdout + done.stderr)}")
  again = overlay(tree, "--check")
  entries = len(tree.git("status", "--short").splitlines())
  what = "nothing" if again.returncode == 0 else "something"
  tree.row(
    "overlay",
    (first.returncode, again.returncode) == (1, 0) and untouched and entries > 0,
    f"{entries} entries in git status; --check before it: exit code {first.returncode}, nothing written; afterwards it "
    f"has {what} to do",
  )


def frames(tree: Tree) -> None:
  r = tree.check("live.py", "frames", "--seconds", str(tree.seconds), "--no-stand-in")
  log = r["loggerd"]
  size = log["mb_per_minute"]["all"] if log else 0.0
  ok = (
    r["frames_answered"] >= 0.95 * r["frames"] > 0
    and not not_valid(r)
    and not r["should_but_does_not"]
    and not r["left_running"]
  )
  ok = (
    ok
    and sum(r["submaster_seen"].values()) > 0
    and r["manager_states"] > 0
    and r["stopped_in_s"] < STOPS
    and size <= LOG_MB
  )
  tree.row(
    "frames by its VisionIpcServer under its manager",
    ok,
    "; ".join(
      (
        f"{r['frames_answered']} of {r['frames']} frames answered",
        f"{sum(r['submaster_seen'].values())} messages by its SubMaster",
        f"{r['cpu_ms_per_frame']} ms of CPU a frame",
        f"{r['memory_mb']} MB resident, {r['memory_own_mb']} its own",
        f"stops in {r['stopped_in_s']} s",
        load(),
      )
    ),
  )
  logs = sum(r["submaster_seen"].get(s, 0) for s in (log or {"mb_per_minute": {}})["mb_per_minute"] if s != "all")
  tree.row(
    "its loggerd's rlog of that, read by its LogReader",
    log["messages"] > 0.9 * logs > 0 and size <= LOG_MB if log else None,
    f"{log['messages']} messages, {log['mb_per_minute']} MB a minute" if log else "its loggerd is not built",
  )


def not_valid(r: dict[str, Any]) -> dict[str, int]:
  """Messages that say they are not valid; fairState does until a bundle is loaded."""
  return {s: n for s, n in r["invalid"].items() if s != "fairState"}


def load() -> str:
  return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def replay(tree: Tree) -> None:
  source = tree.root / f"{tree.package}tools/replay/replay.cc"
  if tree.route is None or not source.with_suffix("").is_file():
    tree.row("its own replay", None, "no --route, or tools/replay is not built")
    return
  edited = "begin openpilot-fair" in source.read_text()
  for name, more in (("--block", ["--block", SERVICES]), ("no --block", [])):
    r = tree.check(
      "cpp_replay.py",
      f"replay{name.replace(' ', '')}",
      "--route",
      str(tree.route),
      "--seconds",
      str(tree.seconds + 10),
      *more,
    )
    sizes = (r["loggerd"] or {}).get("mb_per_minute") or r["mb_per_minute"] or {}
    ok = r["alive"] and sizes.get("all", 0) <= LOG_MB
    if more or edited:
      ok = (
        ok
        and r["sent"] > 0.9 * 20 * tree.seconds
        and r["answered"] >= ANSWERED * r["frames"] > 0
        and r["first_answer_s"] < 5
        and not not_valid(r)
      )
    if not more:
      ok = ok and r["resumed_messages"] > 0
    tail = f"rlog {sizes} MB a minute" if more else f"{r['resumed_messages']} messages after it ended"
    tree.row(
      f"its own replay, {name}{'' if more or edited else ' and not edited'}",
      ok,
      "; ".join(
        (
          f"{r['answered']} of {r['frames']} frames (the first {r['first_answer_s']} s after replay's)",
          f"camera {r['camera']}",
          f"{r['cpu_ms_per_frame']} ms of CPU a frame",
          f"not valid {not_valid(r) or 'none'}",
          tail,
          load(),
        )
      ),
    )


def process_replay(tree: Tree) -> None:
  r = tree.check("replays.py", "process_replay", "fairmodeld")
  tree.row(
    "process_replay of fairmodeld, twice",
    r["equal"] and r["answered"] == r["frames"] > 0 and not r["invalid"] and r["one_changed_is_seen"],
    f"{r['answered']} of {r['frames']} frames, {sum(r['messages'].values())} messages, "
    f"{'equal' if r['equal'] else r['differences']}",
  )


def same_events(tree: Tree, name: str, run: Path, control: bool = False) -> tuple[bool, str]:
  """selfdrived's process_replay with the managerState and frameDropPerc of a run, against its events without
  fairmodeld."""
  args = [
    "selfdrived",
    "--states",
    str(run / "managerState"),
    "--model",
    str(run / "modelV2"),
    *(["--control"] if control else []),
  ]
  for log in tree.logs():
    args += ["--log", str(log)]
  r = tree.check("replays.py", f"selfdrived-{name}", *args)
  ok = r["equal"] and r["ours_in_states"] > 0 and r["without"]["states"].get("enabled", 0) > 0
  steps = r["without"]["states"]
  figure = f"selfdrived's events {'equal' if r['equal'] else r['with']['names']}"
  figure += f" ({sum(steps.values())} steps of a {r['drive']} drive, {steps.get('enabled', 0)} enabled)"
  if control:
    raised = {who: r[f"{who} dead"]["names"].get("processNotRunning", 0) for who in ("plannerd", "fairmodeld")}
    ok = ok and raised["plannerd"] > 0 and not raised["fairmodeld"]
    figure += (
      f"; processNotRunning of a dead plannerd {raised['plannerd']}, of a dead fairmodeld {raised['fairmodeld']}"
    )
  return ok, figure


def killed(tree: Tree) -> None:
  r = tree.check("live.py", "killed", "--seconds", "30", "--kill", "2")
  ok, events = same_events(tree, "killed", tree.out / "killed", control=True)
  ok = (
    ok
    and not r["should_but_does_not"]
    and r["manager_states"] > 40
    and r["kills"] > 3
    and r["frames_answered"] > 0
    and not r["left_running"]
  )
  tree.row(
    "kill -9 of the worker every 2 s",
    ok,
    f"{r['kills']} kills in 30 s (back-off between), {r['should_but_does_not']} of {r['manager_states']} managerStates "
    f"with it not running; {events}",
  )
  r = tree.check("live.py", "killed-all", "--seconds", "10", "--kill", "4", "--kill-all")
  tree.row(
    "control: kill -9 of the supervisor is seen in managerState",
    r["kills"] > 0 and r["should_but_does_not"] > 0,
    f"{r['should_but_does_not']} of {r['manager_states']} managerStates with it not running",
  )


def harmless(tree: Tree) -> None:
  base = tree.check("live.py", "off", "--seconds", "20", "--no-fair")
  tree.row(
    "without fairmodeld: the stand-in for modeld", undisturbed(base) and not sum(base["messages"].values()), said(base)
  )
  for fault in FAULTS:
    r = tree.check("live.py", fault, "--seconds", "25", "--fault", fault)
    came = f"fault: {fault}" in r["said"] and FAULT_SEEN.get(fault, "") in " ".join(r["faults"])
    gone_wrong(tree, fault, r, came)
  try:
    bundle = loop_bundle(tree.out / "models")
  except ImportError as e:
    tree.row("worker gone wrong: a graph with a Loop", None, f"writing it needs {e.name}")
  else:
    r = tree.check("live.py", "loop", "--seconds", "35", "--bundle", str(bundle), "--stuck")
    gone_wrong(tree, "loop", r, "did not come back from a frame" in " ".join(r["faults"]))
  r = tree.check("live.py", "displaced", "--seconds", "20", "--displace", "4")
  tree.row(
    "another publisher for 4 s",
    r["resumed_after_s"] is not None and not r["should_but_does_not"] and undisturbed(r),
    f"resumed {r['resumed_after_s']} s after it ended; {said(r)}",
  )


def gone_wrong(tree: Tree, fault: str, r: dict[str, Any], came: bool) -> None:
  ok, events = same_events(tree, fault, tree.out / fault)
  ok = (
    ok
    and came
    and undisturbed(r)
    and not r["should_but_does_not"]
    and r["manager_states"] > 20
    and not r["left_running"]
  )
  tree.row(
    f"worker gone wrong: {fault}",
    ok,
    f"{said(r)}; {'' if came else 'THE FAULT DID NOT COME; '}fairState said {r['faults'][:2] or 'nothing'}; {events}",
  )


def loop_bundle(models: Path) -> Path:
  """A bundle whose graph never returns from the first frame of the drawn road, whose sky is 200, and returns from its
  trial frames."""
  sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests/selfdrive/modeld")]
  from fair_bundle import write_loop

  return write_loop(models / "loop", "loop", level=200).path


def undisturbed(r: dict[str, Any]) -> bool:
  """The stand-in for modeld took the frames and dropped next to none. Without rights to real-time priority it waits for
  whatever runs on this machine."""
  return r["stand_in_frames"] > 0 and (
    not r["real_time"] or (r["stand_in_frames"] >= 0.98 * r["frames"] and r["frame_drop_perc_max"] <= 1)
  )


def said(r: dict[str, Any]) -> str:
  rights = "" if r["real_time"] else " (no rights for real-time priority)"
  drops = "-" if r["frame_drop_perc_max"] is None else f"{r['frame_drop_perc_max']:.2f}"
  return f"stand-in took {r['stand_in_frames']} of {r['frames']} frames, frameDropPerc at most {drops}{rights}"


def linted(tree: Tree) -> dict[str, tuple[bool, str]] | None:
  """The checkout's own lint.sh, of all files that are not ignored: each tool -> (passed, what it said). None where it
  has none."""
  if not tree.linter.is_file():
    return None
  index = {"GIT_INDEX_FILE": str(tree.out / "index")}  # it goes by git ls-files: an index of its own lists ours, too
  for command in (["read-tree", "HEAD"], ["add", "-A"]):
    tree.run(["git", *command], 60, more=index)
  done = tree.run(["bash", str(tree.linter)], 600, check=False, more=index)
  text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
  parts = re.split(r"^(\w+)\.{3,}\[(.)\]$", text, flags=re.M)
  found = {name: (mark == "✔", said) for name, mark, said in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)}
  (tree.out / f"lint{len(list(tree.out.glob('lint*')))}.txt").write_text(text + done.stderr)
  if not found:
    raise Failed(f"its linter said nothing: {last_lines(done.stdout + done.stderr)}")
  return found


def lint(tree: Tree) -> None:
  after = linted(tree)
  if after is None or tree.lint_before is None:
    tree.row("its lint.sh", None, "it has none")
  else:
    compare_lint(tree, after)


def compare_lint(tree: Tree, after: dict[str, tuple[bool, str]]) -> None:
  """What passed still passes; where a tool failed before (ty: what is not installed here), it has no more to say, and
  of our folder nothing."""
  for name, (passed, text) in after.items():
    before = (tree.lint_before or {}).get(name, (True, ""))
    ours = [line for line in text.splitlines() if "modeld/fair/" in line]
    more = len(text.splitlines()) - len(before[1].splitlines())
    ok = passed or (not before[0] and not ours and more <= 0)
    tree.row(
      f"lint: {name}",
      ok,
      "passes"
      if passed
      else f"{len(before[1].splitlines())} lines without us, {more:+d} with; of our folder {ours[:2] or 'none'}",
    )


def uninstalled(tree: Tree) -> None:
  done = overlay(tree, "--uninstall")
  after = tree.git("status", "--short")
  left = [
    str(f)
    for f in (
      tree.root / f"{tree.package}selfdrive/modeld/fair",
      tree.root / f"{tree.package}models/fair_unified_small",
    )
    if f.exists()
  ]
  tree.row(
    "uninstall",
    done.returncode == 0 and not after and not left,
    f"git status {'empty' if not after else after[:300]}, "
    f"{'nothing of it left' if not left else 'left: ' + ', '.join(left)}"
    + (f"; {last_lines(done.stderr)}" if done.returncode else ""),
  )


STEPS: dict[str, Callable[[Tree], None]] = {
  "frames": frames,
  "replay": replay,
  "process_replay": process_replay,
  "kill": killed,
  "faults": harmless,
  "lint": lint,
}


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument(
    "path", type=Path, nargs="?", default=os.environ.get("OPENPILOT_DIR"), help="the checkout; default: OPENPILOT_DIR"
  )
  p.add_argument(
    "--python",
    default=os.environ.get("OPENPILOT_PYTHON"),
    help="the checkout's Python; default: OPENPILOT_PYTHON, else .venv/bin/python in it",
  )
  p.add_argument("--route", type=Path, help="FOLDER/ROUTE: play this route in it, too")
  p.add_argument("--only", default=",".join(STEPS), help=f"of {','.join(STEPS)}")
  p.add_argument("--seconds", type=float, default=20.0, help="of a run")
  p.add_argument("--out", type=Path, help="default: a temporary folder")
  p.add_argument("--keep", action="store_true", help="leave it laid in")
  args = p.parse_args(argv)
  if args.path is None:
    p.error("no checkout: give its path, or set OPENPILOT_DIR")
  root = Path(args.path).expanduser().resolve()
  python = args.python or str(root / ".venv/bin/python")
  if not Path(python).is_file():
    p.error(f"{python} is not there; set OPENPILOT_PYTHON to the Python that openpilot runs with")
  if unknown := set(args.only.split(",")) - set(STEPS):
    p.error(f"no such check: {', '.join(sorted(unknown))}")
  out = (args.out or Path(tempfile.mkdtemp(prefix="fair-in-openpilot-"))).resolve()
  out.mkdir(parents=True, exist_ok=True)
  tree = Tree(root, python, out, args.route.resolve() if args.route else None, args.seconds)
  if tree.git("status", "--short"):
    print(f"error: {root} has changes that are not committed; this wants a clean checkout", file=sys.stderr)
    return 2
  print(
    f"{root} at {tree.git('log', '-1', '--format=%h of %cs').strip()}; what the checks say lies in {out}", flush=True
  )
  try:
    tests_before = own_tests(tree)
    tree.lint_before = linted(tree)
    installed(tree)
    build(tree)
    compared(tree, tests_before, own_tests(tree))
    for name in args.only.split(","):
      try:
        STEPS[name](tree)
      except Failed as e:
        tree.row(name, False, str(e)[:600])
  except Failed as e:
    tree.row("overlay and build", False, str(e)[:600])
  finally:
    if not args.keep:
      uninstalled(tree)
  print("\n| what | result | figure |\n|---|---|---|\n" + "\n".join(f"| {a} | {b} | {c} |" for a, b, c in tree.rows))
  return int(any(b == "NOT OK" for _, b, _ in tree.rows))


if __name__ == "__main__":
  raise SystemExit(main())
