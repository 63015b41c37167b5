"""`op optimize`: which frames calibrate and which judge, what goes into a graph at them, and the whole command on a
small store."""

import json
import shutil
from dataclasses import replace

import pytest

import images_student_fixture
import optimize_fixture
from fair_bundle import lanes_graph, write_bundle, write_graphs
from label_fixture import LABELS, write_store
from openpilot.selfdrive.modeld.fair import cpu
from openpilot.selfdrive.modeld.fair.bundle import Bundle, load_bundle, write_manifest
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.tools.fair.evaluation import evaluate as evaluation
from openpilot.tools.fair.evaluation.compared import Compared, input_of, set_of
from openpilot.tools.fair.evaluation.scenes import open_segments
from openpilot.tools.fair.optimize import judge, optimize as module, search as searching, told
from openpilot.tools.fair.optimize.calibration import Parts, blocks, check_apart, grid, record, split, spread
from openpilot.tools.fair.optimize.judge import counts, hardest, make_row, most_shown, verdict, worst
from openpilot.tools.fair.optimize.search import Graphs
from openpilot.tools.fair.optimize.variants import Variant
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import MAP_H, MAP_W


@pytest.fixture(scope="module")
def store(tmp_path_factory):
  root = tmp_path_factory.mktemp("store") / "labels"
  optimize_fixture.write_routes(root, count=4, n=8)
  return root


def options(bundle, store, out, **kwargs):
  said = {"int8": True, "target": ("x86",), "frames": 8, "rounds": 2, "max_loss": 0.5}
  return module.Options(bundle=bundle, data=store, output=out, **(said | kwargs))


@pytest.fixture
def quick(monkeypatch):
  """Without a process for each variant."""
  monkeypatch.setattr(told, "footprint", lambda bundle, runner: {"load_s": 0.1, "memory_mb": 1.0})


def test_no_route_both_calibrates_and_judges_and_conditions_are_among_both(store):
  segments = open_segments(store, {"simulator"}, [])
  many = []
  for k in range(9):
    condition = [("day",), ("night",), ("rain",)][k % 3]
    many += [replace(segments[0], name=f"0000{k}--aaaaaaaaaa--{n}", conditions=list(condition)) for n in range(2)]
  parts = split(many)
  one, other = ({s.route for s in x} for x in (parts.calibration, parts.judged))
  assert not one & other and len(one) == 3 and len(other) == 6 and len(parts.calibration) == 6
  assert {c for s in parts.calibration for c in s.conditions} == {c for s in parts.judged for c in s.conditions}
  with pytest.raises(UserError, match="cannot both calibrate and judge"):
    split(many[:2])
  two = split(many[:4])
  assert len(two.calibration) == len(two.judged) == 2


def test_another_segment_of_a_route_that_is_judged_does_not_calibrate(store):
  """Segments were compared by their own names: one minute of a drive calibrated, the next one judged."""
  a, b, *_ = open_segments(store, {"simulator"}, [])
  check_apart(Parts([a], [b]), "STORE")
  one, next_one = (replace(a, name=f"0000002c--d68dde99ca--{n}") for n in (0, 1))
  with pytest.raises(UserError, match="STORE has 1 routes or pictures that are judged too, as 0000002c--d68dde99ca;"):
    check_apart(Parts([one], [b, next_one]), "STORE")


def test_frames_are_spread_over_segments_and_along_them(store):
  segments = open_segments(store, {"simulator"}, [])
  places = spread(segments, 8)
  assert len(places) == 8 and {s.name for s, _ in places} == {s.name for s in segments}
  assert [i for s, i in places if s is places[0][0]] == [2, 6]
  short = [replace(segments[0], ids=segments[0].ids[:1], rows=segments[0].rows[:1]), *segments[1:]]
  assert len(spread(short, 13)) == 13 and len(spread(short, 100)) == 25  # others make up for the short one


def test_pictures_are_put_into_blocks(store):
  segments = open_segments(store, {"simulator"}, [])
  found = blocks(segments)
  assert len({s.route for s in found}) == 30 and len({s.name for s in found}) == len(found)
  assert sorted(i for s in found for i in s.rows) == sorted(i for s in segments for i in s.rows)


