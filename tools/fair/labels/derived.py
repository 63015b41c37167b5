"""Labels that are made of others in the same store: a group of their own, whose key holds what they are made of."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from openpilot.tools.fair.labels.dataset import rows_by_frame
from openpilot.tools.fair.labels.rules import rules_of
from openpilot.tools.fair.labels.meta import CHUNK, VERSION
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.teacher import Label, joint_license
from openpilot.tools.lib.encode_index import EncodeEntry
from openpilot.tools.lib.errors import warn


def labeled_by_all(store: LabelStore, wanted: Sequence[str], title: str) -> Iterator[dict[str, Group]]:
  """The groups of every segment that has frames and labels by all of `wanted`; of the others it is said that they are
  left out. title: of the progress bar."""
  for name, there in tqdm(store.by_segment({"frames", *wanted}).items(), desc=title, unit="segment"):
    if lacks := [w for w in ("frames", *wanted) if w not in there]:
      warn(f"{name} has no labels by {', '.join(lacks)}; it is left out")
    else:
      yield there


def derived_group(
  store: LabelStore,
  frames: Group,
  name: str,
  sources: Sequence[Group],
  labels: list[Label],
  settings: dict[str, Any],
  model_id: str = "{}",
  more: dict[str, Any] | None = None,
) -> Group:
  """The group of teacher `name`, of the same frames as `frames`. settings: all else that decides its labels. model_id:
  what the sources' models, put in for {}, are called together. more: what else decides the labels of this segment
  alone. Raises UserError where the sources' licenses do not go together."""
  license = sources[0].meta["teacher"]["license"]
  for g in sources[1:]:
    license = joint_license(name, license, g.meta["teacher"]["license"])
  meta = {
    **{k: frames.meta[k] for k in ("segment", "camera", "every")},
    "version": VERSION,
    "teacher": {
      "name": name,
      "model_id": model_id.format(" + ".join(g.meta["teacher"]["model_id"] for g in sources)),
      "checkpoint": hashlib.sha256(" ".join(g.meta["teacher"]["checkpoint"] for g in sources).encode()).hexdigest(),
      "licence": license,
      "settings": settings,
    },
    "labels": [{**vars(x), "shape": list(x.shape), "classes": list(x.classes)} for x in labels],
    "view": frames.meta["view"],
    "source": [g.path.name for g in sources],
    "chunk": CHUNK,
    **(more or {}),
  }
  if rules := rules_of(meta):
    meta["rules"] = rules
  table = frames.frames.to_pydict()
  entries = [
    EncodeEntry(f, 0, s, t, t)
    for f, s, t in zip(table["frame_id"], table["segment_id"], table["timestamp_eof"], strict=True)
  ]
  return store.group(meta, entries, camera_height=frames.camera_height)


def to_derive(group: Group, sources: Sequence[Group]) -> Iterator[tuple[int, list[dict[str, int]]]]:
  """Chunks of `group` that are not done, and of which every source has labeled all frames: the chunk, and for each of
  its frames teacher -> row."""
  rows = {g.teacher: rows_by_frame(g) for g in sources}
  ids = group.frames["frame_id"].to_pylist()
  for k in sorted(set(range(group.chunk_count)) - group.done()):
    mine = [ids[r] for r in group.rows(k)]
    if all(f in r for r in rows.values() for f in mine):
      yield k, [{t: r[f] for t, r in rows.items()} for f in mine]
