"""What two teachers agree on, on made-up streets, and the street's class set."""

import numpy as np
import pytest
import torch

from openpilot.tools.fair.distillation.augment import NONE
from openpilot.tools.fair.labels.agree import Boxes, agreed_boxes, agreed_map
from openpilot.tools.fair.onnx.teacher import read_description
from openpilot.tools.fair.spec import road_classes, street_classes
from openpilot.tools.fair.tflite.teacher import read_description as read_tflite
from openpilot.tools.fair.tasks import objects, segmentation
from openpilot.tools.fair.tasks.task import say
from openpilot.tools.fair.teacher import Label
from openpilot.tools.sim.render import CLASSES

STREET = street_classes()
CAMVID = "sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist, unlabelled".split(", ")


def boxes(*rows):
  x = np.array([r[:4] for r in rows], np.float32).reshape(-1, 4)
  return Boxes(x, np.array([r[4] for r in rows], np.int64), np.array([r[5] for r in rows], np.float32))


def test_the_street_knows_every_teachers_names():
  """Maps of the road, of Cityscapes, of CamVid and of the simulator; boxes of COCO's road users."""
  roads = list(read_description("road_segmentation_adas")["maps"])
  assert [STREET.maps[k] for k in STREET.resolve(roads, "maps", "roads")] == ["road", "curb", "marking"]
  city = read_tflite("cityscapes")["classes"]
  got = {n: STREET.maps[k] for n, k in zip(city, STREET.resolve(city, "maps", "city"), strict=True)}
  assert got["sidewalk"] == "curb" and got["rider"] == "person" and got["fence"] == "building"
  assert got["terrain"] == "vegetation" and got["pole"] == "other" and got["bicycle"] == "two-wheeler"
  assert len(got) == 19 and set(got.values()) == set(STREET.maps) - {"marking"}
  assert STREET.resolve(CAMVID, "maps", "CamVid")[-1] == -1
  assert [STREET.maps[k] for k in STREET.resolve(list(CLASSES), "maps", "simulator")[1:]] == [
    "road",
    "marking",
    "vehicle",
    "person",
  ]
  coco = list(read_description("yolox_nano")["boxes"]["classes"].values())
  found = STREET.resolve(coco, "boxes", "COCO")
  assert [STREET.boxes[k] if k >= 0 else None for k in found] == [
    "person",
    "two-wheeler",
    "vehicle",
    "two-wheeler",
    "vehicle",
    "vehicle",
    "vehicle",
    None,
    None,
  ]
  assert STREET.with_role("ground") == ("road",) and STREET.with_role("marking") == ("marking",)
  assert STREET.with_role("movable") == ("vehicle", "person", "two-wheeler")


def test_the_roads_class_set_knows_the_streets_names():
  """So that a student of the road learns from what was agreed on in the street's classes."""
  road = road_classes()
  got = [road.maps[k] if k >= 0 else None for k in road.resolve(STREET.maps, "maps", "agreed")]
  rest = "background"
  assert got == ["road", rest, "lane", "vehicle", "pedestrian", None, rest, rest, rest, rest]
  assert [road.boxes[k] for k in road.resolve(STREET.boxes, "boxes", "agreed")] == ["vehicle", "pedestrian", "cyclist"]


def test_boxes_of_two_are_kept_and_of_one_are_unknown():
  one = boxes((10, 10, 50, 50, 0, 0.5), (100, 100, 140, 150, 0, 0.9), (200, 100, 220, 150, 1, 0.8))
  other = boxes((12, 10, 52, 50, 0, 0.7), (202, 100, 222, 150, 0, 0.6))
  both, alone = agreed_boxes([one, other])
  np.testing.assert_allclose(both.xyxy, [[11, 10, 51, 50]])
  assert both.cls.tolist() == [0] and both.score[0] == pytest.approx(0.7)
  assert sorted(alone[:, 0].tolist()) == [100, 200]  # one alone, and what two call otherwise
  nothing, lone = agreed_boxes([boxes(), boxes()])
  assert len(nothing.cls) == 0 and lone.shape == (0, 4)


