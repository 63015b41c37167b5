"""Pictures of any kind as a source of labels: folders, videos, COCO, YOLO, class maps; whole, letterboxed, with the
data's own classes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from openpilot.selfdrive.modeld.fair.frames import unpack_rgb
from openpilot.tools.fair.distillation.augment import none
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.labels import Labels
from openpilot.tools.fair.evaluation.scenes import open_segments
from openpilot.tools.fair.labels import import_labels, label, loading, rle
from openpilot.tools.fair.labels.dataset import LabelDataset, Reader
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.placement import place_ids, place_picture
from openpilot.tools.fair.labels.sources import SourceOptions, find_source, open_sources
from openpilot.tools.fair.labels.sources.class_maps import read_palette
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec
from openpilot.tools.fair.tasks.objects import object_list
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.pictures import read_rgb
from openpilot.tools.lib.videowriter import VideoWriter

SPEC = InputSpec("rgb", 96, 128)


def ramp(h, w, seed=0):
  """Smooth, so that resampling by any sound rule agrees."""
  y, x = np.mgrid[:h, :w]
  return np.stack([x * 200 / w + seed, y * 200 / h, (x + y) * 100 / (h + w)], -1).round().astype(np.uint8)


def save(path: Path, array) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(array).save(path)
  return path


def run_import(monkeypatch, *words):
  monkeypatch.setattr("sys.argv", ["import", *map(str, words)])
  import_labels.main()


def columns(group, name="objects"):
  t = group.table(name)
  return {c: t[c].to_numpy() if c != "rle" else t[c].to_pylist() for c in t.column_names}


# *** placement ***


@pytest.mark.parametrize("size", [(640, 480), (1080, 1920), (50, 30), (333, 127)])
def test_a_pictures_place_is_that_of_the_specs_matrix(size):
  """Waves, whose phase says where each pixel comes from, to a fiftieth of a pixel: of x' = M x."""
  w, h = size
  spec = InputSpec("rgb", 256, 320)
  matrix = spec.fit(w, h)
  periods = [max(n / matrix[0, 0], n / 2) for n in (23, 29)]  # pixels of the picture

  def waves(x, y):
    return np.stack([127 + 100 * np.sin(2 * np.pi * a / n) for a, n in zip((x, y), periods, strict=True)], -1)

  y, x = np.mgrid[:h, :w].astype(np.float64)
  picture = np.dstack([waves(x, y), np.zeros((h, w))]).round().astype(np.uint8)
  placed = place_picture(picture, matrix, 320, 256, 114)
  inside = spec.covered(*size)
  assert (placed[~inside] == 114).all() and inside.sum() >= 320 * 256 * 0.4
  v, u = np.mgrid[:256, :320]
  at = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(matrix).T
  inner = inside & (at[..., 0] > 2) & (at[..., 0] < w - 3) & (at[..., 1] > 2) & (at[..., 1] < h - 3)
  error = placed[..., :2] - waves(at[..., 0], at[..., 1])
  for axis in range(2):
    slope = 100 * 2 * np.pi / periods[axis] / matrix[0, 0] * np.cos(2 * np.pi * at[..., axis] / periods[axis])
    shift = (error[..., axis] * slope)[inner].sum() / (slope**2)[inner].sum()
    assert abs(shift) < 0.02 and abs(error[..., axis][inner]).max() < 14


