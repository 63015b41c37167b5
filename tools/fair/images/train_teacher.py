#!/usr/bin/env python3
"""Tunes teachers on labeled pictures: Grounding DINO where there are boxes, SAM where there are masks, both where there
are both. Small adapters learn (LoRA), the networks stay as they are; --full tunes all weights.

The output is an experiment's folder: `label --teachers FOLDER` labels with it, and train-student learns from it."""

import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from openpilot.tools.lib.errors import UserError, above_zero, cli, not_negative, printable, warn
from openpilot.tools.lib.files import LONG
from openpilot.tools.lib.options import option, parse, save
from openpilot.tools.learn.processes import TRACKERS, is_first, only_cpu, one_run, parse_trackers, said_once, world_size

DINO, SAM = "IDEA-Research/grounding-dino-tiny", "facebook/sam-vit-base"
NAMES = {"grounding-dino": "grounding_dino", "sam": "sam"}


def device_name(text: str) -> str:
  """A GPU's number, as the design note has it, or a device's name."""
  return f"cuda:{text}" if text.isdigit() else text


@dataclass(frozen=True, kw_only=True)
class Options:
  data: Path = option(help="a COCO JSON, or a YOLO folder: what is learned")
  val: Path | None = option(None, help="the same, held out: metrics before and after, and the best checkpoint")
  images: Path | None = option(None, help="the pictures' folder, where it is not beside the annotations")
  output: Path = option(aliases=("--out",), metavar="EXPERIMENT", help="the experiment's folder")
  teachers: str = option(
    "", metavar="NAME,...", help="of grounding-dino, sam; default: those for which there are labels"
  )
  grounding_dino: str = option(DINO, path=True, help="a Hugging Face folder, a .pth of GroundingDINO, or a hub id")
  sam: str = option(SAM, path=True, help="the same of SAM or SAM 2.1")
  tokenizer: Path | None = option(None, help="a folder with bert-base-uncased's vocab.txt, for a .pth of GroundingDINO")
  download: bool = option(False, help="get bases from the hub that are not here")
  prompts: str = option("together", choices=("together", "each"), help="one prompt for all classes, or one for each")
  prompt: tuple[str, ...] = option((), metavar="CLASS=TEXT", help="a phrase to ask for, in place of the class's name")
  negative: tuple[str, ...] = option((), metavar="TEXT", help="a phrase of what looks alike and is none of the classes")
  epochs: int = option(20, help="passes over the pictures")
  batch_size: int = option(4, aliases=("--batch",), help="pictures at once; halved where memory is too small")
  accumulate: int = option(1, help="batches a step of the optimizer; doubled where --batch-size is halved")
  lr: float = option(1e-4, help="learning rate")
  warmup: int = option(50, help="steps in which the learning rate rises")
  lora_r: int = option(16, aliases=("--lora.r",), help="rank of the adapters")
  lora_alpha: float = option(32.0, aliases=("--lora.alpha",), parse=above_zero, help="their scale: alpha / rank")
  lora_dropout: float = option(0.0, aliases=("--lora.dropout",), parse=not_negative, help="of their inputs")
  lora_targets: str = option(
    "attention",
    aliases=("--lora.targets",),
    help="layers that get one: decoder, attention, everywhere, or an expression for their names",
  )
  full: bool = option(False, help="tune all weights, without adapters")
  checkpointing: bool = option(False, help="compute activations again in place of keeping them, where the model can")
  flip: bool = option(True, help="show every picture as it is, never mirrored")
  jitter: float = option(0.1, parse=not_negative, help="how far SAM's boxes are moved, as a share of their sides")
  max_objects: int = option(16, help="objects of a picture that SAM is asked for in a step")
  cache: float = option(
    4.0,
    parse=not_negative,
    metavar="GIB",
    help="memory in which SAM's frozen image encoder's answers are kept from epoch to epoch; 0: computed every time",
  )
  size: int | None = option(
    None, metavar="PIXELS", help="the shorter side of Grounding DINO's pictures; default: its own"
  )
  seed: int = option(0, help="of all that is random")
  device: str | None = option(
    None, aliases=("--gpu",), parse=device_name, help="cuda, cuda:1, mps, cpu, or a GPU's number"
  )
  precision: str | None = option(
    None, choices=("no", "bf16", "fp16"), help="mixed precision; default: bf16 on GPUs that have it"
  )
  trackers: str | None = option(
    None, help=f"comma-separated: {', '.join(TRACKERS)}, `pip install -e .[track]`; default: tensorboard where it is"
  )
  resume: bool = option(False, help="go on from the last checkpoints of the experiment's folder")


