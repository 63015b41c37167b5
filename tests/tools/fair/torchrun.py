"""Several processes of one run, on a CPU."""

import os
import subprocess
import sys


def torchrun(processes, *words, timeout=1200, **env):
  """-> what subprocess.run() gives; of one process without torchrun."""
  several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
  command = [sys.executable, *(several if processes > 1 else []), *map(str, words)]
  env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
  return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env)
