"""Teachers that say nothing, or what is no number: counted, and refused where all of it is so."""

import numpy as np
import pytest
from test_labels import FRAMES, run
from test_labels import route as written_route

from openpilot.tools.fair.labels.labeling import refuse_silence, run_teacher
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError

route = written_route  # a fixture of theirs


class Silent:
  """Tables without a row."""

  name, model_id, checkpoint_hash, license, stateful = "silent", "", "", "MIT", False
  labels = [Label("lines", "points")]

  def __init__(self, wants):
    self.wants = wants

  def prepare(self, height, width): ...

  def settings(self):
    return {}

  def label(self, clip, state=None):
    return {"lines": {"frame": np.zeros(0, np.int32), "x": np.zeros(0, np.float32), "y": np.zeros(0, np.float32)}}, None


def test_nothing_labeled_is_no_success(route, tmp_path, capsys):
  (view, _) = find_views([str(route)], None, "qcamera", 5, None)
  store = LabelStore(tmp_path, create=True)
  for wants in ("rgb", "none"):
    teacher = Silent(wants)
    groups = run_teacher(teacher, [view], store, every=5, progress=False)
    if wants == "rgb":  # an empty road
      refuse_silence(teacher, groups, store, 5)
      assert (
        "warning: teacher 'silent' says nothing of any of the 30 frames" in capsys.readouterr().err
        and len(store.groups()) == 1
      )
    else:
      with pytest.raises(
        UserError,
        match=r"'silent' says nothing of any of the 30 frames, and nothing of it was stored; .*without --every",
      ):
        refuse_silence(teacher, groups, store, 5)
  assert store.groups() == []


def test_a_qlogs_lines_that_every_misses(shared_data, tmp_path):
  r = run(
    shared_data / "realdata" / "0000002c--d68dde99ca--1",
    "--teachers",
    "openpilot",
    "--no-frames",
    "--every",
    5,
    "--out",
    tmp_path / "s",
  )
  assert r.returncode == 2 and "says nothing of any of the 240 frames" in r.stderr and r.stderr.count("error: ") == 1
  assert LabelStore(tmp_path / "s").groups() == []


class Broken:
  """Depth with one NaN, an infinite sky, and boxes, one of them without a place, in `bad` of its frames; all NaN where
  everything is bad."""

  name, model_id, checkpoint_hash, license, stateful = "broken", "", "", "MIT", False
  maps = [Label("depth", "dense", "float16", (4, 8), "m"), Label("thing", "dense", "float16", (4, 8), "probability")]
  labels = [*maps, Label("boxes", "boxes", classes=("car",))]

  def __init__(self, bad):
    self.bad = bad

  def prepare(self, height, width): ...

  def settings(self):
    return {}

  def label(self, clip, state=None):
    n = len(clip.rgb)
    bad = np.array([i in self.bad for i in clip.frame_ids])
    depth, thing = np.full((n, 4, 8), np.inf), np.full((n, 4, 8), 0.5)
    depth[bad, 1, 1], thing[bad, 2, 2] = np.nan, np.inf
    x0 = np.repeat(np.where(bad, np.nan, 10.0), 2)
    x0[1::2] = 20
    boxes = {
      "frame": np.repeat(np.arange(n), 2),
      "x0": x0,
      "y0": x0 * 0,
      "x1": x0 + 9,
      "y1": x0 * 0 + 9,
      "score": x0 * 0 + 1,
      "cls": np.zeros(2 * n, np.int16),
    }
    return {"depth": depth, "thing": thing, "boxes": boxes}, None


def test_what_is_no_number_is_counted_and_a_broken_teacher_refused(route, tmp_path, capsys):
  (view, _) = find_views([str(route)], None, "qcamera", 1, None)
  some = {e.frame_id for e in view.entries[:20]}
  (group,) = run_teacher(Broken(some), [view], LabelStore(tmp_path / "some", create=True), progress=False)
  err = capsys.readouterr().err
  for name in ("depth", "thing", "boxes"):
    assert f"teacher 'broken' puts out NaN or Inf as '{name}' in 20 of {FRAMES[0]} frames" in err
  assert np.isnan(group.dense("depth")[19, 1, 1]) and np.isinf(group.dense("depth")[30]).all()
  table = group.table("boxes")
  assert table.num_rows == 2 * FRAMES[0] - 20 and set(table["x0"].to_pylist()) == {10, 20}
  most = {e.frame_id for e in view.entries[:40]}
  with pytest.raises(
    UserError,
    match=r"'broken' puts out NaN or Inf as 'depth' in 40 of 64 frames of .* not stored; .*--option "
    r"broken\.precision=float32",
  ):
    run_teacher(Broken(most), [view], LabelStore(tmp_path / "most", create=True), progress=False)
  (group,) = LabelStore(tmp_path / "most").groups()
  assert group.done() == set()
  run_teacher(Broken(set()), [view], LabelStore(tmp_path / "none", create=True), progress=False)
  assert "NaN" not in capsys.readouterr().err
