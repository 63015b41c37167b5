#!/usr/bin/env python3
"""The whole path on a sample: makes a simulated drive (or takes a route), replays it with the manager and the flag on,
and writes what fairmodeld published.

out/demo/overlay.mp4, rlog.zst (the route's log with the fair messages merged in), report.html and report.json."""

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from openpilot.tools.lib.errors import above_zero
from openpilot.tools.lib.options import option, parse

if TYPE_CHECKING:
  from openpilot.selfdrive.modeld.fair.bundle import Bundle

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT = 30.0  # s from deviceState's `started` to fairmodeld's first fairState
PICTURES = 4


def wait_for_fairmodeld(manager: subprocess.Popen) -> None:
  """Sends deviceState until fairmodeld waits for the camera. Raises UserError where it does not start."""
  from openpilot.cereal import messaging
  from openpilot.tools.lib.errors import UserError

  pm, sm = messaging.PubMaster(["deviceState"]), messaging.SubMaster(["fairState"])
  end, fault = time.monotonic() + START_TIMEOUT, ""
  try:
    while time.monotonic() < end:
      msg = messaging.new_message("deviceState", valid=True)
      msg.deviceState.started = True
      pm.send("deviceState", msg)
      sm.update(200)
      if sm.updated["fairState"]:
        if str(sm["fairState"].status) == "waitingForCamera":
          return
        fault = sm["fairState"].fault
      if manager.poll() is not None:
        raise UserError(f"the manager ended with exit code {manager.returncode}; see its output above")
    raise UserError(f"fairmodeld did not get ready within {START_TIMEOUT:.0f} s{': ' + fault if fault else ''}")
  finally:
    pm.close()
    sm.close()


@dataclass(frozen=True)
class Options:
  output: Path = option(ROOT / "out" / "demo", aliases=("--out",), help="the folder to fill")
  route: str | None = option(None, help="replay this route in place of a simulated one")
  camera: str = option("road", choices=("road", "wide", "qcamera"), help="which video of the route")
  data_dir: Path | None = option(None, help="the folder that holds the routes")
  focal: float | None = option(
    None, parse=above_zero, metavar="PX", help="focal length in pixels, of a camera that is not comma's"
  )
  seconds: float = option(12.0, parse=above_zero, help="length of the simulated drive, or of the part of the route")
  seed: int = option(2_000_003, help="which simulated drive")
  time: str = option("day", choices=("day", "dusk", "night"), help="of the simulated drive")
  bundle: Path | None = option(None, help="a bundle's folder; default: models/fair_unified_small")


def run(args: Options) -> None:
  from openpilot.common.params import Params
  from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, find_bundle, load_bundle
  from openpilot.selfdrive.manager.process import die_with_parent
  from openpilot.tools.lib import python
  from openpilot.tools.lib.errors import UserError
  from openpilot.tools.replay.record import Recorder, merge
  from openpilot.tools.lib.cameras import VIDEOS
  from openpilot.tools.replay.replay import Replay
  from openpilot.tools.replay.measure import measure
  from openpilot.tools.replay.report import write_report
  from openpilot.tools.replay.show import show
  from openpilot.tools.replay.source import open_route
  from openpilot.tools.sim.write_route import write_route

  out: Path = args.output
  bundle = load_bundle(args.bundle) if args.bundle else find_bundle(None, MODELS_DIR)
  if args.bundle:
    os.environ["FAIR_MODELS_DIR"] = str(args.bundle.resolve().parent)
  source = args.route or write_route(
    out / "route" / f"{args.seed}-{args.time}-{args.seconds:g}", args.seed, args.seconds, "mici", args.time
  )
  segments, camera = open_route(source, args.data_dir, args.camera)
  if not any(getattr(s, VIDEOS[camera]) for s in segments):
    raise UserError(f"{source} has no video; fairmodeld needs camera frames")
  params = Params()
  params.put_bool("FairEnabled", True)
  params.put_bool("FairLogDense", True)  # the overlay needs masks
  params.put("FairBundle", bundle.path.name)
  # the manager ends with this process
  manager = subprocess.Popen(
    python.command("-m", "openpilot.selfdrive.manager.manager"), env=python.environment(), preexec_fn=die_with_parent
  )
  try:
    wait_for_fairmodeld(manager)
    recorder = Recorder()
    replay = Replay(segments, camera, seconds=args.seconds if args.route else None, focal=args.focal)
    replay.run()
    time.sleep(1.2)  # the last frame's messages, and one more fairState
    live = recorder.stop()
  finally:
    manager.send_signal(signal.SIGINT)
    manager.wait()
  if not live:
    raise UserError("fairmodeld published nothing; see its output above")
  logs = [s.log_path for s in segments if s.log_path is not None]
  merge(logs, live, out / "rlog.zst")
  numbers = measure(out / "rlog.zst", segments, names=names_of_the_road(bundle))
  frames, pictures = show([out / "rlog.zst"], segments, camera, out / "overlay.mp4", keep=PICTURES, focal=args.focal)
  title = f"openpilot-fair: {segments[0].route}" + ("" if args.route else f", a simulated drive by {args.time}")
  write_report(out, title, numbers, bundle, pictures, out / "overlay.mp4")
  table(numbers, bundle.name, replay.late_frames)
  for name, what in (
    ("overlay.mp4", f"{frames} annotated frames"),
    ("rlog.zst", "the log with the fair messages"),
    ("report.html", "latency, drops, quality, frames"),
  ):
    print(f"  {out / name}   {what}")


