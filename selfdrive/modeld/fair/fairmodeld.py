#!/usr/bin/env python3
"""fairmodeld: what openpilot's manager starts. It takes no frame and sends no message: that is worker.py's, in a
process below this one, which may die."""

import sys
from collections.abc import Sequence

from openpilot.selfdrive.modeld.fair.child import python
from openpilot.selfdrive.modeld.fair.supervisor import Supervisor

FOLDER = "openpilot.selfdrive.modeld.fair"


def trial(path: str, runner: str | None) -> list[str]:
  return python(f"{FOLDER}.trial", path, *(["--runner", runner] if runner else []))


def main(argv: Sequence[str] | None = None) -> int:
  """argv: the worker's command line, of a run by hand. openpilot's launcher forks and calls main(): sys.argv is then
  the manager's, and nothing but SIGINT or SIGTERM ends what it started."""
  return Supervisor(python(f"{FOLDER}.worker", *(argv or ())), trial, by_hand=argv is not None).run()


if __name__ == "__main__":
  raise SystemExit(main(sys.argv[1:]))
