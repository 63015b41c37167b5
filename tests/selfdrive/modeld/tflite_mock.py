"""A stand-in of LiteRT's interpreter: a TFLite file is an ONNX file here, and ONNX Runtime computes."""

import sys
from types import ModuleType

import numpy as np
import onnxruntime as ort

KINDS = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}


class Signature:
  def __init__(self, session):
    self.session, self.calls = session, []

  def details(self, values):
    return {v.name: {"shape": np.array(v.shape, np.int32), "dtype": KINDS[v.type]} for v in reversed(values)}

  def get_input_details(self):
    return self.details(self.session.get_inputs())

  def get_output_details(self):
    return self.details(self.session.get_outputs())

  def __call__(self, **inputs):
    names = sorted(o.name for o in self.session.get_outputs())
    return dict(zip(names, self.session.run(names, inputs), strict=True))


class Interpreter:
  def __init__(self, model_content, num_threads):
    assert isinstance(num_threads, int)
    try:
      self.session = ort.InferenceSession(model_content, providers=["CPUExecutionProvider"])
    except Exception:
      raise ValueError("Model provided has model identifier '????',\n should be 'TFL3'") from None

  def allocate_tensors(self):
    pass

  def get_signature_runner(self):
    return Signature(self.session)


def install(monkeypatch):
  package, module = ModuleType("ai_edge_litert"), ModuleType("ai_edge_litert.interpreter")
  module.Interpreter = Interpreter
  monkeypatch.setitem(sys.modules, "ai_edge_litert", package)
  monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", module)
