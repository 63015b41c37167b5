"""Artifacts: what is written is read back, what does not match is never opened, and a graph compiled by tinygrad
computes what ONNX Runtime does."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fair_bundle import lanes_graph, write_bundle, write_graphs
from openpilot.selfdrive.modeld.fair import compile as fair_compile, compile_graph as fair_compile_graph
from openpilot.selfdrive.modeld.fair.artifact import ArtifactError, read_artifact, write_artifact
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.compile import CompileError, build, missing
from openpilot.selfdrive.modeld.fair.parity import differences, sample_inputs
from openpilot.selfdrive.modeld.fair.runners.tinygrad import FLAGS, TinygradRunner, find_clang, requirements
from openpilot.selfdrive.modeld.fair.trust import mac

ROOT = Path(__file__).resolve().parents[3]
TARGET = "tinygrad-cpu"


def about(bundle, **more):
  return {"manifest": bundle.manifest_hash, "graph": "scene", "target": TARGET, **requirements(TARGET), **more}


def read(bundle, folder):
  return read_artifact(bundle, "scene", TARGET, requirements(TARGET), folder)


def test_written_is_read_back_whole_and_in_chunks(tmp_path):
  bundle, blob = write_bundle(tmp_path / "b"), bytes(range(256)) * 40
  for chunk, files in (
    (1 << 20, 1),
    (4096, 3),
    (1024, 10),
    (1 << 20, 1),
  ):  # smaller and larger again: no chunk of another cut is left
    write_artifact(tmp_path / "a", f"scene.{TARGET}", blob, about(bundle), chunk)
    got, said = read(bundle, tmp_path / "a")
    assert got == blob and len(said["files"]) == files and said["size"] == len(blob)
    there = {p.name for p in (tmp_path / "a").iterdir()}
    manifest = f"scene.{TARGET}.pkl.chunkmanifest"
    assert there == {f"scene.{TARGET}.json", *said["files"], *([manifest] if files > 1 else [])}
    if files > 1:  # as openpilot's file_chunker names and counts them
      assert said["files"][0] == f"scene.{TARGET}.pkl.chunk01of{files:02d}" and (
        tmp_path / "a" / manifest
      ).read_text() == str(files)


@pytest.mark.parametrize(
  "change, says",
  [
    ({"manifest": "0" * 64}, "was built for manifest"),
    ({"tinygrad": "0.1+0"}, "was built for tinygrad"),
    ({"flags": {"DEV": "CL"}}, "was built for flags"),
    ({"machine": "vax"}, "was built for machine"),
    ({"graph": "other"}, "was built for graph"),
    ({"target": "tinygrad-qcom"}, "was built for target"),
    ({"files": ["../../x.pkl"]}, "no files of its own"),
    ({"files": [f"scene.{TARGET}.pkl/../../x.pkl"]}, "no files of its own"),
    ({"files": []}, "no files of its own"),
    ({"format": 1}, "was built for format"),
    ({"sha256": "0" * 64}, "it was not opened"),
    ({"files": [f"scene.{TARGET}.pkl.gone"]}, "No such file"),
    ({"size": 10}, "has 100 bytes, may have 10"),
  ],
)
def test_a_sidecar_that_disagrees_is_refused(tmp_path, change, says):
  bundle = write_bundle(tmp_path / "b")
  sidecar = write_artifact(tmp_path / "a", f"scene.{TARGET}", b"x" * 100, about(bundle))
  said = {**json.loads(sidecar.read_text()), **change}
  sidecar.write_text(json.dumps(said))
  with pytest.raises(ArtifactError, match=r"was not written on this machine; it was not opened|no files of its own"):
    read(bundle, tmp_path / "a")
  sidecar.write_text(json.dumps({**said, "mac": mac(said)}))
  with pytest.raises(ArtifactError, match=says) as e:
    read(bundle, tmp_path / "a")
  assert "\n" not in str(e.value)


def test_no_artifact_and_no_json(tmp_path):
  bundle = write_bundle(tmp_path / "b")
  with pytest.raises(ArtifactError, match="no artifact"):
    read(bundle, tmp_path / "a")
  sidecar = write_artifact(tmp_path / "a", f"scene.{TARGET}", b"x", about(bundle))
  for text in (b"{", b"[]", b"\xff\xfe", b"null"):
    sidecar.write_bytes(text)
    with pytest.raises(ArtifactError):
      read(bundle, tmp_path / "a")


class Malice:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_pickle_of_another_hash_is_not_executed(tmp_path):
  """The counter-test first: the same bytes with their own hash are opened, and do what they say."""
  bundle, proof = write_bundle(tmp_path / "b"), tmp_path / "executed"
  evil = pickle.dumps(Malice(proof))
  if importlib.util.find_spec("tinygrad") is not None:  # else there is nothing that would open it
    write_artifact(tmp_path / "a", f"scene.{TARGET}", evil, about(bundle))
    code = f"""
