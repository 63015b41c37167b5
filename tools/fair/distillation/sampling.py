"""How often the clips of a segment are drawn, beside those of others: so that conditions of which there is little, as
night, are seen as often as others."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from openpilot.tools.fair.globs import numbers_of
from openpilot.tools.lib.errors import UserError


def parse_sample(items: Sequence[str]) -> list[tuple[str, float]]:
  """'GLOB=W' each -> (glob, weight). Raises UserError."""
  return numbers_of("--sample", items, "SEGMENTS=W, as 'night*=6'", 0, 100)


def weights_of(names: Sequence[str], items: Sequence[str]) -> np.ndarray:
  """(N,) float: of each segment, 1 where nothing fits its name; of what fits the last counts. Raises UserError where
  one of `items` fits no segment, or nothing is left to draw."""
  weights = np.ones(len(names))
  for glob, weight in parse_sample(items):
    fits = np.array([fnmatchcase(n, glob) for n in names], bool)
    if not fits.any():
      known = ", ".join(sorted(names)[:8]) + (", ..." if len(names) > 8 else "")
      raise UserError(f"--sample {glob}={weight:g} fits no segment that is learned from; they are {known}")
    weights[fits] = weight
  if len(names) and not weights.any():
    raise UserError("--sample leaves nothing to draw: all its weights are 0")
  return weights


def drawn(order: np.ndarray, weights: np.ndarray, seed: Sequence[int]) -> np.ndarray:
  """One epoch: `order` (N,) clips, each as often as its weight says, (N,) by clip: of 2.5 twice or three times, by the
  seed. What is drawn again is spread over the epoch; the rest keeps its order, which reads every chunk once."""
  if (weights == 1).all():
    return order
  r = np.random.default_rng(seed)
  times = (np.floor(weights) + (r.uniform(size=len(weights)) < weights % 1)).astype(int)
  first = order[times[order] > 0]
  again = r.permutation(np.repeat(np.arange(len(times)), np.maximum(times - 1, 0)))
  out = np.insert(first, r.integers(0, len(first) + 1, len(again)), again)
  if not len(out):  # of weights below 1 an epoch may have none
    return order[weights[order] == weights.max()]
  return out


def shares(names: Sequence[str], clips: np.ndarray, items: Sequence[str]) -> list[dict[str, Any]]:
  """What --sample makes of an epoch: for each of `items` its segments, clips, and their share of what is drawn.
  clips: (N,) of each segment."""
  total = weights_of(names, items) * clips
  out = []
  for glob, weight in parse_sample(items):
    fits = np.array([fnmatchcase(n, glob) for n in names], bool)
    share = round(float(total[fits].sum() / max(total.sum(), 1e-9)), 4)
    out.append(
      {"of": glob, "weight": weight, "segments": int(fits.sum()), "clips": int(clips[fits].sum()), "share": share}
    )
  return out


def in_words(said: Sequence[dict[str, Any]]) -> list[str]:
  return [
    f"{s['of']} drawn with weight {s['weight']:g}: {s['clips']} clips of {s['segments']} segments, {s['share']:.0%} of "
    "what is seen"
    for s in said
  ]
