"""Boxes, the Hungarian set loss and the center-based head's losses against references written plainly, in float64, on
fresh random input; and their edges."""

import itertools

import numpy as np
import pytest
import torch
from loss_checks import t, value
from scipy.special import expit, log_expit

from openpilot.tools.fair.distillation import matching as mt

MASK = (64, 128)


def random_boxes(rng, n):
  center, size = rng.uniform([0, 0], [511, 255], (n, 2)), np.exp(rng.uniform(1, 5.5, (n, 2)))
  return np.concatenate([center - size / 2, center + size / 2], 1)


def random_objects(rng, images, most, classes=3):
  """Every second image without masks; the first without objects."""
  out = []
  for i in range(images):
    n = 0 if i == 0 else int(rng.integers(1, most + 1))
    out.append(
      {
        "boxes": t(random_boxes(rng, n)),
        "cls": t(rng.integers(0, classes, n)),
        "track": t(rng.permutation(most)[:n] - 1),
        "score": t(rng.uniform(0.2, 1, n)),
        "mask": t(rng.integers(0, 2, (n, *MASK)).astype(float)) if i % 2 else None,
      }
    )
  return out


# boxes


def test_iou_counts_pixels(rng):
  """Boxes of whole pixels, counted on a grid."""
  a, b = np.sort(rng.integers(0, 24, (2, 40, 2, 2)), axis=2).transpose(0, 1, 2, 3).reshape(2, 40, 4)

  def painted(box):
    grid = np.zeros((24, 24), bool)
    grid[box[1] : box[3], box[0] : box[2]] = True
    return grid

  for i, j in itertools.product(range(0, 40, 5), range(40)):
    p, q = painted(a[i]), painted(b[j])
    union = (p | q).sum()
    hull = (max(a[i, 2], b[j, 2]) - min(a[i, 0], b[j, 0])) * (max(a[i, 3], b[j, 3]) - min(a[i, 1], b[j, 1]))
    iou = (p & q).sum() / union if union else 0
    assert value(mt.box_iou(t(a[i]).double(), t(b[j]).double())) == pytest.approx(iou, abs=1e-12)
    assert value(mt.box_giou(t(a[i]).double(), t(b[j]).double())) == pytest.approx(
      iou - ((hull - union) / hull if hull else 0), abs=1e-12
    )
  assert mt.box_giou(t(a).double()[:, None], t(b).double()).shape == (40, 40)


def test_giou_of_the_smallest_boxes_that_have_an_area():
  """A fiftieth of a pixel of 512 wide, so 1.5e-9 of the picture: with itself, and with one as large that is a width
  aside, a hull of three and a union of two."""
  side = 1.5e-9**0.5
  a = torch.tensor([0.0, 0, side, side], dtype=torch.float64)
  assert float(mt.box_giou(a, a)) == pytest.approx(1)
  thin = torch.tensor([0.0, 0, 5e-10, 1], dtype=torch.float64)  # a hull of 1.5e-9, a union of 1e-9
  assert float(mt.box_giou(thin, thin + torch.tensor([1e-9, 0, 1e-9, 0]))) == pytest.approx(-1 / 3)


def test_giou_gradients(rng):
  a, b = t(random_boxes(rng, 6), True), t(random_boxes(rng, 6))
  assert torch.autograd.gradcheck(mt.box_giou, (a, b))
  empty = torch.zeros(1, 4, requires_grad=True)
  mt.box_giou(empty, torch.zeros(1, 4)).sum().backward()
  assert torch.isfinite(empty.grad).all()


def test_boxes_of_the_view(rng):
  assert mt.to_relative(torch.tensor([-0.5, -0.5, 511.5, 255.5])).tolist() == [0.5, 0.5, 1, 1]
  boxes = random_boxes(rng, 5)
  back = mt.to_corners(mt.to_relative(t(boxes)) * t([512.0, 256.0, 512.0, 256.0])) - 0.5  # x_px = cx 512 - 0.5
  np.testing.assert_allclose(back.numpy(), boxes, atol=1e-9)


# the DETR-shaped head


def focal(x, y):
  return -0.25 * (1 - expit(x)) ** 2 * log_expit(x) if y else -0.75 * expit(x) ** 2 * log_expit(-x)


