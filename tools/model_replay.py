#!/usr/bin/env python3
"""openpilot's model_replay for bundles: compares each bundle's output on a real and a simulated drive with a reference
in the repository.

A reference (tools/replay/refs/NAME.json) has for each drive the hash of all model frames that went in, the hash of all
messages that came out, and the messages' values, pooled and in half precision. Equal hashes pass. Other processors and
releases of ONNX Runtime differ in the last bits, so where the hashes differ the values decide: it passes where all but
a few are within TOLERANCE, and the table shows what changed and by how much. Exit code: 0 passed, 1 changed.

model_replay                      every bundle in models/
model_replay models/NAME --update the bundle's reference, made or made anew: look at the table first
"""

from dataclasses import dataclass
import base64
import hashlib
import io
import json
import os
import platform
import zlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.cereal import messaging
from openpilot.selfdrive.modeld.fair.bundle import MANIFEST, MODELS_DIR, Bundle, BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.publish import class_map_from_message, depth_from_message, mask_from_message
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.route import Route, Segment
from openpilot.tools.replay.process_replay import process_replay
from openpilot.tools.replay.report import cpu_name
from openpilot.tools.sim.write_route import write_route

ROOT = Path(__file__).resolve().parents[1]
REFS = ROOT / "tools/replay/refs"
SHARED_DATA = Path(os.environ.get("FAIR_SHARED_DATA") or ROOT.parent / "shared" / "data")
CACHE = ROOT / "out" / "model_replay"
SECONDS = 2.0
REAL = {"route": "0000002c--d68dde99ca", "segment": 1, "start": 10.0}  # a comma 3X at night in a city; its qcamera
SIM = {"seed": 4, "device": "mici", "time": "day"}
CELLS = (8, 16)  # cells to which a map is pooled: rows, columns
LINE_AT = (10.0, 20.0, 30.0)  # m ahead, where lines are compared
# tolerances, absolute and relative: in units of the message, depth as its logarithm, classes as shares of a cell
TOLERANCE = {
  "fairDepth.log": (0.01, 0.0),
  "fairSegmentation.share": (0.05, 0.0),
  "fairObjects.box": (1.0, 0.02),
  "fairObjects.mask": (0.005, 0.05),
  "fairLanes.points": (2.0, 0.05),
}
OTHER = (0.02, 0.02)
FEW = 0.005  # share of a field's values that may be further off: pixels or objects at a threshold
PARTED = 0.02  # share of identities that only one of the two may have
VALUES = dict[str, np.ndarray]  # field -> one row per value or identity


