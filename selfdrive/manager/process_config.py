"""What runs when, in openpilot's words: should_run(started, params, CP). In an overlay only these two lines go into
openpilot's own table."""

from typing import Any

from openpilot.common.params import Params
from openpilot.selfdrive.manager.process import ManagerProcess, NativeProcess, PythonProcess, ShouldRun

__all__ = ["ManagerProcess", "NativeProcess", "PythonProcess", "managed_processes"]


def always_run(started: bool, params: Params, CP: Any) -> bool:
  return True


def only_onroad(started: bool, params: Params, CP: Any) -> bool:
  return started


def only_offroad(started: bool, params: Params, CP: Any) -> bool:
  return not started


def notcar(started: bool, params: Params, CP: Any) -> bool:
  return started and CP is not None and CP.notCar


def iscar(started: bool, params: Params, CP: Any) -> bool:
  return started and (CP is None or not CP.notCar)


def fair(started: bool, params: Params, CP: Any) -> bool:
  return params.get_bool("FairEnabled")


def and_(*fns: ShouldRun) -> ShouldRun:
  return lambda started, params, CP: all(fn(started, params, CP) for fn in fns)


def or_(*fns: ShouldRun) -> ShouldRun:
  return lambda started, params, CP: any(fn(started, params, CP) for fn in fns)


def not_(fn: ShouldRun) -> ShouldRun:
  return lambda started, params, CP: not fn(started, params, CP)


procs: list[ManagerProcess] = [
  PythonProcess("fairmodeld", "openpilot.selfdrive.modeld.fair.fairmodeld", and_(only_onroad, fair)),
  PythonProcess("fairoffroad", "openpilot.selfdrive.modeld.fair.offroad", and_(only_offroad, fair)),
]

managed_processes = {p.name: p for p in procs}
