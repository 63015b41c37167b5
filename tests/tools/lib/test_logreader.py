import bz2
import errno
from collections import Counter

import numpy as np
import pytest
import zstandard

from openpilot.cereal import log, messaging
from openpilot.tools.lib import files, logreader
from openpilot.tools.lib.encode_index import encode_index, synthetic_index
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader, raw_events
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route


def car_state(t, v=0.0):
  m = messaging.new_message("carState", valid=True, logMonoTime=t)
  m.carState.vEgo = v
  return m.to_bytes()


def camera(t, frame_id):
  m = messaging.new_message("narrowRoadCameraState", valid=True, logMonoTime=t)
  m.narrowRoadCameraState.frameId = frame_id
  return m.to_bytes()


MESSAGES = [car_state(30, 3), camera(10, 1), car_state(20, 2), camera(40, 4), car_state(20, 2.5)]


@pytest.mark.parametrize("suffix", [".zst", ".bz2", ""])
def test_order_selection_spelling(tmp_path, suffix):
  path = tmp_path / f"rlog{suffix}"
  assert write_log(path, MESSAGES) == 5
  assert [e.logMonoTime for e in LogReader(path)] == [10, 20, 20, 30, 40]
  assert [e.logMonoTime for e in LogReader(path, sort_by_time=False)] == [30, 10, 20, 40, 20]
  assert [e.carState.vEgo for e in LogReader(path, services=["carState"])] == [
    2,
    2.5,
    3,
  ]  # equal times keep their order
  for name in ("roadCameraState", "narrowRoadCameraState"):
    assert [e.narrowRoadCameraState.frameId for e in LogReader(path, services=[name])] == [1, 4]
  assert sorted(dat for _, _, dat in raw_events(path)) == sorted(MESSAGES)
  with pytest.raises(UserError, match="no service noSuch"):
    LogReader(path, services=["noSuch"])


def test_several_segments_are_one_stream(tmp_path):
  second = 1_000_000_000
  a = [car_state(t * second, t) for t in range(60)] + [camera(60 * second + 300, 7)]
  b = [camera(59 * second + 700_000_000, 6)] + [
    car_state(t * second, t) for t in range(60, 120)
  ]  # begins before the first ends
  for n, m in enumerate((a, b)):
    write_log(tmp_path / f"0000002c--d68dde99ca--{n}" / "rlog.zst", m)
  times = [e.logMonoTime for e in LogReader(Route(tmp_path))]
  assert len(times) == 122 and times == sorted(times)


def test_unknown_unions_are_skipped_and_counted(tmp_path):
  strange = bytearray(car_state(25))
  at = 8 + 8 + 8  # segment table, root pointer, time; the tag is next
  assert int.from_bytes(strange[at : at + 2], "little") == log.Event.schema.fields["carState"].proto.discriminantValue
  strange[at : at + 2] = (999).to_bytes(2, "little")
  path = tmp_path / "rlog"
  write_log(path, [*MESSAGES, bytes(strange), bytes(strange)])
  reader = LogReader(path)
  assert len(list(reader)) == 5 and reader.unknown == Counter({999: 2})


def test_messages_of_several_segments_of_memory(tmp_path):
  m = messaging.new_message("can", 3000, logMonoTime=15)
  for c in m.can:
    c.dat = b"12345678" * 4
  assert int.from_bytes(m.to_bytes()[:4], "little") > 0, "one memory segment: make it larger"
  m.clear_write_flag()
  write_log(tmp_path / "rlog", [*MESSAGES, m.to_bytes()])
  assert [e.which() for e in LogReader(tmp_path / "rlog")][1] == "can" and len(
    next(iter(LogReader(tmp_path / "rlog", services=["can"]))).can
  ) == 3000


