"""What the folder does to the openpilot around it, read from its source: it publishes its own services alone, and
writes no param but its own."""

import ast
import re
from pathlib import Path

from openpilot.selfdrive.modeld.fair import publish

FAIR = Path(__file__).resolve().parents[2] / "selfdrive/modeld/fair"
WRITES = {"put", "put_bool", "put_nonblocking", "put_bool_nonblocking", "clear_all"}
PUBLISHERS = {"PubMaster", "pub_sock", "PubSocket", "VisionIpcServer"}


def used(names):
  """(file, node) where one of these names is used, as a name, as an attribute or in an import."""
  for path in sorted(FAIR.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text())):
      if getattr(node, "attr", getattr(node, "id", None)) in names or (
        isinstance(node, ast.alias) and node.name in names
      ):
        yield path.name, node


def test_only_fair_services_are_published():
  assert publish.SERVICES and all(name.startswith("fair") for name in publish.SERVICES)
  places = {file for file, _ in used(PUBLISHERS)}
  assert places and places <= {"ipc.py", "worker.py", "sender.py"}, (
    "a publisher in a new place: see that it can only send fair*"
  )
  assert not list(used({"VisionIpcServer"}))


def test_only_our_params_are_written_and_only_by_the_flag_command():
  found = {file for file, node in used(WRITES) if not isinstance(node, ast.Name) or node.id != "put"}
  assert found == {"flag.py"}
  keys = [
    n.value
    for n in ast.walk(ast.parse((FAIR / "flag.py").read_text()))
    if isinstance(n, ast.Constant) and isinstance(n.value, str) and n.value[:1].isupper() and n.value.isalnum()
  ]
  assert keys and all(k.startswith("Fair") for k in keys)


BRITISH = re.compile(
  r"\b((met|lit|cent)re|centred|neighbour|artef(act)|colour|behaviour|favour|(normal|serial)ised?|writeable)s?\b",
  re.IGNORECASE,
)


def test_the_lint_of_a_fork_finds_nothing_in_the_folder():
  """openpilot's limits: files of 120 kB, lines of 160 characters, no tabs, American spelling. Its own tools were run by
  hand: tools/install/README.md."""
  files = [
    p
    for p in FAIR.rglob("*")
    if p.is_file() and "__pycache__" not in p.parts and "built" not in p.parts and p.suffix != ".pyc"
  ]
  assert len(files) > 30
  for path in [*files, FAIR.parents[2] / "cereal/custom.capnp"]:
    text = path.read_text()
    assert path.stat().st_size <= 120 << 10 and "\t" not in text, path
    if path.name != "bundle.schema.json":  # its words are those of manifests; the overlay leaves it out of the lint
      assert not (found := [m.group() for m in BRITISH.finditer(text)]), f"{path}: {found}"
    if path.suffix == ".py":
      assert all(len(line) <= 160 for line in text.split("\n")), path
