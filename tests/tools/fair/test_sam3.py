import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t
from scipy import ndimage
from transformers.models.sam3_video import modeling_sam3_video
from transformers.models.sam3_video.processing_sam3_video import Sam3VideoProcessor

from label_fixture import same_in_pieces
from sam2_models import loaded
from tensor_bytes import tensors
from whole_pictures import check_masks, labeled, turned_view
from openpilot.tools.fair.options import parse_options
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.labels import rle
from openpilot.tools.fair.labels.labeling import run_teacher
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.sam.sam3 import MaskTools, Sam3Teacher
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.fair.teacher import Clip, Entry, hash_weights
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.videowriter import VideoWriter

ENTRY = Entry("sam.sam3:Sam3Teacher", "", "SAM", "", "")
H, W, S, D = 40, 72, 64, 128
PROMPTS = ("car", "traffic light")
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def tokenizer():
  letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
  words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters), "ca", "car</w>"]
  return t.CLIPTokenizer({w: i for i, w in enumerate(words)}, [("c", "a"), ("ca", "r</w>")], model_max_length=32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A small model of the official class, random weights, thresholds at which some of what it finds joins and is
  confirmed -> folder, model."""
  path = tmp_path_factory.mktemp("sam3")
  vit = t.Sam3ViTConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=S,
    patch_size=8,
    window_size=4,
    global_attn_indexes=[1],
    pretrain_image_size=32,
  )
  vision = t.Sam3VisionConfig(
    backbone_config=vit, fpn_hidden_size=D, backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]]
  )
  layers = {"hidden_size": D, "num_attention_heads": 2, "intermediate_size": 48, "num_layers": 1}
  detector = t.Sam3Config(
    vision_config=vision,
    text_config=t.CLIPTextConfig(
      vocab_size=64,
      hidden_size=32,
      intermediate_size=48,
      projection_dim=32,
      num_hidden_layers=1,
      num_attention_heads=2,
      max_position_embeddings=32,
      hidden_act="gelu",
      bos_token_id=0,
      eos_token_id=1,
      pad_token_id=1,
    ),
    geometry_encoder_config={**layers, "roi_size": 3},
    detr_encoder_config=layers,
    detr_decoder_config={**layers, "num_queries": 3},
    mask_decoder_config={"hidden_size": D, "num_attention_heads": 2},
  )
  tracker = t.Sam3TrackerVideoConfig(
    vision_config=vision,
    image_size=S,
    prompt_encoder_config={"hidden_size": D, "image_size": S, "patch_size": 8, "mask_input_channels": 4},
    mask_decoder_config={"hidden_size": D, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": D},
    memory_attention_num_layers=1,
    memory_attention_feed_forward_hidden_size=32,
    memory_attention_rope_feat_sizes=[8, 8],
    memory_encoder_output_channels=64,
    memory_fuser_intermediate_dim=32,
    max_cond_frame_num=2,
    num_maskmem=3,
    max_object_pointers_in_encoder=5,
    **dict.fromkeys(
      (
        "memory_attention_hidden_size",
        "memory_encoder_hidden_size",
        "mask_downsampler_embed_dim",
        "memory_fuser_embed_dim",
      ),
      D,
    ),
  )
  config = t.Sam3VideoConfig(
    detector_config=detector,
    tracker_config=tracker,
    low_res_mask_size=32,
    score_threshold_detection=0.1,
    new_det_thresh=0.2,
    det_nms_thresh=0.5,
    high_conf_thresh=0.15,
    high_iou_thresh=0.005,
    recondition_every_nth_frame=2,
    fill_hole_area=4,
  )
  torch.manual_seed(3)
  model = t.Sam3VideoModel(config).eval()
  with torch.no_grad():
    for p in model.parameters():
      if p.ndim > 1:
        p.normal_(0, 1.2 / p[0].numel() ** 0.5)
  model.save_pretrained(path)
  tokenizer().save_pretrained(path)
  pictures = {"image_mean": MEAN, "image_std": STD, "do_resize": True, "resample": 2, "size": {"height": S, "width": S}}
  (path / "preprocessor_config.json").write_text(json.dumps(pictures))
  return path, loaded(t.Sam3VideoModel, path)


def frames(n, seed=0):
  r = np.random.default_rng(seed)
  x = F.interpolate(torch.tensor(r.uniform(0, 255, (n, 3, 6, 8)), dtype=torch.float32), (H, W), mode="bicubic")
  return x.clamp(0, 255).to(torch.uint8).numpy()


def official(model, rgb, max_objects):
  """The official streaming session and its processor's output, nothing dropped: of each frame ids, masks, scores,
  prompts."""
  model.max_num_objects = max_objects
  session = t.Sam3VideoInferenceSession(video_height=H, video_width=W, dtype=torch.float32)
  session.obj_with_new_inputs = []
  processor = object.__new__(Sam3VideoProcessor)  # its __init__ asks for torchvision
  processor.tokenizer = tokenizer()
  processor.add_text_prompt(session, list(PROMPTS))
  out = []
  for frame in rgb:
    x = F.interpolate(torch.from_numpy(frame[None]).float(), (S, S), mode="bilinear", antialias=True).round()
    x = (x * (1 / 255) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    got = model(session, frame=x[0])
    done = processor.postprocess_outputs(session, got)
    there = done["masks"].flatten(1).any(1)
    ids = done["object_ids"][there].numpy()
    score = [got.obj_id_to_tracker_score[i] for i in ids.tolist()]
    prompt = [next(k for k, p in enumerate(PROMPTS) if i in done["prompt_to_obj_ids"].get(p, [])) for i in ids.tolist()]
    out.append((ids, done["masks"][there].numpy(), score, prompt))
  return out, session


def test_equals_the_official_streaming(saved, monkeypatch):
  path, model = saved
  sam = Sam3Teacher("t", ENTRY, path, device="cpu", prompts=PROMPTS, max_objects=5, lost_after=1000)
  monkeypatch.setattr(
    sys.modules[Sam3VideoProcessor.__module__], "masks_to_boxes", lambda m: m, raising=False
  )  # torchvision's; boxes are not compared
  rgb = frames(14)  # longer than all that memory reaches back
  want, session = official(model, rgb, 5)
  got = list(sam.stream(rgb))
  assert any(
    len(o["cond_frame_outputs"]) > 2 for o in session.output_dict_per_obj.values()
  )  # detections have confirmed some
  assert len({len(g.ids) for g in got}) > 1 and {int(c) for g in got for c in g.classes} == {0, 1}
  for g, (ids, masks, scores, prompts) in zip(got, want, strict=True):
    # the same operations on the same input: no difference, or memory in bfloat16 would make it grow
    np.testing.assert_array_equal(g.ids, ids)
    np.testing.assert_array_equal(g.masks, masks)
    np.testing.assert_allclose(g.scores, scores, atol=1e-5)
    np.testing.assert_array_equal(g.classes, prompts)


def test_memory_is_bounded_and_identities_are_not_used_twice(saved, monkeypatch):
  monkeypatch.setattr("openpilot.tools.fair.sam.sam3.MAX_POINTERS", 4)
  sam = Sam3Teacher("t", ENTRY, saved[0], device="cpu", prompts=PROMPTS, max_objects=3, lost_after=3)
  video, sizes, met = sam.start(H, W), [], {}
  for n, frame in enumerate(frames(30)):
    got = sam.step(video, frame)
    session = video.session
    for i, c in zip(got.ids.tolist(), got.classes.tolist(), strict=True):
      assert met.setdefault(i, c) == c
    if n % 10 == 7:  # as if none had been seen
      video.last_seen = dict.fromkeys(video.last_seen, n - 3)
    sizes.append(tensors([session.output_dict_per_obj, session.mask_inputs_per_obj, session.processed_frames]))
    assert session.get_obj_num() <= 3 and all(n - video.last_seen[i] <= 3 for i in session.obj_ids)
    assert all(
      len(o["cond_frame_outputs"]) <= 4 and len(o["non_cond_frame_outputs"]) <= 4
      for o in session.output_dict_per_obj.values()
    )
    for kept in (
      session.obj_id_to_score,
      session.obj_id_to_prompt_id,
      session.trk_keep_alive,
      session.obj_id_to_last_occluded,
      video.last_seen,
    ):
      assert set(kept) <= set(session.obj_ids)
    assert (
      not session.suppressed_obj_ids
      and not session.unmatched_frame_inds
      and all(f is None for f in session.processed_frames.values())
    )
  assert max(sizes[15:]) <= max(sizes[:15]) * 1.5 and len(met) > 3 and session.max_obj_id >= max(met)


def test_labels_in_pieces_are_those_of_an_unbroken_run(saved, tmp_path):
  sam = Sam3Teacher("t", ENTRY, saved[0], device="cpu", prompts=PROMPTS, max_objects=5, lost_after=4)
  sam.prepare(H, W)
  assert sam.labels[0].classes == PROMPTS and sam.labels[0].name == "objects" and sam.stateful
  rgb = frames(10, seed=5)
  labels, last = sam.label(Clip(rgb))
  whole = labels["objects"]
  assert len(np.unique(whole["track"])) >= 3 and len(whole["rle"]) == len(whole["frame"]) > 10
  again = Sam3Teacher("t", ENTRY, saved[0], device="cpu", prompts=PROMPTS, max_objects=5, lost_after=4)
  same_in_pieces(again, rgb, (1, 4, 2, 3), whole, last, tmp_path)
  np.testing.assert_array_equal(
    np.stack([whole[k] for k in ("x0", "y0", "x1", "y1")], 1), rle.boxes_of(rle.decode(whole["rle"], H, W))
  )
  settings = sam.settings()
  assert json.loads(json.dumps(settings)) == settings and settings["prompts"] == list(PROMPTS)
  with pytest.raises(UserError, match="begin again"):
    sam.label(Clip(rgb[:, :, :20]), last)


def test_masks_of_a_whole_picture(saved, tmp_path):
  """It is given the camera's picture with its network's long side; masks lie in the view as the nearest pixel's."""
  view, store = turned_view(tmp_path), LabelStore(tmp_path / "labels", create=True)
  sam = Sam3Teacher("t", ENTRY, saved[0], device="cpu", prompts=PROMPTS, max_objects=5)
  group, clip, said = labeled(sam, view, store)
  assert clip.rgb.shape[2:] == (40, 64) and "size" not in group.meta["teacher"]["settings"]
  check_masks(group, clip, said)


def test_mask_tools():
  r = np.random.default_rng(0)
  masks = (ndimage.gaussian_filter(r.normal(size=(4, 33, 46)), (0, 1.5, 1.5)) > 0.05).astype(np.uint8)
  labels, areas = (x.numpy() for x in MaskTools.cc_2d(torch.from_numpy(masks)[:, None]))
  for n, mask in enumerate(masks):
    want, count = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.bincount(want.ravel())
    sizes[0] = 0
    assert count > 2
    np.testing.assert_array_equal(areas[n, 0], sizes[want])
    assert len(np.unique(labels[n, 0] * (count + 1) + want)) == count + 1  # the same components by other numbers
  # transformers' use of it: small holes are filled, small sprinkles removed
  scores = torch.full((1, 1, 20, 20), -1.0)
  scores[0, 0, 4:14, 4:14], scores[0, 0, 8, 8], scores[0, 0, 17, 17] = 1.0, -1.0, 1.0
  before, modeling_sam3_video.cv_utils_kernel = modeling_sam3_video.cv_utils_kernel, MaskTools()
  try:
    filled = modeling_sam3_video.fill_holes_in_mask_scores(scores, 4)[0, 0] > 0
  finally:
    modeling_sam3_video.cv_utils_kernel = before
  want = torch.zeros(20, 20, dtype=torch.bool)
  want[4:14, 4:14] = True
  assert torch.equal(filled, want)
  # non-maximum suppression: 1 covers 0; 2 covers 3, which alone would cover 4
  ious = torch.eye(5)
  for i, j in ((0, 1), (2, 3), (3, 4)):
    ious[i, j] = ious[j, i] = 0.6
  kept = MaskTools.generic_nms(ious, torch.tensor([0.5, 0.9, 0.8, 0.7, 0.6]), 0.5, use_iou_matrix=True)
  assert kept.tolist() == [1, 2, 4] and MaskTools.generic_nms(ious[:0, :0], torch.zeros(0), 0.5).tolist() == []


def test_bad_input_is_named(saved, tmp_path):
  path = saved[0]
  assert TEACHERS["sam3"].license == "SAM" and TEACHERS["sam3"].weights == "facebook/sam3"
  with pytest.raises(UserError, match="--accept-license SAM"):
    load_teacher("sam3", path)
  sam = load_teacher("sam3", path, accepted=["SAM"], device="cpu")
  assert (
    isinstance(sam, Sam3Teacher) and sam.prompts[:2] == ("car", "truck") and sam.checkpoint_hash == hash_weights(path)
  )
  with pytest.raises(UserError, match="finds its objects by words"):
    sam.track_objects(frames(1), np.array([[1.0, 1, 9, 9]]))
  for prompts in ("car", (), ("car", "car")):
    with pytest.raises(UserError, match="a list of words"):
      Sam3Teacher("t", ENTRY, path, device="cpu", prompts=prompts)
  with pytest.raises(UserError, match="32 at most"):
    Sam3Teacher("t", ENTRY, path, device="cpu", prompts=("z" * 40,))
  for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
    (tmp_path / name).symlink_to(path / name)
  with pytest.raises(UserError, match=r"no tokenizer.json"):
    Sam3Teacher("t", ENTRY, tmp_path, device="cpu")
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(UserError, match=r"tokenizer in .* does not load"):
    Sam3Teacher("t", ENTRY, tmp_path, device="cpu")
  (tmp_path / "config.json").unlink()
  (tmp_path / "config.json").write_text('{"model_type": "sam2_video"}')
  with pytest.raises(UserError, match="not of a SAM 3 video model"):
    Sam3Teacher("t", ENTRY, tmp_path, device="cpu")


def test_words_from_the_command_line(saved):
  path, _ = saved
  teachers = []
  for words in ("car", "car,traffic light"):
    (options,) = parse_options([f"sam3.prompts={words}", "sam3.max_objects=3"], ["sam3"]).values()
    teachers.append(load_teacher("sam3", path, ["SAM"], device="cpu", **options))
    teachers[-1].prepare(H, W)
  one, two = teachers
  assert (
    one.labels[0].classes == ("car",)
    and two.labels[0].classes == ("car", "traffic light")
    and two.model.max_num_objects == 3
  )
  assert (
    one.settings()["prompts"] == ["car"]
    and two.settings()["prompts"] == ["car", "traffic light"]
    and two.settings()["max_objects"] == 3
  )


def test_words_are_the_classes_that_are_stored(saved, tmp_path):
  """Of a plain video; a class that no road has too."""
  words = "traffic light,traffic cone"
  (options,) = parse_options([f"sam3.prompts={words}", "sam3.max_objects=3"], ["sam3"]).values()
  video = VideoWriter(tmp_path / "v.mp4", W, H, fps=10)
  for frame in frames(2, seed=5):
    video.write(np.ascontiguousarray(frame.transpose(1, 2, 0)))
  video.close()
  spec = InputSpec("rgb", 64, 96)
  teacher = load_teacher("sam3", saved[0], ["SAM"], device="cpu", **options)
  run_teacher(
    teacher, open_sources([str(tmp_path / "v.mp4")], SourceOptions()), LabelStore(tmp_path / "s", True), spec=spec
  )
  (group,) = LabelStore(tmp_path / "s").groups("sam3")
  label, table = group.label("objects"), group.table("objects")
  assert label.classes == ("traffic light", "traffic cone") and label.shape == (64, 96) and group.input == spec
  assert table.num_rows and set(table["cls"].to_pylist()) <= {0, 1}
