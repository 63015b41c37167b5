"""`op evaluate` on a store written here, with networks that read the right answer out of the picture, so that every
number on the page is known."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.numpy_helper import from_array

from openpilot.selfdrive.modeld.fair.bundle import write_manifest
from openpilot.tools.fair.evaluation import evaluate as module, report
from openpilot.tools.fair.evaluation.detections import Detections
from openpilot.tools.fair.evaluation.metrics import Sums
from openpilot.tools.fair.evaluation.groups import GROUPS
from openpilot.tools.fair.evaluation.scenes import SLOTS
from openpilot.tools.fair.labels.rules import rules_of
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels import rle
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.options import parse, save
from openpilot.tools.sim.render import CLASSES

pytestmark = pytest.mark.slow

SEGMENTS = [f"0000000{k}--0000000001--0" for k in range(3)] + ["00000002--0000000001--1"]  # four of three routes
T = 24
CAMERA = {
  "stream": "road",
  "width": 526,
  "height": 330,
  "intrinsics": [[245.0, 0, 263], [0, 245.0, 165], [0, 0, 1]],
  "rpy": [0, 0, 0],
  "calibrated": True,
}
HALF = 20.0  # of every box's side, view pixels
BIAS = 0.1  # of the worse student's log depth


@dataclass
class Entry:
  frame_id: int
  segment_id: int
  timestamp_eof: int


def write_group(store, segment, teacher, labels, data, n=T, license="MIT"):
  """labels: dicts of Label's fields; data: {name: array or table}."""
  meta = {
    "version": 1,
    "segment": segment,
    "teacher": {
      "name": teacher,
      "model_id": f"{teacher}'s",
      "checkpoint": "0" * 64,
      "licence": license,
      "settings": {},
    },
    "labels": [{"dtype": "float16", "shape": [], "unit": "", "classes": [], **x} for x in labels],
    "view": {"name": "medmodel", "width": 512, "height": 256},
    "camera": CAMERA,
    "every": 1,
    "chunk": 64,
  }
  meta["rules"] = rules_of(meta)
  group = store.group(meta, [Entry(1000 + i, i, i * 50_000_000) for i in range(n)])
  group.write_chunk(0, data)


DEPTH = {"name": "depth", "kind": "dense", "shape": [64, 128], "unit": "m"}
CLASS = {
  "name": "segmentation",
  "kind": "dense",
  "dtype": "uint8",
  "shape": [64, 128],
  "unit": "class",
  "classes": list(CLASSES),
}
BOXES = {"name": "objects", "kind": "boxes", "shape": [64, 128], "unit": "px", "classes": ["vehicle", "pedestrian"]}
POINTS = {"name": "points", "kind": "points", "unit": "px", "classes": ["road", "lane"]}


def world(k):
  """Truth of segment k, and the frames that hold it: Y of the first plane is the log of the depth, U the class, V marks
  the objects' centers."""
  r = np.random.default_rng(k)
  logs = np.sort(r.integers(64, 250, (T, 64, 128)), axis=1)[:, ::-1]
  classes = r.integers(0, 4, (64, 128))[None].repeat(T, 0)
  classes[:, :, 64 + 8 * k :] = 1
  frames = np.zeros((T, 6, 128, 256), np.uint8)
  frames[:, 0] = logs.repeat(2, 1).repeat(2, 2)
  frames[:, 4] = classes.repeat(2, 1).repeat(2, 2)
  rows = []
  for t in range(T):
    for track, (i, j) in enumerate(((10, 8 + t), (20, 50 - t))):
      visible = 0.2 if track == 0 and 8 <= t < 10 else 1.0
      frames[t, 5, 4 * i, 4 * j] = 200
      x, y = 8 * j + 3.5, 8 * i + 3.5
      rows.append((t, x - HALF, y - HALF, x + HALF, y + HALF, 1.0, 0, track, visible))
  boxes = {
    c: np.array(v)
    for c, v in zip(
      ("frame", "x0", "y0", "x1", "y1", "score", "cls", "track", "visible_fraction"),
      zip(*rows, strict=True),
      strict=True,
    )
  }
  boxes["cls"], boxes["track"] = boxes["cls"].astype(np.int64), boxes["track"].astype(np.int64)
  maps = np.zeros((len(rows), 64, 128), bool)
  v, u = np.mgrid[:64, :128] * 4 + 1.5
  for m, (x0, y0, x1, y1) in zip(maps, np.stack([boxes[c] for c in ("x0", "y0", "x1", "y1")], 1), strict=True):
    m[:] = (u >= x0) & (u <= x1) & (v >= y0) & (v <= y1)
  boxes["rle"] = rle.encode(maps)
  # three points that go right by 2 px a frame; the third begins later, and is hidden for a while
  points = [
    (t, p, 60 + 100 * p + 2 * t, 130 + 10 * p, not (p == 2 and 10 <= t < 14), 1)
    for t in range(T)
    for p in range(3)
    if p < 2 or t >= 5
  ]
  table = {
    c: np.array(v)
    for c, v in zip(("frame", "track", "x", "y", "visible", "cls"), zip(*points, strict=True), strict=True)
  }
  return frames, np.exp(logs / 64).astype(np.float16), classes.astype(np.uint8), boxes, table


