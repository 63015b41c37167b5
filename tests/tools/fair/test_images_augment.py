"""Characteristics: what each adds, what is guessed, and copies of a data set."""

import json

import images_student_fixture as squares
import numpy as np
import pytest
import yaml
from PIL import Image

from openpilot.tools.fair.distillation.augment import draw, warp_frame
from openpilot.tools.fair.distillation.pixels import CHANGES
from openpilot.tools.fair.images import augment
from openpilot.tools.fair.images.augment import Pipeline, get_augmentation_registry
from openpilot.tools.fair.images.characteristics import CHARACTERISTICS, GEOMETRY, Step, guess, look, plan, read
from openpilot.tools.fair.images.geometry import Sample
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.errors import UserError


def test_every_characteristic_is_made_of_changes_that_there_are():
  for group in CHARACTERISTICS.values():
    for steps in group.values():
      for s in steps:
        assert s.name in GEOMETRY or s.name in CHANGES
        assert 0 < s.share <= 1 and 0 < s.strength <= 1


def test_of_several_the_larger_counts_and_more_intensity_is_more():
  low, high = ({s.name: s for s in plan({"light": ["low", "changing"]}, i)} for i in ("low", "high"))
  assert all(high[k].strength > low[k].strength and high[k].share >= low[k].share for k in low)
  medium = {s.name: s for s in plan({"light": ["low", "changing"]})}
  assert medium["dark"].share == 0.5 and medium["exposure"].share == 0.8  # of low .5 and of changing .2; of changing .8
  assert [s.name in GEOMETRY for s in plan({"camera": ["fisheye"]})] == sorted(
    [s.name in GEOMETRY for s in plan({"camera": ["fisheye"]})], reverse=True
  )


@pytest.mark.parametrize(
  "said, says", [(["light"], "GROUP=NAME"), (["weather=fog"], "object"), (["light=low,strange"], "backlit")]
)
def test_what_is_not_known_is_said(said, says):
  with pytest.raises(UserError, match=says):
    read(said)
  with pytest.raises(UserError, match="low, medium, high"):
    plan({}, "extreme")


def test_what_is_said_is_read():
  assert read(["object=small, thin", "Camera=rolling-shutter"]) == {
    "object": ["small", "thin"],
    "camera": ["rolling_shutter"],
  }


def case(gray, size, thin=False, blur=False, n=12):
  r = np.random.default_rng(3)
  noise = r.integers(-40, 41, (n, 100, 120, 3))
  pictures = [np.clip(gray + x * (not blur), 0, 255).astype(np.uint8) for x in noise]
  h = 120 * size / (5 if thin else 1)
  boxes = [np.array([[5, 5, 5 + 110 * size, 5 + h]])] * n
  return pictures, boxes, [np.zeros(1)] * n


@pytest.mark.parametrize(
  "kind, found",
  [
    ({"gray": 120, "size": 0.2}, set()),
    ({"gray": 45, "size": 0.2}, {("light", "low")}),
    ({"gray": 215, "size": 0.03}, {("light", "bright"), ("object", "small")}),
    ({"gray": 120, "size": 0.8}, {("object", "large")}),
    ({"gray": 120, "size": 0.2, "thin": True}, {("object", "thin")}),
    ({"gray": 120, "size": 0.2, "blur": True}, {("camera", "moving"), ("background", "plain")}),
  ],
)
def test_the_data_is_guessed_by(kind, found):
  said, why = guess(look(*case(**kind)))
  got = {(k, n) for k, v in said.items() for n in v} - {("background", "cluttered")}
  assert got == found and len(why) == sum(map(len, said.values()))


def test_light_and_sizes_that_differ():
  pictures = [np.full((50, 60, 3), g, np.uint8) for g in (30, 200) * 8]
  boxes = [np.array([[0, 0, s, s]]) for s in np.linspace(3, 40, 16)]
  said, _ = guess(look(pictures, boxes, [np.zeros(1)] * 16))
  assert "changing" in said["light"] and "varying" in said["distance"]
  nothing = guess(look(pictures[:1], [np.zeros((0, 4))], [np.zeros(0)]))[0]
  assert "object" not in nothing


