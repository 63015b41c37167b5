"""Dense labels as the bytes of Zarr's files, made in memory: what is written afterwards is whole or not there, and says
nothing of who wrote it, when or where."""

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from openpilot.tools.fair.labels.meta import CHUNK, attributes, dimensions
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.files import MB, read_bytes

META = "zarr.json"
INNER_BYTES = 1 << 17  # of what must be decompressed to read one row, about


def group_bytes(title: str, license: str) -> bytes:
  """zarr.json of a group."""
  files: dict[str, Any] = {}
  zarr.open_group(MemoryStore(files), mode="a", zarr_format=3, attributes={"title": title, "licence": license})
  return files[META].to_bytes()


def shard_name(label: Label, k: int) -> str:
  """The file of a dense label's chunk, by its name in the array's folder."""
  return "/".join(["c", str(k)] + ["0"] * len(label.shape))


class DenseEncoder:
  """Of one dense label of a group of `n` rows. folder: its array's; where that is begun, it is gone on with."""

  def __init__(self, label: Label, n: int, meta: dict[str, Any], folder: Path):
    self.label = label
    self.files: dict[str, Any] = {}
    store = MemoryStore(self.files)
    if (folder / META).exists():
      self.files[META] = cpu.Buffer.from_bytes(read_bytes(folder / META, MB))
      self.array: Any = zarr.open_array(store, mode="r+", zarr_format=3)
      return
    row = int(np.prod(label.shape)) * np.dtype(label.dtype).itemsize
    inner = 1
    while inner * 2 <= CHUNK and inner * 2 * row <= INNER_BYTES:
      inner *= 2
    # shuffled bytes make halves of floats compress; plain zstd is the denser for bytes
    wide = np.dtype(label.dtype).itemsize > 1
    self.array = zarr.create_array(
      store,
      shape=(n, *label.shape),
      dtype=label.dtype,
      chunks=(inner, *label.shape),
      shards=(CHUNK, *label.shape),
      compressors=BloscCodec(cname="zstd", clevel=1, shuffle="shuffle") if wide else ZstdCodec(level=1),
      fill_value=0,
      zarr_format=3,
      dimension_names=dimensions(label),
      attributes=attributes(label, meta),
    )

  @property
  def meta(self) -> bytes:
    return self.files[META].to_bytes()

  def shard(self, k: int, rows: range, values: np.ndarray) -> bytes | None:
    """values: (rows, ...) of chunk k. -> its file; None where all is the fill value, of which there is none."""
    self.array[rows.start : rows.stop] = values
    made = self.files.pop(shard_name(self.label, k), None)
    return None if made is None else made.to_bytes()
