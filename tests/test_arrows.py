"""Who imports whom: one way down the floors, and never in a circle. Imports inside functions count, too."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORLDS = ("cereal", "selfdrive", "tools")
RUNTIME = {"cereal", "selfdrive"}
MAY = {  # a room -> the rooms below it
  "cereal": set[str](),
  "selfdrive": {"cereal"},
  "tools.lib": {"cereal"},
  "tools.learn": {"tools.lib"},
  "tools.sim": {"tools.lib", *RUNTIME},
  "tools.replay": {"tools.sim", "tools.lib", *RUNTIME},  # it judges simulated drives by their truth
  "tools.install": {"tools.lib", *RUNTIME},
  "tools.fair": {"tools.learn", "tools.replay", "tools.sim", "tools.lib", *RUNTIME},
  "tools.dgx": {"tools.fair", "tools.learn", "tools.replay", "tools.sim", "tools.lib", *RUNTIME},
}
LAZY = re.compile(r"(openpilot\.[\w.]+)(?::\w+)?")  # a string that is imported when it is needed
Edges = dict[str, set[str]]


def find_modules(root: Path) -> dict[str, Path]:
  """name -> file. openpilot/ holds links to the worlds; openpilot.common is selfdrive/common."""
  out = {}
  for world in WORLDS:
    for path in (root / world).rglob("*.py"):
      parts = path.relative_to(root).with_suffix("").parts
      out[".".join(p for p in ("openpilot", *parts) if p != "__init__")] = path
  return out


def named(path: Path, own: str) -> Iterator[tuple[str, bool]]:
  """The modules that a file names, some longer by an attribute, and whether it imports them."""
  package = own if path.name == "__init__.py" else own.rpartition(".")[0]
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      for a in node.names:
        yield a.name, True
    elif isinstance(node, ast.ImportFrom):
      above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
      base = ".".join([*above, *([node.module] if node.module else [])])
      for a in node.names:
        yield f"{base}.{a.name}", True
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (m := LAZY.fullmatch(node.value)):
      yield m[1], False


def read(root: Path) -> tuple[Edges, Edges]:
  """-> the imports of each module, and what it names in strings."""
  modules = find_modules(root)
  imports: Edges = defaultdict(set)
  strings: Edges = defaultdict(set)
  for own, path in modules.items():
    for name, imported in named(path, own):
      name = re.sub(r"^openpilot\.common\b", "openpilot.selfdrive.common", name)
      while name and name not in modules:
        name = name.rpartition(".")[0]
      if name and name != own:
        (imports if imported else strings)[own].add(name)
  return imports, strings


@cache
def ours() -> tuple[Edges, Edges]:
  return read(ROOT)


def room(module: str) -> str:
  parts = module.split(".")[1:]
  return ".".join(parts[:2]) if parts[:1] == ["tools"] else ".".join(parts[:1])


def upward(edges: Edges) -> list[str]:
  """Arrows that are none of MAY's. Commands directly in tools/ may import all, and nobody them."""
  files = {r for r in map(room, edges) if r not in MAY}
  out = []
  for a, bs in edges.items():
    for b in bs:
      if room(a) != room(b) and room(a) not in files and room(b) not in MAY[room(a)]:
        out.append(f"{a} -> {b}")
  return sorted(out)


def circles(edges: Edges) -> list[list[str]]:
  """Sets of modules of which each reaches each: Tarjan 1972."""
  index: dict[str, int] = {}
  low: dict[str, int] = {}
  stack: list[str] = []
  out: list[list[str]] = []

  def visit(v: str) -> None:
    index[v] = low[v] = len(index)
    stack.append(v)
    for w in edges.get(v, ()):
      if w not in index:
        visit(w)
        low[v] = min(low[v], low[w])
      elif w in stack:
        low[v] = min(low[v], index[w])
    if low[v] == index[v]:
      at = stack.index(v)
      if len(stack) - at > 1:
        out.append(sorted(stack[at:]))
      del stack[at:]

  for v in list(edges):
    if v not in index:
      visit(v)
  return out


