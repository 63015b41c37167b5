"""Students of transformers' families: trained by their own loss on our store and loop, exported, and run by ours."""

import json
from pathlib import Path
from types import SimpleNamespace

import images_student_fixture as squares
import numpy as np
import pytest

torch = pytest.importorskip("torch")
t = pytest.importorskip("transformers")

import family_models as small

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.tools.fair.bundle.export import TOLERANCE, as_sets, parity
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.fair.images import benchmark, evaluate, infer, train_student
from openpilot.tools.fair.images.families import check_family
from openpilot.tools.fair.images.loss import balance
from openpilot.tools.fair.images.train_student import Options
from openpilot.tools.fair.spec import Class, ClassSet, InputSpec
from openpilot.tools.fair.students.families import FAMILIES, OF_TRANSFORMERS
from openpilot.tools.fair.students.family import describe_network, full
from openpilot.tools.fair.students.onnx_export import export_onnx
from openpilot.tools.fair.students.student import build, spec_of
from openpilot.tools.lib.errors import UserError

SIDE = small.SIDE
CLASSES = ClassSet("pictures", tuple(Class(n, maps=False, boxes=True) for n in ("zott", "flurb")))
# published: classes, side of the pictures, millions of parameters
PARAMETERS = {
  "d-fine-nano": (80, 640, 3.8),
  "d-fine-small": (80, 640, 10.3),
  "rtdetr-v2-r18": (80, 640, 20.2),
  "rf-detr-nano": (91, 384, 30.5),
  "rf-detr-seg-nano": (91, 312, 33.6),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  root = tmp_path_factory.mktemp("families")
  return {name: small.save(name, root / name) for name in small.NAMES}


@pytest.fixture
def student(folders, request):
  """Of the weights of a folder, for two classes and small pictures."""
  name, folder = request.param, folders[request.param]
  network = describe_network(name, 2, SIDE, folder)
  spec = spec_of(name, input=InputSpec("rgb", SIDE, SIDE), classes=CLASSES, network=network)
  return build(spec, pretrained=str(folder))


def frames(n, seed=0):
  return torch.randint(0, 256, (n, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def objects(masks=True):
  mask = torch.zeros(2, SIDE // 4, SIDE // 4)
  mask[0, 2:8, 3:9] = mask[1, 10:20, 10:16] = 1
  boxes = torch.tensor([[11.5, 7.5, 35.5, 31.5], [39.5, 39.5, 63.5, 79.5]])
  return {"boxes": boxes, "cls": torch.tensor([1, 0]), "mask": mask if masks else None}


def nothing():
  return {"boxes": torch.zeros(0, 4), "cls": torch.zeros(0, dtype=torch.long), "mask": torch.zeros(0, 24, 24)}


@pytest.mark.parametrize("student", small.NAMES, indirect=True)
def test_its_loss_and_outputs_are_transformers(student):
  """Called by hand with the labels written out: the same boxes, scores, and loss; in training, too, where queries are
  added that nobody asks for later."""
  x, o = frames(2), objects()
  labels = [
    {
      "class_labels": torch.tensor([1, 0]),
      "boxes": torch.tensor([[24.0, 20, 24, 24], [52, 60, 24, 40]]) / SIDE,
      "masks": o["mask"] > 0.5,
    }
  ] * 2
  mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if student.family.normalized else ((0,) * 3, (1,) * 3)
  pixels = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
  for training in (True, False):
    student.train(training)
    torch.manual_seed(0)
    groups = getattr(student.net.config, "group_detr", 1)
    if not training and groups > 1:
      student.net.config.group_detr = 1  # transformers' loss would match groups that were not asked
    want = student.net(pixels, labels=labels)
    if groups > 1:
      student.net.config.group_detr = groups
    torch.manual_seed(0)
    got = student.learn({"frame": x, "objects": [o, o]})
    torch.testing.assert_close(sum(got["own_loss"].values()), want.loss.reshape(()), rtol=1e-5, atol=1e-5)
    assert set(got["own_loss"]) == ({"own", "masks"} if student.family.masks else {"own"})
    assert got["detector_logits"].shape == (2, student.net.config.num_queries, 2)
    if not training:
      torch.testing.assert_close(got["detector_boxes"], want.pred_boxes)
      torch.testing.assert_close(got["detector_logits"], want.logits)


@pytest.mark.parametrize("student", ["d-fine-nano", "rf-detr-nano", "rf-detr-seg-nano"], indirect=True)
def test_pictures_without_labels_or_masks(student):
  """They are asked apart: no loss of what is not labeled, none of masks of what has none; outputs keep their order."""
  x = frames(4)
  student.eval()
  with torch.no_grad():
    alone = student(x)
    got = student.learn({"frame": x, "objects": [objects(), None, objects(masks=False), nothing()]})
    assert "own_loss" not in student.learn({"frame": x, "objects": [None] * 4})
    masked = student.learn({"frame": x[[0, 3]], "objects": [objects(), nothing()]})["own_loss"]
    boxed = student.learn({"frame": x[2:3], "objects": [objects(masks=False)]})["own_loss"]
  for k, v in alone.items():
    torch.testing.assert_close(got[k], v, rtol=1e-4, atol=1e-4)
  assert all(v.isfinite() for v in got["own_loss"].values())
  if student.family.masks:
    assert set(boxed) == {"own"} and got["own_loss"]["masks"] == masked["masks"]
    torch.testing.assert_close(got["own_loss"]["own"], (3 * masked["own"] + 2 * boxed["own"]) / 5, rtol=1e-5, atol=0)
  student.train()
  learned = student.learn({"frame": x, "objects": [nothing()] * 4})["own_loss"]
  assert learned["own"] > 0  # that there is nothing is learned, too
  sum(learned.values()).backward()
  assert sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters()) > 50
  assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_a_box_drawn_full():
  mask = full(torch.tensor([[3.5, 7.5, 11.5, 19.5]]), 6, 5)
  assert mask[0].nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("student", small.NAMES, indirect=True)
def test_the_graph_says_what_torch_does(student, tmp_path):
  """As sets; and exporting it changes nothing in memory."""
  student.eval()
  before = {k: v.clone() for k, v in student.state_dict().items()}
  with torch.no_grad():
    want = student(frames(1))
  entry = export_onnx(student, tmp_path / "x.onnx", ("detector_",))
  names = [o["name"] for o in entry["outputs"]]
  assert names == ["detector_logits", "detector_boxes", *(["detector_masks"] if student.family.masks else [])]
  assert [i["name"] for i in entry["inputs"]] == ["frame"] and entry["outputs"][0]["classes"] == ["zott", "flurb"]
  assert parity(student, tmp_path / "x.onnx", [{"frame": frames(1, s)} for s in range(3)], names) < TOLERANCE
  with torch.no_grad():
    again = student(frames(1))
  assert all(torch.equal(again[k], v) for k, v in want.items())
  assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())


def test_sets_differ_where_a_query_does(rng):
  a = [rng.normal(size=(200, 3)), rng.uniform(size=(200, 4))]
  order = rng.permutation(200)
  assert as_sets(a, [x[order] for x in a]) == 0
  other = [x[order].copy() for x in a]
  other[1][:10] += 0.5  # other places that are nearly as good
  assert as_sets(a, other) < 1e-9
  other[1][:30] += 0.5
  assert as_sets(a, other) > 0.05
  assert as_sets(a, [a[0] * np.nan, a[1]]) == np.inf == as_sets(a, [a[0][:5], a[1][:5]])


@pytest.mark.parametrize("name", small.NAMES)
def test_the_published_configurations(name):
  """By their number of parameters, on no memory."""
  classes, side, millions = PARAMETERS[name]
  family = FAMILIES[name]
  network = json.loads(describe_network(name, classes, side))
  kind = getattr(t, family.kind)
  config = kind.config_class(**{k: v for k, v in network.items() if k not in ("model_type", "architectures")})
  with torch.device("meta"):
    net = kind(config)
  assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
  assert family.side % family.step == 0


def options(root, out, folders, name, **more):
  told = {"data": root / "a/annotations.json", "output": out, "student": name, "pretrained": str(folders[name])}
  return Options(
    **{**told, "picture_size": SIDE, "batch_size": 2, "steps": 2, "workers": 0, "augment": "plain", **more}
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["d-fine-nano", "rf-detr-seg-nano"])
def test_from_pictures_to_what_it_finds(folders, tmp_path, monkeypatch, capsys, name):
  """All parts that it can have; the bundle, its card, and our commands on it; and a run that is gone on with."""
  squares.register(monkeypatch)
  squares.write(tmp_path / "a", 4)
  squares.write(tmp_path / "b", 2, seed=1)
  more = {"teachers": "colors", "untuned": True, "alias": ("red=flurb", "blue=zott")}
  args = options(tmp_path, tmp_path / "made", folders, name, val=tmp_path / "b/annotations.json", **more)
  bundle = train_student.run(args)
  said = capsys.readouterr().out
  masks = FAMILIES[name].masks
  missing = (
    "without feature: rf-detr-seg-nano shows no feature map" if masks else f"segmentation: {name} makes no masks"
  )
  assert missing in said
  config = json.loads((tmp_path / "made/config.json").read_text())
  assert config["tasks"] == ["detector", "logits", *([] if masks else ["features"])] and config["lr"] == 2e-4
  lines = [json.loads(x) for x in (tmp_path / "made/log.jsonl").read_text().splitlines()]
  held = {k for x in lines for k in x.get("val", {}) if "/" in k}
  assert held == {"detector/own", *(["detector/masks"] if masks else [])}
  card = (bundle / "README.md").read_text()
  assert f"transformers' {FAMILIES[name].kind}, whose code is under Apache-2.0" in card
  assert f"weights of {name}, whose own card" in card and str(folders[name]) not in card
  (graph,) = load_bundle(bundle).graphs
  assert [i["name"] for i in graph["inputs"]] == ["frame"]
  pictures = (str(tmp_path / "b/images"),)
  out = infer.run(infer.Options(model=bundle, paths=pictures, output=tmp_path / "o", score=0.01, visualize=True))
  found = json.loads((out / "predictions.json").read_text())
  assert len(found["images"]) == 2 and found["annotations"]
  assert all(("segmentation" in a) == masks for a in found["annotations"])
  r = evaluate.run(evaluate.Options(model=bundle, data=tmp_path / "b/annotations.json", score=0.05))
  assert r["objects"] == 6 and ("segm" in r) == masks
  (row,) = benchmark.run(benchmark.Options(models=(bundle,), rounds=1))
  assert row["network_ms"]["p50"] > 0
  with pytest.raises(UserError, match="add --resume"):
    train_student.run(args)


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one(folders, tmp_path):
  """Bit for bit: what its loss draws at random is of the step."""
  squares.write(tmp_path / "a", 4)
  more = {"augment": "none", "export": False}
  train_student.run(options(tmp_path, tmp_path / "whole", folders, "d-fine-nano", **more))
  from openpilot.tools.fair.distillation.trainer import Run

  part = options(tmp_path, tmp_path / "part", folders, "d-fine-nano", **more)
  with pytest.MonkeyPatch.context() as m:

    def stopped(run):
      if run.step == 1:
        run.save(run.LAST)
        raise KeyboardInterrupt

    plain = Run.moved
    m.setattr(Run, "moved", lambda run: (plain(run), stopped(run)))
    with pytest.raises(KeyboardInterrupt):
      train_student.run(part)
  from dataclasses import replace

  train_student.run(replace(part, resume=True))
  a, b = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in ("whole", "part"))
  assert a["step"] == b["step"] == 2
  assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


@pytest.mark.parametrize("student", ["rf-detr-nano"], indirect=True)
def test_a_step_of_its_loss_helps(student):
  """On one batch, by a plain optimizer; through the distiller, as it learns."""
  model = Distiller(student, ["detector"], {}, parts={"detector/own": 0.5})
  batch = {"frame": frames(2), "objects": [objects()] * 2, "valid": torch.ones(2, 24, 24, dtype=torch.bool)}
  model.eval()
  with torch.no_grad():
    first = model(batch)
  assert set(first) == {"detector/own", "total"}
  torch.testing.assert_close(first["total"], student.learn(batch)["own_loss"]["own"] / 2, rtol=1e-4, atol=0)
  model.train()
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
  for _ in range(8):
    optimizer.zero_grad()
    model(batch)["total"].backward()
    optimizer.step()
  model.eval()
  with torch.no_grad():
    assert model(batch)["total"] < 0.95 * first["total"]


def test_what_is_wrong_is_one_line(folders, tmp_path):
  data = squares.write(tmp_path / "a", 2)
  for more, says in (
    ({"input": "model-frame"}, "RGB pictures alone"),
    ({"picture_size": 100}, "multiple of 32"),
    ({"student": "rf-detr-seg-nano", "picture_size": 128}, "multiple of 96"),
    ({"backbone": "x"}, "has its own"),
    ({"student": "D-FINE-nano"}, "it is written d-fine-nano"),
    ({"student": "d-fine-giant"}, "is none; there are .*d-fine-nano"),
  ):
    with pytest.raises(UserError, match=says) as e:
      train_student.check_options(Options(**{"data": data, "output": tmp_path / "o", "student": "d-fine-nano", **more}))
    assert "\n" not in str(e.value)
  with pytest.raises(UserError, match=r"no weights 'ustc-community/dfine-nano-coco'.*--download"):
    train_student.of_family(Options(data=data, output=tmp_path, pretrained=True), "d-fine-nano", 2, SIDE)
  with pytest.raises(UserError, match="of a 'rf_detr', not of d-fine-nano"):
    describe_network("d-fine-nano", 2, SIDE, folders["rf-detr-nano"])
  spec = spec_of("d-fine-nano", input=InputSpec("rgb", 64, 64), classes=CLASSES)
  with pytest.raises(UserError, match="300 queries, and pictures of 64x64 have 20 places"):
    build(spec)
  with pytest.raises(UserError, match="RGB pictures alone"):
    build(spec_of("d-fine-nano", classes=CLASSES))
  for name in OF_TRANSFORMERS:
    check_family(name)


def test_weights_that_do_not_fit_their_configuration(folders, tmp_path):
  import shutil

  folder = Path(shutil.copytree(folders["rtdetr-v2-r18"], tmp_path / "w"))
  said = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**said, "decoder_ffn_dim": 56}))
  network = describe_network("rtdetr-v2-r18", 2, SIDE, folder)
  spec = spec_of("rtdetr-v2-r18", input=InputSpec("rgb", SIDE, SIDE), classes=CLASSES, network=network)
  with pytest.raises(UserError, match=r"of the weights that its config.json asks for, or has them of another shape"):
    build(spec, pretrained=str(folder))


