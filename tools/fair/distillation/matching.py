"""Losses that must first say which output answers for which object: the center-based head (objects_loss) and the
DETR-shaped one (set_loss).

objects, everywhere: one dict for each of the B images of {boxes (M, 4) float xyxy in view pixels, cls (M,) int64 into
the K classes, track (M,) int64 or -1, score (M,) float, mask (M, 64, 128) float or bool, or None}. The teacher's score
weighs what an object asks for; without scores all are 1. ignore (N, 4), if there: boxes of which nobody knows what
they are. known (K,) bool, if there: classes of which it is known where they are not; the others are only taught where
they are.
The dicts of parts are weighted already: sum(parts.values()) is the loss."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.tools.fair.distillation.features import shrink_valid, unit
from openpilot.tools.fair.distillation.losses import dice, masked_mean, no_autocast, sigmoid_focal_loss, wide

CELL = 8  # view pixels of a cell of the center-based head; cell j is centered on view pixel 8 j + 3.5
MAP = 4  # view pixels of a map pixel; map pixel i is centered on view pixel 4 i + 1.5
VIEW = (VIEW_W, VIEW_H)
BOX_WEIGHT, GIOU_WEIGHT, EMBED_WEIGHT = 5.0, 2.0, 0.5
CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0  # Deformable DETR's
INSIDE = 0.5  # of a box's own area


# boxes


def box_iou(a: Tensor, b: Tensor) -> Tensor:
  """Intersection over union of (..., 4) xyxy boxes, shapes broadcast: a[:, None] and b[None] give all pairs. 0 where
  both are empty."""
  size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
  inter = size.prod(-1)
  union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
  return inter / union.clamp(min=1e-9)


def box_giou(a: Tensor, b: Tensor) -> Tensor:
  """Generalised IoU, -1..1 (Rezatofighi et al. 2019): IoU less the part of the hull that neither covers. Broadcasts as
  box_iou."""
  inter = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
  union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
  hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
  return inter / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def to_corners(boxes: Tensor) -> Tensor:
  """(..., 4) cx cy w h -> xyxy, the same unit."""
  return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def to_relative(boxes: Tensor, view: tuple[int, int] = VIEW) -> Tensor:
  """(..., 4) xyxy pixels of a view of (width, height) -> cx cy w h in 0..1 of it; it spans -0.5 .. width - 0.5."""
  size = boxes.new_tensor(view)
  return torch.cat([((boxes[..., :2] + boxes[..., 2:]) / 2 + 0.5) / size, (boxes[..., 2:] - boxes[..., :2]) / size], -1)


# the DETR-shaped head


def hungarian_match(
  logits: Tensor, boxes: Tensor, objects: Sequence[Mapping[str, Any]], view: tuple[int, int] = VIEW
) -> list[tuple[Tensor, Tensor]]:
  """Which query answers for which object: the assignment of least total cost (Kuhn 1955; DETR, Carion et al. 2020),
  image by image.

  logits: (B, Q, K), boxes: (B, Q, 4) cx cy w h in 0..1.  Cost: 2 (focal loss of the object's class less that of no
      class) + 5 L1 - 2 GIoU (Deformable DETR).
  Gives for each image (queries, objects), int64 of min(Q, M) on the CPU. A cost that is not finite counts as a large
    one.
  """
  with torch.no_grad():
    logits, boxes = wide(logits), wide(boxes)
    counts = [len(o["cls"]) for o in objects]
    longest = max(counts, default=0)
    target, cls = (
      boxes.new_full((len(objects), longest, 4), 0.5),
      torch.zeros(len(objects), longest, dtype=torch.int64, device=boxes.device),
    )
    for i, o in enumerate(objects):
      target[i, : counts[i]] = to_relative(o["boxes"].to(boxes), view)
      cls[i, : counts[i]] = o["cls"].to(boxes.device)
    present, absent = (sigmoid_focal_loss(logits, torch.full_like(logits, t)) for t in (1.0, 0.0))
    cost = CLASS_COST * torch.gather(present - absent, 2, cls[:, None].expand(-1, logits.shape[1], -1))
    cost = cost + BOX_COST * (boxes[:, :, None] - target[:, None]).abs().sum(-1)
    cost = cost - GIOU_COST * box_giou(to_corners(boxes)[:, :, None], to_corners(target)[:, None])
    table = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=1e6).cpu().numpy()
  pairs = [linear_sum_assignment(table[i, :, :n]) for i, n in enumerate(counts)]
  return [(torch.as_tensor(q, dtype=torch.int64), torch.as_tensor(m, dtype=torch.int64)) for q, m in pairs]


def inside(boxes: Tensor, others: Tensor) -> Tensor:
  """(Q, 4) and (N, 4) xyxy of one unit -> (Q,) bool: which of `boxes` lie in one of `others` with more than half of
  their own area."""
  size = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
  area = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)
  return (size.clamp(min=0).prod(-1) > INSIDE * area[:, None]).any(-1)


def spared(boxes: Tensor, o: Mapping[str, Any], view: tuple[int, int] = VIEW) -> Tensor:
  """Of one image's (Q, 4) cx cy w h in 0..1 of the view -> (Q,) bool: what lies in a box of which nobody knows what it
  is, and in no known one, may be something or nothing."""
  ignore = o.get("ignore")
  if ignore is None or not len(ignore):
    return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
  found = to_corners(boxes.detach())
  unknown, known = (to_corners(to_relative(x.to(found), view)) for x in (ignore, o["boxes"]))
  return inside(found, unknown) & ~inside(found, known)


def set_loss(
  outputs: Mapping[str, Any], objects: Sequence[Mapping[str, Any]], view: tuple[int, int] = VIEW
) -> dict[str, Tensor]:
  """DETR's set loss: sigmoid focal loss of all queries' classes, 5 L1 and 2 (1 - GIoU) of the matched, each a sum over
  the batch's number of objects. Queries that answer for no object and lie in a box of which nobody knows what it is
  (spared) have no part in it.

  outputs: 'detector_logits' (B, Q, K), 'detector_boxes' (B, Q, 4) cx cy w h in 0..1 of the view, and maybe
  'detector_aux', a list of (logits, boxes) of the earlier decoder layers, each matched by itself. Parts: 'class',
  'box', 'giou' of the last layer, 'aux': the sum of the others' (only with aux)."""
  n = max(sum(len(o["cls"]) for o in objects), 1)

  def layer(logits: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    pairs = hungarian_match(logits, boxes, objects, view)
    logits, boxes = wide(logits), wide(boxes)
    device = boxes.device
    image = torch.cat([torch.full_like(q, i) for i, (q, _) in enumerate(pairs)]).to(device)
    query = torch.cat([q for q, _ in pairs]).to(device)
    pick = [(o, m.to(o["cls"].device)) for o, (_, m) in zip(objects, pairs, strict=True)]
    cls = torch.cat([o["cls"][m] for o, m in pick]).to(device)
    target = to_relative(torch.cat([o["boxes"][m] for o, m in pick]).to(boxes), view)
    score = torch.cat([scores(o)[m] for o, m in pick]).to(boxes)
    classes = torch.zeros_like(logits)
    weight = known_classes(objects, logits.transpose(1, 2))[:, None].repeat(1, logits.shape[1], 1)
    free = torch.stack([spared(b, o, view) for b, o in zip(boxes, objects, strict=True)])
    free[image, query] = False
    weight[free] = 0
    classes[image, query, cls] = 1
    weight[image, query, cls] = score
    matched = boxes[image, query]
    return {
      "class": (sigmoid_focal_loss(logits, classes) * weight).sum() / n,
      "box": BOX_WEIGHT * ((matched - target).abs().sum(-1) * score).sum() / n,
      "giou": GIOU_WEIGHT * ((1 - box_giou(to_corners(matched), to_corners(target))) * score).sum() / n,
    }

  parts = layer(outputs["detector_logits"], outputs["detector_boxes"])
  if outputs.get("detector_aux"):
    parts["aux"] = torch.stack(
      [part for logits, boxes in outputs["detector_aux"] for part in layer(logits, boxes).values()]
    ).sum()
  return parts


# the center-based head


@dataclass
class Flat:
  """The objects of all images, one after the other."""

  image: Tensor  # (n,) int64
  boxes: Tensor  # (n, 4) xyxy view px
  cls: Tensor  # (n,) int64
  track: Tensor  # (n,) int64, -1: no identity
  score: Tensor  # (n,)
  mask: Tensor  # (n, 64, 128)
  has_mask: Tensor  # (n,) bool

  def take(self, keep: Tensor) -> "Flat":
    return Flat(*(getattr(self, f.name)[keep] for f in fields(self)))


def scores(o: Mapping[str, Any]) -> Tensor:
  return o["score"] if o.get("score") is not None else torch.ones_like(o["boxes"][:, 0])


def flatten_objects(objects: Sequence[Mapping[str, Any]], like: Tensor, height: int, width: int) -> Flat:
  """All objects as tensors of like's device and floating dtype; those without masks of height x width get zeros,
  which as empty masks teach nothing: of a box that nobody outlined it is not known what it holds."""

  def ints(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).to(like.device)

  counts = [len(o["cls"]) for o in objects]
  empty = [
    o["boxes"].new_zeros(m, height, width) if o.get("mask") is None else o["mask"].to(o["boxes"].dtype)
    for o, m in zip(objects, counts, strict=True)
  ]
  mask = torch.cat(empty).to(like)
  return Flat(
    image=torch.repeat_interleave(torch.arange(len(objects)), torch.tensor(counts, dtype=torch.int64)).to(like.device),
    boxes=torch.cat([o["boxes"] for o in objects]).to(like),
    cls=ints([o["cls"] for o in objects]),
    track=ints([o["track"] if o.get("track") is not None else torch.full_like(o["cls"], -1) for o in objects]),
    score=torch.cat([scores(o) for o in objects]).to(like),
    mask=mask,
    has_mask=mask.flatten(1).any(1),
  )


def gaussian_radius(size: Tensor, overlap: float = 0.7) -> Tensor:
  """(n, 2) widths and heights -> (n,): how far the corners may each move, in x and y, while the box keeps IoU >=
  overlap (CornerNet, Law and Deng 2018).

  The worst way is both inwards: (w - 2 r) (h - 2 r) = overlap w h."""
  total, area = size.sum(-1), size.prod(-1)
  return (total - torch.sqrt(total**2 - 4 * area * (1 - overlap))) / 4


def heat_targets(cells: Tensor, o: Flat, shape: torch.Size) -> Tensor:
  """(B, K, h, w) of shape: the largest of the objects' Gaussians around their cells ((n, 2) x, y), sigma = (2 r + 1) /
  6 (CenterNet, Zhou et al. 2019).

  r is gaussian_radius in whole cells, at least 1: on so coarse a grid a teacher's center often falls into the next
  cell."""
  b, k, h, w = shape
  sigma = (2 * gaussian_radius((o.boxes[:, 2:] - o.boxes[:, :2]).clamp(min=0) / CELL).floor().clamp(min=1) + 1) / 6
  x, y = (
    torch.exp(-((torch.arange(m, device=cells.device) - cells[:, i, None]) ** 2) / (2 * sigma[:, None] ** 2))
    for i, m in ((0, w), (1, h))
  )
  gaussians = (y[:, :, None] * x[:, None]).flatten(1)
  place = (o.image * k + o.cls)[:, None].expand(-1, h * w)
  return gaussians.new_zeros(b * k, h * w).scatter_reduce(0, place, gaussians, "amax").reshape(shape)


def known_classes(objects: Sequence[Mapping[str, Any]], scores: Tensor) -> Tensor:
  """(B, K) of scores' (B, K, ...) dtype: 1 for classes of which it is known where they are not. Of those that nobody
  looked for, nothing is an error but what is missed."""
  every = torch.ones(scores.shape[1], dtype=torch.bool)
  known = [o["known"] if len(o.get("known", ())) else every for o in objects]
  return torch.stack(known).to(scores)


def heat_loss(heat: Tensor, o: Flat, cells: Tensor, keep: Tensor, valid: Tensor, known: Tensor) -> Tensor:
  """CenterNet's penalty-reduced focal loss over valid (B, h, w) cells, over the number of objects kept; scalar. known:
  (B, K) of known_classes().

  Objects that are not kept (their center is where nothing counts) are no positives, but their Gaussians still spare
  their surroundings."""
  target = heat_targets(cells, o, heat.shape)
  kept, (x, y) = o.take(keep), cells[keep].T
  at = ((kept.image * heat.shape[1] + kept.cls) * heat.shape[2] + y) * heat.shape[3] + x
  weight = heat.new_full((heat.numel(),), -1.0).scatter_reduce(0, at, kept.score, "amax").reshape(heat.shape)
  positive = weight >= 0
  p = torch.sigmoid(heat)
  hit = -weight * (1 - p) ** 2 * F.logsigmoid(heat)
  miss = -((1 - target) ** 4) * p**2 * F.logsigmoid(-heat)
  counts = valid[:, None] * known[..., None, None]
  return torch.where(positive, hit, miss * counts).sum() / max(len(kept.cls), 1)


def assign_cells(
  o: Flat, cells: Tensor, valid: Tensor, holds: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
  """Which cells answer for which object: its own and, of the 3x3 around it, those centered in its box; valid cells
  only. holds: (n, 9, 2) centers -> (n, 9) bool, which lie in the object, where it is no upright box.

  cells: (n, 2) int64 x, y in the grid.  valid: (B, h, w) bool. A cell wanted by several goes to the object whose own
                                         cell it is, then to the smallest.
  Gives object (r,), place (r, 2) int64 x, y, own (r,) bool."""
  h, w = valid.shape[1:]
  steps = torch.tensor([[dx, dy] for dy in (-1, 0, 1) for dx in (-1, 0, 1)], device=cells.device)
  places = cells[:, None] + steps  # (n, 9, 2)
  own = (steps == 0).all(-1).expand(len(cells), -1)
  center = places * CELL + (CELL - 1) / 2
  upright = ((center >= o.boxes[:, None, :2]) & (center <= o.boxes[:, None, 2:])).all(-1)
  in_box = (upright if holds is None else holds(center)) | own
  x, y = places[..., 0], places[..., 1]
  wanted = in_box & (x >= 0) & (x < w) & (y >= 0) & (y < h)
  x, y = x.clamp(0, w - 1), y.clamp(0, h - 1)
  wanted = wanted & valid[o.image[:, None], y, x]
  area = (o.boxes[:, 2:] - o.boxes[:, :2]).prod(-1).clamp(max=h * w * CELL * CELL)
  cost = torch.where(wanted, area[:, None] + ~own * 1e6, torch.inf)
  key = (o.image[:, None] * h + y) * w + x
  best = cost.new_full((valid.numel(),), torch.inf).scatter_reduce(0, key.flatten(), cost.flatten(), "amin")
  row, step = torch.nonzero(wanted & (cost == best[key]), as_tuple=True)
  return row, places[row, step], own[row, step]


def mask_losses(coef: Tensor, proto: Tensor, o: Flat, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
  """Binary cross-entropy and Dice of each mask, over the valid map pixels centered in its box (YOLACT, Bolya et al.
  2019).

  coef: (n, P) of the n objects of o, proto: (B, P, H, W), valid: (B, H, W). Gives (n,) entropy, (n,) dice, (n,) bool:
  whether any pixel counts."""
  n, (b, p, h, w) = len(coef), proto.shape
  x, y = (torch.arange(m, device=coef.device) * MAP + (MAP - 1) / 2 for m in (w, h))
  in_x = (x >= o.boxes[:, :1]) & (x <= o.boxes[:, 2:3]) & o.has_mask[:, None]
  in_y = (y >= o.boxes[:, 1:2]) & (y <= o.boxes[:, 3:4])
  counts = torch.bincount(o.image, minlength=b)
  slot = torch.arange(n, device=coef.device) - (counts.cumsum(0) - counts)[o.image]  # the objects are ordered by image
  padded = coef.new_zeros(b, int(counts.max()) if n else 0, p).index_put((o.image, slot), coef)
  with no_autocast(coef):
    logits = padded @ proto.flatten(2)  # (B, most objects of an image, H W)
  row, pixel = torch.nonzero((in_y[:, :, None] & in_x[:, None] & valid[o.image]).flatten(1), as_tuple=True)
  logit = logits[o.image[row], slot[row], pixel]
  truth = o.mask.flatten(1)[row, pixel]

  def total(values: Tensor) -> Tensor:
    return values.new_zeros(n).index_add(0, row, values)

  pixels = total(torch.ones_like(logit))
  entropy = total(F.binary_cross_entropy_with_logits(logit, truth, reduction="none")) / pixels.clamp(min=1)
  q = torch.sigmoid(logit)
  return entropy, dice(total(q * truth), total(q) + total(truth)), pixels > 0


def embedding_loss(embedding: Tensor, o: Flat, clips: Tensor, temperature: float = 0.1) -> Tensor:
  """Supervised contrastive loss (Khosla et al. 2020, L_out) of identity: an object's positives are the same track in
  the other frames of its clip.

  embedding: (n, C) of the n objects of o.  clips: (B,) int64, the images' clips. All other objects of the batch that
                                            have a track are negatives, but those
  of the same number in another clip, which may be the same car seen again. The mean over objects that have a positive;
    0 without."""
  known = o.track >= 0
  e, image, track = unit(embedding[known]), o.image[known], o.track[known]
  same = track[:, None] == track
  positive = same & (clips[image][:, None] == clips[image]) & (image[:, None] != image)
  with no_autocast(e):
    likeness = e @ e.T / temperature
  log_p = F.log_softmax(likeness.masked_fill(same & ~positive, -1e4), -1)
  n = positive.sum(-1)
  return masked_mean(-(log_p * positive).sum(-1) / n.clamp(min=1), (n > 0).to(e.dtype))


def objects_loss(
  outputs: Mapping[str, Tensor],
  objects: Sequence[Mapping[str, Any]],
  valid: Tensor,
  clips: Sequence[int] | Tensor | None = None,
) -> dict[str, Tensor]:
  """The center-based head's losses. valid: (B, 64, 128) bool.  clips: of which clip each of the B images is, for
      identities; None: each is its own.

  outputs: 'objects_heat' (B, K, 32, 64) logits, 'objects_box' (B, 4, 32, 64) left, top, right, bottom >= 0 in view px
  from the cell's center, 'objects_coef' (B, P, 32, 64), 'objects_proto' (B, P, 64, 128), 'objects_embed' (B, E, 32,
  64). An object counts where its center's cell is in the view and wholly valid. Parts: 'heat' (heat_loss); 'box', 5 L1
  in parts of the view's width and height, and 'giou', 2 (1 - GIoU), at the cells of assign_cells, the mean over an
  object's cells, then over objects; 'mask', 'dice' (mask_losses) and 'embed', 0.5 embedding_loss, at the object's own
  cell. A box too small to hold its cell's center is widened to it, since distances are >= 0."""
  heat, box, coef, proto, embed = (wide(outputs[f"objects_{k}"]) for k in ("heat", "box", "coef", "proto", "embed"))
  h, w = heat.shape[2:]
  cells_valid = shrink_valid(valid, h, w)
  o = flatten_objects(objects, heat, *proto.shape[2:])
  cells = torch.floor(((o.boxes[:, :2] + o.boxes[:, 2:]) / 2 + 0.5) / CELL).long()
  limit = torch.tensor([w, h], device=cells.device)
  inside = ((cells >= 0) & (cells < limit)).all(-1) & (o.boxes[:, 2:] > o.boxes[:, :2]).all(-1)
  place = torch.where(inside[:, None], cells, 0)
  keep = inside & cells_valid[o.image, place[:, 1], place[:, 0]]
  parts = {"heat": heat_loss(heat, o, cells, keep, cells_valid, known_classes(objects, heat))}

  o, cells = o.take(keep), cells[keep]
  row, place, own = assign_cells(o, cells, cells_valid)
  n = max(len(o.cls), 1)
  share = (o.score / torch.bincount(row, minlength=len(o.cls)).clamp(min=1))[row] / n
  distances = box[o.image[row], :, place[:, 1], place[:, 0]]  # (r, 4)
  center = place * CELL + (CELL - 1) / 2
  target = torch.cat([center - o.boxes[row, :2], o.boxes[row, 2:] - center], -1).clamp(min=0)
  size = CELL * box.new_tensor([w, h, w, h])
  giou = box_giou(*(torch.cat([center - d[:, :2], center + d[:, 2:]], -1) for d in (distances, target)))
  parts["box"] = BOX_WEIGHT * (((distances - target).abs() / size).sum(-1) * share).sum()
  parts["giou"] = GIOU_WEIGHT * ((1 - giou) * share).sum()

  first = o.take(row[own])  # those that have their own cell: another, smaller one may be centered there
  x, y = place[own].T
  entropy, apart, drawn = mask_losses(coef[first.image, :, y, x], proto, first, valid)
  masks = drawn.sum().clamp(min=1)
  parts["mask"] = (entropy * first.score * drawn).sum() / masks
  parts["dice"] = (apart * first.score * drawn).sum() / masks
  clip = (
    torch.arange(len(heat), device=heat.device)
    if clips is None
    else torch.as_tensor(clips, dtype=torch.int64, device=heat.device)
  )
  parts["embed"] = EMBED_WEIGHT * embedding_loss(embed[first.image, :, y, x], first, clip)
  return parts
