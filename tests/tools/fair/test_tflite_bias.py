"""Biases of TFLite's 8 bits: how weights are rounded, and, where TFLite's converter is installed, that shifted biases
bring each channel's mean back."""

import json
import subprocess

import numpy as np
import pytest

from openpilot.tools.fair.tflite import bias, environment
from openpilot.tools.lib import python

SCRIPT = """
import json, re, sys
from pathlib import Path
import numpy as np, torch
from torch import nn
from openpilot.selfdrive.modeld.fair.runners.tflite import Network
from openpilot.tools.fair.tflite import convert
folder = Path(sys.argv[1])
torch.manual_seed(0)
class Net(nn.Module):
  def __init__(self):
    super().__init__()
    twice = nn.ConvTranspose2d(8, 8, 2, 2)
    self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), twice,
                                nn.ReLU(), nn.Conv2d(8, 4, 1))
  def forward(self, x):
    return {"y": self.layers(x)}
frames = [{"x": torch.rand(1, 3, 33, 41).numpy()} for _ in range(8)]
net = Net().eval()
with torch.no_grad():  # one large weight of each channel makes the others' steps coarse
  for layer in net.layers[:6:2]:
    layer.weight.flatten(1)[:, 0] *= 30
convert.to_tflite(net, {"x": torch.from_numpy(frames[0]["x"])}, folder / "float.tflite")
with torch.no_grad():
  want = np.stack([net(torch.from_numpy(f["x"]))["y"].numpy() for f in frames])
ends = [{"name": n, "shape": list(a.shape), "dtype": "float32"} for n, a in (("x", frames[0]["x"]), ("y", want[0]))]
off = {}
shift = convert.bias_shifts((folder / "float.tflite").read_bytes(), frames)
for name, how in (("plain", {}), ("shifted", shift)):
  left = convert.to_int8(folder / "float.tflite", folder / "int8.tflite", frames, how)
  run = Network((folder / "int8.tflite").read_bytes(), ends[:1], ends[1:]).run
  got = np.stack([run(f)["y"].copy() for f in frames])
  off[name] = float(np.abs((got - want).mean((0, 1, 3, 4))).mean())
off["float"] = left
print("said " + json.dumps(off))
"""


@pytest.mark.parametrize("axis", [0, 3])
def test_weights_are_rounded_to_127_steps_of_each_channel(axis):
  w = np.random.default_rng(0).normal(size=(5, 3, 3, 4)).astype(np.float32)
  w[(slice(None),) * axis + (0,)] = 0  # a channel of zeros stays one
  got = bias.rounded(w, axis, bias.TARGET)
  for a, b in zip(np.moveaxis(w, axis, 0), np.moveaxis(got, axis, 0), strict=True):
    step = np.abs(a).max() / 127
    np.testing.assert_allclose(b, np.round(a / step) * step if step else a, rtol=1e-6)


@pytest.mark.slow
def test_shifted_biases_bring_each_channels_mean_back(tmp_path):
  where = environment.folder()
  if not environment.ready(where):
    pytest.skip(f"TFLite's converter is not installed in {where}; `op optimize --format tflite` makes it")
  done = subprocess.run(
    environment.command("-c", SCRIPT, tmp_path), env=python.environment(), capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  off = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("said ")).removeprefix("said "))
  assert off["shifted"] < 0.75 * off["plain"]  # values are rounded in both
  assert list(off["float"]) == ["the last layer of an output"]
