"""Students: sizes and shapes held, the exported graph equal to torch in ONNX Runtime and tinygrad."""

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("timm", reason="students are built on timm")

import torch.nn.functional as F
from student_inputs import assert_close, randomise, some_inputs
from torch import nn

from openpilot.selfdrive.modeld.fair.bundle import MODELS_DIR, schema, violation
from openpilot.selfdrive.modeld.fair.runners.tinygrad import find_clang
from openpilot.tools.fair.students import backbone as backbones
from openpilot.tools.fair.students.backbone import Backbone, other_stem, packed_stem, rgb_stem
from openpilot.tools.fair.students.detector import DecoderLayer, DetectorHead, SharedAttention, grid, sine
from openpilot.tools.fair.students.lanes import POINTS
from openpilot.tools.fair.students.layers import Attention, split_heads
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.student import HEADS, Student, build, parameters, student_names
from openpilot.tools.fair.students.sizes import SIZES
from openpilot.tools.fair.students.list_students import macs
from openpilot.tools.lib.errors import UserError

TABLE = {  # name: parameters, multiply-accumulates in millions, within 0.5%: as `tools/op.sh students` prints them
  "depth-nano": (505297, 166),
  "depth-small": (1747745, 454),
  "depth-base": (2496081, 1059),
  "objects-nano": (507476, 181),
  "objects-small": (1739100, 471),
  "objects-base": (2472380, 1087),
  "detector-nano": (1063510, 240),
  "detector-small": (2297918, 518),
  "detector-base": (3026270, 1102),
  "oriented-nano": (502002, 170),
  "oriented-small": (1731818, 456),
  "oriented-base": (2461482, 1065),
  "lanes-nano": (540393, 186),
  "lanes-small": (1794697, 471),
  "lanes-base": (2599993, 1109),
  "unified-nano": (1131124, 302),
  "unified-small": (2422724, 621),
  "unified-base": (3291380, 1323),
}
SHAPES = {
  "depth": (1, 64, 128),
  "segmentation": (5, 64, 128),
  "objects_heat": (3, 32, 64),
  "objects_box": (4, 32, 64),
  "objects_coef": (16, 32, 64),
  "objects_proto": (16, 64, 128),
  "objects_embed": (16, 32, 64),
  "detector_logits": (60, 3),
  "detector_boxes": (60, 4),
  "lanes_points_out": (128, 2),
  "lanes_visible": (128,),
}


@pytest.mark.slow
def test_table():
  assert set(TABLE) == set(student_names())
  for name, (count, mega) in TABLE.items():
    student = build(name)
    assert parameters(student) == pytest.approx(count, rel=0.005), name
    assert macs(student) / 1e6 == pytest.approx(mega, rel=0.005), name
    assert parameters(student) <= getattr(HEADS.get(student.task), "budget", 10_000_000)


def test_macs_are_counted_as_by_hand():
  student = build("depth-nano")
  before = macs(student)
  student.depth.depth[1] = nn.ConvTranspose2d(32, 3, 2, 2)  # two more outputs of 32 products each at 64 x 128 places
  assert macs(student) - before == 2 * 32 * 64 * 128


@pytest.mark.parametrize("name", ["efficientvit_b0", "efficientvit_b1", "vit_tiny_patch16_224"])
def test_other_backbones(name):
  student = build("depth-small", name).eval()
  out = student(torch.zeros(1, 6, 128, 256, dtype=torch.uint8))
  assert out["depth"].shape == (1, 1, 64, 128) and out["features"].shape == (1, SIZES["small"].features, 16, 32)


def test_shapes_and_training_outputs():
  student = build("unified-nano")
  inputs = some_inputs(student, b=2)
  out = student.eval()(**inputs)
  expected = {**SHAPES, "features": (64, 16, 32)}
  expected.update({f"{k}_out": tuple(inputs[k].shape[1:]) for k in ("lanes_template", "lanes_hidden")})
  assert {k: tuple(v.shape) for k, v in out.items()} == {k: (2, *v) for k, v in expected.items()}
  assert (
    (out["objects_box"] >= 0).all()
    and (out["objects_coef"].abs() <= 1).all()
    and ((out["detector_boxes"] >= 0) & (out["detector_boxes"] <= 1)).all()
  )
  out = student.train()(inputs["frame"])
  assert not [k for k in out if k.startswith("lanes")]
  assert [(a.shape, b.shape) for a, b in out["detector_aux"]] == [((2, 60, 3), (2, 60, 4))]