def test_nothing_is_cut_and_ids_lie_where_pixels_do():
  for w, h in ((640, 480), (31, 77), (1000, 999)):
    fit = SPEC.fit(w, h)
    ids = np.arange(h)[:, None] % 200 + np.zeros((1, w), int)
    placed = place_ids(ids.astype(np.uint8), fit, 128, 96, 255)
    inside = SPEC.covered(w, h)
    assert (placed[~inside] == 255).all() and (placed[inside] != 255).all()
    v = np.flatnonzero(inside[:, 0])
    assert placed[v, 0].tolist() == [int((i + 0.5) / fit[1, 1]) % 200 for i in v]
    across = place_ids(np.repeat(np.arange(w)[None] % 200, h, 0).astype(np.uint8), fit, 128, 96, 255)
    u = np.flatnonzero(inside[0])
    assert across[0, u].tolist() == [int((i + 0.5) / fit[0, 0]) % 200 for i in u]
    # the last pixels of the picture are there: what is not shown of it is less than a pixel of the input
    shown = inside.sum(1).max() / fit[0, 0], inside.sum(0).max() / fit[1, 1]
    assert w - shown[0] <= 0.5 / fit[0, 0] + 1e-9 and h - shown[1] <= 0.5 / fit[1, 1] + 1e-9


# *** folders and videos ***


