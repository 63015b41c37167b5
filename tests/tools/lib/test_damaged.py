"""What is damaged, hostile or old is read as far as it is whole, and said."""

import bz2
import os
import struct
import subprocess
import sys
from types import SimpleNamespace

import av
import numpy as np
import pytest
import zstandard

from openpilot.cereal import messaging
from openpilot.tools.lib.encode_index import EncodeEntry, by_number, encode_index, exposure_times, join, synthetic_index
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.guard import is_sound, open_event, read_all
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route, Segment
from openpilot.tools.lib.unpack import decompress, most_bytes, one_frame
from openpilot.tools.lib.videowriter import VideoWriter
from openpilot.tools.replay.source import KnownCamera, frames, open_route

SECOND = 10**9
W, H, N, GOP = 96, 64, 40, 10


def message(service, t, **fields):
  m = messaging.new_message(service, valid=True, logMonoTime=t)
  for k, v in fields.items():
    setattr(getattr(m, service), k, v)
  return m.to_bytes()


def index(k, num=0, t=None, **fields):
  t = 100 * SECOND + k * 50_000_000 if t is None else t
  values = {
    "frameId": 500 + k,
    "segmentNum": num,
    "segmentId": k,
    "timestampSof": t - 20_000_000,
    "timestampEof": t - 10_000_000,
  } | fields
  return message("narrowRoadEncodeIdx", t, **values)


def write_video(path):
  with VideoWriter(path, W, H, GOP, 18) as v:
    for i in range(N):
      v.write(np.full((H, W, 3), 16 + 5 * i, np.uint8))
  return bytearray(path.read_bytes())


def shown(frame):
  """The number that a picture shows, by its gray."""
  return round(((float(np.median(frame[:H])) - 16) / 219 * 255 - 16) / 5)


def joined(path):
  reader = FrameReader(path, "nv12")
  ids = {e.position: e.segment_id for e in join(synthetic_index(N, 20.0), reader)}
  return {ids[i]: shown(f) for i, f in reader.read_from(0) if i in ids}


CARS = [message("carState", t * SECOND, vEgo=float(t)) for t in range(1, 9)]
NO_ROOT = struct.pack("<QQ", 1 << 32, 0)
OUTSIDE = struct.pack("<QQ", 1 << 32, 100 << 2 | 2 << 32 | 1 << 48)


@pytest.mark.parametrize("odd", [NO_ROOT, OUTSIDE])
def test_an_odd_message_is_counted_and_the_log_goes_on(tmp_path, odd, capsys):
  (tmp_path / "rlog").write_bytes(b"".join([*CARS[:4], odd, *CARS[4:]]))
  reader = LogReader(tmp_path / "rlog")
  assert [e.carState.vEgo for e in reader] == [1, 2, 3, 4, 5, 6, 7, 8] and reader.damaged == 1
  assert "1 of 9 messages are damaged" in capsys.readouterr().err


@pytest.mark.parametrize("tail", [b"\1" + bytes(15), bytes(16), bytes(4096), b"\xff" * 24])
def test_rubbish_behind_a_whole_log_loses_nothing(tmp_path, tail):
  (tmp_path / "rlog").write_bytes(b"".join(CARS) + tail)
  reader = LogReader(tmp_path / "rlog")
  assert (
    len(list(reader)) == 8 and len(reader.truncated) == 1 and f"{len(tail)} bytes at its end" in reader.truncated[0]
  )


def test_a_damaged_length_costs_its_message_alone(tmp_path):
  dat = bytearray(b"".join(CARS))
  dat[len(CARS[0]) + 7] ^= 0x40  # the second message's length: longer than the file
  (tmp_path / "rlog").write_bytes(bytes(dat))
  got = [e.carState.vEgo for e in LogReader(tmp_path / "rlog")]
  assert got == [1, 3, 4, 5, 6, 7, 8]