def write_store(root, segments=SEGMENTS, truth="simulator"):
  store = LabelStore(root, create=True)
  for k, segment in enumerate(segments):
    frames, depth, classes, boxes, points = world(k)
    write_group(
      store,
      segment,
      "frames",
      [{"name": "frame", "kind": "dense", "dtype": "uint8", "shape": [6, 128, 256]}],
      {"frame": frames},
    )
    write_group(
      store,
      segment,
      truth,
      [DEPTH, CLASS, BOXES, POINTS],
      {"depth": depth, "segmentation": classes, "objects": boxes, "points": points},
    )
    # a teacher that is 5% off in depth and finds one of the two objects
    keep = boxes["track"] == 1
    seen = {
      c: [x for x, q in zip(v, keep, strict=True) if q] if isinstance(v, list) else v[keep] for c, v in boxes.items()
    }
    off = (depth.astype(np.float32) * 1.05).astype(np.float16)
    write_group(store, segment, "expert", [DEPTH, BOXES], {"depth": off, "objects": seen}, license="Apache-2.0")
  return root


def network(tasks, bias=0.0):
  """ONNX graph whose answers are right but for the depth's bias, and for the lanes' visibility, which is always yes. ->
  model, manifest's entry."""
  nodes, constants, outputs = [], {}, []
  inputs = [{"name": "frame", "shape": [1, 6, 128, 256], "dtype": "uint8"}]
  entry = {"name": "all", "file": "all.onnx", "period": 1, "inputs": inputs, "state": [], "outputs": outputs}

  def const(name, value, dtype=np.float32):
    constants[name] = from_array(np.asarray(value, dtype), name)
    return name

  def node(op, *args, out, **attributes):
    nodes.append(helper.make_node(op, list(args), [out], **attributes))
    return out

  def put(name, shape, **more):
    outputs.append({"name": name, "shape": list(shape), "dtype": "float32", **more})

  node("Cast", "frame", out="x", to=onnx.TensorProto.FLOAT)
  for c, name in ((0, "y"), (4, "u"), (5, "v")):
    node(
      "Slice",
      "x",
      const(f"from{c}", [c], np.int64),
      const(f"to{c}", [c + 1], np.int64),
      const(f"axis{c}", [1], np.int64),
      out=name,
    )
  if "depth" in tasks:
    pool = node("AveragePool", "y", out="yp", kernel_shape=[2, 2], strides=[2, 2])
    node("Add", node("Mul", pool, const("scale", 1 / 64), out="ys"), const("bias", bias), out="depth")
    put("depth", (1, 1, 64, 128), head="depth", parameters={"activation": "exp", "metric": True})
  if "segmentation" in tasks:
    pool = node("MaxPool", "u", out="up", kernel_shape=[2, 2], strides=[2, 2])
    d = node("Sub", pool, const("k", np.arange(5).reshape(1, 5, 1, 1)), out="ud")
    node("Neg", node("Mul", d, d, out="uq"), out="segmentation")
    put("segmentation", (1, 5, 64, 128), head="segmentation", classes=list(CLASSES))
  if "objects" in tasks:
    heat = node(
      "Mul", node("MaxPool", "v", out="vp", kernel_shape=[4, 4], strides=[4, 4]), const("gain", 0.1), out="vh"
    )
    one = node("Add", heat, const("cold", -10), out="heat1")
    node("Concat", one, const("none", np.full((1, 1, 32, 64), -30)), out="objects_heat", axis=1)
    zero = node("Mul", heat, const("zero", 0), out="v0")
    for name, value in (
      ("box", np.full((1, 4, 1, 1), HALF)),
      ("coef", np.ones((1, 16, 1, 1))),
      ("embed", np.ones((1, 16, 1, 1))),
    ):
      node("Add", zero, const(f"c_{name}", value), out=f"objects_{name}")
    node("Add", node("Mul", "y", const("zero2", 0), out="y0"), const("c_proto", np.ones((1, 16, 1, 1))), out="big")
    node("AveragePool", "big", out="objects_proto", kernel_shape=[2, 2], strides=[2, 2])
    shapes = {
      "heat": (2, 32, 64),
      "box": (4, 32, 64),
      "coef": (16, 32, 64),
      "proto": (16, 64, 128),
      "embed": (16, 32, 64),
    }
    for name, shape in shapes.items():
      put(
        f"objects_{name}",
        (1, *shape),
        head="objects",
        **({"classes": ["vehicle", "pedestrian"]} if name == "heat" else {}),
      )
  if "lanes" in tasks:
    # points move only where the state came back
    inputs += [
      {"name": f"lanes_{n}", "shape": s, "dtype": "float32"}
      for n, s in (("points", [1, SLOTS, 2]), ("mask", [1, SLOTS]), ("fresh", [1, SLOTS]))
    ]
    inputs.append({"name": "lanes_hidden", "shape": [1, SLOTS, 1], "dtype": "float32"})
    old = node("Sub", const("one", 1), "lanes_fresh", out="old")
    go = node("Mul", node("Unsqueeze", old, const("last", [2], np.int64), out="old2"), "lanes_hidden", out="go")
    way = node("Mul", go, const("way", [[[2, 0]]]), out="gone")
    node("Add", "lanes_points", way, out="lanes_points_out")
    node("Add", node("Mul", "lanes_mask", const("sure", 9), out="m9"), const("low", -4), out="lanes_visible")
    node("Add", node("Mul", "lanes_hidden", const("zero3", 0), out="h0"), const("one3", 1), out="lanes_hidden_out")
    put("lanes_points_out", (1, SLOTS, 2), head="lanes")
    put("lanes_visible", (1, SLOTS), head="lanes")
    put("lanes_hidden_out", (1, SLOTS, 1))
    entry["state"] = [{"input": "lanes_hidden", "output": "lanes_hidden_out", "initial": 0, "reset": "stream"}]
    entry["point_slots"] = {"count": SLOTS, "mask": "lanes_mask"}
  if "features" in tasks:
    node("AveragePool", "x", out="features", kernel_shape=[8, 8], strides=[8, 8])
    put("features", (1, 6, 16, 32), head="features")
  types = {"uint8": onnx.TensorProto.UINT8, "float32": onnx.TensorProto.FLOAT}
  sides = [
    [helper.make_tensor_value_info(s["name"], types[s["dtype"]], s["shape"]) for s in x] for x in (inputs, outputs)
  ]
  graph = helper.make_graph(nodes, "g", *sides, list(constants.values()))
  return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), entry


