"""Data, augmentation and the training loop, on a made-up store: labels move with the picture, a resumed run is the
unbroken one, and what is wrong is said."""

import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from label_fixture import LABELS, same, write_store
from student_inputs import assert_close, randomise, some_inputs

from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.fair.distillation import distill, initial
from openpilot.tools.fair.distillation.augment import NONE, draw
from openpilot.tools.fair.distillation.batch import Batches, collate, convert
from openpilot.tools.fair.distillation.data import Clips, RawClip
from openpilot.tools.fair.distillation.distiller import Distiller
from openpilot.tools.fair.distillation.losses import segmentation_loss, soft_segmentation_loss
from openpilot.tools.fair.distillation.config import Config, Stage
from openpilot.tools.fair.distillation.trainer import Run, grown
from openpilot.tools.fair.spec import StudentSpec, road_classes
from openpilot.tools.fair.students.sizes import SIZES
from openpilot.tools.fair.students.student import Student, build
from openpilot.tools.fair.tasks import TASKS, say
from openpilot.tools.fair.tasks.objects import object_list
from openpilot.tools.fair.tasks.segmentation import class_maps, segmentation
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError

ALL = ["depth", "segmentation", "objects", "detector", "lanes"]


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
  root = tmp_path_factory.mktemp("labels") / "s"
  write_store(root)
  return root


def config(**more):
  return Config(
    **{
      "student": "unified-nano",
      "tasks": ALL,
      "steps": 6,
      "batch": 4,
      "clip": 2,
      "warmup": 2,
      "eval_every": 3,
      "eval_clips": 4,
      "hard": 0.3,
      **more,
    }
  )


def run(root, out, conf, **more):
  out.mkdir(parents=True, exist_ok=True)
  return Run(
    conf, Clips(root, conf.tasks, conf.clip), Clips(root, conf.tasks, conf.clip), out, "labels", workers=0, **more
  )


def weights(path):
  return {
    k: v for k, v in load_checkpoint(path).items() if k in ("model", "ema", "optimizer", "step", "losses", "best")
  }


def test_a_batch_holds_what_the_store_says(labels):
  clips = Clips(labels, ALL, 2)
  batch = Batches(clips, 0, True)[(0, [0, 3], False)]
  assert batch["frame"].shape == (4, 6, 128, 256) and batch["points"].shape == (2, 2, 128, 2)
  first = batch["objects"][0]
  x0, y0, x1, y1 = first["boxes"][0].tolist()
  assert batch["segmentation"][0, road_classes().maps.index("vehicle")].sum() == pytest.approx(
    (x1 - x0) * (y1 - y0) / 16, rel=0.2
  )
  assert first["mask"][0].sum() == pytest.approx((x1 - x0) * (y1 - y0) / 16, rel=0.2)
  inside = first["mask"][0] > 0
  assert (batch["depth"][0][inside] == 10).float().mean() > 0.8  # its edge is of both
  assert batch["points_known"][0].sum(1).tolist() == [4, 4] and batch["points_visible"][0, 0].sum() == 4
  near = np.abs(batch["points"][0, 0][batch["points_known"][0, 0]].numpy() - [x0 + 0.5, y0 + 0.5]).sum(1).min()
  assert near < 1e-4
  # in the same step the same is drawn, in another something else
  again, other = (Batches(clips, 0, True)[(step, [0, 3], True)] for step in (5, 6))
  assert torch.equal(again["frame"], Batches(clips, 0, True)[(5, [0, 3], True)]["frame"]) and not torch.equal(
    again["frame"], other["frame"]
  )
  # what is enlarged is nearer
  zoom = draw(np.random.default_rng([0, 5, 0]), True).zoom
  known = again["depth"][0][torch.isfinite(again["depth"][0])]
  off = np.abs(known.numpy()[:, None] * zoom / [10.0, 20.0, 50.0] - 1).min(axis=1)
  assert (off < 1e-5).mean() > 0.9 and off.max() < 0.34  # at the edges a little of both, nothing in between


