#!/usr/bin/env python3
"""A small manager for a PC: runs the processes of process_config while deviceState.started is set. On a device
openpilot's own manager does this."""

import argparse
import signal
import sys
import time

from openpilot.cereal import messaging
from openpilot.common.params import ParamKeyFlag, Params
from openpilot.selfdrive.manager.process import ManagerProcess, ensure_running
from openpilot.selfdrive.manager.process_config import managed_processes

PERIOD = 0.1  # s between two looks at flag and deviceState
STATE_PERIOD = 0.5  # s between two managerState
LOST = 3.0  # s without deviceState after which nothing counts as started: it comes at 2 Hz


def state_message(procs: list[ManagerProcess], started: bool, params: Params):
  msg = messaging.new_message("managerState", valid=True)
  entries = msg.managerState.init("processes", len(procs))
  for entry, p in zip(entries, procs, strict=True):
    entry.name, entry.running, entry.shouldBeRunning = p.name, p.alive, p.should_run(started, params, None)
    entry.pid, entry.exitCode = (p.proc.pid if p.alive and p.proc else 0), p.exitcode or 0
  return msg


def run(procs: list[ManagerProcess]) -> None:
  """Until KeyboardInterrupt; leaves no process behind."""
  params = Params()
  params.clear_all(ParamKeyFlag.CLEAR_ON_MANAGER_START)
  pm, sm = messaging.PubMaster(["managerState"]), messaging.SubMaster(["deviceState"])
  was: bool | None = None
  last_state = 0.0
  try:
    while True:
      sm.update(int(PERIOD * 1000))
      started = bool(
        sm.seen["deviceState"] and sm["deviceState"].started and time.monotonic() - sm.recv_time["deviceState"] < LOST
      )
      if started != was:
        params.put_bool("IsOnroad", started)
        params.put_bool("IsOffroad", not started)
        params.clear_all(
          ParamKeyFlag.CLEAR_ON_ONROAD_TRANSITION if started else ParamKeyFlag.CLEAR_ON_OFFROAD_TRANSITION
        )
        was = started
      ensure_running(procs, started, params)
      if time.monotonic() - last_state > STATE_PERIOD:
        pm.send("managerState", state_message(procs, started, params))
        last_state = time.monotonic()
  finally:
    for p in procs:
      p.stop(block=False)
    for p in procs:
      p.stop()


def main() -> int:
  argparse.ArgumentParser(prog="manager", description=__doc__).parse_args()

  def stop(*_) -> None:
    raise KeyboardInterrupt

  signal.signal(signal.SIGTERM, stop)
  try:
    run(list(managed_processes.values()))
  except KeyboardInterrupt:
    return 0
  except messaging.MultiplePublishersError as e:
    print(f"error: a manager runs already: {e}", file=sys.stderr)
    return 2
  except OSError as e:  # no folder for params or sockets, a full or read-only disk
    print(f"error: {e}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
