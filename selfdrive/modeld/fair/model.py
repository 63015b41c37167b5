"""A bundle at work: model frame in, messages out. No process, no sockets, and no clock but the one it is given."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from math import isfinite
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.calibration import MAX_ANGLE
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, find_camera
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.heads.depth import Depth
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.lanes import map_lines, model_lines
from openpilot.selfdrive.modeld.fair.heads.objects import Detections
from openpilot.selfdrive.modeld.fair.heads.scale import DepthScale
from openpilot.selfdrive.modeld.fair.heads.segmentation import Segmentation
from openpilot.selfdrive.modeld.fair.ipc import messaging
from openpilot.selfdrive.modeld.fair.lanes import MAX_HIDDEN, MAX_LINES, VISIBLE, LaneTracker
from openpilot.selfdrive.modeld.fair.plan import OBJECT_HEADS, VIEW, Plan, check_input, make_plan, try_heads
from openpilot.selfdrive.modeld.fair.publish import PUBLISH, Stamp, add_maps, lanes_message, objects_message, period
from openpilot.selfdrive.modeld.fair.runners import Runner, open_runner
from openpilot.selfdrive.modeld.fair.schedule import FrameSchedule, due
from openpilot.selfdrive.modeld.fair.state import GraphStats, first_line, plain
from openpilot.selfdrive.modeld.fair.tracked import merge
from openpilot.selfdrive.modeld.fair.tracking import Tracker

JUMP = 0.005  # rad; a calibration that moved further since the last reset is another one: over one pixel of a map
MAX_STEP = 5  # frames; more between two, or a number that falls, is a gap
# what happened -> the `reset` of the states that begin anew
RESETS = {"stream": ("stream", "gap", "calibration"), "gap": ("gap", "calibration"), "calibration": ("calibration",)}


def no_clock() -> float:
  return 0.0


class FairModel:
  """Runs every graph of a bundle on camera frames.

  clock: seconds, e.g. time.perf_counter; None leaves all execution times at zero, so that equal inputs give equal
  bytes.
  runner: one of runners.RUNNERS for all graphs, else what is preferred here.
  dense: masks, hidden objects, all lane points, and whole maps in fairState; fairmodeld takes it from the param
  FairLogDense, for the sake of the log's size. Raises BundleError where a graph cannot be loaded, or wants what this
  runtime does not have."""

  def __init__(
    self,
    bundle: Bundle,
    clock: Callable[[], float] | None = None,
    threads: int = 1,
    runner: str | None = None,
    dense: bool = True,
  ):
    self.dense = dense
    self.bundle, self.clock = bundle, clock or no_clock
    self.schedule = FrameSchedule(bundle.manifest)
    self.runners: dict[str, Runner] = {}
    self.plans: list[Plan] = []
    self.stats = {g["name"]: GraphStats() for g in bundle.graphs}
    classes: list[str] = []
    check_input(bundle)
    for graph in bundle.graphs:
      where = f"{bundle.path}: graph '{graph['name']}'"
      plan = make_plan(where, graph, self.plans)
      self.plans.append(plan)
      for name in OBJECT_HEADS:
        if name in plan.heads:
          classes += [c for c in plan.heads[name][HEADS[name].classes]["classes"] if c not in classes]
      opened = self.runners[graph["name"]] = open_runner(bundle, graph, runner, threads)
      outputs = None
      with contextlib.suppress(
        Exception
      ):  # the first run allocates and would cost the first frame; what fails here fails there, and is reported then
        outputs = opened.run({i["name"]: np.zeros(i["shape"], i["dtype"]) for i in graph["inputs"]})
      if outputs is not None:
        try_heads(where, plan, outputs)
    self.tracker = Tracker(classes, VIEW)
    self.warp: ModelFrame | None = None
    self.rpy: np.ndarray | None = None  # None: not calibrated, the warp takes a level and straight mounting
    self.rpy_at_reset = np.zeros(3)
    self.ground = view_ground(bundle.manifest["view"])
    self.intrinsics: np.ndarray | None = None
    self.scale = DepthScale()
    # of the car: m/s, carState.vEgo, and rad/s to the right, cameraOdometry.rot; whoever drives the model sets them
    self.speed: float | None = None
    self.yaw_rate: float | None = None
    self.newest: dict[str, Any] = {}  # service -> the newest valid map that went out since the last fairState
    self.sent: dict[str, int] = {}  # head -> frame of its last message
    self.stream: tuple[int, int, bool] | None = None  # width, height, wide
    self.frames = self.invalid = self.late = self.faults = 0
    self.fault = ""
    self.warp_time = self.decode_time = 0.0  # s since the last fairState
    self.last_frame_id = self.last_eof = 0
    # of the frame at hand
    self.depth: Depth | None = None
    self.found: dict[str, Detections] = {}
    # the newest: its lane markings are where lines begin if modelV2 has none
    self.segmentation: Segmentation | None = None

  def set_camera(
    self,
    width: int,
    height: int,
    stride: int,
    uv_offset: int,
    device_type: str | None = None,
    sensor: str | None = None,
    wide: bool = False,
  ) -> None:
    """The layout of the NV12 buffers to come. Raises CameraError where no camera gives frames of this size."""
    (intrinsics, picture), before = (
      find_camera(width, height, device_type, sensor, wide),
      (self.stream, self.intrinsics),
    )
    self.stream, self.intrinsics = (width, height, wide), intrinsics
    self.warp = ModelFrame(*picture, stride, uv_offset, self.bundle.manifest["view"])
    self._calibrate()
    if (
      before[0] != self.stream or before[1] is None or not np.array_equal(before[1], intrinsics)
    ):  # the same camera, only known by name now, goes on
      self._reset("stream")

  def set_calibration(self, rpy: np.ndarray | list[float] | None, height: float | None = None) -> bool:
    """rpy: (3,) radians, extrinsicsCalibration.rpyCalib, or None for the default mounting; height: of the camera above
    the road, m; where it is not known openpilot's, 1.22, as before the first calibration.

    True if the warp changed; nonsense is refused with False."""
    if rpy is not None:
      rpy = np.asarray(rpy, dtype=np.float64)
      if rpy.shape != (3,) or not np.isfinite(rpy).all() or np.abs(rpy).max() > MAX_ANGLE:
        return False
    self.ground = view_ground(self.bundle.manifest["view"], height)
    if rpy is not None:
      if self.rpy is not None and np.abs(rpy - self.rpy).max() < 1e-4:  # 0.1 pixel of the view
        return False
    elif self.rpy is None:
      return False
    self.rpy = rpy
    self._calibrate()
    now = np.zeros(3) if rpy is None else rpy
    if np.abs(now - self.rpy_at_reset).max() > JUMP:
      self._reset("calibration")
    return True

  def _calibrate(self) -> None:
    if self.warp is not None and self.intrinsics is not None:
      self.warp.set_calibration(np.zeros(3) if self.rpy is None else self.rpy, self.intrinsics)

  def _reset(self, event: str) -> None:
    """Begins anew what the manifest says does not outlive the event: 'stream', 'gap' or 'calibration'."""
    self.rpy_at_reset = np.zeros(3) if self.rpy is None else self.rpy
    if event == "stream":
      self.tracker.reset()
      self.scale.reset()
    for plan in self.plans:
      self._reset_plan(plan, RESETS[event])

  @staticmethod
  def _reset_plan(plan: Plan, which: tuple[str, ...]) -> None:
    states = [s for s in plan.graph.get("state", []) if s["reset"] in which]
    for state in states:
      plan.inputs[state["input"]].fill(state["initial"])
    if states and plan.slots is not None:  # a point without its template is lost
      plan.slots.reset()

  def process(
    self, buf: np.ndarray, frame_id: int, timestamp_sof: int, timestamp_eof: int, model: Any = None
  ) -> list[tuple[str, Any]]:
    """buf: NV12 buffer, 1-D uint8, in the layout of set_camera(); model: this frame's modelV2 reader if there is one ->
    (service, message) of all that is due.

    A graph that fails or puts out what is not finite gives messages with valid False and a fault; the others go on. One
    that the frame's budget has no room for is put off to the next frame and counted. Raises ValueError on a buffer that
    is too short."""
    assert self.warp is not None, "set_camera() comes first"
    begun = self.clock()
    frame = self.warp.warp(buf)
    self.warp_time += self.clock() - begun
    messages: list[tuple[str, Any]] = []
    ok, late = True, False
    self.depth, self.found = None, {}
    self.scale.drive(timestamp_eof, self.speed)
    objects: list[Stamp] = []  # of the graphs that have objects
    turn = [p for p in self.plans if p.owed or due(self.frames, p.graph)]
    for n, plan in enumerate(sorted(turn, key=lambda p: not p.owed)):
      stats = self.stats[plan.graph["name"]]
      plan.owed = n > 0 and self.clock() - begun + stats.usual > self.schedule.budget
      if plan.owed:
        late = True
        stats.late += 1
        continue
      sent, stamp = self._run(plan, stats, frame, frame_id, timestamp_eof, model)
      messages += sent
      if any(name in plan.heads for name in OBJECT_HEADS):
        objects.append(stamp)
      ok &= stamp.valid
    if objects:
      t0 = self.clock()
      messages += self._track(objects)
      self.decode_time += self.clock() - t0
    self.frames += 1
    self.invalid += not ok
    self.late += late or self.clock() - begun > self.schedule.budget
    self.last_frame_id, self.last_eof = frame_id, timestamp_eof
    return messages

  def _run(
    self, plan: Plan, stats: GraphStats, frame: np.ndarray, frame_id: int, timestamp_eof: int, model: Any
  ) -> tuple[list[tuple[str, Any]], Stamp]:
    """One graph on one model frame -> its messages, and what they are stamped with."""
    graph = plan.graph
    begun = self.clock()
    step = self._advance(plan, frame_id)
    if plan.slots is not None:
      self._seed(plan.slots, model)
    plan.inputs["frame"] = frame[None]
    t0 = self.clock()
    try:
      outputs = self.runners[graph["name"]].run(plan.inputs)
      fault = ""
    except Exception as e:  # runners' exceptions have no common base; one bad graph must not stop the others
      outputs, fault = None, f"graph '{graph['name']}' failed: {first_line(e)}"
    execution_time = self.clock() - t0
    stats.ran(execution_time)
    t0 = self.clock()
    messages: list[tuple[str, Any]] = []
    if outputs is not None:
      # a sum of squares is finite only if all is, and takes a fraction of the time; one that overflows is looked at
      # closely
      bad = [
        name
        for name, a in outputs.items()
        if a.dtype.kind == "f" and not isfinite(np.vdot(a, a)) and not np.isfinite(a).all()
      ]
      if bad:
        fault = f"graph '{graph['name']}' put out NaN or Inf in {', '.join(bad)} at frame {frame_id}"
        self._reset_plan(plan, ("never", "stream", "gap", "calibration"))  # or it would come back every frame
      else:
        for state in graph.get("state", []):
          np.copyto(plan.inputs[state["input"]], outputs[state["output"]])
    stamp = Stamp(frame_id, timestamp_eof, self.bundle.name, execution_time, not fault)
    if outputs is not None:
      try:
        messages = self._decode(plan, outputs, stamp, step)
      except Exception as e:  # finite numbers of which a head makes nothing: its graph's frame is lost, no more
        fault = f"outputs of graph '{graph['name']}' cannot be decoded at frame {frame_id}: {first_line(e)}"
        stamp = replace(stamp, valid=False)
    plan.runs += 1
    stats.valid, stats.fault = not fault, fault
    if fault:
      self.report(fault)
    now = self.clock()
    self.decode_time += now - t0
    stats.took(now - begun)
    return messages, stamp

  def _advance(self, plan: Plan, frame_id: int) -> int:
    """Frames since the graph's last one; what a gap ends is ended."""
    step = 1 if plan.last_frame is None else frame_id - plan.last_frame
    plan.last_frame = frame_id
    if not 0 <= step <= MAX_STEP * plan.graph["period"] * self.schedule.step:
      self._reset_plan(plan, RESETS["gap"])
      if plan.slots is not None and not 0 <= step <= MAX_HIDDEN:
        plan.slots.reset()
    return max(1, step)

  def _seed(self, slots: LaneTracker, model: Any) -> None:
    """Free slots begin on modelV2's lane lines; without modelV2, on the lane markings of the newest segmentation."""
    assert self.warp is not None
    seeds: list[np.ndarray] = []
    if slots.wants_seeds():
      if model is not None:
        try:
          seeds = model_lines(model, self.ground)
        except Exception as e:  # a message is read when its fields are; what is in it is not ours
          self.report(f"lane lines of modelV2 cannot be read: {first_line(e)}")
      elif self.segmentation is not None and (markings := self.segmentation.role("marking")):
        seeds = map_lines(self.segmentation.class_map, markings, self.ground, MAX_LINES)
    slots.seed(seeds, self.ground, self.warp.valid)

  def _decode(self, plan: Plan, outputs: dict[str, np.ndarray], stamp: Stamp, step: int) -> list[tuple[str, Any]]:
    """Messages of the heads that need no other graph; detections are kept for _track(). What is not valid is told but
    not remembered."""
    assert self.warp is not None
    messages = []
    with np.errstate(invalid="ignore", over="ignore"):
      for name, specs in plan.heads.items():
        if name in plan.rare and not all(due(plan.runs, spec) for spec in specs.values()):
          continue
        if name not in (*PUBLISH, *OBJECT_HEADS, "lanes"):  # there is no message of it
          continue
        if not stamp.valid and name not in PUBLISH:
          if name == "lanes":
            messages.append(lanes_message([], stamp, self.dense))
          continue
        value = HEADS[name].decode(
          {part: outputs[spec["name"]] for part, spec in specs.items()}, specs, self.warp.valid, self.ground.height
        )
        if name in OBJECT_HEADS:
          self.found[name] = value
        elif name == "lanes":
          assert plan.slots is not None
          lines = plan.slots.update(value, self.ground, step, self.depth)
          if self.scale.listens:
            sure = (plan.slots.mask[0] > 0) & (value.visibility >= VISIBLE)
            self.scale.points(plan.slots.points[0], sure, plan.slots.fresh[0] > 0, self.ground)
          messages.append(lanes_message(lines, stamp, self.dense))
        else:
          if name == "depth" and stamp.valid:
            self.depth = value = self.scale.meters(value, self.ground, self.segmentation)
          elif name == "segmentation" and stamp.valid:
            self.segmentation = value
          if self._due(name, stamp) and (message := PUBLISH[name](value, stamp)) is not None:
            messages.append(message)
            if stamp.valid and name in ("depth", "segmentation"):
              self.newest[message[0]] = message[1]
    return messages

  def _due(self, name: str, stamp: Stamp) -> bool:
    """Whether a map goes out with this frame: at the rate of its service, and whenever it is not valid."""
    if stamp.valid and 0 <= stamp.frame_id - self.sent.get(name, -1_000_000) < period(f"fair{name.capitalize()}"):
      return False
    self.sent[name] = stamp.frame_id
    return True

  def _track(self, stamps: list[Stamp]) -> list[tuple[str, Any]]:
    """One fairObjects of all that was found in this frame; valid while any of the graphs that find objects is. None
    where no head had its turn."""
    first = stamps[0]
    found = [self.found[name] for name in OBJECT_HEADS if name in self.found]
    if not found and all(s.valid for s in stamps):
      return []
    stamp = Stamp(first.frame_id, first.timestamp_eof, first.bundle, sum(s.execution_time for s in stamps), bool(found))
    if found:
      try:
        return [
          objects_message(
            self.tracker.update(
              first.frame_id, merge(found, self.tracker.classes), self.ground, self.depth, self.speed, self.yaw_rate
            ),
            stamp,
            self.dense,
          )
        ]
      except Exception as e:
        self.report(f"objects cannot be tracked at frame {first.frame_id}: {first_line(e)}")
        self.tracker.reset()
        stamp = replace(stamp, valid=False)
    return [objects_message(None, stamp)]

  def report(self, fault: str) -> None:
    self.fault = plain(fault)
    self.faults += 1

  def follow(self, other: "FairModel") -> None:
    """Takes the place of another bundle in mid-run: calibration, counts and faults go on, ids are not used twice;
    identities and states begin anew."""
    self.rpy, self.rpy_at_reset = other.rpy, other.rpy_at_reset
    self.ground = view_ground(self.bundle.manifest["view"], other.ground.height)
    self.frames, self.invalid, self.late, self.faults, self.fault = (
      other.frames,
      other.invalid,
      other.late,
      other.faults,
      other.fault,
    )
    self.tracker.next_id = other.tracker.next_id
    lines = max((p.slots.next_id for p in other.plans if p.slots is not None), default=1)
    for plan in self.plans:
      if plan.slots is not None:
        plan.slots.next_id = lines
    self.schedule.follow(other.schedule)

  def state_message(self, status: str = "running", **more: Any) -> tuple[str, Any]:
    """("fairState", message) of what happened since the last one; `more` sets fields that only the process knows."""
    msg = messaging.new_message("fairState", valid=status == "running")
    s = msg.fairState
    n = max(1, max((g.count for g in self.stats.values()), default=0))
    s.frameId, s.timestampEof, s.bundle, s.bundleHash, s.status = (
      self.last_frame_id,
      self.last_eof,
      self.bundle.name,
      self.bundle.manifest_hash,
      status,
    )
    s.fault, s.faultCount, s.framesProcessed, s.framesInvalid = self.fault, self.faults, self.frames, self.invalid
    s.framesLate, s.rate, s.budget = self.late, self.schedule.rate_now, self.schedule.budget
    s.warpTime, s.decodeTime, s.calibrated = self.warp_time / n, self.decode_time / n, self.rpy is not None
    if self.warp is not None:
      s.cameraWidth, s.cameraHeight, s.viewFilled = self.warp.width, self.warp.height, self.warp.filled
    for entry, graph in zip(s.init("graphs", len(self.bundle.graphs)), self.bundle.graphs, strict=True):
      self.stats[graph["name"]].tell(entry, graph)
    add_maps(s, self.newest, self.dense)
    self.newest = {}
    self.warp_time = self.decode_time = 0.0
    for k, v in more.items():
      setattr(s, k, v)
    return "fairState", msg
