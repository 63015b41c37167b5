"""Losses of single heads, and how they are summed. A loss of several parts gives a dict of scalars, already weighted:
sum(parts.values()) is the loss.

All compute in the dtype given (half precision in float32, under autocast, too), skip what is not known, and are 0 with
zero gradients where nothing is known. Label tensors carry no gradient. Boxes and objects are in matching.py, features
in features.py."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# probability: below it a float16 that was averaged to a smaller map says nothing, and at a high temperature that would
# count
LEAST = 1e-4
LOG_NEAR, LOG_FAR = (
  -3.0,
  9.0,
)  # log meters, 5 cm and 8 km: beyond them inverse depth is flat, so that its gradients stay finite


def wide(x: Tensor) -> Tensor:
  """Half precision as float32; all else as it is."""
  return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(x: Tensor) -> torch.autocast:
  """Products of matrices stay in the dtype of their factors here, whatever the trainer's autocast says."""
  return torch.autocast(x.device.type, enabled=False)


def masked_mean(x: Tensor, weight: Tensor) -> Tensor:
  """Sum of x * weight over the sum of weight (numbers or bool, of x's shape), scalar; 0 where the weights sum to 0. x
  must be finite everywhere."""
  total = weight.sum()
  return (x * weight).sum() / torch.where(total > 0, total, torch.ones_like(total))


def dice(overlap: Tensor, sizes: Tensor) -> Tensor:
  """1 - (2 overlap + 1) / (sizes + 1): 0 where two masks are the same, smoothed by one pixel (Milletari et al. 2016,
  DETR). overlap: sum of q t;
  sizes: sum q + sum t, or of their squares, with which soft masks are best where they are equal."""
  return 1 - (2 * overlap + 1) / (sizes + 1)


# soft labels


def soft_label_loss(
  student_logits: Tensor,
  teacher_logits: Tensor,
  targets: Tensor,
  temperature: float = 4.0,
  alpha: float = 0.7,
  ignore: int = 255,
  hard: Tensor | None = None,
) -> Tensor:
  """Hinton et al. 2015: alpha T^2 KL(teacher || student) at temperature T, plus (1 - alpha) cross-entropy with the hard
  targets, or `hard`, the task's own loss of them.

  student_logits, teacher_logits: (..., C), or maps (B, C, H, W): the classes are the last dimension, of a 4-D tensor
  dimension 1.
  targets: int64, the shape without the classes; where it is `ignore` neither term counts. KL is 'batchmean': summed
  over classes, the mean over positions."""
  student, teacher = wide(student_logits), wide(teacher_logits).detach()
  if student.ndim == 4:
    student, teacher = student.movedim(1, -1), teacher.movedim(1, -1)
  known = targets != ignore
  student, teacher, targets = student[known], teacher[known], targets[known]
  n = max(len(targets), 1)
  log_q = F.log_softmax(student / temperature, -1)
  log_p = F.log_softmax(teacher / temperature, -1)
  soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / n * temperature**2
  if hard is None:
    hard = F.cross_entropy(student, targets, reduction="sum") / n
  return alpha * soft + (1 - alpha) * hard


def segmentation_loss(logits: Tensor, probabilities: Tensor, valid: Tensor, weights: Tensor | None = None) -> Tensor:
  """Cross-entropy with a teacher's probabilities plus soft Dice (Milletari et al. 2016, squares in the denominator:
  least at q = p for soft p, too).

  logits, probabilities: (B, C, H, W); an all-zero vector is an unknown pixel.  valid: (B, H, W) bool.  weights: (C,) of
      the classes.
  Cross-entropy is the mean over known pixels, weighted by class (sum of w p); Dice is taken per class over the whole
    batch, smoothed by one pixel, its
  mean over classes weighted alike, over those the teacher sees at all."""
  logits = wide(logits)
  p = probabilities.detach().to(logits.dtype)
  known = (valid & (p.sum(1) > 0))[:, None]
  p = torch.where(known, p, 0.0)
  w = torch.ones(p.shape[1], dtype=p.dtype, device=p.device) if weights is None else weights.to(p)
  log_q = F.log_softmax(logits, 1)
  q = log_q.exp() * known
  sums = p.sum((0, 2, 3))  # (C,)
  mass = (w * sums).sum()
  cross_entropy = -(w * (p * log_q).sum((0, 2, 3))).sum() / torch.where(mass > 0, mass, torch.ones_like(mass))
  apart = dice((p * q).sum((0, 2, 3)), (p * p).sum((0, 2, 3)) + (q * q).sum((0, 2, 3)))
  return cross_entropy + masked_mean(apart, w * (sums > 0))


