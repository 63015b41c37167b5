"""What a teacher is: a clip of frames in, named labels out. And what all teachers share: where weights are looked for,
and licenses that must be accepted.

Nothing here imports torch, so that `tools/op.sh teachers` answers at once."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from openpilot.tools.learn.memory import is_out_of_memory
from openpilot.tools.lib.errors import UserError, printable

# what stands behind a model's weights; True: free to use for any purpose, False: shown, and to be accepted by name
# before use
LICENSES = {
  "Apache-2.0": True,
  "MIT": True,
  "BSD-3-Clause": True,
  "CC-BY-NC-4.0": False,  # no commercial use
  "DINOv3": False,  # Meta's: passed on only under the same terms, no military use
  "SAM": False,  # Meta's, SAM 3: the same
}


COORDINATES = {"x0": 0, "y0": 1, "x1": 0, "y1": 1, "x": 0, "y": 1}  # columns of tables -> axis


@dataclass(frozen=True)
class Label:
  """One thing that a teacher says of every frame.

  kind: 'dense', an array of `shape` for each frame; or a table with any number of rows a frame: 'boxes' (x0, y0, x1,
  y1, score, cls, and where the teacher gives them track and rle), 'points' (track, x, y, visible, cls)."""

  name: str
  kind: str
  dtype: str = "float16"
  shape: tuple[int, ...] = ()
  unit: str = ""
  classes: tuple[str, ...] = ()


@dataclass
class Clip:
  """Consecutive frames of one view. A teacher without state may be given frames of several segments."""

  rgb: np.ndarray  # (T, 3, H, W) uint8, RGB; any strides
  intrinsics: np.ndarray | None = None  # (3, 3) of these pixels
  rpy: np.ndarray | None = None  # (3,) rad, calibration
  frame_ids: list[int] = field(default_factory=list)
  times: list[int] = field(default_factory=list)  # end of exposure, ns
  log_path: Path | None = None


# label's name -> (T, ...) array, or a table: {column: array or list}, whose column 'frame' is the frame's number in the
# clip
Labels = dict[str, Any]
State = dict[str, np.ndarray]


class Teacher(Protocol):
  """Boxes, points and masks are in pixels of the clip they were given, (x, y), integers at pixel centers."""

  name: str
  model_id: str  # hub id or file, for people
  checkpoint_hash: str  # sha256 of the weights
  license: str  # of LICENSES
  labels: list[Label]  # may be known only after `prepare`
  stateful: bool  # frames must come in order, `state` goes from one call to the next

  # may have: sees = "picture" where it was made for the camera's whole picture, whose labels are then warped into the
  # view (labels/picture.py); picture_size(width, height) -> at which size it likes that; whole, set before prepare():
  # whether it is given that, and then dense labels may have any size, over all of the picture;
  # stretches = True where that size is the same for all pictures; in place of picture_size: as_fine, times the view's
  # fineness, short_side or long_side, pixels; letterboxed = True: of single pictures it is given the input as stored;
  # view_size() -> (width, height) of the pictures it likes best; wants = "none" where it reads only the log;
  # at_once() -> how many clips are to be labeled at the same time, each by a thread of its own, and none is kept;
  # check(segment), which raises UserError where that segment cannot be labeled, before anything is stored;
  # report() -> lines for people on what it labeled in this run;
  # source(segment) -> what else decides the labels of one segment, as JSON;
  # ASKS_OTHERS = True: its options name other teachers; it is given load(name, weights, **options), which loads them;
  # FIXED: keywords of its constructor that are the registry's, no options; PASSES_ON: the class that gets its **
  # (options.py)

  def prepare(self, height: int, width: int) -> None:
    """Told once of the frames' size, before the first clip. Raises UserError where it cannot take them."""

  def settings(self) -> dict[str, Any]:
    """All else that decides the labels, as JSON: preprocessing, thresholds, precision, tables."""

  def label(self, clip: Clip, state: State | None = None) -> tuple[Labels, State | None]: ...


@dataclass(frozen=True)
class Entry:
  """A teacher's line in the registry."""

  # called with (name, entry, weights path or None, **options) -> Teacher; "module:callable" of tools/fair is imported
  # only when it is needed
  make: str | Callable[..., Any]
  weights: str  # file name, or hub id 'owner/name'; "" where there are none
  license: str
  size: str  # parameters
  says: str  # what it labels, for people
  options: dict[str, Any] = field(default_factory=dict)


def weight_dirs() -> list[Path]:
  """Where weights are looked for: FAIR_WEIGHTS (several, separated as in PATH), then ./weights."""
  return [Path(p).expanduser() for p in os.environ.get("FAIR_WEIGHTS", "").split(os.pathsep) if p] + [Path("weights")]


