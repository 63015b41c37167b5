"""The real fairmodeld as a process, with a camera server and ears beside it."""

import os
import signal
import subprocess
import sys
import time

import numpy as np

from fair_bundle import manifest, objects_graph, write_bundle, write_graphs
from openpilot.cereal import messaging
from openpilot.cereal.visionipc import VisionIpcServer, VisionStreamType, nv12_info

ROAD = VisionStreamType.VISION_STREAM_NARROW_ROAD
DEADLINE = 120.0  # s; generous: only a hang reaches it
FAIRMODELD = [sys.executable, "-m", "openpilot.selfdrive.modeld.fair.fairmodeld"]
PERIOD_NS = 50_000_000


def wait(condition, what):
  """Until condition() is true, whose value it returns."""
  end = time.monotonic() + DEADLINE
  while not (value := condition()):
    assert time.monotonic() < end, f"no {what} within {DEADLINE} s"
    time.sleep(0.02)
  return value


def children(pid):
  with open(f"/proc/{pid}/task/{pid}/children") as f:
    return [int(p) for p in f.read().split()]


class Rig:
  """bundle: its folder, or None: what FAIR_MODELS_DIR and the params say. command: what is started, if not fairmodeld
  as it is."""

  def __init__(self, bundle=None, services=("fairState", "fairDepth", "fairSegmentation"), command=FAIRMODELD, **env):
    args = [] if bundle is None else ["--bundle", str(bundle)]
    self.proc = subprocess.Popen([*command, *args], stderr=subprocess.PIPE, text=True, env={**os.environ, **env})
    self.sm = messaging.SubMaster(list(services))
    self.server, self.stream = None, ROAD
    self.frame_id = 0
    self.level = None  # of all bytes of a frame; None: changes from frame to frame

  @property
  def worker(self):
    """The pid of the process below the supervisor."""
    return wait(lambda: children(self.proc.pid), "worker")[0]

  def camera(self, w=1344, h=760, buffers=6, stream=ROAD):
    if self.server is not None:
      self.server.close()
    self.server, self.stream = VisionIpcServer("camerad"), stream
    self.server.create_buffers(stream, buffers, w, h)
    self.server.start_listener()
    self.size = nv12_info(w, h)[3]

  def send(self, frame_id, eof=None):
    level = frame_id % 250 if self.level is None else self.level
    eof = frame_id * PERIOD_NS + 1 if eof is None else eof
    self.server.send(self.stream, np.full(self.size, level, np.uint8), frame_id, max(0, eof - 1), eof)

  def until(self, condition, what, step=1, period=0.05):
    """Sends a frame every period s, as a camera would, if there is one, until condition(sm) holds."""
    end = time.monotonic() + DEADLINE
    while (now := time.monotonic()) < end:
      assert self.proc.poll() is None, f"fairmodeld died with {self.proc.returncode} while waiting for {what}"
      if self.server is not None:
        self.frame_id += step
        self.send(self.frame_id)
      while (left := now + period - time.monotonic()) > 0:
        self.sm.update(max(1, int(left * 1000)))
        if condition(self.sm):
          return
    raise AssertionError(f"no {what} within {DEADLINE} s; fairState: {self.sm['fairState']}")

  def flows(self, service="fairSegmentation"):
    """Until the newest frame's message is there, and valid. Each frame is given time for it: sent on every message,
    they would stay one ahead for ever."""

    def newest(sm):
      return sm.updated[service] and sm.valid[service] and sm[service].frameId == self.frame_id

    self.sm.update(0)
    self.until(newest, f"valid {service} of the newest frame", period=0.3)

  def fault(self, text):
    self.until(lambda sm: text in sm["fairState"].fault, f"fault that says '{text}'")
    return self.sm["fairState"]

  def close(self):
    """Ends everything; what fairmodeld wrote to stderr."""
    if self.server is not None:
      self.server.close()
    self.proc.send_signal(signal.SIGINT)
    err = self.proc.communicate(timeout=DEADLINE)[1]
    self.sm.close()
    return err


def write_objects(folder, name="tiny"):
  """A scene's graph and one that sees two objects in every frame."""
  write_bundle(folder)
  raw = {"heat": np.full((1, 3, 32, 64), -9, np.float32), "box": np.full((1, 4, 32, 64), 20, np.float32)}
  raw["heat"][0, 0, 10, 20] = raw["heat"][0, 1, 20, 50] = 3
  return write_graphs(folder, [objects_graph(folder, raw), manifest()["graphs"][0]], name).path


def objects_rig(folder, **env):
  """A fixture's body: fairmodeld with that bundle in folder/tiny, running."""
  r = Rig(write_objects(folder / "tiny"), ("fairState", "fairObjects", "fairSegmentation"), **env)
  r.camera()
  r.until(lambda sm: str(sm["fairState"].status) == "running", "running")
  yield r
  r.close()


def ids(sm):
  return {o.trackId for o in sm["fairObjects"].objects}


def device(pm, **fields):
  msg = messaging.new_message("deviceState", valid=True)
  for k, v in fields.items():
    setattr(msg.deviceState, k, v)
  pm.send("deviceState", msg)
