import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from openpilot.common.params import ParamKeyFlag, Params, UnknownKeyName


def test_types(prefix):
  p = Params()
  assert (
    p.get("FairEnabled") is None
    and p.get("FairEnabled", return_default=True) is False
    and not p.get_bool("FairEnabled")
  )
  p.put_bool("FairEnabled", True)
  assert p.get("FairEnabled") is True and Params().get_bool("FairEnabled")
  p.put("FairBundle", "scene-nano")
  assert p.get("FairBundle") == "scene-nano"
  with open(p.get_param_path("FairEnabled"), "rb") as f:
    assert f.read() == b"1"  # openpilot's encoding
  p.remove("FairBundle")
  assert p.get("FairBundle") is None
  for key, value in (("FairEnabled", "1"), ("FairBundle", b"x"), ("FairBundle", 3)):
    with pytest.raises(TypeError):
      p.put(key, value)


def test_unknown_key(prefix):
  p = Params()
  for call in (p.get, p.get_bool, p.remove, p.check_key, lambda k: p.put(k, "x")):
    with pytest.raises(UnknownKeyName):
      call("NoSuchKey")


def test_prefixes_are_apart(prefix, monkeypatch):
  Params().put("FairBundle", "a")
  monkeypatch.setenv("OPENPILOT_PREFIX", "other")
  assert Params().get("FairBundle") is None


def test_clear_all_keeps_what_persists(prefix):
  p = Params()
  p.put_bool("FairEnabled", True)
  p.put_bool("IsOnroad", True)
  p.clear_all(ParamKeyFlag.CLEAR_ON_MANAGER_START)
  assert p.get("IsOnroad") is None and p.get_bool("FairEnabled")


def hammer(n):
  p = Params()
  for i in range(60):
    p.put("FairBundle", f"{n}-{i}-" + "x" * 5000)


def test_readers_never_see_half_a_value(prefix):
  procs = [multiprocessing.get_context("fork").Process(target=hammer, args=(n,)) for n in range(3)]
  p = Params()
  p.put("FairBundle", "0-0-" + "x" * 5000)
  for q in procs:
    q.start()
  while any(q.is_alive() for q in procs):
    value = p.get("FairBundle")
    assert value.endswith("x" * 5000) and value.count("-") == 2
  assert all(q.exitcode == 0 for q in procs)
  assert not [f for f in os.listdir(p.get_param_path()) if f.startswith(".tmp")]


def test_killed_writer_leaves_a_whole_value(prefix):
  code = """
from openpilot.common.params import Params
p = Params()
for i in range(10**9):
  p.put('FairBundle', f'{i}-' + 'y' * 100000)
"""
  for _ in range(3):
    proc = subprocess.Popen([sys.executable, "-c", code])
    p, end = Params(), time.monotonic() + 20
    while p.get("FairBundle") is None and time.monotonic() < end:
      time.sleep(0.01)
    time.sleep(0.05)
    os.kill(proc.pid, signal.SIGKILL)
    proc.wait()
    assert p.get("FairBundle").endswith("y" * 100000)
    p.put("FairBundle", "after")  # the dead writer's lock is gone
    assert p.get("FairBundle") == "after"
    p.remove("FairBundle")
