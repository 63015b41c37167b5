"""What the folder does to the openpilot around it, read from its source: it publishes its own services alone, and writes no param but its own."""
import ast
from pathlib import Path

from openpilot.selfdrive.modeld.fair import publish

FAIR = Path(__file__).resolve().parents[2] / "selfdrive/modeld/fair"
WRITES = {"put", "put_bool", "put_nonblocking", "put_bool_nonblocking", "clear_all"}
PUBLISHERS = {"PubMaster", "pub_sock", "PubSocket", "VisionIpcServer"}


def used(names):
  """(file, node) where one of these names is used, as a name, as an attribute or in an import."""
  for path in sorted(FAIR.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if getattr(node, "attr", getattr(node, "id", None)) in names or (isinstance(node, ast.alias) and node.name in names):
        yield path.name, node


def test_only_fair_services_are_published():
  assert publish.SERVICES and all(name.startswith("fair") for name in publish.SERVICES)
  places = {file for file, _ in used(PUBLISHERS)}
  assert places and places <= {"ipc.py", "worker.py", "sender.py"}, "a publisher in a new place: see that it can only send fair*"
  assert not list(used({"VisionIpcServer"}))


def test_only_our_params_are_written_and_only_by_the_flag_command():
  found = {file for file, node in used(WRITES) if not isinstance(node, ast.Name) or node.id != "put"}
  assert found == {"flag.py"}
  keys = [n.value for n in ast.walk(ast.parse((FAIR / "flag.py").read_text()))
          if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value[:1].isupper() and n.value.isalnum()]
  assert keys and all(k.startswith("Fair") for k in keys)
