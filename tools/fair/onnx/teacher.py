"""Any ONNX detector or segmenter as a teacher, described by a small YAML beside this file or anywhere else: input
layout (NCHW, or NHWC of the input and of dense outputs), color order, scaling, further inputs (feed: name -> numbers,
the same for each image), decoding.

decode: 'yolox' (grids of distances, objectness, classes: Ge et al. 2021), 'dets' (boxes and labels after suppression,
as mmdeploy exports them), 'detr' (boxes x0 y0 x1 y1 in input pixels, scores and labels of all queries, no suppression),
'maps' (a dense output of which one channel is kept)."""

import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx

from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.selfdrive.modeld.fair.ort import ort
from openpilot.tools.learn.memory import halve_on_oom
from openpilot.tools.fair.onnx.device import CPU, check_session, choose_providers, run
from openpilot.tools.fair.onnx.graph import yolox_classes
from openpilot.tools.lib.onnx_batch import free_batch
from openpilot.tools.fair.teacher import (
  Clip,
  Entry,
  Label,
  Labels,
  State,
  check_least,
  fitted,
  hash_weights,
  threads_of_cpu,
)
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import read_yaml

REQUIRED = ("input", "decode")
FORMER = {"colour": "color", "licence": "license"}  # as descriptions spelled it before
DECODES = ("yolox", "dets", "detr", "maps")
LAYOUTS = ("NCHW", "NHWC")
MOST_AT_ONCE = 16  # clips: memory for that many batches
Found = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # frame, boxes (N, 4) in input pixels, score, class
BOX_COLUMNS = ("frame", "x0", "y0", "x1", "y1", "score", "cls")


def read_description(config: str | Path) -> dict[str, Any]:
  """A YAML's path, or the name of one in this folder -> what it says. Raises UserError where it does not describe a
  network."""
  path = Path(config) if Path(config).suffix in (".yaml", ".yml") else Path(__file__).with_name(f"{config}.yaml")
  try:
    read = read_yaml(path)
  except (OSError, ValueError) as e:
    raise UserError(f"cannot read the network's description {path}: {' '.join(str(e).split())[:160]}") from None
  lacking = [k for k in REQUIRED if not isinstance(read, dict) or k not in read]
  if lacking or read["decode"] not in DECODES:
    raise UserError(
      f"{path} is no description of a network: it needs {', '.join(REQUIRED)}, and decode one of {', '.join(DECODES)}; "
      "see yolox_nano.yaml"
    )
  if isinstance(read["input"], dict) and read["input"].get("layout", "NCHW") not in LAYOUTS:
    raise UserError(f"{path}: layout '{read['input']['layout']}' is not known; {' or '.join(LAYOUTS)}")
  if isinstance(read["input"], dict):
    read["input"] = respelled(read["input"], FORMER)
  return respelled(read, FORMER)


