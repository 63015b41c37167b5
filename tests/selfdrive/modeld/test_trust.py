"""Compiled artifacts are code: only this machine's own, or the tree's, are ever opened. And who compiles them, when."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fair_bundle import write_bundle
from openpilot.common.params import Params
from openpilot.selfdrive.modeld.fair import artifact, runners, trust
from openpilot.selfdrive.modeld.fair import compile as fair_compile
from openpilot.selfdrive.modeld.fair.artifact import (
  ArtifactError,
  folder_of,
  read_artifact,
  tree_folder,
  write_artifact,
)
from openpilot.selfdrive.modeld.fair.bundle import BundleError
from openpilot.selfdrive.modeld.fair.compile import CompileError, lacking
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.selfdrive.modeld.fair.runners import open_runner
from openpilot.selfdrive.modeld.fair.runners.tinygrad import requirements
from openpilot.selfdrive.modeld.fair.trust import KEY_SIZE, TrustError, data_root, machine_key

ROOT = Path(__file__).resolve().parents[3]
TARGET = "tinygrad-cpu"
NAME = f"scene.{TARGET}"


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
  monkeypatch.setenv("FAIR_DATA_DIR", str(tmp_path / "data"))


def about(bundle):
  return {"manifest": bundle.manifest_hash, "graph": "scene", "target": TARGET, **requirements(TARGET)}


def read(bundle, folder=None):
  return read_artifact(bundle, "scene", TARGET, requirements(TARGET), folder)[0]


def write(bundle, blob=b"ours", folder=None):
  return write_artifact(folder or folder_of(bundle), NAME, blob, about(bundle))


class Malice:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (str(self.path),)


def test_a_pickle_that_comes_with_a_bundle_is_not_executed(tmp_path, capfd, monkeypatch):
  """All that its sidecar says can be computed by whoever made it, the MAC of a key of his own included."""
  bundle, proof = write_bundle(tmp_path / "b"), tmp_path / "executed"
  evil = pickle.dumps(Malice(proof))
  monkeypatch.setenv("FAIR_DATA_DIR", str(tmp_path / "his"))
  write(bundle, evil, bundle.path / "compiled")
  monkeypatch.setenv("FAIR_DATA_DIR", str(tmp_path / "data"))
  for _ in range(2):
    assert open_runner(bundle, bundle.graphs[0], TARGET).what == "ONNX Runtime"
  err = capfd.readouterr().err
  assert (
    err.count("compiled came with the bundle and is ignored: what runs here is compiled here") == 1
    and "no artifact" in err
  )
  with pytest.raises(ArtifactError, match="nothing was compiled here yet"):
    read(bundle, bundle.path / "compiled")
  machine_key(make=True)
  with pytest.raises(ArtifactError, match="was not written on this machine; it was not opened"):
    read(bundle, bundle.path / "compiled")
  # nor from where ours lie
  shutil.copytree(bundle.path / "compiled", folder_of(bundle))
  with pytest.raises(ArtifactError, match="was not written on this machine"):
    read(bundle)
  assert open_runner(bundle, bundle.graphs[0], TARGET).what == "ONNX Runtime" and not proof.exists()


def test_ours_lie_outside_the_bundle(tmp_path):
  bundle = write_bundle(tmp_path / "b")
  sidecar = write(bundle)
  assert (
    read(bundle) == b"ours"
    and data_root() in sidecar.parents
    and {p.name for p in bundle.path.iterdir()} == {"manifest.json", "scene.onnx"}
  )
  (sidecar.parent / f"{NAME}.pkl").write_bytes(b"hers")
  with pytest.raises(ArtifactError, match="its sidecar says"):
    read(bundle)


def test_each_entry_is_under_the_mac(tmp_path):
  bundle = write_bundle(tmp_path / "b")
  sidecar = write(bundle)
  said = json.loads(sidecar.read_text())
  for key, value in said.items():
    for other in (
      {**said, key: "0" * 64 if key == "mac" else [f"{NAME}.other"] if key == "files" else "other"},
      {k: v for k, v in said.items() if k != key},
    ):
      sidecar.write_text(json.dumps(other))
      with pytest.raises(ArtifactError, match=r"was not written on this machine|names no files"):
        read(bundle)
    assert value is not None
  sidecar.write_text(json.dumps({**said, "more": 1}))
  with pytest.raises(ArtifactError, match="was not written on this machine"):
    read(bundle)


@pytest.mark.parametrize("kind", ["pipe", "device", "large", "deep"])
def test_a_sidecar_that_is_no_file(tmp_path, kind):
  bundle = write_bundle(tmp_path / "b")
  sidecar = write(bundle)
  sidecar.unlink()
  if kind == "pipe":
    os.mkfifo(sidecar)
  elif kind == "device":
    sidecar.symlink_to("/dev/zero")
  elif kind == "large":
    with open(sidecar, "wb") as f:
      f.truncate(1 << 40)
  else:
    sidecar.write_text("[" * 60_000)
  with pytest.raises(ArtifactError) as e:
    read(bundle)
  assert "\n" not in str(e.value)


# *** the key ***


def test_the_key_is_private_and_stays():
  key = machine_key(make=True)
  path = data_root() / "key"
  assert (
    len(key) == KEY_SIZE and path.stat().st_mode & 0o777 == 0o600 and machine_key() == key == machine_key(make=True)
  )
  assert [p.name for p in data_root().iterdir()] == ["key"] and data_root().stat().st_mode & 0o077 == 0
  data_root().chmod(0o777)
  assert machine_key() == key and data_root().stat().st_mode & 0o022 == 0


def test_of_two_that_make_the_key_one_stays(monkeypatch):
  real, made = os.urandom, []

  def late(n):  # the other one is faster
    monkeypatch.setattr(os, "urandom", real)
    made.append(machine_key(make=True))
    return real(n)

  monkeypatch.setattr(os, "urandom", late)
  assert machine_key(make=True) == made[0] == machine_key()


def bad_key(kind, path, tmp_path):
  if kind == "mode":
    path.chmod(0o640)
  elif kind == "owner":
    if os.geteuid() != 0:
      pytest.skip("giving a file away is root's")
    os.chown(path, 12345, -1)
  elif kind == "link":
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
  elif kind == "short":
    path.write_bytes(b"x")
  elif kind == "pipe":
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
  ("kind", "said"),
  [
    ("mode", r"can be read or written by others \(mode 0640\)"),
    ("owner", "belongs to another user"),
    ("link", "cannot be used"),
    ("short", "has 1 bytes"),
    ("pipe", "is no file"),
  ],
)
def test_a_key_that_others_may_know_is_not_used(tmp_path, kind, said):
  bundle = write_bundle(tmp_path / "b")
  write(bundle)
  bad_key(kind, data_root() / "key", tmp_path)
  for make in (False, True):
    with pytest.raises(TrustError, match=said):
      machine_key(make)
  with pytest.raises(ArtifactError, match=f"is not trusted: .*{said}"):
    read(bundle)
  with pytest.raises(TrustError):
    write(bundle)


def test_a_folder_of_another_user_is_not_used(tmp_path):
  if os.geteuid() != 0:
    pytest.skip("giving a folder away is root's")
  data_root().mkdir()
  os.chown(data_root(), 12345, -1)
  with pytest.raises(TrustError, match="belongs to another user"):
    machine_key(make=True)


def test_where_data_lie(monkeypatch, tmp_path):
  monkeypatch.delenv("FAIR_DATA_DIR")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  assert data_root() == tmp_path / "openpilot-fair"
  monkeypatch.setattr(os.path, "isfile", lambda p: p == "/TICI")
  assert data_root() == Path("/data/fair")


# *** the tree's own ***


@pytest.fixture
def tree(tmp_path, monkeypatch):
  code = tmp_path / "tree" / "trust.py"
  code.parent.mkdir()
  code.write_text("")
  for module in (trust, artifact):
    monkeypatch.setattr(module, "BUILT", code.parent / "built")
  monkeypatch.setattr(trust, "CODE", code)
  return code.parent


def test_what_the_trees_build_wrote_is_trusted_as_the_code_is(tmp_path, tree, monkeypatch):
  bundle = write_bundle(tmp_path / "b")
  sidecar = write(bundle, b"the tree's", tree_folder(bundle))
  assert (
    sidecar.parent.parent == tree / "built" and not data_root().exists()
  )  # it wants no key, and may come from another machine
  assert read(bundle) == b"the tree's"
  write(bundle, b"ours")
  assert read(bundle) == b"ours"
  shutil.rmtree(data_root())
  listing = sidecar.parent / trust.LIST
  good, said_then = listing.read_text(), sidecar.read_text()
  for change, said in (
    (lambda: listing.write_text("{}"), "was not written by the build of this tree"),
    (lambda: listing.write_text("["), "is no list of artifacts"),
    (lambda: listing.chmod(0o666), "is not as the code beside it"),
    (lambda: (tree / "built").chmod(0o777), "is not as the code beside it"),
    (lambda: (listing.unlink(), listing.symlink_to(tmp_path / "b" / "manifest.json")), "is not as the code beside it"),
    (lambda: listing.unlink(), "is not trusted"),
    (lambda: sidecar.write_text(sidecar.read_text() + " "), "was not written by the build of this tree"),
    (lambda: (sidecar.parent / f"{NAME}.pkl").write_bytes(b"another"), "its sidecar says"),
  ):
    change()
    with pytest.raises(ArtifactError, match=said):
      read(bundle)
    (tree / "built").chmod(0o755)
    listing.unlink(missing_ok=True)
    listing.write_text(good)
    listing.chmod(0o644)
    sidecar.write_text(said_then)
  os.replace(sidecar.parent, tmp_path / "built")  # the same folder elsewhere is nobody's
  with pytest.raises(ArtifactError, match="is not trusted"):
    read(bundle, tmp_path / "built")


def test_of_another_owner_than_the_code_it_is_not_trusted(tmp_path, tree):
  if os.geteuid() != 0:
    pytest.skip("giving a file away is root's")
  bundle = write_bundle(tmp_path / "b")
  sidecar = write(bundle, b"the tree's", tree_folder(bundle))
  os.chown(sidecar.parent / trust.LIST, 12345, -1)
  with pytest.raises(ArtifactError, match="of another owner"):
    read(bundle)


# *** who compiles, when ***


def test_what_is_lacking_here(tmp_path, monkeypatch):
  bundle = write_bundle(tmp_path / "b")
  there = {"onnx", TARGET}
  monkeypatch.setattr(fair_compile, "missing", lambda t: None if t in there else f"no {t}")
  monkeypatch.setattr(runners, "QCOM_GPU", tmp_path / "none")
  monkeypatch.setattr(runners, "NVIDIA_GPU", tmp_path / "none")
  assert lacking(bundle, None) is None  # ONNX Runtime comes first here, and wants nothing
  assert lacking(bundle, TARGET) == TARGET and lacking(bundle, "tinygrad-qcom") is None
  there.remove("onnx")
  assert lacking(bundle, None) == TARGET
  write(bundle)
  assert lacking(bundle, None) is None
  monkeypatch.setattr(runners, "QCOM_GPU", tmp_path)
  there.add("tinygrad-qcom")
  assert lacking(bundle, None) == "tinygrad-qcom"
  there.clear()
  assert lacking(bundle, None) is None


def test_a_device_that_has_not_compiled_yet_says_so(tmp_path, monkeypatch):
  """Without ONNX Runtime, as there: what fairState carries."""
  monkeypatch.setattr(runners, "QCOM_GPU", tmp_path)
  monkeypatch.setitem(sys.modules, "openpilot.selfdrive.modeld.fair.runners.onnx", None)
  with pytest.raises(
    BundleError,
    match=r"graph 'scene' has no runner here; tinygrad-qcom: no artifact .*, a device does while it is offroad; onnx: ",
  ):
    FairModel(write_bundle(tmp_path / "b"))


def test_a_failed_compilation_is_told_to_who_misses_it(tmp_path, monkeypatch):
  bundle = write_bundle(tmp_path / "b")
  monkeypatch.setattr(fair_compile, "missing", lambda t: None)
  monkeypatch.setattr(
    fair_compile, "command_for", lambda *_: [sys.executable, "-c", "print('error: too hard'); raise SystemExit(2)"]
  )
  with pytest.raises(CompileError, match=r"^too hard$"):
    fair_compile.build(bundle, TARGET)
  with pytest.raises(
    ArtifactError,
    match=r"no artifact .*\(compiling it failed: too hard\); build it with compile.py, a device does while it is "
    r"offroad",
  ):
    read(bundle)


def test_on_a_device_nothing_is_compiled_while_the_car_is_on(tmp_path, monkeypatch, capsys):
  bundle = write_bundle(tmp_path / "b")
  monkeypatch.setattr(fair_compile, "onroad", lambda: True)
  monkeypatch.setattr(sys, "argv", ["compile", str(bundle.path)])
  assert (
    fair_compile.main() == 2 and capsys.readouterr().err == "error: the car is on; compiling is for when it is off\n"
  )


def test_old_artifacts_go(tmp_path):
  folders = []
  for i in range(artifact.KEPT + 2):
    folders.append(data_root() / "artifacts" / f"m{i}")
    folders[-1].mkdir(parents=True)
    os.utime(folders[-1], (i, i))
  assert artifact.prune(folders[0]) == [folders[2], folders[1]]
  assert {p.name for p in folders[0].parent.iterdir()} == {p.name for p in (folders[0], *folders[3:])}


def test_offroad_asks_the_compiler_once_and_ends_when_told(tmp_path, prefix, monkeypatch):
  """The real process; what it would compile here is a bundle that cannot be read, which it says, and waits until
  another one is wanted."""
  models = tmp_path / "models"
  (write_bundle(models / "a", name="a").path / "scene.onnx").write_bytes(b"x")
  write_bundle(models / "b", name="b")
  Params().put("FairRunner", TARGET)
  env = {**os.environ, "FAIR_MODELS_DIR": str(models), "PYTHONPATH": str(ROOT)}
  code = """
from openpilot.selfdrive.modeld.fair import offroad
offroad.LOOK, offroad.TICK = .2, .05
raise SystemExit(offroad.main())
"""
  proc = subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)
  try:
    assert "scene.onnx has sha256" in proc.stderr.readline() and "a ended with exit code 2" in proc.stderr.readline()
    time.sleep(1)
    Params().put("FairRunner", "onnx")
    assert "scene.onnx has sha256" in proc.stderr.readline()
    assert "ended with exit code 2" in proc.stderr.readline()
    Params().put("FairBundle", "b")  # nothing to say of that
    time.sleep(1)
  finally:
    proc.send_signal(signal.SIGINT)
    err = proc.communicate(timeout=60)[1]
  assert proc.returncode == 0 and not err
