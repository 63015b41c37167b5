"""torch.compile of the ViT teachers: the same outputs, one program for all blocks, and a compiler that fails is no end.
With compilers that need no C++."""

import numpy as np
import pytest
import torch
import transformers
from dino_models import close, images, save_folder

from openpilot.tools.fair import hf
from openpilot.tools.fair.options import options_of
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError

VIT: dict = {
  "hidden_size": 32,
  "num_hidden_layers": 12,
  "num_attention_heads": 2,
  "image_size": 56,
}  # more blocks than dynamo compiles one function for
HOW: dict = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}


@pytest.fixture(autouse=True)
def fresh():
  torch._dynamo.reset()
  yield
  torch._dynamo.reset()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  torch.manual_seed(0)
  root = tmp_path_factory.mktemp("vits")
  v3 = transformers.DINOv3ViTConfig(patch_size=14, intermediate_size=64, num_register_tokens=4, **VIT)
  depth = transformers.DepthAnythingConfig(
    backbone_config=transformers.Dinov2Config(
      patch_size=14, out_indices=[3, 6, 9, 12], apply_layernorm=True, reshape_hidden_states=False, **VIT),
    reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, patch_size=14)  # fmt: skip
  convnext = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])
  return {
    "dinov2-small": save_folder(
      transformers.Dinov2Model(transformers.Dinov2Config(patch_size=14, **VIT)), root / "v2", **HOW
    ),
    "dinov3-vits16": save_folder(transformers.DINOv3ViTModel(v3), root / "v3", **HOW),
    "depth-anything-v2-small": save_folder(transformers.DepthAnythingForDepthEstimation(depth), root / "depth", **HOW),
    "dinov3-convnext-tiny": save_folder(transformers.DINOv3ConvNextModel(convnext), root / "convnext", **HOW),
  }


def load(name, folders, **options):
  return load_teacher(name, folders[name], ["DINOv3"], device="cpu", **options)


def label(teacher):
  rgb = images(56, 70, 3).numpy()
  teacher.prepare(56, 70)
  (out,) = teacher.label(Clip(rgb))[0].values()
  return torch.from_numpy(out.astype(np.float32))


def alike(actual, expected):
  """Labels are float16: what differs in float32's last bits, as halves of a batch may, can differ by one of theirs,
  2^-10."""
  torch.testing.assert_close(actual, expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["dinov2-small", "dinov3-vits16", "depth-anything-v2-small"])
def test_outputs_stay_equal_and_blocks_share_a_program(folders, monkeypatch, capsys, name, backend):
  programs = []
  real = torch._dynamo.lookup_backend(backend)

  def counted(graph, inputs):
    programs.append(graph)
    return real(graph, inputs)

  monkeypatch.setattr(hf, "COMPILE_BACKEND", counted)
  plain, fast = load(name, folders), load(name, folders, compile=True)
  want = label(plain)
  assert not programs
  alike(label(fast), want)
  # torch 2.11 still makes a program of each block; it is 2.14 that shares them
  assert 1 <= len(programs) <= (2 if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14) else 3)
  several = len(programs)
  alike(label(fast), want)
  assert len(programs) == several and "torch.compile" not in capsys.readouterr().err
  assert fast.settings() == {**plain.settings(), "compiled": True}
  if name == "dinov2-small":  # transformers' hooks collect what the blocks give: outside what is compiled
    rgb = images(56, 70)
    close(
      load(name, folders, compile=True, layers=(2, 7)).extract_features(rgb),
      load(name, folders, layers=(2, 7)).extract_features(rgb),
    )


def test_a_compiler_that_fails_is_said_once(folders, monkeypatch, capsys):
  tried = []

  def broken(graph, inputs):
    tried.append(graph)
    raise RuntimeError("no C++ compiler")

  monkeypatch.setattr(hf, "COMPILE_BACKEND", broken)
  teacher = load("dinov2-small", folders, compile=True)
  want = label(load("dinov2-small", folders))
  for _ in range(2):
    alike(label(teacher), want)
  (line,) = [x for x in capsys.readouterr().err.splitlines() if "torch.compile" in x]
  assert (
    line.startswith("warning: torch.compile fails for teacher 'dinov2-small'")
    and "no C++ compiler" in line
    and len(tried) == 1
  )


def test_out_of_memory_still_halves_the_batch(folders, monkeypatch, capsys):
  def small(graph, inputs):
    def run(*args):
      if max(a.shape[0] for a in args if a.ndim == 3) > 1:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
      return graph.forward(*args)

    return run

  monkeypatch.setattr(hf, "COMPILE_BACKEND", small)
  alike(label(load("dinov2-small", folders, compile=True)), label(load("dinov2-small", folders)))
  err = capsys.readouterr().err
  assert "out of GPU memory with 3 frames at once; going on with 1" in err and "torch.compile" not in err


def test_who_can_be_compiled(folders):
  assert all(
    "compile" in options_of(n) for n in ("dinov2-base", "depth-anything-v2-small", "dinov3-vitb16")
  ) and "compile" not in options_of("sam3")
  with pytest.raises(UserError, match="compile is for ViTs"):
    load("dinov3-convnext-tiny", folders, compile=True)
