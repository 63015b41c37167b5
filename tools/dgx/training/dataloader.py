#!/usr/bin/env python3
"""Route logs to training data for openpilot's driving model: packed model frames, desire, the car's state, and the path
that it really drove.

OUTPUT keeps a folder a segment (see shards.py), dataset.json, statistics.json. A segment appears when it is whole: run
the same command again to go on."""

import errno
import json
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[3])]

import numpy as np
from tqdm import tqdm

from openpilot.tools.dgx.training.constants import FRAME_SKIP, RUN_FREQ
from openpilot.tools.dgx.training.drive_log import DriveLog, between, held, motion_of, pulses, read_log
from openpilot.tools.dgx.training.paths import DrivenPath
from openpilot.tools.dgx.training.shards import VERSION
from openpilot.tools.fair.labels.group import file_hash
from openpilot.tools.fair.labels.views import SegmentView, ViewWarp, read_frames, segment_view
from openpilot.tools.lib.cameras import VIDEOS
from openpilot.tools.lib.errors import UserError, above_zero, cli, not_negative, warn
from openpilot.tools.lib.log_fields import GPS
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.lock import only_one
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.route import Route, Segment, segments_in
from openpilot.tools.lib.said import command
from openpilot.tools.replay.source import choose_camera

REASONS = (
  "kept",
  "not calibrated",
  "another phase",
  "no frame 4 before",
  "no wide frame",
  "no car state",
  "too slow or backwards",
  "not engaged",
  "no GPS",
  "outside the box",
  "not decoded",
)
CODE = {name: i for i, name in enumerate(REASONS)}
PAIRED = 0.025  # s between a narrow frame and its wide one, as modeld allows


def find_segments(routes: list[str]) -> tuple[list[Segment], dict[str, str]]:
  """-> segments with log and video, by route and number, and why others are left out. Raises UserError where none is
  left."""
  found: dict[str, Segment] = {}
  for r in routes:
    path = Path(r)
    inside = segments_in(path) if path.is_dir() else []
    for s in inside or Route(r).segments:
      same = found.setdefault(s.name, s)
      if same.dir.resolve() != s.dir.resolve():
        warn(f"segment {s.name} is in {same.dir} and in {s.dir}; the first one is taken")
  out: dict[str, str] = {}
  for name, s in found.items():
    if s.log_path is None:
      out[name] = "no rlog or qlog"
    elif not any(v in s.files for v in ("fcamera", "ecamera", "qcamera")):
      out[name] = "no video"
  good = [s for name, s in found.items() if name not in out]
  if not good:
    why = "; ".join(f"{k}: {v}" for k, v in list(out.items())[:4])
    raise UserError(
      f"no segment in {', '.join(routes)} has both a log and a video ({why}); copy qlog.zst and qcamera.ts of each, or "
      "rlog.zst and fcamera.hevc"
    )
  return good, out


def made_of(segment: Segment, stream: str, around: list[Segment], hashed: Callable[[Path], str]) -> dict[str, str]:
  """{file: sha256} of all files that decide a segment's data: its videos, its log and those of `around`, beside it."""
  files = {f"{s.name}/{s.log_path.name}": s.log_path for s in (segment, *around) if s.log_path is not None}
  for kind in {VIDEOS[stream], "ecamera"} & set(segment.files):
    files[f"{segment.name}/{kind}"] = segment.files[kind]
  return {name: hashed(path) for name, path in sorted(files.items())}


def wide_positions(main: SegmentView, wide: SegmentView) -> np.ndarray:
  """For each frame of `main` the position in wide.entries of the frame taken with it; -1: none."""
  t = np.array([e.timestamp_eof for e in wide.entries], np.int64)
  if not len(t):
    return np.full(len(main.entries), -1)
  own = np.array([e.timestamp_eof for e in main.entries], np.int64)
  i = np.clip(np.searchsorted(t, own), 1, max(1, len(t) - 1))
  i = np.where(np.abs(t[i - 1] - own) <= np.abs(t[np.minimum(i, len(t) - 1)] - own), i - 1, np.minimum(i, len(t) - 1))
  return np.where(np.abs(t[i] - own) * 1e-9 <= PAIRED, i, -1)


