"""Labels read back for training: one item a frame, over all segments of a store."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.lib.errors import UserError


class Reader:
  """Rows of many groups. window: so many chunks of each label are kept decoded; 0 decodes row by row."""

  def __init__(self, window: int = 0):
    self.window = window
    self.labels = 1  # that are read in turn
    self.blocks: OrderedDict[tuple[Path, str, int], np.ndarray] = OrderedDict()  # group, label, chunk -> its rows
    self.tables: dict[tuple[Path, str], tuple[dict[str, Any], np.ndarray]] = {}

  def dense(self, group: Group, label: str, rows: Sequence[int]) -> np.ndarray:
    """(len(rows), ...) of a dense label, rows in any order."""
    if not self.window:
      return np.stack([group.row(label, int(r)) for r in rows])  # Zarr's own indexing by lists takes ten times as long
    return np.stack([self._block(group, label, int(r) // CHUNK)[int(r) % CHUNK] for r in rows])

  def _block(self, group: Group, label: str, k: int) -> np.ndarray:
    key = (group.path, label, k)
    if key not in self.blocks:
      span = group.rows(k)
      self.blocks[key] = group.read(label, span.start, span.stop)
      while len(self.blocks) > (self.window + 1) * self.labels:
        self.blocks.popitem(last=False)
    self.blocks.move_to_end(key)
    return self.blocks[key]

  def table(self, group: Group, label: str, row: int) -> dict[str, np.ndarray]:
    """The columns of one row's entries."""
    key = (group.path, label)
    if key not in self.tables:
      table = group.table(label)
      at = table["row"].to_numpy()
      order = np.argsort(at, kind="stable")
      columns = {
        c: table[c].to_numpy()[order] for c in table.column_names if c not in ("row", "frame_id", "segment_id")
      }
      self.tables[key] = columns, np.searchsorted(at[order], np.arange(group.n + 1))
    columns, starts = self.tables[key]
    return {c: v[starts[row] : starts[row + 1]] for c, v in columns.items()}


def rows_by_frame(group: Group) -> dict[int, int]:
  """frame id -> row, of finished chunks."""
  ids = group.frames["frame_id"].to_numpy()
  return {int(ids[r]): r for k in sorted(group.done()) for r in group.rows(k)}


def shuffled_chunks(chunk: np.ndarray, seed: Sequence[int], window: int) -> np.ndarray:
  """chunk: (N,) the chunk of every item -> an order of the items: chunks at random, and items at random within `window`
  of them."""
  r = np.random.default_rng(seed)
  place = r.permutation(chunk.max() + 1)[chunk] // window
  return np.lexsort((r.permutation(len(chunk)), place))


class LabelDataset:
  """Frames that every one of `names` has labeled; for torch's DataLoader, batched by __getitems__.

  names: 'teacher/label'; 'frames/frame' is the model frame. An item: {name: array} for dense labels, {name: {column:
  array}} for tables, and segment, frame_id. Raises UserError where a teacher has no labels here, several sets of them
  for one segment, or stale ones (rules.py) without stale_labels."""

  def __init__(self, root: str | Path, names: Sequence[str], stale_labels: bool = False):
    self.names = list(names)
    store = LabelStore(root)
    self.parts: list[tuple[str, dict[str, Group]]] = []
    rows: list[np.ndarray] = []
    for segment, groups in store.by_segment({n.split("/")[0] for n in self.names}).items():
      if not all(n.split("/")[0] in groups for n in self.names):
        continue
      chosen = {n.split("/")[0]: groups[n.split("/")[0]] for n in self.names}
      bad = {t: g.bad() for t, g in chosen.items()}
      frame_ids = {t: {f: r for f, r in rows_by_frame(g).items() if r not in bad[t]} for t, g in chosen.items()}
      common = sorted(set.intersection(*(set(ids) for ids in frame_ids.values())))
      rows.append(
        np.array([[len(self.parts), f, *(frame_ids[t][f] for t in chosen)] for f in common], np.int64).reshape(
          len(common), 2 + len(chosen)
        )
      )
      self.parts.append((segment, chosen))
    if not self.parts:
      raise UserError(
        f"{root} has no segment that all of {', '.join(self.names)} have labeled; it has "
        f"{', '.join(sorted({g.teacher for g in store.groups()}))}"
      )
    store.check_stale((g for _, groups in self.parts for g in groups.values()), stale_labels)
    self.index = np.concatenate(rows)  # part, frame id, row in each group
    self.reader = Reader()
    self.reader.labels = len(self.names)

  def __len__(self) -> int:
    return len(self.index)

  def shuffled(self, seed: int, window: int = 8) -> np.ndarray:
    """An order of all items: chunks at random, and items at random within `window` of them, which are then read whole
    and once. Four times as fast as an order without regard to chunks. For a sampler, one seed an epoch."""
    self.reader.window = window
    return shuffled_chunks(
      np.unique(np.stack([self.index[:, 0], self.index[:, 2] // CHUNK]), axis=1, return_inverse=True)[1].reshape(-1),
      [seed],
      window,
    )

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self.__getitems__([i])[0]

  def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = [{"segment": self.parts[p][0], "frame_id": int(f)} for p, f in self.index[indices, :2]]
    for j, i in enumerate(indices):
      groups = self.parts[int(self.index[i, 0])][1]
      for name in self.names:
        teacher, label = name.split("/")
        group, row = groups[teacher], self.index[i, 2 + list(groups).index(teacher)]
        dense = group.label(label).kind == "dense"
        out[j][name] = self.reader.dense(group, label, [row])[0] if dense else self.reader.table(group, label, int(row))
    return out
