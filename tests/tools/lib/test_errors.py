"""What a machine does not give is one line and exit code 2, not a traceback."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openpilot.tools.lib.errors import UserError, cli, explain

ROOT = Path(__file__).resolve().parents[3]


def run(capsys, error: BaseException, extra=()) -> tuple[int, str]:
  def main():
    raise error

  code = cli(main, extra)()
  return code, capsys.readouterr().err


class SafetensorError(Exception):
  """As safetensors has it."""


@pytest.mark.parametrize(("error", "said"), [
  (UserError("a\n b"), "a b"),
  (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: the disk is full; free some space"),
  (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y: cannot write: the file system is read-only"),
  (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "/x/y: no permission"),
  (IsADirectoryError(errno.EISDIR, "Is a directory", "/x/y"), "/x/y: is a folder, not a file"),
  (FileExistsError(errno.EEXIST, "File exists", "/x/y"), "/x/y: exists already"),
  (FileNotFoundError(errno.ENOENT, "No such file or directory", b"/x/y"), "/x/y: no such file or folder"),
  (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
  (OSError("AF_UNIX path too long"), "too long (AF_UNIX path too long)"),
  (OSError("8192 requested and 0 written"), "the disk is full (8192 requested"),
  (RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3: file "
                "write failed"), "the disk is full ("),
  (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full ("),
  (RuntimeError("Could not determine home directory."), "set HOME to a folder"),
  (MemoryError(), "out of memory"),
])  # fmt: skip
def test_one_line(capsys, error, said):
  code, err = run(capsys, error)
  assert code == 2 and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_our_own_faults_keep_their_traceback(capsys, monkeypatch):
  for error in (ValueError("no space left"), RuntimeError("shapes differ"), KeyError("x"), AssertionError()):
    assert explain(error) is None
    with pytest.raises(type(error)):
      run(capsys, error)
  assert run(capsys, ValueError("said"), (ValueError,)) == (2, "error: said\n")
  assert run(capsys, KeyboardInterrupt()) == (130, "interrupted\n")
  monkeypatch.setenv("FAIR_TRACEBACK", "1")
  with pytest.raises(PermissionError):
    run(capsys, PermissionError(errno.EACCES, "Permission denied", "/x"))


def shell(script: str, code: str) -> subprocess.CompletedProcess:
  env = {
    **os.environ,
    "CODE": f"from openpilot.tools.lib.errors import cli\n{code}\nraise SystemExit(cli(main)())",
    "PYTHON": sys.executable,
  }
  return subprocess.run(
    ["bash", "-c", "set -o pipefail; " + script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
  )


MANY = "def main():\n  for i in range(100_000): print(i)"


def test_nobody_reads_on():
  r = shell('"$PYTHON" -c "$CODE" | head -1', MANY)
  assert r.stdout == "0\n" and r.stderr == "" and r.returncode == 141
  r = shell('"$PYTHON" -c "$CODE" | head -0', "def main():\n  print(1)")  # only when Python ends
  assert r.stderr == "" and r.returncode in (0, 141)
  r = shell('"$PYTHON" -m openpilot.tools.fair.list_teachers | head -1', "")
  assert r.stdout.count("\n") == 1 and r.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_output_to_a_full_disk():
  r = shell('"$PYTHON" -c "$CODE" > /dev/full', MANY)
  assert r.returncode == 2 and r.stderr.count("\n") == 1 and "the disk is full" in r.stderr


def test_a_broken_connection_is_not_taken_for_that(capsys):
  code, err = run(capsys, BrokenPipeError(errno.EPIPE, "Broken pipe"))
  assert code == 2 and "connection is gone" in err


@pytest.mark.parametrize("module", ["selfdrive.modeld.fair.flag", "selfdrive.manager.manager"])
def test_no_home(module, tmp_path):
  file = tmp_path / "file"
  file.touch()
  env = {k: v for k, v in os.environ.items() if k != "PARAMS_ROOT"} | {
    "HOME": str(file),
    "OPENPILOT_PREFIX": f"home-{os.getpid()}",
  }
  words = ["status"] if module.endswith("flag") else []
  r = subprocess.run(
    [sys.executable, "-m", f"openpilot.{module}", *words], env=env, capture_output=True, text=True, timeout=60
  )
  assert (
    r.returncode == 2
    and r.stderr.startswith("error: ")
    and r.stderr.count("\n") == 1
    and "set HOME or PARAMS_ROOT" in r.stderr
  )


@pytest.mark.parametrize("words", [["tools.replay.record", "OUT"], ["selfdrive.manager.manager"]])
def test_long_tmpdir(words, tmp_path):
  folder = tmp_path / ("x" * 120)
  folder.mkdir()
  env = {**os.environ, "TMPDIR": str(folder), "PARAMS_ROOT": str(tmp_path), "OPENPILOT_PREFIX": "long"}
  command = [sys.executable, "-m", "openpilot." + words[0], *(str(tmp_path / "o.zst") for w in words[1:])]
  r = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
  last = r.stderr.splitlines()[-1]
  assert r.returncode == 2 and "TMPDIR" in last and "Traceback" not in r.stderr


def test_other_systems_are_told_in_one_line(capsys, monkeypatch):
  from openpilot.cereal.visionipc import VisionIpcClient, VisionIpcServer, VisionStreamType

  monkeypatch.setattr(sys, "platform", "darwin")
  for make in (
    lambda: VisionIpcServer("camerad"),
    lambda: VisionIpcClient("camerad", VisionStreamType.VISION_STREAM_ROAD, True),
  ):
    assert cli(make)() == 2
    err = capsys.readouterr().err
    assert err.startswith("error: VisionIPC is not supported on macOS") and err.count("\n") == 1
  code = "import sys; sys.platform = 'win32'; import openpilot"
  r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert r.returncode == 1 and "WSL" in r.stderr and r.stderr.count("\n") == 1


@pytest.mark.parametrize("end, code", [("return 0", 0), ("raise UserError('none')", 2), ("raise SystemExit(3)", 3)])
def test_one_of_several_processes_is_not_taken_apart(end, code):
  """What is alive when Python ends is not destroyed, since torch's threads may be at work on it; atexit is heard."""
  script = f"""
import atexit
from openpilot.tools.lib.errors import UserError, cli
class Alive:
  def __del__(self):
    print("destroyed")
alive = Alive()
atexit.register(print, "at exit")
def main():
  print("done")
  {end}
raise SystemExit(cli(main)())
"""
  for world, last in (("1", "destroyed\n"), ("2", "")):
    env = {**os.environ, "WORLD_SIZE": world}
    r = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=env)
    assert (r.returncode, r.stdout) == (code, "done\nat exit\n" + last), r.stderr
    assert r.stderr == ("error: none\n" if code == 2 else "")
