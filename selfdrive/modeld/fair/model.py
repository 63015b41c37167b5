"""A bundle at work: model frame in, messages out. No process, no sockets, and no clock but the one it is given."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError
from openpilot.selfdrive.modeld.fair.frames import ModelFrame, camera_intrinsics
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.ipc import messaging
from openpilot.selfdrive.modeld.fair.publish import PUBLISH, Stamp
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

MAX_ANGLE = 0.35  # rad; beyond, a calibration is not one


def no_clock() -> float:
  return 0.0


@dataclass
class GraphStats:
  runs: int = 0
  total: float = 0.0  # s since the last fairState
  longest: float = 0.0
  count: int = 0
  valid: bool = True
  fault: str = ""


class FairModel:
  """Runs every graph of a bundle on camera frames.

  clock: seconds, e.g. time.perf_counter; None leaves all execution times at zero, so that equal inputs give equal bytes.
  Raises BundleError where a graph cannot be loaded, or wants what this runtime does not have.
  """

  def __init__(self, bundle: Bundle, clock: Callable[[], float] | None = None, threads: int = 1):
    self.bundle, self.clock = bundle, clock or no_clock
    self.runners: dict[str, OnnxRunner] = {}
    self.stats = {g["name"]: GraphStats() for g in bundle.graphs}
    for graph in bundle.graphs:
      where = f"{bundle.path}: graph '{graph['name']}'"
      for out in graph["outputs"]:
        if out.get("head", "depth") not in HEADS:
          raise BundleError(f"{where}: output '{out['name']}' wants the head '{out['head']}', this runtime has {', '.join(sorted(HEADS))}")
        if out.get("head") == "segmentation" and len(out.get("classes", [])) != out["shape"][1]:
          raise BundleError(
            f"{where}: output '{out['name']}' has {out['shape'][1]} channels and {len(out.get('classes', []))} classes; export the bundle again"
          )
      if graph.get("state") or graph.get("point_slots") or [i["name"] for i in graph["inputs"]] != ["frame"] or graph["inputs"][0].get("frames", [0]) != [0]:
        raise BundleError(f"{where}: only graphs of the single input 'frame', the newest model frame, run here so far; update selfdrive/modeld/fair")
      runner = self.runners[graph["name"]] = OnnxRunner(bundle.path / graph["file"], graph, threads)
      with contextlib.suppress(Exception):  # the first run allocates and would cost the first frame; what fails here fails there, and is reported then
        runner.run({i["name"]: np.zeros(i["shape"], i["dtype"]) for i in graph["inputs"]})
    self.warp: ModelFrame | None = None
    self.rpy: np.ndarray | None = None  # None: not calibrated, the warp takes a level and straight mounting
    self.intrinsics: np.ndarray | None = None
    self.frames = self.invalid = self.faults = 0
    self.fault = ""
    self.warp_time = self.decode_time = 0.0  # s since the last fairState
    self.last_frame_id = self.last_eof = 0

  def set_camera(
    self, width: int, height: int, stride: int, uv_offset: int, device_type: str | None = None, sensor: str | None = None, wide: bool = False
  ) -> None:
    """The layout of the NV12 buffers to come. Raises CameraError where no camera gives frames of this size."""
    self.intrinsics = camera_intrinsics(width, height, device_type, sensor, wide)
    self.warp = ModelFrame(width, height, stride, uv_offset, self.bundle.manifest["view"])
    self._calibrate()

  def set_calibration(self, rpy: np.ndarray | list[float] | None) -> bool:
    """(3,) radians, extrinsicsCalibration.rpyCalib, or None for the default mounting. True if the warp changed; nonsense is refused with False."""
    if rpy is not None:
      rpy = np.asarray(rpy, dtype=np.float64)
      if rpy.shape != (3,) or not np.isfinite(rpy).all() or np.abs(rpy).max() > MAX_ANGLE:
        return False
      if self.rpy is not None and np.abs(rpy - self.rpy).max() < 1e-4:  # 0.1 pixel of the view
        return False
    elif self.rpy is None:
      return False
    self.rpy = rpy
    self._calibrate()
    return True

  def _calibrate(self) -> None:
    if self.warp is not None and self.intrinsics is not None:
      self.warp.set_calibration(np.zeros(3) if self.rpy is None else self.rpy, self.intrinsics)

  def process(self, buf: np.ndarray, frame_id: int, timestamp_sof: int, timestamp_eof: int) -> list[tuple[str, Any]]:
    """buf: NV12 buffer, 1-D uint8, in the layout of set_camera() -> (service, message) of every graph that is due at this frame.

    A graph that fails or puts out what is not finite gives messages with valid False and a fault; the others go on.
    """
    assert self.warp is not None, "set_camera() comes first"
    t0 = self.clock()
    frame = self.warp.warp(buf)
    self.warp_time += self.clock() - t0
    messages: list[tuple[str, Any]] = []
    ok = True
    for graph in self.bundle.graphs:
      if self.frames % graph["period"]:
        continue
      stats = self.stats[graph["name"]]
      t0 = self.clock()
      try:
        outputs = self.runners[graph["name"]].run({"frame": frame[None]})
        fault = ""
      except Exception as e:  # ONNX Runtime's exceptions have no common base; one bad graph must not stop the others
        outputs, fault = None, f"graph '{graph['name']}' failed: {str(e).splitlines()[0][:160]}"
      execution_time = self.clock() - t0
      stats.runs += 1
      stats.count += 1
      stats.total += execution_time
      stats.longest = max(stats.longest, execution_time)
      t0 = self.clock()
      if outputs is not None:
        bad = [name for name, a in outputs.items() if a.dtype.kind == "f" and not np.isfinite(a.sum(dtype=np.float64)) and not np.isfinite(a).all()]
        if bad:
          fault = f"graph '{graph['name']}' put out NaN or Inf in {', '.join(bad)} at frame {frame_id}"
        messages += self._decode(graph, outputs, Stamp(frame_id, timestamp_eof, self.bundle.name, execution_time, not fault))
      stats.valid, stats.fault = not fault, fault
      if fault:
        self.report(fault)
        ok = False
      self.decode_time += self.clock() - t0
    self.frames += 1
    self.invalid += not ok
    self.last_frame_id, self.last_eof = frame_id, timestamp_eof
    return messages

  def _decode(self, graph: dict[str, Any], outputs: dict[str, np.ndarray], stamp: Stamp) -> list[tuple[str, Any]]:
    assert self.warp is not None
    messages = []
    with np.errstate(invalid="ignore", over="ignore"):
      for spec in graph["outputs"]:
        if "head" in spec:
          messages.append(PUBLISH[spec["head"]](HEADS[spec["head"]](outputs[spec["name"]], spec, self.warp.valid), stamp))
    return messages

  def report(self, fault: str) -> None:
    self.fault = fault
    self.faults += 1

  def state_message(self, status: str = "running", **more: Any) -> tuple[str, Any]:
    """("fairState", message) of what happened since the last one; `more` sets fields that only the process knows."""
    msg = messaging.new_message("fairState", valid=status == "running")
    s = msg.fairState
    n = max(1, max((g.count for g in self.stats.values()), default=0))
    s.frameId, s.timestampEof, s.bundle, s.bundleHash, s.status = self.last_frame_id, self.last_eof, self.bundle.name, self.bundle.manifest_hash, status
    s.fault, s.faultCount, s.framesProcessed, s.framesInvalid = self.fault, self.faults, self.frames, self.invalid
    s.warpTime, s.decodeTime, s.calibrated = self.warp_time / n, self.decode_time / n, self.rpy is not None
    if self.warp is not None:
      s.cameraWidth, s.cameraHeight, s.viewFilled = self.warp.width, self.warp.height, self.warp.filled
    for entry, graph in zip(s.init("graphs", len(self.bundle.graphs)), self.bundle.graphs, strict=True):
      g = self.stats[graph["name"]]
      entry.name, entry.runs, entry.period, entry.valid, entry.fault = graph["name"], g.runs, graph["period"], g.valid, g.fault
      entry.executionTime, entry.executionTimeMax = g.total / max(1, g.count), g.longest
      g.total, g.longest, g.count = 0.0, 0.0, 0
    self.warp_time = self.decode_time = 0.0
    for k, v in more.items():
      setattr(s, k, v)
    return "fairState", msg
