"""The services: whether they are logged, their rate, their decimation in the qlog, and the size of their queue.

Names are those of August 2026; `service_name` takes the older spellings too."""

from enum import IntEnum
from typing import NamedTuple


class QueueSize(IntEnum):
  BIG = 10 * 1024 * 1024
  MEDIUM = 2 * 1024 * 1024
  SMALL = 250 * 1024


class Service(NamedTuple):
  should_log: bool
  frequency: float  # Hz, 0: on events
  decimation: int | None  # one of so many messages goes into the qlog; None: none
  queue_size: int  # bytes; a message may take a third of it


BIG, MEDIUM, SMALL = QueueSize.BIG, QueueSize.MEDIUM, QueueSize.SMALL

# older spelling -> the one since August 2026 (openpilot #38585, #38601)
RENAMED = {
  "roadCameraState": "narrowRoadCameraState",
  "driverCameraState": "cabinCameraState",
  "roadEncodeIdx": "narrowRoadEncodeIdx",
  "driverEncodeIdx": "cabinEncodeIdx",
  "wideEncodeIdx": "wideRoadEncodeIdx",
  "roadEncodeData": "narrowRoadEncodeData",
  "driverEncodeData": "cabinEncodeData",
  "qRoadEncodeIdx": "qNarrowRoadEncodeIdx",
  "qRoadEncodeData": "qNarrowRoadEncodeData",
  "liveCalibration": "extrinsicsCalibration",
  "liveParameters": "vehicleParameters",
  "liveTorqueParameters": "lateralTorqueParameters",
  "livePose": "deviceMotion",
  "liveTracks": "radarTracks",
  "liveDelay": "lateralDelay",
  "userFlag": "userBookmark",
  "androidLog": "operatingSystemLog",
}

SERVICE_LIST: dict[str, Service] = {
  # sensors and the car
  "gyroscope": Service(True, 104.0, 104, SMALL),
  "accelerometer": Service(True, 104.0, 104, SMALL),
  "temperatureSensor": Service(True, 2.0, 200, SMALL),
  "touch": Service(True, 20.0, 1, SMALL),
  "can": Service(True, 100.0, 2053, BIG),
  "sendcan": Service(True, 100.0, 139, MEDIUM),
  "pandaStates": Service(True, 10.0, 1, SMALL),
  "peripheralState": Service(True, 2.0, 1, SMALL),
  "carState": Service(True, 100.0, 10, SMALL),
  "carControl": Service(True, 100.0, 10, SMALL),
  "carOutput": Service(True, 100.0, 10, SMALL),
  "carParams": Service(True, 0.02, 1, SMALL),
  "radarTracks": Service(True, 20.0, None, SMALL),
  # the device
  "deviceState": Service(True, 2.0, 1, SMALL),
  "managerState": Service(True, 2.0, 1, SMALL),
  "procLog": Service(True, 0.5, 15, BIG),
  "clocks": Service(True, 0.1, 1, SMALL),
  "logMessage": Service(True, 0.0, None, BIG),
  "errorLogMessage": Service(True, 0.0, 1, BIG),
  "operatingSystemLog": Service(True, 0.0, None, SMALL),
  "gpsLocation": Service(True, 1.0, 1, SMALL),
  "gpsLocationExternal": Service(True, 10.0, 10, SMALL),
  "userBookmark": Service(True, 0.0, 1, SMALL),
  # cameras
  "narrowRoadCameraState": Service(True, 20.0, 20, SMALL),
  "cabinCameraState": Service(True, 20.0, 20, SMALL),
  "wideRoadCameraState": Service(True, 20.0, 20, SMALL),
  "narrowRoadEncodeIdx": Service(False, 20.0, 1, SMALL),
  "cabinEncodeIdx": Service(False, 20.0, 1, SMALL),
  "wideRoadEncodeIdx": Service(False, 20.0, 1, SMALL),
  "qNarrowRoadEncodeIdx": Service(False, 20.0, None, SMALL),
  "narrowRoadEncodeData": Service(False, 20.0, None, BIG),
  "cabinEncodeData": Service(False, 20.0, None, BIG),
  "wideRoadEncodeData": Service(False, 20.0, None, BIG),
  "qNarrowRoadEncodeData": Service(False, 20.0, None, BIG),
  "thumbnail": Service(True, 1 / 60.0, 1, SMALL),
  # driving
  "modelV2": Service(True, 20.0, None, BIG),
  "drivingModelData": Service(True, 20.0, 10, SMALL),
  "cameraOdometry": Service(True, 20.0, 10, SMALL),
  "extrinsicsCalibration": Service(True, 4.0, 4, SMALL),
  "vehicleParameters": Service(True, 20.0, 5, SMALL),
  "lateralTorqueParameters": Service(True, 4.0, 1, SMALL),
  "lateralDelay": Service(True, 4.0, 1, SMALL),
  "deviceMotion": Service(True, 20.0, 4, SMALL),
  "radarState": Service(True, 20.0, 5, SMALL),
  "longitudinalPlan": Service(True, 20.0, 10, SMALL),
  "lateralManeuverPlan": Service(True, 20.0, None, SMALL),
  "driverAssistance": Service(True, 20.0, 20, SMALL),
  "selfdriveState": Service(True, 100.0, 10, SMALL),
  "controlsState": Service(True, 100.0, 10, MEDIUM),
  "onroadEvents": Service(True, 1.0, 1, SMALL),
  "driverStateV2": Service(True, 20.0, 10, SMALL),
  "driverMonitoringState": Service(True, 20.0, 10, SMALL),
  "alertDebug": Service(True, 20.0, 5, SMALL),
  "testJoystick": Service(True, 0.0, None, SMALL),
  "customReservedRawData0": Service(True, 0.0, None, SMALL),
  # ours; a bundle may send at a lower rate, not at a higher. Decimation affects only the qlog, so dense messages are
  # not logged at all: fairState has them coarse
  "fairState": Service(True, 1.0, 1, SMALL),
  "fairDepth": Service(False, 10.0, None, MEDIUM),
  "fairObjects": Service(True, 20.0, 10, MEDIUM),
  "fairSegmentation": Service(False, 20.0, None, MEDIUM),
  "fairLanes": Service(True, 20.0, 10, SMALL),
  "fairFeatures": Service(False, 20.0, None, BIG),
}


def service_name(name: str) -> str:
  """Either spelling of a service -> the one since August 2026; other names are returned unchanged."""
  return RENAMED.get(name, name)
