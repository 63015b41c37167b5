"""Large pictures in tiles: where they are cut, what boxes become, and results put together."""

import dataclasses

import cv2
import numpy as np
import oriented_fixture as made
import pytest
from PIL import Image

from openpilot.selfdrive.modeld.fair.heads.oriented import corners, le90
from openpilot.tools.fair.images import train_obb
from openpilot.tools.fair.images.oriented import orient
from openpilot.tools.fair.images.predict import Found, Predictor
from openpilot.tools.fair.images.geometry import cut
from openpilot.tools.fair.images.tiles import Tiled, cut_boxes, merged, starts, windows
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.rotated import rotated_iou
from openpilot.tools.lib.errors import UserError


def devkit(length, side, gap):
  """The loop of DOTA_devkit's ImgSplit."""
  out, left = [], 0
  while left < length:
    if left + side >= length:
      left = max(length - side, 0)
    out.append(left)
    if left + side >= length:
      break
    left += side - gap
  return out


def test_tiles_begin_where_the_devkit_s_do(rng):
  assert starts(2000, 1024, 200) == [0, 824, 976] and starts(1024, 1024, 200) == starts(300, 1024, 200) == [0]
  for _ in range(50):
    length, side = int(rng.integers(1, 5000)), int(rng.integers(64, 1500))
    gap = int(rng.integers(0, side))
    assert starts(length, side, gap) == devkit(length, side, gap)
  assert windows(300, 90, 128, 28) == [(0, 0, 128, 90), (100, 0, 128, 90), (172, 0, 128, 90)]


def test_clipping_is_opencv_s(rng):
  for _ in range(40):
    box = np.array([[*rng.uniform(0, 100, 2), *rng.uniform(5, 80, 2), rng.uniform(-3, 3)]])
    got = cut(corners(box)[0] - [20, 30], 70, 40) + [20, 30]
    window = np.array([[20, 30], [90, 30], [90, 70], [20, 70]], np.float32)
    want, _ = cv2.intersectConvexConvex(corners(box)[0].astype(np.float32), window)
    mine = abs(cv2.contourArea(got.astype(np.float32))) if len(got) else 0.0
    assert mine == pytest.approx(want, abs=0.05) and (got >= [20 - 1e-9, 30 - 1e-9]).all()
    assert (got <= [90 + 1e-9, 70 + 1e-9]).all()


def test_boxes_are_cut_and_say_how_much_is_left():
  """At a window's right edge, at x 100: a quarter, half, and all of a box is inside, and nothing of the last."""
  boxes = np.array([[110, 50, 40, 10, 0], [100, 20, 40, 10, 0], [70, 70, 40, 10, np.pi / 4], [130, 50, 40, 10, 0]])
  got, rows, shares = cut_boxes(boxes.astype(float), (10, 5, 90, 90))
  assert rows.tolist() == [0, 1, 2]
  np.testing.assert_allclose(shares, [0.25, 0.5, 1], atol=1e-9)
  want = le90([[85, 45, 10, 10, 0], [80, 15, 20, 10, 0], [60, 65, 40, 10, np.pi / 4]])
  np.testing.assert_allclose(rotated_iou(got, want).diagonal(), 1, atol=1e-6)
  # a box at 45 degrees whose end is cut off straight: five corners, which stay, in the least rectangle around them
  turned = np.array([[88.0, 50, 40, 10, np.pi / 4]])
  (piece,), _, (share,) = cut_boxes(turned, (0, 0, 100, 100))
  left = cut(corners(turned)[0], 100, 100)
  assert len(left) == 5 and 0.85 < share < 1
  assert cv2.minAreaRect(left.astype(np.float32))[1][0] * cv2.minAreaRect(left.astype(np.float32))[1][1] == (
    pytest.approx(piece[2] * piece[3], rel=1e-4)
  )


