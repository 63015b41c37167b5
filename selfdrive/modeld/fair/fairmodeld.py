#!/usr/bin/env python3
"""fairmodeld: what openpilot's manager starts. The process that takes frames and sends messages is worker.py's."""


def main() -> int:
  from openpilot.selfdrive.modeld.fair import worker

  return worker.main()


if __name__ == "__main__":
  raise SystemExit(main())
