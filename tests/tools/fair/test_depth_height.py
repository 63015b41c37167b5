"""Depth in heights of the camera: what is taught, what a student that learned it is called, and what the device makes
of it."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from label_fixture import group_of, write_store

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.heads import HEADS
from openpilot.selfdrive.modeld.fair.heads.depth import map_centers
from openpilot.tools.fair.bundle import export
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.distillation.augment import NONE, Augmentation
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.initial import in_unit
from openpilot.tools.fair.evaluation.compared import Compared
from openpilot.tools.fair.evaluation.student import Student
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.spec import road_classes
from openpilot.tools.fair.students.onnx_import import bundle_state
from openpilot.tools.fair.students.student import build
from openpilot.tools.fair.tasks import TASKS, Said
from openpilot.tools.fair.teacher import Label
from openpilot.tools.sim.truth import MAP_H, MAP_W

METERS = Label("depth", "dense", "float32", (MAP_H, MAP_W), "m")
RELATIVE = Label("depth", "dense", "float32", (MAP_H, MAP_W), "relative")
ZOOM = Augmentation(np.array([[1.25, 0, -60], [0, 1.25, -10.0], [0, 0, 1]]), 1.25)


def road(height):
  """(64, 128) float32, m: depth of the road plane so far below the camera, nan above 100 m."""
  y = map_centers(MAP_H, MAP_W)[1] - medmodel_intrinsics[1, 2]
  z = np.where(y > 0, medmodel_intrinsics[1, 1] * height / np.maximum(y, 1e-3), np.nan)
  return np.repeat(np.where(z < 100 * height, z, np.nan)[:, None], MAP_W, axis=1).astype(np.float32)


@pytest.mark.parametrize("change", [NONE, ZOOM], ids=["as it is", "zoomed"])
def test_a_road_teaches_the_same_from_every_height(change):
  r = np.random.default_rng(0)
  taught = [TASKS["depth"].targets(Said([METERS], [road(h)], height=h), change, r)["depth"] for h in (1.0, 1.5, 2.0)]
  assert np.isfinite(taught[0]).sum() > 2000
  np.testing.assert_allclose(taught[1], taught[0], rtol=1e-4)
  np.testing.assert_allclose(taught[2], taught[0], rtol=1e-4)
  # and without a height, or of what is no distance, what was stored
  for said in (Said([METERS], [road(1.5)]), Said([RELATIVE], [1 / road(1.5)], height=1.5)):
    alone = Said(said.labels, said.values)
    out, want = (TASKS["depth"].targets(x, change, r)["depth"] for x in (said, alone))
    np.testing.assert_array_equal(out, want)
  np.testing.assert_allclose(TASKS["depth"].targets(Said([METERS], [road(1.5)]), NONE, r)["depth"][0], road(1.5), 1e-6)


@pytest.mark.parametrize("activation", ["exp", "none"])
def test_meters_grow_with_the_height(activation):
  raw = np.random.default_rng(0).uniform(0.5, 3, (1, 1, MAP_H, MAP_W)).astype(np.float32)
  valid, decode = np.ones((256, 512), bool), HEADS["depth"].decode
  said = {"depth": {"parameters": {"activation": activation, "per_height": True}}}
  heights = np.exp(raw[0, 0]) if activation == "exp" else raw[0, 0]
  before = raw.copy()
  for height in (1.0, 1.22, 2.0):
    out = decode({"depth": raw}, said, valid, height)
    assert out.metric and out.scale == height and out.scale_std == 0.05
    np.testing.assert_allclose(out.z, height * heights, rtol=1e-5)
    # a bundle that does not say it is as before
    for metric in (True, False):
      old = {"depth": {"parameters": {"activation": activation, "metric": metric}}}
      out = decode({"depth": raw}, old, valid, height)
      assert out.metric == metric and (out.scale, out.scale_std) == (1.0, 0.0)
      np.testing.assert_allclose(out.z, heights, rtol=1e-6)
  np.testing.assert_array_equal(raw, before)
  far = decode(
    {"depth": np.full_like(raw, 50)}, {"depth": {"parameters": {"activation": "exp", "per_height": True}}}, valid, 4.0
  )
  assert np.isfinite(far.z.astype(np.float16)).all()


def test_the_store_has_the_height_and_its_key_does_not(tmp_path):
  store = LabelStore(tmp_path / "s", create=True)
  bare = group_of(store, "00000001--aaaaaaaaaa--0", "frames", [METERS], 3)
  assert bare.camera_height is None and "camera_height" not in bare.meta
  meta = json.loads((bare.path / "group.json").read_text())
  again = store.group(meta, [], camera_height=1.5)  # labeled again, now that it is known
  assert again.path == bare.path and again.camera_height == 1.5
  assert {**meta, "camera_height": 1.5} == json.loads((bare.path / "group.json").read_text())
  now = (bare.path / "group.json").read_bytes()
  assert store.group(meta, []).camera_height == 1.5 and (bare.path / "group.json").read_bytes() == now


def test_what_the_store_says_is_what_is_taught(tmp_path):
  """One segment of two has its height, the other is taken for openpilot's 1.22 m, and that is said."""
  write_store(tmp_path / "s")
  store = LabelStore(tmp_path / "s")
  (group,) = store.groups("frames", "00000002--bbbbbbbbbb--0")
  meta = json.loads((group.path / "group.json").read_text())
  store.group(meta, [], camera_height=2.0)
  meters, heights = (Clips(tmp_path / "s", ["depth"], 1, per_height=x) for x in (False, True))
  assert meters.without_height() == []
  (line,) = heights.without_height()
  assert line.startswith("of 1 of 2 segments") and "00000001--aaaaaaaaaa--0" in line and "1.22 m" in line
  r = np.random.default_rng(0)
  for k in (0, len(heights) - 1):
    a, b = (TASKS["depth"].targets(c.read(k).said["depth"], NONE, r)["depth"] for c in (meters, heights))
    np.testing.assert_allclose(a / b, 1.22 if k == 0 else 2.0, rtol=1e-6)
  digest = distill.digest(tmp_path / "s")
  store.group(meta, [], camera_height=1.9)
  assert distill.digest(tmp_path / "s") != digest  # other targets: no run goes on with them


