import copy
import hashlib
import json
import random
import shutil
import subprocess
import sys

import jsonschema
import numpy as np
import pytest

from fair_bundle import lanes_graph, manifest, objects_graph, write_bundle, write_graphs
from openpilot.selfdrive.modeld.fair.bundle import (
  DEFAULT,
  BundleError,
  find_bundle,
  load_bundle,
  schema,
  violation,
  write_manifest,
)
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.roles import FORMER


@pytest.fixture
def bundle(tmp_path):
  return write_bundle(tmp_path / "tiny").path


def edit(bundle, change):
  m = json.loads((bundle / "manifest.json").read_text())
  change(m)
  (bundle / "manifest.json").write_text(json.dumps(m))


def classes(*names):
  """Of the class maps: these, and others up to as many as there are channels."""

  def change(m):
    out = m["graphs"][0]["outputs"][1]
    out["classes"], out["roles"] = [*names, *"abcde"[len(names) :]], {}

  return change


def doubled(entries):
  entries.append(copy.deepcopy(entries[0]))


def states_into_one_input(m):
  one = {"input": "in", "initial": 0, "reset": "gap"}
  m["graphs"][0]["state"] = [{**one, "output": name} for name in ("first", "second")]


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
  r"outputs\[1\]\.roles\.road is \"grund\", must be one of background, ground, marking, movable": lambda b: edit(
    b, lambda m: m["graphs"][0]["outputs"][1].update(roles={"road": "grund"})
  ),
  r"roles\.road must be of type string": lambda b: edit(
    b, lambda m: m["graphs"][0]["outputs"][1].update(roles={"road": ["ground"]})
  ),
  "has a role for 'pothole', which is none of its classes; export": lambda b: edit(
    b, lambda m: m["graphs"][0]["outputs"][1].update(roles={"pothole": "ground"})
  ),
  "output 'depth' has a role for 'road', which is none": lambda b: edit(
    b, lambda m: m["graphs"][0]["outputs"][0].update(roles={"road": "ground"})
  ),
  r"input\.kind is \"bgr\", must be one of model_frame, rgb": lambda b: edit(
    b, lambda m: m.update(input={"kind": "bgr", "height": 256, "width": 512})
  ),
  r"input\.height is 250, must be a multiple of 32": lambda b: edit(
    b, lambda m: m.update(input={"kind": "rgb", "height": 250, "width": 512})
  ),
  r"takes frames \[1, 6, 128, 256\], by its input they are \[1, 3, 480, 640\]": lambda b: edit(
    b, lambda m: m.update(input={"kind": "rgb", "height": 480, "width": 640})
  ),
  "input.view is not the bundle's view 'medmodel'": lambda b: edit(
    b, lambda m: m.update(input={"kind": "model_frame", "height": 256, "width": 512, "view": "sbigmodel"})
  ),
  r"output 'segmentation' has two classes called 'road'": lambda b: edit(b, classes("road", "lane", "road")),
  r"output 'segmentation' has two classes called 'two wheeler'": lambda b: edit(
    b, classes("two-wheeler", "lane", "Two_Wheeler ")
  ),
  r"output 'segmentation' has a class called \"\", which is no name": lambda b: edit(b, classes("")),
  r"has a class called \"\\u001b\[31mcar\", which is no name": lambda b: edit(b, classes("\x1b[31mcar")),
  "streams names 'narrowRoad' twice": lambda b: edit(b, lambda m: m.update(streams=["narrowRoad"] * 2)),
  "graph 'scene' has the input 'frame' twice": lambda b: edit(b, lambda m: doubled(m["graphs"][0]["inputs"])),
  "graph 'scene' has the output 'depth' twice": lambda b: edit(
    b, lambda m: doubled(m["graphs"][0]["outputs"]) or m["graphs"][0]["outputs"][-1].pop("head")
  ),
  "graph 'scene' has the state's input 'in' twice": lambda b: edit(b, states_into_one_input),
  r"it has \"version\" twice in one object": lambda b: (b / "manifest.json").write_text(
    (b / "manifest.json").read_text().replace('"version": "1"', '"version": "2", "version": "1"')
  ),
  r"history\[0\]\.frames is 1000*, must be at most": lambda b: edit(
    b, lambda m: m["provenance"].update(history=[{"steps": 1, "frames": 10**400}])
  ),
  r"provenance\.licence is not known": lambda b: edit(
    b, lambda m: m["provenance"].update(licence="MIT", license="MIT")
  ),
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


