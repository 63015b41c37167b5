"""openpilot's own process_replay: of fairmodeld, twice and compared; of selfdrived, with the managerState that a run of
live.py left and with none of ours.

selfdrived reads a made log (all its inputs at their rates, engaged) or, with --log, a genuine one, in which the
messages stay as they are but for managerState."""

import argparse
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tree import CAMERA, CAR, SERVICE_LIST, Frames, as_reader, log, made_log, messaging, route_log, tell

from openpilot.selfdrive.test.process_replay import process_replay as pr
from openpilot.selfdrive.test.process_replay.compare_logs import compare_logs
from openpilot.system.manager.process_config import managed_processes

MIGRATE = pr.migrate_all


class Server(pr.VisionIpcServer):
  """Its thread names the socket by OPENPILOT_PREFIX, which process_replay takes back soon after: on a busy machine
  before the thread has run, and then no process ever finds the camera."""

  def start_listener(self) -> None:
    super().start_listener()
    socket = Path(f"/tmp/{os.environ['OPENPILOT_PREFIX']}_visionipc_camerad")
    end = time.monotonic() + 30
    while not socket.exists() and time.monotonic() < end:
      time.sleep(0.01)


pr.VisionIpcServer = Server


def fairmodeld(args: argparse.Namespace) -> dict[str, Any]:
  frames = Frames(args.frames, 40, (1344, 760))
  lr = route_log(args.route, frames.count) if args.route else made_log(args.count)
  if args.route:
    lr = lr[
      : next((i for i, m in enumerate(lr) if m.which() == CAMERA and getattr(m, CAMERA).frameId >= args.count), len(lr))
    ]
  pictures = type(
    "Cycle", (), {"pix_fmt": "nv12", "w": frames.w, "h": frames.h, "get": lambda self, i: frames.get(i % frames.count)}
  )()
  cfg = pr.get_process_config("fairmodeld")
  out, took = [], []
  for _ in range(2):
    t = time.monotonic()
    out.append(pr.replay_process(cfg, lr, {CAMERA: pictures}, fingerprint=CAR, disable_progress=True))
    took.append(round(time.monotonic() - t, 1))
  diff = (
    compare_logs(out[0], out[1], ignore_fields=cfg.ignore, tolerance=None)
    if len(out[0]) == len(out[1])
    else [f"{len(out[0])} and {len(out[1])} messages"]
  )
  ids = {getattr(m, m.which()).frameId for m in out[0]}
  other = [m.as_builder() for m in out[1]]
  getattr(other[-1], other[-1].which()).frameId += 1
  seen = (
    compare_logs(out[0], [as_reader(m) for m in other], ignore_fields=cfg.ignore, tolerance=None)
    if len(out[0]) == len(out[1])
    else [""]
  )
  return {
    "frames": sum(m.which() == CAMERA for m in lr),
    "answered": len(ids),
    "messages": Counter(m.which() for m in out[0]),
    "seconds": took,
    "invalid": sum(not m.valid for m in out[0]),
    "differences": [str(d)[:200] for d in diff[:5]],
    "equal": not diff,
    "one_changed_is_seen": bool(seen),
  }


def manager_states(path: str | None) -> list[bytes]:
  if path is None:
    return []
  return [m.as_builder().to_bytes() for m in log.Event.read_multiple_bytes(Path(path).read_bytes())]


def made_selfdrived_log(seconds: float, states: list[bytes], model: list[Any], not_running: str = "") -> list[Any]:
  """Everything selfdrived reads, at its rates, of a car that drives engaged with nothing wrong; managerState at 2 Hz
  from what a run left, in turn."""
  cfg = pr.get_process_config("selfdrived")
  CP = pr.interfaces[CAR].get_non_essential_params(CAR)
  out, start = [], 10_000_000_000
  for name in cfg.pubs:
    if name in ("alertDebug", "gpsLocation", "managerState"):
      continue
    rate = SERVICE_LIST[name].frequency
    for i in range(int(seconds * rate)):
      size = 1 if name == "pandaStates" else None
      msg = messaging.new_message(name, size, valid=True, logMonoTime=start + int(i / rate * 1e9))
      m = getattr(msg, name)
      if name == "carState":
        m.canValid, m.vEgo, m.cruiseState.enabled, m.cruiseState.available = True, 20.0, True, True
        m.gearShifter = "drive"
      elif name == "deviceState":
        m.freeSpacePercent, m.started = 80, True
      elif name == "pandaStates":
        p, safety = m[0], CP.safetyConfigs[0]
        p.controlsAllowed, p.ignitionLine, p.safetyModel = (
          True,
          True,
          getattr(safety.safetyModel, "raw", safety.safetyModel),
        )
        p.safetyParam, p.alternativeExperience = safety.safetyParam, CP.alternativeExperience
      elif name in ("extrinsicsCalibration", "liveCalibration"):
        m.calStatus, m.rpyCalib, m.height = "calibrated", [0.0, 0.0, 0.0], [1.22]
      elif name in ("deviceMotion", "livePose"):
        m.posenetOK = m.inputsOK = True
      elif name in ("vehicleParameters", "liveParameters"):
        m.valid = True
      elif name == "controlsState":
        m.lateralControlState.init("pidState")
      elif name == "modelV2" and model:
        m.frameDropPerc = model[i % len(model)].modelV2.frameDropPerc
      out.append(msg)
  for i in range(int(seconds * 2)):
    if states:
      with log.Event.from_bytes(states[i % len(states)]) as e:
        msg = e.as_builder()
    else:
      msg = messaging.new_message("managerState", valid=True)
      msg.managerState.processes = [
        {"name": n, "running": True, "shouldBeRunning": True} for n in managed_processes if n != "fairmodeld"
      ]
    if not_running and i == int(seconds):
      msg.managerState.processes = [{"name": not_running, "running": False, "shouldBeRunning": True}]
    msg.logMonoTime = start + int(i * 5e8) + 1
    out.append(msg)
  return [as_reader(m) for m in sorted(out, key=lambda m: m.logMonoTime)]


