"""What is hashed is what runs: files swapped in between, weights outside the file, files that are none."""

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import convert_model_to_external_data

from fair_bundle import manifest, write_bundle
from openpilot.selfdrive.modeld.fair import bundle as bundle_module
from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle, read_file, write_manifest
from openpilot.selfdrive.modeld.fair.onnxfile import FIELDS, OnnxError, encode, whole
from openpilot.selfdrive.modeld.fair.runners import open_runner
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner

FRAME = {"frame": np.random.default_rng(0).integers(0, 256, (1, 6, 128, 256), np.uint8)}


def depth(bundle):
  return OnnxRunner(bundle, bundle.graphs[0]).run(FRAME)["depth"].copy()


@pytest.fixture
def pair(tmp_path):
  """(bundle, bytes of its graph, bytes of another one)."""
  good = write_bundle(tmp_path / "good")
  other = write_bundle(tmp_path / "other", bad=7.0, nan=True)
  return good, (good.path / "scene.onnx").read_bytes(), (other.path / "scene.onnx").read_bytes()


def test_a_file_swapped_between_hash_and_run(pair):
  good, _, other = pair
  bundle = load_bundle(good.path)
  (good.path / "scene.onnx").write_bytes(other)
  with pytest.raises(BundleError, match=r"scene.onnx has sha256 .*its manifest says"):
    OnnxRunner(bundle, bundle.graphs[0])


def test_a_file_that_is_swapped_all_the_time(pair):
  """Whatever is loaded computes what the hashed graph does."""
  good, mine, other = pair
  want, stop, path = depth(good), threading.Event(), good.path / "scene.onnx"

  def swap():
    while not stop.is_set():
      for data in (other, mine):
        new = path.with_suffix(".new")
        new.write_bytes(data)
        os.replace(new, path)

  thread = threading.Thread(target=swap)
  thread.start()
  loaded = refused = 0
  try:
    while loaded < 20 or refused < 20:
      try:
        got = depth(load_bundle(good.path))
      except BundleError:
        refused += 1
        continue
      assert np.array_equal(got, want)
      loaded += 1
  finally:
    stop.set()
    thread.join()


def external(folder, names=("weights.bin",)):
  """A bundle whose weights lie in another file, which its manifest lists if it is in `names`."""
  whole_one = write_bundle(folder)
  want = depth(whole_one)
  model = onnx.load(str(folder / "scene.onnx"))
  convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
  onnx.save(model, str(folder / "scene.onnx"))
  raw = json.loads((folder / "manifest.json").read_text())
  raw["sha256"] = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in ("scene.onnx", *names)}
  (folder / "manifest.json").write_text(json.dumps(raw))
  return load_bundle(folder), want


def test_weights_outside_that_are_listed_run_from_memory(tmp_path, monkeypatch):
  bundle, want = external(tmp_path / "b")
  monkeypatch.chdir(tmp_path)  # where ONNX Runtime would look for them
  assert np.array_equal(depth(bundle), want)
  blob = bundle.onnx(bundle.graphs[0])
  onnx.checker.check_model(onnx.load_from_string(blob))
  assert b"weights.bin" not in blob and whole(blob, None) == blob
  (bundle.path / "weights.bin").write_bytes(bytes(1000))
  with pytest.raises(BundleError, match=r"keeps weights in another file: .*weights.bin has sha256"):
    OnnxRunner(bundle, bundle.graphs[0])


@pytest.mark.parametrize("place", ["bundle", "working folder"])
def test_weights_outside_that_are_not_listed_are_refused(tmp_path, monkeypatch, place):
  bundle, _ = external(tmp_path / "b", names=())
  monkeypatch.chdir(bundle.path if place == "working folder" else tmp_path)
  with pytest.raises(
    BundleError, match=r"scene.onnx keeps weights in another file: .*sha256 has no hash of .weights.bin"
  ):
    open_runner(bundle, bundle.graphs[0])


def test_weights_of_a_graph_within_a_graph():
  """In a node's attribute, sparse, of a function: wherever a tensor may be."""
  t = onnx.TensorProto(dims=[2], data_type=1, name="t", data_location=1)
  for k, v in (("location", "w"), ("offset", "4"), ("length", "8")):
    t.external_data.add(key=k, value=v)
  data = np.arange(4, dtype=np.float32)
  inside = onnx.TensorProto(dims=[2], data_type=1, name="t", raw_data=data[1:3].tobytes())
  for kind in ("initializer", "attribute", "subgraph", "sparse", "function", "training"):
    made = []
    for tensor in (t, inside):
      model = onnx.ModelProto(ir_version=8, doc_string="x" * 300)
      node = model.graph.node.add(op_type="If", output=["y" * 200])
      a = node.attribute.add(name="a")
      if kind == "initializer":
        model.graph.initializer.add().CopyFrom(tensor)
      elif kind == "attribute":
        a.tensors.add().CopyFrom(tensor)
      elif kind == "subgraph":
        a.g.node.add().attribute.add().g.initializer.add().CopyFrom(tensor)
      elif kind == "sparse":
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
      elif kind == "function":
        model.functions.add().node.add().attribute.add().t.CopyFrom(tensor)
      else:
        model.training_info.add().algorithm.initializer.add().CopyFrom(tensor)
      made.append(model)
    got = onnx.ModelProto.FromString(whole(made[0].SerializeToString(), lambda name: data.tobytes()))
    assert got == made[1] and (kind == "initializer" or len(made[1].graph.initializer) == 0), kind


