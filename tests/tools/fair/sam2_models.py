"""Small SAM 2 and EdgeTAM models of the official classes, and what the official session says of a video: for the tests
of both files."""

import json

import numpy as np
import torch
import torch.nn.functional as F
import transformers as t

H, W, S = 40, 72, 64
BOXES = np.array([[5, 6, 30, 25], [36.5, 10, 60, 36]], np.float32)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENET = {"image_mean": MEAN, "image_std": STD, "do_resize": True, "resample": 2}
PICTURES = {**IMAGENET, "size": {"height": S, "width": S}}
KINDS = ("sam2_video", "edgetam_video")


def vision_config(widths=(8, 16, 24, 32), heads=(1, 2, 2, 2), d=128):
  """A small Hiera for pictures of S pixels, its maps of d channels."""
  hiera = t.Sam2HieraDetConfig(
    hidden_size=widths[0],
    embed_dim_per_stage=list(widths),
    num_attention_heads_per_stage=list(heads),
    image_size=[S, S],
    blocks_per_stage=[1, 1, 2, 1],
    window_size_per_stage=[4, 2, 2, 2],
    global_attention_blocks=[3],
    window_positional_embedding_background_size=[4, 4],
  )
  return t.Sam2VisionConfig(
    backbone_config=hiera,
    backbone_channel_list=list(widths[::-1]),
    backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    fpn_hidden_size=d,
  )


def parts():
  """Of a configuration of the image model, and of the video models."""
  return {
    "vision_config": vision_config(),
    "prompt_encoder_config": {"hidden_size": 128, "image_size": S, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 128},
  }


def save(kind, path):
  """A small model of the official class, random weights that see some objects and not others. -> the model, loaded from
  `path`."""
  common = {
    **parts(),
    "image_size": S,
    "memory_attention_num_layers": 1,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_output_channels": 64,
    "memory_fuser_intermediate_dim": 32,
    **dict.fromkeys(
      (
        "memory_attention_hidden_size",
        "memory_encoder_hidden_size",
        "mask_downsampler_embed_dim",
        "memory_fuser_embed_dim",
      ),
      128,
    ),
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
  (path / "preprocessor_config.json").write_text(json.dumps(PICTURES))
  return loaded(type(model), path)


def loaded(kind, path):
  """The model as a teacher gets it. One that is compared bit for bit must not be the one in memory that was saved:
  loaded weights lie in a mapped file, aligned otherwise, for which some processors' BLAS rounds otherwise."""
  return kind.from_pretrained(path, local_files_only=True).eval()


def frames(n, seed=0):
  r = np.random.default_rng(seed)
  x = F.interpolate(torch.tensor(r.uniform(0, 255, (n, 3, 6, 8)), dtype=torch.float32), (H, W), mode="bicubic")
  return x.clamp(0, 255).to(torch.uint8).numpy()


def official(model, rgb, boxes, start=0):
  """The official streaming session, nothing dropped: masks (T, N, H, W), logits (T, N). It begins with frame
  `start`."""
  session = getattr(t, type(model).__name__.replace("Model", "InferenceSession"))(
    video_height=H, video_width=W, dtype=torch.float32
  )
  for i, box in enumerate(boxes):
    # pixel centers of the frame -> of the network's input
    corners = (torch.tensor(box[:4]).view(2, 2) + 0.5) * torch.tensor([S / W, S / H]) - 0.5
    session.add_point_inputs(
      session.obj_id_to_idx(i), start, {"point_coords": corners[None, None], "point_labels": torch.tensor([[[2, 3]]])}
    )
    session.obj_with_new_inputs.append(i)
  masks, logits = [], []
  for n in range(start, len(rgb)):
    x = F.interpolate(torch.from_numpy(rgb[n : n + 1]).float(), (S, S), mode="bilinear", antialias=True).round()
    x = (x * (1 / 255) - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    out = model(session, frame=x[0], frame_idx=n)
    masks.append((F.interpolate(out.pred_masks, (H, W), mode="bilinear")[:, 0] > 0).numpy())
    logits.append(out.object_score_logits.flatten())
  return np.stack(masks), torch.sigmoid(torch.stack(logits)).numpy()