class Middle:
  """Says that each picture's middle fifth is a box, and marks the left half of a map; what it saw is kept."""

  name, model_id, checkpoint_hash, license, stateful, sees, whole = "middle", "", "0", "MIT", False, "picture", False

  def __init__(self, stretches):
    self.stretches, self.seen, self.labels = stretches, [], []

  def picture_size(self, width, height):
    return (40, 40) if self.stretches else (width // 2, height // 2)

  def prepare(self, height, width):
    self.size = height, width
    self.labels = [
      Label("boxes", "boxes", unit="px", classes=("thing",)),
      Label("left", "dense", "float16", (height, width), "probability"),
    ]

  def settings(self):
    return {"size": list(self.size)}

  def label(self, clip, state=None):
    n, _, h, w = clip.rgb.shape
    self.seen += list(clip.rgb.transpose(0, 2, 3, 1))
    boxes = np.array([[0.4 * w, 0.4 * h, 0.6 * w, 0.6 * h]] * n) - 0.5
    table = {"frame": np.arange(n), **dict(zip(("x0", "y0", "x1", "y1"), boxes.T, strict=True))}
    left = np.full((n, h, w), 0.5, np.float16)
    left[..., : w // 2] = 1
    return {"boxes": {**table, "score": np.ones(n, np.float32), "cls": np.zeros(n, np.int16)}, "left": left}, state


@pytest.mark.parametrize("stretches", [False, True])
def test_teachers_see_pictures_whole_and_their_labels_lie_in_the_input(tmp_path, stretches):
  sizes = [(128, 96), (64, 96), (300, 100)]
  for i, (w, h) in enumerate(sizes):
    save(tmp_path / "shots" / f"{i}.png", ramp(h, w))
  parts = open_sources([str(tmp_path / "shots")], SourceOptions())
  store, teacher = LabelStore(tmp_path / "s", create=True), Middle(stretches)
  (frames,) = run_teacher(FrameTeacher(SPEC), parts, store, spec=SPEC)
  (group,) = run_teacher(teacher, parts, store, spec=SPEC)
  assert frames.input == group.input == SPEC and [frames.picture_size(r) for r in range(3)] == sizes
  assert frames.meta["teacher"]["license"] == "unstated" and frames.frames["name"].to_pylist()[1] == "1.png"
  for r, (w, h) in enumerate(sizes):
    scale = min(128 / w, 96 / h)
    shown = teacher.seen[r]
    # of the teacher's canvas the picture fills all, or the letterbox's part
    part = (40, 40) if stretches else (w * scale / 2, h * scale / 2)
    np.testing.assert_allclose(shown[1, 1], [200 / part[0], 200 / part[1], 0], atol=12)
    assert abs(int(shown[int(part[1]) - 2, int(part[0]) - 2, 0]) - 200) < 25
    # the box in the middle of the canvas is in the middle of the picture where it is stretched
    canvas = np.array([w * scale, h * scale]) if stretches else np.array([128, 96])
    want = np.concatenate([0.4 * canvas, 0.6 * canvas]) - 0.5
    want[2:] = np.minimum(want[2:], np.array([w, h]) * scale - 0.5)
    t = columns(group, "boxes")
    np.testing.assert_allclose([t[k][r] for k in ("x0", "y0", "x1", "y1")], want, atol=1e-3)
    left = group.row("left", r).astype(float)
    assert left.shape == (48, 64)
    middle = canvas[0] / 4  # of a map of half the input's size
    end = round(w * scale / 2) if stretches else 64  # beyond it, padding
    assert (left[4, : int(middle) - 2] == 1).all() and (left[4, int(middle) + 2 : end - 1] == 0.5).all()
    assert (left[4, end + 1 :] == 0).all() and (not stretches or (left[round(h * scale / 2) + 1 :] == 0).all())
    stored = frames.row("frame", r).transpose(1, 2, 0)
    np.testing.assert_array_equal(
      stored, place_picture(read_rgb(tmp_path / "shots" / f"{r}.png"), SPEC.fit(w, h), 128, 96, 114)
    )
  data = LabelDataset(tmp_path / "s", ["frames/frame", "middle/boxes"])
  assert len(data) == 3 and data[2]["frames/frame"].shape == (3, 96, 128) and len(data[2]["middle/boxes"]["x0"]) == 1
  # no still is a moment after another one, whatever --every is for videos
  assert (np.diff(frames.frames["frame_id"].to_numpy()) > 1).all()
  others = open_sources([str(tmp_path / "shots")], SourceOptions(every=2))
  (same,) = run_teacher(FrameTeacher(SPEC), others, store, every=2, spec=SPEC)
  assert same.path == frames.path and same.n == 3 and same.meta["every"] == 1


def test_a_plain_video_is_shown_whole(tmp_path):
  video = VideoWriter(tmp_path / "v.mp4", 160, 96, fps=10)
  for i in range(6):
    video.write(np.full((96, 160, 3), 30 * i + 40, np.uint8))
  video.close()
  (part,) = open_sources([str(tmp_path / "v.mp4")], SourceOptions(every=2))
  assert part.name == "v--0" and not part.still and [e.frame_id for e in part.entries] == [0, 2, 4]
  (frames,) = run_teacher(FrameTeacher(SPEC), [part], LabelStore(tmp_path / "s", create=True), spec=SPEC, every=2)
  gray = [frames.row("frame", r)[0, 30, 60] for r in range(3)]
  np.testing.assert_allclose(gray, [40, 100, 160], atol=4)
  assert (frames.row("frame", 0)[:, 78:] == 114).all()  # 160x96 in 128x96 is 77 high
  (tmp_path / "w.mp4").write_bytes((tmp_path / "v.mp4").read_bytes())
  assert [p.name for p in open_sources([str(tmp_path)], SourceOptions(name="x"))] == ["x-v--0", "x-w--0"]


def test_the_command(tmp_path, monkeypatch, capsys):
  for i in range(2):
    save(tmp_path / "d" / f"{i}.jpg", ramp(50, 80, i))
  (tmp_path / "d" / "torn.jpg").write_bytes((tmp_path / "d" / "1.jpg").read_bytes()[:300])
  teacher = Middle(False)
  monkeypatch.setattr(loading, "load_teacher", lambda *_, **__: teacher)
  words = ["label", tmp_path / "d", "--teachers", "middle", "--output", tmp_path / "s", "--size", "128x96"]
  monkeypatch.setattr("sys.argv", list(map(str, words)))
  label.main()
  said = capsys.readouterr()
  assert "1 of 3 pictures are left out: " in said.err and "torn.jpg cannot be read" in said.err
  (group,) = LabelStore(tmp_path / "s").groups("middle")
  assert group.row_count == 2 and group.input == SPEC and group.segment.endswith("-d--0")
  label.main()  # again: nothing to do
  assert len(teacher.seen) == 2
  teacher.stateful = True
  with pytest.raises(UserError, match="follows things from frame to frame"):
    label.main()


def test_what_a_path_is(tmp_path):
  options = SourceOptions()
  save(tmp_path / "d" / "a.png", ramp(8, 8))
  kinds = {"pictures": tmp_path / "d", "routes": tmp_path / "nowhere"}
  for name, path in kinds.items():
    assert type(find_source(str(path), options)).__name__ == {"pictures": "PictureFolders", "routes": "Routes"}[name]
  with pytest.raises(UserError, match="no source 'x'; there are pictures"):
    find_source("a", options, "x")
  with pytest.raises(UserError, match="no route at"):
    open_sources([str(tmp_path / "nowhere")], options)
  for a in ("p", "q"):
    save(tmp_path / a / "z" / "same" / "a.png", ramp(8, 8, len(a) + ord(a)))
  with pytest.raises(UserError, match="would both be 'z-same--0'"):
    open_sources([str(tmp_path / a / "z" / "same") for a in ("p", "q")], options)


def test_pictures_as_model_frames(tmp_path):
  """Whole in openpilot's frame, and what a teacher says of them in its pixels."""
  save(tmp_path / "d" / "a.png", np.full((200, 200, 3), (250, 0, 0), np.uint8))
  parts, spec = open_sources([str(tmp_path / "d")], SourceOptions(license="MIT")), InputSpec()
  store = LabelStore(tmp_path / "s", create=True)
  (frames,) = run_teacher(FrameTeacher(spec), parts, store, spec=spec)
  (group,) = run_teacher(Middle(True), parts, store, spec=spec)
  shown = unpack_rgb(frames.row("frame", 0))
  assert frames.input == spec and frames.meta["teacher"]["license"] == "MIT"
  np.testing.assert_allclose(shown[:, :254].reshape(-1, 3).mean(0), [250, 0, 0], atol=3)
  np.testing.assert_allclose(shown[:, 258:], 114, atol=2)
  t = columns(group, "boxes")
  want = np.array([0.4, 0.4, 0.6, 0.6]) * 256 - 0.5
  np.testing.assert_allclose([t[k][0] for k in ("x0", "y0", "x1", "y1")], want, atol=1e-3)
  clip = Clips(tmp_path / "s", ["detector"], 1, classes=ClassSet("x", (Class("thing", boxes=True),))).read(0)
  assert clip.valid[..., :256].all() and not clip.valid[..., 256:].any()


@pytest.mark.parametrize("sizes", [(0, 4), (4, -1), (4, 1 << 30)])
def test_a_store_with_pictures_of_no_size_is_said(tmp_path, sizes):
  save(tmp_path / "d" / "a.png", ramp(4, 4))
  (group,) = run_teacher(
    FrameTeacher(SPEC),
    open_sources([str(tmp_path / "d")], SourceOptions()),
    LabelStore(tmp_path / "s", True),
    spec=SPEC,
  )
  path = group.path / "frames.parquet"
  table = pq.read_table(path)
  for name, side in zip(("width", "height"), sizes, strict=True):
    table = table.set_column(table.column_names.index(name), name, pa.array([side]))
  pq.write_table(table, path)
  with pytest.raises(UserError, match="which is no picture's"):
    LabelStore(tmp_path / "s").groups()


# *** COCO ***


def coco(tmp_path, **more):
  """Two pictures, boxes of two classes, a polygon, run lengths; and all that is wrong in real ones."""
  save(tmp_path / "img" / "a.png", ramp(60, 80))
  save(tmp_path / "img" / "sub" / "b.png", ramp(100, 50))
  mask = np.zeros((100, 50), bool)
  mask[20:60, 10:30] = True
  runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel().astype(int), [0]]))).tolist()
  counts = np.diff([0, *runs, mask.size]).tolist()
  said = {
    "licenses": [{"id": 7, "name": "CC BY 4.0"}],
    "images": [
      {"id": "one", "file_name": "a.png", "width": 80, "height": 60, "license": 7},
      {"id": "two", "file_name": "sub/b.png", "width": 50, "height": 100, "license": 7},
      {"id": "gone", "file_name": "c.png", "width": 50, "height": 100},
      {"id": "out", "file_name": "../../secret.png", "width": 50, "height": 100},
    ],
    "categories": [{"id": 90, "name": "Pothole"}, {"id": 3, "name": "traffic cone"}],
    "annotations": [
      {"image_id": "one", "category_id": 3, "bbox": [10, 20, 30, 15]},
      {"image_id": "one", "category_id": 90, "segmentation": [[8, 8, 40, 8, 40, 24, 8, 24]]},
      {
        "image_id": "two",
        "category_id": 90,
        "bbox": [10, 20, 20, 40],
        "segmentation": {"size": [100, 50], "counts": counts},
      },
      {"image_id": "two", "category_id": 90, "bbox": [-5, 90, 20, 40]},
      {"image_id": "two", "category_id": 90, "bbox": [60, 90, 20, 40]},
      {"image_id": "two", "category_id": 90, "bbox": [0, 0, 0, 40]},
      {"image_id": "two", "category_id": 5, "bbox": [0, 0, 4, 40]},
      {"image_id": "three", "category_id": 90, "bbox": [0, 0, 4, 40]},
      {"image_id": "two", "category_id": 90, "bbox": [0, 0, 4, 40], "iscrowd": 1},
      {"image_id": "two", "category_id": 90, "segmentation": [[1, 2, 3, 4]]},
      {"image_id": "two", "category_id": 90, "segmentation": {"size": [100, 50], "counts": [7]}},
      {"image_id": "two", "category_id": 90, "bbox": [0, float("nan"), 4, 40]},
    ],
    **more,
  }
  (tmp_path / "all.json").write_text(json.dumps(said))
  return tmp_path / "all.json"