def test_imports_go_down_the_floors():
  imports, strings = ours()
  rooms = {room(m) for m in find_modules(ROOT)} - {""}
  folders = {r for r in rooms if r in WORLDS or (ROOT / r.replace(".", "/")).is_dir()} - {"tools"}
  assert folders == set(MAY), f"a new room says here what it may import: {folders ^ set(MAY)}"
  assert sum(map(len, imports.values())) > 500
  assert not upward(imports) and not upward(strings)


def test_no_module_imports_itself_in_a_circle():
  assert not circles(ours()[0])


def plant(root: Path, **files: str) -> tuple[Edges, Edges]:
  for name, text in files.items():
    path = root / (name.replace("__", "/") + ".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  return read(root)


def test_a_planted_import_is_found(tmp_path):
  """At the top, inside a function, of a package's module, relative, by its other name, and in a string."""
  good = {
    "cereal__messaging": "import os\n",
    "selfdrive__common__params": "from openpilot.cereal import messaging\n",
    "tools__learn__loop": "from openpilot.tools.lib.errors import UserError\n",
    "tools__lib__errors": "X = 'see openpilot.tools.fair.x for more'\n",
    "tools__fair__x": "import openpilot.tools.learn.loop\nfrom openpilot.common.params import Params\n",
    "tools__dgx__y": "def f():\n  from openpilot.tools.fair import x\n",
    "tools__demo": "from openpilot.tools.dgx import y\n",
  }
  imports, strings = plant(tmp_path, **good)
  assert not upward(imports) and not upward(strings) and not circles(imports)
  assert imports["openpilot.tools.fair.x"] == {"openpilot.tools.learn.loop", "openpilot.selfdrive.common.params"}
  for name, text, arrow in (
    ("tools__fair__bad", "def f():\n  from openpilot.tools.dgx import y\n", "tools.fair.bad -> openpilot.tools.dgx.y"),
    ("tools__learn__bad", "import openpilot.tools.fair.x as x\n", "tools.learn.bad -> openpilot.tools.fair.x"),
    ("tools__lib__bad", "from openpilot.common.params import P\n", "lib.bad -> openpilot.selfdrive.common.params"),
    ("tools__lib__bad", "from ..learn import loop\n", "tools.lib.bad -> openpilot.tools.learn.loop"),
    ("selfdrive__bad", "if x:\n  from openpilot.tools.lib.errors import e\n", "bad -> openpilot.tools.lib.errors"),
    ("cereal__bad", "from openpilot.selfdrive.common.params import P\n", "bad -> openpilot.selfdrive.common.params"),
    ("tools__sim__bad", "X = 'openpilot.tools.fair.x:draw'\n", "tools.sim.bad -> openpilot.tools.fair.x"),
    ("tools__lib__bad", "from openpilot.tools import demo\n", "tools.lib.bad -> openpilot.tools.demo"),
  ):
    imports, strings = plant(tmp_path, **{name: text})
    found = upward(imports) + upward(strings)
    assert len(found) == 1 and found[0].endswith(arrow), (text, found)
    (tmp_path / (name.replace("__", "/") + ".py")).unlink()


def test_a_planted_circle_is_found(tmp_path):
  parts = {
    "tools__fair__a": "from openpilot.tools.fair.b import f\n",
    "tools__fair__b": "def f():\n  from openpilot.tools.fair import c\n",
    "tools__fair__c": "import os\n",
    "tools__fair__d": "import openpilot.tools.fair.a\n",
  }
  assert not circles(plant(tmp_path, **parts)[0])
  names = [f"openpilot.tools.fair.{x}" for x in "abc"]
  assert circles(plant(tmp_path, tools__fair__c="from openpilot.tools.fair import a\n")[0]) == [names]
