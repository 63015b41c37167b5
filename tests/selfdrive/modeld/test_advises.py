"""It advises, it controls nothing: who hears it, what it sends, what it writes. Of this repository, and of the checkout
in OPENPILOT_DIR where one is named."""

import ast
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest

from openpilot.selfdrive.modeld.fair import sender
from openpilot.selfdrive.modeld.fair.publish import SERVICES

ROOT = Path(__file__).resolve().parents[3]
FAIR = ROOT / "selfdrive" / "modeld" / "fair"
NAME = re.compile(rf"\b({'|'.join(SERVICES)})\b")
SOURCE = {".py", ".pyx", ".cc", ".cpp", ".c", ".h", ".hpp", ".js", ".ts", ".rs"}
# who may know our services by name: their definition, the log and its replay, tests, and what is ours
AUDIENCE = ("cereal/", "selfdrive/modeld/fair/", "tools/", "tests/", "system/loggerd/", "selfdrive/test/")


def checkouts():
  return [ROOT, *([Path(d)] if (d := os.environ.get("OPENPILOT_DIR")) else [])]


def sources(root):
  for folder, inner, files in os.walk(root):
    inner[:] = [
      d
      for d in inner
      if not d.startswith((".", "out")) and not d.endswith("_repo") and not (Path(folder) / d).is_symlink()
    ]
    yield from (Path(folder) / f for f in files if Path(f).suffix in SOURCE)


@pytest.mark.parametrize("root", checkouts(), ids=lambda p: p.name)
def test_nothing_that_drives_hears_it(root):
  seen = 0
  for path in sources(root):
    where = path.relative_to(root).as_posix().removeprefix("openpilot/")
    if (found := NAME.search(path.read_text(errors="replace"))) is not None:
      seen += 1
      assert where.startswith(AUDIENCE), f"{where} names {found[0]}"
  assert seen > 3


def calls(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call):
      yield node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", ""), node


@pytest.mark.parametrize("root", checkouts(), ids=lambda p: p.name)
def test_it_publishes_nothing_of_openpilots_and_writes_no_param_of_its(root):
  fair = next(f for f in (root / "selfdrive/modeld/fair", root / "openpilot/selfdrive/modeld/fair") if f.is_dir())
  assert all(s.startswith("fair") for s in SERVICES)
  publish, write = set(), set()
  for path in sorted(fair.rglob("*.py")):
    for name, node in calls(path):
      if name in ("PubMaster", "pub_sock", "Sender"):
        publish.add((path.name, name, ast.unparse(node.args[0])))
      if (
        name in ("put", "put_bool", "put_nonblocking", "put_bool_nonblocking", "remove", "clear_all")
        and "param" in ast.unparse(node).lower()
      ):
        write.add(path.name)
        keys = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        assert all(k.startswith("Fair") for k in keys), f"{path.name}: {ast.unparse(node)}"
  assert publish == {("worker.py", "Sender", "SERVICES"), ("sender.py", "pub_sock", "name")}
  assert write <= {"flag.py"}  # run by hand


def test_a_flood_is_cut(monkeypatch, prefix, request):
  """As when a camera announces frames without end: openpilot's log takes no more than its share, and the count of what
  is left out is told."""
  folder = tempfile.mkdtemp(prefix="fair", dir="/tmp")  # a socket's path is short: a worker's tmp_path is too long
  request.addfinalizer(lambda: shutil.rmtree(folder, ignore_errors=True))
  monkeypatch.setenv("TMPDIR", folder)
  clock, faults = [10.0], []
  ours = sender.Sender(["fairState", "fairDepth"], lambda: clock[0], faults.append)
  sent = 0
  for _ in range(10_000):  # a second of 10 kHz
    clock[0] += 1e-4
    sent += ours.send("fairDepth", b"x")
  assert 2 * sender.MOST - 2 <= sent <= 2 * sender.MOST + 2  # at first a second's worth at once
  assert (
    len(faults) == 1
    and "fairDepth would have sent over 200 messages a second; 1 messages were left out so far" in faults[0]
  )
  assert ours.send("fairState", b"x")  # the others go on
  sent = 0
  for _ in range(200):  # at 20 Hz nothing is left out
    clock[0] += 0.05
    sent += ours.send("fairDepth", b"x")
  assert sent == 200 and len(faults) == 1
  ours.close()
