"""A user's own classes, from labels to the manifest; and that no class of a label is dropped in silence."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from label_fixture import FRAME, group_of, write_store
from PIL import Image

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.frames import pack_rgb
from openpilot.tools.fair.bundle import export
from openpilot.tools.fair.distillation import distill, initial
from openpilot.tools.fair.distillation.augment import NONE
from openpilot.tools.fair.distillation.batch import Batches
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.options import find_classes, label_names
from openpilot.tools.fair.distillation.plan import Plan
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec, read_classes, road_classes
from openpilot.tools.fair.students.student import build
from openpilot.tools.fair.tasks import TASKS, find_task, say, task_of
from openpilot.tools.fair.tasks.objects import object_list
from openpilot.tools.fair.teacher import Label
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.render import CLASSES

FAIR = Path(distill.__file__).resolve().parents[1]
N = 8
HOLE = slice(40, 56), slice(20, 60)  # rows, columns of the map
MAP_LABEL = Label("segmentation", "dense", "uint8", (64, 128), "class", ("background", "pothole"))
BOX_LABEL = Label("objects", "boxes", unit="px", classes=("pothole", "cone"))


def write(root, label, routes=("00000001--aaaaaaaaaa", "00000002--bbbbbbbbbb")):
  """Pictures with a dark patch, labeled by their owner as `label` says; of boxes also one of the last name."""
  store = LabelStore(root, create=True)
  for route in routes:
    rgb = np.full((256, 512, 3), 120, np.uint8)
    rgb[4 * HOLE[0].start : 4 * HOLE[0].stop, 4 * HOLE[1].start : 4 * HOLE[1].stop] = 20
    group_of(store, f"{route}--0", "frames", FRAME, N, "").write_chunk(0, {"frame": np.stack([pack_rgb(rgb)] * N)})
    said = group_of(store, f"{route}--0", "mine", [label], N)
    if label.kind == "dense":
      ids = np.zeros((N, 64, 128), np.uint8)
      ids[:, *HOLE] = 1
      said.write_chunk(0, {label.name: ids})
      continue
    frame = np.repeat(np.arange(N), 2)
    x0, y0 = np.tile([80.0, 300.0], N).astype(np.float32), np.tile([160.0, 60.0], N).astype(np.float32)
    table = {"frame": frame, "x0": x0, "y0": y0, "x1": x0 + 100, "y1": y0 + 60, "score": np.ones(2 * N, np.float32)}
    said.write_chunk(0, {label.name: {**table, "cls": np.tile([0, len(label.classes) - 1], N)}})
  return root


def run(monkeypatch, module, *args):
  monkeypatch.setattr(sys, "argv", ["x", *map(str, args)])
  module.main()


def learn(monkeypatch, labels, out, *args, steps=1):
  common = "--steps", steps, "--batch", 4, "--eval-every", 1, "--workers", 0
  run(monkeypatch, distill, "--labels", labels, "--student", "objects-nano", "--out", out, *common, *args)


# *** the user's own, end to end ***


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
  """A store of potholes, a run on it, and its bundle."""
  root = tmp_path_factory.mktemp("holes")
  write(root / "s", MAP_LABEL)
  with pytest.MonkeyPatch.context() as m:
    learn(m, root / "s", root / "run", "--classes", "background,pothole")
    run(m, export, root / "run", "--out", root / "models" / "holes", "--no-tinygrad")
  return root


def test_a_map_of_the_users_own_class_reaches_the_manifest(holes, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"'pothole' is no class of 'road'. It knows .*vehicle: car, truck.*--ignore-cl"):
    learn(monkeypatch, holes / "s", tmp_path / "no", "--tasks", "segmentation")
  assert not (tmp_path / "no").exists()
  config = Config.from_dict(load_checkpoint(holes / "run" / "last.pt")["config"])
  assert config.tasks == ["segmentation"] and config.classes.maps == ("background", "pothole")
  assert json.loads((holes / "run" / "config.json").read_text())["classes"]["name"] == "background,pothole"
  bundle = load_bundle(holes / "models" / "holes")
  out = {o["name"]: o for o in bundle.graphs[0]["outputs"]}
  assert list(out) == ["segmentation"] and out["segmentation"]["shape"] == [1, 2, 64, 128]
  assert out["segmentation"]["classes"] == ["background", "pothole"]
  assert out["segmentation"]["roles"] == {"background": "background"}
  assert bundle.manifest["input"] == InputSpec().to_dict()


def test_channels_follow_their_classes(monkeypatch):
  heat, maps = torch.arange(6.0).reshape(3, 2, 1, 1), torch.arange(12.0).reshape(1, 3, 2, 2)
  logits = torch.arange(6.0).reshape(3, 2)
  ema = {
    "student.objects.heat.weight": heat,
    "student.detector.logits.1.weight": logits,
    "student.objects.segmentation.weight": maps,
    "student.neck.x": torch.ones(1),
  }
  state = {"ema": ema, "classes": {"maps": ["road", "pothole", "sky"], "boxes": ["vehicle", "person", "two-wheeler"]}}
  said: list[str] = []
  monkeypatch.setattr(initial, "warn", said.append)

  def boxes(*names: str | Class) -> ClassSet:
    both = [Class("road", boxes=False), Class("pothole"), Class("sky")]
    more = [n if isinstance(n, Class) else Class(n, maps=False, boxes=True) for n in names]
    return ClassSet("other", (*both, *more))

  same = boxes("vehicle", "person", "two-wheeler", "cone")
  assert initial.in_classes(state, same, "here")["ema"] == ema and not said
  # by name in another order, by the set's own alias, by what streets' classes call both, and none of them
  own = Class("runner", aliases=("Two Wheeler",), maps=False, boxes=True)
  kept = initial.in_classes(state, boxes("person", "cone", own, "car", "truck"), "here")["ema"]
  rows = [1, None, 2, 0, 0]
  for name, layer in (("objects.heat", heat), ("detector.logits.1", logits)):
    got = kept[f"student.{name}.weight"]
    assert got.shape == (5, *layer.shape[1:])
    for i, row in enumerate(rows):
      assert got[i].isnan().all() if row is None else torch.equal(got[i], layer[row])
  assert kept["student.objects.segmentation.weight"] is maps
  assert "runner starts as two-wheeler; car starts as vehicle; truck starts as vehicle; cone starts anew" in said[0]
  # a transposed convolution's outputs are its second dimension
  kept = initial.in_classes(state, ClassSet("maps", (Class("sky"), Class("road"))), "here")["ema"]
  assert torch.equal(kept["student.objects.segmentation.weight"], maps[:, [2, 0]])
  assert list(kept) == ["student.neck.x", "student.objects.segmentation.weight"]  # no boxes are learned
  kept = initial.in_classes(state, boxes("cone", "barrel"), "here")["ema"]
  assert "student.objects.heat.weight" not in kept and "cone, barrel start anew" in said[-1]


def test_a_class_that_was_not_known_starts_as_the_student_does(holes, tmp_path):
  plan = Clips(holes / "s", ["segmentation"], 1, classes=find_classes("background,pothole", [MAP_LABEL]))
  config = Config(student="objects-nano", tasks=["segmentation"], steps=1, batch=1, classes=plan.classes)
  run = Run(config, plan, None, tmp_path / "run", "labels", workers=0)
  name = "student.objects.segmentation.weight"
  own = run.distiller.state_dict()[name].clone()
  given = torch.stack([torch.full_like(own[:, 0], math.nan), torch.full_like(own[:, 1], 7)], 1)
  run.warm_start(
    {
      "ema": {name: given},
      "provenance": [],
      "trained": {"segments": [], "unknown": []},
      "history": [],
      "config": {},
      "step": 0,
    }
  )
  got = run.distiller.state_dict()[name]
  assert torch.equal(got[:, 0], own[:, 0]) and (got[:, 1] == 7).all()
  assert torch.equal(run.ema.state_dict()[name], got)


@pytest.mark.slow
def test_a_bundle_of_own_classes_is_trained_on(holes):
  train = Clips(holes / "s", ["segmentation"], 1, classes=find_classes("background,pothole", [MAP_LABEL]))
  state = initial.initial([str(holes / "models" / "holes")], train)
  own = load_checkpoint(holes / "run" / "best.pt")["ema"]["student.objects.segmentation.weight"]
  assert torch.allclose(state["ema"]["student.objects.segmentation.weight"], own, atol=1e-3)  # by way of float16


def test_a_class_map_teaches_the_users_class(tmp_path):
  labels = write(tmp_path / "s", MAP_LABEL)
  clips = Clips(labels, ["segmentation"], 1, classes=find_classes("pothole,background", [MAP_LABEL]))
  batch = Batches(clips, 0, False)[(0, [0], False)]
  assert batch["segmentation"].shape == (1, 2, 64, 128) and batch["segmentation"][0, 0][HOLE].all()
  assert batch["segmentation"][0, 0].sum() == 16 * 40 and batch["segmentation"][0].sum() == 64 * 128
  model = Distiller(build("depth-nano"), ["segmentation"], {}, classes=clips.classes)
  assert model.class_weights.tolist() == [1, 1]


def test_boxes_of_pothole_and_cone_train_those(tmp_path, monkeypatch):
  labels = write(tmp_path / "s", BOX_LABEL)
  with pytest.raises(UserError, match="'pothole', 'cone' are no class of 'road'"):
    learn(monkeypatch, labels, tmp_path / "no")
  learn(monkeypatch, labels, tmp_path / "run", "--classes", "pothole,cone")
  assert Config.from_dict(load_checkpoint(tmp_path / "run" / "last.pt")["config"]).tasks == ["objects"]
  classes = Config.from_dict(load_checkpoint(tmp_path / "run" / "last.pt")["config"]).classes
  objects = Batches(Clips(labels, ["objects"], 1, classes=classes), 0, False)[(0, [0], False)]["objects"][0]
  assert objects["cls"].tolist() == [0, 1] and objects["boxes"].tolist() == [[80, 160, 180, 220], [300, 60, 400, 120]]
  run(monkeypatch, export, tmp_path / "run", "--out", tmp_path / "models" / "things", "--no-tinygrad")
  outputs = load_bundle(tmp_path / "models" / "things").graphs[0]["outputs"]
  assert next(o for o in outputs if o["name"] == "objects_heat")["classes"] == ["pothole", "cone"]
  assert not any("roles" in o or o["name"] == "segmentation" for o in outputs)


# *** nothing in silence ***


def test_what_is_left_out_is_counted(tmp_path, monkeypatch, capsys):
  labels = write(tmp_path / "s", Label("objects", "boxes", unit="px", classes=("car", "traffic light")))
  learn(monkeypatch, labels, tmp_path / "run", "--tasks", "objects")
  said = capsys.readouterr().err
  assert f"'traffic light' by mine are left out, since the class set 'road' does not learn them: {2 * N} boxes" in said
  labels = write(tmp_path / "t", Label("objects", "boxes", unit="px", classes=("car", "unicorn")))
  with pytest.raises(UserError, match=r"'unicorn' is no class of 'road'.*ignored: traffic light"):
    learn(monkeypatch, labels, tmp_path / "no", "--tasks", "objects")
  learn(monkeypatch, labels, tmp_path / "yes", "--tasks", "objects", "--ignore-classes")
  assert "'unicorn' by mine are left out" in capsys.readouterr().err
  clips = Clips(labels, ["objects"], 1, ignore=True)
  assert Batches(clips, 0, False)[(0, [0], False)]["objects"][0]["cls"].tolist() == [0]
  # of no learned class at all: nothing teaches the task
  labels = write(tmp_path / "u", Label("objects", "boxes", unit="px", classes=("unicorn", "stop sign")))
  with pytest.raises(UserError, match="nothing that teaches 'objects'"):
    learn(monkeypatch, labels, tmp_path / "none", "--tasks", "objects", "--ignore-classes")


def test_class_lists_are_of_names_that_labels_have(tmp_path):
  found = find_classes("road, car,Pothole", [MAP_LABEL, BOX_LABEL, Label("road", "dense", unit="probability"), COCO])
  assert found.maps == ("road", "Pothole") and found.boxes == ("car", "Pothole")
  assert found.roles(found.maps + found.boxes) == {"road": "ground", "car": "movable"}
  with pytest.raises(UserError, match="no label is called 'wheel'; labels are called background, pothole, cone"):
    find_classes("pothole,wheel", [MAP_LABEL, BOX_LABEL])
  assert find_classes(None, []) is road_classes()
  (tmp_path / "c.yaml").write_text(yaml.safe_dump({"name": "mine", "classes": [{"name": "cone", "boxes": True}]}))
  assert find_classes(str(tmp_path / "c.yaml"), []) == read_classes(tmp_path / "c.yaml")
  assert label_names([MAP_LABEL, BOX_LABEL]) == {"maps": ["background", "pothole"], "boxes": ["pothole", "cone"]}


COCO = Label("boxes", "boxes", classes=("person", "car"))


def teachers_names():
  """(teacher, kind, names) of every teacher here that tells classes apart."""
  yield "simulator", "maps", CLASSES
  yield "simulator", "boxes", ("vehicle", "pedestrian")
  for path in sorted((FAIR / "onnx").glob("*.yaml")) + sorted((FAIR / "tflite").glob("*.yaml")):
    said = yaml.safe_load(path.read_text())
    found = [("boxes", said.get("boxes", {}).get("classes", {}).values()), ("maps", said.get("maps", {}))]
    for kind, names in [*found, ("maps", said.get("classes", ()))]:
      if names:
        yield path.name, kind, tuple(names)
  yield "detr", "boxes", tuple(json.loads((FAIR / "detr" / "road_classes.json").read_text())["classes"])
  from openpilot.tools.fair.sam.sam3 import PROMPTS

  yield "sam3", "boxes", PROMPTS


@pytest.mark.parametrize("who", list(teachers_names()), ids=lambda w: f"{w[0]}-{w[1]}")
def test_names_of_the_teachers_here_resolve(who):
  teacher, kind, names = who
  assert (road_classes().resolve(names, kind, teacher) >= 0).any()


def test_the_roads_classes_are_what_they_were():
  """Channels of the bundles that ship, and what teachers' names were in the table before."""
  road = road_classes()
  assert road.maps == CLASSES and road.boxes == ("vehicle", "pedestrian", "cyclist")
  assert road.map_weights == (0.5, 0.7, 2.5, 1.5, 4.0)
  maps = {"drivable": 1, "lanes": 2, "person": 4, "car": 3, "truck": 3, "bus": 3, "sky": 0, "tree": 0, "wall": 0}
  assert road.resolve(list(maps), "maps", "x").tolist() == list(maps.values())
  boxes = {"car": 0, "van": 0, "person": 1, "bicycle": 2, "motorcycle": 2, "train": -1}
  assert road.resolve(list(boxes), "boxes", "x").tolist() == list(boxes.values())
  assert road.resolve(["bicycle", "train", "void"], "maps", "x").tolist() == [-1, -1, -1]


