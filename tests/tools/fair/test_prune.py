"""`op optimize --prune`: a run that export, distill and the table of students read without the package that pruned it,
and what it refuses."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from label_fixture import LABELS, interrupted, same, taught, write_store
from student_inputs import assert_close

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, load_bundle
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.tools.fair.bundle import export
from openpilot.tools.fair.evaluation.compared import classes_of
from openpilot.tools.fair.optimize import optimize, prune
from openpilot.tools.fair.optimize.measure import frame_of, milliseconds_in_turns
from openpilot.tools.fair.students import list_students
from openpilot.tools.fair.students.list_students import macs
from openpilot.tools.lib.errors import UserError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  root = tmp_path_factory.mktemp("prune") / "s"
  write_store(root, n=4)
  return root


@pytest.fixture(scope="module")
def run(store):
  out = store.parent / "run"
  taught(store, out, "--steps", 1, "--batch-size", 2)
  return out


def options(bundle, store, output, **more):
  return optimize.Options(bundle=bundle, data=store, output=output, **({"prune": 0.3, "frames": 4} | more))


@pytest.fixture(scope="module")
def pruned(store, run):
  """-> the run without three tenths of its multiply-adds, and what was said of it."""
  pytest.importorskip("torch_pruning", reason="the package that finds groups")
  return store.parent / "pruned", optimize.run(options(run, store, store.parent / "pruned"))


@pytest.fixture(scope="module")
def thin(pruned):
  with pytest.MonkeyPatch.context() as m:
    m.setitem(sys.modules, "torch_pruning", None)  # it is not needed any more
    out = pruned[0].parent / "models" / "thin"
    export.run(export.Options(run=pruned[0], output=out, tinygrad=False))
  return load_bundle(out)


def test_a_bundle_of_boxes_alone_knows_its_classes_by_all_names():
  """Labels call them as teachers do: a two-wheeler is a bicycle, and what has no box is known, too."""
  names, roles = classes_of(load_bundle(MODELS_DIR / "fair_detector_small"))
  known = prune.named("fair_detector_small", names, roles)
  assert names == {"maps": [], "boxes": list(known.boxes)} and known.maps == ()
  said = ["car", "bicycle", "motorcycle", "person", "traffic light"]
  assert known.resolve(said, "boxes", "yolox").tolist() == [0, 2, 2, 1, -1]
  own = prune.named("mine", {"maps": [], "boxes": ["cone", "vehicle"]}, {"cone": "movable"})
  assert own.boxes == ("cone", "vehicle") and own.name == "mine" and own.find("car").name == "vehicle"


@pytest.mark.slow
def test_a_pruned_run_is_counted_and_exported_without_the_package(run, pruned, thin, tmp_path, monkeypatch, capsys):
  out, said = pruned
  whole, student = (export.load_student(r)[0] for r in (run, out))
  assert said["macs"] == [macs(whole), macs(student)] and macs(student) <= 0.7 * macs(whole)
  assert json.loads((out / "log.jsonl").read_text())["pruned"] == json.loads(json.dumps(said))
  monkeypatch.setitem(sys.modules, "torch_pruning", None)
  monkeypatch.setattr(sys, "argv", ["students", str(out), str(run)])
  list_students.main()
  table = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
  assert [row[0] for row in table] == ["pruned", "run"]
  assert [int(row[3].removesuffix("M")) for row in table] == [round(macs(s) / 1e6) for s in (student, whole)]
  assert thin.manifest["widths"] == {k: list(v) for k, v in student.spec.widths.items()}
  assert "pruned, and not taught since" in (thin.path / "README.md").read_text()
  environment = json.loads((out / "environment.json").read_text())
  (out / "environment.json").write_text(json.dumps({k: v for k, v in environment.items() if k != "pruned"}))
  monkeypatch.setattr(sys, "argv", ["export", str(out), "--output", str(tmp_path / "joined"), "--no-tinygrad"])
  export.main()
  (out / "environment.json").write_text(json.dumps(environment))
  assert "pruned, put together from students that had learned before" in (tmp_path / "joined/README.md").read_text()
  frame = np.random.default_rng(0).integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)
  got = OnnxRunner(thin, thin.graphs[0], 1).run({"frame": frame})["depth"]
  with torch.no_grad():
    assert_close("depth", got, student(torch.from_numpy(frame))["depth"].numpy(), export.HALF_TOLERANCE)


COMMON = ("--batch-size", 2, "--no-augment", "--steps", 2, "--eval-every", 1)


@pytest.mark.slow
def test_it_is_distilled_on_and_resumed_when_what_it_started_from_is_gone(store, pruned, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "torch_pruning", None)
  shutil.copytree(pruned[0], tmp_path / "gone")
  on = taught(store, tmp_path / "on", "--init", tmp_path / "gone", *COMMON)
  said = capsys.readouterr().out
  assert "depth-nano, pruned:" in said and "start anew" not in said
  student, config, _ = export.load_student(tmp_path / "on")
  assert on["config"]["widths"] == config.widths and macs(student) == pruned[1]["macs"][1]
  with interrupted(1):
    taught(store, tmp_path / "broken", "--init", tmp_path / "gone", *COMMON)
  shutil.rmtree(tmp_path / "gone")
  again = taught(store, tmp_path / "broken", "--init", tmp_path / "gone", *COMMON, "--resume")
  assert same({k: on[k] for k in ("model", "ema", "optimizer")}, {k: again[k] for k in ("model", "ema", "optimizer")})
  with pytest.raises(UserError, match=r"its widths are of depth-nano on .*, not of depth-nano on mobilenetv4_conv_sm"):
    taught(store, tmp_path / "no", "--init", pruned[0], "--backbone", "mobilenetv4_conv_small", *COMMON)


@pytest.mark.slow
def test_a_pruned_bundle_is_distilled_on_and_pruned_again(store, pruned, thin, tmp_path):
  on = taught(store, tmp_path / "on", "--init", thin.path, *COMMON)
  assert on["config"]["widths"] == thin.manifest["widths"]
  now = pruned[1]["macs"][1]
  again = optimize.run(options(thin.path, store, tmp_path / "b", prune=None, prune_macs=0.9e-6 * now))
  student, config, _ = export.load_student(tmp_path / "b")
  assert again["macs"] == [now, macs(student)] and macs(student) <= 0.9 * now and config.tasks == ["depth"]
  assert config.per_height and config.classes.maps == config.classes.boxes == ()


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"int8": True}, "--prune gives a run that is to be distilled on"),
    ({"prune_macs": 50.0}, "--prune, --prune-macs and --prune-ms each say how much goes"),
    ({"prune": None, "prune_ms": 1e6}, r"--prune-ms 1e\+06: the student takes .* ms a frame here; name less"),
    ({"classes": "car,person"}, "--classes is not for --prune"),
    ({"prune": 0.0}, "--prune 0: it is the share"),
    ({"prune": float("nan")}, "--prune nan: it is the share"),
    ({"prune": None, "prune_macs": 5000.0}, "--prune-macs 5000: the student has .* million; name fewer"),
    ({"bundle": "nowhere"}, "nowhere"),
    ({"output": "there"}, "there is something already"),
    ({"data": "objects"}, "teaches nothing that the student does"),
    ({"truth": "nobody"}, "--truth nobody"),
  ],
)
def test_bad_input_is_one_line_and_nothing_is_written(store, run, tmp_path, change, match):
  change = dict(change)
  for key in ("bundle", "output"):
    if key in change:
      change[key] = tmp_path / change[key]
  if change.get("output"):
    change["output"].mkdir()
    (change["output"] / "mine").touch()
  if change.get("data"):
    change["data"] = tmp_path / "objects"
    write_store(change["data"], n=2, labels=LABELS[2:3])
  with pytest.raises((UserError, optimize.BundleError), match=match) as e:
    optimize.run(options(**({"bundle": run, "store": store, "output": tmp_path / "out"} | renamed(change))))
  assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def renamed(change):
  return {"store" if k == "data" else k: v for k, v in change.items()}


@pytest.mark.slow
def test_a_target_that_cannot_be_met_says_how_near_it_came(store, run, tmp_path):
  pytest.importorskip("torch_pruning", reason="the package that finds groups")
  with pytest.raises(UserError, match=r"0\.9\d* of the multiply-adds cannot go: at most 0\.\d+ can, to \d+ million"):
    optimize.run(options(run, store, tmp_path / "out", prune=0.95))
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_channels_go_until_a_frame_is_fast_enough(store, run, tmp_path, monkeypatch, capsys):
  """By a clock whose time is the multiply-adds: half of them is half of the time, and no more goes than must."""
  pytest.importorskip("torch_pruning", reason="the package that finds groups")

  counted = {}

  def frame(student):
    call = frame_of(student)
    counted[call] = macs(student) / 1e6
    return call

  def milliseconds(calls):
    assert all(np.isfinite(milliseconds_in_turns(calls, 2)))
    return [counted[c] for c in calls]

  monkeypatch.setattr(prune, "frame_of", frame)
  monkeypatch.setattr(prune, "milliseconds_in_turns", milliseconds)
  before = macs(export.load_student(run)[0]) / 1e6
  said = optimize.run(options(run, store, tmp_path / "out", prune=None, prune_ms=0.7 * before))
  assert said["milliseconds"] == [before, said["macs"][1] / 1e6] and said["macs"][0] == before * 1e6
  assert 0.62 * before < said["milliseconds"][1] <= 0.7 * before
  times = [line for line in capsys.readouterr().out.splitlines() if line.startswith("time ")]
  assert times[-1].endswith(f"{said['milliseconds'][1]:.2f} ms a frame") and len(times) > 1
  with pytest.raises(UserError, match=r"--prune-ms 0.1 cannot be met: of .* ms a frame .* are left where 0\.\d+ of"):
    optimize.run(options(run, store, tmp_path / "not", prune=None, prune_ms=0.1))
  assert not (tmp_path / "not").exists()
