"""Batches of a DataLoader's workers where shared memory is small."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from openpilot.tools.learn.handover import Collate, Piped, begin, handed_over
from openpilot.tools.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SMALL = 'mount -t tmpfs -o size=7m tmpfs /dev/shm && exec "$@"'
READ = """
import sys, torch
from openpilot.tools.learn import handover
from openpilot.tools.learn.handover import Collate, begin, handed_over
from openpilot.tools.lib.errors import cli
class Data(torch.utils.data.Dataset):
  def __len__(self): return 12
  def __getitem__(self, i): return {"a": torch.full((3_000_000,), i, dtype=torch.uint8), "name": str(i)}
def main():
  loader = torch.utils.data.DataLoader(Data(), batch_size=None, num_workers=1, prefetch_factor=3, worker_init_fn=begin,
                                       collate_fn=Collate(lambda x: x) if sys.argv[1] == "collate" else None)
  for i, batch in enumerate(handed_over(loader)):
    assert batch["name"] == str(i) and batch["a"].shape == (3_000_000,) and (batch["a"] == i).all()
  print("read", i + 1)
if __name__ == "__main__":
  raise SystemExit(cli(main)())
"""


def read(how: str) -> subprocess.CompletedProcess:
  if subprocess.run(
    ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k tmpfs /dev/shm"], capture_output=True
  ).returncode:
    pytest.skip("no right to mount here")
  return subprocess.run(
    ["unshare", "-m", "sh", "-c", SMALL, "sh", sys.executable, "-c", READ, how],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=100,
  )


def test_small_shared_memory():
  r = read("collate")
  assert (
    r.returncode == 0 and r.stdout == "read 12\n" and r.stderr.count("warning: unable to allocate shared memory") == 1
  ), r.stderr


def test_full_shared_memory_is_no_hang():
  """As where another program fills it in between: torch alone would wait for ever."""
  r = read("plain")
  last = r.stderr.splitlines()[-1]
  assert r.returncode == 2 and last.startswith("error: a reading process died") and "--shm-size" in last, r.stderr


def test_piped_is_the_same_batch():
  batch = {
    "frames": torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
    "flag": torch.tensor([True]),
    "half": torch.ones(2, dtype=torch.float16),
    "rows": [torch.zeros(0, 6), None, {"x": torch.tensor(3.0)}],
    "names": ["a", "b"],
    "array": np.arange(3),
    "step": 4,
  }
  back = Piped(batch).opened()
  assert (
    back.keys() == batch.keys()
    and back["names"] == ["a", "b"]
    and back["step"] == 4
    and isinstance(back["array"], np.ndarray)
  )
  for a, b in (
    (back["frames"], batch["frames"]),
    (back["flag"], batch["flag"]),
    (back["half"], batch["half"]),
    (back["rows"][0], batch["rows"][0]),
    (back["rows"][2]["x"], batch["rows"][2]["x"]),
  ):
    assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
  assert back["rows"][1] is None


def test_other_errors_pass():
  def broken():
    yield 1
    raise RuntimeError("shapes differ")

  got = handed_over(broken())
  assert next(got) == 1
  with pytest.raises(RuntimeError, match="shapes differ"):
    next(got)

  def dead():
    raise RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    yield

  with pytest.raises(UserError, match="--workers 0"):
    next(handed_over(dead()))
  assert Collate(lambda x: x)([torch.ones(2)])[0].sum() == 2 and callable(begin)  # outside a worker nothing is changed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_of_all_processes_leaves_the_reading_one_to_the_trainer(number):
  """As a service manager or `timeout` stops: the trainer still gets the batches of its step."""
  before = set(multiprocessing.active_children())  # what another test's loader has not ended yet
  loader = torch.utils.data.DataLoader(torch.arange(12), batch_size=None, num_workers=1, worker_init_fn=begin)
  batches = handed_over(loader)
  assert next(batches) == 0
  (worker,) = set(multiprocessing.active_children()) - before
  os.kill(worker.pid, number)
  assert [int(b) for b in batches] == list(range(1, 12))
  worker.join(10)
  assert worker.exitcode == 0
