#!/usr/bin/env python3
"""fairmodeld, the process, over an hour of frames as fast as it takes them: its memory, open files and what waits in
its readers' queues.

The next frame goes out when the message of the one before is there, with modelV2 before it, and calibration,
deviceState and carState at their rates. Two small graphs made here find objects and lane points in every frame, so that
tracking works; --bundle takes another.

python tests/bench/bench_soak.py [--frames 72000] [--bundle models/scene-nano] [--minutes 20] [--inside]"""

import argparse
import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

HOUR = 72_000  # frames at 20 Hz
WARM_UP = 0.1  # of the frames, at most
WARM_FRAMES = 3000
LIMIT = 1.0  # MB that memory may grow after it
W, H = 1344, 760


def small_bundle(folder: Path) -> Path:
  sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "selfdrive" / "modeld"))
  from openpilot.selfdrive.modeld.fair.bundle import write_manifest
  from fair_bundle import lanes_graph, manifest, objects_graph, write_bundle, write_graphs

  write_bundle(folder)
  r = np.random.default_rng(0)
  raw = {
    "heat": np.full((1, 3, 32, 64), -9, np.float32),
    "box": r.uniform(8, 40, (1, 4, 32, 64)).astype(np.float32),
    "coef": np.tanh(r.normal(0, 1, (1, 16, 32, 64))).astype(np.float32),
    "proto": r.normal(0, 1, (1, 16, 64, 128)).astype(np.float32),
  }
  for n in range(12):
    raw["heat"][0, n % 3, 3 + 2 * n, 5 * n + 2] = (
      -0.5 - n / 20
    )  # the frame's level takes it over the threshold, and under it again
  bundle = write_graphs(folder, [objects_graph(folder, raw), lanes_graph(folder), manifest()["graphs"][0]])
  return write_manifest(
    folder, {**bundle.manifest, "budget_ms": 1000}
  ).path  # on a busy machine too every graph runs in every frame


