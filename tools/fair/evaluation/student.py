"""A bundle at work on stored model frames: graphs by ONNX Runtime or another runner, outputs decoded and objects
followed by the device's own code."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.objects import THRESHOLD
from openpilot.selfdrive.modeld.fair.plan import Plan, plan_heads, plan_inputs
from openpilot.selfdrive.modeld.fair.runners import Runner
from openpilot.selfdrive.modeld.fair.tracking import Tracker
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.detections import Objects, make_objects
from openpilot.tools.fair.evaluation.scenes import Queries, Scene
from openpilot.tools.fair.labels import rle
from openpilot.tools.lib.errors import UserError
from openpilot.tools.replay.runner import named_runner
from openpilot.tools.sim.truth import IGNORE

LOW_SCORE = 0.05  # average precision wants unsure detections too


class Student:
  """Runs one bundle. Raises BundleError where a graph cannot be run or decoded, UserError where nothing of what it puts
  out can be judged, or the name of a class is not known."""

  def __init__(self, bundle: Bundle, compared: Compared, threads: int = 1, runner: str = "onnx"):
    self.bundle, self.name, self.compared = bundle, bundle.name, compared
    self.runners: dict[str, Runner] = {}
    self.tasks: set[str] = set()
    self.scores: dict[str, float] = {}  # task -> score from which a detection counts
    self.times: dict[str, list[float]] = {"all": []}  # s
    for graph in bundle.graphs:
      self.runners[graph["name"]] = named_runner(runner, bundle, graph, threads)
      self.times[graph["name"]] = []
    self.plans: list[Plan] = []
    self.reset()
    for plan in self.plans:
      self.tasks |= plan.heads.keys() & DECODERS.keys()
      for task in ("objects", "detector", "oriented"):
        if task in plan.heads:
          self.scores[task] = float(
            plan.heads[task][HEADS[task].classes].get("parameters", {}).get("threshold", THRESHOLD)
          )
    if not self.tasks:
      raise UserError(
        f"{bundle.path} has no output that can be evaluated; outputs with the head {', '.join(DECODERS)} can"
      )

  @property
  def slots(self) -> int | None:
    """How many points it can follow."""
    return next((p.slots.mask.shape[1] for p in self.plans if p.slots is not None), None)

  def reset(self, height: float | None = None) -> None:
    """Before each segment: states and identities begin anew. height: of its camera above the road, m, where it is
    known."""
    self.plans = []
    for graph in self.bundle.graphs:
      where = f"{self.bundle.path}: graph '{graph['name']}'"
      plan = Plan(graph, plan_heads(where, graph))
      plan_inputs(where, plan, self.compared.view)
      self.plans.append(plan)
    self.tracker: Tracker | None = None
    self.ground = view_ground(self.bundle.manifest["view"], height)
    self.followed: tuple[np.ndarray, np.ndarray] | None = None

  def step(self, frame: np.ndarray, frame_id: int, valid: np.ndarray, queries: Queries | None) -> Scene:
    """frame: as stored, the next one of the segment; valid (height, width) bool. -> what the student says of it."""
    s = Scene()
    took = 0.0
    for plan in self.plans:
      name = plan.graph["name"]
      if plan.slots is not None:
        self._ask(plan, queries)
      begun = time.perf_counter()
      out = self.runners[name].run({**plan.inputs, "frame": frame[None]})
      self.times[name].append(time.perf_counter() - begun)
      took += self.times[name][-1]
      bad = [k for k, v in out.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
      if bad:  # what is no number must not drop out of the means
        raise UserError(
          f"{self.bundle.path}: graph '{name}' puts out NaN or Inf in {', '.join(bad)} at frame {frame_id}; export a "
          "checkpoint that is sound"
        )
      for state in plan.graph.get("state", []):
        np.copyto(plan.inputs[state["input"]], out[state["output"]])
      for head, specs in plan.heads.items():
        if head in DECODERS:
          raw = {part: out[spec["name"]] for part, spec in specs.items()}
          said = specs if head not in self.scores else unsure(head, specs)
          found = HEADS[head].decode(raw, said, valid, self.ground.height)
          DECODERS[head](self, found, frame_id, s)
    self.times["all"].append(took)
    return s

  def _ask(self, plan: Plan, q: Queries | None) -> None:
    """Sets points, mask and fresh; points go on from where they were found last."""
    assert plan.slots is not None
    n = 0 if q is None else len(q.used)
    plan.slots.mask[:], plan.slots.fresh[:] = 0, 0
    if q is not None:
      last = plan.slots.points[0, :n] if self.followed is None else self.followed[0][:n]
      plan.slots.points[0, :n] = np.where(q.fresh[:, None], q.xy, last)
      plan.slots.mask[0, :n], plan.slots.fresh[0, :n] = q.used, q.fresh

  def table(self, names: list[str], kind: str) -> np.ndarray:
    """(N,) of the bundle's classes: index into those that are compared, -1 none."""
    return self.compared.resolve(names, kind, str(self.bundle.path))

  def track(self, found: Any, frame_id: int) -> Objects:
    """The objects that the device would tell of and see in this frame, with its identities."""
    if self.tracker is None:
      self.tracker = Tracker(found.classes, self.compared.view)
    keep = found.scores >= self.scores["objects"]
    sure = type(found)(
      found.classes,
      found.boxes[keep],
      found.scores[keep],
      found.class_ids[keep],
      None if found.masks is None else found.masks[keep],
      None if found.embed is None else found.embed[keep],
    )
    t = self.tracker.update(frame_id, sure, self.ground)
    seen = np.isin(t.ids, self.tracker.ids[self.tracker.lost == 0])
    masks = None if t.masks is None else t.masks[t.mask_of[seen]]
    return objects_of(self, t.classes, t.boxes[seen], t.class_ids[seen], t.scores[seen], masks, t.ids[seen])