def test_tiles_of_dota_are_pictures_of_their_own(tmp_path, capsys):
  """Pixels are the picture's, labels lie where they lay, and what is cut by 30% or more is difficult."""
  folder = tmp_path / "d"
  (folder / "images").mkdir(parents=True)
  (folder / "labelTxt").mkdir()
  rgb = np.random.default_rng(0).integers(0, 256, (100, 250, 3), np.uint8)
  Image.fromarray(rgb).save(folder / "images/a.png")
  boxes = np.array([[50, 50, 40, 10, 0.3], [128 + 4, 30, 40, 10, 0], [128 - 13, 70, 40, 10, 0]], float)
  lines = [f"{' '.join(f'{v:.4f}' for v in p)} ship 0" for p in corners(boxes).reshape(-1, 8)]
  (folder / "labelTxt/a.txt").write_text("\n".join(lines))
  (part,) = orient(open_sources([str(folder)], SourceOptions()))
  tiles = Tiled(part, 128, 28)
  assert [tiles.title(r) for r in range(3)] == ["a__0_0.png", "a__100_0.png", "a__122_0.png"]
  assert tiles.hash != part.hash and tiles.size(2) == (128, 100) and len(tiles.entries) == 3
  for (_, got), (x, y, w, h) in zip(tiles.read([0, 1, 2]), windows(250, 100, 128, 28), strict=True):
    np.testing.assert_array_equal(got, rgb[y : y + h, x : x + w])
  first, second, third = (tiles.said(r) for r in range(3))
  # in the first tile 16 of 40 pixels are left of the second box, 33 of the third
  assert first.difficult.tolist() == [False, True, False]
  want = np.array([[50, 50, 40, 10, 0.3], [120, 30, 16, 10, 0], [111.5, 70, 33, 10, 0]])
  np.testing.assert_allclose(rotated_iou(first.oriented + [0.5, 0.5, 0, 0, 0], want).diagonal(), 1, atol=1e-4)
  assert second.difficult.tolist() == [False, False] and third.difficult.tolist() == [False, True]
  moved = np.array([[32, 30, 40, 10, 0], [17.5, 70, 35, 10, 0]])
  np.testing.assert_allclose(rotated_iou(second.oriented + [0.5, 0.5, 0, 0, 0], moved).diagonal(), 1, atol=1e-4)


def test_what_tiles_find_twice_is_told_once(rng):
  boxes = np.array([[50, 50, 40, 10, 0.3], [51, 50, 38, 10, 0.3], [51, 50, 38, 10, 0.3], [90, 50, 40, 10, 0.3]], float)
  scores, classes = np.array([0.5, 0.9, 0.4, 0.7]), np.array([0, 0, 1, 0])
  assert merged(boxes, scores, classes).tolist() == [1, 3, 2]
  assert merged(boxes[:0], scores[:0], classes[:0]).tolist() == []
  many = np.column_stack([rng.uniform(0, 200, (60, 2)), rng.uniform(5, 60, (60, 2)), rng.uniform(-2, 2, 60)])
  score, cls = rng.random(60), rng.integers(0, 2, 60)
  kept: list[int] = []
  iou = rotated_iou(many, many)
  for i in np.argsort(-score):  # the rule, plainly
    if not any(iou[i, k] > 0.3 and cls[i] == cls[k] for k in kept):
      kept.append(int(i))
  assert merged(many, score, cls).tolist() == kept


def test_a_large_picture_is_searched_tile_by_tile(monkeypatch):
  """A student that sees the marked pixel of whatever it is shown finds each mark once, where it is."""
  rgb = np.zeros((200, 300, 3), np.uint8)
  marks = [(20, 30), (110, 90), (280, 190)]  # the second is in four tiles
  for x, y in marks:
    rgb[y, x] = 255

  class Sees(Predictor):
    tile, overlap = 128, 40

    def __init__(self):
      pass

    def whole(self, picture):
      y, x = np.nonzero(picture[..., 0])
      turned = np.column_stack([x + 0.5, y + 0.5, np.full(len(x), 20.0), np.full(len(x), 8.0), np.full(len(x), 0.4)])
      size = picture.shape[1], picture.shape[0]
      return Found(np.zeros((len(x), 4)), 0.5 + y / 1000, np.zeros(len(x), int), size, oriented=turned)

  (found,) = Sees()([rgb])
  centers = {tuple(np.round(b[:2] - 0.5).astype(int)) for b in found.oriented}
  assert centers == set(marks) and len(found.oriented) == 3 and found.size == (300, 200)
  assert (np.diff(found.scores) <= 0).all() and found.boxes.dtype == np.float32 and found.boxes.max() <= 300


@pytest.mark.parametrize("tile, overlap", [(10, 0), (128, 128), (128, -1)])
def test_tiles_that_cannot_be(tile, overlap, tmp_path):
  o = train_obb.Options(data=made.dota(tmp_path / "d", 1), output=tmp_path / "o", steps=1)
  with pytest.raises(UserError, match="--tile"):
    train_obb.check_options(dataclasses.replace(o, tile=tile, overlap=overlap))


@pytest.mark.slow
def test_training_on_tiles(tmp_path, capsys):
  """Pictures of 128x96 in tiles of 64: six each."""
  data = made.dota(tmp_path / "d", 2)
  more = {"size": "nano", "picture_size": 64, "batch_size": 3, "steps": 2, "workers": 0, "overlap": 16}
  train_obb.run(train_obb.Options(data=data, val=data, output=tmp_path / "o", tile=64, **more))
  assert "12 labeled" in capsys.readouterr().out
  with pytest.raises(UserError, match="a tile has at least 64 pixels"):
    Predictor(tmp_path / "o", tile=8)
  (found,) = Predictor(tmp_path / "o", 0.001, tile=64, overlap=16)([np.zeros((96, 128, 3), np.uint8)])
  assert found.size == (128, 96) and found.oriented is not None
