"""Grounding DINO and SAM as teachers: what is asked for, the official forward's answers, adapters."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
t = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import grounded_models as small

from openpilot.tools.fair.detr.teacher import Pictures
from openpilot.tools.fair.grounded_sam import lora
from openpilot.tools.fair.grounded_sam.detector import join, levels, load_detector, mend_loss
from openpilot.tools.fair.grounded_sam.experiment import Tuned, find_base
from openpilot.tools.fair.grounded_sam.prompts import class_scores, label_map, load_tokenizer, make_prompts, token_batch
from openpilot.tools.fair.grounded_sam.segmenter import load_segmenter
from openpilot.tools.fair.grounded_sam.two_stage import GroundedSAM, load_teachers
from openpilot.tools.fair.teacher import hash_weights
from openpilot.tools.learn.device import choose_device
from openpilot.tools.lib.errors import UserError

LEVEL = 1.01 / 255 / 0.224  # a gray level, by which resizing may round otherwise
CPU = choose_device("cpu", "float32")
NAMES = ("car", "traffic light", "glorp")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("bases")
  return {
    "dino": small.save_dino(root / "dino"),
    "mm": small.save_dino(root / "mm", mm=True),
    "sam": small.save_sam(root / "sam"),
    "sam2": small.save_sam2(root / "sam2"),
  }


@pytest.fixture(scope="module")
def words(folders):
  return load_tokenizer(folders["dino"])


def pictures(*sizes):
  r = np.random.default_rng(0)
  return [r.integers(0, 256, (3, h, w), dtype=np.uint8) for h, w in sizes]


# *** prompts ***


def test_scores_are_of_classes_not_of_words(words):
  """Half of "traffic light" is not a class, and two classes are not one."""
  p = make_prompts(words, NAMES).all[0]
  assert p.text == "car. traffic light. glorp."
  maps = label_map(p.ids)
  said = [words.decode([p.ids[i] for i in np.flatnonzero(m)]) for m in maps.numpy()]
  assert said == ["car", "traffic light", "glorp"]
  logits = torch.full((1, 256), -20.0)
  light = int(np.flatnonzero(maps[1].numpy())[1])
  logits[0, light] = 20.0  # "light" alone
  assert torch.allclose(class_scores(logits, p.ids), torch.tensor([[0.0, 0.5, 0.0]]), atol=1e-6)


def test_a_long_list_is_split_and_each_part_has_the_negatives(words):
  names = [f"car {a} {b}" for a in "abcdefghij" for b in "klmnopqrst"]
  p = make_prompts(words, names, negatives=("snark",), most=64)
  assert len(p.all) > 1 and sum((x.classes for x in p.all), ()) == tuple(range(100))
  assert max(len(x.ids) for x in p.all) <= 64 and all(x.text.endswith(" snark.") for x in p.all)
  # none could take the next one's first class
  for x, y in zip(p.all, p.all[1:], strict=False):
    longer = make_prompts(words, [names[c] for c in (*x.classes, y.classes[0])], negatives=("snark",))
    assert len(longer.all[0].ids) > 64
  assert len(make_prompts(words, names, each=True).all) == 100


def test_phrases_that_cannot_be_asked_for(words):
  with pytest.raises(UserError, match="asked for twice"):
    make_prompts(words, ("Car", "car"))
  with pytest.raises(UserError, match="no word to ask for"):
    make_prompts(words, ("car", "..."))
  with pytest.raises(UserError, match="at most 12"):
    make_prompts(words, ("car " * 40,), most=12)
  assert make_prompts(words, ("Car", "x"), {"x": "Traffic Light?"}).phrases == ("car", "traffic light")


@pytest.mark.parametrize("size", [(2, 900), (900, 2), (1, 4000)])
def test_a_picture_thinner_than_a_pixel_of_the_input(folders, size):
  """One pixel thin: it ended the training in "preprocessor_config.json: pictures of 64x0 pixels"."""
  rgb = pictures(size)[0]
  h, w = size
  boxes = np.array([[0, 0, w, h], [0, 0, w / 2, h]], np.float32)
  found = load_segmenter(folders["sam"], CPU)
  assert min(found.fit(h, w)) == 1 and max(found.fit(h, w)) == found.side
  assert found.segment(rgb, boxes).shape == (2, h, w)
  assert found.from_picture(np.ones((1, h, w), bool), 16).shape == (1, 16, 16)
  detector = load_detector(folders["dino"], CPU)
  p = make_prompts(detector.tokenizer, NAMES)
  assert np.isfinite(detector.detect([rgb], p, score=0.0)[0].boxes).all()
  fit = Pictures({"size": {"shortest_edge": 800, "longest_edge": 1333}}).fit
  assert (fit(1, 9000), fit(9000, 3)) == ((1, 1333), (1333, 1))


@pytest.mark.parametrize("names", [("car", "c\u00e4r"), ("\u8eca", "\u72ac"), ("car", "car\u200b")])
def test_words_that_are_the_same_to_the_tokenizer_are_refused(words, names):
  """Both classes had the same tokens: every box was of both, with the same score, without a word."""
  assert words(names[0])["input_ids"] == words(names[1])["input_ids"]
  with pytest.raises(UserError, match=r"are the same words to Grounding DINO.*--prompt CLASS=TEXT"):
    make_prompts(words, names)
  assert len(make_prompts(words, names, {names[1]: "a dent"}).all) == 1


def test_a_class_without_a_known_word_is_told(words, capsys):
  make_prompts(words, ("car", "\u72ac"))
  assert "Grounding DINO knows no word of '\u72ac'" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_berts(tmp_path):
  (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "car"]))
  with pytest.raises(UserError, match="is not BERT's"):
    load_tokenizer(tmp_path)
  with pytest.raises(UserError, match=r"no tokenizer\.json or vocab\.txt"):
    load_tokenizer(tmp_path / "none")


# *** the official forward ***


@pytest.mark.parametrize("kind, official", [("dino", "GroundingDino"), ("mm", "MMGroundingDino")])
def test_boxes_are_the_official_processors_and_models(folders, kind, official):
  """Boxes and the scores of classes, of a picture that is resized."""
  rgb = pictures((60, 90))[0]
  found = load_detector(folders[kind], CPU)
  processor = t.AutoProcessor.from_pretrained(folders["dino"])  # both ask alike
  model = getattr(t, f"{official}ForObjectDetection").from_pretrained(folders[kind]).eval()
  inputs = processor(images=rgb, text=[list(NAMES)], return_tensors="pt", input_data_format="channels_first")
  p = make_prompts(found.tokenizer, NAMES)
  batch = found.batch([rgb], [p.all[0]])
  torch.testing.assert_close(batch["pixel_values"], inputs["pixel_values"], rtol=0, atol=LEVEL)
  for k in ("input_ids", "attention_mask", "token_type_ids", "pixel_mask"):
    assert torch.equal(batch[k], inputs[k]), k
  with torch.no_grad():
    want = model(**{**inputs, "pixel_values": batch["pixel_values"]})
  scores, boxes = found.raw([rgb], p.all[0])
  torch.testing.assert_close(boxes, want.pred_boxes, rtol=1e-4, atol=1e-4)
  # the mean over each phrase's tokens: of "traffic light" two
  ids, prob = inputs["input_ids"][0].tolist(), want.logits[0].sigmoid()
  at = [[ids.index(i) for i in words] for words in found.tokenizer(list(NAMES), add_special_tokens=False)["input_ids"]]
  by_hand = torch.stack([prob[:, places].mean(-1) for places in at], -1)
  torch.testing.assert_close(scores[0], by_hand, rtol=1e-4, atol=1e-4)
  answer = found.detect([rgb], p, score=0.0)[0]
  assert np.allclose(np.sort(answer.scores), np.sort(by_hand.max(-1).values.numpy())[-len(answer.scores) :], atol=1e-3)
  assert answer.boxes[:, [0, 2]].max() <= 90 and answer.boxes[:, [1, 3]].max() <= 60
  assert np.array_equal(answer.classes, answer.class_scores.argmax(-1))


def test_pictures_of_other_sizes_beside_it_change_nothing(folders):
  found = load_detector(folders["dino"], CPU)
  found.prompts = make_prompts(found.tokenizer, NAMES)
  several = pictures((60, 90), (64, 64), (60, 90))
  for one, x in zip(found.detect(several, score=0.0), several, strict=True):
    alone = found.detect([x], score=0.0)[0]
    assert np.allclose(one.boxes, alone.boxes, atol=0.05) and np.allclose(one.scores, alone.scores, atol=1e-4)


def test_what_looks_more_like_a_negative_is_nothing(folders):
  found = load_detector(folders["dino"], CPU)
  rgb = pictures((64, 64))
  plain = found.detect(rgb, make_prompts(found.tokenizer, NAMES), score=0.0)[0]
  p = make_prompts(found.tokenizer, NAMES, negatives=("snark",))
  scores, _ = found.raw(rgb, p.all[0])
  lost = int((scores[0].argmax(-1) == 3).sum())
  assert scores.shape[-1] == 4 and len(plain.boxes) == 12
  assert len(found.detect(rgb, p, score=0.0)[0].boxes) == 12 - lost


def test_one_object_of_two_prompts_is_one_box(folders):
  found = load_detector(folders["dino"], CPU)
  rgb = pictures((64, 64))
  p = make_prompts(found.tokenizer, NAMES, each=True)
  answer = found.detect(rgb, p, score=0.0)[0]
  from openpilot.selfdrive.modeld.fair.heads.objects import box_iou

  iou = box_iou(answer.boxes, answer.boxes) - np.eye(len(answer.boxes))
  assert len(answer.boxes) and iou.max() <= 0.7 + 1e-6
  parts = [found._one(p, q, rgb, 0.0)[0] for q in p.all]
  assert len(answer.boxes) < sum(len(x.boxes) for x in parts) and len(join(parts[:1], (64, 64)).boxes) == 12


def test_a_features_map_is_the_encoders_of_stride_16(folders):
  found = load_detector(folders["dino"], CPU)
  found.prompts = make_prompts(found.tokenizer, NAMES)
  got = found.features(pictures((64, 96)))[0]
  seen = {}
  with torch.no_grad():
    batch = found.batch(pictures((64, 96)), [found.prompts.all[0]])
    hook = found.model.model.backbone.register_forward_hook(
      lambda m, i, o: seen.update(maps=[f.shape for f, _ in o[0]])
    )
    flat = found.model(**batch).encoder_last_hidden_state_vision[0]
    hook.remove()
  (h8, w8), (h, w) = seen["maps"][0][-2:], seen["maps"][1][-2:]
  assert got.shape == (32, h, w) == (32, 6, 9)
  want = flat[h8 * w8 : h8 * w8 + h * w].T.reshape(32, h, w).numpy()
  assert np.allclose(got, want, atol=1e-6)
  assert [levels(n, 16) for n in (64, 65, 800, 1333)] == [4, 5, 50, 84]


def test_losses_of_prompts_that_differ_within_a_batch(folders):
  """Together as alone: each picture's classes are those of its own prompt."""
  mend_loss()
  found = load_detector(folders["dino"], CPU)
  asks = [make_prompts(found.tokenizer, n).all[0] for n in (NAMES, ("snark",), ("glorp", "car"))]
  x = pictures((64, 64), (64, 64), (64, 64))
  box = torch.tensor([[0.5, 0.5, 0.3, 0.4]])
  labels = [{"class_labels": torch.tensor([c]), "boxes": box} for c in (1, 0, 1)]
  with torch.no_grad():
    whole = found.model(**found.batch(x, asks), labels=labels).loss_dict["loss_ce"]
    alone = [
      found.model(**found.batch([a], [p]), labels=[y]).loss_dict["loss_ce"]
      for a, p, y in zip(x, asks, labels, strict=True)
    ]
  torch.testing.assert_close(whole, torch.stack(alone).mean(), rtol=1e-4, atol=1e-4)  # of one box each


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_masks_are_the_official_processors_and_models(folders, kind):
  rgb = pictures((40, 72))[0]
  boxes = np.array([[5, 6, 30, 25], [36.5, 10, 60, 36]], np.float32)
  found = load_segmenter(folders[kind], CPU)
  model = getattr(t, {"sam": "SamModel", "sam2": "Sam2Model"}[kind]).from_pretrained(folders[kind]).eval()
  if kind == "sam":
    pictures_of = t.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    processor = t.SamProcessor(pictures_of)
  else:
    processor = t.Sam2Processor(t.Sam2ImageProcessor(size={"height": 64, "width": 64}))
  inputs = processor(images=rgb.transpose(1, 2, 0), input_boxes=[boxes.tolist()], return_tensors="pt")
  with torch.no_grad():
    out = model(pixel_values=found.pixels(rgb), input_boxes=inputs["input_boxes"].float(), multimask_output=False)
    logits, iou = found.forward(found.boxes(boxes, 40, 72), pixels=found.pixels(rgb))
    cached = found.forward(found.boxes(boxes, 40, 72), embeddings=found.embed(found.pixels(rgb)))
  torch.testing.assert_close(found.pixels(rgb), inputs["pixel_values"], rtol=0, atol=LEVEL)
  torch.testing.assert_close(logits, out.pred_masks[0, :, 0], rtol=1e-4, atol=1e-4)
  torch.testing.assert_close(iou, out.iou_scores[0, :, 0], rtol=1e-4, atol=1e-4)
  torch.testing.assert_close(cached[0], logits, rtol=1e-4, atol=1e-4)
  more = {"reshaped_input_sizes": inputs["reshaped_input_sizes"]} if kind == "sam" else {}
  want = processor.post_process_masks(out.pred_masks, inputs["original_sizes"], **more)[0][:, 0].numpy()
  got = found.segment(rgb, boxes)
  assert got.shape == (2, 40, 72) and (got != want).mean() < 2e-3 and 0 < got.mean() < 1
  assert found.segment(rgb, boxes[:0]).shape == (0, 40, 72)