def write_bundle(folder, tasks, bias=0.0, name=None):
  folder.mkdir(parents=True)
  model, entry = network(tasks, bias)
  onnx.save(model, str(folder / "all.onnx"))
  provenance = {"teachers": [], "data": [], "license": "MIT", "git_commit": "0"}
  manifest = {
    "name": name or folder.name,
    "version": "1",
    "size": "nano",
    "view": "medmodel",
    "streams": ["narrowRoad"],
    "metrics": [],
  }
  write_manifest(folder, {**manifest, "graphs": [entry], "provenance": provenance})
  return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  root = tmp_path_factory.mktemp("evaluation")
  write_bundle(root / "unified", ("depth", "segmentation", "objects", "lanes"), BIAS)
  write_bundle(root / "solo", ("depth",))
  write_store(root / "store")
  for k, segment in enumerate(SEGMENTS):  # as the simulator leaves them
    folder = root / "routes" / segment / "truth"
    folder.mkdir(parents=True)
    (folder / "truth.json").write_text(
      json.dumps({"time_of_day": "night" if k == 1 else "day", "weather": "rain" if k > 1 else "clear"})
    )
  return root


def run(*args):
  return module.evaluate(parse(module.Options, None, "evaluate", [str(a) for a in args]))


@pytest.fixture(scope="module", autouse=True)
def few_draws():
  with pytest.MonkeyPatch.context() as m:
    m.setattr(Sums, "draws", 100)
    m.setattr(Detections, "draws", 40)
    yield


