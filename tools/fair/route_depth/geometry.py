"""Depth from how far the picture of a point moved while the camera moved a known way. All in float64.

Camera frames: x right, y down, z along the optical axis, meters. A Move takes a point of the labeled frame to an
earlier one's: X' = R X + t. The earlier picture is asked, not a later one: driving forward, all that is seen now was
seen then, nearer to the middle. Inverse depth rho = 1 / z, since its error is nearly Gaussian, and on a plane's picture
it is linear in the pixel."""

from dataclasses import dataclass

import cv2
import numpy as np

ROT_STD, DIR_STD = 0.002, 0.01  # rad: of the log's turn between two frames, and of the direction of its way
PIXEL_STD = 0.5  # of flow, pixels, at its best
STEPS = 4  # of Gauss-Newton
WITNESSES = 100  # that all points together are: of neighbors flow errs alike
MOST = 3.0  # standard deviations of the log's move that flow may change


@dataclass(frozen=True)
class Move:
  """R (3, 3), t (3,) m: X' = R X + t."""

  R: np.ndarray
  t: np.ndarray


def rays_of(px: np.ndarray, intrinsics: np.ndarray) -> np.ndarray:
  """(..., 2) pixels -> (..., 3) directions with z = 1."""
  k = np.linalg.inv(intrinsics)
  return px @ k[:, :2].T + k[:, 2]


def triangulate(rays: np.ndarray, there: np.ndarray, move: Move) -> np.ndarray:
  """rays (N, 3) of points in the labeled frame, there (N, 3) in the earlier one, both with z = 1 -> (N,) inverse depth,
  1/m, that fits both axes best; negative where they part behind the camera."""
  a = rays @ move.R.T
  c = there[:, :2] * move.t[2] - move.t[:2]
  d = a[:, :2] - there[:, :2] * a[:, 2:]
  return (c * d).sum(axis=1) / np.maximum((c * c).sum(axis=1), 1e-12)


def motion_per_rho(rays: np.ndarray, rho: np.ndarray, move: Move) -> np.ndarray:
  """(N,) how far a point moves in the earlier camera's plane z = 1 for each 1/m of inverse depth."""
  a = rays @ move.R.T
  w = a[:, 2] + rho * move.t[2]
  return np.linalg.norm(move.t[:2] * a[:, 2:] - move.t[2] * a[:, :2], axis=1) / (w * w)


def away(rays: np.ndarray, move: Move) -> np.ndarray:
  """(N, 2) unit vectors: the line on which each ray's point lies for every depth, in the labeled frame's picture: away
  from where the camera drives to."""
  back = move.R.T @ move.t
  line = rays[:, :2] * back[2] - back[:2]
  return line / np.maximum(np.linalg.norm(line, axis=1, keepdims=True), 1e-12)


def essential(move: Move) -> np.ndarray:
  """(3, 3): x'^T E x = 0 of a point's directions in the earlier frame and in the labeled one."""
  x, y, z = move.t
  return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ move.R


def off_line(rays: np.ndarray, there: np.ndarray, move: Move) -> np.ndarray:
  """(N,) Sampson distance from what a still world allows, in units of the plane z = 1."""
  e = essential(move)
  right, left = rays @ e.T, there @ e
  norm = np.sqrt((right[:, :2] ** 2).sum(axis=1) + (left[:, :2] ** 2).sum(axis=1))
  return (there * right).sum(axis=1) / np.maximum(norm, 1e-12)


def moved(move: Move, change: np.ndarray) -> Move:
  """change (5,): a rotation vector, rad, and two components of the direction of t, which keeps its length."""
  length = float(np.linalg.norm(move.t))
  # two directions across t
  across = np.linalg.svd(move.t[None] / length)[2][1:]
  t = move.t / length + change[3:] @ across
  return Move(cv2.Rodrigues(change[:3])[0] @ move.R, t * (length / np.linalg.norm(t)))


def refine(rays: np.ndarray, there: np.ndarray, move: Move, focal: float) -> tuple[Move, float]:
  """The log's move, put right by the flow of a still world: turn and direction of the way, not its length, which a
  picture does not tell. The log counts as much as its standard deviations ROT_STD and DIR_STD say; what moves by
  itself is outvoted (Cauchy's weights). -> the move, and the spread of the points about their lines, pixels. Where flow
  wants what the log rules out it is flow that is wrong: then the log's own move."""
  prior = np.array([ROT_STD] * 3 + [DIR_STD] * 2)
  change = np.zeros(5)
  h = 1e-6
  for _ in range(STEPS):
    now = moved(move, change)
    e = focal * off_line(rays, there, now)
    spread = max(PIXEL_STD, 1.48 * float(np.median(np.abs(e))))
    weight = 1 / (spread**2 + e * e)
    jacobian = np.stack(
      [(focal * off_line(rays, there, moved(move, change + h * step)) - e) / h for step in np.eye(5)], axis=1
    )
    # of neighbors flow errs alike: a hundred points are one witness of each kind
    share = min(1.0, WITNESSES / len(e))
    normal = share * (jacobian * weight[:, None]).T @ jacobian + np.diag(1 / prior**2)
    change = change - np.linalg.solve(normal, share * (jacobian * weight[:, None]).T @ e + change / prior**2)
  now = moved(move, change) if (np.abs(change) < MOST * prior).all() else move
  return now, 1.48 * float(np.median(np.abs(focal * off_line(rays, there, now))))


def plane(rays: np.ndarray, down: np.ndarray, height: float) -> np.ndarray:
  """(N,) inverse depth of the road: the plane at `height`, m, along down (3,); 0 and less at and above the horizon."""
  return rays @ down / height