# *** adapters ***

FAMILIES = {"dino": "grounding_dino", "mm": "mm_grounding_dino", "sam": "sam", "sam2": "sam2"}


def load(kind, folder):
  return load_detector(folder, CPU) if kind in ("dino", "mm") else load_segmenter(folder, CPU)


def answer(kind, teacher):
  """What it computes for a picture, as one vector."""
  rgb = pictures((64, 64))[0]
  with torch.no_grad():
    if kind in ("dino", "mm"):
      p = make_prompts(teacher.tokenizer, NAMES)
      return torch.cat([x.flatten() for x in teacher.raw([rgb], p.all[0])])
    return teacher.forward(teacher.boxes(np.array([[5, 6, 30, 25]]), 64, 64), pixels=teacher.pixels(rgb))[0].flatten()


def stirred(kind, folder, targets):
  """A teacher with an adapter that changes what it says."""
  teacher = load(kind, folder)
  tuned = lora.LoRATrainer(teacher.model, lora.lora_config(teacher.model, teacher.family, 4, 8.0, 0.0, targets))
  g = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for p in lora.trainable(tuned.model).values():
      p.add_(torch.randn(p.shape, generator=g) * 0.3)
  return teacher, tuned


@pytest.mark.parametrize(
  "kind, targets",
  [("dino", "attention"), ("dino", "everywhere"), ("mm", "attention"), ("sam", "attention"), ("sam2", "everywhere")],
)
def test_merged_equals_unmerged_and_what_was_saved(folders, tmp_path, kind, targets):
  """Within 1e-4 of values of about 1: the same sums in another order."""
  teacher, tuned = stirred(kind, folders[kind], targets)
  assert not [n for n in lora.trainable(tuned.model) if "bbox_embed" in n]
  want, before = answer(kind, teacher), answer(kind, load(kind, folders[kind]))
  assert float((want - before).abs().max()) > 1e-3
  base_hash = hash_weights(folders[kind])
  megabytes = lora.save_lora(tmp_path, tuned.model, "base", base_hash, teacher.family)
  assert megabytes == (tmp_path / lora.TENSORS).stat().st_size / 1e6
  for merge in (False, True) if kind == "dino" else (True,):
    again = lora.with_lora(load(kind, folders[kind]), tmp_path, base_hash, merge)
    assert any("lora_" in n for n, _ in again.model.named_parameters()) is not merge
    torch.testing.assert_close(answer(kind, again), want, rtol=1e-4, atol=1e-4)
  # and by PEFT alone, as the note loads it
  other = load(kind, folders[kind])
  other.model = peft.PeftModel.from_pretrained(other.model, tmp_path).merge_and_unload().eval()
  torch.testing.assert_close(answer(kind, other), want, rtol=1e-4, atol=1e-4)


