"""Labels read back for training: one item a frame, over all segments of a store."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.labels.store import CHUNK, Group, LabelStore
from openpilot.tools.lib.errors import UserError


class LabelDataset:
  """Frames that every one of `names` has labelled; for torch's DataLoader, batched by __getitems__.

  names: 'teacher/label'; 'frames/frame' is the model frame. An item: {name: array} for dense labels, {name: {column: array}} for tables, and segment,
  frame_id. Raises UserError where a teacher has no labels here, or several sets of them for one segment.
  """

  def __init__(self, root: str | Path, names: Sequence[str]):
    self.names = list(names)
    store = LabelStore(root)
    by_segment: dict[str, dict[str, Group]] = {}
    for g in store.groups():
      there = by_segment.setdefault(g.segment, {})
      if g.teacher in there and any(n.split("/")[0] == g.teacher for n in self.names):
        raise UserError(f"segment {g.segment} has two sets of labels by '{g.teacher}'; delete one: {g.path} or {there[g.teacher].path}")
      there[g.teacher] = g
    self.parts: list[tuple[str, dict[str, Group]]] = []
    rows: list[np.ndarray] = []
    for segment, groups in by_segment.items():
      if not all(n.split("/")[0] in groups for n in self.names):
        continue
      chosen = {n.split("/")[0]: groups[n.split("/")[0]] for n in self.names}
      frame_ids = {t: self._ids(g) for t, g in chosen.items()}
      common = sorted(set.intersection(*(set(ids) for ids in frame_ids.values())))
      rows.append(np.array([[len(self.parts), f, *(frame_ids[t][f] for t in chosen)] for f in common], np.int64).reshape(len(common), 2 + len(chosen)))
      self.parts.append((segment, chosen))
    if not self.parts:
      raise UserError(
        f"{root} has no segment that all of {', '.join(self.names)} have labelled; it has {', '.join(sorted({g.teacher for g in store.groups()}))}"
      )
    self.index = np.concatenate(rows)  # part, frame id, row in each group
    self.tables: dict[tuple[int, str], tuple[dict[str, Any], np.ndarray]] = {}
    self.window = 0
    self.blocks: OrderedDict[tuple[int, str, int], np.ndarray] = OrderedDict()  # part, name, chunk -> its rows

  @staticmethod
  def _ids(group: Group) -> dict[int, int]:
    """frame id -> row, of finished chunks."""
    ids = group.frames["frame_id"].to_numpy()
    return {int(ids[r]): r for k in sorted(group.done()) for r in group.rows(k)}

  def __len__(self) -> int:
    return len(self.index)

  def shuffled(self, seed: int, window: int = 8) -> np.ndarray:
    """An order of all items: chunks at random, and items at random within `window` of them, which are then read whole and once. Four times as fast as an order
    without regard to chunks. For a sampler, one seed an epoch."""
    r = np.random.default_rng(seed)
    self.window = window
    chunk = np.unique(np.stack([self.index[:, 0], self.index[:, 2] // CHUNK]), axis=1, return_inverse=True)[1].reshape(-1)
    place = r.permutation(chunk.max() + 1)[chunk] // window
    return np.lexsort((r.permutation(len(chunk)), place))

  def _rows(self, part: int, name: str, rows: np.ndarray) -> np.ndarray:
    """Rows of one chunk of a dense label."""
    teacher, label = name.split("/")
    group = self.parts[part][1][teacher]
    array = group.dense(label)
    if not self.window:
      return np.stack([array[int(r)] for r in rows])  # Zarr's own indexing by lists takes ten times as long
    k = int(rows[0]) // CHUNK
    key = (part, name, k)
    if key not in self.blocks:
      span = group.rows(k)
      self.blocks[key] = np.asarray(array[span.start : span.stop])
      while len(self.blocks) > (self.window + 1) * len(self.names):
        self.blocks.popitem(last=False)
    self.blocks.move_to_end(key)
    return self.blocks[key][rows - k * CHUNK]

  def __getitem__(self, i: int) -> dict[str, Any]:
    return self.__getitems__([i])[0]

  def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = [{"segment": self.parts[p][0], "frame_id": int(f)} for p, f in self.index[indices, :2]]
    for name in self.names:
      teacher, label = name.split("/")
      places: dict[tuple[int, int], list[int]] = {}
      rows = np.zeros(len(indices), np.int64)
      for j, i in enumerate(indices):
        part = int(self.index[i, 0])
        rows[j] = self.index[i, 2 + list(self.parts[part][1]).index(teacher)]
        places.setdefault((part, int(rows[j]) // CHUNK), []).append(j)
      for (part, _), js in places.items():
        group = self.parts[part][1][teacher]
        if group.label(label).kind == "dense":
          for j, v in zip(js, self._rows(part, name, rows[js]), strict=True):
            out[j][name] = v
        else:
          columns, starts = self._table(part, teacher, label)
          for j in js:
            a, b = starts[rows[j]], starts[rows[j] + 1]
            out[j][name] = {c: v[a:b] for c, v in columns.items()}
    return out

  def _table(self, part: int, teacher: str, label: str) -> tuple[dict[str, Any], np.ndarray]:
    key = (part, f"{teacher}/{label}")
    if key not in self.tables:
      group = self.parts[part][1][teacher]
      table = group.table(label)
      row = table["row"].to_numpy()
      order = np.argsort(row, kind="stable")
      columns = {c: table[c].to_numpy()[order] for c in table.column_names if c not in ("row", "frame_id", "segment_id")}
      self.tables[key] = columns, np.searchsorted(row[order], np.arange(group.n + 1))
    return self.tables[key]
