#!/usr/bin/env python3
"""Writes a simulated drive as an ordinary openpilot route: logs, videos, and beside them exact truth. Equal arguments
give equal logs and truth."""

import json
import math
import multiprocessing
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import QCAMERA_SIZE, VIEW_H, VIEW_W, camera_intrinsics
from openpilot.selfdrive.modeld.fair.heads.ground import MAX_HEIGHT, MIN_HEIGHT
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.videowriter import VideoWriter
from openpilot.tools.sim.messages import FRAME_ID_OFFSET, FRAME_NS, SOF_TO_EOF_NS, START_NS, qlog_of, segment_messages
from openpilot.tools.sim.render import CLASSES, Frame, library, render
from openpilot.tools.sim.truth import CHUNK
from openpilot.tools.sim.layout import SURROUNDINGS, TIMES, WEATHERS
from openpilot.tools.sim.world import CAMERAS, World

FPS = 20
LANE_X = np.concatenate([np.arange(3.0, 20.0, 1.0), np.arange(20.0, 100.0, 4.0)])


@dataclass(frozen=True)
class Drive:
  """All that decides a route, except its cut into segments."""

  seed: int = 1
  seconds: float = 12.0
  camera: str = "mici"
  time_of_day: str = "day"
  weather: str = "clear"
  qcamera_only: bool = False  # no fcamera: the picture is rendered at the qcamera's size
  camera_height: tuple[float, float] | None = None  # m, least and most; see Layout
  surroundings: str = "open"

  @property
  def name(self) -> str:
    """8 hex digits of a count, 10 of an id, as openpilot names routes since 2024."""
    salt = 97 * TIMES.index(self.time_of_day) + sum(map(ord, self.camera)) + 7919 * WEATHERS.index(self.weather)
    if self.camera_height is not None:
      low, high = (round(1000 * h) for h in self.camera_height)
      salt += 104729 * (low + 10007 * high)
    salt += 15485863 * SURROUNDINGS.index(self.surroundings)
    return f"{self.seed & 0xFFFFFFFF:08x}--{(self.seed * 2654435761 + salt) % 16**10:010x}"

  def lens(self) -> tuple[np.ndarray, int, int]:
    """Intrinsics, width and height of the rendered picture: the road camera's, or those that every reader assumes for
    the qcamera."""
    config, sensor = CAMERAS[self.camera]
    if self.qcamera_only:
      return camera_intrinsics(*QCAMERA_SIZE, self.camera, sensor), *QCAMERA_SIZE
    return config.intrinsics, config.width, config.height


@lru_cache(1)
def world_of(drive: Drive) -> World:
  """Keeps the last world: a worker renders many frames of one."""
  return World(
    drive.seed, drive.time_of_day, drive.seconds, drive.weather, drive.camera_height, surroundings=drive.surroundings
  )


def box_of(mask: np.ndarray) -> list[int] | None:
  ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
  return [int(xs[0]), int(ys[0]), int(xs[-1]), int(ys[-1])] if len(xs) else None


def object_truth(world: World, t: float, shot: Frame, view: Frame) -> list[dict[str, Any]]:
  assert view.alone is not None
  objects = []
  seen = np.bincount(view.instance.reshape(-1), minlength=1 << 16)
  for o in world.objects(t):
    alone = int(view.alone[o["id"]])
    if not alone:
      continue
    fraction = int(seen[o["id"]]) / alone
    objects.append(
      {
        "id": o["id"],
        "cls": CLASSES[o["cls"]],
        "box_view": box_of(view.instance == o["id"]) if seen[o["id"]] else None,
        "box_camera": box_of(shot.instance == o["id"]),
        "visible_fraction": round(fraction, 4),
        "occluded": fraction < 0.5,
        "position": [round(v, 3) for v in (o["x"], o["y"], world.camera_height)],
        "size": [round(v, 3) for v in o["size"]],
        "yaw": round(o["yaw"], 4),
        "v_rel": round(o["v_rel"], 3),
      }
    )
  return objects


def lane_truth(world: World, t: float, view: Frame) -> list[dict[str, Any]]:
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
  return lanes


def render_frame(job: tuple[Drive, int]) -> dict[str, Any]:
  drive, n = job
  world, t = world_of(drive), n / FPS
  shot = render(world, t, *drive.lens(), rpy=world.rpy)
  view = render(world, t, medmodel_intrinsics, VIEW_W, VIEW_H, rgb=False, alone=True)
  with np.errstate(over="ignore"):  # beyond 65504 m, the largest float16, there is only sky
    depth = view.depth.astype(np.float16)
  return {
    "rgb": shot.rgb,
    "depth": depth,
    "semantic": view.semantic,
    "instance": view.instance,
    "objects": object_truth(world, t, shot, view),
    "lanes": lane_truth(world, t, view),
  }


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """As np.savez_compressed, in a third of the time, with a fifth more space."""
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
    for name, a in arrays.items():
      with z.open(f"{name}.npy", "w", force_zip64=True) as f:
        np.lib.format.write_array(f, a)