def test_frames_of_a_batch_do_not_mix():
  student = randomise(build("unified-nano"))
  inputs = some_inputs(student, b=2)
  both, second = student(**inputs), student(**{k: v[1:] for k, v in inputs.items()})
  for name, value in both.items():
    assert_close(name, value[1:].detach().numpy(), second[name].detach().numpy(), 1e-5)


def test_every_parameter_learns():
  student = randomise(build("unified-nano")).train()
  g = torch.Generator().manual_seed(3)
  # three frames: only in the third does the tracker know of a drive before
  frame = torch.randint(0, 256, (6, 6, 128, 256), generator=g, dtype=torch.uint8)
  points = torch.rand(2, 3, 16, 2, generator=g) * torch.tensor([500.0, 250.0])
  out = student.forward_clips(frame, points, torch.ones(2, 3, 16))
  assert out["lanes_points_out"].shape == (2, 3, 16, 2) and out["lanes_visible"].shape == (2, 3, 16)
  aux, looks, votes = out.pop("detector_aux"), out.pop("lanes_looks"), out.pop("lanes_votes")
  loss = sum(
    (v * torch.randn(v.shape, generator=g)).mean()
    for v in [*out.values(), *(x for pair in aux for x in pair), *(logits for _, logits in (*looks, *votes))]
  )
  loss.backward()
  assert [
    n for n, p in student.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
  ] == []


# -- backbone


def test_packed_stem_is_the_rgb_stem():
  """float64; what is left is the rounding of the BT.601 coefficients to six digits."""
  g = torch.Generator().manual_seed(0)
  weight = torch.randn(8, 3, 3, 3, generator=g, dtype=torch.float64)
  mean, std = backbones.RGB_MEAN, backbones.RGB_STD
  yuv = torch.rand(1, 6, 32, 32, generator=g, dtype=torch.float64) * 255
  half = torch.stack([yuv[:, :4].mean(1), yuv[:, 4], yuv[:, 5]], 1)
  r = 1.164384 * (half[:, 0] - 16) + 1.596027 * (half[:, 2] - 128)
  gr = 1.164384 * (half[:, 0] - 16) - 0.391762 * (half[:, 1] - 128) - 0.812968 * (half[:, 2] - 128)
  b = 1.164384 * (half[:, 0] - 16) + 2.017232 * (half[:, 1] - 128)
  rgb = (torch.stack([r, gr, b], 1) / 255 - torch.tensor(mean, dtype=torch.float64).view(1, 3, 1, 1)) / torch.tensor(
    std, dtype=torch.float64
  ).view(1, 3, 1, 1)
  want = F.conv2d(rgb, weight, stride=2, padding=1)  # padded: zero must mean the same color in both
  normalized = (yuv - backbones.yuv_offset(mean).view(1, 6, 1, 1)) / backbones.SCALE
  got = F.conv2d(normalized, packed_stem(weight, std), stride=2, padding=1)
  assert torch.allclose(got, want, atol=1e-9)


def test_a_stem_is_translated_between_packed_frames_and_rgb(rng):
  weight, std = torch.from_numpy(rng.normal(size=(5, 3, 3, 3))), (0.2, 0.3, 0.25)
  packed, rgb = packed_stem(weight, std), rgb_stem(weight, std)
  np.testing.assert_allclose(other_stem(packed).numpy(), rgb.numpy(), rtol=0, atol=1e-12)
  np.testing.assert_allclose(other_stem(rgb).numpy(), packed.numpy(), rtol=0, atol=1e-12)
  # one that tells the four luma planes apart sees their sum
  apart = packed + torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, 0.0]).view(1, 6, 1, 1)
  np.testing.assert_allclose(other_stem(apart).numpy(), rgb.numpy(), rtol=0, atol=1e-12)


