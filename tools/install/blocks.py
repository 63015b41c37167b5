"""Blocks in somebody else's text: marked by comments, with the lines they stand for kept inside, so that they can be
taken out again to the byte.

# begin openpilot-fair (written by its overlay: what is changed in here is lost)
# -     customReserved14 @140 :Custom.CustomReserved14;
fairState @140 :Custom.FairState;
# end openpilot-fair
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

BEGIN, END = "begin openpilot-fair", "end openpilot-fair"
NOTE = "(written by its overlay: what is changed in here is lost)"
STRINGS = r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
COMMENTS = {"#": r"#[^\n]*", "//": r"//[^\n]*|/\*[\s\S]*?\*/"}
CLOSES = {"(": ")", "[": "]", "{": "}"}


class Missing(ValueError):
  """A place in the text that an edit needs was not found. The message names it."""


class Damaged(ValueError):
  """The marks of a block do not pair up. The message has the block and the line."""


@dataclass(frozen=True)
class Edit:
  """Lines start..stop-1 are replaced by `lines`; start == stop only inserts."""

  start: int
  stop: int
  lines: tuple[str, ...]


def strip(text: str, comment: str) -> str:
  """The text without our blocks, the lines that they replaced back in place."""
  begin, end, kept = f"{comment} {BEGIN}", f"{comment} {END}", f"{comment} - "
  out: list[str] = []
  opened = 0
  for i, line in enumerate(text.split("\n"), 1):
    mark = line.strip()
    if mark.startswith(begin):
      if opened:
        raise Damaged(f"line {i}: a block of openpilot-fair begins in the one that began in line {opened}")
      opened = i
    elif mark == end:
      if not opened:
        raise Damaged(f"line {i}: a block of openpilot-fair ends that has not begun")
      opened = 0
    elif not opened:
      out.append(line)
    elif line.startswith(kept):
      out.append(line.removeprefix(kept))
    elif line == kept.rstrip():
      out.append("")
  if opened:
    raise Damaged(f"line {opened}: a block of openpilot-fair begins that does not end")
  return "\n".join(out)


def insert(text: str, edits: Iterable[Edit], comment: str) -> str:
  """The text with each edit as a block; strip() of it gives the text back."""
  lines = text.split("\n")
  for e in sorted(edits, key=lambda e: e.start, reverse=True):
    body = [line for line in e.lines if line.strip()]
    indent = min((line[: len(line) - len(line.lstrip())] for line in body), key=len, default="")
    kept = [f"{comment} - {line}".rstrip() if not line else f"{comment} - {line}" for line in lines[e.start : e.stop]]
    lines[e.start : e.stop] = [f"{indent}{comment} {BEGIN} {NOTE}", *kept, *e.lines, f"{indent}{comment} {END}"]
  return "\n".join(lines)


def tokens(text: str, start: int, comment: str) -> Iterator[tuple[str, int]]:
  """(what, end) of each bracket, string ('"') and other character ('.') from `start` on; comments and blanks are
  skipped."""
  for m in re.compile(f"(?P<s>{STRINGS})|(?P<c>{COMMENTS[comment]})|(?P<b>[][(){{}}])|(?P<o>\\S)").finditer(
    text, start
  ):
    if m.lastgroup == "b":
      yield m.group(), m.end()
    elif m.lastgroup == "s":
      yield '"', m.end()
    elif m.lastgroup == "o":
      yield m.group(), m.end()


def brackets(text: str, at: int, comment: str) -> tuple[int, int]:
  """(position of the bracket that closes the one at `at`, end of the last token between them: at + 1 where there is
  none)."""
  stack: list[str] = []
  last = at + 1
  for what, end in tokens(text, at, comment):
    if what in CLOSES:
      stack.append(CLOSES[what])
    elif what in CLOSES.values():
      if what != stack.pop():
        break
      if not stack:
        return end - 1, last
    last = end
  raise Missing(f"the end of what begins in line {line_of(text, at) + 1}")


def line_of(text: str, position: int) -> int:
  """Number of the line, from 0."""
  return text.count("\n", 0, position)


def find(text: str, pattern: str, what: str) -> re.Match[str]:
  m = re.search(pattern, text, re.MULTILINE)
  if m is None:
    raise Missing(what)
  return m


def region(text: str, opener: str, what: str, comment: str) -> tuple[int, int]:
  """(start, end) of the text between the bracket at the end of `opener` and the one that closes it."""
  m = find(text, opener, what)
  return m.end(), brackets(text, m.end() - 1, comment)[0]


def after(text: str, opener: str, what: str, new: Iterable[str], comment: str) -> list[Edit]:
  """New lines after the statement that begins with `opener`, a pattern that ends with a bracket. They get its
  indentation."""
  m = find(text, opener, what)
  start = text.rfind("\n", 0, m.start() + 1) + 1 if text[m.start()] != "\n" else m.start() + 1
  indent = re.match(r"[ \t]*", text[start:])
  at = line_of(text, brackets(text, m.end() - 1, comment)[0]) + 1
  return [Edit(at, at, tuple(f"{indent.group() if indent else ''}{line}" for line in new))]


def append(text: str, opener: str, what: str, new: Iterable[str], comment: str) -> list[Edit]:
  """New lines as the last entries of the list or table that begins with `opener`; a last entry without a comma gets
  one."""
  m = find(text, opener, what)
  close, last = brackets(text, m.end() - 1, comment)
  at = line_of(text, close)
  if text[text.rfind("\n", 0, close) + 1 : close].strip():
    raise Missing(f"{what}, closed by a bracket on a line of its own")
  if last == m.end() or text[last - 1] == ",":
    return [Edit(at, at, tuple(new))]
  lines = text.split("\n")
  start = line_of(text, last - 1)
  column = last - text.rfind("\n", 0, last - 1) - 1
  with_comma = f"{lines[start][:column]},{lines[start][column:]}"
  return [Edit(start, at, (with_comma, *lines[start + 1 : at], *new))]


def prepend(text: str, opener: str, what: str, new: Iterable[str], comment: str) -> list[Edit]:
  """New lines as the first entries of the table that begins with `opener`, below its first comments: merges conflict
  there less often than at its end."""
  m = find(
    text, rf"{opener}[ \t]*({comment}.*)?\n([ \t]*({comment}.*)?\n)*", f"{what}, with its entries on lines of their own"
  )
  at = line_of(text, m.end())
  return [Edit(at, at, tuple(new))]
