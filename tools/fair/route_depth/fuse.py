"""One frame's witnesses of depth, pixel by pixel, put together: flow over a known way, the road plane, radar, the sky.

Everything is inverse depth with its standard deviation, inf where a witness says nothing, over a grid (h, w) of the
picture."""

from dataclasses import dataclass
from functools import cached_property

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.heads.ground import HEIGHT_STD
from openpilot.tools.fair.route_depth.geometry import (
  PIXEL_STD,
  Move,
  away,
  motion_per_rho,
  off_line,
  plane,
  rays_of,
  refine,
  triangulate,
)

SPEED_STD = 0.02  # of the way driven, as a share
FLOW_STD = 0.02  # of flow, as a share of its length
MAX_BACK = 1.5  # pixels that flow may miss its start by, there and back, beside FLOW_STD of its length
WINDOW = 9  # pixels each way that show flow's texture
BRIGHT_STD = 3.0  # steps of 255, by which brightness differs from picture to picture
BLANK = 1.0  # pixels that brightness leaves free: where more, the move is not put right by it
OFF = 3.0  # standard deviations off its line: it moves by itself, or flow is wrong
REACH = 2  # cells: flow has eight pixels to a cell of its own
END = 0.2  # of inverse depth: so much a surface's bends within REACH cells; more, and it ends there
BELOW = 1.3  # times the road plane's distance: nothing that is seen below the horizon is farther
LEAST = 200  # cells that must be sure for the log's move, or the road's pitch, to be put right by them
FIT_STEP = 3  # of the cells, each way, by which the move is put right
PITCH_STD, FITTED_STD = 0.005, 0.002  # rad; of the road against the calibration, and where this frame's flow told it
MAX_PITCH = 0.02  # rad
PITCH_FAR = 25.0  # m, to which the road tells its pitch
APART = 3.0  # standard deviations: two witnesses that contradict each other teach nothing


@dataclass
class Inverse:
  """rho (h, w) 1/m, std (h, w) its standard deviation, inf: nothing is said."""

  rho: np.ndarray
  std: np.ndarray

  @classmethod
  def nothing(cls, shape: tuple[int, ...]) -> "Inverse":
    return cls(np.zeros(shape), np.full(shape, np.inf))


@dataclass(frozen=True)
class Grid:
  """Cells of a picture. px (h, w, 2) their centers, pixels; rays (h, w, 3) with z = 1; intrinsics (3, 3); down (3,) of
  the road in the camera's frame; height: of the camera above it, m."""

  px: np.ndarray
  rays: np.ndarray
  intrinsics: np.ndarray
  down: np.ndarray
  height: float

  @property
  def focal(self) -> float:
    return float(self.intrinsics[0, 0])

  @property
  def shape(self) -> tuple[int, ...]:
    return self.px.shape[:2]

  @cached_property
  def level(self) -> np.ndarray:
    """(h, w) inverse depth of the road plane as calibrated."""
    return plane(self.rays.reshape(-1, 3), self.down, self.height).reshape(self.shape)


def make_grid(height: int, width: int, stride: int, intrinsics: np.ndarray, down: np.ndarray, above: float) -> Grid:
  """Cells of about `stride` pixels that together cover a picture of height x width, as a map of it does; above: the
  camera above the road, m."""
  h, w = height // stride, width // stride
  x, y = (np.arange(w) + 0.5) * width / w - 0.5, (np.arange(h) + 0.5) * height / h - 0.5
  px = np.stack(np.meshgrid(x, y), axis=-1)
  return Grid(px, rays_of(px, intrinsics), intrinsics, down, above)


def texture(gray: np.ndarray, grid: Grid) -> np.ndarray:
  """(H, W) uint8 -> (h, w, 2, 2): the mean over WINDOW pixels about each cell of the products of brightness's gradient,
  steps of 255 a pixel."""
  smooth = cv2.GaussianBlur(gray.astype(np.float32), (0, 0), 1.0)
  gx, gy = (cv2.Sobel(smooth, cv2.CV_32F, *d, ksize=3, scale=1 / 8) for d in ((1, 0), (0, 1)))
  x, y = grid.px[..., 0].astype(np.float32), grid.px[..., 1].astype(np.float32)
  xx, xy, yy = (
    cv2.remap(cv2.boxFilter(p, -1, (WINDOW, WINDOW)), x, y, cv2.INTER_LINEAR).astype(np.float64)
    for p in (gx * gx, gx * gy, gy * gy)
  )
  return np.stack([np.stack([xx, xy], axis=-1), np.stack([xy, yy], axis=-1)], axis=-2)