def genuine_selfdrived_log(lr: list[Any], states: list[bytes], model: list[Any], not_running: str = "") -> list[Any]:
  """A drive's own messages in this tree's names, and modelV2 at its rate where a qlog has none, without which
  selfdrived disengages at once. managerStates list fairmodeld too, as a run's did in turn; one says that not_running is
  dead."""
  lr = MIGRATE(lr, panda_states=True)
  at = [i for i, m in enumerate(lr) if m.which() == "managerState"]
  for n, i in enumerate(at):
    msg = lr[i].as_builder()
    processes = [p.to_dict() for p in msg.managerState.processes if p.name != "fairmodeld"]
    if states:
      with log.Event.from_bytes(states[n % len(states)]) as e:
        processes += [p.to_dict() for p in e.managerState.processes if p.name == "fairmodeld"]
    if not_running and n == len(at) * 3 // 4:
      processes = [
        *(p for p in processes if p["name"] != not_running),
        {"name": not_running, "running": False, "shouldBeRunning": True},
      ]
    msg.managerState.processes = processes
    lr[i] = as_reader(msg)
  if not any(m.which() == "modelV2" for m in lr):  # 0.10 drops it from qlogs
    times = [m.logMonoTime for m in lr if m.which() == "carState"]
    made = [
      messaging.new_message("modelV2", valid=True, logMonoTime=ns) for ns in range(times[0], times[-1], 50_000_000)
    ]
    for i, msg in enumerate(made):
      if model:
        msg.modelV2.frameDropPerc = model[i % len(model)].modelV2.frameDropPerc
    lr += [as_reader(m) for m in made]
  return sorted(lr, key=lambda m: m.logMonoTime)


def selfdrived(args: argparse.Namespace) -> dict[str, Any]:
  pr.migrate_all = lambda lr, **_: list(
    lr
  )  # done, or made by this very tree; its migration would say of every process that it runs
  model = list(log.Event.read_multiple_bytes(Path(args.model).read_bytes())) if args.model else []
  runs = {"without": ([], [], ""), "with": (manager_states(args.states), model, "")}
  if args.control:
    runs |= {"plannerd dead": ([], [], "plannerd"), "fairmodeld dead": ([], [], "fairmodeld")}
  from openpilot.tools.lib.logreader import LogReader

  drive = [m for path in args.log or () for m in LogReader(path)]
  genuine = {"managerState", "carParams", "carState"} <= {m.which() for m in drive}
  ours = sum(
    any(p.name == "fairmodeld" for p in messaging.log_from_bytes(d).managerState.processes) for d in runs["with"][0]
  )
  events: dict[str, Any] = {}
  for name, (states, model_v2, dead) in runs.items():
    lr = (
      genuine_selfdrived_log(drive, states, model_v2, dead)
      if genuine
      else made_selfdrived_log(args.seconds, states, model_v2, dead)
    )
    got = pr.replay_process(
      pr.get_process_config("selfdrived"), lr, fingerprint=None if genuine else CAR, disable_progress=True
    )
    events[name] = {
      "names": Counter(str(e.name) for m in got if m.which() == "onroadEvents" for e in m.onroadEvents),
      "states": Counter(str(m.selfdriveState.state) for m in got if m.which() == "selfdriveState"),
      "events": [(m.logMonoTime, [str(e.name) for e in m.onroadEvents]) for m in got if m.which() == "onroadEvents"],
    }
  same = events["without"]["events"] == events["with"]["events"]
  return {
    "equal": same,
    "ours_in_states": ours,
    "drive": "genuine" if genuine else "made",
    **{k: {"names": v["names"], "states": v["states"]} for k, v in events.items()},
  }


def main() -> None:
  p = argparse.ArgumentParser()
  p.add_argument("what", choices=["fairmodeld", "selfdrived"])
  p.add_argument("--out", required=True)
  p.add_argument("--count", type=int, default=120)
  p.add_argument("--frames")
  p.add_argument("--route")
  p.add_argument("--log", action="append", help="a genuine log for selfdrived; again for the segment after it")
  p.add_argument("--states", help="managerState messages of a run of live.py")
  p.add_argument(
    "--control",
    action="store_true",
    help="also with plannerd dead, which disengages, and with fairmodeld dead, which must not",
  )
  p.add_argument("--model")
  p.add_argument("--seconds", type=float, default=20.0)
  args = p.parse_args()
  os.makedirs(args.out, exist_ok=True)
  tell({"fairmodeld": fairmodeld, "selfdrived": selfdrived}[args.what](args), args.out)


if __name__ == "__main__":
  main()
