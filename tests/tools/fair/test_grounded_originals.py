"""Original checkpoints against the original projects' own classes, where these are importable: clone
IDEA-Research/GroundingDINO, facebookresearch/segment-anything and facebookresearch/sam2, and name the three folders in
PYTHONPATH. Nothing of theirs is compiled, and no weights are needed: small networks, random weights."""

import importlib.util
import sys
import types
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
t = pytest.importorskip("transformers")

import grounded_models as small
from sam2_models import S, vision_config

from openpilot.tools.fair.grounded_sam import originals
from openpilot.tools.fair.grounded_sam.detector import load_detector
from openpilot.tools.fair.grounded_sam.originals import load_original
from openpilot.tools.fair.grounded_sam.prompts import token_batch, make_prompts
from openpilot.tools.fair.grounded_sam.segmenter import load_segmenter
from openpilot.tools.learn.device import choose_device
from openpilot.tools.lib.errors import UserError

CPU = choose_device("cpu", "float32")


def draw(model):
  """Weights that no part of which is 0 or 1."""
  small.stir(model)
  return model.eval()


def close(ours, theirs):
  """fp32, and other orders of sums: 1e-6 a layer, for logits of about 1 to 10."""
  torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


def stand_in(m, modules):
  """For a package that is not here, and that only configuration or downloads of theirs want."""
  if importlib.util.find_spec(next(iter(modules))) is None:
    for name, more in modules.items():
      m.setitem(sys.modules, name, types.ModuleType(name))
      vars(sys.modules[name]).update(more)


class Bert(torch.nn.Module):
  """In place of GroundingDINO's wrapper, which calls what transformers 5 has no more: the same parts under the same
  names, and the same masks."""

  def __init__(self, bert_model):
    super().__init__()
    self.config = bert_model.config
    self.embeddings, self.encoder, self.pooler = bert_model.embeddings, bert_model.encoder, bert_model.pooler
    self.whole = [bert_model]

  def forward(self, input_ids, attention_mask, token_type_ids, position_ids):
    return self.whole[0](
      input_ids=input_ids,
      attention_mask=attention_mask[:, None],
      token_type_ids=token_type_ids,
      position_ids=position_ids,
    )


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
  """GroundingDINO's own classes, small; its checkpoint as the published ones are; a folder with the tokenizer."""
  pytest.importorskip("groundingdino", reason="no checkout of IDEA-Research/GroundingDINO in PYTHONPATH")
  with pytest.MonkeyPatch.context() as m:
    stand_in(m, {"addict": {"Dict": dict}})
    stand_in(m, {"yapf": {}, "yapf.yapflib": {}, "yapf.yapflib.yapf_api": {"FormatCode": None}})
    code = importlib.import_module("groundingdino.models.GroundingDINO.groundingdino")
    backbone = importlib.import_module("groundingdino.models.GroundingDINO.backbone.backbone")
    swin = importlib.import_module("groundingdino.models.GroundingDINO.backbone.swin_transformer")
    published = importlib.import_module("groundingdino.config.GroundingDINO_SwinT_OGC")
    folder = small.save_tokenizer(tmp_path_factory.mktemp("bert"))
    words = t.BertTokenizer.from_pretrained(folder)
    bert = t.BertConfig(
      hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96, vocab_size=len(words)
    )
    m.setattr(code.get_tokenlizer, "get_tokenlizer", lambda _: words)
    m.setattr(code.get_tokenlizer, "get_pretrained_language_model", lambda _: t.BertModel(bert))
    m.setattr(code, "BertModelWarper", Bert)
    size = {"embed_dim": 16, "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    m.setattr(backbone, "build_swin_transformer", lambda _, **kw: swin.SwinTransformer(**size, **kw))
    args = {k: v for k, v in vars(published).items() if not k.startswith("_")}
    args |= {"enc_layers": 2, "dec_layers": 2, "dim_feedforward": 64, "num_queries": 12}
    args |= {"use_checkpoint": False, "use_transformer_ckpt": False}
    torch.manual_seed(0)
    model = draw(code.build_groundingdino(SimpleNamespace(**args)))
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    state |= {"module.label_enc.weight": torch.zeros(3, 3), "module.bert.embeddings.position_ids": torch.zeros(1, 9)}
    path = folder / "groundingdino_small.pth"
    torch.save({"model": state}, path)
    yield model, path, folder


def test_groundingdino_key_for_key_and_forward(dino):
  model, path, folder = dino
  found = load_detector(path, CPU, folder)
  ours = found.model
  # all of its weights are there, and nothing else: but for BERT's pooler, and a norm of a map that is not read
  unused = [p for n, p in model.named_parameters() if n.startswith("bert.pooler")]
  more = [p for n, p in ours.named_parameters() if ".swin.layernorm." in n]
  count = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in unused)
  assert count == sum(p.numel() for p in ours.parameters()) - sum(p.numel() for p in more)
  pixels = torch.randn(1, 3, 64, 96)
  prompts = make_prompts(found.tokenizer, ("car", "traffic light", "glorp"))
  with torch.no_grad():
    want = model(pixels, captions=[prompts.all[0].text])
    got = ours(pixel_values=pixels, **token_batch(prompts.all, CPU.device))
  known = torch.isfinite(got.logits)
  assert torch.equal(known, torch.isfinite(want["pred_logits"])) and known.any()
  # queries of equal score may come in another order: each is compared by its box
  order = [x["pred_boxes"][0].sum(-1).argsort() for x in (want, {"pred_boxes": got.pred_boxes})]
  close(got.pred_boxes[0, order[1]], want["pred_boxes"][0, order[0]])
  n = len(prompts.all[0].ids)
  close(got.logits[0, order[1], :n], want["pred_logits"][0, order[0], :n])
  assert float(got.pred_boxes.std(1).min()) > 1e-3  # they differ, so that another order would show


