"""Every teacher in a few lines, and how one is loaded. `tools/op.sh teachers` lists them."""

import contextlib
import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from openpilot.tools.fair.teacher import Entry, Teacher, check_license, failure_is_said, find_weights
from openpilot.tools.lib.errors import UserError

TEACHERS: dict[str, Entry] = {
  "openpilot": Entry(
    "openpilot.teacher:OpenpilotTeacher", "", "MIT", "", "lane lines, path, leads out of the route's own log"
  ),
  "simulator": Entry(
    "simulator.teacher:SimulatorTeacher", "", "MIT", "", "depth, classes, objects, points: exact, of simulated routes"
  ),
  "yolox-nano": Entry(
    "onnx.teacher:OnnxTeacher",
    "yolox_nano.onnx",
    "Apache-2.0",
    "0.9M",
    "boxes of COCO's road users",
    {"config": "yolox_nano"},
  ),
  "rtmdet-nano-person": Entry(
    "onnx.teacher:OnnxTeacher",
    "rtmdet_nano_person.onnx",
    "Apache-2.0",
    "1.0M",
    "boxes of persons",
    {"config": "rtmdet_nano_person"},
  ),
  "twinlitenet": Entry(
    "onnx.teacher:OnnxTeacher",
    "twinlitenet.onnx",
    "MIT",
    "0.4M",
    "drivable area, lane markings",
    {"config": "twinlitenet"},
  ),
  "road-segmentation-adas": Entry(
    "onnx.teacher:OnnxTeacher",
    "road-segmentation-adas-0001.onnx",
    "Apache-2.0",
    "0.2M",
    "road, curb, lane markings",
    {"config": "road_segmentation_adas"},
  ),
  "cityscapes-edgetpu": Entry(
    "tflite.teacher:TfliteTeacher",
    "deeplab_mobilenet_edgetpu_slim_cityscapes_quant.tflite",
    "Apache-2.0",
    "1.8M",
    "Cityscapes' 19 classes of a street",
    {"config": "cityscapes"},
  ),
  "deimv2-atto": Entry(
    "onnx.teacher:OnnxTeacher",
    "deimv2_hgnetv2_atto_coco.onnx",
    "Apache-2.0",
    "0.5M",
    "boxes of COCO's road users",
    {"config": "deimv2_atto"},
  ),
  "detr-resnet-50": Entry(
    "detr.teacher:DetrTeacher", "facebook/detr-resnet-50", "Apache-2.0", "41.5M", "boxes of road users, signs, animals"
  ),
  "rtdetr-v2-r18": Entry(
    "detr.teacher:DetrTeacher", "PekingU/rtdetr_v2_r18vd", "Apache-2.0", "20.2M", "boxes of road users, signs, animals"
  ),
  "rtdetr-v2-r50": Entry(
    "detr.teacher:DetrTeacher", "PekingU/rtdetr_v2_r50vd", "Apache-2.0", "42.9M", "boxes of road users, signs, animals"
  ),
  "d-fine-nano": Entry(
    "detr.teacher:DetrTeacher",
    "ustc-community/dfine-nano-coco",
    "Apache-2.0",
    "3.8M",
    "boxes of road users, signs, animals",
  ),
  "d-fine-small": Entry(
    "detr.teacher:DetrTeacher",
    "ustc-community/dfine-small-coco",
    "Apache-2.0",
    "10.3M",
    "boxes of road users, signs, animals",
  ),
  # on a ViT distilled from DINOv3; converted by the author of transformers' class
  "deimv2-dinov3-s": Entry(
    "detr.teacher:DetrTeacher",
    "harshaljanjani/DEIMv2_DINOv3_S_COCO_Transformers",
    "DINOv3",
    "9.7M",
    "boxes of road users, signs, animals",
  ),
  "raft-tracker": Entry(
    "cotracker.tracker:RaftTeacher",
    "raft-small.pth",
    "BSD-3-Clause",
    "1.0M",
    "tracks of points on the road and its lines",
  ),
  "route-depth": Entry(
    "route_depth.teacher:RouteDepthTeacher",
    "raft-small.pth",
    "BSD-3-Clause",
    "1.0M",
    "depth in meters by the drive itself, where it is sure; its standard deviation",
  ),
  "cotracker3-offline": Entry(
    "cotracker.cotracker:CoTrackerTeacher",
    "scaled_offline.pth",
    "CC-BY-NC-4.0",
    "25M",
    "tracks of points, also while they are covered",
    {"mode": "offline"},
  ),
  "cotracker3-online": Entry(
    "cotracker.cotracker:CoTrackerTeacher",
    "scaled_online.pth",
    "CC-BY-NC-4.0",
    "25M",
    "tracks of points, also while they are covered",
    {"mode": "online"},
  ),
  "cotracker2": Entry(
    "cotracker.cotracker:CoTrackerTeacher",
    "cotracker2.pth",
    "CC-BY-NC-4.0",
    "45M",
    "tracks of points, also while they are covered",
    {"mode": "v2"},
  ),
  "yolox-tracker": Entry(
    "sam.track:TrackerTeacher",
    "yolox_nano.onnx",
    "Apache-2.0",
    "0.9M",
    "boxes with identity",
    {"detector": "yolox-nano"},
  ),
  "rtdetr-v2-r18-tracker": Entry(
    "sam.track:TrackerTeacher",
    "PekingU/rtdetr_v2_r18vd",
    "Apache-2.0",
    "20.2M",
    "boxes with identity",
    {"detector": "rtdetr-v2-r18"},
  ),
  "dinov2-small": Entry("dinov2.teacher:make", "facebook/dinov2-small", "Apache-2.0", "22M", "dense features"),
  "dinov2-with-registers-small": Entry(
    "dinov2.teacher:make", "facebook/dinov2-with-registers-small", "Apache-2.0", "22M", "dense features"
  ),
  "dinov2-base": Entry("dinov2.teacher:make", "facebook/dinov2-base", "Apache-2.0", "87M", "dense features"),
  "dinov2-with-registers-base": Entry(
    "dinov2.teacher:make", "facebook/dinov2-with-registers-base", "Apache-2.0", "87M", "dense features"
  ),
  "dinov2-large": Entry("dinov2.teacher:make", "facebook/dinov2-large", "Apache-2.0", "304M", "dense features"),
  "dinov2-with-registers-large": Entry(
    "dinov2.teacher:make", "facebook/dinov2-with-registers-large", "Apache-2.0", "304M", "dense features"
  ),
  "dinov2-giant": Entry("dinov2.teacher:make", "facebook/dinov2-giant", "Apache-2.0", "1.1B", "dense features"),
  "dinov2-with-registers-giant": Entry(
    "dinov2.teacher:make", "facebook/dinov2-with-registers-giant", "Apache-2.0", "1.1B", "dense features"
  ),
  "depth-anything-small": Entry(
    "dinov2.teacher:make", "LiheYoung/depth-anything-small-hf", "Apache-2.0", "25M", "depth, relative (inverse)"
  ),
  "depth-anything-base": Entry(
    "dinov2.teacher:make", "LiheYoung/depth-anything-base-hf", "Apache-2.0", "97M", "depth, relative (inverse)"
  ),
  "depth-anything-large": Entry(
    "dinov2.teacher:make", "LiheYoung/depth-anything-large-hf", "Apache-2.0", "335M", "depth, relative (inverse)"
  ),
  "depth-anything-v2-small": Entry(
    "dinov2.teacher:make", "depth-anything/Depth-Anything-V2-Small-hf", "Apache-2.0", "25M", "depth, relative (inverse)"
  ),
  "depth-anything-v2-base": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Base-hf",
    "CC-BY-NC-4.0",
    "97M",
    "depth, relative (inverse)",
  ),
  "depth-anything-v2-large": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Large-hf",
    "CC-BY-NC-4.0",
    "335M",
    "depth, relative (inverse)",
  ),
  "depth-anything-v2-metric-outdoor-small": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Metric-Outdoor-Small-hf",
    "Apache-2.0",
    "25M",
    "depth in meters",
  ),
  "depth-anything-v2-metric-outdoor-base": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Metric-Outdoor-Base-hf",
    "CC-BY-NC-4.0",
    "97M",
    "depth in meters",
  ),
  "depth-anything-v2-metric-outdoor-large": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Metric-Outdoor-Large-hf",
    "CC-BY-NC-4.0",
    "335M",
    "depth in meters",
  ),
  "depth-anything-v2-metric-indoor-small": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Metric-Indoor-Small-hf",
    "Apache-2.0",
    "25M",
    "depth in meters",
  ),
  "depth-anything-v2-metric-indoor-base": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Metric-Indoor-Base-hf",
    "CC-BY-NC-4.0",
    "97M",
    "depth in meters",
  ),
  "depth-anything-v2-metric-indoor-large": Entry(
    "dinov2.teacher:make",
    "depth-anything/Depth-Anything-V2-Metric-Indoor-Large-hf",
    "CC-BY-NC-4.0",
    "335M",
    "depth in meters",
  ),
  "dpt-dinov2-small-kitti": Entry(
    "dinov2.teacher:make", "facebook/dpt-dinov2-small-kitti", "Apache-2.0", "37M", "depth in meters", {"unit": "m"}
  ),
  "dinov3-vits16": Entry(
    "dinov3.teacher:make", "facebook/dinov3-vits16-pretrain-lvd1689m", "DINOv3", "22M", "dense features"
  ),
  "dinov3-vits16plus": Entry(
    "dinov3.teacher:make", "facebook/dinov3-vits16plus-pretrain-lvd1689m", "DINOv3", "29M", "dense features"
  ),
  "dinov3-vitb16": Entry(
    "dinov3.teacher:make", "facebook/dinov3-vitb16-pretrain-lvd1689m", "DINOv3", "86M", "dense features"
  ),
  "dinov3-vitl16": Entry(
    "dinov3.teacher:make", "facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3", "303M", "dense features"
  ),
  "dinov3-vith16plus": Entry(
    "dinov3.teacher:make", "facebook/dinov3-vith16plus-pretrain-lvd1689m", "DINOv3", "841M", "dense features"
  ),
  "dinov3-convnext-tiny": Entry(
    "dinov3.teacher:make", "facebook/dinov3-convnext-tiny-pretrain-lvd1689m", "DINOv3", "28M", "dense features"
  ),
  "dinov3-convnext-small": Entry(
    "dinov3.teacher:make", "facebook/dinov3-convnext-small-pretrain-lvd1689m", "DINOv3", "50M", "dense features"
  ),
  "dinov3-convnext-base": Entry(
    "dinov3.teacher:make", "facebook/dinov3-convnext-base-pretrain-lvd1689m", "DINOv3", "88M", "dense features"
  ),
  "dinov3-convnext-large": Entry(
    "dinov3.teacher:make", "facebook/dinov3-convnext-large-pretrain-lvd1689m", "DINOv3", "196M", "dense features"
  ),
  "grounding-dino-tiny": Entry(
    "grounded_sam.teacher:GroundedSamTeacher",
    "IDEA-Research/grounding-dino-tiny",
    "Apache-2.0",
    "172M",
    "boxes of what classes=... names",
  ),
  "grounding-dino-base": Entry(
    "grounded_sam.teacher:GroundedSamTeacher",
    "IDEA-Research/grounding-dino-base",
    "Apache-2.0",
    "232M",
    "boxes of what classes=... names",
  ),
  "mm-grounding-dino-tiny": Entry(
    "grounded_sam.teacher:GroundedSamTeacher",
    "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det",
    "Apache-2.0",
    "173M",
    "boxes of what classes=... names",
  ),
  "sam2.1-tiny": Entry(
    "sam.sam2:SAM2VideoWrapper",
    "facebook/sam2.1-hiera-tiny",
    "Apache-2.0",
    "38.9M",
    "masks with identity",
    {"detector": "yolox-nano"},
  ),
  "sam2.1-small": Entry(
    "sam.sam2:SAM2VideoWrapper",
    "facebook/sam2.1-hiera-small",
    "Apache-2.0",
    "46M",
    "masks with identity",
    {"detector": "yolox-nano"},
  ),
  "sam2.1-base-plus": Entry(
    "sam.sam2:SAM2VideoWrapper",
    "facebook/sam2.1-hiera-base-plus",
    "Apache-2.0",
    "80.8M",
    "masks with identity",
    {"detector": "yolox-nano"},
  ),
  "sam2.1-large": Entry(
    "sam.sam2:SAM2VideoWrapper",
    "facebook/sam2.1-hiera-large",
    "Apache-2.0",
    "224M",
    "masks with identity",
    {"detector": "yolox-nano"},
  ),
  "sam2-features-tiny": Entry(
    "sam.features:Sam2FeatureTeacher", "facebook/sam2.1-hiera-tiny", "Apache-2.0", "27M", "dense features"
  ),
  "sam2-features-small": Entry(
    "sam.features:Sam2FeatureTeacher", "facebook/sam2.1-hiera-small", "Apache-2.0", "34M", "dense features"
  ),
  "sam2-features-base-plus": Entry(
    "sam.features:Sam2FeatureTeacher", "facebook/sam2.1-hiera-base-plus", "Apache-2.0", "69M", "dense features"
  ),
  "sam2-features-large": Entry(
    "sam.features:Sam2FeatureTeacher", "facebook/sam2.1-hiera-large", "Apache-2.0", "213M", "dense features"
  ),
  "edgetam": Entry(
    "sam.sam2:SAM2VideoWrapper",
    "yonigozlan/EdgeTAM-hf",
    "Apache-2.0",
    "13.9M",
    "masks with identity",
    {"detector": "yolox-nano"},
  ),
  "sam3": Entry(
    "sam.sam3:Sam3Teacher", "facebook/sam3", "SAM", "860M", "masks with identity of what answers to a word"
  ),
}


