"""Bundles for tests, written with onnx alone: pooled luma as log depth and five classes by thresholds on it; objects,
boxes, lane points known exactly."""

import copy
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from openpilot.selfdrive.modeld.fair.bundle import Bundle, write_manifest

CLASSES = ["background", "road", "lane", "vehicle", "pedestrian"]


def manifest(name: str = "tiny") -> dict:
  return {
    "name": name,
    "version": "1",
    "size": "tiny",
    "view": "medmodel",
    "streams": ["narrowRoad"],
    "graphs": [
      {
        "name": "scene",
        "file": "scene.onnx",
        "period": 1,
        "inputs": [
          {
            "name": "frame",
            "shape": [1, 6, 128, 256],
            "dtype": "uint8",
            "frames": [0],
            "spacing_ms": 50,
            "gap": "ignore",
          }
        ],
        "state": [],
        "outputs": [
          {
            "name": "depth",
            "shape": [1, 1, 64, 128],
            "dtype": "float32",
            "head": "depth",
            "parameters": {"activation": "exp", "metric": True},
          },
          {
            "name": "segmentation",
            "shape": [1, 5, 64, 128],
            "dtype": "float32",
            "head": "segmentation",
            "parameters": {},
            "classes": CLASSES,
          },
        ],
      }
    ],
    "provenance": {"teachers": [], "data": [], "license": "MIT", "git_commit": "none"},
    "metrics": [],
  }


def write_bundle(folder: Path, nan: bool = False, name: str = "tiny", bad: float = np.nan) -> Bundle:
  folder.mkdir(parents=True, exist_ok=True)
  w_depth = np.full((1, 6, 1, 1), 1 / 255 / 2, np.float32)
  w_seg = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6, 1, 1) / 255
  bias = np.array([bad if nan else 1.0], np.float32)
  nodes = [
    helper.make_node("Cast", ["frame"], ["x"], to=TensorProto.FLOAT),
    helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
    helper.make_node("Conv", ["pooled", "w_depth", "bias"], ["depth"]),
    helper.make_node("Conv", ["pooled", "w_seg"], ["segmentation"]),
  ]
  graph = helper.make_graph(
    nodes,
    "scene",
    [helper.make_tensor_value_info("frame", TensorProto.UINT8, [1, 6, 128, 256])],
    [
      helper.make_tensor_value_info("depth", TensorProto.FLOAT, [1, 1, 64, 128]),
      helper.make_tensor_value_info("segmentation", TensorProto.FLOAT, [1, 5, 64, 128]),
    ],
    [
      numpy_helper.from_array(w_depth, "w_depth"),
      numpy_helper.from_array(w_seg, "w_seg"),
      numpy_helper.from_array(bias, "bias"),
    ],
  )
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
  model.ir_version = 8
  onnx.checker.check_model(model)
  onnx.save(model, str(folder / "scene.onnx"))
  return write_manifest(folder, manifest(name))