@pytest.mark.parametrize("fields", [{"data_location": 1}, {"data_location": 1, "raw_data": b"1234"}])
def test_weights_outside_that_do_not_say_where(fields):
  model = onnx.ModelProto(ir_version=8, doc_string="location")
  model.graph.initializer.add(name="t", dims=[1], data_type=1, **fields)
  with pytest.raises(OnnxError, match="does not say where"):
    whole(model.SerializeToString(), lambda name: b"")


def test_fields_are_those_of_onnx():
  for kind, inner in FIELDS.items():
    there = {f.number: f.message_type.name for f in getattr(onnx, kind).DESCRIPTOR.fields if f.message_type is not None}
    assert inner.items() <= there.items()
    # all by which a TensorProto can be reached
    assert {n for n, name in there.items() if name in (*FIELDS, "TensorProto")} == inner.keys()
  assert [
    f.number for f in onnx.TensorProto.DESCRIPTOR.fields if f.name in ("raw_data", "external_data", "data_location")
  ] == [9, 13, 14]


def test_damaged_files_are_refused_in_one_line(tmp_path):
  bundle, _ = external(tmp_path / "b")
  good, r = (bundle.path / "scene.onnx").read_bytes(), np.random.default_rng(3)
  weights, refused = (bundle.path / "weights.bin").read_bytes(), 0
  for _ in range(2000):
    bad = bytearray(good)
    for at in r.integers(0, len(bad), r.integers(1, 4)):
      bad[at] = r.integers(0, 256)
    bad = bytes(bad[: r.integers(1, len(bad))] if r.random() < 0.3 else bad)
    try:
      assert len(whole(bad, lambda name: weights)) < 2 * len(good) + len(weights)
    except OnnxError as e:
      refused += 1
      assert "\n" not in str(e)
  assert refused > 200
  with pytest.raises(OnnxError):
    whole(nested(200), lambda name: b"")


def nested(n):
  """graph within a graph, n deep, with the word location at its end."""
  inner = b""
  for _ in range(n):
    attribute = b"\x32" + encode(len(inner)) + inner
    node = b"\x2a" + encode(len(attribute)) + attribute
    inner = b"\x0a" + encode(len(node)) + node
  return b"\x3a" + encode(len(inner)) + inner + b"\x32\x08location"


def test_onnx_runtimes_own_format_is_refused(tmp_path):
  write_bundle(tmp_path)
  (tmp_path / "scene.onnx").write_bytes(b"\x10\0\0\0ORTM" + bytes(100))
  bundle = write_manifest(tmp_path, manifest())
  with pytest.raises(BundleError, match="is ONNX Runtime's own format"):
    OnnxRunner(bundle, bundle.graphs[0])


# *** files that are none ***


def damage(kind, path: Path, monkeypatch):
  path.unlink()
  if kind == "pipe":
    os.mkfifo(path)
  elif kind == "device":
    path.symlink_to("/dev/zero")
  elif kind == "folder":
    path.mkdir()
  elif kind == "large":
    monkeypatch.setattr(bundle_module, "MAX_FILE", 1 << 20)
    monkeypatch.setattr(bundle_module, "MAX_MANIFEST", 1 << 20)
    with open(path, "wb") as f:
      f.truncate(1 << 40)  # a terabyte that takes no room


@pytest.mark.parametrize("name", ["manifest.json", "scene.onnx"])
@pytest.mark.parametrize(
  ("kind", "said"),
  [
    ("pipe", "is no ordinary file"),
    ("device", "is a link"),
    ("folder", "is no ordinary file"),
    ("large", "1099511627776 bytes"),
  ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, monkeypatch, name, kind, said):
  bundle = write_bundle(tmp_path / "b")
  damage(kind, bundle.path / name, monkeypatch)
  with pytest.raises(BundleError, match=said) as e:
    load_bundle(bundle.path)
  assert "\n" not in str(e.value)
  with pytest.raises(BundleError, match=said):
    read_file(bundle.path / name, 1 << 20)


@pytest.mark.parametrize(
  ("sha256", "said"),
  [
    ({"x" * 5000: "0"}, "cannot be opened: File name too long"),
    ({"a\0b": "0"}, "cannot be opened"),
    ({"..": "0"}, "not a file of the bundle"),
    ({str(i): "0" for i in range(1000)}, "lists 1001 files, may list 64"),
  ],
)
def test_odd_lists_of_files(tmp_path, sha256, said):
  bundle = write_bundle(tmp_path / "b")
  raw = json.loads((bundle.path / "manifest.json").read_text())
  raw["sha256"].update(sha256)
  (bundle.path / "manifest.json").write_text(json.dumps(raw))
  with pytest.raises(BundleError, match=said):
    load_bundle(bundle.path)
