import json

import numpy as np
import pytest
import torch
import transformers
from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil
from transformers.models.rt_detr.image_processing_pil_rt_detr import RTDetrImageProcessorPil

from openpilot.tools.learn.device import Device
from openpilot.tools.fair.detr.teacher import DetrTeacher, Pictures, road_classes, to_table
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip, Entry, failure_is_said
from openpilot.tools.lib.errors import UserError

DEVICE = Device(torch.device("cpu"), torch.float32)
ENTRY = Entry("detr.teacher:DetrTeacher", "", "Apache-2.0", "", "")
NAMES = ["person", "motorbike", "aeroplane", "car", "Traffic Light", "sofa", "dog"]
ROADS = {"person": "person", "motorbike": "motorcycle", "car": "car", "Traffic Light": "traffic light", "dog": "animal"}
SMALL = {
  "d_model": 32,
  "encoder_ffn_dim": 48,
  "decoder_ffn_dim": 48,
  "encoder_attention_heads": 2,
  "decoder_attention_heads": 2,
  "decoder_layers": 2,
  "id2label": dict(enumerate(NAMES)),
}
SMALL_DETR = {**SMALL, "encoder_layers": 1, "num_queries": 12}
SMALL_RT = {
  **SMALL,
  "encoder_hidden_dim": 32,
  "encoder_in_channels": [16, 24, 32],
  "decoder_in_channels": [32, 32, 32],
  "num_queries": 20,
  "num_denoising": 0,
  "initializer_range": 0.1,
}
THREE = ["stage2", "stage3", "stage4"]


def make(kind: str):
  """A small model of the official class with random weights, and the official processor."""
  t = transformers
  fixed = {"height": 64, "width": 96}
  basic = {"embedding_size": 8, "depths": [1, 1, 1, 1], "layer_type": "basic"}
  if kind == "detr":
    back = t.ResNetConfig(hidden_sizes=[8, 12, 16, 24], out_features=["stage4"], **basic)
    return t.DetrForObjectDetection(t.DetrConfig(backbone_config=back, **SMALL_DETR)), DetrImageProcessorPil(
      size={"shortest_edge": 60, "longest_edge": 100}
    )
  if kind == "detr on dinov3":
    vit = t.DINOv3ViTConfig(
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=2,
      num_attention_heads=2,
      num_register_tokens=4,
      out_features=["stage2"],
    )
    return t.DetrForObjectDetection(t.DetrConfig(backbone_config=vit, **SMALL_DETR)), DetrImageProcessorPil(size=fixed)
  if kind == "detr on dinov3 convnext":
    net = t.DINOv3ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1], out_features=["stage4"])
    return t.DetrForObjectDetection(t.DetrConfig(backbone_config=net, **SMALL_DETR)), DetrImageProcessorPil(size=fixed)
  if (
    kind == "deimv2 on dinov3"
  ):  # as the published S, M, L and X: three layers of a ViT beside a small convolutional network
    layers = ["stage1", "stage2", "stage3"]
    vit = t.DINOv3ViTConfig(
      hidden_size=32,
      intermediate_size=48,
      num_hidden_layers=3,
      num_attention_heads=2,
      num_register_tokens=4,
      out_features=layers,
    )
    config = t.Deimv2Config(
      backbone_config=vit, encoder_has_trailing_conv=False, spatial_tuning_adapter_inplanes=8, **SMALL_RT
    )
    return t.Deimv2ForObjectDetection(config), RTDetrImageProcessorPil(size=fixed)
  if kind == "rt_detr_v2":
    back = t.RTDetrResNetConfig(hidden_sizes=[8, 16, 24, 32], out_features=THREE, **basic)
    return t.RTDetrV2ForObjectDetection(t.RTDetrV2Config(backbone_config=back, **SMALL_RT)), RTDetrImageProcessorPil(
      size=fixed
    )
  back = t.HGNetV2Config(
    stem_channels=[3, 8, 8],
    stage_in_channels=[8, 12, 16, 24],
    stage_mid_channels=[8, 8, 8, 8],
    stage_out_channels=[12, 16, 24, 32],
    hidden_sizes=[12, 16, 24, 32],
    stage_num_blocks=[1, 1, 1, 1],
    stage_numb_of_layers=[1, 1, 1, 1],
    out_features=THREE,
  )
  return t.DFineForObjectDetection(t.DFineConfig(backbone_config=back, **SMALL_RT)), RTDetrImageProcessorPil(size=fixed)


