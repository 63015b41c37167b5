"""CoTracker against its own package where that is installed; the windows around it against a tracker whose answers are
known, everywhere."""

import json
import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from cotracker_models import POLE, H, KnownModel, KnownPredictor, W, install, known_video
from openpilot.tools.fair.cotracker.cotracker import CoTracker, CoTrackerTeacher, carry
from openpilot.tools.fair.cotracker.tracker import LANE, ROAD
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError

NC = "CC-BY-NC-4.0"


@pytest.fixture
def known(monkeypatch):
  return install(monkeypatch)


def known_weights(folder, v2=False, learned=12):
  path = folder / f"known{learned}{'v2' if v2 else ''}.pth"
  torch.save(KnownModel(v2, learned).state_dict(), path)
  return path


def test_offline_goes_through_any_length_in_windows(known, tmp_path):
  tracker = CoTracker("offline", known_weights(tmp_path), device="cpu", window=12)
  points = np.array([[10, 10], [5, 40], [66, 50], [200, 5], [110, 60]], np.float64)
  video = known_video(80, 1, 0)
  tracks, visible = tracker.track_lane_points(video, points)
  assert (
    tracks.dtype == np.float32
    and tracks.shape == (80, 5, 2)
    and visible.dtype == bool
    and max(known.seen) == 12 < len(known.seen) + 4
  )
  x = points[:, 0] + np.arange(80)[:, None]
  # behind the pole for 15 frames, longer than the 6 that windows have in common: lost there, and stays where it was
  # seen last
  last = {0: POLE[0] - 1, 1: POLE[0] - 1, 4: W - 1}
  for n, stop in last.items():
    np.testing.assert_allclose(tracks[:, n, 0][x[:, n] <= stop], x[:, n][x[:, n] <= stop], atol=1e-3)
    np.testing.assert_array_equal(visible[:, n], x[:, n] <= stop)
    assert tracks[-1, n, 0] == stop
  np.testing.assert_allclose(tracks[:12, 2, 0], x[:12, 2], atol=1e-3)
  np.testing.assert_array_equal(
    visible[:, 2], (x[:, 2] >= POLE[1]) & (x[:, 2] < W) | (x[:, 2] == 66)
  )  # asked for behind the pole
  assert not visible[:, 3].any()
  # a short video is one call of the official predictor
  known.seen.clear()
  tracker.track_lane_points(video[:12], points)
  assert known.seen == [12]


def test_covered_for_less_than_the_overlap_comes_back(known, tmp_path):
  tracker = CoTracker("offline", known_weights(tmp_path), device="cpu", window=24)
  tracks, visible = tracker.track_lane_points(known_video(40, 3, 1), [[10.0, 10.0]])
  x = 10 + 3 * np.arange(40)
  np.testing.assert_allclose(tracks[:, 0], np.stack([x, 10 + np.arange(40)], 1), atol=1e-3)
  np.testing.assert_array_equal(visible[:, 0], ((x < POLE[0]) | (x >= POLE[1])) & (x < W))


@pytest.mark.parametrize("mode, learned", [("online", 8), ("v2", 8)])
@pytest.mark.parametrize("length", [1, 3, 8, 9, 31])
def test_online_streams(known, tmp_path, mode, learned, length):
  tracker = CoTracker(mode, known_weights(tmp_path, mode == "v2", learned), device="cpu")
  points = np.array([[10, 10], [30, 40]], np.float64)
  tracks, visible = tracker.track_lane_points(torch.from_numpy(known_video(length, 2, 1)), torch.from_numpy(points))
  t = np.arange(length)[:, None]
  np.testing.assert_allclose(tracks.numpy(), points + t[..., None] * [2, 1], atol=1e-3)
  x = points[:, 0] + 2 * t
  np.testing.assert_array_equal(visible.numpy(), (x < POLE[0]) | (x >= POLE[1]))
  assert max(known.seen) <= learned and tracks.dtype == torch.float32


