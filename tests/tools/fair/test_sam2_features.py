"""SAM 2's image encoder as a dense teacher, against the official forward with random weights."""

import json

import numpy as np
import pytest
import torch
import transformers
from dino_models import close, images, normalize
from sam2_models import MEAN, STD, S, save
from test_sam2_checkpoint import as_sam2

from openpilot.tools.fair.tasks import task_of
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.sam import features as features_module
from openpilot.tools.fair.sam.checkpoint import load_pt
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, hash_weights
from openpilot.tools.lib.errors import UserError

SMALL = (128, S // 16, S // 16)  # of the small model; the published ones have 256 channels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("sam2")
  save("sam2_video", path)
  return path


def official(folder, rgb):
  """What the video model's decoder and memory are given: (B, C, h, w). Official code flattens it to (h w, B, C)."""
  model = transformers.Sam2VideoModel.from_pretrained(folder, local_files_only=True).eval()
  with torch.no_grad():
    flat = model.get_image_features(normalize(rgb, MEAN, STD)).fpn_hidden_states[-1]
  return flat.permute(1, 2, 0).unflatten(2, SMALL[1:])


def test_features_are_the_official_ones(folder):
  """fp32 (dino_models.close)."""
  teacher, rgb = load_teacher("sam2-features-tiny", folder, device="cpu"), images(S, S, 3)
  got, want = teacher.extract_feature_map(rgb), official(folder, rgb)
  assert got.shape == (3, *SMALL) and got.dtype == torch.float32 and not got.requires_grad and want.std() > 0.1
  close(got, want)
  close(teacher.extract_feature_map(rgb.float() / 255), want)


def test_frames_are_stretched_as_officially_and_labeled(folder):
  teacher, rgb = load_teacher("sam2-features-tiny", folder, device="cpu"), images(40, 72, 3)
  teacher.prepare(40, 72)
  (label,) = teacher.labels
  assert (label.name, label.shape, list(task_of(label))) == ("features", SMALL, ["features", "patches"])
  labels, state = teacher.label(Clip(rgb.numpy()))
  assert state is None and not teacher.stateful and labels["features"].dtype == np.float16
  squares = torch.nn.functional.interpolate(rgb.float(), (S, S), mode="bilinear", antialias=True)
  np.testing.assert_allclose(labels["features"], official(folder, squares).numpy(), rtol=2e-3, atol=2e-3)  # float16
  halves = [teacher.label(Clip(rgb.numpy()[i : i + 1]))[0]["features"] for i in range(3)]
  np.testing.assert_allclose(np.concatenate(halves), labels["features"], rtol=2e-3, atol=2e-3)
  s = teacher.settings()
  assert (
    json.loads(json.dumps(s)) == s
    and s["input"] == [S, S]
    and teacher.checkpoint_hash == hash_weights(folder)
    and teacher.license == "Apache-2.0"
  )


def test_the_packages_checkpoints_too(folder, tmp_path, monkeypatch):
  model = transformers.Sam2VideoModel.from_pretrained(folder, local_files_only=True)
  torch.save({"model": as_sam2(model)}, tmp_path / "small.pt")
  monkeypatch.setattr(
    features_module, "load_pt", lambda path, device: load_pt(path, device, model.config)
  )  # of no published size
  rgb = images(S, S)
  close(
    load_teacher("sam2-features-tiny", tmp_path / "small.pt", device="cpu").extract_feature_map(rgb),
    official(folder, rgb),
  )


def test_published_sizes_and_bad_input(tmp_path):
  for name in ("tiny", "small", "base-plus", "large"):
    assert TEACHERS[f"sam2-features-{name}"].weights == TEACHERS[f"sam2.1-{name}"].weights
  with torch.device("meta"):  # shapes alone; transformers' defaults are those of the published tiny
    encoder = transformers.Sam2VisionModel(transformers.Sam2VisionConfig())
    assert encoder(torch.zeros(1, 3, 1024, 1024)).fpn_hidden_states[-1].shape == (1, 256, 64, 64)
  save("edgetam_video", tmp_path)
  with pytest.raises(UserError, match="of a 'edgetam_video', not of a SAM 2 video model"):
    load_teacher("sam2-features-tiny", tmp_path, device="cpu")