def pair_terms(logits, box, o, m):
  """Class cost, L1 and GIoU of one query and one object, in plain numbers."""
  x0, y0, x1, y1 = o["boxes"][m].numpy()
  want = np.array([((x0 + x1) / 2 + 0.5) / 512, ((y0 + y1) / 2 + 0.5) / 256, (x1 - x0) / 512, (y1 - y0) / 256])
  (ax, ay, bx, by), (cx, cy, dx, dy) = (
    (c[0] - c[2] / 2, c[1] - c[3] / 2, c[0] + c[2] / 2, c[1] + c[3] / 2) for c in (box, want)
  )
  inter = max(min(bx, dx) - max(ax, cx), 0) * max(min(by, dy) - max(ay, cy), 0)
  union = (bx - ax) * (by - ay) + (dx - cx) * (dy - cy) - inter
  hull = (max(bx, dx) - min(ax, cx)) * (max(by, dy) - min(ay, cy))
  k = int(o["cls"][m])
  return focal(logits[k], 1) - focal(logits[k], 0), np.abs(box - want).sum(), inter / union - (hull - union) / hull


def nobody_knows(box, o):
  """More than half of a query's own area in an ignored box, and not so in any known one."""
  x0, y0, x1, y1 = (
    (box[0] - box[2] / 2) * 512 - 0.5,
    (box[1] - box[3] / 2) * 256 - 0.5,
    (box[0] + box[2] / 2) * 512 - 0.5,
    (box[1] + box[3] / 2) * 256 - 0.5,
  )

  def lies_in(others):
    for a, b, c, d in others.tolist():
      if max(min(x1, c) - max(x0, a), 0) * max(min(y1, d) - max(y0, b), 0) > 0.5 * (x1 - x0) * (y1 - y0):
        return True
    return False

  return "ignore" in o and lies_in(o["ignore"]) and not lies_in(o["boxes"])


def set_reference(logits, boxes, objects):
  total, parts = max(sum(len(o["cls"]) for o in objects), 1), np.zeros(3)
  for q, b, o in zip(logits, boxes, objects, strict=True):
    m = len(o["cls"])
    best = min(  # every assignment there is
      itertools.permutations(range(len(q)), m),
      key=lambda qs, q=q, b=b, o=o: sum(
        2 * c + 5 * l - 2 * g for c, l, g in (pair_terms(q[i], b[i], o, j) for j, i in enumerate(qs))
      ),
    )
    asked = {(i, int(o["cls"][j])): float(o["score"][j]) for j, i in enumerate(best)}
    free = [i for i in range(len(q)) if i not in best and nobody_knows(b[i], o)]
    parts[0] += sum(
      focal(q[i, k], (i, k) in asked) * asked.get((i, k), 1) for i, k in np.ndindex(q.shape) if i not in free
    )
    for j, i in enumerate(best):
      _, l1, giou = pair_terms(q[i], b[i], o, j)
      parts[1:] += np.array([5 * l1, 2 * (1 - giou)]) * float(o["score"][j])
  return dict(zip(("class", "box", "giou"), parts / total, strict=True))


def test_set_loss(rng):
  objects = random_objects(rng, 4, 3)
  layers = [(rng.normal(size=(4, 5, 3)) * 2, rng.uniform(0.1, 0.6, (4, 5, 4))) for _ in range(3)]
  outputs = {
    "detector_logits": t(layers[0][0]),
    "detector_boxes": t(layers[0][1]),
    "detector_aux": [(t(a), t(b)) for a, b in layers[1:]],
  }
  parts = mt.set_loss(outputs, objects)
  for k, v in set_reference(*layers[0], objects).items():
    assert value(parts[k]) == pytest.approx(v, rel=1e-9), k
  assert value(parts["aux"]) == pytest.approx(
    sum(sum(set_reference(*layer, objects).values()) for layer in layers[1:]), rel=1e-9
  )
  del outputs["detector_aux"]
  assert mt.set_loss(outputs, [{k: o[k] for k in ("boxes", "cls")} for o in objects]).keys() == {"class", "box", "giou"}


