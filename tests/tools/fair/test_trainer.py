"""Which clips a run sees next, and the sums that it keeps, without training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from openpilot.tools.fair.distillation import trainer
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.features import Standardiser
from openpilot.tools.fair.distillation.sampling import drawn, in_words, shares, weights_of
from openpilot.tools.fair.distillation.trainer import Run


class Planned(Run):
  """A run of n clips without a student: `order` is that of every epoch."""

  def __init__(self, n, clips, chosen=None, **config):
    self.config = SimpleNamespace(
      **{"batch": clips, "clip": 1, "seed": 0, "hard": 0.0, "augment": True, "mirror": False, "light": 1.0, "tasks": []}
      | {"zoom": None, "pixels": [], "turn": 0.0, "night": 0.0}
      | config
    )
    self.train = SimpleNamespace(order=lambda seed: np.arange(n), live=True)
    self.often = np.ones(n)
    self.chosen, self.clip_losses = chosen, np.zeros(n, np.float32)
    self.order, self.epoch, self.at, self.step, self.workers = [], -1, 0, 10, 0
    self.accelerator = SimpleNamespace(process_index=0, num_processes=1, device="cpu")


@pytest.mark.parametrize("n, clips, length", [(3, 4, 6), (4, 4, 4), (5, 4, 5), (1, 4, 4), (8, 2, 8)])
def test_an_epoch_has_every_clip_once_unless_a_step_wants_more(n, clips, length):
  run = Planned(n, clips)
  run.next_epoch()
  assert run.order == [k % n for k in range(length)] and (run.epoch, run.at) == (0, 0)


def test_clips_to_learn_by_heart_come_in_turn():
  """Three clips for steps of four: the first one twice in each, of at least 200 in all."""
  run = Planned(10, 4, chosen=np.array([3, 7, 9]))
  run.next_epoch()
  assert run.order == [3, 7, 9, 3] * 50


def test_the_hardest_clips_take_the_place_of_others():
  """From the second epoch on, as many as `hard` says."""
  run = Planned(20, 4, hard=0.1)
  run.clip_losses[[4, 11]] = 5, 7
  run.next_epoch()
  assert run.order == list(range(20))
  run.next_epoch()
  changed = [k for k, clip in enumerate(run.order) if clip != k]
  assert {run.order[k] for k in changed} <= {4, 11} and len(changed) in (1, 2)
  assert sum(run.order.count(k) for k in (4, 11)) >= 3


def test_segments_are_drawn_as_often_as_is_said():
  """Of 200 clips 20 three times, 30 half of the times, 10 never, the rest once and in their order; by seed and epoch.
  What is drawn again is spread over the epoch."""
  names = [f"{kind}{k}--0" for kind in ("night", "sim", "broken", "day") for k in range(2)]
  often = weights_of(names, ["*=2", "day*=1", "night*=3", "sim*=0.5", "broken*=0"])
  assert often.tolist() == [3, 3, 0.5, 0.5, 0, 0, 1, 1]
  run = Planned(200, 4)
  run.often = np.repeat(often, [10, 10, 15, 15, 5, 5, 70, 70])
  epochs = []
  for _ in range(40):
    run.next_epoch()
    epochs.append(np.array(run.order))
  times = [np.bincount(e, minlength=200) for e in epochs]
  assert all((t[:20] == 3).all() and (t[50:60] == 0).all() and (t[60:] == 1).all() for t in times)
  assert set(np.ravel([t[20:50] for t in times])) == {0, 1}
  assert np.mean([t[20:50].mean() for t in times]) == pytest.approx(0.5, abs=0.08)  # 1200 draws: 5 standard errors
  firsts = [list(dict.fromkeys(e)) for e in epochs]
  assert all([c for c in f if c >= 60] == list(range(60, 200)) for f in firsts)
  halves = [np.isin(e[: len(e) // 2], range(20)).sum() for e in epochs]
  assert 25 < np.mean(halves) < 50  # of 60: the first 20 lie at the beginning here
  again = Planned(200, 4)
  again.often, again.epoch = run.often, 6
  again.next_epoch()
  assert again.order == epochs[7].tolist() and again.order != epochs[8].tolist()


def test_what_is_never_drawn_is_never_among_the_hardest():
  run = Planned(10, 2, hard=0.5)
  run.often = np.array([0.0] * 8 + [1, 1])
  for _ in range(3):
    run.next_epoch()
    assert set(run.order) <= {8, 9}


def test_an_epoch_of_small_weights_is_not_empty():
  order = drawn(np.arange(4), np.array([1e-9, 2e-9, 0, 2e-9]), [0])
  assert order.tolist() == [1, 3]
  assert drawn(np.arange(4), np.ones(4), [0]).tolist() == [0, 1, 2, 3]


def test_shares_of_what_is_drawn():
  """By hand: 4 clips six times, 8 clips twice, 60 once make 100."""
  said = shares(["night0", "dusk0", "dusk1", "day"], np.array([4, 4, 4, 60]), ["night*=6", "dusk?=2"])
  assert said == [
    {"of": "night*", "weight": 6, "segments": 1, "clips": 4, "share": 0.24},
    {"of": "dusk?", "weight": 2, "segments": 2, "clips": 8, "share": 0.16},
  ]
  assert in_words(said)[0] == "night* drawn with weight 6: 4 clips of 1 segments, 24% of what is seen"


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_steps_are_whole_and_shared(monkeypatch, rank, world):
  """What is left of an epoch and fills no step is not seen; the next epoch begins where none is left. Each clip is
  varied by its place in the whole step."""
  monkeypatch.setattr(trainer, "load", lambda data, what, workers: what)
  run = Planned(7, 2)
  run.accelerator.process_index, run.accelerator.num_processes = rank, world
  want = [(10 + k, [2 * k, 2 * k + 1][rank::world], True, [0, 1][rank::world]) for k in range(3)]
  assert run.batches() == want and run.epoch == 0
  run.at = 4
  assert run.batches() == [(10, *want[2][1:])] and run.epoch == 0
  run.at = 6
  assert run.batches() == want and run.epoch == 1


def test_losses_of_held_out_clips_are_means_of_the_batches_that_have_them(tmp_path, monkeypatch):
  """By hand: a/x (1 + 2 + 6) / 3, a/y and b/z of the batches that name them; the total by the tasks' weights."""
  said = [{"a/x": 1.0, "a/y": 4.0}, {"a/x": 2.0, "b/z": 3.0}, {"a/x": 6.0, "b/z": 5.0}]
  seen = []

  class Held:
    def __init__(self, *_):
      pass

    def __getitem__(self, what):
      seen.append(what)
      return {"frame": torch.zeros(1)}

  monkeypatch.setattr(trainer, "Batches", Held)
  monkeypatch.setattr(trainer, "draw_samples", lambda *_: None)
  run = Planned(9, 2, tasks=["a", "b"], weights={"b": 0.5}, eval_clips=5, spec=None)
  run.val, run.out = [None] * 9, tmp_path
  run.accelerator.autocast = lambda: torch.no_grad()
  run.ema = SimpleNamespace(losses=lambda batch: (said[len(seen) - 1], {}))
  got = run.evaluate()
  assert seen == [(0, [0, 2], False), (0, [4, 6], False), (0, [8], False)]
  assert got == pytest.approx({"a/x": 3, "a/y": 4, "b/z": 4, "total": 3 + 4 + 0.5 * 4})