def test_coco(tmp_path, monkeypatch, capsys):
  words = ("--images", tmp_path / "img", "--name", "holes", "--output", tmp_path / "s", "--size", "128x96")
  run_import(monkeypatch, coco(tmp_path), *words)
  said = capsys.readouterr()
  for what in ("c.png is not in", "../../secret.png leads out of", "2 annotations with a box that is empty",
               "1 annotations of no category", "1 annotations of no picture", "1 regions of crowds are kept",
               "1 annotations with polygons of fewer", "1 annotations with a mask that is none",
               "1 annotations with a box that is none"):  # fmt: skip
    assert what in said.err, what
  assert (
    "2 pictures; 5 boxes with masks (Pothole 3, traffic cone 1, unknown 1)" in said.out
    and "license CC BY 4.0" in said.out
  )
  (group,) = LabelStore(tmp_path / "s").groups("holes")
  assert group.label("objects").classes == ("Pothole", "traffic cone", "unknown") and group.label("objects").shape == (
    96,
    128,
  )
  t = columns(group)
  assert t["cls"].tolist() == [1, 0, 0, 0, 2] and t["row"].tolist() == [0, 0, 1, 1, 1]
  # a: 80x60 by 1.6; b: 50x100 by .96
  want = [[16, 32, 64, 56], [12.8, 12.8, 64, 38.4], [9.6, 19.2, 28.8, 57.6], [0, 86.4, 14.4, 96],
          [0, 0, 3.84, 38.4]]  # fmt: skip
  np.testing.assert_allclose(np.stack([t[k] for k in ("x0", "y0", "x1", "y1")], 1), np.array(want) - 0.5, atol=1e-3)
  assert t["rle"][0] == t["rle"][3] == ""
  for i in (1, 2):
    mask = rle.decode(t["rle"][i], 96, 128)
    area = (want[i][2] - want[i][0]) * (want[i][3] - want[i][1])
    assert abs(mask.sum() / area - 1) < 0.06
    np.testing.assert_allclose(rle.boxes_of(mask[None])[0], np.array(want[i]) - 0.5, atol=1)
  # one edge moved: a new set of labels in place of the one before, and nothing else
  run_import(monkeypatch, coco(tmp_path), *words)
  assert "replaced" not in capsys.readouterr().out
  run_import(
    monkeypatch, coco(tmp_path, annotations=[{"image_id": "one", "category_id": 3, "bbox": [1, 2, 3, 4]}]), *words
  )
  assert capsys.readouterr().out.count("replaced: ") == 1
  assert len(LabelStore(tmp_path / "s").groups()) == 2


