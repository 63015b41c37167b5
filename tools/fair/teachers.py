#!/usr/bin/env python3
"""Lists the teachers: what they label, under which licence, and whether their weights are here."""

import argparse

from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.teacher import LICENCES, find_weights, weight_dirs
from openpilot.tools.lib.errors import UserError, cli


def main() -> None:
  argparse.ArgumentParser(prog="teachers", description=__doc__).parse_args()
  print(f"{'teacher':<34} {'licence':<16} {'size':>7}  {'weights':<10} labels")
  for name, entry in TEACHERS.items():
    try:
      here = "here" if not entry.weights or find_weights(entry.weights) else ""
    except UserError:
      here = "not here"
    licence = entry.licence + ("" if LICENCES[entry.licence] else " *")
    print(f"{name:<34} {licence:<16} {entry.size:>7}  {here:<10} {entry.says}")
  print(f"\n* restricts use, of what learns from it too: read it, then add --accept-licence {'|'.join(k for k, free in LICENCES.items() if not free)}")
  print(f"weights are looked for in {', '.join(map(str, weight_dirs()))} and the hub's cache; FAIR_WEIGHTS names more folders")


if __name__ == "__main__":
  raise SystemExit(cli(main)())
