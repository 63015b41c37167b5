"""Labeled pictures, and what teachers say of them, in a label store beside a student: made once, read every epoch."""

import copy
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from openpilot.tools.fair.images.aimed import Aimed
from openpilot.tools.fair.images.augment import LOOKED_AT, read_recipe, save_recipe, say
from openpilot.tools.fair.images.characteristics import GEOMETRY, Looks, guess, look, plan, spread, to_dict
from openpilot.tools.fair.labels.import_labels import import_parts
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.worker import check_teacher
from openpilot.tools.fair.labels.sources import SourceOptions, dota, open_sources, yolo
from openpilot.tools.fair.labels.sources.coco import BESIDE
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import UNKNOWN, Class, ClassSet, InputSpec, plain, road_classes
from openpilot.tools.fair.tasks.objects import SCORES
from openpilot.tools.fair.students.families import FAMILIES
from openpilot.tools.lib.errors import UserError, printable, warn

NAME = "labeled"  # of the data's own labels in the store
LABELED = "train"  # segments of pictures that the data labels
FREE = "unlabeled"  # and of those that teachers alone label
UNKNOWN_SCALE = 0.4, 2.2  # of pictures of any camera in openpilot's view
HELD_OUT = 0.1  # of the pictures, where there is no --val
BATCH = 8
See = Callable[[list[Pictures]], list[Pictures]]


@dataclass
class Said:
  """What there is to learn from. info: has_boxes, has_masks. teachers: their names. scores, features: whether a teacher
  says these. zoom: range by which pictures are scaled at random. pixels: changes of them: name, share,
  strength."""

  train: Path
  val: Path | None
  spec: InputSpec
  classes: ClassSet
  info: dict[str, Any]
  license: str
  prefer: list[str]
  labeled: int
  unlabeled: int
  held_out: int
  teachers: list[str] = field(default_factory=list)
  scores: bool = False
  features: bool = False
  zoom: tuple[float, float] | None = None
  pixels: list[tuple[str, float, float]] = field(default_factory=list)


def open_labeled(path: Path, images: Path | None, license: str) -> list[Pictures]:
  """Parts with boxes. Raises UserError."""
  if not path.exists():
    raise UserError(f"there is no {path}")
  told = SourceOptions(images=images, license=license)
  others = (path / BESIDE).is_file() or dota.is_dota(path)
  parts = open_sources([str(path)], told, "yolo" if yolo.find_yaml(path) is not None and not others else "")
  for p in parts:
    if not isinstance(p, Pictures) or p.carries.boxes is None:
      raise UserError(f"{path} carries no boxes or masks; give a COCO JSON, a YOLO or a DOTA folder")
  return [p for p in parts if isinstance(p, Pictures)]


def seen(parts: list[Pictures], spec: InputSpec, focal: float | None) -> list[Pictures]:
  """As the student is to see them."""
  return parts if focal is None else [Aimed(p, spec, focal) for p in parts]


def count(parts: list[Pictures]) -> tuple[Counter[str], int, int]:
  """-> labels by class, labels, labels with masks."""
  classes: Counter[str] = Counter()
  boxes = masks = 0
  for p in parts:
    names = p.carries.boxes or ()
    for row in range(len(p.entries)):
      said = p.said(row)
      boxes += len(said.cls)
      masks += sum(m is not None for m in said.masks)
      sure = said.cls if said.difficult is None else said.cls[~said.difficult]
      classes.update(names[k] for k in sure.tolist())
  return classes, boxes, masks


def class_set(names: list[str], used: Counter[str], aliases: tuple[str, ...]) -> ClassSet:
  """The data's classes that have labels, in its order. aliases: NAME=CLASS of teachers. Raises UserError."""
  also: dict[str, list[str]] = {}
  known = {plain(n): n for n in names}
  for item in aliases:
    name, equals, cls = item.partition("=")
    if not equals or plain(cls) not in known:
      raise UserError(f"--alias {item}: write NAME=CLASS, with one of the data's: {', '.join(names)}")
    also.setdefault(known[plain(cls)], []).append(name.strip())
  found = []
  for n in names:
    if used[n] and plain(n) not in UNKNOWN:
      like = road_classes().find(n)  # fairmodeld wants to know what is on the road
      found.append(
        Class(n, like.role if like is not None else None, aliases=tuple(also.get(n, ())), maps=False, boxes=True)
      )
  if not found:
    raise UserError("no class has a label; nothing can be learned")
  return ClassSet("pictures", tuple(found))