def test_a_crowd_teaches_nothing_where_it_is(tmp_path, monkeypatch, capsys):
  """What the losses are given: the one car, and the crowd's region as one to be left out; no warning that it is. In
  evaluation it is a place of which nothing is known."""
  path = coco(
    tmp_path,
    categories=[{"id": 3, "name": "car"}],
    annotations=[
      {"image_id": "one", "category_id": 3, "bbox": [10, 20, 30, 15]},
      {"image_id": "one", "category_id": 3, "bbox": [40, 0, 40, 30], "iscrowd": 1},
    ],
  )
  words = ("--images", tmp_path / "img", "--name", "cars", "--output", tmp_path / "s", "--size", "128x96")
  run_import(monkeypatch, path, *words)
  clips = Clips(tmp_path / "s", ["objects"], 1)
  assert clips.left_out() == []
  said = clips.read(0).said["objects"]
  a = object_list(none(clips.picture), said, said.values[0])
  np.testing.assert_allclose(a["boxes"], [[15.5, 31.5, 63.5, 55.5]], atol=1e-3)
  np.testing.assert_allclose(a["ignore"], [[63.5, -0.5, 127.5, 47.5]], atol=1e-3)
  compared = Compared(input=clips.picture)
  (segment,) = open_segments(tmp_path / "s", {"cars"}, [], wanted=clips.picture)
  scene = Labels(segment, "cars", Reader(), compared).scene(segment.ids[0])
  assert len(scene.objects) == 1 and compared.left_out == {}
  np.testing.assert_allclose(scene.unknown, a["ignore"])


