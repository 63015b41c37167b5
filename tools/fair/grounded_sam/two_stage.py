"""The two-stage teacher: Grounding DINO finds boxes, SAM gives each its mask; either may be there alone."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openpilot.tools.fair.grounded_sam.detector import Answer, Detector, load_detector
from openpilot.tools.fair.grounded_sam.experiment import Experiment, Tuned, find_base, read_experiment
from openpilot.tools.fair.grounded_sam.lora import read_lora, with_lora
from openpilot.tools.fair.grounded_sam.prompts import VOCABULARY, has_tokenizer, make_prompts
from openpilot.tools.fair.grounded_sam.segmenter import Segmenter, load_segmenter
from openpilot.tools.fair.teacher import find_weights, hash_weights
from openpilot.tools.learn.device import Device, choose_device
from openpilot.tools.lib.errors import UserError

# files that the projects publish, as the bases of an experiment may be called
KNOWN = {
  "grounding_dino": ("groundingdino_swint_ogc.pth", "groundingdino_swinb_cogcoor.pth", "grounding-dino-tiny"),
  "sam": ("sam_vit_h_4b8939.pth", "sam_vit_l_0b3195.pth", "sam_vit_b_01ec64.pth", "sam-vit-base"),
}


def device_of(device: str | Device | None) -> Device:
  """float32, unless a Device says otherwise: bf16's 8 bits would move a box's edge by pixels."""
  return device if isinstance(device, Device) else choose_device(device, "float32")


def find_tokenizer(base: Path, tokenizer: Path | None) -> Path | None:
  """The folder of a base's tokenizer: its own, or of a single file the one that is named, or BERT's where weights
  are."""
  if base.is_dir() or tokenizer is not None:
    return tokenizer
  return find_weights(VOCABULARY)


def load_grounding_dino_with_lora(
  base: str | Path,
  lora: str | Path | None = None,
  *,
  use_merged: bool = True,
  device: str | Device | None = None,
  tokenizer: Path | None = None,
) -> Detector:
  """base: a Hugging Face folder or a .pth; lora: an adapter's folder. Raises UserError."""
  base = find_weights(str(base), base)
  found = load_detector(base, device_of(device), find_tokenizer(base, tokenizer))
  return found if lora is None else with_lora(found, Path(lora), hash_weights(base), use_merged)


def load_sam_with_lora(
  base: str | Path, lora: str | Path | None = None, *, use_merged: bool = True, device: str | Device | None = None
) -> Segmenter:
  """As load_grounding_dino_with_lora(), of SAM or SAM 2.1."""
  base = find_weights(str(base), base)
  found = load_segmenter(base, device_of(device))
  return found if lora is None else with_lora(found, Path(lora), hash_weights(base), use_merged)


def load_teachers(
  dataset_info: Mapping[str, Any], base_models_dir: str | Path, lora_adapters_dir: str | Path
) -> dict[str, Any]:
  """As far as the data needs them, {"grounding_dino": Detector, "sam": Segmenter}, adapters merged. base_models_dir
  holds the bases; lora_adapters_dir grounding_dino_lora/ and sam_lora/, an experiment's teachers/. Raises UserError."""
  out: dict[str, Any] = {}
  wanted = {"grounding_dino": dataset_info["has_boxes"], "sam": dataset_info["has_masks"]}
  for key in [k for k, yes in wanted.items() if yes]:
    folder = Path(lora_adapters_dir) / f"{key}_lora"
    said = read_lora(folder)[2]
    names = [n for n in (said.get("base", "").split("/")[-1], *KNOWN[key]) if n]
    base = next((p for n in names if (p := Path(base_models_dir) / n).exists()), None)
    if base is None:
      raise UserError(f"no base of {folder} in {base_models_dir}; looked for {', '.join(names)}")
    if key == "grounding_dino":
      out[key] = load_grounding_dino_with_lora(base=base, lora=folder)
    else:
      out[key] = load_sam_with_lora(base=base, lora=folder)
  return out


def load_tuned(tuned: Tuned, device: Device, base: str | Path | None = None) -> Any:
  """One of an experiment's teachers, its adapter merged."""
  if tuned.whole:
    return (
      load_detector(tuned.folder, device) if tuned.key == "grounding_dino" else load_segmenter(tuned.folder, device)
    )
  found = find_base(tuned, base)
  if tuned.key == "grounding_dino":
    kept = tuned.folder if has_tokenizer(tuned.folder) else None
    detector = load_grounding_dino_with_lora(found, tuned.folder, device=device, tokenizer=kept)
    if tuned.size is not None:
      detector.resize(tuned.size)
    return detector
  return load_sam_with_lora(found, tuned.folder, device=device)


