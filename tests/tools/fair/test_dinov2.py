"""DINOv2 and the depth networks on it, against transformers' own forward with random weights, and DINOv2's linear head
against its definition."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from dino_models import close, images, normalize, save_folder
from openpilot.tools.fair import hf
from openpilot.tools.learn.device import choose_device
from openpilot.tools.fair.dinov2.teacher import DINOv2Wrapper, LinearDepthHead
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, find_weights
from openpilot.tools.lib.errors import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIT: dict = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 70, "patch_size": 14}
NECK: dict = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}


def save(model: transformers.PreTrainedModel, folder: Path, **extra) -> Path:
  return save_folder(
    model, folder, **{"image_mean": MEAN, "image_std": STD, "resample": 3, "size": {"shortest_edge": 256}, **extra}
  )


def backbone_config(registers: bool = False, **options):
  return (
    transformers.Dinov2WithRegistersConfig(num_register_tokens=4, **VIT, **options)
    if registers
    else transformers.Dinov2Config(**VIT, **options)
  )


def official(folder: Path, kind: str = "AutoModel"):
  return getattr(transformers, kind).from_pretrained(folder, local_files_only=True).eval()


def normalized(rgb: torch.Tensor) -> torch.Tensor:
  return normalize(rgb, MEAN, STD)


@pytest.fixture
def dinov2(tmp_path) -> Path:
  torch.manual_seed(0)
  return save(transformers.Dinov2Model(backbone_config()), tmp_path / "dinov2")


@pytest.mark.parametrize("registers", [False, True])
@pytest.mark.parametrize("size", [(70, 70), (28, 98)])  # the size of the position table, and another aspect
def test_features_and_cls_are_the_official_ones(tmp_path, registers, size):
  torch.manual_seed(0)
  model = (
    transformers.Dinov2WithRegistersModel(backbone_config(True))
    if registers
    else transformers.Dinov2Model(backbone_config())
  )
  folder = save(model, tmp_path / "model")
  ours, rgb = DINOv2Wrapper(weights=folder, device="cpu"), images(*size)
  with torch.no_grad():
    out = official(folder)(normalized(rgb)).last_hidden_state
  h, w = size[0] // 14, size[1] // 14
  assert out.shape[1] == 1 + 4 * registers + h * w
  features = ours.extract_features(rgb)
  assert features.shape == (2, 32, h, w) and features.dtype == torch.float32 and not features.requires_grad
  patches = out[:, -h * w :]
  for y, x in ((0, 0), (0, w - 1), (h - 1, 0), (1, 2)):  # row by row, the first token at the top left
    close(features[:, :, y, x], patches[:, y * w + x])
  close(ours.extract_cls(rgb), out[:, 0])
  close(ours.extract_features(rgb.float() / 255), features)  # floats of 0 to 1 are the same images


def test_chosen_layers_are_the_backbones_stages(dinov2):
  rgb = images(28, 42)
  stages = transformers.Dinov2Backbone.from_pretrained(dinov2, out_features=["stage2", "stage4"]).eval()
  with torch.no_grad():
    expected = torch.cat(stages(normalized(rgb)).feature_maps, dim=1)
  ours = DINOv2Wrapper(weights=dinov2, layers=(1, -1), device="cpu")
  close(ours.extract_features(rgb), expected)
  close(ours.extract_features(rgb, layers=(1,)), expected[:, :32])
  with pytest.raises(UserError, match="4 blocks"):
    ours.extract_features(rgb, layers=(4,))


def depth_anything(folder: Path, kind: str, max_depth: int, registers: bool = False) -> Path:
  torch.manual_seed(0)
  vit = backbone_config(registers, out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
  head: dict = {
    "reassemble_hidden_size": 32,
    "head_hidden_size": 8,
    "depth_estimation_type": kind,
    "max_depth": max_depth,
  }
  config = transformers.DepthAnythingConfig(backbone_config=vit, **head, **NECK)
  return save(transformers.DepthAnythingForDepthEstimation(config), folder)


@pytest.mark.parametrize(("kind", "unit", "max_depth"), [("metric", "m", 80), ("relative", "relative", 1)])
def test_depth_anything_is_the_official_one(tmp_path, kind, unit, max_depth):
  folder, rgb = depth_anything(tmp_path / "model", kind, max_depth), images(42, 70)
  model = official(folder, "DepthAnythingForDepthEstimation")
  with torch.no_grad():
    expected = model(normalized(rgb)).predicted_depth
  assert expected.std() > 1e-3  # it says something of the images
  ours = DINOv2Wrapper(weights=folder, device="cpu", outputs=("features", "depth"))
  assert ours.depth_unit == unit
  depth = ours.estimate_depth(rgb)
  assert depth.shape == (2, 1, 42, 70)
  torch.testing.assert_close(depth[:, 0], expected, rtol=1e-4, atol=1e-4 * max_depth)
  both = ours._encode(ours._prepare(rgb), ours.layers, ("features", "depth"))  # of one pass
  close(both["features"], ours.extract_features(rgb))
  close(both["depth"], depth)


def dpt(folder: Path) -> Path:
  torch.manual_seed(0)
  vit = backbone_config(out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
  # the projection of DPT's class has 256 channels whatever its config says
  config = transformers.DPTConfig(
    backbone_config=vit, is_hybrid=False, add_projection=True, **{**NECK, "fusion_hidden_size": 256}
  )
  return save(transformers.DPTForDepthEstimation(config), folder)


def test_dpt_is_the_official_one(tmp_path):
  folder, rgb = dpt(tmp_path / "model"), images(42, 70)
  with torch.no_grad():
    raw = official(folder, "DPTForDepthEstimation")(normalized(rgb)).predicted_depth
  expected = F.interpolate(raw[:, None], (42, 70), mode="bilinear", align_corners=False)
  assert expected.std() > 1e-3 and raw.shape[1:] != (42, 70)
  ours = DINOv2Wrapper(weights=folder, unit="m", device="cpu")
  torch.testing.assert_close(ours.estimate_depth(rgb), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
  with pytest.raises(UserError, match="does not say whether"):
    DINOv2Wrapper(weights=folder, device="cpu")


def published_linear_head(
  maps: list[torch.Tensor], cls: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, max_depth: float
) -> torch.Tensor:
  """DINOv2's linear head as its paper and hub describe it, step by step in numpy's manner: tokens enlarged first, every
  depth weighed by itself."""
  x = torch.cat(
    [torch.cat([m, c[:, :, None, None].repeat(1, 1, *m.shape[2:])], 1) for m, c in zip(maps, cls, strict=True)], 1
  ).double()
  x = F.interpolate(x, scale_factor=4, mode="bilinear", align_corners=False)
  logits = torch.einsum("kc,bchw->bkhw", weight[:, :, 0, 0].double(), x) + bias.double()[None, :, None, None]
  p = logits.clamp(min=0) + 0.1
  p = p / p.sum(1, keepdim=True)
  step = (max_depth - 0.001) / (len(bias) - 1)
  return sum(p[:, k] * (0.001 + k * step) for k in range(len(bias)))[:, None].float()  # type: ignore


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("max_depth", [80.0, 10.0])
def test_linear_head_is_the_published_one(tmp_path, layers, max_depth):
  torch.manual_seed(0)
  config = transformers.Dinov2Config(**{**VIT, "num_hidden_layers": 12})
  folder, rgb = save(transformers.Dinov2Model(config), tmp_path / "model"), images(28, 42)
  weight, bias = torch.randn(256, 64 * layers, 1, 1), torch.randn(256)
  head = tmp_path / "dinov2_kitti_linear_head.pth"
  torch.save(
    {
      "meta": {"epoch": 1},
      "state_dict": {"decode_head.conv_depth.weight": weight, "decode_head.conv_depth.bias": bias},
    },
    head,
  )
  with torch.no_grad():
    hidden = official(folder)(normalized(rgb), output_hidden_states=True).hidden_states
  hidden = [hidden[i + 1] for i in ((11,) if layers == 1 else (2, 5, 8, 11))]
  maps = [t[:, 1:].transpose(1, 2).reshape(2, 32, 2, 3) for t in hidden]
  expected = F.interpolate(
    published_linear_head(maps, [t[:, 0] for t in hidden], weight, bias, max_depth),
    (28, 42),
    mode="bilinear",
    align_corners=False,
  )
  ours = DINOv2Wrapper(weights=folder, depth_head=head, max_depth=max_depth, device="cpu")
  assert ours.depth_unit == "m" and ours.checkpoint_hash.count("+") == 1
  depth = ours.estimate_depth(rgb)
  assert (
    depth.shape == (2, 1, 28, 42)
    and 0 < float(depth.min())
    and float(depth.max()) < max_depth
    and float(depth.std()) > 1e-3
  )
  torch.testing.assert_close(depth, expected, rtol=1e-4, atol=1e-4 * max_depth)


def test_linear_head_learns_and_its_state_loads(tmp_path, dinov2):
  """A head trained here is kept as safetensors and says the same when it is loaded."""
  from safetensors.torch import save_file

  torch.manual_seed(0)
  head = LinearDepthHead(32, layers=1)
  tokens, cls, target = torch.randn(4, 32, 2, 3), torch.randn(4, 32), torch.rand(4, 1, 28, 42) * 20 + 5
  optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
  losses = []
  for _ in range(30):
    loss = (head([tokens], [cls], (28, 42)) - target).abs().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(float(loss.detach()))
  assert losses[-1] < 0.5 * losses[0]
  save_file(head.state_dict(), tmp_path / "head.safetensors")
  loaded = DINOv2Wrapper(weights=dinov2, depth_head=tmp_path / "head.safetensors", device="cpu").depth_head
  assert loaded is not None
  torch.testing.assert_close(loaded([tokens], [cls], (28, 42)), head([tokens], [cls], (28, 42)))


def published_state(registers: int, gated: bool, width: int = 128, blocks: int = 2) -> dict[str, torch.Tensor]:
  """A state with the names and shapes of dinov2_vit*14_pretrain.pth."""
  g, hidden = torch.Generator().manual_seed(0), (width * 4 * 2 // 3 + 7) // 8 * 8 if gated else width * 4
  shapes: dict[str, tuple[int, ...]] = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, 26, width),
    "mask_token": (1, width),
  }
  shapes |= {
    "norm.weight": (width,),
    "norm.bias": (width,),
    "patch_embed.proj.weight": (width, 3, 14, 14),
    "patch_embed.proj.bias": (width,),
  }
  if registers:
    shapes["register_tokens"] = (1, registers, width)
  linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
  linears |= (
    {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
    if gated
    else {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
  )
  for i in range(blocks):
    for name, (n, m) in linears.items():
      shapes |= {f"blocks.{i}.{name}.weight": (n, m), f"blocks.{i}.{name}.bias": (n,)}
    shapes |= {
      f"blocks.{i}.{name}": (width,)
      for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma")
    }
  return {k: torch.randn(s, generator=g) * (0.05 if len(s) == 2 else 0.5) for k, s in shapes.items()}


def published_forward(state: dict[str, torch.Tensor], x: torch.Tensor, heads: int) -> torch.Tensor:
  """The ViT of the paper in plain operations on the published names; images of the position table's size -> tokens
  after the final norm."""

  def norm(x, name):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

  def linear(x, name):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

  x = (
    F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14).flatten(2).transpose(1, 2)
  )
  x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1) + state["pos_embed"]
  if "register_tokens" in state:
    x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], 1)
  for i in range(2):
    b = f"blocks.{i}"
    q, k, v = linear(norm(x, f"{b}.norm1"), f"{b}.attn.qkv").view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    y = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
    x = x + state[f"{b}.ls1.gamma"] * linear(y.transpose(1, 2).flatten(2), f"{b}.attn.proj")
    y = norm(x, f"{b}.norm2")
    if f"{b}.mlp.w12.weight" in state:
      gate, up = linear(y, f"{b}.mlp.w12").chunk(2, -1)
      y = linear(F.silu(gate) * up, f"{b}.mlp.w3")
    else:
      y = linear(F.gelu(linear(y, f"{b}.mlp.fc1")), f"{b}.mlp.fc2")
    x = x + state[f"{b}.ls2.gamma"] * y
  return norm(x, "norm")


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("gated", [False, True])  # the giant's feed-forward layers are gated
def test_published_pth_is_the_papers_network(tmp_path, registers, gated):
  state, rgb = published_state(registers, gated), images(70, 70)
  torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
  tokens = published_forward(state, normalized(rgb), heads=2)
  ours = DINOv2Wrapper(weights=tmp_path / "dinov2_vits14_pretrain.pth", device="cpu")
  close(ours.extract_cls(rgb), tokens[:, 0])
  close(ours.extract_features(rgb), tokens[:, 1 + registers :].transpose(1, 2).unflatten(2, (5, 5)))
  teacher = load_teacher("dinov2-base", tmp_path / "dinov2_vits14_pretrain.pth", device="cpu")
  teacher.prepare(28, 56)
  assert teacher.label(Clip(images(28, 56).numpy()))[0]["features"].shape == (2, 128, 2, 4)


def test_other_pth_are_refused(tmp_path):
  path = tmp_path / "resnet.pth"
  for state in (
    {"conv1.weight": torch.zeros(2)},
    published_state(0, False) | {"blocks.0.attn.bias": torch.zeros(2)},
    "text",
    [1, 2],
  ):
    torch.save(state, path)
    with pytest.raises(UserError, match="is no DINOv2 checkpoint"):
      DINOv2Wrapper(weights=path, device="cpu")
  path.write_bytes(b"no zip")
  with pytest.raises(UserError, match="is no DINOv2 checkpoint"):
    DINOv2Wrapper(weights=path, device="cpu")


def test_teacher_labels_the_view(dinov2):
  """Frames of 512x256 go in as 518x252, and come out as float16 of what extract_features says of them."""
  teacher = load_teacher("dinov2-small", dinov2, device="cpu")
  teacher.prepare(256, 512)
  rgb = images(256, 512, 2).numpy()
  labels, state = teacher.label(Clip(rgb))
  label = teacher.labels[0]
  assert (label.name, label.kind, label.dtype, label.shape) == (
    "features",
    "dense",
    "float16",
    (32, 18, 37),
  ) and state is None
  assert labels["features"].shape == (2, *label.shape) and labels["features"].dtype == np.float16
  settings = teacher.settings()
  assert settings["input"] == [252, 518] and json.loads(json.dumps(settings)) == settings
  assert (teacher.model_id, teacher.license, teacher.stateful, len(teacher.checkpoint_hash)) == (
    "facebook/dinov2-small",
    "Apache-2.0",
    False,
    64,
  )
  # PIL's antialiased bicubic in floating point, an independent one
  planes = [
    np.asarray(Image.fromarray(p.astype(np.float32)).resize((518, 252), Image.Resampling.BICUBIC))
    for p in rgb.reshape(-1, 256, 512)
  ]
  small = torch.from_numpy(np.stack(planes)).view(2, 3, 252, 518).clamp(0, 255) / 255
  with torch.no_grad():
    expected = official(dinov2)(normalized(small * 255)).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (18, 37))
  torch.testing.assert_close(
    torch.from_numpy(labels["features"]).float(), expected, rtol=5e-3, atol=5e-3
  )  # float16, and PIL's order of sums
  with pytest.raises(UserError, match="one view at a time"):
    teacher.label(Clip(rgb[:, :, :128]))


def test_teacher_labels_depth_at_the_frames_size(tmp_path):
  folder = depth_anything(tmp_path / "model", "metric", 80)
  teacher = load_teacher("depth-anything-v2-metric-outdoor-small", folder, device="cpu", outputs=("depth", "features"))
  rgb = images(64, 128, 3)
  teacher.prepare(64, 128)
  depth, features = teacher.labels
  assert (depth.shape, depth.unit, depth.dtype) == ((1, 64, 128), "m", "float16") and features.shape == (32, 5, 9)
  labels, _ = teacher.label(Clip(rgb.numpy()))
  resized = hf.preprocess(rgb, teacher.how, (70, 126), teacher.where)  # type: ignore[attr-defined]
  with torch.no_grad():
    official_depth = official(tmp_path / "model", "DepthAnythingForDepthEstimation")(resized).predicted_depth[:, None]
  expected = F.interpolate(official_depth, (64, 128), mode="bilinear", align_corners=False)
  # float16 keeps 11 bits: 2^-11 of 80 m is 0.04 m
  torch.testing.assert_close(torch.from_numpy(labels["depth"]).float(), expected, rtol=1e-3, atol=0.02)
  assert labels["features"].shape == (3, 32, 5, 9) and teacher.settings()["depth"]["unit"] == "m"


def test_low_precision_keeps_depths_head_in_fp32(tmp_path):
  """bf16 has 8 bits, half a meter at 80 m. The head after a bf16 backbone still gives more values than that."""
  folder, rgb = depth_anything(tmp_path / "model", "metric", 80), images(42, 70)
  depth = DINOv2Wrapper(weights=folder, device="cpu", precision="bfloat16").estimate_depth(rgb)
  exact = DINOv2Wrapper(weights=folder, device="cpu").estimate_depth(rgb)
  assert float((depth.to(torch.bfloat16).float() - depth).abs().max()) > 0
  assert float((depth - exact).abs().mean()) < 0.1 * float(exact.std()) + 0.5


def test_frozen(dinov2):
  model = DINOv2Wrapper(weights=dinov2, device="cpu")
  assert not any(p.requires_grad for p in model.parameters())
  assert not any(m.training for m in model.train().modules())


def test_every_entry_names_a_maker_and_a_hub_id():
  entries = {k: e for k, e in TEACHERS.items() if e.make == "dinov2.teacher:make"}
  assert {
    "dinov2-small",
    "dinov2-with-registers-giant",
    "depth-anything-v2-small",
    "depth-anything-v2-metric-outdoor-small",
  } <= set(entries)
  assert all(e.weights.count("/") == 1 for e in entries.values())
  # Depth Anything's second version is free in its small size only, the first in all
  depth = {k: e.license for k, e in entries.items() if k.startswith("depth-anything")}
  assert len(depth) == 12 and all(
    v == ("CC-BY-NC-4.0" if "-v2-" in k and not k.endswith("small") else "Apache-2.0") for k, v in depth.items()
  )


def test_wrong_folders_say_what_to_do(tmp_path, dinov2, monkeypatch):
  def fails(match: str, **options):
    with pytest.raises(UserError, match=match) as e:
      DINOv2Wrapper(**{"weights": dinov2, "device": "cpu", **options})
    assert "\n" not in str(e.value)

  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("FAIR_WEIGHTS", str(tmp_path / "none"))
  monkeypatch.chdir(tmp_path)
  fails("vit_tiny", model_size="vit_tiny")
  fails("no weights at", weights=tmp_path / "absent")
  fails("no weights 'facebook/dinov2-with-registers-giant'", weights=None, model_size="vit_giant", registers=True)
  fails("layers", layers=(12,))
  fails("no depth head", outputs=("depth",))
  fails("normals", outputs=("normals",))
  fails("no depth head at", depth_head=tmp_path / "absent.pth")
  (tmp_path / "text.pth").write_text("text")
  fails("is no linear depth head", depth_head=tmp_path / "text.pth")
  torch.save(
    {"conv_depth.weight": torch.zeros(256, 768, 1, 1), "conv_depth.bias": torch.zeros(256)}, tmp_path / "other.pth"
  )
  torch.save(
    {"conv_depth.weight": torch.zeros(256, 66, 1, 1), "conv_depth.bias": torch.zeros(256)}, tmp_path / "odd.pth"
  )
  fails("of one layer, or of four", depth_head=tmp_path / "other.pth")
  fails("of the same size", depth_head=tmp_path / "odd.pth")
  (dinov2 / "preprocessor_config.json").rename(dinov2 / "kept")
  fails("no preprocessor_config.json")
  (dinov2 / "preprocessor_config.json").write_text("{")
  fails("is not JSON")
  (dinov2 / "preprocessor_config.json").write_text("{}")
  fails("image_mean")
  (dinov2 / "kept").rename(dinov2 / "preprocessor_config.json")
  config = json.loads((dinov2 / "config.json").read_text())
  (dinov2 / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
  fails("lacks")
  (dinov2 / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
  fails("one model")
  (dinov2 / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
  fails("is of a 'vit'")
  (dinov2 / "config.json").write_text(
    json.dumps({"model_type": "depth_anything", "backbone_config": {"model_type": "swin"}})
  )
  fails("not on DINOv2")
  (dinov2 / "config.json").write_text(json.dumps(config))
  (dinov2 / "model.safetensors").write_bytes(b"x" * 100)
  fails("does not load")
  (dinov2 / "model.safetensors").unlink()
  fails("no model.safetensors")


def test_a_pickle_in_place_of_safetensors_is_not_opened(tmp_path, dinov2):
  """transformers would take pytorch_model.bin where there is no model.safetensors."""

  class Planted:
    def __reduce__(self):
      return (tmp_path / "ran").touch, ()

  folder, cpu = tmp_path / "hf", choose_device("cpu")
  shutil.copytree(dinov2, folder)
  (folder / "model.safetensors").unlink()
  torch.save({"x": Planted()}, folder / "pytorch_model.bin")
  with pytest.raises(UserError) as e:
    DINOv2Wrapper(weights=folder, device="cpu")
  assert "\n" not in str(e.value) and not (tmp_path / "ran").exists()
  with pytest.raises(UserError, match=r"model\.safetensors"):
    hf.load_model(folder, cpu)
  # one that is honest is refused too: nobody looks into it
  torch.save(transformers.AutoModel.from_pretrained(dinov2).state_dict(), folder / "pytorch_model.bin")
  with pytest.raises(UserError, match=r"model\.safetensors"):
    hf.load_model(folder, cpu)


def test_wrong_images(dinov2):
  model = DINOv2Wrapper(weights=dinov2, device="cpu")
  with pytest.raises(UserError, match="multiple of the patch"):
    model.extract_features(images(256, 512))
  with pytest.raises(UserError, match="RGB"):
    model.extract_features(torch.zeros(1, 4, 28, 28))
  with pytest.raises(UserError, match="RGB"):
    model.extract_features(torch.zeros(1, 3, 28, 28, dtype=torch.int64))
  with pytest.raises(UserError, match="no depth head"):
    model.estimate_depth(images(28, 28))


def test_weights_are_found_where_they_are_kept(dinov2, monkeypatch):
  """model_size alone is enough where FAIR_WEIGHTS holds the hub id's folder."""
  dinov2.rename(dinov2.with_name("dinov2-base"))
  monkeypatch.setenv("FAIR_WEIGHTS", str(dinov2.parent))
  assert find_weights("facebook/dinov2-base") == dinov2.with_name("dinov2-base")
  assert DINOv2Wrapper("vit_base", device="cpu").extract_cls(images(28, 28)).shape == (2, 32)


