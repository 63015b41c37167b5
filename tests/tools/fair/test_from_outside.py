"""What a package from outside adds, without a file of ours edited: a source of pictures and a picture format."""

import sys

import numpy as np
import pytest

from openpilot.tools.fair.labels import import_labels, label, loading
from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.sources import source
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib import pictures
from openpilot.tools.lib.errors import cli

PACKAGE = '''
import numpy as np

from openpilot.tools.fair.labels.sources import register_source
from openpilot.tools.fair.labels.sources.pictures import Carries, Pictures, Still, look_at
from openpilot.tools.fair.labels.sources.source import Said
from openpilot.tools.lib.pictures import register_format


def read_dots(path):
  """Rows of letters: darker from a to z."""
  rows = [[(ord(c) - ord("a")) * 10 for c in line] for line in path.read_text().split()]
  gray = np.array(rows, np.uint8)
  return np.repeat(gray[..., None], 3, 2)


class DotsWithCorners(Pictures):
  """Each picture's name says where its box is: x0_y0_x1_y1, pixels counted from the corner."""

  def said(self, row):
    corners = [float(v) for v in self.stills[row].path.stem.split("_")]
    return Said(np.array([corners]) - 0.5, np.zeros(1, np.int64))


class Dots:
  says = "a folder of dots"

  def accepts(self, path, options):
    return path.endswith(".dotset")

  def open(self, paths, options):
    from pathlib import Path
    parts = []
    for p in map(Path, paths):
      stills = look_at([(f, f.name, None) for f in sorted(p.iterdir())], str(p))
      parts.append(DotsWithCorners(options.name or p.stem, p, stills, "CC0-1.0", Carries(boxes=("frog",))))
    return parts


register_format(".dots", read_dots)
register_source("dots", Dots())
'''


class Brightness:
  """A teacher that says how bright a picture is."""

  name, model_id, checkpoint_hash, license, stateful = "brightness", "", "", "MIT", False

  def prepare(self, height, width):
    self.labels = [Label("features", "dense", "float16", (1, 1, 1), "features")]

  def settings(self):
    return {}

  def label(self, clip, state=None):
    return {"features": clip.rgb.astype(np.float32).mean(axis=(1, 2, 3)).reshape(-1, 1, 1, 1)}, state


@pytest.fixture
def package(tmp_path, monkeypatch):
  """Named in FAIR_PLUGINS, as a user would; what it registers is taken out again."""
  (tmp_path / "lib").mkdir()
  (tmp_path / "lib" / "dots_of_mine.py").write_text(PACKAGE)
  monkeypatch.syspath_prepend(tmp_path / "lib")
  monkeypatch.setenv("FAIR_PLUGINS", "dots_of_mine")
  tables = [source.SOURCES, pictures.FORMATS]
  before = [dict(t) for t in tables]
  yield tmp_path
  for table, was in zip(tables, before, strict=True):
    table.clear()
    table.update(was)
  sys.modules.pop("dots_of_mine", None)


def run(monkeypatch, main, *words):
  monkeypatch.setattr("sys.argv", ["x", *map(str, words)])
  assert cli(main)() == 0


def test_a_source_and_a_format_are_labeled_imported_and_read_back(package, monkeypatch, capsys):
  folder = package / "pond.dotset"
  folder.mkdir()
  (folder / "1_1_3_2.dots").write_text("\n".join(["kkkk"] * 4))  # 4x4 of 100
  (folder / "0_2_8_4.dots").write_text("\n".join(["uuuuuuuu"] * 4))  # 8x4 of 200
  (folder / "3_3_4_4.dots").write_text("kk\nk")  # rows that differ
  monkeypatch.setattr(loading, "load_teacher", lambda *_, **__: Brightness())
  more = ("--output", package / "s", "--size", "64x64", "--name", "pond")
  run(monkeypatch, label.main, folder, "--teachers", "brightness", *more)
  run(monkeypatch, import_labels.main, folder, *more)
  said = capsys.readouterr()
  assert "1 of 3 pictures are left out" in said.err and "3_3_4_4.dots cannot be read" in said.err
  assert "2 pictures; 2 boxes (frog 2)" in said.out and "license CC0-1.0" in said.out
  store = LabelStore(package / "s")
  assert sorted(g.teacher for g in store.groups()) == ["brightness", "frames", "pond"]
  (group,) = store.groups("pond")
  assert group.input == InputSpec("rgb", 64, 64) and group.label("objects").classes == ("frog",)
  items = list(LabelDataset(package / "s", ["frames/frame", "pond/objects", "brightness/features"]))
  # sorted by name: 8x4 fills the upper half of 64x64, 4x4 all of it
  wide, square = items
  assert (wide["frames/frame"][:, :32] == 200).all() and (wide["frames/frame"][:, 32:] == 114).all()
  assert (square["frames/frame"] == 100).all()
  assert wide["brightness/features"].item() == 157 and square["brightness/features"].item() == 100
  for item, want in ((wide, (0, 16, 64, 32)), (square, (16, 16, 48, 32))):
    got = [item["pond/objects"][k].item() for k in ("x0", "y0", "x1", "y1")]
    np.testing.assert_allclose(got, np.array(want) - 0.5, atol=1e-3)
