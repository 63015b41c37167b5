#!/usr/bin/env python3
"""Do the tests look? 300 small changes to the code, drawn once by a fixed seed and kept in list.tsv; each is run on its
module's tests, which should fail.

  python tests/mutants/mutants.py run --out out/mutants.tsv    all that has no verdict there yet; interrupted, the same
      command goes on
  python tests/mutants/mutants.py report --out out/mutants.tsv
  python tests/mutants/mutants.py draw --seed 1 --count 300    a new list
  python tests/mutants/mutants.py redraw --seed 1    where the code has moved on: only the rows that are gone from it,
      each from the same file, or the same folder where the file is gone too

A mutant that changes nothing anybody could see is named in equivalent.tsv with the reason."""

import argparse
import ast
import csv
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIST, EQUIVALENT = HERE / "list.tsv", HERE / "equivalent.tsv"
PLACES = (
  "selfdrive",
  "cereal",
  "tools/lib",
  "tools/replay",
  "tools/fair/students",
  "tools/fair/distillation",
  "tools/fair/evaluation",
  "tools/fair/labels",
  "tools/fair/bundle",
)
TESTS_EACH = 4  # files of tests that a module has at most
FIELDS = ("number", "file", "scope", "index", "kind", "old", "new")

COMPARE = {
  ast.Lt: ("<", "<="),
  ast.LtE: ("<=", "<"),
  ast.Gt: (">", ">="),
  ast.GtE: (">=", ">"),
  ast.Eq: ("==", "!="),
  ast.NotEq: ("!=", "=="),
  ast.In: ("in", "not in"),
  ast.NotIn: ("not in", "in"),
  ast.Is: ("is", "is not"),
  ast.IsNot: ("is not", "is"),
}
BINARY = {
  ast.Add: ("+", "-"),
  ast.Sub: ("-", "+"),
  ast.Mult: ("*", "/"),
  ast.Div: ("/", "*"),
  ast.FloorDiv: ("//", "*"),
  ast.Mod: ("%", "//"),
  ast.BitAnd: ("&", "|"),
  ast.BitOr: ("|", "&"),
  ast.LShift: ("<<", ">>"),
  ast.RShift: (">>", "<<"),
}
BOOLEAN = {ast.And: ("and", "or"), ast.Or: ("or", "and")}
# what is said to people, and how a command line looks, is not what the tests are asked about
WORDS = {
  "add_argument",
  "print",
  "ArgumentParser",
  "warn",
  "info",
  "debug",
  "error",
  "set_description",
  "set_postfix",
  "report",
}


@dataclass(frozen=True)
class Site:
  """One change: `start` to `end` (offsets into the text) become `new`. scope: the functions and classes around it;
  index: which of the scope's sites."""

  scope: str
  index: int
  kind: str
  line: int
  start: int
  end: int
  old: str
  new: str

  def applied(self, text: str) -> str:
    return text[: self.start] + self.new + text[self.end :]


def is_text(node: ast.expr) -> bool:
  return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