def write_loop(folder: Path, name: str = "tiny", level: int | None = None) -> Bundle:
  """As write_bundle()'s, but its graph never returns from a frame whose first value is `level`; from none at all
  without one."""
  write_bundle(folder)
  model = onnx.load(str(folder / "scene.onnx"))
  value = helper.make_tensor_value_info
  body = helper.make_graph(
    [helper.make_node("Identity", ["go_in"], ["go_out"]), helper.make_node("Identity", ["v_in"], ["v_out"])],
    "body",
    [value("i", TensorProto.INT64, []), value("go_in", TensorProto.BOOL, []), value("v_in", TensorProto.FLOAT, [1])],
    [value("go_out", TensorProto.BOOL, []), value("v_out", TensorProto.FLOAT, [1])],
  )
  first = [
    helper.make_node("Cast", ["frame"], ["loop_x"], to=TensorProto.FLOAT),
    helper.make_node("Slice", ["loop_x", "zero4", "one4"], ["loop_level4"]),
    helper.make_node("Reshape", ["loop_level4", "no_axes"], ["loop_level"]),
    helper.make_node("Equal", ["loop_level", "loop_level" if level is None else "the_level"], ["go"]),
    helper.make_node("Loop", ["", "go", "bias"], ["looped"], body=body),
  ]
  for node in model.graph.node:
    node.input[:] = ["looped" if i == "bias" else i for i in node.input]
  nodes = [*first, *model.graph.node]
  del model.graph.node[:]
  model.graph.node.extend(nodes)
  model.graph.initializer.extend(
    numpy_helper.from_array(v, k)
    for k, v in (
      ("zero4", np.zeros(4, np.int64)),
      ("one4", np.ones(4, np.int64)),
      ("no_axes", np.zeros(0, np.int64)),
      ("the_level", np.array(level or 0, np.float32)),
    )
  )
  onnx.checker.check_model(model)
  onnx.save(model, str(folder / "scene.onnx"))
  return write_manifest(folder, manifest(name))


OBJECT_CLASSES = ["vehicle", "pedestrian", "cyclist"]
SLOTS, TEMPLATE, HIDDEN = 128, 4, 2


def save(folder: Path, name: str, nodes: list, inputs: list, outputs: list, constants: dict[str, np.ndarray]) -> dict:
  """Writes <name>.onnx; inputs and outputs are (name, shape), the frame uint8, all else float32. Every graph may use
  `level`, the frame's first value, and `poison`, which is 0, or NaN where that value is 255. Returns the graph's entry
  in the manifest."""
  first = [
    helper.make_node("Cast", ["frame"], ["x"], to=TensorProto.FLOAT),
    helper.make_node("Slice", ["x", "zero4", "one4"], ["level4"]),
    helper.make_node("Reshape", ["level4", "scalar"], ["level"]),
    helper.make_node("Sub", ["limit", "level"], ["below"]),
    helper.make_node("Sqrt", ["below"], ["root"]),
    helper.make_node("Mul", ["root", "zero"], ["poison"]),
  ]
  constants = {
    "zero4": np.zeros(4, np.int64),
    "one4": np.ones(4, np.int64),
    "scalar": np.ones(1, np.int64),
    "limit": np.array([254.5], np.float32),
    "zero": np.zeros(1, np.float32),
    **constants,
  }
  all_inputs = [("frame", [1, 6, 128, 256]), *inputs]
  info = [
    helper.make_tensor_value_info(n, TensorProto.UINT8 if n == "frame" else TensorProto.FLOAT, s) for n, s in all_inputs
  ]
  graph = helper.make_graph(
    first + nodes,
    name,
    info,
    [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs],
    [numpy_helper.from_array(v, k) for k, v in constants.items()],
  )
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
  model.ir_version = 8
  onnx.checker.check_model(model)
  onnx.save(model, str(folder / f"{name}.onnx"))
  entry = {
    "name": name,
    "file": f"{name}.onnx",
    "period": 1,
    "state": [],
    "inputs": [{"name": n, "shape": list(s), "dtype": "uint8" if n == "frame" else "float32"} for n, s in all_inputs],
    "outputs": [{"name": n, "shape": list(s), "dtype": "float32"} for n, s in outputs],
  }
  entry["inputs"][0].update(frames=[0], spacing_ms=50, gap="ignore")
  return entry


def objects_graph(folder: Path, raw: dict[str, np.ndarray], name: str = "objects") -> dict:
  """Puts out `raw` {part: array}, the heat plus level / 100; NaN where the level is 255."""
  nodes, constants = [], {"hundredth": np.array([0.01], np.float32)}
  for part, array in raw.items():
    constants[f"c_{part}"] = array
    nodes.append(
      helper.make_node("Add", [f"c_{part}", "poison"], [f"p_{part}" if part == "heat" else f"objects_{part}"])
    )
  nodes += [
    helper.make_node("Mul", ["level", "hundredth"], ["shift"]),
    helper.make_node("Add", ["p_heat", "shift"], ["objects_heat"]),
  ]
  entry = save(folder, name, nodes, [], [(f"objects_{part}", list(a.shape)) for part, a in raw.items()], constants)
  for out, part in zip(entry["outputs"], raw, strict=True):
    out.update(head="objects", parameters={"part": part})
    if part == "heat":
      out["classes"] = OBJECT_CLASSES
  return entry