def test_frames_of_zstd_and_bz2(tmp_path):
  skippable = b"\x50\x2a\x4d\x18" + struct.pack("<I", 5) + b"hello"
  half = [b"".join(CARS[:4]), b"".join(CARS[4:])]
  z = [zstandard.compress(h) for h in half]
  for dat in (
    skippable + z[0] + z[1],
    z[0] + skippable + z[1],
    z[0] + z[1] + skippable,
    bz2.compress(half[0]) + bz2.compress(half[1]),
  ):
    (tmp_path / "rlog").write_bytes(dat)
    reader = LogReader(tmp_path / "rlog")
    assert len(list(reader)) == 8 and not reader.truncated


def test_one_frame_of_zstd_is_unpacked_at_once():
  """Of a size that is stated or not, as a device writes it; what is damaged, cut or claims too much is left to the
  careful way."""
  dat = b"".join(message("carState", i * SECOND, vEgo=float(i)) for i in range(3000))
  stream = zstandard.ZstdCompressor(level=3).compressobj()
  unstated, stated = stream.compress(dat) + stream.flush(), zstandard.compress(dat)
  for packed in (unstated, stated):
    most, end = most_bytes(packed, 1 << 26)
    assert most >= len(dat) and end == len(packed)
    assert one_frame(packed, most) == dat
    assert one_frame(packed[:-9], most) == b"" and one_frame(packed, len(dat) - 1) == b""
    assert most_bytes(packed * 2, 1 << 26) == (2 * most, len(packed))
  size = zstandard.get_frame_parameters(stated).content_size
  at = stated.index(size.to_bytes(4, "little"))
  claims = stated[:at] + (2**31 - 1).to_bytes(4, "little") + stated[at + 4 :]
  assert zstandard.get_frame_parameters(claims).content_size == 2**31 - 1
  assert one_frame(claims, most_bytes(claims, 1 << 26)[0]) == b""


def test_what_stands_before_the_damage_of_a_zstd_frame_is_read(tmp_path):
  """But for 4096 bytes at most: so much of a file is handed to zstd at a time."""
  block = 1 << 17
  whole = np.random.default_rng(0).integers(0, 256, 6 * block, np.uint8).tobytes()  # blocks that are not compressed
  packed = bytearray(zstandard.compress(whole, 1))
  pos, starts_of = zstandard.frame_header_size(bytes(packed)), []
  while not starts_of or not packed[starts_of[-1]] & 1:
    starts_of.append(pos)
    pos += 3 + (int.from_bytes(packed[pos : pos + 3], "little") >> 3)
  assert len(starts_of) == 6
  packed[starts_of[4]] |= 6  # a kind of block that there is not
  (tmp_path / "rlog.zst").write_bytes(packed)
  dat, problem = decompress(tmp_path / "rlog.zst")
  assert 4 * block - 4096 <= len(dat) <= 4 * block and dat == whole[: len(dat)] and "damaged" in problem


def test_bombs_and_what_is_no_file(tmp_path):
  zeros = zstandard.ZstdCompressor(level=1).compressobj()
  bomb = b"".join(zeros.compress(bytes(1 << 24)) for _ in range(5)) + zeros.flush()  # 80 MiB
  for name, dat in (("a.zst", bomb), ("b.bz2", bz2.compress(bytes(1 << 26) + b"over"))):
    (tmp_path / name).write_bytes(dat)
    with pytest.raises(UserError, match="unpacks to more than 64 MiB"):
      list(LogReader(tmp_path / name))
  os.mkfifo(tmp_path / "fifo")
  for path in (tmp_path / "fifo", "/dev/zero"):
    with pytest.raises(UserError, match=r"no ordinary file|neither a folder nor a file"):
      list(LogReader([path]))
    with pytest.raises(UserError):
      FrameReader(path)
    with pytest.raises(UserError):
      Route(path)
  with pytest.raises(UserError, match="no route at"):
    Route("a" * 5000)
  with pytest.raises(UserError):
    list(LogReader(["b" * 5000]))


