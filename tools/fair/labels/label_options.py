"""What `tools/op.sh label` is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from openpilot.selfdrive.modeld.fair.frames import VIEWS
from openpilot.tools.fair.labels.picture import SEES
from openpilot.tools.fair.spec import KINDS, InputSpec
from openpilot.tools.lib.cameras import CAMERAS
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.options import option as flag

SIZE = "640x640"  # of single pictures


@dataclass(frozen=True)
class Options:
  teachers: str = flag(help="comma-separated; `tools/op.sh teachers` lists them")
  output: Path = flag(aliases=("--out",), help="the label store")
  paths: tuple[str, ...] = flag(
    (),
    positional=True,
    metavar="PATH",
    help="a route: a folder with segments, one segment's folder, its name (with --data-dir), a video, or "
    "s3://BUCKET/... or gs://BUCKET/...; a folder of pictures; a COCO JSON; a YOLO folder",
  )
  connect: tuple[str, ...] = flag(
    (), metavar="ROUTE", help="a route of comma connect, DONGLE|LOG or its address; COMMA_JWT is the token"
  )
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
  plan: Path | None = flag(
    None, metavar="FILE.parquet", help="write what is to be done, a row for each segment and teacher, and label nothing"
  )
  shard: str | None = flag(
    None, metavar="PART/PARTS", help="do one part of it, as 3/64; the first is 0. Longest segments first"
  )
  ray: str | None = flag(
    None,
    bare="local",
    metavar="HOST:PORT",
    help="on a Ray cluster: its head's address; without one, workers on this machine",
  )
  workers: int | None = flag(
    None, help="with --ray: so many; by default one on each GPU, else one on each node. With --estimate: for so many"
  )
  only: Path | None = flag(None, metavar="FILE.parquet", help="do these rows of a plan alone")
  estimate: bool = flag(False, help="label nothing: say from a timed sample what hours, GPU hours and disk it takes")
  segments: int | None = flag(None, metavar="N", help="with --estimate: of so many segments like those given")


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


def shown(args: Options) -> tuple[tuple[int, int] | None, InputSpec, str | None]:
  """-> for run_teacher() and check_teacher(): size, spec, sees. Raises UserError."""
  size = parse_size(args.view) if args.view else None
  return size, picture_spec(args.input, args.size), args.sees or ("view" if size else None)


def picture_spec(kind: str, size: str) -> InputSpec:
  """Of single pictures. Raises UserError."""
  if kind == "model_frame":
    return InputSpec()
  width, height = parse_size(size, "--size")
  return InputSpec("rgb", height, width)
