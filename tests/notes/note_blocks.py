"""The Python blocks of the design notes, which lie outside the repository, and docs/notes_names.md, which says of each
that does not run why not."""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "notes_names.md"
Key = tuple[str, int]  # note's file, number of the block in it, from 1
RUNS: dict[Key, Callable[["Block"], None]] = {}
REASONS: dict[Key, Callable[["Block"], None]] = {}  # of the page's table, those that can be checked


@dataclass(frozen=True)
class Block:
  note: str
  number: int
  source: str

  def run(self, **prelude: Any) -> dict[str, Any]:
    """As it is typed, after `prelude`; the CPU stands for a GPU that is not here. -> its names."""
    source = self.source if torch.cuda.is_available() else self.source.replace("cuda:0", "cpu")
    names = {"__name__": "note", **prelude}
    exec(compile(source, f"{self.note} block {self.number}", "exec"), names)
    return names


def read_blocks(folder: Path) -> dict[Key, Block]:
  out: dict[Key, Block] = {}
  for path in sorted(folder.glob("*.md")):
    fence, lines, count = "", list[str](), 0
    for line in path.read_text(encoding="utf-8").splitlines():
      if line.strip().startswith("```"):
        if fence == "python":
          count += 1
          out[path.name, count] = Block(path.name, count, "\n".join(lines))
        fence, lines = ("" if fence else line.strip()[3:].strip() or "text"), []
      else:
        lines.append(line)
  return out


def runs(note: str, number: int, kept: dict[Key, Callable[[Block], None]] = RUNS) -> Callable[..., Any]:
  """What follows runs that block, and checks what the note states of it."""

  def keep(f: Callable[[Block], None]) -> Callable[[Block], None]:
    assert (note, number) not in kept
    kept[note, number] = f
    return f

  return keep


def fails(note: str, number: int) -> Callable[..., Any]:
  """What follows shows why that block does not run."""
  return runs(note, number, REASONS)


def rows(title: str) -> list[list[str]]:
  """A table of the page, without its head: the cells of each line."""
  part = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
  lines = [x for x in part.splitlines() if x.startswith("|")][2:]
  return [[c.strip() for c in re.split(r"(?<!\\)\|", x)[1:-1]] for x in lines]


def not_run() -> dict[Key, str]:
  """Blocks -> the reason, of the page. A line may name several blocks of a note: 3, 13-16."""
  out: dict[Key, str] = {}
  for note, numbers, why in rows("Blocks that do not run"):
    for part in numbers.split(","):
      first, _, last = part.strip().partition("-")
      for n in range(int(first), int(last or first) + 1):
        assert (note, n) not in out
        out[note, n] = why
  return out


def same_call(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
  """Ours takes what theirs does: the same names in the same order, the same defaults; what else it takes has a
  default."""
  wanted, given = (list(inspect.signature(f).parameters.values()) for f in (theirs, ours))
  for a, b in zip(wanted, given, strict=False):
    assert a.name == b.name and a.default in (b.default, inspect.Parameter.empty), (ours, a, b)
  assert len(given) >= len(wanted)
  for b in given[len(wanted) :]:
    assert b.default is not inspect.Parameter.empty or b.kind in (b.VAR_POSITIONAL, b.VAR_KEYWORD), (ours, b)
