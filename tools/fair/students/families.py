"""Students of other projects by name: what each is, as data. Transformers' classes under Apache-2.0; and ultralytics'
under AGPL-3.0, where the user has that package and accepts its license by name. Nothing here imports torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from openpilot.tools.lib.errors import UserError

LICENSE = "Apache-2.0"  # of transformers' code of all of its classes
AGPL = "AGPL-3.0"  # of ultralytics' code and weights


@dataclass(frozen=True)
class Family:
  """model_type, kind: transformers' names of its configuration and class. hub: where its weights are published. config,
  backbone: its published numbers, where they are not the class's own. side: of the square pictures that it sees by
  default; step: sides are multiples of it. masks: whether it makes them. features: whether it shows a
  map that a teacher's can be compared with. normalized: pictures by ImageNet's mean and deviation. dynamo:
  which of torch's two ONNX exporters can write it. package, license: whose code it is. like: the size of ours that is
  most like it. asks_others: whether its loss counts the objects of all processes."""

  model_type: str
  kind: str
  hub: str
  config: Mapping[str, Any]
  backbone: Mapping[str, Any]
  side: int = 640
  step: int = 32
  masks: bool = False
  features: bool = True
  normalized: bool = False
  dynamo: bool = False
  package: str = "transformers"
  license: str = LICENSE
  like: str = "nano"
  asks_others: bool = False


def yolo(name: str, like: str, masks: bool = False) -> Family:
  """Of ultralytics' description of that name."""
  kind, config = "SegmentationModel" if masks else "DetectionModel", {"yaml": f"{name}.yaml"}
  return Family("yolov8", kind, "", config, {}, masks=masks, package="ultralytics", license=AGPL, like=like)


# both D-FINEs have the smallest HGNetV2
HGNET = {
  "model_type": "hgnet_v2",
  "layer_type": "basic",
  "embedding_size": 32,
  "hidden_sizes": [128, 256, 512, 1024],
  "stem_channels": [3, 16, 16],
  "stage_in_channels": [16, 64, 256, 512],
  "stage_mid_channels": [16, 32, 64, 128],
  "stage_out_channels": [64, 256, 512, 1024],
  "stage_num_blocks": [1, 1, 2, 1],
  "stage_downsample": [False, True, True, True],
  "stage_light_block": [False, False, True, True],
  "stage_kernel_size": [3, 3, 5, 5],
  "stage_numb_of_layers": [3, 3, 3, 3],
  "use_learnable_affine_block": True,
  "out_indices": [2, 3, 4],
}
DINOV2 = {
  "model_type": "rf_detr_dinov2",
  "hidden_size": 384,
  "num_hidden_layers": 12,
  "num_attention_heads": 6,
  "out_features": ["stage3", "stage6", "stage9", "stage12"],
  "patch_size": 16,
  "num_windows": 2,
}
RF_DETR = {"d_model": 256, "decoder_n_points": 2}

FAMILIES: dict[str, Family] = {
  "d-fine-nano": Family(
    "d_fine",
    "DFineForObjectDetection",
    "ustc-community/dfine-nano-coco",
    {
      "num_feature_levels": 2,
      "d_model": 128,
      "encoder_hidden_dim": 128,
      "encoder_ffn_dim": 512,
      "encoder_in_channels": [512, 1024],
      "encode_proj_layers": [1],
      "feat_strides": [16, 32],
      "decoder_in_channels": [128, 128],
      "decoder_ffn_dim": 512,
      "decoder_n_points": [6, 6],
      "decoder_layers": 3,
      "depth_mult": 0.5,
      "hidden_expansion": 0.34,
    },
    {**HGNET, "out_indices": [3, 4]},
  ),
  "d-fine-small": Family(
    "d_fine",
    "DFineForObjectDetection",
    "ustc-community/dfine-small-coco",
    {
      "encoder_in_channels": [256, 512, 1024],
      "decoder_n_points": [3, 6, 3],
      "decoder_layers": 3,
      "depth_mult": 0.34,
      "hidden_expansion": 0.5,
    },
    HGNET,
  ),
  "rtdetr-v2-r18": Family(
    "rt_detr_v2",
    "RTDetrV2ForObjectDetection",
    "PekingU/rtdetr_v2_r18vd",
    {"encoder_in_channels": [128, 256, 512], "hidden_expansion": 0.5, "decoder_layers": 3},
    {
      "model_type": "rt_detr_resnet",
      "hidden_sizes": [64, 128, 256, 512],
      "depths": [2, 2, 2, 2],
      "layer_type": "basic",
      "out_indices": [2, 3, 4],
    },
  ),
  "rf-detr-nano": Family(
    "rf_detr",
    "RfDetrForObjectDetection",
    "Roboflow/rf-detr-nano",
    {**RF_DETR, "decoder_layers": 2},
    DINOV2,
    side=384,
    normalized=True,
    dynamo=True,
    asks_others=True,
  ),
  "rf-detr-seg-nano": Family(
    "rf_detr",
    "RfDetrForInstanceSegmentation",
    "Roboflow/rf-detr-seg-nano",
    {**RF_DETR, "decoder_layers": 4, "num_queries": 100, "class_loss_coefficient": 5.0},
    {**DINOV2, "patch_size": 12, "num_windows": 1},
    side=384,
    step=96,  # of its patches of 12, and of 32
    masks=True,
    features=False,
    normalized=True,
    dynamo=True,
    asks_others=True,
  ),
  "yolov8n": yolo("yolov8n", "nano"),
  "yolov8s": yolo("yolov8s", "small"),
  "yolov8n-seg": yolo("yolov8n-seg", "nano", True),
  "yolov8s-seg": yolo("yolov8s-seg", "small", True),
  "fastsam-s": yolo("yolov8s-seg", "small", True),  # that network; what makes it FastSAM is its weights
}
OF_TRANSFORMERS = tuple(n for n, f in FAMILIES.items() if f.package == "transformers")


def split_name(name: str) -> tuple[str, str]:
  """Of a family: task and size, as a StudentSpec has them."""
  if FAMILIES[name].package == "ultralytics":
    return name, ""
  task, _, size = name.rpartition("-")
  return task, size


@dataclass(frozen=True)
class Width:
  """What a student's size says to the projector of features: channels of its map."""

  neck: int


def check_processes(name: str, processes: int) -> None:
  """Raises UserError where they are too many for the student."""
  if name in FAMILIES and FAMILIES[name].asks_others and processes > 1:
    raise UserError(
      f"{name}: transformers' own loss of it does not go with {processes} processes; start it without torchrun"
    )
