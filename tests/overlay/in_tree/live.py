"""fairmodeld under openpilot's own manager, fed by openpilot's VisionIpcServer, read by its SubMaster, SubSocket and
LogReader.

manager_thread() runs as it stands, all processes blocked but ours; beside it a stand-in for modeld takes the same
frames and says frameDropPerc as modeld does. --kill S: the worker gets SIGKILL every S seconds. --fault NAME: see
faults/. --stuck: nothing is awaited of the bundle, whose graph never returns. --no-fair: the flag stays off; the
stand-in's figures are then those without us."""

import argparse
import gc
import os
import random
import signal
import sys
import time
from itertools import pairwise
from multiprocessing import Process
from pathlib import Path
from typing import Any

import numpy as np
from tree import (
  CALIBRATION,
  CAMERA,
  FAIR,
  FPS,
  STREAM,
  Frames,
  Params,
  VisionIpcClient,
  VisionIpcServer,
  calibration,
  camera_state,
  children,
  cpu_and_memory,
  device_state,
  end,
  log,
  loggerd,
  loggerd_wrote,
  messaging,
  nv12_layout,
  put_bool,
  tell,
)

BUFFERS = 24
STATE = ("framesReceived", "framesProcessed", "framesDropped", "framesLate", "framesNotDue", "rate")


def manager(names: list[str]) -> None:
  from openpilot.system.manager import manager as m

  os.environ["BLOCK"] = ",".join(n for n in m.managed_processes if n not in names)
  os.environ["NOBOARD"] = "1"
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
  sys.stdout = open(os.devnull, "w")
  try:
    m.manager_thread()
  finally:
    m.manager_cleanup()


def real_time(priority: int) -> bool:
  """As openpilot's processes on a device; False where this user has no rights to: other work on the machine then counts
  as ours."""
  try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
  except OSError:
    return False
  return True


def stand_in() -> None:
  """modeld's loop without its network: newest frame first, 15 ms of work, frameDropPerc by modeld's own filter,
  modeld's priority."""
  real_time(54)
  from openpilot.common.filter_simple import FirstOrderFilter

  client, pm = VisionIpcClient("camerad", STREAM, True), messaging.PubMaster(["modelV2"])
  while not client.connect(False):
    time.sleep(0.05)
  dropped, last, run, a = FirstOrderFilter(0.0, 10.0, 1.0 / FPS), 0, 0, np.ones((180, 180), np.float32)
  while True:
    if client.recv() is None:
      continue
    t = time.perf_counter()
    missed = max(0, client.frame_id - last - 1) if run > 10 else 0
    share = dropped.update(min(missed, 10))
    run, last = run + 1, client.frame_id
    while time.perf_counter() - t < 0.015:
      a @ a
    msg = messaging.new_message("modelV2", valid=True)
    m = msg.modelV2
    m.frameId, m.timestampEof, m.frameDropPerc = client.frame_id, client.timestamp_eof, 100 * share / (1 + share)
    m.modelExecutionTime = time.perf_counter() - t
    pm.send("modelV2", msg)


def main() -> None:
  p = argparse.ArgumentParser()
  p.add_argument("--out", required=True)
  p.add_argument("--seconds", type=float, default=20.0)
  p.add_argument("--frames", help="a route's frames (.npy); default: a drawn road of a comma four's camera")
  p.add_argument("--kill", type=float, help="seconds between two SIGKILLs of the worker")
  p.add_argument("--kill-all", action="store_true", help="what the manager started gets the SIGKILL instead")
  p.add_argument("--fault")
  p.add_argument("--no-fair", action="store_true")
  p.add_argument(
    "--displace",
    type=float,
    help="seconds that another publisher takes the fair* services for, as openpilot's replay does without --block",
  )
  p.add_argument("--no-stand-in", action="store_true")
  p.add_argument("--bundle", help="a bundle's folder")
  p.add_argument("--stuck", action="store_true")
  args = p.parse_args()
  os.makedirs(args.out, exist_ok=True)
  if args.fault:
    os.environ["FAIR_FAULT"] = args.fault
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "faults"), os.environ["PYTHONPATH"]])
  os.environ.setdefault("DONGLE_ID", "0" * 16)

  from openpilot.common.prefix import OpenpilotPrefix

  with OpenpilotPrefix(f"fair{os.getpid()}"):
    params = Params()
    put_bool(params, "FairEnabled", not args.no_fair)
    if args.bundle:
      folder = Path(args.bundle).absolute()
      os.environ["FAIR_MODELS_DIR"] = str(folder.parent)
      params.put("FairBundle", folder.name)
    result = run(args)
  tell(result, args.out)


