"""SAM 2.1 and EdgeTAM over a video of any length: masks with identity, one frame at a time, in bounded memory.

The networks are transformers' Sam2VideoModel and EdgeTamVideoModel, called as they are. What is done around them:
- after each frame, all is dropped that no later frame looks at, which changes nothing in the result;
- objects join on any frame from a detector. They are prompted in a session of their own, which is then merged: the
  official forward would run all other objects again, and write their memory of that frame as if they had been prompted
  too;
- objects unseen for long are let go, so that a drive does not get slower with every car that was met."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from openpilot.selfdrive.modeld.fair.heads.objects import box_iou
from openpilot.tools.fair.detr.teacher import Pictures, read_folder
from openpilot.tools.learn.device import choose_device
from openpilot.tools.fair.hf import load_model
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.sam.checkpoint import PICTURES, load_pt
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import (
  Clip,
  Entry,
  Label,
  Labels,
  State,
  Teacher,
  check_least,
  hash_weights,
  helper_settings,
  joint_hash,
  joint_license,
  load_helper,
)
from openpilot.tools.lib.errors import UserError

Detector = Callable[[np.ndarray], np.ndarray]  # (3, H, W) uint8 RGB -> (M, 4 to 6): x0 y0 x1 y1, score, class
MODELS = {
  "sam2_video": "Sam2Video",
  "edgetam_video": "EdgeTamVideo",
}  # model_type -> what transformers' classes are called
KEPT = ("object_pointer", "maskmem_features", "maskmem_pos_enc")  # of an object's frame, once it has passed


@dataclass
class Tracked:
  """One frame's objects, in the order in which they joined."""

  ids: np.ndarray  # (N,) int64, never used twice in a video
  masks: np.ndarray  # (N, H, W) bool
  scores: np.ndarray  # (N,) float32, probability that the object is to be seen
  classes: np.ndarray  # (N,) int16, the detector's, -1 where it said none


@dataclass
class Video:
  """A video's state between two frames."""

  session: Any  # transformers' inference session
  frame: int = 0
  next_id: int = 0
  last_seen: dict[int, int] = field(default_factory=dict)
  classes: dict[int, int] = field(default_factory=dict)
  pos_enc: torch.Tensor | None = None  # of the spatial memory: the same for all objects and frames, kept once


def check_boxes(boxes: np.ndarray, strict: bool) -> np.ndarray:
  """-> float32, those that have an area. Raises UserError on another shape, and if strict on one without area."""
  boxes = np.asarray(boxes, np.float32)
  if boxes.ndim != 2 or not 4 <= boxes.shape[1] <= 6:
    raise UserError(f"boxes of shape {boxes.shape}; (N, 4): x0 y0 x1 y1, and if known a score and a class")
  good = np.isfinite(boxes).all(axis=1) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
  if strict and not good.all():
    raise UserError(
      f"box {int(good.argmin())} has no area: {boxes[good.argmin(), :4].tolist()}; boxes are x0 y0 x1 y1, x0 < x1, "
      "y0 < y1"
    )
  return boxes[good]