OWN = {  # how DINOv2's own training code, and what people wrap around it, saves a teacher
  "teacher_checkpoint": lambda s: {
    "teacher": {**{f"backbone.{k}": v for k, v in s.items()}, "dino_head.mlp.0.weight": torch.zeros(2, 2)}
  },
  "module": lambda s: {"teacher": {f"module.backbone.{k}": v for k, v in s.items()}},
  "state_dict": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3},
  "fsdp": lambda s: {
    "model": {
      **{f"teacher.backbone._fsdp_wrapped_module.{k}": v for k, v in s.items()},
      **{f"student.backbone._fsdp_wrapped_module.{k}": v * 0 for k, v in s.items()},
      "student.dino_head.last_layer.weight_g": torch.zeros(2),
    }
  },
}


@pytest.mark.parametrize("how", OWN)
def test_own_trainings_of_dinov2_load(tmp_path, how):
  """Blocks in chunks, as block_chunks=2 makes them of two: blocks.0.0 and blocks.1.1, the block's own number last."""
  state, rgb = published_state(4, False), images(70, 70)
  chunked = {k.replace("blocks.1.", "blocks.1.1.").replace("blocks.0.", "blocks.0.0."): v for k, v in state.items()}
  for name, s in (("plain", state), ("chunked", chunked)):
    torch.save(OWN[how](s), tmp_path / f"{name}.pth")
    close(
      DINOv2Wrapper(weights=tmp_path / f"{name}.pth", device="cpu").extract_cls(rgb),
      published_forward(state, normalized(rgb), heads=2)[:, 0],
    )


