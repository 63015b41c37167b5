#!/usr/bin/env python3
"""Puts several teachers' labels of a store together to what they agree on, as a teacher of its own: class maps that are
unknown where they differ, and boxes that two detectors see; what one alone sees is 'unknown', and teaches nothing.

The roads' teacher gives probabilities of road, curb and markings, the scenes' teacher one class a pixel, the boxes'
teachers boxes; by whatever names the class set knows them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.tools.fair.labels.dataset import Reader
from openpilot.tools.fair.labels.derived import derived_group, labeled_by_all, to_derive
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.spec import STREET, ClassSet, read_classes
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse
from openpilot.tools.sim.truth import IGNORE

SURE = 0.9  # of the roads' teacher: so sure, it needs no second voice but none that says something stands there
ROADLIKE, NOT_ROAD = 0.5, 0.3
SAME = 0.5  # intersection over union of two boxes of one thing
GROW = 0.05  # of a box's sides, within which pixels may be of its thing
OUTLINE = 3  # view pixels: so far inside its outline a class map cannot tell a thing from what is behind it
MIN_SIDE = 8.0  # view pixels: of smaller boxes one voice is as good as none, and teaches nothing


@dataclass
class Boxes:
  """xyxy (N, 4) view pixels, cls (N,) index into a class set's boxes, score (N,)."""

  xyxy: np.ndarray
  cls: np.ndarray
  score: np.ndarray


def agreed_boxes(parts: list[Boxes]) -> tuple[Boxes, np.ndarray]:
  """Of two or more detectors -> boxes that another one sees too (their mean, its best score), and (M, 4) the boxes of
  one alone, or that two call otherwise."""
  boxes = np.concatenate([p.xyxy for p in parts])
  cls, score = np.concatenate([p.cls for p in parts]), np.concatenate([p.score for p in parts])
  owner = np.repeat(np.arange(len(parts)), [len(p.cls) for p in parts])
  iou = box_iou(boxes, boxes)
  free, kept, alone = np.ones(len(boxes), bool), [], []
  for i in np.argsort(-score, kind="stable"):
    if not free[i]:
      continue
    same = free & (iou[i] >= SAME)
    same[i] = True
    voices = same & (cls == cls[i])
    if len(set(owner[voices].tolist())) > 1:
      best = [max(np.flatnonzero(voices & (owner == o)), key=lambda k: iou[i, k]) for o in set(owner[voices].tolist())]
      kept.append((boxes[best].mean(axis=0), cls[i], score[best].max()))
    else:
      alone.append(boxes[i])
    free &= ~same
  lone = np.array(alone, np.float32).reshape(-1, 4)
  if not kept:
    return Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32)), lone
  xyxy, which, sure = zip(*kept, strict=True)
  return Boxes(np.array(xyxy, np.float32), np.array(which), np.array(sure, np.float32)), lone


def painted(boxes: np.ndarray, grow: float = 0.0) -> np.ndarray:
  """(N, 4) -> (256, 512) bool: pixels inside any of them, each made larger by a share of its sides."""
  out = np.zeros((VIEW_H, VIEW_W), bool)
  for x0, y0, x1, y1 in boxes:
    dx, dy = grow * (x1 - x0), grow * (y1 - y0)
    out[max(0, round(y0 - dy)) : max(0, round(y1 + dy) + 1), max(0, round(x0 - dx)) : max(0, round(x1 + dx) + 1)] = True
  return out


def core(thing: np.ndarray) -> np.ndarray:
  """(256, 512) bool without what is within OUTLINE of its outline; the view's edge is none."""
  disk: Any = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * OUTLINE + 1, 2 * OUTLINE + 1))
  return cv2.erode(thing.astype(np.uint8), disk, borderType=cv2.BORDER_CONSTANT, borderValue=1) > 0


