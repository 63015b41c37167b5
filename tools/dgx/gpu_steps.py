"""The steps of gpu_check.py that are no command of their own: python -m openpilot.tools.dgx.gpu_steps NAME [WORDS], in
the folder of its output. Each leaves its numbers in NAME.json."""

import copy
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.bundle import given_or_shipped, load_bundle, write_manifest
from openpilot.selfdrive.modeld.fair.parity import sample_inputs
from openpilot.selfdrive.modeld.fair.runners import tensorrt
from openpilot.tools.dgx.benchmark_tensorrt import measure
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.fair.optimize.formats import to_half
from openpilot.tools.fair.optimize.quantize import TARGETS, calibrate, last_layers, prepare, quantize
from openpilot.tools.fair.optimize.sensitivity import errors, run_all
from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import write_json

CALIBRATE, CALLS = 8, 200
SECONDS = 6  # of a simulated drive
Numbers = dict[str, Any]


def int8(blob: bytes, inputs: list[dict[str, np.ndarray]]) -> bytes:
  """For TensorRT; ranges of noise: right for speed, not for accuracy."""
  model = prepare(blob)
  return quantize(calibrate(model, inputs, True), TARGETS["tensorrt"], last_layers(model))


def graph_variant(name: str, precision: str) -> Numbers:
  """A bundle with one variant for TensorRT, and how far it is off from float in ONNX Runtime."""
  base, folder = load_bundle(given_or_shipped(name)), Path(f"student-{precision}")
  half = to_half(base).files if precision == "float16" else {}
  shutil.rmtree(folder, ignore_errors=True)
  shutil.copytree(base.path, folder)
  manifest, off = copy.deepcopy(base.manifest), dict[str, float]()
  for graph in manifest["graphs"]:
    blob = base.onnx(graph)
    some = [sample_inputs(graph, s) for s in range(CALIBRATE)]
    made = half.get(graph["name"]) or int8(blob, some)
    file = f"{graph['name']}.{precision}-tensorrt.onnx"
    (folder / file).write_bytes(made)
    graph["variants"] = [{"target": tensorrt.TARGET, "file": file, "precision": precision}]
    off |= errors(run_all(made, some[:2]), run_all(blob, some[:2]))
  write_manifest(folder, manifest)
  worst = max(off, key=lambda k: off[k])
  return {"off from float, of a deviation": off[worst], "in": worst, "MB": (folder / file).stat().st_size / 1e6}


def engine(precision: str) -> Numbers:
  """Builds and runs what graph_variant() made."""
  bundle = load_bundle(f"student-{precision}")
  out: Numbers = {}
  for graph in bundle.graphs:
    begun = time.perf_counter()
    tensorrt.build_engine(bundle, graph, Path("engines"))
    runner = tensorrt.TensorRTRunner(bundle, graph, Path("engines"))
    said = json.loads(Path(f"engines/{graph['name']}.tensorrt.json").read_text())
    x, took = sample_inputs(graph, 2), []
    for _ in range(CALLS):
      t = time.perf_counter()
      runner.run(x)
      took.append(time.perf_counter() - t)
    p50, p99 = (1e3 * float(np.percentile(took, q)) for q in (50, 99))
    out |= {"ms p50": p50, "p99": p99, "off from ONNX Runtime": said["parity"]}
    out["build s"] = time.perf_counter() - begun - sum(took)
  return out


def teacher_file(name: str) -> Path:
  return Path(name) if name else save_reference(Path("reference.onnx"))


def teacher_rows(path: Path, provider: str, precision: str | None) -> Numbers:
  """Frames a second of each batch. Raises UserError where nothing ran."""
  batches = (1, 16, 64) if torch.cuda.is_available() else (1, 2)
  rows = measure([path], provider, precision, batches, 10 if torch.cuda.is_available() else 2, None)
  ran = [r for r in rows if "skipped" not in r]
  if not ran:
    raise UserError(f"{provider}: {rows[0]['skipped']}")
  best = max(ran, key=lambda r: r["frames_per_second"])
  label = f"{provider} {precision or ''}".strip()
  kept = {"frames/s": best["frames_per_second"], "of 800": best["of_800"], "batch": best["batch"]}
  return {f"{label} {k}": v for k, v in kept.items()}


