"""The interface of CoTracker's package over a world of known motion: the first pixel of a frame holds its number and
the speed. For the tests of trackers, and of names."""

import sys
from types import ModuleType

import numpy as np
import torch

H, W = 96, 128
POLE = (60, 75)  # columns behind which points of the known world are not seen


def known_video(n, vx, vy, size=(H, W)):
  video = np.zeros((n, 3, *size), np.uint8)
  video[:, 0, 0, 0], video[:, 1:, 0, 0] = np.arange(n), (128 + vx, 128 + vy)
  return video


class KnownModel(torch.nn.Module):
  def __init__(self, v2, window_len):
    super().__init__()
    self.register_buffer("time_emb", torch.zeros(1, window_len, 4))
    if not v2:
      self.corr_mlp = torch.nn.Module()
      self.corr_mlp.fc1 = torch.nn.Linear(2, 2)
    self.weight = torch.nn.Parameter(torch.zeros(3))


class KnownPredictor(torch.nn.Module):
  seen: list[int] = []  # frames of every window
  wobble = 0.0  # px; what is said of a point depends on where the window ends

  def __init__(self, checkpoint, offline=True, v2=False, window_len=60):
    super().__init__()
    assert checkpoint is None
    self.model = KnownModel(v2, window_len)

  def forward(self, video, queries):
    assert video.dtype == torch.float32 and video.shape[0] == queries.shape[0] == 1 and queries.shape[2] == 3
    self.seen.append(video.shape[1])
    number, speed = video[0, :, 0, 0, 0], video[0, 0, 1:, 0, 0] - 128
    start, xy = queries[0, :, 0].long(), queries[0, :, 1:]
    gone = number[:, None] - number[start]  # (T, N)
    tracks = xy + gone[..., None] * speed + self.wobble * torch.sin(number[-1]) * (gone[..., None] != 0)
    visible = (tracks[..., 0] < POLE[0]) | (tracks[..., 0] >= POLE[1])
    visible[start, torch.arange(len(start))] = True
    return tracks[None], visible[None]


class KnownStreamer(KnownPredictor):
  def __init__(self, checkpoint, v2=False, window_len=16):
    super().__init__(checkpoint, False, v2, window_len)
    self.parts = None

  def forward(self, video_chunk, is_first_step=False, queries=None):
    step = self.model.time_emb.shape[1] // 2
    if is_first_step:
      self.queries, self.parts = queries, []
      return None, None
    assert video_chunk.shape[1] <= 2 * step
    self.parts.append(video_chunk if not self.parts else video_chunk[:, step:])
    tracks, visible = super().forward(torch.cat(self.parts, 1), self.queries)
    self.seen[-1] = video_chunk.shape[1]
    return tracks, visible


def install(monkeypatch) -> type[KnownPredictor]:
  """The package, as far as it is called."""
  package, predictor = ModuleType("cotracker"), ModuleType("cotracker.predictor")
  package.__path__ = []
  predictor.CoTrackerPredictor, predictor.CoTrackerOnlinePredictor = KnownPredictor, KnownStreamer
  monkeypatch.setitem(sys.modules, "cotracker", package)
  monkeypatch.setitem(sys.modules, "cotracker.predictor", predictor)
  monkeypatch.setattr(KnownPredictor, "seen", [])
  return KnownPredictor