def run(args: argparse.Namespace) -> dict[str, Any]:
  frames = Frames(args.frames, BUFFERS, (1344, 760))
  buffers = [
    frames.buffer(i) for i in range(min(BUFFERS, frames.count) if args.frames is None else min(frames.count, 200))
  ]
  stride, uv, size = nv12_layout(frames.w, frames.h)
  pm = messaging.PubMaster(["deviceState", CAMERA, CALIBRATION, "carState"])
  listed = ["managerState", *FAIR, "modelV2"]
  socks = {s: messaging.sub_sock(s, timeout=0) for s in listed}
  sm = messaging.SubMaster(FAIR)
  server = VisionIpcServer("camerad")
  server.create_buffers_with_sizes(STREAM, 20, frames.w, frames.h, size, stride, uv)
  server.start_listener()
  gc.collect()
  procs = [Process(target=manager, args=(["fairmodeld", "fairoffroad"],), daemon=False)]
  if not args.no_stand_in:
    procs.append(Process(target=stand_in, daemon=True))
  for proc in procs:
    proc.start()

  folder = str(Path(args.out, "realdata").absolute())
  writer = None if args.fault or args.kill or args.stuck else loggerd(folder)
  raw: dict[str, list[bytes]] = {s: [] for s in listed}
  seen: dict[str, int] = dict.fromkeys(FAIR, 0)
  invalid: dict[str, int] = dict.fromkeys(FAIR, 0)
  rights = real_time(53)  # as camerad's: what is late here must not be late by what else the machine does
  kills, sent, pid, worst_mb = 0, 0, 0, (0.0, 0.0)
  begin = time.monotonic()
  deadline, next_frame, next_kill = begin + 60, begin, None
  other: Any = None
  until, displaced_at = 0.0, None
  began_at: float | None = None  # the first message: from then on it counts
  while time.monotonic() < deadline:
    now = time.monotonic()
    if now >= next_frame:
      ns = time.monotonic_ns()
      state = camera_state(sent, ns)
      m = getattr(state, CAMERA)
      server.send(STREAM, buffers[sent % len(buffers)], sent, m.timestampSof, m.timestampEof)
      pm.send(CAMERA, state)
      car = messaging.new_message("carState", valid=True)
      car.carState.vEgo = 16.0
      pm.send("carState", car)
      if sent % 5 == 0:
        pm.send(CALIBRATION, calibration())
      if sent % 10 == 0:
        pm.send("deviceState", device_state())
      sent += 1
      next_frame = max(next_frame + 1 / FPS, now - 1.0)
    sm.update(0)
    for s in FAIR:
      if sm.updated[s]:
        seen[s] += 1
        invalid[s] += not sm.valid[s]
    for s, sock in socks.items():
      raw[s] += messaging.drain_sock_raw(sock)
    for data in raw["managerState"][-1:]:
      with log.Event.from_bytes(data) as e:
        pid = next((q.pid for q in e.managerState.processes if q.name == "fairmodeld" and q.running), 0) or pid
    started = (
      args.no_fair or (args.stuck and now > begin + 8) or (seen["fairState"] and sum(seen.values()) > seen["fairState"])
    )
    if began_at is None and (started or now > begin + 45):
      began_at, deadline = now, now + args.seconds
      next_kill = now + (args.kill or 0)
      counted_from = sent
      begin_raw = {s: len(v) for s, v in raw.items()}
      procs_now = [pid, *children(pid)]
      cpu0 = sum(cpu_and_memory(q)[0] for q in procs_now) if pid else 0.0
    if args.kill and began_at and now >= next_kill and now < deadline - 1.5:
      workers = [pid] if args.kill_all else children(pid)
      for victim in workers[:1]:  # none while the supervisor waits before it starts another one
        try:
          os.kill(victim, signal.SIGKILL)
          kills += 1
        except ProcessLookupError:
          pass
      next_kill = now + args.kill + random.uniform(-0.2, 0.2)
    if args.displace and began_at and other is None and now > began_at + 3:
      other, until, displaced_at = messaging.PubMaster(FAIR), now + args.displace, sent
    if other and now < until and sent % 2:
      for s in FAIR:
        other.send(s, messaging.new_message(s, valid=False))
    elif other and now >= until:
      other, until = False, now
    if pid and sent % 10 == 0:
      held = [cpu_and_memory(q) for q in [pid, *children(pid)]]
      worst_mb = max(worst_mb, (sum(m for _, m, _ in held), sum(m - shared for _, m, shared in held)))
    time.sleep(0.002)
  last = {s: len(v) for s, v in raw.items()}
  cpu1 = sum(cpu_and_memory(q)[0] for q in [pid, *children(pid)]) if pid else 0.0
  below = [pid, *children(pid)] if pid else []
  stopped_in = time.monotonic()
  for proc in procs:
    end(proc)
  stopped_in = time.monotonic() - stopped_in
  if writer is not None:
    writer.send_signal(signal.SIGINT)
    writer.wait(10)
  left = [q for q in below if alive(q)]
  assert began_at is not None
  frames_counted = sent - counted_from
  fair_raw = {s: raw[s][begin_raw[s] : last[s]] for s in FAIR}
  save(args.out, raw, FAIR)
  per = {s: len(v) for s, v in fair_raw.items()}
  ours = [e for e in events(fair_raw["fairObjects"]) if e.valid and e.fairObjects.frameId]
  back = next((round(e.logMonoTime / 1e9 - until, 1) for e in ours if e.logMonoTime > until * 1e9), None)
  ids = sorted({frame_id(d) for s in FAIR if s != "fairState" for d in fair_raw[s]})
  drops = [e.modelV2.frameDropPerc for e in events(raw["modelV2"][begin_raw["modelV2"] :])]
  bad = [
    any(q.name == "fairmodeld" and q.shouldBeRunning and not q.running for q in e.managerState.processes)
    for e in events(raw["managerState"])
  ]
  states = events(raw["fairState"])
  model_ids = [e.modelV2.frameId for e in events(raw["modelV2"][begin_raw["modelV2"] :])]
  return {
    "loggerd": loggerd_wrote(folder) if writer else None,
    "resumed_after_s": back if displaced_at else None,
    "real_time": rights,
    "frames": frames_counted,
    "frames_answered": len([i for i in ids if i >= counted_from]),
    "messages": per,
    "kills": kills,
    "submaster_seen": seen,
    "invalid": {s: v for s, v in invalid.items() if v},
    "gap": max((b - a for a, b in pairwise(ids)), default=None),
    "cpu_ms_per_frame": round(1000 * (cpu1 - cpu0) / max(1, frames_counted), 1)
    if not args.kill and not args.fault
    else None,
    "memory_mb": round(worst_mb[0], 1),
    "memory_own_mb": round(worst_mb[1], 1),
    "manager_states": len(raw["managerState"]),
    "should_but_does_not": sum(bad),
    "stand_in_frames": len(model_ids),
    "stand_in_missed": (model_ids[-1] - model_ids[0] + 1 - len(model_ids)) if model_ids else None,
    "frame_drop_perc_max": max(drops, default=None),
    "faults": sorted({e.fairState.fault for e in states if e.fairState.fault})[:8],
    "fair_state": {k: getattr(states[-1].fairState, k) for k in STATE} if states else None,
    "status": str(states[-1].fairState.status) if states else None,
    "stopped_in_s": round(stopped_in, 2),
    "left_running": left,
    "startup_s": round(began_at - begin, 2),
  }


def alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


def events(raws: list[bytes]) -> list[Any]:
  return [messaging.log_from_bytes(d) for d in raws]


def frame_id(data: bytes) -> int:
  e = messaging.log_from_bytes(data)
  return getattr(e, e.which()).frameId


def save(out: str, raw: dict[str, list[bytes]], fair: list[str]) -> None:
  """An rlog of what was said, as loggerd would write it, and the manager's states for selfdrived."""
  import zstandard

  every = sorted((d for s in fair for d in raw[s]), key=lambda d: messaging.log_from_bytes(d).logMonoTime)
  Path(out, "rlog.zst").write_bytes(zstandard.compress(b"".join(every), 10))
  Path(out, "managerState").write_bytes(b"".join(raw["managerState"]))
  Path(out, "modelV2").write_bytes(b"".join(raw["modelV2"]))


if __name__ == "__main__":
  main()