def test_claimed_elements_are_not_read():
  m = messaging.new_message("fairObjects", valid=True)
  m.logMonoTime = 0  # of which no word looks like a list's pointer, as one of a clock may
  m.fairObjects.init("objects", 1)
  dat = m.to_bytes()
  words = list(struct.unpack(f"<{len(dat) // 8}Q", dat))
  at = next(i for i, w in enumerate(words) if w & 3 == 1 and w >> 32 & 7 == 7)
  words[at + 1 + (words[at] >> 2 & 0x3FFFFFFF)] = (2**29 - 1) << 2  # so many, of no size
  words[at] &= 0x7FFFFFFFF
  dat = struct.pack(f"<{len(words)}Q", *words)
  assert len(dat) < 200 and not is_sound(dat)
  with pytest.raises(Exception, match="traversal limit"):
    read_all(open_event(dat))


def struct_to(offset, data=0, pointers=0):
  return (offset & 0x3FFFFFFF) << 2 | data << 32 | pointers << 48


def list_to(offset, kind, n):
  return 1 | (offset & 0x3FFFFFFF) << 2 | kind << 32 | n << 35


def one_segment(*words):
  return struct.pack(f"<II{len(words)}Q", 0, len(words), *words)


FAR_OUT = list_to(99, 5, 1)


@pytest.mark.parametrize(
  ("words", "good"),
  [
    # lists of bits, bytes, and 2, 4, 8 bytes that fill 130 words, and one element more
    *(
      ((struct_to(0, 0, 1), list_to(0, kind, 130 * per), *[2**64 - 1] * 130), True)
      for kind, per in ((1, 64), (2, 8), (3, 4), (4, 2), (5, 1))
    ),
    *(
      ((struct_to(0, 0, 1), list_to(0, kind, 130 * per + 1), *[2**64 - 1] * 130), False)
      for kind, per in ((1, 64), (2, 8), (3, 4), (4, 2), (5, 1))
    ),
    # pointers in a list, and in structs in a list, of which one points outside
    ((struct_to(0, 0, 1), list_to(0, 6, 2), struct_to(1, 1), 0, 5), True),
    ((struct_to(0, 0, 1), list_to(0, 6, 2), 0, FAR_OUT, 5), False),
    ((struct_to(0, 0, 1), list_to(0, 6, 4), 0, 0, 0), False),
    ((struct_to(0, 0, 1), list_to(0, 7, 4), struct_to(2, 1, 1), 9, 0, FAR_OUT, 0), True),
    ((struct_to(0, 0, 1), list_to(0, 7, 4), struct_to(2, 1, 1), 9, 0, 9, FAR_OUT), False),
    ((struct_to(0, 0, 1), list_to(0, 7, 4), struct_to(2, 1, 1), 9, struct_to(-5), 9, 0), True),
    ((struct_to(0, 0, 1), list_to(0, 7, 3), struct_to(2, 1, 1), 9, 0, 9, 0), False),
    # a struct before the segment's begin, up to its end, and beyond
    ((struct_to(0, 0, 1), struct_to(-3, 1), 5), False),
    ((struct_to(0, 0, 1), struct_to(0, 1), 5), True),
    ((struct_to(0, 0, 1), struct_to(0, 2), 5), False),
  ],
)
def test_pointers_by_the_encodings_own_rules(words, good):
  """Words of one segment, as capnproto.org/encoding.html has them."""
  assert is_sound(one_segment(*words)) is good


def test_what_is_not_sound_is_what_capnp_aborts_on(tmp_path):
  """as_builder() in a process of its own: it lives through all that is_sound() passes."""
  m = messaging.new_message("deviceState", valid=True)
  m.deviceState.cpuUsagePercent, m.deviceState.networkInfo.operator = [1, 2, 3], "somebody"
  good, r = m.to_bytes(), np.random.default_rng(0)
  assert is_sound(good) and all(map(is_sound, CARS))
  passed, stopped = [], 0
  for _ in range(400):
    b = bytearray(good)
    b[int(r.integers(16, len(b)))] = int(r.integers(256))
    if is_sound(bytes(b)):
      passed.append(bytes(b))
    else:
      stopped += 1
  assert len(passed) > 100 and stopped > 20
  (tmp_path / "passed").write_bytes(b"".join(struct.pack("<I", len(b)) + b for b in passed))
  code = """
import struct, sys
from openpilot.tools.lib.guard import open_event
dat, at, n = open(sys.argv[1], "rb").read(), 0, 0
while at < len(dat):
  size = struct.unpack_from("<I", dat, at)[0]
  open_event(dat[at + 4:at + 4 + size]).as_builder()
  at, n = at + 4 + size, n + 1
print(n)
"""
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "passed")], capture_output=True, text=True)
  assert done.stdout.strip() == str(len(passed)), done.stderr


