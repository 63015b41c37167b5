"""The label store: what teachers say of routes, one group per segment, teacher and key.

DIR/store.json
DIR/<route>--<segment>/<teacher>-<key>/group.json      all that decides the labels; the key is its hash, but for
                                                       camera_height
                                      frames.parquet   frame_id, segment_id, timestamp_eof of every row
                                      <label>.zarr     dense: Zarr v3, (rows, ...), one shard per chunk of rows
                                      <label>/00000.parquet   tables: one file per chunk, with frame_id and segment_id
                                      chunks/00000.json       written last: the chunk's files and their sha256. Without
                                                              it the chunk is not there

A killed run leaves at worst files of a chunk without its json, which the next run writes again. Coordinates are in the
512x256 model view."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from openpilot.tools.fair.labels.claims import CLAIMS, Claims
from openpilot.tools.fair.labels.encode import META, DenseEncoder, group_bytes, shard_name
from openpilot.tools.fair.labels.meta import CHUNK, VERSION, read_meta
from openpilot.tools.fair.labels.rules import check_stale, stale_rules
from openpilot.tools.fair.labels.stored import (
  check_columns,
  check_sizes,
  checked_table,
  damage_is_said,
  disk_full_is_said,
  open_dense,
  read_table,
)
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Label, Labels, State
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import atomic_path, ordinary, read_arrays, read_json, write_bytes, write_json
from openpilot.tools.lib.said import command

COMMIT_LIMIT = 1 << 20  # bytes: some files of a chunk, and rows
MOST_NAME = 200  # letters of such a file's name


def key_of(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:12]


def file_hash(path: Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


class Group:
  """One segment's labels by one teacher."""

  def __init__(self, path: Path):
    self.path = path
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
        f"{path} is no group of labels: {' '.join(str(e).split())[:120]}; delete it and label again"
      ) from None
    self.n: int = self.frames.num_rows
    self._arrays: dict[str, Any] = {}  # zarr.Array: what it types as the result of indexing is of no use
    self._encoders: dict[str, DenseEncoder] = {}

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
            shard.unlink(missing_ok=True)
          else:
            write_bytes(shard, made)
            files.append(shard)
        else:
          path = self.path / label.name / f"{k:05d}.parquet"
          with atomic_path(path) as tmp:
            pq.write_table(self._table(labels[label.name], rows.start), tmp, compression="zstd")
          files.append(path)
      if state is not None:
        path = self.path / "chunks" / f"{k:05d}.npz"
        with atomic_path(path) as tmp:
          np.savez(tmp, **state)  # type: ignore[arg-type]
        files.append(path)
      commit = {"files": {str(f.relative_to(self.path)): file_hash(f) for f in files}, "bad": bad or []}
      write_bytes(self.commit_path(k), json.dumps(commit).encode())
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
      path.unlink(missing_ok=True)

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
    self.commit_path(k).unlink(missing_ok=True)

  # *** reading ***

  def label(self, name: str) -> Label:
    for label in self.labels:
      if label.name == name:
        return label
    raise UserError(f"{self.path} has no label '{name}'; it has {', '.join(x.name for x in self.labels)}")

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
      if shard.exists():
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
        parts.append(checked_table(read_table(path), self.rows(k), self.label(name)))
    if not parts:
      raise UserError(f"{self.path} holds no finished chunk yet; run the labeling command again")
    return pa.concat_tables(parts, promote_options="permissive")

  def entry_count(self, name: str) -> int:
    """Rows of a table so far, over all frames."""
    paths = [self.path / name / f"{k:05d}.parquet" for k in self.done()]
    return sum(pq.read_metadata(p).num_rows for p in paths if p.exists())

  def problems(self) -> Iterator[tuple[int, str]]:
    """(chunk, what is wrong) of every finished chunk whose files are not what was written."""
    for k in sorted(self.done()):
      try:
        files = self.commit(k)["files"]
      except (OSError, ValueError):
        yield k, f"{self.commit_path(k)} is damaged"
        continue
      for name, digest in files.items():
        path = self.path / name
        if not path.exists():
          yield k, f"{path} is gone"
        elif not path.is_file() or file_hash(path) != digest:
          yield k, f"{path} is not what was written"

  @property
  def size(self) -> int:
    return sum(p.stat().st_size for p in self.path.rglob("*") if p.is_file())


