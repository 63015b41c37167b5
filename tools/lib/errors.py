"""Bad input, or a machine that lacks what is needed: one clear line, exit code 2."""

import atexit
import contextlib
import errno
import functools
import importlib
import math
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

BROKEN_PIPE = 141  # as a program that SIGPIPE ends


def printable(text: object, most: int | None = None) -> str:
  """A text that is safe on a terminal: one line, control characters (a file's name may hold escape codes) spelled out.
  Of a text over `most` characters the beginning and the end are kept."""
  plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(text).split()))
  return plain if most is None or len(plain) <= most else plain[: most // 2] + "..." + plain[-most // 3 :]


_said: set[str] = set()
_say_warning: list[Callable[[str], None]] = []  # innermost last


def warn(text: str) -> None:
  """One line on stderr: something was left out, guessed or ignored. The same line is printed once, since one command
  may read a log several times."""
  if text not in _said:
    _said.add(text)
    line = f"warning: {printable(text)}"
    if _say_warning:
      _say_warning[-1](line)
    else:
      sys.stderr.write(line + "\n")  # at once: other processes may write, too


@contextlib.contextmanager
def warnings_by(say: Callable[[str], None]) -> Iterator[None]:
  """Within it warn() hands its lines to `say`."""
  _say_warning.append(say)
  try:
    yield
  finally:
    _say_warning.pop()


class UserError(Exception):
  """Something the user gave is wrong. The message is one line: what was wrong, where, what to do."""


class Unreadable(UserError):
  """Its files are damaged, or are something else."""


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


# error number -> (what it means, what to do)
SYSTEM = {
  errno.ENOSPC: ("the disk is full", "free some space and run the command again"),
  errno.EDQUOT: ("the disk quota is used up", "free some space and run the command again"),
  errno.EROFS: ("cannot write: the file system is read-only", "choose another folder"),
  errno.EACCES: ("no permission", "choose another file or folder, or change its rights"),
  errno.EPERM: ("no permission", "choose another file or folder, or change its rights"),
  errno.EISDIR: ("is a folder, not a file", "name a file"),
  errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another path"),
  errno.EEXIST: ("exists already as something else", "choose another path"),
  errno.ENOENT: ("no such file or folder", "check the path"),
  errno.ENAMETOOLONG: ("the path is too long", "choose a shorter one; for a socket, set a shorter TMPDIR"),
  errno.EMFILE: ("too many open files", "raise the limit with `ulimit -n 4096`"),
  errno.ENFILE: ("too many open files on this machine", "close some programs"),
  errno.ENOMEM: ("out of memory", "close some programs, or take smaller batches"),
  errno.EOPNOTSUPP: ("not supported here", "use another file system or machine"),
  errno.EIO: ("the disk or its connection fails", "copy the data to another disk"),
}
# system errors that libraries hide in a text of their own
TEXTS = (
  (
    (
      "No space left on device",
      "Disk quota exceeded",
      "PytorchStreamWriter failed",
      "unexpected pos",
      "iostream error",
      " requested and ",
    ),
    errno.ENOSPC,
  ),
  (("Read-only file system",), errno.EROFS),
  (("AF_UNIX path too long", "is longer than 107 characters", "is longer than 103 characters"), errno.ENAMETOOLONG),
  (("Too many open files",), errno.EMFILE),
)
HOMELESS = ("Could not determine home directory", "uid not found")


def system_errno(e: BaseException) -> int | None:
  """The system's error number, also where a library hides it in a text; None where it is not a system error."""
  number = getattr(e, "errno", None)
  if number in SYSTEM:
    return number
  if isinstance(e, (OSError, RuntimeError)) or type(e).__name__ in ("SafetensorError", "ZMQError"):
    return next((n for words, n in TEXTS if any(w in str(e) for w in words)), None)
  return None


def explain(e: BaseException) -> str | None:
  """The line for an error that the machine caused; None for a fault of this program, which needs its traceback."""
  text = " ".join(str(e).split())
  if (number := system_errno(e)) is not None:
    if number == errno.EOPNOTSUPP and isinstance(e, OSError):
      return e.strerror
    what, do = SYSTEM[number]
    path = getattr(e, "filename", None) or ""
    path = os.fsdecode(path) if isinstance(path, (str, bytes)) else ""
    if len(path) > 200:
      path = path[:100] + "..." + path[-60:]
    hidden = "" if path or getattr(e, "errno", None) in SYSTEM else f" ({text[:120]})"
    return f"{path + ': ' if path else ''}{what}{hidden}; {do}"
  if isinstance(e, (RuntimeError, KeyError)) and any(w in text for w in HOMELESS):
    return "this user has no home folder; set HOME to a folder that can be written"
  if isinstance(e, MemoryError):
    return "out of memory; close some programs, or take smaller batches"
  if type(e).__name__ == "OutOfMemoryError":
    return f"the GPU's memory is full ({text[:120]}); take a smaller batch, or --device cpu"
  return None


def load_plugins() -> None:
  """Imports the modules that FAIR_PLUGINS names, separated by commas: packages of others, which register what they add
  (CONTRIBUTING.md). Raises UserError where one is not found."""
  for name in filter(None, map(str.strip, os.environ.get("FAIR_PLUGINS", "").split(","))):
    try:
      importlib.import_module(name)
    except ModuleNotFoundError as e:
      if e.name is None or not (name == e.name or name.startswith(f"{e.name}.")):
        raise  # the module exists; one that it imports does not
      raise UserError(f"FAIR_PLUGINS: no module '{name}'; add the folder that holds it to PYTHONPATH") from None


def cli(main: Callable[..., int | None], extra: tuple[type[Exception], ...] = ()) -> Callable[..., int]:
  """Wraps a command's main: imports the modules of FAIR_PLUGINS, then runs it. A UserError, one of `extra`, or an
  error that explain() knows becomes one line on stderr and exit code 2; Ctrl-C exits with 130; a closed standard output
  (`| head`) ends it silently. FAIR_TRACEBACK=1 shows where an error came from."""
  wrong: tuple[type[Exception], ...] = (UserError, *extra)

  def run(*args, **kwargs) -> int:
    try:
      try:
        load_plugins()
        code = main(*args, **kwargs) or 0
      finally:
        sys.stdout.flush()  # here: a failure at Python's exit could only be shown as a traceback
      return code
    except BrokenPipeError as e:
      if not _unread():
        return _say(f"the other end of a connection is gone ({e})")
      return BROKEN_PIPE
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      return 130
    except Exception as e:
      said = " ".join(str(e).split()) if isinstance(e, wrong) else explain(e)
      if said is None or os.environ.get("FAIR_TRACEBACK"):
        raise
      _unread()
      return _say(said)

  @functools.wraps(main)
  def wrapped(*args, **kwargs) -> int:
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
      return run(*args, **kwargs)
    try:
      code = run(*args, **kwargs)
    except SystemExit as e:
      if not isinstance(e.code, int):
        raise
      code = e.code
    _leave(code)

  return wrapped


def _leave(code: int) -> NoReturn:
  """Ends one of several processes that torchrun started, as Python does, but without taking Python apart: a thread of
  torch's may still drop its last work, which then aborts (pytorch issue 190489), and torchrun takes the run for failed
  and ends the others."""
  atexit._run_exitfuncs()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


def _say(what: str) -> int:
  print(f"error: {printable(what)}", file=sys.stderr)
  return 2


def _unread() -> bool:
  """Whether standard output is closed. Then pending output is dropped, or Python would try to write it again at
  exit."""
  try:
    sys.stdout.flush()
    ended = select.poll()  # the failed write may have dropped its data already
    ended.register(sys.stdout.fileno(), 0)
    if not any(events & select.POLLERR for _, events in ended.poll(0)):
      return False
  except (ValueError, AttributeError):  # closed, or no file
    return False
  except OSError:
    pass
  with contextlib.suppress(OSError, ValueError):
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
  return True
