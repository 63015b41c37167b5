"""From a training run to a bundle that the runtime loads: what was not learned is not published, what is unfinished is
refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from label_fixture import write_store
from onnx import numpy_helper

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.evaluation import evaluate
from openpilot.tools.fair.bundle import export, replace
from openpilot.tools.fair.bundle.card import headlines, seen
from openpilot.tools.lib.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp("export")
  write_store(root / "s", license="CC-BY-NC-4.0")
  argv = [
    "distill",
    "--labels",
    root / "s",
    "--student",
    "depth-nano",
    "--out",
    root / "run",
    "--steps",
    3,
    "--batch",
    4,
    "--eval-every",
    2,
    "--workers",
    0,
  ]
  with pytest.MonkeyPatch.context() as m:
    m.setattr(sys, "argv", [*map(str, argv), "--accept-license", "CC-BY-NC-4.0"])
    distill.main()
  return root / "run"


def export_to(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
  export.main()


def test_a_run_becomes_a_bundle(run, tmp_path, monkeypatch):
  out = tmp_path / "models" / "my-depth"
  with pytest.raises(UserError, match="CC-BY-NC-4"):
    export_to(monkeypatch, run, "--out", out)
  assert not out.exists()
  for _ in range(2):  # a second time it is replaced whole
    export_to(
      monkeypatch, run, "--out", out, "--accept-license", "CC-BY-NC-4.0", "--labels", run.parent / "s", "--no-tinygrad"
    )
  bundle = load_bundle(out)
  (depth,) = bundle.graphs[0]["outputs"]  # nobody taught features
  assert depth["name"] == "depth" and depth["parameters"] == {"activation": "exp", "per_height": True}
  p = bundle.manifest["provenance"]
  assert p["license"] == "CC-BY-NC-4.0" and p["teachers"] == [
    {"model": "simulator", "checkpoint_hash": "a", "license": "CC-BY-NC-4.0"}
  ]
  assert any(m["name"] == "held-out loss depth/metric" for m in bundle.manifest["metrics"])
  assert "Not made for real streets" in (out / "README.md").read_text() and [x.name for x in out.parent.iterdir()] == [
    "my-depth"
  ]
  here = str(run.parent)  # which is in the run's options.yaml
  assert here in (run / "options.yaml").read_text()
  assert not [f for f in ("manifest.json", "README.md") if here in (out / f).read_text()]
  assert {f.suffix for f in out.iterdir()} == {".onnx", ".json", ".md"}
  student, _, _ = export.load_student(run)
  frame = np.random.default_rng(0).integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)
  got = OnnxRunner(bundle, bundle.graphs[0], 1).run({"frame": frame})
  want = student(torch.from_numpy(frame))["depth"].detach().numpy()
  assert np.allclose(got["depth"], want, atol=1e-2)  # log meters, weights of 11 bits


def spoil(path, value):
  """Multiplies the first convolution's weights in the file by `value`."""
  model = onnx.load(path)
  w = next(i for i in model.graph.initializer if len(i.dims) == 4)
  a = numpy_helper.to_array(w)
  w.CopyFrom(numpy_helper.from_array((a * value).astype(a.dtype), w.name))
  onnx.save(model, path)


@pytest.mark.parametrize(
  ("step", "value", "message"),
  [
    ("export_onnx", 3.0, "ONNX Runtime and torch differ by"),
    ("export_onnx", float("nan"), "ONNX Runtime and torch differ by inf"),
    ("store_half", 3.0, "float16 weights change an output by"),
  ],
)
def test_a_graph_that_computes_something_else_is_not_written(run, tmp_path, monkeypatch, step, value, message):
  honest = getattr(export, step)

  def wrong(*args):
    out = honest(*args)
    spoil(next(a for a in args if isinstance(a, Path)), value)
    return out

  monkeypatch.setattr(export, step, wrong)
  with pytest.raises(UserError, match=message):
    export_to(monkeypatch, run, "--out", tmp_path / "models" / "x", "--accept-license", "CC-BY-NC-4.0", "--no-tinygrad")
  assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
  ("apart", "said"),
  [
    ((0.0021, 0.0), "differ by 0.0021 of an output"),
    ((0.0, 0.0101), "float16 weights change an output by 0.01 of"),
    ((0.0019, 0.0099), None),
  ],
)
def test_a_graph_may_be_off_by_two_thousandths_and_a_hundredth_of_half_weights(run, tmp_path, monkeypatch, apart, said):
  left = list(apart)
  monkeypatch.setattr(export, "parity", lambda *_: left.pop(0))
  out = tmp_path / "models" / "x"
  words = (run, "--out", out, "--accept-license", "CC-BY-NC-4.0", "--no-tinygrad")
  if said is None:
    export_to(monkeypatch, *words)
    assert (out / "README.md").exists() and not left
  else:
    with pytest.raises(UserError, match=said):
      export_to(monkeypatch, *words)
    assert not out.exists()


