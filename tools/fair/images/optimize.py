#!/usr/bin/env python3
"""A student of pictures made smaller and faster: in 8 bits or float16, as ONNX, TFLite, or a TensorRT engine.
`tools/op.sh optimize` beneath, in the words that picture people use: its page, its variants, its judgment."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.runners import file_of
from openpilot.tools.fair.images.predict import find_bundle
from openpilot.tools.fair.optimize import formats, optimize
from openpilot.tools.lib.errors import UserError, above_zero, cli
from openpilot.tools.lib.files import atomic_path
from openpilot.tools.lib.options import option, parse

SUFFIX = {".onnx": "onnx", ".engine": "tensorrt", ".tflite": "tflite"}


@dataclass(frozen=True)
class Options:
  model: Path = option(positional=True, help="a bundle's folder, a file in it, or what `images train-student` wrote")
  output: Path = option(aliases=("--out",), help="a folder; or a file, beside which the folder of its name is")
  format: tuple[str, ...] = option(
    ("onnx",), nargs="+", metavar=",".join(formats.FORMATS), help="what is made; tflite in an environment of its own"
  )
  quantize: str | None = option(None, choices=("int8",), help="8 bits: a third of --data calibrates, the rest judges")
  precision: str | None = option(None, choices=("fp16",), help="of --format tensorrt, where nothing is quantized")
  data: Path | None = option(
    None, aliases=("--calibration-data",), help="a COCO JSON or YOLO folder of pictures that it has not learned from"
  )
  images: Path | None = option(None, help="the pictures' folder, where it is not beside")
  max_loss: float = option(
    0.01, parse=above_zero, help="what each metric may lose, in parts of it; recalls half of it, in points"
  )
  frames: int = option(48, help="pictures that ranges are taken from")


def check(args: Options) -> tuple[str, ...]:
  """-> the formats. Raises UserError."""
  said = formats.formats_said(args.format)
  kind = SUFFIX.get(args.output.suffix)
  if args.output.suffix and kind is None:
    raise UserError(f"--output {args.output}: a folder, or a file that ends with {', '.join(SUFFIX)}")
  if kind is not None and kind not in said:
    raise UserError(f"--output {args.output} is a file of {kind}, --format says {', '.join(said)}")
  if args.precision is not None and ("tensorrt" not in said or args.quantize):
    raise UserError("--precision fp16 is of --format tensorrt without --quantize; ONNX files store float16 as it is")
  if "tensorrt" in said and not (args.precision or args.quantize):
    raise UserError("--format tensorrt: say --precision fp16, or --quantize int8")
  if args.data is None and (args.quantize or said != ("onnx",)):
    raise UserError("say --data: pictures with labels that calibrate and judge what is made")
  return said


def run(args: Options) -> Path:
  """-> the file or folder that was written. Raises UserError, BundleError."""
  said = check(args)
  model = find_bundle(args.model)
  kind = SUFFIX.get(args.output.suffix)
  folder = args.output.with_suffix("") if kind else args.output
  place = model
  if args.data is not None and (args.quantize or said != ("onnx",)):
    place = folder / load_bundle(model).name
    optimize.run(
      optimize.Options(
        bundle=model,
        data=args.data,
        output=folder,
        int8=args.quantize == "int8",
        format=said,
        images=args.images,
        max_loss=args.max_loss,
        frames=args.frames,
      )
    )
  bundle = load_bundle(place)
  if kind == "tensorrt":
    files = sorted(folder.glob("*.engine"))
  else:
    runner = kind or "onnx"
    if kind == "tflite" and args.quantize:
      runner = "tflite-int8"
    files = [place / file_of(g, runner) for g in bundle.graphs]
  if kind is None:
    if place == model:  # its ONNX file as it is
      args.output.mkdir(parents=True, exist_ok=True)
      for file in files:
        shutil.copyfile(file, args.output / file.name)
    return args.output
  if len(files) != 1:
    raise UserError(f"{place} has {len(files)} graphs; name a folder with --output")
  with atomic_path(args.output) as tmp:
    shutil.copyfile(files[0], tmp)
  print(f"wrote        {args.output}")
  return args.output


def main() -> None:
  run(parse(Options, __doc__, "images optimize"))


if __name__ == "__main__":
  raise SystemExit(cli(main, (BundleError,))())
