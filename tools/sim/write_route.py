#!/usr/bin/env python3
"""Writes a simulated drive as an ordinary openpilot route: logs, videos, and beside them exact truth. Equal arguments give equal logs and truth."""

import argparse
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.videowriter import VideoWriter
from openpilot.tools.sim.messages import FRAME_ID_OFFSET, FRAME_NS, SOF_TO_EOF_NS, START_NS, qlog_of, segment_messages
from openpilot.tools.sim.render import CLASSES, library, render
from openpilot.tools.sim.truth import CHUNK, VIEW_H, VIEW_W
from openpilot.tools.sim.world import CAMERAS, TIMES, World

FPS = 20
LANE_X = np.concatenate([np.arange(3.0, 20.0, 1.0), np.arange(20.0, 100.0, 4.0)])
QCAMERA = (526, 330)


def box_of(mask: np.ndarray) -> list[int] | None:
  ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return [int(xs[0]), int(ys[0]), int(xs[-1]), int(ys[-1])] if len(xs) else None


def alone_pixels(o: dict[str, Any], height: float) -> int:
  """How many pixels of the view an object would fill with nothing before it, counted from its upright box: the base of its visible fraction."""
  c, s = np.cos(o["yaw"]), np.sin(o["yaw"])
  l2, w2, h = o["size"][0] / 2, o["size"][1] / 2, o["size"][2]
  corners = np.array([[o["x"] + c * a - s * b, o["y"] + s * a + c * b, height - z] for a in (-l2, l2) for b in (-w2, w2) for z in (0, h)])
  px, depth = project(corners, medmodel_intrinsics)
  if (depth <= 0.3).any():
    return 0
  x0, y0, x1, y1 = (
    np.clip(px[:, 0].min(), 0, VIEW_W),
    np.clip(px[:, 1].min(), 0, VIEW_H),
    np.clip(px[:, 0].max(), 0, VIEW_W),
    np.clip(px[:, 1].max(), 0, VIEW_H),
  )
  return int((x1 - x0) * (y1 - y0))


def render_frame(job: tuple[int, str, float, str, int]) -> dict[str, Any]:
  seed, time_of_day, seconds, camera, n = job
  world, t = world_of(seed, time_of_day, seconds), n / FPS
  config = CAMERAS[camera][0]
  shot = render(world, t, config.intrinsics, config.width, config.height, rpy=world.rpy)
  view = render(world, t, medmodel_intrinsics, VIEW_W, VIEW_H, rgb=False)
  objects = []
  for o in world.objects(t):
    mask = view.instance == o["id"]
    alone, seen = alone_pixels(o, world.camera_height), int(mask.sum())
    if not alone and not seen:
      continue
    fraction = min(1.0, seen / max(1, alone))  # of its bounding rectangle: an unoccluded car fills 0.6 to 1 of it
    objects.append(
      {
        "id": o["id"],
        "cls": CLASSES[o["cls"]],
        "box_view": box_of(mask),
        "box_camera": box_of(shot.instance == o["id"]),
        "visible_fraction": round(fraction, 4),
        "occluded": fraction < 0.3,
        "position": [round(v, 3) for v in (o["x"], o["y"], world.camera_height)],
        "size": [round(v, 3) for v in o["size"]],
        "yaw": round(o["yaw"], 4),
        "v_rel": round(o["v_rel"], 3),
      }
    )
  lanes = []
  for line in world.lane_lines(t, LANE_X):
    road = np.stack([LANE_X, line["y"], np.full_like(LANE_X, world.camera_height)], axis=1)
    px, z = project(road, medmodel_intrinsics)
    ok = np.isfinite(px).all(1)
    ij = np.round(np.where(ok[:, None], px, -1)).astype(int)
    inside = ok & (ij[:, 0] >= 0) & (ij[:, 0] < VIEW_W) & (ij[:, 1] >= 0) & (ij[:, 1] < VIEW_H)
    visible = inside.copy()
    visible[inside] = view.depth[ij[inside, 1], ij[inside, 0]] > z[inside] * 0.9
    keep = np.isfinite(line["y"])
    lanes.append(
      {
        "id": line["id"],
        "kind": line["kind"],
        "road": road[keep].round(3).tolist(),
        "view": [p if ok[i] else None for i, p in enumerate(px.round(2).tolist()) if keep[i]],
        "visible": visible[keep].tolist(),
      }
    )
  return {"rgb": shot.rgb, "depth": view.depth.astype(np.float16), "semantic": view.semantic, "instance": view.instance, "objects": objects, "lanes": lanes}


_world: tuple[tuple[int, str, float], World] | None = None


def world_of(seed: int, time_of_day: str, seconds: float) -> World:
  """The last world that was asked for is kept: a worker renders many frames of one."""
  global _world
  key = (seed, time_of_day, seconds)
  if _world is None or _world[0] != key:
    _world = (key, World(seed, time_of_day, seconds))
  return _world[1]