# *** one look, one plan ***


def test_a_run_looks_at_the_labels_once(tmp_path, monkeypatch):
  root = tmp_path / "s"
  write_store(root)
  opened, listed = [], []
  init, groups = LabelStore.__init__, LabelStore.groups
  monkeypatch.setattr(LabelStore, "__init__", lambda self, *a, **k: (opened.append(1), init(self, *a, **k))[1])
  monkeypatch.setattr(LabelStore, "groups", lambda self, *a, **k: (listed.append(1), groups(self, *a, **k))[1])
  plans: list[Plan] = []
  real = distill.make_plan
  monkeypatch.setattr(distill, "make_plan", lambda *a: plans.append(real(*a)) or plans[-1])
  run(
    monkeypatch,
    distill,
    *("--labels", root, "--student", "depth-nano", "--out", tmp_path / "run", "--steps", 1, "--batch", 1),
    *("--eval-every", 1, "--workers", 0),
  )
  assert (len(opened), len(listed)) == (1, 1)
  (plan,) = plans
  assert [s.name for s in plan.val.segments] and not {s.name for s in plan.val.segments} & {
    s.name for s in plan.train.segments
  }
  assert plan.labels == distill.digest(root) and [t["model"] for t in plan.teachers] == ["simulator"]
  assert load_checkpoint(tmp_path / "run" / "last.pt")["labels"] == plan.labels


