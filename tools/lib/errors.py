"""Bad input: one clear line, exit code 2."""
import functools
import math
import sys
from collections.abc import Callable


def plain(text: str) -> str:
  """text on one line, control characters (a file's name may hold escape codes) spelled out."""
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(text.split()))


_said: set[str] = set()


def warn(text: str) -> None:
  """One line on stderr: something was left out, guessed or ignored. The same line is said once: a log is read several times by one command."""
  if text not in _said:
    _said.add(text)
    print(f"warning: {plain(text)}", file=sys.stderr)


class UserError(Exception):
  """Something the user gave is wrong. The message is one line: what was wrong, where, what to do."""


def not_negative(text: str) -> float:
  """For argparse: a number, 0 or above. Raises UserError, since argparse's own errors are a page."""
  try:
    value = float(text)
  except ValueError:
    value = math.nan
  if not (math.isfinite(value) and value >= 0):
    raise UserError(f"'{text[:40]}' is not a number of 0 or above")
  return value


def above_zero(text: str) -> float:
  """As not_negative(), without 0."""
  value = not_negative(text)
  if not value:
    raise UserError(f"'{text[:40]}' is not a number above 0")
  return value


def cli(main: Callable[..., int | None], extra: tuple[type[Exception], ...] = ()) -> Callable[..., int]:
  """Wraps a command's main: a UserError (or one of `extra`) becomes one line on stderr and exit code 2, Ctrl-C exits with 130."""
  wrong: tuple[type[Exception], ...] = (UserError, *extra)

  @functools.wraps(main)
  def wrapped(*args, **kwargs) -> int:
    try:
      return main(*args, **kwargs) or 0
    except wrong as e:
      print(f"error: {plain(str(e))}", file=sys.stderr)
      return 2
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      return 130
  return wrapped