from pathlib import Path
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.runners.tinygrad import TinygradRunner
b = load_bundle({str(bundle.path)!r})
TinygradRunner(b, b.graphs[0], {TARGET!r}, Path({str(tmp_path / 'a')!r}))
"""
    r = subprocess.run(
      [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert proof.is_dir() and "tinygrad-cpu does not start" in r.stderr  # it made a folder, and no jit
    proof.rmdir()
  write_artifact(tmp_path / "a", f"scene.{TARGET}", b"y" * len(evil), about(bundle))
  (tmp_path / "a" / f"scene.{TARGET}.pkl").write_bytes(evil)
  with pytest.raises(ArtifactError, match=r"it was not opened|not installed"):
    TinygradRunner(bundle, bundle.graphs[0], TARGET, tmp_path / "a")
  assert not proof.exists()


def test_a_write_that_is_cut_short_leaves_what_was_there(tmp_path, monkeypatch):
  bundle = write_bundle(tmp_path / "b")
  write_artifact(tmp_path / "a", f"scene.{TARGET}", b"old", about(bundle))

  def full(fd):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError):
    write_artifact(tmp_path / "a", f"scene.{TARGET}", b"new", about(bundle))
  assert read(bundle, tmp_path / "a")[0] == b"old" and len(list((tmp_path / "a").iterdir())) == 2


def test_flags_of_the_comma_four_are_openpilots():
  assert FLAGS["tinygrad-qcom"] == {
    "DEV": "QCOM",
    "IMAGE": "1",
    "FLOAT16": "1",
    "NOLOCALS": "1",
    "JIT_BATCH_SIZE": "0",
    "OPENPILOT_HACKS": "1",
  }


def test_sample_inputs_are_in_range(tmp_path):
  graph = write_graphs(tmp_path, [lanes_graph(tmp_path)]).graphs[0]
  x = sample_inputs(graph, 1)
  assert {k: (v.shape, v.dtype) for k, v in x.items()} == {
    i["name"]: (tuple(i["shape"]), np.dtype(i["dtype"])) for i in graph["inputs"]
  }
  points = x["lanes_points"]
  assert set(np.unique(x["lanes_mask"])) == set(np.unique(x["lanes_fresh"])) == {0.0, 1.0} and x["frame"].max() > 250
  assert points[..., 0].max() > 300 and points[..., 0].max() <= 511 and 150 < points[..., 1].max() <= 255
  assert all(np.array_equal(v, w) for v, w in zip(x.values(), sample_inputs(graph, 1).values(), strict=True))
  assert not np.array_equal(x["frame"], sample_inputs(graph, 2)["frame"])


def test_differences():
  want = {"a": np.array([0.0, -4.0], np.float32), "b": np.array([1.0], np.float32)}
  assert differences({"a": np.array([1.0, -4.0]), "b": np.array([1.0])}, want) == {"a": 0.25, "b": 0.0}
  assert np.isinf(differences({"a": np.array([np.nan, -4.0]), "b": want["b"]}, want)["a"])


def test_what_is_missing_is_said(tmp_path, monkeypatch):
  bundle = write_bundle(tmp_path / "b")
  assert missing("onnx") is None and build(bundle, "onnx") == []
  monkeypatch.setattr(fair_compile, "QCOM_GPU", tmp_path / "none")
  monkeypatch.setattr(fair_compile, "NVIDIA_GPU", tmp_path / "none")
  if importlib.util.find_spec("tinygrad") is not None:
    for target, says in (("tinygrad-qcom", "no Adreno GPU here"), ("tinygrad-cuda", "no NVIDIA GPU here")):
      with pytest.raises(CompileError, match=says):
        build(bundle, target)
  monkeypatch.setenv("PATH", "")
  monkeypatch.delenv("CC", raising=False)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  assert find_clang() is None and "not installed" in (missing(TARGET) or "")


def test_the_compiler_of_the_ziglang_package_is_found(tmp_path, monkeypatch):
  pytest.importorskip("ziglang")
  monkeypatch.setenv("PATH", "/bin")
  monkeypatch.delenv("CC", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  if (cc := find_clang()) == "/bin/clang":
    pytest.skip("clang is in /bin, which a shell wants")
  source = "int f(int x) { return x + 1; }"
  r = subprocess.run(
    [cc, "-c", "-x", "c", "-", "-o", "-", "--target=x86_64-none-unknown-elf"],
    input=source.encode(),
    capture_output=True,
  )
  assert r.returncode == 0 and r.stdout[:4] == b"\x7fELF"


def scons(folder, *args):
  """scons on a tree of which nothing can be imported while scons reads it: no openpilot, as in a checkout whose
  libraries are not built yet."""
  env = {**os.environ, "FAIR_MODELS_DIR": str(folder / "models"), "PYTHONPATH": ""}
  return subprocess.run(
    [sys.executable, "-P", "-m", "SCons", "-C", str(folder / "tree"), *args, "fair"],
    env=env,
    capture_output=True,
    text=True,
  )


@pytest.fixture
def tree(tmp_path):
  """A checkout with the SConscript and files of its names beside it, none of which is Python."""
  pytest.importorskip("SCons")
  fair = tmp_path / "tree" / "selfdrive" / "modeld" / "fair"
  (fair / "runners").mkdir(parents=True)
  (tmp_path / "tree" / "openpilot").mkdir()
  (tmp_path / "tree" / "openpilot" / "__init__.py").write_text("raise SystemExit('imported while scons reads')")
  (tmp_path / "tree" / "SConstruct").write_text((ROOT / "SConstruct").read_text())
  (fair / "SConscript").write_text((ROOT / "selfdrive" / "modeld" / "fair" / "SConscript").read_text())
  code = ("artifact", "trust", "compile", "compile_graph", "slim", "bundle", "onnxfile")
  for name in (*code, "runners/tinygrad", "runners/tensorrt"):
    (fair / f"{name}.py").write_text("not built yet")
  return tmp_path


def write_compiler(tree):
  """A compiler that compiles in no time."""
  fair = tree / "tree" / "openpilot" / "selfdrive" / "modeld" / "fair"
  fair.mkdir(parents=True)
  (tree / "tree" / "openpilot" / "__init__.py").write_text("")
  (fair / "compile.py").write_text("import sys; print('compiled', sys.argv[1])")


def test_scons_builds_what_changed(tree):
  """One command a bundle; a manifest that cannot be read is left out with a word. Reading imports nothing, and what
  fails to compile stops nothing."""
  for name in ("one", "two"):
    write_bundle(tree / "models" / name)
  (tree / "models" / "bad").mkdir()
  (tree / "models" / "bad" / "manifest.json").write_text("{")
  r = scons(tree, "-n")
  assert r.returncode == 0, r.stderr
  commands = [line for line in r.stdout.splitlines() if "modeld.fair.compile" in line]
  assert commands == [
    f'python -m openpilot.selfdrive.modeld.fair.compile "{tree}/models/{n}" --tree' for n in ("one", "two")
  ]
  assert "bad/manifest.json cannot be read" in r.stdout
  r = scons(tree)
  assert r.returncode == 0 and r.stdout.count("was not compiled") == 2, r.stdout + r.stderr
  # with a compiler that compiles: once, and again for what changed
  write_compiler(tree)
  assert scons(tree).stdout.count("compiled /") == 2 and scons(tree).stdout.count("compiled /") == 0
  manifest = tree / "models" / "two" / "manifest.json"
  manifest.write_text(manifest.read_text() + "\n")
  assert "compiled /" in (out := scons(tree).stdout) and f"{tree}/models/one" not in out


def test_scons_caches_no_stamp(tree):
  """openpilot's SConstruct has a cache: of it scons took the stamp, and compiled nothing, where built/ had been taken
  away, or in the next checkout."""
  write_bundle(tree / "models" / "one")
  write_compiler(tree)
  sconstruct = tree / "tree" / "SConstruct"
  sconstruct.write_text("CacheDir('cache')\n" + sconstruct.read_text())
  assert scons(tree).stdout.count("compiled /") == 1
  shutil.rmtree(tree / "tree" / "selfdrive" / "modeld" / "fair" / "built")
  assert scons(tree).stdout.count("compiled /") == 1


def test_compiling_wants_none_of_the_trees_own_libraries():
  """In a build it runs before Params, messaging and transformations are built."""
  code = """