def find_weights(weights: str, given: str | Path | None = None, download: bool = False) -> Path:
  """-> file or folder. Looked for: `given`; then, in each of weight_dirs(), the file, or the hub id's folder; then the
  hub's cache; then, with `download`, the hub. Raises UserError saying where it looked."""
  if given is not None:
    if Path(given).exists():
      return Path(given)
    raise UserError(f"no weights at {given}; give a checkpoint's file or folder")
  looked = []
  for folder in weight_dirs():
    for name in dict.fromkeys((weights, weights.split("/")[-1])):
      path = folder / name
      if path.exists():
        return path
      looked.append(str(path))
  is_hub_id = "/" in weights
  if is_hub_id:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.yaml"]
    try:
      return Path(snapshot_download(weights, allow_patterns=patterns, local_files_only=not download))
    except LocalEntryNotFoundError:
      looked.append("the hub's cache")
    except (HfHubHTTPError, OSError) as e:
      why = str(e).splitlines()[0]
      raise UserError(
        f"{weights} could not be downloaded: {why}; accept its terms on the hub and log in, or copy it to {looked[0]}"
      ) from None
  hint = " or let it be downloaded with --download" if is_hub_id and not download else ""
  raise UserError(
    f"no weights '{weights}'; looked at {', '.join(looked)}; put them there, name the folder in FAIR_WEIGHTS{hint}"
  )


def threads_of_cpu() -> int:
  """FAIR_ORT_THREADS, else as many as there are cores."""
  return int(os.environ.get("FAIR_ORT_THREADS", "0")) or os.cpu_count() or 1


def fitted(size: tuple[int, int], side: tuple[int, int], stretch: bool) -> tuple[int, int]:
  """(width, height) of a picture of `size` in a network's input of `side`: stretched to it, or as large as fits in."""
  if stretch:
    return side
  ratio = min(side[1] / size[1], side[0] / size[0])
  return round(size[0] * ratio), round(size[1] * ratio)


@cache
def hash_weights(path: Path) -> str:
  """sha256 of a file, or of a folder's weight and configuration files by name."""
  if path.is_file():
    with open(path, "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  h = hashlib.sha256()
  for p in sorted(
    p
    for p in path.rglob("*")
    if p.is_file() and p.suffix in (".json", ".safetensors", ".bin", ".pt", ".pth", ".onnx", ".yaml")
  ):
    h.update(f"{p.relative_to(path)} {hash_weights(p)}\n".encode())
  return h.hexdigest()


@contextlib.contextmanager
def failure_is_said(name: str) -> Iterator[None]:
  """What comes up in a network of somebody else's making, of files that are garbled or not of one model, is a
  UserError. Out of memory stays what it is: then fewer frames are tried."""
  try:
    yield
  except UserError:
    raise
  except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
    if is_out_of_memory(e):
      raise
    raise UserError(
      f"teacher '{name}' fails: {type(e).__name__}: {printable(e, 200)}; its configuration, preprocessor and weights "
      "must be of one model: copy its files again"
    ) from e


def check_license(name: str, license: str, accepted: Iterable[str]) -> None:
  """Raises UserError where the license restricts use and was not accepted."""
  if not LICENSES.get(license, False) and license not in accepted:
    what = f"teacher '{name}' is under the license {license}, which restricts use of it and of what learns from it"
    raise UserError(f"{what}; read it, then add --accept-license {license}")


def license_of(teachers: Iterable[Mapping[str, str]]) -> str:
  """Of what learned from teachers, as manifests and checkpoints name them: all licenses that restrict use."""
  said = {t.get("license") or t["licence"] for t in teachers}
  return " and ".join(sorted(x for x in said if not LICENSES.get(x, False))) or "MIT"


def check_least(name: str, least: float, **values: float) -> None:
  """Raises UserError where an option of teacher `name` is below `least`."""
  for key, value in values.items():
    if value < least:
      raise UserError(f"teacher '{name}': {key} is {value}; at least {least}")


def joint_license(name: str, own: str, other: str) -> str:
  """Of what two teachers label together: that one which restricts use. Raises UserError where both do, each in its
  way."""
  restricts = sorted({x for x in (own, other) if not LICENSES.get(x, False)})
  if len(restricts) > 1:
    raise UserError(
      f"teacher '{name}' would be under the licenses {' and '.join(restricts)} at once; choose a helper under another "
      "license"
    )
  return restricts[0] if restricts else own


def load_helper(load: Callable[..., Teacher], name: str, weights: str | None, device: str | None) -> Teacher:
  """The teacher that another one asks, by its option. It chooses its device by itself but for the CPU: ONNX Runtime may
  have no GPU where torch has one."""
  return load(name, weights, device=device if device == "cpu" else None)


def joint_hash(own: str, helper: Teacher) -> str:
  return hashlib.sha256(f"{own} {helper.checkpoint_hash}".encode()).hexdigest()


def helper_settings(helper: Teacher, whole: bool = False) -> dict[str, Any]:
  """whole: it sees whole pictures, whose size is each segment's own."""
  settings = {k: v for k, v in helper.settings().items() if not whole or k != "size"}
  return {"name": helper.name, "checkpoint": helper.checkpoint_hash, "settings": settings}