def test_set_loss_of_what_nobody_knows(rng):
  """Queries in ignored boxes, of which one lies in a known box too, and one answers for an object: the others ask for
  nothing, whatever they say."""
  objects = random_objects(rng, 4, 2)
  logits = rng.normal(size=(4, 6, 3)) * 2
  boxes = np.concatenate([rng.uniform(0.1, 0.9, (4, 6, 2)), rng.uniform(0.05, 0.2, (4, 6, 2))], axis=-1)  # apart
  for o, b in zip(objects, boxes, strict=True):
    around = mt.to_corners(t(b[2:5])) * t([512.0, 256.0, 512.0, 256.0]) - 0.5
    o["ignore"] = torch.cat([around + t([-3.0, -3.0, 3.0, 3.0]), around[:1] + 200])
  objects[1]["boxes"][:1] = objects[1]["ignore"][1:2]  # known, and ignored
  objects[2]["ignore"][0] = objects[2]["ignore"][0] + t([400.0, 0, 400.0, 0])  # elsewhere
  free = sum(nobody_knows(b[i], o) for o, b in zip(objects, boxes, strict=True) for i in range(6))
  assert 4 <= free <= 16
  parts = mt.set_loss({"detector_logits": t(logits), "detector_boxes": t(boxes)}, objects)
  expected = set_reference(logits, boxes, objects)
  for k, v in expected.items():
    assert value(parts[k]) == pytest.approx(v, rel=1e-9), k
  plain = set_reference(logits, boxes, [{k: v for k, v in o.items() if k != "ignore"} for o in objects])
  assert plain["class"] > expected["class"] and plain["box"] == expected["box"]


def test_half_of_a_box_in_another():
  """Exactly half does not lie in it, a little more does; a flat box lies nowhere."""
  other = torch.tensor([[0.0, 0, 10, 10]])
  boxes = torch.tensor([[5.0, 0, 15, 10], [4.9, 0, 14.9, 10], [5.0, 5, 5, 5], [2.0, 2, 4, 4]])
  assert mt.inside(boxes, other).tolist() == [False, True, False, True]
  assert mt.inside(boxes, other[:0]).tolist() == [False] * 4


def test_set_loss_at_the_edges(rng):
  nothing = [{"boxes": torch.zeros(0, 4), "cls": torch.zeros(0, dtype=torch.int64), "score": torch.zeros(0)}] * 2
  many = [
    {"boxes": t(random_boxes(rng, 7)).float(), "cls": torch.zeros(7, dtype=torch.int64), "score": torch.ones(7)}
  ] * 2  # more objects than queries
  for scale, objects in itertools.product((1.0, 1e5), (nothing, many)):
    logits, boxes = (
      t(rng.normal(size=(2, 4, 3)).astype(np.float32) * np.float32(scale), True),
      t(rng.random((2, 4, 4)).astype(np.float32), True),
    )
    parts = mt.set_loss({"detector_logits": logits, "detector_boxes": boxes}, objects)
    grads = torch.autograd.grad(sum(parts.values()), (logits, boxes))
    assert all(torch.isfinite(g).all() for g in grads) and (objects is many) == bool(grads[1].any())
  broken = mt.set_loss({"detector_logits": logits * torch.nan, "detector_boxes": boxes}, many)
  assert torch.isnan(sum(broken.values()))  # for the trainer to see, not scipy's exception


# the center-based head


def test_gaussian_radius(rng):
  """Moving the corners by the radius in the worst of the three ways leaves IoU at 0.7, in no way less."""
  size = np.exp(rng.uniform(0, 4, (50, 2)))
  for (w, h), r in zip(size, mt.gaussian_radius(t(size)).tolist(), strict=True):
    a = (w - r) * (h - r)
    ious = [a / (2 * w * h - a), (w - 2 * r) * (h - 2 * r) / (w * h), w * h / ((w + 2 * r) * (h + 2 * r))]
    assert min(ious) == pytest.approx(0.7, abs=1e-9)


def centered(o, m, valid):
  """The cell (x, y) of an object's center and whether the object counts."""
  x0, y0, x1, y1 = o["boxes"][m].tolist()
  x, y = int(np.floor((x0 + x1 + 1) / 16)), int(np.floor((y0 + y1 + 1) / 16))
  return x, y, 0 <= x < 64 and 0 <= y < 32 and bool(valid[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].all())


