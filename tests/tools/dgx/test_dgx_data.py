"""Training data for the driving model: routes to shards and back, filters, resuming, bad input."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tqdm import tqdm

from openpilot.cereal import messaging
from openpilot.tools.dgx.training import dataloader
from openpilot.tools.dgx.training.constants import T_IDXS
from openpilot.tools.dgx.training.dataloader import columns_of, find_segments, make_data, table
from openpilot.tools.dgx.training.drive_log import read_log
from openpilot.tools.dgx.training.shards import DrivingClips, epoch_batches, make_loader, read_dataset, split
from openpilot.tools.fair.labels.views import ViewWarp, read_frames, segment_view
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.lock import only_one
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route
from openpilot.tools.sim.messages import START_NS
from openpilot.tools.sim.world import World
from openpilot.tools.sim.write_route import write_route

T = np.array(T_IDXS)
OPTIONS = {
  "camera": "road",
  "fps": 20,
  "min_speed": 0.0,
  "engaged": False,
  "gps_box": None,
  "traffic": "log",
  "focal": None,
}


@pytest.fixture(scope="module")
def route(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp("sim")
  write_route(root, 3, 4.0, "tizi", segment_seconds=2.0, qcamera_only=True)
  return root


@pytest.fixture(scope="module")
def data(route, tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp("data") / "d"
  make_data([str(route)], out, OPTIONS, progress=False)
  return out


def test_shards_hold_what_modeld_sees(route, data):
  _, shards = read_dataset(data)
  segments = Route(str(route)).segments
  assert [s.name for s in shards] == [s.name for s in segments] and len(shards) == 2
  clips = DrivingClips(shards, 3, hop=1)
  item = clips[0]
  assert item["frames"].shape == item["big_frames"].shape == (3, 12, 128, 256) and item["plan"].shape == (3, 33, 15)
  view = segment_view(segments[0], "qcamera")
  start = int(clips.clips[0][1])
  assert start == 4  # the first frame with one 4 before it
  for name, kind in (("frames", "medmodel"), ("big_frames", "sbigmodel")):
    warp = ViewWarp(view, kind)
    frames = {p: warp.frame(f) for p, f in read_frames(view, list(range(13)))}
    for k in range(3):
      at = start + 4 * k
      assert (item[name][k].numpy() == np.concatenate([frames[at - 4], frames[at]])).all()
  assert not (item["frames"][0] == item["frames"][1]).all()
  assert item["frame_id"].tolist() == [view.entries[start + 4 * k].frame_id for k in range(3)]


def test_columns_are_the_worlds(route, data):
  """Speed as the simulator's world has it at the frame's time; plans reach into the next segment, and end where the log
  does."""
  _, shards = read_dataset(data)
  world = World(3, "day", seconds=4.0)
  c = shards[0].columns
  t = (c["time"] - START_NS) * 1e-9
  speed = np.array([world.ego(x)["v_ego"] for x in t])
  assert np.nanmax(np.abs(c["speed"] - speed)) < 0.02
  known = np.isfinite(c["plan"][:, :, 0])
  reach = t[:, None] + T
  assert known[2:][reach[2:] < 3.9].all() and not known[reach > 4.1].any()  # segments are 2 s long
  assert np.isfinite(
    shards[1].columns["plan"][0, 0]
  ).all()  # a frame before its own log's first pose: the segment before has one
  log = read_log(Route(str(route)).segments[0])
  alone, _ = columns_of(segment_view(Route(str(route)).segments[0], "qcamera"), log, [log], OPTIONS)
  assert not np.isfinite(alone["plan"][:, :, 0])[reach > 2.1].any()
  for i in (10, 30):
    x, y, a = world.pose(t[i])
    truth = np.array([world.pose(t[i] + dt)[:2] for dt in T[:13]]) - (x, y)
    truth = np.stack(
      [np.cos(a) * truth[:, 0] + np.sin(a) * truth[:, 1], -np.sin(a) * truth[:, 0] + np.cos(a) * truth[:, 1]], -1
    )
    assert (
      truth[-1, 0] > 15 and np.linalg.norm(c["plan"][i, :13, :2] - truth, axis=1).max() < 0.1
    )  # 1.4 s; the device is mounted askew in this world


def test_the_wide_camera_is_joined_by_time(route, tmp_path, monkeypatch):
  """The wide camera began three frames later, runs 2 ms behind and lost a frame: each pair's wide half is of the same
  moment, or the pair is left out."""
  main = segment_view(Route(str(route)).segments[0], "qcamera")
  main.entries = main.entries[:24]
  there = [e for k, e in enumerate(main.entries) if k >= 3 and k != 15]
  late = [replace(e, segment_id=i, timestamp_eof=e.timestamp_eof + 2_000_000) for i, e in enumerate(there)]
  wide = replace(main, stream="wide", entries=late)
  expected = [-1] * 3 + list(range(12)) + [-1] + list(range(12, 20))
  assert dataloader.wide_positions(main, wide).tolist() == expected

  def pictures(view, positions):
    for q in positions:  # a picture's brightness tells its camera and moment
      level = (
        10
        + main.entries.index(
          next(e for e in main.entries if abs(e.timestamp_eof - view.entries[q].timestamp_eof) < 3e6)
        )
        + 100 * (view is wide)
      )
      yield q, np.full((main.height * 3 // 2, main.width), level, np.uint8)

  monkeypatch.setattr(dataloader, "read_frames", pictures)
  log = read_log(main.segment)
  columns, _ = columns_of(main, log, [log], OPTIONS)
  with open(tmp_path / "a", "wb") as a, open(tmp_path / "b", "wb") as b:
    rows = dataloader.write_frames(main, wide, columns, (a, b), tqdm(disable=True))
  frames, big = (np.fromfile(tmp_path / k, np.uint8).reshape(-1, 6, 128, 256) for k in "ab")
  kept = np.flatnonzero(columns["keep"])
  assert kept.tolist() == [
    k for k in range(4, 24) if k not in (4, 5, 6, 15, 19)
  ]  # of 4, 5, 6 and 19 it is the frame 4 before that is lacking
  assert len(frames) == len(big) == rows
  for k in kept:
    for at in (k, columns["pair"][k]):
      r = columns["row"][at]
      assert (frames[r] == 10 + at).all() and (big[r] == 110 + at).all()
  assert {dataloader.REASONS[x] for x in columns["reason"][[4, 5, 6, 15, 19]]} == {"no wide frame"}


def test_resuming_writes_what_is_lacking(route, tmp_path, monkeypatch):
  out = tmp_path / "d"
  make_data([str(route)], out, OPTIONS, progress=False)
  first, second = (s.name for s in Route(str(route)).segments)
  before = (out / first / "frames.u8").stat().st_mtime_ns
  whole = (out / second / "frames.u8").read_bytes()
  shutil.rmtree(out / second)
  write = dataloader.write_frames

  def dies(*args):
    write(*args)
    raise KeyboardInterrupt

  with monkeypatch.context() as m:
    m.setattr(dataloader, "write_frames", dies)
    with pytest.raises(KeyboardInterrupt):
      make_data([str(route)], out, OPTIONS, progress=False)
  assert not (out / second).exists() and not list(out.glob(".*"))
  stats = make_data([str(route)], out, OPTIONS, progress=False)
  assert (out / first / "frames.u8").stat().st_mtime_ns == before
  assert (out / second / "frames.u8").read_bytes() == whole
  assert json.loads((out / "statistics.json").read_text()) == stats
  with pytest.raises(UserError, match="other options: fps 20 then, 5 now"):
    make_data([str(route)], out, {**OPTIONS, "fps": 5}, progress=False)


def test_a_segment_is_that_of_its_files(route, tmp_path, capsys):
  """A segment made without its neighbor, or of a log that was replaced, is made again: the data does not depend on what
  came first."""
  first, second = Route(str(route)).segments
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  make_data([str(route)], whole, OPTIONS, progress=False)
  make_data([str(first.dir)], parts, OPTIONS, progress=False)
  alone = np.load(parts / first.name / "columns.npz")["plan"]
  make_data([str(route)], parts, OPTIONS, progress=False)
  assert f"{first.name} was made of other files" in capsys.readouterr().err
  for name in (first.name, second.name):
    for file in ("segment.json", "columns.npz", "frames.u8", "big.u8"):
      assert (parts / name / file).read_bytes() == (whole / name / file).read_bytes(), (name, file)
  together = np.load(whole / first.name / "columns.npz")["plan"]
  assert np.isfinite(together).all((1, 2)).sum() >= np.isfinite(alone).all((1, 2)).sum()
  assert not np.array_equal(together, alone, equal_nan=True)
  # the same segment with another log
  other = tmp_path / "other" / first.dir.name
  shutil.copytree(first.dir, other)
  path = next(p for p in (other / "rlog.zst", other / "qlog.zst") if p.exists())
  events = [e.as_builder() for e in LogReader(path)]
  for e in events:
    if e.which() == "carState":
      e.carState.vEgo += 1
  write_log(path, [e.to_bytes() for e in events])
  before = json.loads((whole / "statistics.json").read_text())["segments"][first.name]["speed_mean"]
  stats = make_data([str(other.parent)], whole, OPTIONS, progress=False)
  assert stats["segments"][first.name]["speed_mean"] == pytest.approx(before + 1)
  assert f"holds 1 more segments, which this command did not make ({second.name})" in capsys.readouterr().err
  make_data([str(other.parent), str(first.dir)], whole, OPTIONS, progress=False)
  assert "the first one is taken" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["log", "video"])
def test_a_segment_that_cannot_be_read_is_left_out(route, tmp_path, what):
  shutil.copytree(route, tmp_path / "r")
  first, second = Route(str(tmp_path / "r")).segments
  (first.log_path if what == "log" else first.qcamera).write_bytes(b"")
  stats = make_data([str(tmp_path / "r")], tmp_path / "d", OPTIONS, progress=False)
  assert list(stats["segments"]) == [second.name] and "is empty" in stats["left_out"][first.name]
  assert f"left out: {first.name}" in table(stats)
  with pytest.raises(UserError, match="is empty"):
    make_data([str(first.dir)], tmp_path / "e", OPTIONS, progress=False)


def test_filters_say_why(route, tmp_path):
  segments = Route(str(route)).segments
  view, log = segment_view(segments[0], "qcamera"), read_log(segments[0])

  def reasons(**options) -> set[str]:
    columns, _ = columns_of(view, log, [log], {**OPTIONS, **options})
    return {dataloader.REASONS[k] for k in np.unique(columns["reason"])}

  assert reasons() == {"kept", "no frame 4 before"}
  assert reasons(min_speed=99.0) == {"no frame 4 before", "too slow or backwards"}
  assert reasons(fps=5) == {"kept", "another phase", "no frame 4 before"}
  assert reasons(gps_box=[0, 0, -1, -1]) == {"no frame 4 before", "outside the box"}
  assert reasons(gps_box=[-90, -180, 90, 180]) == {"kept", "no frame 4 before"}
  assert reasons(engaged=True) == {"kept", "no frame 4 before"}
  log.engaged, log.gps = [(r[0], 0) for r in log.engaged], {}
  assert reasons(engaged=True) == {"no frame 4 before", "not engaged"}
  assert reasons(gps_box=[-90, -180, 90, 180]) == {"no frame 4 before", "no GPS"}
  view.calibrated = False
  assert reasons() == {"not calibrated"}
  stats = make_data([str(route)], tmp_path / "slow", {**OPTIONS, "min_speed": 99.0}, progress=False)
  assert "too slow" in table(stats)
  with pytest.raises(UserError, match="no kept frames"):
    read_dataset(tmp_path / "slow")


def test_five_a_second_hold_the_same_pairs(route, data, tmp_path):
  make_data([str(route)], tmp_path / "d", {**OPTIONS, "fps": 5}, progress=False)
  few, many = DrivingClips(read_dataset(tmp_path / "d")[1], 2, 1), DrivingClips(read_dataset(data)[1], 2, 1)
  place = {int(many[i]["frame_id"][0]): i for i in range(len(many))}
  assert 0 < len(few) < len(many) / 3
  for i in range(0, len(few), 3):
    other = many[place[int(few[i]["frame_id"][0])]]
    assert (few[i]["frames"] == other["frames"]).all() and (few[i]["desire"] == other["desire"]).all()


def test_batches(data):
  _, shards = read_dataset(data)
  train, val, how = split(shards, 2, 2, 0.5)
  assert val is not None and "1 of 2 segments" in how
  assert {s.name for s in train.shards}.isdisjoint(s.name for s in val.shards)
  order = epoch_batches(len(train), 3, 0, 1)
  assert order == epoch_batches(len(train), 3, 0, 1) != epoch_batches(len(train), 3, 0, 2)
  ranks = [epoch_batches(len(train), 4, 0, 1, k, 2) for k in range(2)]
  assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(b) for b in epoch_batches(len(train), 4, 0, 1)]
  batch = next(iter(make_loader(train, order)))
  assert (
    batch["frames"].shape == (3, 2, 12, 128, 256)
    and batch["desire"].shape == (3, 2, 8)
    and batch["traffic_convention"].shape == (3, 2)
  )
  two = next(iter(make_loader(train, order, workers=1)))
  assert all((batch[k] == two[k]).all() for k in ("frames", "big_frames", "frame_id"))


def test_a_pulse_between_steps_is_seen_once(data):
  _, shards = read_dataset(data)
  shards[0].columns["desire"][:] = 0
  shards[0].columns["desire"][10, 3] = 1  # between the steps at 8 and 12
  clips = DrivingClips(shards[:1], 3, 1)
  item = clips[int(np.flatnonzero(clips.clips[:, 1] == 4)[0])]
  assert item["desire"].sum() == 1 and item["desire"][2, 3] == 1


# *** bad input ***


def test_bad_input(route, data, tmp_path, monkeypatch, capsys):
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(UserError, match="no route"):
    find_segments([str(empty)])
  lone = tmp_path / "lone--0"
  lone.mkdir()
  shutil.copy(Route(str(route)).segments[0].qcamera, lone / "qcamera.ts")
  with pytest.raises(UserError, match="no rlog or qlog"):
    find_segments([str(lone)])
  with pytest.raises(UserError, match="no training data"):
    read_dataset(empty)
  copy = tmp_path / "copy"
  shutil.copytree(data, copy)
  first = sorted(p for p in copy.iterdir() if p.is_dir())[0]
  (first / "frames.u8").write_bytes(b"short")
  with pytest.raises(UserError, match="has not the"):
    read_dataset(copy)
  (first / "columns.npz").write_bytes(b"no zip")
  with pytest.raises(UserError, match="no segment of training data"):
    read_dataset(copy)
  monkeypatch.setattr(
    "sys.argv", ["dataloader", "--routes", str(route), "--output", str(tmp_path / "no"), "--min-speed", "99"]
  )
  assert dataloader.cli(dataloader.main)() == 2
  assert "no frame was kept" in capsys.readouterr().err


def test_another_camera_and_no_calibration(route, tmp_path):
  """The route's own log without its calibration: nothing is kept, and the statistics say why."""
  old = Route(str(route)).segments[0]
  new = tmp_path / "r" / old.dir.name
  new.mkdir(parents=True)
  kept = []
  for event in LogReader([old.log_path]):
    if event.which() == "extrinsicsCalibration":
      m = messaging.new_message("extrinsicsCalibration", valid=True, logMonoTime=event.logMonoTime)
      m.extrinsicsCalibration.calStatus = "uncalibrated"
      kept.append(m.to_bytes())
    else:
      kept.append(event.as_builder().to_bytes())
  write_log(new / "qlog.zst", kept)
  shutil.copy(old.qcamera, new / "qcamera.ts")
  stats = make_data([str(tmp_path / "r")], tmp_path / "d", OPTIONS, progress=False)
  assert stats["total"] == {"not calibrated": 40}
  from openpilot.tools.lib.videowriter import VideoWriter

  writer = VideoWriter(new / "fcamera.hevc", 320, 240, 10, 24)
  for _ in range(20):
    writer.write(np.zeros((240, 320, 3), np.uint8))
  writer.close()
  with pytest.raises(UserError, match="320x240"):
    make_data([str(tmp_path / "r")], tmp_path / "e", OPTIONS, progress=False)


