"""A student of transformers' classes, which learns by its own loss: see families.py for which there are."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openpilot.tools.fair.spec import StudentSpec
from openpilot.tools.fair.students.backbone import RGB_MEAN, RGB_STD
from openpilot.tools.fair.students.families import FAMILIES, Family, Width
from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import LONG

# of RF-DETR's loss, each also with a suffix for earlier layers: part -> its weight in the configuration
WEIGHTS = {
  "loss_ce": "class_loss_coefficient",
  "loss_bbox": "bbox_loss_coefficient",
  "loss_giou": "giou_loss_coefficient",
  "loss_mask_ce": "mask_class_loss_coefficient",
  "loss_mask_dice": "mask_dice_loss_coefficient",
}
OF_CLASSES = ("class", "score")  # in the names of layers that have a channel for each class


def import_transformers() -> Any:
  try:
    import transformers
  except ModuleNotFoundError as e:
    raise UserError(f"students of transformers need the package {e.name}: `pip install -e .[train]`") from None
  transformers.utils.logging.disable_progress_bar()
  return transformers


def describe_network(name: str, classes: int, side: int, weights: Path | None = None) -> str:
  """All that decides a family's graph, as JSON: its published configuration, or that of a folder of weights, for so
  many classes and pictures of that side. Raises UserError."""
  from openpilot.tools.fair.hf import check_numbers, read_config

  family, transformers = FAMILIES[name], import_transformers()
  kind = getattr(transformers, family.kind).config_class
  if weights is None:
    backbone = {**family.backbone, "image_size": side} if family.model_type == "rf_detr" else dict(family.backbone)
    config = kind(backbone_config=backbone, **family.config)
    if hasattr(config, "freeze_backbone_batch_norms"):
      config.freeze_backbone_batch_norms = False  # random statistics are not worth keeping
  else:
    said = read_config(weights, (family.model_type,), name)
    check_numbers(said, weights / "config.json")
    try:
      config = kind.from_pretrained(weights, local_files_only=True)
    except Exception as e:  # whatever a configuration of another version comes to
      raise UserError(f"{weights / 'config.json'} does not load: {printable(e, LONG)}; copy the whole folder") from None
  config.num_labels = classes
  if hasattr(config, "anchor_image_size"):
    config.anchor_image_size = None  # made for whatever size comes
  told = json.loads(config.to_json_string(use_diff=False))
  return json.dumps(
    {k: v for k, v in told.items() if k not in ("transformers_version", "_name_or_path")}, sort_keys=True
  )


def make_network(family: Family, network: str, weights: Path | None) -> tuple[Any, list[str]]:
  """-> transformers' model, and the names of its tensors that start anew though there are weights: those of classes.
  Raises UserError."""
  transformers = import_transformers()
  kind = getattr(transformers, family.kind)
  config = kind.config_class(
    **{k: v for k, v in json.loads(network).items() if k not in ("model_type", "architectures")}
  )
  if weights is None:
    return kind(config), []
  said_by = transformers.utils.logging.get_verbosity()
  transformers.utils.logging.set_verbosity_error()  # it would list layers of classes, which are said in a line here
  try:
    net, said = kind.from_pretrained(
      weights,
      config=config,
      local_files_only=True,
      use_safetensors=True,
      ignore_mismatched_sizes=True,
      output_loading_info=True,
      dtype=torch.float32,
    )
  except Exception as e:  # transformers has no class of its own for any of this
    why = printable((str(e) or repr(e)).strip().splitlines()[0], LONG)
    raise UserError(f"--pretrained {weights} does not load: {why}; its files must be of one model") from None
  finally:
    transformers.utils.logging.set_verbosity(said_by)
  anew = sorted(k[0] if isinstance(k, (tuple, list)) else k for k in said["mismatched_keys"])
  wrong = sorted(said["missing_keys"]) + [k for k in anew if not any(w in k for w in OF_CLASSES)]
  if wrong:
    raise UserError(
      f"--pretrained {weights} lacks {len(wrong)} of the weights that its config.json asks for, or has them of another "
      f"shape ({wrong[0]}); its files must be of one model"
    )
  return net, anew


class FamilyStudent(nn.Module):
  """(B, 3, H, W) uint8 RGB -> detector_logits (B, Q, K), for a sigmoid; detector_boxes (B, Q, 4) cx cy w h in 0..1 of
  the picture; where it makes masks detector_masks (B, Q, h, w) logits over the picture. Raises UserError."""

  tasks = ("detector",)
  lanes = None  # it follows no points

  def __init__(self, spec: StudentSpec, pretrained: bool | str = False):
    super().__init__()
    self.describe(spec)
    weights = Path(pretrained) if isinstance(pretrained, str) else None
    network = spec.network or describe_network(spec.name, len(spec.classes.boxes), spec.input.width, weights)
    self.net, anew = make_network(self.family, network, weights)
    if weights is not None:
      print(f"{spec.name}: starts from {weights}; {len(anew)} of its tensors are of other classes, and start anew")
    config = self.net.config
    strides = [config.backbone_config.patch_size] if "patch_size" in network else config.feat_strides
    if (cells := sum((spec.input.height // s) * (spec.input.width // s) for s in strides)) < config.num_queries:
      raise UserError(
        f"{spec.name} asks {config.num_queries} queries, and pictures of {spec.input.width}x{spec.input.height} have "
        f"{cells} places alone; take a larger --picture-size"
      )
    self.size = Width(int(getattr(config, "encoder_hidden_dim", config.d_model)))

  def describe(self, spec: StudentSpec) -> None:
    """What it is and sees. Raises UserError for an input that it cannot have."""
    self.spec, self.name, self.task = spec, spec.name, spec.task
    self.family = FAMILIES[spec.name]
    if spec.input.kind != "rgb":
      raise UserError(f"{spec.name} sees RGB pictures alone, no model frames; leave out --input model-frame")
    if any(s % self.family.step for s in (spec.input.height, spec.input.width)):
      raise UserError(f"{spec.name} sees pictures whose sides are multiples of {self.family.step}: --picture-size")
    self.hint = False  # whether its map comes out as 'features', too
    mean, std = (RGB_MEAN, RGB_STD) if self.family.normalized else ((0.0,) * 3, (1.0,) * 3)
    self.mean: Tensor
    self.std: Tensor
    self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
    self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

  def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    return {"frame": torch.zeros(1, *self.spec.input.shape, dtype=torch.uint8, device=device)}

  def pixels(self, frame: Tensor) -> Tensor:
    return (frame.float() / 255 - self.mean) / self.std

  def forward(self, frame: Tensor, labels: Sequence[Mapping[str, Tensor]] | None = None) -> dict[str, Any]:
    """labels: class_labels, boxes and masks of each picture, as transformers has them; then also own_loss."""
    with self.as_one_group():
      out = self.net(self.pixels(frame), labels=labels)
    found: dict[str, Any] = {"detector_logits": out.logits, "detector_boxes": out.pred_boxes}
    if self.family.masks:
      found["detector_masks"] = out.pred_masks
    if self.training:
      found = {k: self.as_used(v) for k, v in found.items()}
    if self.hint:
      found["features"] = self.map_of(out)
    if labels is not None:
      found["own_loss"] = self.parts_of(out)
    return found

  @contextlib.contextmanager
  def as_one_group(self) -> Iterator[None]:
    """While it learns, an RF-DETR asks several groups of queries; when it is judged, one alone, which its loss does not
    know by itself. What its loss draws at random is then drawn the same every time."""
    config = self.net.config
    groups = getattr(config, "group_detr", 1)
    if self.training or groups == 1:
      yield
      return
    try:
      config.group_detr = 1
      with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    finally:
      config.group_detr = groups

  def as_used(self, x: Tensor) -> Tensor:
    """The queries that are asked when it is used: not those that were made of the labels, which come first, or the
    further groups, which come last."""
    n = self.net.config.num_queries
    return x[:, :n] if hasattr(self.net.config, "group_detr") else x[:, -n:]

  def map_of(self, out: Any) -> Tensor:
    """(B, C, h, w), the finest."""
    maps = out.backbone_features if self.family.model_type == "rf_detr" else out.encoder_last_hidden_state
    return maps if torch.is_tensor(maps) else maps[0]

  def parts_of(self, out: Any) -> dict[str, Tensor]:
    """transformers' loss as a sum of two: masks', and all else. Where a batch has no object, masks' parts are of no
    numbers at all, and so would be transformers' own sum: these here are added one by one."""
    if not self.family.masks:
      return {"own": out.loss}
    zero = out.logits.sum() * 0
    parts = {"own": zero, "masks": zero}
    for k, v in out.loss_dict.items():
      weight = next((w for p, w in WEIGHTS.items() if k.startswith(p)), None)
      if weight is not None:  # the others are for people
        kind = "masks" if k.startswith("loss_mask") else "own"
        parts[kind] = parts[kind] + getattr(self.net.config, weight) * v.sum()
    return parts

  def learn(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Outputs of a distiller's batch; with own_loss where any picture is labeled. Of pictures without labels there is
    none, of those without masks none of masks: these are asked apart from the others."""
    frame = batch["frame"]
    objects = batch.get("objects") or [None] * len(frame)
    kinds = [self.kind_of(o) for o in objects]
    if len(set(kinds)) == 1:
      return self.learn_alike(frame, objects, kinds[0])
    each: list[dict[str, Any]] = [{} for _ in objects]
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for kind in sorted(set(kinds)):
      mine = [i for i, k in enumerate(kinds) if k == kind]
      found = self.learn_alike(frame[mine], [objects[i] for i in mine], kind)
      count = sum(max(1, len(objects[i]["cls"])) for i in mine) if kind else 0
      for part, value in found.pop("own_loss", {}).items():
        sums[part] = sums.get(part, 0.0) + value * count
        counts[part] = counts.get(part, 0) + count
      for row, i in enumerate(mine):
        each[i] = {k: v[row] for k, v in found.items()}
    out: dict[str, Any] = {k: torch.stack([x[k] for x in each]) for k in each[0]}
    if sums:
      out["own_loss"] = {k: v / counts[k] for k, v in sums.items()}
    return out

  def kind_of(self, o: Mapping[str, Any] | None) -> str:
    if o is None:
      return ""
    if not self.family.masks or (o["mask"] is not None and bool((o["mask"].flatten(1).amax(1) > 0.5).all())):
      return "masks"
    return "boxes"

  def learn_alike(self, frame: Tensor, objects: Sequence[Any], kind: str) -> dict[str, Any]:
    out = self(frame, [self.label_of(o, kind) for o in objects] if kind else None)
    if kind == "boxes":
      del out["own_loss"]["masks"]  # of boxes drawn full, which only the matching needs
    return out

  def label_of(self, o: Mapping[str, Any], kind: str) -> dict[str, Tensor]:
    """One picture's objects, as tasks/objects.py has them -> as transformers has them."""
    w, h = self.spec.input.width, self.spec.input.height
    box = (o["boxes"].float() + 0.5) / o["boxes"].new_tensor([w, h, w, h])
    box = torch.cat([(box[:, :2] + box[:, 2:]) / 2, box[:, 2:] - box[:, :2]], 1)
    found = {"class_labels": o["cls"].long(), "boxes": box}
    if self.family.masks:
      found["masks"] = (
        o["mask"] > 0.5 if kind == "masks" and o["mask"] is not None else full(o["boxes"], h // 4, w // 4)
      )
    return found


def full(boxes: Tensor, rows: int, columns: int) -> Tensor:
  """(M, 4) pixels -> (M, rows, columns) bool, cells of four pixels whose center is inside."""
  x, y = (torch.arange(n, device=boxes.device) * 4 + 1.5 for n in (columns, rows))
  inside = (x >= boxes[:, 0:1]) & (x <= boxes[:, 2:3]), (y >= boxes[:, 1:2]) & (y <= boxes[:, 3:4])
  return inside[1][:, :, None] & inside[0][:, None]