def objects_reference(out, objects, valid, clips):
  """Loops over images, objects, cells and pixels."""
  heat = out["objects_heat"]
  own, kept, everyone = {}, [], []
  for i, o in enumerate(objects):
    for m in range(len(o["cls"])):
      x, y, counts = centered(o, m, valid[i])
      everyone.append((i, m, x, y, counts))
      if counts:
        kept.append((i, m, x, y))
        area = float((o["boxes"][m, 2:] - o["boxes"][m, :2]).prod())
        if (i, x, y) not in own or area < own[i, x, y][0]:
          own[i, x, y] = area, m
  n = max(len(kept), 1)

  target = np.zeros(heat.shape)
  yy, xx = np.mgrid[:32, :64]
  for i, m, x, y, _ in everyone:
    o = objects[i]
    w, h = ((o["boxes"][m, 2:] - o["boxes"][m, :2]) / 8).tolist()
    r = max(
      int(next(r for r in np.arange(1, 200) if (w - 2 * r) * (h - 2 * r) < 0.7 * w * h or 2 * r > min(w, h)) - 1), 1
    )
    k = int(o["cls"][m])
    target[i, k] = np.maximum(target[i, k], np.exp(-((xx - x) ** 2 + (yy - y) ** 2) / (2 * ((2 * r + 1) / 6) ** 2)))
  positives: dict[tuple, float] = {}
  for i, m, x, y in kept:
    at = i, int(objects[i]["cls"][m]), y, x
    positives[at] = max(float(objects[i]["score"][m]), positives.get(at, 0.0))
  loss = sum(-s * (1 - expit(heat[at])) ** 2 * log_expit(heat[at]) for at, s in positives.items())
  for i, k, y, x in np.ndindex(heat.shape):
    if (i, k, y, x) not in positives and valid[i, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].all():
      loss -= (1 - target[i, k, y, x]) ** 4 * expit(heat[i, k, y, x]) ** 2 * log_expit(-heat[i, k, y, x])
  parts = {"heat": loss / n, "box": 0.0, "giou": 0.0}

  wants: dict[tuple, tuple] = {}
  for i, m, x, y in kept:
    box = objects[i]["boxes"][m].numpy()
    area = (box[2] - box[0]) * (box[3] - box[1])
    for dx, dy in itertools.product((-1, 0, 1), (-1, 0, 1)):
      cx, cy = 8 * (x + dx) + 3.5, 8 * (y + dy) + 3.5
      if (
        not (0 <= x + dx < 64 and 0 <= y + dy < 32)
        or not valid[i, 2 * (y + dy) : 2 * (y + dy) + 2, 2 * (x + dx) : 2 * (x + dx) + 2].all()
      ):
        continue
      if (dx or dy) and not (box[0] <= cx <= box[2] and box[1] <= cy <= box[3]):
        continue
      rank = (bool(dx or dy), area, m)
      if (i, x + dx, y + dy) not in wants or rank < wants[i, x + dx, y + dy]:
        wants[i, x + dx, y + dy] = rank
  for i, m, _, _ in kept:
    box, cells = objects[i]["boxes"][m].numpy(), [(x, y) for (j, x, y), w in wants.items() if j == i and w[2] == m]
    for x, y in cells:
      cx, cy = 8 * x + 3.5, 8 * y + 3.5
      d, want = out["objects_box"][i, :, y, x], np.maximum([cx - box[0], cy - box[1], box[2] - cx, box[3] - cy], 0)
      w = float(objects[i]["score"][m]) / len(cells) / n
      parts["box"] += 5 * w * (np.abs(d - want) / [512, 256, 512, 256]).sum()
      inter = np.minimum(d, want)[:2] + np.minimum(d, want)[2:]
      hull = np.maximum(d, want)[:2] + np.maximum(d, want)[2:]
      union = (d[:2] + d[2:]).prod() + (want[:2] + want[2:]).prod() - inter.prod()
      parts["giou"] += 2 * w * (1 - inter.prod() / union + (hull.prod() - union) / hull.prod())

  entropies, dices, seen = [], [], []
  for (i, x, y), (_, m) in own.items():
    o = objects[i]
    seen.append((i, int(o["track"][m]), out["objects_embed"][i, :, y, x]))
    x0, y0, x1, y1 = o["boxes"][m].tolist()
    pixels = [
      (v, u) for v, u in np.ndindex(MASK) if valid[i, v, u] and x0 <= 4 * u + 1.5 <= x1 and y0 <= 4 * v + 1.5 <= y1
    ]
    if o["mask"] is None or not pixels:
      continue
    v, u = np.array(pixels).T
    logits, truth = out["objects_coef"][i, :, y, x] @ out["objects_proto"][i][:, v, u], o["mask"][m].numpy()[v, u]
    entropies.append(-float(o["score"][m]) * (truth * log_expit(logits) + (1 - truth) * log_expit(-logits)).mean())
    q = expit(logits)
    dices.append(float(o["score"][m]) * (1 - (2 * (q * truth).sum() + 1) / (q.sum() + truth.sum() + 1)))
  parts |= {"mask": np.mean(entropies) if entropies else 0.0, "dice": np.mean(dices) if dices else 0.0}

  anchors = []
  seen = [(i, k, e / np.linalg.norm(e)) for i, k, e in seen if k >= 0]
  for i, k, e in seen:
    friends = [b for b, (j, l, _) in enumerate(seen) if l == k and j != i and clips[j] == clips[i]]
    others = [b for b, (_, l, _) in enumerate(seen) if l != k] + friends
    if friends:
      likeness = {b: np.exp(e @ seen[b][2] / 0.1) for b in others}
      anchors.append(-np.mean([np.log(likeness[b] / sum(likeness.values())) for b in friends]))
  return parts | {"embed": 0.5 * np.mean(anchors) if anchors else 0.0}