def test_states_are_what_the_road_makes_of_them(tmp_path, store):
  """The fixture's tracker counts frames in its template."""
  bundle = write_graphs_in(tmp_path / "lanes")
  compared = Compared(set_of([bundle]), input_of([bundle]))
  heard = record(bundle, open_segments(store, {"simulator"}, []), compared, 8)["lanes"]
  counts = [float(x["lanes_template"].max()) for x in heard]
  fresh = [bool(x["lanes_fresh"].all()) for x in heard]
  assert len(heard) == 8 and fresh[0] and counts[0] == 0  # each fourth is of points that are new
  # the others had two frames before
  assert counts == [0, 2, 2, 2, 0, 2, 2, 2] and fresh == [c == 0 for c in counts]
  assert all(x["lanes_mask"].all() for x in heard)
  with pytest.raises(UserError, match="4 frames to calibrate with are too few"):
    record(bundle, open_segments(store, {"simulator"}, []), compared, 4)


def write_graphs_in(folder):
  folder.mkdir()
  return write_graphs(folder, [lanes_graph(folder)])


def test_points_all_over_the_picture():
  q = grid(128, 256, 512, True, 0)
  assert q.used.all() and q.fresh.all() and (q.xy.min(0) > 0).all() and (q.xy.max(0) < (511, 255)).all()
  assert (q.xy.max(0) > (450, 220)).all() and not grid(128, 256, 512, False, 0).fresh.any()


def test_losses_and_what_they_may_be_by_hand():
  error = make_row("depth", "abs_rel", 0.2, 0.203, 0.01)
  assert error.loss == pytest.approx(0.015) and error.limit == 0.01 and error.share == pytest.approx(1.5)
  assert error.shown and most_shown([error]) == pytest.approx(1.5)  # no interval: taken for a loss
  error.spread(-0.001, 0.007)
  assert not error.shown and most_shown([error]) == 0 and error.share == pytest.approx(1.5)
  error.spread(0.001, 0.007)
  assert error.shown and most_shown([error]) == pytest.approx(1.5)
  better = make_row("segmentation", "miou", 0.5, 0.51, 0.01)
  assert better.loss == pytest.approx(-0.02)
  same = make_row("objects", "recall", 0.6, 0.6, 0.01)
  same.spread(0.0, 0.0)
  assert same.words.endswith("0.6000 to 0.6000, 0.00 points (+0.00 to +0.00)")  # it was told as a gain, -0.00
  recall = make_row("objects", "recall", 0.6, 0.597, 0.01)
  assert recall.loss == pytest.approx(0.003) and recall.limit == 0.005  # half a point
  tiny = make_row("objects", "ap", 0.01, 0.0095, 0.01)
  assert tiny.loss == pytest.approx(0.01)  # in parts of 0.05
  assert make_row("depth", "silog", 0.2, 0.3, 0.01).limit is None
  assert worst([error, better, recall, tiny]) is error
  with pytest.raises(UserError, match="could be judged"):
    worst([make_row("depth", "silog", 0.2, 0.3, 0.01)])


def judged(task, metric, base, value, ends=None):
  """ends: of the difference's interval."""
  row = make_row(task, metric, base, value, 0.01)
  if ends is not None:
    row.spread(*ends)
  return row


def test_what_an_interval_decides():
  """The whole of it is within, or beyond, what may be lost; else nothing is decided, whatever the value says."""
  error = "depth", "abs_rel", 0.2
  assert judged(*error, 0.2, (-0.01, 0.0019)).verdict == "within"  # up to .95%
  assert judged(*error, 0.203, (0.0021, 0.004)).verdict == "beyond"  # at least 1.05%
  assert judged(*error, 0.203, (0.0019, 0.004)).verdict == "undecided"
  assert judged(*error, 0.2, (-0.01, 0.0021)).verdict == "undecided"
  assert judged(*error, 0.2).verdict == judged(*error, 0.3).verdict == "undecided"  # too few routes for an interval
  assert judged("depth", "silog", 0.2, 0.3, (0.1, 0.2)).verdict == ""
  better = judged("segmentation", "miou", 0.5, 0.497, (-0.006, -0.002))
  assert (better.least, better.most) == pytest.approx((0.004, 0.012)) and better.verdict == "undecided"
  assert "0.60% (+0.40 to +1.20)" in better.words
  recall = judged("objects", "recall", 0.6, 0.597, (-0.0049, 0.001))
  assert recall.most == pytest.approx(0.0049) and recall.verdict == "within"  # half a point
  assert "0.30 points (-0.10 to +0.49)" in recall.words
  rows = [recall, judged(*error, 0.2, (0, 0)), judged("depth", "silog", 0.2, 0.3)]
  assert counts(rows) == {"within": 2, "undecided": 0, "beyond": 0} and verdict(rows) == "within"
  rows.append(better)
  assert verdict(rows) == "undecided" and hardest(rows) is better  # though recall has lost more of what it may
  rows.append(judged(*error, 0.203, (0.0021, 0.004)))
  assert counts(rows) == {"within": 2, "undecided": 1, "beyond": 1} and verdict(rows) == "beyond"


