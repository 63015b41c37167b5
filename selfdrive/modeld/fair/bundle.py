"""Student bundles: a folder with ONNX graphs and a manifest.json that says all that the runtime needs. Here it is read,
checked and, for the tools, written."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from openpilot.selfdrive.modeld.fair.onnxfile import OnnxError, whole
from openpilot.selfdrive.modeld.fair.roles import folded

MODELS_DIR = Path(os.environ.get("FAIR_MODELS_DIR") or Path(__file__).resolve().parents[3] / "models")
SCHEMA_PATH = Path(__file__).with_name("bundle.schema.json")
MANIFEST = "manifest.json"
DEFAULT = "fair_unified_small"  # what runs where nothing is named
MAX_MESSAGE = 1500  # characters
MAX_VALUES = 1 << 26  # of one input or output
MAX_MANIFEST = 1 << 20  # bytes
MAX_FILE = 512 << 20  # bytes of any other file
MAX_FILES = 64
TYPES: dict[str, tuple[type, ...]] = {
  "object": (dict,),
  "array": (list,),
  "string": (str,),
  "number": (int, float),
  "integer": (int,),
  "boolean": (bool,),
}


class BundleError(ValueError):
  """A bundle that cannot be run. The message is one line, whatever names are in it: what, where, what to do."""

  def __init__(self, message: str):
    super().__init__("".join(c if c.isprintable() else "?" for c in message[:MAX_MESSAGE]))


@dataclass(frozen=True)
class Bundle:
  path: Path
  manifest: dict[str, Any]
  manifest_hash: str  # sha256 of manifest.json's bytes

  @property
  def name(self) -> str:
    return self.manifest["name"]

  @property
  def graphs(self) -> list[dict[str, Any]]:
    return self.manifest["graphs"]

  def read(self, name: str) -> bytes:
    """A file's bytes, which are those that the manifest lists: read once, hashed, handed out. Raises BundleError where
    they are others, or none are listed."""
    if name not in self.manifest["sha256"]:
      raise BundleError(
        f"{self.path / MANIFEST}: sha256 has no hash of {json.dumps(name)[:60]}; export the bundle again"
      )
    data = read_file(self.path / name, MAX_FILE)
    if (actual := hashlib.sha256(data).hexdigest()) != self.manifest["sha256"][name]:
      raise changed(self.path / name, actual, self.manifest["sha256"][name])
    return data

  def onnx(self, graph: dict[str, Any], variant: dict[str, Any] | None = None) -> bytes:
    """The ONNX file of a graph, or of one of its variants, in one piece, whatever files its weights lie in: what a
    runner is given, so that it opens none. Raises BundleError."""
    file = (variant or graph)["file"]

    def outside(name: str) -> bytes:
      try:
        return self.read(name)
      except BundleError as e:
        raise OnnxError(f"keeps weights in another file: {e}") from None

    try:
      return whole(self.read(file), outside)
    except OnnxError as e:
      raise BundleError(f"{self.path / file} {e}") from None


@cache
def schema() -> dict[str, Any]:
  return json.loads(SCHEMA_PATH.read_text())


def violation(value: Any, rule: dict[str, Any], at: str = "manifest") -> str | None:
  """The first breach of a JSON Schema by `value`, or None. Knows the keywords that bundle.schema.json uses: the device
  has no jsonschema package."""
  kind = rule.get("type")
  if kind is not None and (not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "boolean")):
    return f"{at} must be of type {kind}, is {json.dumps(value)[:60]}"
  if isinstance(value, float) and not math.isfinite(value):
    return f"{at} is {value}, must be a finite number"
  if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
    return f"{at} is {json.dumps(value)[:60]}, half a character of UTF-16: no message can carry it"
  if isinstance(value, str) and len(value) > rule.get("maxLength", len(value)):
    return f"{at} has {len(value)} characters, may have {rule['maxLength']}"
  if "enum" in rule and value not in rule["enum"]:
    return f"{at} is {json.dumps(value)[:60]}, must be one of {', '.join(map(str, rule['enum']))}"
  if "pattern" in rule and not re.search(rule["pattern"], value):
    return f"{at} is {json.dumps(value)[:60]}, must match {rule['pattern']}"
  if "minimum" in rule and value < rule["minimum"]:
    return f"{at} is {value}, must be at least {rule['minimum']}"
  if "maximum" in rule and value > rule["maximum"]:
    return f"{at} is {value}, must be at most {rule['maximum']}"
  if "multipleOf" in rule and value % rule["multipleOf"]:
    return f"{at} is {value}, must be a multiple of {rule['multipleOf']}"
  if isinstance(value, list):
    if len(value) < rule.get("minItems", 0):
      return f"{at} needs at least {rule['minItems']} entries"
    if len(value) > rule.get("maxItems", len(value)):
      return f"{at} has {len(value)} entries, may have {rule['maxItems']}"
    for i, v in enumerate(value):
      if "items" in rule and (found := violation(v, rule["items"], f"{at}[{i}]")):
        return found
  if isinstance(value, dict):
    for k in rule.get("required", []):
      if k not in value:
        return f"{at}.{k} is missing"
    others = rule.get("additionalProperties", True)
    for k, v in value.items():
      name = f"{at}.{json.dumps(k)[1:-1][:60]}"
      if k in rule.get("properties", {}):
        if found := violation(v, rule["properties"][k], f"{at}.{k}"):
          return found
      elif others is False:
        return f"{name} is not known"
      elif isinstance(others, dict) and (found := violation(v, others, name)):
        return found
  return None


def normalized(manifest: Any) -> Any:
  """A manifest with the keys of before, `licence` in its provenance, under their present names."""
  provenance = manifest.get("provenance") if isinstance(manifest, dict) else None
  if not isinstance(provenance, dict):
    return manifest
  provenance = renamed(provenance)
  if isinstance(provenance.get("teachers"), list):
    provenance["teachers"] = [renamed(t) if isinstance(t, dict) else t for t in provenance["teachers"]]
  return {**manifest, "provenance": provenance}


def renamed(said: dict[str, Any]) -> dict[str, Any]:
  both = "license" in said  # then the former one is refused, as any other key
  return {k if both or k != "licence" else "license": v for k, v in said.items()}


def contradiction(manifest: dict[str, Any]) -> str | None:
  """Where two entries of a manifest that fits its schema contradict each other; None where none do."""
  if (said := manifest.get("input")) is not None:
    if said["kind"] == "model_frame" and said.get("view", "medmodel") != manifest["view"]:
      return f"input.view is not the bundle's view '{manifest['view']}'"
    shape = [1, *frame_shape(said)]
    for graph in manifest["graphs"]:
      taken = next((i["shape"] for i in graph["inputs"] if i["name"] == "frame"), shape)
      if taken != shape:
        return f"graph '{graph['name']}' takes frames {taken}, by its input they are {shape}"
  if name := twice(manifest["streams"]):
    return f"streams names '{name}' twice"
  for graph in manifest["graphs"]:
    states = graph.get("state", [])
    for what, names in (
      ("input", [i["name"] for i in graph["inputs"]]),
      ("output", [o["name"] for o in graph["outputs"]]),
      ("state's input", [s["input"] for s in states]),
    ):
      if (name := twice(names)) is not None:
        return f"graph '{graph['name']}' has the {what} '{name[:60]}' twice"
    targets = [v["target"] for v in graph.get("variants", [])]
    if twice(targets) is not None:
      return f"graph '{graph['name']}' has two variants for one target; its variants are for {', '.join(targets)}"
    for out in graph["outputs"]:
      classes = out.get("classes", [])
      if no_name := [n for n in classes if not n.strip() or any(c < " " or "\x7f" <= c <= "\x9f" for c in n)]:
        return f"output '{out['name'][:60]}' has a class called {json.dumps(no_name[0])}, which is no name"
      # messages carry names alone, and the tools tell classes apart as folded() does
      if (name := twice(map(folded, classes))) is not None:
        return f"output '{out['name'][:60]}' has two classes called '{name}'"
      if stray := [name for name in out.get("roles", {}) if name not in classes]:
        return f"output '{out['name'][:60]}' has a role for '{stray[0][:60]}', which is none of its classes"
  return None


def twice(names: Iterable[str]) -> str | None:
  """The first of the names that was there before."""
  seen: set[str] = set()
  for name in names:
    if name in seen:
      return name
    seen.add(name)
  return None


def frame_shape(said: dict[str, Any]) -> tuple[int, int, int]:
  """Of one frame of a manifest's `input`, uint8: packed YUV 4:2:0 of a model frame, or RGB."""
  height, width = said["height"], said["width"]
  return (3, height, width) if said["kind"] == "rgb" else (6, height // 2, width // 2)


def no_number(text: str) -> None:
  raise ValueError(f"{text} is no number")


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  if (key := twice(k for k, _ in pairs)) is not None:
    raise ValueError(f"it has {json.dumps(key)[:60]} twice in one object")
  return dict(pairs)


def open_file(path: Path, limit: int) -> BinaryIO:
  """An ordinary file of at most `limit` bytes, opened; no link, device or pipe, which may give bytes for ever. Raises
  BundleError, FileNotFoundError."""
  try:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
  except FileNotFoundError:
    raise
  except (OSError, ValueError) as e:
    why = (
      "is a link; copy the file itself"
      if isinstance(e, OSError) and e.errno == errno.ELOOP
      else f"cannot be opened: {getattr(e, 'strerror', e)}"
    )
    raise BundleError(f"{path.parent / path.name[:100]} {why}") from None
  st = os.fstat(fd)
  if not stat.S_ISREG(st.st_mode) or st.st_size > limit:
    os.close(fd)
    raise BundleError(
      f"{path} has {st.st_size} bytes, may have {limit}" if stat.S_ISREG(st.st_mode) else f"{path} is no ordinary file"
    )
  return os.fdopen(fd, "rb")


def read_file(path: Path, limit: int) -> bytes:
  """Its bytes, see open_file(); one that grows while it is read is refused too."""
  try:
    with open_file(path, limit) as f:
      data = f.read(limit + 1)
  except OSError as e:
    raise BundleError(f"{path} cannot be read: {e.strerror}") from None
  if len(data) > limit:
    raise BundleError(f"{path} has over {limit} bytes")
  return data


def sha256(path: Path, limit: int = 1 << 62) -> str:
  """Of an ordinary file, in hexadecimal; see open_file()."""
  h = hashlib.sha256()
  with open_file(path, limit) as f:
    while chunk := f.read(1 << 20):
      h.update(chunk)
  return h.hexdigest()


def changed(path: Path, actual: str, expected: object) -> BundleError:
  return BundleError(
    f"{path} has sha256 {actual[:12]}..., its manifest says {str(expected)[:12]}...; it was changed or cut short: copy "
    "or export it again"
  )


def load_bundle(path: str | Path) -> Bundle:
  """Reads and checks a bundle folder: manifest against the schema, every file against its hash. Raises BundleError with
  one line on anything wrong."""
  path = Path(path)
  if not path.is_dir():
    raise BundleError(f"no bundle at {path}; a bundle is a folder with {MANIFEST} and its ONNX files")
  try:
    raw = read_file(path / MANIFEST, MAX_MANIFEST)
  except BundleError as e:
    raise BundleError(f"{path} has no readable {MANIFEST} ({e}); export the bundle again") from None
  try:
    manifest = normalized(json.loads(raw, parse_constant=no_number, object_pairs_hook=no_key_twice))
  except (ValueError, RecursionError) as e:
    raise BundleError(f"{path / MANIFEST} is not JSON ({e}); export the bundle again") from None
  if found := violation(manifest, schema()):
    raise BundleError(f"{path / MANIFEST}: {found}")
  if found := contradiction(manifest):
    raise BundleError(f"{path / MANIFEST}: {found}; export the bundle again")
  names = [g["name"] for g in manifest["graphs"]]
  if len(set(names)) != len(names):
    raise BundleError(f"{path / MANIFEST}: two graphs have the same name; names are {', '.join(names)}")
  for graph in manifest["graphs"]:
    for spec in graph["inputs"] + graph["outputs"]:
      if math.prod(spec["shape"]) > MAX_VALUES:
        raise BundleError(
          f"{path / MANIFEST}: '{spec['name'][:60]}' of graph '{graph['name']}' has over {MAX_VALUES} values; export "
          "the bundle again"
        )
    for part in (graph, *graph.get("variants", [])):
      if part["file"] not in manifest["sha256"]:
        raise BundleError(f"{path / MANIFEST}: sha256 has no hash of {part['file']}; export the bundle again")
  if len(manifest["sha256"]) > MAX_FILES:
    raise BundleError(f"{path / MANIFEST}: sha256 lists {len(manifest['sha256'])} files, may list {MAX_FILES}")
  for name, expected in manifest["sha256"].items():
    if "/" in name or name in (MANIFEST, "", ".", ".."):
      raise BundleError(f"{path / MANIFEST}: sha256 names {json.dumps(name)[:60]}, which is not a file of the bundle")
    try:
      actual = sha256(path / name, MAX_FILE)
    except FileNotFoundError:
      raise BundleError(
        f"{path} lacks {name.encode(errors='replace').decode()[:100]!r}, which its manifest lists; copy the whole "
        "folder again"
      ) from None
    except OSError as e:
      raise BundleError(f"{path / name} cannot be read: {e.strerror}") from None
    if actual != expected:
      raise changed(path / name, actual, expected)
  return Bundle(path, manifest, hashlib.sha256(raw).hexdigest())


def bundle_path(name: str | None, models_dir: str | Path) -> Path:
  """The folder of that name in models_dir, or with no name DEFAULT where it is there, else the first. Raises
  BundleError naming what is there."""
  models_dir = Path(models_dir)
  there = sorted(p.parent.name for p in models_dir.glob(f"*/{MANIFEST}"))
  if name:
    if "/" in name or name not in there:
      raise BundleError(
        f"no bundle '{name}' in {models_dir}; there {'are ' + ', '.join(there) if there else 'is none'}"
      )
    return models_dir / name
  if not there:
    raise BundleError(f"no bundle in {models_dir}; put one there, or name its folder with --bundle")
  return models_dir / (DEFAULT if DEFAULT in there else there[0])


def given_or_shipped(path: str | Path) -> Path:
  """A path as it was given; where nothing is there the folder of that name among the bundles that ship."""
  path = Path(path)
  return path if path.exists() else MODELS_DIR / path


def find_bundle(name: str | None, models_dir: str | Path) -> Bundle:
  """bundle_path(), loaded."""
  return load_bundle(bundle_path(name, models_dir))


def fingerprint(path: str | Path) -> tuple[tuple[str, int, int, int], ...]:
  """What of a bundle's files changes when they do: name, inode, size and time of change, without reading them; empty
  where there is no folder."""
  found = []
  with contextlib.suppress(OSError), os.scandir(path) as entries:
    for e in itertools.islice(entries, 4 * MAX_FILES):
      with contextlib.suppress(OSError):
        st = e.stat()
        found.append((e.name, st.st_ino, st.st_size, st.st_mtime_ns))
  return tuple(sorted(found))


def write_manifest(path: str | Path, manifest: dict[str, Any]) -> Bundle:
  """Adds sha256 of every file in the folder, checks against the schema and writes manifest.json atomically."""
  path = Path(path)
  manifest = {
    **normalized(manifest),
    "sha256": {
      p.name: sha256(p)
      for p in sorted(path.iterdir())
      if p.is_file() and p.name != MANIFEST and not p.name.startswith(".")
    },
  }
  if found := violation(manifest, schema()) or contradiction(manifest):
    raise BundleError(f"{path / MANIFEST} was not written: {found}")
  tmp = path / f".{MANIFEST}.tmp"
  tmp.write_text(json.dumps(manifest, indent=1) + "\n")
  os.replace(tmp, path / MANIFEST)
  return load_bundle(path)


def spec_slots(graph: dict[str, Any]) -> tuple[int, dict[str, str]] | None:
  """A graph's entry in the manifest -> the number of its point slots and the names of the inputs for points, mask and
  fresh; None without slots."""
  slots = graph.get("point_slots")
  if slots is None:
    return None
  stem = slots["mask"].removesuffix("mask")
  return slots["count"], {
    "points": slots.get("points", stem + "points"),
    "mask": slots["mask"],
    "fresh": slots.get("fresh", stem + "fresh"),
  }
