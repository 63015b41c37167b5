#!/usr/bin/env python3
"""Puts a relative teacher's depth to meters, frame by frame: least squares of scale and shift in inverse depth against
what another teacher of the same store is sure of, as route-depth. They go into the store as a teacher of its own.

A frame in which too little is sure, or all of it about equally far, or that the fit does not explain, teaches nothing:
it is 0. How many those are is said."""

from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.fair.labels.derived import derived_group, labeled_by_all, to_derive
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.maps import inverse_of
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse

LEAST = 200  # cells that are sure
RANGE = 2.0  # times as far are the farthest of them (but for a twentieth) as the nearest
OWN_STD = 0.05  # of inverse depth, as a share: what the relative teacher itself errs by, beside the other's error
OFF = 0.15  # median error of inverse depth, as a share: more, and scale and shift do not explain the frame
STEPS = 8  # of reweighting (Cauchy): what the two hold for two things is outvoted


@dataclass
class Fit:
  """inverse depth 1/m = scale x + shift; off: median error of it, as a share."""

  scale: float
  shift: float
  off: float


@dataclass
class Report:
  """why: reason -> frames that teach nothing."""

  fits: list[Fit] = field(default_factory=list)
  why: dict[str, int] = field(default_factory=dict)

  def leave_out(self, reason: str) -> None:
    self.why[reason] = self.why.get(reason, 0) + 1

  def lines(self) -> list[str]:
    n = len(self.fits) + sum(self.why.values())
    out = [f"{len(self.fits)} of {n} frames are in meters"]
    if self.fits:
      scale, off = (np.array([getattr(f, k) for f in self.fits]) for k in ("scale", "off"))
      low, middle, high = np.percentile(scale, [10, 50, 90])
      out.append(
        f"scale {middle:.4g} (10 to 90%: {low:.4g} to {high:.4g}); off by {np.median(off):.1%} of inverse depth"
      )
    return out + [f"{k} frames: {reason}" for reason, k in sorted(self.why.items())]


def fit(x: np.ndarray, rho: np.ndarray, std: np.ndarray) -> Fit | str:
  """x (N,) relative inverse depth, larger is nearer; rho (N,) 1/m of the same cells and its standard deviation (N,) ->
  scale and shift, or why there are none."""
  if len(x) < LEAST:
    return f"fewer than {LEAST} cells are sure"
  near, far = np.percentile(rho, [97.5, 2.5])
  if near < RANGE * far:
    return f"all that is sure is about as far: no {RANGE:g} times between"
  var = std**2 + (OWN_STD * rho) ** 2
  weight = 1 / var
  scale = shift = 0.0
  for _ in range(STEPS):
    mx, mr = np.average(x, weights=weight), np.average(rho, weights=weight)
    spread = float((weight * (x - mx) ** 2).sum())
    if spread <= 0:
      return "the relative teacher says the same everywhere"
    scale = float((weight * (x - mx) * (rho - mr)).sum()) / spread
    shift = float(mr - scale * mx)
    weight = 1 / (var + (scale * x + shift - rho) ** 2)
  off = float(np.median(np.abs(scale * x + shift - rho) / rho))
  if scale <= 0:
    return "what is nearer by one is farther by the other"
  return Fit(scale, shift, off) if off <= OFF else f"scale and shift do not explain it to {OFF:.0%}"


def refit(
  relative: np.ndarray, depth: np.ndarray, share: np.ndarray | None, far: float
) -> tuple[np.ndarray, Fit | str]:
  """relative (h, w); depth (h', w') m, 0 unknown, inf the sky; share (h', w') its standard deviation, a tenth where
  None -> (h, w) float32 m, 0 where it is not known or farther than `far`; and the fit."""
  relative = relative.astype(np.float32).reshape(relative.shape[-2:])
  rho, known = inverse_of(depth, "m")
  known = (known > 0) & (rho > 0)
  there = cv2.resize(relative, rho.shape[::-1], interpolation=cv2.INTER_LINEAR)
  known &= np.isfinite(there)
  std = rho * (0.1 if share is None else share.astype(np.float32).reshape(rho.shape))
  found = fit(there[known].astype(np.float64), rho[known].astype(np.float64), std[known].astype(np.float64))
  if isinstance(found, str):
    return np.zeros_like(relative), found
  inverse = found.scale * relative + found.shift
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.where(inverse > 1 / far, 1 / inverse, 0).astype(np.float32), found


def write_segment(
  store: LabelStore, frames: Group, relative: Group, sure: Group, name: str, far: float, report: Report
) -> Group:
  """Nothing is done twice."""
  label, by = label_of(relative, "relative"), label_of(sure, "m")
  share = next((x.name for x in sure.labels if x.unit == "std"), None)
  settings = {"relative": relative.teacher, "by": sure.teacher, "far": far, "rule": [LEAST, RANGE, OWN_STD, OFF, STEPS]}
  shape = label.shape[-2:]
  stored = Label("depth", "dense", "float16", shape, "m")
  group, reader = derived_group(store, frames, name, [relative, sure], [stored], settings), Reader()
  for k, chunk in to_derive(group, [relative, sure]):
    maps = np.zeros((len(chunk), *shape), np.float16)
    for n, rows in enumerate(chunk):
      std = None if share is None else reader.dense(sure, share, [rows[sure.teacher]])[0]
      x, z = (reader.dense(g, a, [rows[g.teacher]])[0] for g, a in ((relative, label.name), (sure, by.name)))
      maps[n], found = refit(x, z, std, far)
      if isinstance(found, str):
        report.leave_out(found)
      else:
        report.fits.append(found)
    group.write_chunk(k, {"depth": maps})
  return group


def label_of(group: Group, unit: str) -> Label:
  for x in group.labels:
    if x.kind == "dense" and x.unit == unit:
      return x
  raise UserError(f"{group.path}: teacher '{group.teacher}' has no depth of unit '{unit}'")


@dataclass(frozen=True)
class Options:
  labels: Path = option(positional=True, help="the label store, into which the meters go too")
  relative: str = option("depth-anything-v2-small", help="teacher of relative depth")
  by: str = option("route-depth", help="teacher of depth in meters, where it is sure")
  name: str = option("", help="of the teacher that they are together; default: RELATIVE-meters")
  far: float = option(80.0, help="m, beyond which nothing is told")


def main() -> None:
  args = parse(Options, __doc__, "meters")
  if not args.far > 0:
    raise UserError(f"--far {args.far:g}: it is above 0")
  store, report, groups = LabelStore(args.labels, writes=True), Report(), []
  name, wanted = args.name or f"{args.relative}-meters", [args.relative, args.by]
  for there in labeled_by_all(store, wanted, name):
    groups.append(write_segment(store, there["frames"], there[args.relative], there[args.by], name, args.far, report))
  if not groups:
    raise UserError(f"{store.place} has no segment that both {' and '.join(wanted)} have labeled")
  print(f"{name}: {len(groups)} segments, {sum(g.row_count for g in groups)} frames; new: {'; '.join(report.lines())}")


if __name__ == "__main__":
  raise SystemExit(cli(main)())
