#!/usr/bin/env python3
"""The whole of it in a real openpilot checkout: lays fairmodeld in, builds what that changes, runs it under openpilot's own programs, and takes it out again.

    OPENPILOT_DIR=~/openpilot python tests/overlay/real_tree.py
    python tests/overlay/real_tree.py ~/openpilot --route ~/routes/ROUTE --only frames,replay

The checkout is the user's: clean (no changes that are not committed), set up and built as its own README says. Its Python is .venv/bin/python in it, or
OPENPILOT_PYTHON. With --route FOLDER/ROUTE (a folder with segments ROUTE--0, ROUTE--1 ... that hold qlog and qcamera.ts) its frames and messages are used, and
openpilot's own replay plays it; without, a drawn road. What the checks write lies in --out. Prints a table; exit code 1 where something is not as it must be.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SERVICES = "fairState,fairDepth,fairObjects,fairSegmentation,fairLanes,fairFeatures"
FAULTS = ("spin", "leak", "flood", "hang", "crash")
SUBMODULES = ("msgq_repo", "opendbc_repo", "rednose_repo", "tinygrad_repo", "teleoprtc_repo")
ANSWERED = 0.985  # of the frames from openpilot's own replay: 580 of 589


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

  @property
  def package(self) -> str:
    return "openpilot/" if (self.root / "openpilot/cereal/log.capnp").is_file() else ""

  def env(self) -> dict[str, str]:
    path = [self.root, *(self.root / s for s in SUBMODULES if (self.root / s).is_dir())]
    bin_folder = str(Path(self.python).absolute().parent)
    more = {"PYTHONPATH": os.pathsep.join(map(str, path)), "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]), "OMP_NUM_THREADS": "1",
            "PWD": str(self.root)}
    return {**{k: v for k, v in os.environ.items() if k not in ("OPENPILOT_PREFIX", "VIRTUAL_ENV")}, **more}

  def run(self, command: list[str], timeout: float, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command in the checkout, in its environment."""
    try:
      done = subprocess.run(command, cwd=self.root, env=self.env(), timeout=timeout, capture_output=True, text=True, errors="replace")
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
    return json.loads(found[-1].removeprefix("RESULT "))

  def git(self, *args: str) -> str:
    return self.run(["git", *args], 60).stdout

  def row(self, what: str, ok: bool, figure: str) -> None:
    self.rows.append((what, "ok" if ok else "NOT OK", figure))
    print(f"{'ok' if ok else 'NOT OK':7} {what}: {figure}", flush=True)


def last_lines(text: str, n: int = 3) -> str:
  return " | ".join(line for line in text.strip().splitlines()[-n:])


def overlay(tree: Tree, *args: str) -> subprocess.CompletedProcess[str]:
  env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
  return subprocess.run([sys.executable, "-m", "openpilot.tools.install.overlay", str(tree.root), *args], env=env, capture_output=True, text=True, cwd=tree.out)


# *** the checks, in their order ***

def own_tests(tree: Tree) -> dict[str, int]:
  """The checkout's own tests of what is edited, by its own runner: {"passed": n, "failed": n, ...}."""
  p = tree.package
  targets = [f"{p}cereal/messaging/tests", f"{p}common/tests/test_params.py", f"{p}system/manager/test/test_manager.py"]
  targets = [t for t in targets if (tree.root / t).exists()]
  runner = tree.root / "tools/test_runner.py"
  command = [str(runner), *targets] if runner.is_file() else ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", *targets]
  done = tree.run([tree.python, *command], 600, check=False)
  (tree.out / "own_tests.txt").write_text(done.stdout + done.stderr)
  last = next((x for x in reversed((done.stdout + done.stderr).splitlines()) if " passed" in x or " failed" in x), "")
  counts = re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)
  if not counts:
    raise Failed(f"its own tests did not run: {last_lines(done.stdout + done.stderr)}")
  return {word.rstrip("s"): int(n) for n, word in counts}


def words(counts: dict[str, int]) -> str:
  return ", ".join(f"{n} {what}" for what, n in counts.items())


def build(tree: Tree) -> None:
  p = tree.package
  targets = [f"{p}common", f"{p}cereal", "msgq_repo", "fair"]
  targets += [t for t in (f"{p}tools/replay/replay", f"{p}system/loggerd/loggerd") if (tree.root / t).is_file()]
  begin = time.monotonic()
  done = tree.run([str(Path(tree.python).parent / "scons") if (Path(tree.python).parent / "scons").is_file() else "scons", "-j2", *targets], 3600)
  (tree.out / "scons.txt").write_text(done.stdout + done.stderr)
  compiled = [line for line in done.stdout.splitlines() if "graph '" in line]
  tree.row("scons of schema, params and bundle", True, f"{time.monotonic() - begin:.0f} s; {'; '.join(compiled) or 'nothing was to be compiled'}")


