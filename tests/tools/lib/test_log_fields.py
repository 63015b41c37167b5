"""What openpilot wrote at other places in other years: values of real logs of 0.8, 0.9 and 0.10, and of messages as
each version wrote them."""

import numpy as np
import pytest

from openpilot.cereal import messaging
from openpilot.tools.dgx.training.dataloader import columns_of
from openpilot.tools.dgx.training.drive_log import motion_of, pulses, read_log
from openpilot.tools.fair.labels.views import segment_view
from openpilot.tools.lib import log_fields
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.logwriter import write_log
from openpilot.tools.lib.route import Route

OLD, DEMO, NEW = (
  "2021-02-27--13-45-18--24",
  "2023-07-27--13-01-19--0",
  "0000002c--d68dde99ca--1",
)  # 0.8.2, 0.9.4, 0.10.2


def segment_of(shared_data, name):
  return next(s for s in Route(shared_data / "realdata" / name.rpartition("--")[0]).segments if s.name == name)


def rewritten(segment, folder, change):
  """The segment with a log of what change(event's builder) keeps of what is needed to join its qcamera."""
  folder = folder / segment.name
  folder.mkdir()
  services = [
    "driverMonitoringStateDEPRECATED",
    "carState",
    "extrinsicsCalibration",
    "narrowRoadEncodeIdx",
    "qNarrowRoadEncodeIdx",
  ]
  events = [e.as_builder() for e in LogReader([segment.log_path], services=services)]
  write_log(folder / "qlog.zst", [b.to_bytes() for b in events if change(b)])
  (folder / "qcamera.ts").symlink_to(segment.qcamera)
  return Route(str(folder.parent)).segments[0]


@pytest.mark.parametrize(
  ("name", "status"), [(OLD, {"calibrated"}), (DEMO, {"uncalibrated", "calibrated"}), (NEW, {"calibrated"})]
)
def test_calibration_status_of_each_age(shared_data, name, status):
  path = segment_of(shared_data, name).log_path
  assert {
    log_fields.calibration_status(e.extrinsicsCalibration)
    for e in LogReader([path], services=["extrinsicsCalibration"])
  } == status


def test_lane_changes_of_0_9(shared_data):
  """modelV2 is in this log too, with a lane-change state that is always off: that field was not written yet."""
  log = read_log(segment_of(shared_data, DEMO))
  rows, source = log.desires()
  assert source == "lateralPlanDEPRECATED.desire" and "modelV2" in log.desire
  t = np.arange(rows[0, 0], rows[-1, 0], 0.05)
  found = [(round(t[i], 1), int(k)) for i, k in np.argwhere(pulses(t, rows))]
  assert [k for _, k in found] == [3, 4] and np.abs(np.array([x for x, _ in found]) - (73.66, 86.16)).max() < 0.11


def test_lane_changes_of_0_8_and_0_10(shared_data):
  for name, source in (
    (OLD, "modelV2.meta.laneChangeState"),
    (NEW, "drivingModelData.meta.laneChangeState"),
  ):  # none in either
    rows, said = read_log(segment_of(shared_data, name)).desires()
    assert said == source and len(rows) >= 120 and not rows[:, 1].any()


def test_lane_change_states_to_desires():
  def event(service, state, side, desire="none"):
    msg = messaging.new_message(service)
    m = getattr(msg, service)
    if service == "lateralPlanDEPRECATED":
      m.desire = desire
    m = m if service == "lateralPlanDEPRECATED" else m.meta
    m.laneChangeState, m.laneChangeDirection = state, side
    return msg.as_reader()

  for service in log_fields.DESIRES:
    states = [
      ("off", "none"),
      ("preLaneChange", "left"),
      ("laneChangeStarting", "left"),
      ("laneChangeFinishing", "right"),
    ]
    assert [log_fields.desire(event(service, *s)) for s in states] == [0, 0, 3, 4]
  assert log_fields.desire(event("lateralPlanDEPRECATED", "off", "none", "keepRight")) == 6
  assert log_fields.desire(messaging.new_message("carState").as_reader()) is None
  assert (
    log_fields.speaking({"modelV2": [(0, 0)] * 9, "lateralPlanDEPRECATED": [(0, 0), (1, 3)]}) == "lateralPlanDEPRECATED"
  )
  assert (
    log_fields.speaking({"drivingModelData": [(0, 0)], "lateralPlanDEPRECATED": [(0, 0)]}) == "drivingModelData"
    and log_fields.speaking({}) is None
  )