def agreed_map(
  classes: ClassSet, roads: dict[str, np.ndarray], scene: np.ndarray, parts: list[Boxes], both: Boxes
) -> np.ndarray:
  """roads: (256, 512) probability of each class that the roads' teacher tells; scene: (256, 512) int64 index into
  classes.maps, -1 unknown; parts: every detector's boxes, both: the agreed ones -> (256, 512) uint8, 255 unknown."""
  role = [classes.roles([n]).get(n) for n in classes.maps]
  ground = [i for i, r in enumerate(role) if r == "ground"]
  marking = [i for i, r in enumerate(role) if r == "marking"]
  movable = [i for i, r in enumerate(role) if r == "movable"]
  road = sum((p for n, p in roads.items() if role[classes.maps.index(n)] in ("ground", "marking")), np.float32(0))
  paint = sum((p for n, p in roads.items() if role[classes.maps.index(n)] == "marking"), np.float32(0))
  out = np.full(scene.shape, IGNORE, np.uint8)
  stands = np.isin(scene, movable)
  # what is no road to both is what the scenes' teacher says
  other = (road < NOT_ROAD) & (scene >= 0) & ~np.isin(scene, ground + marking) & ~stands
  out[other] = scene[other]
  drivable = ((road >= ROADLIKE) & np.isin(scene, ground + marking)) | ((road >= SURE) & ~stands)
  out[drivable] = ground[0] if ground else IGNORE
  if marking:
    out[drivable & (paint >= ROADLIKE)] = marking[0]
  every = np.concatenate([p.xyxy for p in parts])
  kinds = np.concatenate([p.cls for p in parts])
  for i in movable:
    name = classes.maps[i]
    mine = kinds == classes.boxes.index(name) if name in classes.boxes else np.zeros(len(kinds), bool)
    thing = (scene == i) & (road < ROADLIKE) & painted(every[mine], GROW)
    out[thing] = IGNORE
    out[core(thing)] = i
  inside = painted(both.xyxy)
  out[inside & ~np.isin(out, movable) & ~((road >= SURE) & ~painted(both.xyxy, -GROW))] = IGNORE
  return out


@dataclass
class Segment:
  """One segment's groups, and how their names are the class set's."""

  frames: Group
  roads: Group
  scenes: Group
  boxes: list[Group]


def read_boxes(reader: Reader, group: Group, row: int, classes: ClassSet) -> Boxes:
  label = next(x for x in group.labels if x.kind == "boxes")
  table = reader.table(group, label.name, row)
  to = classes.resolve(label.classes, "boxes", f"{group.teacher}'s boxes")
  cls = to[table["cls"].astype(int)] if len(table["cls"]) else np.zeros(0, np.int64)
  xyxy = np.stack([table[k] for k in ("x0", "y0", "x1", "y1")], axis=1).astype(np.float32)
  good = cls >= 0
  return Boxes(xyxy[good], cls[good], table["score"][good].astype(np.float32))


def agree_on(segment: Segment, reader: Reader, rows: dict[str, int], classes: ClassSet) -> tuple[np.ndarray, Any]:
  """One frame; rows: teacher -> row -> its class map, and the columns of its boxes."""
  parts = [read_boxes(reader, g, rows[g.teacher], classes) for g in segment.boxes]
  both, alone = agreed_boxes(parts)
  names = [x.name for x in segment.roads.labels]
  to = classes.resolve(names, "maps", f"{segment.roads.teacher}'s maps")
  roads: dict[str, np.ndarray] = {}
  for n, k in zip(names, to, strict=True):
    if k >= 0:
      small_map = segment.roads.row(n, rows[segment.roads.teacher]).astype(np.float32)
      p: Any = cv2.resize(small_map, (VIEW_W, VIEW_H), interpolation=cv2.INTER_LINEAR)
      roads[classes.maps[k]] = roads[classes.maps[k]] + p if classes.maps[k] in roads else p
  label = segment.scenes.labels[0]
  ids: np.ndarray = segment.scenes.row(label.name, rows[segment.scenes.teacher]).astype(np.int64)
  lut = np.full(IGNORE + 1, -1, np.int64)
  lut[: len(label.classes)] = classes.resolve(label.classes, "maps", f"{segment.scenes.teacher}'s classes")
  ids = lut[ids]
  small = (
    (both.xyxy[:, 2:] - both.xyxy[:, :2]).min(axis=1, initial=np.inf) < MIN_SIDE if len(both.cls) else both.cls > 0
  )
  lone = np.concatenate([alone, both.xyxy[small]])
  boxes = np.concatenate([both.xyxy[~small], lone])
  table = {k: boxes[:, i] for i, k in enumerate(("x0", "y0", "x1", "y1"))}
  table["score"] = np.concatenate([both.score[~small], np.ones(len(lone), np.float32)])
  table["cls"] = np.concatenate([both.cls[~small], np.full(len(lone), len(classes.boxes))]).astype(np.int16)
  return agreed_map(classes, roads, ids, parts, both), table