class LabelStore:
  """Raises UserError where DIR holds something else, or the labels of another version."""

  def __init__(self, root: str | Path, create: bool = False):
    self.root = Path(root)
    info = self.root / "store.json"
    if not info.exists():
      if not create:
        make = f"`tools/op.sh label ROUTE --teachers ... {command('--out', self.root)}`"
        raise UserError(f"no label store in {self.root}: store.json is missing; make one with {make}")
      if self.root.exists() and any(self.root.iterdir()):
        raise UserError(
          f"{self.root} holds other files and is no label store; choose an empty or a new folder for --out"
        )
      with disk_full_is_said(self.root):
        write_bytes(info, json.dumps({"version": VERSION}).encode())
    try:
      version = read_json(info)["version"]
    except (OSError, ValueError, KeyError, TypeError):
      raise UserError(
        f"{info} is damaged; write {{\"version\": {VERSION}}} into it if this is a label store of this version"
      ) from None
    if version != VERSION:
      raise UserError(
        f"{self.root} is a label store of version {printable(version, 20)}, this program writes {VERSION}; label again "
        "into another folder"
      )

  @cached_property
  def claims(self) -> Claims:
    """Who fills which group, where several commands fill one store."""
    return Claims(self.root / CLAIMS)

  def groups(self, teacher: str | None = None, segment: str | None = None) -> list[Group]:
    found = [Group(p.parent) for p in sorted(self.root.glob("*/*/group.json"))]
    return [g for g in found if teacher in (None, g.teacher) and segment in (None, g.segment)]

  def by_segment(self, teachers: set[str], groups: list[Group] | None = None) -> dict[str, dict[str, Group]]:
    """segment -> teacher -> group. groups: of groups(), where they are listed already. Raises UserError where one of
    `teachers` has two sets of labels for one segment."""
    out: dict[str, dict[str, Group]] = {}
    for g in self.groups() if groups is None else groups:
      there = out.setdefault(g.segment, {})
      if g.teacher in there and bool(g.stale) != bool(
        there[g.teacher].stale
      ):  # made anew: what is left of before is as if it were not there
        there[g.teacher] = there[g.teacher] if g.stale else g
        continue
      if g.teacher in there and g.teacher in teachers:
        raise UserError(
          f"segment {g.segment} has two sets of labels by '{g.teacher}'; delete one: {g.path} or "
          f"{there[g.teacher].path}"
        )
      there[g.teacher] = g
    return out

  def check_stale(self, groups: Iterable[Group], allowed: bool) -> None:
    """Raises UserError where some of the groups that are used are stale and that is not allowed; else it is said."""
    check_stale(((str(g.path), g.meta) for g in groups), allowed)

  def group(
    self,
    meta: dict[str, Any],
    entries: list[EncodeEntry],
    more: dict[str, list[Any]] | None = None,
    camera_height: float | None = None,
  ) -> Group:
    """The group of `meta`, made if it is not there. more: further columns of its frames. camera_height: above the road,
    m; no part of the key, and put into a group that was made before it was stored. Raises UserError where its names
    would lead out of the store."""
    for name in (meta["segment"], meta["teacher"]["name"]):
      if name.startswith(".") or Path(name).name != name:
        raise UserError(f"'{name}' is no name of a segment or teacher, it would lead out of {self.root}; give another")
    path = self.root / meta["segment"] / f"{meta['teacher']['name']}-{key_of(meta)}"
    if not (path / "group.json").exists():
      with disk_full_is_said(self.root):
        columns = {
          "frame_id": [e.frame_id for e in entries],
          "segment_id": [e.segment_id for e in entries],
          "timestamp_eof": [e.timestamp_eof for e in entries],
        }
        with atomic_path(path / "frames.parquet") as tmp:
          table = {k: pa.array(v, pa.int64()) for k, v in columns.items()}
          pq.write_table(pa.table({**table, **{k: pa.array(v) for k, v in (more or {}).items()}}), tmp)
        title = f"labels of {meta['segment']} by {meta['teacher']['name']}"
        write_bytes(path / META, group_bytes(title, meta["teacher"]["licence"]))
        self._write(path / "group.json", meta, camera_height)
    group = Group(path)
    if camera_height is not None and group.camera_height != camera_height:
      self._write(path / "group.json", meta, camera_height)
      return Group(path)
    return group

  @staticmethod
  def _write(path: Path, meta: dict[str, Any], camera_height: float | None) -> None:
    height = {} if camera_height is None else {"camera_height": camera_height}
    with disk_full_is_said(path.parent):
      write_json(path, {**meta, **height})

  def is_whole(self, name: str) -> bool:
    """Whether nothing is left to do in a group; also where it is no group any more."""
    try:
      group = Group(self.root / name)
    except UserError:
      return True
    return len(group.done()) == group.chunk_count

  def stale(self, current: list[Group]) -> list[Group]:
    """Groups of the same segments and teachers as `current`, with another key."""
    kept = {g.path for g in current}
    named = {(g.segment, g.teacher) for g in current}
    return [g for g in self.groups() if (g.segment, g.teacher) in named and g.path not in kept]

  def remove(self, group: Group) -> None:
    (group.path / "group.json").unlink(missing_ok=True)  # from here on it is no group, whatever is left of it
    shutil.rmtree(group.path, ignore_errors=True)  # another command may be removing it, too
