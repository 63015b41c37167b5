"""Pictures with class maps become a label store that a student can learn from and be judged on."""

import sys

import numpy as np
import pytest
from PIL import Image

from openpilot.selfdrive.modeld.fair.frames import unpack_rgb
from openpilot.tools.fair.distillation.batch import Batches
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.labels import import_images as images
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import InputSpec, road_classes

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.pictures import read_rgb

CLASSES = "sky,road,car"
MAPS = road_classes().maps


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


def run(monkeypatch, folder, *more, cut=("--cut", "0.5")):
  argv = [
    "import-images",
    folder / "images",
    folder / "ids",
    "--classes",
    CLASSES,
    "--name",
    "toy",
    "--license",
    "MIT",
    "--out",
    folder / "s",
    *cut,
    *more,
  ]
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
    found = p[MAPS.index("vehicle")] > 0.5
    assert (car & found).sum() / (car | found).sum() > 0.93  # but for the edge
    # 480x360 is scaled by 512/480 and cut to the middle 256 rows: ids 11 begin at row 300 * 16/15 - 64 = 256: just
    # outside
    assert p.sum(0).min() == 1 and p[MAPS.index("background"), 0].all() and p[MAPS.index("road"), -1].all()


def test_pictures_are_not_cut_unasked(folder, monkeypatch, capsys):
  """480x360 fits the 512x256 frame by its height: 341 pixels wide, the rest is padding, which counts nowhere."""
  run(monkeypatch, folder, cut=())
  assert "letterboxed: pictures are whole, and fill 67% of the frames" in capsys.readouterr().out
  store = LabelStore(folder / "s")
  (frames,), (said,) = store.groups("frames"), store.groups("toy")
  assert frames.input == said.input == InputSpec() and frames.picture_size(1) == (480, 360)
  picture = frame(folder)
  shown = read_rgb(folder / "images" / "0.png")
  # view pixel (x, y) shows the picture's ((x + 0.5) 45 / 32 - 0.5, ...)
  for x, y in ((10, 20), (300, 200), (338, 250), (104, 130)):
    at = shown[round((y + 0.5) * 45 / 32 - 0.5), round((x + 0.5) * 45 / 32 - 0.5)]
    np.testing.assert_allclose(picture[y, x], at, atol=6)
  np.testing.assert_allclose(picture[:, 345:], 114, atol=2)
  ids = said.read("segmentation", 0, 1)[0]
  assert ids.shape == (64, 128) and (ids[:, 86:] == 255).all() and (ids[0, :85] == 0).all()
  batch = Batches(Clips(folder / "s", ["segmentation"], 1), 0, False)[(0, [0, 1], False)]
  assert batch["valid"].shape == (2, 64, 128) and batch["valid"][..., :85].all() and not batch["valid"][..., 86:].any()
  # ids 11 of rows 300 and below have no name
  assert (ids[45, :10] == 1).all() and (ids[54:, :85] == 255).all()


def test_a_picture_of_the_views_proportions_is_as_it_ever_was(folder, monkeypatch):
  """Nothing would be cut of it: its store is that of --cut, byte for byte."""
  for kind in ("images", "ids"):
    for p in (folder / kind).iterdir():
      Image.open(p).crop((0, 60, 480, 300)).save(p)
  run(monkeypatch, folder, cut=())
  before = {p.name: p.read_bytes() for p in (folder / "s").rglob("*") if p.is_file()}
  run(monkeypatch, folder)
  assert {p.name: p.read_bytes() for p in (folder / "s").rglob("*") if p.is_file()} == before
  assert "input" not in LabelStore(folder / "s").groups("frames")[0].meta


def test_what_has_no_class_is_unknown(folder, monkeypatch):
  run(monkeypatch, folder, cut=("--cut", "1"))
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
    monkeypatch.setattr(
      sys,
      "argv",
      [
        "x",
        str(folder / "nowhere"),
        "x",
        "--classes",
        "road",
        "--name",
        "a",
        "--license",
        "MIT",
        "--out",
        str(folder / "t"),
      ],
    )
    images.main()


def frame(folder, i=0):
  (group,) = LabelStore(folder / "s").groups("frames")
  return unpack_rgb(group.read("frame", i, i + 1)[0])


def test_a_picture_that_exif_turns_is_turned(folder, monkeypatch):
  """A portrait is stored as a landscape with orientation 6; its class map is upright, as annotation tools show it."""
  upright, ids = Image.open(folder / "images" / "0.png"), Image.open(folder / "ids" / "0.png")
  run(monkeypatch, folder)
  want = frame(folder)
  exif = Image.Exif()
  exif[274] = 6  # turn by a quarter clockwise to look at it
  upright.transpose(Image.Transpose.ROTATE_90).save(folder / "images" / "0.png", exif=exif)
  assert Image.open(folder / "images" / "0.png").size == (360, 480) and ids.size == (480, 360)
  run(monkeypatch, folder)
  np.testing.assert_array_equal(frame(folder), want)