# *** names of before ***


def test_points_are_lanes(tmp_path, monkeypatch):
  """As option, in stages and weights, in a configuration and in a checkpoint of learned weights."""
  root = tmp_path / "s"
  write_store(root)
  (tmp_path / "stages.yaml").write_text("[{steps: 1, tasks: [points]}]")
  run(
    monkeypatch,
    distill,
    *("--labels", root, "--student", "lanes-nano", "--out", tmp_path / "run", "--tasks", "points", "--steps", 1),
    *("--weight", "points=2", "--stages", tmp_path / "stages.yaml", "--learned-weights", "--batch", 8, "--workers", 0),
  )
  state = load_checkpoint(tmp_path / "run" / "last.pt")
  assert state["config"]["tasks"] == ["lanes"] and state["config"]["weights"] == {"lanes": 2.0}
  assert state["config"]["stages"][0]["tasks"] == ["lanes"] and find_task("points").name == "lanes"
  assert task_of(Label("points", "points")) == ("lanes",) and task_of(Label("lines", "points")) == ()
  old = {k: v for k, v in state["config"].items() if k not in ("input", "classes", "ignore_classes")}
  old |= {"tasks": ["points"], "weights": {"points": 2.0}, "stages": [{"steps": 1, "tasks": ["points"]}]}
  assert Config.from_dict(old) == Config.from_dict(state["config"])
  model = Distiller(build("lanes-nano"), ["lanes"], {}, learned=True)
  before = {k.replace("log_variance.lanes", "log_variance.points"): v for k, v in model.state_dict().items()}
  assert "weights.log_variance.points" in before
  before["weights.log_variance.points"] = torch.tensor(0.25)
  model.load_state_dict(before)
  assert float(model.weights.log_variance["lanes"].detach()) == 0.25


