"""One group of a label store: see store.py."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpilot.tools.fair.labels.encode import META, DenseEncoder, shard_name
from openpilot.tools.fair.labels.meta import CHUNK, read_meta
from openpilot.tools.fair.labels.remote import Remote
from openpilot.tools.fair.labels.rules import stale_rules
from openpilot.tools.fair.labels.stored import (
  check_columns,
  check_sizes,
  checked_table,
  damage_is_said,
  disk_full_is_said,
  open_dense,
  read_table,
  write_table,
)
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Label, Labels, State
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import atomic_path, ordinary, read_arrays, read_json, write_bytes

COMMIT_LIMIT = 1 << 20  # bytes: some files of a chunk, and rows
MOST_NAME = 200  # letters of such a file's name


def file_hash(path: Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


class Group:
  """One segment's labels by one teacher."""

  def __init__(self, path: Path, remote: Remote | None = None):
    """path: its folder, of a remote store in its mirror."""
    self.path, self.remote = path, remote
    self.refresh()
    try:
      self.meta: dict[str, Any] = read_meta(path / "group.json")
      self.frames = read_table(path / "frames.parquet")
      check_columns(self.frames, ("frame_id", "segment_id", "timestamp_eof"))
      check_sizes(self.frames)
      self.labels = [
        Label(**{**m, "shape": tuple(m["shape"]), "classes": tuple(m["classes"])}) for m in self.meta["labels"]
      ]
    except (OSError, ValueError, TypeError, RecursionError) as e:
      raise UserError(
        f"{self.place} is no group of labels: {' '.join(str(e).split())[:120]}; delete it and label again"
      ) from None
    self.n: int = self.frames.num_rows
    self._arrays: dict[str, Any] = {}  # zarr.Array: what it types as the result of indexing is of no use
    self._encoders: dict[str, DenseEncoder] = {}

  def refresh(self) -> None:
    """What a remote store has of it now."""
    if self.remote is not None:
      self.there = self.remote.sync(self.name)

  def _fetched(self, path: Path) -> Path:
    """Of a remote store's group a file, in the mirror if it is anywhere."""
    if self.remote is not None and not path.exists() and self.remote.name(path) in self.there:
      self.remote.fetch(self.remote.name(path))
    return path

  def fetch(self) -> None:
    """All that its chunks have, for processes that cannot fetch."""
    if self.remote is not None:
      files = {self.path / f for k in self.done() for f in self.commit(k)["files"]}
      self.remote.fetch_all(self.remote.name(p) for p in files if not p.exists())

  def _send(self, path: Path) -> Path:
    if self.remote is not None:
      self.remote.send(path)
      self.there[self.remote.name(path)] = f"new {path.stat().st_size}"
    return path

  def _remove(self, path: Path) -> None:
    if self.remote is not None:
      self.remote.remove(self.remote.name(path))
    path.unlink(missing_ok=True)

  @property
  def teacher(self) -> str:
    return self.meta["teacher"]["name"]

  @property
  def segment(self) -> str:
    return self.meta["segment"]

  @property
  def name(self) -> str:
    """In its store."""
    return f"{self.path.parent.name}/{self.path.name}"

  @property
  def place(self) -> str:
    """For people: of a remote store its URL."""
    return f"{self.path}" if self.remote is None else f"{self.remote.url}/{self.name}"

  @property
  def camera_height(self) -> float | None:
    """Of the segment's camera above the road, m, as its log says; None where it was not stored."""
    return self.meta.get("camera_height")

  @property
  def input(self) -> InputSpec:
    """What its frames are, and in whose pixels its labels are."""
    return InputSpec.from_dict(self.meta.get("input"))

  def picture_size(self, row: int) -> tuple[int, int] | None:
    """(width, height) of a frame's own picture, pixels, before it was letterboxed; None of a route's."""
    if "width" not in self.frames.column_names:
      return None
    return self.frames["width"][row].as_py(), self.frames["height"][row].as_py()

  @property
  def stale(self) -> list[str]:
    """Rules that were mended since this was labeled: see rules.py."""
    return stale_rules(self.meta)

  @property
  def chunk_count(self) -> int:
    return -(-self.n // CHUNK)

  def rows(self, k: int) -> range:
    return range(k * CHUNK, min(self.n, (k + 1) * CHUNK))

  def commit_path(self, k: int) -> Path:
    return self.path / "chunks" / f"{k:05d}.json"

  def commit(self, k: int) -> dict[str, Any]:
    """What was written last of a chunk: its files, by names inside the group, with their sha256. Raises OSError,
    ValueError."""
    said = read_json(self.commit_path(k), COMMIT_LIMIT)
    files = said.get("files") if isinstance(said, dict) else None
    if not isinstance(files, dict) or any(
      Path(name).is_absolute() or ".." in Path(name).parts or len(name) > MOST_NAME for name in files
    ):
      raise ValueError(f"{self.commit_path(k).name} is no list of the group's files")
    return said

  def shard(self, label: Label, k: int) -> Path:
    """The file of a dense label's chunk."""
    return self.path / f"{label.name}.zarr" / shard_name(label, k)

  def done(self) -> set[int]:
    return {int(p.stem) for p in (self.path / "chunks").glob("[0-9]*.json")}

  def bad(self) -> set[int]:
    """Rows whose frame could not be decoded. Raises UserError where a chunk's file is damaged."""
    out: set[int] = set()
    for k in self.done():
      try:
        rows = {range(self.n)[int(r)] for r in self.commit(k).get("bad", ())}
      except (OSError, ValueError, TypeError, IndexError):
        raise UserError(f"{self.commit_path(k)} is damaged; label again with --repair") from None
      out |= rows
    return out

  @property
  def row_count(self) -> int:
    """Rows that are labeled."""
    return sum(len(self.rows(k)) for k in self.done())

  # *** writing ***

  def _encoder(self, label: Label) -> DenseEncoder:
    if label.name not in self._encoders:
      folder = self.path / f"{label.name}.zarr"
      made = self._encoders[label.name] = DenseEncoder(label, self.n, self.meta, folder)
      if not (folder / META).exists():
        write_bytes(folder / META, made.meta)
        self._send(folder / META)
    return self._encoders[label.name]

  def write_chunk(self, k: int, labels: Labels, state: State | None = None, bad: list[int] | None = None) -> None:
    """labels: dense arrays of the chunk's rows; tables whose column 'frame' counts rows from the chunk's first. state:
    the teacher's, behind this chunk.
    bad: rows whose frame could not be decoded. Raises UserError where the disk is full; then nothing of this chunk
    counts."""
    rows = self.rows(k)
    files: list[Path] = []
    with disk_full_is_said(self.path):
      for label in self.labels:
        if label.kind == "dense":
          made, shard = self._encoder(label).shard(k, rows, labels[label.name]), self.shard(label, k)
          if made is None:  # of nothing but the fill value
            self._remove(shard)
          else:
            write_bytes(shard, made)
            files.append(self._send(shard))
        else:
          path = self.path / label.name / f"{k:05d}.parquet"
          write_table(path, self._table(labels[label.name], rows.start), compression="zstd")
          files.append(self._send(path))
      if state is not None:
        path = self.path / "chunks" / f"{k:05d}.npz"
        with atomic_path(path) as tmp:
          np.savez(tmp, **state)  # type: ignore[arg-type]
        files.append(self._send(path))
      commit = {"files": {str(f.relative_to(self.path)): file_hash(f) for f in files}, "bad": bad or []}
      write_bytes(self.commit_path(k), json.dumps(commit).encode())
      self._send(self.commit_path(k))
    if self.remote is not None:  # of a writer's mirror nobody reads the large files
      for label in self.labels:
        if label.kind == "dense":
          self.shard(label, k).unlink(missing_ok=True)
    if state is not None:
      self.forget_states()

  def forget_states(self) -> None:
    """Of a teacher's states the newest is kept: none is gone on from but that."""
    done = self.done()
    kept = sorted(p for p in (self.path / "chunks").glob("[0-9]*.npz") if int(p.stem) in done)
    for path in kept[:-1]:
      commit = self.commit(int(path.stem))
      if commit["files"].pop(str(path.relative_to(self.path)), None) is not None:
        write_bytes(self.commit_path(int(path.stem)), json.dumps(commit).encode())
        self._send(self.commit_path(int(path.stem)))
      self._remove(path)

  def _table(self, table: dict[str, Any], first: int) -> pa.Table:
    rows = np.asarray(table["frame"], np.int64) + first
    columns: dict[str, Any] = {c: self.frames[c].take(pa.array(rows)) for c in ("frame_id", "segment_id")}
    for name, values in table.items():
      if name != "frame":
        columns[name] = pa.array(values, pa.string()) if isinstance(values, list) else pa.array(values)
    return pa.table({"row": pa.array(rows.astype(np.int32)), **columns})

  def state(self, k: int) -> State | None:
    """The teacher's state behind chunk k, if it was kept."""
    path = self.path / "chunks" / f"{k:05d}.npz"
    if k not in self.done() or not path.exists():
      return None
    with damage_is_said(path):
      return read_arrays(path)

  def drop_chunk(self, k: int) -> None:
    self._remove(self.commit_path(k))

  # *** reading ***

  def label(self, name: str) -> Label:
    for label in self.labels:
      if label.name == name:
        return label
    raise UserError(f"{self.place} has no label '{name}'; it has {', '.join(x.name for x in self.labels)}")

  def dense(self, name: str) -> Any:
    """(rows, ...) Zarr array; rows of chunks that are not done are zero: see done(). What it reads is not checked: see
    read()."""
    label = self.label(name)
    if name not in self._arrays:
      path = self.path / f"{label.name}.zarr"
      with damage_is_said(path / "zarr.json"):
        self._arrays[name] = open_dense(path, (self.n, *label.shape), label.dtype)
    return self._arrays[name]

  def read(self, name: str, first: int, stop: int) -> np.ndarray:
    """(stop - first, ...): rows of a dense label, all of one chunk. Raises UserError that names the chunk's file where
    it is damaged."""
    array, k = self.dense(name), first // CHUNK
    shard = self.shard(self.label(name), k)
    with damage_is_said(shard):
      if self._fetched(shard).exists():
        ordinary(shard)
      elif str(shard.relative_to(self.path)) in self.commit(k)["files"]:
        raise FileNotFoundError("it is gone")  # Zarr would read zeros
      return np.asarray(array[first:stop])

  def row(self, name: str, r: int) -> np.ndarray:
    """One row of a dense label; as read()."""
    return self.read(name, r, r + 1)[0]

  def table(self, name: str) -> pa.Table:
    """All rows so far: row, frame_id, segment_id and the label's columns. Raises UserError that names a file that is
    damaged."""
    self.label(name)
    parts = []
    for k in sorted(self.done()):
      path = self.path / name / f"{k:05d}.parquet"
      with damage_is_said(path):
        parts.append(checked_table(read_table(self._fetched(path)), self.rows(k), self.label(name)))
    if not parts:
      raise UserError(f"{self.place} holds no finished chunk yet; run the labeling command again")
    return pa.concat_tables(parts, promote_options="permissive")

  def entry_count(self, name: str) -> int:
    """Rows of a table so far, over all frames."""
    paths = [self.path / name / f"{k:05d}.parquet" for k in self.done()]
    return sum(pq.read_metadata(p).num_rows for p in paths if self._fetched(p).exists())

  def problems(self) -> Iterator[tuple[int, str]]:
    """(chunk, what is wrong) of every finished chunk whose files are not what was written."""
    for k in sorted(self.done()):
      try:
        files = self.commit(k)["files"]
      except (OSError, ValueError):
        yield k, f"{self.commit_path(k)} is damaged"
        continue
      for name, digest in files.items():
        path = self._fetched(self.path / name)
        if not path.exists():
          yield k, f"{path} is gone"
        elif not path.is_file() or file_hash(path) != digest:
          yield k, f"{path} is not what was written"

  @property
  def size(self) -> int:
    if self.remote is not None:
      self.refresh()
      return sum(int(x.rpartition(" ")[2]) for x in self.there.values())
    return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())