def test_a_tied_layer_is_never_adapted(folders):
  found = load_detector(folders["dino"], CPU)
  config = lora.lora_config(found.model, "grounding_dino", targets=r".*(bbox_embed.*layers\.\d|\.q_proj)")
  assert config.target_modules and not [n for n in config.target_modules if "bbox_embed" in n.split(".")]
  with pytest.raises(UserError, match="no dense layer has such a name"):
    lora.lora_config(found.model, "grounding_dino", targets="bbox_embed.*")
  with pytest.raises(UserError, match="nor an expression"):
    lora.lora_config(found.model, "grounding_dino", targets="(")


def test_parameters_that_should_not_learn_are_said(folders):
  teacher, tuned = stirred("sam", folders["sam"], "decoder")
  tuned._verify_freezing()
  learn, base = tuned.counts
  assert learn == sum(p.numel() for n, p in teacher.model.named_parameters() if "lora_" in n)
  assert base == sum(p.numel() for p in load_segmenter(folders["sam"], CPU).model.parameters())
  assert f"{learn:,} parameters of 14 layers learn beside {base:,} frozen ones" in tuned.report()
  teacher.model.vision_encoder.pos_embed.requires_grad_(True)
  with pytest.raises(UserError, match=r"1 parameters learn that should not.*pos_embed"):
    tuned._verify_freezing()


