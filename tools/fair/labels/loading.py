"""Teachers and sources as `tools/op.sh label` is told of them."""

import cv2

from openpilot.tools.fair.labels.label_options import Options, parse_weights
from openpilot.tools.fair.labels.labeling import FrameTeacher
from openpilot.tools.fair.labels.sources import SourceOptions
from openpilot.tools.fair.labels.sources.fetched import CONNECT
from openpilot.tools.fair.labels.sources.routes import number_or_auto
from openpilot.tools.fair.options import parse_options
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Teacher
from openpilot.tools.lib.errors import UserError


def teacher_names(args: Options) -> list[str]:
  names = list(dict.fromkeys(n for n in args.teachers.replace(" ", "").split(",") if n))
  if not names:
    raise UserError("--teachers names nobody; `tools/op.sh teachers` lists who there is")
  return names


def load_teachers(args: Options) -> list[Teacher]:
  """As the options name them. Raises UserError."""
  names = teacher_names(args)
  weights, options = parse_weights(args.weights, names), parse_options(list(args.option), names)
  cv2.setNumThreads(1)  # its threads would fight the teacher's
  return [
    load_teacher(n, weights.get(n), args.accept_license, args.download, device=args.device, **options[n]) for n in names
  ]


def held_teachers(args: Options) -> dict[str, Teacher]:
  """As load_teachers(), by name, with the one that keeps the frames. Raises UserError where two have one name."""
  held: dict[str, Teacher] = {}
  for t in [*([FrameTeacher()] if args.frames else []), *load_teachers(args)]:
    if held.setdefault(t.name, t) is not t:
      raise UserError(f"two of --teachers are called '{t.name}'; label with one after the other")
  return held


def inputs(args: Options) -> list[str]:
  """What is to be labeled, for the sources. Raises UserError."""
  if not args.paths and not args.connect:
    raise UserError("what is to be labeled? Give a PATH, or --connect ROUTE")
  return [*args.paths, *(f"{CONNECT}{r}" for r in args.connect)]


def source_options(args: Options) -> SourceOptions:
  if args.aim is not None and args.source != "stills":
    raise UserError("--aim is for pictures of road cameras; add --source stills")
  return SourceOptions(
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
