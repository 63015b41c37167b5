"""Teachers' options from the command line, as far as the key of the labels that they decide; and what is refused before
anything is stored."""

import numpy as np
import pytest
import torch
import transformers
from dino_models import save_folder

from openpilot.tools.fair import list_teachers as teachers
from openpilot.tools.fair.labels import label as labeling
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.options import options_of, parse_options
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Entry, joint_license
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.videowriter import VideoWriter
from sam2_models import save as save_sam2

W, H = 526, 330


@pytest.fixture(scope="module")
def route(tmp_path_factory):
  """Four frames of noise, no log."""
  folder = tmp_path_factory.mktemp("videos") / "0000002c--d68dde99ca--0"
  folder.mkdir()
  r = np.random.default_rng(3)
  with VideoWriter(folder / "qcamera.ts", W, H, 15, 30) as v:
    for _ in range(4):
      v.write(r.integers(0, 256, (H // 10, W // 2, 3), dtype=np.uint8).repeat(10, 0).repeat(2, 1))
  return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
  torch.manual_seed(0)
  config = transformers.Dinov2Config(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14
  )
  return save_folder(
    transformers.Dinov2Model(config),
    tmp_path_factory.mktemp("dinov2") / "m",
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
    resample=3,
  )


def command(monkeypatch, *words, main=labeling.main) -> int:
  monkeypatch.setattr("sys.argv", ["x", *map(str, words)])
  return cli(main)()


def error(capsys) -> str:
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
  return line


def test_every_teacher_says_what_can_be_chosen():
  there = {name: options_of(name) for name in TEACHERS}
  assert not there["openpilot"] and not there["simulator"]
  for name, wanted in {
    "sam3": {"prompts", "max_objects", "lost_after", "precision"},
    "dinov2-base": {"layers", "depth_head", "max_depth", "outputs", "unit", "scale", "precision"},
    "dinov3-vits16": {"resize", "scale", "precision"},
    "sam2.1-tiny": {"detector", "detector_weights", "every", "join_iou", "max_objects", "lost_after", "precision"},
    "raft-tracker": {"scale", "iters", "points", "spacing", "limit", "max_age", "fb_pixels", "fb_share", "precision"},
    "cotracker3-offline": {"window", "hop", "points", "spacing", "limit", "max_age", "precision"},
    "yolox-tracker": {"flow", "turn", "lost_after", "start_score", "precision"},
    "detr-resnet-50": {"score", "batch", "table", "precision"},
    "yolox-nano": {"score", "iou"},
  }.items():
    assert wanted <= set(there[name]), name
  never = {"name", "entry", "path", "weights", "license", "device", "config", "mode", "load", "seeds", "groups"}
  assert not any(never & set(o) for o in there.values()) and "detector" not in there["yolox-tracker"]
  assert there["sam2.1-tiny"]["detector"].default == "yolox-nano"  # the registry's, not the constructor's
  assert there["dpt-dinov2-small-kitti"]["unit"].default == "m"


def test_values_are_of_the_annotated_kind():
  got = parse_options(
    [
      "sam3.prompts=car,traffic light",
      "dinov2-base.layers=-4,-1",
      "dinov2-base.scale=2",
      "sam2.1-tiny.every=5",
      "yolox-tracker.flow=Yes",
      "dinov2-base.depth_head=a=b.pth",
    ],
    ["sam3", "dinov2-base", "sam2.1-tiny", "yolox-tracker", "openpilot"],
  )
  assert got == {
    "sam3": {"prompts": ("car", "traffic light")},
    "dinov2-base": {"layers": (-4, -1), "scale": 2.0, "depth_head": "a=b.pth"},
    "sam2.1-tiny": {"every": 5},
    "yolox-tracker": {"flow": True},
    "openpilot": {},
  }
  assert isinstance(got["dinov2-base"]["scale"], float)
  for name in TEACHERS:  # what the list shows can be written back
    for option in options_of(name).values():
      assert option.default in (None, ()) or option.parse(option.default_text) in (
        option.default,
        tuple(np.atleast_1d(option.default)),
      )


@pytest.mark.parametrize(
  ("option", "message"),
  [
    ("dinov2-small.layers=four", "layers is a whole number, or several separated by commas, not 'four'"),
    ("dinov2-small.layers=1,,2", "layers is a whole number"),
    ("dinov2-small.layers=9", "layers (9,) of a DINOv2 with 4 blocks"),
    ("dinov2-small.scale=nan", "scale is a number, not 'nan'"),
    ("dinov2-small.scale=-1", "scale is -1.0; at least"),
    ("dinov2-small.words=car", "has no option 'words'; it has layers, depth_head"),
    ("dinov2-small=3", "write TEACHER.key=value"),
    ("sam3.prompts=car", "with one of --teachers (dinov2-small)"),
    ("dinov2-small.precision=int4", "precision 'int4' is not known"),
    ("dinov2-small.depth_head=/nowhere.pth", "no depth head at /nowhere.pth"),
  ],
)
def test_bad_options_are_one_line(route, dinov2, tmp_path, monkeypatch, capsys, option, message):
  words = (
    route,
    "--teachers",
    "dinov2-small",
    "--weights",
    f"dinov2-small={dinov2}",
    "--device",
    "cpu",
    "--out",
    tmp_path / "s",
  )
  assert command(monkeypatch, *words, "--option", option) == 2
  assert message in error(capsys) and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("sam2.1-tiny", {"every": 0}), ("sam2.1-tiny", {"max_objects": 0}), ("sam3", {"lost_after": -1}),
    ("raft-tracker", {"iters": 0}), ("raft-tracker", {"spacing": 0}), ("yolox-tracker", {"gate": -1.0}),
    ("detr-resnet-50", {"batch": 0}), ("yolox-nano", {"score": -0.1}), ("twinlitenet", {"score": 0.5}),
  ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused(tmp_path, name, options):
  with pytest.raises(UserError, match=f"teacher '{name}'.*{next(iter(options))}"):
    load_teacher(name, tmp_path, ["SAM"], **options)


def test_options_decide_the_labels_and_their_key(route, dinov2, tmp_path, monkeypatch, capsys):
  words = (
    route,
    "--teachers",
    "dinov2-small",
    "--weights",
    f"dinov2-small={dinov2}",
    "--device",
    "cpu",
    "--out",
    tmp_path / "s",
    "--no-frames",
  )
  assert command(monkeypatch, *words) == 0
  assert command(monkeypatch, *words, "--option", "dinov2-small.layers=1,3", "--option", "dinov2-small.scale=0.5") == 0
  assert "stale: " in capsys.readouterr().out
  plain, both = sorted(LabelStore(tmp_path / "s").groups(), key=lambda g: len(g.meta["teacher"]["settings"]["layers"]))
  assert (
    plain.path != both.path
    and both.meta["teacher"]["settings"]["layers"] == [1, 3]
    and both.meta["teacher"]["settings"]["scale"] == 0.5
  )
  assert plain.label("features").shape == (32, 16, 32) and both.label("features").shape == (64, 16, 32)
  assert abs(plain.meta["picture"]["width"] - 2 * both.meta["picture"]["width"]) <= 14  # half as fine
  assert (
    command(monkeypatch, *words, "--option", "dinov2-small.layers=3", "--prune") == 0
  )  # -1 by another name: nothing new
  assert [g.path for g in LabelStore(tmp_path / "s").groups()] == [plain.path]


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (("--teachers", ""), "--teachers names nobody; `tools/op.sh teachers`"),
    (("--teachers", " , "), "--teachers names nobody"),
    (("--teachers", "simulator"), "teacher 'simulator' reads the truth beside a log"),
    (("--teachers", "openpilot"), "teacher 'openpilot' reads the route's log"),
  ],
)
def test_what_cannot_be_labeled_is_refused_before_a_frame_is_stored(
  route, tmp_path, monkeypatch, capsys, words, message
):
  assert command(monkeypatch, route, *words, "--out", tmp_path / "s") == 2
  assert message in error(capsys) and not (tmp_path / "s").exists()


def test_the_simulators_teacher_refuses_a_real_route(shared_data, tmp_path, monkeypatch, capsys):
  real = shared_data / "realdata" / "0000002c--d68dde99ca--1"  # with a log
  assert command(monkeypatch, real, "--teachers", "simulator", "--camera", "qcamera", "--out", tmp_path / "s") == 2
  assert str(real) in error(capsys) and not (tmp_path / "s").exists()


def test_a_helper_is_under_the_same_flags(tmp_path, monkeypatch):
  """SAM 2's detector: chosen by an option; its license must be accepted too, and stays with the labels."""
  save_sam2("sam2_video", tmp_path / "sam")
  asked = []

  class Boxes:
    name, checkpoint_hash, license = "boxes", "1" * 64, "DINOv3"

    def settings(self):
      return {}

  def boxes(name, entry, path, device=None):
    asked.append(device)
    return Boxes()

  monkeypatch.setattr("openpilot.tools.fair.detr.teacher.boxes", boxes, raising=False)
  monkeypatch.setitem(TEACHERS, "boxes", Entry("detr.teacher:boxes", "", "DINOv3", "", ""))
  with pytest.raises(UserError, match="teacher 'boxes' is under the license DINOv3"):
    load_teacher("sam2.1-tiny", tmp_path / "sam", device="cpu", detector="boxes")
  teacher = load_teacher("sam2.1-tiny", tmp_path / "sam", ["DINOv3"], device="cpu", detector="boxes")
  assert teacher.license == "DINOv3" and asked == ["cpu"] and teacher.settings()["detector"]["name"] == "boxes"
  with pytest.raises(UserError, match="at once"):
    joint_license("t", "SAM", "DINOv3")
  assert joint_license("t", "MIT", "BSD-3-Clause") == "MIT"


def test_the_list_shows_options_and_keeps_its_columns(monkeypatch, capsys):
  assert command(monkeypatch, main=teachers.main) == 0
  lines = capsys.readouterr().out.splitlines()
  at = lines[0].index("license")
  assert len(max(TEACHERS, key=len)) > 34
  for line, (name, entry) in zip(lines[1:], TEACHERS.items(), strict=False):
    assert line.startswith(name) and line[at - 2 : at] == "  " and line[at:].startswith(entry.license)
  assert command(monkeypatch, "sam3", "openpilot", main=teachers.main) == 0
  out = capsys.readouterr().out
  assert "--option sam3.prompts=car,truck" in out and "--option sam3.max_objects=64" in out and "no options" in out
  assert command(monkeypatch, "nobody", main=teachers.main) == 2 and "no teacher 'nobody'" in error(capsys)
