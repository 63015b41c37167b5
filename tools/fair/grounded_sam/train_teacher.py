#!/usr/bin/env python3
"""`tools/op.sh images train-teacher` under the name that the design note of the Grounded SAM platform has."""

from openpilot.tools.fair.images.train_teacher import main
from openpilot.tools.lib.errors import cli

if __name__ == "__main__":
  raise SystemExit(cli(main)())
