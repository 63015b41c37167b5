"""A TFLite segmenter as a teacher, described by a small YAML beside this file: uint8 RGB in, one class id a pixel out.
It runs in LiteRT (`pip install -e .[tflite]`)."""

import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State, fitted, hash_weights, threads_of_cpu
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_yaml

FITS = ("stretch", "center")


def read_description(name: str) -> dict[str, Any]:
  """Of the YAML of that name in this folder."""
  read = read_yaml(Path(__file__).with_name(f"{name}.yaml"))
  assert read["input"]["fit"] in FITS, read["input"]["fit"]
  return read


class TfliteTeacher:
  """'segmentation': the network's class ids, of the picture that it was given; where it is shown the view alone, of
  that. Raises UserError where the file is no TFLite network, or another than its description says."""

  stateful = False
  sees = "picture"
  whole = False
  FIXED = ("config",)

  def __init__(self, name: str, entry: Entry, path: Path | None, config: str = "", device: str | None = None):
    assert path is not None
    try:
      from ai_edge_litert.interpreter import Interpreter
    except ModuleNotFoundError:
      raise UserError(f"teacher '{name}' needs the package ai-edge-litert: pip install -e .[tflite]") from None
    if device not in (None, "cpu"):
      raise UserError(f"teacher '{name}' runs on the CPU alone; leave --device out")
    self.name, self.license, self.model_id = name, entry.license, path.name
    self.checkpoint_hash, self.config = hash_weights(path), read_description(config)
    try:
      self.net: Any = Interpreter(str(path), num_threads=threads_of_cpu())
      self.net.allocate_tensors()
      (given,), (said,) = self.net.get_input_details(), self.net.get_output_details()
    except (ValueError, RuntimeError) as e:
      raise UserError(
        f"{path} is no TFLite network of one input and one output: {' '.join(str(e).split())[:120]}"
      ) from None
    self.side = tuple(self.config["input"]["size"])  # height, width
    if (
      tuple(given["shape"]) != (1, *self.side, 3)
      or given["dtype"] != np.uint8
      or tuple(said["shape"]) != (1, *self.side)
    ):
      raise UserError(
        f"{path} takes {given['dtype'].__name__}{list(given['shape'])} and gives {list(said['shape'])}; its "
        f"description wants uint8{[1, *self.side, 3]} and {[1, *self.side]}"
      )
    self.given, self.said = given["index"], said["index"]
    self.classes = tuple(self.config["classes"])
    self.labels: list[Label] = []
    self.lock = threading.Lock()  # an interpreter has one set of tensors

  def picture_size(self, width: int, height: int) -> tuple[int, int]:
    """(width, height) at which a picture of this size needs no more resizing."""
    return fitted((width, height), self.side[::-1], self.config["input"]["fit"] == "stretch")

  def view_size(self) -> tuple[int, int]:
    w, h = self.picture_size(VIEW_W, VIEW_H)
    return w // 2 * 2, h // 2 * 2

  def prepare(self, height: int, width: int) -> None:
    self.size = [height, width]
    self.fit_w, self.fit_h = self.picture_size(width, height)
    self.left, self.top = (self.side[1] - self.fit_w) // 2, (self.side[0] - self.fit_h) // 2
    shape = (self.fit_h, self.fit_w) if self.whole else (VIEW_H, VIEW_W)
    self.labels = [Label("segmentation", "dense", "uint8", shape, "class", self.classes)]

  def settings(self) -> dict[str, Any]:
    return {"description": self.config, "size": self.size}

  def ids(self, rgb: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 RGB -> (fit_h, fit_w) uint8, the network's own pixels under the picture."""
    blob = np.full((*self.side, 3), self.config["input"]["pad"], np.uint8)
    inside = slice(self.top, self.top + self.fit_h), slice(self.left, self.left + self.fit_w)
    blob[inside] = cv2.resize(rgb, (self.fit_w, self.fit_h), interpolation=cv2.INTER_LINEAR)
    with self.lock:
      self.net.set_tensor(self.given, blob[None])
      self.net.invoke()
      out = self.net.get_tensor(self.said)[0]
    return out[inside].astype(np.uint8)

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    h, w = self.labels[0].shape
    ids = [self.ids(np.ascontiguousarray(x.transpose(1, 2, 0))) for x in clip.rgb]
    if (h, w) != (self.fit_h, self.fit_w):
      ids = [cv2.resize(x, (w, h), interpolation=cv2.INTER_NEAREST_EXACT) for x in ids]
    return {"segmentation": np.stack(ids)}, None