def route_name(seed: int, camera: str, time_of_day: str) -> str:
  """8 hex digits of a count, 10 of an id, as openpilot names routes since 2024."""
  return f"{seed & 0xFFFFFFFF:08x}--{(seed * 2654435761 + 97 * TIMES.index(time_of_day) + sum(map(ord, camera))) % 16**10:010x}"


def write_segment(folder: Path, num: int, world: World, rendered: Iterator[dict[str, Any]], first: int, count: int, camera: str, last: bool) -> None:
  config, sensor = CAMERAS[camera]
  truth = folder / "truth"
  truth.mkdir(parents=True)
  wide = config.width > 1344
  videos = [VideoWriter(folder / "fcamera.hevc", config.width, config.height, 30 if wide else 20, 24), VideoWriter(folder / "qcamera.ts", *QCAMERA, 15, 27)]
  chunk: list[dict[str, Any]] = []
  with open(truth / "objects.jsonl", "w") as objects, open(truth / "lanes.jsonl", "w") as lanes:
    for i in range(count):
      r = next(rendered)
      for v in videos:
        v.write(r["rgb"])
      objects.write(json.dumps(r["objects"]) + "\n")
      lanes.write(json.dumps(r["lanes"]) + "\n")
      chunk.append(r)
      if len(chunk) == CHUNK or i == count - 1:
        np.savez_compressed(truth / f"dense-{i // CHUNK:04d}.npz", **{k: np.stack([c[k] for c in chunk]) for k in ("depth", "semantic", "instance")})  # type: ignore[arg-type]
        chunk = []
  for v in videos:
    v.close()
  messages = segment_messages(world, num, first, count, config, camera, sensor, last)
  write_log(folder / "rlog.zst", [m for _, m in messages])
  write_log(folder / "qlog.zst", qlog_of(messages))
  info = {
    "seed": world.seed,
    "time_of_day": world.time_of_day,
    "camera": camera,
    "frames": count,
    "frame_id_offset": FRAME_ID_OFFSET + first,
    "classes": list(CLASSES),
    "view": "medmodel",
    "camera_height": world.camera_height,
    "rpy": world.rpy.tolist(),
    "timestamp_eof": [START_NS + (first + i) * FRAME_NS + SOF_TO_EOF_NS for i in range(count)],
  }
  (truth / "truth.json").write_text(json.dumps(info))


def write_route(
  out_dir: str | Path, seed: int = 1, seconds: float = 12.0, camera: str = "mici", time_of_day: str = "day", segment_seconds: float = 60.0
) -> Path:
  """Writes `<out_dir>/<route>--<n>/` for each segment and returns out_dir. A segment appears whole or not at all; those that are there already are kept."""
  out, route = Path(out_dir), route_name(seed, camera, time_of_day)
  total, per = round(seconds * FPS), round(segment_seconds * FPS)
  if total < 1 or per < 1:
    raise UserError(f"{seconds} seconds in segments of {segment_seconds} hold no frame; at 20 Hz 0.05 is the least")
  library()  # compiled once, before the workers start
  world = world_of(seed, time_of_day, seconds)
  starts = range(0, total, per)
  missing = [(n, first) for n, first in enumerate(starts) if not (out / f"{route}--{n}" / "rlog.zst").exists()]
  frames = [f for _, first in missing for f in range(first, min(total, first + per))]
  if not frames:
    return out
  out.mkdir(parents=True, exist_ok=True)
  with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
    jobs = ((seed, time_of_day, seconds, camera, f) for f in frames)
    rendered = iter(tqdm(pool.imap(render_frame, jobs, chunksize=2), total=len(frames), desc="simulate", unit="frame"))
    for n, first in missing:
      tmp, final = out / f".{route}--{n}.tmp", out / f"{route}--{n}"
      shutil.rmtree(tmp, ignore_errors=True)
      tmp.mkdir(parents=True)
      try:
        write_segment(tmp, n, world, rendered, first, min(per, total - first), camera, first + per >= total)
      except OSError as e:
        shutil.rmtree(tmp, ignore_errors=True)
        raise UserError(f"{final} was not written: {e.strerror or e}; make room and run the same command again") from e
      except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
      shutil.rmtree(final, ignore_errors=True)
      tmp.rename(final)
  return out


def main() -> None:
  p = argparse.ArgumentParser(prog="sim", description=__doc__)
  p.add_argument("out", type=Path, help="folder for the segments")
  p.add_argument("--seed", type=int, default=1)
  p.add_argument("--seconds", type=float, default=12.0)
  p.add_argument("--segment-seconds", type=float, default=60.0)
  p.add_argument("--camera", choices=sorted(CAMERAS), default="mici")
  p.add_argument("--time", choices=TIMES, default="day")
  args = p.parse_args()
  write_route(args.out, args.seed, args.seconds, args.camera, args.time, args.segment_seconds)
  print(f"{args.out}: route {route_name(args.seed, args.camera, args.time)}, {args.seconds} s, truth beside each segment")


if __name__ == "__main__":
  raise SystemExit(cli(main)())