def sam_of(side, **more):
  from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

  grid = side // 8
  encoder = ImageEncoderViT(
    depth=3,
    embed_dim=32,
    img_size=side,
    mlp_ratio=2,
    norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    num_heads=2,
    patch_size=8,
    qkv_bias=True,
    use_rel_pos=True,
    global_attn_indexes=[0, 2],
    window_size=3,
    out_chans=64,
  )
  prompt = PromptEncoder(
    embed_dim=64, image_embedding_size=(grid, grid), input_image_size=(side, side), mask_in_chans=4
  )
  decoder = MaskDecoder(
    num_multimask_outputs=3,
    transformer=TwoWayTransformer(depth=2, embedding_dim=64, mlp_dim=48, num_heads=8),
    transformer_dim=64,
    iou_head_depth=3,
    iou_head_hidden_dim=40,
  )
  return Sam(encoder, prompt, decoder, [123.675, 116.28, 103.53], [58.395, 57.12, 57.375])


def test_segment_anything_key_for_key_and_forward(tmp_path):
  pytest.importorskip("segment_anything", reason="no checkout of facebookresearch/segment-anything in PYTHONPATH")
  torch.manual_seed(0)
  model = draw(sam_of(64))
  path = tmp_path / "sam_small.pth"
  torch.save(model.state_dict(), path)
  found = load_segmenter(path, CPU)
  theirs = [v.numel() for k, v in model.state_dict().items() if not k.startswith("pixel_")]
  assert sum(p.numel() for p in found.model.parameters()) == sum(theirs)
  rgb = np.random.default_rng(0).integers(0, 256, (3, 48, 64), dtype=np.uint8)  # it needs no resizing, but padding
  boxes = np.array([[5, 6, 30, 25], [36.5, 10, 60, 36]], np.float32)
  with torch.no_grad():
    given = {"image": torch.from_numpy(rgb), "boxes": torch.from_numpy(boxes), "original_size": (48, 64)}
    want = model([given], multimask_output=False)[0]
    logits, iou = found.forward(found.boxes(boxes, 48, 64), pixels=found.pixels(rgb))
  close(logits, want["low_res_logits"][:, 0])
  close(iou, want["iou_predictions"][:, 0])
  masks = found.segment(rgb, boxes)
  assert np.array_equal(masks, want["masks"][:, 0].numpy()) and 0 < masks.mean() < 1