def check(args: Options) -> None:
  for name in ("epochs", "batch_size", "accumulate", "max_objects"):
    if getattr(args, name) < 1:
      raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
  if not 0 < args.lr < 1:
    raise UserError(f"--lr {args.lr}: above 0 and below 1")
  if args.size is not None and not 16 <= args.size <= 4096:
    raise UserError(f"--size {args.size}: 16 to 4096 pixels")
  if args.jitter > 0.4:
    raise UserError(f"--jitter {args.jitter}: at most 0.4; such boxes are not the object's any more")
  if world_size() > 1 and ":" in (args.device or ""):
    raise UserError(f"--device {args.device}: each of {world_size()} processes takes a GPU of its own; leave it out")
  # the first process looks: another one may find what it has begun to write
  if not args.resume and is_first() and args.output.exists() and any(args.output.iterdir()):
    raise UserError(f"{args.output} is not empty; name another --output, or go on with --resume")


def chosen(args: Options, info: dict[str, Any]) -> list[str]:
  """The teachers that are tuned. Raises UserError where there are no labels for one that is asked for."""
  there = {"grounding_dino": info["has_boxes"], "sam": info["has_masks"]}
  if not args.teachers:
    return [k for k, yes in there.items() if yes]
  said = [t.strip().replace("_", "-") for t in args.teachers.split(",") if t.strip()]
  if unknown := [t for t in said if t not in NAMES]:
    raise UserError(f"--teachers {printable(unknown[0], 40)}: there are {', '.join(NAMES)}")
  if "sam" in said and not info["has_masks"]:
    raise UserError("--teachers sam: the data has no masks")
  return [NAMES[t] for t in dict.fromkeys(said)]


def find_base(args: Options, key: str) -> tuple[Path, str]:
  """-> where the base is, and what it is called: no folder of this machine."""
  from openpilot.tools.fair.teacher import find_weights

  said = getattr(args, key)
  is_hub_id = said.count("/") == 1 and not said.startswith(("/", ".", "~"))
  path = find_weights(said, None if is_hub_id and not Path(said).exists() else said, args.download)
  return path, Path(said).resolve().name if Path(said).exists() else said


def load_base(args: Options, key: str, path: Path, device: Any) -> Any:
  from openpilot.tools.fair.grounded_sam.detector import load_detector
  from openpilot.tools.fair.grounded_sam.prompts import VOCABULARY
  from openpilot.tools.fair.grounded_sam.segmenter import load_segmenter
  from openpilot.tools.fair.teacher import find_weights

  if key == "sam":
    return load_segmenter(path, device)
  words = args.tokenizer
  if words is None and path.is_file():
    words = find_weights(VOCABULARY, None, args.download)
  found = load_detector(path, device, words)
  if args.size is not None:
    found.resize(args.size)
  return found


def tuning(args: Options) -> Any:
  from openpilot.tools.fair.grounded_sam.tune import Tuning

  return Tuning(**{f.name: getattr(args, f.name) for f in fields(Tuning)})


def own_device(args: Options) -> Any:
  """Of several processes each has a GPU of its own."""
  from openpilot.tools.learn.device import choose_device

  several = world_size() > 1 and not only_cpu() and args.device != "cpu"
  return choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several else args.device, "float32")


@dataclass
class Begun:
  """One teacher, ready to be tuned."""

  loop: Any
  teacher: Any
  tuned: Any  # LoRATrainer; None with --full
  path: Path
  base: str
  base_hash: str
  learn: int  # parameters