def turned_back(frame: np.ndarray, grid: Grid, move: Move) -> tuple[np.ndarray, Move, np.ndarray]:
  """An earlier frame (3, H, W) uint8 as its camera would have seen it, had it looked where the labeled frame's looks:
  flow then has only the way to find, and no turn. -> (3, H, W), the move that is left, and (3, 3) from its pixels to
  the earlier frame's own."""
  back = grid.intrinsics @ move.R @ np.linalg.inv(grid.intrinsics)
  size = frame.shape[:0:-1]
  flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
  planes = [cv2.warpPerspective(p, back, size, flags=flags, borderMode=cv2.BORDER_REPLICATE) for p in frame]
  return np.stack(planes), Move(np.eye(3), move.R.T @ move.t), back


def outside(px: np.ndarray, back: np.ndarray, height: int, width: int) -> np.ndarray:
  """(..., 2) pixels -> (...) bool: `back` (3, 3) puts them beside a picture of height x width."""
  p = px @ back[:, :2].T + back[:, 2]
  with np.errstate(invalid="ignore", divide="ignore"):
    x, y = p[..., 0] / p[..., 2], p[..., 1] / p[..., 2]
    return ~((p[..., 2] > 0) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1))


def from_flow(
  grid: Grid, flow: np.ndarray, missed: np.ndarray, move: Move, still: np.ndarray, tensor: np.ndarray
) -> tuple[Inverse, Move]:
  """flow (h, w, 2) pixels from each cell to an earlier picture, missed (h, w) pixels by which the way back misses its
  start, nan outside; move: the log's; still (h, w) bool: what no detector holds for something that moves; tensor: of
  texture(). -> inverse depth of what stands still, and the move as this flow put it right."""
  rays, there = grid.rays.reshape(-1, 3), rays_of((grid.px + flow).reshape(-1, 2), grid.intrinsics)
  length = np.linalg.norm(flow, axis=-1).ravel()
  miss = missed.ravel()
  with np.errstate(invalid="ignore"):
    good = (miss < MAX_BACK + FLOW_STD * length) & still.ravel()
  line = away(rays, move)  # along which alone depth shows
  slope = np.sqrt(np.maximum(np.einsum("ni,nij,nj->n", line, tensor.reshape(-1, 2, 2), line), 1e-9))
  blank = BRIGHT_STD / slope  # pixels by which brightness leaves flow free
  fit = np.zeros(grid.shape, bool)
  fit[::FIT_STEP, ::FIT_STEP] = True
  fit = fit.ravel() & good & (blank < BLANK)
  spread = PIXEL_STD
  if fit.sum() >= LEAST // FIT_STEP:
    move, spread = refine(rays[fit], there[fit], move, grid.focal)
  out = Inverse.nothing(grid.shape)
  rho = triangulate(rays, there, move)
  off = grid.focal * np.abs(off_line(rays, there, move))
  own = np.hypot(0.5 * np.nan_to_num(miss, nan=np.inf), blank)
  noise = np.sqrt(max(PIXEL_STD, spread) ** 2 + own**2 + (FLOW_STD * length) ** 2)
  off_std = np.sqrt(max(PIXEL_STD, spread) ** 2 + (FLOW_STD * length) ** 2)
  good &= off < OFF * off_std
  with np.errstate(divide="ignore", invalid="ignore"):
    std = np.hypot(noise / grid.focal / motion_per_rho(rays, rho, move), SPEED_STD * rho)
  good &= np.isfinite(std) & (rho > -3 * std)
  out.rho[:] = rho.reshape(grid.shape)
  out.std.ravel()[good] = std[good]
  out.std[ends(out)] = np.inf
  out.std[too_far(grid, out)] = np.inf
  return out, move


def ends(x: Inverse) -> np.ndarray:
  """(h, w) bool: within REACH cells inverse depth bends by END of itself, and more than its error: a surface ends, and
  flow is smeared over the step."""
  rho = np.where(np.isfinite(x.std), x.rho, np.nan)
  out, k = np.zeros(rho.shape, bool), REACH
  with np.errstate(invalid="ignore"):
    for a, to in ((rho, out), (rho.T, out.T)):
      to[k:-k] |= np.abs(a[2 * k :] + a[: -2 * k] - 2 * a[k:-k]) > END * np.abs(a[k:-k])
    out &= ~(np.abs(rho) < x.std)  # nothing but error there
  return cv2.dilate(out.astype(np.uint8), np.ones((2 * k + 1, 2 * k + 1), np.uint8)) > 0


