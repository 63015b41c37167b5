"""Distilling feature maps: the teacher's features standardised, the student's projected to their width, and the losses
between the two."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from openpilot.tools.fair.distillation.losses import masked_mean, no_autocast, wide


def shrink_valid(valid: Tensor, height: int, width: int) -> Tensor:
  """(B, H, W) bool to (B, height, width) bool, coarser or equal: a cell is valid where every pixel it touches is."""
  if valid.shape[1:] == (height, width):
    return valid
  return F.adaptive_max_pool2d((~valid)[:, None].float(), (height, width))[:, 0] == 0


# PHI-S


def is_prime(n: int) -> bool:
  return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def paley(q: int) -> Tensor:
  """The Jacobsthal matrix (q, q) float64 of an odd prime q: entry (i, j) is 0 where i = j, else 1 where i - j is a
  square modulo q, else -1."""
  character = torch.full((q,), -1.0, dtype=torch.float64)
  character[[k * k % q for k in range(1, q)]] = 1.0
  character[0] = 0.0
  i = torch.arange(q)
  return character[(i[:, None] - i) % q]


def hadamard(n: int) -> Tensor | None:
  """An (n, n) float64 matrix of 1 and -1 with orthogonal rows: Sylvester's doubling of 1 or of a Paley matrix; None
  where these know none of order n."""
  if n == 1:
    return torch.ones(1, 1, dtype=torch.float64)
  if n % 4 == 0 and is_prime(n - 1):  # Paley I: n - 1 = 3 modulo 4
    h = torch.ones(n, n, dtype=torch.float64)
    h[1:, 1:] = paley(n - 1) + torch.eye(n - 1, dtype=torch.float64)
    h[1:, 0] = -1
    return h
  if n % 4 == 0 and (n // 2 - 1) % 4 == 1 and is_prime(n // 2 - 1):  # Paley II: n / 2 - 1 = 1 modulo 4
    s = torch.ones(n // 2, n // 2, dtype=torch.float64)
    s[0, 0] = 0
    s[1:, 1:] = paley(n // 2 - 1)
    one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    return torch.kron(s, one) + torch.kron(
      torch.eye(n // 2, dtype=torch.float64), torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    )
  half = hadamard(n // 2) if n % 2 == 0 else None
  return None if half is None else torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def equalise(variances: Tensor) -> Tensor:
  """An orthogonal (n, n) R with diag(R diag(variances) R^T) all equal to their mean, for any n and spectrum: n - 1
  plane rotations (Schur and Horn).

  Each turns the largest and the smallest of what is left until one of the two is the mean; those left stay uncorrelated
  among themselves."""
  n = len(variances)
  v, rotation, mean = variances.double().clone(), torch.eye(n, dtype=torch.float64), variances.double().mean()
  left = list(range(n))
  for _ in range(n - 1):
    i, j = min(left, key=lambda k: v[k]), max(left, key=lambda k: v[k])
    spread = v[j] - v[i]
    if spread <= 1e-15 * v[j].abs():
      break
    s2 = ((mean - v[i]) / spread).clamp(0, 1)
    c, s = torch.sqrt(1 - s2), torch.sqrt(s2)
    rotation[[i, j]] = torch.stack([c * rotation[i] + s * rotation[j], c * rotation[j] - s * rotation[i]])
    v[j] = v[i] + v[j] - mean
    v[i] = mean
    left.remove(i)
  return rotation


class Standardiser(nn.Module):
  """PHI-S (Ranzinger et al. 2024, arXiv 2410.01680): y = R (x - mean) / scale, which gives every channel of a teacher
  the same variance, 1, with one scalar.

  R = H U^T: U are the principal axes of the covariance, H an orthonormal Hadamard matrix, whose entries all have the
  square 1 / C, so that each output channel has the same share of every eigenvalue; scale is the root of the mean
  eigenvalue. A rotation and one scalar keep the geometry: errors in y are errors in x, over scale. Widths of no known
  Hadamard matrix (those not 1, 2 or a multiple of 4, and a few others; DINO's 384, 768, 1024, 1280 and 1536 have one)
  get rotations made for their eigenvalues instead (see equalise): the same property, exactly, of the features fitted.

  Fit: update() with every batch, then finish(). The state_dict holds the fit; load it into Standardiser(channels) of
  the same width."""

  mean: Tensor
  rotation: Tensor
  scale: Tensor

  def __init__(self, channels: int, dtype: torch.dtype = torch.float32):
    super().__init__()
    self.channels = channels
    self.count = 0
    self.sums = torch.zeros(
      channels, dtype=torch.float64
    )  # running mean and moment are on the CPU, in float64, and not part of the state
    self.moment = torch.zeros(channels, channels, dtype=torch.float64)
    self.register_buffer("mean", torch.zeros(channels, dtype=dtype))
    self.register_buffer("rotation", torch.eye(channels, dtype=dtype))
    self.register_buffer("scale", torch.zeros((), dtype=dtype))  # 0: not fitted

  @torch.no_grad()
  def update(self, features: Tensor, valid: Tensor | None = None) -> None:
    """Adds features (B, C, h, w), where valid ((B, H, W) bool at their size or finer) says so; one pass, by Chan's
    update of mean and covariance."""
    x = features.detach().movedim(1, -1)
    x = x.reshape(-1, self.channels) if valid is None else x[shrink_valid(valid, *features.shape[2:]).to(x.device)]
    x = x.to("cpu", torch.float64)
    n = len(x)
    if n == 0:
      return
    mean = x.mean(0)
    delta, total = mean - self.sums, self.count + n
    x = x - mean
    self.moment += x.T @ x + torch.outer(delta, delta) * (self.count * n / total)
    self.sums += delta * (n / total)
    self.count = total

  @torch.no_grad()
  def finish(self) -> None:
    """Sets mean, rotation and scale from what update() has seen. ValueError: fewer than two vectors, features that are
    constant or not finite."""
    if self.count < 2:
      raise ValueError(f"standardising needs at least 2 feature vectors, got {self.count}")
    covariance = self.moment / self.count
    mean_variance = covariance.diagonal().mean()
    if not torch.isfinite(covariance).all() or mean_variance <= 0:
      raise ValueError(f"the teacher's features cannot be standardised: their mean variance is {mean_variance:.3g}")
    eigenvalues, axes = torch.linalg.eigh(covariance)
    h = hadamard(self.channels)
    turn = equalise(eigenvalues.clamp(min=0)) if h is None else h / math.sqrt(self.channels)
    self.mean.copy_(self.sums)
    self.rotation.copy_(turn @ axes.T)
    self.scale.copy_(mean_variance.sqrt())

  def check(self) -> None:
    if self.scale == 0:
      raise RuntimeError("this Standardiser is not fitted: update() it with features and finish(), or load its state")

  def forward(self, features: Tensor) -> Tensor:
    """(B, C, h, w) the teacher's features -> (B, C, h, w) standardised. RuntimeError: not fitted."""
    self.check()
    centered = features.to(self.mean.dtype) - self.mean[:, None, None]
    with no_autocast(centered):
      return torch.einsum("dc,bchw->bdhw", self.rotation, centered) / self.scale

  def inverse(self, standardised: Tensor) -> Tensor:
    """(B, C, h, w) standardised -> (B, C, h, w) as the teacher gives them. RuntimeError: not fitted."""
    self.check()
    with no_autocast(standardised):
      return (
        torch.einsum("dc,bdhw->bchw", self.rotation, standardised.to(self.mean.dtype)) * self.scale
        + self.mean[:, None, None]
      )


# the student's side


class Projector(nn.Module):
  """From the student's features to the teacher's width, while training only: a 1x1 convolution, or with hidden > 0 two,
  with GELU between (Theia, RADIO)."""

  def __init__(self, channels: int, teacher_channels: int, hidden: int = 0):
    super().__init__()
    layers = (
      [nn.Conv2d(channels, hidden, 1), nn.GELU(), nn.Conv2d(hidden, teacher_channels, 1)]
      if hidden
      else [nn.Conv2d(channels, teacher_channels, 1)]
    )
    self.layers = nn.Sequential(*layers)

  def forward(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """(B, F, h, w) -> (B, teacher_channels, *size): resized to the teacher's grid, bilinearly between cell centers,
    before it is projected."""
    if size is not None and features.shape[2:] != tuple(size):
      features = F.interpolate(features, size, mode="bilinear", align_corners=False)
    return self.layers(features)


def unit(x: Tensor) -> Tensor:
  """The last dimension as unit vectors; near 0 (against 0.001) they fade to 0, so that gradients stay finite."""
  return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def feature_loss(projected: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
  """0.9 (1 - cosine) + 0.1 smooth-L1 (beta 1), both the mean over valid cells, the latter over channels, too (Theia,
  Shang et al. 2024).

  projected, teacher: (B, C, h, w), the teacher's standardised.  valid: (B, H, W) bool at their size or finer: a cell
      counts where all its pixels do.
  """
  known = shrink_valid(valid, *teacher.shape[2:])
  p = wide(projected)
  t = torch.where(known[:, None], wide(teacher).detach().to(p.dtype), 0.0)
  norms = torch.sqrt(((p * p).sum(1) + 1e-6) * ((t * t).sum(1) + 1e-6))  # as in unit(), with fewer passes
  cosine = 1 - (p * t).sum(1) / norms
  smooth = F.smooth_l1_loss(p, t, reduction="none").mean(1)
  return masked_mean(0.9 * cosine + 0.1 * smooth, known.to(p.dtype))


def gram_loss(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 0.07) -> Tensor:
  """How alike the tokens of an image are, distilled: KL(teacher || student) of the softmax over tokens of cosine /
  temperature, the mean over tokens.

  student: (B, F, h, w), teacher: (B, C, h, w), any two widths; of another grid, the student's is resized to the
      teacher's.  valid: as of feature_loss.
  A token's likeness to itself, always 1, is left out: at this temperature it would be most of the distribution. Invalid
    tokens are neither rows nor
  columns. Costs B (h w)^2 memory: grids up to about 32x32."""
  student, teacher = wide(student), wide(teacher).detach()
  if student.shape[2:] != teacher.shape[2:]:
    student = F.interpolate(student, teacher.shape[2:], mode="bilinear", align_corners=False)
  known = shrink_valid(valid, *teacher.shape[2:]).flatten(1)  # (B, n)
  # large negative numbers, not -inf, which would make NaN of rows that have no other token
  left_out = (torch.eye(known.shape[1], dtype=torch.bool, device=known.device) | ~known[:, None]).to(
    student.dtype
  ) * -1e4  # (B, n, n)

  def log_likeness(x: Tensor) -> Tensor:
    x = unit(x.flatten(2).transpose(1, 2)) / math.sqrt(temperature)
    with no_autocast(x):
      return F.log_softmax(torch.baddbmm(left_out.to(x.dtype), x, x.transpose(1, 2)), -1)

  teacher = torch.where(known.reshape(len(known), 1, *teacher.shape[2:]), teacher, 0.0)
  log_p, log_q = log_likeness(teacher).to(student.dtype), log_likeness(student)
  p = log_p.exp()
  rows = known & (known.sum(1, keepdim=True) > 1)
  return masked_mean((p * log_p).sum(-1) - (p * log_q).sum(-1), rows.to(student.dtype))
