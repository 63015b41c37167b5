"""Driving networks and students adapted with DoRA to dense teachers: what is learned and what stays, the whole way to
files, going on, and bad input."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from dino_models import save_dinov2
from label_fixture import LABELS, write_store

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.frames import pack_rgb, unpack_rgb
from openpilot.tools.dgx.training.export import export as export_driving
from openpilot.tools.dgx.training.model import load_onnx
from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.trainer import Run as DistillRun
from openpilot.tools.fair.labels import label as labeling
from openpilot.tools.fair.bundle import export as exporting
from openpilot.tools.dgx.dense import dora_distillation
from openpilot.tools.dgx.dense.driving_features import DrivingFeatures, big_frame, frames_back, pair_up
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.sim.write_route import write_route

DEPTH = LABELS[:1]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
  """Depth of made-up frames; two routes, one of which is held out."""
  root = tmp_path_factory.mktemp("labels") / "s"
  write_store(root, labels=DEPTH)
  return root


def command(monkeypatch, *words, main=dora_distillation.main) -> int:
  monkeypatch.setattr("sys.argv", ["x", *map(str, words)])
  return cli(main)()


def held_out(run: Path) -> list[dict[str, float]]:
  return [x["val"] for x in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "val" in x]


def part(val: dict[str, float], name: str) -> float:
  return sum(v for k, v in val.items() if k.split("/")[0] == name)


def test_the_big_view_shows_the_same_at_half_the_size():
  rgb = np.full((256, 512, 3), 30, np.uint8)
  rgb[100:117, 300:333] = 220
  seen = unpack_rgb(big_frame(pack_rgb(rgb)))[..., 1] > 125
  ys, xs = np.nonzero(seen)
  # openpilot's two views: f 910, c (256, 47.6), and f 455, c (256, 151.8); the block's middle is (316, 108)
  assert np.allclose([xs.mean(), ys.mean()], [256 + (316 - 256) / 2, 151.8 + (108 - 47.6) / 2], atol=0.6)
  assert seen.sum() == pytest.approx(17 * 33 / 4, rel=0.15)


def test_pairs_are_two_hundred_milliseconds_apart_the_older_first():
  frames = torch.from_numpy(
    np.random.default_rng(0).integers(0, 256, (6, 6, 128, 256), dtype=np.uint8)
  )  # two clips of three
  batch = {
    "frame": frames,
    "valid": torch.arange(6),
    "depth": torch.arange(6),
    "metric": torch.arange(6),
    "clip": torch.arange(6),
  }
  out = pair_up(batch, 3)
  assert out["frame"].shape == (2, 24, 128, 256) and out["depth"].tolist() == out["valid"].tolist() == [2, 5]
  for clip, (first, last) in enumerate(((0, 2), (3, 5))):
    assert torch.equal(out["frame"][clip, :6], frames[first]) and torch.equal(out["frame"][clip, 6:12], frames[last])
    assert np.array_equal(out["frame"][clip, 18:].numpy(), big_frame(frames[last].numpy()))
  assert [frames_back(n) for n in (1, 2, 4)] == [4, 2, 1]
  with pytest.raises(UserError, match="every 3th frame"):
    frames_back(3)


def test_the_map_is_the_one_asked_for(base):
  student = DrivingFeatures(load_onnx(base)).eval()
  pairs = torch.randint(0, 256, (2, 24, 128, 256), dtype=torch.uint8)
  with torch.no_grad():
    out = student(pairs)
    alone = student(pairs[1:])
  assert (
    out["features"].shape == (2, student.features, 8, 16)
    and out["depth"].shape == (2, 1, 64, 128)
    and out["plan"].shape[0] == 2
  )
  torch.testing.assert_close(out["features"][1:], alone["features"], atol=1e-4, rtol=1e-4)
  assert student.upto[-1] == student.tap and len(student.upto) < len(student.layers)
  with pytest.raises(UserError, match=r"no map nowhere to read features from; --tap takes one of: .*24x64x128"):
    DrivingFeatures(load_onnx(base), "nowhere")


@pytest.mark.slow
def test_a_driving_network_learns_from_dinov2_and_the_simulators_depth(base, tmp_path, monkeypatch, capsys):
  """The whole way as typed: simulated routes, labels by a small DINOv2 of the real architecture and by the simulator,
  DoRA, openpilot's ONNX again."""
  torch.manual_seed(0)
  save_dinov2(tmp_path / "dino")
  for seed in (4, 5):
    write_route(tmp_path / "routes", seed, 1.2, qcamera_only=True)
  words = [
    "--teachers",
    "simulator,dinov2-small",
    "--weights",
    f"dinov2-small={tmp_path / 'dino'}",
    "--camera",
    "qcamera",
    "--view",
    "128x64",
    "--every",
    2,
  ]
  assert (
    command(
      monkeypatch, *sorted((tmp_path / "routes").iterdir()), *words, "--out", tmp_path / "labels", main=labeling.main
    )
    == 0
  )
  words = [
    "--labels",
    tmp_path / "labels",
    "--base",
    base,
    "--output",
    tmp_path / "run",
    "--batch-size",
    4,
    "--workers",
    0,
    "--no-augment",
  ]
  assert command(monkeypatch, *words, "--steps", 16, "--eval-every", 8, "--lr", 1e-2, "--dora-rank", 4) == 0
  assert (
    "features, depth of 10 clips of 3 frames" in capsys.readouterr().out and (tmp_path / "run" / "adapter").is_dir()
  )
  first, *_, last = held_out(tmp_path / "run")
  assert first["keep"] < 1e-5  # an adapter begins as nothing
  assert part(last, "depth") < 0.8 * part(first, "depth")  # on a route that it has not seen
  lines = [
    x["features/features"]
    for x in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    if "loss" in x
  ]
  assert (
    len(lines) == 16 and np.mean(lines[-4:]) < 0.9 * lines[0]
  )  # what a random DINOv2 sees can be learned by heart only
  state = load_checkpoint(tmp_path / "run" / "best_model.pt")
  assert len(state["provenance"]) == 2
  found = export_driving(tmp_path / "run" / "best_model.pt", tmp_path / "tuned.onnx", tinygrad=False)
  assert found["torch_merge"] < 1e-4 and found["onnxruntime"] < 1e-4
  was, now = onnx.load(str(base)), onnx.load(str(tmp_path / "tuned.onnx"))
  assert [(i.name, i.type) for i in was.graph.input] == [(i.name, i.type) for i in now.graph.input]
  weights = [{i.name: onnx.numpy_helper.to_array(i) for i in m.graph.initializer} for m in (was, now)]
  changed = {n for n, w in weights[0].items() if not np.array_equal(w, weights[1][n])}
  assert changed and all(n.startswith("vision.blocks") for n in changed)  # what follows the map stays