# *** real routes ***


@pytest.mark.slow
def test_real_segments(shared_data, tmp_path):
  stats = make_data([str(shared_data / "realdata")], tmp_path / "d", {**OPTIONS, "fps": 5}, progress=False)
  print(table(stats))
  assert sorted(stats["segments"]) == ["0000002c--d68dde99ca--0", "0000002c--d68dde99ca--1", "2023-07-27--13-01-19--0"]
  assert stats["left_out"]["2024-02-11--13-07-23--0"] == "no rlog or qlog" and len(stats["left_out"]) == 8
  _, shards = read_dataset(tmp_path / "d")
  city = shards[1]
  assert city.meta["sources"]["path"] == "deviceMotion" and 4 < city.meta["sources"]["path_hz"] < 6
  c = city.columns
  whole = np.isfinite(c["plan"]).all((1, 2))
  assert whole.sum() > 900
  # the wheels, a sensor that the path does not use, agree on its length to a few percent
  traveled = np.concatenate([[0], np.cumsum(c["speed"][:-1] * np.diff(c["time"]) * 1e-9)])
  i = np.flatnonzero(whole[:-200])
  length = np.linalg.norm(np.diff(c["plan"][i][:, :, :3].astype(float), axis=1), axis=-1).sum(1)
  ratio = np.median(length / (traveled[i + 200] - traveled[i]))
  print(f"length of 10 s of path over the wheels': median {ratio:.3f}")
  assert 0.94 < ratio < 1.03
  # a car does not slide: at each point of the path the velocity looks along it, and lateral acceleration is speed times
  # turn rate
  assert np.median(np.abs(c["plan"][i][:, :, 7][:, 0] - c["pose"][i, 0] * c["pose"][i, 5])) < 0.2
  assert np.abs(c["plan"][i][:, :, 2]).max() < 8 and np.abs(c["plan"][i][:, 0, :3]).max() < 1e-5


