"""What this process takes of its machine: memory, open files, priority."""

import contextlib
import errno
import os
import resource
import sys
from collections.abc import Iterator

FILES = 1024  # that should be possible: 60 are open without a camera, and each of its buffers is one, up to 253


def peak_memory_mb() -> float:
  """The most of it that was resident so far, MB."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def memory_mb() -> float:
  """Resident set size now, MB; where there is no /proc, its maximum so far."""
  try:
    with open("/proc/self/statm") as f:
      return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
  except OSError:
    return peak_memory_mb()


def allow_files() -> None:
  """Raises the limit of open files to FILES, or as far as this process may."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    with contextlib.suppress(OSError, ValueError):
      resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def too_few_files(e: Exception) -> str:
  """What to do where an exception is of too few open files; else ''."""
  if getattr(e, "errno", None) not in (errno.EMFILE, errno.ENFILE):
    return ""
  return (
    f"; this process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}: raise the limit, `ulimit -n {FILES}`"
  )


@contextlib.contextmanager
def at_ease() -> Iterator[None]:
  """At real-time priority a bundle's seconds of loading would keep all else from its core: within, this process is an
  ordinary one."""
  policy = os.sched_getscheduler(0) if sys.platform == "linux" else None
  if policy is None or policy not in (os.SCHED_FIFO, os.SCHED_RR):
    yield
    return
  before = os.sched_getparam(0)
  os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
  try:
    yield
  finally:
    os.sched_setscheduler(0, policy, before)
