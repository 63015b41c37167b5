"""The log of a simulated car: openpilot's messages at openpilot's rates, from the world's state. Noise is seeded by the
segment."""

from collections import Counter
from typing import Any

import numpy as np

from openpilot.cereal import log, messaging
from openpilot.cereal.services import SERVICE_LIST
from openpilot.common.transformations.camera import CameraConfig
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.tools.sim.world import World

FRAME_NS = 50_000_000
START_NS = 100_000_000_000
SOF_TO_EOF_NS = 14_697_000
# a camera's frame count does not begin with the video's: this exposes code that counts instead of joining
FRAME_ID_OFFSET = 137
X_IDXS = 192.0 * (np.arange(33) / 32) ** 2
T_IDXS = 10.0 * (np.arange(33) / 32) ** 2
MODEL_DELAY_NS = 25_000_000

Messages = list[tuple[int, bytes]]


def segment_messages(
  world: World, num: int, first: int, count: int, config: CameraConfig, device: str, sensor: str, last: bool
) -> Messages:
  """(logMonoTime, bytes) of one segment in time order; frames first .. first + count - 1 of the drive."""
  r = np.random.default_rng([world.seed, num, 5])
  begin, end = START_NS + first * FRAME_NS, START_NS + (first + count) * FRAME_NS

  def add(t: int, service: str, size: int | None = None) -> Any:
    msg = messaging.new_message(service, size, valid=True, logMonoTime=t)
    pending.append((t, msg))
    return getattr(msg, service)

  pending: list[tuple[int, Any]] = []
  init = add(begin, "initData")
  init.deviceType, init.version, init.dongleId = device, "simulator", "0" * 16
  add(begin, "sentinel").type = "startOfRoute" if num == 0 else "startOfSegment"
  params = add(begin + 1, "carParams")
  params.brand, params.carFingerprint, params.wheelbase, params.mass, params.steerRatio = (
    "mock",
    "SIMULATOR",
    2.7,
    1500.0,
    15.0,
  )

  for t in range(begin, end, 10_000_000):  # 100 Hz
    e = world.ego((t - START_NS) * 1e-9)
    cs = add(t, "carState")
    cs.vEgo = cs.vEgoRaw = cs.vEgoCluster = e["v_ego"]
    cs.aEgo, cs.yawRate, cs.steeringAngleDeg = (
      e["a_ego"],
      -e["yaw_rate"],
      -float(np.degrees(e["curvature"] * 2.7 * 15.0)),
    )  # both positive to the left
    cs.gearShifter, cs.canValid, cs.cruiseState.enabled, cs.cruiseState.available, cs.cruiseState.speed = (
      "drive",
      True,
      True,
      True,
      world.speed,
    )
    cc = add(t + 1000, "carControl")
    cc.enabled = cc.latActive = cc.longActive = True
    cc.actuators.curvature, cc.actuators.accel, cc.currentCurvature = -e["curvature"], e["a_ego"], -e["curvature"]
    ss = add(t + 2000, "selfdriveState")
    ss.state, ss.enabled, ss.active, ss.engageable = "enabled", True, True, True
    co = add(t + 3000, "controlsState")
    co.curvature = co.desiredCurvature = -e["curvature"]
  for t in range(begin + 5000, end, 500_000_000):  # 2 Hz
    ds = add(t, "deviceState")
    ds.started, ds.startedMonoTime, ds.deviceType, ds.thermalStatus, ds.freeSpacePercent = (
      True,
      START_NS,
      device,
      "ok",
      80.0,
    )
  for t in range(begin + 6000, end, 250_000_000):  # 4 Hz
    cal = add(t, "extrinsicsCalibration")
    cal.calStatus, cal.calPerc, cal.validBlocks, cal.calCycle = "calibrated", 100, 50, 1
    cal.rpyCalib, cal.rpyCalibSpread, cal.height = (
      [float(v) for v in world.rpy],
      [0.001] * 3,
      [float(world.camera_height)],
    )
  for t in range(begin + 7000, end, 100_000_000):  # 10 Hz
    e = world.ego((t - START_NS) * 1e-9)
    gps = add(t, "gpsLocationExternal")
    x, y, heading = world.pose((t - START_NS) * 1e-9)
    gps.latitude, gps.longitude = x / 111_111.0, y / 111_111.0
    gps.speed, gps.bearingDeg, gps.hasFix, gps.satelliteCount, gps.source = (
      e["v_ego"],
      float(np.degrees(heading) % 360),
      True,
      12,
      "ublox",
    )
    gps.horizontalAccuracy, gps.vNED = (
      1.0,
      [float(e["v_ego"] * np.cos(heading)), float(e["v_ego"] * np.sin(heading)), 0.0],
    )

  for i in range(first, first + count):
    frame_messages(add, world, i, i - first, num, config, sensor, r)
  add(end - 1, "sentinel").type = "endOfRoute" if last else "endOfSegment"
  pending.sort(key=lambda x: x[0])
  return [(t, m.to_bytes()) for t, m in pending]


