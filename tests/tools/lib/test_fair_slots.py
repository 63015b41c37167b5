"""before_the_move.zst: a message of each of our kinds, and a carState, as the code of two releases before the move to
Event @140..@145 wrote them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import zstandard

from openpilot.cereal import messaging
from openpilot.selfdrive.modeld.fair.publish import SERVICES, class_map_from_message, depth_from_message
from openpilot.tools.lib import fair_slots
from openpilot.tools.lib.logreader import TAG_NAMES, TAGS, LogReader, raw_events
from openpilot.tools.lib.logwriter import write_log

OLD = Path(__file__).with_name("before_the_move.zst")


def at_old_slot(service: str, msg) -> bytes:
  """A message of today with the tag that is four lower."""
  dat = bytearray(msg.to_bytes())
  at = 8 + 8 + 8
  assert int.from_bytes(dat[at : at + 2], "little") == TAGS[service]
  dat[at : at + 2] = (TAGS[service] - fair_slots.MOVED).to_bytes(2, "little")
  return bytes(dat)


def test_recordings_of_before_read_as_if_of_today(capsys):
  events = list(LogReader(OLD))
  assert "14 fair messages were recorded at Event @136..@141" in capsys.readouterr().err
  assert Counter(e.which() for e in events) == {"carState": 2} | dict.fromkeys(SERVICES, 2) | {"fairDepth": 4}
  for first in (0, 8):
    by = {e.which(): getattr(e, e.which()) for e in events[first : first + 7]}
    assert all(by[s].bundle == f"student-{('192c323', 'b01d6ea')[first // 8]}" for s in SERVICES)
    assert (
      str(by["fairState"].status) == "running"
      and by["fairState"].bundleHash == "ab" * 32
      and by["fairState"].graphs[0].name == "main"
    )
    assert (depth_from_message(by["fairDepth"]) == np.arange(8).reshape(2, 4)).all() and by["fairDepth"].metric
    assert [(o.trackId, o.classId, list(o.box)) for o in by["fairObjects"].objects] == [(5, 1, [1, 2, 3, 4])]
    assert class_map_from_message(by["fairSegmentation"]).T.ravel().tolist() == [0] * 5 + [255] * 3
    assert [(line.lineId, line.prob, list(line.y)) for line in by["fairLanes"].lines] == [(3, 0.75, [3, 4])]
    assert (by["fairFeatures"].channels, len(by["fairFeatures"].data)) == (2, 8) and by["carState"].vEgo == 12.5
  assert [e.logMonoTime for e in LogReader(OLD, services=["fairLanes"])] == [1005, 1105]
  assert all(messaging.log_from_bytes(dat).which() == TAG_NAMES[tag] for _, tag, dat in raw_events(OLD))


def test_a_forks_messages_at_these_slots_are_never_ours(tmp_path, capsys):
  """All have the sizes of our structs, so that only their content tells."""
  messages = []
  for i in range(3):
    m = messaging.new_message("fairState", logMonoTime=i)
    m.fairState.bundle, m.fairState.bundleHash, m.fairState.stream = "milestone", "reached", "assisted"
    messages.append(at_old_slot("fairState", m))
    m = messaging.new_message(
      "fairDepth", logMonoTime=10 + i
    )  # reads as an empty depth map of ours, but no fairState names its bundle
    m.fairDepth.bundle = "milestone"
    messages.append(at_old_slot("fairDepth", m))
  m = messaging.new_message("fairSegmentation", logMonoTime=20)
  m.fairSegmentation.bundle, m.fairSegmentation.runClass = "student-b01d6ea", b"abc"  # three classes, no lengths
  messages.append(at_old_slot("fairSegmentation", m))
  ours = zstandard.ZstdDecompressor().decompressobj().decompress(OLD.read_bytes())
  path = tmp_path / "rlog.zst"
  write_log(path, [*messages, ours])
  counts = Counter(e.which() for e in LogReader(path))
  assert (counts["customReserved10"], counts["customReserved11"], counts["customReserved13"]) == (3, 3, 1)
  assert counts["fairState"] == 2 and counts["fairDepth"] == 4 and counts["fairSegmentation"] == 2
  assert "14 fair messages" in capsys.readouterr().err
  write_log(path, messages)
  assert not any(s in SERVICES for s in Counter(e.which() for e in LogReader(path))) and capsys.readouterr().err == ""


def test_another_programs_messages_at_our_slots_are_left_out(tmp_path, capsys):
  small = messaging.new_message("fairLanes", logMonoTime=1)
  small.fairLanes.bundle = "strange"
  dat = bytearray(small.to_bytes())
  dat[24:26] = TAGS["fairState"].to_bytes(
    2, "little"
  )  # 2 words, 2 pointers: no fairState, and no fairState names that bundle
  today = messaging.new_message("fairState", logMonoTime=2)
  today.fairState.bundle = "strange"
  path = tmp_path / "rlog"
  write_log(path, [bytes(dat), today.to_bytes()])
  assert [e.logMonoTime for e in LogReader(path)] == [2]
  assert "1 messages at Event @140..@145 are another program's" in capsys.readouterr().err


@pytest.mark.parametrize("service", SERVICES)
def test_messages_of_today_are_taken_as_they_are(tmp_path, capsys, service):
  write_log(tmp_path / "rlog", [messaging.new_message(service, logMonoTime=1).to_bytes()])
  assert [e.which() for e in LogReader(tmp_path / "rlog")] == [service] and capsys.readouterr().err == ""
  assert all(
    TAGS[s] == 138 + i
    for i, s in enumerate(["fairState", "fairDepth", "fairObjects", "fairSegmentation", "fairLanes", "fairFeatures"])
  )
