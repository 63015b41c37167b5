"""What a label store says of itself: to xarray and other readers of Zarr, and to us where another version, or
somebody's hand, wrote it."""

import json
import pickle
import sys

import numpy as np
import pytest
import zarr
from label_fixture import FRAME, group_of, write_store

from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.options import Options as DistillOptions
from openpilot.tools.fair.evaluation.evaluate import Options as EvaluateOptions
from openpilot.tools.fair.evaluation.scenes import open_segments
from openpilot.tools.fair.labels import browse as listing
from openpilot.tools.fair.labels import rules
from openpilot.tools.fair.labels.dataset import LabelDataset, Reader
from openpilot.tools.fair.labels.meta import attributes
from openpilot.tools.fair.labels.rules import rules_of, stale_rules
from openpilot.tools.fair.labels.store import LabelStore, key_of
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.options import parse
from openpilot.tools.lib.errors import UserError, cli

SEGMENT = "00000001--aaaaaaaaaa--0"


def test_arrays_say_what_they_are(tmp_path):
  """As xarray wants it: a Zarr group whose arrays have dimension names that do not contradict each other, units, and
  classes with their numbers."""
  store = LabelStore(tmp_path, create=True)
  labels = [
    Label("features", "dense", "float16", (3, 4, 8)),
    Label("depth", "dense", "float16", (1, 8, 16), "m"),
    Label("relative", "dense", "float16", (8, 16), "relative"),
    Label("classes", "dense", "uint8", (8, 16), "class", ("road", "traffic light")),
    Label("sum", "dense", "float32", (1,)),
  ]
  group = group_of(store, SEGMENT, "t", labels, 3)
  group.write_chunk(0, {x.name: np.ones((3, *x.shape), x.dtype) for x in labels})
  root = zarr.open_group(str(group.path), mode="r", zarr_format=3)
  arrays = dict(root.arrays())
  assert set(arrays) == {f"{x.name}.zarr" for x in labels} and SEGMENT in root.attrs["title"]
  sizes = {}
  for array in arrays.values():
    assert array.metadata.zarr_format == 3 and len(array.metadata.dimension_names) == array.ndim
    for name, n in zip(array.metadata.dimension_names, array.shape, strict=True):
      assert sizes.setdefault(name, n) == n  # xarray refuses a group in which one dimension has two sizes
    assert "integers at pixel centers" in array.attrs["frame_of_reference"] and array.attrs["view"] == "medmodel"
  assert (
    arrays["depth.zarr"].metadata.dimension_names == ("row", "depth_channel", "depth_y", "depth_x")
    and arrays["depth.zarr"].attrs["units"] == "m"
  )
  assert "optical axis" in arrays["depth.zarr"].attrs["comment"]
  assert arrays["relative.zarr"].attrs["units"] == "1" and arrays["relative.zarr"].attrs["kind"] == "relative"
  said = arrays["classes.zarr"].attrs
  assert (
    said["classes"] == ["road", "traffic light"]
    and said["flag_values"] == [0, 1]
    and said["flag_meanings"] == "road traffic_light"
  )


ODD = {
  "version 9": (lambda m: m.update(version=9), "version 9, this program reads 1"),
  "no teacher": (lambda m: m.pop("teacher"), "no right 'teacher'"),
  "teacher": (lambda m: m["teacher"].pop("licence"), "no right 'license'"),
  "camera": (lambda m: m["camera"].update(intrinsics=[]), "lacks or garbles"),
  "view": (lambda m: m["view"].pop("width"), "lacks or garbles"),
  "label": (lambda m: m["labels"][0].update(more=1), "more"),
  "dtype": (lambda m: m["labels"][0].update(dtype="f99"), "f99"),
  "out": (lambda m: m["labels"][0].update(name="../../x"), "which is no name"),
  "chunk": (lambda m: m.update(chunk=7), "chunks of 7 rows"),
  "height": (lambda m: m.update(camera_height="high"), "camera_height that is none of 0.5 to 4.0 m"),
  "no height": (lambda m: m.update(camera_height=float("nan")), "camera_height that is none"),
  "a list": (None, "no JSON object"),
}


@pytest.mark.parametrize("how", ODD)
def test_another_versions_group_is_one_line(tmp_path, monkeypatch, capsys, how):
  (group,) = write_store(tmp_path / "s", n=2).groups("simulator", SEGMENT)
  meta = json.loads((group.path / "group.json").read_text())
  change, says = ODD[how]
  if change is None:
    meta = [meta]
  else:
    change(meta)
  (group.path / "group.json").write_text(json.dumps(meta))
  monkeypatch.setattr(sys, "argv", ["labels", str(tmp_path / "s")])
  assert cli(listing.main)() == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and str(group.path) in err and says in err and "label again" in err


