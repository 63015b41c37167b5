import json
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as t

from tensor_bytes import tensors
from openpilot.tools.fair.device import choose_device
from openpilot.tools.fair.sam import rle
from openpilot.tools.fair.sam.checkpoint import config_of, load_pt, rename
from openpilot.tools.fair.sam.sam2 import SAM2VideoWrapper
from openpilot.tools.fair.teacher import Clip, Entry, Label, hash_weights
from openpilot.tools.lib.errors import UserError

ENTRY = Entry("sam.sam2:SAM2VideoWrapper", "", "Apache-2.0", "", "")
H, W, S = 40, 72, 64
BOXES = np.array([[5, 6, 30, 25], [36.5, 10, 60, 36]], np.float32)
LATE = np.array([[10, 28, 33, 38, 0.9, 2]], np.float32)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
KINDS = ("sam2_video", "edgetam_video")


def save(kind, path):
  """A small model of the official class, random weights that see some objects and not others."""
  hiera = t.Sam2HieraDetConfig(
    hidden_size=8,
    embed_dim_per_stage=[8, 16, 24, 32],
    num_attention_heads_per_stage=[1, 2, 2, 2],
    image_size=[S, S],
    blocks_per_stage=[1, 1, 2, 1],
    window_size_per_stage=[4, 2, 2, 2],
    global_attention_blocks=[3],
    window_positional_embedding_background_size=[4, 4],
  )
  vision = t.Sam2VisionConfig(
    backbone_config=hiera, backbone_channel_list=[32, 24, 16, 8], backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], fpn_hidden_size=128
  )
  common = {
    "vision_config": vision,
    "image_size": S,
    "prompt_encoder_config": {"hidden_size": 128, "image_size": S, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 128},
    "memory_attention_num_layers": 1,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_output_channels": 64,
    "memory_fuser_intermediate_dim": 32,
    **dict.fromkeys(("memory_attention_hidden_size", "memory_encoder_hidden_size", "mask_downsampler_embed_dim", "memory_fuser_embed_dim"), 128),
  }
  torch.manual_seed(3)
  if kind == "sam2_video":
    model = t.Sam2VideoModel(t.Sam2VideoConfig(memory_attention_feed_forward_hidden_size=32, **common))
  else:
    model = t.EdgeTamVideoModel(
      t.EdgeTamVideoConfig(
        memory_attention_mlp_hidden_size=32,
        memory_attention_rope_k_sizes=[2, 2],
        perceiver_resampler_num_latents=4,
        perceiver_resampler_num_latents_2d=4,
        **common,
      )
    )
  with torch.no_grad():
    for name, p in model.named_parameters():
      if p.ndim > 1:
        p.normal_(0, 1.5 / p[0].numel() ** 0.5)
      elif name.endswith("pred_obj_score_head.proj_out.bias"):
        p.fill_(2.0 if kind == "sam2_video" else 0.35)  # so that they see some and not others
  model.eval().save_pretrained(path)
  pictures = {"image_mean": MEAN, "image_std": STD, "do_resize": True, "resample": 2, "size": {"height": S, "width": S}}
  (path / "preprocessor_config.json").write_text(json.dumps(pictures))
  return model


def frames(n, seed=0):
  r = np.random.default_rng(seed)
  x = F.interpolate(torch.tensor(r.uniform(0, 255, (n, 3, 6, 8)), dtype=torch.float32), (H, W), mode="bicubic")
  return x.clamp(0, 255).to(torch.uint8).numpy()