def begin(args: Options, key: str, data: Any, val: Any) -> Begun:
  """Raises UserError."""
  import torch

  from openpilot.tools.fair.grounded_sam import tune
  from openpilot.tools.fair.grounded_sam.lora import LoRATrainer, lora_config
  from openpilot.tools.fair.grounded_sam.prompts import make_prompts, parse_prompts
  from openpilot.tools.fair.teacher import hash_weights
  from openpilot.tools.learn.checkpoint import load_checkpoint, same_run
  from openpilot.tools.learn.device import choose_device
  from openpilot.tools.learn.processes import make_accelerator

  device = own_device(args)
  path, base = find_base(args, key)
  teacher = load_base(args, key, path, device)
  asked: Any = None
  if key == "grounding_dino":
    said = parse_prompts(args.prompt, data.names)
    asked = make_prompts(
      teacher.tokenizer, data.names, said, args.negative, args.prompts == "each", teacher.most_tokens
    )
    teacher.prompts = asked
  tuned = None
  if args.full:
    teacher.model.requires_grad_(True)
  else:
    config = lora_config(
      teacher.model, teacher.family, args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets
    )
    torch.manual_seed(args.seed)  # adapters begin at random
    tuned = LoRATrainer(teacher.model, config)
  if args.checkpointing:
    checkpointing(teacher.model)
  learn = sum(p.numel() for p in teacher.model.parameters() if p.requires_grad)
  print(f"{key}: {base} ({teacher.family}), {tuned.report() if tuned else f'all {learn:,} parameters learn'}")
  folder = args.output / "runs" / key
  folder.mkdir(parents=True, exist_ok=True)
  there = [t for t in TRACKERS[:1] if installed(t)]
  trackers = tuple(there) if args.trackers is None else parse_trackers(args.trackers)
  bf16 = device.device.type == "cuda" and str(choose_device(str(device.device)).dtype) == "torch.bfloat16"
  accelerator = make_accelerator(
    args.precision or ("bf16" if bf16 else "no"), trackers, args.output / "logs", device.device.type == "cpu"
  )
  kind = tune.DetectorLoop if key == "grounding_dino" else tune.SegmenterLoop
  loop = kind(folder, teacher, data, val, tuning(args), accelerator=accelerator)
  base_hash = hash_weights(path)
  lora = None if tuned is None else [args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets]
  loop.run_key = {"base": base_hash, "data": data.summary()["sha256"], "lora": lora, "size": args.size}
  how = {k: v for k, v in asdict(loop.t).items() if k != "cache"}  # which changes nothing that is learned
  loop.run_key |= {"tuning": how, "asked": None if asked is None else asked.settings()}
  if args.resume and (folder / loop.LAST).exists():
    state = load_checkpoint(folder / loop.LAST, keys=("learned", "run"), of="a teacher")
    same_run(folder / loop.LAST, state["run"], loop.run_key)
    loop.load(state)
    print(f"{key}: goes on from step {loop.step} of {loop.steps}")
  return Begun(loop, teacher, tuned, path, base, base_hash, learn)