def write_segment(
  folder: Path, num: int, drive: Drive, rendered: Iterator[dict[str, Any]], first: int, count: int, last: bool
) -> None:
  world, (config, sensor) = world_of(drive), CAMERAS[drive.camera]
  truth = folder / "truth"
  truth.mkdir(parents=True)
  videos = [VideoWriter(folder / "qcamera.ts", *QCAMERA_SIZE, 15, 27)]
  if not drive.qcamera_only:
    videos.append(
      VideoWriter(folder / "fcamera.hevc", config.width, config.height, 30 if config.width > 1344 else 20, 24)
    )
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
        save_arrays(
          truth / f"dense-{i // CHUNK:04d}.npz",
          {k: np.stack([c[k] for c in chunk]) for k in ("depth", "semantic", "instance")},
        )
        chunk = []
  for v in videos:
    v.close()
  messages = segment_messages(world, num, first, count, config, drive.camera, sensor, last)
  write_log(folder / "rlog.zst", [m for _, m in messages])
  write_log(folder / "qlog.zst", qlog_of(messages))
  info = {
    "seed": world.seed,
    "time_of_day": world.time_of_day,
    "weather": world.weather,
    "surroundings": world.surroundings,
    "camera": drive.camera,
    "camera_size": drive.lens()[1:],  # of box_camera's pixels
    "seconds": drive.seconds,
    "frames": count,
    "frame_id_offset": FRAME_ID_OFFSET + first,
    "classes": list(CLASSES),
    "view": "medmodel",
    "camera_height": world.camera_height,
    "rpy": world.rpy.tolist(),
    "timestamp_eof": [START_NS + (first + i) * FRAME_NS + SOF_TO_EOF_NS for i in range(count)],
    "pose": [world.pose((first + i) / FPS) for i in range(count)],
  }
  (truth / "truth.json").write_text(json.dumps(info))


def cut(drive: Drive, segment_seconds: float) -> list[tuple[int, int, int]]:
  """(segment, first frame, frames). Raises UserError where there is none."""
  total, per = round(drive.seconds * FPS), round(segment_seconds * FPS)
  if total < 1 or per < 1:
    raise UserError(
      f"{drive.seconds} seconds in segments of {segment_seconds} hold no frame; at 20 Hz 0.05 is the least"
    )
  return [(n, first, min(per, total - first)) for n, first in enumerate(range(0, total, per))]


def write_missing(
  out: Path, drive: Drive, missing: list[tuple[int, int, int]], last: int, rendered: Iterator[dict[str, Any]]
) -> None:
  """The segments `missing`, of which each appears whole or not at all. rendered: all their frames in order."""
  for n, first, count in missing:
    tmp, final = out / f".{drive.name}--{n}.tmp", out / f"{drive.name}--{n}"
    shutil.rmtree(tmp, ignore_errors=True)
    try:
      tmp.mkdir(parents=True)
      write_segment(tmp, n, drive, rendered, first, count, n == last)
    except OSError as e:
      shutil.rmtree(tmp, ignore_errors=True)
      raise UserError(f"{final} was not written: {e.strerror or e}; make room and run the same command again") from e
    except BaseException:
      shutil.rmtree(tmp, ignore_errors=True)
      raise
    shutil.rmtree(final, ignore_errors=True)
    tmp.rename(final)


