#!/usr/bin/env python3
"""fairmodeld: what openpilot's manager starts. The process that takes frames and sends messages is worker.py's."""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] = ()) -> int:
  """argv: the command line. openpilot's launcher forks and calls main(): sys.argv is then the manager's, and not ours to read."""
  from openpilot.selfdrive.modeld.fair import worker

  return worker.main(argv)


if __name__ == "__main__":
  raise SystemExit(main(sys.argv[1:]))