def columns_of(
  view: SegmentView, log: DriveLog, near: list[DriveLog], options: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """One entry a frame of the video, all but the pictures; `reason` is the first filter that the frame does not pass, 0
  where it passes. And the sources.

  near: the logs of this segment and of those beside it, through which the path goes on."""
  ids = np.array([e.frame_id for e in view.entries], np.int64)
  time_ns = np.array([e.timestamp_eof for e in view.entries], np.int64)
  t = time_ns * 1e-9
  car = between(t, np.array(log.car, np.float64).reshape(-1, 6)[:, :4])
  lights = held(t, np.array(log.car, np.float64).reshape(-1, 6)[:, [0, 4, 5]])
  engaged = held(t, np.array(log.engaged, np.float64).reshape(-1, 2))[:, 0] > 0
  gps_source = next((s for s in GPS if log.gps.get(s)), "none")
  gps = between(t, np.array(log.gps.get(gps_source, []), np.float64).reshape(-1, 4))
  desires, desire_source = log.desires()
  motion, motion_source, hertz = motion_of(near, view.rpy)
  path = DrivenPath(motion[:, 0], motion[:, 1:4], motion[:, 4:7])
  place = {int(f): i for i, f in enumerate(ids)}
  pair = np.array([place.get(int(f) - FRAME_SKIP, -1) for f in ids], np.int64)

  reason = np.zeros(len(t), np.uint8)

  def drop(bad: np.ndarray | bool, why: str) -> None:
    reason[(reason == 0) & bad] = CODE[why]

  drop(not view.calibrated, "not calibrated")
  drop(ids % (RUN_FREQ // options["fps"]) != 0, "another phase")
  drop(pair < 0, "no frame 4 before")
  drop(np.isnan(car[:, 0]), "no car state")
  drop(~(car[:, 0] >= options["min_speed"]), "too slow or backwards")
  if options["engaged"]:
    drop(~engaged, "not engaged")
  if options["gps_box"]:
    a, b, c, d = options["gps_box"]
    drop(np.isnan(gps[:, 0]), "no GPS")
    drop(
      ~((gps[:, 0] >= min(a, c)) & (gps[:, 0] <= max(a, c)) & (gps[:, 1] >= min(b, d)) & (gps[:, 1] <= max(b, d))),
      "outside the box",
    )
  columns: dict[str, np.ndarray] = {
    "frame_id": ids,
    "segment_id": np.array([e.segment_id for e in view.entries], np.int64),
    "time": time_ns,
    "pair": pair,
    "reason": reason,
    "desire": pulses(t, desires),
    "speed": car[:, 0].astype(np.float32),
    "acceleration": car[:, 1].astype(np.float32),
    "steering": car[:, 2].astype(np.float32),
    "blinkers": lights.astype(np.float32),
    "engaged": engaged,
    "gps": gps,
    "pose": np.concatenate(path.state(t), -1).astype(np.float32),
    "plan": path.plan(t),
  }
  traffic = {"left": True, "right": False, "log": log.left_hand}[options["traffic"]]
  rhd_source = "option"
  if options["traffic"] == "log":
    rhd_source = (
      "assumed right-hand: the log does not say" if log.left_hand is None else "isRHD of driverMonitoringState"
    )
  facts = {
    "calibrated": view.calibrated,
    "rpy": view.rpy.tolist(),
    "traffic_convention": [float(not traffic), float(bool(traffic))],
    "action_t": list(log.action_t()),
    "sources": {
      "desire": desire_source,
      "gps": gps_source,
      "path": motion_source,
      "path_hz": round(hertz, 2),
      "traffic": rhd_source,
    },
    "truncated": log.truncated,
  }
  return columns, facts


def write_frames(
  view: SegmentView,
  wide: SegmentView | None,
  columns: dict[str, np.ndarray],
  files: tuple[BinaryIO, BinaryIO],
  bar: Any,
) -> int:
  """Decodes and warps what is needed, in order; sets columns' row and keep. -> rows. With no wide camera the main one's
  picture is warped into its view."""
  joined = np.arange(len(view.entries)) if wide is None else wide_positions(view, wide)
  columns["reason"][(columns["reason"] == 0) & (joined < 0)] = CODE["no wide frame"]
  ok = columns["reason"] == 0
  ok &= joined[columns["pair"]] >= 0
  columns["reason"][(columns["reason"] == 0) & ~ok] = CODE["no wide frame"]
  need = ok.copy()
  need[columns["pair"][ok]] = True
  positions = np.flatnonzero(need)
  row = np.full(len(need), -1, np.int64)
  warp, big = ViewWarp(view, "medmodel").model_frame, ViewWarp(wide or view, "sbigmodel").model_frame
  wide_frames = None if wide is None else read_frames(wide, sorted({int(joined[p]) for p in positions}))
  wide_at, wide_frame = -1, None
  n = 0
  for p, frame in read_frames(view, [int(p) for p in positions]):
    bar.update()
    other: np.ndarray | None = frame
    if wide_frames is not None:
      while wide_at < joined[p]:
        wide_at, wide_frame = next(wide_frames, (1 << 60, None))
      other = wide_frame if wide_at == joined[p] else None
    if other is None:
      continue
    files[0].write(warp.warp(frame.reshape(-1)).data)
    files[1].write(big.warp(other.reshape(-1)).data)
    row[p] = n
    n += 1
  good = ok & (row >= 0) & (row[columns["pair"]] >= 0)
  columns["reason"][ok & ~good] = CODE["not decoded"]
  columns["row"], columns["keep"] = row, good
  return n


def make_segment(
  view: SegmentView,
  wide: SegmentView | None,
  log: DriveLog,
  near: list[DriveLog],
  options: dict[str, Any],
  origin: dict[str, str],
  root: Path,
  progress: bool = True,
) -> dict[str, Any]:
  """Writes one segment's folder, whole or not at all. origin: what made_of() says. -> its segment.json."""
  segment = view.segment
  columns, facts = columns_of(view, log, near, options)
  tmp = root / f".{segment.name}.tmp"
  shutil.rmtree(tmp, ignore_errors=True)
  tmp.mkdir(parents=True)
  try:
    with (
      open(tmp / "frames.u8", "wb") as a,
      open(tmp / "big.u8", "wb") as b,
      tqdm(desc=segment.name, unit="frame", disable=not progress, leave=False) as bar,
    ):
      rows = write_frames(view, wide, columns, (a, b), bar)
    np.savez_compressed(tmp / "columns.npz", **columns)  # type: ignore[arg-type]
    keep = columns["keep"]
    speed = columns["speed"][keep]
    meta = {
      **facts,
      "made_of": origin,
      "camera": view.camera(),
      "big": wide.camera() if wide is not None else f"the {view.stream} camera's picture in the wide view",
      "rows": rows,
      "frames": len(keep),
      "reasons": {REASONS[k]: v for k, v in sorted(Counter(columns["reason"].tolist()).items())},
      "speed_mean": float(speed.mean()) if len(speed) else None,
      "speed_max": float(speed.max()) if len(speed) else None,
      "whole_plans": int(np.isfinite(columns["plan"][keep]).all((1, 2)).sum()),
      "pulses": int(columns["desire"].sum()),
    }
    (tmp / "segment.json").write_text(json.dumps(meta, indent=1))
    shutil.rmtree(root / segment.name, ignore_errors=True)
    tmp.replace(root / segment.name)
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f"the disk is full: {segment.name} was not written; free some space, or take --fps 5, and run the command again"
      ) from None
    raise
  finally:
    shutil.rmtree(tmp, ignore_errors=True)
  return meta


def make_data(routes: list[str], root: Path, options: dict[str, Any], progress: bool = True) -> dict[str, Any]:
  """All segments that are not there yet, or are of other files. -> statistics: of each segment, their sum, and what was
  left out. Raises UserError where no segment can be read."""
  segments, left_out = find_segments(routes)
  described = {"version": VERSION, **options}
  if (root / "dataset.json").is_file():
    there = json.loads((root / "dataset.json").read_text())
    differ = [k for k in described if there.get(k) != described[k]]
    if differ:
      what = ", ".join(f"{k} {there.get(k)} then, {described[k]} now" for k in differ)
      raise UserError(f"{root} was made with other options: {what}; give the same ones, or choose another --output")
  else:
    with atomic_path(root / "dataset.json") as tmp:
      tmp.write_text(json.dumps(described, indent=1))
  by_name = {s.name: s for s in segments}
  logs: dict[str, DriveLog | None] = {}  # None: cannot be read
  hashed = cache(file_hash)  # a log is its own segment's, and those beside it ask for it too

  def log_of(s: Segment) -> DriveLog | None:
    if s.name not in logs:
      try:
        logs[s.name] = read_log(s)
      except UserError as e:
        logs[s.name], left_out[s.name] = None, str(e)
    return logs[s.name]

  metas: dict[str, Any] = {}
  for s in segments:
    around = [n for k in (-1, 0, 1) if (n := by_name.get(f"{s.route}--{s.num + k}")) is not None]
    try:
      stream = choose_camera([s], options["camera"])
      origin = made_of(s, stream, around, hashed)
      if (done := root / s.name / "segment.json").is_file():
        metas[s.name] = json.loads(done.read_text())
        if metas[s.name].get("made_of") == origin:
          continue
        del metas[s.name]
        warn(f"{done.parent} was made of other files (a video, a log, or a log beside it); it is made again")
      log = log_of(s)
      if log is None:
        continue
      view = segment_view(s, stream, 1, options["focal"])
      wide = segment_view(s, "wide") if stream == "road" and s.ecamera is not None else None
    except UserError as e:
      left_out[s.name] = str(e)
      continue
    near = [beside for beside in map(log_of, around) if beside is not None]
    metas[s.name] = make_segment(view, wide, log, near, options, origin, root, progress)
    for name in logs.keys() - {n.name for n in around if n.num >= s.num}:  # what the next segment does not need
      del logs[name]
  if not metas:
    raise UserError(left_out[segments[0].name])
  more = [p.parent.name for p in sorted(root.glob("*/segment.json")) if p.parent.name not in metas]
  if more:
    warn(
      f"{root} holds {len(more)} more segments, which this command did not make ({', '.join(more[:4])}"
      f"{', ...' if len(more) > 4 else ''}); they are learned from, too"
    )
  total: Counter[str] = Counter()
  for m in metas.values():
    total.update(m["reasons"])
  stats = {
    "segments": metas,
    "left_out": left_out,
    "total": dict(total),
    "whole_plans": sum(m["whole_plans"] for m in metas.values()),
  }
  with atomic_path(root / "statistics.json") as tmp:
    tmp.write_text(json.dumps(stats, indent=1))
  return stats


def table(stats: dict[str, Any]) -> str:
  lines = [
    f"{'segment':<30} {'frames':>6} {'kept':>6} {'10 s plan':>9} {'km/h':>5} {'pulses':>6}  path, desire, not kept"
  ]
  for name, m in stats["segments"].items():
    why = ", ".join(f"{v} {k}" for k, v in m["reasons"].items() if k != "kept")
    s = m["sources"]
    speed = "" if m["speed_mean"] is None else f"{m['speed_mean'] * 3.6:.0f}"
    kept = m["reasons"].get("kept", 0)
    sources = f"{s['path']} {s['path_hz']:.1f} Hz, {s['desire']}"
    lines.append(
      f"{name:<30} {m['frames']:>6} {kept:>6} {m['whole_plans']:>9} {speed:>5} {m['pulses']:>6}  "
      f"{sources}{', ' + why if why else ''}"
    )
  total = stats["total"]
  rest = ", ".join(f"{v} {k}" for k, v in total.items() if k != "kept")
  lines.append(
    f"{len(stats['segments'])} segments, {sum(total.values())} frames: {total.get('kept', 0)} "
    f"kept{', ' + rest if rest else ''}"
  )
  lines += [f"left out: {k}, {v}" for k, v in stats["left_out"].items()]
  return "\n".join(lines)


@dataclass(frozen=True)
class Options:
  routes: tuple[str, ...] = option(
    nargs="+", metavar="DIR", help="folders of routes or segments, in any of openpilot's layouts"
  )
  output: Path = option(aliases=("--out",), metavar="DATA", help="the folder of the data")
  camera: str = option(
    "road", choices=("road", "wide", "qcamera"), help="the qcamera stands in for a road camera that is not there"
  )
  fps: int = option(
    20, choices=(5, 10, 20), help="frames kept a second; 5 is one phase of four, and a quarter of the disk"
  )
  min_speed: float = option(0.0, parse=not_negative, metavar="M/S", help="only frames at this speed or above")
  engaged: bool = option(False, help="only frames at which openpilot drove")
  gps_box: tuple[float, ...] | None = option(
    None, nargs=4, metavar=("LAT", "LON", "LAT", "LON"), help="two corners; only frames inside"
  )
  traffic: str = option("log", choices=("log", "right", "left"), help="the side that traffic keeps to")
  focal: float | None = option(None, parse=above_zero, help="pixels, for a camera that is none of comma's")


def main() -> None:
  args = parse(Options, __doc__, "dataloader")
  options = {k: getattr(args, k) for k in ("camera", "fps", "min_speed", "engaged", "traffic", "focal")}
  options["gps_box"] = None if args.gps_box is None else list(args.gps_box)
  if not all(map(math.isfinite, args.gps_box or ())):
    raise UserError(f"--gps-box {' '.join(map(str, args.gps_box or ()))}: four numbers, degrees")
  args.output.mkdir(parents=True, exist_ok=True)
  with only_one(args.output, f"another command makes {args.output}; wait for it, or choose another --output"):
    stats = make_data(list(args.routes), args.output, options)
  print(table(stats))
  if not stats["total"].get("kept"):
    worst = max((v, k) for k, v in stats["total"].items())
    raise UserError(
      f"no frame was kept: {worst[0]} of {sum(stats['total'].values())} were left out as '{worst[1]}'; take other "
      "routes or wider filters"
    )
  print(f"{args.output}: next, `tools/op.sh dgx train {command('--data', args.output, '--output', 'RUN')}`")


if __name__ == "__main__":
  raise SystemExit(cli(main)())
