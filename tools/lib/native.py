"""Compiles small C files on first use, and keeps them in the user's cache under the hash of their source and this
machine's kind."""

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from openpilot.tools.lib.errors import UserError, explain

# -ffp-contract=off: fused multiply-adds would make the last bits depend on the machine
CFLAGS = ("-O3", "-std=c99", "-ffp-contract=off", "-shared", "-fPIC")


@cache
def compile_library(source: Path) -> ctypes.CDLL:
  """source, a .c file -> the loaded library. Raises UserError where there is no C compiler or it fails."""
  named = os.environ.get("CC")
  compiler = named or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
  if compiler is None:
    raise UserError(
      f"no C compiler for {source.name}; looked for cc, gcc and clang on the path; install one (Debian: apt-get "
      "install gcc), or name it in CC"
    )
  command = [*shlex.split(compiler), *CFLAGS]
  if shutil.which(command[0]) is None:
    raise UserError(f"CC={named} names no program on this machine; unset CC, or name a C compiler in it")
  # a home folder may be shared by machines that cannot run each other's code
  machine = f"{sys.platform} {platform.machine()} {platform.libc_ver()[0]}"
  key = hashlib.sha256(source.read_bytes() + " ".join(command).encode() + machine.encode()).hexdigest()[:16]
  name = f"{source.stem}-{key}.so"
  try:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openpilot-fair"
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / name).exists():
      with contextlib.suppress(OSError):  # damaged: compile again
        return ctypes.CDLL(str(folder / name))
    return _build(command, source, folder, name)
  except (OSError, RuntimeError):  # no home, one that cannot be written, or a full disk: compile for this process alone
    pass
  try:
    with tempfile.TemporaryDirectory() as own:
      return _build(command, source, Path(own), name)  # the file is not needed once it is loaded
  except OSError as e:
    raise UserError(f"{source.name} cannot be compiled: {explain(e) or e}") from None


def _build(command: list[str], source: Path, folder: Path, name: str) -> ctypes.CDLL:
  fd, tmp = tempfile.mkstemp(dir=folder, suffix=".so")
  os.close(fd)
  try:
    r = subprocess.run([*command, "-o", tmp, str(source), "-lm"], capture_output=True, text=True)
    if r.returncode:
      if "No space left on device" in r.stderr:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))
      raise UserError(f"'{command[0]}' could not compile {source.name}: {' '.join(r.stderr.split())[-300:]}")
    os.replace(tmp, folder / name)  # atomic: two processes may build at once
  finally:
    with contextlib.suppress(FileNotFoundError):
      os.unlink(tmp)
  return ctypes.CDLL(str(folder / name))