def memory(pid: int) -> float:
  """Resident, MB."""
  with open(f"/proc/{pid}/statm") as f:
    return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--frames", type=int, default=HOUR)
  p.add_argument("--minutes", type=float, help="stop after so many, with the frames that there are")
  p.add_argument(
    "--inside",
    action="store_true",
    help="fairmodeld's loop in this process: nothing waits for the scheduler; memory is then of both",
  )
  p.add_argument("--bundle", type=Path, help="a bundle's folder; default: a small one made here")
  args = p.parse_args()
  scratch = tempfile.TemporaryDirectory(prefix="soak")
  os.environ["OPENPILOT_PREFIX"], os.environ["PARAMS_ROOT"] = f"soak-{os.getpid()}", scratch.name
  from openpilot.cereal import messaging
  from openpilot.cereal.visionipc import VisionIpcServer, VisionStreamType, nv12_info

  bundle = args.bundle or small_bundle(Path(scratch.name) / "small")
  road, size = VisionStreamType.VISION_STREAM_NARROW_ROAD, nv12_info(W, H)[3]
  server = VisionIpcServer("camerad")
  server.create_buffers(road, 16, W, H)
  r = np.random.default_rng(1)
  for k, buf in enumerate(server.buffers[road]):
    buf.data[:size] = r.integers(0, 250, size, dtype=np.uint8)
    buf.data[:W] = 10 * k  # the first lines: what the small graphs look at
  server.start_listener()
  pm = messaging.PubMaster(["modelV2", "extrinsicsCalibration", "deviceState", "carState"])
  state = messaging.sub_sock("fairState")
  socks = {s: messaging.sub_sock(s) for s in ("fairSegmentation", "fairObjects", "fairLanes", "fairDepth")}
  x = np.linspace(0, 13, 33) ** 2
  model = messaging.new_message("modelV2", valid=True)
  for line, y in zip(model.modelV2.init("laneLines", 4), (-5.1, -1.7, 1.7, 5.1), strict=True):
    line.x, line.y, line.z = x.tolist(), (y + 0 * x).tolist(), [1.2] * 33
  model.modelV2.laneLineProbs = [0.9] * 4
  daemon = proc = None
  if args.inside:
    from openpilot.selfdrive.modeld.fair.worker import FairModeld

    gc.disable()  # as config_realtime_process()
    daemon = FairModeld(lambda: bundle, None)
    daemon.send_state("starting")
  else:
    proc = subprocess.Popen([sys.executable, "-m", "openpilot.selfdrive.modeld.fair.worker", "--bundle", str(bundle)])
  pid = os.getpid() if proc is None else proc.pid
  poller = messaging.Poller()
  for sock in socks.values():
    poller.registerSocket(sock)

  def send(n: int) -> None:
    model.modelV2.frameId = n  # a number in place: nothing of the message grows
    model.clear_write_flag()
    pm.send("modelV2", model.to_bytes())
    if n % 5 == 0:
      msg = messaging.new_message("extrinsicsCalibration", valid=True)
      msg.extrinsicsCalibration.calStatus = "calibrated"
      msg.extrinsicsCalibration.rpyCalib, msg.extrinsicsCalibration.height = [0.0, 0.02 + n // 2000 * 1e-4, 0.0], [1.2]
      pm.send("extrinsicsCalibration", msg)
      car = messaging.new_message("carState", valid=True)
      car.carState.vEgo = 20.0
      pm.send("carState", car)
    if n % 10 == 0:
      msg = messaging.new_message("deviceState", valid=True)
      msg.deviceState.deviceType, msg.deviceState.started = "mici", True
      pm.send("deviceState", msg)
    server.send_buffer(road, server.get_buffer(road), n, n * 50_000_000, n * 50_000_000 + 1)

  n, done, begun, most, lost = 0, 0, time.monotonic(), 0, 0
  heard = dict.fromkeys(socks, 0)
  rows: list[tuple[int, float, int, int]] = []
  warm = min(WARM_FRAMES, int(args.frames * WARM_UP))
  print(f"{'frames':>8} {'s':>7} {'memory, MB':>11} {'open files':>11} {'most messages waiting':>22}")
  while done < args.frames and (args.minutes is None or time.monotonic() - begun < args.minutes * 60):
    n += 1
    send(n)
    end, answered = time.monotonic() + 3.0, False
    while not answered and time.monotonic() < end and (proc is None or proc.poll() is None):
      if daemon is not None:
        daemon.step()
      poller.poll(200 if daemon is None else 1)
      for s, sock in socks.items():
        got = messaging.drain_sock_raw(sock)
        heard[s] += len(got)
        most = max(most, len(got))
        answered |= any(getattr(messaging.log_from_bytes(dat), s).frameId == n for dat in got[-1:])
    assert proc is None or proc.poll() is None, f"fairmodeld ended with {proc.returncode} after {done} frames"
    done += answered
    lost += not answered and done > 0
    if answered and (done == warm or done % max(1, args.frames // 24) == 0):
      rows.append((done, memory(pid), len(os.listdir(f"/proc/{pid}/fd")), most))
      print(f"{done:8d} {time.monotonic() - begun:7.0f} {rows[-1][1]:11.2f} {rows[-1][2]:11d} {most:22d}", flush=True)
      most = 0
  rows.append((done, memory(pid), len(os.listdir(f"/proc/{pid}/fd")), most))
  with open(f"/proc/{pid}/stat") as f:
    ticks = f.read().rsplit(")", 1)[1].split()
  cpu = (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
  states = messaging.drain_sock(state)
  if proc is not None:
    proc.send_signal(signal.SIGINT)
    proc.wait(30)
  after = [row for row in rows if row[0] >= warm] or rows[-1:]
  growth = after[-1][1] - after[0][1]
  s = states[-1].fairState if states else None
  took = time.monotonic() - begun
  print(
    f"{done} frames of {args.frames} in {took:.0f} s, {cpu / max(1, done) * 1e3:.2f} ms of CPU a frame, {lost} frames "
    "without an answer"
  )
  print(
    f"messages: {', '.join(f'{k} {v}' for k, v in heard.items())}; faults "
    f"{s.faultCount if s else 'unknown'}{': ' + s.fault if s and s.fault else ''}"
  )
  print(
    f"memory after {after[0][0]} frames {after[0][1]:.2f} MB, at the end {after[-1][1]:.2f}, most "
    f"{max(r[1] for r in after):.2f}"
  )
  print(f"growth after warm-up {growth:+.2f} MB, {'within' if growth < LIMIT else 'OVER'} {LIMIT:g}")
  print(
    f"open files {after[0][2]} -> {after[-1][2]}; most messages that waited in one reader's queue "
    f"{max(r[3] for r in after)}"
  )
  server.close()
  scratch.cleanup()


if __name__ == "__main__":
  main()
