"""Against the sam2 package's own predictor, where it is installed: `pip install sam2`, which wants hydra-core and
iopath. No CUDA is needed.

SAM 2.1 tiny as the package builds it, random weights, three frames of 1024x1024, so that nobody resizes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from openpilot.tools.fair.sam.sam2 import SAM2VideoWrapper
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Entry

pytest.importorskip("sam2", reason="the sam2 package is not installed")
pytestmark = pytest.mark.slow

ENTRY = Entry("sam.sam2:SAM2VideoWrapper", "", "Apache-2.0", "", "")
S, FRAMES = 1024, 3
BOXES = np.array([[200, 220, 520, 600], [600, 300, 900, 700]], np.float32)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
  """-> the official predictor, its checkpoint as the package writes them, its video, and the frames that it reads
  there."""
  from sam2.build_sam import build_sam2_video_predictor

  root = tmp_path_factory.mktemp("sam2")
  torch.manual_seed(0)
  # filling holes needs its CUDA extension
  predictor = build_sam2_video_predictor(
    "configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu", hydra_overrides_extra=["++model.fill_hole_area=0"]
  )
  with torch.no_grad():
    predictor.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(2.0)  # they are to be seen
  torch.save({"model": predictor.state_dict()}, root / "sam2.1_hiera_tiny.pt")
  r = np.random.default_rng(0)
  (root / "video").mkdir()
  frames = []
  for i in range(FRAMES):
    coarse = torch.tensor(r.uniform(0, 255, (1, 3, 12, 12)), dtype=torch.float32)
    picture = F.interpolate(coarse, (S, S), mode="bicubic").clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save(root / "video" / f"{i:05d}.jpg")
    frames.append(np.asarray(Image.open(root / "video" / f"{i:05d}.jpg").convert("RGB")).transpose(2, 0, 1))
  return predictor, root / "sam2.1_hiera_tiny.pt", root / "video", np.stack(frames)


@torch.inference_mode()
def test_tracks_are_the_packages(package, monkeypatch):
  """Mask logits within 1e-3 of their largest value: fp32, but that the memory is kept in bfloat16 on both sides, whose
  last bit may fall either way."""
  predictor, checkpoint, video, frames = package
  state = predictor.init_state(str(video))
  for i, box in enumerate(BOXES):
    predictor.add_new_points_or_box(state, 0, i, box=box)
  want = np.stack([masks[:, 0].numpy() for _, _, masks in predictor.propagate_in_video(state)])
  sam = SAM2VideoWrapper("t", ENTRY, checkpoint, device="cpu")
  got = []
  forward = sam.model.forward

  def kept(*args, **kwargs):
    out = forward(*args, **kwargs)
    got.append(F.interpolate(out.pred_masks, (S, S), mode="bilinear", align_corners=False)[:, 0].numpy())
    return out

  monkeypatch.setattr(sam.model, "forward", kept)
  masks, ids, scores = sam.track_objects(frames, BOXES)
  assert ids.tolist() == [0, 1] and want.shape == (FRAMES, 2, S, S) and (scores > 0.5).all()
  got, largest = np.stack(got), np.abs(want).max()
  print("largest difference", np.abs(got - want).max(), "of logits up to", largest)
  assert np.ptp(want) > 1e-2 and np.abs(want).max() < 1000
  np.testing.assert_allclose(got, want, atol=1e-3 * largest)
  assert (masks == (want > 0)).mean() > 0.999


@torch.inference_mode()
def test_features_are_the_packages(package):
  """fp32: within 1e-4 of the largest value, through 12 blocks."""
  predictor, checkpoint, _, frames = package
  x = (torch.from_numpy(frames[:1]).float() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
    [0.229, 0.224, 0.225]
  ).view(3, 1, 1)
  want = predictor.forward_image(x)["vision_features"]
  got = load_teacher("sam2-features-tiny", checkpoint, device="cpu").extract_feature_map(torch.from_numpy(frames[:1]))
  assert got.shape == want.shape == (1, 256, 64, 64)
  print("largest difference", float((got - want).abs().max()), "of", float(want.abs().max()))
  torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
