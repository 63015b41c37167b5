"""Starts this Python again: our modules are found from any folder, and no file of the working folder is imported by
accident (-P)."""

import os
import subprocess
import sys
from pathlib import Path

from openpilot.tools.lib.errors import printable

ROOT = str(Path(__file__).resolve().parents[2])


def command(*words: str | Path) -> list[str]:
  """`python words`, for subprocess."""
  return [sys.executable, "-P", *map(str, words)]


def environment(**more: str) -> dict[str, str]:
  """For what command() starts. An empty entry of PYTHONPATH would be the working folder."""
  path = dict.fromkeys(filter(None, (ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep))))
  return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONSAFEPATH": "1", **more}


def last_line(said: str) -> str:
  """Of what a process said, as part of a message; "" of nothing."""
  return printable((said.strip().splitlines() or [""])[-1].removeprefix("error: "), 200)


def why_failed(done: "subprocess.CompletedProcess[str]") -> str:
  """Of a process that failed: the last line of its standard error, else its exit code."""
  return last_line(done.stderr or "") or f"exit code {done.returncode}"