def hold_out(parts: list[Pictures], seed: int) -> tuple[list[Pictures], list[Pictures]]:
  """A tenth of each part's pictures, at least one where there are two."""
  train: list[Pictures] = []
  val: list[Pictures] = []
  for p in parts:
    n = len(p.stills)
    take = max(1, round(HELD_OUT * n)) if n > 1 else 0
    out = set(np.random.default_rng([seed, n]).permutation(n)[:take].tolist())
    for kept, to in (([i for i in range(n) if i not in out], train), (sorted(out), val)):
      if kept:
        to.append(part_of(p, kept))
  return train, val


def part_of(part: Pictures, rows: list[int]) -> Pictures:
  """Those pictures of a part."""
  out = copy.copy(part)
  out.__dict__.pop("hash", None)
  out.keep([part.stills[i] for i in rows])
  return out


def named(parts: list[Pictures], name: str) -> list[Pictures]:
  """Under names of their own in the store."""
  for i, p in enumerate(parts):
    own = name if len(parts) == 1 else f"{name}-{i}"
    p.name = f"{own}--0"
    p.segment = replace(p.segment, route=own)
  return parts


def teach(store: LabelStore, teachers: list[Any], parts: list[Pictures], spec: InputSpec) -> None:
  for teacher in teachers:
    groups = run_teacher(teacher, parts, store, batch=BATCH, spec=spec)
    for g in store.stale(groups):
      store.remove(g)
    print(f"{teacher.name:<12} has labeled {sum(g.row_count for g in groups)} pictures, license {teacher.license}")


def known_to(teachers: list[Any], classes: ClassSet) -> tuple[bool, bool, bool]:
  """-> whether a teacher scores classes, makes masks, makes features. Raises UserError where one says nothing that can
  be learned."""
  scores = masks = features = False
  for t in teachers:
    finds = [x for x in t.labels if x.kind == "boxes"]
    says = False
    for x in t.labels:
      if x.kind == "boxes":
        mine = [n for n in x.classes if (c := classes.find(n)) is not None and c.boxes]
        if mine:
          says = True
          scores |= x.unit == SCORES
          masks |= bool(x.shape)
      elif x.name == "features":
        features, says = True, says or not finds
    if not says:
      own = sorted({n for x in finds for n in x.classes})
      raise UserError(
        f"teacher '{t.name}' says {', '.join(own[:12]) or 'no boxes'}, and the data's classes are "
        f"{printable(', '.join(classes.boxes), 200)}; give it another name: --alias NAME=CLASS"
      )
  return scores, masks, features


def say_unknown(teachers: list[Any], classes: ClassSet) -> None:
  """What the pictures that a teacher alone labels say, by a family's own loss, of classes that it has no name for: that
  they are not there. Ours learns nothing of these there, which `Clips.not_told` says."""
  finds = ((t, [x for x in t.labels if x.kind == "boxes" and x.unit != SCORES]) for t in teachers)
  for t, labels in finds:
    if labels:  # the first one's boxes are learned
      known = {c.name for x in labels for n in x.classes if (c := classes.find(n)) is not None}
      if unknown := [n for n in classes.boxes if n not in known]:
        warn(
          f"--unlabeled: '{t.name}' has no name for {len(unknown)} of {len(classes.boxes)} classes, and pictures that "
          f"it alone labels teach that none of these is there: {printable(', '.join(unknown), 200)}"
        )
      return


