"""A bundle at work on stored model frames: graphs by ONNX Runtime, outputs decoded and objects followed by the device's
own code."""

import time
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.objects import THRESHOLD
from openpilot.selfdrive.modeld.fair.plan import VIEW, Plan, plan_heads, plan_inputs
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.selfdrive.modeld.fair.tracking import Tracker
from openpilot.tools.fair.evaluation.detections import Objects, make_objects
from openpilot.tools.fair.evaluation.scenes import Queries, Scene
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.students.classes import NAMES, OBJECTS, SEGMENTATION
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import IGNORE

TASKS = ("depth", "segmentation", "objects", "detector", "lanes")
LOW_SCORE = 0.05  # average precision wants unsure detections too


class Student:
  """Runs one bundle. Raises BundleError where a graph cannot be run or decoded, UserError where nothing of what it puts
  out can be judged."""

  def __init__(self, bundle: Bundle, threads: int = 1):
    self.bundle, self.name = bundle, bundle.name
    self.runners: dict[str, OnnxRunner] = {}
    self.tasks: set[str] = set()
    self.scores: dict[str, float] = {}  # task -> score from which a detection counts
    self.times: dict[str, list[float]] = {"all": []}  # s
    for graph in bundle.graphs:
      self.runners[graph["name"]] = OnnxRunner(bundle, graph, threads)
      self.times[graph["name"]] = []
    self.plans: list[Plan] = []
    self.reset()
    for plan in self.plans:
      self.tasks |= plan.heads.keys() & set(TASKS)
      for task in ("objects", "detector"):
        if task in plan.heads:
          self.scores[task] = float(
            plan.heads[task][HEADS[task].classes].get("parameters", {}).get("threshold", THRESHOLD)
          )
    if not self.tasks:
      raise UserError(
        f"{bundle.path} has no output that can be evaluated; outputs with the head {', '.join(TASKS)} can"
      )

  @property
  def slots(self) -> int | None:
    """How many points it can follow."""
    return next((p.slots.mask.shape[1] for p in self.plans if p.slots is not None), None)

  def reset(self) -> None:
    """Before each segment: states and identities begin anew."""
    self.plans = []
    for graph in self.bundle.graphs:
      where = f"{self.bundle.path}: graph '{graph['name']}'"
      plan = Plan(graph, plan_heads(where, graph))
      plan_inputs(where, plan)
      self.plans.append(plan)
    self.tracker: Tracker | None = None
    self.ground = view_ground(self.bundle.manifest["view"])
    self.followed: tuple[np.ndarray, np.ndarray] | None = None

  def step(self, frame: np.ndarray, frame_id: int, valid: np.ndarray, queries: Queries | None) -> Scene:
    """frame (6, 128, 256) uint8, the next one of the segment; valid (256, 512) bool. -> what the student says of it."""
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
        if head in TASKS:
          self._decode(head, specs, {part: out[spec["name"]] for part, spec in specs.items()}, valid, frame_id, s)
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

  def _decode(
    self,
    head: str,
    specs: dict[str, dict[str, Any]],
    raw: dict[str, np.ndarray],
    valid: np.ndarray,
    frame_id: int,
    s: Scene,
  ) -> None:
    if head in ("objects", "detector"):
      part = HEADS[head].classes
      specs = {
        **specs,
        part: {**specs[part], "parameters": {**specs[part].get("parameters", {}), "threshold": LOW_SCORE}},
      }
    found = HEADS[head].decode(raw, specs, valid)
    if head == "depth":
      s.depth, s.depth_kind = found.z, "metric" if found.metric else "scale"
    elif head == "segmentation":
      table = np.full(256, IGNORE, np.uint8)
      for k, name in enumerate(found.classes):
        table[k] = SEGMENTATION.index(NAMES["segmentation_names"].get(name, "background"))
      s.classes = table[found.class_map]
    elif head == "lanes":
      self.followed = found.points.astype(np.float64), found.visibility > 0.5
      s.followed = self.followed
    else:
      setattr(s, head, objects_of(found.classes, found.boxes, found.class_ids, found.scores, found.masks))
      if head == "objects":
        s.tracked = self._track(found, frame_id)

  def _track(self, found: Any, frame_id: int) -> Objects:
    """The objects that the device would tell of and see in this frame, with its identities."""
    if self.tracker is None:
      self.tracker = Tracker(found.classes, VIEW)
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
    return objects_of(t.classes, t.boxes[seen], t.class_ids[seen], t.scores[seen], masks, t.ids[seen])


def objects_of(
  classes: list[str],
  boxes: np.ndarray,
  class_ids: np.ndarray,
  scores: np.ndarray,
  masks: np.ndarray | None,
  ids: np.ndarray | None = None,
) -> Objects:
  """Of the classes that are compared."""
  names = NAMES["object_names"]
  to_class = np.array([OBJECTS.index(names[c]) if c in names else -1 for c in classes], np.int64)
  o = make_objects(boxes, to_class[class_ids], scores, **({} if ids is None else {"track": ids.astype(np.int64)}))
  if masks is not None:
    o.rle = rle.encode(masks)
  return o.take(o.cls >= 0)
