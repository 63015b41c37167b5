"""From a teacher's batches to whole chunks of the store, in the input's pixels; what is no number is counted."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.labels.pipeline import Item, Work
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.teacher import COORDINATES, Label, Labels, State
from openpilot.tools.lib.errors import UserError

MOST_BROKEN = 0.5  # of a chunk's frames: a teacher that says NaN of more is broken, of fewer its NaN is unknown


@dataclass
class Pending:
  """A chunk that is being filled."""

  dense: dict[str, np.ndarray]
  tables: dict[str, list[dict[str, Any]]]
  filled: int = 0
  bad: list[int] = field(default_factory=list)
  broken: dict[str, set[int]] = field(default_factory=dict)  # label -> rows of which it says what is no number


def to_view(table: dict[str, Any], scale: tuple[float, float]) -> dict[str, Any]:
  """A table's coordinates from the pixels of the teacher's picture to those of the 512x256 view, both at pixel
  centers."""
  return {
    k: ((np.asarray(v) + 0.5) / scale[COORDINATES[k]] - 0.5).astype(np.float32) if k in COORDINATES else v
    for k, v in table.items()
  }


def no_numbers(x: np.ndarray, unit: str) -> np.ndarray:
  """(N, ...) of a dense label -> (N,) bool: frames in which it says NaN, or Inf where that is not the sky."""
  if x.dtype.kind != "f":
    return np.zeros(len(x), bool)
  flat = x.reshape(len(x), -1)
  return (np.isnan(flat) if unit == "m" else ~np.isfinite(flat)).any(axis=1)


def take(table: dict[str, Any], keep: np.ndarray, frames: np.ndarray) -> dict[str, Any]:
  return {
    k: frames if k == "frame" else [v[i] for i in keep] if isinstance(v, list) else np.asarray(v)[keep]
    for k, v in table.items()
  }


def sizes_of(items: list[Item]) -> np.ndarray:
  """(N, 2) width and height of single pictures."""
  return np.array([i.work.view.size(i.row) for i in items], np.int64).reshape(-1, 2)  # type: ignore[union-attr]


class Collector:
  """Takes labels batch by batch, and hands whole chunks to the writer."""

  def __init__(
    self,
    labels: list[Label],
    scale: tuple[float, float],
    write: Callable[..., None],
    teacher: str = "",
    said: list[Label] | None = None,
  ):
    """labels: as they are stored; said: as the teacher says them, where it sees another picture than the view."""
    self.labels, self.scale, self.write, self.teacher = labels, scale, write, teacher
    self.said = {x.name: x for x in said or labels}
    self.pending: dict[tuple[Path, int], Pending] = {}
    self.broken: Counter[str] = Counter()  # label -> frames of which it says what is no number

  def add_parts(self, batch: list[Item], parts: list[tuple[Labels, int]], state: State | None) -> None:
    """A batch's labels in pieces of so many frames. state: behind the batch, which no chunk's end cuts."""
    at = 0
    for labels, n in parts:
      self.add(batch[at : at + n], labels, state)
      at += n

  def add(self, batch: list[Item], labels: Labels, state: State | None) -> None:
    at = 0
    while at < len(batch):  # one run of rows within one chunk at a time
      work, k = batch[at].work, batch[at].row // CHUNK
      end = at
      while end < len(batch) and batch[end].work is work and batch[end].row // CHUNK == k:
        end += 1
      if k in work.todo:
        self._add(work, k, batch[at:end], labels, at, end, state)
      at = end

  def _add(self, work: Work, k: int, items: list[Item], labels: Labels, at: int, end: int, state: State | None) -> None:
    rows = work.group.rows(k)
    key = (work.group.path, k)
    if key not in self.pending:
      dense = {x.name: np.zeros((len(rows), *x.shape), x.dtype) for x in self.labels if x.kind == "dense"}
      self.pending[key] = Pending(dense, {x.name: [] for x in self.labels if x.kind != "dense"})
    p = self.pending[key]
    first = items[0].row - rows.start
    for label in self.labels:
      if label.kind == "dense":
        stored = p.dense[label.name][first : first + len(items)]
        with np.errstate(over="ignore"):
          said = np.asarray(labels[label.name][at:end])
          if work.refit is not None:
            said = work.refit.dense(self.said[label.name], label, said, sizes_of(items))
          elif work.picture is not None:
            said = work.picture.dense(self.said[label.name], said)
          stored[:] = said
        p.broken.setdefault(label.name, set()).update(
          first + i for i in np.flatnonzero(no_numbers(stored, label.unit)).tolist()
        )
      else:
        table = labels[label.name]
        frame = np.asarray(table["frame"], np.int64)
        here = (frame >= at) & (frame < end)
        sound = np.all(
          [np.isfinite(np.asarray(table[c], np.float64)) for c in (*COORDINATES, "score") if c in table], axis=0
        ) | np.zeros(len(frame), bool)
        p.broken.setdefault(label.name, set()).update((first + np.unique(frame[here & ~sound]) - at).tolist())
        keep = np.flatnonzero(here & sound)
        taken = take(table, keep, frame[keep] - at + first)
        if work.refit is not None:
          p.tables[label.name].append(work.refit.table(taken, sizes_of(items)[frame[keep] - at]))
          continue
        if work.picture is not None:
          taken = work.picture.table(self.said[label.name], taken)
        p.tables[label.name].append(to_view(taken, self.scale))
    p.filled += len(items)
    p.bad += [i.row for i in items if not i.good]
    if p.filled == len(rows):
      del self.pending[key]
      for name, broken in p.broken.items():
        if len(broken) > MOST_BROKEN * len(rows):
          where = f"{len(broken)} of {len(rows)} frames of {work.group.segment} from row {rows.start}"
          what = f"teacher '{self.teacher}' puts out NaN or Inf as '{name}' in {where}"
          raise UserError(
            f"{what}, which are not stored; look at its checkpoint, or try --option {self.teacher}.precision=float32 "
            "where it has that"
          )
        self.broken[name] += len(broken)
      done: Labels = dict(p.dense)
      for name, parts in p.tables.items():
        columns = {c: [x[c] for x in parts] for c in parts[0]}
        done[name] = {
          c: list(chain.from_iterable(x)) if isinstance(x[0], list) else np.concatenate(x) for c, x in columns.items()
        }
      self.write(work, k, done, state, p.bad)