def test_one_thing_of_two_names_is_one_object():
  box = np.array([[10, 10, 60, 50], [11, 10, 60, 51], [11, 10, 60, 51], [100, 10, 150, 50]], np.float32)
  table = dict(zip(("x0", "y0", "x1", "y1"), box.T, strict=True)) | {
    "score": np.array([0.5, 0.9, 0.9, 0.4], np.float32),
    "cls": np.array([0, 1, 2, 0]),
  }
  label = Label("boxes", "boxes", classes=("car", "truck", "person"))
  said = object_list(NONE, say([label], [table], TASKS["objects"]), table)
  assert said["boxes"][:, 0].tolist() == [11, 11, 100] and said["cls"].tolist() == [
    0,
    1,
    0,
  ]  # the person is another thing


def test_a_teacher_of_some_classes_teaches_those_and_the_sum_of_the_rest():
  r = np.random.default_rng(0)
  drivable, lanes = (r.uniform(0, 1, (128, 256)).astype(np.float32) for _ in range(2))
  said = [Label("drivable", "dense", unit="probability"), Label("lanes", "dense", unit="probability")]
  p, rest = class_maps(NONE, say(said, [], TASKS["segmentation"]), np.stack([drivable, lanes]))
  d, l = (x.reshape(64, 2, 128, 2).mean(axis=(1, 3)) for x in (drivable, lanes))
  assert (
    np.allclose(p[2], l, atol=1e-6)
    and np.allclose(p[1], d * (1 - l), atol=1e-6)
    and np.allclose(p.sum(0) + rest, 1, atol=1e-6)
  )
  logits = torch.from_numpy(r.normal(size=(1, 5, 64, 128))).float()
  batch = {
    "segmentation": torch.from_numpy(p)[None],
    "segmentation_rest": torch.from_numpy(rest)[None],
    "segmentation_named": torch.tensor([[False, True, True, False, False]]),
  }
  valid = torch.ones(1, 64, 128, dtype=torch.bool)
  weights = torch.ones(5)
  loss = segmentation(logits, batch, valid, weights)
  # a logit moved from one unnamed class to another changes nothing as long as their sum stays
  q = logits.double().softmax(1)
  moved = q.clone()
  moved[:, 0], moved[:, 3], moved[:, 4] = q[:, 3], q[:, 4], q[:, 0]
  assert torch.allclose(segmentation(moved.log().float(), batch, valid, weights), loss, atol=1e-5)
  other = q.clone()
  other[:, 0], other[:, 1] = q[:, 1], q[:, 0]
  assert (segmentation(other.log().float(), batch, valid, weights) - loss).abs() > 1e-3


def test_a_teacher_that_says_how_sure_it_is_teaches_that(rng):
  """Where classes are merged, too: what is not named may be anything as long as its sum is right. Hard labels are
  learned as they were."""
  said = [Label("drivable", "dense", unit="probability"), Label("lanes", "dense", unit="probability")]
  maps = rng.uniform(0.1, 0.4, (2, 128, 256)).astype(np.float32)
  clip = RawClip(
    "x",
    rng.integers(0, 256, (1, 6, 128, 256), dtype=np.uint8),
    np.ones((256, 512), bool),
    {"segmentation": say(said, [maps], TASKS["segmentation"])},
  )
  hard = RawClip(
    "y",
    clip.frames,
    clip.valid,
    {"segmentation": say(LABELS[1:2], [rng.integers(0, 5, (64, 128)).astype(np.uint8)], TASKS["segmentation"])},
  )
  batch = collate([convert(c, NONE, rng) for c in (clip, hard)])
  assert batch["segmentation_soft"].tolist() == [True, False]
  model = Distiller(build("objects-nano"), ["segmentation"], {})
  valid = batch["valid"]
  p, rest = batch["segmentation"][:1], batch["segmentation_rest"][:1]
  logits = torch.randn(2, 5, 64, 128, requires_grad=True)
  named = batch["segmentation_named"]
  merged = logits[:1].log_softmax(1)
  q = torch.cat([merged[:, named[0]], merged[:, ~named[0]].logsumexp(1, keepdim=True)], 1)
  w = torch.tensor([0.7, 2.5, 0.5])
  want = soft_segmentation_loss(q, torch.cat([p[:, named[0]], rest[:, None]], 1), valid[:1], w)
  want = 0.5 * want + 0.5 * segmentation_loss(logits[1:], batch["segmentation"][1:], valid[1:], model.class_weights)
  assert torch.allclose(segmentation(logits, batch, valid, model.class_weights), want)
  alone = {k: v[1:] for k, v in batch.items() if torch.is_tensor(v)}
  before = segmentation_loss(logits[1:], alone["segmentation"], valid[1:], model.class_weights)
  assert torch.equal(segmentation(logits[1:], alone, valid[1:], model.class_weights), before)


