"""Small random backbones of the real classes, labeled pictures, and the options of a training that takes seconds."""

from pathlib import Path

import images_student_fixture
import transformers
import yaml
from PIL import Image

from openpilot.tools.fair.images.train_detr import Options


def save_backbone(folder: Path, kind: str = "vit") -> Path:
  t = transformers
  if kind == "vit":
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = t.DINOv3ViTModel(t.DINOv3ViTConfig(num_register_tokens=4, **sizes))
  elif kind == "convnext":
    model = t.DINOv3ConvNextModel(t.DINOv3ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1]))
  else:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = t.Dinov2Model(t.Dinov2Config(image_size=70, patch_size=14, **sizes))
  model.save_pretrained(folder)
  return folder


def options(folder: Path, **changes) -> Options:
  """Of a training on colored squares, made in `folder` where they are not there yet."""
  for name, n, seed in (("train", 6, 0), ("val", 3, 1)):
    if not (folder / name).exists():
      images_student_fixture.write(folder / name, n, seed)
  small = {"short": 64, "long": 96, "width": 32, "encoder_layers": 1, "decoder_layers": 2, "queries": 12, "epochs": 1}
  small |= {"workers": 0, "accept_license": ("DINOv3",), "device": "cpu", "accumulate": 1, "worst": 1}
  data = {"data": folder / "train" / "annotations.json", "val": folder / "val" / "annotations.json"}
  return Options(**{"output": folder / "out", **data, **small, **changes})


def write_yolo(
  folder: Path, lines: dict[str, list[str]], names=("person", "head"), size=(40, 30), split="train"
) -> Path:
  """lines: picture's name -> its labels; None: no file of labels."""
  for kind in ("images", "labels"):
    (folder / kind / split).mkdir(parents=True, exist_ok=True)
  for name, rows in lines.items():
    Image.new("RGB", size, (len(name) * 9 % 256, 50, 90)).save(folder / "images" / split / f"{name}.png")
    if rows is not None:
      (folder / "labels" / split / f"{name}.txt").write_text("".join(f"{r}\n" for r in rows))
  splits = sorted(p.name for p in (folder / "images").iterdir())
  said = {"names": list(names), **{s: f"images/{s}" for s in splits}}
  (folder / "data.yaml").write_text(yaml.safe_dump(said))
  return folder
