"""Small checkpoints under the names of the published ones, random weights, made once."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import sam2_models
from cotracker_models import KnownModel, install
from dino_models import save_folder

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def save_dinov2(folder: Path, head: Path, width: int) -> None:
  """One block of ViT-B's width, or another, and a linear depth head."""
  torch.manual_seed(0)
  config = transformers.Dinov2Config(
    hidden_size=width, num_hidden_layers=1, num_attention_heads=4, mlp_ratio=1, image_size=70, patch_size=14
  )
  more = {"image_mean": MEAN, "image_std": STD, "resample": 3, "size": {"shortest_edge": 256}}
  save_folder(transformers.Dinov2Model(config), folder, **more)
  state = {"conv_depth.weight": torch.randn(16, 2 * width, 1, 1), "conv_depth.bias": torch.rand(16)}
  torch.save({"state_dict": {f"decode_head.{k}": v for k, v in state.items()}}, head)


def save_dinov3(folder: Path) -> None:
  """One block of ViT-L's width; pictures of 518 pixels."""
  torch.manual_seed(0)
  config = transformers.DINOv3ViTConfig(
    hidden_size=1024,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=16,
    patch_size=16,
    num_register_tokens=4,
  )
  size = {"height": 518, "width": 518}
  save_folder(transformers.DINOv3ViTModel(config), folder, image_mean=MEAN, image_std=STD, resample=2, size=size)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory) -> SimpleNamespace:
  """weights: a folder of weights (dinov2-base and narrow with their depth heads, sam2.1-hiera-large, cotracker2.pth).
  home: a working folder with dinov3/."""
  weights, home = tmp_path_factory.mktemp("weights"), tmp_path_factory.mktemp("home")
  save_dinov2(weights / "dinov2-base", weights / "dinov2_vitb14_kitti_linear_head.pth", 768)
  save_dinov2(weights / "narrow", weights / "narrow_head.pth", 32)
  (weights / "sam2.1-hiera-large").mkdir()
  sam2_models.save("sam2_video", weights / "sam2.1-hiera-large")
  torch.save(KnownModel(True, 8).state_dict(), weights / "cotracker2.pth")
  save_dinov3(home / "dinov3")
  return SimpleNamespace(weights=weights, home=home)


@pytest.fixture
def at_home(checkpoints, monkeypatch) -> SimpleNamespace:
  """The small checkpoints where they are looked for, and CoTracker's package."""
  monkeypatch.setenv("FAIR_WEIGHTS", str(checkpoints.weights))
  monkeypatch.chdir(checkpoints.home)
  install(monkeypatch)
  return checkpoints


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
  """Two threads on two busy cores are many times slower than one."""
  monkeypatch.setenv("FAIR_ORT_THREADS", "1")
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  torch.manual_seed(0)
  yield
  torch.set_num_threads(before)