def fill(args: Any, spec: InputSpec, teachers: list[Any], see: See | None = None) -> Said:
  """args: of train_student, or of train_obb. see: of the parts as they are read, as the student is to see them. Imports
  pictures and labels, and lets the teachers label. Raises UserError."""
  cv2.setNumThreads(1)
  see = see or (lambda parts: seen(parts, spec, args.focal))
  parts = open_labeled(args.data, args.images, args.license)
  license = args.license or " and ".join(sorted({p.license for p in parts})) or "unstated"
  names = list(dict.fromkeys(n for p in parts for n in p.carries.boxes or ()))
  val: list[Pictures] = []
  if args.val is not None:
    val = open_labeled(args.val, args.val_images or args.images, args.license)
    known = {*UNKNOWN, *(plain(n) for n in names)}
    if other := [n for p in val for n in p.carries.boxes or () if plain(n) not in known]:
      raise UserError(f"--val {args.val} has the class '{other[0]}', which {args.data} does not have")
  elif len(parts) > 1 and (named_val := [p for p in parts if p.segment.route.endswith(("-val", "-valid"))]):
    val, parts = named_val, [p for p in parts if p not in named_val and not p.segment.route.endswith("-test")]
  else:
    parts, val = hold_out(parts, args.seed)
    warn(
      f"no --val: {sum(len(p.stills) for p in val)} pictures are held out at random; all others are learned from, "
      "which `images evaluate` of the same data does not know; `tools/op.sh images validate --split` makes parts, and "
      "keeps alike ones together"
    )
  if not parts:
    raise UserError(f"{args.data} holds no pictures to train on")
  learned = {os.path.realpath(s.path) for p in parts for s in p.stills}
  judging = [os.path.realpath(s.path) for p in val for s in p.stills]
  if n := sum(path in learned for path in judging):
    warn(
      f"{n} of {len(judging)} pictures to judge by are also learned from: what is said of them is not of new pictures"
    )
  parts, val = see(parts), see(val)
  used, boxes, masks = count(parts)
  classes = class_set(names, used, getattr(args, "alias", ()))
  names = [n for n in names if plain(n) not in UNKNOWN]
  if unused := [n for n in names if not used[n]]:
    listed = printable(", ".join(unused), 200)
    warn(f"{len(unused)} of {len(names)} classes have no label to learn from, and are left out: {listed}")
  free: list[Pictures] = []
  if args.unlabeled is not None:
    free = see(open_free(args.unlabeled, license))
  for t in teachers:
    check_teacher(t, [], [*parts, *free], None, spec)
  scores, masked, features = known_to(teachers, classes)
  if free and getattr(args, "student", "") in FAMILIES:
    say_unknown(teachers, classes)
  stores = {k: args.output / "labels" / k for k in ("train", "val")}
  sets = {"train": (named(parts, LABELED), named(free, FREE)), "val": (named(val, "val"), [])}
  for k, (own, more) in sets.items():
    if not own:
      continue
    store = LabelStore(stores[k], create=True)
    import_parts(store, own, NAME, spec, BATCH)
    for p in more:
      run_teacher(FrameTeacher(spec), [p], store, batch=BATCH, spec=spec)
    if k == "train":
      teach(store, teachers, [*own, *more], spec)
  labeled, free_count, held = (sum(len(p.entries) for p in x) for x in (parts, free, val))
  print(
    f"pictures     {labeled} labeled, {free_count} unlabeled, {held} held out; {boxes} labels, {masks} with masks\n"
    f"classes      {printable(', '.join(f'{n} {used[n]}' for n in classes.boxes), 300)}"
  )
  zoom, pixels = varied(args, parts, spec)
  return Said(
    train=stores["train"],
    val=stores["val"] if val else None,
    spec=spec,
    classes=classes,
    info={"has_boxes": boxes > 0, "has_masks": masks > 0 or masked},
    license=license,
    prefer=[NAME, *(t.name for t in teachers)],
    labeled=labeled,
    unlabeled=free_count,
    held_out=held,
    teachers=[t.name for t in teachers],
    scores=scores,
    features=features,
    zoom=zoom,
    pixels=pixels,
  )


def varied(
  args: Any, parts: list[Pictures], spec: InputSpec
) -> tuple[tuple[float, float] | None, list[tuple[str, float, float]]]:
  """How the pictures are varied beyond what is usual: -> range of scales, changes of pixels. Prints and saves it."""
  unknown = UNKNOWN_SCALE if spec.kind == "model_frame" and args.focal is None else None
  if args.augment in ("plain", "none"):
    return unknown, []
  why: list[str] = []
  intensity = "medium"
  if args.augment == "auto":
    said, why = guess(look_at(parts))
  else:
    said, intensity = read_recipe(Path(args.augment))
  steps = plan(said, intensity)
  print("\n".join(say(said, why, steps, intensity)))
  save_recipe(to_dict(said, intensity, steps), args.output)
  scale = max((s.strength for s in steps if s.name == "scale"), default=0.0)
  sized = said.get("distance") or {"small", "large"} & set(said.get("object", ()))
  zoom = (float(np.exp(-0.9 * scale)), float(np.exp(0.7 * scale))) if sized else None
  # the usual variation has light and color already, and moves pictures by itself
  usual = (*GEOMETRY, "exposure", "color")
  return unknown or zoom, [(s.name, s.share, s.strength) for s in steps if s.name not in usual]


def look_at(parts: list[Pictures]) -> Looks:
  """At some pictures of all parts."""
  each = [(p, r) for p in parts for r in range(len(p.entries))]
  some = [each[i] for i in spread(len(each), LOOKED_AT)]
  said = [p.said(r) for p, r in some]
  pictures = [rgb for p, r in some for _, rgb in p.read([r])]
  return look(pictures, [s.boxes + 0.5 for s in said], [s.cls for s in said])


def open_free(path: Path, license: str) -> list[Pictures]:
  """Pictures without labels, or frames of videos. Raises UserError."""
  parts = open_sources([str(path)], SourceOptions(license=license), "pictures")
  return [p for p in parts if isinstance(p, Pictures)]
