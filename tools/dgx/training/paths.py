"""The path that the car really drove, as the driving model predicts it: velocities and turn rates of the log,
integrated over the next ten seconds.

All in the calibrated frame of the device: x forward, y right, z down; meters, seconds, radians."""

import numpy as np

from openpilot.common.transformations.orientation import euler_from_rot
from openpilot.tools.dgx.training.constants import IDX_N, PLAN_WIDTH, T_IDXS

STEP = 0.02  # s, of the integration
MAX_GAP = 1.0  # s between samples; over a longer gap nothing is integrated
ACCELERATION_WINDOW = 0.25  # s, either way: a log at 5 Hz gives no finer


def rodrigues(phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(..., 3) rotation vectors -> (..., 3, 3) the rotations, and the integrals of Exp(s * phi) over s from 0 to 1, which
  carry a turning velocity along."""
  a = np.linalg.norm(phi, axis=-1)[..., None, None]
  k = np.zeros((*phi.shape, 3))
  k[..., 0, 1], k[..., 0, 2], k[..., 1, 2] = -phi[..., 2], phi[..., 1], -phi[..., 0]
  k[..., 1, 0], k[..., 2, 0], k[..., 2, 1] = phi[..., 2], -phi[..., 1], phi[..., 0]
  small = a < 1e-3
  b = np.where(small, 1.0, a)
  sine = np.where(small, 1 - a**2 / 6, np.sin(b) / b)
  cosine = np.where(small, 0.5 - a**2 / 24, (1 - np.cos(b)) / b**2)
  rest = np.where(small, 1 / 6 - a**2 / 120, (b - np.sin(b)) / b**3)
  kk, eye = k @ k, np.eye(3)
  return eye + sine * k + cosine * kk, eye + cosine * k + rest * kk


class DrivenPath:
  """times: (N,) s, ascending; velocity, rates: (N, 3) in the calibrated frame at those times. Between samples both are
  linear."""

  def __init__(self, times: np.ndarray, velocity: np.ndarray, rates: np.ndarray, max_gap: float = MAX_GAP):
    times, first = np.unique(np.asarray(times, np.float64), return_index=True)
    self.times, self.velocity, self.rates = (
      times,
      np.asarray(velocity, np.float64)[first],
      np.asarray(rates, np.float64)[first],
    )
    if len(times) < 2:
      return
    self.gap = np.diff(times) > max_gap
    self.gaps = np.concatenate([[0], np.cumsum(self.gap)])  # before each sample
    n = max(1, int(np.ceil((times[-1] - times[0]) / STEP)))
    self.grid = np.linspace(times[0], times[-1], n + 1)
    middle = (self.grid[1:] + self.grid[:-1]) / 2
    self.v_cell, self.w_cell = self._interp(middle, self.velocity), self._interp(middle, self.rates)
    dt = self.grid[1] - self.grid[0]
    turns, carries = rodrigues(self.w_cell * dt)
    steps = np.einsum("nij,nj->ni", carries, self.v_cell) * dt
    self.r, self.p = np.empty((n + 1, 3, 3)), np.empty((n + 1, 3))
    r, p = np.eye(3), np.zeros(3)
    self.r[0], self.p[0] = r, p
    for i in range(n):
      p = p + r @ steps[i]
      r = r @ turns[i]
      self.r[i + 1], self.p[i + 1] = r, p

  def _interp(self, t: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.stack([np.interp(t, self.times, values[:, k]) for k in range(3)], -1)

  def state(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(...,) s -> velocity and rates (..., 3) at t; NaN where the log does not say."""
    t = np.asarray(t, np.float64)
    if len(self.times) < 2:
      return np.full((*t.shape, 3), np.nan), np.full((*t.shape, 3), np.nan)
    known = self.piece(t) >= 0
    return tuple(np.where(known[..., None], self._interp(t, x), np.nan) for x in (self.velocity, self.rates))  # type: ignore[return-value]

  def piece(self, t: np.ndarray) -> np.ndarray:
    """Number of the stretch without gaps that t lies in; -1: in none."""
    i = np.searchsorted(self.times, t, side="right") - 1
    i = np.where(t == self.times[-1], len(self.times) - 2, i)
    inside = (i >= 0) & (i < len(self.gap))
    at = np.clip(i, 0, len(self.gap) - 1)
    return np.where(inside & ~self.gap[at], self.gaps[at], -1)

  def pose(self, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(...,) s -> rotations (..., 3, 3) and positions (..., 3) in the frame at the first sample; meaningful within one
    piece."""
    i = np.clip(np.searchsorted(self.grid, t, side="right") - 1, 0, len(self.v_cell) - 1)
    d = (np.clip(t, self.grid[0], self.grid[-1]) - self.grid[i])[..., None]
    turn, carry = rodrigues(self.w_cell[i] * d)
    return self.r[i] @ turn, self.p[i] + np.einsum("...ij,...jk,...k->...i", self.r[i], carry, self.v_cell[i] * d)

  def plan(self, t0: np.ndarray) -> np.ndarray:
    """(M,) s -> (M, 33, 15) float32 at T_IDXS after each: position, velocity and acceleration in the calibrated frame
    at t0, euler angles of the frame then in the frame at t0, turn rates in the frame then. NaN where the log has no
    future that is joined to t0 without a gap."""
    t0 = np.asarray(t0, np.float64)
    out = np.full((len(t0), IDX_N, PLAN_WIDTH), np.nan, np.float32)
    if len(self.times) < 2 or not len(t0):
      return out
    t = t0[:, None] + np.asarray(T_IDXS)
    piece = self.piece(t)
    known = (piece == self.piece(t0)[:, None]) & (piece >= 0)
    r0, p0 = self.pose(t0)
    back = np.swapaxes(r0, -1, -2)[:, None]
    r, p = self.pose(t)
    position = (back @ (p - p0[:, None])[..., None])[..., 0]
    velocity = (back @ r @ self._interp(t, self.velocity)[..., None])[..., 0]
    # differences of the velocity in a frame that does not turn; one-sided where a piece ends
    a, b = self._within(t - ACCELERATION_WINDOW, t), self._within(t + ACCELERATION_WINDOW, t)
    change = self._fixed_velocity(b) - self._fixed_velocity(a)
    acceleration = (back @ (change / np.maximum(b - a, 1e-6)[..., None])[..., None])[..., 0]
    euler = euler_from_rot(back @ r)
    values = np.concatenate([position, velocity, acceleration, euler, self._interp(t, self.rates)], -1)
    out[known] = values[known]
    return out

  def _within(self, t: np.ndarray, near: np.ndarray) -> np.ndarray:
    """t, or `near` where t lies in another piece."""
    t = np.clip(t, self.times[0], self.times[-1])
    return np.where(self.piece(t) == self.piece(near), t, near)

  def _fixed_velocity(self, t: np.ndarray) -> np.ndarray:
    return (self.pose(t)[0] @ self._interp(t, self.velocity)[..., None])[..., 0]


def position_at(plan: np.ndarray, seconds: float) -> np.ndarray:
  """(..., 33, 15) -> (..., 2): x, y after so many seconds, linear between T_IDXS."""
  k = int(np.searchsorted(T_IDXS, seconds, side="right")) - 1
  share = (seconds - T_IDXS[k]) / (T_IDXS[k + 1] - T_IDXS[k])
  return (1 - share) * plan[..., k, :2] + share * plan[..., k + 1, :2]


def path_error(plan: np.ndarray, driven: np.ndarray, seconds: float) -> np.ndarray:
  """(..., 33, 15) each -> (...,) meters between them after so many seconds; NaN where the drive's is not known."""
  return np.linalg.norm(position_at(plan, seconds) - position_at(driven, seconds), axis=-1)


def constant_curvature(pose: np.ndarray) -> np.ndarray:
  """(..., 6) velocity and turn rates of the moment -> (..., 33, 15), of which x and y are filled: what no network is
  needed for. 0 elsewhere."""
  t = np.asarray(T_IDXS)
  v, w = pose[..., :1].astype(np.float64), pose[..., 5:6].astype(np.float64)
  a = w * t
  out = np.zeros((*pose.shape[:-1], IDX_N, PLAN_WIDTH))
  out[..., 0] = v * t * np.sinc(a / np.pi)
  out[..., 1] = v * t * np.sinc(a / 2 / np.pi) * np.sin(a / 2)
  return out