def unsure(head: str, specs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """A head's outputs, with detections down to LOW_SCORE."""
  part = HEADS[head].classes
  return {**specs, part: {**specs[part], "parameters": {**specs[part].get("parameters", {}), "threshold": LOW_SCORE}}}


def objects_of(
  student: Student,
  classes: list[str],
  boxes: np.ndarray,
  class_ids: np.ndarray,
  scores: np.ndarray,
  masks: np.ndarray | None,
  ids: np.ndarray | None = None,
) -> Objects:
  """Of the classes that are compared."""
  to_class = student.table(classes, "boxes")
  more = {} if ids is None else {"track": ids.astype(np.int64)}
  o = make_objects(boxes, to_class[class_ids], scores, map_shape=student.compared.map_shape, **more)
  if masks is not None:
    o.rle = rle.encode(masks)
  return o.take(o.cls >= 0)


def decode_depth(student: Student, found: Any, frame_id: int, s: Scene) -> None:
  s.depth, s.depth_kind = found.z, "metric" if found.metric else "scale"


def decode_classes(student: Student, found: Any, frame_id: int, s: Scene) -> None:
  table, at = np.full(256, IGNORE, np.uint8), student.table(found.classes, "maps")
  table[np.flatnonzero(at >= 0)] = at[at >= 0]
  s.classes = table[found.class_map]
  s.named = tuple(sorted({int(k) for k in at if k >= 0}))
  for k in np.flatnonzero(at < 0).tolist():
    student.compared.leave_out(student.name, found.classes[k], "map pixels", int((found.class_map == k).sum()))


def decode_lanes(student: Student, found: Any, frame_id: int, s: Scene) -> None:
  s.followed = student.followed = found.points.astype(np.float64), found.visibility > 0.5


def decode_detector(student: Student, found: Any, frame_id: int, s: Scene) -> None:
  s.detector = objects_of(student, found.classes, found.boxes, found.class_ids, found.scores, found.masks)


def decode_objects(student: Student, found: Any, frame_id: int, s: Scene) -> None:
  s.objects = objects_of(student, found.classes, found.boxes, found.class_ids, found.scores, found.masks)
  s.tracked = student.track(found, frame_id)


Decode = Callable[[Student, Any, int, Scene], None]
# head -> puts what it decoded into the scene
DECODERS: dict[str, Decode] = {
  "depth": decode_depth,
  "segmentation": decode_classes,
  "objects": decode_objects,
  "detector": decode_detector,
  "lanes": decode_lanes,
}