class Finder(ast.NodeVisitor):
  def __init__(self, text: str):
    self.text, self.sites = text, []
    self.lines = [0]
    for line in text.splitlines(keepends=True):
      self.lines.append(self.lines[-1] + len(line.encode()))
    self.raw = text.encode()
    self.scope: list[str] = []
    self.counts: dict[str, int] = {}

  def byte(self, line: int, column: int) -> int:
    return self.lines[line - 1] + column

  def add(self, kind: str, line: int, start: int, end: int, new: str) -> None:
    scope = ".".join(self.scope) or "module"
    self.counts[scope] = self.counts.get(scope, -1) + 1
    a, b = len(self.raw[:start].decode()), len(self.raw[:end].decode())
    self.sites.append(Site(scope, self.counts[scope], kind, line, a, b, self.text[a:b], new))

  def between(self, kind: str, left: ast.expr, right: ast.expr, old: str, new: str) -> None:
    """The operator lies between two operands, and maybe brackets and comments."""
    start, end = self.byte(left.end_lineno or 0, left.end_col_offset or 0), self.byte(right.lineno, right.col_offset)
    at = self.raw[start:end].decode().find(old)
    if at >= 0 and "#" not in self.raw[start:end].decode():
      begin = start + len(self.raw[start:end].decode()[:at].encode())
      self.add(kind, left.end_lineno or 0, begin, begin + len(old), new)

  def visit_scope(self, node: ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) -> None:
    self.scope.append(node.name)
    for part in (getattr(node, "args", None), *node.body):  # not its decorators and annotations
      if part is not None:
        self.visit(part)
    self.scope.pop()

  visit_FunctionDef = visit_ClassDef = visit_AsyncFunctionDef = visit_scope  # type: ignore[assignment]

  def visit_arguments(self, node: ast.arguments) -> None:
    for default in [*node.defaults, *(d for d in node.kw_defaults if d is not None)]:
      self.visit(default)

  def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
    if node.value is not None:
      self.visit(node.value)

  def visit_Raise(self, node: ast.Raise) -> None: ...

  def visit_Assert(self, node: ast.Assert) -> None: ...

  def visit_JoinedStr(self, node: ast.JoinedStr) -> None: ...

  def visit_Import(self, node: ast.Import) -> None: ...

  def visit_ImportFrom(self, node: ast.ImportFrom) -> None: ...

  def visit_If(self, node: ast.If) -> None:
    if not (
      isinstance(node.test, ast.Compare)
      and isinstance(node.test.left, ast.Name)
      and node.test.left.id in ("__name__", "TYPE_CHECKING")
    ):
      self.generic_visit(node)

  def visit_Call(self, node: ast.Call) -> None:
    name = (
      node.func.attr
      if isinstance(node.func, ast.Attribute)
      else node.func.id
      if isinstance(node.func, ast.Name)
      else ""
    )
    if name not in WORDS and not name.endswith("Error"):
      self.generic_visit(node)

  def visit_Compare(self, node: ast.Compare) -> None:
    for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
      self.between("compare", left, right, *COMPARE[type(op)])
    self.generic_visit(node)

  def visit_BinOp(self, node: ast.BinOp) -> None:
    text = any(is_text(n) for n in (node.left, node.right))
    if type(node.op) in BINARY and not text:
      self.between("arithmetic", node.left, node.right, *BINARY[type(node.op)])
    self.generic_visit(node)

  def visit_BoolOp(self, node: ast.BoolOp) -> None:
    for left, right in zip(node.values, node.values[1:], strict=False):
      self.between("boolean", left, right, *BOOLEAN[type(node.op)])
    self.generic_visit(node)

  def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
    start = self.byte(node.lineno, node.col_offset)
    if isinstance(node.op, ast.Not):
      self.add("not", node.lineno, start, start + len("not "), "")  # and leaves brackets that the operand is in
    self.generic_visit(node)

  def visit_Constant(self, node: ast.Constant) -> None:
    v = node.value
    if isinstance(v, bool):
      new = str(not v)
    elif isinstance(v, int):
      new = str(v + 1)
    elif isinstance(v, float):
      new = repr(2 * v if v else 1.0)
    else:
      return
    self.add(
      "constant",
      node.lineno,
      self.byte(node.lineno, node.col_offset),
      self.byte(node.end_lineno or 0, node.end_col_offset or 0),
      new,
    )

  def left_out(self, node: ast.stmt) -> None:
    self.add(
      "left out",
      node.lineno,
      self.byte(node.lineno, node.col_offset),
      self.byte(node.end_lineno or 0, node.end_col_offset or 0),
      "pass",
    )

  def visit_Expr(self, node: ast.Expr) -> None:
    if isinstance(node.value, ast.Call):
      name = node.value.func.attr if isinstance(node.value.func, ast.Attribute) else getattr(node.value.func, "id", "")
      if name not in WORDS:
        self.left_out(node)
    self.generic_visit(node)

  def visit_AugAssign(self, node: ast.AugAssign) -> None:
    self.left_out(node)
    self.generic_visit(node)

  def visit_Break(self, node: ast.Break) -> None:
    self.add(
      "break",
      node.lineno,
      self.byte(node.lineno, node.col_offset),
      self.byte(node.lineno, node.col_offset + 5),
      "continue",
    )

  def visit_Continue(self, node: ast.Continue) -> None:
    self.add(
      "continue",
      node.lineno,
      self.byte(node.lineno, node.col_offset),
      self.byte(node.lineno, node.col_offset + 8),
      "break",
    )


def sites(text: str) -> Iterator[Site]:
  """All of a file's. Docstrings, annotations, imports, what is raised, asserted or said are left alone."""
  finder = Finder(text)
  finder.visit(ast.parse(text))
  yield from finder.sites


# *** which tests are a module's ***


def module_name(path: str) -> str:
  """'selfdrive/common/params.py' -> 'openpilot.common.params', as it is imported."""
  dotted = path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
  return (
    "openpilot." + dotted.removeprefix("selfdrive.") if dotted.startswith("selfdrive.common") else "openpilot." + dotted
  )


def mentions(text: str, module: str) -> bool:
  parent, _, name = module.rpartition(".")
  listed = rf"from {re.escape(parent)} import [^\n]*\b{re.escape(name)}\b"
  return re.search(rf"{re.escape(module)}\b", text) is not None or re.search(listed, text) is not None