def test_license_is_read_in_either_spelling(tmp_path):
  write_store(tmp_path / "s", routes=("00000001--aaaaaaaaaa",), n=2)
  (path,) = (tmp_path / "s").glob("*/simulator-*/group.json")
  meta = json.loads(path.read_text())
  assert meta["teacher"]["licence"] == "MIT" and "license" not in meta["teacher"]  # as the first stores have it
  meta["teacher"]["license"] = meta["teacher"].pop("licence")
  for _ in range(2):
    (group,) = LabelStore(tmp_path / "s").groups("simulator")
    assert group.meta["teacher"]["license"] == "MIT"
    path.write_text(json.dumps(meta))


class Planted:
  def __reduce__(self):
    return sys.exit, ("run",)


def test_a_version_2_array_with_a_pickle_for_a_filter_is_not_opened(tmp_path):
  """Zarr v2 names its filters in its metadata, and one of numcodecs' unpickles what it is given."""
  (group,) = write_store(tmp_path / "s", n=2).groups("simulator", SEGMENT)
  path = group.path / "depth.zarr"
  (path / "zarr.json").unlink()
  said = {
    "zarr_format": 2,
    "shape": [2, 64, 128],
    "chunks": [2, 64, 128],
    "dtype": "<f2",
    "compressor": None,
    "fill_value": 0,
    "order": "C",
  }
  (path / ".zarray").write_text(json.dumps({**said, "filters": [{"id": "pickle", "protocol": 4}]}))
  (path / "0.0.0").write_bytes(pickle.dumps(Planted()))
  with pytest.raises(UserError, match=r"zarr\.json is damaged"):
    LabelStore(tmp_path / "s").groups("simulator", SEGMENT)[0].read("depth", 0, 1)


@pytest.fixture
def mended(monkeypatch):
  """A rule that has been mended since: of the simulator's labels."""
  rule = rules.Rule(2, lambda m: m["teacher"]["name"] == "simulator", "trees are trees")

  def mend():
    monkeypatch.setitem(rules.RULES, "trees", rule)

  return mend


def test_stale_labels_are_refused_listed_and_taken_where_asked(tmp_path, mended, monkeypatch, capsys):
  store = write_store(tmp_path / "s")
  names = ["frames/frame", "simulator/depth"]
  before = Clips(tmp_path / "s", ["depth"], 1)
  mended()
  for read in (
    lambda **k: Clips(tmp_path / "s", ["depth"], 1, **k),
    lambda **k: LabelDataset(tmp_path / "s", names, **k),
    lambda stale_labels=False: open_segments(tmp_path / "s", {"simulator"}, [], stale=stale_labels),
  ):
    with pytest.raises(UserError, match=r"2 groups of labels are stale.*trees are trees.*--prune.*--stale-labels"):
      read()
    capsys.readouterr()
    assert (
      len(read(stale_labels=True)) in (len(before), 2)
      and "warning: 2 groups of labels are stale" in capsys.readouterr().err
    )
  words = ["--labels", tmp_path / "s", "--student", "depth-nano", "--out", tmp_path / "run", "--tasks", "depth"]
  monkeypatch.setattr(sys, "argv", ["distill", *map(str, words)])
  assert cli(distill.main)() == 2
  err = capsys.readouterr().err
  assert err.count("error: ") == 1 and "groups of labels are stale" in err and not (tmp_path / "run").exists()
  assert parse(DistillOptions, None, "distill", [*map(str, words), "--stale-labels"]).stale_labels
  assert parse(EvaluateOptions, None, "evaluate", ["b", "d", "--stale-labels"]).stale_labels
  monkeypatch.setattr(sys, "argv", ["labels", str(tmp_path / "s")])
  assert cli(listing.main)() == 0
  out = capsys.readouterr().out
  assert out.count("stale: since then trees are trees") == 2 and "2 groups stale" in out
  assert store.groups("frames")[0].stale == []