@pytest.mark.parametrize(
  "words",
  [
    ["--focal", "0"],
    ["--focal", "nan"],
    ["--focal", "-3"],
    ["--min-speed", "nan"],
    ["--gps-box", "1", "2", "3", "nan"],
  ],
)
def test_numbers_that_are_none_are_one_line(words, tmp_path, monkeypatch, capsys):
  """A focal length of 0 was taken for one that is not given, and one of nan ended in a traceback."""
  monkeypatch.setattr("sys.argv", ["dataloader", "--routes", str(tmp_path), "--output", str(tmp_path / "d"), *words])
  assert cli(dataloader.main)() == 2
  err = capsys.readouterr().err.splitlines()
  assert len(err) == 1 and words[0] in err[0] and words[-1] in err[0], err
  assert not (tmp_path / "d").exists()


def test_two_at_once_are_refused(tmp_path, monkeypatch, capsys):
  """They wrote into one folder, and left a segment without its columns."""
  (tmp_path / "d").mkdir()
  monkeypatch.setattr("sys.argv", ["dataloader", "--routes", str(tmp_path), "--output", str(tmp_path / "d")])
  with only_one(tmp_path / "d", ""):
    assert cli(dataloader.main)() == 2
  assert "another command makes" in capsys.readouterr().err
