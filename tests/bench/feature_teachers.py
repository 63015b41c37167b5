"""Teachers of dense features whose real weights may be published, for benches that learn from a feature map. They are
registered on import: FAIR_PLUGINS=feature_teachers, with this folder in PYTHONPATH, brings them to a command.

mobilenetv2: the map of stride 16 of mobilenetv2_100 with ImageNet's weights; random: the same network without them;
xfeat: XFeat's descriptors."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.teacher import Clip, Entry, Label, Labels, State

WEIGHTS = {"mobilenetv2": "timm_mobilenetv2_100_imagenet.pth", "random": "", "xfeat": "xfeat_320x224.onnx"}


class FeatureTeacher:
  """Of dense features: see the top."""

  stateful, sees = False, "picture"

  def __init__(self, name: str, entry: Entry, path: Path | None, device: str | None = None):
    self.name, self.license, self.model_id = name, entry.license, name
    self.checkpoint_hash = name
    self.kind, self.path, self.labels = name, path, list[Label]()

  def picture_size(self, width: int, height: int) -> tuple[int, int]:
    return width, height

  def prepare(self, height: int, width: int) -> None:
    if self.kind == "xfeat":
      self.session = ort.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
    else:
      import timm

      torch.manual_seed(0)
      self.net = timm.create_model("mobilenetv2_100", features_only=True, out_indices=(3,), pad_type="same").eval()
      if self.path is not None:
        state = {k: v.float() for k, v in torch.load(self.path, weights_only=True).items()}
        missing = self.net.load_state_dict(state, strict=False).missing_keys
        assert not missing, missing
    channels = 64 if self.kind == "xfeat" else 96
    self.labels = [Label("features", "dense", "float16", (channels, height // 16, width // 16))]

  def settings(self) -> dict[str, Any]:
    return {}

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    rgb = torch.from_numpy(np.ascontiguousarray(clip.rgb)).float() / 255
    size = rgb.shape[2] // 16, rgb.shape[3] // 16
    with torch.no_grad():
      if self.kind == "xfeat":
        wide = torch.nn.functional.interpolate(rgb, (224, 320), mode="bilinear", antialias=True).numpy()
        out = torch.from_numpy(np.concatenate([self.session.run(["output"], {"input": x[None]})[0] for x in wide]))
      else:
        out = self.net(rgb)[0]
      if out.shape[2:] != size:
        out = torch.nn.functional.interpolate(out, size, mode="bilinear", antialias=True)
    return {"features": out.numpy().astype(np.float16)}, None


for _name, _file in WEIGHTS.items():
  TEACHERS[_name] = Entry(FeatureTeacher, _file, "Apache-2.0", "", "dense features")