def test_a_damaged_field_ends_its_block_and_is_said(tmp_path, capsys):
  bad = bytearray(message("extrinsicsCalibration", 3 * SECOND, calStatus="calibrated"))
  calibrated, none = bytes(bad), message("extrinsicsCalibration", 3 * SECOND)
  at = next(i for i, (a, b) in enumerate(zip(calibrated, none, strict=True)) if a != b)
  bad[at] = 200  # no such status
  write_log(tmp_path / "rlog", [*CARS[:2], bytes(bad), *CARS[2:]])
  reader, said = LogReader(tmp_path / "rlog"), []
  for event in reader:
    with reader.guard(event):
      said.append(str(event.extrinsicsCalibration.calStatus) if event.which() != "carState" else event.carState.vEgo)
  assert said == [1, 2, 3, 4, 5, 6, 7, 8] and "1 extrinsicsCalibration" in capsys.readouterr().err
  with pytest.raises(KeyError), reader.guard(None):
    raise KeyError  # our own mistakes are not taken for damage


def test_times_out_of_place(tmp_path, capsys):
  init = message("initData", 5, version="x")
  late, early = message("carState", 4000 * SECOND), message("carState", 2**63)
  write_log(tmp_path / "rlog", [init, *CARS[:3], late, *CARS[3:], early])
  reader = LogReader(tmp_path / "rlog")
  assert [e.which() for e in reader] == ["initData"] + [
    "carState"
  ] * 8 and "1 messages are 10 minutes and more out of time" in capsys.readouterr().err
  late_init = message("initData", 8 * SECOND, version="x")  # every segment repeats the route's, whenever that was
  write_log(tmp_path / "rlog", [late_init, *CARS])
  assert next(e.which() for e in LogReader(tmp_path / "rlog")) == "initData"
  assert [t for t, _, _ in LogReader(tmp_path / "rlog").raw()] == [SECOND, *(k * SECOND for k in range(1, 9))]


def segment_of(tmp_path, messages, num=0):
  folder = tmp_path / f"0000002c--d68dde99ca--{num}"
  write_log(folder / "rlog.zst", messages)
  return Segment("0000002c--d68dde99ca", num, folder, {"rlog": folder / "rlog.zst"})


def test_index_without_exposure_times(tmp_path):
  entries = encode_index(segment_of(tmp_path, [index(k, timestampSof=0, timestampEof=0) for k in range(5)]))
  assert (
    [e.timestamp_eof for e in entries]
    == [e.timestamp_sof for e in entries]
    == [100 * SECOND + k * 50_000_000 for k in range(5)]
  )


def test_an_index_out_of_order_is_put_into_it(tmp_path):
  """By the number of the picture, not by when it was logged."""
  order = [0, 2, 1, 4, 3, 5]
  eof = [100 * SECOND + k * 50_000_000 for k in range(6)]
  log = [index(k, t=eof[n] + 10_000_000, timestampEof=eof[k]) for n, k in enumerate(order)]
  entries = encode_index(segment_of(tmp_path, log))
  assert [e.segment_id for e in entries] == sorted(order) and [e.timestamp_eof for e in entries] == eof


@pytest.mark.parametrize("odd", [2, 13, 16])
def test_a_time_that_does_not_fit_is_its_nearest_neighbors(odd):
  """20 frames at 20 Hz, with a stop of 100 s in the middle."""
  at = np.arange(20) * 50_000_000 + np.where(np.arange(20) >= 10, 100 * SECOND, 0) + 10**12
  wrong = at.copy()
  wrong[odd] = 7
  entries = [EncodeEntry(i, 0, i, int(t) - 10_000_000, int(t)) for i, t in enumerate(wrong)]
  sof, eof, replaced = exposure_times(entries, at + 60_000_000)
  assert replaced == 1 and eof.tolist() == at.tolist() and (eof - sof)[[1, 5, odd]].tolist() == [10_000_000] * 2 + [0]