def test_coco_of_another_size(tmp_path, monkeypatch, capsys):
  """Annotated on pictures of half the size; and turned by EXIF where the annotations are of the unturned one."""
  path = coco(tmp_path, images=[{"id": "one", "file_name": "a.png", "width": 40, "height": 30},
                                {"id": "two", "file_name": "sub/b.png", "width": 100, "height": 50}],
              annotations=[{"image_id": "one", "category_id": 3, "bbox": [10, 20, 10, 5]}])  # fmt: skip
  words = (path, "--images", tmp_path / "img", "--name", "x", "--output", tmp_path / "s", "--size", "128x96")
  with pytest.raises(UserError, match="does not say under which license"):
    run_import(monkeypatch, *words)
  run_import(monkeypatch, *words, "--license", "MIT")
  assert "sub/b.png is 50x100, its annotations are of 100x50" in capsys.readouterr().err
  t = columns(*LabelStore(tmp_path / "s").groups("x"))
  np.testing.assert_allclose([t[k][0] for k in ("x0", "y0", "x1", "y1")], np.array([32, 64, 64, 80]) - 0.5, atol=1e-3)


def test_a_polygon_that_ends_far_away_is_drawn_where_the_picture_is(tmp_path, monkeypatch):
  """Its edge's length would be memory."""
  far = [[10, 10, 1e13, 10, 1e13, 30, 10, 30]]
  path = coco(tmp_path, annotations=[{"image_id": "one", "category_id": 3, "segmentation": far}])
  words = (path, "--images", tmp_path / "img", "--name", "x", "--output", tmp_path / "s", "--size", "128x96")
  run_import(monkeypatch, *words)
  t = columns(*LabelStore(tmp_path / "s").groups("x"))
  mask = rle.decode(t["rle"][0], 96, 128)
  assert mask[20:44, 20:120].all() and not mask[:14].any() and t["x1"][0] == 127.5


