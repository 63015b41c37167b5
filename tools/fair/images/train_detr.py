#!/usr/bin/env python3
"""Trains a detection transformer on labeled pictures: DETR or Deformable DETR on a frozen backbone (DINOv3, DINOv2, any
of transformers' or timm's), by Hugging Face's Trainer. Best weights, COCO's numbers and a page are in the output's
folder, which transformers loads, and which teaches: `--teachers detr:EXP`, `images train-student --teacher-dir EXP`."""

from dataclasses import dataclass
from pathlib import Path

from openpilot.tools.fair.detr.experiment import FILE, is_detr
from openpilot.tools.learn.processes import TRACKERS, is_first
from openpilot.tools.lib.errors import UserError, cli, not_negative
from openpilot.tools.lib.options import option, parse
from openpilot.tools.lib.said import command

DINOV3 = "facebook/dinov3-vitl16-pretrain-lvd1689m"
HEADS = ("detr", "deformable")


@dataclass(frozen=True, kw_only=True)
class Options:
  data: Path = option(help="a COCO JSON, a YOLO folder or its data.yaml, a DOTA folder")
  val: Path | None = option(None, help="the same, to judge by; default: the folder's own val, or a tenth held out")
  images: Path | None = option(None, help="the pictures' folder, where it is not beside")
  val_images: Path | None = option(None, help="the folder of --val's pictures; default: as --images")
  output: Path = option(aliases=("--out",), metavar="EXP", help="the detector's folder")
  backbone: str = option(
    DINOV3, path=True, help="a Hugging Face folder or hub id, a name of timm, or a config.json alone (random weights)"
  )
  backbone_weights: str | None = option(
    None, path=True, metavar="FILE", help="a state dict of timm's network; none: random"
  )
  level: int = option(-1, help="which of the backbone's maps: -1 is the last, -2 in timm's networks is twice as fine")
  normalize: str = option(
    "backbone", choices=("backbone", "imagenet", "none"), help="of RGB; none where the weights have it in their stem"
  )
  head: str = option("detr", choices=HEADS, help="deformable learns faster on few pictures")
  queries: int = option(300, help="the most objects of a picture that can be found")
  encoder_layers: int = option(6, help="0 leaves the encoder out")
  decoder_layers: int = option(6, help="at least 2")
  width: int = option(256, help="of the transformer's tokens, a multiple of 32")
  short: int = option(960, metavar="PIXELS", help="the shorter edge of pictures")
  long: int = option(1536, metavar="PIXELS", help="the longer edge at most")
  pad: str = option("orientation", choices=("orientation", "batch"), help="to one size of each, or the batch's largest")
  augment: bool = option(True, help="flip, mild affine and light changes: leave them out")
  cache_features: bool = option(False, help="run the frozen backbone once, over all pictures; then only flips vary")
  cache_precision: str = option("float16", choices=("float16", "float32"), help="of the features that are kept")
  epochs: int = option(10, help="passes over the pictures")
  batch_size: int = option(2, aliases=("--batch",), help="pictures at once on each GPU")
  accumulate: int = option(4, help="batches a step of the optimizer")
  lr: float = option(1e-4, help="learning rate")
  weight_decay: float = option(1e-4, parse=not_negative, help="of the optimizer")
  warmup: float = option(0.05, parse=not_negative, help="share of the steps in which the learning rate rises")
  clip: float = option(0.1, parse=not_negative, help="of the gradient's norm")
  keep: int = option(8, help="checkpoints that are kept beside the best")
  workers: int = option(8, help="processes that read pictures")
  pilot: bool = option(False, help="first 10 + 10 pictures for an epoch: speed, memory, queries, what all will take")
  score: float = option(0.3, help="from which on a detection counts, where one number is told")
  worst: int = option(8, help="pictures that the page shows")
  license: str | None = option(None, aliases=("--licence",), help="of the backbone's weights, where it is not known")
  accept_license: tuple[str, ...] = option(
    (), aliases=("--accept-licence",), metavar="LICENSE", help="of a backbone whose license restricts use"
  )
  download: bool = option(False, help="get the backbone from the hub")
  device: str | None = option(
    None, aliases=("--gpu",), choices=("cuda", "mps", "cpu"), help="default: the best there is"
  )
  precision: str | None = option(
    None, choices=("no", "bf16", "fp16"), help="mixed precision; default: bf16 on GPUs that have it, else fp16"
  )
  trackers: str = option("", help=f"comma-separated: {', '.join(TRACKERS)}, `pip install -e .[track]`")
  space: str | None = option(None, metavar="USER/SPACE", help="a Hugging Face Space that shows trackio's runs")
  push: str | None = option(None, metavar="USER/MODEL", help="push every checkpoint to the hub, private")
  seed: int = option(0, help="of all that is random")
  resume: bool = option(False, help="go on from the last checkpoint of the output's folder")


def check(args: Options) -> None:
  for name, least in (
    ("queries", 1),
    ("encoder_layers", 0),
    ("decoder_layers", 2),
    ("epochs", 1),
    ("batch_size", 1),
    ("accumulate", 1),
    ("workers", 0),
    ("keep", 1),
    ("worst", 0),
    ("seed", 0),
  ):
    if getattr(args, name) < least:
      raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least {least}")
  if args.width < 32 or args.width % 32:
    raise UserError(f"--width {args.width}: a multiple of 32")
  if not 0 < args.lr < 1 or not args.warmup < 1:
    raise UserError("--lr is above 0 and below 1, --warmup below 1")
  if not 0 < args.score < 1:
    raise UserError(f"--score {args.score:g}: a score is between 0 and 1")
  if not 32 <= args.short <= args.long <= 4096:
    raise UserError(f"--short {args.short} --long {args.long}: 32 to 4096 pixels, and the longer edge is not shorter")
  if args.cache_features and args.pad != "orientation":
    raise UserError("--cache-features wants --pad orientation: features hang on the padding")
  if args.space and "trackio" not in args.trackers:
    raise UserError("--space is of trackio: add --trackers trackio")
  there = args.output.exists() and any(args.output.iterdir())
  if there and not args.resume and is_first():  # which another process may have begun to write
    raise UserError(f"{args.output} is not empty; name another --output, or go on with --resume")
  if args.resume and not is_detr(args.output):
    raise UserError(f"--resume: no training in {args.output}: it has no {FILE}")


def next_command(args: Options) -> str:
  """A student that this teaches: the same pictures, and all that `images train-student` asks for."""
  words: list[str | Path] = ["--data", args.data, "--teacher-dir", args.output, "--output", f"{args.output}-student"]
  for flag in ("val", "images", "val_images"):
    if (value := getattr(args, flag)) is not None:
      words += [f"--{flag.replace('_', '-')}", value]
  for license in args.accept_license:
    words += ["--accept-license", license]
  return command("images", "train-student", *words)


def main() -> None:
  args = parse(Options, __doc__, "images train-detr")
  check(args)
  from openpilot.tools.fair.detr.training import run  # torch and transformers take seconds

  run(args)
  if is_first():
    print(f"next\n  tools/op.sh {next_command(args)}")


if __name__ == "__main__":
  raise SystemExit(cli(main)())
