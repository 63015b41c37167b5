import fractions

import av
import numpy as np
import pytest

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.videowriter import VideoWriter

W, H, N, GOP = 256, 144, 47, 10


def picture(i):
  """A bright square that moves, and the number of the frame in the brightness of a stripe."""
  p = np.zeros((H, W, 3), np.uint8)
  p[20:60, 4 * i : 4 * i + 40] = (200, 80, 30)
  p[100:] = 4 * i + 20
  return p


def write(path, pix_fmt="yuv420p"):
  if path.suffix == ".mp4":
    c = av.open(str(path), "w")
    s = c.add_stream("libx264", rate=20)
    s.width, s.height, s.pix_fmt, s.gop_size, s.options = W, H, pix_fmt, GOP, {"bf": "2"}
    for i in range(N):
      f = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
      f.pts, f.time_base = i, fractions.Fraction(1, 20)
      c.mux(s.encode(f))
    c.mux(s.encode(None))
    c.close()
  else:
    v = VideoWriter(path, W, H, GOP, 18)
    for i in range(N):
      v.write(picture(i))
    v.close()
  return path


@pytest.fixture(params=["fcamera.hevc", "qcamera.ts", "clip.mp4"])
def video(request, tmp_path):
  return write(tmp_path / request.param)


@pytest.mark.parametrize("pix_fmt", ["rgb24", "nv12"])
def test_random_access_is_bit_equal_to_the_sequence(video, pix_fmt):
  reader = FrameReader(video, pix_fmt)
  assert (reader.w, reader.h, reader.frame_count, reader.fps) == (W, H, N, 20.0)
  frames = list(reader)
  assert len(frames) == N and frames[0].shape == ((H, W, 3) if pix_fmt == "rgb24" else (H * 3 // 2, W))
  stripe = [
    round((f[120].mean() - (0 if pix_fmt == "rgb24" else 16)) * (1 if pix_fmt == "rgb24" else 255 / 219))
    for f in frames
  ]
  assert all(
    abs(s - (4 * i + 20)) < 6 for i, s in enumerate(stripe)
  )  # frames are the right ones: neighbors differ by 4, the codec by less
  for i in np.random.default_rng(0).permutation(N):
    assert (FrameReader(video, pix_fmt).get(int(i)) if i % 7 == 0 else reader.get(int(i))).tobytes() == frames[
      i
    ].tobytes()
  for start in (0, 3, GOP, 33):
    i, frame = next(reader.read_from(start))
    assert i == start and frame.tobytes() == frames[start].tobytes()
  with pytest.raises(IndexError):
    reader.get(N)


def test_nv12_planes(tmp_path):
  path = write(tmp_path / "fcamera.hevc")
  with av.open(str(path), format="hevc") as c:
    want = next(c.decode(video=0)).reformat(format="nv12").to_ndarray()
  assert (FrameReader(path, "nv12").get(0) == want).all()


@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p"])
def test_planes_are_those_of_nv12_and_stay_good(tmp_path, pix_fmt):
  path = write(tmp_path / "clip.mp4", pix_fmt)
  reader = FrameReader(path, "nv12")
  for start in (0, 13):
    planes, frames = (
      list(reader.planes_from(start)),
      list(reader.read_from(start)),
    )  # all of them held while the decoder goes on
    assert len(planes) == len(frames) == N - start
    for (i, (y, u, v)), (j, frame) in zip(planes, frames, strict=True):
      assert i == j
      assert (y == frame[:H]).all() and (u == frame[H:, 0::2]).all() and (v == frame[H:, 1::2]).all()


@pytest.mark.parametrize("name", ["fcamera.hevc", "qcamera.ts", "clip.mp4"])
@pytest.mark.parametrize("content", [b"", b"no video " * 1000])
def test_what_is_no_video_is_said(tmp_path, name, content):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=name):
    FrameReader(tmp_path / name)
  with pytest.raises(UserError, match="no video at"):
    FrameReader(tmp_path / "absent.hevc")


@pytest.mark.parametrize("name", ["fcamera.hevc", "qcamera.ts"])
def test_cut_short(tmp_path, name):
  path = write(tmp_path / name)
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) * 2 // 3])
  reader = FrameReader(path)
  assert 10 < len(list(reader)) <= reader.frame_count < N


