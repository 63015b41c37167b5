"""What is drawn over frames, by its pixels."""

from types import SimpleNamespace

import av
import numpy as np
import pyarrow as pa
import pytest

from openpilot.tools.fair.labels import browse, rle
from openpilot.tools.fair.labels.video import Painter
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.colors import track_color


def painted(labels, tables=None, rows=None, row=0):
  """Over black, at twice the size of a 512x256 view. -> (512, 1024, 3) int."""
  group = SimpleNamespace(labels=labels, input=InputSpec(), teacher="mine", n=2)
  group.table = lambda name: pa.table(tables[name])
  group.row = lambda name, r: rows[name]
  picture, insets = Painter(group).paint(np.zeros((512, 1024, 3), np.uint8), row)
  assert insets == []
  return picture.astype(int)


def test_probabilities_are_tinted_one_color_each():
  """In this order, at most 45% of it; pixels are rounded down."""
  labels = [Label(f"p{k}", "dense", "float16", (64, 128), "probability") for k in range(4)]
  rows = {x.name: np.zeros((64, 128), np.float16) for x in labels}
  for k, x in enumerate(labels):
    rows[x.name][:, 32 * k : 32 * k + 32] = 1
  out = painted(labels, rows=rows)
  for k, color in enumerate([(70, 110, 255), (255, 220, 0), (255, 60, 60), (60, 230, 90)]):
    off = out[300, 256 * k + 128] - 0.45 * np.array(color)
    assert (off > -1 - 1e-9).all() and (off < 1e-9).all()


def line(track, x, y):
  n = len(x)
  return {
    "row": np.ones(n, np.int64),
    "track": np.full(n, track),
    "x": np.array(x, np.float32),
    "y": np.array(y, np.float32),
    "road_x": np.zeros(n, np.float32),
    "visible": np.ones(n, bool),
  }


def test_a_lane_line_is_a_line_and_one_point_of_it_a_circle():
  """The view's pixel 99.5, 49.5 is the picture's 200, 100. A circle of six picture pixels is drawn about one point."""
  labels, black = [Label("lines", "points", unit="px")], (0, 0, 0)
  for x, on, off in (
    ([99.5, 199.5], [(100, 200), (100, 300), (100, 400)], [(94, 200), (106, 200), (94, 400)]),
    ([99.5], [(94, 200), (106, 200), (100, 194), (100, 206)], [(100, 200), (100, 210), (100, 300)]),
  ):
    table = line(5, x, [49.5] * len(x))
    out = painted(labels, {"lines": table}, row=1)
    assert all(tuple(out[p]) == track_color(5) for p in on) and all(tuple(out[p]) == black for p in off)
    assert not painted(labels, {"lines": table}, row=0).any()


def test_a_mask_tints_its_own_pixels():
  """Two by two of each of a mask that is half as large, 110 of 255; the box is elsewhere."""
  mask = np.zeros((1, 256, 512), bool)
  mask[0, :30, :50] = mask[0, 200:, 450:] = True
  box = dict(zip(("x0", "y0", "x1", "y1"), np.float32([[200], [100], [260], [140]]), strict=True))
  table = {"row": [0], **box, "score": np.ones(1, np.float32), "cls": [0], "track": [3], "rle": rle.encode(mask)}
  out = painted([Label("objects", "boxes", shape=(256, 512), unit="px", classes=("car",))], {"objects": table})
  want = mask[0].repeat(2, 0).repeat(2, 1)[..., None] * np.array(track_color(3)) * 110 / 255
  elsewhere = np.ones((512, 1024), bool)
  elsewhere[180:290, 390:530] = False  # the box and its name
  assert np.abs(out - want)[elsewhere].max() <= 1


def test_an_oriented_box_is_drawn_turned():
  """A square of 80 on its corner: its sides are lines, and the upright box around it is not drawn."""
  r = 40 * 2**0.5
  box = {"x0": 250 - r, "y0": 130 - r, "x1": 250 + r, "y1": 130 + r, "score": 1, "cx": 250, "cy": 130, "w": 80, "h": 80}
  table = {k: np.float32([v]) for k, v in {**box, "angle": np.pi / 4}.items()} | {"row": [0], "cls": [0]}
  out = painted([Label("oriented", "boxes", unit="px", classes=("car",))], {"oriented": table})
  at = (np.array([[250 - r / 2, 130 - r / 2], [250 + r / 2, 130 + r / 2]]) + 0.5) * 2  # in the middle of two sides
  for x, y in at.round().astype(int):
    assert out[y - 2 : y + 3, x - 2 : x + 3].max() > 0
  right, low = round((250 + r + 0.5) * 2), round((130 + r + 0.5) * 2)
  assert not out[low - 8 : low + 3, right - 8 : right + 3].any()


@pytest.mark.parametrize("every, fps", [(1, 20), (4, 5), (50, 1)])
def test_a_video_of_labels_is_whole_and_as_fast_as_the_route(tmp_path, monkeypatch, every, fps):
  frames = [np.full((64, 97, 3), v, np.uint8) for v in (40, 120, 200)]
  f = SimpleNamespace(meta={"every": every})
  monkeypatch.setattr(browse, "drawn", lambda *_: iter([(f, p) for p in frames]))
  assert browse.render(None, None, None, tmp_path / "x.mp4", None) == 3
  with av.open(str(tmp_path / "x.mp4")) as video:
    stream = video.streams.video[0]
    assert (stream.width, stream.height, stream.average_rate) == (96, 64, fps)
    got = [x.to_ndarray(format="rgb24").mean() for x in video.decode(stream)]
  assert got == pytest.approx([40, 120, 200], abs=4)


def test_a_video_of_nothing_says_what_was_wrong(tmp_path, monkeypatch):
  def nothing(*_):
    raise ValueError("no labels")
    yield

  monkeypatch.setattr(browse, "drawn", nothing)
  with pytest.raises(ValueError, match="no labels"):
    browse.render(None, None, None, tmp_path / "x.mp4", None)
  assert list(tmp_path.iterdir()) == []