def random_outputs(rng, b, scale=1.0):
  shapes = {"heat": (3, 32, 64), "box": (4, 32, 64), "coef": (6, 32, 64), "proto": (6, *MASK), "embed": (5, 32, 64)}
  out = {f"objects_{k}": rng.normal(size=(b, *s)) * scale for k, s in shapes.items()}
  return out | {"objects_box": np.abs(out["objects_box"]) * 30}


def random_valid(rng, b):
  valid = np.ones((b, *MASK), bool)
  for v in valid:
    v[: rng.integers(0, 16)], v[:, : rng.integers(0, 32)] = False, False
  return valid


def add_object(o, center, size, track):
  center, size = t(np.array(center, float)), t(np.array(size, float))
  new = {
    "boxes": torch.cat([center - size / 2, center + size / 2]),
    "cls": torch.tensor(1),
    "track": torch.tensor(track),
    "score": torch.tensor(0.7).double(),
  }
  o.update({k: torch.cat([o[k], v[None]]) for k, v in new.items()})
  if o["mask"] is not None:
    o["mask"] = torch.cat([o["mask"], 1 - o["mask"][:1]])


def test_objects_loss(rng):
  clips = [0, 0, 0, 1, 1]
  objects, out, valid = random_objects(rng, 5, 7), random_outputs(rng, 5), random_valid(rng, 5)
  # centers: just over a cell's edge; the same, smaller, in the same frame; the same again in the clip's next frame; a
  # cell that a smaller neighbor wants
  add_object(objects[1], [295.7, 160.2], [60, 40], track=20)
  add_object(objects[1], [295.7, 160.2], [40, 30], track=21)
  add_object(objects[2], [303.7, 160.2], [60, 40], track=21)
  add_object(objects[3], [323.5, 163.5], [120, 80], track=21)
  add_object(objects[3], [331.5, 163.5], [30, 30], track=22)
  parts = mt.objects_loss({k: t(v) for k, v in out.items()}, objects, t(valid), clips)
  for k, v in objects_reference(out, objects, valid, clips).items():
    assert value(parts[k]) == pytest.approx(v, rel=1e-4 if k == "embed" else 1e-9, abs=1e-12), (
      k
    )  # unit() guards its root with 1e-6


