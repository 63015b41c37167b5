"""A tiny bundle for tests: pooled luma as log depth, and five classes by thresholds on it. Written with onnx alone."""
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from openpilot.selfdrive.modeld.fair.bundle import Bundle, write_manifest

CLASSES = ["background", "road", "lane", "vehicle", "pedestrian"]


def manifest(name: str = "tiny") -> dict:
  return {
    "name": name, "version": "1", "size": "tiny", "view": "medmodel", "streams": ["narrowRoad"],
    "graphs": [{
      "name": "scene", "file": "scene.onnx", "period": 1,
      "inputs": [{"name": "frame", "shape": [1, 6, 128, 256], "dtype": "uint8", "frames": [0], "spacing_ms": 50, "gap": "ignore"}],
      "state": [],
      "outputs": [
        {"name": "depth", "shape": [1, 1, 64, 128], "dtype": "float32", "head": "depth", "parameters": {"activation": "exp", "metric": True}},
        {"name": "segmentation", "shape": [1, 5, 64, 128], "dtype": "float32", "head": "segmentation", "parameters": {}, "classes": CLASSES},
      ]}],
    "provenance": {"teachers": [], "data": [], "licence": "MIT", "git_commit": "none"},
    "metrics": [],
  }


def write_bundle(folder: Path, nan: bool = False, name: str = "tiny") -> Bundle:
  folder.mkdir(parents=True, exist_ok=True)
  w_depth = np.full((1, 6, 1, 1), 1 / 255 / 2, np.float32)
  w_seg = np.linspace(-1, 1, 30, dtype=np.float32).reshape(5, 6, 1, 1) / 255
  bias = np.array([np.nan if nan else 1.], np.float32)
  nodes = [
    helper.make_node("Cast", ["frame"], ["x"], to=TensorProto.FLOAT),
    helper.make_node("AveragePool", ["x"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
    helper.make_node("Conv", ["pooled", "w_depth", "bias"], ["depth"]),
    helper.make_node("Conv", ["pooled", "w_seg"], ["segmentation"]),
  ]
  graph = helper.make_graph(nodes, "scene", [helper.make_tensor_value_info("frame", TensorProto.UINT8, [1, 6, 128, 256])],
                            [helper.make_tensor_value_info("depth", TensorProto.FLOAT, [1, 1, 64, 128]),
                             helper.make_tensor_value_info("segmentation", TensorProto.FLOAT, [1, 5, 64, 128])],
                            [numpy_helper.from_array(w_depth, "w_depth"), numpy_helper.from_array(w_seg, "w_seg"), numpy_helper.from_array(bias, "bias")])
  model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
  model.ir_version = 8
  onnx.checker.check_model(model)
  onnx.save(model, str(folder / "scene.onnx"))
  return write_manifest(folder, manifest(name))