def missing_of(out: Path, drive: Drive, segments: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
  return [s for s in segments if not (out / f"{drive.name}--{s[0]}" / "rlog.zst").exists()]


def write_route(
  out_dir: str | Path,
  seed: int = 1,
  seconds: float = 12.0,
  camera: str = "mici",
  time_of_day: str = "day",
  segment_seconds: float = 60.0,
  weather: str = "clear",
  qcamera_only: bool = False,
  camera_height: tuple[float, float] | None = None,
  surroundings: str = "open",
) -> Path:
  """write_drive() of Drive's values."""
  drive = Drive(seed, seconds, camera, time_of_day, weather, qcamera_only, camera_height, surroundings)
  return write_drive(out_dir, drive, segment_seconds)


def write_drive(out_dir: str | Path, drive: Drive, segment_seconds: float = 60.0) -> Path:
  """Writes `<out_dir>/<route>--<n>/` for each segment and returns out_dir. Segments that are there already are kept."""
  out = Path(out_dir)
  segments = cut(drive, segment_seconds)
  missing = missing_of(out, drive, segments)
  frames = [f for _, first, count in missing for f in range(first, first + count)]
  if frames:
    library()  # compiled once, before the workers start
    with multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
      rendered = pool.imap(render_frame, ((drive, f) for f in frames), chunksize=2)
      write_missing(
        out, drive, missing, segments[-1][0], iter(tqdm(rendered, total=len(frames), desc="simulate", unit="frame"))
      )
  return out


def write_whole(job: tuple[Path, Drive, float]) -> int:
  """One route in this process. -> frames written."""
  out, drive, segment_seconds = job
  segments = cut(drive, segment_seconds)
  missing = missing_of(out, drive, segments)
  write_missing(
    out,
    drive,
    missing,
    segments[-1][0],
    (render_frame((drive, f)) for _, first, count in missing for f in range(first, first + count)),
  )
  return sum(count for _, _, count in missing)


def write_routes(
  out_dir: str | Path, drives: list[Drive], segment_seconds: float = 60.0, jobs: int | None = None
) -> int:
  """Many routes side by side, `jobs` at a time (one a core), each in a process of its own. -> frames written; routes
  that are there already are kept."""
  out = Path(out_dir)
  library()
  n = 0
  with multiprocessing.get_context("spawn").Pool(min(len(drives), jobs or os.cpu_count() or 1)) as pool:
    bar = tqdm(
      total=sum(count for d in drives for _, _, count in cut(d, segment_seconds)), desc="simulate", unit="frame"
    )
    for drive, written in zip(drives, pool.imap(write_whole, [(out, d, segment_seconds) for d in drives]), strict=True):
      n += written
      bar.update(round(drive.seconds * FPS))
    bar.close()
  return n


def conditions(seed: int, time_of_day: str, weather: str) -> tuple[str, str]:
  """Time of day and weather of one route; 'any' takes them in turn: seeds 0, 1, 2 are day, dusk, night, and of every
  nine seeds the last three have rain."""
  return TIMES[seed % 3] if time_of_day == "any" else time_of_day, WEATHERS[
    seed // 3 % 3 == 2
  ] if weather == "any" else weather


def parse_seeds(text: str) -> range:
  first, colon, last = text.partition(":")
  if not colon or not first.isdigit() or not last.isdigit() or int(last) <= int(first):
    raise UserError(f"--seeds {text} names no seeds; write FIRST:END, as 1000:1080 for 1000 to 1079")
  return range(int(first), int(last))


def parse_height(text: str) -> tuple[float, float]:
  """'LOW:HIGH' or 'HEIGHT', m. Raises UserError."""
  try:
    low, high = (float(x) for x in (text.split(":") if ":" in text else (text, text)))
  except ValueError:
    low, high = math.nan, math.nan
  if not MIN_HEIGHT <= low <= high <= MAX_HEIGHT:
    raise UserError(
      f"--camera-height {text}: write LOW:HIGH or one height, of {MIN_HEIGHT} to {MAX_HEIGHT} m, as 1.0:2.0"
    )
  return low, high


@dataclass(frozen=True)
class Options:
  output: Path = option(positional=True, help="folder for the segments")
  seed: int = option(1, help="which drive")
  seeds: str | None = option(
    None,
    metavar="FIRST:END",
    help="a route for each of them, 1000:1080 for 1000 to 1079; the same command goes on where it was stopped",
  )
  seconds: float = option(12.0, help="of each drive")
  segment_seconds: float = option(60.0, help="of each segment")
  camera: str = option("mici", choices=sorted(CAMERAS), help="whose")
  time: str = option("day", choices=(*TIMES, "any"), help="any: in turn by the seed")
  weather: str = option("clear", choices=(*WEATHERS, "any"), help="any: rain in a third of the seeds")
  qcamera_only: bool = option(False, help="only qcamera.ts, rendered at its size: several times as fast")
  camera_height: str | None = option(
    None, metavar="LOW[:HIGH]", help="m above the road, between which each seed draws it; default: 1.15:1.4"
  )
  surroundings: str = option(
    "open",
    choices=(*SURROUNDINGS, "any"),
    help="narrow: a street between walls and hedges; queue: creeping traffic; any: every fourth seed's is narrow",
  )
  workers: int | None = option(None, aliases=("--jobs",), help="processes with --seeds; default: one a core")


def main() -> None:
  args = parse(Options, __doc__, "sim")
  seeds = parse_seeds(args.seeds) if args.seeds else range(args.seed, args.seed + 1)
  height = None if args.camera_height is None else parse_height(args.camera_height)
  drives = [
    Drive(
      s,
      args.seconds,
      args.camera,
      *conditions(s, args.time, args.weather),
      args.qcamera_only,
      height,
      SURROUNDINGS[s % 4 == 3] if args.surroundings == "any" else args.surroundings,
    )
    for s in seeds
  ]
  if args.seeds:
    n = write_routes(args.output, drives, args.segment_seconds, args.workers)
    print(f"{args.output}: {len(drives)} routes of {args.seconds} s, {n} frames written, truth beside each segment")
    return
  (d,) = drives
  write_drive(args.output, d, args.segment_seconds)
  print(f"{args.output}: route {d.name}, {d.seconds} s, {d.time_of_day}, {d.weather}, truth beside each segment")


if __name__ == "__main__":
  raise SystemExit(cli(main)())
