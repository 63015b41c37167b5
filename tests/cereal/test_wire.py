"""Real logs of several ages through our schema, and our messages through a schema that does not know them."""

import bz2
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from openpilot.cereal import CEREAL_PATH, log, messaging


def events(path):
  dat = path.read_bytes()
  dat = bz2.decompress(dat) if path.suffix == ".bz2" else zstandard.ZstdDecompressor().decompressobj().decompress(dat)
  return log.Event.read_multiple_bytes(dat, traversal_limit_in_words=2**64 - 1)


def test_every_shared_log_reads(shared_data):
  paths = sorted((shared_data / "realdata").glob("*/?log.*"))
  assert len(paths) >= 7
  for path in paths:
    counts = Counter()
    for e in events(path):
      which = e.which()
      counts[which] += 1
      m = getattr(e, which)
      if which == "carState":
        assert -10 < m.vEgo < 60 and math.isfinite(m.steeringAngleDeg)
      elif which == "extrinsicsCalibration" and len(m.rpyCalib):
        assert len(m.rpyCalib) == 3 and all(abs(v) < 0.3 for v in m.rpyCalib)
      elif which in ("narrowRoadEncodeIdx", "qNarrowRoadEncodeIdx"):
        assert m.segmentId <= 1200 and str(m.type) in ("fullHEVC", "qcameraH264", "bigBoxLossless")
      elif which == "modelV2":
        assert len(m.laneLines) == 4 and len(m.laneLines[0].y) == 33 and abs(m.laneLines[0].x[-1] - 192) < 1e-3
      elif which == "initData":
        assert str(m.deviceType) in ("neo", "tici", "tizi", "mici", "chffrAndroid")
      elif which == "deviceState":
        assert 0 <= m.freeSpacePercent <= 100 and len(m.cpuTempC) <= 16
      elif which == "narrowRoadCameraState":
        assert m.timestampEof > 0
      elif which == "gpsLocation" and m.hasFix:
        assert -90 <= m.latitude <= 90
    assert counts["carState"] > 50, path


OLD_READER = """
import sys, capnp
capnp.remove_import_hook()
folder, path = sys.argv[1:]
log = capnp.load(folder + "/log.capnp", imports=[folder])
for e in log.Event.read_multiple_bytes(open(path, "rb").read()):
  try:
    which = e.which()
  except capnp.KjException:   # as openpilot's LogReader
    which = "unknown"
  print(which, e.logMonoTime, e.valid, e.carState.vEgo if which == "carState" else "")
"""


@pytest.mark.parametrize("known", ["empty structs", "slots of later versions unknown"])
def test_our_messages_survive_a_reader_that_does_not_know_them(tmp_path, known):
  schema = tmp_path / "schema"
  schema.mkdir()
  for f in Path(CEREAL_PATH).glob("*.capnp"):
    shutil.copy(f, schema)
  text = (schema / "log.capnp").read_text()
  text = re.sub(r"(fair\w+) @(\d+) :Custom\.Fair\w+;", r"customReserved\2 @\2 :Custom.CustomReserved0;", text)
  if known != "empty structs":  # an old schema ends before our slots
    text = re.sub(r"^    \w+ @(13[6-9]|14\d|15[0-2]) :[^\n]*\n", "", text, flags=re.M)
  (schema / "log.capnp").write_text(text)
  messages = []
  for i in range(3):
    msg = messaging.new_message("carState", valid=True, logMonoTime=10 * i)
    msg.carState.vEgo = 1.5 * i
    ours = messaging.new_message("fairDepth", logMonoTime=10 * i + 5)
    ours.fairDepth.data, ours.fairDepth.bundle = b"x" * 1000, "tiny"
    messages += [msg, ours]
  path = tmp_path / "log"
  path.write_bytes(b"".join(m.to_bytes() for m in messages))
  r = subprocess.run(
    [sys.executable, "-c", OLD_READER, str(schema), str(path)], capture_output=True, text=True, check=True
  )
  lines = [line.split() for line in r.stdout.splitlines()]
  assert [(x[0], x[1], x[2], float(x[3])) for x in lines if x[0] == "carState"] == [
    ("carState", str(10 * i), "True", 1.5 * i) for i in range(3)
  ]
  name = "customReserved141" if known == "empty structs" else "unknown"
  assert [(x[0], x[1]) for x in lines if x[0] != "carState"] == [(name, str(10 * i + 5)) for i in range(3)]
