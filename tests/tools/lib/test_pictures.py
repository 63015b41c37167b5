"""Single pictures from files: turned, scaled, of a size that is looked at first, in formats that others may add."""

import numpy as np
import pytest
from PIL import Image

from openpilot.tools.lib import pictures
from openpilot.tools.lib.pictures import (
  PictureError,
  find_pictures,
  is_picture,
  picture_size,
  read_rgb,
  register_format,
)


def colors(h, w):
  y, x = np.mgrid[:h, :w]
  return np.stack([x * 255 // w, y * 255 // h, np.full((h, w), 90)], -1).astype(np.uint8)


# orientation -> how the file's rows and columns lie when it is shown, by the EXIF standard
SHOWN = {
  1: lambda a: a,
  2: lambda a: a[:, ::-1],
  3: lambda a: a[::-1, ::-1],
  4: lambda a: a[::-1],
  5: lambda a: a.transpose(1, 0, 2),
  6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
  7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
  8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", SHOWN)
def test_exif_turns(tmp_path, orientation):
  stored, exif = colors(20, 30), Image.Exif()
  exif[0x0112] = orientation
  Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
  want = SHOWN[orientation](stored)
  assert picture_size(tmp_path / "a.png") == want.shape[1::-1]
  np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), want)


@pytest.mark.parametrize(("value", "want"), [(0, 0), (128, 0), (129, 1), (32768, 128), (65535, 255)])
def test_16_bits_are_scaled_by_257(tmp_path, value, want):
  Image.fromarray(np.full((4, 5), value, np.uint16)).save(tmp_path / "a.png")
  assert (read_rgb(tmp_path / "a.png") == want).all()


def test_modes(tmp_path):
  rgba = np.dstack([colors(8, 8), np.full((8, 8), 7, np.uint8)])
  Image.fromarray(rgba).save(tmp_path / "a.png")
  np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), rgba[..., :3])
  Image.fromarray(rgba[..., 0] > 100).save(tmp_path / "b.png")
  assert set(np.unique(read_rgb(tmp_path / "b.png"))) == {0, 255}
  Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "c.tif")
  with pytest.raises(PictureError, match=r"c\.tif cannot be read \(a picture of floats"):
    read_rgb(tmp_path / "c.tif")


def test_what_is_no_picture_is_said(tmp_path, monkeypatch):
  (tmp_path / "a.png").write_bytes(b"no picture")
  # a program in PostScript, which some libraries run
  (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
  Image.fromarray(colors(60, 60)).save(tmp_path / "c.jpg")
  (tmp_path / "c.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:400])
  (tmp_path / "d.png").mkdir()
  for name in ("a.png", "b.png", "c.jpg", "d.png", "e.png"):
    with pytest.raises(PictureError, match=r"cannot be read|ordinary") as e:
      read_rgb(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value)
  Image.fromarray(colors(60, 60)).save(tmp_path / "f.png")
  monkeypatch.setattr(pictures, "MAX_PIXELS", 3599)
  for read in (read_rgb, picture_size):
    with pytest.raises(PictureError, match="60x60 is more than 0 million"):
      read(tmp_path / "f.png")


def test_a_folder_of_folders(tmp_path):
  for name in ("b/2.JPG", "b/1.png", "a.webp", ".hidden/3.png", "b/.4.png", "c.txt"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
  assert [str(p.relative_to(tmp_path)) for p in find_pictures(tmp_path)] == ["a.webp", "b/1.png", "b/2.JPG"]


def test_a_format_of_ones_own(tmp_path, monkeypatch):
  monkeypatch.setattr(pictures, "FORMATS", dict(pictures.FORMATS))
  assert not is_picture(tmp_path / "a.raw")
  register_format(".raw", lambda path: np.frombuffer(path.read_bytes(), np.uint16).reshape(2, 3))
  (tmp_path / "a.raw").write_bytes((np.arange(6, dtype=np.uint16) * 10000).tobytes())
  assert is_picture(tmp_path / "a.raw") and picture_size(tmp_path / "a.raw") == (3, 2)
  assert read_rgb(tmp_path / "a.raw")[..., 0].tolist() == [[0, 39, 78], [117, 156, 195]]
  (tmp_path / "a.raw").write_bytes(b"123")
  with pytest.raises(PictureError, match=r"a\.raw cannot be read"):
    read_rgb(tmp_path / "a.raw")
