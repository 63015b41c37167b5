"""What a group of the label store says of itself: group.json, checked, and the names and units that its Zarr arrays
carry."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.heads.ground import MAX_HEIGHT, MIN_HEIGHT
from openpilot.tools.fair.labels.rules import stale_rules
from openpilot.tools.fair.labels.views import view_intrinsics
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_json

VERSION = 1
CHUNK = 64  # rows of a shard, of a table's file, and of what a killed run loses
NAME = re.compile(r"[A-Za-z0-9_][\w .+-]*")  # of a label: it is part of files' names


def frame_of_reference(spec: InputSpec) -> str:
  """Of the labels of an input, for people."""
  w, h = spec.width, spec.height
  return (
    f"pixels of the {'view' if spec.kind == 'model_frame' else 'input'}'s {w}x{h} picture, (x, y), integers at pixel "
    f"centers; pixel i of n is centered on x = (i + 0.5) {w} / n - 0.5, of y with {h}"
  )


def dimensions(label: Label) -> tuple[str, ...]:
  """Of a dense label's array: what xarray and others call its axes. Those of the picture are each label's own, as their
  sizes differ."""
  names = {0: (), 1: ("value",), 2: ("y", "x"), 3: ("channel", "y", "x")}.get(len(label.shape)) or tuple(
    f"dim{i}" for i in range(len(label.shape))
  )
  return ("row", *(f"{label.name}_{n}" for n in names))


def attributes(label: Label, meta: dict[str, Any]) -> dict[str, Any]:
  """Of a dense label's array, by the CF conventions where they have a word for it."""
  units = "m" if label.unit == "m" else "1"
  name = f"{label.name} by {meta['teacher']['name']}"
  out: dict[str, Any] = {
    "long_name": name,
    "units": units,
    "kind": {"m": "metric", "": label.name}.get(label.unit, label.unit),
    "frame_of_reference": frame_of_reference(InputSpec.from_dict(meta.get("input"))),
  }
  if label.classes:
    meanings = " ".join(c.replace(" ", "_") for c in label.classes)
    out |= {"classes": list(label.classes), "flag_values": list(range(len(label.classes))), "flag_meanings": meanings}
  if label.unit == "m":
    out["comment"] = "depth along the optical axis of the view, not along the ray; inf: the sky"
  return out | {"view": meta["view"]["name"]}


def read_meta(path: Path) -> dict[str, Any]:
  """group.json, as far as all that reads labels relies on it. Raises ValueError, whose text says what is wrong."""
  meta = read_json(path)
  if not isinstance(meta, dict):
    raise ValueError("group.json is no JSON object")
  if meta.get("version") != VERSION:
    raise ValueError(f"group.json is of version {meta.get('version')}, this program reads {VERSION}")
  for name, kind in (
    ("segment", str),
    ("teacher", dict),
    ("labels", list),
    ("view", dict),
    ("camera", dict),
    ("every", int),
    ("chunk", int),
  ):
    if not isinstance(meta.get(name), kind):
      raise ValueError(f"group.json has no right '{name}'")
  teacher = meta["teacher"]
  # on disk it keeps the spelling of the first stores: another one would be another key, and all would be labeled anew
  if "license" not in teacher and "licence" in teacher:
    teacher["license"] = teacher["licence"]
  if wrong := [k for k in ("name", "model_id", "checkpoint", "license") if not isinstance(teacher.get(k), str)]:
    raise ValueError(f"group.json has no right '{wrong[0]}' of its teacher")
  if meta["chunk"] != CHUNK:
    raise ValueError(f"group.json has chunks of {meta['chunk']} rows, this program reads {CHUNK}")
  try:
    meta["camera"]["width"], meta["camera"]["height"], meta["camera"]["rpy"]
    (
      float(meta["camera"]["intrinsics"][0][0]),
      view_intrinsics(meta["view"]["name"], meta["view"]["width"], meta["view"]["height"]),
    )
    for m in meta["labels"]:
      if not NAME.fullmatch(m["name"]):
        raise ValueError(f"group.json has a label '{m['name']}', which is no name")
      np.dtype(m["dtype"]), tuple(m["shape"]), tuple(m["classes"])
    if "camera_height" in meta and not (
      type(meta["camera_height"]) in (int, float) and MIN_HEIGHT <= meta["camera_height"] <= MAX_HEIGHT
    ):
      raise ValueError(f"group.json has a camera_height that is none of {MIN_HEIGHT} to {MAX_HEIGHT} m")
    stale_rules(meta)
    InputSpec.from_dict(meta.get("input"))
  except UserError as e:
    raise ValueError(f"group.json: {e}") from None
  except (KeyError, IndexError, TypeError, AttributeError, ArithmeticError) as e:
    raise ValueError(f"group.json lacks or garbles {e}") from None
  return meta
