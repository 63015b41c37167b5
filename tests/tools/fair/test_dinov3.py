"""DINOv3 against transformers' own forward with random weights; the resize against PIL; the distillation loss against
its definition."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from dino_models import close, images, normalize, save_folder
from openpilot.tools.fair.dinov3.config import DinoV3Config
from openpilot.tools.fair.dinov3.losses import masked_cosine_loss
from openpilot.tools.fair.dinov3.teacher import DinoV3Teacher
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError

MEAN, STD = (
  (0.430, 0.411, 0.296),
  (0.213, 0.156, 0.143),
)  # DINOv3's satellite ones: not ImageNet's, so that built-in constants would show
VIT: dict = {
  "hidden_size": 32,
  "intermediate_size": 64,
  "num_hidden_layers": 3,
  "num_attention_heads": 2,
  "patch_size": 16,
  "num_register_tokens": 4,
}
CONVNEXT: dict = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
KINDS = ["vit", "vit_plus", "convnext"]


def model_of(kind: str) -> transformers.PreTrainedModel:
  torch.manual_seed(0)
  if kind == "convnext":
    return transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**CONVNEXT))
  # the feed-forward layers of S+ and H+
  gated: dict = {"use_gated_mlp": True, "hidden_act": "silu"} if kind == "vit_plus" else {}
  return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**VIT, **gated))


def save(folder: Path, kind: str = "vit", **preprocessor) -> Path:
  written = {
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 2,
    "do_resize": True,
    "size": {"height": 518, "width": 518},
    **preprocessor,
  }
  return save_folder(model_of(kind), folder, **written)


def normalized(rgb: torch.Tensor) -> torch.Tensor:
  return normalize(rgb, MEAN, STD)


def by_pil(rgb: torch.Tensor, height: int, width: int) -> torch.Tensor:
  """Each channel as PIL resizes it in floating point, antialiased: independent of torch's."""
  planes = [
    np.asarray(Image.fromarray(p.numpy().astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
    for p in rgb.flatten(0, 1)
  ]
  return torch.from_numpy(np.stack(planes)).view(len(rgb), 3, height, width)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_is_the_official_one(tmp_path, kind):
  folder, rgb = save(tmp_path / "model", kind), images(64, 96)
  teacher = DinoV3Teacher(DinoV3Config(folder, resize="multiple"), torch.device("cpu"))
  official = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
  with torch.no_grad():
    out = official(normalized(rgb))
  patch, prefix = (32, 1) if kind == "convnext" else (16, 5)
  h, w = 64 // patch, 96 // patch
  assert out.last_hidden_state.shape == (2, prefix + h * w, 32)
  cls, dense = teacher.extract_features(rgb), teacher.extract_feature_map(rgb)
  assert cls.shape == (2, 32) and dense.shape == (2, 32, h, w) and dense.dtype == torch.float32
  close(cls, out.pooler_output)
  for y, x in ((0, 0), (0, w - 1), (h - 1, 0), (1, 1)):  # row by row, the first token at the top left
    close(dense[:, :, y, x], out.last_hidden_state[:, prefix + y * w + x])
  close(teacher.extract_feature_map(rgb.float() / 255), dense)


def test_registers_are_dropped_by_the_config(tmp_path):
  """Two registers, none: the map still holds the patches, and a backbone says the same."""
  for n in (0, 2):
    folder, rgb = tmp_path / f"model{n}", images(48, 32)
    torch.manual_seed(n)
    transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**{**VIT, "num_register_tokens": n})).save_pretrained(
      folder
    )
    (folder / "preprocessor_config.json").write_text(
      json.dumps({"image_mean": MEAN, "image_std": STD, "do_resize": False})
    )
    backbone = transformers.DINOv3ViTBackbone.from_pretrained(folder, out_features=["stage3"]).eval()
    with torch.no_grad():
      expected = backbone(normalized(rgb)).feature_maps[0]
    close(DinoV3Teacher(DinoV3Config(folder), "cpu").extract_feature_map(rgb), expected)


