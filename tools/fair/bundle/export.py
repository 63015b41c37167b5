#!/usr/bin/env python3
"""Exports a training run's best student as a bundle: ONNX checked against torch and in tinygrad, manifest with
provenance and metrics, model card."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.bundle import load_bundle, sha256, write_manifest
from openpilot.selfdrive.modeld.fair.compile import CompileError, build as compile_bundle, missing
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.selfdrive.modeld.fair.parity import differences, worst
from openpilot.tools.fair.distillation.trained import load_student_checkpoint, trained_on
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.bundle.card import card, metrics_of, read_evaluation
from openpilot.tools.fair.bundle.sources import data_lines, shown_runs
from openpilot.tools.fair.bundle.replace import check_out, new_bundle
from openpilot.tools.fair.labels.fetching import run_folder
from openpilot.tools.fair.students.onnx_export import export_onnx, store_half
from openpilot.tools.fair.students.student import Student, build
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.fair.tasks.depth import PER_HEIGHT
from openpilot.tools.fair.teacher import check_license, license_of
from openpilot.tools.lib.errors import UserError, cli, warn
from openpilot.tools.lib.files import read_json
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.said import public

TOLERANCE = 2e-3  # of an output's largest value: float32 summed in another order, some 60 layers deep
HALF_TOLERANCE = 1e-2  # with weights that keep 11 bits
FRAMES = 8


def load_student(run: Path) -> tuple[Student, Config, dict[str, Any]]:
  """The best student of a run, in eval mode, its configuration, and its checkpoint. Raises UserError where the run is
  not finished."""
  last, state = (load_student_checkpoint(run / name) for name in ("last.pt", "best.pt"))
  config = Config.from_dict(state["config"])
  if last["step"] < config.steps:
    raise UserError(
      f"{run} is at step {last['step']} of {config.steps}; let it finish: the same `tools/op.sh distill` command with "
      "--resume"
    )
  student = build(config.spec)
  try:
    student.load_state_dict(
      {k.removeprefix("student."): v for k, v in state["ema"].items() if k.startswith("student.")}
    )
  except RuntimeError as e:
    raise UserError(
      f"{run / 'best.pt'} does not fit {config.student}: {' '.join(str(e).split())[:120]}; it is of another version of "
      "this code"
    ) from None
  return student.eval(), config, state


def read_environment(run: Path) -> dict[str, Any]:
  """What `tools/op.sh distill` wrote of its surroundings. Raises UserError."""
  path = run / "environment.json"
  try:
    said = read_json(path)
    lacks = [k for k in ("clips", "segments", "labels", "commit") if k not in said]
  except (OSError, ValueError, TypeError) as e:
    raise UserError(
      f"{path} is missing or damaged ({type(e).__name__}); it tells where the run's data came from: copy the whole "
      "run, or train again"
    ) from None
  if lacks:
    raise UserError(
      f"{path} lacks {', '.join(lacks)}; it is not of `tools/op.sh distill`: copy the run's own, or train again"
    )
  return said


def real_inputs(student: Student, labels: Path | None, seed: int) -> list[dict[str, torch.Tensor]]:
  """Frames of a label store where one is given, else noise; the tracker's inputs are made up, its state too."""
  r, picture = np.random.default_rng(seed), student.spec.input
  if labels is not None:
    data = LabelDataset(labels, ["frames/frame"], stale_labels=True)  # any will do
    frames = [data[int(i)]["frames/frame"][None] for i in np.linspace(0, len(data) - 1, FRAMES)]
    if frames[0].shape[1:] != picture.shape:
      raise UserError(f"--labels {labels} holds frames {frames[0].shape[1:]}, the student takes {picture.shape}")
  else:
    frames = [r.integers(0, 256, (1, *picture.shape), dtype=np.uint8) for _ in range(FRAMES)]
  out = []
  for k, frame in enumerate(frames):
    inputs = {
      name: torch.from_numpy(r.normal(0, 0.3, x.shape).astype(np.float32))
      for name, x in student.inputs().items()
      if name != "frame"
    }
    if inputs:
      inputs["lanes_points"] = torch.from_numpy(
        r.uniform([0, 0], [picture.width - 1, picture.height - 1], inputs["lanes_points"].shape).astype(np.float32)
      )
      inputs["lanes_mask"] = torch.from_numpy((r.uniform(size=inputs["lanes_mask"].shape) < 0.8).astype(np.float32))
      inputs["lanes_fresh"] = torch.from_numpy(
        (r.uniform(size=inputs["lanes_fresh"].shape) < (1.0 if k == 0 else 0.2)).astype(np.float32)
      )
    out.append({"frame": torch.from_numpy(frame.copy()), **inputs})
  return out