import sys, openpilot.selfdrive.modeld.fair.compile
print([m for m in sys.modules if m.startswith(('openpilot.c', 'cereal', 'msgq'))])
"""
  r = subprocess.run(
    [sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT), "PATH": "/bin"}, capture_output=True, text=True
  )
  assert r.stdout == "[]\n", r.stdout + r.stderr


def can_compile():
  if (why := missing(TARGET)) is not None:
    pytest.skip(why)


@pytest.mark.slow
def test_tinygrad_computes_what_onnx_runtime_does(tmp_path):
  """State, point slots, a uint8 frame; read in another process, with nothing cached and no torch. 1e-4 of an output's
  largest value."""
  can_compile()
  bundle = write_graphs(tmp_path / "b", [lanes_graph((tmp_path / "b").mkdir() or tmp_path / "b")])
  (said,) = build(bundle, TARGET, timeout=300)
  assert said["parity"] <= 1e-4 and said["manifest"] == bundle.manifest_hash
  code = f"""
import sys
import numpy as np
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.parity import differences, sample_inputs
from openpilot.selfdrive.modeld.fair.runners import open_runner
b = load_bundle({str(bundle.path)!r})
g = b.graphs[0]
tiny, onnx = open_runner(b, g, {TARGET!r}), open_runner(b, g, "onnx")
assert tiny.what.startswith("tinygrad") and onnx.what == "ONNX Runtime"
x = [sample_inputs(g, 7), sample_inputs(g, 7)]
for step in range(4):
  out = [tiny.run(x[0]), onnx.run(x[1])]
  assert max(differences(*out).values()) < 1e-4, (step, differences(*out))
  for i in (0, 1):
    for s in g["state"]:
      x[i][s["input"]] = out[i][s["output"]].copy()