# *** pictures of any size ***


def test_imported_pictures_with_own_classes_reach_the_manifest(tmp_path, monkeypatch):
  """A folder of RGB pictures and class maps, letterboxed into another size than the road's, as typed."""
  from openpilot.tools.fair.labels import import_labels

  r = np.random.default_rng(0)
  for name in ("pictures", "maps"):
    (tmp_path / name).mkdir()
  for k in range(4):
    ids = np.zeros((60, 120), np.uint8)
    ids[30:50, 20:60] = 1
    rgb = np.where(ids[..., None] == 1, 30, r.integers(100, 200, (60, 120, 3))).astype(np.uint8)
    Image.fromarray(rgb).save(tmp_path / "pictures" / f"{k}.png")
    Image.fromarray(ids).save(tmp_path / "maps" / f"{k}.png")
  labels = tmp_path / "s"
  args = "--annotations", tmp_path / "maps", "--classes", "background,pothole", "--name", "holes", "--license", "MIT"
  run(monkeypatch, import_labels, tmp_path / "pictures", *args, "--size", "160x96", "--output", labels)
  learn(monkeypatch, labels, tmp_path / "run", "--classes", "background,pothole")
  config = Config.from_dict(load_checkpoint(tmp_path / "run" / "last.pt")["config"])
  assert config.input == InputSpec("rgb", 96, 160) and config.tasks == ["segmentation"]
  clips = Clips(labels, ["segmentation"], 1, classes=config.classes)
  batch = Batches(clips, 0, False)[(0, [0], False)]
  assert batch["frame"].shape == (1, 3, 96, 160) and batch["segmentation"].shape == (1, 2, 24, 40)
  # 120x60 pixels are 160x80 of 160x96: the lowest 16 rows, 4 of the map, are padding
  assert batch["valid"][0].sum(1).tolist() == [40] * 20 + [0] * 4
  assert np.argwhere(batch["segmentation"][0, 1].numpy() > 0.5).min(0).tolist() == [10, 7]  # 30 and 20 by 4 / 3, by 4
  moved = Batches(clips, 0, True)[(3, [0], True)]
  assert moved["frame"].shape == (1, 3, 96, 160) and not torch.equal(moved["frame"], batch["frame"])
  run(
    monkeypatch, export, tmp_path / "run", "--out", tmp_path / "models" / "holes", "--no-tinygrad", "--labels", labels
  )
  bundle = load_bundle(tmp_path / "models" / "holes")
  assert bundle.manifest["input"] == InputSpec("rgb", 96, 160).to_dict()
  (out,) = bundle.graphs[0]["outputs"]
  assert out["shape"] == [1, 2, 24, 40] and out["classes"] == ["background", "pothole"]


