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

import glob
import hashlib
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from openpilot.tools.fair.labels import mirrors
from openpilot.tools.fair.labels.claims import Claims, Folder
from openpilot.tools.fair.labels.encode import META, group_bytes
from openpilot.tools.fair.labels.group import Group
from openpilot.tools.fair.labels.meta import VERSION
from openpilot.tools.fair.labels.remote import AT_ONCE, INDEX, Remote, folder_of, url_of
from openpilot.tools.fair.labels.rules import check_stale
from openpilot.tools.fair.labels.stored import disk_full_is_said, write_table
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import read_json, write_bytes, write_json
from openpilot.tools.lib.said import command


def key_of(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:12]


INFO, ORIGINS = "store.json", "sources.yaml"


class LabelStore:
  """Raises UserError where DIR holds something else, or the labels of another version."""

  def __init__(self, root: str | Path, create: bool = False, writes: bool = False):
    """root: a folder, or a URL (remote.py). create: where it is not there. writes: labels will be put into it."""
    url = url_of(root)
    self.remote = None if url is None else Remote(url, create or writes)
    self.place = str(root) if url is None else url  # for people
    self.root = folder_of(root) if self.remote is None else self.remote.mirror
    info = self.root / INFO
    if self.remote is not None:
      info.unlink(missing_ok=True)
      self.remote.fetch_all((INFO, ORIGINS))
    if not info.exists():
      if not create:
        make = f"`tools/op.sh label ROUTE --teachers ... {command('--out', self.place)}`"
        raise UserError(f"no label store in {self.place}: store.json is missing; make one with {make}")
      if self.remote.folders() if self.remote is not None else self.root.exists() and any(self.root.iterdir()):
        raise UserError(
          f"{self.place} holds other files and is no label store; choose an empty or a new folder for --out"
        )
      with disk_full_is_said(self.root):
        write_bytes(info, json.dumps({"version": VERSION}).encode())
      self._send(info)
    try:
      version = read_json(info)["version"]
    except (OSError, ValueError, KeyError, TypeError):
      raise UserError(
        f"{info} is damaged; write {{\"version\": {VERSION}}} into it if this is a label store of this version"
      ) from None
    if version != VERSION:
      raise UserError(
        f"{self.place} is a label store of version {printable(version, 20)}, this program writes {VERSION}; label "
        "again into another folder"
      )

  @cached_property
  def claims(self) -> Claims:
    """Who fills which group, where several commands fill one store."""
    return Claims(Folder(self.root) if self.remote is None else self.remote)

  def _send(self, path: Path) -> None:
    if self.remote is not None:
      self.remote.send(path)

  def _paths(self, segment: str | None) -> list[Path]:
    """Folders of all groups, or of a segment's."""
    if self.remote is None:
      own = "*" if segment is None else glob.escape(segment)  # its folder is called so, too
      return [p.parent for p in sorted(self.root.glob(f"{own}/*/group.json"))]
    found = self.remote.groups() if segment is None else self.remote.folders(f"{segment}/")
    with ThreadPoolExecutor(AT_ONCE) as pool:
      list(pool.map(self.remote.sync, found))
    # in the order of a folder's paths: of the groups of 'cars' and 'cars-2' those of 'cars' come first
    found = sorted(found, key=lambda g: g.split("/"))
    return [self.root / g for g in found if (self.root / g / "group.json").exists()]

  def finish(self) -> None:
    """What is left to do when all is labeled: nothing of a folder but what killed processes left."""
    self.claims.sweep(self.is_whole)
    if self.remote is not None:
      self.remote.write_index()

  def groups(self, teacher: str | None = None, segment: str | None = None) -> list[Group]:
    found = [Group(p, self.remote) for p in self._paths(segment)]
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
          f"segment {g.segment} has two sets of labels by '{g.teacher}'; delete one: {g.place} or "
          f"{there[g.teacher].place}"
        )
      there[g.teacher] = g
    if self.remote is not None:  # what reads them may be forked, and cannot fetch
      for g in tqdm([g for x in out.values() for t, g in x.items() if t in teachers], desc=self.place, unit="group"):
        g.fetch()
      mirrors.make_room()  # of what others keep
    return out

  def check_stale(self, groups: Iterable[Group], allowed: bool) -> None:
    """Raises UserError where some of the groups that are used are stale and that is not allowed; else it is said."""
    check_stale(((g.place, g.meta) for g in groups), allowed)

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
    if self.remote is not None:
      self.remote.sync(f"{path.parent.name}/{path.name}")
    if not (path / "group.json").exists():
      with disk_full_is_said(self.root):
        columns = {
          "frame_id": [e.frame_id for e in entries],
          "segment_id": [e.segment_id for e in entries],
          "timestamp_eof": [e.timestamp_eof for e in entries],
        }
        table = {k: pa.array(v, pa.int64()) for k, v in columns.items()}
        write_table(path / "frames.parquet", pa.table({**table, **{k: pa.array(v) for k, v in (more or {}).items()}}))
        title = f"labels of {meta['segment']} by {meta['teacher']['name']}"
        write_bytes(path / META, group_bytes(title, meta["teacher"]["licence"]))
        if self.remote is not None:
          self.remote.remove(INDEX)
        for name in ("frames.parquet", META):
          self._send(path / name)
        self._write(path / "group.json", meta, camera_height)
    group = Group(path, self.remote)
    if camera_height is not None and group.camera_height != camera_height:
      self._write(path / "group.json", meta, camera_height)
      return Group(path, self.remote)
    return group

  def _write(self, path: Path, meta: dict[str, Any], camera_height: float | None) -> None:
    height = {} if camera_height is None else {"camera_height": camera_height}
    with disk_full_is_said(path.parent):
      write_json(path, {**meta, **height})
    self._send(path)

  def is_whole(self, name: str) -> bool:
    """Whether nothing is left to do in a group; also where it is no group any more."""
    try:
      group = Group(self.root / name, self.remote)
    except UserError:
      return True
    return len(group.done()) == group.chunk_count

  def stale(self, current: list[Group]) -> list[Group]:
    """Groups of the same segments and teachers as `current`, with another key."""
    kept = {g.path for g in current}
    named = {(g.segment, g.teacher) for g in current}
    found = [g for segment in sorted({s for s, _ in named}) for g in self.groups(segment=segment)]
    return [g for g in found if (g.segment, g.teacher) in named and g.path not in kept]

  def remove(self, group: Group) -> None:
    if self.remote is not None:
      self.remote.remove(INDEX)
      first = f"{group.name}/group.json"
      for name in (first, *(n for n in self.remote.names(f"{group.name}/") if n != first)):
        self.remote.remove(name)
    (group.path / "group.json").unlink(missing_ok=True)  # from here on it is no group, whatever is left of it
    shutil.rmtree(group.path, ignore_errors=True)  # another command may be removing it, too
