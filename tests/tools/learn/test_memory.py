"""Memory that a training frees and takes again."""

import platform
import subprocess
import sys

import pytest

CODE = """
import resource
from openpilot.tools.learn.memory import keep_freed
def faults():
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  b"x" * (1 << 26)  # 16384 pages, written to
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = [faults() for _ in range(3)]
keep_freed()
print(first[-1], [faults() for _ in range(3)][-1], resource.getpagesize())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
def test_memory_that_is_kept_is_not_mapped_anew():
  said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
  before, after, page = map(int, said.split())
  if before < (1 << 26) // page // 2:
    pytest.skip("this system maps large pages by itself")
  assert after < before // 100