def names_of_the_road(bundle: "Bundle") -> dict[str, str]:
  """{class of the bundle's maps: what the road's class set, which the simulator's truth is in, calls it}."""
  from openpilot.tools.fair.evaluation.compared import classes_of
  from openpilot.tools.fair.spec import road_classes

  return {n: c.name for n in classes_of(bundle)[0]["maps"] if (c := road_classes().find(n)) is not None}


def table(r: dict, bundle: str, late: int) -> None:
  q = r["quality"]
  rows = [
    ("bundle", bundle),
    ("frames processed / dropped / invalid", f"{r['frames']} / {r.get('dropped', 0)} / {r.get('invalid', 0)}"),
    ("network, ms, p50 / p99", f"{r['execution_ms'].get('p50')} / {r['execution_ms'].get('p99')}"),
    (
      "warp + decode + publish, ms, mean",
      f"{r.get('warp_ms', 0)} + {r.get('decode_ms', 0)} + {r.get('publish_ms', 0)}",
    ),
    ("memory, MB", r.get("memory_mb")),
    ("frames that the replay sent late", late),
  ]
  if q:
    rows += [
      ("depth AbsRel / delta1, against truth", f"{q.get('abs_rel')} / {q.get('delta1')}"),
      ("segmentation mIoU, against truth", q.get("miou")),
    ]
  if r["faults"]:
    rows.append(("faults", "; ".join(r["faults"])))
  print()
  for name, value in rows:
    print(f"  {name:<38} {value}")
  print()


def end(number: int, _: object) -> NoReturn:
  """Handles a signal like Ctrl-C: processes are stopped and temporary files removed."""
  raise SystemExit(128 + number)


def main() -> None:
  signal.signal(
    signal.SIGINT, signal.default_int_handler
  )  # a shell that starts us in the background ignores SIGINT, which stops the processes below
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
  from openpilot.cereal.messaging import remove_sockets

  args = parse(Options, __doc__, "demo")
  args.output.mkdir(parents=True, exist_ok=True)
  # its own prefix and params: a running openpilot and the user's params are not touched
  with tempfile.TemporaryDirectory(prefix="fair-demo-") as params_root:
    os.environ |= {"OPENPILOT_PREFIX": f"demo-{os.getpid()}", "PARAMS_ROOT": params_root}
    try:
      run(args)
    finally:
      remove_sockets()


if __name__ == "__main__":
  from openpilot.selfdrive.modeld.fair.bundle import BundleError
  from openpilot.tools.lib.errors import cli

  raise SystemExit(cli(main, (BundleError,))())
