"""The environment of TFLite's converter: a folder beside the virtual environment that runs, made when it is first
wanted. It has what the converter brings (about 750 MB) and sees all else, torch too, where it is already; its versions
of what both have come first there, and there alone."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError

PACKAGES = ("litert-torch>=0.10,<0.11", "ai-edge-quantizer>=0.10,<0.11", "ai-edge-litert>=2.3,<3")
ROOM = 2 << 30  # bytes that installing needs free
STAMP, BASE = ".made", "_base.pth"


def folder() -> Path:
  """FAIR_TFLITE_ENV, else the running environment's folder with -tflite behind."""
  named = os.environ.get("FAIR_TFLITE_ENV")
  return Path(named).absolute() if named else Path(f"{sys.prefix}-tflite")


def base() -> str:
  return sysconfig.get_paths()["purelib"]


def wanted() -> str:
  """What the stamp of a whole environment says."""
  said = (*PACKAGES, base(), sys.version)
  return hashlib.sha256("\n".join(said).encode()).hexdigest()


def ready(where: Path) -> bool:
  with contextlib.suppress(OSError):
    return (where / STAMP).read_text() == wanted() and (where / "bin" / "python").exists()
  return False


@contextlib.contextmanager
def alone(where: Path) -> Iterator[None]:
  """One process at a time; others wait, and say so."""
  where.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{where}.lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      print(f"another command makes {where}; waiting for it", file=sys.stderr, flush=True)
      fcntl.flock(lock, fcntl.LOCK_EX)
    yield


def make(where: Path) -> None:
  """Anew: of one that was interrupted, or is of other packages, nothing is kept. Raises UserError."""
  if where.exists() and not (where / "pyvenv.cfg").is_file() and any(where.iterdir()):
    raise UserError(f"{where} is there and is no virtual environment; name another folder in FAIR_TFLITE_ENV")
  shutil.rmtree(where, ignore_errors=True)
  if (free := shutil.disk_usage(where.parent).free) < ROOM:
    raise UserError(f"{where.parent} has {free / 1e9:.1f} GB free, TFLite's converter wants {ROOM / 1e9:.1f}")
  print(f"making {where}: TFLite's converter, about 750 MB, once (FAIR_PIP_ARGS is passed on to pip)", flush=True)
  subprocess.run(python.command("-m", "venv", "--without-pip", where), check=True)
  own = next((where / "lib").glob("python*/site-packages"))
  (own / BASE).write_text(base() + "\n")
  pip = [str(where / "bin" / "python"), "-P", "-m", "pip", "install", "--disable-pip-version-check"]
  try:
    # its progress is pip's own, on standard error, where results are not
    done = subprocess.run([*pip, *os.environ.get("FAIR_PIP_ARGS", "").split(), *PACKAGES], stdout=sys.stderr)
  except BaseException:
    shutil.rmtree(where, ignore_errors=True)
    raise
  if done.returncode:
    shutil.rmtree(where, ignore_errors=True)
    raise UserError(
      "pip could not install TFLite's converter; is a package index reachable, and room on the disk? Run the command "
      "again"
    )
  (where / STAMP).write_text(wanted())


def command(*words: str | Path) -> list[str]:
  """`python words` in the environment, which is made where it is not whole. Raises UserError."""
  where = folder()
  with alone(where):
    if not ready(where):
      make(where)
  return [str(where / "bin" / "python"), *python.command(*words)[1:]]
