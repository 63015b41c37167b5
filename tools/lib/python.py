"""Starts this Python again: our modules are found from any folder, and no file of the working folder is imported by
accident (-P)."""

import os
import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])


def command(*words: str | Path) -> list[str]:
  """`python words`, for subprocess."""
  return [sys.executable, "-P", *map(str, words)]


def environment(**more: str) -> dict[str, str]:
  """For what command() starts. An empty entry of PYTHONPATH would be the working folder."""
  path = dict.fromkeys(filter(None, (ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep))))
  return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", **more}
