"""Rendered frames with exact truth for scene-nano, in memory-mapped arrays that a killed run goes on filling."""

import io
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE, VIEW_H, VIEW_W, pack_rgb
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.said import command
from openpilot.tools.sim.render import library, render
from openpilot.tools.sim.truth import MAP_H, MAP_W, map_labels
from openpilot.tools.sim.world import World

FRAMES_PER_WORLD = 8
TIMES = ("day", "dusk", "night")
TIME_SHARES = (0.5, 0.2, 0.3)


def spoil(rgb: np.ndarray, r: np.random.Generator) -> np.ndarray:
  """What cameras and encoders do to a picture: lower resolution, JPEG-like blocks, at times both."""
  image = Image.fromarray(rgb)
  if r.uniform() < 0.45:
    k = r.uniform(1.2, 2.6)
    image = image.resize((int(VIEW_W / k), int(VIEW_H / k)), Image.Resampling.BILINEAR).resize(
      (VIEW_W, VIEW_H), Image.Resampling.BICUBIC
    )
  if r.uniform() < 0.6:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=int(r.integers(25, 92)))
    image = Image.open(data)
  return np.asarray(image.convert("RGB"))


def render_world(job: tuple[int, bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
  """(seed, spoil the pictures?) -> frames (8, 6, 128, 256), depth (8, 64, 128), classes (8, 64, 128), time of day."""
  seed, spoiled = job
  r = np.random.default_rng([seed, 99])
  time_of_day = str(r.choice(TIMES, p=TIME_SHARES))
  world = World(seed, time_of_day, seconds=20.0)
  frames, depths, classes = (
    np.empty((FRAMES_PER_WORLD, *FRAME_SHAPE), np.uint8),
    np.empty((FRAMES_PER_WORLD, MAP_H, MAP_W), np.float16),
    np.empty((FRAMES_PER_WORLD, MAP_H, MAP_W), np.uint8),
  )
  for i, t in enumerate(np.sort(r.uniform(0, 20, FRAMES_PER_WORLD))):
    frame = render(
      world, float(t), medmodel_intrinsics, VIEW_W, VIEW_H, rpy=r.normal(0, 0.006, 3)
    )  # the calibration is never quite right
    frames[i] = pack_rgb(spoil(frame.rgb, r) if spoiled else frame.rgb)
    depths[i], classes[i] = map_labels(frame.depth, frame.semantic)
  return frames, depths, classes, time_of_day


class SceneData:
  """The arrays of one folder: frames (N, 6, 128, 256) uint8, depth (N, 64, 128) float16, classes (N, 64, 128) uint8,
  times [N // 8]."""

  def __init__(self, root: Path, mode: str = "r"):
    info = root / "info.json"
    if not info.is_file():
      raise UserError(
        f"no rendered frames in {root}: info.json is missing; make them with `tools/op.sh train-scene render "
        f"{command('--out', root)}`"
      )
    self.info = json.loads(info.read_text())
    n = self.info["frames"]
    self.frames = np.memmap(root / "frames.u8", np.uint8, mode, shape=(n, *FRAME_SHAPE))  # type: ignore[call-overload]
    self.depth = np.memmap(root / "depth.f16", np.float16, mode, shape=(n, MAP_H, MAP_W))  # type: ignore[call-overload]
    self.classes = np.memmap(root / "classes.u8", np.uint8, mode, shape=(n, MAP_H, MAP_W))  # type: ignore[call-overload]
    self.times: list[str] = self.info["times"]

  @property
  def done(self) -> int:
    """Frames that are rendered so far."""
    return len(self.times) * FRAMES_PER_WORLD


def render_data(root: Path, frames: int, first_seed: int, spoiled: bool = True) -> SceneData:
  """Renders `frames` frames (whole worlds of 8) from seeds first_seed on; goes on where an earlier run of the same
  command stopped."""
  worlds = -(-frames // FRAMES_PER_WORLD)
  root.mkdir(parents=True, exist_ok=True)
  info_path = root / "info.json"
  info: dict[str, Any] = {
    "frames": worlds * FRAMES_PER_WORLD,
    "first_seed": first_seed,
    "spoiled": spoiled,
    "times": [],
  }
  if info_path.exists():
    old = json.loads(info_path.read_text())
    if {k: old[k] for k in ("frames", "first_seed", "spoiled")} != {
      k: info[k] for k in ("frames", "first_seed", "spoiled")
    }:
      raise UserError(
        f"{root} holds other frames ({old['frames']} from seed {old['first_seed']}); choose another folder or delete it"
      )
    info = old
  else:
    for name, size in (
      ("frames.u8", int(np.prod(FRAME_SHAPE))),
      ("depth.f16", 2 * MAP_H * MAP_W),
      ("classes.u8", MAP_H * MAP_W),
    ):
      with open(root / name, "wb") as file:
        file.truncate(worlds * FRAMES_PER_WORLD * size)
    info_path.write_text(json.dumps(info))
  data = SceneData(root, "r+")
  library()  # compile once, before the workers start
  start = len(info["times"])
  jobs = [(first_seed + i, spoiled) for i in range(start, worlds)]
  with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, max(1, len(jobs)))) as pool:
    for i, (f, d, c, time_of_day) in enumerate(
      tqdm(pool.imap(render_world, jobs), total=worlds, initial=start, desc="render", unit="world"), start
    ):
      at = slice(i * FRAMES_PER_WORLD, (i + 1) * FRAMES_PER_WORLD)
      data.frames[at], data.depth[at], data.classes[at] = f, d, c
      info["times"].append(time_of_day)
      if i % 20 == 19 or i == worlds - 1:
        for array in (data.frames, data.depth, data.classes):
          array.flush()
        tmp = info_path.with_suffix(".tmp")
        tmp.write_text(json.dumps(info))
        os.replace(tmp, info_path)
  return SceneData(root)