# *** the loop ***


def test_a_resumed_run_is_the_unbroken_one(labels, tmp_path):
  """Stopped within an epoch, of which some segments are drawn more often, with stronger light, and half of it by
  night."""
  how = config(sample=["*=1", "00000001*=2.5"], light=2.0, night=0.5)
  whole = run(labels, tmp_path / "a", how)
  whole.fit()
  part = run(labels, tmp_path / "b", how)
  before = signal.getsignal(signal.SIGINT)
  step, real = part.update_ema, os.kill

  def stop():
    step()
    if part.step == 4:
      real(os.getpid(), signal.SIGINT)

  part.update_ema = stop
  with pytest.raises(KeyboardInterrupt):
    part.fit()
  assert signal.getsignal(signal.SIGINT) is before
  state = load_checkpoint(tmp_path / "b" / "last.pt")
  assert state["step"] == 4
  rest = run(labels, tmp_path / "b", how)
  rest.load(state)
  rest.fit()
  a, b = weights(tmp_path / "a" / "last.pt"), weights(tmp_path / "b" / "last.pt")
  assert a["step"] == b["step"] == 6 and same(a, b)


@pytest.mark.slow
def test_it_learns_a_few_clips_by_heart(labels, tmp_path):
  conf = config(steps=120, batch=4, lr=3e-3, warmup=10, ema=0.9, eval_every=60, overfit=2)
  r = run(labels, tmp_path, conf)
  start = r.evaluate()
  end = r.fit()
  for task in ("depth/metric", "segmentation/segmentation", "objects/heat", "detector/class"):
    assert end[task] < 0.6 * start[task], task
  assert (tmp_path / "best.pt").exists() and list((tmp_path / "samples").glob("*.png"))


def test_a_loss_that_is_not_finite_stops_the_run(labels, tmp_path):
  r = run(labels, tmp_path, config(eval_every=2))
  real = r.distiller.total

  def total(parts):
    return real(parts) * (float("nan") if r.step == 3 else 1.0)

  r.distiller.total = total
  with pytest.raises(
    UserError, match=r"step 3 is not finite.*--aaaaaaaaaa--0 frames|step 3 is not finite.*--bbbbbbbbbb--0 frames"
  ):
    r.fit()
  assert load_checkpoint(tmp_path / "last.pt")["step"] == 2


def test_what_a_stage_freezes_stays(labels, tmp_path):
  r = run(labels, tmp_path, config(steps=3, stages=[Stage(steps=3, tasks=["depth"], freeze=["backbone"])]))
  before = {k: v.clone() for k, v in r.distiller.student.state_dict().items()}
  r.fit()
  after = r.distiller.student.state_dict()
  changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
  assert "backbone" not in changed and "depth" in changed


def test_missing_labels_say_which_teacher_gives_them(tmp_path):
  write_store(tmp_path / "s", labels=LABELS[:2])
  with pytest.raises(UserError, match="nothing that teaches 'lanes'; add a teacher of tracks: raft-tracker"):
    Clips(tmp_path / "s", ["depth", "points"], 2)
  with pytest.raises(
    UserError, match=r"'lanes'; add a teacher of tracks: raft.*and nothing that teaches 'detector'; add .*yolox"
  ):
    Clips(tmp_path / "s", ["points", "detector"], 2)  # frames are there, and labels, but none of these
  with pytest.raises(UserError, match="no segment with model frames"):
    Clips(tmp_path / "s", ["depth"], 2, segments=["00000009--cccccccccc--0"])
  with pytest.raises(UserError, match="no 40 consecutive"):
    Clips(tmp_path / "s", ["depth"], 40)