assert not {{"torch", "onnx"}} & set(sys.modules)
print("same")
"""
  env = {"PYTHONPATH": str(ROOT), "PATH": "/bin", "HOME": str(tmp_path), "FAIR_DATA_DIR": os.environ["FAIR_DATA_DIR"]}
  r = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert r.returncode == 0 and r.stdout == "same\n", r.stderr[-2000:]


@pytest.mark.slow
def test_a_changed_bundle_runs_in_onnx_runtime_and_says_why(tmp_path, capfd):
  can_compile()
  bundle = write_bundle(tmp_path / "b")
  command = [sys.executable, "-m", "openpilot.selfdrive.modeld.fair.compile", str(bundle.path), "--target", TARGET]
  done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
  assert done.returncode == 0 and "off from ONNX Runtime by" in done.stdout, done.stderr
  code = """
import sys
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.model import FairModel
print(next(iter(FairModel(load_bundle(sys.argv[1]), runner="tinygrad-cpu").runners.values())).what)
"""
  env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENPILOT_PREFIX": "test-compile"}
  run = [sys.executable, "-c", code, str(bundle.path)]
  first = subprocess.run(run, env=env, capture_output=True, text=True)
  assert first.stdout.startswith("tinygrad"), first.stderr
  write_bundle(tmp_path / "b", name="renamed")
  second = subprocess.run(run, env=env, capture_output=True, text=True)
  assert second.stdout == "ONNX Runtime\n" and "no artifact" in second.stderr
  assert load_bundle(tmp_path / "b").name == "renamed"


SLIM = """
import pickle
from openpilot.selfdrive.modeld.fair import compile as c
c.set_flags("tinygrad-cpu")
import numpy as np
from tinygrad import Tensor, TinyJit
from tinygrad.uop.ops import Ops, UOp
from openpilot.selfdrive.modeld.fair import slim
w = [Tensor(np.random.default_rng(i).normal(size=(8, 8)).astype(np.float32)).realize() for i in range(4)]
def step(x):
  a, b = (x @ w[0]).relu().contiguous(), (x @ w[1]).relu().contiguous()
  return {"y": ((a @ w[2]).contiguous() * (b @ w[3]).contiguous() + a).contiguous()}
jit, x = TinyJit(step, prune=True), Tensor(np.ones((8, 8), np.float32)).realize()
want = [jit(x=x)["y"].numpy() for _ in range(3)][0]
jit.captured.free_intermediates()
first = 1 << 40
def slots(jit):
  return {u.arg.slot for u in jit.captured._linear.toposort() if u.op is Ops.BUFFER and isinstance(u.device, str)}
