"""Pictures with class maps become a label store that a student can learn from and be judged on."""

import sys

import numpy as np
import pytest
from PIL import Image

from openpilot.selfdrive.modeld.fair.frames import unpack_rgb
from openpilot.tools.fair.distillation.batch import Batches
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.labels import images
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.students.classes import SEGMENTATION
from openpilot.tools.lib.errors import UserError

CLASSES = "sky,road,car"


@pytest.fixture
def folder(tmp_path):
  """Two 480x360 pictures: sky above, road below, a car that is red; ids 3 and up are unknown."""
  for kind in ("images", "ids"):
    (tmp_path / kind).mkdir()
  for k in range(2):
    rgb, ids = np.full((360, 480, 3), (90, 120, 200), np.uint8), np.zeros((360, 480), np.uint8)
    rgb[180:], ids[180:] = 80, 1
    rgb[150:210, 100 + 100 * k : 200 + 100 * k], ids[150:210, 100 + 100 * k : 200 + 100 * k] = (230, 20, 20), 2
    ids[300:] = 11
    Image.fromarray(rgb).save(tmp_path / "images" / f"{k}.png")
    Image.fromarray(ids).save(tmp_path / "ids" / f"{k}.png")
  return tmp_path


def run(monkeypatch, folder, *more):
  argv = ["import-images", folder / "images", folder / "ids", "--classes", CLASSES, "--name", "toy", "--licence", "MIT", "--out", folder / "s", *more]
  monkeypatch.setattr(sys, "argv", list(map(str, argv)))
  images.main()


def test_pictures_and_classes_agree(folder, monkeypatch):
  run(monkeypatch, folder)
  run(monkeypatch, folder)  # again: nothing to do
  assert len(LabelStore(folder / "s").groups()) == 2
  clips = Clips(folder / "s", ["segmentation"], 1)
  batch = Batches(clips, 0, False)[(0, [0, 1], False)]
  assert batch["valid"].all()
  for k in range(2):
    p = batch["segmentation"][k].numpy()
    red = unpack_rgb(batch["frame"][k].numpy())[1::4, 1::4]
    car = (red[..., 0].astype(int) - red[..., 2]) > 100
    found = p[SEGMENTATION.index("vehicle")] > 0.5
    assert (car & found).sum() / (car | found).sum() > 0.93  # but for the edge
    # 480x360 is scaled by 512/480 and cut to the middle 256 rows: ids 11 begin at row 300 * 16/15 - 64 = 256: just outside
    assert p.sum(0).min() == 1 and p[SEGMENTATION.index("background"), 0].all() and p[SEGMENTATION.index("road"), -1].all()


def test_what_has_no_class_is_unknown(folder, monkeypatch):
  run(monkeypatch, folder, "--cut", 1)
  p = Batches(Clips(folder / "s", ["segmentation"], 1), 0, False)[(0, [0], False)]["segmentation"][0].numpy()
  assert (p[:, -16:] == 0).all() and p[:, 0].sum() == 128


def test_bad_input_is_said(folder, monkeypatch):
  (folder / "ids" / "1.png").unlink()
  with pytest.raises(UserError, match=r"1 of 2 pictures have no class map"):
    run(monkeypatch, folder)
  assert not (folder / "s").exists()
  Image.new("RGB", (480, 360)).save(folder / "ids" / "1.png")
  with pytest.raises(UserError, match="mode RGB"):
    run(monkeypatch, folder)
  with pytest.raises(UserError, match="no pictures"):
    monkeypatch.setattr(sys, "argv", ["x", str(folder / "nowhere"), "x", "--classes", "a", "--name", "a", "--licence", "MIT", "--out", str(folder / "t")])
    images.main()