def save(kind, path):
  torch.manual_seed(7)
  model, processor = make(kind)
  model.eval()
  with torch.no_grad():  # heads start near nothing: spread their scores and boxes
    for name, p in model.named_parameters():
      if p.ndim == 2 and ("class" in name or "bbox" in name):
        p.normal_(0, 0.6 if "class" in name else 0.2)
  model.save_pretrained(path)
  processor.save_pretrained(path)
  return model, processor


def frames(n=3, h=50, w=120, seed=0):
  """Smooth random pictures, with noise: resizing matters on them."""
  r = np.random.default_rng(seed)
  x = torch.nn.functional.interpolate(
    torch.tensor(r.uniform(0, 255, (n, 3, 7, 9)), dtype=torch.float32), (h, w), mode="bicubic"
  )
  return (x.numpy() + r.normal(0, 20, (n, 3, h, w))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
  "kind", ["detr", "detr on dinov3", "detr on dinov3 convnext", "deimv2 on dinov3", "rt_detr_v2", "d_fine"]
)
def test_equals_the_official_forward_and_postprocessing(kind, tmp_path):
  official, processor = save(kind, tmp_path)
  # as the teacher gets it: mapped weights are aligned otherwise
  official = type(official).from_pretrained(tmp_path, local_files_only=True).eval()
  teacher = DetrTeacher("t", ENTRY, tmp_path, device="cpu", score=0.2, batch=2)
  rgb = frames(seed=len(kind))
  teacher.prepare(*rgb.shape[-2:])
  with torch.inference_mode():
    x = teacher.pictures(rgb, teacher.device)
    outputs = official(pixel_values=x)
    logits, boxes = teacher.forward(rgb)
    # the same operations on the same input, in batches of another size: sums of another order, some 3e-6
    torch.testing.assert_close(logits, outputs.logits, atol=3e-5, rtol=3e-5)
    torch.testing.assert_close(boxes, outputs.pred_boxes, atol=1e-5, rtol=3e-5)
    want = processor.post_process_object_detection(outputs, 0.2, [rgb.shape[-2:]] * len(rgb))
  got = teacher.detect(rgb)
  assert sum(len(s) for _, s, _ in got) > 5
  for (b, s, c), w in zip(got, want, strict=True):
    np.testing.assert_allclose(b, w["boxes"], atol=1e-3)  # pixels
    np.testing.assert_allclose(s, w["scores"], atol=1e-5)
    np.testing.assert_array_equal(c, w["labels"])
  # and the table: in batches, road classes only, pixel centers, clipped
  table = teacher.label(Clip(rgb))[0]["boxes"]
  roads = {NAMES.index(k): teacher.classes.index(v) for k, v in ROADS.items()}
  wanted = [
    (t, *(b.numpy().clip(0, [120, 50, 120, 50]) - 0.5), s.item(), roads[k.item()])
    for t, w in enumerate(want)
    for b, s, k in zip(w["boxes"], w["scores"], w["labels"], strict=True)
    if k.item() in roads
  ]
  wanted = [r for r in wanted if r[3] > r[1] and r[4] > r[2]]
  assert (
    0 < len(wanted) < sum(len(s) for _, s, _ in got) + kind.startswith(("detr", "deim"))
  )  # of random weights they see few classes
  np.testing.assert_allclose(
    np.stack([table[k] for k in ("frame", "x0", "y0", "x1", "y1", "score", "cls")], 1), np.array(wanted), atol=2e-3
  )


