"""Damaged Hugging Face folders of small teachers: what is written in config.json and preprocessor_config.json, the
weights' bytes and names; what loads labels a frame."""

import contextlib
import json
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers

from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, failure_is_said
from openpilot.tools.lib.errors import UserError
from tests.fuzz.fuzz import Case
from tests.fuzz.json_mutator import change, spoil_json
from tests.fuzz.stores import spoil_bytes

REFUSED = (UserError,)
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
HOW = {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "resample": 3, "size": {"height": 64, "width": 96}}
RGB = np.random.default_rng(0).integers(0, 256, (1, 3, 64, 96), dtype=np.uint8)
BIG = (0, -1, 3, 10**4, 10**6, 10**9, 2**31, 2**63, 10**30, 1e9, 0.5, float("nan"))


def write(folder: Path, model: transformers.PreTrainedModel, **how: object) -> None:
  model.eval().save_pretrained(folder)
  (folder / "preprocessor_config.json").write_text(json.dumps({**HOW, **how}))


def checkpoints(tmp: Path) -> dict[str, Path]:
  """By the name of a teacher that takes such a folder."""
  t = transformers
  torch.manual_seed(0)
  v2 = t.Dinov2Config(patch_size=14, image_size=70, **VIT)
  four = {**VIT, "num_hidden_layers": 4}
  back = t.Dinov2Config(patch_size=14, image_size=70, out_indices=[1, 2, 3, 4], reshape_hidden_states=False, **four)
  depth = t.DepthAnythingConfig(
    backbone_config=back,
    reassemble_hidden_size=16,
    neck_hidden_sizes=[8, 8, 8, 8],
    fusion_hidden_size=8,
    head_hidden_size=8,
    depth_estimation_type="metric",
    max_depth=80,
  )
  resnet = t.RTDetrResNetConfig(
    embedding_size=8,
    hidden_sizes=[8, 8, 8, 8],
    depths=[1, 1, 1, 1],
    layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
  )
  detr = t.RTDetrV2Config(
    backbone_config=resnet,
    d_model=16,
    encoder_hidden_dim=16,
    encoder_in_channels=[8, 8, 8],
    decoder_in_channels=[16, 16, 16],
    encoder_ffn_dim=16,
    decoder_ffn_dim=16,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    decoder_layers=2,
    num_queries=10,
    num_denoising=0,
    id2label={0: "car", 1: "person"},
  )
  models = {
    "dinov2-small": t.Dinov2Model(v2),
    "depth-anything-v2-metric-outdoor-small": t.DepthAnythingForDepthEstimation(depth),
    "dinov3-vits16": t.DINOv3ViTModel(t.DINOv3ViTConfig(patch_size=16, num_register_tokens=1, **VIT)),
    "rtdetr-v2-r18": t.RTDetrV2ForObjectDetection(detr),
  }
  for name, model in models.items():
    write(tmp / name, model, do_rescale=True, do_normalize=True)
  return {name: tmp / name for name in models}


def spoil_numbers(text: bytes, r: random.Random) -> bytes:
  """Sizes, as who wants memory and time has them."""
  value = json.loads(text)
  for _ in range(r.choice((1, 1, 2))):
    numbers = [(p, k) for p, k in places(value) if isinstance(p[k], (int, float)) and not isinstance(p[k], bool)]
    parent, key = r.choice(numbers)
    parent[key] = r.choice(BIG)
  return json.dumps(value).encode()


def places(value: dict | list) -> Iterator[tuple[dict | list, str | int]]:
  for key in value if isinstance(value, dict) else range(len(value)):
    yield value, key
    if isinstance(value[key], (dict, list)):
      yield from places(value[key])


def spoil_weights(dat: bytes, r: random.Random) -> bytes:
  """safetensors: 8 bytes that count the header's, the header in JSON, the numbers."""
  size = struct.unpack("<Q", dat[:8])[0]
  header, rest = json.loads(dat[8 : 8 + size]), dat[8 + size :]
  kind = r.randrange(6)
  if kind == 0:
    return spoil_bytes(dat, r)
  if kind == 1:
    return struct.pack("<Q", r.choice((0, size - 1, size + 1, 10**6, 2**40, 2**63, 2**64 - 1))) + dat[8:]
  if kind == 2:
    numbers = np.frombuffer(rest, np.float32).copy()
    numbers[r.randrange(len(numbers)) :: r.choice((1, 7, 1000))] = r.choice((np.nan, np.inf, 1e38, 0, -1e-40))
    rest = numbers.tobytes()
  elif kind == 3:
    name = r.choice([k for k in header if k != "__metadata__"])
    entry = header.pop(name)
    if r.random() < 0.5:
      header[r.choice((name + "x", "layer.99." + name, "", "a" * 5000, "\ud800"[:0] + "\x1b[2J"))] = entry
  elif kind == 4:
    header = change(header, r)
  else:
    rest = rest[: r.randrange(len(rest))]
  new = json.dumps(header).encode()
  return struct.pack("<Q", len(new)) + new + rest


@contextlib.contextmanager
def prepare(tmp: Path, counts: Counter[str]) -> Iterator[Callable[[random.Random], Case]]:
  folders, root = checkpoints(tmp), tmp / "hostile"
  transformers.utils.logging.set_verbosity_error()

  def label(name: str, folder: Path) -> None:
    teacher = load_teacher(name, folder, accepted=("DINOv3", "CC-BY-NC-4.0"), device="cpu")
    with failure_is_said(name):  # as the labeling command has it
      teacher.prepare(*RGB.shape[2:])
      teacher.label(Clip(RGB))
    counts[f"labels of {name}"] += 1

  for name, folder in folders.items():
    label(name, folder)

  def cases(r: random.Random) -> Case:
    name = r.choice(sorted(folders))
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(folders[name], root)
    what = r.choice(("config.json", "config.json", "preprocessor_config.json", "model.safetensors"))
    dat = (root / what).read_bytes()
    if what == "model.safetensors":
      dat = spoil_weights(dat, r)
    else:
      dat = spoil_numbers(dat, r) if r.random() < 0.5 else spoil_json(dat, r)
    (root / what).write_bytes(dat)
    yield f"{name}, {what}", lambda: label(name, root)

  yield cases