def test_what_dinov2_does_not_have_is_named(tmp_path):
  path = tmp_path / "x.pth"
  torch.save({f"backbone.{k}": v for k, v in published_state(0, False).items() if k != "pos_embed"}, path)
  with pytest.raises(
    UserError, match=r"x\.pth is no DINOv2 checkpoint: it lacks 'pos_embed' and holds .*; give a .*teacher_checkpoint"
  ):
    DINOv2Wrapper(weights=path, device="cpu")
  torch.save(published_state(0, False) | {"blocks.0.attn.rope.weight": torch.zeros(2)}, path)
  with pytest.raises(UserError, match=r"it holds 'blocks\.0\.attn\.rope\.weight', which DINOv2 has not"):
    DINOv2Wrapper(weights=path, device="cpu")


PICTURES = {  # what preprocessor_config.json says of bytes -> what transformers makes of them
  "not normalized": ({"do_normalize": False}, lambda x: x / 255),
  "bytes as they are": ({"do_rescale": False, "do_normalize": False}, lambda x: x),
  "of bytes": (
    {"do_rescale": False, "image_mean": [123.0, 116.0, 103.0], "image_std": [58.0, 57.0, 57.0]},
    lambda x: (x - torch.tensor([123.0, 116.0, 103.0]).view(3, 1, 1)) / torch.tensor([58.0, 57.0, 57.0]).view(3, 1, 1),
  ),
  "to 2": (
    {"rescale_factor": 2 / 255, "image_mean": [1.0] * 3, "image_std": [0.5] * 3},
    lambda x: (x * 2 / 255 - 1) / 0.5,
  ),
}


