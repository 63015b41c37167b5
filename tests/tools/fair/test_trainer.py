"""Which clips a run sees next, and the sums that it keeps, without training."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from openpilot.tools.fair.distillation import trainer
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.features import Standardiser
from openpilot.tools.fair.distillation.trainer import Run


class Planned(Run):
  """A run of n clips without a student: `order` is that of every epoch."""

  def __init__(self, n, clips, chosen=None, **config):
    self.config = SimpleNamespace(
      **{"batch": clips, "clip": 1, "seed": 0, "hard": 0.0, "augment": True, "mirror": False, "tasks": [], **config}
    )
    self.train = SimpleNamespace(order=lambda seed: np.arange(n), live=True)
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


@pytest.mark.parametrize("rank, world", [(0, 1), (1, 2)])
def test_steps_are_whole_and_shared(monkeypatch, rank, world):
  """What is left of an epoch and fills no step is not seen; the next epoch begins where none is left."""
  monkeypatch.setattr(trainer, "load", lambda data, what, workers: what)
  run = Planned(7, 2)
  run.accelerator.process_index, run.accelerator.num_processes = rank, world
  want = [(10 + k, [2 * k, 2 * k + 1][rank::world], True) for k in range(3)]
  assert run.batches() == want and run.epoch == 0
  run.at = 4
  assert run.batches() == [(10, want[2][1], True)] and run.epoch == 0
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
