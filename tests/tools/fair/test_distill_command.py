"""`op distill` as typed: what is wrong is said before anything is written, a run goes on only as the run that it was,
and one at a time is in a folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from label_fixture import interrupted, same, write_store

from openpilot.tools.learn.checkpoint import load_checkpoint
from openpilot.tools.fair.distillation import distill, initial
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.look import Look
from openpilot.tools.fair.distillation.options import Options, configuration, trunk_of
from openpilot.tools.fair.distillation.trained import trained_on
from openpilot.tools.fair.distillation.config import Config, Stage
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.fair.spec import InputSpec
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.lock import only_one
from openpilot.tools.lib.options import parse


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
  root = tmp_path_factory.mktemp("labels") / "s"
  write_store(root)
  return root


def make_run(root, out, **more):
  out.mkdir(parents=True, exist_ok=True)
  return Run(
    Config("depth-nano", ["depth"], steps=2, batch=4, **more), Clips(root, ["depth"], 1), None, out, "labels", workers=0
  )


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (("--student", "dinosaur"), "no student 'dinosaur'; there are"),
    (("--student", "depth-nano", "--tasks", "points"), "depth-nano cannot learn it"),
    (("--student", "depth-nano", "--weight", "depth"), "write TASK=NUMBER"),
    (("--student", "depth-nano", "--clip", "8", "--batch", "4"), "--batch-size 4: it is at least the clip's 8 frames"),
    (("--student", "depth-nano", "--steps", "0"), "or 0 to put together what --init names"),
    (("--student", "depth-nano", "--eval-every", "0"), "--eval-every 0: it is at least 1"),
    (("--student", "depth-nano", "--workers", "-1"), "--workers -1: it is at least 0"),
    (("--student", "depth-nano", "--clip", "0"), "--clip 0: it is at least 1"),
    (("--student", "depth-nano", "--overfit", "-1"), "--overfit -1: it is at least 0"),
    (("--student", "depth-nano", "--lr", "0"), "--lr 0: the learning rate is above 0"),
    (("--student", "depth-nano", "--lr", "-1"), "--lr -1: the learning rate is above 0"),
    (("--student", "depth-nano", "--lr", "nan"), "--lr nan: the learning rate is above 0"),
    (("--student", "depth-nano", "--weight", "depth=nan"), "--weight depth=nan"),
    (("--student", "depth-nano", "--trackers", "foo"), "--trackers foo: there are tensorboard, trackio"),
    (("--student", "depth-nano", "--init", "nowhere"), "nowhere"),
    (("--student", "depth-nano", "--sample", "night*"), "--sample night[*]: write SEGMENTS=W"),
    (("--student", "depth-nano", "--sample", "night*=-1"), "a number from 0 to 100"),
    (("--student", "depth-nano", "--sample", "night*=2"), "night[*]=2 fits no segment that is learned from; they are "),
    (("--student", "depth-nano", "--sample", "*=0"), "leaves nothing to draw"),
    (("--student", "depth-nano", "--sample", "*=2", "--overfit", "2"), "leave one of them out"),
    (("--student", "depth-nano", "--light", "0.5"), "--light 0.5: it is a strength from 1 to 4"),
    (("--student", "depth-nano", "--light", "nan"), "--light nan"),
    (("--student", "depth-nano", "--night", "1.5"), "--night 1.5: it is a share, from 0 to 1"),
    (("--student", "depth-nano", "--night", "nan"), "--night nan"),
    (("--student", "depth-nano", "--night", "0.2", "--no-augment"), "--night and --no-augment"),
    (("--student", "depth-nano", "--resume"), "no checkpoint to go on from"),
  ],
)
def test_bad_input_is_said(labels, tmp_path, monkeypatch, args, message):
  monkeypatch.setattr(sys, "argv", ["distill", "--labels", str(labels), "--out", str(tmp_path / "run"), *args])
  with pytest.raises(UserError, match=message):
    distill.main()
  assert not (tmp_path / "run" / "config.json").exists()


def argv(monkeypatch, labels, out, *args):
  words = [
    "--labels",
    labels,
    "--student",
    "depth-nano",
    "--out",
    out,
    "--steps",
    2,
    "--batch",
    4,
    "--eval-every",
    2,
    "--workers",
    0,
    *args,
  ]
  monkeypatch.setattr(sys, "argv", ["distill", *map(str, words)])


@pytest.mark.parametrize(
  ("stages", "message"),
  [
    ("{}", "no stages are in it"),
    ("[]", "no stages are in it"),
    ("[{}]", "steps"),
    ("[{steps: 0}]", "steps: 0 is no number of at least 1"),
    ("[{steps: 2, lr: -1}]", "lr: -1 is no factor above 0"),
    ("[{steps: 2, tasks: depth}]", "tasks: depth is no list"),
    ("[{steps: 2, tasks: [dpeth]}]", "'dpeth' is no task of this run; it learns depth"),
    ("[{steps: 2, freeze: [backbon3]}]", "freeze 'backbon3' is no part of depth-nano; it has backbone, depth"),
    ("[{steps: 2, wheels: 4}]", "wheels"),
    ("[", "write a list of"),
  ],
)
def test_stages_that_would_do_nothing_are_refused(labels, tmp_path, monkeypatch, stages, message):
  (tmp_path / "stages.yaml").write_text(stages)
  argv(monkeypatch, labels, tmp_path / "run", "--stages", tmp_path / "stages.yaml")
  with pytest.raises(UserError, match=message):
    distill.main()
  assert not (tmp_path / "run").exists()


def test_a_stage_that_freezes_all_is_refused(labels, tmp_path):
  r = make_run(labels, tmp_path, stages=[Stage(steps=2, freeze=[""])])
  with pytest.raises(UserError, match="all that its tasks learn is frozen"):
    r.fit()


def test_a_tracker_that_is_not_installed_is_named(labels, tmp_path, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  argv(monkeypatch, labels, tmp_path / "run", "--trackers", "tensorboard")
  with pytest.raises(UserError, match=r"tensorboard is not installed: `pip install -e .\[track\]`"):
    distill.main()


def test_one_run_at_a_time_in_a_folder(labels, tmp_path, monkeypatch):
  out = tmp_path / "run"
  out.mkdir()
  argv(monkeypatch, labels, out)
  with only_one(out, "x"), pytest.raises(UserError, match=r"another run is writing .*run; wait for it"):
    distill.main()
  assert [p.name for p in out.iterdir()] == [".lock"]
  assert distill.main() is None and (out / "last.pt").exists()


def test_a_runs_folder_starts_it_again_and_goes_on(labels, tmp_path, monkeypatch):
  """Also from another folder than the first was started in, and where what is said of the run is published."""
  run, other = tmp_path / "run", tmp_path / "other"
  monkeypatch.chdir(labels.parent)
  argv(monkeypatch, labels.name, run, "--seed", 7, "--weight", "depth=2", "--no-augment")
  distill.main()
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["distill", "--config", str(run), "--output", str(other)])
  with interrupted(1):
    distill.main()
  monkeypatch.setattr(sys, "argv", ["distill", "--config", str(other)])
  with pytest.raises(UserError, match="holds a run at step 1 of 2; add --resume"):
    distill.main()
  monkeypatch.setattr(sys, "argv", ["distill", "--config", str(other), "--resume"])
  distill.main()
  first, again = (load_checkpoint(p / "last.pt") for p in (run, other))
  assert again["step"] == 2 and same(first, again)
  said = [json.loads((p / "environment.json").read_text())["command"] for p in (run, other)]
  assert "--config" not in said[1] and said[1].replace(str(labels), labels.name).replace("other", "run") == said[0]


def test_resume_compares_and_says_what_changed(labels, tmp_path, monkeypatch, capsys):
  """--overfit is a part of the configuration; other labels, and a checkpoint of another kind, are no run to go on from;
  and --init is not taken again."""
  root, out, first = tmp_path / "s", tmp_path / "run", tmp_path / "first"
  write_store(root)
  argv(monkeypatch, root, first, "--seed", 5)
  distill.main()
  argv(monkeypatch, root, out, "--init", first, "--steps", 4)
  with interrupted(3):
    distill.main()
  argv(monkeypatch, root, out, "--init", first, "--steps", 4, "--resume", "--overfit", 2)
  with pytest.raises(UserError, match="overfit 0 then, 2 now"):
    distill.main()
  old = load_checkpoint(out / "last.pt")
  del old["config"]["overfit"], old["trained"]  # as it was written before there were such
  torch.save(old, out / "last.pt")
  argv(monkeypatch, root, out, "--init", first, "--steps", 4, "--resume")
  distill.main()
  resumed = load_checkpoint(out / "last.pt")
  argv(monkeypatch, root, tmp_path / "whole", "--init", first, "--steps", 4)
  distill.main()
  assert resumed["step"] == 4 and same(resumed, load_checkpoint(tmp_path / "whole" / "last.pt"))
  write_store(root, routes=("00000003--cccccccccc",))
  argv(monkeypatch, root, out, "--init", first, "--steps", 4, "--resume")
  with pytest.raises(
    UserError, match=r"labels of .* have changed.*without --resume a new run starts from the student there"
  ):
    distill.main()
  assert not (out / "before.pt").exists() and same(load_checkpoint(out / "last.pt")["model"], resumed["model"])
  torch.save({"step": 1}, out / "last.pt")
  with pytest.raises(UserError, match=r"last\.pt lacks config, labels, best.*no checkpoint of"):
    distill.main()
  argv(monkeypatch, root, tmp_path / "other", "--init", out / "last.pt")
  with pytest.raises(UserError, match=r"last\.pt lacks config, ema, provenance"):
    distill.main()
  torch.save([1], out / "last.pt")
  with pytest.raises(UserError, match=r"last\.pt lacks everything"):
    distill.main()


def test_the_backbone_is_that_of_what_it_starts_from(tmp_path, monkeypatch, capsys):
  """Unless --backbone says another; a run that goes on has its own, and a part of a run says nothing."""
  run, bundle, other = (tmp_path / name for name in ("run", "bundle", "other"))
  for folder, name, backbone in ((run, "config.json", "one"), (bundle, "manifest.json", "two"), (other, "x", None)):
    folder.mkdir()
    (folder / name).write_text(json.dumps({"backbone": backbone}))
  (run / "last.pt").touch()
  said = lambda *init, **more: trunk_of(  # noqa: E731
    Options(labels=tmp_path, output=other, student="depth-nano", init=tuple(map(str, init)), **more)
  )
  assert said() is None and said(run) == said(run / "last.pt") == said(run, bundle) == "one" and said(bundle) == "two"
  assert "backbone two, as" in capsys.readouterr().out
  assert said(run, backbone="three") == "three" and said(f"{run}:lanes") is None and said(other) is None
  assert said(run, resume=True) is None  # `other` is the run that goes on
  (other / "config.json").write_text('{"backbone": "four"}')
  assert said(run, resume=True) == said(tmp_path / "gone", resume=True) == "four"
  (run / "config.json").write_text("{")
  assert said(run) is None


def test_it_is_known_what_a_student_was_trained_on(labels, tmp_path):
  """Its own segments and those of what it started from; of a checkpoint from before they were kept, what
  environment.json says, or that it is not known."""
  first = make_run(labels, tmp_path / "a")
  mine = sorted(s.name for s in first.train.segments)
  first.save("best.pt")
  assert load_checkpoint(tmp_path / "a" / "best.pt")["trained"] == {"segments": mine, "unknown": []}
  write_store(tmp_path / "s", routes=("00000009--dddddddddd",))
  second = make_run(tmp_path / "s", tmp_path / "b")
  second.warm_start(initial.initial([str(tmp_path / "a")], second.train))
  assert second.trained == {"segments": [*mine, "00000009--dddddddddd--0"], "unknown": []}
  old = {k: v for k, v in load_checkpoint(tmp_path / "a" / "best.pt").items() if k != "trained"}
  assert trained_on(old, tmp_path / "a") == {"segments": [], "unknown": ["a"]}
  (tmp_path / "a" / "environment.json").write_text(
    json.dumps({"segments": ["x--0"], "command": "--labels s --init models/y"})
  )
  assert trained_on(old, tmp_path / "a") == {"segments": ["x--0"], "unknown": ["a"]}


def test_former_names_of_options_are_taken():
  words = ["--labels", "x", "--student", "depth-nano", "--out", "o", "--batch", "8", "--accept-licence", "X"]
  args = parse(Options, None, "distill", words)
  assert args.output == Path("o") and args.batch_size == 8 and args.accept_license == ("X",)
  new = {"--out": "--output", "--batch": "--batch-size", "--accept-licence": "--accept-license"}
  assert parse(Options, None, "distill", [new.get(w, w) for w in words]) == args


def test_restricted_licenses_are_asked_for(tmp_path, monkeypatch):
  write_store(tmp_path / "s", license="CC-BY-NC-4.0")
  monkeypatch.setattr(
    sys, "argv", ["distill", "--labels", str(tmp_path / "s"), "--student", "depth-nano", "--out", str(tmp_path / "run")]
  )
  with pytest.raises(UserError, match=r"--accept-license CC-BY-NC-4\.0"):
    distill.main()
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [None, "no", "fp16"])
@pytest.mark.parametrize("able", [False, True])
def test_precision_is_what_is_said_else_what_the_gpu_has(labels, monkeypatch, given, able):
  monkeypatch.setattr(torch.cuda, "is_available", lambda: able)
  monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: able)
  args = [
    "--labels",
    str(labels),
    "--student",
    "depth-nano",
    "--out",
    "x",
    *(() if given is None else ("--precision", given)),
  ]
  config, live = configuration(parse(Options, None, "distill", args), Look(labels))
  assert config.precision == (given or ("bf16" if able else "no")) and live is None


def test_pictures_of_any_camera_are_not_made_night(labels, monkeypatch):
  """Where the road is is known of the view alone."""
  args = ("--labels", str(labels), "--output", "x", "--student", "depth-nano", "--night", "0.2")
  options = parse(Options, None, "distill", args)
  assert configuration(options, Look(labels))[0].night == 0.2
  monkeypatch.setattr(Look, "picture", lambda self: InputSpec("rgb", 160, 224))
  with pytest.raises(UserError, match=r"--night .*: it knows where the road is in the view"):
    configuration(options, Look(labels))