def respelled(said: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
  """The same, keys by their other names, in the same order."""
  return {names.get(k, k): v for k, v in said.items()}


def describe(path: Path) -> tuple[str, Entry]:
  """A user's own YAML, which also says weights (a path from its folder) and license -> name and registry entry."""
  read = read_description(path)
  if "weights" not in read or "license" not in read:
    raise UserError(
      f"{path} does not say weights and license: add 'weights: net.onnx' and 'license: MIT', or whatever the "
      "network's is"
    )
  weights = path.parent / str(read["weights"])
  entry = Entry(
    "onnx.teacher:OnnxTeacher",
    str(weights if weights.exists() else read["weights"]),
    str(read["license"]),
    "",
    "",
    {"config": str(path)},
  )
  return str(read.get("name", path.stem)), entry


def nms(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, iou: float) -> np.ndarray:
  """Greedy suppression within each class. boxes (N, 4) -> indices kept, best first."""
  if not len(boxes):
    return np.zeros(0, np.int64)
  order = np.argsort(-scores, kind="stable")
  b = boxes[order]
  area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
  wh = np.clip(np.minimum(b[:, None, 2:], b[None, :, 2:]) - np.maximum(b[:, None, :2], b[None, :, :2]), 0, None)
  inter = wh[..., 0] * wh[..., 1]
  over = (inter > iou * (area[:, None] + area[None] - inter)) & (classes[order][:, None] == classes[order][None])
  keep = np.ones(len(b), bool)
  for i in range(len(b)):
    if keep[i]:
      keep[i + 1 :] &= ~over[i, i + 1 :]
  return order[keep]


class OnnxTeacher:
  stateful = False
  sees = "picture"
  whole = False

  def __init__(
    self,
    name: str,
    entry: Entry,
    path: Path | None,
    config: str | Path | dict[str, Any] = "",
    device: str | None = None,
    score: float | None = None,
    iou: float | None = None,
  ):
    """config: a YAML's path, or its name in this folder. score: boxes below are dropped; iou: of boxes that overlap
    more only the best stays; both as the YAML says where not given. Raises UserError where file and YAML disagree, and
    on an option that the YAML's network has not."""
    assert path is not None
    self.name, self.license, self.model_id = name, entry.license, path.name
    self.config = dict(config) if isinstance(config, dict) else read_description(config)
    for key, value in (("score", score), ("iou", iou)):
      if value is not None:
        if key not in self.config.get("boxes", {}):
          raise UserError(f"teacher '{name}' has no option {key}: its network puts out no boxes that are chosen by it")
        check_least(name, 0, **{key: value})
        self.config["boxes"] = {**self.config["boxes"], key: value}
    self.checkpoint_hash = hash_weights(path)
    try:
      model = onnx.load(str(path))
    except Exception as e:  # protobuf's errors have no common base
      raise UserError(f"{path} is not an ONNX file: {str(e).splitlines()[0][:120]}; copy it again") from None
    names = [i.name for i in model.graph.input]
    inp = self.config["input"]
    if inp["name"] not in names:
      raise UserError(
        f"{path} has the inputs {', '.join(names)}, its description wants '{inp['name']}'; it is another network, or "
        "the YAML is wrong"
      )
    self.providers, self.provider_options = choose_providers(device)
    model = free_batch(model)
    # a fifteenth of YOLOX-nano's time on a CPU is classes that are of no road, and moving them about; bit for bit the
    # same boxes there, so nowhere else
    self.cut = self.config["decode"] == "yolox" and self.providers[0] == CPU and self._cut(model)
    self.graph = model.SerializeToString()
    self.session = self._open(threads_of_cpu())
    if check_session(self.session, self.providers[0], device) == CPU:
      self.providers, self.provider_options = [CPU], [{}]
    self.output_names = [o.name for o in self.session.get_outputs()]
    self.input_h, self.input_w = inp["size"]
    self.single = not self._batches()
    self.classes = tuple(self.config.get("boxes", {}).get("classes", {}).values())
    self.labels: list[Label] = []
    self.height = self.width = 0
    self.memory = threading.local()  # of each thread that labels

  def _cut(self, model: onnx.ModelProto) -> bool:
    return yolox_classes(model, self.config["boxes"]["output"], [int(k) for k in self.config["boxes"]["classes"]])

  def _open(self, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the batch test below may fail, and is not the user's business
    options.intra_op_num_threads = self.threads = threads
    return ort.InferenceSession(self.graph, options, providers=self.providers, provider_options=self.provider_options)

  def at_once(self) -> int:
    """How many clips are labeled best at the same time, each by a thread of its own; from now on they may be. Small
    networks on a CPU get a core for each
    clip: cores that share one clip wait for each other after every layer, and all the longer where frames are being
    decoded beside them."""
    threads = max(1, min(threads_of_cpu(), MOST_AT_ONCE)) if self.providers[0] == "CPUExecutionProvider" else 1
    if threads > 1 and self.threads > 1:
      self.session = self._open(1)
    return threads

  def _batches(self) -> bool:
    """Whether two images at once give what each gives alone."""
    x = (
      np.random.default_rng(0).uniform(0, 1, (2, 3, self.input_h, self.input_w)).astype(np.float32)
      / self.config["input"]["scale"]
      * 0.5
    )
    try:
      both = self.session.run(None, self._feed(x))
      alone = [self.session.run(None, self._feed(x[i : i + 1])) for i in range(2)]
    except Exception:  # a graph whose inner shapes depend on one image
      return False
    return all(
      len(b) == 2 and b.shape[1:] == a.shape[1:] and np.allclose(b[i], a[0], atol=1e-3)
      for i in range(2)
      for b, a in zip(both, alone[i], strict=True)
    )

  def _feed(self, blob: np.ndarray) -> dict[str, np.ndarray]:
    """(T, 3, h, w) -> all inputs."""
    inp = self.config["input"]
    x = np.ascontiguousarray(blob.transpose(0, 2, 3, 1)) if inp.get("layout") == "NHWC" else blob
    more = {k: np.repeat(np.array([v], np.int64), len(blob), 0) for k, v in self.config.get("feed", {}).items()}
    return {inp["name"]: x, **more}

  @property
  def stretches(self) -> bool:
    return bool(self.config["input"]["fit"] == "stretch")

  def picture_size(self, width: int, height: int) -> tuple[int, int]:
    """(width, height) at which a picture of this size needs no more resizing."""
    return fitted((width, height), (self.input_w, self.input_h), self.stretches)

  def view_size(self) -> tuple[int, int]:
    """(width, height) at which the view needs no more resizing: even numbers, as its chroma is halved."""
    w, h = self.picture_size(VIEW_W, VIEW_H)
    return w // 2 * 2, h // 2 * 2

  def prepare(self, height: int, width: int) -> None:
    self.height, self.width = height, width
    self.fit_w, self.fit_h = self.picture_size(width, height)
    if self.config["decode"] == "maps":
      self.map_shape = (self.fit_h, self.fit_w) if self.whole else (VIEW_H // 2, VIEW_W // 2)
      self.labels = [Label(k, "dense", "float16", self.map_shape, "probability") for k in self.config["maps"]]
    else:
      self.labels = [Label("boxes", "boxes", unit="px", classes=self.classes)]

  def settings(self) -> dict[str, Any]:
    # spelled as in stores from before: the same labels keep their key
    former = {now: before for before, now in FORMER.items()}
    description = respelled({**self.config, "input": respelled(self.config["input"], former)}, former)
    return {"description": description, "size": [self.height, self.width]}

  def prepare_batch(self, rgb: np.ndarray) -> np.ndarray:
    """(T, 3, H, W) uint8 RGB -> (T, 3, h, w) float32, the network's input. In one thread the same buffer every time."""
    inp = self.config["input"]
    blob = getattr(self.memory, "blob", None)
    fit = self.fit_h, self.fit_w
    if blob is None or len(blob) < len(rgb):
      blob = self.memory.blob = np.empty((len(rgb), 3, self.input_h, self.input_w), np.float32)
      self.memory.fit = None
    if self.memory.fit != fit:  # a flatter picture leaves free what the one before it has filled
      mean, std = (np.array(inp[k], np.float32)[:, None, None] for k in ("mean", "std"))
      blob[:] = (np.float32(float(inp.get("pad", 0)) * inp["scale"]) - mean) / std
      self.memory.fit = fit
    plain = not any(inp["mean"]) and all(s == 1 for s in inp["std"])
    for t, image in enumerate(rgb):
      hwc = np.ascontiguousarray(image.transpose(1, 2, 0))  # no copy where the clip was made of pictures
      small = (
        cv2.resize(hwc, (self.fit_w, self.fit_h), interpolation=cv2.INTER_LINEAR)
        if hwc.shape[:2] != (self.fit_h, self.fit_w)
        else hwc
      )
      planes = self.memory.planes = cv2.split(
        small, getattr(self.memory, "planes", None)
      )  # memory that is there already takes a third of the time
      for c, plane in enumerate(planes if inp["color"] == "RGB" else planes[::-1]):
        target = blob[t, c, : self.fit_h, : self.fit_w]
        if inp["scale"] == 1:
          np.copyto(target, plane)
        else:
          np.multiply(plane, np.float32(inp["scale"]), out=target)
        if not plain:
          target -= np.float32(inp["mean"][c])
          target /= np.float32(inp["std"][c])
    return blob[: len(rgb)]

  def forward(self, blob: np.ndarray) -> dict[str, Any]:
    if self.single:
      runs = [halve_on_oom(lambda x: [run(self.session, self._feed(x))], blob[i : i + 1])[0] for i in range(len(blob))]
      return {k: [r[j][0] for r in runs] for j, k in enumerate(self.output_names)}  # their shapes may differ
    runs = halve_on_oom(lambda x: [run(self.session, self._feed(x))], blob)
    return {
      k: runs[0][j] if len(runs) == 1 else [x for r in runs for x in r[j]] for j, k in enumerate(self.output_names)
    }

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]:
    out = self.forward(self.prepare_batch(clip.rgb))
    decode = self.config["decode"]
    return (self._maps(out) if decode == "maps" else self._boxes(out, len(clip.rgb), decode)), None

  def _maps(self, out: dict[str, Any]) -> Labels:
    labels: Labels = {}
    h, w = self.map_shape
    for name, spec in self.config["maps"].items():
      x = np.asarray(out[spec["output"]])
      if self.config["input"].get("layout") == "NHWC":
        x = x.transpose(0, 3, 1, 2)
      if spec.get("softmax"):
        # of two channels: a sigmoid of their difference
        others = np.delete(x, spec["channel"], axis=1)
        p = 1 / (1 + np.exp(others - x[:, spec["channel"] : spec["channel"] + 1]).sum(axis=1))
      else:
        p = x[:, spec["channel"]]
      p = p[:, : self.fit_h, : self.fit_w]
      p = p.astype(np.float32)
      if p.shape[1:] != (h, w):
        p = np.stack([cv2.resize(m, (w, h), interpolation=cv2.INTER_LINEAR) for m in p])
      labels[name] = (np.round(p * 256) / 256).astype(np.float16)  # finer would be noise that does not compress
    return labels

  def _boxes(self, out: dict[str, Any], n: int, decode: str) -> Labels:
    spec = self.config["boxes"]
    index = {int(k): i for i, k in enumerate(spec["classes"])}
    frame, boxes, scores, classes = (
      self._yolox(np.asarray(out[spec["output"]]), spec, index)
      if decode == "yolox"
      else self._dets(out, n, spec, index)
    )
    # to the clip's pixels; the networks count from the corner, we from the pixel's center
    scale = np.array([self.width / self.fit_w, self.height / self.fit_h] * 2, np.float32)
    boxes = np.clip(boxes * scale, 0, np.array([self.width, self.height] * 2, np.float32)) - np.float32(0.5)
    good = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    columns = (frame.astype(np.int32), *boxes.T, scores.astype(np.float32), classes.astype(np.int16))
    return {"boxes": {k: v[good] for k, v in zip(BOX_COLUMNS, columns, strict=True)}}

  def _yolox(self, x: np.ndarray, spec: dict[str, Any], index: dict[int, int]) -> Found:
    """(T, A, 5 + C): center and size in strides (size as logarithm), objectness, class scores: of all the network's
    classes, or of the road's alone."""
    frame, likely = np.nonzero(x[:, :, 4] >= spec["score"])  # a score is at most its objectness
    x = x[frame, likely]
    scores = x[:, 4:5] * (x[:, 5:] if self.cut else x[:, 5 + np.array(list(index))])
    best = scores.argmax(axis=1)
    score = scores[np.arange(len(x)), best]
    good = score >= spec["score"]
    x, frame, score, best, likely = x[good], frame[good], score[good], best[good], likely[good]
    centers, strides = self._grid(tuple(spec["strides"]))
    stride = strides[likely, None]
    middle, size = (x[:, :2] + centers[likely]) * stride, np.exp(x[:, 2:4]) * stride
    boxes = np.concatenate([middle - size / 2, middle + size / 2], axis=1)
    ends = np.searchsorted(frame, np.arange(1, frame.max(initial=-1) + 2))  # frames are in order
    keep = np.concatenate(
      [
        np.zeros(0, np.int64),
        *[a + nms(boxes[a:b], score[a:b], best[a:b], spec["iou"]) for a, b in pairwise([0, *ends.tolist()])],
      ]
    )
    return frame[keep], boxes[keep], score[keep], best[keep]

  def _grid(self, strides: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    if not hasattr(self, "_grids"):
      centers, each = [], []
      for s in strides:
        v, u = np.mgrid[: self.input_h // s, : self.input_w // s]
        centers.append(np.stack([u.ravel(), v.ravel()], axis=1))
        each.append(np.full(u.size, s))
      self._grids = np.concatenate(centers).astype(np.float32), np.concatenate(each).astype(np.float32)
    return self._grids

  def _dets(self, out: dict[str, Any], n: int, spec: dict[str, Any], index: dict[int, int]) -> Found:
    """Of each frame (M, 5) boxes with scores, or (M, 4) and scores of their own, and (M,) labels."""
    dets, labels = (
      [np.asarray(x, kind) for x in out[spec[k]]] for k, kind in (("output", np.float32), ("labels", np.int64))
    )
    if self.config["decode"] == "detr":
      scores = [np.asarray(x, np.float32) for x in out[spec["scores"]]]
      dets = [np.concatenate([d, s[:, None]], axis=1) for d, s in zip(dets, scores, strict=True)]
    frame, rows, label = np.repeat(np.arange(n), [len(d) for d in dets]), np.concatenate(dets), np.concatenate(labels)
    good = (rows[:, 4] >= spec["score"]) & np.isin(label, list(index))
    return frame[good], rows[good, :4], rows[good, 4], np.array([index[int(k)] for k in label[good]], np.int64)