def test_the_side_of_traffic(shared_data):
  for name in (OLD, DEMO, NEW):
    assert read_log(segment_of(shared_data, name)).left_hand is False
  for service in log_fields.TRAFFIC_SIDE:
    for side in (True, False):
      msg = messaging.new_message(service)
      getattr(msg, service).isRHD = side
      assert log_fields.left_hand(msg.as_reader()) is side
  assert log_fields.left_hand(messaging.new_message("carState").as_reader()) is None


def test_a_left_hand_drive_of_before_august_2026(shared_data, tmp_path):
  """The demo route as if the driver sat on the right: only the old message says so."""

  def change(b):
    if b.which() == "driverMonitoringStateDEPRECATED":
      b.driverMonitoringStateDEPRECATED.isRHD = True
    return True

  segment = rewritten(segment_of(shared_data, DEMO), tmp_path, change)
  log = read_log(segment)
  assert log.left_hand is True
  options = {"fps": 20, "min_speed": 0.0, "engaged": False, "gps_box": None, "traffic": "log"}
  _, facts = columns_of(segment_view(segment, "qcamera"), log, [log], options)
  assert facts["traffic_convention"] == [0.0, 1.0] and facts["sources"]["traffic"] == "isRHD of driverMonitoringState"


@pytest.mark.parametrize(
  ("name", "source", "fixes"),
  [(OLD, "gpsLocationExternal", 77), (DEMO, "gpsLocationExternal", 20), (NEW, "gpsLocation", 60)],
)
def test_gps_fixes(shared_data, name, source, fixes):
  log = read_log(segment_of(shared_data, name))
  assert {k: len(v) for k, v in log.gps.items()} == {source: fixes}


def test_motion_before_0_9_7(shared_data):
  """liveLocationKalman; the wheels, a sensor that it does not use alone, agree with its speed."""
  log = read_log(segment_of(shared_data, DEMO))
  motion, source, hertz = motion_of([log], np.zeros(3))
  assert source == "liveLocationKalmanDEPRECATED" and 3.5 < hertz < 4.5 and len(motion) > 200
  car = np.array(log.car)
  speed = np.interp(motion[:, 0], car[:, 0], car[:, 1])
  assert np.median(np.abs(np.linalg.norm(motion[:, 1:4], axis=1) - speed)) < 0.3 and speed.max() > 20


def test_a_mounting_is_taken_in_every_state(shared_data, tmp_path):
  """The demo route calibrates while it drives: its last calibrated one holds. Of its beginning alone, the newest of
  what calibrationd had so far."""
  demo = segment_of(shared_data, DEMO)
  events = [e.extrinsicsCalibration for e in LogReader([demo.log_path], services=["extrinsicsCalibration"])]
  view = segment_view(demo, "qcamera", every=600)
  assert view.calibrated and np.abs(view.rpy - list(events[-1].rpyCalib)).max() < 1e-7
  early = rewritten(
    demo,
    tmp_path,
    lambda b: b.which() != "extrinsicsCalibration" or str(b.extrinsicsCalibration.calStatus) == "uncalibrated",
  )
  want = list([m for m in events if str(m.calStatus) == "uncalibrated"][-1].rpyCalib)
  view = segment_view(early, "qcamera", every=600)
  assert np.abs(want).max() > 1e-3 and np.abs(view.rpy - want).max() < 1e-7 and view.calibrated