@pytest.mark.parametrize("head", ["objects", "lanes"])
def test_what_is_followed_is_one_graphs(tmp_path, head):
  """Two of them: the objects of one were lost, and lines were sent twice a frame, under the same ids."""
  if head == "lanes":
    graph = lanes_graph(tmp_path)
  else:
    raw = {"heat": np.full((1, 3, 32, 64), -9, np.float32), "box": np.full((1, 4, 32, 64), 20, np.float32)}
    graph = objects_graph(tmp_path, raw)
  FairModel(write_graphs(tmp_path, [graph]))
  with pytest.raises(BundleError, match=rf"graph 'two' has the head '{head}', as has graph '{graph['name']}'"):
    FairModel(write_graphs(tmp_path, [graph, {**graph, "name": "two"}]))


def test_the_former_spelling_of_license_is_read_and_the_present_one_written(bundle):
  teacher = {"model": "m", "checkpoint_hash": "0"}

  def as_before(m):
    provenance = m["provenance"]
    provenance["licence"] = provenance.pop("license")
    provenance["teachers"] = [{**teacher, "licence": "Apache-2.0"}]

  edit(bundle, as_before)
  before = (bundle / "manifest.json").read_bytes()
  b = load_bundle(bundle)
  assert b.manifest["provenance"]["license"] == "MIT" and b.manifest_hash == hashlib.sha256(before).hexdigest()
  assert b.manifest["provenance"]["teachers"] == [{**teacher, "license": "Apache-2.0"}]
  write_manifest(bundle, json.loads(before))
  assert '"licence"' not in (bundle / "manifest.json").read_text()
  assert load_bundle(bundle).manifest["provenance"] == b.manifest["provenance"]


def test_what_contradicts_itself_is_not_written(bundle):
  before = (bundle / "manifest.json").read_bytes()
  m = manifest()
  m["graphs"][0]["outputs"][1]["roles"] = {"pothole": "ground"}
  with pytest.raises(BundleError, match="was not written: output 'segmentation' has a role for 'pothole'"):
    write_manifest(bundle, m)
  assert (bundle / "manifest.json").read_bytes() == before and not list(bundle.glob(".*"))


@pytest.mark.parametrize("roles", [None, {"lane": "background"}])
def test_roles_are_the_manifests_or_those_of_the_names_before(bundle, roles):
  """Whatever the classes are called: what has a role is looked for by it."""
  names = ["background", "road", "lane", "vehicle", "pedestrian"]
  if roles is not None:  # names that say something else than their roles
    roles = {"vehicle": "ground", "road": "marking", "pedestrian": "marking"}
    edit(bundle, lambda m: m["graphs"][0]["outputs"][1].update(roles=roles))
  model = FairModel(load_bundle(bundle))
  channels = model.plans[0].heads["segmentation"]["segmentation"]["channels"]
  want = {"background": (0,), "ground": (1,), "marking": (2,), "movable": (3, 4)}
  assert channels == (want if roles is None else {"background": (), "ground": (3,), "marking": (1, 4), "movable": ()})
  assert roles is not None or [FORMER[n] for n in names] == ["background", "ground", "marking", "movable", "movable"]


def test_a_bundle_of_other_pictures_loads_and_fairmodeld_refuses_it(bundle):
  said = {"kind": "rgb", "height": 480, "width": 640, "letterbox": True, "pad": 114}

  def takes_rgb(m):
    m["input"] = said
    m["graphs"][0]["inputs"][0]["shape"] = [1, 3, 480, 640]

  edit(bundle, lambda m: m.update(input={"kind": "model_frame", "height": 256, "width": 512}))
  FairModel(load_bundle(bundle))
  edit(bundle, takes_rgb)
  b = load_bundle(bundle)  # to be judged, converted, shown
  with pytest.raises(BundleError, match=r"takes RGB pictures of 640x480; fairmodeld makes .* 512x256 alone\. Judge it"):
    FairModel(b)


def test_not_an_onnx_file(tmp_path):
  b = write_bundle(tmp_path / "b").path
  (b / "scene.onnx").write_bytes(b"no graph")
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
  base["input"] = {"kind": "model_frame", "height": 256, "width": 512, "view": "medmodel", "letterbox": True, "pad": 0}
  base["graphs"][0]["outputs"][1]["roles"] = {"road": "ground", "lane": "marking"}
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