@pytest.fixture(scope="module")
def result(made):
  return run(
    made / "unified",
    made / "solo",
    made / "store",
    "--teacher",
    "expert",
    "--routes",
    made / "routes",
    "--out",
    made / "out",
  )


def value(result, task, column, metric, reference="simulator"):
  return result["tables"][reference][task][column][metric]["value"]


def test_known_answers(result):
  assert result["frames"] == 4 * T
  # to float16 of the truth, 2**-11
  assert (
    value(result, "depth", "unified", "abs_rel") == pytest.approx(np.exp(BIAS) - 1, abs=6e-4)
    and value(result, "depth", "unified", "delta1") == 1
  )
  assert value(result, "depth", "unified", "abs_rel_median") < 6e-4 and value(result, "depth", "solo", "abs_rel") < 6e-4
  assert value(result, "segmentation", "unified", "miou") == 1 and set(
    result["tables"]["simulator"]["segmentation"]
  ) == {"unified", "mean map"}
  for task in ("objects", "masks"):
    assert (
      value(result, task, "unified", "ap") == pytest.approx(1) and value(result, task, "unified", "recall_mostly") == 1
    )
  assert value(result, "masks", "unified", "mask_iou") == 1 and value(
    result, "video", "unified", "j_and_f"
  ) == pytest.approx(1)
  assert (
    value(result, "identity", "unified", "idf1") == 1 and value(result, "identity", "unified", "kept_occluded") == 1
  )
  lanes = result["tables"]["simulator"]["lanes"]["unified"]
  assert (
    lanes["delta_avg"]["value"] == 1 and lanes["delta_after"]["value"] == 1
  )  # only if the state is fed, and queries begin where they should
  n = 2 * (T - 1) + (T - 6)
  assert lanes["occlusion_accuracy"]["value"] == pytest.approx(1 - 4 / n) and lanes["average_jaccard"][
    "value"
  ] == pytest.approx((n - 4) / n)


def test_the_teacher_and_the_gap_to_it(result):
  assert (
    value(result, "depth", "expert", "abs_rel") == pytest.approx(0.05, abs=6e-4)
    and value(result, "objects", "expert", "recall") == 0.5
  )
  cell = result["tables"]["simulator"]["depth"]["unified"]["abs_rel"]
  assert cell["gap_teacher"] == pytest.approx((np.exp(BIAS) - 1.05) / 0.05, abs=0.05) and cell["marked"] == [
    "gap_reference",
    "gap_teacher",
  ]
  assert result["tables"]["simulator"]["depth"]["solo"]["abs_rel"]["marked"] == []
  # agreement with the teacher, who says that half the objects are not there
  assert value(result, "depth", "solo", "abs_rel", "expert") == pytest.approx(1 - 1 / 1.05, abs=6e-4)
  assert (
    value(result, "objects", "unified", "recall", "expert") == 1
    and value(result, "objects", "unified", "precision", "expert") == 0.5
  )
  assert "gap_teacher" not in result["tables"]["expert"]["depth"]["solo"]["abs_rel"]


def test_rivals_and_differences(result):
  assert (
    value(result, "depth", "mean map", "abs_rel") > 0.01 and 0.1 < value(result, "segmentation", "mean map", "miou") < 1
  )
  # points that stand still: from 1 px of 256 a frame on they are off by one threshold after the other
  assert 0.2 < value(result, "lanes", "hold still", "delta_avg") < 0.9
  assert value(result, "identity", "unified, IoU only", "idf1") == 1
  found = {(d["a"], d["b"], d["task"]): d for d in result["differences"]}
  d = found["unified", "solo", "depth"]
  assert (
    d["difference"] == pytest.approx(np.exp(BIAS) - 1, abs=1e-3)
    and d["low"] > 0.1
    and not d["better"]
    and d["routes"] == 3
  )
  assert found["unified", "hold still", "lanes"]["better"] and found["solo", "mean map", "depth"]["better"]
  assert ("solo", "unified, IoU only", "identity") not in found and not found[
    "unified", "unified, IoU only", "identity"
  ]["better"]


def test_a_mean_map_never_sees_the_segment_it_is_judged_on(made):
  """Nor does a rival from other data: with segments as different as here, its own would be better."""
  alone = run(made / "solo", made / "store", "--segment", SEGMENTS[0], "--out", made / "alone")
  assert set(alone["tables"]["simulator"]["depth"]) == {"solo"}  # there is no other segment to learn from
  assert alone["differences"] == [] and "low" not in alone["tables"]["simulator"]["depth"]["solo"]["abs_rel"]
  other = write_store(made / "other", ["00000007--0000000002--0"])
  with_other = run(made / "solo", made / "store", "--rival-data", other, "--out", made / "with_other")
  assert "mean map" in with_other["tables"]["simulator"]["depth"] and with_other["rival_data"] == str(other)


