"""A relative teacher's depth put to meters: against a scale and a shift that are known, and what cannot be put so."""

import json
import sys

import numpy as np
import pytest
from label_fixture import FRAME, group_of

from openpilot.tools.fair.labels import meters
from openpilot.tools.fair.labels.meters import LEAST, Fit, fit, refit
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.sim.truth import MAP_H, MAP_W

SCALE, SHIFT = 0.004, 0.002  # 1/m for one of the relative teacher's numbers


def truth(height=1.3):
  """(64, 128) m: a road, and above it a wall 60 m ahead."""
  y = (np.arange(MAP_H) + 0.5) * 4 - 0.5 - 47.6
  return np.repeat(np.minimum(910 * height / np.maximum(y, 1e-3), 60.0)[:, None], MAP_W, axis=1)


def relative(z):
  return (1 / z - SHIFT) / SCALE


def test_scale_and_shift_come_back(rng):
  """Of two thirds of the cells that are sure, a tenth of which the two hold for different things."""
  z = truth()
  sure = np.where(rng.uniform(size=z.shape) < 0.66, z, 0)
  share = np.where(sure > 0, 0.08, 0)
  noisy = np.where(sure > 0, sure * (1 + share * rng.normal(0, 1, z.shape)), 0)
  wrong = (rng.uniform(size=z.shape) < 0.1) & (sure > 0)
  noisy[wrong] *= rng.uniform(0.2, 0.5, wrong.sum())
  out, found = refit(relative(z).astype(np.float32), noisy, share, 80.0)
  assert isinstance(found, Fit) and found.scale == pytest.approx(SCALE, rel=0.02)
  np.testing.assert_allclose(out, z, rtol=0.03)  # all of them, those too of which nobody was sure
  exact, found = refit(relative(z), np.where(sure > 0, z, np.inf), None, 80.0)
  assert found.off < 1e-6
  np.testing.assert_allclose(exact, z, rtol=1e-4)
  near, _ = refit(relative(z), sure, None, 50.0)
  assert (near[z > 51] == 0).all() and (near[z < 49] > 0).all()
  # a label of another size
  small, _ = refit(relative(z), np.kron(sure, np.ones((2, 2))), np.kron(share, np.ones((2, 2))), 80.0)
  assert small.shape == z.shape and np.median(np.abs(small / z - 1)) < 0.02


def test_what_cannot_be_put_to_meters_is_not():
  z = truth()
  few = z.copy()
  few.ravel()[LEAST - 1 :] = 0
  for x, depth, why in (
    (relative(z), few, "fewer than"),
    (relative(z), np.where((z > 20) & (z < 35), z, 0), "about as far"),
    (-relative(z), z, "is farther by the other"),
    (np.ones_like(z), z, "says the same everywhere"),
    (np.sin(np.arange(z.size) * 12.9898).reshape(z.shape) * 0.01 + relative(z) * 1e-3, z, "do not explain"),
    (np.full_like(z, np.nan), z, "fewer than"),
    (relative(z), np.full_like(z, np.inf), "fewer than"),
  ):
    out, found = refit(x, depth, None, 80.0)
    assert isinstance(found, str) and why in found and (out == 0).all()


def test_weights_are_variances(rng):
  """Two lines of cells: the one that is known ten times as well decides."""
  rho = np.linspace(0.02, 0.2, 2 * LEAST)
  x = (rho - SHIFT) / SCALE
  vague = np.arange(len(rho)) % 2 == 0
  said = np.where(vague, 1.3 * rho, rho)
  found = fit(x, said, np.where(vague, 0.5, 0.01) * rho)
  assert isinstance(found, Fit) and found.scale == pytest.approx(SCALE, rel=0.02)


def store_of(root, name="route-depth", n=3):
  store, segment, z = LabelStore(root, create=True), "00000001--aaaaaaaaaa--0", truth()
  frames = group_of(store, segment, "frames", FRAME, n, "")
  frames.write_chunk(0, {"frame": np.zeros((n, 6, 128, 256), np.uint8)})
  depth = np.stack([z, np.where(z < 9, z, 0), z])
  labels = [Label("depth", "dense", "float16", z.shape, "m"), Label("depth_std", "dense", "float16", z.shape, "std")]
  g = group_of(store, segment, name, labels, n, "b")
  g.write_chunk(0, {"depth": depth, "depth_std": np.where(depth > 0, 0.05, 0)})
  r = group_of(store, segment, "relative", [Label("depth", "dense", "float32", z.shape, "relative")], n, "c")
  r.write_chunk(0, {"depth": np.stack([relative(z) * k for k in (1, 1, 2)])})
  return store


def command(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["meters", *map(str, words)])
  meters.main()


def test_the_command_adds_a_teacher_and_says_what_it_left_out(tmp_path, monkeypatch, capsys):
  store = store_of(tmp_path / "s")
  words = (tmp_path / "s", "--relative", "relative")
  command(monkeypatch, *words)
  said = capsys.readouterr().out
  assert "1 segments, 3 frames; new: 2 of 3 frames are in meters" in said and "1 frames: all that is sure" in said
  (group,) = store.groups("relative-meters")
  out = group.read("depth", 0, 3).astype(float)
  assert group.label("depth").unit == "m" and (out[1] == 0).all()
  np.testing.assert_allclose(out[[0, 2]], np.stack([truth()] * 2), rtol=2e-3)  # float16
  meta = json.loads((group.path / "group.json").read_text())
  assert meta["teacher"]["model_id"] == "relative + route-depth" and meta["teacher"]["settings"]["by"] == "route-depth"
  before = {p: p.read_bytes() for p in group.path.rglob("*") if p.is_file()}
  command(monkeypatch, *words)  # again: nothing is done twice
  assert "new: 0 of 0 frames" in capsys.readouterr().out
  assert before == {p: p.read_bytes() for p in group.path.rglob("*") if p.is_file()}


def test_what_is_not_there_is_said(tmp_path, monkeypatch, capsys):
  store_of(tmp_path / "s")
  with pytest.raises(UserError, match="no segment that both depth-anything-v2-small and route-depth"):
    command(monkeypatch, tmp_path / "s")
  with pytest.raises(UserError, match="'route-depth' has no depth of unit 'relative'"):
    command(monkeypatch, tmp_path / "s", "--relative", "route-depth", "--by", "relative")
  with pytest.raises(UserError, match="--far 0"):
    command(monkeypatch, tmp_path / "s", "--relative", "relative", "--far", 0)
