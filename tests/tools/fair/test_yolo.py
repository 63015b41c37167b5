"""Students of ultralytics' classes, where that package is installed: beside its own forward pass and loss. What needs
no such package is tested everywhere: the refusals, the stamp of the license, what is suppressed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import images_student_fixture as squares
import numpy as np
import pytest

torch = pytest.importorskip("torch")


from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.fair.images import infer, train_student
from openpilot.tools.fair.images.families import check_family
from openpilot.tools.fair.images.train_student import Options
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec
from openpilot.tools.fair.students.families import FAMILIES, OF_TRANSFORMERS
from openpilot.tools.fair.students.student import build, spec_of
from openpilot.tools.fair.students.yolo import OVERLAP, kept, read_weights
from openpilot.tools.lib.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
NAMES = tuple(n for n in FAMILIES if n not in OF_TRANSFORMERS)
HAVE = importlib.util.find_spec("ultralytics") is not None
needs = pytest.mark.skipif(
  not HAVE, reason="ultralytics is not installed: it is AGPL-3.0, and only for who asks for it"
)
CLASSES = ClassSet("pictures", tuple(Class(n, maps=False, boxes=True) for n in ("zott", "flurb")))
SIDE = 96


def student(name):
  torch.manual_seed(0)
  return build(spec_of(name, input=InputSpec("rgb", SIDE, SIDE), classes=CLASSES))


def greedy(scores, boxes, overlap):
  """One after the other, best first."""
  out = []
  kind = scores.argmax(1)
  x0, y0, x1, y1 = (boxes[:, 0] - boxes[:, 2] / 2, boxes[:, 1] - boxes[:, 3] / 2) + (
    boxes[:, 0] + boxes[:, 2] / 2,
    boxes[:, 1] + boxes[:, 3] / 2,
  )
  for i in range(len(scores)):
    over = False
    for j in out:
      w = min(x1[i], x1[j]) - max(x0[i], x0[j])
      h = min(y1[i], y1[j]) - max(y0[i], y0[j])
      both = max(w, 0) * max(h, 0)
      area = boxes[i, 2] * boxes[i, 3] + boxes[j, 2] * boxes[j, 3]
      over |= kind[i] == kind[j] and both / (area - both) > overlap
    if not over:
      out.append(i)
  return out


def test_what_is_suppressed(rng):
  """As one after the other would; two of one place but other classes both stay."""
  places = rng.uniform(0.2, 0.8, (6, 4)) * [1, 1, 0.3, 0.3]
  boxes = np.repeat(places, 5, 0) + rng.normal(0, 0.004, (30, 4))
  boxes = boxes[rng.permutation(30)]
  scores = np.sort(rng.normal(0, 1, (30, 1)), 0)[::-1] * np.eye(2)[rng.integers(0, 2, 30)] - 5
  order = (-scores.max(1)).argsort(kind="stable")
  scores, boxes = scores[order], boxes[order]
  stay = kept(torch.from_numpy(scores.copy())[None], torch.from_numpy(boxes)[None])[0]
  assert stay.nonzero()[:, 0].tolist() == greedy(scores, boxes, OVERLAP)


@pytest.mark.parametrize("name", NAMES)
def test_who_has_not_accepted_its_license_is_told_of_ours(name):
  with pytest.raises(UserError, match=r"AGPL-3\.0, which binds.*leave --student out, with --size (nano|small)") as e:
    check_family(name)
  assert "\n" not in str(e.value) and ("pip install ultralytics" in str(e.value)) is not HAVE


def test_the_license_of_the_network_stays_with_what_it_learns():
  of = lambda name: Run.provenance(  # noqa: E731
    SimpleNamespace(config=SimpleNamespace(student=name), train=SimpleNamespace(provenance=list), inherited=[])
  )
  assert of("yolov8n") == [{"model": "yolov8n of ultralytics", "checkpoint_hash": "", "licence": "AGPL-3.0"}]
  assert of("d-fine-nano") == of("objects-nano") == []


def test_it_is_imported_by_nothing_else(tmp_path):
  """A package of that name that says so when it is imported."""
  (tmp_path / "ultralytics.py").write_text("raise SystemExit('imported')")
  code = (
    "import sys; sys.path.append(sys.argv[1]); import importlib.util as u; assert u.find_spec('ultralytics'); "
    "import openpilot.tools.fair.images.train_student, openpilot.tools.fair.students.yolo; "
    "from openpilot.tools.fair.images.families import check_family; check_family('d-fine-nano')"
  )
  done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


def test_weights_that_hold_code_are_not_opened(tmp_path):
  (tmp_path / "yolov8n.pt").write_bytes(b"anything")
  with pytest.raises(UserError, match=r"hold code; write the weights alone.*save_file\(YOLO\('yolov8n.pt'\)") as e:
    read_weights(tmp_path / "yolov8n.pt")
  assert "\n" not in str(e.value)
  (tmp_path / "broken.safetensors").write_bytes(b"no such thing")
  with pytest.raises(UserError, match="does not load"):
    read_weights(tmp_path / "broken.safetensors")
  args = Options(data=tmp_path, output=tmp_path, pretrained=True)
  with pytest.raises(UserError, match="no weights on the hub"):
    train_student.of_family(args, "yolov8n", 2, SIDE)


def objects(masks):
  mask = torch.zeros(2, SIDE // 4, SIDE // 4)
  mask[0, 2:8, 3:9] = mask[1, 10:20, 10:16] = 1
  boxes = torch.tensor([[11.5, 7.5, 35.5, 31.5], [39.5, 39.5, 63.5, 79.5]])
  return {"boxes": boxes, "cls": torch.tensor([1, 0]), "mask": mask if masks else None}


@needs
@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-seg"])
def test_its_boxes_and_loss_are_ultralytics(name):
  """Beside its own model called by hand: boxes and scores of the best places; the loss of a batch, of which one picture
  has no objects. 1e-4: sums over 189 places in float32."""
  net = student(name)
  with torch.no_grad():
    for n, p in net.net.named_parameters():  # away from where all places are alike
      if "dfl" not in n:  # which counts 0, 1, 2, ...
        p.add_(0.02 * torch.randn_like(p))
  x = torch.randint(0, 256, (2, 3, SIDE, SIDE), dtype=torch.uint8)
  net.eval()
  with torch.no_grad():
    found, theirs = net(x), net.net(x / 255)[0]
  theirs = theirs[0] if isinstance(theirs, tuple) else theirs
  scores, at = theirs[:, 4:6].amax(1).topk(100)
  boxes = theirs[:, :4].gather(2, at[:, None].expand(-1, 4, -1)).transpose(1, 2) / SIDE
  there = found["detector_logits"].amax(2) > -11
  assert 0.05 < there.float().mean() < 1  # some are suppressed
  torch.testing.assert_close(found["detector_logits"].amax(2).sigmoid()[there], scores[there], rtol=1e-4, atol=1e-6)
  torch.testing.assert_close(found["detector_boxes"], boxes, rtol=1e-4, atol=1e-5)

  o = objects(FAMILIES[name].masks)
  empty = {"boxes": torch.zeros(0, 4), "cls": torch.zeros(0, dtype=torch.long), "mask": torch.zeros(0, 24, 24)}
  batch = {
    "batch_idx": torch.tensor([0.0, 0]),
    "cls": torch.tensor([1.0, 0]),
    "bboxes": torch.tensor([[24.0, 20, 24, 24], [52, 60, 24, 40]]) / SIDE,
    "masks": o["mask"],
  }
  net.train()
  net.net.args.overlap_mask = False
  want = net.net.init_criterion()(net.net(x / 255), batch)[0].sum() / 2
  got = net.learn({"frame": x, "objects": [o, empty]})
  torch.testing.assert_close(sum(got["own_loss"].values()), want, rtol=1e-4, atol=1e-4)
  assert set(got["own_loss"]) == ({"own", "masks"} if FAMILIES[name].masks else {"own"})
  sum(got["own_loss"].values()).backward()
  assert all(p.grad is not None for n, p in net.named_parameters() if p.requires_grad and "dfl" not in n)


@needs
def test_a_step_lowers_its_loss_and_half_labels_teach():
  """Pictures without labels give no loss, those without masks none of masks."""
  net = student("yolov8n-seg").train()
  x = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
  assert "masks" not in net.learn({"frame": x, "objects": [objects(False)] * 3})["own_loss"]
  assert "own_loss" not in net.learn({"frame": x, "objects": [None] * 3})
  step = torch.optim.AdamW(net.parameters(), 1e-3)
  losses = []
  for _ in range(6):
    loss = sum(net.learn({"frame": x, "objects": [objects(True), None, objects(True)]})["own_loss"].values())
    losses.append(loss.item())
    step.zero_grad()
    loss.backward()
    step.step()
  assert losses[-1] < losses[0]


@needs
def test_it_starts_from_weights_of_other_classes(tmp_path, capsys):
  from safetensors.torch import save_file

  other = build(spec_of("yolov8n", input=InputSpec("rgb", SIDE, SIDE), classes=CLASSES))
  state = {k: v.clone() for k, v in other.net.state_dict().items()}
  for k in list(state):
    if ".cv3." in k and k.split(".")[-2] == "2":
      state[k] = torch.zeros(80, *state[k].shape[1:])
  save_file(state, tmp_path / "w.safetensors")
  spec = spec_of("yolov8n", input=InputSpec("rgb", SIDE, SIDE), classes=CLASSES)
  net = build(spec, pretrained=str(tmp_path / "w.safetensors"))
  assert "6 of its tensors are of other classes" in capsys.readouterr().out
  torch.testing.assert_close(net.net.model[0].conv.weight, other.net.model[0].conv.weight, rtol=0, atol=0)
  with pytest.raises(UserError, match=r"lacks \d+ of the weights of yolov8s"):
    build(
      spec_of("yolov8s", input=InputSpec("rgb", SIDE, SIDE), classes=CLASSES),
      pretrained=str(tmp_path / "w.safetensors"),
    )


@needs
@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolov8n-seg"])
def test_from_pictures_to_what_it_finds(tmp_path, monkeypatch, name):
  """After steps that are too few for all three squares of a picture, the bundle's best box is one of them; run and
  bundle are under AGPL-3.0."""
  squares.write(tmp_path / "a", 1)
  data = tmp_path / "a/annotations.json"
  told = {"data": data, "val": data, "student": name, "picture_size": SIDE, "batch_size": 1, "steps": 200}
  args = Options(
    **told, output=tmp_path / "made", lr=2e-3, workers=0, augment="none", license="MIT", accept_license=("AGPL-3.0",)
  )
  bundle = train_student.run(args)
  manifest = load_bundle(bundle).manifest
  assert manifest["provenance"]["license"] == "AGPL-3.0"
  assert "ultralytics' " in (bundle / "README.md").read_text()
  out = infer.run(infer.Options(model=bundle, paths=(str(tmp_path / "a/images"),), output=tmp_path / "o", score=0.3))
  found = json.loads((out / "predictions.json").read_text())
  truth = json.loads(data.read_text())
  best = max(found["annotations"], key=lambda a: a["score"])["bbox"]
  assert min(np.abs(np.subtract(best, a["bbox"])).max() for a in truth["annotations"]) < 2  # pixels