@pytest.mark.parametrize(("half", "stored"), [(0.0099, 10), (0.0101, 1)])  # onnx's numbers of FLOAT16 and FLOAT
def test_half_weights_are_taken_where_they_change_little(run, tmp_path, monkeypatch, half, stored):
  left = [0.0, half]
  monkeypatch.setattr(export, "parity", lambda *_: left.pop(0))
  out = tmp_path / "models" / "x"
  words = ("--out", out, "--accept-license", "CC-BY-NC-4.0", "--no-tinygrad", "--weights", "auto")
  export_to(monkeypatch, run, *words)
  weights = [i.data_type for i in onnx.load(next(out.glob("*.onnx"))).graph.initializer if np.prod(i.dims) >= 1024]
  assert weights and set(weights) == {stored}
  assert ("float32, since float16 would" in (out / "README.md").read_text()) is (stored == 1)


def test_a_headline_stands_beside_others_but_not_beside_their_rivals():
  """'..., IoU only' is what a student's own objects would get without its tracker."""

  def cell(v):
    return {"idf1": {"value": v}}

  columns = {"mine": {"idf1": {"value": 0.8, "low": 0.7, "high": 0.9}}, "mine, IoU only": cell(0.6)}
  columns |= {"other": cell(0.7), "other, IoU only": cell(0.5), "silent": {}}
  (found,) = headlines({"tables": {"simulator": {"identity": columns, "depth": {"other": {}}}}}, "mine")
  assert found["others"] == {"mine, IoU only": 0.6, "other": 0.7}
  assert (found["task"], found["metric"], found["reference"]) == ("identity", "idf1", "simulator")
  assert (found["value"], found["low"], found["high"]) == (0.8, 0.7, 0.9)


def test_a_unified_student_that_learned_no_points_asks_for_none(run, tmp_path, monkeypatch):
  """Points and the tracker's state are no inputs of its graph, and so none of its manifest, which the runtime would
  fill in vain."""
  license = ["--accept-license", "CC-BY-NC-4.0"]
  argv = [
    "distill",
    "--labels",
    run.parent / "s",
    "--student",
    "unified-nano",
    "--tasks",
    "depth,objects",
    "--out",
    tmp_path / "run",
    "--steps",
    2,
  ]
  monkeypatch.setattr(sys, "argv", [*map(str, argv), "--batch", "4", "--workers", "0", *license])
  distill.main()
  export_to(monkeypatch, tmp_path / "run", "--out", tmp_path / "b", *license, "--no-tinygrad")
  bundle = load_bundle(tmp_path / "b")
  graph = bundle.graphs[0]
  assert [i["name"] for i in graph["inputs"]] == ["frame"] and not graph.get("state") and "point_slots" not in graph
  out = OnnxRunner(bundle, graph, 1).run({"frame": np.zeros((1, 6, 128, 256), np.uint8)})
  assert out["depth"].shape == (1, 1, 64, 128) and "objects_heat" in out