def test_no_points_and_other_shapes(known, tmp_path):
  for mode in ("offline", "online"):
    tracker = CoTracker(mode, known_weights(tmp_path), device="cpu")
    tracks, visible = tracker.track_lane_points(known_video(30, 1, 1), np.zeros((0, 2)))
    assert tracks.shape == (30, 0, 2) and visible.shape == (30, 0) and not known.seen
    with pytest.raises(UserError, match="uint8"):
      tracker.track_lane_points(np.zeros((2, 3, 64, 64)), np.zeros((1, 2)))


def test_carry():
  queries = np.array([[0, 1.0, 1.0], [5, 2.0, 2.0], [1, 3.0, 3.0]])
  tracks = np.arange(24, dtype=np.float32).reshape(4, 3, 2)  # of the frames 3 to 6
  visible = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]], bool)
  got, there = carry(queries, tracks, visible, 3, 4)
  assert there.tolist() == [True, True, False] and got[:2].tolist() == [[5, 12, 13], [5, 2, 2]] and queries[0, 0] == 0


# *** the teacher ***


def teacher(folder, mode="online", **options):
  weights = known_weights(folder, learned=12)
  name = f"cotracker3-{mode}"
  return load_teacher(
    name, weights, accepted=[NC], device="cpu", **{"points": "grid", "window": 12, "hop": 4, **options}
  )