def test_pretrained_weights_reach_the_packed_stem(monkeypatch):
  import timm

  create = timm.create_model
  kept = {}

  def fake(name, pretrained=False, **kw):
    net = create(name, pretrained=False, **kw)
    kept["stem"], kept["std"] = (
      net.conv_stem.weight.detach().clone(),
      net.pretrained_cfg["std"],
    )  # this one's is not ImageNet's
    return net

  monkeypatch.setattr(timm, "create_model", fake)
  b = Backbone("mobilenetv4_conv_small_050", pretrained=True)
  assert b.pretrained and torch.equal(b.net.conv_stem.weight, packed_stem(kept["stem"], kept["std"]))


def test_offline_is_said_and_goes_on(monkeypatch, capsys):
  import timm

  create = timm.create_model

  def offline(name, pretrained=False, **kw):
    if pretrained:
      raise OSError("no route to the hub")
    return create(name, pretrained=False, **kw)

  monkeypatch.setattr(timm, "create_model", offline)
  b = Backbone("mobilenetv4_conv_small_050", pretrained=True)
  assert not b.pretrained and "no route to the hub" in capsys.readouterr().err


def test_backbone_levels():
  b = Backbone("vit_tiny_patch16_224", deepest=32).eval()
  maps = b(torch.zeros(1, 6, 128, 256, dtype=torch.uint8))
  assert {s: tuple(m.shape[1:]) for s, m in maps.items()} == {
    s: (b.channels[s], 256 // s, 512 // s) for s in (4, 8, 16, 32)
  }


def test_wrong_names(monkeypatch):
  with pytest.raises(UserError, match=r"no student 'unified-huge'.*unified-small"):
    build("unified-huge")
  with pytest.raises(UserError, match="timm has no backbone 'resnet9000'"):
    build("depth-nano", "resnet9000")
  with pytest.raises(UserError, match="over its budget of 3M"):
    build("lanes-nano", "vit_tiny_patch16_224")
  monkeypatch.setitem(sys.modules, "timm", None)
  with pytest.raises(UserError, match="timm cannot be imported"):
    build("depth-nano")


# -- attention


def test_attention_against_torch():
  torch.manual_seed(0)
  ours = Attention(32, heads=4).double()
  theirs = nn.MultiheadAttention(32, 4, batch_first=True).double()
  with torch.no_grad():
    theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]))
    theirs.out_proj.weight.copy_(ours.out.weight)
    theirs.out_proj.bias.copy_(ours.out.bias)
  q, k, v = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 9, 9))
  bias = torch.randn(5, 9, dtype=torch.float64)
  assert torch.allclose(ours(q, k, v, bias), theirs(q, k, v, attn_mask=bias)[0], atol=1e-12)


def test_place_in_the_keys_is_a_gaussian():
  """The detector's four numbers beside a query and a key, against the Gaussian written out."""
  torch.manual_seed(0)
  attention = SharedAttention(32, heads=4).double()
  places = grid(4, 6).double()
  query, tokens, value = (torch.randn(2, n, 32, dtype=torch.float64) for n in (5, 24, 24))
  center, sharp = torch.rand(2, 4, 5, 2, dtype=torch.float64), 1 + 9 * torch.rand(2, 4, 5, 2, dtype=torch.float64)
  key = torch.cat(
    [split_heads(tokens, 4), torch.cat([(places - 0.5) ** 2, places - 0.5], 1).expand(2, 4, -1, -1)], -1
  ).transpose(2, 3)
  got = attention(query, key, split_heads(value, 4), torch.cat([-sharp, 2 * sharp * (center - 0.5)], -1))
  gauss = -(sharp[..., None, :] * (places - center[..., None, :]) ** 2).sum(-1)
  y = F.scaled_dot_product_attention(
    split_heads(attention.q(query), 4), split_heads(tokens, 4), split_heads(value, 4), attn_mask=gauss
  )
  assert torch.allclose(got, attention.out(y.transpose(1, 2).flatten(2)), atol=1e-10)