def soft_segmentation_loss(
  logits: Tensor, probabilities: Tensor, valid: Tensor, weights: Tensor | None = None
) -> Tensor:
  """soft_label_loss() of a teacher's probabilities, with segmentation_loss() of the class that it holds for the
  likeliest as the hard part. Arguments as there.

  Classes that a teacher does not name are to be merged before, in both: the temperature then flattens two distributions
  over the same classes."""
  p = probabilities.detach().to(wide(logits).dtype)
  likeliest = p.argmax(1)
  known = p.sum(1) > 0
  one_hot = F.one_hot(likeliest, p.shape[1]).movedim(-1, 1).to(p) * known[:, None]
  hard = segmentation_loss(logits, one_hot, valid, weights)
  return soft_label_loss(logits, p.clamp(min=LEAST).log(), torch.where(valid & known, likeliest, 255), hard=hard)


# depth


def median_scaled(x: Tensor, known: Tensor, floor: float = 0.0) -> Tensor:
  """(B, n) minus its median, over its mean absolute deviation from it, per row over known (B, n) bool (Ranftl et al.
  2022, MiDaS, equation 5).

  floor: the least deviation, as a part of |median|, so that a constant row has bounded gradients. Unknown entries come
  back 0."""
  x = torch.where(known, x, torch.nan)
  median = x.nanmedian(1, keepdim=True).values
  x = torch.where(known, x - median, 0.0)
  deviation = x.abs().sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
  least = (floor * median.abs()).detach().clamp(min=1e-12)
  return x / torch.where(deviation > least, deviation, least.nan_to_num(1.0))


def gradient_matching(difference: Tensor, known: Tensor, scales: int = 4) -> Tensor:
  """(B,): the sum over scales (every pixel, every 2nd, 4th, 8th) of the mean of |d/dx| + |d/dy| of (B, H, W)
  difference, over the scale's known pixels.

  A step counts where both its pixels are known (MiDaS, equation 11; Li and Snavely 2018)."""
  total = difference.new_zeros(len(difference))
  for i in range(scales):
    d, k = difference[:, :: 2**i, :: 2**i], known[:, :: 2**i, :: 2**i]
    dx, kx = (d[:, :, 1:] - d[:, :, :-1]).abs(), k[:, :, 1:] & k[:, :, :-1]
    dy, ky = (d[:, 1:] - d[:, :-1]).abs(), k[:, 1:] & k[:, :-1]
    total = total + ((dx * kx).sum((1, 2)) + (dy * ky).sum((1, 2))) / k.sum((1, 2)).clamp(min=1)
  return total


def depth_loss(log_depth: Tensor, depth: Tensor, valid: Tensor, metric: bool = True) -> dict[str, Tensor]:
  """Distils depth; each part is a mean over the images that know any depth, of means over their known pixels.

  log_depth: (B, 1, H, W), natural log of meters.  depth: (B, H, W); metric: meters, unknown where not finite or <= 0;
  else a relative teacher's inverse depth of unknown scale and shift (larger is nearer), unknown where not finite.
      valid: (B, H, W) bool.
  Parts: 'invariant', L1 after both inverse depths are shifted by their median and scaled by their mean deviation
    (MiDaS; inverse depth, since that is what
  relative teachers know up to scale and shift), 'gradient', 0.5 times multi-scale gradient matching of the same; for
    metric teachers also
  'silog', sqrt(mean g^2 - 0.85 mean(g)^2) of g = log ratio (Eigen et al. 2014; Bhat et al. 2021), and 'metric', L1 in
    log meters.
  """
  log_depth = wide(log_depth)[:, 0]
  depth = depth.to(log_depth.dtype)
  known = valid & torch.isfinite(depth) & ((depth > 0) if metric else torch.ones_like(valid))
  depth = torch.where(known, depth, 1.0)
  images = known.flatten(1).any(1).to(log_depth.dtype)

  prediction = torch.exp(-log_depth.clamp(LOG_NEAR, LOG_FAR))
  target = 1 / depth if metric else depth
  flat = known.flatten(1)
  difference = (
    median_scaled(prediction.flatten(1), flat, floor=0.01) - median_scaled(target.flatten(1), flat)
  ).reshape(known.shape)
  n = known.sum((1, 2)).clamp(min=1)
  parts = {
    "invariant": masked_mean(difference.abs().sum((1, 2)) / n, images),
    "gradient": 0.5 * masked_mean(gradient_matching(difference, known), images),
  }
  if metric:
    g = torch.where(known, log_depth - depth.log(), 0.0)
    mean, square = g.sum((1, 2)) / n, (g * g).sum((1, 2)) / n
    # the root's gradient stays finite, and 0 stays 0
    silog = torch.sqrt((square - 0.85 * mean**2).clamp(min=0) + 1e-8) - 1e-4
    parts |= {"silog": masked_mean(silog, images), "metric": masked_mean(g.abs().sum((1, 2)) / n, images)}
  return parts