def test_labels_of_two_checkpoints_are_not_mixed(tmp_path):
  write_store(tmp_path / "s", routes=("00000001--aaaaaaaaaa",))
  write_store(tmp_path / "s", routes=("00000002--bbbbbbbbbb",), checkpoint="b")
  with pytest.raises(UserError, match="two checkpoints"):
    Clips(tmp_path / "s", ["depth"], 1)


def test_a_tenth_of_the_routes_is_held_out(tmp_path):
  routes = [f"{i:08x}--aaaaaaaaaa" for i in range(12)]
  write_store(tmp_path / "s", routes=routes, n=2, labels=LABELS[:1])
  out = distill.held_out(tmp_path / "s")
  assert len(out) == 1 and out == distill.held_out(tmp_path / "s")


def command(*args):
  return subprocess.run(
    [sys.executable, "-m", "openpilot.tools.fair.distillation.distill", *map(str, args)],
    capture_output=True,
    text=True,
    timeout=300,
  )


@pytest.mark.slow
def test_the_command_from_start_to_new_labels(labels, tmp_path):
  root, out = tmp_path / "s", tmp_path / "run"
  write_store(root, routes=[f"{i:08x}--aaaaaaaaaa" for i in range(3)])
  base = ("--labels", root, "--student", "depth-nano", "--out", out, "--batch", 4, "--eval-every", 2)
  r = command(*base, "--steps", 4)
  assert r.returncode == 0, r.stderr
  assert {p.name for p in out.iterdir()} >= {
    "config.json",
    "environment.json",
    "log.jsonl",
    "samples",
    "last.pt",
    "best.pt",
  }
  again = command(*base, "--steps", 4)
  assert again.returncode == 2 and "add --resume" in again.stderr
  other = command(*base, "--steps", 5, "--resume")
  assert other.returncode == 2 and "steps 4 then, 5 now" in other.stderr
  assert "is complete" in command(*base, "--steps", 4, "--resume").stdout
  # --steps 0: what --init names, as it is
  joined = tmp_path / "joined"
  r = command("--labels", root, "--student", "depth-nano", "--out", joined, "--batch", 4, "--steps", 0, "--init", out)
  assert r.returncode == 0, r.stderr
  was, now = load_checkpoint(out / "best.pt"), load_checkpoint(joined / "last.pt")
  assert now["step"] == 0 and all(
    torch.equal(v, now["ema"][k]) for k, v in was["ema"].items() if k.startswith("student.")
  )
  # a changed teacher: the same command starts from the student that is there
  shutil.rmtree(root)
  write_store(root, routes=[f"{i:08x}--aaaaaaaaaa" for i in range(3)], checkpoint="b")
  r = command(*base, "--steps", 4)
  assert (
    r.returncode == 0 and "the labels have changed" in r.stdout and "->" in r.stdout and (out / "before.pt").exists()
  ), r.stderr


def test_a_live_teacher_of_features(labels, tmp_path, monkeypatch, capsys):
  """A small DINOv2 of the real architecture labels while the student learns: nothing of it is in the store."""
  pytest.importorskip("transformers")
  from dino_models import save_dinov2

  save_dinov2(tmp_path / "dino")
  live = [
    "--live-teacher",
    f"dinov2-small={tmp_path / 'dino'}",
    "--tasks",
    "depth,features",
    "--steps",
    "2",
    "--batch",
    "4",
    "--eval-every",
    "2",
  ]
  monkeypatch.setattr(
    sys, "argv", ["distill", "--labels", str(labels), "--student", "depth-nano", "--out", str(tmp_path / "run"), *live]
  )
  assert distill.main() in (0, None)
  state = load_checkpoint(tmp_path / "run/last.pt")
  assert state["step"] == 2 and any("dinov2" in t["model"] for t in state["provenance"])
  assert "the live teacher 'dinov2-small' sees the view alone" in capsys.readouterr().err


