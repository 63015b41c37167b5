"""A driving model's file driven over a route: what is published is what the model says of modeld's inputs, the same
every time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from openpilot.cereal import messaging
from openpilot.tools.dgx import driving_replay
from openpilot.tools.dgx.training.constants import T_IDXS, X_IDXS
from openpilot.tools.dgx.training.drive_log import between, read_log
from openpilot.tools.dgx.training.reference import save_reference
from openpilot.tools.dgx.training.teacher import DrivingTeacher
from openpilot.tools.fair.labels.views import ViewWarp, read_frames, segment_view
from openpilot.tools.lib.errors import cli
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Route
from openpilot.tools.sim.write_route import write_route

SECONDS = 0.5


@pytest.fixture(scope="module")
def route(tmp_path_factory) -> Path:
  root = tmp_path_factory.mktemp("sim")
  write_route(root, 3, SECONDS, "tizi", qcamera_only=True)
  return next(root.iterdir())


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
  return save_reference(tmp_path_factory.mktemp("model") / "reference.onnx", speed=True)


def replayed(route: Path, model: Path) -> list[bytes]:
  return list(
    driving_replay.driving_replay(
      Route(str(route)).segments, driving_replay.DrivingModel([model]), "qcamera", progress=False
    )
  )


def test_what_is_published_is_what_the_model_says(route, model):
  segment = Route(str(route)).segments[0]
  view = segment_view(segment, "qcamera")
  frames = [f.reshape(-1) for _, f in read_frames(view, list(range(len(view.entries))))]
  narrow, big = (ViewWarp(view, name).model_frame for name in ("medmodel", "sbigmodel"))
  t = np.array([e.timestamp_eof for e in view.entries]) * 1e-9
  speed = between(t, np.array(read_log(segment).car)[:, :2])[:, 0]
  clip = {
    "frames": np.stack([narrow.warp(f).copy() for f in frames]),
    "big_frames": np.stack([big.warp(f).copy() for f in frames]),
    "desire": torch.zeros(len(frames), 8),
    "traffic_convention": torch.tensor([1.0, 0.0]),
    "speed": torch.from_numpy(speed).float(),
  }
  want = DrivingTeacher(model, device="cpu").label(clip)

  messages = [messaging.log_from_bytes(b) for b in replayed(route, model)]
  assert [m.modelV2.frameId for m in messages] == [e.frame_id for e in view.entries] and all(m.valid for m in messages)
  for i, m in enumerate(messages):
    plan = want["plan"][i].numpy()
    # the last speed at the frame's time, not one between two messages: a hundredth of a second of what the car gains
    assert np.allclose(m.modelV2.position.x, plan[:, 0], atol=0.3) and np.allclose(
      m.modelV2.orientationRate.z, plan[:, 14], atol=1e-3
    )
    assert np.allclose(m.modelV2.laneLines[1].y, want["lane_lines"][i, 1, :, 0], atol=1e-2)
    assert np.allclose(m.modelV2.laneLineProbs, want["lane_lines_prob"][i, 1::2], atol=1e-4)
    assert (
      np.allclose(m.modelV2.leadsV3[2].v, want["lead"][i, 2, :, 2], atol=1e-2) and m.modelV2.leadsV3[2].probTime == 4.0
    )
  last = messages[-1].modelV2
  assert np.allclose(last.position.t, T_IDXS) and np.allclose(last.laneLines[0].x, X_IDXS)
  assert [
    len(x) for x in (last.laneLines, last.roadEdges, last.leadsV3, last.meta.desireState, last.meta.desirePrediction)
  ] == [4, 2, 3, 8, 32]


def test_the_command_gives_the_same_log_every_time(route, model, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(
    "sys.argv", ["driving_replay", str(route), str(model), "--out", str(tmp_path / "a.zst"), "--seconds", "0.2"]
  )
  assert cli(driving_replay.main)() == 0
  assert "4 modelV2 of 4 frames by reference, 0 invalid" in capsys.readouterr().out
  assert [m.which() for m in LogReader([tmp_path / "a.zst"])] == ["modelV2"] * 4
  again = replayed(route, model)
  assert again == replayed(route, model)
  assert [messaging.log_from_bytes(b).to_dict() for b in again[:4]] == [
    m.to_dict() for m in LogReader([tmp_path / "a.zst"])
  ]
