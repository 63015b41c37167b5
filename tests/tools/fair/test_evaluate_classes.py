"""`op evaluate` of a user's own classes, pictures and tasks, with networks that read the answer out of the picture."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.numpy_helper import from_array

from label_fixture import CAMERA
from openpilot.selfdrive.modeld.fair import heads
from openpilot.selfdrive.modeld.fair.bundle import load_bundle, write_manifest
from openpilot.tools.fair import tasks
from openpilot.tools.fair.evaluation import evaluate as module
from openpilot.tools.fair.evaluation import groups, labels, student
from openpilot.tools.fair.evaluation.compared import Compared, classes_said, set_of
from openpilot.tools.fair.evaluation.metrics import Sums
from openpilot.tools.fair.evaluation.scenes import Segment
from openpilot.tools.fair.labels.rules import rules_of
from openpilot.tools.fair.labels.meta import CHUNK, VERSION
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec, road_classes, street_classes
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.options import parse

SEGMENT, T = "00000000--0000000001--0", 3
OWN = ["background", "pothole", "cone"]
RGB = InputSpec("rgb", 64, 96)
ROAD = list(road_classes().maps)


def write_bundle(folder, classes, spec=None, mixed=None, head="segmentation"):
  """A bundle whose class maps are what a channel of the frame says, and the classes of `mixed` (from, to) are
  confused."""
  folder.mkdir(parents=True)
  spec = spec or InputSpec()
  channel, pool = (0, 4) if spec.kind == "rgb" else (4, 2)
  k = len(classes)
  nodes, constants = [], {}

  def const(name, value, dtype=np.float32):
    constants[name] = from_array(np.asarray(value, dtype), name)
    return name

  def node(op, *args, out, **attributes):
    nodes.append(helper.make_node(op, list(args), [out], **attributes))
    return out

  node("Cast", "frame", out="x", to=onnx.TensorProto.FLOAT)
  sides = [const(n, [v], np.int64) for n, v in (("first", channel), ("stop", channel + 1), ("axis", 1))]
  node("Slice", "x", *sides, out="one")
  node("MaxPool", "one", out="small", kernel_shape=[pool, pool], strides=[pool, pool])
  at = np.arange(k)
  if mixed is not None:
    at[[mixed[0], mixed[1]]] = at[[mixed[1], mixed[0]]]
  node("Sub", "small", const("k", at.reshape(1, k, 1, 1)), out="d")
  node("Neg", node("Mul", "d", "d", out="q"), out="segmentation")
  shape, out = [1, *spec.shape], [1, k, *spec.map_shape]
  value = helper.make_tensor_value_info
  graph = helper.make_graph(
    nodes,
    "g",
    [value("frame", onnx.TensorProto.UINT8, shape)],
    [value("segmentation", onnx.TensorProto.FLOAT, out)],
    list(constants.values()),
  )
  onnx.save(
    helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(folder / "all.onnx")
  )
  output = {"name": "segmentation", "shape": out, "dtype": "float32", "head": head}
  if head == "segmentation":
    output |= {"classes": classes, "roles": {"background": "background"} if "background" in classes else {}}
  manifest = {
    "name": folder.name,
    "version": "1",
    "size": "nano",
    "view": "medmodel",
    "streams": ["narrowRoad"],
    "metrics": [],
    "input": spec.to_dict(),
    "provenance": {"teachers": [], "data": [], "license": "MIT", "git_commit": "0"},
    "graphs": [
      {
        "name": "all",
        "file": "all.onnx",
        "period": 1,
        "inputs": [{"name": "frame", "shape": shape, "dtype": "uint8"}],
        "outputs": [output],
      }
    ],
  }
  write_manifest(folder, manifest)
  return folder


def write_group(store, teacher, said, data, spec):
  meta = {
    "version": VERSION,
    "segment": SEGMENT,
    "teacher": {"name": teacher, "model_id": teacher, "checkpoint": "0", "licence": "MIT", "settings": {}},
    "labels": [{**vars(x), "shape": list(x.shape), "classes": list(x.classes)} for x in said],
    "view": {"name": "medmodel", "width": 512, "height": 256},
    "camera": {**CAMERA, "width": spec.width, "height": spec.height} if spec.kind == "rgb" else CAMERA,
    "every": 1,
    "chunk": CHUNK,
    **({"input": spec.to_dict()} if spec.kind == "rgb" else {}),
  }
  meta["rules"] = rules_of(meta)
  group = store.group(meta, [EncodeEntry(i, 0, i, i * 50_000_000, i * 50_000_000) for i in range(T)])
  group.write_chunk(0, data)


def write_store(root, names, spec=None, seed=0):
  """Class maps whose ids are those of OWN, said in the order `names`. -> the maps (T, h, w)."""
  spec = spec or InputSpec()
  store, (h, w) = LabelStore(root, create=True), spec.map_shape
  truth = np.random.default_rng(seed).integers(0, len(OWN), (T, h, w)).astype(np.uint8)
  frames = np.zeros((T, *spec.shape), np.uint8)
  if spec.kind == "rgb":
    frames[:, 0] = truth.repeat(4, 1).repeat(4, 2)
  else:
    frames[:, 4] = truth.repeat(2, 1).repeat(2, 2)
  write_group(store, "frames", [Label("frame", "dense", "uint8", spec.shape)], {"frame": frames}, spec)
  order = np.array([[n.lower() for n in names].index(n) for n in OWN], np.uint8)
  label = Label("segmentation", "dense", "uint8", (h, w), "class", tuple(names))
  write_group(store, "mine", [label], {"segmentation": order[truth]}, spec)
  return truth


def run(*args):
  return module.evaluate(parse(module.Options, None, "evaluate", [str(a) for a in args]))


def test_a_class_of_ones_own_is_judged(tmp_path):
  write_store(tmp_path / "store", ["cone", "Background", "pothole"])
  right = write_bundle(tmp_path / "right", OWN)
  wrong = write_bundle(tmp_path / "wrong", OWN, mixed=(1, 2))
  got = run(right, wrong, tmp_path / "store", "--truth", "mine", "--output", tmp_path / "out")
  table = got["tables"]["mine"]["segmentation"]
  assert {k: v["value"] for k, v in table["right"].items()} == dict.fromkeys(["miou", *(f"iou_{n}" for n in OWN)], 1)
  assert table["wrong"]["iou_pothole"]["value"] == table["wrong"]["iou_cone"]["value"] == 0
  assert table["wrong"]["miou"]["value"] == pytest.approx(1 / 3) and got["compared"]["left_out"] == {}
  page = (tmp_path / "out" / "evaluation.html").read_text()
  assert "iou_pothole" in page and "overlap of pothole (IoU)" in page and "wrong, Segmentation" in page


def test_a_class_that_nobody_knows_is_an_error_or_left_out_and_said(tmp_path):
  """As a bundle of the road's classes on a user's labels: never a mIoU of 1 over what is left."""
  truth = write_store(tmp_path / "store", OWN)
  road = write_bundle(tmp_path / "road", ROAD)
  words = (road, tmp_path / "store", "--truth", "mine", "--output", tmp_path / "out")
  with pytest.raises(UserError, match=r"'pothole', 'cone' are no class of 'road'.*vehicle: car.*--ignore-classes") as e:
    run(*words)
  assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
  with pytest.raises(UserError, match="nothing could be compared: not compared, of mine: cone, map pixels: "):
    run(*words, "--ignore-classes")
  named = tmp_path / "named.yaml"
  named.write_text("name: mine\nclasses:\n- {name: road, aliases: [pothole]}\n- {name: lane}\n- {name: background}\n")
  with pytest.raises(UserError, match="'cone' is no class of 'mine'"):
    run(*words, "--classes", named)
  got = run(*words, "--classes", named, "--ignore-classes")
  cells = got["tables"]["mine"]["segmentation"]["road"]
  assert cells["iou_road"]["value"] == 1 and "miou" not in cells  # a class of the truth is missing
  assert got["compared"]["left_out"]["mine"] == {"cone, map pixels": int((truth == 2).sum())}
  assert (
    f"not compared, of mine: cone, map pixels: {(truth == 2).sum()}"
    in (tmp_path / "out" / "evaluation.html").read_text()
  )


def test_pictures_of_any_size_and_kind(tmp_path):
  write_store(tmp_path / "store", OWN, RGB)
  bundle = write_bundle(tmp_path / "right", OWN, RGB)
  wrong = write_bundle(tmp_path / "wrong", OWN, RGB, mixed=(1, 2))
  got = run(bundle, wrong, tmp_path / "store", "--truth", "mine", "--output", tmp_path / "out")
  assert got["tables"]["mine"]["segmentation"]["right"]["miou"]["value"] == 1
  assert (tmp_path / "out" / "evaluation.html").read_text().count("data:image/jpeg") == 1  # of 96x64, three beside
  frames = write_bundle(tmp_path / "frames", OWN)
  with pytest.raises(UserError, match=r"holds RGB pictures of 96x64, and model frames of 512x256 are what the bundle"):
    run(frames, tmp_path / "store", "--truth", "mine")
  with pytest.raises(UserError, match="one by one"):
    run(frames, bundle, tmp_path / "store", "--truth", "mine")


def test_the_set_is_the_roads_where_nothing_of_it_is_lost(tmp_path):
  def of(name, classes):
    return set_of([load_bundle(write_bundle(tmp_path / name, classes))])

  assert of("a", ROAD) is road_classes() and of("b", ["background", "drivable", "car"]) is road_classes()
  pole = of("c", ["background", "pole", "sky"])  # aliases of the road's background
  assert pole.maps == ("background", "pole", "sky") and pole.find("building").name == "background"
  two = of("d", ["car", "truck"])  # aliases of one class
  assert two.maps == ("car", "truck") and two.boxes == ()
  assert of("e", ["background", "vehicle", "cow"]).find("truck").name == "vehicle"
  street = of("s", list(street_classes().maps))
  assert street is street_classes() and street.find("lane").name == "marking" and street.is_ignored("background")
  assert of("f", ["road", "pole"]).maps == ("road", "pole")
  assert classes_said("car, tree").maps == classes_said("car, tree").boxes == ("car", "tree")


def test_what_nobody_names_is_background_only_where_there_is_one():
  own = ClassSet("own", (Class("house", "background"), Class("tree", "background"), Class("road", "ground")))
  both = np.array([[0, 1, 2]], np.uint8)
  assert groups.restrict(both, (2,), Compared(own)).tolist() == [[255, 255, 2]]
  assert groups.restrict(both, (1,), Compared(road_classes())).tolist() == [[0, 1, 0]]


class Wet(Sums):
  """Mean difference of two maps."""

  def __init__(self):
    self.sums = np.zeros(2)

  def result(self):
    return {"off": float(self.sums[0] / self.sums[1])}


def wet_groups():
  def judge(card, pair):
    a, b = pair.found.more.get("wet"), pair.ref.more.get("wet")
    if a is None or b is None:
      return None
    off = float(np.abs(a.astype(float) - b).mean())
    card.of("wet", Wet).sums += [off, 1]
    return off

  return {
    "wet": groups.Group(
      "Wetness",
      "off",
      "Mean difference.",
      {"off": "how far off"},
      judge,
      read=lambda x, said, row, s: s.more.update(wet=x.reader.dense(x.group, said[0].name, [row])[0]),
      decode=lambda who, found, frame_id, s: s.more.update(wet=found),
    )
  }


def test_a_task_from_elsewhere_brings_its_own_table(tmp_path, monkeypatch):
  """Its labels, its head and its metric, without a file of this project being edited."""
  head = heads.Head(heads.single("wet", lambda raw, spec, valid: -raw[0, 0]), ("wet",))
  monkeypatch.setitem(heads.HEADS, "wet", head)
  task = replace(
    tasks.TASKS["depth"],
    name="wet",
    head="wet",
    teaches=lambda label, classes: label.name == "wetness",
    metric=f"{__name__}:wet_groups",
  )
  before = {id(t): dict(t) for t in (tasks.TASKS, groups.GROUPS, labels.READERS, student.DECODERS)}
  try:
    tasks.register(task)
    store = LabelStore(tmp_path / "store", create=True)
    frames = np.random.default_rng(0).integers(0, 3, (T, 6, 128, 256)).astype(np.uint8)
    write_group(store, "frames", [Label("frame", "dense", "uint8", (6, 128, 256))], {"frame": frames}, InputSpec())
    wet = np.square(frames[:, 4].reshape(T, 64, 2, 128, 2).max((2, 4)).astype(np.float16)) + 0.5
    write_group(store, "gauge", [Label("wetness", "dense", "float16", (64, 128))], {"wetness": wet}, InputSpec())
    bundle = write_bundle(tmp_path / "damp", ["wet"], head="wet")
    got = run(bundle, tmp_path / "store", "--truth", "gauge", "--output", tmp_path / "out")
    assert got["tables"]["gauge"]["wet"]["damp"]["off"]["value"] == pytest.approx(0.5)
    assert list(groups.GROUPS)[-2:] == ["wet", "log"] and "Wetness" in (tmp_path / "out/evaluation.html").read_text()
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["bundles"]["damp"]["tasks"] == ["wet"]
  finally:
    for table in (tasks.TASKS, groups.GROUPS, labels.READERS, student.DECODERS):
      table.clear()
      table.update(before[id(table)])


def test_the_padding_of_a_picture_counts_nowhere():
  """Each picture of a folder has its own size: what it does not fill of its frame is no picture."""
  frames = SimpleNamespace(meta={"input": InputSpec().to_dict()})
  sizes = np.array([[320, 240], [512, 256], [1024, 256]])
  s = Segment("a--0", {"frames": frames}, [2, 0, 1], [7, 8, 9], np.ones((256, 512), bool), [], sizes)
  for frame_id, (width, height) in zip((8, 9, 7), sizes.tolist(), strict=True):
    scale = min(512 / width, 256 / height)
    x, y = (np.arange(512) + 0.5) / scale - 0.5, (np.arange(256) + 0.5) / scale - 0.5  # in the picture's pixels
    want = (y < height - 0.5)[:, None] & (x < width - 0.5)
    assert (s.valid_at(frame_id) == want).all() and want.any()
    assert (s.map_valid_at(frame_id) == want[1::4, 1::4]).all()
  assert s.valid_at(9).all() and not s.valid_at(8).all() and s.valid_at(8).mean() == pytest.approx(2 / 3, abs=0.002)
