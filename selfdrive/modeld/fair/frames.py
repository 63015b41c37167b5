"""Camera frames to model frames: openpilot's calibrated warp into a 512x256 view, YUV 4:2:0 packed to uint8 (6, 128,
256).

The warp is openpilot's own (selfdrive/modeld/compile_modeld.py): nearest neighbor, pixels outside the image clamped to
its border."""

import numpy as np

from openpilot.common.transformations.model import get_warp_matrix
from openpilot.selfdrive.modeld.fair.ipc import DEVICE_CAMERAS, road_camera

VIEW_W, VIEW_H = 512, 256
FRAME_SHAPE = (6, VIEW_H // 2, VIEW_W // 2)
VIEWS = ("medmodel", "sbigmodel")
QCAMERA_SIZE = (526, 330)  # the road camera, scaled by the encoder
QCAMERA_OF = ("tizi", "ox03c10")  # where nobody says whose it is
# pixels; decoders round a picture's sides up to less than so many more: openpilot's replay to 4, others to 16
PADDING = 16
ROUNDING = 2  # pixels; encoders round the sides of a scaled picture to even numbers
MIN_SCALE = 0.1


class CameraError(ValueError):
  """A camera whose intrinsics are not known."""


def scaled(intrinsics: np.ndarray, x: float, y: float) -> np.ndarray:
  """(3, 3) of a camera whose picture is resized by x and y. Pixels are counted at their centers, so the center c goes
  to (c + 0.5) * x - 0.5."""
  return np.array([[x, 0.0, 0.5 * x - 0.5], [0.0, y, 0.5 * y - 0.5], [0.0, 0.0, 1.0]]) @ intrinsics


def is_padded(size: tuple[int, int], picture: tuple[int, int]) -> bool:
  """Whether frames of `size` hold such a picture, at most padded at the right and below."""
  return all(0 <= a - b < PADDING for a, b in zip(size, picture, strict=True))


def find_camera(
  width: int, height: int, device_type: str | None = None, sensor: str | None = None, wide: bool = False
) -> tuple[np.ndarray, tuple[int, int]]:
  """(3, 3) pinhole matrix of comma's road camera (wide: the wide one) that gives frames of this size, and width and
  height of the picture in them.

  Frames may be padded by a decoder. device_type and sensor, as the log spells them, decide where both are known and the
  camera fits; else the size does.
  526x330 is the qcamera: the road camera of device and sensor, else the 1928x1208 one, scaled. Frames scaled otherwise
  are known where device and sensor are, and both sides are scaled alike: to 2 pixels, and up to 3 more for padding.
  Raises CameraError on what no camera gives."""
  size = (width, height)
  given = DEVICE_CAMERAS.get((device_type or "unknown", sensor or "unknown"))
  cameras = [road_camera(c, wide) for c in ([given] if given is not None else []) + list(DEVICE_CAMERAS.values())]
  cameras = [c for c in cameras if c.width]
  for camera in cameras:
    if is_padded(size, camera.size):
      return camera.intrinsics, camera.size
  if not wide and is_padded(size, QCAMERA_SIZE):
    camera = cameras[0] if given is not None else road_camera(DEVICE_CAMERAS[QCAMERA_OF], False)
    return scaled(camera.intrinsics, QCAMERA_SIZE[0] / camera.width, QCAMERA_SIZE[1] / camera.height), QCAMERA_SIZE
  if given is not None and cameras[0] == road_camera(given, wide):
    camera = cameras[0]
    x, y = width / camera.width, height / camera.height
    scale = min(x, y)
    extra = max(width - camera.width * scale, height - camera.height * scale)
    if MIN_SCALE <= scale <= 1 and extra <= ROUNDING:
      return scaled(camera.intrinsics, x, y), size
    if MIN_SCALE <= scale <= 1 and extra <= ROUNDING + 3:
      return scaled(camera.intrinsics, scale, scale), (round(camera.width * scale), round(camera.height * scale))
  sizes = ", ".join(sorted({f"{c.width}x{c.height}" for c in cameras} | (set() if wide else {"526x330 (qcamera)"})))
  device = f" of {device_type} with {sensor}" if given is not None else ""
  what = f"no {'wide' if wide else 'road'} camera{device} gives {width}x{height} frames"
  hint = "scaled ones where the log names device and sensor; else add the camera to DEVICE_CAMERAS"
  raise CameraError(f"{what}; known are {sizes}, padded by up to {PADDING - 1} pixels, and {hint}")


def camera_intrinsics(
  width: int, height: int, device_type: str | None = None, sensor: str | None = None, wide: bool = False
) -> np.ndarray:
  """find_camera()'s (3, 3) matrix."""
  return find_camera(width, height, device_type, sensor, wide)[0]


class ModelFrame:
  """Warps the frames of one camera size and NV12 layout. Set the calibration once, and again whenever it changes."""

  def __init__(self, width: int, height: int, stride: int, uv_offset: int, view: str = "medmodel"):
    if view not in VIEWS:
      raise ValueError(f"view '{view}' is not known; one of {', '.join(VIEWS)}")
    self.width, self.height, self.stride, self.uv_offset, self.view = width, height, stride, uv_offset, view
    self.indices = np.zeros(
      FRAME_SHAPE, dtype=np.intp
    )  # of the byte in the NV12 buffer that each value comes from; intp spares take() a conversion
    self.valid = np.zeros((VIEW_H, VIEW_W), dtype=bool)  # view pixels that lie in the image
    self.frame = np.zeros(FRAME_SHAPE, dtype=np.uint8)

  def set_calibration(self, rpy, intrinsics: np.ndarray) -> None:
    """rpy: (3,) radians, extrinsicsCalibration.rpyCalib; intrinsics: (3, 3) of the camera."""
    m = get_warp_matrix(rpy, intrinsics, self.view == "sbigmodel")
    x, y, inside = self._source(m, VIEW_W, VIEW_H, self.width, self.height)
    luma = y * self.stride + x
    m_uv = m * np.array([[1.0, 1.0, 0.5], [1.0, 1.0, 0.5], [2.0, 2.0, 1.0]])
    x, y, _ = self._source(m_uv, VIEW_W // 2, VIEW_H // 2, self.width // 2, self.height // 2)
    chroma = self.uv_offset + y * self.stride + 2 * x
    self.indices[:] = packed(luma, chroma, chroma + 1)
    self.valid[:] = inside

  @staticmethod
  def _source(m: np.ndarray, w: int, h: int, src_w: int, src_h: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    u, v = np.meshgrid(np.arange(w), np.arange(h))
    p = m @ np.stack([u.ravel(), v.ravel(), np.ones(w * h)])
    with np.errstate(divide="ignore", invalid="ignore"):
      q = np.round(p[:2] / p[2])
    ahead = p[2] > 0
    q = np.where(ahead & np.isfinite(q), q, 0)
    inside = ahead & (q[0] >= 0) & (q[0] < src_w) & (q[1] >= 0) & (q[1] < src_h)
    x, y = np.clip(q[0], 0, src_w - 1).astype(np.intp), np.clip(q[1], 0, src_h - 1).astype(np.intp)
    return x.reshape(h, w), y.reshape(h, w), inside.reshape(h, w)

  @property
  def filled(self) -> float:
    """Fraction of the view that the camera covers."""
    return float(self.valid.mean())

  def warp(self, buf: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """buf: the NV12 buffer, 1-D uint8, at least uv_offset + stride * height / 2 long -> (6, 128, 256) uint8. Without
    `out` the same array every time."""
    out = self.frame if out is None else out
    if buf.size < self.uv_offset + (self.height // 2 - 1) * self.stride + self.width // 2 * 2:
      raise ValueError(
        f"a buffer of {buf.size} bytes is too short for {self.width}x{self.height} NV12 with stride {self.stride}"
      )
    # the indices are in range by construction; mode 'clip' spares take() a buffered copy
    return np.take(buf, self.indices, out=out, mode="clip")


def packed(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """(2h, 2w) luma, (h, w) U and V -> (6, h, w), as a model frame has them."""
  return np.stack([y[0::2, 0::2], y[1::2, 0::2], y[0::2, 1::2], y[1::2, 1::2], u, v])


def luma_of(frame: np.ndarray) -> np.ndarray:
  """(6, h, w) of a model frame -> (2h, 2w)."""
  y = np.empty((2 * frame.shape[1], 2 * frame.shape[2]), frame.dtype)
  y[0::2, 0::2], y[1::2, 0::2], y[0::2, 1::2], y[1::2, 1::2] = frame[:4]
  return y


def pack_rgb(rgb: np.ndarray) -> np.ndarray:
  """(256, 512, 3) uint8 RGB of the model view -> (6, 128, 256) uint8: BT.601 limited range, chroma averaged over 2x2,
  as the cameras' NV12."""
  f = rgb.astype(np.float32)
  y = 16 + f @ np.array([65.481, 128.553, 24.966], dtype=np.float32) / 255
  c = f.reshape(VIEW_H // 2, 2, VIEW_W // 2, 2, 3).mean(axis=(1, 3))
  u = 128 + c @ np.array([-37.797, -74.203, 112.0], dtype=np.float32) / 255
  v = 128 + c @ np.array([112.0, -93.786, -18.214], dtype=np.float32) / 255
  return np.clip(np.round(packed(y, u, v)), 0, 255).astype(np.uint8)


def unpack_rgb(frame: np.ndarray) -> np.ndarray:
  """(6, h, w) uint8, by default h 128, w 256 -> (2h, 2w, 3) uint8 RGB, the inverse of pack_rgb up to chroma resolution:
  to look at, and for teachers."""
  u, v = (np.repeat(np.repeat(frame[i].astype(np.float32) - 128, 2, 0), 2, 1) for i in (4, 5))
  y = 1.164384 * (luma_of(frame).astype(np.float32) - 16)
  return np.clip(
    np.round(np.stack([y + 1.596027 * v, y - 0.391762 * u - 0.812968 * v, y + 2.017232 * u], axis=-1)), 0, 255
  ).astype(np.uint8)
