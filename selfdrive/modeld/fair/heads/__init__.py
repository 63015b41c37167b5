"""Heads: pure numpy functions from a graph's raw output to physical quantities; the manifest names them.

Outputs of one graph that name the same head are decoded together; parameters.part says which is which."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads import depth, detector, features, lanes, objects, oriented, segmentation

# decode({part: raw output}, {part: its entry in the manifest}, valid (256, 512) bool of the model view, height of the
# camera above the road, m) -> named quantities
Decode = Callable[[dict[str, np.ndarray], dict[str, dict[str, Any]], np.ndarray, float], Any]


@dataclass(frozen=True)
class Head:
  decode: Decode
  parts: tuple[str, ...]  # that a graph must put out
  more: tuple[str, ...] = ()  # that it may
  classes: str = ""  # the part whose manifest entry names the classes
  axis: int = 1  # of that part's shape that counts them


def single(name: str, decode: Callable[[np.ndarray, dict[str, Any], np.ndarray], Any]) -> Decode:
  """A head of one output that does not depend on the camera's height."""
  return lambda raw, specs, valid, height: decode(raw[name], specs[name], valid)


def several(decode: Callable[[dict[str, np.ndarray], dict[str, dict[str, Any]], np.ndarray], Any]) -> Decode:
  """A head of several outputs that does not depend on the camera's height."""
  return lambda raw, specs, valid, height: decode(raw, specs, valid)


HEADS: dict[str, Head] = {
  "depth": Head(
    lambda raw, specs, valid, height: depth.decode(raw["depth"], specs["depth"], valid, height), ("depth",)
  ),
  "segmentation": Head(single("segmentation", segmentation.decode), ("segmentation",), classes="segmentation"),
  "features": Head(single("features", features.decode), ("features",)),
  "objects": Head(several(objects.decode), ("heat", "box"), ("coef", "proto", "embed"), classes="heat"),
  "detector": Head(several(detector.decode), ("logits", "boxes"), ("masks",), classes="logits", axis=2),
  "oriented": Head(several(oriented.decode), ("heat", "box"), classes="heat"),
  "lanes": Head(several(lanes.decode), ("points", "visible")),
}


def part_of(spec: dict[str, Any]) -> str:
  """Which part of its head an output is: parameters.part, else what its name says: 'objects_heat' is 'heat',
  'lanes_points_out' is 'points'.

  A head of one output takes it whatever it is called."""
  head = spec["head"]
  parts = HEADS[head].parts
  if len(parts) == 1 and not HEADS[head].more:
    return parts[0]
  return str(spec.get("parameters", {}).get("part", spec["name"])).removeprefix(head + "_").removesuffix("_out")
