from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from PIL import Image

from openpilot.tools.fair.cotracker.raft import (
  LEVELS,
  RADIUS,
  RaftSmall,
  correlation_pyramid,
  load_raft,
  lookup,
  padding,
  pixel_grid,
)
from openpilot.tools.lib.errors import UserError


load_once = cache(load_raft)


@pytest.fixture
def model(shared_data):
  return load_once(shared_data / "weights" / "raft-small.pth")


@pytest.fixture
def street(shared_data):
  """A real street picture, (1, 3, 360, 480) float32."""
  image = Image.open(min((shared_data / "camvid" / "train").glob("*.png"))).convert("RGB")
  return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()


def reference_lookup(f1, f2, coords):
  """Written from the paper's words, one number at a time: mean of f2's correlations over 2^i squares, bilinear, zero
  outside."""
  c, h, w = f1.shape
  corr = np.einsum("cij,ckl->ijkl", f1, f2) / np.sqrt(c)
  out = np.zeros((LEVELS * (2 * RADIUS + 1) ** 2, h, w))
  for level in range(LEVELS):
    hh, ww = h >> level, w >> level
    k = 2**level
    pooled = corr[:, :, : hh * k, : ww * k].reshape(h, w, hh, k, ww, k).mean((3, 5))
    for i in range(h):
      for j in range(w):
        n = level * (2 * RADIUS + 1) ** 2
        for dx in range(-RADIUS, RADIUS + 1):  # the checkpoint's order: x is the slower
          for dy in range(-RADIUS, RADIUS + 1):
            x, y = coords[0, i, j] / k + dx, coords[1, i, j] / k + dy
            x0, y0 = int(np.floor(x)), int(np.floor(y))
            for xi, yi in ((x0, y0), (x0 + 1, y0), (x0, y0 + 1), (x0 + 1, y0 + 1)):
              if 0 <= xi < ww and 0 <= yi < hh:
                out[n, i, j] += pooled[i, j, yi, xi] * (1 - abs(x - xi)) * (1 - abs(y - yi))
            n += 1
  return out


def test_lookup_against_slow_reference():
  r = np.random.default_rng(0)
  h, w = 8, 11
  f1, f2 = r.normal(size=(2, 5, h, w))
  coords = pixel_grid(h, w, torch.device("cpu"))[0].numpy() + r.normal(0, 4, (2, h, w))  # many outside
  t = [torch.from_numpy(x)[None] for x in (f1, f2, coords)]
  ours = lookup(correlation_pyramid(t[0], t[1]), t[2])[0].numpy()
  np.testing.assert_allclose(ours, reference_lookup(f1, f2, coords), atol=1e-9)  # float64 throughout


def test_names_and_shapes_are_the_checkpoints(shared_data):
  state = torch.load(shared_data / "weights" / "raft-small.pth", map_location="cpu", weights_only=True)
  mine = RaftSmall().state_dict()
  assert len(state) == 106 and {k.removeprefix("module."): v.shape for k, v in state.items()} == {
    k: v.shape for k, v in mine.items()
  }


@pytest.mark.parametrize("shift", [(5, 0), (-9, 4), (0, -6), (3.5, -2.25)])
def test_known_shifts(model, street, shift):
  """A window of a real picture, moved: whole pixels exactly, fractions by bilinear sampling."""
  h, w, x0, y0 = 160, 208, 120, 100
  grid = pixel_grid(h, w, torch.device("cpu")) + torch.tensor([x0, y0]).view(1, 2, 1, 1)

  def window(dx, dy):
    at = grid - torch.tensor([dx, dy]).view(1, 2, 1, 1)
    size = torch.tensor([street.shape[3], street.shape[2]]).view(1, 2, 1, 1)
    return F.grid_sample(street, ((2 * at + 1) / size - 1).permute(0, 2, 3, 1), align_corners=False)

  with torch.inference_mode():
    flow = model.flow(window(0, 0), window(*shift))[0]
  assert flow.shape == (2, h, w)
  error = (flow - torch.tensor(shift).view(2, 1, 1)).norm(dim=0)[16:-16, 16:-16]
  assert error.median() < 0.3


def test_known_warp_and_odd_size(model, street):
  """Driving forward: everything moves away from a point, by up to 15 pixels. 206x301 needs padding on all sides."""
  h, w = 206, 301
  base = pixel_grid(h, w, torch.device("cpu"))
  center, zoom = torch.tensor([160.0, 80.0]).view(1, 2, 1, 1), 1.08
  at = center + (base - center) / zoom + torch.tensor([90.0, 80.0]).view(1, 2, 1, 1)
  size = torch.tensor([street.shape[3], street.shape[2]]).view(1, 2, 1, 1)
  b = F.grid_sample(street, ((2 * at + 1) / size - 1).permute(0, 2, 3, 1), align_corners=False)
  a = street[:, :, 80 : 80 + h, 90 : 90 + w]
  with torch.inference_mode():
    ea, eb = model.encode(a), model.encode(b)
    forth, back = model.flow_both(ea, eb)
    alone = model.flow(a, b)[0]
  error = (forth - ((base - center) * (zoom - 1))[0]).norm(dim=0)[16:-16, 16:-16]
  assert error.median() < 0.3
  error = (back - ((base - center) * (1 / zoom - 1))[0]).norm(dim=0)[16:-16, 16:-16]
  assert error.median() < 0.3
  torch.testing.assert_close(forth, alone, atol=0.01, rtol=0)  # the same sums in another order, through 12 steps


def test_padding_never_below_the_coarsest_level():
  assert padding(64, 72) == (0, 0, 0, 0) and padding(158, 205) == (1, 2, 1, 1) and padding(40, 64) == (0, 0, 12, 12)


def test_other_files_are_refused(tmp_path):
  path = tmp_path / "raft-small.pth"
  with pytest.raises(UserError, match="cannot be read"):
    load_raft(path)
  path.write_bytes(b"not a checkpoint")
  with pytest.raises(UserError, match="not a RAFT small checkpoint"):
    load_raft(path)
  torch.save({"module.fnet.conv1.weight": torch.zeros(1)}, path)
  with pytest.raises(UserError, match="not a RAFT small checkpoint"):
    load_raft(path)
  torch.save([1, 2], path)
  with pytest.raises(UserError, match="not a RAFT small checkpoint"):
    load_raft(path)