# masks


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
  """Focal loss (Lin et al. 2017) of every element, the shape of logits. targets: 0..1, the same shape. alpha: of the
  positives, 1 - alpha of the rest."""
  logits, targets = wide(logits), targets.to(wide(logits).dtype)
  cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
  p = torch.sigmoid(logits)
  wrong = p * (1 - targets) + (1 - p) * targets
  return (alpha * targets + (1 - alpha) * (1 - targets)) * wrong**gamma * cross_entropy


# points


def points_loss(
  pred_points: Tensor,
  visible_logits: Tensor,
  points: Tensor,
  points_visible: Tensor,
  points_known: Tensor,
  reached: Tensor | None = None,
  delta: float = 6.0,
  gamma: float = 0.8,
  occluded: float = 0.2,
) -> dict[str, Tensor]:
  """Huber over the window and binary cross-entropy of visibility (CoTracker, Karaev et al. 2023 and 2024).

  pred_points: (clips, T, N, 2) view px, or (I, clips, T, N, 2) of I refinements: refinement i weighs gamma^(I - 1 - i),
    the weights' mean is taken.
  visible_logits: (clips, T, N), or (I, ...) alike.  points, points_visible (0..1), points_known (bool): the labels;
      unknown points count nowhere.
  reached: (clips, T, N) bool, where the tracker could see the point from where it looked: of one that is lost already
    there is nothing to learn but how
  points usually move, and a guessed motion carries off what is not lost. By itself all.
  Parts: 'points', 0.05 times the mean over known points of the Huber loss (delta px) summed over x and y, hidden points
    weighing `occluded` of
  a visible one, since teachers guess there; 'visible', the mean over known points."""
  pred, logits = wide(pred_points), wide(visible_logits)
  pred = pred if pred.ndim == 5 else pred[None]
  logits = logits if logits.ndim == 4 else logits[None]
  visible = points_visible[points_known].to(pred.dtype)  # (n,)
  huber = F.huber_loss(
    pred[:, points_known], points[points_known].to(pred.dtype).expand(len(pred), -1, -1), reduction="none", delta=delta
  ).sum(-1)
  entropy = F.binary_cross_entropy_with_logits(
    logits[:, points_known], visible.expand(len(logits), -1), reduction="none"
  )
  weight = occluded + (1 - occluded) * visible
  if reached is not None:
    weight = weight * reached[points_known]

  def discounted(x: Tensor, w: Tensor) -> Tensor:
    steps = gamma ** torch.arange(len(x) - 1, -1, -1, dtype=x.dtype, device=x.device)
    return masked_mean(x, steps[:, None] * w)

  return {"points": 0.05 * discounted(huber, weight), "visible": discounted(entropy, torch.ones_like(visible))}