def test_a_pipeline_repeats_and_does_nothing_where_no_change_is_drawn():
  r = np.random.default_rng(0)
  rgb, found = squares.picture(r)
  sample = Sample(rgb, np.array([[x, y, x + s, y + s] for _, x, y, s in found], float))
  everything = Pipeline(tuple(Step(n, 1.0, 0.6) for n in (*GEOMETRY, *CHANGES)))
  a, b = (everything(sample, np.random.default_rng(4)) for _ in range(2))
  np.testing.assert_array_equal(a.rgb, b.rgb)
  np.testing.assert_array_equal(a.boxes, b.boxes)
  assert not np.array_equal(a.rgb, everything(sample, np.random.default_rng(5)).rgb)
  same = Pipeline(tuple(Step(n, 0.0, 1.0) for n in CHANGES))(sample, r)
  np.testing.assert_array_equal(same.rgb, rgb)
  np.testing.assert_array_equal(same.boxes, sample.boxes)


def test_another_package_adds_a_characteristic(monkeypatch):
  monkeypatch.setitem(CHARACTERISTICS, "object", dict(CHARACTERISTICS["object"]))
  registry = get_augmentation_registry()
  registry.register("object", "furry", (Step("defocus", 1.0, 1.0),))
  assert "furry" in registry.characteristics()["object"]
  assert "defocus" in {s.name for s in registry.pipeline({"object": ["furry"]}).steps}
  with pytest.raises(UserError, match="there already"):
    registry.register("object", "furry", ())


def test_copies_of_a_data_set_keep_labels_on_their_things(tmp_path):
  """Squares are of one color each: what is labeled must be of it, and all of that color be labeled."""
  data = squares.write(tmp_path / "a", 3, masks=True)
  coco = json.loads(data.read_text())
  for k, a in enumerate(coco["annotations"]):  # a third as polygons, as run lengths, as boxes
    x, y, w, h = a["bbox"]
    mask = np.zeros((squares.H, squares.W), bool)
    mask[y : y + h, x : x + w] = True
    if k % 3 == 1:
      a["segmentation"] = {"size": [squares.H, squares.W], "counts": rle.encode(mask[None])[0]}
    elif k % 3 == 2:
      a.pop("segmentation")
  data.write_text(json.dumps(coco))
  out = tmp_path / "out"
  recipe = augment.run(augment.Options(data=data, what=("camera=fisheye", "distance=near"), output=out, copies=3))
  assert recipe == yaml.safe_load((out / "augmentation.yaml").read_text())
  made = json.loads((out / "annotations.json").read_text())
  assert len(made["images"]) == 12 and len(made["annotations"]) > 24
  names = {c["id"]: c["name"] for c in made["categories"]}
  by_image = {i["id"]: i for i in made["images"]}
  whole = 0
  for a in made["annotations"]:
    rgb = np.asarray(Image.open(out / "images" / by_image[a["image_id"]]["file_name"])).astype(int)
    x, y, w, h = a["bbox"]
    red = rgb[..., 0] - rgb[..., 2]
    of_it = red > 25 if names[a["category_id"]] == "flurb" else red < -25
    inside = of_it[int(y + 2) : int(y + h - 2), int(x + 2) : int(x + w - 2)]
    if inside.size:
      whole += inside.mean() > 0.6
      assert inside.mean() > 0.35, a
  assert whole > 0.9 * len(made["annotations"]) - 6
  again = augment.run(augment.Options(data=data, recipe=out / "augmentation.yaml", show=tmp_path / "s.png"))
  assert again == recipe and Image.open(tmp_path / "s.png").width > 400


@pytest.mark.parametrize("picture", [InputSpec(), InputSpec("rgb", 64, 96)])
def test_a_student_in_training_sees_the_changes(picture):
  frame = np.random.default_rng(0).integers(0, 256, picture.shape, dtype=np.uint8)
  plain = draw(np.random.default_rng(1), picture=picture)
  more = draw(np.random.default_rng(1), picture=picture, pixels=[("fog", 1.0, 1.0), ("rain", 0.0, 1.0)])
  assert [n for n, _ in more.pixels] == ["fog"] and not plain.pixels and np.array_equal(plain.matrix, more.matrix)
  a, b, c = warp_frame(plain, frame), warp_frame(more, frame), warp_frame(more, frame)
  assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() > 5 and np.array_equal(b, c)
