"""images train-teacher: small teachers on a small data set that can be learned."""

import json
from pathlib import Path

import numpy as np
import pytest
from images_fixture import write
from PIL import Image

torch = pytest.importorskip("torch")
t = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import grounded_models as small

from openpilot.tools.fair.grounded_sam import data as pictures_of
from openpilot.tools.fair.grounded_sam import train_teacher as note_command
from openpilot.tools.fair.grounded_sam import tune
from openpilot.tools.fair.grounded_sam.experiment import check_classes, generate_config, read_experiment
from openpilot.tools.fair.grounded_sam.lora import LoRATrainer, lora_config, trainable
from openpilot.tools.fair.grounded_sam.prompts import make_prompts
from openpilot.tools.fair.grounded_sam.two_stage import GroundedSAM
from openpilot.tools.fair.images import train_teacher
from openpilot.tools.fair.images.dataset import inspect_dataset
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.learn.device import choose_device
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import parse

W, H = 96, 96
NAMES = ("glorp", "snark")  # no model knows them


def scene(seed):
  """A bright square of one color for each class, somewhere on gray."""
  r = np.random.default_rng(seed)
  image = np.full((H, W, 3), 90 + r.integers(0, 9), np.uint8)
  boxes = []
  for k, color in enumerate(((250, 30, 30), (30, 60, 250))):
    side = int(r.integers(24, 40))
    x, y = int(r.integers(48 * k, 48 * k + 48 - side // 2)), int(r.integers(0, H - side))
    x = min(x, W - side)
    image[y : y + side, x : x + side] = color
    boxes.append((x, y, side, side))
  return image, boxes


def make_data(folder, count=4, boxes=True, masks=True, first=0):
  (folder / "images").mkdir(parents=True, exist_ok=True)
  coco = {"images": [], "annotations": [], "licenses": [{"id": 1, "name": "MIT"}]}
  coco["categories"] = [{"id": 10 * k + 3, "name": n} for k, n in enumerate(NAMES)]
  for i in range(count):
    image, found = scene(first + i)
    Image.fromarray(image).save(folder / "images" / f"{first + i}.png")
    coco["images"].append({"id": i + 1, "file_name": f"{first + i}.png", "width": W, "height": H, "license": 1})
    for k, (x, y, w, h) in enumerate(found):
      a = {"id": 2 * i + k + 1, "image_id": i + 1, "category_id": 10 * k + 3, "iscrowd": 0}
      if boxes:
        a |= {"bbox": [x, y, w, h], "area": w * h}
      if masks:
        a["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
      coco["annotations"].append(a)
  return coco


def make_place(root):
  small.save_dino(root / "dino")
  small.save_sam(root / "sam")
  write(root / "train", make_data(root / "train"))
  write(root / "val", make_data(root / "val", 2, first=50))
  return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return make_place(tmp_path_factory.mktemp("platform"))


def run(place, out, *more, data="train", val="val"):
  words = ["--data", place / data / "annotations.json", "--images", place / data / "images", "--output", out]
  words += ["--val", place / val / "annotations.json"] if val else []
  words += ["--grounding-dino", place / "dino", "--sam", place / "sam", "--device", "cpu", "--trackers", ""]
  options = parse(train_teacher.Options, None, "x", [str(w) for w in [*words, *more]])
  return train_teacher.run(options)


@pytest.fixture(scope="module")
def experiment(place, tmp_path_factory):
  """Both teachers, on boxes and masks; val lies in the same folder of pictures."""
  for p in (place / "val" / "images").iterdir():
    Image.open(p).save(place / "train" / "images" / p.name)
  out = tmp_path_factory.mktemp("experiments") / "exp1"
  said = run(place, out, "--epochs", "2", "--batch_size", "2", "--lora.r", "4", "--prompt", "snark=a cone")
  return out, said


def test_an_experiments_folder(experiment, place, capsys):
  out, _ = experiment
  names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
  adapters = {
    f"teachers/{k}_lora/{f}"
    for k in ("grounding_dino", "sam")
    for f in ("adapter_config.json", "adapter_model.safetensors")
  }
  assert adapters | {"metadata.json", "teacher_config.yaml", "options.yaml"} <= names
  assert not [n for n in names if n.startswith("teachers/") and n not in adapters]  # adapters alone
  read = json.loads((out / "metadata.json").read_text())
  assert read["classes"] == [{"id": 3, "name": "glorp"}, {"id": 13, "name": "snark"}]
  assert read["licenses"] == {"MIT": 4} and read["prompts"] == {"snark": "a cone"}
  assert read["versions"]["transformers"] == t.__version__ and {"peft", "torch"} <= set(read["versions"])
  for key, module in (("grounding_dino", "ap"), ("sam", "mask_iou")):
    teacher = read["teachers"][key]
    assert module in teacher["before"] and module in teacher["after"] and teacher["steps"] == 4
    assert 0 < teacher["trainable"] < teacher["parameters"] / 10 and 0 < teacher["megabytes"] < 0.1
    assert teacher["memory_gib"]["a_batch"] == pytest.approx(2 * teacher["memory_gib"]["a_picture"], abs=2e-3)
  assert str(place) not in json.dumps(read)  # no folder of this machine
  from openpilot.tools.lib.files import read_yaml

  config = read_yaml(out / "teacher_config.yaml")
  assert config["lora"]["r"] == 4 and config["class_mapping"] == {3: "glorp", 13: "snark"}
  assert config["class_names"] == list(NAMES) and config["num_classes"] == 2
  e = read_experiment(out)
  assert e.classes == NAMES and set(e.teachers) == {"grounding_dino", "sam"} and e.license == "Apache-2.0"
  check_classes(e, ["glorp"], "x")
  with pytest.raises(UserError, match=r"x has classes that .* was not tuned for: dent; it has glorp, snark"):
    check_classes(e, ["glorp", "dent"], "x")


def test_the_experiment_is_a_teacher(experiment):
  """What label asks: objects with masks, scores of classes, features; the same as GroundedSAM says."""
  out, _ = experiment
  teacher = load_teacher(str(out), device="cpu", score=0.02, features=True, class_scores=True)
  assert teacher.name == "grounded-sam-exp1" and teacher.license == "Apache-2.0"
  teacher.prepare(H, W)
  assert [(x.name, x.kind, x.unit, x.classes) for x in teacher.labels] == [
    ("objects", "boxes", "px", NAMES),
    ("class_scores", "boxes", "score", NAMES),
    ("features", "dense", "", ()),
  ]
  rgb = np.stack([scene(k)[0].transpose(2, 0, 1) for k in (7, 8)])
  found, _ = teacher.label(Clip(rgb))
  table, scores = found["objects"], found["class_scores"]
  assert len(table["rle"]) == len(table["frame"]) and found["features"].shape == (2, *teacher.labels[2].shape)
  wanted = GroundedSAM.of(out, "cpu")(list(rgb), 0.02)
  seen = [a.masks.any((1, 2)) for a in wanted]
  assert np.allclose(
    table["x0"], np.concatenate([a.boxes[s, 0] for a, s in zip(wanted, seen, strict=True)]) - 0.5, atol=1e-4
  )
  assert (table["score"] > 0.02).all() and (scores["score"] >= 0.05).all()
  said = GroundedSAM.of(out, "cpu").detect(list(rgb), 0.02)
  assert len(scores["frame"]) == sum(int((a.class_scores >= 0.05).sum()) for a in said)
  assert json.loads(json.dumps(teacher.settings())) == teacher.settings()
  with pytest.raises(UserError, match="was tuned; it knows its classes"):
    load_teacher(str(out), device="cpu", classes=("car",))


def test_an_untuned_base_is_told_what_to_look_for(place):
  with pytest.raises(UserError, match="must be told what to look for"):
    load_teacher("grounding-dino-tiny", place / "dino", device="cpu")
  teacher = load_teacher("grounding-dino-tiny", place / "dino", device="cpu", classes=("car", "cone"))
  teacher.prepare(H, W)
  assert [(x.name, x.classes) for x in teacher.labels] == [("boxes", ("car", "cone"))]


# *** learning ***


def loop_of(place, key, out, accumulate=1, epochs=2, full=False, each=False, lr=1e-4, targets="attention", **more):
  device = choose_device("cpu", "float32")
  data = pictures_of.read_pictures(place / "train" / "annotations.json", place / "train" / "images")
  how = tune.Tuning(
    epochs=epochs, batch_size=4 // accumulate, accumulate=accumulate, warmup=0, lr=lr, full=full, **more
  )
  out.mkdir(parents=True, exist_ok=True)
  if key == "sam":
    from openpilot.tools.fair.grounded_sam.segmenter import load_segmenter

    teacher = load_segmenter(place / "sam", device)
  else:
    from openpilot.tools.fair.grounded_sam.detector import load_detector

    teacher = load_detector(place / "dino", device)
    teacher.prompts = make_prompts(teacher.tokenizer, data.names, each=each)
  torch.manual_seed(0)
  if full:
    teacher.model.requires_grad_(True)
  else:
    LoRATrainer(teacher.model, lora_config(teacher.model, teacher.family, 4, 16.0, 0.0, targets))
  kind = tune.SegmenterLoop if key == "sam" else tune.DetectorLoop
  return kind(out, teacher, data, None, how)


def state_of(loop):
  return {k: v.detach().clone() for k, v in loop.unwrapped.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("key", ["grounding_dino", "sam"])
def test_adapters_learn_and_the_base_stays_bit_for_bit(place, tmp_path, key):
  """Of a set that can be learned the loss falls, and nothing but adapters has changed."""
  # of the random SAM attention alone moves little: all of its decoder learns
  how = {"lr": 1e-2, "targets": r"mask_decoder\..*"} if key == "sam" else {"lr": 3e-3}
  loop = loop_of(place, key, tmp_path, epochs=8, flip=False, jitter=0.0, **how)
  before = state_of(loop)
  piece = (list(range(4)), 4)
  with torch.no_grad():
    first = float(loop.losses(piece)["total"])
  tune.learn(loop)
  with torch.no_grad():
    last = float(loop.losses(piece)["total"])
  assert last < 0.9 * first, (first, last)
  changed = {k for k, v in state_of(loop).items() if not torch.equal(v, before[k])}
  assert changed and all("lora_" in k for k in changed)
  assert len([k for k in changed if "lora_B" in k]) > len([k for k in before if "lora_B" in k]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("key", ["grounding_dino", "sam"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(place, tmp_path, key):
  whole = loop_of(place, key, tmp_path / "a", accumulate=2, each=True)
  tune.learn(whole)
  broken = loop_of(place, key, tmp_path / "b", accumulate=2, each=True)
  broken.unwrapped.eval()
  broken.steps = 1
  broken.rate = whole.rate
  broken.fit()
  again = loop_of(place, key, tmp_path / "b", accumulate=2, each=True)
  with torch.no_grad():
    for p in trainable(again.unwrapped).values():
      p.normal_()  # what it would begin with is gone
  again.load(torch.load(tmp_path / "b" / again.LAST, weights_only=True))
  assert again.step == 1
  tune.learn(again)
  a, b = state_of(whole), state_of(again)
  assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_accumulation_is_one_batch(place, tmp_path):
  """The mask loss weighs each picture the same, however they are cut."""
  got = []
  for n in (1, 4):
    loop = loop_of(place, "sam", tmp_path / str(n), accumulate=n)
    parts = [loop.losses(p) for p in loop.pieces([0, 1, 2, 3])]
    assert len(parts) == n
    got.append(float(sum(p["total"] for p in parts)))
  assert got[0] == pytest.approx(got[1], rel=1e-5)


def test_out_of_memory_halves_the_batch_and_says_so(place, tmp_path, capsys):
  loop = loop_of(place, "sam", tmp_path)
  plain, seen = loop.losses, []

  def losses(piece):
    seen.append(len(piece[0]))
    if len(piece[0]) > 1:
      raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    return plain(piece)

  loop.losses = losses
  loop.unwrapped.eval()
  assert loop.step_on([0, 1, 2, 3]) is not None
  assert seen == [4, 2, 1, 1, 1, 1] and loop.at_once == 1
  said = capsys.readouterr().err
  assert (
    "4 pictures at once do not fit into memory; going on with 2, 2 times a step" in said and "with 1, 4 times" in said
  )
  assert loop.state()["at_once"] == 1  # a resumed run goes on so


def test_too_little_memory_is_seen_before_the_first_step(place, tmp_path, monkeypatch, capsys):
  loop = loop_of(place, "sam", tmp_path)
  one = tune.saved_bytes(loop, ([0], 1))
  learn = sum(p.numel() * 4 for p in trainable(loop.unwrapped).values())
  monkeypatch.setattr(tune, "free_bytes", lambda _: int(3 * learn + 3 * one))
  said = tune.estimate(loop)
  assert loop.at_once == 2 and said["a_batch"] == pytest.approx(2 * said["a_picture"])
  assert one > 8 * 8 * 32 * 4 * 2 and "going on with 2" in capsys.readouterr().err


def test_checkpointing_keeps_less_and_learns_the_same(place, tmp_path, capsys):
  kept, gradients = [], []
  for again in (False, True):
    loop = loop_of(place, "sam", tmp_path / str(again), targets="everywhere", flip=False)
    if again:
      train_teacher.checkpointing(loop.unwrapped)
    tune.ready(loop)
    kept.append(tune.saved_bytes(loop, ([0], 1)))
    loop.losses(([0, 1], 2))["total"].backward()
    gradients.append({n: p.grad for n, p in trainable(loop.unwrapped).items()})
  assert kept[1] < 0.8 * kept[0], kept
  for n, g in gradients[0].items():
    torch.testing.assert_close(gradients[1][n], g, rtol=1e-4, atol=1e-7)
  train_teacher.checkpointing(loop_of(place, "grounding_dino", tmp_path / "dino").unwrapped)
  assert "it goes on without" in capsys.readouterr().err


def test_a_mask_loss_by_hand():
  """Against the definitions, in float64."""
  g = torch.Generator().manual_seed(0)
  x, y = torch.randn(2, 3, 3, generator=g).double(), (torch.rand(2, 3, 3, generator=g) > 0.5).double()
  iou = torch.tensor([0.3, 0.9], dtype=torch.float64)
  got = tune.mask_loss(x, iou, y)
  for part, want in zip(("focal", "dice", "iou"), by_hand(x.numpy(), iou.numpy(), y.numpy()), strict=True):
    assert float(got[part]) == pytest.approx(want, rel=1e-6)
  assert float(got["total"]) == pytest.approx(20 * float(got["focal"]) + float(got["dice"]) + float(got["iou"]))


def by_hand(x, iou, y):
  focal, dice, error = [], [], []
  for a, i, b in zip(x, iou, y, strict=True):
    p = 1 / (1 + np.exp(-a))
    at = np.where(b > 0, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    focal.append(at.mean())
    dice.append(1 - (2 * (p * b).sum() + 1) / (p.sum() + b.sum() + 1))
    both, either = ((a > 0) & (b > 0)).sum(), ((a > 0) | (b > 0)).sum()
    error.append((i - both / either) ** 2)
  return np.mean(focal), np.mean(dice), np.mean(error)


def test_full_tuning_is_kept_whole(place, tmp_path):
  out = tmp_path / "full"
  said = run(place, out, "--teachers", "sam", "--full", "--epochs", "1", val=None)
  teacher = said["teachers"]["sam"]
  assert teacher["trainable"] == teacher["parameters"] and teacher["full"] and not teacher["before"]
  model = GroundedSAM.of(out, "cpu").segmenter.model
  base = t.SamModel.from_pretrained(place / "sam")
  assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True))


# *** data ***


def test_which_teachers_by_the_labels(tmp_path):
  for boxes, masks, want in (
    (True, False, ["grounding_dino"]),
    (False, True, ["sam"]),
    (True, True, ["grounding_dino", "sam"]),
  ):
    folder = tmp_path / f"{boxes}{masks}"
    coco = make_data(folder, 1, boxes, masks)
    found = pictures_of.read_pictures(write(folder, coco), folder / "images")
    assert found.info["has_boxes"] is boxes and found.info["has_masks"] is masks
    same = inspect_dataset(coco)
    assert {k: found.info[k] for k in same} == same
    assert train_teacher.chosen(options(), found.info) == want
  with pytest.raises(UserError, match="the data has no masks"):
    train_teacher.chosen(options("--teachers", "sam"), {"has_boxes": True, "has_masks": False})
  assert train_teacher.chosen(options("--teachers", "grounding-dino,sam"), {"has_boxes": False, "has_masks": True}) == [
    "grounding_dino",
    "sam",
  ]


def options(*words):
  return parse(train_teacher.Options, None, "x", ["--data", "d", "--output", "o", *words])


def test_a_mirrored_picture_keeps_its_labels(place):
  data = pictures_of.read_pictures(place / "train" / "annotations.json", place / "train" / "images")
  e = data.example(0, masks=True)
  f = pictures_of.flipped(e)
  for box, mask, cls in zip(f.boxes, f.masks, f.classes, strict=True):
    ys, xs = np.nonzero(mask)
    assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == box.tolist()
    color = f.rgb[:, mask].mean(1)
    assert (color[0] > color[2]) == (cls == 0)
  back = pictures_of.flipped(f)
  assert np.array_equal(back.rgb, e.rgb) and np.array_equal(back.boxes, e.boxes) and np.array_equal(back.masks, e.masks)


def test_boxes_as_a_detector_would_give_them():
  boxes = np.tile([[10.0, 20, 30, 60]], (500, 1))
  moved = pictures_of.jittered(boxes, 0.1, (70, 40), np.random.default_rng(0))
  change = np.abs(moved - boxes)
  assert change[:, [0, 2]].max() <= 0.2 * 20 + 1e-9 and change[:, [1, 3]].max() <= 0.2 * 40 + 1e-9 and change.min() >= 0
  assert (moved[:, 2:] - moved[:, :2] >= 1).all() and moved.min() >= 0 and moved[:, 3].max() <= 70
  assert np.array_equal(pictures_of.jittered(boxes, 0.0, (70, 40), np.random.default_rng(0)), boxes)


def test_every_picture_once_an_epoch():
  steps = list(pictures_of.steps_of(5, 2, 0, 6, 7))
  assert [len(s) for s in steps] == [2, 2, 1] * 2
  assert sorted(np.concatenate(steps[:3])) == sorted(np.concatenate(steps[3:])) == list(range(5))
  again = list(pictures_of.steps_of(5, 2, 4, 6, 7))
  assert all(np.array_equal(a, b) for a, b in zip(again, steps[4:], strict=True))


# *** what is wrong ***


def change_of(coco, **more):
  return {**coco, **more}


def test_wrong_input_is_one_line(place, tmp_path, capsys):
  coco = json.loads((place / "train" / "annotations.json").read_text())
  wrong = {
    "size": ({"segmentation": {"size": [5, 5], "counts": [25]}}, r"1 masks are none, or of another size .* --fix"),
    "class": ({"category_id": 99}, ""),
  }
  for name, (more, said) in wrong.items():
    folder = tmp_path / name
    (folder).mkdir()
    bad = json.loads(json.dumps(coco))
    bad["annotations"][0] |= more
    path = write(folder, bad)
    if said:
      with pytest.raises(UserError, match=said):
        pictures_of.read_pictures(path, place / "train" / "images")
  data = pictures_of.read_pictures(place / "train" / "annotations.json", place / "train" / "images")
  other = json.loads(json.dumps(coco))
  other["categories"][0]["name"] = "dent"
  (tmp_path / "val").mkdir()
  with pytest.raises(UserError, match=r"has classes that .* has not: dent"):
    pictures_of.read_pictures(write(tmp_path / "val", other), place / "train" / "images", data)


@pytest.mark.parametrize(
  "words, said",
  [
    (("--lora.r", "0"), "--lora-r 0"),
    (("--epochs", "0"), "--epochs 0: at least 1"),
    (("--lr", "3"), "--lr 3.0"),
    (("--teachers", "yolo"), "there are grounding-dino, sam"),
    (("--grounding-dino", "/none/dino"), "no weights"),
    (("--prompt", "car=x"), "with one of the classes glorp, snark"),
    (("--lora.targets", "none"), "no dense layer has such a name"),
    (("--grounding-dino", "SAM"), "not of Grounding DINO"),
    (("--data", "/none.json"), "there is no /none.json"),
  ],
)
def test_wrong_options_are_one_line_and_code_2(place, tmp_path, monkeypatch, capsys, words, said):
  words = [str(place / "sam") if w == "SAM" else w for w in words]
  base = ["--data", place / "train" / "annotations.json", "--images", place / "train" / "images"]
  base += ["--grounding-dino", place / "dino", "--sam", place / "sam", "--device", "cpu", "--trackers", ""]
  monkeypatch.setattr("sys.argv", ["x", *map(str, base), "--output", str(tmp_path / "out"), *words])
  assert cli(note_command.main)() == 2
  err = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
  assert len(err) == 1 and said in err[0]
  assert not (tmp_path / "out" / "metadata.json").exists()


def test_an_output_that_is_not_empty_and_another_run(place, experiment, tmp_path):
  out, _ = experiment
  with pytest.raises(UserError, match="is not empty"):
    run(place, out)
  meta = json.loads((out / "metadata.json").read_text())
  del meta["teachers"]["sam"]
  other = tmp_path / "exp"
  import shutil

  shutil.copytree(out, other)
  (other / "metadata.json").write_text(json.dumps(meta))
  with pytest.raises(UserError, match=r"is of another run: lora"):
    run(place, other, "--resume", "--epochs", "2", "--batch_size", "2", "--lora.r", "8")


@pytest.mark.parametrize(
  "change, said",
  [
    (lambda m: {**m, "format": 9}, "format 9"),
    (lambda m: {**m, "classes": []}, "its classes are none"),
    (lambda m: {**m, "teachers": {"x": {}}}, "which is none of"),
    (lambda m: [], "is of no experiment"),
  ],
)
def test_a_folder_that_is_no_experiment(experiment, tmp_path, change, said):
  out, _ = experiment
  meta = json.loads((out / "metadata.json").read_text())
  (tmp_path / "metadata.json").write_text(json.dumps(change(meta)))
  with pytest.raises(UserError, match=said):
    read_experiment(tmp_path)
  with pytest.raises(UserError, match="no experiment in"):
    read_experiment(tmp_path / "none")


def test_a_base_that_is_another(experiment, place, tmp_path):
  out, _ = experiment
  small.save_sam2(tmp_path / "sam")
  with pytest.raises(UserError, match="is another SAM than"):
    GroundedSAM.of(out, "cpu", {"sam": tmp_path / "sam", "grounding_dino": place})
  found = GroundedSAM.of(out, "cpu", {"sam": place, "grounding_dino": place / "dino"})  # a folder of bases, and one
  assert found.has_boxes and found.has_masks


def test_a_configuration_is_filled_from_the_data(tmp_path):
  path = tmp_path / "default.yaml"
  path.write_text("epochs: 3\nlora:\n  r: 8\n  alpha: 16\n")
  info = {"class_mapping": {3: "glorp", 13: "snark"}}
  got = generate_config(path, info, {"lora.r": 32, "epochs": 5})
  assert got == {
    "epochs": 5,
    "lora": {"r": 32, "alpha": 16},
    "num_classes": 2,
    "class_names": ["glorp", "snark"],
    "class_mapping": {3: "glorp", 13: "snark"},
  }
  assert generate_config(path, info)["lora"]["r"] == 8
  with pytest.raises(UserError, match=r"(N|n)o such file"):
    generate_config(tmp_path / "none.yaml", info)


def test_no_class_is_in_the_code():
  folder = Path(train_teacher.__file__).parents[1]
  for path in [*(folder / "grounded_sam").glob("*.py"), folder / "images" / "train_teacher.py"]:
    assert not [n for n in NAMES if n in path.read_text()]
