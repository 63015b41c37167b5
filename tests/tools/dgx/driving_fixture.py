"""Made-up driving data."""

import json
from pathlib import Path

import numpy as np

from openpilot.tools.dgx.training.constants import DESIRE_LEN, FRAME_SHAPE, T_IDXS
from openpilot.tools.dgx.training.paths import constant_curvature
from openpilot.tools.dgx.training.shards import VERSION

T = np.array(T_IDXS)


def write_data(root: Path, segments: int = 2, frames: int = 44, seed: int = 0) -> Path:
  """Noise pictures whose brightness tells the turn of the road, and the plan of that turn."""
  r = np.random.default_rng(seed)
  root.mkdir(parents=True)
  (root / "dataset.json").write_text(json.dumps({"version": VERSION}))
  for k in range(segments):
    folder = root / f"00000001--aaaaaaaaaa--{k}"
    folder.mkdir()
    rates = np.repeat(r.uniform(-0.05, 0.05, -(-frames // 12)), 12)[:frames]
    speed = np.full(frames, 12.0)
    pose = np.stack([speed, 0 * speed, 0 * speed, 0 * speed, 0 * speed, rates], -1).astype(np.float32)
    plan = constant_curvature(pose).astype(np.float32)
    plan[..., 3], plan[..., 11], plan[..., 14] = 12.0, rates[:, None] * T, rates[:, None]
    plan[-6:, 20:] = np.nan  # the end of the log
    pair = np.arange(frames) - 4
    pair[pair < 0] = -1
    columns = {
      "frame_id": np.arange(frames) + 100,
      "segment_id": np.arange(frames),
      "time": np.arange(frames) * 50_000_000,
      "pair": pair,
      "keep": pair >= 0,
      "row": np.arange(frames),
      "desire": np.zeros((frames, DESIRE_LEN), np.uint8),
      "speed": pose[:, 0],
      "acceleration": pose[:, 1],
      "steering": pose[:, 2],
      "blinkers": np.zeros((frames, 2), np.float32),
      "gps": np.zeros((frames, 3)),
      "pose": pose,
      "plan": plan,
    }
    np.savez(folder / "columns.npz", **columns)
    pictures = (
      (r.normal(128, 6, (frames, *FRAME_SHAPE)) + rates[:, None, None, None] * 1500).clip(0, 255).astype(np.uint8)
    )
    pictures.tofile(folder / "frames.u8")
    pictures.tofile(folder / "big.u8")
    meta = {"rows": frames, "traffic_convention": [1.0, 0.0], "action_t": [0.3, 0.2], "rpy": [0.0, 0.0, 0.0]}
    (folder / "segment.json").write_text(json.dumps(meta))
  return root
