"""A small label store of made-up frames: a bright square that moves, its depth, class, box and tracked corners."""

import contextlib
import os
import signal
import sys

import numpy as np
import pytest
import torch

from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE, pack_rgb
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.fair.labels.rules import rules_of
from openpilot.tools.fair.labels.meta import CHUNK, VERSION
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.teacher import Clip, Label
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.sim.truth import MAP_H, MAP_W

CAMERA = {
  "stream": "qcamera",
  "width": 526,
  "height": 330,
  "intrinsics": [[722.4, 0, 263], [0, 722.4, 165], [0, 0, 1]],
  "rpy": [0.0, 0.0, 0.0],
  "video": "x",
}
LABELS = [
  Label("depth", "dense", "float16", (MAP_H, MAP_W), "m"),
  Label(
    "segmentation", "dense", "uint8", (MAP_H, MAP_W), "class", ("background", "road", "lane", "vehicle", "pedestrian")
  ),
  Label("objects", "boxes", shape=(256, 512), unit="px", classes=("vehicle", "pedestrian")),
  Label("points", "points", unit="px", classes=("lane", "road")),
]
FRAME = [Label("frame", "dense", "uint8", FRAME_SHAPE)]


def group_of(store, segment, teacher, labels, n, checkpoint="a", license="MIT", rules=None):
  meta = {
    "version": VERSION,
    "segment": segment,
    "teacher": {"name": teacher, "model_id": teacher, "checkpoint": checkpoint, "licence": license, "settings": {}},
    "labels": [{**vars(x), "shape": list(x.shape), "classes": list(x.classes)} for x in labels],
    "view": {"name": "medmodel", "width": 512, "height": 256},
    "camera": CAMERA,
    "every": 1,
    "chunk": CHUNK,
  }
  meta["rules"] = rules_of(meta) if rules is None else rules
  return store.group(meta, [EncodeEntry(100 + i, 0, i, 50_000_000 * i, 50_000_000 * i) for i in range(n)])


def square(seed, t):
  """x0, y0, size in view pixels."""
  r = np.random.default_rng(seed)
  x, y, size, speed = r.integers(60, 300), r.integers(60, 120), int(r.integers(30, 70)), r.integers(1, 5)
  return int(x + speed * t), int(y), size


def write_store(
  root,
  routes=("00000001--aaaaaaaaaa", "00000002--bbbbbbbbbb"),
  n=16,
  teacher="simulator",
  labels=LABELS,
  checkpoint="a",
  license="MIT",
):
  store = LabelStore(root, create=True)
  for seed, route in enumerate(routes):
    segment = f"{route}--0"
    frames, said = [], {x.name: [] for x in labels if x.kind == "dense"}
    boxes = {k: [] for k in ("frame", "x0", "y0", "x1", "y1", "score", "cls", "track", "rle")}
    points = {k: [] for k in ("frame", "track", "x", "y", "visible", "cls")}
    for t in range(n):
      x, y, s = square(seed, t)
      rgb = np.full((256, 512, 3), 60, np.uint8)
      rgb[150:] = 90
      rgb[y : y + s, x : x + s] = (220, 180 - 60 * (seed % 2), 40)
      frames.append(pack_rgb(rgb))
      depth, cls, mask = np.full((256, 512), 50.0), np.zeros((256, 512), np.uint8), np.zeros((256, 512), bool)
      cls[150:], depth[150:] = 1, 20.0
      mask[y : y + s, x : x + s] = True
      cls[mask], depth[mask] = 3, 10.0
      for name, value in (("depth", depth[1::4, 1::4]), ("segmentation", cls[1::4, 1::4])):
        if name in said:
          said[name].append(value)
      for k, v in zip(
        boxes, (t, x - 0.5, y - 0.5, x + s - 0.5, y + s - 0.5, 1.0, 0, seed, rle.encode(mask[None])[0]), strict=True
      ):
        boxes[k].append(v)
      for k, (px, py) in enumerate(((x, y), (x + s - 1, y), (x, y + s - 1), (x + s - 1, y + s - 1))):
        for key, v in zip(points, (t, k, px, py, True, 1), strict=True):
          points[key].append(v)
    g = group_of(store, segment, "frames", FRAME, n, "")
    h = group_of(store, segment, teacher, labels, n, checkpoint, license)
    to = dict.fromkeys(("x0", "y0", "x1", "y1", "score", "x", "y"), np.float32)
    tables = {"objects": boxes, "points": points}
    for k in range(g.chunk_count):
      rows = g.rows(k)
      g.write_chunk(k, {"frame": np.stack(frames[rows.start : rows.stop])})
      chunk = {name: np.stack(v[rows.start : rows.stop]) for name, v in said.items()}
      for x in labels:
        if x.kind != "dense":
          table = tables[x.name]
          at = [i for i, f in enumerate(table["frame"]) if f in rows]
          chunk[x.name] = {
            c: [v[i] for i in at] if c == "rle" else np.array([v[i] for i in at], to.get(c)) for c, v in table.items()
          }
          chunk[x.name]["frame"] = chunk[x.name]["frame"] - rows.start
      h.write_chunk(k, chunk)
  return store


def same(a, b):
  """Of checkpoints."""
  if torch.is_tensor(a):
    return torch.equal(a, b)
  if isinstance(a, dict):
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
  if isinstance(a, list):
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
  return a == b


def same_in_pieces(teacher, rgb, sizes, whole, last, folder):
  """Labels of the clip in pieces of `sizes` frames, with the state through a file in between, are `whole`, and the
  state behind them is `last`."""
  state, parts, start = None, [], 0
  for n in sizes:
    if state is not None:
      np.savez(folder / "state.npz", **{k.replace("/", "|"): v for k, v in state.items()})
      state = {k.replace("|", "/"): v for k, v in np.load(folder / "state.npz").items()}
    labels, state = teacher.label(Clip(rgb[start : start + n]), state)
    part = dict(labels["objects"])
    part["frame"] = part["frame"] + start
    parts.append(part)
    start += n
  for k, v in whole.items():
    assert [x for p in parts for x in p[k]] == list(v), k
  assert sorted(state) == sorted(last) and all(np.array_equal(state[k], last[k]) for k in last)


def taught(store, out, *more):
  """`distill` of a small student of depth, with more options. -> its last checkpoint."""
  words = ["--labels", store, "--student", "depth-nano", "--tasks", "depth", "--output", out, "--workers", 0, *more]
  with pytest.MonkeyPatch.context() as m:
    m.setattr(sys, "argv", ["distill", *map(str, words)])
    distill.main()
  return load_checkpoint(out / "last.pt")


@contextlib.contextmanager
def interrupted(step):
  """Ctrl-C at the end of that step of the run within, which ends by it."""
  real = Run.update_ema

  def stop(self):
    real(self)
    if self.step == step:
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.MonkeyPatch.context() as m, pytest.raises(KeyboardInterrupt):
    m.setattr(Run, "update_ema", stop)
    yield
