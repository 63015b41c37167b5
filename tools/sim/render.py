"""Renders a World through any pinhole camera with the C ray-caster beside this file, which is compiled on first use."""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from openpilot.common.transformations.camera import device_frame_from_view_frame
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.tools.lib.native import compile_library

if TYPE_CHECKING:
  from openpilot.tools.sim.world import World

SOURCE = Path(__file__).with_name("raycast.c")
CLASSES = ("background", "road", "lane", "vehicle", "pedestrian")

F = ctypes.c_float
P = ctypes.POINTER(F)


class Scene(ctypes.Structure):
  """Mirrors `Scene` in raycast.c, field by field."""

  _fields_ = [
    ("height", ctypes.c_double),
    ("s0", ctypes.c_double),
    ("n_table", ctypes.c_int32),
    ("table_step", F),
    ("table_y", P),
    ("table_s", P),
    ("table_heading", P),
    ("n_lines", ctypes.c_int32),
    ("lines", P),
    ("d_left", F),
    ("d_right", F),
    ("shoulder", F),
    ("walk", F),
    ("asphalt", F * 3),
    ("terrain", F * 3),
    ("sky_top", F * 3),
    ("sky_low", F * 3),
    ("sun", F * 3),
    ("sun_dir", F * 3),
    ("ambient", F * 3),
    ("walk_rgb", F * 3),
    ("headlight", F),
    ("street_light", F),
    ("haze", F),
    ("texture", F),
    ("wet", F),
    ("mirror", F),
    ("rain", F),
    ("seed", ctypes.c_uint32),
    ("n_boxes", ctypes.c_int32),
    ("boxes", P),
  ]


@dataclass
class Frame:
  rgb: np.ndarray  # (H, W, 3) uint8
  depth: np.ndarray  # (H, W) float32, meters along the optical axis, inf in the sky
  semantic: np.ndarray  # (H, W) uint8, index into CLASSES
  instance: np.ndarray  # (H, W) uint16, identity of the vehicle or pedestrian, 0 elsewhere
  # (65536,) int32, how many pixels each identity would fill with nothing in front of it
  alone: np.ndarray | None = None


@cache
def library() -> Any:
  """The compiled ray-caster. Raises UserError where there is no C compiler or it fails."""
  lib = compile_library(SOURCE)
  address = ctypes.c_void_p
  lib.raycast.argtypes = [
    ctypes.POINTER(Scene),
    address,
    address,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_double,
    *[address] * 6,
  ]
  lib.raycast.restype = None
  lib.develop.argtypes = [address, address, address, F, F, ctypes.c_int, address]
  lib.develop.restype = None
  return lib


def _floats(a: np.ndarray) -> Any:
  return a.ctypes.data_as(P)


def render(
  world: "World",
  t: float,
  intrinsics: np.ndarray,
  width: int,
  height: int,
  rpy=(0.0, 0.0, 0.0),
  camera_height: float | None = None,
  rgb: bool = True,
  alone: bool = False,
) -> Frame:
  """What a camera with `intrinsics` (3, 3) sees of `world` at `t` seconds.

  rpy: radians, how the camera is mounted (extrinsicsCalibration.rpyCalib); with medmodel's intrinsics and rpy 0 the
  image is the model view itself. rgb=False leaves the picture black and saves its shading; depth, semantic and instance
  are the same. alone=True counts Frame.alone."""
  view = world.view(t)
  arrays = {
    k: np.ascontiguousarray(view[k], dtype=np.float32)
    for k in ("table_y", "table_s", "table_heading", "lines", "boxes")
  }
  look = world.look
  scene = Scene(
    height=world.camera_height if camera_height is None else camera_height,
    s0=view["s0"],
    n_table=len(arrays["table_y"]),
    table_step=view["table_step"],
    table_y=_floats(arrays["table_y"]),
    table_s=_floats(arrays["table_s"]),
    table_heading=_floats(arrays["table_heading"]),
    n_lines=len(arrays["lines"]),
    lines=_floats(arrays["lines"]),
    n_boxes=len(arrays["boxes"]),
    boxes=_floats(arrays["boxes"]),
    d_left=world.d_left,
    d_right=world.d_right,
    shoulder=world.shoulder,
    walk=world.walk,
    seed=world.seed & 0xFFFFFFFF,
    **{
      k: (F * 3)(*look[k])
      for k in ("asphalt", "terrain", "sky_top", "sky_low", "sun", "sun_dir", "ambient", "walk_rgb")
    },
    **{k: look[k] for k in ("headlight", "street_light", "haze", "texture", "wet", "mirror", "rain")},
  )
  rot = np.ascontiguousarray(rot_from_euler(rpy).T @ device_frame_from_view_frame)
  k = np.array([intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]], dtype=np.float64)
  linear = np.empty((height, width, 3), dtype=np.float32) if rgb else None
  out = Frame(
    np.zeros((height, width, 3), dtype=np.uint8),
    np.empty((height, width), dtype=np.float32),
    np.empty((height, width), dtype=np.uint8),
    np.empty((height, width), dtype=np.uint16),
    np.zeros(1 << 16, dtype=np.int32) if alone else None,
  )
  stamp = np.empty((height, width), dtype=np.uint16) if alone else None
  lib = library()
  arrays_out = (linear, out.depth, out.semantic, out.instance, out.alone, stamp)
  lib.raycast(ctypes.byref(scene), rot.ctypes.data, k.ctypes.data, width, height, t, *map(_address, arrays_out))
  if linear is not None:
    # exposure, sensor noise, then a display curve; seeded by the moment, so that a frame is the same whenever it is
    # rendered
    rng = np.random.default_rng([world.seed, round(t * 1e6), width])
    noise = rng.standard_normal((height, width), dtype=np.float32)
    lib.develop(
      linear.ctypes.data,
      noise.ctypes.data,
      GAMMA.ctypes.data,
      look["exposure"],
      look["noise"],
      height * width,
      out.rgb.ctypes.data,
    )
  return out


def _address(a: np.ndarray | None) -> int | None:
  return None if a is None else a.ctypes.data


GAMMA = np.round(255 * (np.arange(4096) / 4095) ** (1 / 2.0)).astype(np.uint8)