def test_conditions(result):
  assert (
    set(result["conditions"]) == {"day", "night", "clear", "rain"} and result["conditions"]["night"]["segments"] == 1
  )
  assert result["conditions"]["rain"]["tables"]["simulator"]["depth"]["unified"]["abs_rel"] == pytest.approx(
    np.exp(BIAS) - 1, abs=6e-4
  )


def test_of_frames_that_lie_apart_it_is_said_what_that_means_for_what_is_followed(result):
  assert result["every"] == 1 and report.sparse(result) == ""
  apart = {**result, "every": 2}
  line = report.sparse(apart)
  assert "Tracks of points" in line and "Depth" not in line
  assert line.endswith("of 2 frames one is labeled, so that things move 2 times as far between two as on the road")
  assert line in report.left_out(apart) and line not in report.left_out(result)
  assert report.sparse({**apart, "tables": {"simulator": {"depth": {}}}}) == ""


def test_page_and_json(made, result):
  page = (made / "out" / "evaluation.html").read_text()
  assert json.loads((made / "out" / "evaluation.json").read_text())["tables"] == result["tables"]
  assert (
    set(result["latency_ms"]["unified"]["all"]) == {"p50", "p99"}
    and "Latency" in page
    and "hold still" in page
    and "behind the teacher" in page
  )
  # worst frames of what errs: the depth of both (of one only by float16), the points' visibility; a picture each, one
  # in 40 frames of a segment
  assert (
    page.count("data:image/jpeg") >= 6 and "unified, Tracks of points" in page and "unified, Segmentation" not in page
  )
  assert "{{" not in page and "None" not in page.replace("None: nothing", "")
  assert all(g.definition for g in GROUPS.values()) and not list((made / "out").glob(".*"))


def test_the_pages_folder_starts_it_again(made, result, monkeypatch):
  """With bundles that were named, and nothing of it is in the page."""
  options = parse(module.Options, None, "evaluate", ["--config", str(made / "out")])
  assert options.bundles == (made / "unified", made / "solo") and options.routes == (made / "routes",)
  assert options.data == made / "store" and options.teacher == ("expert",) and options.output == made / "out"
  assert str(made) not in (made / "out" / "evaluation.html").read_text()
  monkeypatch.chdir(made)
  save(parse(module.Options, None, "evaluate", ["solo", "fair_unified_small", "store"]), made / "out")
  again = parse(module.Options, None, "evaluate", ["--config", str(made / "out")])
  assert again.bundles == (made / "solo", Path("fair_unified_small")) and again.data == made / "store"


def test_openpilot_in_a_real_log(made, tmp_path):
  """A store without the simulator: its lines agree with the lane class where it is drawn, and its lead with the
  depth."""
  root = tmp_path / "store"
  store = LabelStore(root, create=True)
  frames, depth, classes, boxes, _ = world(0)
  classes[:] = 1
  classes[:, 40, :] = 2
  frames[:, 4] = classes.repeat(2, 1).repeat(2, 2)
  write_group(
    store,
    SEGMENTS[0],
    "frames",
    [{"name": "frame", "kind": "dense", "dtype": "uint8", "shape": [6, 128, 256]}],
    {"frame": frames},
  )
  write_group(store, SEGMENTS[0], "expert", [DEPTH], {"depth": depth})
  rows = {
    "frame": np.arange(4),
    "track": np.array([1, 1, 2, 2]),
    "x": np.full(4, 200.0),
    "y": np.array([161.5, 161.5, 165.5, 100.0]),
  }
  lines = {
    **rows,
    "visible": np.ones(4, bool),
    "cls": rows["track"],
    "score": np.array([0.9, 0.1, 0.9, 0.9]),
    "road_x": np.full(4, 10.0),
  }
  x, y = (float(boxes[c][0]) for c in ("x0", "y1"))
  far = float(depth[0, int((y + 4.5) / 4), int((x + 20.5) / 4)])
  lead = {
    "frame": 0,
    "track": 0,
    "x": x + 20,
    "y": y + 4,
    "visible": True,
    "cls": 0,
    "score": 0.9,
    "road_x": far / 1.25,
  }
  leads = {k: np.array([v]) for k, v in lead.items()}
  named = [
    {"name": "lines", "kind": "points", "classes": ["lane0", "lane1", "lane2"]},
    {"name": "leads", "kind": "points", "classes": ["lead0", "lead1"]},
  ]
  write_group(store, SEGMENTS[0], "openpilot", named, {"lines": lines, "leads": leads})
  got = run(made / "unified", root, "--teacher", "expert", "--out", tmp_path / "out")
  assert got["truth"] is None and set(got["tables"]) == {"expert", "openpilot"}
  log = got["tables"]["openpilot"]["log"]
  assert (
    log["unified"]["log_lane_recall"]["value"] == pytest.approx(2 / 3)
    and log["unified"]["log_lead_recall"]["value"] == 1
  )
  assert log["unified"]["abs_rel_lead"]["value"] == pytest.approx(1.25 * np.exp(BIAS) - 1, abs=2e-3)
  assert log["expert"]["abs_rel_lead"]["value"] == pytest.approx(0.25, abs=2e-3)
  alone = run(
    made / "unified", root, "--teacher", "openpilot", "--out", tmp_path / "alone"
  )  # its lines are no tracks of points
  assert set(alone["tables"]) == {"openpilot"} and alone["tables"]["openpilot"]["log"]["unified"] == log["unified"]