def tune_one(args: Options, key: str, data: Any, val: Any) -> dict[str, Any]:
  """Tunes one teacher; the first process saves it. -> its part of metadata.json."""
  from openpilot.tools.fair.grounded_sam import tune

  with said_once():
    begun = begin(args, key, data, val)
  loop = begun.loop
  memory = tune.estimate(loop)
  print(f"{key}: memory in GiB: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in memory.items()))
  after = tune.learn(loop)
  before = loop.before
  for k in after:
    print(f"{key}: {k} {before.get(k, float('nan')):.3f} before, {after[k]:.3f} after")
  megabytes = save_tuned(args, key, begun) if is_first() else 0.0
  return {
    "base": begun.base,
    "base_hash": begun.base_hash,
    "family": begun.teacher.family,
    "full": args.full,
    "size": args.size,
    "parameters": sum(p.numel() for p in begun.teacher.model.parameters()),
    "trainable": begun.learn,
    "megabytes": round(megabytes, 3),
    "steps": loop.step,
    "memory_gib": {k: round(v, 3) for k, v in memory.items()},
    "before": before,
    "after": after,
  }


def save_tuned(args: Options, key: str, begun: Begun) -> float:
  """-> megabytes."""
  from openpilot.tools.fair.grounded_sam.lora import save_lora

  place = args.output / "teachers" / (key if args.full else f"{key}_lora")
  if begun.tuned is None:
    megabytes = save_whole(place, begun.teacher)
  else:
    megabytes = save_lora(place, begun.tuned.model, begun.base, begun.base_hash, begun.teacher.family)
    if key == "grounding_dino" and begun.path.is_file():
      begun.teacher.tokenizer.save_pretrained(place)  # the base has none
  print(f"{key}: {megabytes:.2f} MB in {place}")
  return megabytes


def installed(package: str) -> bool:
  import importlib.util

  return importlib.util.find_spec(package) is not None


def checkpointing(model: Any) -> None:
  try:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
  except (ValueError, NotImplementedError, AttributeError) as e:
    warn(f"--checkpointing: {printable(e, LONG)}; it goes on without")


def save_whole(place: Path, teacher: Any) -> float:
  """A Hugging Face folder. -> megabytes of its weights."""
  import json

  place.mkdir(parents=True, exist_ok=True)
  teacher.model.save_pretrained(place)
  pictures = teacher.pictures.config if hasattr(teacher, "pictures") else teacher.said
  (place / "preprocessor_config.json").write_text(json.dumps(pictures))
  if hasattr(teacher, "tokenizer"):
    teacher.tokenizer.save_pretrained(place)
  return sum(p.stat().st_size for p in place.glob("*.safetensors")) / 1e6


def read(args: Options) -> tuple[Any, Any, list[str], dict[str, Any]]:
  """-> the pictures, those to judge by, the teachers that are tuned, metadata.json as it is. The first process writes
  how. Raises UserError."""
  import yaml

  from openpilot.tools.fair.grounded_sam.data import read_pictures
  from openpilot.tools.fair.grounded_sam.experiment import CONFIG, generate_config, read_experiment
  from openpilot.tools.fair.grounded_sam.lora import versions
  from openpilot.tools.fair.grounded_sam.prompts import parse_prompts
  from openpilot.tools.lib.files import atomic_path

  check(args)
  data = read_pictures(args.data, args.images)
  val = None if args.val is None else read_pictures(args.val, args.images, data)
  teachers = chosen(args, data.info)
  for key in teachers:
    find_base(args, key)  # before anything is written
  prompts = parse_prompts(args.prompt, data.names)
  if is_first():
    args.output.mkdir(parents=True, exist_ok=True)
    save(args, args.output)
    lora = {f.name.removeprefix("lora_"): getattr(args, f.name) for f in fields(args) if f.name.startswith("lora_")}
    config = generate_config(args.output / "options.yaml", data.info, {"lora": lora, "teachers": teachers})
    config = {k: v for k, v in config.items() if not k.startswith("lora_")}
    with atomic_path(args.output / CONFIG) as tmp:
      tmp.write_text(yaml.safe_dump(config, sort_keys=False))
  print(f"pictures     {len(data)} to learn from, {'none' if val is None else len(val)} held out")
  print(f"classes      {', '.join(map(str, data.names))}")
  if val is None:
    print("             without --val nothing is judged, and the last checkpoint is taken")
  said: dict[str, Any] = {
    "classes": [{"id": k, "name": v} for k, v in data.mapping.items()],
    "info": {**data.info, "class_mapping": {str(k): v for k, v in data.mapping.items()}},
    "licenses": data.licenses,
    "versions": versions(),
    "prompts": prompts,
    "negatives": list(args.negative),
    "each": args.prompts == "each",
    "data": {"train": data.summary(), **({} if val is None else {"val": val.summary()})},
    "teachers": {},
  }
  if args.resume and (args.output / "metadata.json").exists():
    said["teachers"] = read_experiment(args.output).metadata["teachers"]
  return data, val, teachers, said


def run(args: Options) -> dict[str, Any]:
  """-> metadata.json."""
  from openpilot.tools.fair.grounded_sam.experiment import write_metadata

  with said_once():
    data, val, teachers, said = read(args)
  for key in teachers:
    if key in said["teachers"]:
      print(f"{key}: is there already")
      continue
    said["teachers"][key] = tune_one(args, key, data, val)
    if is_first():
      write_metadata(args.output, said)
  return said


def main() -> None:
  args = parse(Options, __doc__, "images train-teacher")
  with one_run():
    run(args)


if __name__ == "__main__":
  raise SystemExit(cli(main)())
