"""Files are whole or not there, and what a killed writer left goes with the next one."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openpilot.tools.lib import files
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path

ROOT = Path(__file__).resolve().parents[3]
WRITER = """
import sys, time
from pathlib import Path
from openpilot.tools.lib.files import atomic_path
with atomic_path(Path(sys.argv[1])) as tmp:
  tmp.write_text("half")
  print(tmp, flush=True)
  time.sleep(60)
"""


@pytest.fixture(autouse=True)
def fresh():
  files._swept.clear()


def write(path: Path) -> None:
  with atomic_path(path) as tmp:
    tmp.write_text("whole")


def writer(path: Path) -> tuple[subprocess.Popen, Path]:
  p = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
  assert p.stdout is not None
  return p, Path(p.stdout.readline().strip())


def test_what_a_killed_process_left_is_removed_and_a_living_ones_stays(tmp_path):
  dead, left = writer(tmp_path / "last.pt")
  alive, its = writer(tmp_path / "best.pt")
  try:
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert left.exists() and left.name.startswith(".last.tmp") and left.suffix == ".pt"
    write(tmp_path / "other.json")  # of another name: one look at the folder is enough
    assert not left.exists() and its.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([its.name, "other.json"])
  finally:
    alive.kill()
    alive.wait()


def test_what_cannot_be_asked_stays_a_day(tmp_path):
  """Of another machine, or of a version that did not say which: its number means nothing here."""
  names = (".last.tmpabcdef-999999999.pt", ".last.tmp999999999.pt")
  for name in (*names, "last.tmp999999999.pt", ".hidden.pt", ".last.tmpx.pt"):
    (tmp_path / name).touch()
  write(tmp_path / "a")
  assert all((tmp_path / n).exists() for n in names)
  for path in tmp_path.iterdir():
    os.utime(path, (time.monotonic(),) * 2)  # long ago
  files._swept.clear()
  write(tmp_path / "b")
  assert sorted(p.name for p in tmp_path.iterdir()) == [".hidden.pt", ".last.tmpx.pt", "a", "b", "last.tmp999999999.pt"]


def fail(error: BaseException):
  raise error


@pytest.mark.parametrize(("error", "said"), [
  (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
  (RuntimeError("PytorchStreamWriter failed writing file data/0"), "the disk is full"),
  (OSError("4096 requested and 12 written"), "the disk is full"),
])  # fmt: skip
def test_full_disk(tmp_path, error, said):
  with pytest.raises(UserError, match=f"out.pt was not written: {said}"), atomic_path(tmp_path / "out.pt") as tmp:
    tmp.touch()
    fail(error)
  assert list(tmp_path.iterdir()) == []


def test_other_errors_are_as_they_were(tmp_path):
  """Of what is read to be written, too: it is not the output that is wrong."""
  for error in (
    ValueError("x"),
    PermissionError(errno.EACCES, "Permission denied", "/data/input.hevc"),
    FileNotFoundError(errno.ENOENT, "No", "/data/x"),
  ):
    with pytest.raises(type(error)), atomic_path(tmp_path / "out.pt"):
      fail(error)
  assert list(tmp_path.iterdir()) == []


def test_what_is_in_the_way(tmp_path):
  (tmp_path / "folder").mkdir()
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match="folder is a folder"):
    write(tmp_path / "folder")
  with pytest.raises(UserError, match=r"is a file, not a folder|exists already"):
    write(tmp_path / "file" / "out.json")


FULL = 'mount -t tmpfs -o size=1m tmpfs "$1" && shift && exec "$@"'
CHECKPOINT = """
import sys, torch
from pathlib import Path
from openpilot.tools.lib.errors import cli
from openpilot.tools.lib.files import atomic_path
def main():
  with atomic_path(Path(sys.argv[1]) / "last.pt") as tmp:
    torch.save({"weights": torch.zeros(1_000_000)}, tmp)
try:
  code = cli(main)()
finally:
  print(sorted(p.name for p in Path(sys.argv[1]).iterdir()))
raise SystemExit(code)
"""


def test_a_checkpoint_on_a_full_disk(tmp_path):
  """torch says so by a RuntimeError of its writer."""
  if subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True).returncode:
    pytest.skip("no right to mount here")
  command = ["unshare", "-m", "sh", "-c", FULL, "sh", str(tmp_path), sys.executable, "-c", CHECKPOINT, str(tmp_path)]
  r = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
  assert (
    r.returncode == 2
    and r.stderr.count("\n") == 1
    and "last.pt was not written: the disk is full" in r.stderr
    and r.stdout == "[]\n"
  ), r.stderr
