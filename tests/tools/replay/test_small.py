"""Small pieces of replay and compare-logs, by hand."""

import itertools
import math
import threading
from types import SimpleNamespace

import pytest

from openpilot.cereal import messaging
from openpilot.tools.replay import record
from openpilot.tools.replay.compare_logs import differences
from openpilot.tools.replay.replay import Item, Replay, with_time


def test_a_message_at_another_time():
  m = messaging.new_message("carState", valid=True, logMonoTime=5)
  m.carState.vEgo = 7.5
  event = messaging.log_from_bytes(with_time(m.to_bytes(), 2**60 + 3))
  assert (event.logMonoTime, event.valid, event.carState.vEgo) == (2**60 + 3, True, 7.5)
  assert len(with_time(m.to_bytes(), 9)) == len(m.to_bytes())
  several = bytes([1, 0, 0, 0]) + bytes(4 * 3)  # two memory segments: three words of lengths and their filling
  dat = several + bytes(8) + (5).to_bytes(8, "little") + bytes(8)
  assert with_time(dat, 9) == several + bytes(8) + (9).to_bytes(8, "little") + bytes(8)


@pytest.mark.parametrize(
  ("a", "b", "same"),
  [
    (1.0, 1.0, True),
    (0.0, -0.0, True),
    (1.0, 1.0019, True),
    (1.0, 1.0021, False),
    (0.0, 0.0009, True),
    (0.0, 0.0011, False),
    (math.nan, math.nan, True),
    (math.nan, 1.0, False),
    (math.inf, math.inf, True),
    (math.inf, -math.inf, False),
    (math.inf, 1.0, False),
    (1.0, math.inf, False),
    (1, 1, True),
    (1, 2, False),
    ("a", "b", False),
    ([1.0, 2.0], [1.0, 2.0], True),
    ([1.0], [1.0, 2.0], False),
    ({"x": 1.0}, {"x": 9.0}, False),
  ],
)
def test_what_counts_as_a_difference(a, b, same):
  """Up to a thousandth of 1 and of the number together."""
  assert (list(differences(a, b, "", 1e-3)) == []) is same


def test_device_state_is_there_before_the_first_message():
  """Processes that wait for it come up meanwhile."""
  done = []
  stop = SimpleNamespace(is_set=lambda: False, set=lambda: done.append("end"))
  stop.wait = lambda s: done.append(("waited", s))
  fake = SimpleNamespace(segments=[SimpleNamespace(route="a")], has_video=True, stop=stop, loop=False, start=0.0)
  fake.sent_messages = fake.sent_frames = 0
  fake.guard, fake.close = SimpleNamespace(say=lambda: None), lambda: done.append("closed")
  fake._serve, fake._started = lambda: done.append("served"), lambda t: done.append(("started", t))

  def played(bar):
    fake.sent_messages += 1
    done.append("played")

  fake._round = played
  Replay.run(fake, progress=False)
  assert done == ["served", ("started", 0), ("waited", 0.3), "played", "end", "closed"]


def test_a_recorder_hears_from_its_creation_on(monkeypatch):
  """And ends when it is told to."""
  heard = threading.Event()
  waiting = [[b"a", b"b"], [b"c"]]
  closed = []

  class Poller:
    def poll(self, ms):
      if not waiting:
        heard.set()
        return []
      return ["sock"]

  monkeypatch.setattr(record.messaging, "Poller", Poller)
  monkeypatch.setattr(record.messaging, "sub_sock", lambda s, p: SimpleNamespace(close=lambda: closed.append(s)))
  monkeypatch.setattr(record.messaging, "drain_sock_raw", lambda sock: waiting.pop(0))
  recorder = record.Recorder(["fairState", "fairObjects"])
  assert heard.wait(10)
  assert recorder.stop() == [b"a", b"b", b"c"] and closed == ["fairState", "fairObjects"]
  assert not recorder.thread.is_alive()


def test_what_is_read_ahead_is_sent_in_its_order():
  """By a thread of its own, until it says that there is no more."""
  sent, looked = [], itertools.count()
  fake = SimpleNamespace(last_time=0, last_id=0, has_video=False, speed=1e6, seconds=None, loop=False)
  fake.stop = SimpleNamespace(is_set=lambda: next(looked) > 20, wait=lambda s: False)
  fake.logged, fake.sent_messages = {"deviceState"}, 0
  fake._send = lambda service, dat: sent.append((service, dat))
  items = [Item(1000 * k, 0, "carState", bytes([k])) for k in range(5)]

  def feed(waiting):
    for item in (*items, None):
      waiting.put(item)

  fake._feed = feed
  Replay._round(fake, None)
  assert sent == [("carState", bytes([k])) for k in range(5)]
  assert fake.sent_messages == 5 and fake.last_time == 4000
