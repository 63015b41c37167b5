"""Which of ONNX Runtime's execution providers runs a network: the asked device's, else the best by itself; said aloud.
And its lack of memory, by its text."""

import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.learn.memory import OutOfMemory
from openpilot.tools.lib.errors import UserError

CPU = "CPUExecutionProvider"
PROVIDERS = {"cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider", "cpu": CPU}
INSTALL = {"cuda": "pip install onnxruntime-gpu in place of onnxruntime", "mps": "onnxruntime has it on macOS only"}
# it has no error type for this: the arena's, CUDA's, cuBLAS's
NO_MEMORY = ("failed to allocate memory", "out of memory", "alloc_failed", "bad_alloc")


@cache
def say(what: str) -> None:
  print(what, file=sys.stderr)


def choose_providers(device: str | None) -> tuple[list[str], list[dict[str, Any]]]:
  """'cuda', 'cuda:1', 'mps', 'cpu', or None: CUDA where this onnxruntime has it, else the CPU -> providers and their
  options, the first that is to run it. Raises UserError where this onnxruntime has none for the device."""
  there = ort.get_available_providers()
  kind, _, number = (device or ("cuda" if PROVIDERS["cuda"] in there else "cpu")).partition(":")
  if kind not in PROVIDERS or (number and not number.isdigit()):
    raise UserError(f"ONNX Runtime knows no device '{device}'; {', '.join(PROVIDERS)}")
  if PROVIDERS[kind] not in there:
    raise UserError(
      f"this onnxruntime has no {PROVIDERS[kind]} for --device {device}: {INSTALL[kind]}, or leave --device out"
    )
  options = {"device_id": number} if number and kind == "cuda" else {}
  return ([PROVIDERS[kind], CPU], [options, {}]) if kind != "cpu" else ([CPU], [{}])


def check_session(session: ort.InferenceSession, wanted: str, device: str | None) -> str:
  """-> the provider that runs, said once. A provider whose libraries are not there gives way to the CPU without a word:
  where its device was asked for by name, that is a UserError."""
  runs = session.get_providers()[0]
  if runs != wanted and device is not None:
    raise UserError(
      f"ONNX Runtime could not start {wanted} for --device {device}: its CUDA and cuDNN libraries are missing or of "
      "another version"
    )
  less = ""
  if runs == CPU and device is None and Path("/dev/nvidiactl").exists():
    less = "; there is an NVIDIA GPU: " + (
      INSTALL["cuda"] if wanted == CPU else f"{wanted} did not start, its CUDA and cuDNN libraries do not fit"
    )
  say(f"device: ONNX Runtime's {runs.removesuffix('ExecutionProvider')}{less}")
  return runs


def run(session: ort.InferenceSession, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
  """All outputs. Raises OutOfMemory where memory could not be had."""
  try:
    return session.run(None, feed)
  except Exception as e:
    if any(text in str(e).lower() for text in NO_MEMORY):
      raise OutOfMemory(str(e)) from None
    raise