def label_in_clips(made, video, cuts, through_disk):
  tables, state, start = [], None, 0
  for n in cuts:
    labels, state = made.label(Clip(video[start : start + n]), state)
    table = labels["points"]
    assert ((table["frame"] >= 0) & (table["frame"] < max(n, 1))).all()
    table["frame"] = table["frame"] + start
    tables.append(table)
    start += n
    np.savez(through_disk, **state)
    with np.load(through_disk) as z:
      state = dict(z)
  assert start == len(video)
  whole = {k: np.concatenate([t[k] for t in tables]) for k in tables[0]}
  order = np.lexsort((whole["track"], whole["frame"]))
  return {k: v[order] for k, v in whole.items()}, state


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_clips_cut_at_hops_give_identical_labels(known, monkeypatch, tmp_path, mode):
  monkeypatch.setattr(KnownPredictor, "wobble", 0.2)
  video = known_video(32, 4, 2)
  disk = tmp_path / "state.npz"
  whole, end = label_in_clips(teacher(tmp_path, mode), video, [32], disk)
  assert len(whole["frame"]) > 300 and max(known.seen) == 12
  for cuts in ([4] * 8, [8, 16, 8], [20, 0, 12]):
    parts, end_parts = label_in_clips(teacher(tmp_path, mode), video, cuts, disk)
    for k in whole:
      assert whole[k].dtype == parts[k].dtype and (whole[k] == parts[k]).all(), (cuts, k)
    assert end.keys() == end_parts.keys() and all((end[k] == end_parts[k]).all() for k in end)
  # cut between: what is known only later cannot be in labels before, and nothing else differs
  for cuts in ([1] * 32, [6, 3, 14, 9]):
    parts, end_parts = label_in_clips(teacher(tmp_path, mode), video, cuts, disk)
    assert all((end[k] == end_parts[k]).all() for k in end)
    ends = np.cumsum(cuts)
    early = np.isin(whole["frame"], [f for f in range(32) if ends[ends > f].min() < (f // 4 + 1) * 4])
    wobbled = np.abs(whole["x"] - parts["x"]).max()
    assert all((whole[k] == parts[k]).all() for k in ("frame", "track", "cls")) and 0 < wobbled < 0.5
    assert all((whole[k][~early] == parts[k][~early]).all() for k in whole) and 0 < early.mean() < 1


def test_table_of_tracks(known, tmp_path):
  video = known_video(60, 3, 1)
  made = teacher(tmp_path, "offline", window=16, hop=4, max_age=30, limit=20)
  assert made.labels[0].classes == ("road", "lane") and made.stateful and made.license == NC
  table, state = label_in_clips(made, video, [60], tmp_path / "state.npz")
  back, first = 0, []
  for track in np.unique(table["track"]):
    rows = table["track"] == track
    frames, visible = table["frame"][rows], table["visible"][rows]
    xy = np.stack([table["x"][rows], table["y"][rows]], 1)
    assert (np.diff(frames) == 1).all() and len(frames) <= 30 and visible[0]
    np.testing.assert_allclose(np.diff(xy, axis=0), np.tile([3, 1], (len(xy) - 1, 1)), atol=1e-3)
    inside = (xy >= 0).all(1) & (xy <= [W - 1, H - 1]).all(1)
    assert inside[:-1].all()  # the row in which it has left is its last
    hidden = (xy[:, 0] >= POLE[0]) & (xy[:, 0] < POLE[1])
    np.testing.assert_array_equal(visible[1:], (inside & ~hidden)[1:])
    back += bool((~visible[1:-1] & visible[2:]).any())
    first.append(frames[0])
  assert (
    back > 3 and set(np.unique(first)) <= {0, *range(3, 60, 4)} and len(set(first)) > 5
  )  # one track through the cover; new points behind every hop
  assert (
    np.bincount(table["frame"]).max() <= 40
    and len(state["track"]) <= 20
    and state["frames"].shape == (12, 3, H, W)
    and state["first"] == 48
  )


def test_settings_and_own_seeds(known, tmp_path):
  def seeds(clip, i):
    return np.array([[40.0, 40.0], [41.0, 41.0], [500.0, 1.0]]), np.array([LANE, LANE, ROAD])

  made = teacher(tmp_path, seeds=seeds)
  table = made.label(Clip(known_video(2, 0, 0)))[0]["points"]
  assert table["cls"].tolist() == [LANE, LANE] and table["frame"].tolist() == [0, 1]
  settings = made.settings()
  assert (
    json.loads(json.dumps(settings)) == settings
    and settings["window"] == 12
    and settings["hop"] == 4
    and settings["mode"] == "online"
  )
  empty, state = made.label(Clip(known_video(0, 0, 0)))
  assert len(empty["points"]["x"]) == 0 and state is None
  _, state = made.label(Clip(known_video(2, 0, 0)))
  with pytest.raises(UserError, match="begin again"):
    made.label(Clip(known_video(2, 0, 0, (64, 64))), state)


# *** what is refused ***


def test_license_must_be_accepted(known, tmp_path):
  for name in ("cotracker3-offline", "cotracker3-online", "cotracker2"):
    assert TEACHERS[name].license == NC
    with pytest.raises(UserError, match=f"--accept-license {NC}"):
      load_teacher(name, known_weights(tmp_path))
  assert isinstance(
    load_teacher("cotracker2", known_weights(tmp_path, v2=True), accepted=[NC], device="cpu"), CoTrackerTeacher
  )


def test_package_must_be_there(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "cotracker", None)
  monkeypatch.delitem(sys.modules, "cotracker.predictor", raising=False)
  with pytest.raises(UserError, match=r"pip install git\+https://github.com/facebookresearch/co-tracker"):
    load_teacher("cotracker3-offline", known_weights(tmp_path), accepted=[NC])


def test_wrong_checkpoints(known, tmp_path):
  with pytest.raises(UserError, match="take teacher cotracker3-online"):
    CoTracker("offline", known_weights(tmp_path, learned=16), device="cpu")
  with pytest.raises(UserError, match="no checkpoint of CoTracker 3"):
    CoTracker("offline", known_weights(tmp_path, v2=True), device="cpu")
  with pytest.raises(UserError, match="no checkpoint of CoTracker 2"):
    CoTracker("v2", known_weights(tmp_path), device="cpu")
  (tmp_path / "junk.pth").write_bytes(b"junk")
  with pytest.raises(UserError, match="is no CoTracker checkpoint"):
    CoTracker("offline", tmp_path / "junk.pth", device="cpu")
  state = KnownModel(False, 12).state_dict()
  del state["weight"]
  torch.save({"model": state}, tmp_path / "part.pth")
  with pytest.raises(UserError, match="does not fit"):
    CoTracker("offline", tmp_path / "part.pth", device="cpu")
  with pytest.raises(UserError, match="no mode"):
    CoTracker("sideways", known_weights(tmp_path))
  with pytest.raises(UserError, match="hop is 12"):
    teacher(tmp_path, hop=12)


# *** the package itself ***

SMALL = (64, 96)  # the networks' picture here, to be quick; 384x512 otherwise


@pytest.fixture
def package():
  return pytest.importorskip("cotracker.predictor", reason="the cotracker package is not installed")


def published(package, folder, mode, learned):
  """A checkpoint in the official format, of random weights that move points and hide some."""
  torch.manual_seed(1)
  model = package.build_cotracker(None, offline=mode == "offline", window_len=learned, v2=mode == "v2")
  with torch.no_grad():
    model.updateformer.flow_head.weight.normal_(0, 0.01)
    head = model.vis_predictor[0] if mode == "v2" else model.updateformer.vis_conf_head
    head.weight.normal_(0, 0.05)
    head.bias.copy_(torch.tensor({"offline": [1.33, 1.85], "online": [1.1, 1.6], "v2": [3.25]}[mode]))
  path = folder / "published.pth"
  torch.save(model.state_dict() if mode == "online" else {"model": model.state_dict()}, path)
  return path


def small(predictor):
  predictor.interp_shape = SMALL
  predictor.model.requires_grad_(
    False
  )  # as ours is: matmul sums in another order otherwise, which 6 rounds make 2e-4 px
  return predictor


def real_video(n):
  r = np.random.default_rng(4)
  x = torch.nn.functional.interpolate(
    torch.tensor(r.uniform(0, 255, (n, 3, 8, 10)), dtype=torch.float32), (80, 112), mode="bicubic"
  )
  return x.clamp(0, 255).to(torch.uint8).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("mode, learned", [("offline", 6), ("online", 4), ("v2", 4)])
def test_equals_the_official_predictors(package, tmp_path, mode, learned):
  path = published(package, tmp_path, mode, learned)
  tracker = CoTracker(mode, path, device="cpu")
  small(tracker.predictor)
  video = real_video(5)
  queries = np.array([[0, 20, 30], [0, 70, 50], [2, 50, 40]], np.float64)
  tensor, asked = torch.from_numpy(video).float()[None], torch.from_numpy(queries).float()[None]
  official = small(
    package.CoTrackerPredictor(str(path), offline=mode == "offline", v2=mode == "v2", window_len=learned)
  )
  want, seen = (x[0].numpy() for x in official(tensor, queries=asked))
  tracks, visible = tracker.follow(video, queries)
  in_picture = (want >= 0).all(-1) & (want <= [111, 79]).all(-1)
  # the same operations on the same input
  np.testing.assert_allclose(tracks, want, atol=1e-5)
  np.testing.assert_array_equal(visible, seen & in_picture)
  assert (
    np.abs(np.diff(want[:, :2], axis=0)).max() > 1 and seen.sum() > 3 and not seen.all()
  )  # 3: of the queries themselves
  if mode == "offline":
    got = tracker.track_lane_points(video, queries[:2, 1:])
    want, seen = (x[0].numpy() for x in official(tensor, queries=asked[:, :2]))
  else:
    small(tracker.streamer)
    got = tracker.track_lane_points(video, queries[:2, 1:])
    official = small(package.CoTrackerOnlinePredictor(str(path), v2=mode == "v2", window_len=learned))
    official(tensor, is_first_step=True, queries=asked[:, :2])
    for start in range(0, 3, 2):  # as its README says: overlapping by half
      want, seen = official(tensor[:, start : start + 4])
    want, seen = want[0].numpy(), seen[0].numpy()
  in_picture = (want >= 0).all(-1) & (want <= [111, 79]).all(-1)
  np.testing.assert_allclose(got[0][1:], want[1:], atol=1e-5)
  np.testing.assert_array_equal(got[1][1:], (seen & in_picture)[1:])
  np.testing.assert_array_equal(got[0][0], queries[:2, 1:])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "v2"])
def test_clips_shorter_than_a_window_are_tracked(package, tmp_path, mode):
  """The official forward answers zeros there."""
  path = published(package, tmp_path, mode, 8)
  tracker = CoTracker(mode, path, device="cpu")
  small(tracker.predictor)
  tracks, _ = tracker.follow(real_video(3), np.array([[0.0, 60.0, 40.0]]))
  assert tracks.shape == (3, 1, 2) and (np.abs(tracks - [60, 40]) < 40).all() and np.ptp(tracks, axis=0).min() > 0