def test_so_many_frames_judge_unless_it_is_said(tmp_path, store, monkeypatch, capsys):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  monkeypatch.setattr(module, "MOST", 12)

  def frames(**more):
    parts = module.open_data(options(bundle.path, store, tmp_path / "out", **more), bundle).parts
    return [len(s.ids) for s in (*parts.calibration, *parts.judged)]

  assert frames() == [3] * 4 and "of 32 frames the first 3 of each segment are used" in capsys.readouterr().out
  assert frames(limit=5) == [5] * 4 and not capsys.readouterr().out
  monkeypatch.setattr(module, "MOST", 32)
  assert frames() == [8] * 4 and not capsys.readouterr().out


def test_outputs_that_a_task_is_judged_by(tmp_path):
  outputs = [{"name": "depth", "head": "depth"}, {"name": "heat", "head": "objects"}, {"name": "state"}]
  graphs = object.__new__(Graphs)
  graphs.base = Bundle(tmp_path, {"graphs": [{"name": "g", "outputs": outputs}]}, "")
  assert graphs.outputs_of("depth") == {"depth"}
  assert graphs.outputs_of("masks") == graphs.outputs_of("identity") == {"heat"}
  assert graphs.outputs_of("lanes") == {"depth", "heat", "state"}


def test_recommended_is_the_fastest_of_those_that_lose_little(monkeypatch):
  monkeypatch.setattr("openpilot.tools.fair.optimize.variants.targets", lambda: ("x86-vnni", "x86"))
  a, b, c = (Variant(f"int8 {t}", "int8", t, {}) for t in ("x86-vnni", "x86", "aarch64"))
  good, bad = ([judged("depth", "abs_rel", 0.2, v, (v - 0.2, v - 0.2))] for v in (0.2, 0.3))
  ms = {"float": {"p50": 9.0}, a.label: {"p50": 4.0}, b.label: {"p50": 5.0}, c.label: {"p50": 1.0}}
  assert module.recommend([a, b, c], {a.label: good, b.label: good, c.label: good}, ms)[0] == a.label
  found, why = module.recommend([a, b], {a.label: bad, b.label: good}, ms)
  assert found == b.label and "int8 x86-vnni would lose more" in why
  assert module.recommend([a], {a.label: bad}, ms)[0] == "float"
  unknown = [judged("depth", "abs_rel", 0.2, 0.2, (-0.1, 0.1))]
  found, why = module.recommend([a, b], {a.label: unknown, b.label: good}, ms)
  assert found == b.label and "int8 x86-vnni is undecided" in why


@pytest.mark.slow
def test_the_whole_command(tmp_path, store, quick, monkeypatch, capsys):
  bundle = optimize_fixture.write_conv(tmp_path / "models" / "conv")
  (bundle.path / "README.md").write_text("# conv\n")
  bundle = write_manifest(bundle.path, bundle.manifest)
  results = module.run(options(bundle.path, store, tmp_path / "out", apply=True, fp16=True))
  said = capsys.readouterr().out
  assert "int8 x86" in said and "recommended: " in said
  assert results["calibration"]["routes"] == 1 and results["judged"]["routes"] == 3
  # the page's numbers are those of `op evaluate` on the routes that judge
  judged = tmp_path / "judged"
  shutil.copytree(store, judged)
  calibrating = [p for p in judged.iterdir() if p.is_dir() and p.name.startswith(optimize_fixture.ROUTES[1])]
  assert len(calibrating) == 1
  shutil.rmtree(calibrating[0])
  shipped = load_bundle(bundle.path)
  monkeypatch.setattr(cpu, "targets", lambda: ("x86",))
  kept = next(v for v in shipped.graphs[0]["variants"] if v["precision"] == "int8")
  assert kept["target"] == "x86" and kept["weight_bits"] == 7 and kept["calibration"]["frames"] == 8
  table = evaluation.evaluate(evaluation.Options((bundle.path,), judged, output=tmp_path / "e"))["tables"]["simulator"]
  half, variant = results["variants"][1:]
  # a graph for a GPU, judged by what it would say there
  assert half["label"] == "float16 tensorrt" and half["verdict"] == "within" and not half["here"]
  assert 0 < max(half["output_errors"].values()) < max(variant["output_errors"].values()) / 2
  assert half["bytes"] == (bundle.path / "scene.float16-tensorrt.onnx").stat().st_size
  rows = {(m["task"], m["metric"]): m for m in variant["metrics"]}
  for task in ("depth", "segmentation"):
    for metric, cell in table[task]["conv"].items():
      assert rows[task, metric]["value"] == pytest.approx(cell["value"], rel=1e-9), metric
  assert rows["depth", "abs_rel"]["low"] is not None
  # what ships: both graphs, and each processor takes its own
  assert OnnxRunner(shipped, shipped.graphs[0]).what == "ONNX Runtime, int8 for x86"
  assert shipped.onnx(shipped.graphs[0]) == (bundle.path / "scene.onnx").read_bytes()
  card = (shipped.path / "README.md").read_text()
  assert "## In 8 bits" in card and "| x86 |" in card
  assert {x["why"] for x in kept["float"]} == {
    "a last layer: what it says is the answer itself",
    "a product of attention or of coordinates",
  }
  page = (tmp_path / "out" / "optimize.html").read_text()
  assert "Recommended: " in page and "<svg" in page and "middle" in page and str(store) not in page
  # again, of what has a variant: it is made anew of the float graph
  module.run(options(bundle.path, store, tmp_path / "out", apply=True))
  assert len(load_bundle(bundle.path).graphs[0]["variants"]) == 1
  again = (bundle.path / "README.md").read_text()
  assert again.count("## In 8 bits") == 1 and again.count("| x86 |") == 1