def test_an_mp4_that_is_cut_short_says_how_many_frames_it_lacks(tmp_path, capsys):
  """Its header, where that stands first, counts them all."""
  path = tmp_path / "clip.mp4"
  write(path)
  with av.open(str(path)) as old, av.open(str(tmp_path / "first.mp4"), "w", options={"movflags": "faststart"}) as new:
    to = new.add_stream_from_template(old.streams.video[0])
    for p in old.demux(video=0):
      if p.dts is not None:
        p.stream = to
        new.mux(p)
  whole = (tmp_path / "first.mp4").read_bytes()
  assert FrameReader(tmp_path / "first.mp4").frame_count == N and not capsys.readouterr().err
  path.write_bytes(whole[: len(whole) * 2 // 3])
  reader = FrameReader(path)
  said = capsys.readouterr().err
  assert 10 < reader.frame_count < N
  assert f"says that it has {N} frames, and " in said and "it is cut short" in said


@pytest.mark.slow
def test_shared_qcamera(shared_data):
  reader = FrameReader(shared_data / "realdata" / "0000002c--d68dde99ca--1" / "qcamera.ts", "nv12")
  assert (reader.w, reader.h, reader.frame_count) == (526, 330, 1200)
  frames = {i: f for i, f in enumerate(reader) if i % 97 == 0}
  assert sum(1 for _ in reader) == 1200
  for i, f in frames.items():
    assert (reader.get(i) == f).all()


def test_frames_at_uneven_times_have_their_mean_rate(tmp_path):
  """Ten in 39 twentieths of a second: the last comes late, and lasts one."""
  path = tmp_path / "x.mp4"
  with av.open(str(path), "w") as c:
    s = c.add_stream("libx264", rate=20)
    s.width, s.height, s.pix_fmt, s.options = 96, 64, "yuv420p", {"bf": "0"}
    for t in (*range(9), 38):
      f = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 6 * t, np.uint8), format="rgb24")
      f.pts, f.time_base = t, fractions.Fraction(1, 20)
      c.mux(s.encode(f))
    c.mux(s.encode(None))
  assert FrameReader(path).fps == pytest.approx(10 / (39 / 20))


def test_frames_behind_a_cut_within_a_group(tmp_path):
  """The first 7 of 30 are cut off by an edit list, and the pictures from the 8th to the 10th need the first: all that
  are shown are there, in order and at random."""
  path = tmp_path / "cut.mp4"
  with av.open(str(path), "w", options={"avoid_negative_ts": "disabled", "use_editlist": "1"}) as c:
    s = c.add_stream("libx264", rate=20)
    s.width, s.height, s.pix_fmt, s.gop_size, s.options = 96, 64, "yuv420p", 10, {"bf": "0"}
    shift = fractions.Fraction(7, 20)
    for i in (*range(30), None):
      f = None
      if i is not None:
        f = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 6 * i + 20, np.uint8), format="rgb24")
        f.pts, f.time_base = i, fractions.Fraction(1, 20)
      for p in s.encode(f):
        p.pts -= int(shift / p.time_base)
        p.dts = p.pts
        c.mux(p)
  reader = FrameReader(path)
  frames = list(reader)
  assert reader.frame_count == len(frames) == 23
  assert np.abs([f.mean() - (6 * (i + 7) + 20) for i, f in enumerate(frames)]).max() < 3
  for i in (2, 0, 5, 22, 1):
    assert (FrameReader(path).get(i) == frames[i]).all()