def test_queries_are_sought_by_what_they_are_and_where():
  """As DETR's: a query's place is added to what asks and to what is asked, not to what is told."""
  torch.manual_seed(0)
  layer = DecoderLayer(8, 16, 2)
  given = []
  layer.self_attention.register_forward_pre_hook(lambda _, args: given.extend(args))
  layer.cross.register_forward_pre_hook(lambda _, args: given.append(args[0]))
  layer.norm1.register_forward_hook(lambda _, args, out: given.append(out))
  x, query, box = torch.randn(3, 8), torch.randn(3, 8), torch.rand(3, 4)
  layer(x, query, box, torch.randn(2, 8, 5), torch.randn(2, 5, 4))
  pos = query.numpy() + box.numpy() @ layer.place.weight.detach().numpy().T + layer.place.bias.detach().numpy()
  asks, asked, told, after, crossing = (g.detach().numpy() for g in given)
  for got, want in ((asks, x.numpy() + pos), (asked, x.numpy() + pos), (told, x.numpy()), (crossing, after + pos)):
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_points_without_more_are_fresh_where_there_is_no_state():
  """And go on where there is one; all of them are used unless a mask says so."""
  given, state = [], torch.full((1, 3, 2), 7.0)
  lanes = SimpleNamespace(
    zeros=lambda b, n, like: (torch.zeros(b, n, 2), torch.zeros(b, n, 2)),
    step=lambda *args: given.append(args) or (0, 0, 0, 0),
  )
  student = SimpleNamespace(encode=lambda frame: ({}, []), lanes=lanes)
  mask, fresh = torch.tensor([[1.0, 0, 1]]), torch.tensor([[0.0, 1, 0]])
  for extra, want_mask, want_fresh in (
    ({}, [1, 1, 1], [1, 1, 1]),
    ({"lanes_mask": mask}, [1, 0, 1], [1, 1, 1]),
    ({"lanes_template": state, "lanes_hidden": state}, [1, 1, 1], [0, 0, 0]),
    ({"lanes_template": state, "lanes_hidden": state, "lanes_fresh": fresh}, [1, 1, 1], [0, 1, 0]),
  ):
    Student.forward(student, None, torch.zeros(1, 3, 2), **extra)
    _, _, used, new, template, hidden = given[-1]
    assert (used.tolist(), new.tolist()) == ([want_mask], [want_fresh])
    assert (template == (7 if "lanes_template" in extra else 0)).all() and (hidden == template).all()


# -- export


@pytest.mark.slow
@pytest.mark.parametrize("task", (*HEADS, "unified"))
def test_onnx_runtime_parity(task, tmp_path):
  """1e-4 of each output's largest value: some hundred float32 sums deep, in another order."""
  ort = pytest.importorskip("onnxruntime")
  onnx = pytest.importorskip("onnx")
  student = randomise(build(f"{task}-small"), seed=7)
  entry = export_onnx(student, tmp_path / "student.onnx")
  assert not student.training
  graph = onnx.load(tmp_path / "student.onnx")
  assert [(o.domain, o.version) for o in graph.opset_import] == [("", 17)]
  assert violation(entry, schema()["properties"]["graphs"]["items"]) is None
  session = ort.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
  for side, found in (("inputs", session.get_inputs()), ("outputs", session.get_outputs())):
    assert [(i.name, i.shape) for i in found] == [(i["name"], i["shape"]) for i in entry[side]]
  assert session.get_inputs()[0].type == "tensor(uint8)"
  state = {s["input"]: s["output"] for s in entry["state"]}
  assert state == (
    {} if student.lanes is None else {"lanes_template": "lanes_template_out", "lanes_hidden": "lanes_hidden_out"}
  )
  assert json.loads(json.dumps(entry)) == entry
  for seed in (1, 2):
    inputs = some_inputs(student, seed)
    with torch.no_grad():
      want = student(**inputs)
    got = session.run(list(want), {k: v.numpy() for k, v in inputs.items()})
    for (name, w), o in zip(want.items(), got, strict=True):
      assert_close(name, o, w.numpy(), 1e-4)


def test_heads_in_the_manifest(tmp_path):
  pytest.importorskip("onnx")
  entry = export_onnx(build("unified-nano"), tmp_path / "fair.onnx")
  heads = {o["name"]: (o.get("head"), o.get("parameters", {}).get("part")) for o in entry["outputs"]}
  assert heads == {
    "depth": ("depth", None),
    "features": ("features", None),
    "segmentation": ("segmentation", None),
    **{f"objects_{p}": ("objects", p) for p in ("heat", "box", "coef", "proto", "embed")},
    "detector_logits": ("detector", "logits"),
    "detector_boxes": ("detector", "boxes"),
    "lanes_points_out": ("lanes", "points"),
    "lanes_visible": ("lanes", "visible"),
    "lanes_template_out": (None, None),
    "lanes_hidden_out": (None, None),
  }
  assert entry["point_slots"] == {"count": 128, "mask": "lanes_mask"} and entry["file"] == "fair.onnx"