def settings(**more) -> dora_distillation.Settings:
  weights = {**dora_distillation.WEIGHTS, "path": 0.0}
  return dora_distillation.Settings(
    **{"steps": 4, "batch_size": 2, "dora_rank": 2, "eval_every": 2, "weights": weights, **more}
  )


@pytest.mark.slow
def test_going_on_is_bit_for_bit_the_unbroken_run(base, store, tmp_path, monkeypatch):
  def make(out: Path, conf=None) -> dora_distillation.Run:
    out.mkdir(exist_ok=True)
    return dora_distillation.Run(conf or settings(), base, Clips(store, ["depth"], 5), None, out, "labels")

  whole = make(tmp_path / "whole")
  frozen = {n: p.clone() for n, p in whole.model.named_parameters() if n not in whole.learned}
  whole.fit()
  now = dict(whole.model.named_parameters())
  assert frozen and all(torch.equal(now[n], p) for n, p in frozen.items())
  broken = make(tmp_path / "broken")
  save = broken.save

  def stops(name: str) -> None:
    save(name)
    if name == dora_distillation.RESUME:
      raise KeyboardInterrupt

  monkeypatch.setattr(broken, "save", stops)
  with pytest.raises(KeyboardInterrupt):
    broken.fit()
  again = make(tmp_path / "broken")
  again.load(load_checkpoint(tmp_path / "broken" / "resume.pt"))
  assert again.step == 2
  again.fit()
  assert again.step == 4 and all(torch.equal(again.learned[n], p) for n, p in whole.learned.items())
  with pytest.raises(UserError, match="dora_rank 2 then, 4 now; give the same"):
    make(tmp_path / "broken", settings(dora_rank=4)).load(load_checkpoint(tmp_path / "broken" / "resume.pt"))