def frame_messages(
  add: Any, world: World, i: int, segment_id: int, num: int, config: CameraConfig, sensor: str, r: np.random.Generator
) -> None:
  """The messages at 20 Hz: camera, encoders, the model, odometry, radar."""
  sof = START_NS + i * FRAME_NS
  eof, frame_id = sof + SOF_TO_EOF_NS, FRAME_ID_OFFSET + i
  t = i * FRAME_NS * 1e-9
  e = world.ego(t)
  cam = add(eof + 200_000, "narrowRoadCameraState")
  cam.frameId, cam.timestampSof, cam.timestampEof, cam.sensor, cam.requestId, cam.frameIdSensor = (
    frame_id,
    sof,
    eof,
    sensor,
    frame_id,
    frame_id,
  )
  cam.exposureValPercent, cam.gain, cam.integLines = (
    (15.0, 1.0, 300) if world.time_of_day == "day" else (80.0, 8.0, 1200)
  )
  for service, kind in (("narrowRoadEncodeIdx", "fullHEVC"), ("qNarrowRoadEncodeIdx", "qcameraH264")):
    idx = add(eof + 6_000_000, service)
    idx.frameId, idx.type, idx.encodeId, idx.segmentNum, idx.segmentId, idx.segmentIdEncode = (
      frame_id,
      kind,
      i,
      num,
      segment_id,
      segment_id,
    )
    idx.timestampSof, idx.timestampEof = sof, eof

  done = eof + MODEL_DELAY_NS
  m = add(done, "modelV2")
  m.frameId, m.frameIdExtra, m.timestampEof, m.modelExecutionTime = frame_id, frame_id, eof, 0.017
  lines = {line["d"]: line for line in world.lane_lines(t, X_IDXS)}
  wanted = [e["d"] + k * world.lane_width for k in (-1.5, -0.5, 0.5, 1.5)]
  probs, stds = [], []
  laterals = []
  for entry, d in zip(m.init("laneLines", 4), wanted, strict=True):
    near = min(lines, key=lambda x: abs(x - d)) if lines else None
    there = near is not None and abs(near - d) < 0.6 * world.lane_width
    y = lines[near]["y"] if there and near is not None else world.lateral(t, X_IDXS, d)
    spread = 0.03 + 0.004 * X_IDXS
    noisy = np.nan_to_num(y, nan=0.0) + r.normal(0, 1) * spread + r.normal(0, 0.2, 33) * spread
    entry.x, entry.y, entry.z = X_IDXS.tolist(), noisy.tolist(), [world.camera_height] * 33
    probs.append(float(np.clip(r.normal(0.93, 0.04), 0, 1)) if there else float(np.clip(r.normal(0.08, 0.05), 0, 1)))
    stds.append(0.1 if there else 0.6)
    laterals.append(float(noisy[0]))
  m.laneLineProbs, m.laneLineStds = probs, stds
  for entry, d in zip(m.init("roadEdges", 2), (world.d_left, world.d_right), strict=True):
    y = np.nan_to_num(world.lateral(t, X_IDXS, d), nan=0.0) + r.normal(0, 0.15)
    entry.x, entry.y, entry.z = X_IDXS.tolist(), y.tolist(), [world.camera_height] * 33
  m.roadEdgeStds = [0.3, 0.3]
  ahead = world.speed * T_IDXS
  m.position.t, m.position.x = T_IDXS.tolist(), ahead.tolist()
  m.position.y, m.position.z = np.nan_to_num(world.lateral(t, ahead, e["d"]), nan=0.0).tolist(), [0.0] * 33
  m.velocity.t, m.velocity.x, m.velocity.y, m.velocity.z = T_IDXS.tolist(), [e["v_ego"]] * 33, [0.0] * 33, [0.0] * 33
  vehicles = sorted(
    (o for o in world.objects(t) if o["cls"] == 3 and abs(o["lane_d"]) < 0.5 * world.lane_width and o["x"] > 2),
    key=lambda o: o["x"],
  )
  for k, entry in enumerate(m.init("leadsV3", 3)):
    entry.probTime, entry.t = 2.0 * k, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    o = vehicles[0] if vehicles else None
    entry.prob = 0.95 if o is not None and o["x"] < 120 else 0.02
    x0 = o["x"] - o["size"][0] / 2 if o is not None else 150.0
    entry.x, entry.y = [x0 + r.normal(0, 0.02 * x0) for _ in range(6)], [o["y"] if o is not None else 0.0] * 6
    entry.v, entry.a, entry.xStd, entry.yStd, entry.vStd, entry.aStd = (
      [e["v_ego"] + (o["v_rel"] if o is not None else 0.0)] * 6,
      [0.0] * 6,
      [0.02 * x0] * 6,
      [0.3] * 6,
      [0.5] * 6,
      [0.3] * 6,
    )
  m.meta.desireState, m.meta.engagedProb = [1.0] + [0.0] * 7, 0.95
  m.action.desiredCurvature, m.action.desiredAcceleration = -e["curvature"], e["a_ego"]
  dm = add(done + 1000, "drivingModelData")
  dm.frameId, dm.frameIdExtra, dm.modelExecutionTime, dm.action.desiredCurvature = (
    frame_id,
    frame_id,
    0.017,
    -e["curvature"],
  )
  dm.laneLineMeta.leftY, dm.laneLineMeta.rightY, dm.laneLineMeta.leftProb, dm.laneLineMeta.rightProb = (
    laterals[1],
    laterals[2],
    probs[1],
    probs[2],
  )
  od = add(done + 2000, "cameraOdometry")
  od.frameId, od.timestampEof = frame_id, eof
  velocity, rates = world.motion(t)
  od.trans, od.rot = (velocity + r.normal(0, [0.05, 0.02, 0.02])).tolist(), (rates + r.normal(0, 0.001, 3)).tolist()
  od.transStd, od.rotStd = [0.05, 0.02, 0.02], [0.001] * 3
  pose = add(done + 3000, "deviceMotion")
  device_from_calib = rot_from_euler(world.rpy)
  for field, value in (
    (pose.velocityDevice, device_from_calib @ velocity),
    (pose.angularVelocityDevice, device_from_calib @ rates),
  ):
    field.x, field.y, field.z = value.tolist()
    field.valid = True
  pose.timestamp = eof
  pose.inputsOK = pose.posenetOK = pose.sensorsOK = True
  rs = add(done + 4000, "radarState")
  for name, o in zip(("leadOne", "leadTwo"), (vehicles + [None, None])[:2], strict=True):
    if o is not None:
      lead = getattr(rs, name)
      lead.dRel, lead.yRel, lead.vRel, lead.present, lead.vLead = (
        o["x"] - o["size"][0] / 2 - 1.5,
        -o["y"],
        o["v_rel"],
        True,
        e["v_ego"] + o["v_rel"],
      )  # from the bumper; left is positive
      lead.modelProb, lead.radar = 0.95, False


def qlog_of(messages: Messages) -> list[bytes]:
  """Every n-th message of each service, by openpilot's decimation; services without one are left out."""
  seen: Counter[str] = Counter()
  kept = []
  for _, dat in messages:
    with log.Event.from_bytes(dat) as event:
      which = event.which()
    decimation = SERVICE_LIST[which].decimation if which in SERVICE_LIST else 1
    if decimation is not None and seen[which] % decimation == 0:
      kept.append(dat)
    seen[which] += 1
  return kept
