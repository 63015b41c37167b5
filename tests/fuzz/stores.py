"""Damaged label stores: each file's bytes, values and kind, through all that a reader asks of a store."""

import contextlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.lib.errors import UserError
from tests.fuzz.fuzz import Case
from tests.fuzz.json_mutator import spoil_json
from tests.tools.fair.label_fixture import write_store

REFUSED = (UserError,)
NUMBERS = (
  -(2**63),
  -(2**31),
  -1,
  0,
  1,
  2,
  15,
  16,
  17,
  255,
  2**31 - 1,
  2**31,
  2**63 - 1,
  0.5,
  float("nan"),
  float("inf"),
)


def spoil_bytes(dat: bytes, r: random.Random) -> bytes:
  b = bytearray(dat)
  for _ in range(r.choice((1, 1, 3, 20))):
    at, size = r.randrange(len(b) + 1), r.choice((1, 4, 8, 100))
    kind = r.randrange(5)
    if kind == 0:
      b[at : at + size] = r.randbytes(size)
    elif kind == 1:
      del b[at : at + size]
    elif kind == 2:
      b[at:at] = r.randbytes(size)
    elif kind == 3:
      b[at : at + 8] = r.choice((2**64 - 1, 2**63, 2**40, 2**31, 0)).to_bytes(8, "little")
    else:
      del b[at:]
  return bytes(b)


def spoil_table(path: Path, r: random.Random) -> None:
  """Another value, type, name, length or order of a column, or none."""
  table = pq.read_table(path)
  k = r.randrange(table.num_columns)
  name, column = table.column_names[k], table.column(k).to_pylist()
  kind = r.randrange(6)
  if kind == 0:
    table = table.drop_columns([name])
  elif kind == 1:
    table = table.rename_columns([f"{c}x" if c == name else c for c in table.column_names])
  elif kind == 2:
    table = table.slice(r.randrange(table.num_rows + 1))
  elif kind == 3:
    table = table.take(pa.array([r.randrange(table.num_rows) for _ in range(r.choice((1, table.num_rows, 500)))]))
  else:
    value = r.choice((*NUMBERS, None, "", "x", "1 2 -3", "9" * 50, b"\xff", [1]))
    values = [value if kind == 4 or r.random() < 0.1 else v for v in column]
    try:
      table = table.set_column(k, name, pa.array(values))
    except (pa.ArrowException, OverflowError, TypeError, ValueError):  # these do not go into one column
      table = table.set_column(k, name, pa.array([str(v) for v in values]))
  pq.write_table(table, path)


def spoil(path: Path, others: list[Path], r: random.Random) -> None:
  kind = r.randrange(12)
  if kind == 0:
    path.unlink()
  elif kind == 1:
    path.unlink()
    make = (lambda: os.mkfifo(path), lambda: path.symlink_to("/dev/zero"), path.mkdir, lambda: path.symlink_to("/"))
    r.choice(make)()
  elif kind == 2:
    shutil.copy(r.choice(others), path)
  elif path.suffix == ".json" and kind < 10:
    path.write_bytes(spoil_json(path.read_bytes(), r))
  elif path.suffix == ".parquet" and kind < 10:
    spoil_table(path, r)
  else:
    path.write_bytes(spoil_bytes(path.read_bytes(), r))


def use(root: Path) -> None:
  """All that a reader asks of a store; what is wrong with one group is told, of another it may still be asked."""
  store = LabelStore(root)
  for g in store.groups():
    list(g.problems())
    for label in g.labels:
      if label.kind == "dense":
        g.read(label.name, 0, 16)
      else:
        g.table(label.name)
    g.state(0)
    assert g.size >= 0
  data = LabelDataset(root, [f"simulator/{x}" for x in ("depth", "segmentation", "objects", "points")])
  for i in range(0, len(data), 7):
    data[i]


@contextlib.contextmanager
def prepare(tmp: Path, counts: Counter[str]) -> Iterator[Callable[[random.Random], Case]]:
  whole, root = tmp / "whole", tmp / "store"
  write_store(whole, routes=("00000001--aaaaaaaaaa",), n=16)
  names = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
  use(whole)

  def cases(r: random.Random) -> Case:
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(whole, root)
    chosen = [r.choice(names) for _ in range(r.choice((1, 1, 1, 2)))]
    for name in dict.fromkeys(chosen):
      spoil(root / name, [whole / n for n in names], r)
    yield " and ".join(map(str, chosen)), lambda: use(root)

  yield cases
