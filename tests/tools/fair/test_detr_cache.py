"""Features of the frozen backbone in place of pictures: the same losses."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import options, save_backbone, write_yolo

from openpilot.tools.fair.detr.augment import FLIPS
from openpilot.tools.fair.detr.backbone import load_backbone
from openpilot.tools.fair.detr.cache import Features, fill
from openpilot.tools.fair.detr.data import read_index
from openpilot.tools.fair.detr.model import make_model
from openpilot.tools.fair.detr.pictures import Frame
from openpilot.tools.fair.detr.samples import Collate, Samples
from openpilot.tools.lib.errors import UserError


@pytest.mark.parametrize("head", ["detr", "deformable"])
def test_losses_are_those_of_the_pictures(head, tmp_path):
  """Two epochs' batches, with flips: within 1e-3 by float16, 1e-6 by float32."""
  torch.manual_seed(2)
  backbone = load_backbone(str(save_backbone(tmp_path / "vit")))
  data = read_index(options(tmp_path).data, None)
  model = make_model(head, backbone, data.names, 1, 2, 12, 32, levels=2).eval()
  frame = Frame(60, 96, "orientation", backbone.multiple)
  plain, join, flipped = Samples(data, frame, FLIPS, 3), Collate(frame), 0
  for dtype, most in (("float16", 1e-3), ("float32", 1e-6)):
    store = Features(tmp_path / dtype, dtype)
    fill(store, data, frame, model, "w", 2, "cpu")
    stored = Samples(data, frame, FLIPS, 3, store)
    for epoch in range(2):
      plain.set_epoch(epoch)
      stored.set_epoch(epoch)
      a, b = (join([s[i] for i in (0, 3, 5)]) for s in (plain, stored))
      labels = b.pop("labels")
      for i, x, y in zip((0, 3, 5), a.pop("labels"), labels, strict=True):
        torch.testing.assert_close(x["boxes"], y["boxes"])
        own = plain.labels(i, data.boxes[data.of(i)], data.classes[data.of(i)])
        flipped += not torch.equal(own["boxes"], y["boxes"])
      with torch.no_grad():
        one, two = (
          model(pixel_values=x["pixel_values"], pixel_mask=x["pixel_mask"], labels=labels).loss.item() for x in (a, b)
        )
      assert abs(one - two) <= most * one, dtype
  assert 0 < flipped < 12


def test_features_are_kept_until_something_changes(tmp_path):
  backbone = load_backbone(str(save_backbone(tmp_path / "vit")))
  folder = write_yolo(tmp_path / "y", {"a": ["0 0.5 0.5 0.2 0.2"]}, size=(40, 30))
  write_yolo(folder, {"tall": ["0 0.5 0.5 0.2 0.2"]}, size=(30, 40))
  data, frame = read_index(folder, None), Frame(32, 64, "orientation", backbone.multiple)
  model = make_model("detr", backbone, data.names, 0, 2, 5, 32)
  store = Features(tmp_path / "f")
  fill(store, data, frame, model, "w", 2, "cpu")
  assert [store.read(i, False).shape for i in (0, 1)] == [(32, 2, 4), (32, 4, 2)]  # landscape and portrait
  made = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()}
  again = Features(tmp_path / "f")
  fill(again, data, frame, model, "w", 2, "cpu")
  assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()} == made
  np.testing.assert_array_equal(again.read(1, True), store.read(1, True))
  other = Features(tmp_path / "f")
  fill(other, data, frame, model, "other weights", 2, "cpu")
  assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "f").iterdir()} != made
  with pytest.raises(UserError, match="--pad orientation"):
    fill(Features(tmp_path / "g"), data, Frame(32, 64, "batch", 32), model, "w", 2, "cpu")
  full = type("Usage", (), {"free": 10})
  with pytest.MonkeyPatch.context() as m:
    m.setattr("shutil.disk_usage", lambda _: full)
    with pytest.raises(UserError, match="GiB of features"):
      fill(Features(tmp_path / "h"), data, frame, model, "w", 2, "cpu")
  assert not list((tmp_path / "h").glob("*.npy"))