def test_bad_input_is_one_line(made, tmp_path):
  write_bundle(tmp_path / "features", ("features",))
  empty = tmp_path / "empty"
  LabelStore(empty, create=True)
  no_frames = tmp_path / "no_frames"
  store = LabelStore(no_frames, create=True)
  _, depth, *_ = world(0)
  write_group(store, SEGMENTS[0], "simulator", [DEPTH], {"depth": depth})
  cases = [
    ([made / "nothing", made / "store"], "no bundle"),
    ([tmp_path / "features", made / "store"], "no output that can be evaluated"),
    ([made / "solo", tmp_path / "features" / "x"], "no label store"),
    ([made / "solo", empty], "no model frames"),
    ([made / "solo", no_frames], "no model frames"),
    ([made / "solo", made / "store", "--truth", "sam"], "no labels by 'sam'"),
    ([made / "solo", made / "store", "--teacher", "sam"], "no labels by 'sam'"),
    ([made / "solo", made / "store", "--rival-data", made / "store"], "segments that are evaluated"),
    ([made / "solo", made / "store", "--frames", 0], "--frames 0: it is at least 1"),
    ([made / "solo", made / "store", "--frames", -3], "--frames -3: it is at least 1"),
    ([made / "solo", made / "store", "--routes", made / "nope"], "nope: there is no such folder"),
  ]
  for args, said in cases:
    with pytest.raises((UserError, module.BundleError)) as e:
      run(*args, "--out", tmp_path / "out")
    assert said in str(e.value) and "\n" not in str(e.value), args
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.tools.fair.evaluation.evaluate", *map(str, cases[3][0])],
    capture_output=True,
    text=True,
  )
  assert r.returncode == 2 and r.stderr.startswith("error: ") and r.stderr.count("\n") == 1
  assert not (tmp_path / "out").exists()


def test_truth_that_says_nothing_of_the_students_task(made, tmp_path):
  store = LabelStore(tmp_path / "store", create=True)
  frames, _, classes, *_ = world(0)
  write_group(
    store,
    SEGMENTS[0],
    "frames",
    [{"name": "frame", "kind": "dense", "dtype": "uint8", "shape": [6, 128, 256]}],
    {"frame": frames},
  )
  write_group(store, SEGMENTS[0], "simulator", [CLASS], {"segmentation": classes})
  with pytest.raises(UserError, match="say nothing of depth"):
    run(made / "solo", tmp_path / "store", "--out", tmp_path / "out")


def test_nan_is_no_result(made, tmp_path):
  folder = write_bundle(tmp_path / "nan", ("depth",), float("nan"))
  with pytest.raises(UserError, match="puts out NaN or Inf in depth at frame 1000"):
    run(folder, made / "store", "--out", tmp_path / "out")


def test_what_cannot_be_decoded_is_refused(made, tmp_path):
  folder = write_bundle(tmp_path / "odd", ("depth",))
  manifest = json.loads((folder / "manifest.json").read_text())
  manifest["graphs"][0]["outputs"][0]["head"] = "tea"
  write_manifest(folder, manifest)
  with pytest.raises(module.BundleError, match="wants the head 'tea'"):
    run(folder, made / "store", "--out", tmp_path / "out")
