"""tools/op.sh: what it installs, and when it need not; what a set-up that was killed, or is not alone, leaves to the
next."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from openpilot.tools.lib.half_installed import half_installed

ROOT = Path(__file__).resolve().parents[2]
# stands for Python: writes down what pip is asked for; `-m venv` makes a folder with itself in it, slowly, unless there
# is no room
PYTHON = f"""#!/bin/sh
for last; do :; done
case "$*" in
  *"-m pip install"*) echo "${{last##*/}}" >> "$PIP_LOG"; [ ! -e "$PIP_LOG.fail" ] ;;
  *"-m venv"*)
    mkdir -p "$last/bin" && touch "$last/pyvenv.cfg"
    sleep "${{SLOW:-0}}"
    [ ! -e "$PIP_LOG.full" ] || exit 1
    cp "$0" "$last/bin/python" ;;
  *"-m pip --version"*) [ ! -e "$PIP_LOG.nopip" ] ;;
  *ensurepip*) rm "$PIP_LOG.nopip" ;;
  *half_installed*) echo half_installed >> "$PIP_LOG" ;;
  *fcntl*) exec {sys.executable} "$@" ;;
esac
"""


class Op:
  """op.sh in a repository of its own, where Python is the script above."""

  def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    self.repo, self.venv, self.log = tmp_path / "repo", tmp_path / "venv", tmp_path / "log"
    for name in ("tools/op.sh", "pyproject.toml"):
      (self.repo / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / name, self.repo / name)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    for key, value in {"FAIR_VENV": self.venv, "FAIR_PYTHON": python, "PIP_LOG": self.log}.items():
      monkeypatch.setenv(key, str(value))

  def start(self, *words: str, **env: str) -> subprocess.Popen:
    command = ["bash", str(self.repo / "tools" / "op.sh"), *words]
    return subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env={**os.environ, **env},
      start_new_session=True,
    )

  def __call__(self, command: str) -> list[str]:
    """-> the extras that a command installs."""
    self.log.write_text("")
    p = self.start(command)
    self.out, self.err = p.communicate()
    self.code = p.returncode
    return [line.removeprefix("repo[").removesuffix("]") for line in self.log.read_text().splitlines()]


@pytest.fixture
def op(tmp_path, monkeypatch):
  return Op(tmp_path, monkeypatch)


def test_what_holds_more_counts(op):
  assert op("setup") == ["tools"] and op("setup") == [] and op.code == 0
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


def test_help_lists_every_command_once(op):
  assert op("help") == [] and op.code == 0 and all(len(line) <= 120 for line in op.out.splitlines())
  listed = re.findall(r"^  ((?:dgx|images) [a-z-]+|[a-z][a-z-]*)", op.out, re.MULTILINE)
  text = (ROOT / "tools" / "op.sh").read_text()
  commands = re.findall(r"^  ([a-z-]+)\)", text, re.MULTILINE)
  verbs = []
  for group, folder, count in (("dgx", "dgx", 9), ("images", "fair/images", 10)):
    block = re.search(rf"^  {group}\)\n(.*?)^    esac", text, re.MULTILINE | re.DOTALL)[1]
    own = re.findall(r"^      ([a-z-]+)\) module=([\w.]+)(?: extras=[\w,]+)? ;;", block, re.MULTILINE)
    assert len(own) == count
    for verb, module in own:
      assert (ROOT / "tools" / folder / f"{module.replace('.', '/')}.py").exists(), module
      verbs.append(f"{group} {verb}")
  assert sorted(listed) == sorted([c for c in commands if c not in ("dgx", "images")] + verbs)


def test_images(op):
  assert op("images") == [] and op.code == 0 and op.out.startswith("  images validate ")
  out, err = op.start("images", "learn").communicate()
  assert out == "" and err.endswith("error: unknown command 'images learn'\n") and not op.venv.exists()


def test_dgx(op):
  assert op("dgx") == [] and op.code == 0 and op.out.startswith("  dgx data ")
  out, err = op.start("dgx", "learn").communicate()
  assert out == "" and err.endswith("error: unknown command 'dgx learn'\n") and not op.venv.exists()
  op.start("dgx", "train", "--data", "D").communicate()
  assert op.log.read_text() == "repo[tools,train]\n"


def wait_for(condition, what: str) -> None:
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end, what
    time.sleep(0.02)


def test_killed_while_making_the_environment(op):
  p = op.start("setup", SLOW="60")
  wait_for((op.venv / "pyvenv.cfg").exists, "it does not begin")
  os.killpg(p.pid, signal.SIGKILL)
  p.communicate()
  assert not (op.venv / "bin" / "python").exists()
  assert op("setup") == ["tools"] and "incomplete" in op.out and op.code == 0
  assert op("setup") == []


def test_full_disk_while_making_the_environment(op):
  op.log.with_name("log.full").touch()
  assert op("setup") == [] and op.code == 2 and "is the disk full?" in op.err and not op.venv.exists()
  op.log.with_name("log.full").unlink()
  assert op("setup") == ["tools"] and op.code == 0


def test_environment_without_pip(op):
  assert op("setup") == ["tools"]
  op.log.with_name("log.nopip").touch()
  assert op("teachers") == ["tools,teach"] and "has no pip" in op.out


def test_python_that_is_gone(op):
  assert op("setup") == ["tools"]
  (op.venv / "bin" / "python").unlink()
  (op.venv / "bin" / "python").symlink_to("/nowhere/python3.11")
  assert op("setup") == ["tools"] and "incomplete" in op.out and op("setup") == []


def test_a_folder_of_somebody_else_is_left_alone(op):
  op.venv.mkdir()
  (op.venv / "thesis.tex").write_text("\\end")
  assert op("setup") == [] and op.code == 2 and "no virtual environment" in op.err
  assert (op.venv / "thesis.tex").exists()


def test_killed_while_installing(op):
  assert op("setup") == ["tools"]
  (op.venv / ".installing").mkdir()  # as a killed pip leaves it
  assert op("demo") == ["half_installed", "tools"] and op("demo") == []


def test_an_install_that_fails_leaves_what_works(op):
  assert op("setup") == ["tools"]
  op.log.with_name("log.fail").touch()  # no network
  assert op("teachers") == ["tools,teach", "half_installed"] and op.code == 2 and "Run the command again" in op.err
  assert op("demo") == [] and op.code == 0


def test_three_terminals_on_a_fresh_checkout(op):
  op.log.write_text("")
  three = [op.start("setup", SLOW="0.5") for _ in range(3)]
  ends = [p.communicate() for p in three]
  assert [p.returncode for p in three] == [0, 0, 0], ends
  assert op.log.read_text().splitlines() == ["repo[tools]"] and sum("waiting for it" in err for _, err in ends) == 2
  assert sum("making the virtual environment" in out for out, _ in ends) == 1


def test_windows_is_told_of_wsl(op, tmp_path):
  (tmp_path / "bin").mkdir()
  (tmp_path / "bin" / "uname").write_text("#!/bin/sh\necho MINGW64_NT-10.0-22631\n")
  (tmp_path / "bin" / "uname").chmod(0o755)
  p = op.start("demo", PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}")
  out, err = p.communicate()
  assert p.returncode == 2 and out == "" and err.count("\n") == 1 and "WSL" in err


def test_half_installed_packages(tmp_path):
  def package(name: str, record: str, installer: bool = True) -> Path:
    info = tmp_path / f"{name}-1.0.dist-info"
    info.mkdir()
    (tmp_path / f"{name}.py").write_text("x = 1\n")
    (info / "RECORD").write_text(record)
    if installer:
      (info / "INSTALLER").write_text("pip\n")
    return info

  package("whole", "whole.py,sha256=x,6\nwhole-1.0.dist-info/RECORD,,\n")
  missing = package("missing", "missing.py,,6\nmissing/sub.py,,3\n")
  short = package("short", "short.py,,600\n")
  early = package("early", "early.py,,6\n", installer=False)
  assert half_installed(tmp_path) == sorted([missing, short, early])