@pytest.mark.parametrize(
  "size,shape",
  [
    ({"shortest_edge": 60, "longest_edge": 100}, (50, 120)),
    ({"shortest_edge": 80, "longest_edge": 1333}, (50, 120)),
    ({"shortest_edge": 60, "longest_edge": 100}, (121, 77)),
    ({"height": 64, "width": 64}, (50, 120)),
  ],
)
def test_pictures_equal_the_official_processor(size, shape):
  rgb = frames(2, *shape)
  official = DetrImageProcessorPil(size=size)
  x = Pictures(official.to_dict())(rgb, DEVICE)
  want = official(images=list(rgb), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
  # PIL rounds to whole gray levels between its two passes as well, torch only after both: one gray level, 1/255 over
  # the smallest std
  assert x.shape == want.shape
  assert (x - want).abs().max() <= 1.01 / 255 / 0.224
  assert (x - want).abs().mean() < 0.2 / 255 / 0.224


def test_batches_and_single_frames_agree(tmp_path):
  save("rt_detr_v2", tmp_path)
  teacher = DetrTeacher("t", ENTRY, tmp_path, device="cpu", score=0.2)
  rgb = frames(4)
  whole = teacher.label(Clip(rgb))[0]["boxes"]
  for t in range(4):
    one = teacher.label(Clip(rgb[t : t + 1]))[0]["boxes"]
    np.testing.assert_allclose(one["x0"], whole["x0"][whole["frame"] == t], atol=1e-3)


def test_settings_say_what_decides_the_labels(tmp_path):
  save("d_fine", tmp_path)
  teacher = DetrTeacher("t", ENTRY, tmp_path, device="cpu")
  teacher.prepare(50, 120)
  s = teacher.settings()
  assert json.loads(json.dumps(s)) == s
  assert s["classes"]["motorbike"] == "motorcycle" and "sofa" not in s["classes"] and s["precision"] == "float32"
  assert teacher.labels[0].classes == teacher.classes and not teacher.stateful


def test_no_boxes_is_an_empty_table():
  table = to_table([(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int16))] * 3, 50, 120)
  assert all(len(v) == 0 for v in table.values()) and set(table) == {"frame", "x0", "y0", "x1", "y1", "score", "cls"}


def test_road_classes_are_data(tmp_path):
  classes, lut = road_classes({0: "N/A", 3: "Car", 17: "zebra"})
  assert len(classes) == 10 and [lut[0], lut[3], lut[17]] == [-1, classes.index("car"), classes.index("animal")]
  (tmp_path / "mine.json").write_text(json.dumps({"classes": ["wheels"], "names": {"wheels": ["car", "zebra"]}}))
  assert road_classes({0: "car", 1: "dog"}, tmp_path / "mine.json")[1].tolist() == [0, -1]


def test_those_on_dinov3_are_under_its_license():
  assert TEACHERS["deimv2-dinov3-s"].license == "DINOv3"
  with pytest.raises(UserError, match="--accept-license DINOv3"):
    load_teacher("deimv2-dinov3-s", "/nowhere")


def test_bad_folders_are_named_in_one_line(tmp_path):
  save("detr", tmp_path / "good")

  def refuse(match, folder):
    with pytest.raises(UserError, match=match) as e:
      DetrTeacher("t", ENTRY, folder, device="cpu")
    assert "\n" not in str(e.value)

  def copy(name, **changes):
    new = tmp_path / name
    new.mkdir()
    for p in (tmp_path / "good").iterdir():
      (new / p.name).write_bytes(p.read_bytes())
    config = json.loads((new / "config.json").read_text())
    (new / "config.json").write_text(json.dumps({**config, **changes}))
    return new

  refuse("is of a 'dinov2', not of a detection transformer", copy("wrong", model_type="dinov2"))
  refuse("lacks .* of the weights", copy("more", decoder_layers=3))
  refuse("does not load", copy("wider", d_model=64))
  refuse("none of its classes", copy("unnamed", id2label={str(i): f"LABEL_{i}" for i in range(7)}))
  for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
    folder = copy("no-" + name)
    (folder / name).unlink()
    refuse(f"no {name} in", folder)
  cut = copy("cut")
  (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
  refuse("does not load", cut)
  (cut / "config.json").write_text("{")
  refuse("is not JSON", cut)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"size": {"height": 10**7, "width": 64}}, "1 to 4096 are possible"),
    ({"size": {"height": "x" * 5000, "width": 64}}, "fails: ValueError"),
    ({"size": {"x" * 5000: 1}}, "is not known"),
    ({"image_mean": None}, "has no image_mean and image_std"),
    ({"image_std": [0.1, 0, 0.1]}, "has no image_mean and image_std"),
    ({"rescale_factor": [1]}, "rescale_factor"),
  ],
)
def test_pictures_that_cannot_be_are_told_in_a_line(tmp_path, change, says):
  save("rt_detr_v2", tmp_path)
  path = tmp_path / "preprocessor_config.json"
  path.write_text(
    json.dumps(
      {**json.loads(path.read_text()), "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.2] * 3, **change}
    )
  )
  with pytest.raises(UserError, match=says) as e:
    teacher = load_teacher("rtdetr-v2-r18", tmp_path, device="cpu")
    with failure_is_said(teacher.name):
      teacher.prepare(50, 120)
      teacher.label(Clip(frames(1)))
  assert "\n" not in str(e.value) and len(str(e.value)) < 1000