def too_far(grid: Grid, x: Inverse) -> np.ndarray:
  """(h, w) bool: below the horizon and farther than the road that would be seen there: something drives as fast as the
  car itself, and hardly moves in the picture."""
  with np.errstate(invalid="ignore"):
    return (grid.level > 2 * PITCH_STD / grid.height) & (x.rho + x.std < grid.level / BELOW)


def from_plane(grid: Grid, road: np.ndarray, flow: Inverse) -> tuple[Inverse, float]:
  """road (h, w) bool: where a segmentation sees it. -> its plane's inverse depth, with the pitch against the
  calibration that flow found on it; and that pitch, rad, 0 where it did not."""
  sure = road & np.isfinite(flow.std) & (flow.rho > 1 / PITCH_FAR) & (flow.std < 0.15 * flow.rho)
  pitch, std = 0.0, PITCH_STD
  if sure.sum() >= LEAST:
    each = grid.height * flow.rho[sure] - grid.level[sure] * grid.height
    weight = 1 / flow.std[sure] ** 2
    order = np.argsort(each, kind="stable")
    half = np.cumsum(weight[order])
    pitch = float(np.clip(each[order][np.searchsorted(half, half[-1] / 2)], -MAX_PITCH, MAX_PITCH))
    std = FITTED_STD
  rho = grid.level + pitch / grid.height
  out = Inverse.nothing(grid.shape)
  out.rho[:] = rho
  good = road & (rho > 2 * std / grid.height)
  out.std[good] = np.hypot(std / grid.height, HEIGHT_STD * rho[good])
  return out, pitch


def put_lead(x: Inverse, grid: Grid, boxes: np.ndarray, ahead: float, right: float, camera: np.ndarray) -> bool:
  """Radar's lead, m ahead of the camera and to the right: the middle of the one of boxes (N, 4) that it lies in gets
  its distance. camera (3, 3): from the calibrated frame. -> whether there is such a box."""
  point = camera @ np.array([ahead, right, 0.5 * grid.height])  # half-way up to the camera
  if point[2] < 1:
    return False
  u, v = (grid.intrinsics @ (point / point[2]))[:2]
  near = (boxes[:, 0] <= u) & (u <= boxes[:, 2]) & (boxes[:, 1] <= v) & (v <= boxes[:, 3])
  if not near.any():
    return False
  size = np.prod(boxes[near, 2:] - boxes[near, :2], axis=1)
  x0, y0, x1, y1 = boxes[near][np.argmin(size)]
  # its middle: beside and below it the box shows what is behind
  inner = (np.abs(grid.px[..., 0] - (x0 + x1) / 2) < 0.25 * (x1 - x0)) & (
    np.abs(grid.px[..., 1] - (y0 + y1) / 2) < 0.25 * (y1 - y0)
  )
  x.rho[inner], x.std[inner] = 1 / point[2], (0.03 + 0.6 / point[2]) / point[2]
  return True


def together(a: Inverse, b: Inverse) -> Inverse:
  """Weighed by their variances where both speak; nothing where they contradict each other."""
  both = np.isfinite(a.std) & np.isfinite(b.std)
  with np.errstate(invalid="ignore", divide="ignore"):
    wa, wb = 1 / a.std**2, 1 / b.std**2
    rho = np.where(both, (a.rho * wa + b.rho * wb) / (wa + wb), np.where(np.isfinite(a.std), a.rho, b.rho))
    std = 1 / np.sqrt(wa + wb)
    apart = both & (np.abs(a.rho - b.rho) > APART * np.hypot(a.std, b.std))
  std[apart] = np.inf
  return Inverse(rho, std)


def sampled(field: np.ndarray, px: np.ndarray) -> np.ndarray:
  """(2, H, W) float32 and (..., 2) pixels -> (..., 2) float64, bilinear, nan outside."""
  x, y = px[..., 0].astype(np.float32), px[..., 1].astype(np.float32)
  parts = [cv2.remap(f, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=np.nan) for f in field]
  return np.stack(parts, axis=-1).astype(np.float64)
