"""Benches start as READMEs print them: as a file from any folder, and as a module from the repository's root, without
PYTHONPATH."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHES = sorted(p.stem for p in (ROOT / "tests" / "bench").glob("bench_*.py"))
NEEDED = {"bench_dora": "peft", "bench_teachers": "peft"}


def start(cwd, *words) -> subprocess.CompletedProcess:
  env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
  return subprocess.run(
    [sys.executable, *map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHES)
def test_help(name, tmp_path):
  if name in NEEDED:
    pytest.importorskip(NEEDED[name])
  for cwd, words in ((tmp_path, [ROOT / "tests" / "bench" / f"{name}.py"]), (ROOT, ["-m", f"tests.bench.{name}"])):
    done = start(cwd, *words, "--help")
    assert (
      done.returncode == 0 and done.stdout.startswith("usage:") and f"python tests/bench/{name}.py" in done.stdout
    ), done.stderr
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("name", "said"), [("bench_runners", "no bundle at nope"), ("bench_logreader", "there is no log nope")]
)
def test_bad_input_is_one_line(name, said, tmp_path):
  done = start(tmp_path, ROOT / "tests" / "bench" / f"{name}.py", "nope")
  assert (
    done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
  )