@cache
def texts(place: str) -> dict[str, str]:
  found = subprocess.run(
    ["git", "-C", str(ROOT), "ls-files", "--", place], capture_output=True, text=True, check=True
  ).stdout.split("\n")
  return {p: (ROOT / p).read_text() for p in found if p.endswith(".py") and not (ROOT / p).is_symlink()}


def tests_of(path: str) -> list[str]:
  """The files of tests that import the module, else those that import what imports it: first those of its name, then
  those of its folder's."""
  tests = {p: t for p, t in texts("tests").items() if Path(p).name.startswith("test_")}
  module = module_name(path)
  wanted = [module]
  for _ in range(3):
    near = [p for p, t in tests.items() if any(mentions(t, m) for m in wanted)]
    if near:
      break
    wanted = [
      module_name(p)
      for place in PLACES
      for p, t in texts(place).items()
      if p != path and any(mentions(t, m) for m in wanted)
    ]
  stem, folder = Path(path).stem, Path(path).parent

  def rank(p: str) -> tuple[bool, int, int, str]:
    shared = len(set(Path(p).parts) & set(folder.parts))
    return (
      Path(p).stem not in (f"test_{stem}", f"test_{folder.name}"),
      -shared,
      -len(re.findall(re.escape(module), tests[p])),
      p,
    )

  return sorted(near, key=rank)[:TESTS_EACH]


# *** the list ***


def read_list() -> list[dict[str, str]]:
  with open(LIST, newline="") as f:
    return list(csv.DictReader(f, delimiter="\t"))


def write_list(rows: Iterable[dict[str, str]]) -> None:
  with open(LIST, "w", newline="") as f:
    out = csv.DictWriter(f, FIELDS, delimiter="\t", lineterminator="\n")
    out.writeheader()
    out.writerows(rows)


def as_row(number: int | str, path: str, s: Site) -> dict[str, str]:
  return dict(zip(FIELDS, map(str, (number, path, s.scope, s.index, s.kind, s.old, s.new)), strict=True))


def draw(seed: int, count: int) -> None:
  found = [(p, s) for place in PLACES for p, text in sorted(texts(place).items()) for s in sites(text)]
  chosen = random.Random(seed).sample(found, min(count, len(found)))
  write_list(as_row(k, p, s) for k, (p, s) in enumerate(chosen))
  print(f"{LIST.relative_to(ROOT)}: {len(chosen)} of {len(found)} places in {len({p for p, _ in chosen})} files")


def find(text: str, row: dict[str, str]) -> Site | None:
  """The row's change in the file as it is today: where it was in its scope, else the nearest one there that reads the
  same."""
  same = [
    s for s in sites(text) if (s.scope, s.kind, s.old, s.new) == (row["scope"], row["kind"], row["old"], row["new"])
  ]
  return min(same, key=lambda s: abs(s.index - int(row["index"])), default=None)


def redraw(seed: int) -> None:
  """The rows that today's code has no place for become others, with their numbers; the rest stays as it was drawn."""
  rows, chance = read_list(), random.Random(seed)
  today = {p: text for place in PLACES for p, text in sorted(texts(place).items())}
  today |= {r["file"]: (ROOT / r["file"]).read_text() for r in rows if (ROOT / r["file"]).is_file()}
  placed = {k: find(today.get(r["file"], ""), r) for k, r in enumerate(rows)}
  taken = {(rows[k]["file"], s.start) for k, s in placed.items() if s is not None}
  for k in (k for k, s in placed.items() if s is None):
    file = rows[k]["file"]
    near = [file] if file in today else [p for p in today if Path(p).parent == Path(file).parent]
    found = [(p, s) for p in near for s in sites(today[p]) if (p, s.start) not in taken]
    if not found:
      raise SystemExit(f"error: row {rows[k]['number']}: {file} and its folder have no place that is not drawn yet")
    p, s = chance.choice(found)
    taken.add((p, s.start))
    rows[k] = as_row(rows[k]["number"], p, s)
    print(f"{said(rows[k], s)} (was of {file})")
  write_list(rows)


# *** the run ***


def verdicts(out: Path) -> dict[int, str]:
  if not out.is_file():
    return {}
  with open(out, newline="") as f:
    return {int(r[0]): r[1] for r in csv.reader(f, delimiter="\t")}


def copy_tree(to: Path) -> None:
  for name in subprocess.run(
    ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=True
  ).stdout.split("\0"):
    source, target = ROOT / name, to / name
    if name and (source.is_symlink() or source.is_file()):
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(source, target, follow_symlinks=False)