def test_index_of_a_neighbor_and_odd_times(tmp_path, capsys):
  own = [index(k) for k in range(6)]
  entries = encode_index(segment_of(tmp_path, [index(1199, 7, t=99 * SECOND), *own, index(3)]))
  assert [(e.frame_id, e.segment_num) for e in entries] == [
    (500 + k, 0) for k in range(6)
  ] and "2 of 8 entries" in capsys.readouterr().err
  with pytest.raises(UserError, match="is of segment 0"):
    encode_index(segment_of(tmp_path, own, num=3))
  own[2] = index(2, timestampEof=3700 * SECOND)
  times = [e.timestamp_eof for e in encode_index(segment_of(tmp_path, own))]
  assert np.diff(times).tolist() == [50_000_000] * 5
  entries = encode_index(segment_of(tmp_path, [index(k) for k in range(6)]))
  _, eof, odd = exposure_times(
    entries, np.array([100 * SECOND + k * 50_000_000 + (k == 4) * 90 * SECOND for k in range(6)])
  )
  assert odd == 0 and np.diff(eof).tolist() == [50_000_000] * 5  # the message was late, not the frame


def starts(dat):
  """Where the pictures of HEVC begin that are no key."""
  out, pos = [], dat.find(b"\0\0\1")
  while pos >= 0:
    if dat[pos + 3] >> 1 & 63 < 16:
      out.append(pos)
    pos = dat.find(b"\0\0\1", pos + 3)
  return out


@pytest.mark.parametrize(
  ("gop", "missing", "breaks", "first_key", "moved"),
  [
    (20, 0, [], 5, (0, 0)),
    (20, 40, [], 5, (15, 15)),  # cut within a group: what is missing before is the rest of that group
    (20, 35, [], 5, (35, 35)),  # that and whole groups
    (20, 3, [], 5, (3, 3)),
    (0, 40, [], 5, (40, 40)),  # no regular groups: all of it
    (20, 40, [10], 5, (0, 40)),  # whole groups in one place where pictures are missing
    (20, 40, [10, 20], 0, (0, 0)),  # nobody knows where
    (20, 39, [10], 0, (0, 0)),
  ],
)
def test_pictures_that_an_index_has_more(gop, missing, breaks, first_key, moved):
  """Of 30 pictures whose file has a break before the 10th: how far the first and the last move."""
  reader = SimpleNamespace(numbers=np.arange(30), keys=[first_key], seconds=None, breaks=breaks, gop=gop)
  got = by_number(30 + missing, reader) - np.arange(30)
  assert (got[0], got[-1]) == moved and set(got.tolist()) == set(moved)


@pytest.mark.parametrize("what", ["noise", "zeros", "cut out", "headless", "tail"])
def test_damaged_hevc_keeps_its_numbers(tmp_path, what):
  path = tmp_path / "fcamera.hevc"
  dat = write_video(path)
  p = starts(dat)
  a, b = p[20], p[21]  # picture 23 of 40 and the one behind it
  if what == "noise":
    dat[a:b] = np.random.default_rng(0).integers(0, 256, b - a, np.uint8).tobytes()
  elif what == "zeros":
    dat[a:b] = bytes(b - a)
  elif what == "cut out":
    del dat[a : p[24]]
  elif what == "headless":
    del dat[: p[4]]
  else:
    del dat[p[30] + 2 :]
  path.write_bytes(dat)
  got = joined(path)
  assert all(i == s for i, s in got.items()), got
  lost = {
    "noise": range(23, 30),
    "zeros": range(23, 30),
    "cut out": range(23, 30),
    "headless": range(10),
    "tail": range(34, 40),
  }[what]
  assert set(range(N)) - set(got) == set(lost)


@pytest.mark.parametrize("begin", [0.4, 0.55])
def test_a_hole_in_a_ts_keeps_its_numbers(tmp_path, begin):
  path = tmp_path / "qcamera.ts"
  dat = write_video(path)
  at = int(len(dat) * begin) // 188 * 188 + 100
  del dat[at : at + 188 * 9]
  path.write_bytes(dat)
  got = joined(path)
  assert all(i == s for i, s in got.items()) and 20 < len(got) < N and {0, N - 1} <= set(got), got