def teacher(name: str) -> Numbers:
  path, out = teacher_file(name), Numbers()
  for provider in ("onnxruntime", "torch"):
    out |= teacher_rows(path, provider, None)
  return out


def teacher_int8(name: str) -> Numbers:
  from openpilot.tools.dgx.benchmark_inference import inputs_of
  from openpilot.tools.dgx.training import runners

  path = teacher_file(name)
  values = runners.inputs_of(path)
  some = [{k: v.numpy() for k, v in inputs_of(values, 1, s).items()} for s in range(CALIBRATE)]
  made = Path("teacher-int8.onnx")
  made.write_bytes(int8(path.read_bytes(), some))
  return teacher_rows(made, "tensorrt", "float32")  # the types that its graph has


def pictures() -> Numbers:
  """Sixteen pictures of noise with rectangles, as COCO JSON with polygons."""
  from PIL import Image

  r, folder = np.random.default_rng(0), Path("pictures")
  folder.mkdir(exist_ok=True)
  images, annotations = list[Numbers](), list[Numbers]()
  for n in range(1, 17):
    picture = r.integers(0, 256, (96, 128, 3), np.uint8)
    images.append({"id": n, "file_name": f"{n}.png", "width": 128, "height": 96})
    for k in range(2):
      x, y, w, h = (int(v) for v in (r.integers(4, 60), r.integers(4, 40), r.integers(20, 60), r.integers(20, 50)))
      picture[y : y + h, x : x + w] = (255, 0, 0) if k else (0, 0, 255)
      corners = [x, y, x + w, y, x + w, y + h, x, y + h]
      row = {"id": len(annotations) + 1, "image_id": n, "category_id": k + 1, "bbox": [x, y, w, h], "area": w * h}
      annotations.append({**row, "iscrowd": 0, "segmentation": [corners]})
    Image.fromarray(picture).save(folder / f"{n}.png")
  categories = [{"id": 1, "name": "blue"}, {"id": 2, "name": "red"}]
  write_json(folder / "labels.json", {"images": images, "annotations": annotations, "categories": categories})
  return {"pictures": len(images)}


def drive() -> Numbers:
  """Two simulated drives, labeled by the simulator's truth, and as driving data."""

  def command(module: str, *words: str) -> None:
    done = subprocess.run(
      python.command("-m", module, *words), env=python.environment(), capture_output=True, text=True
    )
    if done.returncode:
      raise UserError(f"{module}: {python.why_failed(done)}")

  seeds = ("--seeds", "1:3", "--seconds", str(SECONDS), "--qcamera-only", "--workers", "1")
  command("openpilot.tools.sim.write_route", "drives", *seeds)
  segments = sorted(str(p) for p in Path("drives").iterdir())
  command(
    "openpilot.tools.fair.labels.label",
    *segments,
    "--teachers",
    "simulator",
    "--camera",
    "qcamera",
    "--output",
    "labels",
  )
  command(
    "openpilot.tools.dgx.training.dataloader", "--routes", *segments, "--camera", "qcamera", "--output", "driving"
  )
  return {"drives": len(segments), "seconds": SECONDS}


RUN: dict[str, Callable[..., Numbers]] = {
  "student float16": lambda bundle: graph_variant(bundle, "float16"),
  "student int8": lambda bundle: graph_variant(bundle, "int8"),
  "student float16 engine": lambda bundle: engine("float16"),
  "student int8 engine": lambda bundle: engine("int8"),
  "teacher": teacher,
  "teacher float16 engine": lambda name: teacher_rows(teacher_file(name), "tensorrt", "float16"),
  "teacher int8 engine": teacher_int8,
  "pictures": pictures,
  "drive": drive,
}


def main() -> None:
  name, *words = sys.argv[1:]
  write_json(Path(f"{name.replace(' ', '-')}.json"), RUN[name](*words))


if __name__ == "__main__":
  raise SystemExit(cli(main, (ValueError,))())
