"""Bad input: one clear line, exit code 2."""
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
  """Something the user gave is wrong. The message is one line: what was wrong, where, what to do."""


def cli(main: Callable[..., int | None], extra: tuple[type[Exception], ...] = ()) -> Callable[..., int]:
  """Wraps a command's main: a UserError (or one of `extra`) becomes one line on stderr and exit code 2, Ctrl-C exits with 130."""
  wrong: tuple[type[Exception], ...] = (UserError, *extra)

  @functools.wraps(main)
  def wrapped(*args, **kwargs) -> int:
    try:
      return main(*args, **kwargs) or 0
    except wrong as e:
      print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
      return 2
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      return 130
  return wrapped
