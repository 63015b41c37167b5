"""The whole of it in the openpilot checkout that OPENPILOT_DIR names: see real_tree.py, which tells what it wants of it."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
def test_in_a_real_openpilot(tmp_path):
  if not os.environ.get("OPENPILOT_DIR"):
    pytest.skip("OPENPILOT_DIR is not set: a clean, built openpilot checkout")
  done = subprocess.run([sys.executable, str(HERE / "real_tree.py"), "--out", str(tmp_path)], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr


def test_without_a_checkout_it_says_what_it_wants(tmp_path):
  env = {k: v for k, v in os.environ.items() if not k.startswith("OPENPILOT_")}
  done = subprocess.run([sys.executable, str(HERE / "real_tree.py")], capture_output=True, text=True, env=env)
  assert done.returncode == 2 and "set OPENPILOT_DIR" in done.stderr
  done = subprocess.run([sys.executable, str(HERE / "real_tree.py"), str(tmp_path)], capture_output=True, text=True, env=env)
  assert done.returncode == 2 and "OPENPILOT_PYTHON" in done.stderr