def test_a_loss_that_is_too_large_is_told_and_nothing_is_applied(tmp_path, store, quick, monkeypatch):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  monkeypatch.setattr(judge, "loss_of", lambda *words: 0.02)
  with pytest.raises(UserError, match=r"--max-loss 0\.01 is not met: int8 x86: .*2\.00% .*; the page says"):
    module.run(options(bundle.path, store, tmp_path / "out", apply=True, max_loss=0.01))
  assert load_bundle(bundle.path).manifest_hash == bundle.manifest_hash
  tried = json.loads((tmp_path / "out" / "optimize.json").read_text())["search"]["x86"]
  counts = [len(t["back"]) for t in tried]
  assert tried[0]["float"] == "0 of 2 layers in float" and counts == sorted(set(counts)) and counts[-1] == 2
  assert all(t["share"] > 1 for t in tried) and not (tmp_path / "out" / "conv").exists()


@pytest.mark.parametrize("low, rungs", [(-0.001, 1), (0.001, 2)])  # of the difference, of an error
def test_layers_go_back_only_for_a_loss_that_is_shown(tmp_path, store, quick, monkeypatch, low, rungs):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  row = make_row("depth", "abs_rel", 0.2, 0.21, 0.01)
  row.spread(low, 0.02)
  monkeypatch.setattr(searching, "judge", lambda bundles, *more, **named: {b: [row] for b in bundles if b != "float"})
  tried = module.run(options(bundle.path, store, tmp_path / "out"))["search"]["x86"]
  assert [t["float"] for t in tried] == [f"{2 * n} of 2 layers in float" for n in range(rungs)]
  assert tried[0]["share"] == pytest.approx(5) and tried[0]["shown"] == pytest.approx(5 if rungs > 1 else 0)
  assert bool(tried[0]["over"]) == (rungs > 1)


def test_what_is_undecided_is_told_and_applied_where_one_says_so(tmp_path, store, quick, monkeypatch):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  real = judge.paired_bootstrap
  monkeypatch.setattr(judge, "paired_bootstrap", lambda a, b, n: dict.fromkeys(real(a, b, 3), (-9.0, 9.0)))
  said = r"int8 x86 is undecided: of what 2 metrics lose on 3 routes, 2 undecided by --max-loss 0\.5; .*more routes, or"
  with pytest.raises(UserError, match=said):
    module.run(options(bundle.path, store, tmp_path / "out", apply=True))
  assert load_bundle(bundle.path).manifest_hash == bundle.manifest_hash
  tried = load_bundle(tmp_path / "out" / "conv")
  assert len(tried.graphs[0]["variants"]) == 1 and "undecided" in (tmp_path / "out" / "optimize.html").read_text()
  results = module.run(options(bundle.path, store, tmp_path / "again", apply=True, undecided=True))
  assert len(load_bundle(bundle.path).graphs[0]["variants"]) == 1
  assert results["applied"] == ["int8 x86"] and results["recommendation"]["variant"] == "float"