def test_a_map_is_known_where_two_say_the_same():
  at = {n: i for i, n in enumerate(STREET.maps)}
  scene = np.full((256, 512), at["sky"])
  scene[100:] = at["road"]
  scene[60:100, 100:160] = at["vehicle"]
  scene[60:100, 400:440] = at["vehicle"]  # where no detector sees one
  scene[200:, :50] = at["curb"]  # where the other is sure of road
  scene[200:, 460:] = at["vehicle"]
  road = np.zeros((256, 512), np.float32)
  road[100:] = 0.95
  road[120:140] = 0.4  # unsure
  road[230:240, 200:300] = 0.2
  paint = np.zeros_like(road)
  paint[150:160, 200:300], road[150:160, 200:300] = 0.8, 0.15
  car = boxes((100, 60, 160, 100, 0, 0.9))
  parts = [car, boxes()]
  out = agreed_map(STREET, {"road": road, "marking": paint}, scene, parts, boxes())
  assert out[20, 20] == at["sky"] and out[180, 200] == at["road"] and out[155, 250] == at["marking"]
  assert out[130, 200] == 255 and out[235, 250] == 255
  assert out[80, 130] == at["vehicle"] and out[80, 420] == 255
  # what is near its outline is told of neither side
  assert (out[60:100, 100:103] == 255).all() and out[80, 103] == at["vehicle"] and out[80, 99] == at["sky"]
  assert out[220, 20] == at["road"] and out[220, 480] == 255
  # where two boxes agree and the map says otherwise, nobody knows
  hidden = agreed_map(STREET, {"road": road, "marking": paint}, np.full_like(scene, at["sky"]), parts, car)
  assert hidden[80, 130] == 255 and hidden[20, 20] == at["sky"]


def test_what_one_detector_alone_has_seen_teaches_nothing():
  """Its cells count nowhere, but for those in a known box; and it is no object."""
  label = Label("boxes", "boxes", classes=("vehicle", "unknown"))
  table = {
    k: np.array(v, np.float32) for k, v in {"x0": [40, 60], "y0": [40, 40], "x1": [80, 160], "y1": [80, 80]}.items()
  }
  table |= {"score": np.ones(2, np.float32), "cls": np.array([0, 1])}
  said = say([label], [table], objects.TASK, STREET)
  (one,) = objects.targets(said, NONE, np.random.default_rng(0))["objects"]
  assert one["cls"].tolist() == [STREET.boxes.index("vehicle")] and len(one["boxes"]) == 1
  np.testing.assert_allclose(one["ignore"], [[60, 40, 160, 80]])
  tensors = {k: torch.from_numpy(one[k]) for k in ("boxes", "ignore")}
  counts = objects.counted(torch.ones(2, 64, 128, dtype=torch.bool), [tensors, None])
  assert counts[0, 15, 12] and counts[0, 15, 19] and not counts[0, 15, 25] and not counts[0, 11, 39]
  assert counts[0, 15, 41] and counts[0, 30, 25] and not counts[1].any()


def test_the_simulators_background_is_none_of_what_it_names():
  """Of the street's classes it names four; where it says background, it is one of the others."""
  label = Label("segmentation", "dense", "uint8", (64, 128), "class", tuple(CLASSES))
  ids = np.zeros((64, 128), np.uint8)
  ids[32:] = CLASSES.index("road")
  ids[:8] = 255
  out, rest = segmentation.class_maps(NONE, say([label], [ids], segmentation.TASK, STREET), ids)
  assert (rest[8:32] == 1).all() and (rest[32:] == 0).all() and (rest[:8] == 0).all()
  assert (out[STREET.maps.index("road"), 32:] == 1).all() and out[:, :32].sum() == 0
