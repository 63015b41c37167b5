"""A small network of convolutions, with what must stay float behind it, as a bundle; and a store to judge it on."""

import copy
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fair_bundle import CLASSES, manifest
from label_fixture import write_store
from openpilot.selfdrive.modeld.fair.bundle import Bundle, write_manifest

ROUTES = tuple(f"0000000{k}--{'abcdef'[k] * 10}" for k in range(6))


def chain(nodes, weights, outputs, size=(1, 4, 9, 12)):
  value = onnx.helper.make_tensor_value_info
  sides = [value("x", onnx.TensorProto.FLOAT, list(size))], [value(o, onnx.TensorProto.FLOAT, None) for o in outputs]
  constants = [numpy_helper.from_array(w, k) for k, w in weights.items()]
  graph = onnx.helper.make_graph(nodes, "chain", *sides, constants)
  return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def network(seed: int = 0) -> onnx.ModelProto:
  """frame -> 'stem', 'middle' with a residual, then 'out', 'classes'; 'gate' is a product beside the trunk."""
  r = np.random.default_rng(seed)
  weights = {
    "w_stem": r.normal(0, 0.3, (8, 6, 3, 3)),
    "w_middle": r.normal(0, 0.2, (8, 8, 3, 3)),
    "w_out": np.abs(r.normal(0, 0.2, (1, 8, 1, 1))),
    "w_classes": r.normal(0, 0.3, (5, 8, 1, 1)),
    "w_gate": r.normal(0, 0.1, (128, 128)),
    "scale": np.array([1 / 255]),
  }
  nodes = [
    helper.make_node("Cast", ["frame"], ["x"], "cast", to=TensorProto.FLOAT),
    helper.make_node("Mul", ["x", "scale"], ["scaled"], "scaled"),
    helper.make_node("Conv", ["scaled", "w_stem"], ["a"], "stem", strides=[2, 2], pads=[1, 1, 1, 1]),
    helper.make_node("Relu", ["a"], ["b"], "relu"),
    helper.make_node("Conv", ["b", "w_middle"], ["c"], "middle", pads=[1, 1, 1, 1]),
    helper.make_node("Add", ["b", "c"], ["d"], "residual"),
    helper.make_node("Relu", ["d"], ["e"], "relu_2"),
    helper.make_node("Conv", ["e", "w_out"], ["raw"], "out"),
    helper.make_node("MatMul", ["raw", "w_gate"], ["mixed"], "gate"),
    helper.make_node("Mul", ["mixed", "scale"], ["small"], "small"),
    helper.make_node("Add", ["raw", "small"], ["depth"], "sum"),
    helper.make_node("Conv", ["e", "w_classes"], ["segmentation"], "classes"),
  ]
  graph = helper.make_graph(
    nodes,
    "scene",
    [helper.make_tensor_value_info("frame", TensorProto.UINT8, [1, 6, 128, 256])],
    [
      helper.make_tensor_value_info("depth", TensorProto.FLOAT, [1, 1, 64, 128]),
      helper.make_tensor_value_info("segmentation", TensorProto.FLOAT, [1, 5, 64, 128]),
    ],
    [numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()],
  )
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
  model.ir_version = 8
  onnx.checker.check_model(model)
  return model


def write_conv(folder: Path, name: str = "conv", seed: int = 0, size: tuple[int, int] | None = None) -> Bundle:
  """size: height and width of another picture, that its manifest says it takes."""
  folder.mkdir(parents=True)
  onnx.save(network(seed), str(folder / "scene.onnx"))
  said = copy.deepcopy(manifest(name))
  said["graphs"][0]["outputs"][1]["classes"] = CLASSES
  if size is not None:
    said["input"] = {"kind": "model_frame", "height": size[0], "width": size[1], "view": "medmodel"}
    said["graphs"][0]["inputs"][0]["shape"] = [1, 6, size[0] // 2, size[1] // 2]
  return write_manifest(folder, said)


def write_routes(root: Path, count: int = 4, n: int = 4):
  return write_store(root, routes=ROUTES[:count], n=n)
