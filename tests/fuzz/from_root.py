"""Imported first by a bench that is run as a file: openpilot is then found from any folder, without PYTHONPATH, also by
the processes that it starts."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
sys.path.insert(0, ROOT)  # before this folder, which stays: a spawned process imports this again
os.environ["PYTHONPATH"] = os.pathsep.join(
  dict.fromkeys(filter(None, (ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep))))
)