def test_the_chain_in_c_equals_that_in_python():
  """On whole, cut and damaged logs, with messages of one and of several memory segments."""
  lib = logreader.library()
  if lib is None:
    pytest.skip("no C compiler")
  r = np.random.default_rng(1)
  m = messaging.new_message("can", 3000, logMonoTime=15)
  for c in m.can:
    c.dat = b"12345678" * 4
  big = m.to_bytes()
  m.clear_write_flag()
  for trial in range(300):
    dat = bytearray(b"".join(big if k == 3 else MESSAGES[k % 3] for k in r.integers(0, 4, 12)))
    if trial % 3 == 1:
      dat = dat[: int(r.integers(8, len(dat)))]
    elif trial % 3 == 2:
      dat[int(r.integers(len(dat)))] ^= 1 << int(r.integers(8))
    words = np.frombuffer(bytes(dat), "<u8", len(dat) // 8)
    (s, b, e), (s2, b2, e2) = logreader.chain_native(lib, words), logreader.chain_python(words)
    assert e == e2 and (s == s2).all() and (b == b2).all() and len(s) == len(s2), trial
    _, root, end, _ = logreader.chain(words)  # over gaps, too
    (times, tags), (times2, tags2) = (
      logreader.headers_native(lib, words, root, end),
      logreader.headers_numpy(words, root, end),
    )
    assert len(times) == len(root) and (times == times2).all() and (tags == tags2).all(), trial


def test_the_root_of_any_pointer_is_found_alike_in_c_and_in_numpy():
  """Far pointers, lists, structs that are too small or reach out of the message."""
  lib = logreader.library()
  if lib is None:
    pytest.skip("no C compiler")
  r = np.random.default_rng(2)
  words = r.integers(0, 2**62, 4000, dtype=np.uint64)
  root = np.arange(0, 3990, 10)
  pointer = r.integers(0, 4, len(root)) | r.integers(0, 12, len(root)) << 2 | r.integers(0, 4, len(root)) << 32
  pointer[:2] = 0x3FFFFFFF << 2 | 5 << 32, 2**16 - 1 << 32  # a root before the message; behind it
  words[root] = pointer.astype(np.uint64)
  end = root + r.integers(1, 11, len(root))
  native, numpy = logreader.headers_native(lib, words, root, end), logreader.headers_numpy(words, root, end)
  assert all(np.array_equal(a, b) for a, b in zip(native, numpy, strict=True))
  assert {logreader.FAR, logreader.DAMAGED} < set(native[1].tolist()) and (native[0] > 0).sum() > 20


@pytest.mark.parametrize("suffix", [".zst", ".bz2", ""])
def test_truncated_tails_are_tolerated_and_said(tmp_path, suffix, capsys):
  path, many = tmp_path / f"rlog{suffix}", [car_state(i * 7919 % 2**31 + i * 2**32, i) for i in range(120_000)]
  write_log(path, many)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) * 2 // 3 - 3])
  reader = LogReader(path, services=["carState"])
  got = [e.carState.vEgo for e in reader]
  assert 0 < len(got) < 120_000 and got == [float(i) for i in range(len(got))]
  assert len(reader.truncated) == 1 and str(path) in reader.truncated[0]
  assert capsys.readouterr().err.count("warning:") == 1


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"", "is empty"),
    (b"this is no log at all, but text of some length", "is not a log"),
    (zstandard.compress(b"text " * 100), "is not a log"),
    (bz2.compress(b"\0" * 100), "is not a log"),
    (b"\x28\xb5\x2f\xfd" + b"rubbish", "no readable data"),
    (b"BZh9rubbish", "no readable data"),
  ],
)
def test_what_is_no_log_is_said(tmp_path, content, message):
  (tmp_path / "rlog").write_bytes(content)
  with pytest.raises(UserError, match=message):
    list(LogReader(tmp_path / "rlog"))


def test_segment_without_log_is_named(tmp_path):
  (tmp_path / "0000002c--d68dde99ca--3").mkdir()
  (tmp_path / "0000002c--d68dde99ca--3" / "qcamera.ts").write_bytes(b"x")
  with pytest.raises(UserError, match="no rlog or qlog in segment 0000002c--d68dde99ca--3"):
    list(LogReader(tmp_path))


def test_disk_full_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "rlog.zst"
  write_log(path, MESSAGES)
  before = path.read_bytes()

  def full():
    yield MESSAGES[0]
    raise OSError(errno.ENOSPC, "No space left on device")

  with pytest.raises(UserError, match="disk is full"):
    write_log(path, full())
  assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["rlog.zst"]
  with pytest.raises(KeyError), files.atomic_path(tmp_path / "x") as tmp:
    tmp.write_text("half")
    raise KeyError
  assert [p.name for p in tmp_path.iterdir()] == ["rlog.zst"]


def test_shared_logs_equal_pycapnp(shared_data):
  paths = sorted((shared_data / "realdata").glob("*/?log.*"))
  for path in paths:
    dat = path.read_bytes()
    dat = bz2.decompress(dat) if path.suffix == ".bz2" else zstandard.ZstdDecompressor().decompressobj().decompress(dat)
    want = [(e.logMonoTime, e.which()) for e in log.Event.read_multiple_bytes(dat, traversal_limit_in_words=2**64 - 1)]
    reader = LogReader(path, sort_by_time=False)
    assert [(e.logMonoTime, e.which()) for e in reader] == want and not reader.unknown and not reader.truncated
    chosen = [(e.logMonoTime, e.which()) for e in LogReader(path, services=["carState", "liveCalibration"])]
    assert chosen == sorted((x for x in want if x[1] in ("carState", "extrinsicsCalibration")), key=lambda x: x[0])


def test_shared_video_joins_its_log(shared_data):
  last = None
  for s in Route(shared_data / "realdata" / "0000002c--d68dde99ca").segments:
    entries = encode_index(s, "qcamera")
    assert [e.segment_id for e in entries] == list(range(1200)) and {e.segment_num for e in entries} == {s.num}
    ids = [e.frame_id for e in entries]
    assert ids == list(range(ids[0], ids[0] + 1200)) and (last is None or ids[0] == last + 1)
    last = ids[-1]


def test_index_without_log():
  entries = synthetic_index(5, 25.0, 3, start=1000, first_id=10)
  assert (
    [e.frame_id for e in entries] == [10, 11, 12, 13, 14]
    and entries[4].timestamp_sof == 1000 + 160_000_000
    and entries[0].segment_num == 3
  )
