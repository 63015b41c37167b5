#!/usr/bin/env python3
"""A bundle in every runner that is here: latency p50 and p99, memory, time to load; beside ONNX Runtime, on frames of a
drive or noise. Then fairmodeld's time from its start to its first message.

python tests/bench/bench_runners.py [BUNDLE] [--runners onnx tinygrad-cpu] [--frames 100] [--video qcamera.ts] [--start]

A runner is measured in a process of its own, on one core, with artifacts of this machine
(selfdrive/modeld/fair/compile.py); without one it is left out with the reason."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run as a file
  import from_root  # noqa: F401

import numpy as np

from openpilot.cereal import messaging
from openpilot.cereal.visionipc import VisionIpcServer, VisionStreamType, nv12_info
from openpilot.selfdrive.modeld.fair.artifact import ArtifactError
from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.parity import differences, sample_inputs
from openpilot.selfdrive.modeld.fair.machine import memory_mb
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics
from openpilot.selfdrive.modeld.fair.runners import RUNNERS, make_runner
from openpilot.tools.lib.errors import UserError, cli

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 3


def model_frames(video, n):
  """(n, 6, 128, 256) of a qcamera, one a second; noise without one."""
  if video is None:
    return np.random.default_rng(0).integers(0, 256, (n, 6, 128, 256), dtype=np.uint8)
  from openpilot.tools.lib.framereader import FrameReader

  reader = FrameReader(video, "nv12")
  warp = ModelFrame(526, 330, 526, 526 * 330)
  warp.set_calibration(np.zeros(3), camera_intrinsics(526, 330))
  return np.stack([warp.warp(reader.get(20 * i % len(reader)).reshape(-1)).copy() for i in range(n)])


def child(path, name, frames, repeat):
  """Runs in its own process; prints one line of JSON."""
  frames = np.load(frames)
  bundle = load_bundle(path)
  before, rows = memory_mb(), []
  for graph in bundle.graphs:
    t = time.perf_counter()
    try:
      runner = make_runner(name, bundle, graph)
    except (ArtifactError, BundleError, ImportError) as e:
      print(json.dumps({"skipped": str(e)}))
      return
    load, times, outputs = time.perf_counter() - t, [], []
    x = sample_inputs(graph, 0)
    cpu = 0.0
    for i in range(WARM_UP + repeat):
      x["frame"] = frames[i % len(frames)][None]
      t, c = time.perf_counter(), time.process_time()
      out = runner.run(x)
      times.append(time.perf_counter() - t)
      cpu += (time.process_time() - c) * (i >= WARM_UP)
      if i < 4:
        outputs.append({k: v.copy() for k, v in out.items()})
    if name != "onnx":
      theirs = make_runner("onnx", bundle, graph)
      off = max(
        max(differences(o, theirs.run({**x, "frame": frames[i % len(frames)][None]})).values())
        for i, o in enumerate(outputs)
      )
    else:
      off = 0.0
    p50, p99 = np.percentile(times[WARM_UP:], (50, 99)) * 1e3
    rows.append(
      {
        "graph": graph["name"],
        "what": runner.what,
        "load": load,
        "first": times[0],
        "p50": p50,
        "p99": p99,
        "cpu": cpu / repeat * 1e3,
        "off": off,
      }
    )
  print(json.dumps({"rows": rows, "memory": memory_mb() - before}))


def first_message(path, runner):
  """Seconds from the start of the process to its first message of a frame, a camera at 20 Hz being there already; and
  its CPU time until then."""
  os.environ.update(
    OPENPILOT_PREFIX=f"bench-{os.getpid()}-{runner}",
    PARAMS_ROOT=tempfile.mkdtemp(),
    PYTHONPATH=str(ROOT),
    FAIR_MODELS_DIR=str(path.parent),
  )
  from openpilot.common.params import Params

  Params().put("FairBundle", path.name)
  w, h = 1344, 760
  stride, y_height, _, size = nv12_info(w, h)
  server = VisionIpcServer("camerad")
  kind = VisionStreamType.VISION_STREAM_NARROW_ROAD
  server.create_buffers_with_sizes(kind, 4, w, h, size, stride, stride * y_height)
  server.start_listener()
  services = ["fairDepth", "fairSegmentation", "fairObjects", "fairLanes"]
  sm = messaging.SubMaster(services, ignore_avg_freq=services)
  buf = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
  t0 = time.perf_counter()
  p = subprocess.Popen([sys.executable, "-m", "openpilot.selfdrive.modeld.fair.worker", "--runner", runner], cwd=ROOT)
  try:
    frame = 0
    while not any(sm.seen[s] for s in services):
      if time.perf_counter() - t0 > 600 or p.poll() is not None:
        raise SystemExit("fairmodeld sent nothing")
      if time.perf_counter() - t0 > frame * 0.05:
        now = time.monotonic_ns()
        server.send(kind, buf, frame, now, now)
        frame += 1
      sm.update(5)
    seconds = time.perf_counter() - t0
    with open(f"/proc/{p.pid}/stat") as f:
      ticks = f.read().rsplit(")", 1)[1].split()
    return seconds, (int(ticks[11]) + int(ticks[12])) / os.sysconf("SC_CLK_TCK")
  finally:
    p.terminate()
    p.wait()


def main():
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("bundle", type=Path, nargs="?", default=MODELS_DIR / "scene-nano")
  p.add_argument("--runners", nargs="+", choices=RUNNERS, default=["onnx", "tinygrad-cpu"])
  p.add_argument("--frames", type=int, default=100)
  p.add_argument("--video", type=Path, help="a qcamera.ts; default: noise")
  p.add_argument("--start", action="store_true", help="also measure the start of fairmodeld")
  p.add_argument("--child", help=argparse.SUPPRESS)
  args = p.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
  if args.child:
    child(args.bundle, args.runners[0], args.child, args.frames)
    return
  load_bundle(args.bundle)  # what is wrong with it is said once, and here
  print(
    f"{args.bundle.name}, {args.frames} frames of {args.video.name if args.video else 'noise'}, one core; ms, MB, s"
  )
  print(
    f"{'runner':<34} {'graph':<14} {'p50':>8} {'p99':>8} {'CPU':>8} {'of onnx':>8} {'first':>8} {'load s':>7} "
    f"{'memory':>7} {'off':>8}"
  )
  base = {}
  with tempfile.TemporaryDirectory() as folder:
    np.save(Path(folder) / "frames.npy", model_frames(args.video, min(args.frames, 50)))
    for name in dict.fromkeys(("onnx", *args.runners)):
      command = [
        sys.executable,
        __file__,
        str(args.bundle),
        "--runners",
        name,
        "--frames",
        str(args.frames),
        "--child",
        f"{folder}/frames.npy",
      ]
      done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
      if done.returncode:
        raise UserError(f"{name} ended with {done.returncode} on {args.bundle.name}: what it said stands above")
      found = json.loads(done.stdout.splitlines()[-1])
      if "skipped" in found:
        print(f"{name:<34} not measured: {found['skipped']}")
        continue
      for r in found["rows"]:
        ratio = r["p50"] / base.setdefault(r["graph"], r["p50"])
        times = (
          f"{r['p50']:>8.1f} {r['p99']:>8.1f} {r['cpu']:>8.1f} {ratio:>8.1f} {r['first'] * 1e3:>8.0f} {r['load']:>7.2f}"
        )
        print(f"{r['what'][:34]:<34} {r['graph']:<14} {times} {found['memory']:>7.0f} {r['off']:>8.1e}")
  if args.start:
    for name in dict.fromkeys(("onnx", *args.runners)):
      seconds, cpu = first_message(args.bundle.resolve(), name)
      print(
        f"{name}: first message {seconds:.2f} s after the start of fairmodeld, {cpu:.2f} s of them on the CPU; the "
        "goal is 2 s"
      )


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())
