#!/usr/bin/env python3
"""Labels routes, folders of pictures and videos with teachers. Killed at any moment, the same command goes on where it
stopped, and the result is that of an unbroken run."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2

from openpilot.selfdrive.modeld.fair.frames import VIEWS
from openpilot.tools.fair.labels.labeling import FrameTeacher, picture_size, refuse_silence, run_teacher
from openpilot.tools.fair.labels.passes import Failures
from openpilot.tools.fair.labels.picture import SEES
from openpilot.tools.fair.labels.refit import canvas_of
from openpilot.tools.fair.labels.rules import stale_rules
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.labels.sources.pictures import Pictures
from openpilot.tools.fair.labels.sources.routes import number_or_auto
from openpilot.tools.fair.labels.store import Group, LabelStore
from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.fair.options import parse_options
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.spec import KINDS, InputSpec
from openpilot.tools.fair.teacher import Teacher
from openpilot.tools.lib.cameras import CAMERAS
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option as flag, parse

SIZE = "640x640"  # of single pictures


@dataclass(frozen=True)
class Options:
  paths: tuple[str, ...] = flag(
    positional=True,
    metavar="PATH",
    help="a route: a folder with segments, one segment's folder, its name (with --data-dir), or a video; a folder of "
    "pictures; a COCO JSON; a YOLO folder",
  )
  teachers: str = flag(help="comma-separated; `tools/op.sh teachers` lists them")
  output: Path = flag(aliases=("--out",), help="the label store")
  source: str = flag(
    "",
    help="kind of the paths, where it is not recognized: routes, pictures, coco, yolo, class_maps; or "
    "'stills': pictures of road cameras, as frames of their own",
  )
  data_dir: Path | None = flag(None, help="the folder that holds the routes")
  camera: str = flag("road", choices=CAMERAS, help="of a route")
  every: int = flag(1, metavar="N", help="label every Nth frame of a video")
  input: str = flag(
    "rgb",
    choices=KINDS,
    help="of single pictures: as students see them, whole and letterboxed; routes are model frames",
  )
  size: str = flag(SIZE, metavar="WxH", help="of an rgb input")
  images: Path | None = flag(None, help="the pictures' folder, where annotations lie elsewhere")
  name: str = flag("", help="of the pictures in the store; default: their folder's")
  license: str = flag("", aliases=("--licence",), help="of the pictures; default: the data's own")
  view: str | None = flag(
    None, metavar="WxH", help="size of the view, or of the pictures, for teachers; default: each teacher's own"
  )
  sees: str | None = flag(
    None,
    choices=SEES,
    help="what teachers are shown of routes: the camera's whole picture, whose labels are warped into the view, or the "
    "view; by default what each was made for, and the view where --view gives its size",
  )
  view_name: str = flag("medmodel", choices=VIEWS, help="of routes")
  batch_size: int = flag(8, aliases=("--batch",), help="frames in a teacher's batch")
  focal: str | None = flag(
    None,
    metavar="PIXELS",
    help="focal length, of a camera that is not comma's; 'auto': guessed where the camera is not known, and then "
    "nothing teaches meters",
  )
  horizon: str | None = flag(
    None,
    metavar="ROW",
    help="of a video without calibration: the horizon's row in the picture, pixels, or 'auto': from what moves in it",
  )
  aim: Path | None = flag(
    None,
    metavar="FILE.yaml",
    help="of --source stills: focal length and horizon of each picture, as 'road*.jpg: {focal: 910, horizon: 240}'",
  )
  weights: tuple[str, ...] = flag(
    (), metavar="TEACHER=PATH", help="a checkpoint's file or folder; else FAIR_WEIGHTS and ./weights are searched"
  )
  option: tuple[str, ...] = flag(
    (), metavar="TEACHER.KEY=VALUE", help="as sam3.prompts=car,tram; `tools/op.sh teachers TEACHER` lists them"
  )
  accept_license: tuple[str, ...] = flag(
    (), aliases=("--accept-licence",), metavar="LICENSE", help="accept this license of a teacher, which restricts use"
  )
  download: bool = flag(False, help="let weights be downloaded from the hub")
  device: str | None = flag(None, help="cuda, mps or cpu; default: the best there is")
  frames: bool = flag(True, help="do not store the frames; they can be made again from the data")
  repair: bool = flag(False, help="check existing labels first, and label damaged chunks again")
  prune: bool = flag(
    False, help="afterwards delete labels of these teachers and segments that were made with other settings"
  )


def parse_size(text: str, flag: str = "--view") -> tuple[int, int]:
  """-> (width, height). Raises UserError."""
  w, x, h = text.partition("x")
  if not x or not w.isdigit() or not h.isdigit() or int(w) < 64 or int(h) < 32 or int(w) % 32 or int(h) % 32:
    raise UserError(f"{flag} {text} is not a size; two multiples of 32, as 512x256")
  return int(w), int(h)


def parse_weights(items: Sequence[str], teachers: list[str]) -> dict[str, str]:
  pairs = dict(i.split("=", 1) for i in items if "=" in i)
  wrong = [i for i in items if "=" not in i] + [k for k in pairs if k not in teachers]
  if wrong:
    raise UserError(f"--weights {wrong[0]}: write TEACHER=PATH, with one of --teachers ({', '.join(teachers)})")
  return pairs


def picture_spec(kind: str, size: str) -> InputSpec:
  """Of single pictures. Raises UserError."""
  if kind == "model_frame":
    return InputSpec()
  width, height = parse_size(size, "--size")
  return InputSpec("rgb", height, width)


def keep_license(store: LabelStore, parts: Sequence[Pictures], given: str) -> None:
  """Pictures whose license is not said have the one under which they are in the store already."""
  for part in parts:
    for g in store.groups("frames", part.name) if not given and part.license == "unstated" else ():
      if g.meta["camera"]["video"] == part.camera()["video"]:
        part.license = g.meta["teacher"]["license"]


def check_teacher(
  teacher: Teacher, views: list[SegmentView], parts: list[Pictures], size: tuple[int, int] | None, spec: InputSpec
) -> None:
  """Everything that can be wrong is found before the first frame. Raises UserError."""
  if views:
    teacher.prepare(*picture_size(teacher, size)[::-1])
  else:
    canvas = canvas_of(teacher, spec, size)
    teacher.prepare(canvas.height, canvas.width)
  meters = [x.name for x in teacher.labels if x.unit == "m"]
  if meters and getattr(teacher, "wants", "rgb") == "rgb" and any(v.estimated for v in views):
    raise UserError(
      f"teacher '{teacher.name}' says meters, of a camera whose focal length or mounting is guessed; give --focal "
      "and --horizon in pixels, or leave it out"
    )
  every: list[SegmentView | Pictures] = [*views, *parts]
  if teacher.stateful and (still := [p.segment.dir for p in every if getattr(p, "still", False)]):
    raise UserError(
      f"teacher '{teacher.name}' follows things from frame to frame, and {still[0]} holds single pictures; give a "
      "video, or leave this teacher out"
    )
  if hasattr(teacher, "check"):
    for segment in [v.segment for v in views] + [p.segment for p in parts]:
      teacher.check(segment)


def label_all(
  teachers: list[Teacher],
  views: list[SegmentView],
  parts: list[Pictures],
  store: LabelStore,
  args: Options,
  failures: Failures,
) -> list[Group]:
  """-> the groups that are there now."""
  size = parse_size(args.view) if args.view else None
  spec, sees = picture_spec(args.input, args.size), args.sees or ("view" if size else None)
  current: list[Group] = []
  for teacher in teachers:
    begun = time.monotonic()
    groups: list[Group] = []
    more = (args.view_name, size, args.batch_size, args.every, args.repair)
    frames = teacher.name == "frames"
    if views:
      groups += run_teacher(teacher, views, store, *more, sees=sees, failures=failures)
    if parts:
      groups += run_teacher(
        FrameTeacher(spec) if frames else teacher, parts, store, *more, spec=spec, failures=failures
      )
    current += groups
    refuse_silence(teacher, groups, store, args.every)
    rows, taken = sum(g.row_count for g in groups), time.monotonic() - begun
    licenses = dict.fromkeys(g.meta["teacher"]["license"] for g in groups)
    print(
      f"{teacher.name:<22} {len(groups)} segments, {rows} frames, {sum(g.size for g in groups) / 1e6:.1f} MB, "
      f"{taken:.1f} s, license {', '.join(licenses) or teacher.license}"
    )
  return current


def say_stale(store: LabelStore, current: list[Group], prune: bool) -> None:
  for g in store.stale(current):
    if prune and store.claims.taken(g.name):
      print(f"kept: {g.path}: another command fills it")
      continue
    if prune:
      store.remove(g)
    why = "by rules that were mended since" if stale_rules(g.meta) else "with other settings"
    print(f"{'removed' if prune else 'stale'}: {g.path}{'' if prune else f' (made {why}; --prune deletes it)'}")


def main() -> int:
  args = parse(Options, __doc__, "label")
  if args.every < 1 or args.batch_size < 1:
    raise UserError("--every and --batch-size are at least 1")
  names = list(dict.fromkeys(n for n in args.teachers.replace(" ", "").split(",") if n))
  if not names:
    raise UserError("--teachers names nobody; `tools/op.sh teachers` lists who there is")
  weights, size = parse_weights(args.weights, names), parse_size(args.view) if args.view else None
  options, spec = parse_options(list(args.option), names), picture_spec(args.input, args.size)
  cv2.setNumThreads(1)  # its threads would fight the teacher's
  teachers: list[Teacher] = [
    load_teacher(n, weights.get(n), args.accept_license, args.download, device=args.device, **options[n]) for n in names
  ]
  told = SourceOptions(
    data_dir=args.data_dir,
    camera=args.camera,
    every=args.every,
    focal=number_or_auto(args.focal, "--focal"),
    horizon=number_or_auto(args.horizon, "--horizon"),
    aim=args.aim,
    images=args.images,
    name=args.name,
    license=args.license,
  )
  if args.aim is not None and args.source != "stills":
    raise UserError("--aim is for pictures of road cameras; add --source stills")
  found = open_sources(list(args.paths), told, args.source)
  views = [p for p in found if isinstance(p, SegmentView)]
  parts = [p for p in found if isinstance(p, Pictures)]
  for teacher in teachers:
    check_teacher(teacher, views, parts, size, spec)
  if args.frames:
    teachers.insert(0, FrameTeacher())
  store = LabelStore(args.output, create=True)
  keep_license(store, parts, args.license)
  failures = Failures()
  groups = label_all(teachers, views, parts, store, args, failures)
  store.claims.sweep(store.is_whole)
  say_stale(store, groups, args.prune)
  return failures.finish()


if __name__ == "__main__":
  raise SystemExit(cli(main)())