def installed(tree: Tree) -> None:
  done = overlay(tree)
  if done.returncode:
    raise Failed(f"overlay: {last_lines(done.stdout + done.stderr)}")
  again = overlay(tree, "--check")
  entries = len(tree.git("status", "--short").splitlines())
  what = "nothing" if again.returncode == 0 else "something"
  tree.row("overlay", again.returncode == 0, f"{entries} entries in git status; --check afterwards has {what} to do")


def frames(tree: Tree) -> None:
  r = tree.check("live.py", "frames", "--seconds", str(tree.seconds), "--no-stand-in")
  log = r["loggerd"] or {}
  invalid = {s: n for s, n in r["invalid"].items() if s != "fairState"}  # it is not valid before a bundle is loaded
  tree.row("frames by its VisionIpcServer under its manager", r["frames_answered"] > 0 and not invalid and not r["should_but_does_not"],
           "; ".join((f"{r['frames_answered']} of {r['frames']} frames answered", f"{sum(r['submaster_seen'].values())} messages by its SubMaster",
                      f"{log['messages']} by its LogReader of its loggerd's rlog" if log else "its loggerd is not built",
                      f"{r['cpu_ms_per_frame']} ms of CPU a frame", f"{r['memory_mb']} MB", f"stops in {r['stopped_in_s']} s")))


def replay(tree: Tree) -> None:
  if tree.route is None or not (tree.root / f"{tree.package}tools/replay/replay").is_file():
    tree.row("its own replay", True, "skipped: no --route, or tools/replay is not built")
    return
  for name, more in (("--block", ["--block", SERVICES]), ("no --block", [])):
    r = tree.check("cpp_replay.py", f"replay{name.replace(' ', '')}", "--route", str(tree.route), "--seconds", str(tree.seconds + 10 if more else 15), *more)
    share = r["answered"] / max(1, r["frames_first_to_last"])
    size = (r["loggerd"] or {}).get("mb_per_minute") or r["mb_per_minute"] or {}
    invalid = {s: n for s, n in r["invalid"].items() if s != "fairState"}
    ok = r["alive"] and (share >= ANSWERED and not invalid if more else bool(r["resumed_messages"]))
    tail = f"rlog {size} MB a minute" if more else f"{r['resumed_messages']} messages after it ended"
    tree.row(f"its own replay, {name}", ok,
             f"{r['answered']} of {r['frames_first_to_last']} frames, camera {r['camera']}, not valid {invalid or 'none'}; {tail}")


def process_replay(tree: Tree) -> None:
  r = tree.check("replays.py", "process_replay", "fairmodeld")
  tree.row("process_replay of fairmodeld, twice", r["equal"] and r["answered"] == r["frames"] and not r["invalid"],
           f"{r['answered']} of {r['frames']} frames, {sum(r['messages'].values())} messages, {'equal' if r['equal'] else r['differences']}")


def without(tree: Tree, name: str, states: str, model: str) -> tuple[bool, str]:
  """selfdrived's process_replay with the managerState and frameDropPerc of a run, against its events without fairmodeld."""
  r = tree.check("replays.py", f"selfdrived-{name}", "selfdrived", "--states", states, "--model", model)
  control = "processNotRunning" in r["plannerd dead"]["names"] and "processNotRunning" not in r["fairmodeld dead"]["names"]
  return r["equal"] and control, f"selfdrived's events {'equal' if r['equal'] else r['with']['names']}{'' if control else ', AND THE CONTROL DID NOT WORK'}"


def killed(tree: Tree) -> None:
  r = tree.check("live.py", "killed", "--seconds", "30", "--kill", "2")
  ok, events = without(tree, "killed", str(tree.out / "killed/managerState"), str(tree.out / "killed/modelV2"))
  tree.row("kill -9 of the worker every 2 s", ok and not r["should_but_does_not"] and r["kills"] > 3 and not r["left_running"],
           f"{r['kills']} kills in 30 s (back-off between), {r['should_but_does_not']} of {r['manager_states']} managerStates with it not running; {events}")