def sam2_of(side, d):
  """SAM 2.1 with all that its published configurations have, small; and transformers' configuration of it."""
  from sam2.modeling.backbones.hieradet import Hiera
  from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
  from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
  from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
  from sam2.modeling.position_encoding import PositionEmbeddingSine
  from sam2.modeling.sam2_base import SAM2Base
  from sam2.modeling.sam.transformer import RoPEAttention

  trunk = Hiera(
    embed_dim=8,
    stages=(1, 1, 2, 1),
    global_att_blocks=(3,),
    window_spec=(4, 2, 2, 2),
    window_pos_embed_bkg_spatial_size=(4, 4),
  )
  levels = {"fpn_top_down_levels": [2, 3], "fpn_interp_model": "nearest"}
  neck = FpnNeck(PositionEmbeddingSine(d, normalize=True), d, [64, 32, 16, 8], **levels)
  rope = {"embedding_dim": d, "num_heads": 1, "downsample_rate": 1, "feat_sizes": (4, 4)}
  block = MemoryAttentionLayer(
    "relu",
    RoPEAttention(rope_k_repeat=True, kv_in_dim=16, **rope),
    d,
    32,
    0.0,
    False,
    True,
    False,
    RoPEAttention(**rope),
  )
  memory = MemoryEncoder(
    16,
    MaskDownSampler(d, kernel_size=3, stride=2, padding=1),
    Fuser(CXBlock(d), 1),
    PositionEmbeddingSine(16, normalize=True),
    in_dim=d,
  )
  on = (
    "directly_add_no_mem_embed",
    "use_high_res_features_in_sam",
    "multimask_output_in_sam",
    "iou_prediction_use_sigmoid",
    "use_obj_ptrs_in_encoder",
    "proj_tpos_enc_in_obj_ptrs",
    "pred_obj_scores",
    "pred_obj_scores_mlp",
    "fixed_no_obj_ptr",
    "use_mlp_for_obj_ptr_proj",
    "no_obj_embed_spatial",
  )
  model = SAM2Base(
    ImageEncoder(trunk, neck, scalp=1),
    MemoryAttention(d, True, block, 1),
    memory,
    image_size=side,
    sam_mask_decoder_extra_args={
      "dynamic_multimask_via_stability": True,
      "dynamic_multimask_stability_delta": 0.05,
    },  # as build_sam2 has it
    **dict.fromkeys(on, True),
  )
  vision = vision_config((8, 16, 32, 64), (1, 2, 4, 8), d)
  prompt = {"hidden_size": d, "image_size": side}
  return model, t.Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config={"hidden_size": d})


def test_sam2_key_for_key_and_forward(tmp_path, monkeypatch):
  side, d = S, 64
  made = SimpleNamespace(instance=lambda: SimpleNamespace(is_initialized=bool))
  hydra = {"hydra": {"initialize_config_module": lambda *_, **__: None}, "hydra.core": {}}
  stand_in(monkeypatch, hydra | {"hydra.core.global_hydra": {"GlobalHydra": made}})
  stand_in(monkeypatch, {"iopath": {}, "iopath.common": {}, "iopath.common.file_io": {"g_pathmgr": None}})
  pytest.importorskip("sam2", reason="no checkout of facebookresearch/sam2 in PYTHONPATH")
  from sam2.sam2_image_predictor import SAM2ImagePredictor

  torch.manual_seed(0)
  model, config = sam2_of(side, d)
  draw(model)
  path = tmp_path / "sam2.1_hiera_small.pt"
  torch.save({"model": model.state_dict()}, path)
  monkeypatch.setattr(originals.sam2, "config_of", lambda _: config)  # of no published size
  found = load_segmenter(path, CPU)
  kept = [k for k in model.state_dict() if k.startswith(("image_encoder.", "sam_", "no_mem_embed"))]
  # the frequencies are held twice, four point embeddings are one
  assert len(found.model.state_dict()) == len(kept) - 3 + 1
  rgb = np.random.default_rng(0).integers(0, 256, (3, side, side), dtype=np.uint8)  # it needs no resizing
  boxes = np.array([[5, 6, 30, 25], [36.5, 10, 60, 36]], np.float32)
  predictor = SAM2ImagePredictor(model)
  predictor._bb_feat_sizes = [(side // s, side // s) for s in (4, 8, 16)]
  predictor.set_image(rgb.transpose(1, 2, 0))
  masks, iou, low = predictor.predict(box=boxes, multimask_output=False)
  with torch.no_grad():
    logits, ours = found.forward(found.boxes(boxes, side, side), pixels=found.pixels(rgb))
  close(logits.clamp(-32, 32), torch.from_numpy(low[:, 0]))
  close(ours, torch.from_numpy(iou[:, 0]))
  seen = found.segment(rgb, boxes)
  assert np.array_equal(seen, masks[:, 0] > 0) and 0 < seen.mean() < 1


def test_a_checkpoint_of_another_family_is_refused(tmp_path):
  for name, state in {
    "sam": {"image_encoder.neck.0.weight": torch.zeros(1)},
    "none": {"a": torch.zeros(1)},
    "half": {"transformer.tgt_embed.weight": torch.zeros(1, 1)},
  }.items():
    torch.save(state, tmp_path / f"{name}.pth")
  (tmp_path / "text.pth").write_text("no checkpoint")
  for name, said in {
    "sam": r"segment-anything \(SAM\), not of GroundingDINO",
    "none": "is no checkpoint of GroundingDINO",
    "half": "no whole checkpoint of GroundingDINO",
    "text": "copy it again",
  }.items():
    with pytest.raises(UserError, match=said):
      load_original(tmp_path / f"{name}.pth", ("grounding_dino",))


def test_code_in_a_pickle_is_not_run(tmp_path):
  class Code:
    def __reduce__(self):
      return (exec, ("raise SystemExit(7)",))

  torch.save({"model": Code()}, tmp_path / "x.pth")
  with pytest.raises(UserError, match="is no checkpoint"):
    load_original(tmp_path / "x.pth", ("sam",))
