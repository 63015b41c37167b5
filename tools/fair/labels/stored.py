"""Opening the files of a label store that may have come from elsewhere: what does not fit to the group, or would take
all memory, is refused."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import zarr

from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import MANY, MB, atomic_path, ordinary

MOST_SIDE = 1 << 20  # pixels of a picture
TABLE_LIMIT = 512 * MB  # bytes of one chunk's table, unpacked
PIECE_LIMIT = 256 * MB  # of what must be unpacked to read one row of a dense label


@contextlib.contextmanager
def disk_full_is_said(where: Path) -> Iterator[None]:
  try:
    yield
  except OSError as e:
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(
        f"the disk is full: {where} stays at its last whole chunk; free some space and run the command again"
      ) from e
    raise


@contextlib.contextmanager
def damage_is_said(path: Path) -> Iterator[None]:
  """Around what reads one file of a chunk. Zarr's, its codecs' and Parquet's ways to fail have no common base."""
  try:
    yield
  except MemoryError:
    raise
  except Exception as e:
    why = " ".join(str(e).replace(str(path), "it").split())[:120]
    raise UserError(
      f"{path} is damaged ({why}); label its route again: the same `tools/op.sh label ...` with --repair"
    ) from None


def read_table(path: Path) -> pa.Table:
  """A Parquet file whose claims are looked at first, texts by what they take when written out. Raises OSError,
  ValueError, UserError."""
  about = pq.read_metadata(ordinary(path, TABLE_LIMIT))
  size = sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
  if about.num_rows > MANY or size > TABLE_LIMIT:
    raise ValueError(f"{about.num_rows} rows of {size} bytes are more than a chunk has")
  texts = [f.name for f in about.schema.to_arrow_schema() if pa.types.is_string(f.type)]
  table = pq.read_table(path, read_dictionary=texts)  # a short file can name one long text a million times
  for name in texts:
    column = table[name]
    lengths = (pc.sum(pc.binary_length(part.dictionary).take(part.indices)).as_py() or 0 for part in column.chunks)
    if sum(lengths) > TABLE_LIMIT:
      raise ValueError(f"the texts of '{name}' are too long")
    table = table.set_column(table.column_names.index(name), name, column.cast(pa.string()))
  return table


def write_table(path: Path, table: pa.Table, **how: Any) -> None:
  """Atomically. how: as Parquet's writer takes it. Raises UserError as atomic_path() does."""
  with atomic_path(path) as tmp:
    pq.write_table(table, tmp.absolute(), **how)  # a relative name with a colon would be taken for a URL


def check_columns(table: pa.Table, names: tuple[str, ...]) -> None:
  """Raises ValueError where one is not there, or no column of whole numbers."""
  for name in names:
    if name not in table.column_names:
      raise ValueError(f"a table has no column '{name}'")
    if not pa.types.is_integer(table[name].type) or table[name].null_count:
      raise ValueError(f"'{name}' is no column of whole numbers")


def check_sizes(frames: pa.Table) -> None:
  """Raises ValueError where single pictures have sizes that none has."""
  sides = [c for c in ("width", "height") if c in frames.column_names]
  check_columns(frames, tuple(sides))
  for name in sides:
    least, most = (pc.min_max(frames[name])[k].as_py() for k in ("min", "max"))
    if least is not None and not 1 <= least <= most <= MOST_SIDE:
      raise ValueError(f"'{name}' goes from {least} to {most}, which is no picture's")


def checked_table(table: pa.Table, rows: range, label: Label) -> pa.Table:
  """The table, if its rows are the chunk's and its classes the label's. Raises ValueError."""
  check_columns(table, ("row", "frame_id", "segment_id"))
  for name, low, high in (("row", rows.start, rows.stop), ("cls", 0, len(label.classes) or MANY)):
    if name not in table.column_names:
      continue
    column = table[name]
    if not pa.types.is_integer(column.type) or column.null_count:
      raise ValueError(f"'{name}' is no column of whole numbers")
    least, most = (pc.min_max(column)[k].as_py() for k in ("min", "max"))
    if least is not None and not (low <= least and most < high):
      raise ValueError(f"'{name}' goes from {least} to {most}, outside {low} to {high - 1}")
  return table


def open_dense(path: Path, shape: tuple[int, ...], dtype: str) -> Any:
  """A Zarr array that is what the group says, in pieces of a bearable size. Of format 3 alone: version 2 has filters
  that are pickles, which are code."""
  ordinary(path / "zarr.json", MB)
  array: Any = zarr.open_array(str(path), mode="r", zarr_format=3)
  row = int(np.prod(shape[1:], dtype=object)) * np.dtype(dtype).itemsize
  if array.shape != shape or array.dtype != np.dtype(dtype):
    raise ValueError(f"it is {array.dtype}{list(array.shape)}, the group says {dtype}{list(shape)}")
  if (
    array.shards != (CHUNK, *shape[1:])
    or array.chunks[1:] != shape[1:]
    or not 1 <= array.chunks[0] <= CHUNK
    or row * array.chunks[0] > PIECE_LIMIT
  ):
    raise ValueError(f"its pieces of {list(array.chunks)} in {list(array.shards or [])} are not what is written here")
  return array