def run_tests(tree: Path, tests: list[str], limit: float) -> tuple[int | None, float]:
  """Exit code of pytest, None where it took longer than `limit` s, and the seconds that it took."""
  env = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(tree),
    "PYTHONDONTWRITEBYTECODE": "1",
    "FAIR_SHARED_DATA": os.environ.get("FAIR_SHARED_DATA", str(ROOT.parent / "shared" / "data")),
  }
  begun = time.monotonic()
  command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
  proc = subprocess.Popen(
    command, cwd=tree, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
  )
  try:
    code: int | None = proc.wait(limit)
  except subprocess.TimeoutExpired:
    code = None
  finally:
    if proc.poll() is None:
      os.killpg(proc.pid, 9)
      proc.wait()
  return code, time.monotonic() - begun


def run(out: Path, only: set[int] | None, part: tuple[int, int]) -> None:
  out.parent.mkdir(parents=True, exist_ok=True)
  done = verdicts(out)
  rows = [
    r
    for r in read_list()
    if int(r["number"]) not in done
    and int(r["number"]) % part[1] == part[0]
    and (only is None or int(r["number"]) in only)
  ]
  sound: dict[tuple[str, ...], float] = {}  # seconds of the unchanged code's tests
  with tempfile.TemporaryDirectory(prefix="mutants-") as tmp:
    tree = Path(tmp)
    copy_tree(tree)
    for row in sorted(rows, key=lambda r: (tests_of(r["file"]), int(r["number"]))):
      path = tree / row["file"]
      site = find(path.read_text(), row) if path.is_file() else None
      tests = tests_of(row["file"])
      seconds = 0.0
      if site is None:
        verdict = "gone"
      elif not tests:
        verdict = "survived"
      else:
        if tuple(tests) not in sound:
          code, sound[tuple(tests)] = run_tests(tree, tests, 1200)
          if code != 0:
            raise SystemExit(
              f"error: the tests {' '.join(tests)} fail without a mutant too (pytest's exit code {code}); mend "
              "them first"
            )
        text = path.read_text()
        path.write_text(site.applied(text))
        code, seconds = run_tests(tree, tests, 60 + 5 * sound[tuple(tests)])
        path.write_text(text)
        verdict = "survived" if code == 0 else "timed out" if code is None else "killed"
      with open(out, "a", newline="") as f:
        csv.writer(f, delimiter="\t", lineterminator="\n").writerow([row["number"], verdict, f"{seconds:.1f}"])
      print(f"{row['number']:>4} {verdict:9} {seconds:6.1f} s  {said(row, site)}", flush=True)


def said(row: dict[str, str], site: Site | None) -> str:
  return f"{row['file']}:{site.line if site else '?'} {row['scope']}: {row['old'][:60]} -> {row['new'][:60]}"


def report(out: Path) -> int:
  """Prints the score and who survived. 0 where 85% of those that are not equivalent were killed."""
  with open(EQUIVALENT, newline="") as f:
    equivalent = {int(r[0]): r[1] for r in csv.reader(f, delimiter="\t")}
  done, rows = verdicts(out), {int(r["number"]): r for r in read_list()}
  counts = Counter("equivalent" if k in equivalent and v == "survived" else v for k, v in done.items() if k in rows)
  killed, counted = counts["killed"] + counts["timed out"], sum(counts[v] for v in ("killed", "timed out", "survived"))
  for k in sorted(rows):
    if done.get(k) == "survived" and k not in equivalent:
      print(f"{k:>4} {said(rows[k], find((ROOT / rows[k]['file']).read_text(), rows[k]))}")
  print(f"{killed} of {counted} killed ({killed / max(counted, 1):.0%}; goal 85%)")
  print(f"{counts['equivalent']} equivalent, {counts['gone']} gone, {len(rows) - len(done)} without a verdict")
  return 0 if killed >= 0.85 * counted else 1


def main() -> int:
  p = argparse.ArgumentParser(prog="mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("command", choices=("draw", "redraw", "run", "report"))
  p.add_argument("--seed", type=int, default=1)
  p.add_argument("--count", type=int, default=300)
  p.add_argument(
    "--out", type=Path, default=ROOT / "out" / "mutants.tsv", help="the verdicts: number, verdict, seconds"
  )
  p.add_argument("--only", help="numbers, comma-separated")
  p.add_argument("--part", default="0/1", help="K/N: every N-th from the K-th, for N of these at once")
  args = p.parse_args()
  if args.command == "draw":
    draw(args.seed, args.count)
    return 0
  if args.command == "redraw":
    redraw(args.seed)
    return 0
  if args.command == "report":
    return report(args.out)
  k, n = map(int, args.part.split("/"))
  run(args.out, {int(x) for x in args.only.split(",")} if args.only else None, (k, n))
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