def harmless(tree: Tree) -> None:
  base = tree.check("live.py", "off", "--seconds", "20", "--no-fair")
  tree.row("without fairmodeld: the stand-in for modeld", True, said(base))
  for fault in FAULTS:
    r = tree.check("live.py", fault, "--seconds", "25", "--fault", fault)
    ok, events = without(tree, fault, str(tree.out / fault / "managerState"), str(tree.out / fault / "modelV2"))
    ok = ok and not r["should_but_does_not"] and (r["frame_drop_perc_max"] <= 1 or not r["real_time"])
    tree.row(f"worker gone wrong: {fault}", ok, f"{said(r)}; {events}")
  r = tree.check("live.py", "displaced", "--seconds", "20", "--displace", "4")
  tree.row("another publisher for 4 s", r["resumed_after_s"] is not None and not r["should_but_does_not"],
           f"resumed {r['resumed_after_s']} s after it ended; {said(r)}")


def said(r: dict[str, Any]) -> str:
  rights = "" if r["real_time"] else " (no rights for real-time priority)"
  return f"stand-in took {r['stand_in_frames']} of {r['frames']} frames, frameDropPerc at most {r['frame_drop_perc_max']:.2f}{rights}"


def lint(tree: Tree) -> None:
  """The checkout's linters on what was added and edited."""
  files = tree.git("diff", "--name-only").split() + tree.git("ls-files", "--others", "--exclude-standard").split()
  files = [f for f in files if not f.startswith(f"{tree.package}models/")]
  python = [f for f in files if f.endswith(".py")]
  for name, command in (("ruff", ["ruff", "check", "--quiet", *python]), ("codespell", ["codespell", *[f for f in files if not f.endswith(".json")]]),
                        ("ty", ["ty", "check", "--quiet", *python])):
    try:
      done = tree.run([name, *command[1:]], 300, check=False)
      tree.row(f"lint: {name}", done.returncode == 0, last_lines(done.stdout + done.stderr, 2)[:160] or f"nothing in {len(files)} files")
    except Failed as e:
      tree.row(f"lint: {name}", True, f"skipped: {e}")
  for script, more in (("check_indentation.py", python), ("check_added_large_files.py", ["--enforce-all", "--maxkb=120", *files])):
    path = next((p for p in (tree.root / "scripts/lint").rglob(script)), None)
    if path is not None:
      done = tree.run([tree.python, str(path), *more], 60, check=False)
      tree.row(f"lint: {script}", done.returncode == 0, last_lines(done.stdout + done.stderr, 2)[:160] or f"{len(files)} files")


def uninstalled(tree: Tree, before: str) -> None:
  done = overlay(tree, "--uninstall")
  after = tree.git("status", "--short")
  tree.row("uninstall", done.returncode == 0 and after == before, "git status as before" if after == before else f"git status: {after[:300]}")


STEPS: dict[str, Callable[[Tree], None]] = {
  "frames": frames, "replay": replay, "process_replay": process_replay, "kill": killed, "faults": harmless, "lint": lint,
}


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("path", type=Path, nargs="?", default=os.environ.get("OPENPILOT_DIR"), help="the checkout; default: OPENPILOT_DIR")
  p.add_argument("--python", default=os.environ.get("OPENPILOT_PYTHON"), help="the checkout's Python; default: OPENPILOT_PYTHON, else .venv/bin/python in it")
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
  before = tree.git("status", "--short")
  if before.strip():
    print(f"error: {root} has changes that are not committed; this wants a clean checkout", file=sys.stderr)
    return 2
  print(f"{root} at {tree.git('log', '-1', '--format=%h of %cs').strip()}; what the checks say lies in {out}", flush=True)
  try:
    tests_before = own_tests(tree)
    installed(tree)
    build(tree)
    tests_after = own_tests(tree)
    bad = [t.get("failed", 0) + t.get("error", 0) for t in (tests_before, tests_after)]
    tree.row("its own tests of messaging, params and manager", bad[1] <= bad[0] and tests_after.get("passed", 0) >= tests_before.get("passed", 0),
             f"before: {words(tests_before)}; after: {words(tests_after)}")
    for name in args.only.split(","):
      try:
        STEPS[name](tree)
      except Failed as e:
        tree.row(name, False, str(e)[:600])
  except Failed as e:
    tree.row("overlay and build", False, str(e)[:600])
  finally:
    if not args.keep:
      uninstalled(tree, before)
  print("\n| what | result | figure |\n|---|---|---|\n" + "\n".join(f"| {a} | {b} | {c} |" for a, b, c in tree.rows))
  return int(any(b != "ok" for _, b, _ in tree.rows))


if __name__ == "__main__":
  raise SystemExit(main())