@pytest.mark.slow
def test_a_student_is_adapted_and_exported_as_a_bundle(store, tmp_path, monkeypatch):
  run = tmp_path / "distilled"
  run.mkdir()
  conf = Config(student="depth-nano", tasks=["depth"], steps=2, batch=2, warmup=1, eval_every=2)
  DistillRun(conf, Clips(store, ["depth"], 1), None, run, "labels", workers=0).fit()
  words = [
    "--labels",
    store,
    "--student",
    run,
    "--steps",
    8,
    "--eval-every",
    4,
    "--lr",
    1e-2,
    "--batch-size",
    4,
    "--workers",
    0,
    "--no-augment",
  ]
  assert command(monkeypatch, *words, "--output", tmp_path / "adapted") == 0
  first, *_, last = held_out(tmp_path / "adapted")
  assert part(last, "depth") < part(first, "depth")
  was, now = load_checkpoint(run / "best.pt")["ema"], load_checkpoint(tmp_path / "adapted" / "best.pt")["ema"]
  student = {k for k in was if k.startswith("student.")}
  assert set(now) == student  # no trace of adapters, projector
  same = {k for k in student if torch.equal(was[k], now[k])}
  assert {k for k in student if "running_" in k} <= same and len(same) < len(student)
  assert (
    command(monkeypatch, tmp_path / "adapted", "--no-tinygrad", "--out", tmp_path / "bundle", main=exporting.main) == 0
  )
  assert load_bundle(tmp_path / "bundle").name == "bundle"


def test_the_table_names_what_was_clipped(base, store, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(dora_distillation.Run, "fit", lambda self: {})
  words = ["--labels", store, "--base", base, "--workers", 0, "--output"]
  assert command(monkeypatch, *words, tmp_path / "a", "--dora-rank", 64) == 0
  assert "rank clipped on " in capsys.readouterr().out
  assert command(monkeypatch, *words, tmp_path / "b", "--dora-rank", 1) == 0
  assert "clipped" not in capsys.readouterr().out
  assert command(monkeypatch, "--config", tmp_path / "b", "--output", tmp_path / "c") == 0
  a, b = ((tmp_path / k / "options.yaml").read_text() for k in "bc")
  assert a.replace(str(tmp_path / "b"), str(tmp_path / "c")) == b != a
  said = json.loads((tmp_path / "c" / "environment.json").read_text())["command"]
  assert "--config" not in said and "--dora-rank 1" in said


def test_bad_input(base, store, tmp_path, monkeypatch, capsys):
  def refused(*words) -> str:
    assert command(monkeypatch, *words) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]

  good = ["--labels", store, "--output", tmp_path / "x", "--base", base]
  assert "no label store" in refused(*good[2:], "--labels", tmp_path)
  assert "give --base" in refused(*good[:4]) and "one of them" in refused(*good, "--student", tmp_path)
  assert "there is no" in refused(*good[:4], "--base", tmp_path / "none.onnx")
  assert "PART=NUMBER" in refused(*good, "--weight", "depth")
  assert "the parts are features, depth, keep, path" in refused(*good, "--weight", "points=1")
  assert "at least 1" in refused(*good, "--steps", 0)
  assert "there are features, depth" in refused(*good, "--tasks", "points")
  assert "nothing that teaches 'features'; add a teacher of dense features" in refused(*good, "--tasks", "features")
  assert "leave --resume out" in refused(*good, "--resume")
  assert "nothing to adapt" in refused(*good, "--targets", "nowhere", "--workers", 0)
  said = refused(*good, "--dora-rank", 100000, "--workers", 0)
  assert (
    "rank 100000 is too large: no layer to adapt takes more than" in said and "the largest sensible rank is" in said
  )
  write_store(tmp_path / "boxes", labels=LABELS[2:])
  assert "neither dense features nor depth" in refused("--labels", tmp_path / "boxes", *good[2:])
  write_store(tmp_path / "restricted", labels=DEPTH, teacher="dinov3-vits16", license="DINOv3")
  assert "--accept-license DINOv3" in refused("--labels", tmp_path / "restricted", *good[2:])
