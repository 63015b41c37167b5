#!/usr/bin/env python3
"""How long students take: of each model the network alone, and a whole picture from its pixels to what is found in it.
Models take turns, so that what else the machine does falls on all of them."""

import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.selfdrive.modeld.fair.runners import RUNNERS, file_of
from openpilot.tools.fair.images.predict import Predictor
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import write_json
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.pictures import find_pictures, read_rgb

READ = 16  # pictures that are held


@dataclass(frozen=True)
class Options:
  models: tuple[Path, ...] = option(positional=True, metavar="MODEL", help="bundles' folders")
  images: Path | None = option(None, help="a folder of pictures; else noise of the student's own size")
  rounds: int = option(100, help="pictures that each model is given")
  runner: tuple[str, ...] = option(("onnx",), nargs="+", help=f"what runs the graph: {', '.join(RUNNERS)}")
  threads: int = option(1, help="of the runner")
  score: float = option(0.3, help="from which on a detection is told")
  json: Path | None = option(None, metavar="FILE", help="write the table as JSON")


def milliseconds(times: list[float]) -> dict[str, float]:
  return {f"p{q}": round(1e3 * float(np.percentile(times, q)), 3) for q in (50, 90, 99)}


def row_of(p: Predictor, network: list[float], whole: list[float], runner: str) -> dict[str, Any]:
  file = p.path / file_of(p.graph, runner)
  return {
    "model": p.bundle.name,
    "runner": runner,
    "picture": f"{p.spec.width}x{p.spec.height}",
    "megabytes": round(file.stat().st_size / 1e6, 2),
    "network_ms": milliseconds(network),
    "whole_ms": milliseconds(whole),
    "per_second": round(1 / float(np.median(whole)), 1),
  }


def run(args: Options) -> list[dict[str, Any]]:
  if args.rounds < 1 or args.threads < 1:
    raise UserError("--rounds and --threads are at least 1")
  made = [(Predictor(m, args.score, args.threads, r), r) for m in args.models for r in args.runner]
  pictures = [read_rgb(f) for f in find_pictures(args.images)[:READ]] if args.images is not None else []
  if args.images is not None and not pictures:
    raise UserError(f"no pictures in {args.images}")
  noise = np.random.default_rng(0)
  own = [pictures or [noise.integers(0, 256, (p.spec.height, p.spec.width, 3), np.uint8)] for p, _ in made]
  times: list[tuple[list[float], list[float]]] = [([], []) for _ in made]
  turns = [islice(cycle(x), args.rounds + 1) for x in own]
  for n in range(args.rounds + 1):
    for (p, _), turn, (network, whole) in zip(made, turns, times, strict=True):
      rgb = next(turn)
      begun = time.perf_counter()
      frame = p.frame(rgb)
      ready = time.perf_counter()
      out = p.run(frame)
      done = time.perf_counter()
      p.decode(out, (rgb.shape[1], rgb.shape[0]))
      if n:  # the first one finds everything cold
        network.append(done - ready)
        whole.append(time.perf_counter() - begun)
  rows = [row_of(p, *t, r) for (p, r), t in zip(made, times, strict=True)]
  wide = max(len(r["model"]) for r in rows)
  print(f"{'model':{wide}}  runner        picture     MB   network ms p50    p99   whole ms p50    p99")
  for r in rows:
    n, w = r["network_ms"], r["whole_ms"]
    print(
      f"{r['model']:{wide}}  {r['runner']:12}  {r['picture']:>9} {r['megabytes']:>5.1f}   {n['p50']:>14.1f} "
      f"{n['p99']:>6.1f}   {w['p50']:>12.1f} {w['p99']:>6.1f}"
    )
  print(
    f"{args.rounds} pictures each, {args.threads} thread{'s' if args.threads > 1 else ''}; other programs may have run"
  )
  if args.json is not None:
    write_json(args.json, rows)
  return rows


def main() -> None:
  run(parse(Options, __doc__, "images benchmark"))


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())