def test_an_evaluation_goes_into_the_card(run, tmp_path, monkeypatch):
  """The page's own JSON, of the bundle that was exported before."""
  out, license = tmp_path / "b", ("--accept-license", "CC-BY-NC-4.0", "--no-tinygrad")
  export_to(monkeypatch, run, "--out", out, *license)
  monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, [out, run.parent / "s", "--out", tmp_path / "e"])])
  evaluate.main()
  (tmp_path / "notes.txt").write_text("Mind the gap.")
  found = tmp_path / "e" / "evaluation.json"
  export_to(monkeypatch, run, "--out", out, *license, "--evaluation", found, "--notes", tmp_path / "notes.txt")
  value = json.loads(found.read_text())["tables"]["simulator"]["depth"]["b"]["abs_rel"]["value"]
  card, metrics = (out / "README.md").read_text(), load_bundle(out).manifest["metrics"]
  assert f"| abs_rel | simulator | {value:.3f}" in card and "mean map" in card and "Mind the gap." in card
  assert {"Depth: abs_rel": value}.items() <= {m["name"]: m["value"] for m in metrics}.items()
  # one of the two routes was held out
  assert "(`" in card and "**1 of 2 segments were trained on**" in card and "not trained on" not in card
  assert all("1 of 2 segments were trained on" in m["data"] for m in metrics)
  with pytest.raises(UserError, match="evaluates b, not c"):
    export_to(monkeypatch, run, "--out", tmp_path / "c", *license, "--evaluation", found)
  found.write_text("{}")
  with pytest.raises(UserError, match="no evaluation's JSON"):
    export_to(monkeypatch, run, "--out", out, *license, "--evaluation", found)


def test_a_card_says_what_it_knows_of_what_was_trained_on():
  evaluation = {"segments": [{"name": "a--0"}, {"name": "b--0"}]}
  for segments, unknown, said in (
    (["c--0"], [], "not trained on"),
    (["b--0", "c--0"], ["models/x"], "1 of 2 segments were trained on"),
    (["c--0"], ["models/x"], "not trained on as far as is known: it is not recorded what models/x learned from"),
  ):
    assert seen(evaluation, {"segments": segments, "unknown": unknown}) == said


def test_a_run_that_is_not_whole_is_refused(run, tmp_path, monkeypatch):
  part = tmp_path / "run"
  shutil.copytree(run, part)
  words = (part, "--out", tmp_path / "b", "--accept-license", "CC-BY-NC-4.0", "--no-tinygrad")
  (part / "log.jsonl").unlink()
  with pytest.raises(UserError, match=r"log\.jsonl is not readable .*no --evaluation"):
    export_to(monkeypatch, *words)
  (part / "environment.json").write_text("{}")
  with pytest.raises(UserError, match=r"environment\.json lacks clips"):
    export_to(monkeypatch, *words)
  (part / "environment.json").unlink()
  with pytest.raises(UserError, match=r"environment\.json is missing or damaged"):
    export_to(monkeypatch, *words)
  torch.save({"step": 1}, part / "best.pt")
  with pytest.raises(UserError, match=r"best\.pt lacks config, ema, provenance; it is no checkpoint of"):
    export_to(monkeypatch, *words)
  assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
def test_weights_are_stored_as_half(run, tmp_path, monkeypatch):
  """Half the file, and the same within float16's 11 bits; tinygrad reads it, too."""
  small, large = tmp_path / "small", tmp_path / "large"
  export_to(monkeypatch, run, "--out", small, "--accept-license", "CC-BY-NC-4.0")
  export_to(
    monkeypatch, run, "--out", large, "--accept-license", "CC-BY-NC-4.0", "--weights", "float32", "--no-tinygrad"
  )
  bundles = [load_bundle(small), load_bundle(large)]
  sizes = [(b.path / b.graphs[0]["file"]).stat().st_size for b in bundles]
  assert sizes[0] < 0.65 * sizes[1]
  frame = np.random.default_rng(1).integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)
  a, b = (OnnxRunner(x, x.graphs[0], 1).run({"frame": frame})["depth"].copy() for x in bundles)
  assert 0 < np.abs(a - b).max() < 1e-2 * np.abs(b).max()
  said = (small / "README.md").read_text()
  assert "stored as float16" in said and (
    "tinygrad and ONNX Runtime differ by at most" in said or "tinygrad was not checked" in said
  )


