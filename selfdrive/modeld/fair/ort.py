"""ONNX Runtime, for all that use it: its telemetry (a device id and facts of the machine, on Linux since 1.29) is off
before it is loaded, here and in every process that is started from here."""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import onnxruntime as ort

__all__ = ["ort"]