def test_518_pixels_are_32_by_32_tokens_of_the_whole_image(tmp_path):
  folder, rgb = save(tmp_path / "model"), images(64, 128, 1)
  teacher = DinoV3Teacher(DinoV3Config(folder), "cpu")
  assert teacher.cfg.input_size(64, 128) == (512, 512)
  dense = teacher.extract_feature_map(rgb)
  assert dense.shape == (1, 32, 32, 32)
  official = transformers.AutoModel.from_pretrained(folder).eval()
  with torch.no_grad():
    tokens = official(normalized(by_pil(rgb, 512, 512))).last_hidden_state[:, 5:]
  # PIL's weights are float32 of another order than torch's; the network enlarges that a little
  torch.testing.assert_close(dense, tokens.transpose(1, 2).view(1, 32, 32, 32), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
  ("resample", "size", "given", "expected"),
  [
    (2, {"height": 224, "width": 448}, (100, 90), (224, 448)),
    (3, {"height": 230, "width": 240}, (100, 90), (224, 240)),
    (2, {"shortest_edge": 64}, (256, 512), (64, 128)),
    (2, {"shortest_edge": 40}, (512, 256), (80, 32)),
    (2, 32, (16, 48), (32, 96)),
  ],
)
def test_resize_is_as_the_preprocessor_says(tmp_path, resample, size, given, expected):
  cfg = DinoV3Config(save(tmp_path / "model", resample=resample, size=size))
  assert cfg.how.mode == {2: "bilinear", 3: "bicubic"}[resample]
  assert cfg.input_size(*given) == expected
  assert DinoV3Teacher(cfg, "cpu").extract_feature_map(images(given[0], given[1], 1)).shape == (
    1,
    32,
    expected[0] // 16,
    expected[1] // 16,
  )


def test_multiple_keeps_the_size(tmp_path):
  folder = save(tmp_path / "model")
  assert DinoV3Config(folder, "multiple").input_size(256, 512) == (256, 512)
  assert DinoV3Config(folder, "multiple").input_size(330, 526) == (336, 528)
  assert DinoV3Config(folder, "multiple", scale=2.0).input_size(256, 512) == (512, 1024)
  assert DinoV3Config(folder, "multiple").input_size(3, 5) == (16, 16)


@pytest.mark.parametrize(("kind", "grid"), [("vit", (16, 32)), ("convnext", (8, 16))])
def test_teacher_labels_the_view(tmp_path, kind, grid):
  teacher = load_teacher("dinov3-vits16", save(tmp_path / "model", kind), accepted=["DINOv3"], device="cpu")
  teacher.prepare(256, 512)
  rgb = images(256, 512, 3)
  labels, state = teacher.label(
    Clip(rgb.permute(0, 2, 3, 1).contiguous().numpy().transpose(0, 3, 1, 2))
  )  # strides as a decoder leaves them
  label = teacher.labels[0]
  assert (label.name, label.kind, label.dtype, label.shape, state) == (
    "features",
    "dense",
    "float16",
    (32, *grid),
    None,
  )
  with torch.no_grad():
    tokens = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()(normalized(rgb)).last_hidden_state
  expected = tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
  assert labels["features"].dtype == np.float16
  torch.testing.assert_close(torch.from_numpy(labels["features"]).float(), expected, rtol=2e-3, atol=2e-3)  # float16
  settings = teacher.settings()
  assert (
    settings["input"] == [256, 512]
    and settings["resize"] == "multiple"
    and json.loads(json.dumps(settings)) == settings
  )
  assert (teacher.license, teacher.model_id, teacher.stateful) == ("DINOv3", TEACHERS["dinov3-vits16"].weights, False)


def test_out_of_gpu_memory_halves_the_batch(tmp_path, capsys):
  """A GPU that holds two frames at once: the labels of five are the same."""
  teacher = DinoV3Teacher(DinoV3Config(save(tmp_path / "model"), "multiple"), "cpu")
  rgb = images(32, 64, 5).numpy()
  expected, _ = teacher.label(Clip(rgb))
  whole = teacher.encode

  def small(frames: torch.Tensor):
    if len(frames) > 2:
      raise torch.cuda.OutOfMemoryError("no room")
    return whole(frames)

  teacher.encode = small  # type: ignore[method-assign]
  labels, _ = teacher.label(Clip(rgb))
  np.testing.assert_allclose(
    labels["features"], expected["features"], rtol=2e-3, atol=2e-3
  )  # other batch sizes take other kernels
  assert "out of GPU memory" in capsys.readouterr().err