@pytest.mark.parametrize("white", [65535, 255])
def test_pictures_of_16_bits_are_scaled_not_clipped(folder, monkeypatch, white):
  gray = np.linspace(0, 1, 480)[None].repeat(360, 0)
  for k in range(2):
    Image.fromarray((gray * white).astype(np.uint16 if white > 255 else np.uint8)).save(folder / "images" / f"{k}.png")
  ids = np.asarray(Image.open(folder / "ids" / "0.png"))
  Image.fromarray(ids.astype(np.uint16)).save(folder / "ids" / "0.png")  # ids stay numbers
  run(monkeypatch, folder)
  np.testing.assert_allclose(frame(folder)[100, ::64, 0], np.linspace(0, 255, 512)[::64], atol=3)
  p = Batches(Clips(folder / "s", ["segmentation"], 1), 0, False)[(0, [0], False)]["segmentation"][0].numpy()
  assert p[MAPS.index("road"), -1].all()


def test_one_bad_picture_is_left_out_by_name_then_mended(folder, monkeypatch, capsys):
  whole = (folder / "images" / "1.png").read_bytes()
  (folder / "images" / "1.png").write_bytes(whole[: len(whole) // 2])
  run(monkeypatch, folder)
  err = capsys.readouterr().err
  assert "warning: 1 of 2 pictures are left out: " in err and "1.png cannot be read" in err
  assert len(Clips(folder / "s", ["segmentation"], 1)) == 1
  (folder / "images" / "1.png").write_bytes(whole)
  run(monkeypatch, folder)
  assert capsys.readouterr().out.count("replaced: ") == 2
  assert len(Clips(folder / "s", ["segmentation"], 1)) == 2 and len(LabelStore(folder / "s").groups()) == 2


def test_a_map_of_other_proportions_is_refused_by_name_and_the_store_stays_of_use(folder, monkeypatch, capsys):
  for k in range(2):
    Image.new("L", (480, 270)).save(folder / "ids" / f"{k}.png")
  with pytest.raises(
    UserError, match=r"0\.png is 480x360, its class map 480x270: other proportions, and 1 more; no picture is left"
  ):
    run(monkeypatch, folder)
  Image.open(folder / "images" / "0.png").resize((960, 720)).save(folder / "images" / "0.png")
  Image.new("L", (480, 360)).save(folder / "ids" / "0.png")  # half as large is no other part
  run(monkeypatch, folder)
  said = capsys.readouterr()
  assert "1 of 2 pictures are left out: 1.png is 480x360" in said.err
  assert "cut: 17% of the height above, 17% below" in said.out
  assert len(Clips(folder / "s", ["segmentation"], 1)) == 1


def test_two_pictures_of_one_map_and_names_that_are_none(folder, monkeypatch):
  Image.open(folder / "images" / "0.png").save(folder / "images" / "0.jpg")
  with pytest.raises(UserError, match=r"0\.jpg and 0\.png would both have the class map 0\.png"):
    run(monkeypatch, folder)
  (folder / "images" / "0.jpg").unlink()
  for name in ("../x", "/x", ".x", "", "a b", "frames", "simulator"):
    with pytest.raises(UserError, match="--name "):
      run(monkeypatch, folder, "--name", name)
  assert not (folder / "s").exists()


def test_any_class_is_kept_by_its_name(folder, monkeypatch):
  run(monkeypatch, folder, "--classes", "background,pothole")
  (said,) = LabelStore(folder / "s").groups("toy")
  assert said.label("segmentation").classes == ("background", "pothole")
  run(monkeypatch, folder, "--classes", "Sky, Road,unknown")
  p = Batches(Clips(folder / "s", ["segmentation"], 1), 0, False)[(0, [0], False)]["segmentation"][0].numpy()
  assert not p[MAPS.index("vehicle")].any() and (p.sum(0) == 0).any() and p[MAPS.index("road"), -1].all()


@pytest.mark.parametrize("case", ["exif90", "othersize", "mended"])
def test_real_cases(shared_data, tmp_path, monkeypatch, case):
  source = shared_data.parent / "cases" / "import-images" / case
  if not source.is_dir():
    pytest.skip(f"no {source}")
  words = [
    source / "images",
    source / "ann",
    "--classes",
    "background,road,lane,vehicle,pedestrian",
    "--name",
    "x",
    "--license",
    "MIT",
  ]
  monkeypatch.setattr(sys, "argv", ["import-images", *map(str, words), "--cut", "0.5", "--out", str(tmp_path / "s")])
  if case == "othersize":
    with pytest.raises(UserError, match=r"a\.png is .* other proportions"):
      images.main()
    return
  images.main()
  assert len(Clips(tmp_path / "s", ["segmentation"], 1)) == (1 if case == "exif90" else 24)
  shape = read_rgb(next((source / "images").iterdir())).shape
  assert shape == ((640, 480, 3) if case == "exif90" else (360, 480, 3))