@pytest.mark.parametrize(
  ("change", "match"),
  [
    ({"int8": False}, "nothing to do"),
    ({"undecided": True}, "--undecided says what --apply takes"),
    ({"fp16": True, "target": ("tensorrt",)}, "--fp16 or --int8, the other in a command of its own"),
    ({"frames": 0}, "at least 1"),
    ({"frames": 4}, "too few"),
    ({"data": "nowhere"}, "there is no such file"),
    ({"calibration": "same"}, "4 routes or pictures that are judged too"),
    ({"truth": "nobody"}, "no labels by 'nobody'"),
    ({"classes": "moon,sun"}, "is no class|moon"),
  ],
)
def test_bad_input_is_one_line(tmp_path, store, quick, change, match):
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  if change.get("data"):
    change = {"data": tmp_path / "nowhere"}
  if change.get("calibration"):
    change = {"calibration": store}
  with pytest.raises(UserError, match=match) as e:
    module.run(replace(options(bundle.path, store, tmp_path / "out"), **change))
  assert "\n" not in str(e.value) and not (tmp_path / "out" / "optimize.json").exists()


def test_what_calibrates_is_of_the_same_classes(tmp_path, store, quick, monkeypatch):
  monkeypatch.setattr(module, "record", None)  # nothing is computed before
  bundle = optimize_fixture.write_conv(tmp_path / "conv")
  other = [x for x in LABELS if x.name == "depth"]
  other.append(Label("segmentation", "dense", "uint8", (MAP_H, MAP_W), "class", ("background", "moon", "sun", "road")))
  write_store(tmp_path / "moon", routes=optimize_fixture.ROUTES[4:5], n=2, labels=other)
  with pytest.raises(UserError, match="moon"):
    module.run(options(bundle.path, store, tmp_path / "out", calibration=tmp_path / "moon"))
  assert not (tmp_path / "out" / "optimize.json").exists()


def test_a_graph_without_layers_and_one_that_takes_other_pictures(tmp_path, store, quick):
  with pytest.raises(UserError, match="no convolution before the last"):
    module.run(options(write_bundle(tmp_path / "flat").path, store, tmp_path / "out"))
  bundle = optimize_fixture.write_conv(tmp_path / "conv", size=(128, 256))
  with pytest.raises(UserError, match="model frames of 512x256, and model frames of 256x128"):
    module.run(options(bundle.path, store, tmp_path / "out"))


def test_labeled_pictures_are_parted_in_blocks(tmp_path):
  data = images_student_fixture.write(tmp_path / "data", 12)
  said = {"kind": "rgb", "height": 96, "width": 96, "letterbox": True, "pad": 114}
  heat = {"name": "objects_heat", "shape": [1, 2, 12, 12], "dtype": "float32", "head": "objects"}
  heat |= {"parameters": {"part": "heat"}, "classes": ["flurb", "zott"]}
  graph = {"name": "objects", "inputs": [], "outputs": [heat]}
  bundle = Bundle(tmp_path, {"name": "x", "view": "medmodel", "input": said, "graphs": [graph]}, "")
  with pytest.raises(UserError, match=r"'never seen' is no class of 'x'.*--ignore-classes"):
    module.open_data(options(tmp_path, data, tmp_path / "out"), bundle)
  found = module.open_data(options(tmp_path, data, tmp_path / "out", ignore_classes=True), bundle)
  assert found.truth == "labeled" and found.compared.names("boxes") == ("flurb", "zott")
  one, other = ([i for s in part for i in s.ids] for part in (found.parts.calibration, found.parts.judged))
  assert not set(one) & set(other) and len(one) == 4 and len(other) == 8
  with pytest.raises(UserError, match="there is no such file"):
    module.open_data(options(tmp_path, tmp_path / "no.json", tmp_path / "out"), bundle)
  # blocks of two stores are called alike: every other store was refused as the same one
  more = options(
    tmp_path, images_student_fixture.write(tmp_path / "more", 9, seed=1), tmp_path / "out2", ignore_classes=True
  )
  module.open_data(more, bundle)
  apart = module.open_data(
    replace(more, data=data, output=tmp_path / "out3", calibration=tmp_path / "out2/labels"), bundle
  )
  assert [sum(len(s.ids) for s in p) for p in (apart.parts.calibration, apart.parts.judged)] == [9, 12]
  with pytest.raises(UserError, match="has 12 routes or pictures that are judged too, as picture"):
    module.open_data(replace(more, data=data, output=tmp_path / "out4", calibration=tmp_path / "out/labels"), bundle)