@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("[]", "no COCO JSON"),
    ("{", "cannot read"),
    ('{"images": [], "categories": []}', "no categories"),
    ('{"images": [], "categories": [{"id": 1, "name": "a"}]}', "names no pictures"),
    ('{"images": [{"id": 1}], "categories": [{"id": 1, "name": "a"}]}', "an entry lacks 'file_name'"),
    ('{"images": [{"id": 1, "file_name": "x.png"}], "categories": [{"id": 1, "name": "a"}]}', "not beside it"),
  ],
)
def test_what_is_no_coco_is_one_line(tmp_path, monkeypatch, text, match):
  (tmp_path / "a.json").write_text(text)
  with pytest.raises(UserError, match=match) as e:
    run_import(monkeypatch, tmp_path / "a.json", "--name", "x", "--license", "MIT", "--output", tmp_path / "s")
  assert "\n" not in str(e.value) and not (tmp_path / "s").exists()


# *** YOLO ***


def yolo(tmp_path, data="names: {0: pothole, 7: Cone}\ntrain: images/train\nval: images/val\nlicense: MIT\n"):
  for split, name, size in (("train", "a", (80, 60)), ("train", "b", (50, 100)), ("val", "c", (64, 64))):
    save(tmp_path / "y" / "images" / split / f"{name}.png", ramp(*size[::-1], ord(name)))
    (tmp_path / "y" / "labels" / split).mkdir(parents=True, exist_ok=True)
  labels = tmp_path / "y" / "labels"
  (labels / "train" / "a.txt").write_text(
    "7 0.3125 0.458333333 0.375 0.25\n0 0.1 0.1 0.5 0.1 0.5 0.4 0.1 0.4\n\n3 .5 .5 .1 .1\n0 x\n"
  )
  (labels / "train" / "stray.txt").write_text("0 .5 .5 .1 .1\n")
  (labels / "val" / "c.txt").write_text("0 0.5 0.5 1.5 0.5\n0 .5 .5 0 .5\n")
  (tmp_path / "y" / "data.yaml").write_text(data)
  return tmp_path / "y"


def test_yolo(tmp_path, monkeypatch, capsys):
  run_import(monkeypatch, yolo(tmp_path), "--name", "y", "--output", tmp_path / "s", "--size", "128x96")
  said = capsys.readouterr()
  for what in ("1 of 2 pictures have no file of labels", "1 files of labels have no picture: stray.txt",
               "1 labels of a class that names does not have", "1 lines that are no box or polygon",
               "1 boxes that are empty"):  # fmt: skip
    assert what in said.err, what
  train, val = (LabelStore(tmp_path / "s").groups("y", f"y-{s}--0")[0] for s in ("train", "val"))
  assert train.label("objects").classes == ("pothole", "Cone") and train.meta["teacher"]["license"] == "MIT"
  t = columns(train)
  want = [[16, 32, 64, 56], [12.8, 9.6, 64, 38.4]]
  np.testing.assert_allclose(np.stack([t[k] for k in ("x0", "y0", "x1", "y1")], 1), np.array(want) - 0.5, atol=1e-3)
  assert t["cls"].tolist() == [1, 0] and t["rle"][0] == ""
  assert abs(rle.decode(t["rle"][1], 96, 128).sum() / (51.2 * 28.8) - 1) < 0.06
  t = columns(val)  # cut at the picture's border
  np.testing.assert_allclose([t[k][0] for k in ("x0", "y0", "x1", "y1")], np.array([0, 24, 96, 72]) - 0.5, atol=1e-3)