def test_tasks_have_fixed_weights_unless_they_are_to_be_learned():
  parts = {"depth/a": torch.tensor(3.0), "depth/b": torch.tensor(4.0), "segmentation/x": torch.tensor(5.0)}
  model = Distiller(nn.Linear(1, 1), ["depth", "segmentation"], {"depth": 2.0})
  assert not list(model.weights.parameters()) and model.total(parts).item() == 2 * (3 + 4) + 5


def test_a_teachers_features_are_standardised_by_those_that_are_known():
  """Mean and mean variance of the channels, over frames and places; a frame without features counts for nothing."""
  r = np.random.default_rng(0)
  x = r.normal([[[[1.0]], [[-2.0]], [[0.5]], [[3.0]]]], [[[[1.0]], [[2.0]], [[3.0]], [[0.5]]]], (6, 4, 8, 8))
  x = x.astype(np.float32)
  missing = x.copy()
  missing[4:] = np.nan
  standardiser = Standardiser(4)
  Distiller.fit_features(
    SimpleNamespace(standardiser=standardiser),
    [{"features": torch.from_numpy(missing)}, {"other": 1}, {"features": torch.from_numpy(x[4:])}],
  )
  flat = x.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, 4)
  np.testing.assert_allclose(standardiser.mean, flat.mean(0), atol=1e-5)
  assert float(standardiser.scale) == pytest.approx(np.sqrt(np.cov(flat.T, ddof=0).trace() / 4), rel=1e-3)
