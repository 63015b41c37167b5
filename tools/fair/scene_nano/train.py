#!/usr/bin/env python3
"""scene-nano from the simulator's exact truth: render, train, evaluate, export. `all` does the four in a row; the
defaults take two cores about an hour.

Every step resumes: a killed `render` or `train` goes on where it stopped when the same command is given again, or
`--config RUN`."""

import hashlib
import json
import math
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openpilot.selfdrive.modeld.fair.bundle import write_manifest
from openpilot.selfdrive.modeld.fair.frames import FRAME_SHAPE
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.selfdrive.modeld.fair.parity import difference, worst
from openpilot.tools.fair.scene_nano.student import SceneStudent
from openpilot.tools.fair.scene_nano.losses import depth_loss, depth_mask, segmentation_loss
from openpilot.tools.fair.scene_nano.data import FRAMES_PER_WORLD, TIMES, SceneData, render_data
from openpilot.tools.learn.checkpoint import load_checkpoint, same_run
from openpilot.tools.learn.loop import Loop
from openpilot.tools.learn.processes import make_accelerator
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse, save
from openpilot.tools.lib.said import command
from openpilot.tools.sim.render import CLASSES
from openpilot.tools.sim.truth import IGNORE, MAP_H, MAP_W, MAX_DEPTH

ROOT = Path(__file__).resolve().parents[3]
CLASS_WEIGHTS = (1.0, 1.0, 3.0, 2.0, 5.0)  # lane markings and pedestrians are a few pixels each
TRAIN_SEED, VAL_SEED = 1, 1_000_000  # first seeds: no world is in both
OPSET = 17