class GroundedSAM:
  """Pictures are (3, H, W) uint8 RGB of any size; boxes x0 y0 x1 y1 in pixels from the corner.

  Each base is a Hugging Face folder or an original file; with an adapter it is tuned, and use_merged puts that into the
  weights: the same answers, faster. classes: what is asked for, prompts: phrases of some of them."""

  def __init__(
    self,
    grounding_dino_base: str | Path | None = None,
    grounding_dino_lora: str | Path | None = None,
    sam_base: str | Path | None = None,
    sam_lora: str | Path | None = None,
    use_merged: bool = True,
    classes: Sequence[str] = (),
    prompts: Mapping[str, str] | None = None,
    negatives: Sequence[str] = (),
    each: bool = False,
    device: str | Device | None = None,
    tokenizer: Path | None = None,
    grounding_dino: str | Path | None = None,
    sam: str | Path | None = None,
  ):
    """grounding_dino, sam: bases without adapters."""
    dino, mask = grounding_dino_base or grounding_dino, sam_base or sam
    where = device_of(device)
    self.detector: Detector | None = None
    self.segmenter: Segmenter | None = None
    if dino is not None:
      self.detector = load_grounding_dino_with_lora(
        dino, grounding_dino_lora, use_merged=use_merged, device=where, tokenizer=tokenizer
      )
    if mask is not None:
      self.segmenter = load_sam_with_lora(mask, sam_lora, use_merged=use_merged, device=where)
    self.finish(classes, prompts, negatives, each)
    self.checkpoint_hash = joint_hash([Path(p) for p in (dino, grounding_dino_lora, mask, sam_lora) if p is not None])

  def finish(
    self, classes: Sequence[str], prompts: Mapping[str, str] | None, negatives: Sequence[str], each: bool
  ) -> None:
    if self.detector is None and self.segmenter is None:
      raise UserError("a GroundedSAM of neither Grounding DINO nor SAM; name the base of one")
    self.classes = tuple(classes)
    if self.detector is not None and classes:
      made = make_prompts(self.detector.tokenizer, classes, prompts, negatives, each, self.detector.most_tokens)
      self.detector.prompts = made

  @classmethod
  def of(
    cls,
    experiment: str | Path | Experiment,
    device: str | Device | None = None,
    bases: Mapping[str, str | Path] | None = None,
  ) -> "GroundedSAM":
    """An experiment's teachers, adapters merged. bases: {"grounding_dino": PATH, "sam": PATH}, where they are elsewhere
    than they were. Raises UserError."""
    e = experiment if isinstance(experiment, Experiment) else read_experiment(Path(experiment))
    where = device_of(device)
    found = {k: load_tuned(t, where, (bases or {}).get(k)) for k, t in e.teachers.items()}
    out = cls.__new__(cls)
    out.detector, out.segmenter = found.get("grounding_dino"), found.get("sam")
    out.finish(e.classes, e.prompts, e.negatives, e.each)
    parts = [f"{k} {t.base_hash} {hash_weights(t.folder)}" for k, t in sorted(e.teachers.items())]
    out.checkpoint_hash = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return out

  @property
  def has_boxes(self) -> bool:
    return self.detector is not None

  @property
  def has_masks(self) -> bool:
    return self.segmenter is not None

  def detect(self, rgbs: Sequence[np.ndarray], score: float = 0.3) -> list[Answer]:
    """Boxes alone. Raises UserError where there is no Grounding DINO, or no class was said."""
    if self.detector is None:
      raise UserError("this teacher has no Grounding DINO; give it boxes, of labels or of another teacher")
    if self.detector.prompts is None:
      raise UserError("no classes to ask for; name them")
    return self.detector.detect(rgbs, score=score)

  def segment(self, rgbs: Sequence[np.ndarray], boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(N, 4) boxes of each picture -> (N, H, W) bool of each. Raises UserError where there is no SAM."""
    if self.segmenter is None:
      raise UserError("this teacher has no SAM; masks need one")
    return [
      self.segmenter.segment(x, np.asarray(b, np.float32).reshape(-1, 4)) for x, b in zip(rgbs, boxes, strict=True)
    ]

  def features(self, rgbs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(D, h, w) float32 of each: Grounding DINO's map, or SAM's where it is alone."""
    if self.detector is not None:
      return self.detector.features(rgbs)
    assert self.segmenter is not None
    return self.segmenter.features(rgbs)

  def __call__(self, rgbs: np.ndarray | Sequence[np.ndarray], score: float = 0.3) -> list[Answer]:
    """Boxes, and where SAM is there their masks. One picture (3, H, W), or several."""
    pictures = [rgbs] if isinstance(rgbs, np.ndarray) and rgbs.ndim == 3 else list(rgbs)
    found = self.detect(pictures, score)
    if self.segmenter is not None:
      for x, a in zip(pictures, found, strict=True):
        a.masks = self.segmenter.segment(x, a.boxes)
    return found


def joint_hash(paths: Sequence[Path]) -> str:
  return hashlib.sha256("\n".join(hash_weights(p) for p in paths).encode()).hexdigest()
