"""Spoiled manifests of three bundles: what is accepted the schema accepts too, and it runs."""

import contextlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jsonschema
import numpy as np

from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle, schema
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import serialize, size_limit
from tests.fuzz.fuzz import Case
from tests.fuzz.json_mutator import spoil_json
from tests.selfdrive.modeld.fair_bundle import lanes_graph, manifest, objects_graph, write_bundle, write_graphs

REFUSED = (BundleError,)
W, H = 1344, 760
STRIDE, Y_HEIGHT, _, SIZE = nv12_info(W, H)
FRAME = np.full(SIZE, 100, np.uint8)


def bundles(tmp_path: Path) -> list[Path]:
  raw = {"heat": np.full((1, 3, 32, 64), -9, np.float32), "box": np.full((1, 4, 32, 64), 20, np.float32)}
  raw["heat"][0, 0, 10, 20] = 3
  out = []
  for kind in ("scene", "objects", "lanes"):
    folder = tmp_path / kind
    write_bundle(folder)
    if kind == "objects":
      write_graphs(folder, [objects_graph(folder, raw), {**manifest()["graphs"][0], "period": 2, "phase": 1}])
    elif kind == "lanes":
      write_graphs(folder, [lanes_graph(folder)])
    out.append(folder)
  return out


@contextlib.contextmanager
def prepare(tmp: Path, counts: Counter[str]) -> Iterator[Callable[[random.Random], Case]]:
  reference = jsonschema.Draft202012Validator(schema())
  warps, why = {}, set()
  for view in ("medmodel", "sbigmodel"):
    warps[view] = ModelFrame(W, H, STRIDE, STRIDE * Y_HEIGHT, view)
    warps[view].set_calibration(np.zeros(3), camera_intrinsics(W, H))
  folders = bundles(tmp)
  texts = [(f / "manifest.json").read_bytes() for f in folders]

  def load(folder: Path, text: bytes) -> None:
    try:
      model = FairModel(load_bundle(folder))
    except BundleError as e:
      why.add("".join(c for c in str(e).split(": ", 1)[-1] if c.isalpha())[:20])
      counts["kinds of refusal"] = len(why)
      assert text not in texts
      raise
    m = json.loads(text)
    assert reference.is_valid(m), [e.message[:200] for e in reference.iter_errors(m)]
    assert len({g["name"] for g in m["graphs"]}) == len(m["graphs"])
    model.warp, model.stream, model.intrinsics = warps[m["view"]], (W, H, False), camera_intrinsics(W, H)
    sent = [message for t in range(3) for message in model.process(FRAME, t, t, t + 1)]
    for name, msg in [*sent, model.state_message()]:
      assert msg.valid and len(serialize(name, msg)) < size_limit(name)
    assert model.faults == 0, model.fault

  def cases(r: random.Random) -> Case:
    k = r.randrange(len(folders))
    text = texts[k] if r.random() < 0.01 else spoil_json(texts[k], r)
    (folders[k] / "manifest.json").write_bytes(text)
    yield folders[k].name, lambda: load(folders[k], text)

  yield cases