def pooled(a: np.ndarray) -> np.ndarray:
  """(H, W) -> CELLS means, nan left out."""
  h, w = a.shape
  cells = a.reshape(CELLS[0], h // CELLS[0], CELLS[1], w // CELLS[1]).swapaxes(1, 2).reshape(*CELLS, -1)
  known = np.isfinite(cells)
  return np.where(known.any(2), np.where(known, cells, 0).sum(2) / np.maximum(known.sum(2), 1), np.nan)


def values_of(event: Any) -> VALUES:
  """The values of a fair* message. Objects and lines have a row each, their identity first."""
  which = event.which()
  m = getattr(event, which)
  out: VALUES = {"valid": np.array([event.valid])}
  if which == "fairDepth":
    out |= {"log": pooled(np.log(np.maximum(depth_from_message(m), 1e-3))).ravel(), "scale": np.array([m.scale])}
  elif which == "fairSegmentation":
    class_map = class_map_from_message(m)
    out |= {
      "share": np.stack([pooled(class_map == k) for k in range(len(m.classes))]).ravel(),
      "classProb": np.array(list(m.classProb)),
    }
  elif which == "fairObjects":
    rows = [(o.trackId, o.classId, o.prob, o.visibility, o.depth, *o.box) for o in m.objects]
    table = np.array(rows).reshape(-1, 9)
    ids = table[:, :1]
    out |= {
      "#class": table[:, :2],
      "#prob": np.hstack([ids, table[:, 2:4]]),
      "#depth": np.hstack([ids, table[:, 4:5]]),
      "#box": np.hstack([ids, table[:, 5:]]),
    }
    masks = [mask_from_message(o) for o in m.objects]
    out["#mask"] = np.hstack(
      [ids, np.array([mask.mean() if mask is not None else 0.0 for mask in masks]).reshape(-1, 1)]
    )
    places = [(o.trackId, *o.position, *o.positionStd) for o in m.objects if len(o.position)]
    out["#position"] = np.array(places).reshape(-1, 7)
  elif which == "fairLanes":
    at = np.array(LINE_AT)
    fits = [(line.lineId, *np.polyval(list(line.fit)[::-1], at)) for line in m.lines if len(line.fit)]
    out |= {
      "#fit": np.array(fits).reshape(-1, 4),
      "#prob": np.array([(line.lineId, line.prob) for line in m.lines]).reshape(-1, 2),
    }
    out["#points"] = np.array([(line.lineId, len(line.x)) for line in m.lines]).reshape(-1, 2)
  return {f"{which}.{k}": v.astype(np.float16 if "#" not in k else np.float32) for k, v in out.items()}


class Watched(FairModel):
  """Passes frames on to the model, and hashes every model frame."""

  def __init__(self, bundle: Bundle):
    super().__init__(bundle)
    self.inputs = hashlib.sha256()

  def process(
    self, buf: np.ndarray, frame_id: int, timestamp_sof: int, timestamp_eof: int, model: Any = None
  ) -> list[tuple[str, Any]]:
    messages = super().process(buf, frame_id, timestamp_sof, timestamp_eof, model)
    assert self.warp is not None
    self.inputs.update(self.warp.frame.tobytes())
    return messages


def drive(bundle: Bundle, segments: list[Segment], camera: str, start: float) -> dict[str, Any]:
  """Runs SECONDS of a drive -> {frames, inputs, messages: hashes, values: {field: rows of all messages, the frame's
  number first}}."""
  model, messages = Watched(bundle), hashlib.sha256()
  rows: dict[str, list[np.ndarray]] = {}
  first: int | None = None
  for dat in process_replay(segments, model, camera, start, SECONDS, progress=False):
    event = messaging.log_from_bytes(dat)
    if event.which() == "fairState":  # counts, and facts about the machine
      continue
    messages.update(dat)
    frame = getattr(event, event.which()).frameId
    first = frame if first is None else first
    for field, value in values_of(event).items():
      table = value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value[None]
      rows.setdefault(field, []).append(np.hstack([np.full((len(table), 1), frame - first, table.dtype), table]))
  if not model.frames:
    raise UserError(f"no frames in {segments[0].dir} from {start:g} s on; is the video there?")
  return {
    "frames": model.frames,
    "inputs": model.inputs.hexdigest(),
    "messages": messages.hexdigest(),
    "values": {k: np.vstack(v) for k, v in rows.items()},
  }


def pack(values: VALUES) -> str:
  data = io.BytesIO()
  np.savez(data, **values)  # type: ignore[arg-type]
  return base64.b85encode(zlib.compress(data.getvalue(), 9)).decode()


def unpack(text: str) -> VALUES:
  with np.load(io.BytesIO(zlib.decompress(base64.b85decode(text))), allow_pickle=False) as z:
    return {k: z[k] for k in z.files}


def aligned(a: np.ndarray, b: np.ndarray, keys: int) -> tuple[np.ndarray, np.ndarray, int]:
  """Rows of both tables whose first `keys` columns agree, in one order, without those columns; and how many rows have
  no partner."""
  at = {tuple(row[:keys].tolist()): i for i, row in enumerate(b)}
  pairs = [(i, at[k]) for i, row in enumerate(a) if (k := tuple(row[:keys].tolist())) in at]
  i, j = np.array(pairs, int).reshape(-1, 2).T
  return a[i, keys:], b[j, keys:], len(a) + len(b) - 2 * len(pairs)


def compare(want: VALUES, got: VALUES) -> list[dict[str, Any]]:
  """One row per field: how many values, the largest and mean difference, how many beyond the tolerance, and `moved`
  where these are too many."""
  out = []
  for field in sorted(want.keys() | got.keys()):
    if field not in want or field not in got or want[field].shape[1:] != got[field].shape[1:]:
      out.append(
        {
          "field": field,
          "values": 0,
          "max": 0.0,
          "mean": 0.0,
          "beyond": 0,
          "parted": 0,
          "tolerance": (0, 0),
          "frame": 0,
          "moved": True,
        }
      )
      continue
    keys = 2 if "#" in field else 1  # the frame, and the identity
    a, b, parted = aligned(want[field].astype(np.float64), got[field].astype(np.float64), keys)
    absolute, share = TOLERANCE.get(field.replace("#", ""), OTHER)
    off = np.abs(a - b)
    both_nan, one_nan = np.isnan(a) & np.isnan(b), np.isnan(a) != np.isnan(b)
    off = np.where(both_nan, 0, np.where(one_nan, np.inf, off))
    beyond = off > absolute + share * np.abs(np.where(np.isnan(a), 0, a))
    finite = np.where(np.isfinite(off), off, 0)
    frames = np.concatenate([want[field][:, 0], got[field][:, 0]])  # either table may be empty: nothing was found
    moved = int(beyond.sum()) > FEW * off.size or parted > PARTED * (len(want[field]) + len(got[field]))
    row = int(off.max(1).argmax()) if off.size else 0
    out.append(
      {
        "field": field.replace("#", ""),
        "values": off.size,
        "max": float(finite.max(initial=0)),
        "mean": float(finite.mean()) if off.size else 0.0,
        "beyond": int(beyond.sum()),
        "parted": parted,
        "tolerance": (absolute, share),
        "frame": int(frames[row]) if len(frames) else 0,
        "moved": moved,
      }
    )
  return out


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
  columns = f"{'values':>8}{'max diff':>11}{'mean diff':>11}{'tolerance':>16}{'beyond':>8}{'unpaired':>10}"
  yield f"    {'field':<26}{columns}  worst at frame"
  for r in rows:
    within = f"{r['tolerance'][0]:g} + {100 * r['tolerance'][1]:g} %"
    numbers = f"{r['values']:>8}{r['max']:>11.4g}{r['mean']:>11.4g}{within:>16}{r['beyond']:>8}{r['parted']:>10}"
    yield f"    {r['field']:<26}{numbers}  {r['frame']}{'   MOVED' if r['moved'] else ''}"


def drives(data: Path, folder: Path, named: bool = False) -> dict[str, tuple[list[Segment], str, float] | None]:
  """name -> segments, camera, start; None where the route is missing. The simulated one is rendered into `folder`,
  once. Raises UserError where the user `named` a data folder without the route."""
  path = data / "realdata" / str(REAL["route"])
  there = any(path.parent.glob(f"{REAL['route']}--{REAL['segment']}"))
  segments = [s for s in Route(path).segments if s.num == REAL["segment"]] if there else []
  if named and not segments:
    why = "has no" if data.is_dir() else "is not there, and so no"
    raise UserError(
      f"{data} {why} realdata/{REAL['route']}--{REAL['segment']}; name the shared data's folder in --data or "
      "FAIR_SHARED_DATA, or leave both out"
    )
  sim = folder / f"simulated-{'-'.join(map(str, SIM.values()))}-{SECONDS:g}"
  write_route(sim, int(str(SIM["seed"])), SECONDS, str(SIM["device"]), str(SIM["time"]))
  return {
    "real": (segments, "qcamera", float(str(REAL["start"]))) if segments else None,
    "simulated": (Route(sim).segments, "road", 0.0),
  }


def check(bundle: Bundle, name: str, run: dict[str, Any], reference: dict[str, Any]) -> tuple[bool, list[str]]:
  """Compares one drive with its reference -> whether it passes, and the lines to print."""
  if run["messages"] == reference["messages"]:
    return True, [f"  {name}: {run['frames']} frames, the same byte for byte"]
  rows = compare(unpack(reference["values"]), run["values"])
  passed = not any(r["moved"] for r in rows) and run["frames"] == reference["frames"]
  why = (
    "model frames are the same"
    if run["inputs"] == reference["inputs"]
    else "MODEL FRAMES DIFFER TOO: look at the decoder, the warp or the simulator first"
  )
  verdict = "within the tolerance" if passed else "MOVED"
  head = f"  {name}: {run['frames']} frames of {reference['frames']}, {verdict}; not the same bytes, {why}"
  return passed, [head, *table(rows)]


def reference_of(bundle: Bundle, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
  made = {
    "onnxruntime": version("onnxruntime"),
    "numpy": version("numpy"),
    "machine": f"{platform.system()} {platform.machine()}",
    "cpu": cpu_name(),
  }
  kept = {name: {**run, "values": pack(run["values"])} for name, run in runs.items()}
  return {"bundle": bundle.name, "manifest": bundle.manifest_hash, "made_with": made, "drives": kept}


def replay_bundle(
  bundle: Bundle, there: dict[str, tuple[list[Segment], str, float] | None], refs: Path, update: bool
) -> bool:
  """Runs a bundle over the drives and prints how it differs from its reference; with `update` writes a new reference.
  Returns whether it passes."""
  path = refs / f"{bundle.name}.json"
  reference = json.loads(path.read_text()) if path.is_file() else None
  print(f"{bundle.name}, manifest {bundle.manifest_hash[:12]}")
  if reference is None and not update:
    print(f"  no reference: make one with model_replay {bundle.path} --update")
    return False
  if reference is not None and reference["manifest"] != bundle.manifest_hash:
    print(f"  the reference is of another manifest, {reference['manifest'][:12]}")
  if reference is not None:
    print("  reference made with " + ", ".join(f"{k} {v}" for k, v in reference["made_with"].items()))
  old = reference["drives"] if reference is not None else {}
  passed, runs = True, {}
  for name, source in there.items():
    if source is None:
      print(f"  {name}: missing, so not checked; name the shared data's folder in --data or FAIR_SHARED_DATA")
      if update:
        raise UserError(
          f"the {name} drive is missing, and a reference needs both; name the shared data's folder with --data"
        )
      continue
    runs[name] = drive(bundle, *source)
    if name in old:
      ok, lines = check(bundle, name, runs[name], old[name])
      passed &= ok
      print("\n".join(lines))
    elif not update:
      print(f"  {name}: not in the reference; --update adds it")
      passed = False
  if update:
    with atomic_path(path) as tmp:
      tmp.write_text(json.dumps(reference_of(bundle, runs), indent=1) + "\n")
    print(f"  {path} written, {path.stat().st_size / 1000:.0f} kB")
    return True
  return passed


@dataclass(frozen=True)
class Options:
  bundles: tuple[Path, ...] = option((), positional=True, help="folders of bundles; default: all in models/")
  update: bool = option(False, help="write today's output as the new reference")
  data: Path | None = option(None, help="folder with realdata/; default: FAIR_SHARED_DATA")
  refs: Path = option(REFS, help="folder of the references")
  cache: Path = option(CACHE, help="where the simulated drive is kept; delete it after a change of the simulator")


def main() -> int:
  args = parse(Options, __doc__, "model-replay")
  bundles = [load_bundle(b) for b in args.bundles or sorted(m.parent for m in MODELS_DIR.glob(f"*/{MANIFEST}"))]
  if not bundles:
    raise UserError(f"no bundle in {MODELS_DIR}; name one")
  there = drives(
    args.data or SHARED_DATA, args.cache, args.data is not None or bool(os.environ.get("FAIR_SHARED_DATA"))
  )
  passed = [replay_bundle(b, there, args.refs, args.update) for b in bundles]
  return 0 if all(passed) else 1


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())