own = slim.with_own_numbers(jit, first)
small = slim.slim(own)
captured = jit.captured   # as devices have it whose kernels are called in batches: what is called stands in a call
batch = captured._linear.replace(src=(UOp(Ops.CALL, captured._linear.dtype, (captured._linear,)),))
batch = slim.with_own_numbers(slim.rebuilt(jit, batch, captured.ret), first)
print(*(min(slots(j)) >= first for j in (own, small, batch)))
print(*(np.array_equal(j(x=x)["y"].numpy(), want) for j in (own, small)))
print(len(pickle.dumps(small)) < len(pickle.dumps(own)))
"""


def test_a_slim_jit_computes_the_same_from_buffers_of_its_own_numbers():
  """Four layers' outputs of one size and kind: two of one number would be taken for one."""
  can_compile()
  r = subprocess.run(
    [sys.executable, "-c", SLIM], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
  )
  assert r.stdout.split() == ["True"] * 6, r.stdout + r.stderr[-2000:]


class Tensor:
  def __init__(self, array):
    self.array = array

  def numpy(self):
    return self.array


class Jit:
  """Of a tinygrad that is not there: the first two calls run as they are, later ones add `off`."""

  captured = None
  made: "list[Jit]" = []

  def __init__(self, outputs, off):
    self.outputs, self.off, self.calls = outputs, off, 0
    self.made.append(self)

  def __call__(self, **inputs):
    self.calls += 1
    total = sum(float(t.numpy().sum()) for t in inputs.values()) + (self.off if self.calls > 2 else 0.0)
    return {k: Tensor(np.full(shape, total, np.float32)) for k, shape in self.outputs.items()}


@pytest.fixture
def compiled(tmp_path, monkeypatch):
  """compiled(reads, off): the bytes that are written where another process reads each form as `reads` says: right,
  wrong, or an exception."""
  bundle = write_bundle(tmp_path / "b")
  graph = bundle.graphs[0]
  outputs = {o["name"]: o["shape"] for o in graph["outputs"]}
  arrays = {i["name"]: np.zeros(i["shape"], i["dtype"]) for i in graph["inputs"]}

  def begin(reads, off=0.0):
    monkeypatch.setattr(fair_compile_graph, "number_from", lambda first: None)
    monkeypatch.setattr(fair_compile_graph, "parity", lambda *_: None)
    monkeypatch.setattr(
      fair_compile_graph, "make_jit", lambda *_: (Jit(outputs, off), arrays, {k: Tensor(v) for k, v in arrays.items()})
    )
    for form in ("light", "whole", "as_it_is"):
      monkeypatch.setattr(fair_compile_graph, form, lambda *_, form=form: form.encode())

    def read_back(blob, *_):
      answer = reads[blob.decode()]
      if answer == "raises":
        raise ImportError("cannot import name 'TinyELF'")
      total = sum(float(v.sum()) for v in sample_inputs(graph, 2).values())
      return {k: np.full(shape, total if answer == "right" else 0.0, np.float32) for k, shape in outputs.items()}

    monkeypatch.setattr(fair_compile_graph, "read_back", read_back)
    said = fair_compile_graph.compile_graph(bundle, graph, TARGET, tmp_path / "a")
    return read(bundle, tmp_path / "a")[0], said

  return begin


@pytest.mark.parametrize(
  "reads, written",
  [
    ({"light": "right"}, b"light"),
    ({"light": "raises", "whole": "right"}, b"whole"),
    ({"light": "wrong", "whole": "raises", "as_it_is": "right"}, b"as_it_is"),
  ],
)
def test_written_is_the_smallest_form_that_another_process_reads_right(compiled, reads, written):
  blob, said = compiled(reads)
  assert blob == written and said["unjitted"] == 0.0 and said["parity"] is None
  assert Jit.made[-1].calls == 4 + (
    written == b"as_it_is"
  )  # its memory, which was given back, is taken again for that form alone


@pytest.mark.parametrize(
  "last, says",
  [("wrong", "it computes something else when it is read back"), ("raises", "cannot import name 'TinyELF'")],
)
def test_a_jit_that_no_other_process_reads_right_is_not_written(compiled, tmp_path, last, says):
  with pytest.raises(CompileError, match=says) as e:
    compiled({"light": "wrong", "whole": "raises", "as_it_is": last})
  assert "\n" not in str(e.value) and not (tmp_path / "a").exists()