def parity(student: Student, path: Path, inputs: list[dict[str, torch.Tensor]], names: list[str]) -> float:
  """The largest difference between ONNX Runtime and torch over `inputs`: see apart(), or as_sets()."""
  session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  found: list[float] = []
  for x in inputs:
    with torch.no_grad():
      want = student(**x)
    out = session.run(names, {i.name: x[i.name].numpy() for i in session.get_inputs()})
    if getattr(student, "family", None) is not None:
      found.append(as_sets([want[n].numpy()[0] for n in names], [o[0] for o in out]))
      continue
    found += apart(dict(zip(names, out, strict=True)), {n: want[n].detach().numpy() for n in names}).values()
  return worst(found)


def apart(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
  """The largest difference of each output, in parts of its largest value; of the tracker's, of 99 of 100 points: it
  looks around whole cells, and one that lies half-way between two is rounded to either."""
  out = differences(got, want)
  for name, a in want.items():
    if name.startswith("lanes_") and np.isfinite(out[name]):
      points = np.abs(a - got[name]).reshape(a.shape[1], -1).max(1)
      out[name] = float(np.quantile(points, 0.99) / max(1e-6, np.abs(a).max()))
  return out


def as_sets(want: list[np.ndarray], got: list[np.ndarray]) -> float:
  """Each (Q, ...): queries in any order, as those that are equally good come out. -> the difference to the nearest of
  the other side in parts of each output's largest value, of 9 of 10 queries: where many places are nearly equally
  good, others of them are asked, while a fault of the graph moves all."""
  if [a.shape for a in want] != [a.shape for a in got] or not all(np.isfinite(a).all() for a in (*want, *got)):
    return float("inf")
  scales = [max(1e-6, float(np.abs(a).max())) for a in want]
  a, b = (
    np.concatenate([x.reshape(len(x), -1) / s for x, s in zip(side, scales, strict=True)], 1) for side in (want, got)
  )
  apart = np.stack([np.abs(b - row).max(1) for row in a])  # (Q, Q)
  return max(float(np.quantile(apart.min(axis), 0.9)) for axis in (0, 1))


def in_tinygrad(folder: Path) -> str:
  """Compiles the bundle in `folder` for tinygrad's CPU device, which compares it with ONNX Runtime. -> what to say.
  Raises UserError where they differ."""
  if why := missing("tinygrad-cpu"):
    return f"tinygrad was not checked: {why}"
  with tempfile.TemporaryDirectory() as tmp:
    try:
      said = compile_bundle(load_bundle(folder), "tinygrad-cpu", Path(tmp))
    except CompileError as e:
      raise UserError(f"{e}; nothing was written. --no-tinygrad exports it anyway") from None
  return f"tinygrad and ONNX Runtime differ by at most {max(s['parity'] for s in said):.1g}"


@dataclass(frozen=True)
class Options:
  run: Path = option(positional=True, help="a finished run of `tools/op.sh distill`")
  output: Path = option(aliases=("--out",), help="the bundle's folder, as models/NAME")
  evaluation: tuple[Path, ...] = option(
    (), help="JSON of `tools/op.sh evaluate` on the same bundle, for manifest and card; may be repeated"
  )
  notes: Path | None = option(None, help="a text file with what users must know of it; goes into the card")
  labels: Path | None = option(
    None, help="a label store whose frames ONNX Runtime and torch are compared on; else noise"
  )
  weights: str = option(
    "float16",
    choices=("float16", "float32", "auto"),
    help="how the file stores them; it computes in float32 either way. auto: float16 where that changes little",
  )
  tinygrad: bool = option(True, help="do not compile it in tinygrad, which takes a minute or more")
  accept_license: tuple[str, ...] = option(
    (),
    aliases=("--accept-licence",),
    metavar="LICENSE",
    help="of teachers whose license restricts what learns from them",
  )


def run(args: Options, told: str = "") -> None:
  """told: of another command, for the card. Raises UserError."""
  args = replace(args, run=run_folder(args.run))
  check_out(args.output, args.run)
  evaluations = [read_evaluation(e, args.output.name) for e in args.evaluation]
  try:
    notes = args.notes.read_text() if args.notes else told
  except OSError as e:
    raise UserError(f"--notes {args.notes}: {e.strerror}") from None
  student, config, state = load_student(args.run)
  for t in state["provenance"]:
    check_license(t["model"], t["licence"], args.accept_license)
  environment, trained = read_environment(args.run), trained_on(state, args.run)
  wanted = tuple(o for t in config.tasks for o in TASKS[t].outputs)
  if config.qat and not told:
    warn(f"{args.run} learned in 8 bits: its float graph is not what it learned; see `tools/op.sh optimize --qat`")
  with new_bundle(args.output, args.run) as folder:
    path = folder / f"{config.student}.onnx"
    graph = export_onnx(student, path, wanted, config.untaught)
    for out in graph["outputs"]:
      if config.per_height and out.get("head") == "depth":
        out["parameters"] = dict(PER_HEIGHT)
    apart = parity(student, path, real_inputs(student, args.labels, 0), [o["name"] for o in graph["outputs"]])
    if not apart <= TOLERANCE:
      raise UserError(
        f"ONNX Runtime and torch differ by {apart:.2g} of an output's largest value, more than {TOLERANCE}; nothing "
        f"was written to {args.output}"
      )
    checked = [f"ONNX Runtime and torch differ by at most {apart:.1g}"]
    if args.weights != "float32":
      whole = path.read_bytes()
      store_half(path)
      apart = parity(student, path, real_inputs(student, args.labels, 0), [o["name"] for o in graph["outputs"]])
      if not apart <= HALF_TOLERANCE and args.weights == "float16":
        raise UserError(
          f"float16 weights change an output by {apart:.2g} of its largest value, more than {HALF_TOLERANCE}; export "
          "with --weights float32"
        )
      if apart <= HALF_TOLERANCE:
        checked.append(f"with the weights stored as float16 by {apart:.1g}")
      else:
        path.write_bytes(whole)
        checked.append(f"weights are stored as float32, since float16 would change an output by {apart:.1g}")
    metrics = metrics_of(evaluations, args.output.name, args.run, trained)
    manifest = {
      "name": args.output.name,
      "version": "1",
      "size": student.spec.size,
      **({"backbone": student.spec.backbone} if student.spec.backbone else {}),
      **({"widths": student.spec.to_dict()["widths"]} if student.spec.widths else {}),
      "view": student.spec.input.view,
      "input": student.spec.input.to_dict(),
      "streams": ["narrowRoad"],
      "graphs": [graph],
      "provenance": {
        "teachers": [{**t, "model": public(t["model"])} for t in state["provenance"]],
        "data": [
          (
            f"{environment['clips']} clips of {config.clip} frames from {len(environment['segments'])} segments, label "
            f"store {environment['labels']}" + (f", {config.taught_by}" if config.taught_by else "")
          ),
          *data_lines(state),
        ],
        "history": shown_runs(state),
        "licence": license_of(state["provenance"]),
        "checkpoint_hash": sha256(args.run / "best.pt"),
        "git_commit": environment["commit"] or "unknown",
      },
      "metrics": metrics,
    }
    write_manifest(folder, manifest)
    if args.tinygrad:
      checked.append(in_tinygrad(folder))
    (folder / "README.md").write_text(
      card(args.output.name, student, config, state, environment, metrics, evaluations, checked, notes, trained)
    )
    write_manifest(folder, manifest)  # again, with the card's hash
  size = sum(f.stat().st_size for f in args.output.iterdir()) / 1e6
  print(f"{args.output}: {', '.join(o['name'] for o in graph['outputs'])}; {size:.1f} MB; {'; '.join(checked)}")


def main() -> None:
  run(parse(Options, __doc__, "export"))


if __name__ == "__main__":
  raise SystemExit(cli(main)())
