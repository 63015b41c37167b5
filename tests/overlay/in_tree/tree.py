"""What the checks need of an openpilot checkout of either layout. It runs in the checkout's own Python, and imports
nothing of this repository.

The folder of a run (argument --out) holds what is handed from one check to the next: rlog, managerState messages,
result as JSON."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

try:
  from openpilot.cereal import log, messaging
  from openpilot.cereal.services import SERVICE_LIST
except ImportError:  # before June 2026
  from cereal import log, messaging
  from cereal.services import SERVICE_LIST
try:
  from openpilot.cereal.visionipc import VisionStreamType
except ImportError:  # before August 2026
  from msgq.visionipc import VisionStreamType
from msgq.visionipc import VisionIpcClient, VisionIpcServer
from openpilot.common.params import Params

__all__ = ["FAIR", "SERVICE_LIST", "Params", "VisionIpcClient", "VisionIpcServer", "log", "messaging"]

FPS = 20
FAIR = [name for name in SERVICE_LIST if name.startswith("fair")]
NEW = "narrowRoadCameraState" in SERVICE_LIST  # since August 2026
CAMERA = "narrowRoadCameraState" if NEW else "roadCameraState"
WIDE = "wideRoadCameraState"
CALIBRATION = "extrinsicsCalibration" if NEW else "liveCalibration"
STREAM = VisionStreamType.VISION_STREAM_NARROW_ROAD if NEW else VisionStreamType.VISION_STREAM_ROAD
# from the checkout's root, the working folder
ROOT = Path("openpilot") if Path("openpilot/cereal").is_dir() else Path()
CAR = "TOYOTA_COROLLA_TSS2"


def put_bool(params: Params, key: str, value: bool) -> None:
  params.put_bool(key, value)
  for _ in range(200):  # put() has been asynchronous since 2026
    if params.get_bool(key) == value:
      return
    import time

    time.sleep(0.01)
  raise AssertionError(f"{key} was not written")


def nv12_layout(w: int, h: int) -> tuple[int, int, int]:
  """(stride, uv_offset, bytes) of a camera's buffer, openpilot's alignment on a device of today."""
  stride, y_height, uv_height = -(-w // 128) * 128, -(-h // 32) * 32, -(-(h // 2) // 16) * 16
  return stride, stride * y_height, -(-(stride * (y_height + uv_height)) // 4096) * 4096


class Frames:
  """NV12 pictures, each (h * 3/2, w) uint8: of a route where its file is given, else a drawn road that moves. What
  process_replay's FrameReader offers."""

  pix_fmt = "nv12"

  def __init__(self, path: str | None = None, count: int = 200, size: tuple[int, int] = (1928, 1208)):
    self.real = np.load(path, mmap_mode="r") if path else None
    self.count = len(self.real) if self.real is not None else count
    self.w, self.h = (self.real.shape[2], self.real.shape[1] * 2 // 3) if self.real is not None else size

  def picture(self, i: int) -> np.ndarray:
    if self.real is not None:
      return self.real[i % self.count]
    w, h = self.w, self.h
    out = np.full((h * 3 // 2, w), 128, np.uint8)
    y, x = np.arange(h)[:, None], np.arange(w)[None]
    horizon = h * 0.45
    down = np.maximum(y - horizon, 1)
    across = (x - w / 2) / down  # lanes are straight lines through the vanishing point
    road = (y > horizon) & (np.abs(across) < 1.6)
    luma = np.where(y > horizon, 90, 200) + 0 * x
    luma = np.where(road, 60, luma)
    distance = 900 / down + i * 0.8
    dash = (np.floor(distance / 4) % 2 == 0) & (np.abs(np.abs(across) - 0.55) < 0.03)
    luma = np.where(road & (dash | (np.abs(np.abs(across) - 1.5) < 0.03)), 210, luma)
    for k, (lane, far) in enumerate(((0.0, 90 + 20 * np.sin(i / 40)), (1.1, 140 - (i * 1.5) % 110))):
      size = 4000 / max(far, 12)
      cx, cy = w / 2 + lane * 900 / far * 3, horizon + 900 / far * 3
      luma = np.where((np.abs(x - cx) < size) & (y < cy) & (y > cy - 1.4 * size), 30 + 20 * k, luma)
    out[:h] = luma
    return out

  def get(self, i: int) -> np.ndarray:
    return np.ascontiguousarray(self.picture(i)).reshape(-1)

  def buffer(self, i: int) -> np.ndarray:
    """One frame as it lies in a camera's buffer."""
    stride, uv, size = nv12_layout(self.w, self.h)
    out, picture = np.zeros(size, np.uint8), self.picture(i)
    out[: stride * self.h].reshape(self.h, stride)[:, : self.w] = picture[: self.h]
    out[uv : uv + stride * (self.h // 2)].reshape(-1, stride)[:, : self.w] = picture[self.h : self.h + self.h // 2]
    return out


def camera_state(frame_id: int, ns: int) -> Any:
  msg = messaging.new_message(CAMERA, valid=True, logMonoTime=ns)
  m = getattr(msg, CAMERA)
  m.frameId = m.encodeId = frame_id
  m.timestampSof, m.timestampEof, m.sensor = ns - 30_000_000, ns - 15_000_000, "ox03c10"
  return msg


def calibration(ns: int | None = None) -> Any:
  msg = messaging.new_message(CALIBRATION, valid=True, **({} if ns is None else {"logMonoTime": ns}))
  m = getattr(msg, CALIBRATION)
  m.calStatus, m.rpyCalib, m.height = "calibrated", [0.0, 0.01, -0.01], [1.22]
  return msg


def device_state(ns: int | None = None) -> Any:
  msg = messaging.new_message("deviceState", valid=True, **({} if ns is None else {"logMonoTime": ns}))
  m = msg.deviceState
  m.started, m.deviceType, m.freeSpacePercent = True, "tizi", 80
  return msg


def made_log(frames: int) -> list[Any]:
  """What fairmodeld reads, at the rates of a device, in this checkout's names."""
  out, start = [], 10_000_000_000
  for i in range(frames):
    ns = start + i * 50_000_000
    car = messaging.new_message("carState", valid=True, logMonoTime=ns + 1)
    car.carState.vEgo = 16.0
    out.append(car)
    if i % 5 == 0:
      out.append(calibration(ns + 2))
    if i % 10 == 0:
      out.append(device_state(ns + 3))
    out.append(camera_state(i, ns + 4))
  return [as_reader(m) for m in out]


def route_log(path: str, frames: int) -> list[Any]:
  """A route's own messages that fairmodeld reads, with a camera state for every frame of the video: qlogs keep one of
  twenty."""
  from openpilot.tools.lib.logreader import LogReader

  index = "narrowRoadEncodeIdx" if NEW else "roadEncodeIdx"
  out = []
  for m in LogReader(path):
    which = m.which()
    if which == index and (e := getattr(m, which)).segmentId < frames:
      out.append(as_reader(camera_state(e.segmentId, e.timestampEof + 15_000_000)))
    elif which in ("deviceState", CALIBRATION, "carState", "modelV2"):
      out.append(m)
  return sorted(out, key=lambda m: m.logMonoTime)


def as_reader(msg: Any) -> Any:
  return log.Event.from_bytes(msg.to_bytes()).__enter__()


def children(pid: int) -> list[int]:
  """Processes below pid, itself not among them, the nearest first."""
  out: list[int] = []
  try:
    for task in Path(f"/proc/{pid}/task").iterdir():
      for child in (task / "children").read_text().split():
        out += [int(child), *children(int(child))]
  except (FileNotFoundError, ProcessLookupError):
    pass
  return out


def cpu_and_memory(pid: int) -> tuple[float, float, float]:
  """(CPU seconds so far, MB resident, MB of them that are shared: files, camera buffers, queues) of a process; zeros
  where it is gone."""
  try:
    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    resident, shared = (
      int(n) * os.sysconf("SC_PAGE_SIZE") / 1e6 for n in Path(f"/proc/{pid}/statm").read_text().split()[1:3]
    )
  except (FileNotFoundError, ProcessLookupError, IndexError):
    return 0.0, 0.0, 0.0
  return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"), resident, shared


def end(process: Any, seconds: float = 8.0) -> None:
  process.terminate()
  process.join(seconds)
  if process.is_alive():
    os.kill(process.pid, signal.SIGKILL)


def logged(raws: list[bytes], seconds: float) -> dict[str, Any]:
  """What openpilot's loggerd would keep of these messages: MB a minute at its zstd level 10, all together and each
  service by itself."""
  import zstandard

  kept: dict[str, list[bytes]] = {}
  for d in raws:
    kept.setdefault(messaging.log_from_bytes(d).which(), []).append(d)
  kept = {s: v for s, v in kept.items() if SERVICE_LIST[s].should_log}
  each = {s: round(len(zstandard.compress(b"".join(v), 10)) * 60 / seconds / 1e6, 3) for s, v in kept.items()}
  in_order = [d for d in raws if messaging.log_from_bytes(d).which() in kept]
  return {"all": round(len(zstandard.compress(b"".join(in_order), 10)) * 60 / seconds / 1e6, 3), **each}


def loggerd(folder: str) -> Any:
  """openpilot's loggerd, writing to a folder; None where it is not built."""
  import subprocess

  path = (ROOT / "system/loggerd/loggerd").absolute()
  if not path.is_file():
    return None
  return subprocess.Popen(
    [str(path)],
    cwd=path.parent,
    env={**os.environ, "LOG_ROOT": folder},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def loggerd_wrote(folder: str) -> dict[str, Any] | None:
  """{"messages": fair* in its rlogs, as openpilot's LogReader reads them, "mb_per_minute"}."""
  from openpilot.tools.lib.logreader import LogReader

  files = sorted(Path(folder).glob("*/rlog*"))
  events = [e for f in files for e in LogReader(str(f)) if e.which() in FAIR]
  if not events:
    return None
  seconds = (events[-1].logMonoTime - events[0].logMonoTime) / 1e9
  return {
    "messages": len(events),
    "mb_per_minute": logged([e.as_builder().to_bytes() for e in events], seconds),
    "seconds": round(seconds, 1),
  }


def tell(result: dict[str, Any], out: str) -> None:
  """The check's last word: a line of JSON, in the run's folder too."""
  text = json.dumps(result, default=str)
  Path(out, f"{Path(sys.argv[0]).stem}.json").write_text(text)
  print(f"RESULT {text}", flush=True)
