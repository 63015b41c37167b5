import json
import os
import signal

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
torch = pytest.importorskip("torch")

from openpilot.selfdrive.modeld.fair.bundle import find_bundle
from openpilot.selfdrive.modeld.fair.frames import pack_rgb
from openpilot.selfdrive.modeld.fair.model import FairModel
from openpilot.tools.fair.scene_nano.student import SceneStudent
from openpilot.tools.fair.scene_nano.losses import depth_loss, depth_mask, segmentation_loss
from openpilot.tools.fair.scene_nano.data import SceneData, render_data
from openpilot.tools.fair.scene_nano.train import ROOT, augment, evaluate, export, train, val_dir
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.render import CLASSES, render
from openpilot.tools.sim.truth import IGNORE, map_labels
from openpilot.tools.sim.world import World
from openpilot.common.transformations.model import medmodel_intrinsics


def test_size_and_shapes():
  m = SceneStudent().eval()
  assert sum(p.numel() for p in m.parameters()) < 2_000_000
  depth, logits = m(torch.randint(0, 256, (2, 6, 128, 256), dtype=torch.uint8))
  assert depth.shape == (2, 1, 64, 128) and logits.shape == (2, len(CLASSES), 64, 128)


def test_its_weights_have_the_shapes_of_the_shipped_bundle():
  graph = onnx.load(str(find_bundle("scene-nano", ROOT / "models").path / "scene.onnx")).graph
  shipped = sorted(tuple(x.dims) for x in graph.initializer if len(x.dims) == 4)
  assert sorted(tuple(p.shape) for p in SceneStudent().parameters() if p.dim() == 4) == shipped


def test_losses_against_float64():
  r = np.random.default_rng(0)
  log_depth, depth = r.normal(2, 1, (2, 8, 9)), np.exp(r.normal(2, 1, (2, 8, 9)))
  depth[0, 0, :4] = [np.inf, np.nan, 0, 300]
  classes = r.integers(0, 5, (2, 8, 9))
  classes[1, 1] = IGNORE
  logits, weights = r.normal(0, 2, (2, 5, 8, 9)), r.uniform(0.5, 5, 5)
  mask = depth_mask(torch.tensor(depth), torch.tensor(classes))
  ok = np.isfinite(depth) & (depth > 0) & (depth < 200) & (classes != IGNORE)
  assert (mask.numpy() == ok).all() and not ok[0, 0, :4].any()
  g = log_depth[ok] - np.log(depth[ok])
  want = np.abs(g).mean() + np.sqrt((g * g).mean() - 0.5 * g.mean() ** 2 + 1e-8)
  assert float(depth_loss(torch.tensor(log_depth), torch.tensor(depth), mask)) == pytest.approx(want, rel=1e-12)
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  nll = weight = 0.0
  dice = []
  for c in range(5):
    at = classes == c
    nll -= weights[c] * np.log(p[:, c][at]).sum()
    weight += weights[c] * at.sum()
    known = classes != IGNORE
    dice.append(1 - (2 * p[:, c][at].sum() + 1) / (p[:, c][known].sum() + at.sum() + 1))
  got = segmentation_loss(torch.tensor(logits), torch.tensor(classes), torch.tensor(weights))
  assert float(got) == pytest.approx(nll / weight + np.mean(dice), rel=1e-12)
  assert float(depth_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool))) == 0


def test_augmentation_moves_labels_with_the_picture():
  """Frames whose brightness encodes the class stay so: mirrored together; and border pixels count nowhere."""
  classes = torch.zeros(64, 64, 128, dtype=torch.int64)
  classes[:, :, 80:] = 3
  frames = torch.full((64, 6, 128, 256), 128, dtype=torch.uint8)
  frames[:, :4] = (
    torch.where(classes == 3, 200, 60).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].to(torch.uint8)
  )
  depth = classes.float() + 1
  out, depth = augment(frames, depth, classes, torch.Generator().manual_seed(3))
  mirrored = cut = 0
  for i in range(64):
    luma = out[i, :4].float().mean(0).reshape(64, 2, 128, 2).mean((1, 3))
    known = classes[i] != IGNORE
    bright, dark = luma[known & (classes[i] == 3)], luma[known & (classes[i] == 0)]
    assert bright.min() > dark.max() or bright.mean() - dark.mean() > 20
    assert ((depth[i] == 4) == (classes[i] == 3))[known].all()
    mirrored += bool(classes[i, 30, 30] == 3)
    cut += bool((~known).any())
  assert 15 < mirrored < 50 and 1 <= cut < 30