class Evil:
  def __reduce__(self):
    return os.mkdir, ("evil",)


def test_a_student_is_put_together_from_two(labels, tmp_path):
  """The second run's tracker on the first one's trunk; and a license that either learned under stays."""
  first, second = (run(labels, tmp_path / name, config(steps=2, seed=seed)) for name, seed in (("a", 1), ("b", 2)))
  second.inherited = [{"model": "dinov3", "checkpoint_hash": "0", "licence": "DINOv3"}]
  for r, name in ((first, "a"), (second, "b")):
    r.save("best.pt")
    assert (tmp_path / name / "best.pt").exists()
  first.train.per_height = True  # as both have learned
  state = initial.initial([str(tmp_path / "a"), f"{tmp_path / 'b'}:lanes"], first.train)
  for k, v in state["ema"].items():
    assert torch.equal(v, (second if ".lanes." in k else first).ema.state_dict()[k])
  third = run(labels, tmp_path / "c", config(seed=3))
  assert third.warm_start(state) == []
  assert "DINOv3" in {t["licence"] for t in third.provenance()} and "DINOv3" not in {
    t["licence"] for t in first.provenance()
  }
  third.save("last.pt")
  again = run(labels, tmp_path / "d", config(seed=3))
  again.load(load_checkpoint(tmp_path / "c/last.pt"))
  assert again.provenance() == third.provenance()
  with pytest.raises(UserError, match=r"no part 'wheels'; it has .*lanes"):
    initial.initial([f"{tmp_path / 'a'}:wheels"], first.train)
  with pytest.raises(UserError, match="nowhere"):
    initial.initial([str(tmp_path / "nowhere")], first.train)


def test_a_wider_student_starts_as_the_narrower_one():
  """Every output, on fresh weights and input; what is neither the same nor wider is not taken."""
  narrow = randomise(build("unified-nano"))
  wide = Student(
    StudentSpec("unified", "wide"), dataclasses.replace(SIZES["nano"], neck=64), "mobilenetv4_conv_small_050"
  )
  old, own = narrow.state_dict(), wide.state_dict()
  found = {k: grown(v, own[k]) for k, v in old.items()}
  assert old.keys() == own.keys() and any(v.shape != own[k].shape for k, v in old.items())
  wide.load_state_dict(found)
  inputs = some_inputs(narrow)
  with torch.no_grad():
    want, got = narrow(**inputs), wide.eval()(**inputs)
  for k, v in want.items():
    assert_close(k, got[k].numpy(), v.numpy(), 1e-5)
  for a, b in (((3, 2), (2, 4)), ((3,), (3, 1)), ((4, 4, 3, 3), (8, 8, 5, 5)), ((), (3,))):
    assert grown(torch.zeros(a), torch.zeros(b)) is None


def test_a_pickle_with_code_is_not_opened(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "last.pt").write_bytes(pickle.dumps(Evil()))
  with pytest.raises(UserError, match="not opened"):
    load_checkpoint(tmp_path / "last.pt")
  torch.save({"x": Evil()}, tmp_path / "zip.pt")
  with pytest.raises(UserError, match="not opened"):
    load_checkpoint(tmp_path / "zip.pt")
  assert not (tmp_path / "evil").exists()


def test_another_backbones_trunk_starts_anew(capsys):
  """Layers of two backbones are called alike, and some have one shape: the first convolution."""
  state = {"backbone": "one", "ema": {"student.backbone.conv": 1, "student.neck.conv": 2, "student.depth.conv": 3}}
  assert initial.of_trunk(state, "other", "--init R")["ema"] == {"student.depth.conv": 3}
  assert "its backbone is one, and other is learned now" in capsys.readouterr().err
  assert initial.of_trunk(state, "one", "--init R") is state
