"""Small C files compiled on first use, kept in the user's cache under the hash of their source."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from openpilot.tools.lib.errors import UserError

# -ffp-contract=off: fused multiply-adds would make the last bits depend on the machine
CFLAGS = ("-O3", "-std=c99", "-ffp-contract=off", "-shared", "-fPIC")


@cache
def compile_library(source: Path) -> ctypes.CDLL:
  """source, a .c file -> the loaded library. Raises UserError where there is no C compiler or it fails."""
  compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
  if compiler is None:
    raise UserError(f"no C compiler for {source.name}; looked for cc, gcc and clang on the path; install one (Debian: apt-get install gcc), or name it in CC")
  command = [*compiler.split(), *CFLAGS]
  key = hashlib.sha256(source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
  folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openpilot-fair"
  path = folder / f"{source.stem}-{key}.so"
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=folder, suffix=".so")
    os.close(fd)
    r = subprocess.run([*command, "-o", tmp, str(source), "-lm"], capture_output=True, text=True)
    if r.returncode:
      os.unlink(tmp)
      raise UserError(f"'{compiler}' could not compile {source.name}: {r.stderr.strip()[-300:]}")
    os.replace(tmp, path)  # atomic: two processes may build at once
  return ctypes.CDLL(str(path))
