"""DINOv2Wrapper as it is used without a label store: features, and depth by the head that is published for it."""

import sys
from pathlib import Path
from typing import Any

from openpilot.tools.fair.dinov2 import teacher
from openpilot.tools.fair.teacher import weight_dirs

# trained to 80 m, the only ones of a camera on a car; DINOv2 with registers has none
HEAD = "dinov2_{}14_kitti_linear_head.pth"
SHORT = {"vit_small": "vits", "vit_base": "vitb", "vit_large": "vitl", "vit_giant": "vitg"}


class DINOv2Wrapper(teacher.DINOv2Wrapper):
  """The teacher's class. Where neither weights nor depth_head are given and HEAD of this size lies where weights are
  looked for, it is taken, which is said on stderr; without a head estimate_depth raises UserError.

  extract_features: (B, 3, H, W) -> (B, C, H/14, W/14); estimate_depth: -> (B, 1, H, W) meters."""

  def __init__(self, model_size: str = "vit_base", **options: Any):
    if not {"weights", "depth_head", "registers"} & set(options) and model_size in SHORT:
      name = HEAD.format(SHORT[model_size])
      head: Path | None = next((d / name for d in weight_dirs() if (d / name).is_file()), None)
      if head is not None:
        print(f"depth: {head}, trained to 80 m", file=sys.stderr)
        options["depth_head"] = head
    super().__init__(model_size, **options)