def test_shipped_bundle_beats_guessing_on_a_new_world():
  bundle = find_bundle("scene-nano", ROOT / "models")
  runner = FairModel(bundle).runners["scene"]
  depths, classes, preds, maps = [], [], [], []
  for k, seed in enumerate(range(3_000_000, 3_000_006)):
    f = render(World(seed, ("day", "night")[k % 2], 10.0), 4.0, medmodel_intrinsics, 512, 256)
    d, c = map_labels(f.depth, f.semantic)
    out = runner.run({"frame": pack_rgb(f.rgb)[None]})
    depths.append(d.astype(float))
    classes.append(c)
    preds.append(np.exp(out["depth"][0, 0].astype(float)))
    maps.append(out["segmentation"][0].argmax(0))
  depth, cls, pred, seg = map(np.array, (depths, classes, preds, maps))
  ok = np.isfinite(depth) & (depth < 200)
  mean_map = np.exp(
    np.nanmean(np.where(ok, np.log(np.where(ok, depth, 1)), np.nan), axis=0)
  )  # knows these very frames' mean: a strong guess
  guess = np.abs(np.broadcast_to(mean_map, depth.shape)[ok] / depth[ok] - 1).mean()
  assert np.abs(pred[ok] / depth[ok] - 1).mean() < 0.6 * guess
  majority = np.apply_along_axis(lambda x: np.bincount(x, minlength=5).argmax(), 0, cls)
  assert (seg == cls).mean() > 0.93 > (np.broadcast_to(majority, cls.shape) == cls).mean()
  sizes = sum(p.stat().st_size for p in bundle.path.iterdir())
  assert sizes < 10e6


@pytest.mark.slow
def test_render_train_resume_export(tmp_path):
  """The whole path, small: rendering resumes, a resumed training is bit-equal to an unbroken one, and the bundle
  runs."""
  data = tmp_path / "data"
  render_data(data, 16, 50)
  render_data(val_dir(data), 8, 900_000)
  before = np.array(SceneData(data).frames)
  (data / "info.json").write_text(json.dumps({**json.loads((data / "info.json").read_text()), "times": []}))
  render_data(data, 16, 50)
  assert (SceneData(data).frames == before).all()
  with pytest.raises(UserError, match="other frames"):
    render_data(data, 24, 50)
  torch.use_deterministic_algorithms(True)
  try:
    train(data, tmp_path / "whole", 4, 2, 1e-3, 0)
    from openpilot.tools.fair.scene_nano import train as train_scene

    calls = 0
    real = train_scene.augment

    def interrupted(*a):
      nonlocal calls
      calls += 1
      if calls == 3:  # Ctrl-C: the step is finished first
        os.kill(os.getpid(), signal.SIGINT)
      return real(*a)

    train_scene.augment = interrupted
    with pytest.raises(KeyboardInterrupt):
      train(data, tmp_path / "broken", 4, 2, 1e-3, 0)
    train_scene.augment = real
    state = torch.load(tmp_path / "broken" / "last.pt", weights_only=True)
    assert state["step"] == 3
    state["opt"] = state.pop("optimizer")  # as it was called before
    torch.save(state, tmp_path / "broken" / "last.pt")
    train(data, tmp_path / "broken", 4, 2, 1e-3, 0)
    a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "broken"))
    assert a["step"] == b["step"] == 4 and all(
      torch.equal(a["model"][k], b["model"][k]) and torch.equal(a["ema"][k], b["ema"][k]) for k in a["model"]
    )
  finally:
    torch.use_deterministic_algorithms(False)
  export(tmp_path / "whole", data, tmp_path / "tiny-scene")
  bundle = find_bundle("tiny-scene", tmp_path)
  assert FairModel(bundle).runners["scene"].run({"frame": np.zeros((1, 6, 128, 256), np.uint8)})["depth"].shape == (
    1,
    1,
    64,
    128,
  )
  assert set(evaluate(SceneStudent(), SceneData(val_dir(data)))["all"]) >= {"abs_rel", "delta1", "silog", "miou"}
