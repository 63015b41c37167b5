"""The runner of mutants: its changes are programs, and it knows a module's tests."""

import ast
import importlib.util
import sys
from pathlib import Path

spec = importlib.util.spec_from_file_location("mutants", Path(__file__).parent / "mutants" / "mutants.py")
assert spec is not None and spec.loader is not None
mutants = importlib.util.module_from_spec(spec)
sys.modules["mutants"] = mutants
spec.loader.exec_module(mutants)

TEXT = '''"""Words: 1 < 2."""
import os
SIZE = 3   # é
def f(a: int = 4, *, b=None) -> bool:
  """More words."""
  if a < SIZE and not b:
    raise ValueError(f"{a + 1}")
  a += 1
  print("a" + "b")
  os.remove("x" if a is None else "y")
  return (a * 2) % 5 != 0
'''


def test_every_site_is_a_change_and_still_a_program():
  found = list(mutants.sites(TEXT))
  said = [(s.scope, s.line, s.old, s.new) for s in found]
  assert said == [
    ("module", 3, "3", "4"),
    ("f", 4, "4", "5"),
    ("f", 6, "and", "or"),
    ("f", 6, "<", "<="),
    ("f", 6, "not ", ""),
    ("f", 8, "a += 1", "pass"),
    ("f", 8, "1", "2"),
    ("f", 10, 'os.remove("x" if a is None else "y")', "pass"),
    ("f", 10, "is", "is not"),
    ("f", 11, "!=", "=="),
    ("f", 11, "%", "//"),
    ("f", 11, "*", "/"),
    ("f", 11, "2", "3"),
    ("f", 11, "5", "6"),
    ("f", 11, "0", "1"),
  ]
  for s in found:
    changed = s.applied(TEXT)
    assert changed != TEXT and ast.dump(ast.parse(changed)) != ast.dump(ast.parse(TEXT))
  row = {"scope": "f", "kind": "compare", "old": "!=", "new": "==", "index": "7"}
  assert (
    mutants.find(TEXT.replace("return", "return a and"), row).line == 11
    and mutants.find(TEXT, {**row, "old": ">"}) is None
  )


def test_what_is_negated_keeps_its_brackets():
  (site,) = (s for s in mutants.sites("x = not (a + b)\n") if s.kind == "not")
  assert site.applied("x = not (a + b)\n") == "x = (a + b)\n"


def test_a_modules_tests_are_found_by_what_they_import():
  assert mutants.tests_of("selfdrive/modeld/fair/tracking.py")[0] == "tests/selfdrive/modeld/test_tracking.py"
  assert "tests/tools/replay/test_objects_lanes.py" in mutants.tests_of("tools/replay/overlay.py")
  assert mutants.module_name("selfdrive/common/params.py") == "openpilot.common.params"
  assert mutants.module_name("tools/lib/__init__.py") == "openpilot.tools.lib"


def test_every_row_of_the_list_is_of_a_file_with_tests():
  rows = mutants.read_list()
  assert len(rows) == len({r["number"] for r in rows}) >= 300
  assert {r["file"].split("/")[0] for r in rows} == {"selfdrive", "cereal", "tools"}


def test_only_what_is_gone_is_drawn_again(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(mutants, "LIST", tmp_path / "list.tsv")
  monkeypatch.setattr(mutants, "ROOT", tmp_path)
  (tmp_path / "a").mkdir()
  today = {"a/one.py": "x = 1 < y\n", "a/two.py": "x = y + 3\n"}
  for p, text in today.items():
    (tmp_path / p).write_text(text)
  monkeypatch.setattr(mutants, "texts", lambda place: today if place == mutants.PLACES[0] else {})
  first = mutants.as_row(0, "a/one.py", next(mutants.sites(today["a/one.py"])))
  old = {**first, "kind": "break", "old": "break", "new": "continue"}
  mutants.write_list([first, {**old, "number": "1"}, {**old, "number": "2", "file": "a/gone.py"}])
  mutants.redraw(1)
  rows = mutants.read_list()
  assert rows[0] == first and [r["number"] for r in rows] == ["0", "1", "2"]
  assert (rows[1]["file"], rows[1]["old"], rows[1]["new"]) == ("a/one.py", "1", "2")  # the file's other place
  assert rows[2]["file"] == "a/two.py" and (rows[2]["old"], rows[2]["new"]) in {("+", "-"), ("3", "4")}