def test_a_student_changes_its_unit_by_a_constant():
  student, frame = build("depth-nano").eval(), torch.randint(0, 256, (1, 6, 128, 256), dtype=torch.uint8)
  ema = {f"student.{k}": v.clone() for k, v in student.state_dict().items()}
  config = vars(Config("depth-nano", ["depth"]))
  old = {k: v for k, v in config.items() if k != "per_height"}
  assert not Config.from_dict({**old, "classes": None, "input": None}).per_height  # as once everything
  with torch.no_grad():
    before = student(frame)["depth"]
    for said, per_height, sign in (
      ({"config": {**old, "classes": None, "input": None}}, True, -1),
      ({"per_height": True}, False, 1),
      ({"per_height": False}, False, 0),
    ):
      now = in_unit({**said, "ema": ema}, per_height, "x")["ema"]
      student.load_state_dict({k.removeprefix("student."): v for k, v in now.items()})
      np.testing.assert_allclose(student(frame)["depth"], before + sign * math.log(1.275), atol=1e-5)


@pytest.mark.slow
def test_a_run_says_its_unit_to_its_bundle_and_to_the_next_run(tmp_path, monkeypatch, capsys):
  write_store(tmp_path / "s", n=8)

  def command(main, *words):
    monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
    main()
    return capsys.readouterr().err

  common = ("--labels", tmp_path / "s", "--student", "depth-nano", "--steps", 1, "--batch-size", 4, "--workers", 0)
  said = command(distill.main, *common, "--output", tmp_path / "meters", "--no-per-height")
  assert "height" not in said
  said = command(distill.main, *common, "--output", tmp_path / "run", "--init", tmp_path / "meters")
  assert "of 1 of 1 segments" not in said and "the camera's height is not known" in said
  assert "its depth is in meters, and heights of the camera are learned now: 1.275 m" in said
  frames = torch.zeros(2, 6, 128, 256, dtype=torch.uint8)
  valid, frame = np.ones((256, 512), bool), np.full((6, 128, 256), 90, np.uint8)
  for run, parameters in (
    ("meters", {"activation": "exp", "metric": True}),
    ("run", {"activation": "exp", "per_height": True}),
  ):
    command(export.main, tmp_path / run, "--output", tmp_path / "b" / run, "--no-tinygrad")
    bundle = load_bundle(tmp_path / "b" / run)
    assert bundle.graphs[0]["outputs"][0]["parameters"] == parameters
    state = bundle_state(tmp_path / "b" / run, frames)
    assert state["per_height"] == (run == "run")
    assert [(x["steps"], x["frames"]) for x in state["history"]] == [(1, 4)] * (1 if run == "meters" else 2)
    assert state["history"][0]["sources"][0]["share"] == 1
    student = Student(bundle, Compared(road_classes()))
    low = student.step(frame, 0, valid, None)
    student.reset(2.44)
    high = student.step(frame, 0, valid, None)
    assert low.depth_kind == high.depth_kind == "metric"
    np.testing.assert_allclose(high.depth, low.depth * (2 if run == "run" else 1), rtol=1e-5)