class SAM2VideoWrapper:
  """detector: a teacher of boxes by its registry name, asked every `every` frames; its boxes join that overlap no
  object by more than `join_iou`, best first, while there are fewer than `max_objects`. lost_after: frames after which
  an object unseen is let go.

  path: a Hugging Face folder, or a checkpoint of the sam2 package. detector_weights: where the detector's are, if not
  where all are looked for.
  load: of the detector. Raises UserError where it is no SAM 2 video model."""

  stateful = True
  sees = "picture"
  whole = False
  letterboxed = True
  ASKS_OTHERS = True

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    device: str | None = None,
    precision: str | None = None,
    detector: str | None = None,
    detector_weights: str | None = None,
    every: int = 10,
    join_iou: float = 0.3,
    max_objects: int = 16,
    lost_after: int = 60,
    load: Callable[..., Teacher] = load_teacher,
  ):
    import transformers

    assert path is not None
    check_least(name, 1, every=every, max_objects=max_objects)
    check_least(name, 0, join_iou=join_iou, lost_after=lost_after)
    self.name, self.license, self.model_id = name, entry.license, entry.weights or path.name
    self.device = choose_device(device, precision)
    self.model: Any
    if path.suffix in (".pt", ".pth"):
      kind, pictures = MODELS["sam2_video"], PICTURES
      self.model = load_pt(path, self.device)
    else:
      config, pictures = read_folder(path, tuple(MODELS), "a SAM 2 video model")
      kind = MODELS[config["model_type"]]
      self.model = load_model(path, self.device, f"{kind}Model")
    self.session_class: Any = getattr(transformers, f"{kind}InferenceSession")
    self.image_size = int(self.model.config.image_size)
    self.pictures = Pictures(
      {**pictures, "do_resize": True, "size": {"height": self.image_size, "width": self.image_size}}
    )
    self.every, self.join_iou, self.max_objects, self.lost_after = every, join_iou, max_objects, lost_after
    self.detector: Teacher | None = load_helper(load, detector, detector_weights, device) if detector else None
    self.license = joint_license(name, entry.license, self.detector.license) if self.detector else entry.license
    self.checkpoint_hash = joint_hash(hash_weights(path), self.detector) if self.detector else hash_weights(path)
    self.labels: list[Label] = []
    self.size = [0, 0]
    # of how many frames before the next one memory and pointers are looked at
    self.memory_reach, self.pointer_reach = (
      self.model.config.num_maskmem - 1,
      self.model.config.max_object_pointers_in_encoder - 1,
    )

  # *** one frame at a time ***

  def start(self, height: int, width: int) -> Video:
    where = self.device.device
    return Video(
      self.session_class(
        video_height=height,
        video_width=width,
        inference_device=where,
        inference_state_device=where,
        video_storage_device=where,
        dtype=self.device.dtype,
      )
    )

  @torch.inference_mode()
  def step(self, video: Video, rgb: np.ndarray, boxes: np.ndarray | None = None, every_box: bool = False) -> Tracked:
    """The next frame. rgb: (3, H, W) uint8. boxes: (M, 4 to 6) x0 y0 x1 y1 in pixels, integers at pixel centers, and
    score and class if known. They become new objects where they overlap none that is there and while there is room,
    best first; with every_box all do, in their order."""
    session, t = video.session, video.frame
    pixels = self.pictures(rgb[None], self.device)[0]
    masks, logits = self._forward(session, pixels, t)
    if boxes is not None and len(boxes):
      new = check_boxes(boxes, every_box)
      if not every_box:
        new = self._new(new, masks, self.max_objects - session.get_obj_num())
      if len(new):
        joining = self._prompt(video, new)
        joined = self._forward(joining, pixels, t)
        masks, logits = np.concatenate([masks, joined[0]]), np.concatenate([logits, joined[1]])
        self._merge(session, joining)
    ids = np.array(session.obj_ids, np.int64)
    for i in ids[logits > 0]:
      video.last_seen[int(i)] = t
    out = Tracked(
      ids,
      masks,
      (1 / (1 + np.exp(-logits))).astype(np.float32),
      np.array([video.classes[int(i)] for i in ids], np.int16),
    )
    self._forget(video)
    video.frame += 1
    return out

  def _forward(self, session: Any, pixels: torch.Tensor, t: int) -> tuple[np.ndarray, np.ndarray]:
    """-> masks (N, H, W) bool, logits of being there (N,) float32."""
    size = (session.video_height, session.video_width)
    if not session.get_obj_num():
      return np.zeros((0, *size), bool), np.zeros(0, np.float32)
    out = self.model(session, frame=pixels, frame_idx=t)
    masks = F.interpolate(out.pred_masks.float(), size, mode="bilinear", align_corners=False)[:, 0] > 0
    return masks.cpu().numpy(), out.object_score_logits.float().flatten().cpu().numpy()

  def _new(self, boxes: np.ndarray, masks: np.ndarray, room: int) -> np.ndarray:
    """The boxes that are nobody yet, best first."""
    if boxes.shape[1] > 4:
      boxes = boxes[np.argsort(-boxes[:, 4], kind="stable")]
    there = rle.boxes_of(masks)
    free = ~(box_iou(boxes[:, :4], there[np.isfinite(there[:, 0])]) > self.join_iou).any(axis=1)
    return boxes[free][: max(room, 0)]

  def _prompt(self, video: Video, boxes: np.ndarray) -> Any:
    """A session of new objects only, on the current frame."""
    session, t = video.session, video.frame
    joining = self.start(session.video_height, session.video_width).session
    joining.cache = session.cache  # the frame's features
    scale = self.image_size / np.array([session.video_width, session.video_height], np.float32)
    for box in boxes:
      i = video.next_id
      # the network counts its own pixels from their centers too
      corners = torch.from_numpy((box[:4].reshape(2, 2) + 0.5) * scale - 0.5).float()
      joining.add_point_inputs(
        joining.obj_id_to_idx(i),
        t,
        {"point_coords": corners[None, None], "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32)},
      )
      joining.obj_with_new_inputs.append(i)
      video.next_id += 1
      video.last_seen[i], video.classes[i] = t, int(box[5]) if len(box) > 5 else -1
    return joining

  @staticmethod
  def _merge(session: Any, joining: Any) -> None:
    for i in joining.obj_ids:
      session.output_dict_per_obj[session.obj_id_to_idx(i)] = joining.output_dict_per_obj[joining.obj_id_to_idx(i)]

  def _forget(self, video: Video) -> None:
    """Drops what no later frame looks at, and objects unseen for long."""
    session, t = video.session, video.frame
    for i in [i for i in session.obj_ids if t - video.last_seen[i] > self.lost_after]:
      self._remove(session, i)
      del video.last_seen[i], video.classes[i]
    session.processed_frames = {}
    for idx, outputs in session.output_dict_per_obj.items():
      session.frames_tracked_per_obj[idx], session.point_inputs_per_obj[idx] = {}, {}
      passed = outputs["non_cond_frame_outputs"]
      for f in [f for f in passed if f <= t - max(self.pointer_reach, self.memory_reach)]:
        del passed[f]
      for kind in outputs.values():
        for f, out in kind.items():
          needed = KEPT if kind is not passed or f > t - self.memory_reach else KEPT[:1]
          for key in [k for k in out if k not in needed]:
            del out[key]
          if "maskmem_pos_enc" in out:
            if video.pos_enc is None:
              video.pos_enc = out["maskmem_pos_enc"].clone()
            if out["maskmem_pos_enc"] is not video.pos_enc and torch.equal(out["maskmem_pos_enc"], video.pos_enc):
              out["maskmem_pos_enc"] = video.pos_enc

  @staticmethod
  def _remove(session: Any, obj_id: int) -> None:
    """The session counts its objects without gaps: those behind move up."""
    gone = session._obj_id_to_idx[obj_id]
    ids = [i for i in session.obj_ids if i != obj_id]
    for per_obj in (
      session.point_inputs_per_obj,
      session.mask_inputs_per_obj,
      session.output_dict_per_obj,
      session.frames_tracked_per_obj,
    ):
      del per_obj[gone]
      kept = [per_obj[k] for k in sorted(per_obj)]
      per_obj.clear()
      per_obj.update(enumerate(kept))
    session._obj_id_to_idx.clear()
    session._obj_id_to_idx.update({i: n for n, i in enumerate(ids)})
    session._obj_idx_to_id.clear()
    session._obj_idx_to_id.update(enumerate(ids))
    session.obj_ids = ids

  # *** whole videos ***

  def stream(
    self,
    frames: Iterable[np.ndarray],
    initial_boxes: np.ndarray | None = None,
    detector: Detector | None = None,
    every: int | None = None,
  ) -> Iterator[Tracked]:
    """frames: any number of (3, H, W) uint8 RGB, one is held at a time. initial_boxes (N, 4 to 6): the objects of the
    first frame. detector: asked on the first frame where there are no initial boxes, then every `every` frames, for
    objects to join."""
    video: Video | None = None
    for t, rgb in enumerate(frames):
      rgb = np.asarray(rgb)
      if (
        rgb.ndim != 3
        or rgb.shape[0] != 3
        or rgb.dtype != np.uint8
        or (video and rgb.shape[1:] != (video.session.video_height, video.session.video_width))
      ):
        raise UserError(f"frame {t} is {rgb.dtype} of shape {rgb.shape}; all frames are uint8 of one shape (3, H, W)")
      video = video or self.start(*rgb.shape[1:])
      if t == 0 and initial_boxes is not None:
        yield self.step(video, rgb, initial_boxes, every_box=True)
      else:
        yield self.step(video, rgb, detector(rgb) if detector and t % (every or self.every) == 0 else None)

  def track_objects(
    self,
    video_frames: Any,
    initial_boxes: np.ndarray | None = None,
    detector: Detector | None = None,
    every: int | None = None,
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """video_frames (T, 3, H, W) uint8 RGB, or an iterable of (3, H, W); the rest as `stream`.

    -> masks (T, N, H, W) bool, ids (N,) int64, scores (T, N) float32, of all objects that there ever were, the initial
    ones first and in their order; before an object joined and after it was let go its masks are empty and its scores 0.
    """
    out = list(self.stream(video_frames, initial_boxes, detector, every))
    ids = np.unique(np.concatenate([f.ids for f in out])) if out else np.zeros(0, np.int64)
    size = out[0].masks.shape[1:] if out else (0, 0)
    masks, scores = np.zeros((len(out), len(ids), *size), bool), np.zeros((len(out), len(ids)), np.float32)
    for t, f in enumerate(out):
      columns = np.searchsorted(ids, f.ids)
      masks[t, columns], scores[t, columns] = f.masks, f.scores
    return masks, ids, scores

  # *** as a teacher ***

  def prepare(self, height: int, width: int) -> None:
    if self.detector is None:
      raise UserError(
        f"teacher '{self.name}' has nobody to tell it what to follow; add the option detector, a teacher of boxes, "
        "e.g. yolox-nano"
      )
    self.detector.prepare(height, width)
    found = [b for b in self.detector.labels if b.kind == "boxes"]
    if not found:
      raise UserError(f"teacher '{self.detector.name}' gives no boxes; choose another detector for '{self.name}'")
    self.found, self.size = found[0].name, [height, width]
    self.labels = [Label("objects", "boxes", shape=(height, width), unit="px", classes=found[0].classes)]

  @property
  def long_side(self) -> int:
    """Of a whole picture, pixels: the network sees no finer."""
    return self.image_size

  def settings(self) -> dict[str, Any]:
    return {
      "pictures": self.pictures.config,
      "precision": self.device.precision,
      "detector": helper_settings(self.detector, self.whole) if self.detector else None,
      "every": self.every,
      "join_iou": self.join_iou,
      "max_objects": self.max_objects,
      "lost_after": self.lost_after,
      "size": self.size,
    }

  def detect(self, rgb: np.ndarray) -> np.ndarray:
    """The detector's boxes of a frame: (M, 6)."""
    assert self.detector is not None
    table = self.detector.label(Clip(rgb[None]))[0][self.found]
    return np.stack([np.asarray(table[k], np.float32) for k in ("x0", "y0", "x1", "y1", "score", "cls")], axis=1)

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    """'objects': the visible objects' boxes, which bound their masks; track: identity, never used twice in a video;
    rle: the mask as COCO counts."""
    video = self.load(state, *clip.rgb.shape[-2:]) if state else self.start(*clip.rgb.shape[-2:])
    rows: list[tuple[Any, ...]] = []
    for t, rgb in enumerate(clip.rgb):
      got = self.step(video, rgb, self.detect(rgb) if video.frame % self.every == 0 else None)
      boxes, counts = rle.boxes_of(got.masks), rle.encode(got.masks)
      rows += [
        (t, *boxes[n], got.scores[n], got.classes[n], got.ids[n], counts[n])
        for n in np.flatnonzero(np.isfinite(boxes[:, 0]))
      ]
    columns = {
      "frame": np.int32,
      **dict.fromkeys(("x0", "y0", "x1", "y1", "score"), np.float32),
      "cls": np.int16,
      "track": np.int64,
    }
    table: dict[str, Any] = {k: np.array([r[n] for r in rows], dtype) for n, (k, dtype) in enumerate(columns.items())}
    table["rle"] = [r[-1] for r in rows]
    return {"objects": table}, self.save(video)

  @staticmethod
  def save(video: Video) -> State:
    """A video's state as arrays, bit for bit."""
    session = video.session
    state: State = {
      "video": np.array([session.video_height, session.video_width, video.frame, video.next_id], np.int64),
      "objects": np.array([(i, video.last_seen[i], video.classes[i]) for i in session.obj_ids], np.int64).reshape(
        -1, 3
      ),
    }

    def put(key: str, x: torch.Tensor) -> None:
      # numpy has no bfloat16
      state[f"{key}:bf16" if x.dtype == torch.bfloat16 else key] = (
        (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).cpu().numpy()
      )

    if video.pos_enc is not None:
      put("pos_enc", video.pos_enc)
    for idx, outputs in session.output_dict_per_obj.items():
      for kind, frames in outputs.items():
        for f, out in frames.items():
          for name, x in out.items():
            if x is not video.pos_enc:
              put(f"{session.obj_idx_to_id(idx)}/{kind}/{f}/{name}", x.contiguous())
    return state

  def load(self, state: State, height: int, width: int) -> Video:
    """The reverse of `save`. Raises UserError where it is of frames of another size."""
    h, w, frame, next_id = (int(v) for v in state["video"])
    if (h, w) != (height, width):
      raise UserError(f"the frames are {width}x{height}, those before were {w}x{h}; begin again with these frames")
    video = self.start(h, w)
    video.frame, video.next_id, session = frame, next_id, video.session
    for i, seen, cls in state["objects"].tolist():
      session.obj_id_to_idx(i)
      video.last_seen[i], video.classes[i] = seen, cls
    for key, x in state.items():
      tensor = torch.from_numpy(x.copy()).to(self.device.device)
      name, _, bf16 = key.partition(":")
      tensor = tensor.view(torch.bfloat16) if bf16 else tensor
      if name == "pos_enc":
        video.pos_enc = tensor
      elif "/" in name:
        i, kind, f, what = name.split("/")
        session.output_dict_per_obj[session.obj_id_to_idx(int(i))][kind].setdefault(int(f), {})[what] = tensor
    for outputs in session.output_dict_per_obj.values():
      for frames in outputs.values():
        for out in frames.values():
          if "maskmem_features" in out:
            out.setdefault("maskmem_pos_enc", video.pos_enc)
    return video
