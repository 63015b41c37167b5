"""Students of other classes and other pictures than the road's: sizes of all outputs, the exported graph, and that the
default is what it was."""

import hashlib

import numpy as np
import pytest
import torch
from student_inputs import randomise, some_inputs

from openpilot.tools.fair.spec import Class, ClassSet, InputSpec, StudentSpec
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.sizes import SIZES, register
from openpilot.tools.fair.students.student import HEADS, UNIFIED, build, heads_of, spec_of
from openpilot.tools.lib.errors import UserError

MAPS = ClassSet("maps", (Class("background", "background"), Class("pothole")))
BOXES = ClassSet("boxes", tuple(Class(n, maps=False, boxes=True) for n in ("pothole", "cone")))


@pytest.mark.parametrize(
  ("picture", "backbone"),
  [
    (InputSpec("rgb", 96, 160), None),
    (InputSpec("rgb", 64, 96), "vit_tiny_patch16_224"),
    (InputSpec("model_frame", 96, 160), None),
    (InputSpec("model_frame", 96, 160), "efficientvit_b0"),
  ],
)
def test_any_picture_of_whole_32s(picture, backbone):
  student = build(spec_of("unified-nano", input=picture), backbone)
  h, w = picture.height, picture.width
  frame = torch.randint(0, 256, (2, *picture.shape), dtype=torch.uint8)
  points = torch.rand(2, 128, 2) * torch.tensor([w - 1.0, h - 1.0])
  out = student.eval()(frame, points)
  assert out["depth"].shape == (2, 1, h // 4, w // 4) == (2, 1, *picture.map_shape)
  assert out["features"].shape[2:] == (h // 16, w // 16) and out["segmentation"].shape[2:] == (h // 4, w // 4)
  assert out["objects_heat"].shape[2:] == (h // 8, w // 8) and out["objects_proto"].shape[2:] == (h // 4, w // 4)
  assert out["detector_boxes"].shape == (2, 60, 4) and out["lanes_points_out"].shape == (2, 128, 2)
  assert all(torch.isfinite(v).all() for v in out.values())
  student.train()(frame)["detector_logits"].sum().backward()


def test_another_picture_exports(tmp_path):
  ort = pytest.importorskip("onnxruntime")
  student = randomise(build(spec_of("unified-nano", input=InputSpec("rgb", 96, 160), classes=BOXES)))
  entry = export_onnx(student, tmp_path / "x.onnx")
  assert entry["inputs"][0] == {
    "name": "frame",
    "shape": [1, 3, 96, 160],
    "dtype": "uint8",
    "frames": [0],
    "spacing_ms": 50,
    "gap": "ignore",
  }
  classes = {o["name"]: o["classes"] for o in entry["outputs"] if "classes" in o}
  assert classes == {"objects_heat": ["pothole", "cone"], "detector_logits": ["pothole", "cone"]}
  inputs = some_inputs(student)
  inputs["lanes_points"] *= torch.tensor([160 / 560, 96 / 300])
  session = ort.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
  names = [o["name"] for o in entry["outputs"]]
  with torch.no_grad():
    want = student(**inputs)
  for name, got in zip(names, session.run(names, {k: v.numpy() for k, v in inputs.items()}), strict=True):
    assert np.abs(got - want[name].numpy()).max() <= 1e-4 * max(1.0, float(want[name].abs().max())), name


def test_heads_have_the_classes_that_there_are():
  assert heads_of(spec_of("unified-nano", classes=MAPS)) == ("depth", "objects", "lanes")  # no boxes for the detector
  out = build(spec_of("objects-nano", classes=MAPS)).eval()(torch.zeros(1, 6, 128, 256, dtype=torch.uint8))
  assert {k: v.shape[1] for k, v in out.items()} == {"segmentation": 2}
  out = build(spec_of("objects-nano", classes=BOXES)).eval()(torch.zeros(1, 6, 128, 256, dtype=torch.uint8))
  assert "segmentation" not in out and out["objects_heat"].shape[1] == 2
  with pytest.raises(UserError, match="detector-nano tells classes of boxes apart, and the class set 'maps' has none"):
    build(spec_of("detector-nano", classes=MAPS))
  with pytest.raises(UserError, match=r"up to 1024 pixels a side, not in 1056x64"):
    build(spec_of("lanes-nano", input=InputSpec("rgb", 64, 1056)))


def test_names_and_sizes_are_found():
  assert spec_of("lanes-small") == StudentSpec("lanes", "small")
  with pytest.raises(UserError, match="no student 'wings-small'; there are depth-nano"):
    build("wings-small")
  with pytest.raises(UserError, match="already"):
    register("small", SIZES["nano"])
  with pytest.raises(UserError, match="no size 'huge' of students; there are nano"):
    build(StudentSpec("depth", "huge"))


def test_the_default_student_is_what_it_was():
  """Names of its weights, in order (without timm's), and the heads' values of a seed: as they were before pictures and
  classes were data."""
  names = [k for k in build("unified-nano").state_dict() if not k.startswith("backbone.")]
  assert hashlib.sha256("\n".join(names).encode()).hexdigest()[:16] == "9f8875f775bd15be"
  torch.manual_seed(0)
  heads = [HEADS[n].make(StudentSpec("unified", "nano"), SIZES["nano"]) for n in UNIFIED]
  sums = [sum(float(p.detach().double().sum()) for p in h.parameters()) for h in heads]
  assert sums == pytest.approx([201.117089, 193.469807, 1106.141419, 158.895485], abs=1e-3)
