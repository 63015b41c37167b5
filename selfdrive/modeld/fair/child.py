"""Processes below this one that may do anything: each in a group of its own, with limits, the first to go where memory
is short, and dead when this one is."""

import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import openpilot

# us that a child may take a core at real-time priority without once waiting, then SIGXCPU ends it, RT_GRACE later
# SIGKILL
RT_LIMIT = 3_000_000
RT_GRACE = 1_000_000
MAX_LINE = 1 << 16
TRIAL_NICE = 15  # of what nobody waits for
PR_SET_PDEATHSIG = 1
# what a signal that nobody here sent mostly means
LIKELY = {
  "SIGXCPU": f"{RT_LIMIT // 1_000_000} s at real-time priority without once waiting",
  "SIGKILL": "out of memory, by hand, or RLIMIT_RTTIME at real-time priority; dmesg tells of memory",
}
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def memory_limit() -> int:
  """Bytes that the worker may hold: 2 GiB or a quarter of the machine's. Where there is an NVIDIA GPU, whose libraries
  want more, 16 GiB or half."""
  total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return min(16 << 30, total // 2) if os.path.exists("/dev/nvidiactl") else min(2 << 30, total // 4)


def limit(which: int, value: int, grace: int = 0) -> None:
  """Lowers a limit of this process for good, the hard one to `grace` above; what the system does not have or allow is
  left as it is."""
  hard = resource.getrlimit(which)[1]
  with contextlib.suppress(OSError, ValueError):
    soft, top = (v if hard == resource.RLIM_INFINITY else min(v, hard) for v in (value, value + grace))
    resource.setrlimit(which, (soft, top))


def tame(parent: int, memory: int, nice: int) -> None:
  """In a child before it becomes another program: it dies with its parent, is the first to go where memory is short,
  and yields to others.

  Memory is counted as the private and writable (RLIMIT_DATA): a GPU's libraries reserve far more addresses than they
  use, which RLIMIT_AS would count."""
  if LIBC is not None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died in between
      os._exit(1)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
      f.write("1000")
    limit(resource.RLIMIT_DATA, memory)
    limit(resource.RLIMIT_RTTIME, RT_LIMIT, RT_GRACE)
  limit(resource.RLIMIT_CORE, 0)
  with contextlib.suppress(OSError):
    os.nice(nice)


def environment(**more: str) -> dict[str, str]:
  """This process's, in which a child started with -P finds openpilot: the working folder, which may hold anything, is
  not searched."""
  root = str(Path(openpilot.__path__[0]).absolute().parent)
  threads = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
  }  # by default: each of BLAS's threads has its own buffers
  env = {**threads, **os.environ, **set_in_c("CEREAL_FAKE", "CEREAL_FAKE_PREFIX"), **more}
  env["PYTHONPATH"] = os.pathsep.join(
    [root, *(p for p in env.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(p) and p != root)]
  )
  return env


def set_in_c(*names: str) -> dict[str, str]:
  """Variables that os.environ does not show: msgq tells its processes of process_replay's events by C's setenv."""
  if LIBC is None:
    return {}
  getenv = LIBC.getenv
  getenv.restype = ctypes.c_char_p
  return {name: value.decode(errors="replace") for name in names if (value := getenv(name.encode())) is not None}


def python(module: str, *args: str) -> list[str]:
  return [sys.executable, "-P", "-m", module, *args]


def ended(code: int) -> str:
  """A return code of Popen, for people."""
  if code >= 0:
    return f"ended with exit code {code}"
  with contextlib.suppress(ValueError):
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (f" ({LIKELY[name]})" if name in LIKELY else "")
  return f"was killed by signal {-code}"


def pipe(reads: bool) -> tuple[int, int]:
  """(read, write), the end that stays here non-blocking."""
  r, w = os.pipe()
  os.set_blocking(r if reads else w, False)
  with contextlib.suppress(OSError, AttributeError):
    fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, MAX_LINE)
  return r, w


def read_all(fd: int) -> tuple[bytes, bool]:
  """What is there to read now, of which MAX_LINE at most, and whether the other end is still open."""
  try:
    data = os.read(fd, MAX_LINE)
    return data, bool(data)
  except BlockingIOError:
    return b"", True
  except OSError:
    return b"", False


class Child:
  """A process in a group of its own that dies with this one; what it writes into the pipe comes out of lines(), or lies
  in `rest`."""

  def __init__(self, command: Sequence[str], memory: int, nice: int, make: Callable[[int], dict[str, Any]]):
    """make: number of the pipe's end in the child -> more of Popen's arguments. Raises OSError where no process can be
    made."""
    self.fd, theirs = pipe(True)
    me = os.getpid()
    try:
      more = make(theirs)
      self.proc = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=lambda: tame(me, memory, nice), **more
      )
    except BaseException:
      os.close(self.fd)
      raise
    finally:
      os.close(theirs)
    self.open = True
    self.rest = b""
    self.begun = time.monotonic()

  def fill(self) -> bool:
    """Takes what is there to read, of which the last MAX_LINE bytes stay in `rest`; False where there is nothing
    now."""
    data = b""
    if self.open:
      data, self.open = read_all(self.fd)
      self.rest = (self.rest + data)[-MAX_LINE:]
    return bool(data)

  def lines(self) -> list[bytes]:
    self.fill()
    *whole, self.rest = self.rest.split(b"\n")
    return whole

  def dead(self) -> bool:
    """Whether it has ended; whatever it left of its group is then ended too, before its number is free for others."""
    if self.proc.returncode is not None:
      return True
    with contextlib.suppress(OSError):
      if os.waitid(os.P_PID, self.proc.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
      self.kill()
    return self.proc.poll() is not None

  def kill(self) -> None:
    if self.proc.returncode is None:
      with contextlib.suppress(OSError):
        os.killpg(self.proc.pid, signal.SIGKILL)

  def send(self, sig: int) -> None:
    if self.proc.returncode is None:
      with contextlib.suppress(OSError):
        os.kill(self.proc.pid, sig)

  def wait(self, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not self.dead():
      if time.monotonic() > end:
        return False
      time.sleep(0.01)
    return True

  def close(self) -> None:
    os.close(self.fd)

  def memory(self) -> int:
    """Bytes: the larger of what is resident and what is private and writable. 0 where the system does not tell."""
    try:
      with open(f"/proc/{self.proc.pid}/statm") as f:
        values = [int(v) for v in f.read().split()]
      return max(values[1], values[5]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
      return 0
