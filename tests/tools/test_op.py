"""tools/op.sh: what it installs, and when it need not."""
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = """#!/bin/sh
case "$*" in *"-m pip"*) for last; do :; done; echo "${last##*/}" >> "$0.pip" ;; esac
"""


@pytest.fixture
def op(tmp_path, monkeypatch):
  """op.sh in a repository of its own, whose virtual environment's Python only writes down what pip is asked for. -> the extras that a command installs."""
  (tmp_path / "repo" / "tools").mkdir(parents=True)
  for name in ("tools/op.sh", "pyproject.toml"):
    shutil.copy(ROOT / name, tmp_path / "repo" / name)
  python = tmp_path / "venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(PYTHON)
  python.chmod(0o755)
  monkeypatch.setenv("FAIR_VENV", str(tmp_path / "venv"))
  log = Path(f"{python}.pip")

  def run(command: str) -> list[str]:
    log.write_text("")
    subprocess.run(["bash", str(tmp_path / "repo" / "tools" / "op.sh"), command], check=True, capture_output=True)
    return [line.removeprefix("repo[").removesuffix("]") for line in log.read_text().splitlines()]

  run.repo = tmp_path / "repo"
  return run


def test_what_holds_more_counts(op):
  assert op("setup") == ["tools"] and op("setup") == []
  assert op("teachers") == ["tools,teach"] and op("replay") == op("labels") == []
  assert op("compile") == ["tools,compile"]
  assert op("students") == ["tools,train"] and op("teachers") == op("python") == []
  assert op("lint") == ["tools,train,test"]
  assert [c for c in ("test", "students", "teachers", "compile", "demo") if op(c)] == []


def test_more_first_then_less(op):
  assert op("students") == ["tools,train"]
  assert op("teachers") == op("label") == op("setup") == []
  assert op("compile") == ["tools,compile"]  # which train does not hold
  (op.repo / "pyproject.toml").write_text((op.repo / "pyproject.toml").read_text() + "\n")
  assert op("teachers") == ["tools,teach"]  # other requirements: all anew


def test_extras_hold_what_the_script_says():
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  assert "openpilot-fair[teach]" in extras["train"] and "openpilot-fair[compile]" in extras["test"]
