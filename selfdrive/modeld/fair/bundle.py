"""Student bundles: a folder with ONNX graphs and a manifest.json that says all that the runtime needs. Here it is read, checked and, for the tools, written."""

import contextlib
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MODELS_DIR = Path(os.environ.get("FAIR_MODELS_DIR") or Path(__file__).resolve().parents[3] / "models")
SCHEMA_PATH = Path(__file__).with_name("bundle.schema.json")
MANIFEST = "manifest.json"
DEFAULT = "fair_unified_small"  # what runs where nothing is named
MAX_MESSAGE = 1500  # characters
MAX_VALUES = 1 << 26  # of one input or output
TYPES: dict[str, tuple[type, ...]] = {"object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int,), "boolean": (bool,)}


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


@cache
def schema() -> dict[str, Any]:
  return json.loads(SCHEMA_PATH.read_text())


def violation(value: Any, rule: dict[str, Any], at: str = "manifest") -> str | None:
  """The first breach of a JSON Schema by `value`, or None. Knows the keywords that bundle.schema.json uses: the device has no jsonschema package."""
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
    for k, v in value.items():
      if k in rule.get("properties", {}):
        if found := violation(v, rule["properties"][k], f"{at}.{k}"):
          return found
      elif rule.get("additionalProperties") is False:
        return f"{at}.{json.dumps(k)[1:-1][:60]} is not known"
  return None


def no_number(text: str) -> None:
  raise ValueError(f"{text} is no number")


def sha256(path: Path) -> str:
  h = hashlib.sha256()
  with open(path, "rb") as f:
    while chunk := f.read(1 << 20):
      h.update(chunk)
  return h.hexdigest()


def load_bundle(path: str | Path) -> Bundle:
  """Reads and checks a bundle folder: manifest against the schema, every file against its hash. Raises BundleError with one line on anything wrong."""
  path = Path(path)
  if not path.is_dir():
    raise BundleError(f"no bundle at {path}; a bundle is a folder with {MANIFEST} and its ONNX files")
  try:
    raw = (path / MANIFEST).read_bytes()
  except OSError:
    raise BundleError(f"{path} has no readable {MANIFEST}; export the bundle again") from None
  try:
    manifest = json.loads(raw, parse_constant=no_number)
  except (ValueError, RecursionError) as e:
    raise BundleError(f"{path / MANIFEST} is not JSON ({e}); export the bundle again") from None
  if found := violation(manifest, schema()):
    raise BundleError(f"{path / MANIFEST}: {found}")
  names = [g["name"] for g in manifest["graphs"]]
  if len(set(names)) != len(names):
    raise BundleError(f"{path / MANIFEST}: two graphs have the same name; names are {', '.join(names)}")
  for graph in manifest["graphs"]:
    for spec in graph["inputs"] + graph["outputs"]:
      if math.prod(spec["shape"]) > MAX_VALUES:
        raise BundleError(f"{path / MANIFEST}: '{spec['name'][:60]}' of graph '{graph['name']}' has over {MAX_VALUES} values; export the bundle again")
    if graph["file"] not in manifest["sha256"]:
      raise BundleError(f"{path / MANIFEST}: sha256 has no hash of {graph['file']}; export the bundle again")
  for name, expected in manifest["sha256"].items():
    if "/" in name or name == MANIFEST:
      raise BundleError(f"{path / MANIFEST}: sha256 names {json.dumps(name)[:60]}, which is not a file of the bundle")
    if not (path / name).is_file():
      raise BundleError(f"{path} lacks {name.encode(errors='replace').decode()[:100]!r}, which its manifest lists; copy the whole folder again")
    if (actual := sha256(path / name)) != expected:
      raise BundleError(
        f"{path / name} has sha256 {actual[:12]}..., its manifest says {str(expected)[:12]}...; it was changed or cut short: copy or export it again"
      )
  return Bundle(path, manifest, hashlib.sha256(raw).hexdigest())


def bundle_path(name: str | None, models_dir: str | Path) -> Path:
  """The folder of that name in models_dir, or with no name DEFAULT where it is there, else the first. Raises BundleError naming what is there."""
  models_dir = Path(models_dir)
  there = sorted(p.parent.name for p in models_dir.glob(f"*/{MANIFEST}"))
  if name:
    if "/" in name or name not in there:
      raise BundleError(f"no bundle '{name}' in {models_dir}; there {'are ' + ', '.join(there) if there else 'is none'}")
    return models_dir / name
  if not there:
    raise BundleError(f"no bundle in {models_dir}; put one there, or name its folder with --bundle")
  return models_dir / (DEFAULT if DEFAULT in there else there[0])


def find_bundle(name: str | None, models_dir: str | Path) -> Bundle:
  """bundle_path(), loaded."""
  return load_bundle(bundle_path(name, models_dir))


def fingerprint(path: str | Path) -> tuple[tuple[str, int, int, int], ...]:
  """What of a bundle's files changes when they do: name, inode, size and time of change, without reading them; empty where there is no folder."""
  found = []
  with contextlib.suppress(OSError), os.scandir(path) as entries:
    for e in entries:
      with contextlib.suppress(OSError):
        st = e.stat()
        found.append((e.name, st.st_ino, st.st_size, st.st_mtime_ns))
  return tuple(sorted(found))


def write_manifest(path: str | Path, manifest: dict[str, Any]) -> Bundle:
  """Adds sha256 of every file in the folder, checks against the schema and writes manifest.json atomically."""
  path = Path(path)
  manifest = {**manifest, "sha256": {p.name: sha256(p) for p in sorted(path.iterdir()) if p.is_file() and p.name != MANIFEST and not p.name.startswith(".")}}
  if found := violation(manifest, schema()):
    raise BundleError(f"{path / MANIFEST} was not written: {found}")
  tmp = path / f".{MANIFEST}.tmp"
  tmp.write_text(json.dumps(manifest, indent=1) + "\n")
  os.replace(tmp, path / MANIFEST)
  return load_bundle(path)


def spec_slots(graph: dict[str, Any]) -> tuple[int, dict[str, str]] | None:
  """A graph's entry in the manifest -> the number of its point slots and the names of the inputs for points, mask and fresh; None without slots."""
  slots = graph.get("point_slots")
  if slots is None:
    return None
  stem = slots["mask"].removesuffix("mask")
  return slots["count"], {"points": slots.get("points", stem + "points"), "mask": slots["mask"], "fresh": slots.get("fresh", stem + "fresh")}