def test_labels_made_anew_stand_for_the_stale_ones(tmp_path, mended):
  store = write_store(tmp_path / "s")
  old = store.groups("simulator")
  before = old[0].meta["rules"]
  mended()
  for g in old:
    meta = {**g.meta, "rules": rules_of(g.meta)}
    assert (
      meta["rules"] == {**before, "trees": 2}
      and key_of(meta) != key_of(g.meta)
      and stale_rules(meta) == []
      and stale_rules(g.meta) == ["trees"]
    )
    new = store.root / g.segment / f"simulator-{key_of(meta)}"
    g.path.rename(new)
    (new / "group.json").write_text(json.dumps(meta))
    group_of(store, g.segment, "simulator", g.labels, g.n, rules=before)  # what was there before, empty
  assert all(not g["simulator"].stale for g in store.by_segment({"simulator"}).values())
  assert len(Clips(tmp_path / "s", ["depth"], 1)) > 0


def test_which_labels_the_mended_rules_are_about():
  def meta(teacher="yolox-nano", focal=2648.0, stream="road", view=(512, 256)):
    camera = {"stream": stream, "intrinsics": [[focal, 0, 0], [0, focal, 0], [0, 0, 1]]}
    return {
      "teacher": {"name": teacher},
      "view": {"name": "medmodel", "width": view[0], "height": view[1]},
      "camera": camera,
    }

  assert rules_of(meta()) == {"smaller": 2}
  assert (
    rules_of(meta(view=(1024, 512))) == {}
    and rules_of(meta(focal=1141.5)) == {}
    and rules_of(meta("frames")) == {}
    and rules_of(meta("simulator")) == {}
  )
  assert rules_of(meta("frames", 722.4, "qcamera")) == {"qcamera": 2}
  uncalibrated = meta("frames", 910.0)
  uncalibrated["camera"] = {**uncalibrated["camera"], "calibrated": False}
  assert rules_of(uncalibrated) == {"calibration": 2} and stale_rules(uncalibrated) == ["calibration"]
  assert rules_of(meta("camvid", 910.0, "images")) == {"pictures": 2} and FRAME


def test_a_rows_entries_are_read_from_the_table(tmp_path):
  write_store(tmp_path / "s", routes=("00000001--aaaaaaaaaa",), n=16)
  group, reader = LabelStore(tmp_path / "s").groups("simulator")[0], Reader()
  whole = group.table("points").to_pydict()
  for row in (3, 0, 15, 3):
    got = reader.table(group, "points", row)
    at = [i for i, r in enumerate(whole["row"]) if r == row]
    assert len(at) == 4 and got["x"].tolist() == [whole["x"][i] for i in at]
    assert not {"row", "frame_id", "segment_id"} & set(got)


def test_attributes_say_what_the_numbers_of_classes_mean():
  """As the CF conventions have it: flag_values and flag_meanings, words with spaces between."""
  label = Label("segmentation", "dense", "uint8", (64, 128), "class", ("traffic light", "road"))
  out = attributes(label, {"teacher": {"name": "t"}, "view": {"name": "medmodel", "width": 512, "height": 256}})
  assert (out["classes"], out["flag_values"], out["flag_meanings"]) == (
    ["traffic light", "road"],
    [0, 1],
    "traffic_light road",
  )
  assert (out["long_name"], out["units"], out["kind"]) == ("segmentation by t", "1", "class")


def test_frames_that_could_not_be_decoded_teach_and_judge_nothing(tmp_path):
  """The first two of sixteen, and one in the middle: no clip holds them. What is no list of rows is said."""
  write_store(tmp_path, ("00000001--aaaaaaaaaa",))
  group = next(g for g in LabelStore(tmp_path).groups("frames"))
  commit = json.loads(group.commit_path(0).read_text())
  group.commit_path(0).write_text(json.dumps({**commit, "bad": [0, 1, 7]}))
  assert group.bad() == {0, 1, 7}
  assert Clips(tmp_path, ["depth"], 1).starts[:, 1].tolist() == [2, 3, 4, 5, 6, *range(8, 16)]
  assert Clips(tmp_path, ["depth"], 4).starts[:, 1].tolist() == [2, 8, 10, 12]
  (segment,) = open_segments(tmp_path, {"simulator"}, [])
  assert segment.rows == [2, 3, 4, 5, 6, *range(8, 16)] and len(segment.ids) == 13
  assert len(LabelDataset(tmp_path, ["frames/frame", "simulator/depth"])) == 13
  for wrong in ([16], ["x"], 3):
    group.commit_path(0).write_text(json.dumps({**commit, "bad": wrong}))
    with pytest.raises(UserError, match="damaged; label again with --repair"):
      group.bad()