def test_a_jit_that_is_not_what_tinygrad_computes_without_it_is_refused(compiled):
  """With no ONNX Runtime to compare with."""
  with pytest.raises(CompileError, match=r"in tinygrad-cpu is off from tinygrad without its jit by"):
    compiled({"light": "right"}, off=1e6)


def test_a_tinygrad_that_does_not_compile_is_told_in_one_line(tmp_path, monkeypatch):
  """Whatever it raises: it is of another time."""
  bundle = write_bundle(tmp_path / "b")

  def older(*_):
    raise ImportError("cannot import name 'UOp'\nTo fix, ...")

  monkeypatch.setattr(fair_compile_graph, "number_from", older)
  with pytest.raises(CompileError, match=r"does not compile it for tinygrad-cpu: cannot import name 'UOp'$"):
    fair_compile_graph.compile_graph(bundle, bundle.graphs[0], TARGET, tmp_path / "a")


BUILT_AS_IT_IS = """
import importlib.util
import sys
from pathlib import Path
from openpilot.selfdrive.modeld.fair import compile as c
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
c.set_flags("tinygrad-cpu")
sys.modules["openpilot.selfdrive.modeld.fair.slim"] = None  # as where it cannot be imported
sys.modules["onnxruntime"] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "onnxruntime" else find(name, *args)
b = load_bundle(sys.argv[1])
said = c.compile_graph(b, b.graphs[0], "tinygrad-cpu", c.folder_of(b))
print(said["parity"], said["unjitted"] <= 1e-4)
"""
BUILT_WHOLE = """
import sys
from pathlib import Path
from openpilot.selfdrive.modeld.fair import compile as c
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
c.set_flags("tinygrad-cpu")
from openpilot.selfdrive.modeld.fair import slim
def another(jit):
  raise AttributeError("a tinygrad whose jits look otherwise")
slim.slim = another
b = load_bundle(sys.argv[1])
c.compile_graph(b, b.graphs[0], "tinygrad-cpu", c.folder_of(b))
"""


@pytest.mark.slow
def test_two_networks_of_one_shape_in_one_process_keep_their_own_weights(tmp_path):
  """As when a bundle is replaced while it runs: each was compiled in a process of its own, where tinygrad counts
  buffers from 0. One of them could not be made smaller, one was written as it is and without ONNX Runtime, and no
  compiler is there when they run."""
  can_compile()
  bundles = [write_bundle(tmp_path / f"b{i}", nan=True, bad=bias) for i, bias in enumerate((1.0, 2.5, 4.0))]
  small = build(bundles[0], TARGET, timeout=300)[0]["size"]
  env = {**os.environ, "PYTHONPATH": str(ROOT)}
  r = subprocess.run([sys.executable, "-c", BUILT_WHOLE, str(bundles[1].path)], env=env, capture_output=True, text=True)
  assert r.returncode == 0 and len(read(bundles[1], None)[0]) > small, r.stderr
  r = subprocess.run(
    [sys.executable, "-c", BUILT_AS_IT_IS, str(bundles[2].path)], env=env, capture_output=True, text=True
  )
  assert r.returncode == 0 and r.stdout == "None True\n" and len(read(bundles[2], None)[0]) > small, r.stdout + r.stderr
  code = f"""
import sys
import numpy as np
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.parity import sample_inputs
from openpilot.selfdrive.modeld.fair.runners import make_runner
loaded = [(b, make_runner({TARGET!r}, b, b.graphs[0])) for b in map(load_bundle, {[str(b.path) for b in bundles]!r})]
depths = []
for bundle, runner in loaded * 2:
  x = sample_inputs(bundle.graphs[0], 3)
  depths.append(runner.run(x)["depth"].copy())
  assert np.allclose(depths[-1], make_runner("onnx", bundle, bundle.graphs[0]).run(x)["depth"], rtol=1e-4)
assert np.allclose(depths[1] - depths[0], 1.5, atol=1e-3) and np.allclose(depths[2] - depths[1], 1.5, atol=1e-3)
assert all(np.array_equal(depths[i], depths[i + 3]) for i in range(3))
print("own")
"""
  env = {
    "PYTHONPATH": str(ROOT),
    "PATH": "/nowhere",
    "HOME": str(tmp_path),
    "CC": "/nowhere/cc",
    "FAIR_DATA_DIR": os.environ["FAIR_DATA_DIR"],
  }
  r = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
  assert r.returncode == 0 and r.stdout == "own\n", r.stderr[-2000:]