def test_a_student_learns_from_it_and_it_stays_as_it_is(tmp_path):
  """Distillation: gradients reach the student, none the teacher, which stays in eval mode."""
  teacher = DinoV3Teacher(DinoV3Config(save(tmp_path / "model"), "multiple"), "cpu")
  before = {k: v.clone() for k, v in teacher.state_dict().items()}
  torch.manual_seed(0)
  student = torch.nn.Conv2d(3, 32, 16, 16)
  rgb = images(64, 96).float() / 255
  optimizer, losses = torch.optim.AdamW(student.parameters(), lr=0.01), []
  teacher.train()
  for _ in range(60):
    loss = masked_cosine_loss(student(rgb), teacher.extract_feature_map(rgb), torch.ones(2, 64, 96, dtype=torch.bool))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
  assert losses[-1] < 0.5 * losses[0]
  assert not any(m.training for m in teacher.modules()) and not any(p.requires_grad for p in teacher.parameters())
  assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_masked_cosine_loss_by_hand():
  generator = torch.Generator().manual_seed(0)
  student, teacher = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(2, 5, 3, 4, generator=generator)
  s, t = student.numpy(), teacher.numpy()
  distance = 1 - (s * t).sum(1) / np.sqrt((s**2).sum(1) * (t**2).sum(1))
  assert float(masked_cosine_loss(student, teacher)) == pytest.approx(distance.mean(), rel=1e-5)
  mask = np.random.default_rng(0).random((2, 3, 4)) > 0.5
  assert float(masked_cosine_loss(student, teacher, torch.from_numpy(mask))) == pytest.approx(
    distance[mask].mean(), rel=1e-5
  )
  fine = np.zeros((2, 6, 8), bool)
  fine[0, 0, 0], fine[1, 4:6, 2:4] = True, True  # a quarter of one cell, the whole of another
  expected = (distance[0, 0, 0] * 0.25 + distance[1, 2, 1]) / 1.25
  assert float(masked_cosine_loss(student, teacher, torch.from_numpy(fine))) == pytest.approx(expected, rel=1e-5)
  assert float(masked_cosine_loss(teacher * 3, teacher)) == pytest.approx(0, abs=1e-6)
  assert float(masked_cosine_loss(-teacher, teacher)) == pytest.approx(2, abs=1e-6)


def test_masked_cosine_loss_at_its_edges():
  teacher = torch.randn(1, 4, 4, 8, requires_grad=True)
  student = torch.zeros(1, 4, 2, 4, requires_grad=True)
  loss = masked_cosine_loss(student, teacher, torch.zeros(1, 4, 8, dtype=torch.bool))
  loss.backward()
  assert float(loss.detach()) == 0 and float(student.grad.abs().sum()) == 0 and teacher.grad is None  # type: ignore[union-attr]
  flat = F.interpolate(torch.arange(8.0).view(1, 1, 1, 8).expand(1, 4, 4, 8), (2, 4), mode="area").requires_grad_()
  assert torch.isfinite(masked_cosine_loss(torch.zeros(1, 4, 4, 8), teacher.detach())) and torch.isfinite(
    masked_cosine_loss(flat, teacher)
  )
  with pytest.raises(ValueError, match="channels"):
    masked_cosine_loss(torch.zeros(1, 5, 4, 8), teacher)
  with pytest.raises(ValueError, match="mask"):
    masked_cosine_loss(torch.zeros(1, 4, 4, 8), teacher, torch.ones(2, 4, 8))


def test_license_must_be_accepted(tmp_path):
  with pytest.raises(UserError, match="--accept-license DINOv3"):
    load_teacher("dinov3-vits16", save(tmp_path / "model"), device="cpu")
  assert all(e.license == "DINOv3" for e in TEACHERS.values() if e.make == "dinov3.teacher:make")


def test_wrong_folders_say_what_to_do(tmp_path):
  folder = save(tmp_path / "model")

  def fails(match: str, root: Path = folder, **options):
    with pytest.raises(UserError, match=match) as e:
      DinoV3Teacher(DinoV3Config(root, **options), "cpu")
    assert "\n" not in str(e.value)

  fails("is no folder", tmp_path / "absent")
  fails("resize 'crop'", resize="crop")
  transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(
    tmp_path / "dinov2"
  )
  fails("is of a 'dinov2', not of DINOv3", tmp_path / "dinov2")
  preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
  wrong: dict
  for wrong, match in (
    ({"resample": 0}, "resamples by 0"),
    ({"size": {"longest_edge": 9}}, "longest_edge"),
    ({"image_std": [1]}, "image_std"),
  ):
    (folder / "preprocessor_config.json").write_text(json.dumps({**preprocessor, **wrong}))
    fails(match)
  (folder / "preprocessor_config.json").unlink()
  fails("no preprocessor_config.json")
  (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
  config = json.loads((folder / "config.json").read_text())
  for wrong, match in (
    ({"num_register_tokens": 2}, "one model"),
    ({"num_hidden_layers": 4}, "lacks"),
    ({"patch_size": "x"}, "lacks or garbles"),
  ):
    (folder / "config.json").write_text(json.dumps({**config, **wrong}))
    fails(match)
  (folder / "config.json").unlink()
  fails("no config.json")


@pytest.mark.parametrize(
  "size", [{"height": 10**6, "width": 16}, {"height": 16, "width": 10**12}, {"shortest_edge": 10**9}]
)
def test_pictures_of_a_size_that_cannot_be(tmp_path, size):
  teacher = DinoV3Teacher(DinoV3Config(save(tmp_path / "model", size=size)), "cpu")
  with pytest.raises(UserError, match="1 to 4096 are possible"):
    teacher.extract_feature_map(images(32, 48))