def write_segment(store: LabelStore, segment: Segment, classes: ClassSet, name: str) -> Group:
  """Labels all frames that all of the segment's teachers have labeled whole; nothing is done twice."""
  sources = [segment.roads, segment.scenes, *segment.boxes]
  labels = [
    Label("segmentation", "dense", "uint8", (VIEW_H, VIEW_W), "class", classes.maps),
    Label("boxes", "boxes", unit="px", classes=(*classes.boxes, "unknown")),
  ]
  settings = {
    "roads": segment.roads.teacher,
    "scenes": segment.scenes.teacher,
    "boxes": [g.teacher for g in segment.boxes],
    "classes": classes.to_dict(),
    "rule": [SURE, ROADLIKE, NOT_ROAD, SAME, GROW, OUTLINE, MIN_SIDE],
  }
  group = derived_group(store, segment.frames, name, sources, labels, settings)
  reader = Reader()
  for k, frames in to_derive(group, sources):
    maps, tables = [], []
    for n, rows in enumerate(frames):
      one, boxes = agree_on(segment, reader, rows, classes)
      maps.append(one)
      tables.append({"frame": np.full(len(boxes["cls"]), n, np.int64), **boxes})
    columns = {c: np.concatenate([t[c] for t in tables]) for c in tables[0]}
    group.write_chunk(k, {"segmentation": np.stack(maps), "boxes": columns})
  return group


@dataclass(frozen=True)
class Options:
  labels: Path = option(positional=True, help="the label store, into which what is agreed on goes too")
  roads: str = option("road-segmentation-adas", help="teacher of road, curb and markings")
  scenes: str = option("cityscapes-edgetpu", help="teacher of one class a pixel")
  boxes: str = option("yolox-nano,deimv2-atto", help="teachers of boxes, comma-separated, two or more")
  classes: Path = option(STREET, metavar="FILE.yaml", help="class set that all of their names are of")
  name: str = option("agreed", help="of the teacher that they are together")


def main() -> None:
  args = parse(Options, __doc__, "agree")
  classes, detectors = read_classes(args.classes), [n for n in args.boxes.replace(" ", "").split(",") if n]
  if len(detectors) < 2:
    raise UserError(f"--boxes {args.boxes}: two teachers at least, to agree on anything")
  store, groups = LabelStore(args.labels, writes=True), []
  wanted = [args.roads, args.scenes, *detectors]
  for there in labeled_by_all(store, wanted, args.name):
    segment = Segment(there["frames"], there[args.roads], there[args.scenes], [there[d] for d in detectors])
    groups.append(write_segment(store, segment, classes, args.name))
  if not groups:
    raise UserError(f"{store.place} has no segment that all of {', '.join(wanted)} have labeled")
  print(f"{args.name}: {len(groups)} segments, {sum(g.row_count for g in groups)} frames")


if __name__ == "__main__":
  raise SystemExit(cli(main)())