@pytest.fixture(scope="module")
def saved(folders, tmp_path_factory):
  _, tuned = stirred("sam", folders["sam"], "decoder")
  folder = tmp_path_factory.mktemp("adapter")
  lora.save_lora(folder, tuned.model, "base", hash_weights(folders["sam"]), "sam")
  return folder


@pytest.fixture
def adapter(saved, tmp_path):
  return Path(shutil.copytree(saved, tmp_path / "lora"))


def put_on(folders, adapter, base_hash=None):
  """Onto a SAM as load_segmenter() has it."""
  model = t.SamModel(t.SamConfig.from_pretrained(folders["sam"]))
  return lora.apply_lora(model, adapter, "sam", base_hash or hash_weights(folders["sam"]))


def rewrite(folder, change):
  """change: {tensors}, {header} -> both."""
  from safetensors import safe_open
  from safetensors.torch import save_file

  with safe_open(folder / lora.TENSORS, "pt") as f:
    tensors, header = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
  tensors, header = change(tensors, header)
  save_file(tensors, folder / lora.TENSORS, metadata=header)


WRONG = {
  "of another base": (lambda x, h: (x, h | {"base_hash": "0" * 64}), "an adapter of another base: of base"),
  "of another family": (lambda x, h: (x, h | {"family": "grounding_dino"}), "an adapter of grounding_dino, not of sam"),
  "other names": (
    lambda x, h: ({k.replace("q_proj", "query"): v for k, v in x.items()}, h | {"transformers": "4.9.9"}),
    r"7 layers of it are not there.*made with transformers 4\.9\.9, here is 5\.",
  ),
  "other shapes": (lambda x, h: ({k: v[:, :3].contiguous() for k, v in x.items()}, h), "does not fit"),
  "half of it": (lambda x, h: ({k: v for k, v in x.items() if "lora_A" in k}, h), "does not fit its base"),
  "not finite": (lambda x, h: ({k: v * float("nan") for k, v in x.items()}, h), "not finite"),
  "no adapter": (lambda x, h: ({"weight": torch.zeros(2)}, h), "is no part of an adapter"),
}


