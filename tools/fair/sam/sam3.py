"""SAM 3: everything in a video that answers to a word, as masks with identity, one frame at a time, in bounded memory.

The network is transformers' Sam3VideoModel, called as it is: on each frame it looks for every prompt, follows what it
has, and matches the two. What is done around it is what sam2.py does around SAM 2, and two small algorithms that
transformers would download as a CUDA kernel, or do without."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from openpilot.tools.fair.detr.teacher import Pictures, read_folder
from openpilot.tools.learn.device import choose_device
from openpilot.tools.fair.hf import load_model
from openpilot.tools.fair.sam.sam2 import SAM2VideoWrapper, Tracked, Video
from openpilot.tools.fair.teacher import Entry, Label, State, check_least, hash_weights
from openpilot.tools.lib.errors import UserError

PROMPTS = ("car", "truck", "bus", "person", "bicycle", "motorcycle", "traffic light", "traffic sign")
TOKENS = 32  # of a prompt, as officially
# frames on which a detection confirmed an object, whose pointers are kept: officially all, without an end
MAX_POINTERS = 32


class MaskTools:
  """What transformers takes from its kernel cv-utils: for it to be neither downloaded nor left out."""

  @staticmethod
  def generic_nms(
    ious: torch.Tensor, scores: torch.Tensor, threshold: float, use_iou_matrix: bool = True
  ) -> torch.Tensor:
    """ious (N, N), scores (N,) -> indices of those that overlap no better one that is kept by more than `threshold`,
    best first."""
    assert use_iou_matrix
    overlap = (ious > threshold).cpu().numpy()
    kept: list[int] = []
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
      if not any(overlap[i, j] for j in kept):
        kept.append(i)
    return torch.tensor(kept, dtype=torch.long, device=ious.device)

  @staticmethod
  def cc_2d(masks: torch.Tensor, get_counts: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """masks (N, 1, H, W) uint8 -> of each pixel its 8-connected component's number and area, (N, 1, H, W) int32, 0
    where there is none."""
    assert get_counts
    labels, areas = np.zeros(masks.shape, np.int32), np.zeros(masks.shape, np.int32)
    for n, mask in enumerate(masks[:, 0].cpu().numpy()):
      _, labels[n, 0], stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
      areas[n, 0] = np.where(labels[n, 0] > 0, stats[:, cv2.CC_STAT_AREA][labels[n, 0]], 0)
    return torch.from_numpy(labels).to(masks.device), torch.from_numpy(areas).to(masks.device)


class Sam3Teacher(SAM2VideoWrapper):
  """prompts: what is looked for, each a class of the label. The same thing may answer to two of them. max_objects: no
  more are followed at a time.
  lost_after: frames after which an object unseen is let go; officially none is.

  Raises UserError where the folder is no SAM 3 video model with its tokenizer."""

  ASKS_OTHERS = False

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    device: str | None = None,
    precision: str | None = None,
    prompts: tuple[str, ...] = PROMPTS,
    max_objects: int = 64,
    lost_after: int = 60,
  ):
    from transformers import CLIPTokenizer, Sam3VideoInferenceSession
    from transformers.models.sam3_video import modeling_sam3_video

    assert path is not None
    check_least(name, 1, max_objects=max_objects)
    check_least(name, 0, lost_after=lost_after)
    if isinstance(prompts, str) or not prompts or len(set(prompts)) < len(prompts):
      raise UserError(f"teacher '{name}': prompts are {prompts!r}; a list of words, no word twice")
    _, pictures = read_folder(path, ("sam3_video",), "a SAM 3 video model")
    if not any((path / f).is_file() for f in ("tokenizer.json", "vocab.json")):
      raise UserError(f"no tokenizer.json in {path}, which prompts need; copy the whole folder")
    self.name, self.license, self.model_id = name, entry.license, entry.weights or path.name
    self.device = choose_device(device, precision)
    self.model = load_model(path, self.device, "Sam3VideoModel")
    setattr(modeling_sam3_video, "cv_utils_kernel", MaskTools())  # noqa: B010 (typed as None there)
    logging.getLogger(modeling_sam3_video.__name__).setLevel(logging.ERROR)  # it warns on every frame that is full
    self.model.max_num_objects = max_objects
    self.session_class = Sam3VideoInferenceSession
    self.image_size = int(self.model.config.image_size)
    self.pictures = Pictures(
      {**pictures, "do_resize": True, "size": {"height": self.image_size, "width": self.image_size}}
    )
    self.prompts, self.max_objects, self.lost_after, self.every = tuple(prompts), max_objects, lost_after, 1
    self.detector = None
    self.checkpoint_hash = hash_weights(path)
    self.labels: list[Label] = []
    self.size = [0, 0]
    config = self.model.config.tracker_config
    self.memory_reach, self.pointer_reach = config.num_maskmem - 1, config.max_object_pointers_in_encoder - 1
    self.tokens = self._tokenize(CLIPTokenizer, path)
    self.embeddings: dict[int, Any] = {}  # of the prompts, once they are known

  def _tokenize(self, tokenizer_class: Any, path: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    try:
      tokenizer = tokenizer_class.from_pretrained(path, local_files_only=True)
      encoded = [tokenizer(p, return_tensors="pt", padding="max_length", max_length=TOKENS) for p in self.prompts]
    except Exception as e:  # anything, on a file that is none
      raise UserError(
        f"the tokenizer in {path} does not load: {(str(e) or repr(e)).splitlines()[0][:160]}; copy the whole "
        "folder again"
      ) from None
    for prompt, tokens in zip(self.prompts, encoded, strict=True):
      if tokens.input_ids.shape[1] > TOKENS:
        raise UserError(
          f"the prompt '{prompt[:40]}' is of {tokens.input_ids.shape[1]} tokens; {TOKENS} at most: name the thing in a "
          "few words"
        )
    return [
      (tokens.input_ids.to(self.device.device), tokens.attention_mask.to(self.device.device)) for tokens in encoded
    ]

  def start(self, height: int, width: int) -> Video:
    video = super().start(height, width)
    session = video.session
    for prompt, (ids, mask) in zip(self.prompts, self.tokens, strict=True):
      i = session.add_prompt(prompt)
      session.prompt_input_ids[i], session.prompt_attention_masks[i] = ids, mask
    session.prompt_embeddings = self.embeddings
    session.obj_with_new_inputs = []
    return video

  @torch.inference_mode()
  def step(self, video: Video, rgb: np.ndarray, boxes: np.ndarray | None = None, every_box: bool = False) -> Tracked:
    """The next frame, (3, H, W) uint8 -> its visible objects. Within a prompt, no two masks share a pixel."""
    if boxes is not None and len(boxes):
      raise UserError(f"teacher '{self.name}' finds its objects by words, not from boxes; give it prompts")
    session, t = video.session, video.frame
    out = self.model(session, frame=self.pictures(rgb[None], self.device)[0], frame_idx=t)
    ids = np.array(sorted(out.obj_id_to_mask), np.int64)
    classes = np.array([session.obj_id_to_prompt_id[i] for i in ids.tolist()], np.int16)
    scores = np.array([out.obj_id_to_tracker_score.get(i, 0.0) for i in ids.tolist()], np.float32)
    masks = np.zeros((0, session.video_height, session.video_width), bool)
    if len(ids):
      low = torch.cat([out.obj_id_to_mask[i] for i in ids.tolist()])[:, None]
      masks = (F.interpolate(low, masks.shape[1:], mode="bilinear", align_corners=False)[:, 0] > 0).cpu().numpy()
    for c in np.unique(classes):
      one = np.flatnonzero(classes == c)
      masks[one] &= np.where(masks[one], scores[one, None, None], 0).argmax(0) == np.arange(len(one))[:, None, None]
    seen = masks.any(axis=(1, 2))
    for i in session.obj_ids:
      video.last_seen.setdefault(i, t)
      video.classes[i] = session.obj_id_to_prompt_id[i]
    video.last_seen.update(dict.fromkeys(ids[seen].tolist(), t))
    video.next_id = session.max_obj_id + 1
    self._forget(video)
    video.frame += 1
    return Tracked(ids[seen], masks[seen], scores[seen], classes[seen])

  def _forget(self, video: Video) -> None:
    session, t = video.session, video.frame
    frames = session.processed_frames
    super()._forget(video)
    frames[t] = None  # the network asks how many there were
    session.processed_frames = frames
    for idx, outputs in session.output_dict_per_obj.items():
      session.mask_inputs_per_obj[idx] = {}
      confirmed = outputs["cond_frame_outputs"]
      newest = sorted(confirmed, reverse=True)
      for f in newest[MAX_POINTERS:]:
        del confirmed[f]
      for f in newest[max(self.model.config.tracker_config.max_cond_frame_num, 1) : MAX_POINTERS]:
        if f <= t - self.memory_reach:
          confirmed[f] = {"object_pointer": confirmed[f]["object_pointer"]}
    there = set(session.obj_ids)
    for of_obj in (
      session.obj_id_to_prompt_id,
      session.obj_id_to_score,
      session.obj_id_to_last_occluded,
      session.trk_keep_alive,
      session.obj_first_frame_idx,
    ):
      for i in [i for i in of_obj if i not in there]:
        del of_obj[i]
    # what only a run over a whole video looks back at
    session.obj_id_to_tracker_score_frame_wise, session.suppressed_obj_ids = defaultdict(dict), defaultdict(set)
    session.unmatched_frame_inds, session.overlap_pair_to_frame_inds = defaultdict(list), defaultdict(list)

  def detect(self, rgb: np.ndarray) -> np.ndarray:
    """None: it finds its objects in `step`."""
    return np.zeros((0, 6), np.float32)

  def prepare(self, height: int, width: int) -> None:
    self.size = [height, width]
    self.labels = [Label("objects", "boxes", shape=(height, width), unit="px", classes=self.prompts)]

  def settings(self) -> dict[str, Any]:
    return {
      "pictures": self.pictures.config,
      "precision": self.device.precision,
      "prompts": list(self.prompts),
      "max_objects": self.max_objects,
      "lost_after": self.lost_after,
      "size": self.size,
    }

  @staticmethod
  def save(video: Video) -> State:
    session, state = video.session, SAM2VideoWrapper.save(video)
    state["matching"] = np.array(
      [
        (
          session.obj_id_to_score[i],
          int(session.obj_id_to_last_occluded.get(i, -1)),
          session.trk_keep_alive[i],
          session.obj_first_frame_idx[i],
        )
        for i in session.obj_ids
      ],
      np.float64,
    ).reshape(-1, 4)
    return state

  def load(self, state: State, height: int, width: int) -> Video:
    matching = state["matching"]
    video = super().load({k: v for k, v in state.items() if k != "matching"}, height, width)
    session = video.session
    session.processed_frames, session.max_obj_id = dict.fromkeys(range(video.frame)), video.next_id - 1
    for i, (score, occluded, alive, first) in zip(session.obj_ids, matching.tolist(), strict=True):
      session.obj_id_to_prompt_id[i], session.obj_id_to_score[i] = video.classes[i], score
      session.obj_id_to_last_occluded[i] = torch.tensor([int(occluded)], device=self.device.device)
      session.trk_keep_alive[i], session.obj_first_frame_idx[i] = int(alive), int(first)
    return video