@pytest.mark.parametrize(("fps", "pictures"), [(10, 20), (25, 50)])
def test_a_video_encoded_again_at_another_rate(tmp_path, fps, pictures):
  """Of 40 frames at 20 Hz. By their numbers its pictures would be those of other times."""
  for count in (pictures, N):
    with VideoWriter(tmp_path / f"{count}.ts", W, H, GOP, 18, fps) as v:
      for i in range(count):
        v.write(np.full((H, W, 3), 16 + 5 * (i % N), np.uint8))
  reader = FrameReader(tmp_path / f"{pictures}.ts", "nv12")
  with pytest.raises(UserError, match=rf"pictures are {1 / fps:.3f} s apart, those of the log's index 0\.050 s"):
    join(synthetic_index(N, 20.0), reader)
  assert joined(tmp_path / f"{N}.ts") == {k: k for k in range(N)}  # as many as frames, whatever rate the file says


def test_real_qcamera_with_a_hole(shared_data, tmp_path):
  source = shared_data / "realdata" / "0000002c--d68dde99ca--1"
  dat = bytearray((source / "qcamera.ts").read_bytes())
  middle = len(dat) // 2 // 188 * 188
  del dat[middle : middle + 188 * 900]
  at = len(dat) // 5
  dat[at : at + 1880] = bytes(1880)
  folder = tmp_path / source.name
  folder.mkdir()
  (folder / "qcamera.ts").write_bytes(dat)
  (folder / "qlog.zst").write_bytes((source / "qlog.zst").read_bytes())
  wanted = {e.frame_id: f for e, f in frames(Route(source).segments, "qcamera")}
  seen = 0
  for e, f in frames(Route(folder).segments, "qcamera"):
    assert (f == wanted[e.frame_id]).all(), e.frame_id
    seen += 1
  assert 900 < seen < 1190


def test_the_decoder_does_not_wait_for_itself(tmp_path):
  path = tmp_path / "fcamera.hevc"
  dat, r = write_video(path), np.random.default_rng(3)
  for _ in range(20):
    b = bytearray(dat)
    for at in r.integers(200, len(b), 12):
      b[at : at + 20] = r.bytes(20)
    path.write_bytes(b)
    try:
      list(FrameReader(path, "nv12"))
    except UserError:
      pass


