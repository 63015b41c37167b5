import copy
import json
import random
import shutil
import subprocess
import sys

import jsonschema
import pytest

from fair_bundle import manifest, write_bundle
from openpilot.selfdrive.modeld.fair.bundle import DEFAULT, BundleError, find_bundle, load_bundle, schema, violation
from openpilot.selfdrive.modeld.fair.model import FairModel


@pytest.fixture
def bundle(tmp_path):
  return write_bundle(tmp_path / "tiny").path


def edit(bundle, change):
  m = json.loads((bundle / "manifest.json").read_text())
  change(m)
  (bundle / "manifest.json").write_text(json.dumps(m))


def test_loads(bundle):
  b = load_bundle(bundle)
  assert b.name == "tiny" and b.graphs[0]["name"] == "scene" and len(b.manifest_hash) == 64
  assert find_bundle(None, bundle.parent).name == find_bundle("tiny", bundle.parent).name == "tiny"
  write_bundle(bundle.parent / "a", name="a")
  assert find_bundle(None, bundle.parent).name == "a"  # the first
  write_bundle(bundle.parent / DEFAULT, name=DEFAULT)
  assert find_bundle(None, bundle.parent).name == DEFAULT


BREAK = {
  "no bundle at": lambda b: shutil.rmtree(b),
  "no readable manifest.json": lambda b: (b / "manifest.json").unlink(),
  "is not JSON": lambda b: (b / "manifest.json").write_text("{"),
  r"manifest\.graphs\[0\]\.period must be of type integer": lambda b: edit(
    b, lambda m: m["graphs"][0].update(period="1")
  ),
  r"manifest\.view is missing": lambda b: edit(b, lambda m: m.pop("view")),
  r"manifest\.color is not known": lambda b: edit(b, lambda m: m.update(color=1)),
  "its manifest says": lambda b: (b / "scene.onnx").write_bytes(b"x"),
  "lacks 'scene.onnx'": lambda b: (b / "scene.onnx").unlink(),
  "has no hash of scene.onnx": lambda b: edit(b, lambda m: m.update(sha256={})),
  'sha256 names "manifest.json"': lambda b: edit(b, lambda m: m["sha256"].update({"manifest.json": "0"})),
  "not a file of the bundle": lambda b: edit(b, lambda m: m["sha256"].update({"../x": "0"})),
}


@pytest.mark.parametrize("message", BREAK)
def test_each_breakage_is_one_clear_line(bundle, message):
  BREAK[message](bundle)
  with pytest.raises(BundleError, match=message) as e:
    load_bundle(bundle)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  ("message", "change"),
  [
    ("input 'frame' is uint8", lambda m: m["graphs"][0]["inputs"][0].update(shape=[1, 6, 64, 256])),
    ("outputs are depth, segmentation", lambda m: m["graphs"][0]["outputs"][0].update(name="other")),
    ("wants the head 'nose'", lambda m: m["graphs"][0]["outputs"][0].update(head="nose")),
    ("5 channels and 2 classes", lambda m: m["graphs"][0]["outputs"][1].update(classes=["a", "b"])),
  ],
)
def test_graphs_that_disagree_with_the_manifest(bundle, message, change):
  edit(bundle, change)
  with pytest.raises(BundleError, match=message):
    FairModel(load_bundle(bundle))


def test_not_an_onnx_file(tmp_path):
  b = write_bundle(tmp_path / "b").path
  (b / "scene.onnx").write_bytes(b"no graph")
  from openpilot.selfdrive.modeld.fair.bundle import write_manifest

  write_manifest(b, manifest())
  with pytest.raises(BundleError, match="ONNX Runtime"):
    FairModel(load_bundle(b))


def test_missing_name_says_what_is_there(bundle):
  with pytest.raises(BundleError, match=r"no bundle 'x' in .*there are tiny"):
    find_bundle("x", bundle.parent)


def mutate(value, r: random.Random):
  """A copy with one node replaced, removed or added, at random."""
  value = copy.deepcopy(value)
  node, path = value, []
  while isinstance(node, (dict, list)) and node and (not path or r.random() < 0.75):
    key = r.choice(list(node)) if isinstance(node, dict) else r.randrange(len(node))
    path.append((node, key))
    node = node[key]
  parent, key = path[-1]
  action = r.randrange(4)
  if action == 0 and isinstance(parent, dict):
    del parent[key]
  elif action == 1 and isinstance(parent, dict):
    parent["extra"] = 1
  else:
    parent[key] = r.choice([None, True, 0, -1, 1.5, "", "Bad Name", [], {}, [1], {"a": 1}, "narrowRoad"])
  return value


def test_own_validator_agrees_with_jsonschema():
  r = random.Random(1)
  reference = jsonschema.Draft202012Validator(schema())
  base = {**manifest(), "sha256": {"scene.onnx": "0"}}
  assert reference.is_valid(base) and violation(base, schema()) is None
  valid = 0
  for _ in range(1500):
    m = mutate(base, r)
    expected = reference.is_valid(m)
    valid += expected
    assert (violation(m, schema()) is None) == expected, (
      violation(m, schema()),
      [e.message for e in reference.iter_errors(m)],
    )
  assert 50 < valid < 1450


def test_by_hand_a_bad_bundle_ends_with_2_and_one_line(tmp_path, prefix):
  r = subprocess.run(
    [sys.executable, "-m", "openpilot.selfdrive.modeld.fair.fairmodeld", "--bundle", str(tmp_path / "none")],
    capture_output=True,
    text=True,
  )
  assert r.returncode == 2 and r.stderr.startswith("error: no bundle at") and r.stderr.count("\n") == 1