@pytest.mark.parametrize("what", WRONG)
def test_adapters_that_do_not_fit(folders, adapter, what):
  change, said = WRONG[what]
  rewrite(adapter, change)
  with pytest.raises(UserError, match=said):
    put_on(folders, adapter)


def test_an_adapters_configuration(folders, adapter):
  """Its expressions are not used: one that takes for ever does no harm. What would change the result is refused."""
  path = adapter / lora.CONFIG
  said = json.loads(path.read_text())
  path.write_text(json.dumps(said | {"target_modules": "(a+)+$" * 20}))
  put_on(folders, adapter)
  for wrong, match in (
    ({"modules_to_save": ["mask_decoder"]}, "uses modules_to_save"),
    ({"bias": "all"}, "uses bias"),
    ({"peft_type": "IA3"}, "no LoRA adapter"),
  ):
    path.write_text(json.dumps(said | wrong))
    with pytest.raises(UserError, match=match):
      put_on(folders, adapter)
  path.write_text("{")
  with pytest.raises(UserError, match="no adapter in"):
    lora.read_lora(adapter)


def test_a_newer_version_whose_layers_fit_is_said(folders, adapter, capsys):
  rewrite(adapter, lambda x, h: (x, h | {"transformers": "5.99.0"}))
  put_on(folders, adapter)
  assert re.search(
    r"made with transformers 5\.99\.0, here is \S+; its layers have the same names", capsys.readouterr().err
  )