@pytest.mark.parametrize(
  ("data", "match"),
  [
    ("names: [a]\n", "names neither train nor val"),
    ("train: images/train\n", "describes no YOLO folder"),
    ("names: [a]\ntrain: /etc\n", "not below"),
    ("names: [a]\ntrain: ../../..\n", "not below|no such|there is no"),
    ("names: [a]\ntrain: images/none\n", "there is no"),
    ("names: {a: b}\ntrain: images/train\n", "names are a list"),
    ("names: &x [a]\ntrain: *x\n", "cannot read"),
  ],
)
def test_what_is_no_yolo_is_one_line(tmp_path, monkeypatch, data, match):
  words = (yolo(tmp_path, data), "--name", "x", "--license", "MIT", "--output", tmp_path / "s", "--source", "yolo")
  with pytest.raises(UserError, match=match) as e:
    run_import(monkeypatch, *words)
  assert "\n" not in str(e.value) and not (tmp_path / "s").exists()


# *** class maps ***

LAYOUTS = {  # picture, its map
  "same names": ("a.png", "a.png"),
  "CamVid's": ("0001TP_1.png", "0001TP_1_L.png"),
  "Cityscapes'": ("bern/x_leftImg8bit.png", "bern/x_gtFine_labelIds.png"),
  "nested pictures, flat maps": ("one/two/a.jpg", "a.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_class_maps(tmp_path, monkeypatch, layout):
  picture, annotation = LAYOUTS[layout]
  ids = np.zeros((30, 40), np.uint8)
  ids[10:20], ids[20:] = 1, 9
  save(tmp_path / "images" / picture, ramp(60, 80))
  save(tmp_path / "maps" / annotation, ids)
  words = (tmp_path / "images", "--annotations", tmp_path / "maps", "--classes", "sky,Pothole,unknown")
  run_import(monkeypatch, *words, "--name", "m", "--license", "MIT", "--output", tmp_path / "s", "--size", "128x96")
  (group,) = LabelStore(tmp_path / "s").groups("m")
  assert group.label("segmentation").classes == ("sky", "Pothole", "unknown")
  got = group.row("segmentation", 0)
  want = np.repeat(np.array([0, 1, 255], np.uint8), 32)[:, None].repeat(128, 1)
  assert got.shape == (96, 128)
  np.testing.assert_array_equal(got, want)


def test_class_maps_in_colors(tmp_path, monkeypatch, capsys):
  colors = np.zeros((60, 80, 3), np.uint8)
  colors[:20], colors[20:40], colors[40:] = (64, 32, 32), (255, 0, 0), (1, 2, 3)
  save(tmp_path / "images" / "a.png", ramp(60, 80))
  save(tmp_path / "maps" / "a.png", colors)
  (tmp_path / "palette.txt").write_text("# of CamVid's kind\n64 32 32\tRoad\n255 0 0  lane marking\n")
  assert read_palette("402020=Road, #FF0000=lane marking") == list(read_palette(str(tmp_path / "palette.txt")))
  words = (tmp_path / "images", "--annotations", tmp_path / "maps", "--name", "m", "--license", "MIT")
  more = ("--output", tmp_path / "s", "--size", "128x96")
  run_import(monkeypatch, *words, *more, "--palette", tmp_path / "palette.txt")
  assert "33.3% of the pixels have colors that --palette does not have (010203)" in capsys.readouterr().err
  (group,) = LabelStore(tmp_path / "s").groups("m")
  assert group.label("segmentation").classes == ("Road", "lane marking")
  assert group.row("segmentation", 0)[[0, 31, 32, 63, 64, 95], 0].tolist() == [0, 0, 1, 1, 255, 255]
  for wrong in ("zz0000=a", "ff0000", "ff0000=", "nowhere.txt"):
    with pytest.raises(UserError, match="--palette"):
      run_import(monkeypatch, *words, *more, "--palette", wrong)
  with pytest.raises(UserError, match="no pixel of its class maps"):
    run_import(monkeypatch, *words, *more, "--palette", "123456=a")
  with pytest.raises(UserError, match=r"mode RGB.*--palette"):
    run_import(monkeypatch, *words, *more, "--classes", "a,b")