def test_autocast_changes_nothing(rng):
  """Losses run inside the trainer's autocast; products of matrices would lose most of their digits there."""
  objects, out = random_objects(rng, 4, 5), {k: t(v.astype(np.float32)) for k, v in random_outputs(rng, 4).items()}
  valid = t(random_valid(rng, 4))
  expected = mt.objects_loss(out, objects, valid, [0] * 4)
  with torch.autocast("cpu", torch.bfloat16):
    parts = mt.objects_loss(out, objects, valid, [0] * 4)
  assert {k: value(v) for k, v in parts.items()} == {k: value(v) for k, v in expected.items()}
  half = mt.objects_loss({k: v.bfloat16() for k, v in out.items()}, objects, valid, [0] * 4)
  assert all(
    v.dtype == torch.float32 and value(v) == pytest.approx(value(expected[k]), rel=0.1, abs=0.1)
    for k, v in half.items()
  )


def test_objects_count_only_where_valid(rng):
  objects, valid = random_objects(rng, 3, 6), random_valid(rng, 3)
  out = {k: t(v, True) for k, v in random_outputs(rng, 3).items()}
  grads = dict(
    zip(
      out,
      torch.autograd.grad(
        sum(mt.objects_loss(out, objects, t(valid)).values()), tuple(out.values()), allow_unused=True
      ),
      strict=True,
    )
  )
  whole = valid.reshape(3, 32, 2, 64, 2).all((2, 4))
  for name, seen in (("heat", whole), ("box", whole), ("coef", whole), ("proto", valid)):
    assert not grads[f"objects_{name}"].numpy()[~np.broadcast_to(seen[:, None], out[f"objects_{name}"].shape)].any(), (
      name
    )


def test_objects_loss_at_the_edges(rng):
  none = [
    {
      "boxes": torch.zeros(0, 4),
      "cls": torch.zeros(0, dtype=torch.int64),
      "track": torch.zeros(0, dtype=torch.int64),
      "mask": None,
    }
  ] * 2
  outside, empty, tiny = [[-900.0, 0, -800, 50]], [[100, 100, 100, 100], [50, 60, 40, 50]], [[100, 100, 100.5, 100.5]]
  strange = torch.tensor(outside + empty + tiny + [[-0.5, -0.5, 511.5, 255.5], [505, 250, 511.5, 255.5]])
  odd = [
    {
      "boxes": strange,
      "cls": torch.zeros(6, dtype=torch.int64),
      "track": torch.arange(6),
      "score": torch.ones(6),
      "mask": torch.ones(6, *MASK),
    }
  ] * 2
  everywhere = torch.ones(2, *MASK, dtype=torch.bool)
  for objects, valid, scale in itertools.product((none, odd), (everywhere, ~everywhere), (0.0, 1.0, 1e4)):
    out = {k: t(v.astype(np.float32), True) for k, v in random_outputs(rng, 2, scale).items()}
    parts = mt.objects_loss(out, objects, valid, [0, 0])
    loss = sum(parts.values())
    assert parts.keys() == {"heat", "box", "giou", "mask", "dice", "embed"} and torch.isfinite(loss)
    grads = torch.autograd.grad(loss, tuple(out.values()), allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in grads)
    if not valid.any():
      assert value(loss) == 0 and not any(g is not None and g.any() for g in grads)
    elif objects is none:
      assert all(value(v) == 0 for k, v in parts.items() if k != "heat")
    elif scale == 1.0:
      assert value(parts["embed"]) > 0 and value(parts["mask"]) > 0


def test_a_box_without_an_outline_beside_outlined_ones_teaches_no_mask(rng):
  """As in pictures of which some things have polygons: an empty mask is none."""
  center, size = rng.uniform([60, 60], [450, 200], (2, 2)), rng.uniform(30, 50, (2, 2))
  boxes = t(np.concatenate([center - size / 2, center + size / 2], 1))
  one = {"cls": torch.tensor([0, 1]), "track": torch.tensor([-1, -1]), "score": torch.ones(2).double()}
  outlined = t(rng.integers(0, 2, (1, *MASK)).astype(float))
  both = {"boxes": boxes, **one, "mask": torch.cat([outlined, torch.zeros_like(outlined)])}
  out, valid = {k: t(v) for k, v in random_outputs(rng, 1).items()}, torch.ones(1, *MASK, dtype=torch.bool)
  parts = mt.objects_loss(out, [both], valid)
  alone = mt.objects_loss(out, [{k: v[:1] for k, v in both.items()}], valid)
  for k in ("mask", "dice"):
    assert value(parts[k]) == pytest.approx(value(alone[k]), rel=1e-12) and value(alone[k]) > 0
