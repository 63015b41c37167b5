"""Depth from the road plane: rows against the geometry written down, boxes that stand on it, and a store."""

import numpy as np
import pytest
from label_fixture import LABELS, write_store

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
from openpilot.tools.fair.labels.agree import Boxes
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.labels import plane
from openpilot.tools.fair.labels.plane import BELOW, plane_depth, plane_map, tilts_of
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import STREET as STREET_FILE
from openpilot.tools.fair.spec import street_classes
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import MAP_H, MAP_W

STREET = street_classes()
ROAD, PAINT, CAR, SKY = (STREET.maps.index(n) for n in ("road", "marking", "vehicle", "sky"))
F, CY = medmodel_intrinsics[1, 1], medmodel_intrinsics[1, 2]


def boxes(*rows):
  a = np.array(rows, np.float32).reshape(-1, 4)
  return Boxes(a, np.full(len(a), STREET.boxes.index("vehicle")), np.ones(len(a), np.float32))


@pytest.mark.parametrize("height", [1.0, 1.22, 2.0])
def test_the_road_lies_where_the_plane_is(height):
  cls = np.full((MAP_H, MAP_W), SKY)
  cls[20:, :] = ROAD
  cls[30:, 60:64] = PAINT
  got = plane_map(STREET, cls, boxes(), height)
  y = 4 * np.arange(MAP_H) + 1.5  # a map pixel's center
  want = np.where((np.arange(MAP_H) >= 20) & (y - CY >= BELOW), height * F / np.maximum(y - CY, 1), np.nan)
  np.testing.assert_allclose(got, np.repeat(want[:, None], MAP_W, 1), rtol=1e-3)  # float16
  # a point on the road at that distance is seen in that row
  assert CY + F * height / float(got[40, 3]) == pytest.approx(y[40], abs=0.1)


def test_what_stands_on_the_road_is_as_far_as_where_it_stands():
  cls = np.full((MAP_H, MAP_W), ROAD)
  cls[10:30, 20:40] = CAR
  cls[10:40, 30:50] = CAR
  far, near, cut = (80, 40, 160, 120), (120, 40, 200, 160), (300, 40, 400, 256)
  cls[10:, 75:100] = CAR
  got = plane_map(STREET, cls, boxes(near, far, cut), DEFAULT_HEIGHT).astype(np.float32)
  np.testing.assert_allclose(got[12:28, 21:29], plane_depth(120, DEFAULT_HEIGHT), rtol=1e-3)
  np.testing.assert_allclose(got[12:38, 31:49], plane_depth(160, DEFAULT_HEIGHT), rtol=1e-3)  # the nearer one hides
  assert np.isnan(got[12:60, 76:99]).all()  # stands below the picture: not known where
  assert np.isnan(plane_depth(CY + BELOW - 1, 1.0)) and np.isfinite(plane_depth(CY + BELOW + 0.01, 1.0))
  assert np.isnan(got[12, 5]) and np.isfinite(got[60, 5])  # near the horizon a little pitch is all the distance


def test_a_class_without_a_box_is_not_known():
  cls = np.full((MAP_H, MAP_W), CAR)
  assert np.isnan(plane_map(STREET, cls, boxes(), 1.2)).all()


@pytest.mark.parametrize("degrees", [-8.0, 2.5, 8.0])
def test_a_view_that_looks_down_or_up_sees_the_plane_there(degrees, rng):
  """Points on the road, turned into the view's axes and seen by its lens."""
  t, height, z = np.radians(degrees), 1.4, rng.uniform(4, 40, 50)
  ahead, down = z * np.cos(t) + height * np.sin(t), height * np.cos(t) - z * np.sin(t)
  got = plane_depth(CY + F * down / ahead, height, t)
  sure = F * height / ahead >= BELOW
  np.testing.assert_allclose(got[sure], ahead[sure], rtol=1e-9)
  assert np.isnan(got[~sure]).all() and sure.any()


def test_which_segments_are_tilted_is_said_by_name():
  names = ["low-a--0", "low-b--0", "high--0"]
  assert tilts_of(["low*=5", "low-b*=-2.5"], names) == pytest.approx(
    {"low-a--0": np.radians(5), "low-b--0": np.radians(-2.5)}
  )
  for item, said in (("low*", "write SEGMENTS=DEGREES"), ("low*=40", "from -15 to 15"), ("no*=3", "fits none of")):
    with pytest.raises(UserError, match=said):
      tilts_of([item], names)


def test_tilted_segments_are_learned_from_beside_others(tmp_path, monkeypatch, capsys):
  """The road in both, at other distances, and one run learns from both."""
  write_store(tmp_path / "s", ("level", "low"), 4, "agreed", LABELS[1:3])
  road = ["--classes", str(STREET_FILE.with_name("road.yaml"))]
  monkeypatch.setattr("sys.argv", ["plane", str(tmp_path / "s"), *road, "--tilt", "low*=5"])
  plane.main()
  assert capsys.readouterr().out == "road-plane: 2 segments, 8 frames\n"
  assert len(Clips(tmp_path / "s", ["depth"], 1)) == 8
  found = {
    s: there["road-plane"].row("depth", 0).reshape(MAP_H, MAP_W)[60, 0]
    for s, there in LabelStore(tmp_path / "s").by_segment({"road-plane"}).items()
  }
  want = {s: float(plane_depth(241.5, DEFAULT_HEIGHT, t)) for s, t in (("level--0", 0.0), ("low--0", np.radians(5)))}
  assert found == pytest.approx(want, rel=1e-3)
