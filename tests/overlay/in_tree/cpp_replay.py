"""openpilot's own replay (C++) of a route's qcamera, fairmodeld beside it as the manager's process class starts it,
read by its SubMaster."""

import argparse
import os
import pty
import select
import shlex
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tree import FAIR, NEW, ROOT, children, cpu_and_memory, logged, loggerd, loggerd_wrote, messaging, put_bool, tell

STATE = ("framesReceived", "framesProcessed", "framesDropped", "framesLate", "calibrated", "viewFilled")


def main() -> None:
  p = argparse.ArgumentParser()
  p.add_argument("--out", required=True)
  p.add_argument(
    "--route", required=True, help="FOLDER/ROUTE: the folder with its segments, its name without a segment's number"
  )
  p.add_argument("--seconds", type=float, default=30.0)
  p.add_argument("--start", type=int, default=0)
  p.add_argument("--speed", default="1.0")
  p.add_argument("--block", help="the services that replay leaves to us; default: none, it publishes them all")
  args = p.parse_args()
  os.makedirs(args.out, exist_ok=True)
  from openpilot.common.params import Params
  from openpilot.common.prefix import OpenpilotPrefix

  with OpenpilotPrefix(f"fair{os.getpid()}"):
    put_bool(Params(), "FairEnabled", True)
    tell(run(args), args.out)


def replay(args: argparse.Namespace, block: str | None) -> tuple[subprocess.Popen, int]:
  ours, its = pty.openpty()
  route = Path(args.route)
  command = [
    str(ROOT / "tools/replay/replay"),
    "--qcam",
    "--no-loop",
    "--no-hw-decoder",
    "-x",
    args.speed,
    "-s",
    str(args.start),
    "-d",
    str(route.parent),
  ]
  command += [*(["--block", block] if block else []), route.name]
  print(shlex.join(command), flush=True)
  return subprocess.Popen(
    command, stdin=its, stdout=its, stderr=its, env={**os.environ, "TERM": "xterm"}, start_new_session=True
  ), ours


def run(args: argparse.Namespace) -> dict[str, Any]:
  from openpilot.system.manager.process_config import managed_processes

  socks = {s: messaging.sub_sock(s, timeout=0) for s in FAIR}
  camera = messaging.sub_sock("narrowRoadEncodeIdx" if NEW else "roadEncodeIdx", timeout=0)
  fair = managed_processes["fairmodeld"]
  fair.start()
  time.sleep(6)  # the network is loaded: only then frames come
  folder = str(Path(args.out, "realdata").absolute())
  writer = loggerd(folder)
  player, fd = replay(args, args.block)
  raw: dict[str, list[bytes]] = {s: [] for s in FAIR}
  sent, seen, screen = [], [], b""  # sent: (s, frame) of every frame that replay says
  pids = [fair.proc.pid, *children(fair.proc.pid)]
  cpu = sum(cpu_and_memory(q)[0] for q in pids)
  begin = time.monotonic()
  while time.monotonic() < begin + args.seconds and player.poll() is None:
    for s, sock in socks.items():
      for d in messaging.drain_sock_raw(sock):
        raw[s].append(d)
        seen.append((time.monotonic() - begin, s))
    for d in messaging.drain_sock_raw(camera):
      e = messaging.log_from_bytes(d)
      sent.append((time.monotonic() - begin, getattr(e, e.which()).frameId))
    if select.select([fd], [], [], 0)[0]:
      screen = (screen + os.read(fd, 65536))[-20000:]
    time.sleep(0.002)
  # of the worker that began; what a second one would need is missing
  cpu = sum(cpu_and_memory(q)[0] for q in pids) - cpu
  player.send_signal(signal.SIGINT)
  try:
    player.wait(3)
  except subprocess.TimeoutExpired:
    player.kill()
  alive = fair.proc is not None and fair.proc.is_alive()
  resumed = None
  if args.block is None:  # the other publisher is gone: ours take their services again
    end, resumed = time.monotonic() + 15, 0
    while time.monotonic() < end:
      resumed += sum(len(messaging.drain_sock_raw(sock)) for sock in socks.values())
      time.sleep(0.05)
  fair.stop()
  if writer is not None:
    writer.send_signal(signal.SIGINT)
    writer.wait(10)
  seconds = seen[-1][0] - seen[0][0] if seen else 0.0
  events = [messaging.log_from_bytes(d) for s in FAIR for d in raw[s]]
  ids = Counter(getattr(e, e.which()).frameId for e in events if e.which() in ("fairObjects", "fairSegmentation"))
  states = [e.fairState for e in events if e.which() == "fairState"]
  Path(args.out, "screen.txt").write_bytes(screen)
  Path(args.out, "rlog").write_bytes(b"".join(d for s in FAIR for d in raw[s]))
  due = {
    i for t, i in sent if ids and i >= min(ids) and t < sent[-1][0] - 0.5
  }  # from the first answer on; the last ones are still under way
  return {
    "sent": len(sent),
    "first_answer_s": round(min(t for t, i in sent if i in ids) - sent[0][0], 2) if due else None,
    "frames": len(due),
    "answered": len(due & set(ids)),
    "messages": {s: len(raw[s]) for s in FAIR if raw[s]},
    "invalid": Counter(e.which() for e in events if not e.valid),
    "alive": alive,
    "resumed_messages": resumed,
    "cpu_ms_per_frame": round(1000 * cpu / max(1, len(ids)), 1),
    "camera": f"{states[-1].cameraWidth}x{states[-1].cameraHeight}" if states else None,
    "state": {k: getattr(states[-1], k) for k in STATE} if states else None,
    "mb_per_minute": logged([d for s in FAIR for d in raw[s]], seconds) if seconds else None,
    "loggerd": loggerd_wrote(folder) if writer else None,
    "faults": sorted({s.fault for s in states if s.fault}),
  }


if __name__ == "__main__":
  main()