def test_nan_is_not_exported(tmp_path):
  student = build("depth-nano")
  with torch.no_grad():
    student.depth.depth[1].bias.fill_(float("nan"))
  with pytest.raises(UserError, match=r"NaN or Inf in depth\.depth\.1\.bias"):
    export_onnx(student, tmp_path / "student.onnx")


TINYGRAD = """
import sys
import numpy as np
from tinygrad import Tensor
from tinygrad.nn.onnx import OnnxRunner
inputs = dict(np.load(sys.argv[2]))
out = OnnxRunner(sys.argv[1])({k: Tensor(v) for k, v in inputs.items()})
np.savez(sys.argv[3], **{k: v.numpy() for k, v in out.items()})
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, backbone", [("unified-nano", None), ("depth-nano", "mobilenetv2_100_same")])
def test_tinygrad_parity(tmp_path, name, backbone):
  """All heads. In a process of its own: tinygrad reads its settings when it is imported. 1e-4 as for ONNX Runtime."""
  pytest.importorskip("onnx")
  if importlib.util.find_spec("tinygrad") is None:
    pytest.skip("tinygrad is not installed")
  if (compiler := find_clang()) is None:
    pytest.skip("tinygrad's CPU device needs clang, or the ziglang package")
  student = randomise(build(name, backbone), seed=9)
  export_onnx(student, tmp_path / "student.onnx")
  inputs = some_inputs(student, 4)
  np.savez(tmp_path / "in.npz", **{k: v.numpy() for k, v in inputs.items()})
  command = [sys.executable, "-c", TINYGRAD, *(str(tmp_path / f) for f in ("student.onnx", "in.npz", "out.npz"))]
  # NOOPT: plain loops, for what is tested is the operators, and optimized kernels take minutes to compile
  done = subprocess.run(
    command, env={**os.environ, "CC": compiler, "DEV": "CPU", "NOOPT": "1"}, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr[-2000:]
  got = np.load(tmp_path / "out.npz")
  with torch.no_grad():
    want = student(**inputs)
  for k, w in want.items():
    assert_close(k, got[k], w.numpy(), 1e-4)


def tensorflow_same(x, conv):
  """TensorFlow's padding, written down by its documentation: total = max(k - s, 0) on sides that s divides, the smaller
  half first."""
  (kh, kw), (sh, sw) = conv.kernel_size, conv.stride
  out = x.new_zeros(len(x), conv.out_channels, x.shape[2] // sh, x.shape[3] // sw)
  top, left = (kh - sh) // 2, (kw - sw) // 2
  for i in range(kh):
    for j in range(kw):
      moved = torch.zeros_like(x)
      dy, dx = i - top, j - left
      ys, xs = torch.arange(x.shape[2]) + dy, torch.arange(x.shape[3]) + dx
      good = ((ys >= 0) & (ys < x.shape[2]))[:, None] & ((xs >= 0) & (xs < x.shape[3]))[None]
      moved[..., good] = x[..., ys.clamp(0, x.shape[2] - 1), :][..., xs.clamp(0, x.shape[3] - 1)][..., good]
      out += torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], moved[..., ::sh, ::sw])
  return out


@pytest.mark.parametrize("name, timm_name", [(n, v.timm) for n, v in backbones.VARIANTS.items()])
def test_weights_of_a_file_see_the_packed_frame_as_they_saw_rgb(tmp_path, name, timm_name):
  """The whole backbone on a packed frame gives what timm's network gives on the RGB picture that it holds at half the
  size, to 1e-5 of the largest value, at the borders too; nothing clips as the frame holds a legal picture."""
  import timm

  torch.manual_seed(0)
  whole = timm.create_model(timm_name, pad_type="same").eval()
  torch.save({k: v.half() for k, v in whole.state_dict().items()}, tmp_path / "w.pth")
  whole.load_state_dict(torch.load(tmp_path / "w.pth"))
  b = Backbone(name, str(tmp_path / "w.pth")).eval()
  assert b.pretrained
  frame = torch.randint(60, 190, (1, 6, 128, 256), dtype=torch.uint8)
  frame[:, 4:] = torch.randint(110, 146, (1, 2, 128, 256), dtype=torch.uint8)
  y, u, v = frame[:, :4].double().mean(1) - 16, frame[:, 4].double() - 128, frame[:, 5].double() - 128
  rgb = torch.stack(
    [1.164384 * y + 1.596027 * v, 1.164384 * y - 0.391762 * u - 0.812968 * v, 1.164384 * y + 2.017232 * u], 1
  )
  assert rgb.min() >= 0 and rgb.max() <= 255
  net = timm.create_model(timm_name, features_only=True, pad_type="same").eval()
  net.load_state_dict({k: x for k, x in whole.state_dict().items() if k in net.state_dict()})
  for part in backbones.VARIANTS[name].linear:
    net.get_submodule(part).act = torch.nn.Identity()
  with torch.no_grad():
    got, want = b(frame), net((rgb / 255).float())
    stem = next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    x = (rgb / 255).float()
    assert torch.allclose(stem(x), tensorflow_same(x, stem), atol=1e-5)
    mine = b.net.conv_stem(b.normalize(frame))
    assert (mine - stem(x)).abs().max() < 1e-5 * stem(x).abs().max()
  by_stride = dict(zip([2 * r for r in net.feature_info.reduction()], want, strict=True))
  for stride in b.strides:
    assert (got[stride] - by_stride[stride]).abs().max() < 1e-4 * by_stride[stride].abs().max(), stride


def test_a_file_of_other_weights_is_refused(tmp_path):
  torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
  with pytest.raises(UserError, match=r"tensors of the backbone are not in it, the first is conv_stem\.weight"):
    Backbone("mobilenetv2_100_same", str(tmp_path / "w.pth"))
  with pytest.raises(UserError, match="other conventions"):
    Backbone("mobilenetv2_100_same", True)


def test_a_pretrained_backbone_keeps_the_budget():
  student = build("unified-small", "mobilenetv2_100_same")
  assert macs(student) < 650e6 and parameters(student) < 2.5e6


def test_padding_as_tensorflows_in_onnx_runtime(tmp_path):
  import onnxruntime as ort

  student = randomise(build("depth-nano", "mobilenetv2_100_same"), seed=3)
  export_onnx(student, tmp_path / "student.onnx")
  inputs = some_inputs(student, 4)
  session = ort.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
  names = [o.name for o in session.get_outputs()]
  got = dict(zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True))
  with torch.no_grad():
    want = student(**inputs)
  for k, w in want.items():
    assert_close(k, got[k], w.numpy(), 1e-4)


def test_places_are_sines_and_cosines_of_x_then_of_y():
  """At frequencies from half a wave over the picture to 32."""
  x, y = 0.25, 0.5
  freq = np.array([0.5, 32.0])
  want = np.concatenate([f(2 * np.pi * v * freq) for v in (x, y) for f in (np.sin, np.cos)])
  np.testing.assert_allclose(sine(torch.tensor([[x, y]]), 8).numpy(), want[None], atol=1e-5)


def test_a_detectors_queries_begin_small_and_of_its_width():
  head = DetectorHead(16, 2)
  assert head.content.shape[-1] == head.query.shape[-1] == 128
  for p in (head.content, head.query):
    assert 0.018 < float(p.detach().std()) < 0.022


def test_colors_are_normalized_as_the_backbones_were_trained():
  import timm.data

  assert backbones.RGB_MEAN == timm.data.IMAGENET_DEFAULT_MEAN and backbones.RGB_STD == timm.data.IMAGENET_DEFAULT_STD


def test_lanes_have_as_many_points_as_the_shipped_bundles():
  graphs = json.loads((MODELS_DIR / "fair_unified_small" / "manifest.json").read_text())["graphs"]
  assert POINTS in {g["point_slots"]["count"] for g in graphs if "point_slots" in g}
