#!/usr/bin/env python3
"""`tools/op.sh images optimize` under the name that the design note of the Grounded SAM platform has."""

import sys

from openpilot.tools.fair.grounded_sam.words import in_our_words
from openpilot.tools.fair.images.optimize import main
from openpilot.tools.lib.errors import cli

if __name__ == "__main__":
  sys.argv[1:] = in_our_words(sys.argv[1:], ("--model",))
  raise SystemExit(cli(main)())