def detector_graph(folder: Path, logits: np.ndarray, boxes: np.ndarray) -> dict:
  nodes = [
    helper.make_node("Identity", ["c_logits"], ["detector_logits"]),
    helper.make_node("Identity", ["c_boxes"], ["detector_boxes"]),
  ]
  entry = save(
    folder,
    "detector",
    nodes,
    [],
    [("detector_logits", list(logits.shape)), ("detector_boxes", list(boxes.shape))],
    {"c_logits": logits, "c_boxes": boxes},
  )
  entry["outputs"][0].update(head="detector", parameters={"part": "logits"}, classes=OBJECT_CLASSES)
  entry["outputs"][1].update(head="detector", parameters={"part": "boxes"})
  return entry


def lanes_graph(folder: Path, reset: str = "gap") -> dict:
  """Points in use that are not fresh move 2 px down; the template counts frames, the hidden state halves itself and
  adds the level; visible: logit 3."""
  n = SLOTS
  nodes = [
    helper.make_node("Sub", ["one", "lanes_fresh"], ["old"]),
    helper.make_node("Mul", ["old", "lanes_mask"], ["moves"]),
    helper.make_node("Reshape", ["moves", "column"], ["moves3"]),
    helper.make_node("Mul", ["moves3", "step"], ["way"]),
    helper.make_node("Add", ["lanes_points", "way"], ["moved"]),
    helper.make_node("Add", ["moved", "poison"], ["lanes_points_out"]),
    helper.make_node("Add", ["lanes_template", "one"], ["counted"]),
    helper.make_node("Add", ["counted", "poison"], ["lanes_template_out"]),
    helper.make_node("Mul", ["lanes_hidden", "half"], ["halved"]),
    helper.make_node("Add", ["halved", "level"], ["lanes_hidden_out"]),
    helper.make_node("Add", ["three", "poison"], ["lanes_visible"]),
  ]
  points, slot, template, hidden = [1, n, 2], [1, n], [1, n, TEMPLATE], [1, n, HIDDEN]
  entry = save(
    folder,
    "lanes",
    nodes,
    [
      ("lanes_points", points),
      ("lanes_mask", slot),
      ("lanes_fresh", slot),
      ("lanes_template", template),
      ("lanes_hidden", hidden),
    ],
    [
      ("lanes_points_out", points),
      ("lanes_visible", slot),
      ("lanes_template_out", template),
      ("lanes_hidden_out", hidden),
    ],
    {
      "one": np.ones(1, np.float32),
      "half": np.array([0.5], np.float32),
      "column": np.array([1, n, 1]),
      "step": np.array([0, 2], np.float32),
      "three": np.full(slot, 3, np.float32),
    },
  )
  entry["state"] = [
    {"output": f"lanes_{k}_out", "input": f"lanes_{k}", "initial": 0, "reset": reset} for k in ("template", "hidden")
  ]
  entry["point_slots"] = {"count": n, "mask": "lanes_mask"}
  entry["outputs"][0].update(head="lanes", parameters={"part": "points"})
  entry["outputs"][1].update(head="lanes", parameters={"part": "visible"})
  return entry


def write_graphs(folder: Path, graphs: list[dict], name: str = "tiny") -> Bundle:
  """The graphs' .onnx files are in the folder already."""
  return write_manifest(folder, {**copy.deepcopy(manifest(name)), "graphs": graphs})