def test_what_a_teacher_has_no_name_for_is_no_object():
  """SAM 2 says -1 of a thing that no detector named: before, it counted as the last class."""
  table = {k: np.array([v, v + 100], np.float32) for k, v in (("x0", 10), ("y0", 10), ("x1", 60), ("y1", 60))}
  table |= {"score": np.ones(2, np.float32), "cls": np.array([-1, 0], np.int16)}
  label = Label("objects", "boxes", classes=("car", "person"))
  assert object_list(NONE, say([label], [table], TASKS["objects"]), table)["cls"].tolist() == [0]


@pytest.mark.parametrize(
  ("said", "why"),
  [
    ({"kind": "bgr"}, "input kind 'bgr'"),
    ({"height": 100}, "multiples of 32"),
    ({"width": "512"}, "multiples of 32"),
    ({"view": "fisheye"}, "the view 'fisheye'"),
    ({"pad": 300}, "padded with 300"),
    ({"depth": 3}, "'depth' is not known"),
    ([], None),
    ([1], "is no mapping"),
  ],
)
def test_an_input_that_is_none_is_refused(said, why):
  if why is None:
    assert InputSpec.from_dict(said) == InputSpec()  # nothing was said
    return
  with pytest.raises(UserError, match=why):
    InputSpec.from_dict(said)
