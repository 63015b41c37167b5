"""Lane lines on simulated frames that are really glared and blanked; the bundle looks at them: a class map by contrast,
points that follow a bright ridge."""

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from fair_bundle import CLASSES, SLOTS, save, write_graphs
from openpilot.cereal.visionipc import nv12_info
from openpilot.selfdrive.modeld.fair.lanes import MAX_HIDDEN, SEED_PERIOD
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Route
from openpilot.tools.replay.source import fill_nv12, frames
from openpilot.tools.sim.write_route import write_route

REACH, ARM = 6, 6  # view pixels that a point may move in a frame; from a ridge to its sides
CONTRAST = 25.0  # of luma, from where on a ridge is one


def contrast_graph(folder: Path) -> dict:
  """Class 'lane' where a map pixel is brighter than what lies three of them to its sides, background elsewhere."""
  kernel = np.zeros((1, 1, 1, 7), np.float32)
  kernel[0, 0, 0, [0, 3, 6]] = -0.5, 1, -0.5
  nodes = [
    helper.make_node("Slice", ["x", "from0", "to1", "channel"], ["luma"]),
    helper.make_node("AveragePool", ["luma"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
    helper.make_node("Conv", ["pooled", "kernel"], ["ridge"], pads=[0, 3, 0, 3]),
    helper.make_node("Sub", ["ridge", "least"], ["lane"]),
    helper.make_node("Mul", ["lane", "zero"], ["none"]),
    helper.make_node("Sub", ["none", "ten"], ["never"]),
    helper.make_node("Concat", ["none", "never", "lane", "never", "never"], ["segmentation"], axis=1),
  ]
  entry = save(
    folder,
    "contrast",
    nodes,
    [],
    [("segmentation", [1, 5, 64, 128])],
    {
      "from0": np.zeros(1, np.int64),
      "to1": np.ones(1, np.int64),
      "channel": np.ones(1, np.int64),
      "kernel": kernel,
      "least": np.array([CONTRAST], np.float32),
      "ten": np.array([10], np.float32),
    },
  )
  entry["outputs"][0].update(head="segmentation", parameters={}, classes=CLASSES)
  return entry


def ridge_graph(folder: Path) -> dict:
  """Each point moves to the brightest ridge within REACH to its sides; it is visible where there is one."""
  n, reach = SLOTS, REACH + ARM
  offsets = np.arange(-reach, reach + 1, dtype=np.float32)
  sides = np.stack([offsets, 0 * offsets], axis=1)[None, None]  # (1, 1, K, 2)
  nodes = [
    helper.make_node("Slice", ["x", "from0", "to1", "channel"], ["luma"]),
    helper.make_node("Unsqueeze", ["lanes_points", "axis2"], ["middle"]),
    helper.make_node("Add", ["middle", "sides"], ["looked"]),  # (1, N, K, 2) view pixels
    helper.make_node("Mul", ["looked", "to_grid"], ["scaled"]),
    helper.make_node("Add", ["scaled", "grid_start"], ["grid"]),
    helper.make_node("GridSample", ["luma", "grid"], ["row4"], mode="bilinear", padding_mode="border", align_corners=0),
    helper.make_node("Squeeze", ["row4", "axis1"], ["row"]),  # (1, N, K)
    helper.make_node("Slice", ["row", "arm", "arm_end", "axis2"], ["center"]),
    helper.make_node("Slice", ["row", "from0", "left_end", "axis2"], ["left"]),
    helper.make_node("Slice", ["row", "arm2", "end", "axis2"], ["right"]),
    helper.make_node("Max", ["left", "right"], ["beside"]),
    helper.make_node("Sub", ["center", "beside"], ["ridge"]),
    helper.make_node("Softmax", ["ridge"], ["weight"], axis=2),
    helper.make_node("Mul", ["weight", "steps"], ["weighted"]),
    helper.make_node("ReduceSum", ["weighted", "axis2"], ["shift"], keepdims=1),
    helper.make_node("ReduceMax", ["ridge"], ["height"], axes=[2], keepdims=0),
    helper.make_node("Sub", ["height", "least"], ["over"]),
    helper.make_node("Mul", ["over", "gain"], ["lanes_visible"]),
    helper.make_node("Greater", ["height", "least"], ["there"]),
    helper.make_node("Cast", ["there"], ["there_f"], to=1),
    helper.make_node("Unsqueeze", ["there_f", "axis2"], ["there3"]),
    helper.make_node("Mul", ["shift", "there3"], ["move"]),  # blind, a point stays
    helper.make_node("Mul", ["move", "sideways"], ["way"]),
    helper.make_node("Add", ["lanes_points", "way"], ["lanes_points_out"]),
  ]
  i64 = lambda *v: np.array(v, np.int64)  # noqa: E731
  entry = save(
    folder,
    "ridge",
    nodes,
    [("lanes_points", [1, n, 2]), ("lanes_mask", [1, n]), ("lanes_fresh", [1, n])],
    [("lanes_points_out", [1, n, 2]), ("lanes_visible", [1, n])],
    {
      "from0": i64(0),
      "to1": i64(1),
      "channel": i64(1),
      "axis1": i64(1),
      "axis2": i64(2),
      "sides": sides,
      "to_grid": np.array([1 / 256, 1 / 128], np.float32),
      "grid_start": np.array([1 / 256 - 1, 1 / 128 - 1], np.float32),
      "arm": i64(ARM),
      "arm_end": i64(ARM + 2 * REACH + 1),
      "left_end": i64(2 * REACH + 1),
      "arm2": i64(2 * ARM),
      "end": i64(2 * reach + 1),
      "steps": np.arange(-REACH, REACH + 1, dtype=np.float32),
      "least": np.array([CONTRAST / 2], np.float32),
      "gain": np.array([0.3], np.float32),
      "sideways": np.array([1, 0], np.float32),
    },
  )
  entry["point_slots"] = {"count": n, "mask": "lanes_mask"}
  entry["outputs"][0].update(head="lanes", parameters={"part": "points"})
  entry["outputs"][1].update(head="lanes", parameters={"part": "visible"})
  return entry


class Drive:
  """A simulated drive through a bundle without modelV2, each frame as it is or changed."""

  def __init__(self, folder: Path, seconds: float):
    route = write_route(folder / "route", seed=21, seconds=seconds, qcamera_only=True)
    segments = Route(route).segments
    bundle = folder / "bundle"
    bundle.mkdir()
    self.model = FairModel(write_graphs(bundle, [contrast_graph(bundle), ridge_graph(bundle)]))
    self.frames = frames(segments, "qcamera")
    events = list(LogReader([segments[0].rlog], services=["modelV2", "extrinsicsCalibration"]))
    calibration = next(e.extrinsicsCalibration for e in events if e.which() == "extrinsicsCalibration")
    self.truth = {e.modelV2.frameId: e.modelV2 for e in events if e.which() == "modelV2"}
    self.model.set_calibration(list(calibration.rpyCalib), calibration.height[0])
    self.layout: tuple[int, int] | None = None
    self.frame_id = 0

  def step(self, glare=None):
    """The next frame -> lines; glare: fills the luma of the frame with so much, and the chroma with gray."""
    entry, frame = next(self.frames)
    return self.run(entry.frame_id, frame, glare)

  def run(self, frame_id, frame, glare):
    self.last = frame
    h, w = frame.shape[0] * 2 // 3, frame.shape[1]
    stride, y_height, _, size = nv12_info(w, h)
    if self.layout != (w, h):
      self.model.set_camera(w, h, stride, stride * y_height)
      self.layout = (w, h)
    frame = frame.copy()
    if glare is not None:
      frame[:h], frame[h:] = glare, 128
    self.frame_id = frame_id
    sent = dict(
      self.model.process(
        fill_nv12(frame, np.zeros(size, np.uint8), stride, stride * y_height), frame_id, 0, frame_id * 50_000_000
      )
    )
    assert sent["fairLanes"].valid and not self.model.faults, self.model.fault
    return sent["fairLanes"].fairLanes.lines

  def own(self, lines):
    """The lines that lie on one of the road's own, within 0.35 m at 12 m: line id -> line."""
    model = self.truth[self.frame_id]
    at = [
      float(np.interp(12.0, list(e.x), list(e.y)))
      for e, p in zip(model.laneLines, model.laneLineProbs, strict=True)
      if p > 0.3
    ]
    return {e.lineId: e for e in lines if any(abs(np.polyval(list(e.fit)[::-1], 12.0) - y) < 0.35 for y in at)}


def visible(line):
  return sum(v >= 0.5 for v in line.visibility)


@pytest.mark.slow
def test_lines_survive_glare_and_come_back_after_the_dark(tmp_path):
  drive = Drive(tmp_path, 3.0)
  for _ in range(15):
    lines = drive.step()
  before = drive.own(lines)
  assert len(before) >= 2 and all(visible(e) > 5 for e in before.values())
  sure = {k: e.prob for k, e in before.items()}
  # the sun in the lens for 0.75 s: nothing to see, and the lines stay
  for _ in range(15):
    lines = drive.step(glare=235)
    assert before.keys() <= {e.lineId for e in lines} and not any(visible(e) for e in lines)
  assert all(e.prob < 0.05 < sure[e.lineId] for e in lines if e.lineId in sure)
  for _ in range(8):
    lines = drive.step()
  after = drive.own(lines)
  assert before.keys() <= after.keys() and all(visible(after[k]) > 5 and after[k].prob > 0.5 * sure[k] for k in before)
  # black for over two seconds: they end, none is made up, and what begins then is new
  for _ in range(MAX_HIDDEN + 2):
    lines = drive.run(drive.frame_id + 1, drive.last, glare=16)
  assert not len(lines)
  used = drive.model.plans[1].slots.next_id
  id_offset = drive.frame_id
  for n in range(2 * SEED_PERIOD):
    entry, frame = next(drive.frames)
    drive.truth[id_offset + n + 1] = drive.truth[entry.frame_id]
    lines = drive.run(id_offset + n + 1, frame, None)
  again = drive.own(lines)
  assert (
    len(again) >= 2 and min(again) >= used and all(visible(e) >= 4 for e in again.values())
  )  # a dashed line shows few