def test_nothing_of_this_machine_is_in_an_adapter(adapter):
  text = (adapter / lora.CONFIG).read_text() + (adapter / lora.TENSORS).read_bytes().decode("latin-1")
  assert "/" not in json.loads((adapter / lora.CONFIG).read_text())["base_model_name_or_path"]
  assert str(adapter) not in text and "/tmp" not in text


def test_teachers_of_both_stages(folders, tmp_path):
  """By the note's two interfaces: load_teachers, and GroundedSAM merged and not."""
  want = {}
  for kind, key in (("dino", "grounding_dino"), ("sam", "sam")):
    teacher, tuned = stirred(kind, folders[kind], "attention")
    lora.save_lora(tmp_path / f"{key}_lora", tuned.model, kind, hash_weights(folders[kind]), teacher.family)
    want[key] = answer(kind, teacher)
  found = load_teachers({"has_boxes": True, "has_masks": True}, folders["dino"].parent, tmp_path)
  assert set(found) == {"grounding_dino", "sam"}
  torch.testing.assert_close(answer("dino", found["grounding_dino"]), want["grounding_dino"], rtol=1e-4, atol=1e-4)
  torch.testing.assert_close(answer("sam", found["sam"]), want["sam"], rtol=1e-4, atol=1e-4)
  assert set(load_teachers({"has_boxes": False, "has_masks": True}, folders["dino"].parent, tmp_path)) == {"sam"}
  with pytest.raises(UserError, match="no base of"):
    load_teachers({"has_boxes": True, "has_masks": False}, tmp_path, tmp_path)
  both = [
    GroundedSAM(
      grounding_dino_base=folders["dino"],
      grounding_dino_lora=tmp_path / "grounding_dino_lora",
      sam_base=folders["sam"],
      sam_lora=tmp_path / "sam_lora",
      use_merged=merge,
      classes=NAMES,
      device="cpu",
    )
    for merge in (True, False)
  ]
  x = pictures((64, 64))[0]
  a, b = (m(x, score=0.0)[0] for m in both)
  assert np.allclose(a.boxes, b.boxes, atol=0.01) and a.masks is not None and b.masks is not None
  assert a.masks.shape == (len(a.boxes), 64, 64) and (a.masks != b.masks).mean() < 1e-3
  sam = GroundedSAM(sam=folders["sam"], device="cpu")
  with pytest.raises(UserError, match="no Grounding DINO"):
    sam.detect([x])
  assert sam.segment([x], [np.array([[5, 6, 30, 25]])])[0].shape == (1, 64, 64)
  with pytest.raises(UserError, match="neither"):
    GroundedSAM()


def test_texts_of_a_batch_are_padded(words):
  asks = [make_prompts(words, n).all[0] for n in (NAMES, ("car",))]
  batch = token_batch(asks, CPU.device)
  assert batch["attention_mask"].sum(1).tolist() == [len(p.ids) for p in asks]
  assert (batch["input_ids"][1, len(asks[1].ids) :] == 0).all()


def test_a_base_that_was_moved_is_told_with_the_place_where_it_was(tmp_path):
  """It told of another folder alone, ./weights, in which nobody had put it."""
  tuned = Tuned("sam", tmp_path / "exp/teachers/sam_lora", False, "moved-base", "0" * 64, None, str(tmp_path / "was"))
  with pytest.raises(
    UserError, match=rf"sam_lora needs its base moved-base; it is not at {tmp_path}/was, and no weights"
  ):
    find_base(tuned)
  with pytest.raises(UserError, match=rf"it is not at {tmp_path}/here, and no weights 'moved-base'"):
    find_base(tuned, tmp_path / "here")