@pytest.mark.parametrize("how", PICTURES)
def test_pictures_are_made_as_the_folder_says(tmp_path, how):
  said, expected = PICTURES[how]
  folder = save(transformers.Dinov2Model(backbone_config()), tmp_path / "model", **said)
  ours, rgb = DINOv2Wrapper(weights=folder, device="cpu"), images(70, 70)
  torch.testing.assert_close(ours._prepare(rgb), expected(rgb.float()), rtol=1e-5, atol=1e-5)
  torch.testing.assert_close(ours._prepare(rgb.float() / 255), expected(rgb.float()), rtol=1e-5, atol=1e-4)
  ours.prepare(70, 70)
  plain = DINOv2Wrapper(weights=save(transformers.Dinov2Model(backbone_config()), tmp_path / "plain"), device="cpu")
  plain.prepare(70, 70)
  assert (
    ours.settings()["preprocess"] != plain.settings()["preprocess"] and "white" not in plain.settings()["preprocess"]
  )


def test_blocks_that_the_config_does_not_name_are_refused(dinov2):
  """A config.json of a shallower model would load, and drop the last blocks in silence."""
  path = dinov2 / "config.json"
  said = {
    k: v for k, v in json.loads(path.read_text()).items() if k not in ("out_features", "out_indices", "stage_names")
  }
  path.write_text(json.dumps({**said, "num_hidden_layers": 3}))
  with pytest.raises(UserError, match=r"weights of blocks that its config\.json does not name \(encoder\.layer\.3\."):
    DINOv2Wrapper(weights=dinov2, device="cpu")
  known = {"encoder.layer.0.norm.weight", "head.weight"}
  assert hf.dropped_blocks(
    ["classifier.weight", "dinov2.encoder.layer.7.norm.weight", "memory.layers.0.norm.weight"], known
  ) == ["dinov2.encoder.layer.7.norm.weight"]


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"num_hidden_layers": 10**6}, "has 1000000 as 'num_hidden_layers'; at most 256 is read"),
    ({"hidden_size": 10**12}, "has 1000000000000 as 'hidden_size'"),
    ({"layer_norm_eps": float("nan")}, "has nan as 'layer_norm_eps'"),
    ({"patch_size": [[10**9]]}, "has 1000000000 as 'patch_size'"),
    ({"out_indices": [0] * (2**20 + 1)}, "has a list 'out_indices' of 1048577"),
    ({"hidden_size": 4096}, r"config.json asks for \d+ numbers, the weights hold \d+"),
    ({"image_size": 14 * 4000}, r"config.json asks for \d+ numbers, the weights hold \d+"),
  ],
)
def test_a_config_that_asks_for_too_much_is_not_built(dinov2, change, says):
  path = dinov2 / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UserError, match=says) as e:
    load_teacher("dinov2-small", dinov2, device="cpu")
  assert "\n" not in str(e.value)