@pytest.mark.parametrize("name", ["d-fine-nano", "rf-detr-seg-nano"])
def test_parts_that_a_family_cannot_have(name):
  from types import SimpleNamespace

  said = SimpleNamespace(info={"has_boxes": True, "has_masks": True}, scores=True, features=True, teachers=("t",))
  weights, off = balance(Options(data=Path("a"), output=Path("o")), said, name)
  gone = "feature" if "seg" in name else "segmentation"
  assert list(off) == [gone] and name in off[gone] and sum(weights.values()) == pytest.approx(1)


def test_several_processes_are_told_of_a_loss_of_shares_and_one_that_waits_is_refused(capsys):
  """An RF-DETR's loss asks all processes, which do not judge when the first one does."""

  def asked(name, processes, student):
    accelerator = SimpleNamespace(num_processes=processes, is_main_process=True)
    return Run.learns_by_itself(SimpleNamespace(accelerator=accelerator, config=SimpleNamespace(student=name)), student)

  own = SimpleNamespace(learn=None)
  assert not asked("objects-nano", 2, SimpleNamespace()) and asked("rf-detr-nano", 1, own)
  assert asked("d-fine-nano", 2, own)
  assert "d-fine-nano learns by its package's own loss, of each process's share" in capsys.readouterr().err
  for name in ("rf-detr-nano", "rf-detr-seg-nano"):
    with pytest.raises(UserError, match=f"{name}: transformers' own loss of it does not go with 2 processes"):
      asked(name, 2, own)