def files(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_only_a_bundle_is_ever_replaced(run, tmp_path, monkeypatch):
  """What would be deleted is a bundle and nothing else; all other folders, and the run's own, stay as they are."""
  monkeypatch.setattr(export, "load_student", lambda _: pytest.fail("work began before the folder was looked at"))
  home, models = tmp_path / "home", tmp_path / "models"
  (home / "thesis").mkdir(parents=True)
  (home / "thesis" / "chapter.txt").write_text("x")
  manifest = json.dumps({"sha256": {"net.onnx": "0"}, "graphs": [{"file": "net.onnx"}]})
  for name, more in (("mine", "notes.txt"), ("odd", None)):
    (models / name).mkdir(parents=True)
    (models / name / "manifest.json").write_text(
      manifest if name == "mine" else json.dumps({"name": "a web application"})
    )
    (models / name / "net.onnx").write_bytes(b"x")
    if more:
      (models / name / more).write_text("x")
  (tmp_path / "file").write_text("x")
  (tmp_path / "link").symlink_to(home)
  before, of_run = files(tmp_path), files(run)
  for out, said in (
    (home, "has no manifest.json, but thesis"),
    (models, "it holds bundles, as mine"),
    (models / "mine", "has notes.txt, which is no part"),
    (models / "odd", "manifest.json of something else"),
    (tmp_path / "file", "is a file"),
    (tmp_path / "link", "is a link"),
    (run, "is the run"),
    (run.parent, "holds the run"),
    (run.parent / "s" / "..", "names no folder"),
    (models / "mein Schüler", "is no name of one: a to z"),
    (models / "Mine", "is no name of one: a to z"),
  ):
    with pytest.raises(UserError, match=said):
      export_to(monkeypatch, run, "--out", out, "--accept-license", "CC-BY-NC-4.0")
    assert files(tmp_path) == before and files(run) == of_run, out
  (models / "mine" / "notes.txt").unlink()
  (models / "mine" / "compiled").mkdir()
  (tmp_path / "empty").mkdir()
  for out in (models / "mine", tmp_path / "empty", tmp_path / "new"):
    replace.check_out(out, run)


@pytest.mark.parametrize(
  ("name", "make", "allowed"),
  [
    ("net.onnx", "file", True),
    ("README.md", "file", True),
    ("compiled", "folder", True),
    ("net.onnx", "folder", False),
    ("net.onnx", "link", False),
    ("compiled", "file", False),
    ("notes.txt", "file", False),
    ("pictures", "folder", False),
    ("pictures", "link", False),
  ],
)
def test_what_may_lie_in_a_bundle(tmp_path, name, make, allowed):
  """Its own files, as files, and a folder of artifacts."""
  folder = tmp_path / "bundle"
  folder.mkdir()
  (folder / "manifest.json").write_text(json.dumps({"sha256": {"net.onnx": "0"}, "graphs": [{"file": "net.onnx"}]}))
  (tmp_path / "elsewhere").write_text("x")
  path = folder / name
  {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to(tmp_path / "elsewhere")}[make]()
  assert replace.foreign(folder) == (None if allowed else f"has {name}, which is no part of the bundle")


def test_the_old_bundle_stays_until_the_new_one_is_there(run, tmp_path, monkeypatch):
  out = tmp_path / "b"
  out.mkdir()
  (out / "manifest.json").write_text(json.dumps({"sha256": {}, "graphs": []}))
  before = files(tmp_path)
  with pytest.raises(KeyboardInterrupt), replace.new_bundle(out, run):
    raise KeyboardInterrupt
  assert files(tmp_path) == before
  real = Path.rename

  def rename(self, target):
    if Path(target) == out and ".old" not in self.name:
      raise OSError("no")
    return real(self, target)

  monkeypatch.setattr(Path, "rename", rename)
  with pytest.raises(OSError, match="no"), replace.new_bundle(out, run) as folder:
    (folder / "x").write_text("x")
  assert files(tmp_path) == before
  monkeypatch.undo()
  with replace.new_bundle(out, run) as folder:
    (folder / "x").write_text("x")
  assert files(tmp_path) == {"b/x": b"x"} and [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_unfinished_run_is_refused(run, tmp_path, monkeypatch):
  unfinished = tmp_path / "run"
  unfinished.mkdir()
  for name in ("best.pt", "environment.json", "log.jsonl"):
    (unfinished / name).write_bytes((run / name).read_bytes())
  state = torch.load(run / "last.pt", weights_only=True)
  torch.save({**state, "step": 2}, unfinished / "last.pt")
  with pytest.raises(UserError, match="at step 2 of 3; let it finish"):
    export_to(monkeypatch, unfinished, "--out", tmp_path / "b", "--accept-license", "CC-BY-NC-4.0")
  assert not (tmp_path / "b").exists()
