import json
import weakref

import numpy as np
import pytest

from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.sam.sam2 import SAM2VideoWrapper
from openpilot.tools.fair.teacher import Clip, Entry, Label, hash_weights
from openpilot.tools.lib.errors import UserError
from label_fixture import same_in_pieces
from sam2_models import BOXES, KINDS, H, W, frames, official, save
from tensor_bytes import tensors


ENTRY = Entry("sam.sam2:SAM2VideoWrapper", "", "Apache-2.0", "", "")
LATE = np.array([[10, 28, 33, 38, 0.9, 2]], np.float32)


def same(masks, scores, want):
  # the same operations on the same input. Memory is kept in bfloat16: a difference in the last bit would grow to 1e-3,
  # so there must be none before it
  np.testing.assert_array_equal(masks, want[0])
  np.testing.assert_allclose(scores, want[1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_official_session(kind, tmp_path):
  model = save(kind, tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu")
  rgb = frames(24)  # longer than the 15 frames whose pointers are kept
  masks, ids, scores = sam.track_objects(rgb, BOXES)
  assert masks.dtype == bool and masks.shape == (24, 2, H, W) and ids.tolist() == [0, 1] and scores.shape == (24, 2)
  want = official(model, rgb, BOXES)
  assert 0.01 < want[0].mean() < 0.99 and (want[1] > 0.5).any() and np.ptp(want[1]) > 1e-3
  same(masks, scores, want)


@pytest.mark.parametrize("kind", KINDS)
def test_joining_leaves_the_others_as_they_were(kind, tmp_path):
  model = save(kind, tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", join_iou=1.0)
  rgb = frames(14)
  asked = []

  def detector(frame):
    asked.append(frame)
    return LATE if len(asked) == 1 else np.zeros((0, 6), np.float32)

  masks, ids, scores = sam.track_objects(iter(rgb), BOXES, detector, every=5)
  assert ids.tolist() == [0, 1, 2] and [
    next(n for n in range(14) if a is rgb[n] or (a == rgb[n]).all()) for a in asked
  ] == [5, 10]
  same(masks[:, :2], scores[:, :2], official(model, rgb, BOXES))
  same(masks[5:, 2:], scores[5:, 2:], official(model, rgb, LATE, start=5))
  assert not masks[:5, 2].any() and not scores[:5, 2].any()


def test_those_behind_one_let_go_are_as_they_were(tmp_path):
  model = save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", lost_after=5, join_iou=1.0)
  rgb = frames(12)
  three = np.concatenate([BOXES, LATE[:, :4]])
  video = sam.start(H, W)
  got = []
  for n, frame in enumerate(rgb):
    got.append(sam.step(video, frame, three if n == 0 else None, every_box=True))
    if n == 5:
      video.last_seen[1] = 0
      sam._forget(video)  # the middle one, as if it had not been seen since frame 0
  assert [len(g.ids) for g in got] == [3] * 6 + [2] * 6 and got[-1].ids.tolist() == [0, 2]
  want = official(model, rgb, three)
  for n in range(12):
    columns = [0, 1, 2] if n < 6 else [0, 2]
    same(got[n].masks, got[n].scores, (want[0][n, columns], want[1][n, columns]))
  assert sam.step(video, rgb[0], LATE).ids.tolist() == [0, 2, 3]  # no identity twice


def test_memory_does_not_grow_with_the_video(tmp_path):
  save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu")
  given: list[weakref.ref] = []

  def endless():
    for frame in frames(40):
      given.append(weakref.ref(f := frame.copy()))
      yield f

  assert all(sum(r() is not None for r in given) <= 2 for _ in sam.stream(endless(), BOXES)) and len(given) == 40
  video = sam.start(H, W)
  sizes = []
  for n, frame in enumerate(frames(40)):
    sam.step(video, frame, BOXES if n == 0 else None, every_box=True)
    sizes.append(tensors([vars(video.session), vars(video.session.cache)]))
  assert sizes[39] == sizes[20] and not video.session.processed_frames
  assert all(len(v) == 0 for v in video.session.frames_tracked_per_obj.values())


class Detector:
  """A teacher of boxes that answers what it is told."""

  name, checkpoint_hash, stateful, labels = (
    "told",
    "0" * 64,
    False,
    [Label("boxes", "boxes", classes=("person", "bicycle", "car"))],
  )

  def prepare(self, height, width):
    assert (height, width) == (H, W)

  def settings(self):
    return {"told": 1}

  def label(self, clip, state=None):
    assert len(clip.rgb) == 1
    rows = np.concatenate(
      [np.c_[BOXES, [[0.5, 0], [0.8, 2]]], LATE if clip.rgb[0, 0, 0, 0] > 100 else LATE[:0]]
    ).astype(np.float32)
    return {
      "boxes": {
        "frame": np.zeros(len(rows), np.int32),
        **{k: rows[:, n] for n, k in enumerate(("x0", "y0", "x1", "y1", "score", "cls"))},
      }
    }, None


@pytest.mark.parametrize("kind", KINDS)
def test_labels_in_pieces_are_those_of_an_unbroken_run(kind, tmp_path):
  save(kind, tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", every=4, max_objects=5, lost_after=6)
  sam.detector = Detector()
  sam.prepare(H, W)
  rgb = frames(25, seed=5)
  (whole,), last = [labels["objects"] for labels, _ in [sam.label(Clip(rgb))]], sam.label(Clip(rgb))[1]
  assert (
    len(np.unique(whole["track"])) >= 3 and set(whole["cls"]) <= {0, 2} and len(whole["rle"]) == len(whole["frame"])
  )
  same_in_pieces(sam, rgb, (1, 9, 8, 7), whole, last, tmp_path)
  # what the table says is what the masks are
  masks = rle.decode(whole["rle"], H, W)
  np.testing.assert_array_equal(np.stack([whole[k] for k in ("x0", "y0", "x1", "y1")], 1), rle.boxes_of(masks))
  s = sam.settings()
  assert json.loads(json.dumps(s)) == s and s["detector"]["name"] == "told"
  with pytest.raises(UserError, match="begin again"):
    sam.label(Clip(rgb[:, :, :20]), last)


def test_boxes_join_only_where_nobody_is(tmp_path):
  save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", max_objects=3)
  there = np.zeros((1, H, W), bool)
  there[0, 6:25, 5:30] = True
  rows = np.c_[np.concatenate([BOXES, LATE[:, :4], [[60, 1, 70, 9]]]), [0.9, 0.3, 0.5, 0.4]].astype(np.float32)
  new = sam._new(rows, there, room=2)
  np.testing.assert_array_equal(
    new[:, 4], np.float32([0.5, 0.4])
  )  # not who is there; best first; as many as there is room


def test_rle_round_trip():
  r = np.random.default_rng(0)
  masks = r.uniform(size=(6, 33, 47)) > np.array([0.5, 0.1, 0.9, 2, -1, 0.99])[:, None, None]
  counts = rle.encode(masks)
  np.testing.assert_array_equal(rle.decode(counts, 33, 47), masks)
  np.testing.assert_array_equal(rle.decode(counts[2], 33, 47), masks[2])
  assert (
    [rle.total(c) for c in counts] == [33 * 47] * 6
    and rle.encode(masks[:0]) == []
    and rle.decode([], 3, 4).shape == (0, 3, 4)
  )
  assert np.isnan(rle.boxes_of(masks[3:4])).all() and rle.boxes_of(masks[4:5]).tolist() == [[-0.5, -0.5, 46.5, 32.5]]
  for bad in (counts[0], "", "~~~~", "0"):
    with pytest.raises(UserError, match="run lengths"):
      rle.decode(bad, 10, 10)


def test_bad_input_is_named(tmp_path):
  save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu")
  assert sam.checkpoint_hash == hash_weights(tmp_path)
  with pytest.raises(UserError, match="has no area"):
    sam.track_objects(frames(2), np.array([[5, 5, 5, 9]]))
  with pytest.raises(UserError, match="boxes of shape"):
    sam.track_objects(frames(2), np.zeros((2, 3)))
  with pytest.raises(UserError, match="frame 1 is uint8 of shape"):
    sam.track_objects([frames(1)[0], frames(1)[0, :, :9]], BOXES)
  with pytest.raises(UserError, match="nobody to tell it"):
    sam.prepare(H, W)
  (tmp_path / "sam2.1_hiera_tiny.pt").touch()
  with pytest.raises(UserError, match="of the sam2 package"):
    SAM2VideoWrapper("t", ENTRY, tmp_path / "sam2.1_hiera_tiny.pt", device="cpu")
  masks, ids, scores = sam.track_objects(frames(3))  # nobody to follow
  assert masks.shape == (3, 0, H, W) and len(ids) == 0 and scores.shape == (3, 0)
