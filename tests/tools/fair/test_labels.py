"""The label store and the command that fills it, on routes written here and a small ONNX network made here."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics
from openpilot.tools.fair.labels import rules
from openpilot.tools.fair.labels import group as group_module
from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.collector import to_view
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.browse import statistics
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.video import pictures
from openpilot.tools.fair.labels.views import ViewWarp
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.framereader import FrameReader
from openpilot.tools.lib.videowriter import VideoWriter

W, H = 526, 330
FRAMES = (150, 70)  # of the route's segments


def write_network(folder, seed=0):
  """Two maps of one 3x3 convolution each, and its description."""
  r = np.random.default_rng(seed)
  weights = helper.make_tensor("w", onnx.TensorProto.FLOAT, (2, 3, 3, 3), r.normal(0, 0.5, 54).astype(np.float32))
  shape = helper.make_tensor("s", onnx.TensorProto.INT64, (4,), [1, 2, 32, 64])  # a batch of one, written down
  graph = helper.make_graph(
    [
      helper.make_node("Conv", ["images", "w"], ["y"], pads=[1, 1, 1, 1]),
      helper.make_node("Reshape", ["y", "s"], ["out"]),
    ],
    "net",
    [helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, (1, 3, 32, 64))],
    [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, (1, 2, 32, 64))],
    [weights, shape],
  )
  folder.mkdir(exist_ok=True)
  onnx.save(
    helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(folder / "net.onnx")
  )
  (folder / "net.yaml").write_text(
    """name: tiny
weights: net.onnx
license: MIT
input:
  {name: images, size: [32, 64], color: RGB, scale: 0.00392156862745098, mean: [0, 0, 0], std: [1, 1, 1], fit: stretch}
decode: maps
maps:
  thing: {output: out, channel: 1, softmax: true}
"""
  )
  return folder / "net.yaml"


@pytest.fixture(scope="module")
def route(tmp_path_factory):
  """Two segments of video without logs: a noisy picture that moves."""
  root = tmp_path_factory.mktemp("videos")
  r = np.random.default_rng(3)
  big = r.integers(0, 256, (60, 120, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
  for k, n in enumerate(FRAMES):
    folder = root / f"0000002c--d68dde99ca--{k}"
    folder.mkdir()
    with VideoWriter(folder / "qcamera.ts", W, H, 15, 30) as v:
      for i in range(n):
        v.write(big[i % 100 : i % 100 + H, i : i + W])
  return root


@pytest.fixture
def network(tmp_path):
  return write_network(tmp_path / "net")


def command(*args):
  return [sys.executable, "-m", "openpilot.tools.fair.labels.label", *map(str, args)]


def run(*args):
  return subprocess.run(command(*args), capture_output=True, text=True, timeout=120)


def contents(root):
  """Every file but the lock, by its hash."""
  return {
    str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
    for p in sorted(root.rglob("*"))
    if p.is_file() and p.name != ".lock"
  }


def test_frames_and_labels_are_what_they_say(route, network, tmp_path):
  r = run(route, "--teachers", network, "--out", tmp_path / "store", "--every", 3, "--sees", "view")
  assert r.returncode == 0, r.stderr
  store = LabelStore(tmp_path / "store")
  (frames, tiny) = (store.groups(t, "0000002c--d68dde99ca--0")[0] for t in ("frames", "tiny"))
  assert (
    frames.n == tiny.n == 50
    and tiny.row_count == 50
    and tiny.meta["teacher"]["licence"] == "MIT"
    and len(tiny.meta["teacher"]["checkpoint"]) == 64
  )
  # the model frame is what fairmodeld makes of the camera's buffer
  nv12 = FrameReader(route / "0000002c--d68dde99ca--0" / "qcamera.ts", "nv12").get(21)
  warp = ModelFrame(W, H, W, W * H)
  warp.set_calibration(np.zeros(3), camera_intrinsics(W, H))
  assert (frames.dense("frame")[7] == warp.warp(nv12.reshape(-1))).all()
  # the label is what the network says of the view
  (view, _) = find_views([str(route)], None, "qcamera", 3, None)
  teacher = load_teacher(str(network))
  assert teacher.view_size() == (64, 32)
  teacher.prepare(32, 64)
  rgb = ViewWarp(view, width=64, height=32).rgb(nv12)
  labels, _ = teacher.label(Clip(rgb.transpose(2, 0, 1)[None]))
  assert tiny.dense("thing").shape == (50, 128, 256)
  # to float16 of probabilities; the batch may be summed in another order
  np.testing.assert_allclose(tiny.dense("thing")[7].astype(float), labels["thing"][0].astype(float), atol=1 / 256)
  assert "probability" in statistics(tiny, tiny.labels[0]) and list(tiny.problems()) == []
  data = LabelDataset(tmp_path / "store", ["frames/frame", "tiny/thing"])
  assert (
    len(data) == 50 + 24
    and data[7]["frames/frame"].shape == (6, 128, 256)
    and (data[7]["tiny/thing"] == tiny.dense("thing")[7]).all()
  )
  many = data.__getitems__([60, 3, 49, 7])
  assert [m["segment"][-1] for m in many] == ["1", "0", "0", "0"] and (
    many[3]["frames/frame"] == data[7]["frames/frame"]
  ).all()
  alone = {i: data[i] for i in range(0, 74, 5)}
  for window in (1, 8):
    order = data.shuffled(seed=window, window=window).tolist()
    assert sorted(order) == list(range(74)) and order != sorted(order)
    for i, item in zip(order, data.__getitems__(order), strict=True):
      assert i not in alone or (
        item["frame_id"] == alone[i]["frame_id"] and (item["tiny/thing"] == alone[i]["tiny/thing"]).all()
      )


def test_the_rgb_view_shows_what_the_model_frame_shows(route):
  """Both warps, bilinear RGB and openpilot's nearest neighbor, put the same thing at the same pixel."""
  (view, _) = find_views([str(route)], None, "qcamera", 1, None)
  warp = ViewWarp(view)
  nv12 = FrameReader(view.path, "nv12").get(5)
  rgb = warp.rgb(nv12).astype(float)
  luma = 16 + rgb @ np.array([65.481, 128.553, 24.966]) / 255
  packed = warp.frame(nv12)
  full = np.zeros((256, 512))
  full[0::2, 0::2], full[1::2, 0::2], full[0::2, 1::2], full[1::2, 1::2] = packed[:4]

  def error(dx):
    return np.abs(np.roll(luma, dx, 1) - full)[warp.valid][::7].mean()

  # half-pixel nearest against bilinear at block edges of 8 to 11 pixels; any shift is worse
  assert error(0) < 6 and error(0) < 0.7 * min(error(2), error(-2))