@pytest.mark.parametrize("name", ["GOPR0001.MP4", "clip.MOV", "clip.avi"])
def test_any_video(tmp_path, name):
  path = tmp_path / name
  with av.open(str(path), "w") as c:
    s = c.add_stream("libx264", rate=30)
    s.width, s.height, s.pix_fmt = 95, 61, "yuv444p"
    for _ in range(9):
      c.mux(s.encode(av.VideoFrame.from_ndarray(np.full((61, 95, 3), 90, np.uint8), format="rgb24")))
    c.mux(s.encode(None))
  segments, camera = open_route(path, None, "road")
  got = [(e.timestamp_eof, f.shape) for e, f in frames(segments, camera)]
  assert len(got) == 9 and got[0][1] == (90, 94) and abs(np.diff([t for t, _ in got]) - SECOND / 30).max() < 2_000_000
  shapes = {f.shape for _, f in frames(segments, camera, focal=80.0)}
  assert shapes == {(874 * 3 // 2, 1164)}


def test_turned_video(tmp_path):
  path = tmp_path / "phone.mp4"
  dat = write_video(path)
  identity = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
  at = dat.find(identity, dat.find(b"tkhd"))
  assert at > 0
  dat[at : at + 36] = struct.pack(
    ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, H << 16, 0, 1 << 30
  )  # by a quarter, clockwise
  path.write_bytes(dat)
  reader = FrameReader(path)
  assert (reader.w, reader.h) == (H, W) and reader.get(0).shape == (W, H, 3)


@pytest.mark.parametrize("pix_fmt", ["nv12", "rgb24"])
@pytest.mark.parametrize(("w", "h", "focal"), [(1920, 1080, 1500.0), (640, 360, 400.0)])
def test_a_camera_of_unknown_make_looks_like_a_known_one(pix_fmt, w, h, focal):
  """A mark 100 (80) pixels right of the middle and 60 (50) below it lies at the same angle in what comes out."""
  x, y = (100, 60) if w > 1000 else (80, 50)
  frame = np.full((h, w, 3), 30, np.uint8)
  frame[h // 2 + y - 4 : h // 2 + y + 4, w // 2 + x - 4 : w // 2 + x + 4] = 220
  if pix_fmt == "nv12":
    frame = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="nv12").to_ndarray()
  out = KnownCamera(focal, pix_fmt)(frame)
  luma = (out[:874] if pix_fmt == "nv12" else out[..., 1]).astype(float)
  assert luma.shape == (874, 1164)
  v, u = np.nonzero(luma > 120)
  scale = 910 / focal
  assert abs(u.mean() + 0.5 - (582 + x * scale)) < 1.5 and abs(v.mean() + 0.5 - (437 + y * scale)) < 1.5


def test_names_of_connect(tmp_path):
  dongle, log = "0123456789abcdef", "0000002c--d68dde99ca"
  for n in (0, 1):
    write_log(tmp_path / f"{dongle}|{log}--{n}" / "rlog.zst", CARS)
  for name in (
    f"{dongle}/{log}",
    f"{dongle}|{log}",
    f"{dongle}_{log}",
    f"https://connect.comma.ai/{dongle}/{log}",
    f"connect.comma.ai/{dongle}/{log}/5/20",
  ):
    assert [s.num for s in Route(name, tmp_path).segments] == [0, 1]
  for one in (f"{dongle}/{log}/1", f"{dongle}/{log}--1", f"{dongle}|{log}--1", f"connect.comma.ai/{dongle}/{log}--1"):
    assert [s.num for s in Route(one, tmp_path).segments] == [1]


def test_names_do_not_reach_the_terminal_raw():
  assert printable("a\x1b[31m\x07b\nc \x9b") == "a\\x1b[31m\\x07b c \\x9b"


def test_shared_cases(shared_data):
  """The folder of small inputs that failed."""
  cases = shared_data.parent / "cases"
  if not cases.is_dir():
    pytest.skip(f"no shared cases at {cases}")

  def play(name):
    return [(e.frame_id, e.segment_num, e.timestamp_eof) for e, _ in frames(*open_route(cases / name, None, "road"))]

  assert [f[0] for f in play("damaged-picture/hevc-noise")] == [*range(23), *range(30, 60)]
  assert [f[0] for f in play("damaged-picture/hevc-headless")] == list(range(10, 60))
  assert [f[0] for f in play("damaged-picture/ts-hole")] == [*range(28), *range(40, 60)]
  for name in ("no-exposure-times", "comma2k19"):
    assert [(f[0], f[2]) for f in play(name)] == [(k, 100_060_000_000 + k * 50_000_000) for k in range(60)]
  assert [f[0] for f in play("missing-segment")] == [*range(40), *range(240, 280)]
  assert len(play("one-odd-time/late")) == 40 and len(play("one-bad-segment/empty-log")) == 40
  assert (
    len(play("one-bad-segment/empty-rlog-good-qlog")) == len(play("one-bad-segment/empty-fcamera-good-qcamera")) == 80
  )
  for name, damaged in (("bad-message/null-root.zst", 1), ("zst/skippable-first.zst", 0), ("zst/two-frames.zst", 0)):
    reader = LogReader(cases / name)
    assert len(list(reader)) == 100 and reader.damaged == damaged


def test_a_container_of_an_unknown_codec_is_one_line(tmp_path):
  path = tmp_path / "x.mp4"
  with VideoWriter(path, 96, 64) as v:
    for i in range(4):
      v.write(np.full((64, 96, 3), 50 * i, np.uint8))
  path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
  with pytest.raises(UserError, match="not a video that can be read") as e:
    FrameReader(path)
  assert "\n" not in str(e.value)
