#!/usr/bin/env python3
"""How far driving models' plans are from the path that the car really drove, after 1, 2 and 3 s, beside two paths that
need no network: of constant curvature, and of constant curvature with the acceleration of the last 0.4 s, fading. Both
are told the car's true turn rate, which models must see.

python tools/dgx/training/evaluate.py --data DATA MODEL.onnx [MODEL.onnx ...]

Runs each file with ONNX Runtime and modeld's memory over whole segments. Intervals are of 95%, by resampling blocks of
ten seconds: frames beside each other are too alike to count as many. "less than" is the first file's error minus the
other's on the same frames: above 0 with all of its interval, it is better."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: the modules beside it must not be found under their bare names
  sys.path[: not sys.flags.safe_path] = [str(Path(__file__).resolve().parents[3])]

import numpy as np
import torch
from tqdm import tqdm

from openpilot.tools.dgx.training.constants import T_IDXS
from openpilot.tools.dgx.training.paths import constant_curvature, path_error
from openpilot.tools.dgx.training.reference_turn import arc
from openpilot.tools.dgx.training.shards import DrivingClips, read_dataset
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option, parse

RIVALS = ("constant curvature", "and acceleration")
SECONDS = (1.0, 2.0, 3.0)
BLOCK = 50  # steps at 5 Hz
RESAMPLED = 2000


def interval(errors: np.ndarray, blocks: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
  """(N,) values and the block of each -> their mean and its 95% interval, by resampling blocks. NaN values count
  nothing."""
  good = np.isfinite(errors)
  errors, blocks = errors[good], blocks[good]
  names, index = np.unique(blocks, return_inverse=True)
  if not len(names):
    return (np.nan,) * 3
  sums, counts = np.bincount(index, errors), np.bincount(index)
  chosen = np.random.default_rng(seed).integers(0, len(names), (RESAMPLED, len(names)))
  means = sums[chosen].sum(1) / counts[chosen].sum(1)
  return float(errors.mean()), float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def drives(data: Path, length: int) -> DrivingClips:
  """Clips that follow each other without overlap, each as long as `length` steps. Raises UserError where there is
  none."""
  clips = DrivingClips(read_dataset(data)[1], length)
  if not len(clips):
    raise UserError(
      f"{data} has no {length} steps that follow each other, each kept; take a smaller --clip, or data that is less "
      "filtered"
    )
  return clips


def accelerated(pose: np.ndarray) -> np.ndarray:
  """(T, 6) velocity and turn rates along a clip at 5 Hz -> (T, 33, 15): reference_turn.arc from them. Steps without a
  past have no acceleration yet."""
  v, turn = (torch.from_numpy(pose[:, k : k + 1].astype(np.float64)) for k in (0, 5))
  gains = torch.stack(
    [torch.nn.functional.pad(v[k:] - v[: len(v) - k], (0, 0, k, 0))[: len(v)] / (0.2 * k) for k in (1, 2)]
  )
  return arc(v, turn, gains.mean(0), torch.tensor(T_IDXS, dtype=torch.float64)).numpy()


def errors_of(
  models: dict[str, DrivingTeacher], clips: DrivingClips, warm: int, progress: bool = True
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """-> {name: (N, len(SECONDS)) meters}, RIVALS among them, and the ten seconds that each lies in. warm: a clip's steps
  that only fill memory."""
  found: dict[str, list[np.ndarray]] = {}
  blocks: list[np.ndarray] = []
  for i in tqdm(range(len(clips)), desc="evaluate", unit="clip", disable=not progress):
    clip = clips[i]
    driven, pose = clip["plan"].numpy()[warm:], clip["pose"].numpy()
    plans = dict(zip(RIVALS, (constant_curvature(pose)[warm:], accelerated(pose)[warm:]), strict=True))
    for name, model in models.items():
      labels = model.label(clip)
      if "plan" not in labels:
        raise UserError(f"{name} puts out no plan; give a driving model")
      plans[name] = labels["plan"].float().cpu().numpy()[warm:]
    for name, plan in plans.items():
      found.setdefault(name, []).append(np.stack([path_error(plan, driven, s) for s in SECONDS], -1))
    blocks.append(
      int(clips.clips[i, 0]) * 100_000 + (int(clips.clips[i, 1]) // 4 + np.arange(warm, clips.length)) // BLOCK
    )
  return {k: np.concatenate(v) for k, v in found.items()}, np.concatenate(blocks)


def compare(errors: dict[str, np.ndarray], blocks: np.ndarray, first: str) -> dict[str, Any]:
  """errors_of's -> error {name: an interval per second}, gain {name: of first's error minus its own}, frames that are
  known to the end, blocks."""
  known = int(np.isfinite(errors[first][:, -1]).sum())
  out: dict[str, Any] = {
    "frames": known,
    "blocks": len(np.unique(blocks)),
    "seconds": list(SECONDS),
    "error": {},
    "gain": {},
  }
  for name, e in errors.items():
    out["error"][name] = [interval(e[:, k], blocks) for k in range(len(SECONDS))]
    if name != first:
      out["gain"][name] = [interval(errors[first][:, k] - e[:, k], blocks) for k in range(len(SECONDS))]
  return out


@dataclass(frozen=True)
class Options:
  models: tuple[Path, ...] = option(
    positional=True, metavar="MODEL.onnx", help="whole driving models; the others are compared with the first"
  )
  data: Path = option(help="a folder of dataloader.py that was not trained on")
  clip: int = option(50, help="steps at 5 Hz of one drive")
  warm: int = option(5, help="of them, steps at the start that are not judged")
  json: Path | None = option(None, help="write the numbers there too")


def main() -> None:
  args = parse(Options, __doc__, "evaluate")
  if not 0 <= args.warm < args.clip:
    raise UserError("--warm is at least 0 and below --clip")
  torch.set_grad_enabled(False)
  names = [m.stem if [x.stem for x in args.models].count(m.stem) == 1 else str(m) for m in args.models]
  models = {n: DrivingTeacher(m) for n, m in zip(names, args.models, strict=True)}
  clips = drives(args.data, args.clip)
  errors, blocks = errors_of(models, clips, args.warm)
  result = compare(errors, blocks, names[0])
  print(
    f"{args.data}: {result['frames']} frames in {result['blocks']} blocks of 10 s; meters between plan and drive, mean "
    "and 95% interval"
  )
  print(f"{'':<24}" + "".join(f"{f'after {s:g} s':>26}" for s in SECONDS))
  for name, e in result["error"].items():
    print(f"{name:<24}" + "".join(f"{f'{m:.2f} ({a:.2f} to {b:.2f})':>26}" for m, a, b in e))
  for name, e in result["gain"].items():
    print(
      f"{f'{name}: less than {names[0]}':<24}\n{'':<24}"
      + "".join(f"{f'{m:+.2f} ({a:+.2f} to {b:+.2f})':>26}" for m, a, b in e)
    )
  if args.json:
    with atomic_path(args.json) as tmp:
      tmp.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
  raise SystemExit(cli(main)())