def augment(frames: Tensor, depth: Tensor, classes: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
  """Exposure, contrast, white balance, noise, mirrored roads and pixels outside the image, alike for frames (B, 6, 128,
  256) and labels, in place.

  Returns frames uint8 and the depth. Border pixels repeat, as the warp clamps them, and their labels count nowhere."""
  b = len(frames)
  x = frames.float()

  def u(lo: float, hi: float, *shape: int) -> Tensor:
    return torch.rand(b, *shape, generator=g) * (hi - lo) + lo

  luma = (x[:, :4] - 16) * u(0.6, 1.5, 1, 1, 1) + 16 + u(-12, 22, 1, 1, 1)
  x[:, :4] = 16 + 219 * ((luma - 16).clamp(0, 219) / 219) ** u(0.75, 1.3, 1, 1, 1)
  x[:, 4:] = (x[:, 4:] - 128) * u(0.2, 1.4, 1, 1, 1) + 128 + u(-8, 8, 2, 1, 1)
  x += torch.randn(x.shape, generator=g) * u(0, 5, 1, 1, 1) ** 2 / 3
  x = x.round().clamp(0, 255)
  for i in range(b):
    if torch.rand((), generator=g) < 0.5:  # columns 2i and 2i+1 of the view change places when it is mirrored
      x[i] = x[i][[2, 3, 0, 1, 4, 5]].flip(-1)
      depth[i], classes[i] = depth[i].flip(-1), classes[i].flip(-1)
    if torch.rand((), generator=g) < 0.1:
      cut, side = int(torch.randint(1, 10, (), generator=g)), int(torch.randint(4, (), generator=g))
      n = 2 * cut
      if side == 0:
        x[i, :, :n], classes[i, :cut] = x[i, :, n : n + 1], IGNORE
      elif side == 1:
        x[i, :, -n:], classes[i, -cut:] = x[i, :, -n - 1 : -n], IGNORE
      elif side == 2:
        x[i, :, :, :n], classes[i, :, :cut] = x[i, :, :, n : n + 1], IGNORE
      else:
        x[i, :, :, -n:], classes[i, :, -cut:] = x[i, :, :, -n - 1 : -n], IGNORE
  return x.to(torch.uint8), depth


def batch(data: SceneData, index: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
  index = np.sort(index)
  return (
    torch.from_numpy(data.frames[index]),
    torch.from_numpy(data.depth[index].astype(np.float32)),
    torch.from_numpy(data.classes[index].astype(np.int64)),
  )


@torch.inference_mode()
def evaluate(model: torch.nn.Module, data: SceneData, limit: int | None = None) -> dict[str, dict[str, float]]:
  """Metrics by time of day and over all. Depth: AbsRel mean(|d - d*| / d*), delta1 share of max(d/d*, d*/d) < 1.25,
  SiLog sqrt(var(log d - log d*)), no alignment, over truth below 200 m. Segmentation: IoU per class from one confusion
  matrix over all frames, mIoU their mean."""
  confusion = {k: np.zeros((len(CLASSES), len(CLASSES))) for k in TIMES}
  sums = {k: np.zeros(5) for k in TIMES}  # n, abs rel, delta1, g, g^2
  was_training = model.training
  model.eval()
  for start in range(0, min(data.done, limit or data.done), FRAMES_PER_WORLD):
    time_of_day = data.times[start // FRAMES_PER_WORLD]
    frames, depth, classes = batch(data, np.arange(start, start + FRAMES_PER_WORLD))
    log_depth, logits = model(frames)
    mask = depth_mask(depth, classes)
    truth, pred = depth[mask].double(), log_depth[:, 0][mask].double().exp()
    g = (pred / truth).log()
    sums[time_of_day] += [
      mask.sum(),
      ((pred - truth).abs() / truth).sum(),
      (g.abs() < math.log(1.25)).sum(),
      g.sum(),
      (g * g).sum(),
    ]
    k = classes * len(CLASSES) + logits.argmax(1)
    confusion[time_of_day] += np.bincount(k[classes != IGNORE].numpy().ravel(), minlength=len(CLASSES) ** 2).reshape(
      len(CLASSES), -1
    )
  model.train(was_training)
  out = {}
  for name, keys in [(k, [k]) for k in TIMES] + [("all", list(TIMES))]:
    c, s = np.sum([confusion[k] for k in keys], axis=0), np.sum([sums[k] for k in keys], axis=0)
    if s[0] == 0:
      continue
    iou = np.diag(c) / np.maximum(1, c.sum(0) + c.sum(1) - np.diag(c))
    out[name] = {
      "abs_rel": s[1] / s[0],
      "delta1": s[2] / s[0],
      "silog": math.sqrt(max(0.0, s[4] / s[0] - (s[3] / s[0]) ** 2)),
      "miou": iou.mean(),
      **{f"iou_{n}": v for n, v in zip(CLASSES, iou, strict=True)},
    }
    out[name] = {k: round(float(v), 4) for k, v in out[name].items()}
  return out


class Run(Loop):
  """One run in the folder `out`, on the CPU. Everything random is a function of the step."""

  NAME, BEST, LEARNED_FROM = "train-scene", "last.pt", "frames"

  def __init__(self, data: SceneData, val: SceneData, out: Path, steps: int, batch_size: int, lr: float, seed: int):
    super().__init__(out, steps, lr=lr, warmup=200, seed=seed, accelerator=make_accelerator("no", (), out, cpu=True))
    self.data, self.val, self.batch_size = data, val, batch_size
    torch.manual_seed(seed)
    model = SceneStudent().to(memory_format=torch.channels_last)
    self.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.02), ema=0.998)
    self.class_weights = torch.tensor(CLASS_WEIGHTS)

  def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for step in range(self.step, self.steps):
      g = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
      frames, depth, classes = batch(self.data, torch.randint(self.data.done, (self.batch_size,), generator=g).numpy())
      yield (*augment(frames, depth, classes, g), classes)

  def losses(self, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    frames, depth, classes = batch
    log_depth, logits = self.model(frames.contiguous(memory_format=torch.channels_last))
    parts = {
      "depth": depth_loss(log_depth[:, 0], depth, depth_mask(depth, classes)),
      "segmentation": segmentation_loss(logits, classes, self.class_weights),
    }
    return {**parts, "total": parts["depth"] + parts["segmentation"]}

  def evaluate(self) -> dict[str, float]:
    """Of the averaged student; on all held-out frames at the end, on some before."""
    return evaluate(self.ema, self.val, None if self.step == self.steps else 160)["all"]

  def settings(self) -> dict[str, Any]:
    return {"steps": self.steps, "batch_size": self.batch_size, "lr": self.lr}

  def state(self) -> dict[str, Any]:
    return {**super().state(), **self.settings()}

  def load(self, state: Mapping[str, Any]) -> None:
    same_run(self.out / self.LAST, state, self.settings())
    super().load({"best": math.inf, **state, "optimizer": state.get("optimizer", state.get("opt"))})  # the former name


def train(data_dir: Path, out: Path, steps: int, batch_size: int, lr: float, seed: int) -> None:
  out.mkdir(parents=True, exist_ok=True)
  run = Run(SceneData(data_dir), SceneData(val_dir(data_dir)), out, steps, batch_size, lr, seed)
  if (out / run.LAST).exists():
    run.load(load_checkpoint(out / run.LAST))
  run.fit()


def val_dir(data_dir: Path) -> Path:
  return data_dir.with_name(data_dir.name + "-val")


def load_student(run: Path) -> SceneStudent:
  path = run / "last.pt"
  if not path.is_file():
    raise UserError(f"no checkpoint at {path}; train first: `tools/op.sh train-scene train {command('--run', run)}`")
  model = SceneStudent()
  model.load_state_dict(torch.load(path, weights_only=True)["ema"])
  return model.eval()


def export(run: Path, data_dir: Path, out: Path) -> None:
  """Writes the bundle: scene.onnx, manifest.json with metrics on worlds that were not trained on, README.md. Checks
  ONNX Runtime against torch."""
  import onnx

  model, data, val = load_student(run), SceneData(data_dir), SceneData(val_dir(data_dir))
  metrics = evaluate(model, val)
  out.mkdir(parents=True, exist_ok=True)
  path = out / "scene.onnx"
  example = torch.from_numpy(val.frames[:1].copy())
  torch.onnx.export(
    model,
    (example,),
    str(path),
    input_names=["frame"],
    output_names=["depth", "segmentation"],
    opset_version=OPSET,
    dynamo=False,
  )
  onnx.checker.check_model(onnx.load(str(path)))
  session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  found: list[float] = []
  for i in range(0, min(val.done, 64), 4):
    frame = val.frames[i : i + 1].copy()
    for a, b in zip(session.run(None, {"frame": frame}), model(torch.from_numpy(frame)), strict=True):
      found.append(difference(a, b.detach().numpy()))
  apart = worst(found)
  if not apart <= 1e-3:
    raise UserError(
      f"{path}: ONNX Runtime and torch differ by {apart:.2g} of an output's largest value, more than 1e-3; nothing was "
      "shipped"
    )
  commit = (
    subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    or "unknown"
  )
  data_name = f"simulator, {data.done} frames, seeds from {data.info['first_seed']}"
  val_name = f"simulator, {val.done} frames, seeds from {val.info['first_seed']}"
  checkpoint_hash = hashlib.sha256((run / "last.pt").read_bytes()).hexdigest()
  (out / "README.md").write_text(card(metrics, data_name, val_name, sum(p.numel() for p in model.parameters()), apart))
  write_manifest(
    out,
    {
      "name": out.name,
      "version": "1",
      "size": "nano",
      "view": "medmodel",
      "streams": ["narrowRoad"],
      "graphs": [
        {
          "name": "scene",
          "file": "scene.onnx",
          "period": 1,
          "inputs": [
            {
              "name": "frame",
              "shape": [1, *FRAME_SHAPE],
              "dtype": "uint8",
              "frames": [0],
              "spacing_ms": 50,
              "gap": "ignore",
            }
          ],
          "state": [],
          "outputs": [
            {
              "name": "depth",
              "shape": [1, 1, MAP_H, MAP_W],
              "dtype": "float32",
              "head": "depth",
              "parameters": {"activation": "exp", "metric": True},
            },
            {
              "name": "segmentation",
              "shape": [1, len(CLASSES), MAP_H, MAP_W],
              "dtype": "float32",
              "head": "segmentation",
              "parameters": {},
              "classes": list(CLASSES),
            },
          ],
        }
      ],
      "provenance": {
        "teachers": [],
        "data": [f"{data_name}; exact truth, MIT"],
        "licence": "MIT",
        "checkpoint_hash": checkpoint_hash,
        "git_commit": commit,
      },
      "metrics": [
        {"name": f"{k}/{time_of_day}", "value": v, "data": val_name}
        for time_of_day, m in metrics.items()
        for k, v in m.items()
      ],
    },
  )
  print(json.dumps(metrics, indent=1))
  print(f"torch and ONNX Runtime differ by at most {apart:.2g}; bundle in {out}")


def card(metrics: dict[str, dict[str, float]], data: str, val: str, parameters: int, apart: float) -> str:
  keys = ["abs_rel", "delta1", "silog", "miou", *[f"iou_{c}" for c in CLASSES]]
  rows = "\n".join(f"| {k} | " + " | ".join(f"{m[k]:.3f}" for m in metrics.values()) + " |" for k in keys)
  return f"""# scene-nano

Depth and road-scene segmentation ({', '.join(CLASSES)}) from one model frame; {parameters / 1e6:.2f}M parameters.

**Not made for real streets.** It has seen nothing but this project's ray-cast simulator: boxes for cars, hashes for
asphalt. It is the first bundle, there to carry the runtime; its depth on a real camera is a guess. No teacher was used,
so no license but MIT applies.

- Trained on: {data}, exact truth, by `tools/op.sh train-scene all`.
- Measured on: {val}; the same simulator, worlds that were not trained on, clean and spoiled pictures alike.
- Input `frame` uint8 (1, 6, 128, 256), the medmodel view; the graph normalizes. Outputs (64, 128): `depth`, the natural
  log of meters along the optical axis; `segmentation`, logits. Map pixel i is centered on view pixel 4i + 1.5.
- A map pixel's class is the vote of its 4x4 view pixels, lane pixels counting three times and pedestrians twice; truth
  in the table is made the same way.
- Depth metrics: truth below {MAX_DEPTH:.0f} m, no alignment: AbsRel mean(abs(d - d*) / d*), delta1 the share within a
  factor 1.25, SiLog the standard deviation of log d - log d*.
- ONNX Runtime and torch agree to {apart:.1g} of the largest value.

| metric | {' | '.join(metrics)} |
|---|{'---|' * len(metrics)}
{rows}
"""


@dataclass(frozen=True)
class Options:
  step: str = option(positional=True, choices=("render", "train", "evaluate", "export", "all"), help="what to do")
  data: Path = option(ROOT / "out" / "scene", help="rendered frames; the held-out ones lie beside it in <data>-val")
  run: Path = option(ROOT / "out" / "scene-run", help="checkpoints and log")
  output: Path = option(ROOT / "models" / "scene-nano", aliases=("--out",), help="the bundle")
  frames: int = option(10000, help="rendered to train on")
  val_frames: int = option(640, help="rendered to evaluate on")
  steps: int = option(3000, help="of the optimizer")
  batch_size: int = option(16, aliases=("--batch",), help="frames a step")
  lr: float = option(2e-3, help="learning rate")
  seed: int = option(0, help="of all that is random")


def main() -> None:
  args = parse(Options, __doc__, "train-scene")
  if args.step in ("render", "all"):
    render_data(args.data, args.frames, TRAIN_SEED)
    render_data(val_dir(args.data), args.val_frames, VAL_SEED)
  if args.step in ("train", "all"):
    if not (args.run / Run.LAST).exists():
      args.run.mkdir(parents=True, exist_ok=True)
      save(args, args.run)
    train(args.data, args.run, args.steps, args.batch_size, args.lr, args.seed)
  if args.step == "evaluate":
    print(json.dumps(evaluate(load_student(args.run), SceneData(val_dir(args.data))), indent=1))
  if args.step in ("export", "all"):
    export(args.run, args.data, args.output)


if __name__ == "__main__":
  raise SystemExit(cli(main)())