def find_entry(name: str) -> tuple[str, Entry]:
  """A registry name, the description of an ONNX network (*.yaml), or the folder of an experiment (train-teacher; of
  train-detr, also as detr:FOLDER) -> the teacher's name and entry. Raises UserError where there is none."""
  if name.endswith((".yaml", ".yml")):
    from openpilot.tools.fair.onnx.teacher import describe

    return describe(Path(name))
  if name not in TEACHERS and (name.startswith("detr:") or (Path(name) / "detr.json").is_file()):
    from openpilot.tools.fair.detr.experiment import describe as describe_detr

    return describe_detr(Path(name.removeprefix("detr:")))
  if name not in TEACHERS and (Path(name) / "teacher_config.yaml").is_file():
    from openpilot.tools.fair.grounded_sam.experiment import describe as describe_experiment

    return describe_experiment(Path(name))
  if name not in TEACHERS:
    raise UserError(
      f"no teacher '{name}'; there are {', '.join(TEACHERS)}, or name the description of an ONNX network, as net.yaml"
    )
  return name, TEACHERS[name]


def maker_of(name: str, entry: Entry) -> Callable[..., Teacher]:
  """What entry.make names. Raises UserError where a package that it needs is not installed."""
  if not isinstance(entry.make, str):
    return entry.make
  module, attribute = entry.make.split(":")
  try:
    return getattr(importlib.import_module(f"openpilot.tools.fair.{module}"), attribute)
  except ModuleNotFoundError as e:
    raise UserError(f"teacher '{name}' needs the package {e.name}; install it: see tools/fair/README.md") from None


def load_teacher(
  name: str, weights: str | Path | None = None, accepted: Iterable[str] = (), download: bool = False, **options: Any
) -> Teacher:
  """A teacher by its registry name, or an ONNX network by its description (*.yaml; tools/fair/onnx). options override
  the entry's.

  Raises UserError on an unknown name, missing weights, a license not accepted."""
  name, entry = find_entry(name)
  check_license(name, entry.license, accepted)
  path = find_weights(entry.weights, weights, download) if entry.weights else None
  make, accepted = maker_of(name, entry), tuple(accepted)
  if getattr(make, "ASKS_OTHERS", False):  # what holds for it holds for its helpers
    options.setdefault("load", lambda other, path=None, **more: load_teacher(other, path, accepted, download, **more))
  with failure_is_said(name) if path is not None else contextlib.nullcontext():
    return make(name, entry, path, **{**entry.options, **options})
