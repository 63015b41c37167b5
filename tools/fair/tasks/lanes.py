"""Points of the road and its lines that are followed from frame to frame.

Batch: points (clips, T, N, 2) float32 view pixels, points_visible (clips, T, N) float32, points_known (clips, T, N)
bool, of tracks that start in the first frame; points_view (clips, 3, 3) float32, the augmentation's matrix less the
identity."""

from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.augment import IDENTITY, Augmentation, warp_points
from openpilot.tools.fair.spec import ClassSet, StudentSpec
from openpilot.tools.fair.tasks.task import Batch, Outputs, Said, Targets, Task
from openpilot.tools.fair.teacher import Label

SLOTS = 128  # tracked points of a clip
ENOUGH = 4  # points that say how fast the car drives
FILLS = dict.fromkeys(("points", "points_visible", "points_known", "points_view"), 0)  # of clips without points


def teaches(label: Label, classes: ClassSet) -> bool:
  # openpilot's lines and leads are no points of the picture that are followed
  return label.kind == "points" and label.name == "points"


def point_tracks(
  a: Augmentation, tables: list[dict[str, np.ndarray] | None], r: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Tracks that are visible in the first frame -> xy (T, SLOTS, 2), visible (T, SLOTS), known (T, SLOTS)."""
  steps = len(tables)
  width, height = a.picture.width, a.picture.height
  xy, visible, known = (
    np.zeros((steps, SLOTS, 2), np.float32),
    np.zeros((steps, SLOTS), np.float32),
    np.zeros((steps, SLOTS), bool),
  )
  first = tables[0]
  if first is None:
    return xy, visible, known
  start = warp_points(a, np.stack([first["x"], first["y"]], axis=1).astype(np.float64))
  inside = (start >= 0).all(axis=1) & (start <= [width - 1, height - 1]).all(axis=1) & first["visible"].astype(bool)
  ids = first["track"][inside]
  ids = r.permutation(ids)[:SLOTS]
  slot = {int(t): k for k, t in enumerate(ids)}
  for t, table in enumerate(tables):
    if table is None:
      continue
    at = np.array([slot.get(int(k), -1) for k in table["track"]], int)
    rows = np.flatnonzero(at >= 0)
    p = warp_points(a, np.stack([table["x"][rows], table["y"][rows]], axis=1).astype(np.float64))
    xy[t, at[rows]] = p
    there = (p >= -0.5).all(axis=1) & (p <= [width - 0.5, height - 0.5]).all(axis=1)
    visible[t, at[rows]] = table["visible"][rows].astype(bool) & there
    known[t, at[rows]] = True
  return xy, visible, known


def targets(said: Said, a: Augmentation, r: np.random.Generator) -> Targets:
  parts = *point_tracks(a, said.values, r), (a.matrix - IDENTITY).astype(np.float32)
  return {k: x[None] for k, x in zip(FILLS, parts, strict=True)}


def view_of(batch: Batch) -> Any:
  """(clips, 3, 3): the augmentation's matrix."""
  return batch["points_view"] + batch["points_view"].new_tensor(IDENTITY)


def forward(student: Any, batch: Batch) -> dict[str, Any]:
  """The tracker runs over each clip."""
  steps = batch["points"].shape[1]
  started = batch["points_known"][:, :1].float()
  return student.forward_clips(batch["frame"], batch["points"], started.expand(-1, steps, -1), view=view_of(batch))


def loss(model: Any, out: Outputs, batch: Batch) -> dict[str, Any]:
  from openpilot.tools.fair.distillation.losses import in_window, match_loss, points_loss, vote_loss
  from openpilot.tools.fair.students.lanes import STRIDES, view_to_cell
  from openpilot.tools.fair.students.plane import road_of

  if "points" not in batch or not batch["points_known"][:, 1:].any():
    return {}
  known = batch["points_known"].clone()
  known[:, 0] = False  # given, not found
  cells = [view_to_cell(batch["points"], s) for s in STRIDES]
  reached = in_window(out["lanes_looks"][0], cells[0])[1]
  parts = points_loss(
    out["lanes_points_out"], out["lanes_visible"], batch["points"], batch["points_visible"], known, reached
  )
  parts["match"] = match_loss(out["lanes_looks"], cells, batch["points_visible"], known)
  road = road_of(model.student.spec.input)
  if road is not None and out["lanes_votes"]:
    parts["speed"] = vote_loss(out["lanes_votes"], *true_speeds(road, batch))
  return parts


def true_speeds(road: Any, batch: Batch) -> tuple[Any, Any]:
  """Of each frame the car's speed in which most points came there (clips, T), and whether enough of them say so."""
  points, there = batch["points"], batch["points_known"]
  clips, steps = there.shape[:2]
  before, both = points.roll(1, 1), there & there.roll(1, 1)
  both[:, 0] = False  # roll() brings the last frame there
  speed = road.speed(
    before.flatten(0, 1), points.flatten(0, 1), both.flatten(0, 1).float(), view_of(batch).repeat_interleave(steps, 0)
  )
  return speed.reshape(clips, steps), both.sum(2) >= ENOUGH


def sketch(rgb: np.ndarray, i: int, batch: Batch, out: dict[str, np.ndarray], spec: StudentSpec) -> list[np.ndarray]:
  from openpilot.tools.fair.distillation.sketches import points_on

  if "lanes_points_out" not in out or "points" not in batch:
    return []
  c, t = divmod(i, batch["points"].shape[1])
  used = batch["points_known"][c, 0].numpy()
  true = batch["points"][c, t].numpy()[used], batch["points_visible"][c, t].numpy()[used] > 0
  return [
    points_on(rgb, out["lanes_points_out"][c, t][used], out["lanes_visible"][c, t][used] > 0),
    points_on(rgb, *true),
  ]


TASK = Task(
  name="lanes",
  head="lanes",
  wanted="a teacher of tracks: raft-tracker, or simulator on simulated routes",
  teaches=teaches,
  targets=targets,
  loss=loss,
  forward=forward,
  fills=FILLS,
  per_clip=True,
  outputs=("lanes_",),
  decode={
    "lanes_points_out": {"head": "lanes", "parameters": {"part": "points"}},
    "lanes_visible": {"head": "lanes", "parameters": {"part": "visible"}},
  },
  clip=8,
  sketch=sketch,
  metric="openpilot.tools.fair.evaluation.groups:lanes",
)