def test_larger_views_see_the_same_place(route):
  (view, _) = find_views([str(route)], None, "qcamera", 1, None)
  nv12 = FrameReader(view.path, "nv12").get(5)
  small, large = ViewWarp(view).rgb(nv12).astype(float), ViewWarp(view, width=1024, height=512).rgb(nv12).astype(float)
  mean = large.reshape(256, 2, 512, 2, 3).mean(axis=(1, 3))
  errors = [
    np.abs(np.roll(mean, (dx, dy), (1, 0)) - small)[4:-4, 4:-4].mean()
    for dx, dy in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
  ]
  # what is left is interpolation; were one view half a pixel off, a shift towards it would be as good as none
  assert errors[0] < 0.6 * min(errors[1:])
  table = to_view({"x0": np.array([0.5]), "y": np.array([2.5]), "cls": np.array([3])}, (2, 2))
  assert table["x0"][0] == 0 and table["y"][0] == 1 and table["cls"][0] == 3


@pytest.mark.slow
def test_killed_at_any_moment_then_the_same_command_equals_an_unbroken_run(route, network, tmp_path):
  args = (route, "--teachers", network, "--batch", 8)
  assert run(*args, "--out", tmp_path / "whole").returncode == 0
  want = contents(tmp_path / "whole")
  for k, wait_for in enumerate(
    ("frames-*/chunks/00000.json", "frames-*/frame.zarr/c", "tiny-*/chunks/00000.json", "tiny-*/thing.zarr/c/1")
  ):
    out = tmp_path / f"killed{k}"
    proc = subprocess.Popen(command(*args, "--out", out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while proc.poll() is None and not list(out.glob(f"*--0/{wait_for}")):
      assert time.monotonic() < end
      time.sleep(0.002)
    os.kill(proc.pid, signal.SIGKILL)
    proc.wait()
    before = contents(out)
    assert before != want
    r = run(*args, "--out", out)
    assert r.returncode == 0, r.stderr
    assert contents(out) == want


def test_labels_of_a_mended_rule_are_made_anew(route, tmp_path, monkeypatch):
  views = find_views([str(route)], None, "qcamera", 9, None)
  store = LabelStore(tmp_path, create=True)
  monkeypatch.setattr(rules, "RULES", {})
  old = run_teacher(FrameTeacher(), views, store, every=9, progress=False)
  monkeypatch.setattr(
    rules, "RULES", {"lens": rules.Rule(2, lambda m: m["camera"]["stream"] == "qcamera", "the lens is round")}
  )
  assert all(g.stale == ["lens"] for g in store.groups())
  with pytest.raises(
    UserError,
    match=r"2 groups of labels are stale, the first is .*: since then the lens is round; .*--prune, or "
    r".*--stale-labels",
  ):
    LabelDataset(tmp_path, ["frames/frame"])
  new = run_teacher(FrameTeacher(), views, store, every=9, progress=False)
  assert {g.path for g in new}.isdisjoint(g.path for g in old) and all(g.stale == [] and g.row_count for g in new)
  assert {g.path for g in store.stale(new)} == {g.path for g in old}
  assert len(LabelDataset(tmp_path, ["frames/frame"])) == sum(g.n for g in new)  # what is left of before is not taken
  assert {g.path for g in run_teacher(FrameTeacher(), views, store, every=9, progress=False)} == {g.path for g in new}


class Counter:
  """A teacher with state: it counts the frames it has seen, and marks a point whose place depends on all of them."""

  name, model_id, checkpoint_hash, license, stateful = "counter", "", "", "MIT", True
  labels = [Label("points", "points"), Label("sum", "dense", "float32", (1,))]

  def __init__(self, fail_at=None):
    self.fail_at, self.calls = fail_at, 0

  def prepare(self, height, width): ...

  def settings(self):
    return {}

  def label(self, clip, state):
    n, total = (int(state["n"]), float(state["total"])) if state else (0, 0.0)
    sums = []
    for image in clip.rgb:
      n, total = n + 1, total + float(image.mean())
      sums.append([total])
      self.calls += 1
      if self.calls == self.fail_at:
        raise KeyboardInterrupt
    t = np.arange(len(clip.rgb), dtype=np.int32)
    points = {
      "frame": t,
      "track": t * 0,
      "x": np.array(sums)[:, 0].astype(np.float32),
      "y": t.astype(np.float32),
      "visible": t >= 0,
      "cls": t.astype(np.int16) * 0,
    }
    return {"points": points, "sum": np.array(sums, np.float32)}, {"n": np.array(n), "total": np.array(total)}


def test_a_teacher_with_state_goes_on_from_its_state(route, tmp_path):
  """In batches of seven, which leave a single frame at the end of a chunk."""
  views = find_views([str(route)], None, "qcamera", 1, None)
  results = []
  for k, fail_at in enumerate((None, CHUNK + 20)):
    store = LabelStore(tmp_path / str(k), create=True)
    if fail_at is not None:
      with pytest.raises(KeyboardInterrupt):
        run_teacher(Counter(fail_at), views, store, batch=7, progress=False)
    counter = Counter()
    groups = run_teacher(counter, views, store, batch=7, progress=False)
    assert counter.calls == sum(FRAMES) - (CHUNK if fail_at else 0)  # the finished chunk is not done again
    results.append([(g.dense("sum")[:].tolist(), g.table("points").to_pydict()) for g in groups])
  assert results[0] == results[1]
  assert results[0][1][0][0] != results[0][0][0][FRAMES[1]]  # the second segment began anew
  assert run_teacher(Counter(), views, store, progress=False)[0].row_count == FRAMES[0]


def test_without_the_state_behind_the_last_chunk_it_begins_at_the_start(route, tmp_path):
  """Begun in the middle it would count from nothing there."""
  views = find_views([str(route)], None, "qcamera", 1, None)
  sums = []
  for k in range(2):
    store = LabelStore(tmp_path / str(k), create=True)
    if k:
      with pytest.raises(KeyboardInterrupt):
        run_teacher(Counter(CHUNK + 20), views, store, batch=8, progress=False)
      kept = list((tmp_path / str(k)).rglob("chunks/*.npz"))
      assert len(kept) == 1
      kept[0].unlink()
    counter = Counter()
    groups = run_teacher(counter, views, store, batch=8, progress=False)
    assert counter.calls == sum(FRAMES)
    sums.append([g.dense("sum")[:].tolist() for g in groups])
  assert sums[0] == sums[1]


class Masks:
  """A mask over the right half of every picture but the first."""

  name, model_id, checkpoint_hash, license, stateful = "masks", "", "", "MIT", False
  labels = [Label("objects", "boxes", shape=(64, 128), classes=("car",))]

  def view_size(self):
    return 128, 64

  def prepare(self, height, width): ...

  def settings(self):
    return {}

  def label(self, clip, state=None):
    mask = np.zeros((1, 64, 128), bool)
    mask[:, :, 64:] = True
    n = len(clip.rgb) - 1
    box = {
      k: np.full(n, v, np.float32) for k, v in {"x0": 63.5, "y0": -0.5, "x1": 127.5, "y1": 63.5, "score": 1}.items()
    }
    return {
      "objects": {
        "frame": 1 + np.arange(n),
        **box,
        "cls": np.zeros(n, np.int16),
        "track": np.arange(n),
        "rle": rle.encode(mask) * n,
      }
    }, None


def test_masks_are_stored_and_drawn(route, tmp_path):
  views = find_views([str(route)], None, "qcamera", 1, None)[:1]
  store = LabelStore(tmp_path, create=True)
  (frames,) = run_teacher(FrameTeacher(), views, store, progress=False)
  (group,) = run_teacher(Masks(), views, store, batch=2, progress=False)
  table = group.table("objects").to_pydict()
  assert table["row"] == list(range(1, FRAMES[0], 2)) and set(table["rle"]) == {table["rle"][0]}
  assert (table["x0"][0], table["x1"][0], table["y1"][0]) == (255.5, 511.5, 255.5)  # of the 512x256 view
  plain, masked = (p[2:-2, 40:-40].astype(float) for p in pictures(frames, [group], 2))
  change = np.abs(masked - plain).mean(axis=2)
  assert np.median(change[:, 600:]) > 2 * np.median(
    change[:, :400]
  )  # the pattern moves between the two frames, the mask tints only its own half


class Large(Counter):
  """More than `most` frames at once do not fit into the GPU's memory."""

  def __init__(self, most, stateful):
    super().__init__()
    self.most, self.stateful = most, stateful

  def label(self, clip, state):
    if len(clip.rgb) > self.most:
      raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    labels, after = super().label(clip, state)
    return labels, after if self.stateful else None


@pytest.mark.parametrize("stateful", [True, False])
def test_out_of_gpu_memory_halves_the_batch_and_goes_on(route, tmp_path, capsys, stateful):
  views = find_views([str(route)], None, "qcamera", 10, None)
  results = []
  for most in (8, 3):
    teacher = Large(most, stateful)
    groups = run_teacher(teacher, views, LabelStore(tmp_path / str(most), create=True), batch=8, progress=False)
    assert teacher.calls == 15 + 7  # no frame twice
    # the sum depends on the batches where nothing is carried on from one to the next; the points on none
    results.append(
      [g.dense("sum")[:].tolist() if stateful else g.table("points").column("row").to_pylist() for g in groups]
    )
  assert results[0] == results[1] and len(results[0][0]) == 15
  assert "out of GPU memory with 8 frames at once; going on with 4" in capsys.readouterr().err
  with pytest.raises(UserError, match="does not hold a single frame"):
    run_teacher(Large(0, stateful), views, LabelStore(tmp_path / "none", create=True), batch=2, progress=False)


def test_a_damaged_chunk_is_named_and_repaired(route, network, tmp_path):
  args = (route / "0000002c--d68dde99ca--0", "--teachers", network, "--out", tmp_path / "s", "--no-frames")
  assert run(*args).returncode == 0
  want = contents(tmp_path / "s")
  (group,) = LabelStore(tmp_path / "s").groups()
  shard = group.path / "thing.zarr" / "c" / "1" / "0" / "0"
  dat = bytearray(shard.read_bytes())
  dat[len(dat) // 2] ^= 4
  shard.write_bytes(dat)
  listing = subprocess.run(
    [sys.executable, "-m", "openpilot.tools.fair.labels.browse", str(tmp_path / "s")],
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert (
    listing.returncode == 1
    and "chunk 1" in listing.stdout + listing.stderr
    and "--repair" in listing.stdout + listing.stderr
  )
  r = run(*args, "--repair")
  assert r.returncode == 0 and str(shard) in r.stderr
  assert contents(tmp_path / "s") == want


def test_other_settings_make_new_labels_and_prune_drops_the_old(route, network, tmp_path):
  args = (route / "0000002c--d68dde99ca--1", "--teachers", network, "--out", tmp_path / "s", "--no-frames")
  assert run(*args).returncode == 0 and run(*args, "--view", "256x128").stdout.count("stale:") == 1
  assert len(LabelStore(tmp_path / "s").groups()) == 2
  with pytest.raises(UserError, match="two sets"):
    LabelDataset(tmp_path / "s", ["tiny/thing"])
  write_network(network.parent, seed=1)  # another checkpoint
  assert run(*args, "--prune").stdout.count("removed:") == 2
  (left,) = LabelStore(tmp_path / "s").groups()
  assert left.meta["picture"]["width"] == 64 and left.row_count == 70


def test_disk_full_keeps_whole_chunks(route, network, tmp_path, monkeypatch):
  store = LabelStore(tmp_path / "s", create=True)
  views = find_views([str(route)], None, "qcamera", 1, None)[:1]
  teacher = load_teacher(str(network))
  real = group_module.file_hash
  calls = []

  def full(path):
    calls.append(path)
    if len(calls) >= 2:
      raise OSError(errno.ENOSPC, "No space left on device")
    return real(path)

  monkeypatch.setattr(group_module, "file_hash", full)
  with pytest.raises(UserError, match="disk is full"):
    run_teacher(teacher, views, store, progress=False)
  monkeypatch.undo()
  (group,) = store.groups()
  assert group.done() == {0} and list(group.problems()) == []
  run_teacher(teacher, views, store, progress=False)
  assert group.done() == {0, 1, 2}


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--teachers", "dinosaur"], "no teacher 'dinosaur'; there are"),
    (["--teachers", "yolox-nano", "--weights", "yolox-nano=/nowhere.onnx"], "no weights at /nowhere.onnx"),
    (["--teachers", "yolox-nano", "--weights", "other=/nowhere.onnx"], "write TEACHER=PATH"),
    (["--teachers", "NET", "--view", "500x250"], "--view 500x250 is not a size"),
    (["--teachers", "NET", "--every", "0"], "at least 1"),
    (["--teachers", "NET", "--camera", "wide"], "choose"),
  ],
)
def test_bad_input_is_one_line(route, network, tmp_path, args, message):
  r = run(route, *[str(network) if a == "NET" else a for a in args], "--out", tmp_path / "s")
  assert (
    r.returncode == 2
    and r.stderr.splitlines()[-1].startswith("error: ")
    and message in r.stderr
    and "Traceback" not in r.stderr
  )
  assert not (tmp_path / "s").exists()


def test_bad_stores_and_routes_are_said(route, network, tmp_path):
  (tmp_path / "log").mkdir()
  (tmp_path / "log" / "0000002c--d68dde99ca--0").mkdir()
  (tmp_path / "log" / "0000002c--d68dde99ca--0" / "qlog").write_bytes(b"x")
  with pytest.raises(UserError, match="no video in"):
    find_views([str(tmp_path / "log")], None, "road", 1, None)
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "thesis.txt").write_text("x")
  with pytest.raises(UserError, match="holds other files"):
    LabelStore(tmp_path / "full", create=True)
  with pytest.raises(UserError, match=r"no label store.*store.json is missing"):
    LabelStore(tmp_path / "absent")
  LabelStore(tmp_path / "old", create=True)
  (tmp_path / "old" / "store.json").write_text('{"version": 0}')
  with pytest.raises(UserError, match="version 0, this program writes 1"):
    LabelStore(tmp_path / "old")
  (network.parent / "net.onnx").write_bytes(b"no network")
  with pytest.raises(UserError, match="is not an ONNX file"):
    load_teacher(str(network))
  network.write_text("name: x\n")
  with pytest.raises(UserError, match="is no description of a network"):
    load_teacher(str(network))


def test_licenses_must_be_accepted(tmp_path, network):
  network.write_text(network.read_text().replace("license: MIT", "license: CC-BY-NC-4.0"))
  with pytest.raises(UserError, match=r"add --accept-license CC-BY-NC-4\.0"):
    load_teacher(str(network))
  teacher = load_teacher(str(network), accepted=["CC-BY-NC-4.0"])
  assert teacher.license == "CC-BY-NC-4.0"
  # as it was spelled before: the same teacher, and the same labels
  before = network.with_name("before.yaml")
  before.write_text(network.read_text().replace("license: ", "licence: ").replace("color: ", "colour: "))
  former = load_teacher(str(before), accepted=["CC-BY-NC-4.0"])
  assert former.license == teacher.license and former.settings() == teacher.settings()
  assert teacher.settings()["description"]["licence"] == "CC-BY-NC-4.0"
