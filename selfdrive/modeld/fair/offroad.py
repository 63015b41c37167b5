#!/usr/bin/env python3
"""fairoffroad: while the car is off, compiles what fairmodeld will want and has not. openpilot's manager starts it, and
ends it before the car drives."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, BundleError, bundle_path, fingerprint
from openpilot.selfdrive.modeld.fair.child import TRIAL_NICE, Child, ended, environment, python
from openpilot.selfdrive.modeld.fair.supervisor import say

TICK = 0.5  # s between two looks at the process that compiles
LOOK = 5.0  # s between two looks at what is wanted


def wanted() -> tuple[Any, ...] | None:
  """(bundle's folder, the runner or '', fingerprint of the folder), None without a bundle."""
  from openpilot.selfdrive.modeld.fair.ipc import Params, read_param

  params = Params()
  try:
    path = bundle_path(read_param(params, "FairBundle"), MODELS_DIR)
  except BundleError:
    return None
  return path, read_param(params, "FairRunner") or "", fingerprint(path)


def main(argv: Sequence[str] = ()) -> int:
  """Until SIGINT or SIGTERM. What failed is tried again when another bundle or runner is wanted, or the car was on in
  between."""
  stop: list[int] = []
  for sig in (signal.SIGINT, signal.SIGTERM):
    signal.signal(sig, lambda s, _: stop.append(s))
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
  child: Child | None = None
  done: tuple[Any, ...] | None = None
  next_look = 0.0
  try:
    while not stop:
      if child is None and time.monotonic() >= next_look:
        next_look = time.monotonic() + LOOK
        if (now := wanted()) is not None and now != done:
          done = now
          command = python("openpilot.selfdrive.modeld.fair.compile", str(now[0]), "--lacking", now[1])
          child = Child(command, memory, TRIAL_NICE, lambda w: {"env": environment(), "stdout": w})
      elif child is not None:
        child.fill()
        if child.dead():
          if child.proc.returncode:
            say(f"compiling {done[0] if done else ''} {ended(child.proc.returncode)}", "fairoffroad")
          child.close()
          child = None
      time.sleep(TICK)
  finally:
    if child is not None:
      child.kill()
      child.wait(1.0)
  return 0


if __name__ == "__main__":
  raise SystemExit(main(sys.argv[1:]))
