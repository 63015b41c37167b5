"""A small cluster of Ray's on this machine, one of whose workers is killed. Ray is not among what the tests install:
pip install -e '.[scale]'."""

import os
import signal
import subprocess
import time

import pytest
from test_label_claims import route as small_route
from test_labels import command, contents, run, write_network

from openpilot.tools.fair.labels.claims import CLAIMS

pytest.importorskip("ray", reason="Ray is not installed")
route = small_route  # a fixture of theirs


@pytest.mark.slow
def test_a_killed_worker_costs_its_job_and_the_store_is_one_machines(route, tmp_path):
  args = (route, "--teachers", write_network(tmp_path / "net"), "--focal", 110, "--batch-size", 7)
  assert run(*args, "--output", tmp_path / "whole").returncode == 0
  out = tmp_path / "s"
  with open(tmp_path / "err", "w") as err:
    proc = subprocess.Popen(command(*args, "--output", out, "--ray", "--workers", 2), stderr=err, stdout=err)
    killed, end = None, time.monotonic() + 240
    while proc.poll() is None and time.monotonic() < end:
      for claim in out.glob(f"{CLAIMS}/*/tiny-*.0"):
        words = claim.read_text().split()
        if killed is None and len(words) > 1:  # whoever labels it
          killed = int(words[1])
          os.kill(killed, signal.SIGKILL)
      time.sleep(0.002)
    code = proc.wait(timeout=10)
  said = (tmp_path / "err").read_text()
  if "timed out during startup" in said:
    pytest.skip("this machine is too busy: Ray gives itself 30 s to start")
  assert code == 0, said
  assert killed is not None and "a worker died at" in said and "its job is given to another" in said, said
  assert contents(out) == contents(tmp_path / "whole")
