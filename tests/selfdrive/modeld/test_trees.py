"""fairmodeld in upstream's trees since March 2025, by stand-ins that have their API."""
import json
import os
import subprocess
import sys
import tempfile

import pytest

from fair_bundle import write_bundle
from fair_rig import DEADLINE, Rig
from msgq_like import TREES, site, transport

NAMES = """
import json
import numpy as np
from openpilot.selfdrive.modeld.fair import ipc, publish, worker
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
params = ipc.Params()
params.put("FairBundle", "some")
print(json.dumps({
  "services": [worker.EXTRINSICS, worker.CAMERA_STATE], "queue": publish.size_limit("fairDepth"),
  "streams": [ipc.stream_type("narrowRoad"), ipc.stream_type("wideRoad")],
  "focal": [camera_intrinsics(1928, 1208)[0, 0], camera_intrinsics(1344, 760, wide=True)[0, 0]],
  "param": [ipc.read_param(params, key) for key in ("FairBundle", "FairRunner", "NoSuchKey")],
  "close": hasattr(ipc.Client, "close"), "layout": ipc.messaging.__name__,
}))
"""


@pytest.mark.parametrize("date", TREES)
def test_what_differs_between_trees_ends_in_ipc(tmp_path, prefix, date):
  env = {**os.environ, "PYTHONPATH": site(date, tmp_path / "site")}
  r = subprocess.run([sys.executable, "-c", NAMES], env=env, capture_output=True, text=True, timeout=DEADLINE)
  assert r.returncode == 0, r.stderr
  said, tree = json.loads(r.stdout), TREES[date]
  assert said["services"] == (["liveCalibration", "roadCameraState"] if tree.old_names else ["extrinsicsCalibration", "narrowRoadCameraState"])
  assert said["queue"] == (2 if tree.queue_size else 10) * 1024 * 1024 // 3
  assert said["streams"] == [0, 2] and said["focal"] == [2648.0, 425.25] and said["param"] == ["some", None, None] and not said["close"]


@pytest.fixture
def upstream(tmp_path, prefix, monkeypatch):
  """A function DATE -> Rig: fairmodeld in that tree, what feeds and hears it on the same transport."""
  rigs = []

  def make(date, **more):
    transport(monkeypatch.setattr)
    rigs.append(Rig(write_bundle(tmp_path / "tiny").path, PYTHONPATH=site(date, tmp_path / "site"), **more))
    return rigs[-1]

  with tempfile.TemporaryDirectory(prefix="q") as short:  # a socket's path has 107 characters
    monkeypatch.setenv("TMPDIR", short)
    yield make
    for rig in rigs:
      rig.close()


@pytest.mark.parametrize("date", TREES)
def test_frames_in_messages_out(upstream, date):
  rig = upstream(date)
  rig.camera()
  rig.flows("fairDepth")
  rig.until(lambda sm: str(sm["fairState"].status) == "running", "running")
  s = rig.sm["fairState"]
  assert s.framesProcessed > 0 and s.faultCount == 0 and (s.cameraWidth, s.cameraHeight) == (1344, 760)
