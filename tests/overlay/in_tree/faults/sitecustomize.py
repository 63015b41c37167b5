"""Worker gone wrong on purpose: on the path of a run with --fault, it changes fairmodeld's worker a few seconds after
it began. FAIR_FAULT names what."""

import os
import sys
import threading
import time

AFTER = 4.0  # s after the worker's class is there


def spin(daemon):
  while True:
    pass


def leak(daemon, kept=[]):  # noqa: B006
  kept.append(b"x" * 50_000_000)
  time.sleep(0.01)


def flood(daemon):
  from openpilot.selfdrive.modeld.fair.ipc import messaging

  for _ in range(200):
    msg = messaging.new_message("fairObjects", valid=True)
    msg.fairObjects.init("objects", 90)
    daemon.pm.send("fairObjects", msg.to_bytes())


def hang(daemon):
  time.sleep(10_000)


def crash(daemon):
  import ctypes

  ctypes.string_at(0)


def arm():
  while not hasattr(worker := sys.modules["__main__"], "FairModeld"):  # run by python -m
    time.sleep(0.1)
  time.sleep(AFTER)
  print(f"fault: {os.environ['FAIR_FAULT']}", file=sys.stderr, flush=True)
  worker.FairModeld.step = globals()[os.environ["FAIR_FAULT"]]


if "FAIR_FAULT" in os.environ and any("fair.worker" in a or "fair/worker" in a for a in sys.orig_argv):
  threading.Thread(target=arm, daemon=True).start()
