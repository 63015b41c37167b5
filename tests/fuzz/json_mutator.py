"""JSON made wrong, as values and as text; VALUES are of manifests, which others take as any."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

VALUES = [
  None,
  True,
  False,
  0,
  1,
  -1,
  2,
  3,
  64,
  128,
  256,
  1.5,
  1e308,
  10**30,
  "",
  "frame",
  "depth",
  "uint8",
  "float32",
  "float16",
  "int64",
  "lanes",
  "objects",
  "scene.onnx",
  "../scene.onnx",
  "Bad Name",
  "a\nb",
  "tiny\n",
  "\ud800",
  "x" * 10_000,
  [],
  {},
  [1],
  [0],
  [1, 6, 128, 256],
  [1048576] * 8,
  [2**40],
  {"a": 1},
  ["narrowRoad"],
  ["wideRoad"],
  "sbigmodel",
  "gap",
  ["background", "road", "lane", "vehicle", "pedestrian"],
  ["a"] * 300,
]


def nodes(value: Any) -> Iterator[tuple[Any, Any]]:
  """(parent, key) of everything in it."""
  for key in value if isinstance(value, dict) else range(len(value)):
    yield value, key
    if isinstance(value[key], (dict, list)):
      yield from nodes(value[key])


def change(value: Any, r: random.Random) -> Any:
  """One to three nodes replaced, removed, copied, added to, or made a little wrong."""
  value = copy.deepcopy(value)
  for _ in range(r.choice((1, 1, 1, 2, 3))):
    parent, key = r.choice(list(nodes(value)))
    kind = r.randrange(8)
    old = parent[key]
    if kind == 0:
      del parent[key]
    elif kind == 1 and isinstance(parent, list):
      parent.append(copy.deepcopy(old))
    elif kind == 2 and isinstance(parent, dict):
      name = r.choice(
        [
          "extra",
          "phase",
          "period",
          "rate",
          "budget_ms",
          "state",
          "point_slots",
          "classes",
          "head",
          "parameters",
          key + "\n",
        ]
      )
      parent[name] = copy.deepcopy(r.choice(VALUES))
    elif kind == 3 and isinstance(old, (int, float)) and not isinstance(old, bool):
      parent[key] = r.choice([old + 1, old - 1, -old, old * 2, float(old), old * 10**12, 1e999])
    elif kind == 4 and isinstance(old, str):
      parent[key] = r.choice([old + "\n", old[:-1], old.upper(), old + "x", " " + old])
    elif kind == 5:
      other, k = r.choice(list(nodes(value)))
      parent[key] = copy.deepcopy(other[k])
    else:
      parent[key] = copy.deepcopy(r.choice(VALUES))
    if not any(nodes(value)):
      break
  return value


def spoil_text(text: bytes, r: random.Random) -> bytes:
  kind, at = r.randrange(7), r.randrange(len(text))
  if kind == 0:
    return text[:at]
  if kind == 1:
    return text[:at] + r.randbytes(r.choice((1, 4))) + text[at + 1 :]
  if kind == 2:
    return text[:at] + b"[" * 100_000 + text[at:]
  if kind == 3:
    return text.replace(
      b"128", r.choice([b"NaN", b"Infinity", b"1e999", b"128.0", b"9" * 5000, b"0128", b"\xff", b"-0"]), 1
    )
  if kind == 4:
    return text[:at] + text[max(0, at - 40) : at] + text[at:]
  if kind == 5:
    instead = [
      b'"period": 0',
      b'"period": 1, "period": -1',
      b'"period": true',
      b'"period": 3, "phase": 2',
      b'"period": NaN',
    ]
    return text.replace(b'"period": 1', r.choice(instead), 1)
  return b"\xef\xbb\xbf" + text


def spoil_json(text: bytes, r: random.Random) -> bytes:
  """Its values changed, or its text: then it is mostly no JSON at all."""
  return spoil_text(text, r) if r.random() < 0.3 else json.dumps(change(json.loads(text), r)).encode()