def official(model, rgb, boxes, start=0):
  """The official streaming session, nothing dropped: masks (T, N, H, W), logits (T, N). It begins with frame `start`."""
  session = getattr(t, type(model).__name__.replace("Model", "InferenceSession"))(video_height=H, video_width=W, dtype=torch.float32)
  for i, box in enumerate(boxes):
    # pixel centres of the frame -> of the network's input
    corners = (torch.tensor(box[:4]).view(2, 2) + 0.5) * torch.tensor([S / W, S / H]) - 0.5
    session.add_point_inputs(session.obj_id_to_idx(i), start, {"point_coords": corners[None, None], "point_labels": torch.tensor([[[2, 3]]])})
    session.obj_with_new_inputs.append(i)
  masks, logits = [], []
  for n in range(start, len(rgb)):
    x = F.interpolate(torch.from_numpy(rgb[n : n + 1]).float(), (S, S), mode="bilinear", antialias=True).round()
    x = (x * (1 / 255) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    out = model(session, frame=x[0], frame_idx=n)
    masks.append((F.interpolate(out.pred_masks, (H, W), mode="bilinear")[:, 0] > 0).numpy())
    logits.append(out.object_score_logits.flatten())
  return np.stack(masks), torch.sigmoid(torch.stack(logits)).numpy()


def same(masks, scores, want):
  # the same operations on the same input. Memory is kept in bfloat16: a difference in the last bit would grow to 1e-3, so there must be none before it
  np.testing.assert_array_equal(masks, want[0])
  np.testing.assert_allclose(scores, want[1], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_official_session(kind, tmp_path):
  model = save(kind, tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu")
  rgb = frames(24)  # longer than the 15 frames whose pointers are kept
  masks, ids, scores = sam.track_objects(rgb, BOXES)
  assert masks.dtype == bool and masks.shape == (24, 2, H, W) and ids.tolist() == [0, 1] and scores.shape == (24, 2)
  want = official(model, rgb, BOXES)
  assert 0.01 < want[0].mean() < 0.99 and (want[1] > 0.5).any() and np.ptp(want[1]) > 1e-3
  same(masks, scores, want)


@pytest.mark.parametrize("kind", KINDS)
def test_joining_leaves_the_others_as_they_were(kind, tmp_path):
  model = save(kind, tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", join_iou=1.0)
  rgb = frames(14)
  asked = []

  def detector(frame):
    asked.append(frame)
    return LATE if len(asked) == 1 else np.zeros((0, 6), np.float32)

  masks, ids, scores = sam.track_objects(iter(rgb), BOXES, detector, every=5)
  assert ids.tolist() == [0, 1, 2] and [next(n for n in range(14) if a is rgb[n] or (a == rgb[n]).all()) for a in asked] == [5, 10]
  same(masks[:, :2], scores[:, :2], official(model, rgb, BOXES))
  same(masks[5:, 2:], scores[5:, 2:], official(model, rgb, LATE, start=5))
  assert not masks[:5, 2].any() and not scores[:5, 2].any()


def test_those_behind_one_let_go_are_as_they_were(tmp_path):
  model = save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", lost_after=5, join_iou=1.0)
  rgb = frames(12)
  three = np.concatenate([BOXES, LATE[:, :4]])
  video = sam.start(H, W)
  got = []
  for n, frame in enumerate(rgb):
    got.append(sam.step(video, frame, three if n == 0 else None, every_box=True))
    if n == 5:
      video.last_seen[1] = 0
      sam._forget(video)  # the middle one, as if it had not been seen since frame 0
  assert [len(g.ids) for g in got] == [3] * 6 + [2] * 6 and got[-1].ids.tolist() == [0, 2]
  want = official(model, rgb, three)
  for n in range(12):
    columns = [0, 1, 2] if n < 6 else [0, 2]
    same(got[n].masks, got[n].scores, (want[0][n, columns], want[1][n, columns]))
  assert sam.step(video, rgb[0], LATE).ids.tolist() == [0, 2, 3]  # no identity twice


def test_memory_does_not_grow_with_the_video(tmp_path):
  save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu")
  given: list[weakref.ref] = []

  def endless():
    for frame in frames(40):
      given.append(weakref.ref(f := frame.copy()))
      yield f

  assert all(sum(r() is not None for r in given) <= 2 for _ in sam.stream(endless(), BOXES)) and len(given) == 40
  video = sam.start(H, W)
  sizes = []
  for n, frame in enumerate(frames(40)):
    sam.step(video, frame, BOXES if n == 0 else None, every_box=True)
    sizes.append(tensors([vars(video.session), vars(video.session.cache)]))
  assert sizes[39] == sizes[20] and not video.session.processed_frames
  assert all(len(v) == 0 for v in video.session.frames_tracked_per_obj.values())


class Detector:
  """A teacher of boxes that answers what it is told."""

  name, checkpoint_hash, stateful, labels = "told", "0" * 64, False, [Label("boxes", "boxes", classes=("person", "bicycle", "car"))]

  def prepare(self, height, width):
    assert (height, width) == (H, W)

  def settings(self):
    return {"told": 1}

  def label(self, clip, state=None):
    assert len(clip.rgb) == 1
    rows = np.concatenate([np.c_[BOXES, [[0.5, 0], [0.8, 2]]], LATE if clip.rgb[0, 0, 0, 0] > 100 else LATE[:0]]).astype(np.float32)
    return {"boxes": {"frame": np.zeros(len(rows), np.int32), **{k: rows[:, n] for n, k in enumerate(("x0", "y0", "x1", "y1", "score", "cls"))}}}, None


@pytest.mark.parametrize("kind", KINDS)
def test_labels_in_pieces_are_those_of_an_unbroken_run(kind, tmp_path):
  save(kind, tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", every=4, max_objects=5, lost_after=6)
  sam.detector = Detector()
  sam.prepare(H, W)
  rgb = frames(25, seed=5)
  (whole,), last = [labels["objects"] for labels, _ in [sam.label(Clip(rgb))]], sam.label(Clip(rgb))[1]
  assert len(np.unique(whole["track"])) >= 3 and set(whole["cls"]) <= {0, 2} and len(whole["rle"]) == len(whole["frame"])
  state, parts, start = None, [], 0
  for n in (1, 9, 8, 7):
    if state is not None:  # as it comes back from a file
      np.savez(tmp_path / "state.npz", **{k.replace("/", "|"): v for k, v in state.items()})
      state = {k.replace("|", "/"): v for k, v in np.load(tmp_path / "state.npz").items()}
    labels, state = sam.label(Clip(rgb[start : start + n]), state)
    part = dict(labels["objects"])
    part["frame"] = part["frame"] + start
    parts.append(part)
    start += n
  for k, v in whole.items():
    assert [x for p in parts for x in p[k]] == list(v), k
  assert sorted(state) == sorted(last) and all(np.array_equal(state[k], last[k]) for k in last)
  # what the table says is what the masks are
  masks = rle.decode(whole["rle"], H, W)
  np.testing.assert_array_equal(np.stack([whole[k] for k in ("x0", "y0", "x1", "y1")], 1), rle.boxes_of(masks))
  s = sam.settings()
  assert json.loads(json.dumps(s)) == s and s["detector"]["name"] == "told"
  with pytest.raises(UserError, match="begin again"):
    sam.label(Clip(rgb[:, :, :20]), state)


def test_boxes_join_only_where_nobody_is(tmp_path):
  save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu", max_objects=3)
  there = np.zeros((1, H, W), bool)
  there[0, 6:25, 5:30] = True
  rows = np.c_[np.concatenate([BOXES, LATE[:, :4], [[60, 1, 70, 9]]]), [0.9, 0.3, 0.5, 0.4]].astype(np.float32)
  new = sam._new(rows, there, room=2)
  np.testing.assert_array_equal(new[:, 4], np.float32([0.5, 0.4]))  # not who is there; best first; as many as there is room


def test_rle_round_trip():
  r = np.random.default_rng(0)
  masks = r.uniform(size=(6, 33, 47)) > np.array([0.5, 0.1, 0.9, 2, -1, 0.99])[:, None, None]
  counts = rle.encode(masks)
  np.testing.assert_array_equal(rle.decode(counts, 33, 47), masks)
  np.testing.assert_array_equal(rle.decode(counts[2], 33, 47), masks[2])
  assert [rle.total(c) for c in counts] == [33 * 47] * 6 and rle.encode(masks[:0]) == [] and rle.decode([], 3, 4).shape == (0, 3, 4)
  assert np.isnan(rle.boxes_of(masks[3:4])).all() and rle.boxes_of(masks[4:5]).tolist() == [[-0.5, -0.5, 46.5, 32.5]]
  for bad in (counts[0], "", "~~~~", "0"):
    with pytest.raises(UserError, match="run lengths"):
      rle.decode(bad, 10, 10)


def test_bad_input_is_named(tmp_path):
  save("sam2_video", tmp_path)
  sam = SAM2VideoWrapper("t", ENTRY, tmp_path, device="cpu")
  assert sam.checkpoint_hash == hash_weights(tmp_path)
  with pytest.raises(UserError, match="has no area"):
    sam.track_objects(frames(2), np.array([[5, 5, 5, 9]]))
  with pytest.raises(UserError, match="boxes of shape"):
    sam.track_objects(frames(2), np.zeros((2, 3)))
  with pytest.raises(UserError, match="frame 1 is uint8 of shape"):
    sam.track_objects([frames(1)[0], frames(1)[0, :, :9]], BOXES)
  with pytest.raises(UserError, match="nobody to tell it"):
    sam.prepare(H, W)
  (tmp_path / "sam2.1_hiera_tiny.pt").touch()
  with pytest.raises(UserError, match="of the sam2 package"):
    SAM2VideoWrapper("t", ENTRY, tmp_path / "sam2.1_hiera_tiny.pt", device="cpu")
  masks, ids, scores = sam.track_objects(frames(3))  # nobody to follow
  assert masks.shape == (3, 0, H, W) and len(ids) == 0 and scores.shape == (3, 0)


# names and shapes of sam2's Hiera-T video predictor (facebookresearch/sam2, configs/sam2.1/sam2.1_hiera_t.yaml), and what transformers calls them
NAMES = {
  "maskmem_tpos_enc": ("memory_temporal_positional_encoding", (7, 1, 1, 64)),
  "no_mem_embed": ("no_memory_embedding", (1, 1, 256)),
  "no_mem_pos_enc": ("no_memory_positional_encoding", (1, 1, 256)),
  "no_obj_ptr": ("no_object_pointer", (1, 256)),
  "no_obj_embed_spatial": ("occlusion_spatial_embedding_parameter", (1, 64)),
  "image_encoder.trunk.pos_embed": ("vision_encoder.backbone.pos_embed", (1, 96, 7, 7)),
  "image_encoder.trunk.pos_embed_window": ("vision_encoder.backbone.pos_embed_window", (1, 96, 8, 8)),
  "image_encoder.trunk.patch_embed.proj.weight": ("vision_encoder.backbone.patch_embed.projection.weight", (96, 3, 7, 7)),
  "image_encoder.trunk.blocks.1.norm1.weight": ("vision_encoder.backbone.blocks.1.layer_norm1.weight", (96,)),
  "image_encoder.trunk.blocks.1.attn.qkv.weight": ("vision_encoder.backbone.blocks.1.attn.qkv.weight", (576, 96)),
  "image_encoder.trunk.blocks.1.attn.proj.bias": ("vision_encoder.backbone.blocks.1.attn.proj.bias", (192,)),
  "image_encoder.trunk.blocks.1.mlp.layers.0.weight": ("vision_encoder.backbone.blocks.1.mlp.proj_in.weight", (768, 192)),
  "image_encoder.trunk.blocks.1.mlp.layers.1.weight": ("vision_encoder.backbone.blocks.1.mlp.proj_out.weight", (192, 768)),
  "image_encoder.trunk.blocks.1.proj.weight": ("vision_encoder.backbone.blocks.1.proj.weight", (192, 96)),
  "image_encoder.neck.convs.0.conv.weight": ("vision_encoder.neck.convs.0.weight", (256, 768, 1, 1)),
  "mask_downsample.weight": ("mask_downsample.weight", (1, 1, 4, 4)),
  "memory_attention.layers.3.self_attn.out_proj.bias": ("memory_attention.layers.3.self_attn.o_proj.bias", (256,)),
  "memory_attention.layers.3.cross_attn_image.k_proj.weight": ("memory_attention.layers.3.cross_attn_image.k_proj.weight", (256, 64)),
  "memory_attention.layers.3.linear1.weight": ("memory_attention.layers.3.linear1.weight", (2048, 256)),
  "memory_attention.norm.weight": ("memory_attention.layer_norm.weight", (256,)),
  "memory_encoder.mask_downsampler.encoder.9.weight": ("memory_encoder.mask_downsampler.layers.3.conv.weight", (256, 64, 3, 3)),
  "memory_encoder.mask_downsampler.encoder.10.weight": ("memory_encoder.mask_downsampler.layers.3.layer_norm.weight", (256,)),
  "memory_encoder.mask_downsampler.encoder.12.weight": ("memory_encoder.mask_downsampler.final_conv.weight", (256, 256, 1, 1)),
  "memory_encoder.pix_feat_proj.weight": ("memory_encoder.feature_projection.weight", (256, 256, 1, 1)),
  "memory_encoder.fuser.layers.1.gamma": ("memory_encoder.memory_fuser.layers.1.scale", (256,)),
  "memory_encoder.fuser.layers.1.dwconv.weight": ("memory_encoder.memory_fuser.layers.1.depthwise_conv.weight", (256, 1, 7, 7)),
  "memory_encoder.fuser.layers.1.norm.bias": ("memory_encoder.memory_fuser.layers.1.layer_norm.bias", (256,)),
  "memory_encoder.fuser.layers.1.pwconv2.weight": ("memory_encoder.memory_fuser.layers.1.pointwise_conv2.weight", (256, 1024)),
  "memory_encoder.out_proj.weight": ("memory_encoder.projection.weight", (64, 256, 1, 1)),
  "sam_prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": ("prompt_encoder.shared_embedding.positional_embedding", (2, 128)),
  "sam_prompt_encoder.not_a_point_embed.weight": ("prompt_encoder.not_a_point_embed.weight", (1, 256)),
  "sam_prompt_encoder.mask_downscaling.3.weight": ("prompt_encoder.mask_embed.conv2.weight", (16, 4, 2, 2)),
  "sam_prompt_encoder.mask_downscaling.4.weight": ("prompt_encoder.mask_embed.layer_norm2.weight", (16,)),
  "sam_prompt_encoder.mask_downscaling.6.weight": ("prompt_encoder.mask_embed.conv3.weight", (256, 16, 1, 1)),
  "sam_prompt_encoder.no_mask_embed.weight": ("prompt_encoder.no_mask_embed.weight", (1, 256)),
  "sam_mask_decoder.transformer.layers.0.mlp.layers.1.weight": ("mask_decoder.transformer.layers.0.mlp.proj_out.weight", (256, 2048)),
  "sam_mask_decoder.transformer.layers.0.cross_attn_image_to_token.out_proj.weight": (
    "mask_decoder.transformer.layers.0.cross_attn_image_to_token.o_proj.weight",
    (256, 128),
  ),
  "sam_mask_decoder.transformer.norm_final_attn.weight": ("mask_decoder.transformer.layer_norm_final_attn.weight", (256,)),
  "sam_mask_decoder.iou_token.weight": ("mask_decoder.iou_token.weight", (1, 256)),
  "sam_mask_decoder.output_upscaling.0.weight": ("mask_decoder.upscale_conv1.weight", (256, 64, 2, 2)),
  "sam_mask_decoder.output_upscaling.1.weight": ("mask_decoder.upscale_layer_norm.weight", (64,)),
  "sam_mask_decoder.output_upscaling.3.weight": ("mask_decoder.upscale_conv2.weight", (64, 32, 2, 2)),
  "sam_mask_decoder.conv_s1.weight": ("mask_decoder.conv_s1.weight", (64, 256, 1, 1)),
  "sam_mask_decoder.output_hypernetworks_mlps.3.layers.0.weight": ("mask_decoder.output_hypernetworks_mlps.3.proj_in.weight", (256, 256)),
  "sam_mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": ("mask_decoder.output_hypernetworks_mlps.3.proj_out.weight", (32, 256)),
  "sam_mask_decoder.iou_prediction_head.layers.1.weight": ("mask_decoder.iou_prediction_head.layers.0.weight", (256, 256)),
  "sam_mask_decoder.pred_obj_score_head.layers.2.bias": ("mask_decoder.pred_obj_score_head.proj_out.bias", (1,)),
  "obj_ptr_proj.layers.1.weight": ("object_pointer_proj.layers.0.weight", (256, 256)),
  "obj_ptr_tpos_proj.weight": ("temporal_positional_encoding_projection_layer.weight", (64, 256)),
}
# transformers' -> sam2's, written the other way round from tools/fair/sam/checkpoint.py, on purpose: two mistakes would have to agree
BACK = (
  (r"\bobject_pointer_proj\b", "obj_ptr_proj"),
  (r"\btemporal_positional_encoding_projection_layer\b", "obj_ptr_tpos_proj"),
  (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
  (r"^no_memory_embedding$", "no_mem_embed"),
  (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
  (r"^no_object_pointer$", "no_obj_ptr"),
  (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
  (r"backbone\.blocks\.(\d+)\.mlp\.proj_in", r"backbone.blocks.\1.mlp.layers.0"),
  (r"backbone\.blocks\.(\d+)\.mlp\.proj_out", r"backbone.blocks.\1.mlp.layers.1"),
  (r"transformer\.layers\.(\d+)\.mlp\.proj_in", r"transformer.layers.\1.mlp.layers.0"),
  (r"transformer\.layers\.(\d+)\.mlp\.proj_out", r"transformer.layers.\1.mlp.layers.1"),
  (r"(mlps\.\d|head|obj_ptr_proj)\.layers\.0", r"\1.layers.1"),
  (r"(mlps\.\d|head|obj_ptr_proj)\.proj_in", r"\1.layers.0"),
  (r"(mlps\.\d|head|obj_ptr_proj)\.proj_out", r"\1.layers.2"),
  (r"^vision_encoder\.backbone", "image_encoder.trunk"),
  (r"^vision_encoder\.neck\.convs\.(\d)", r"image_encoder.neck.convs.\1.conv"),
  (r"patch_embed\.projection", "patch_embed.proj"),
  (r"memory_encoder\.projection", "memory_encoder.out_proj"),
  (r"feature_projection", "pix_feat_proj"),
  (r"memory_fuser", "fuser"),
  (r"\.scale$", ".gamma"),
  (r"depthwise_conv", "dwconv"),
  (r"pointwise_conv", "pwconv"),
  (r"final_conv", "encoder.12"),
  (r"downsampler\.layers\.0\.conv", "downsampler.encoder.0"),
  (r"downsampler\.layers\.0\.layer_norm", "downsampler.encoder.1"),
  (r"downsampler\.layers\.1\.conv", "downsampler.encoder.3"),
  (r"downsampler\.layers\.1\.layer_norm", "downsampler.encoder.4"),
  (r"downsampler\.layers\.2\.conv", "downsampler.encoder.6"),
  (r"downsampler\.layers\.2\.layer_norm", "downsampler.encoder.7"),
  (r"downsampler\.layers\.3\.conv", "downsampler.encoder.9"),
  (r"downsampler\.layers\.3\.layer_norm", "downsampler.encoder.10"),
  (r"mask_embed\.conv1", "mask_downscaling.0"),
  (r"mask_embed\.layer_norm1", "mask_downscaling.1"),
  (r"mask_embed\.conv2", "mask_downscaling.3"),
  (r"mask_embed\.layer_norm2", "mask_downscaling.4"),
  (r"mask_embed\.conv3", "mask_downscaling.6"),
  (r"upscale_conv1", "output_upscaling.0"),
  (r"upscale_layer_norm", "output_upscaling.1"),
  (r"upscale_conv2", "output_upscaling.3"),
  (r"\blayer_norm", "norm"),
  (r"\bo_proj", "out_proj"),
  (r"^prompt_encoder\.shared_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
  (r"^(prompt_encoder|mask_decoder)", r"sam_\1"),
)


def as_sam2(model):
  """The state of transformers' model under the names of the sam2 package."""
  out = {}
  for name, value in model.state_dict().items():
    if name == "prompt_encoder.point_embed.weight":
      out |= {f"sam_prompt_encoder.point_embeddings.{i}.weight": value[i : i + 1].clone() for i in range(4)}
    elif name != "shared_image_embedding.positional_embedding":
      for pattern, to in BACK:
        name = re.sub(pattern, to, name)
      out[name] = value
  return out


def test_checkpoints_of_the_sam2_package(tmp_path):
  model, rgb = save("sam2_video", tmp_path), frames(10)
  model.shared_image_embedding.load_state_dict(model.prompt_encoder.shared_embedding.state_dict())  # in sam2 they are one
  state = as_sam2(model)
  assert len(state) == len(model.state_dict()) - 1 + 3
  torch.save({"model": state}, tmp_path / "small.pt")
  loaded = load_pt(tmp_path / "small.pt", choose_device("cpu"), model.config)
  want, got = model.state_dict(), loaded.state_dict()
  assert want.keys() == got.keys() and all(torch.equal(want[k], got[k]) for k in want)
  with torch.inference_mode():
    (a, b), (c, d) = official(model, rgb, BOXES), official(loaded, rgb, BOXES)
  np.testing.assert_array_equal(a, c)
  np.testing.assert_array_equal(b, d)
  for what, change in {"lacks": lambda s: s.pop("obj_ptr_proj.layers.2.bias"), "has more": lambda s: s.update(other=torch.zeros(1))}.items():
    broken = dict(state)
    change(broken)
    torch.save({"model": broken}, tmp_path / "broken.pt")
    with pytest.raises(UserError, match="object_pointer_proj.proj_out.bias" if what == "lacks" else '"other"'):
      load_pt(tmp_path / "broken.pt", choose_device("cpu"), model.config)


def test_published_sizes_of_the_sam2_package():
  renamed = rename({k: torch.empty(shape, device="meta") for k, (_, shape) in NAMES.items()})
  renamed.pop("shared_image_embedding.positional_embedding")
  assert {k: tuple(v.shape) for k, v in renamed.items()} == dict(NAMES.values())
  # names, count and parameters as the package builds them of its four configurations
  for width, window, heads, stages, weights, count in (
    (96, 7, 1, (1, 2, 7, 2), 471, 38_962_498),
    (96, 7, 1, (1, 2, 11, 2), 519, 46_060_354),
    (112, 14, 2, (2, 3, 16, 3), 615, 80_850_178),
    (144, 7, 2, (2, 6, 36, 4), 903, 224_446_642),
  ):
    hint = {f"vision_encoder.backbone.blocks.{i}.layer_norm1.weight": torch.empty(0) for i in range(sum(stages))}
    hint |= {
      "vision_encoder.backbone.patch_embed.projection.weight": torch.empty(width, 3, 7, 7, device="meta"),
      "vision_encoder.backbone.pos_embed": torch.empty(1, width, window, window, device="meta"),
      "occlusion_spatial_embedding_parameter": torch.empty(0),
      "temporal_positional_encoding_projection_layer.weight": torch.empty(0),
    }
    config = config_of(hint)
    hiera = config.vision_config.backbone_config
    assert tuple(hiera.blocks_per_stage) == stages and hiera.num_attention_heads_per_stage[0] == heads
    with torch.device("meta"):
      model = t.Sam2VideoModel(config)
    state = as_sam2(model)
    assert len(state) == weights
    if sum(stages) == 12:
      assert {k: tuple(state[k].shape) for k in NAMES} == {k: shape for k, (_, shape) in NAMES.items()}
    assert sum(p.numel() for p in model.parameters()) == count