def in_window(look: tuple[Tensor, Tensor], cells: Tensor) -> tuple[Tensor, Tensor]:
  """A look of match_loss() and places (clips, T, N, 2) in cells of its map -> how far they are from its middle, and
  whether they lie in its window."""
  center, logits = look
  off = cells - center
  return off, (off.abs() <= math.isqrt(logits.shape[-1]) // 2).all(-1)


def match_loss(
  looks: Sequence[tuple[Tensor, Tensor]],
  cells: Sequence[Tensor],
  points_visible: Tensor,
  points_known: Tensor,
  weight: float = 0.5,
) -> Tensor:
  """Cross-entropy of where the tracker sees each point in the window that it looks at, so that what is learned is to
  tell places apart, not how points usually move: a motion that is guessed right for a clip's length still drifts over a
  minute.

  looks: of each stage the window's middle (clips, T, N, 2) in whole cells of its map, and the logits (clips, T, N, S *
  S) of its places, row-major. cells: of each stage the points' true place (clips, T, N, 2) in cells, which is shared
  among the four places around it (bilinear weights). Points that are hidden, unknown or outside the window count
  nowhere. -> `weight` times the mean over the points that count, summed over stages."""
  means = []
  for look, at in zip(looks, cells, strict=True):
    logits = wide(look[1])
    size = math.isqrt(logits.shape[-1])
    off, inside = in_window(look, at)
    some = points_known & (points_visible > 0.5) & inside
    steps = torch.arange(size, dtype=logits.dtype, device=logits.device) - size // 2
    x, y = torch.relu(1.0 - (off[some][..., None].to(logits.dtype) - steps).abs()).unbind(1)  # (n, S) each
    target = (y[:, :, None] * x[:, None]).flatten(1)
    entropy = -(target * torch.log_softmax(logits[some], dim=-1)).sum(-1)
    means.append(masked_mean(entropy, torch.ones_like(entropy)))
  return weight * torch.stack(means).sum()


def vote_loss(votes: Sequence[tuple[Tensor, Tensor]], speed: Tensor, known: Tensor, weight: float = 0.3) -> Tensor:
  """Cross-entropy of the car's speed among the candidates that the points vote for: taught directly, as match_loss()
  teaches where points are, for a point that guesses its own motion needs no vote.

  votes: of each stage the candidates (clips, T, K), evenly spaced and rising, and their logits. speed (clips, T): the
  true one, shared between the two candidates beside it; what is not known, or lies beyond the candidates, counts
  nowhere. -> `weight` times the mean over the frames that count, summed over stages."""
  means = []
  for speeds, logits in votes:
    speeds, logits = wide(speeds.detach()), wide(logits)
    at = (speed.to(speeds.dtype) - speeds[..., 0]) / (speeds[..., 1] - speeds[..., 0])
    k = torch.arange(speeds.shape[-1], dtype=speeds.dtype, device=speeds.device)
    some = known & (at >= 0) & (at <= k[-1])
    target = torch.relu(1.0 - (at[some][:, None] - k).abs())
    entropy = -(target * torch.log_softmax(logits[some], dim=-1)).sum(-1)
    means.append(masked_mean(entropy, torch.ones_like(entropy)))
  return weight * torch.stack(means).sum()


# the sum


class TaskWeights(nn.Module):
  """Sums the tasks' losses: with fixed weights w_k, or with learned homoscedastic uncertainties (Kendall et al. 2018):
  sum of 0.5 w_k (exp(-s_k) L_k + s_k), s_k = log of the task's variance, a parameter that starts at 0.

  weights: task -> w_k.  learned: whether s_k are there and learned. Leave a task without labels in a step out of its
                         losses: a loss of 0 would
  only teach that the task is certain."""

  def __init__(self, weights: Mapping[str, float], learned: bool = False):
    super().__init__()
    self.fixed = dict(weights)
    # in their order: torch sorts a dict's
    zeros = OrderedDict((k, nn.Parameter(torch.zeros(()))) for k in self.fixed if learned)
    self.log_variance = nn.ParameterDict(zeros)
    self.learned = learned

  def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
    """losses: task -> scalar. The scalar sum. ValueError: no task, or one without a weight."""
    if unknown := sorted(set(losses) - set(self.fixed)):
      raise ValueError(f"no weight for the tasks {unknown}; there are weights for {sorted(self.fixed)}")
    if not losses:
      raise ValueError("no task has a loss in this step")
    if not self.learned:
      return torch.stack([self.fixed[k] * loss for k, loss in losses.items()]).sum()
    s = {k: self.log_variance[k] for k in losses}
    return torch.stack([0.5 * self.fixed[k] * (torch.exp(-s[k]) * loss + s[k]) for k, loss in losses.items()]).sum()

  @torch.no_grad()
  def effective(self) -> dict[str, float]:
    """What multiplies each task's loss now."""
    return {
      k: w * (0.5 * float(torch.exp(-self.log_variance[k])) if self.learned else 1.0) for k, w in self.fixed.items()
    }
