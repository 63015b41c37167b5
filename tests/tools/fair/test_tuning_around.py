"""Tuning teachers: what is kept from epoch to epoch, bases of the hub, and what TensorBoard is told."""

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from hub import served
from test_train_teacher import loop_of, make_place, options, run

from openpilot.tools.fair.grounded_sam import tune
from openpilot.tools.fair.grounded_sam.two_stage import GroundedSAM
from openpilot.tools.fair.images import train_teacher
from openpilot.tools.learn.device import choose_device
from openpilot.tools.lib.errors import UserError

SIDE, CHANNELS = 8, 32  # of a small SAM's map


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  return make_place(tmp_path_factory.mktemp("platform"))


@pytest.mark.parametrize("room, kept", [(1.0, 8), (2.5 * CHANNELS * SIDE * SIDE * 4 / 2**30, 2), (0.0, 0)])
def test_what_the_frozen_encoder_says_is_kept_and_changes_nothing(place, tmp_path, monkeypatch, capsys, room, kept):
  """Over epochs, mirrored or not: the same losses, and each picture is looked at once each way."""
  losses, asked = [], []
  for cache in (0.0, room):
    loop = loop_of(place, "sam", tmp_path / str(cache), cache=cache)
    tune.ready(loop)
    plain, calls = loop.segmenter.embed, []
    monkeypatch.setattr(loop.segmenter, "embed", lambda x, plain=plain, calls=calls: (calls.append(1), plain(x))[1])
    said = []
    for epoch in range(4):
      loop.step = epoch  # whether a picture is mirrored is of the step
      said.append([float(v) for v in loop.losses(([0, 1, 2, 3], 4)).values()])
    losses.append(said)
    asked.append(len(calls))
  assert losses[0] == losses[1] and len({x[0] for x in losses[0]}) == 4
  assert asked[0] == 16 and len(loop.kept) <= kept
  assert asked[1] == len(loop.kept) if room == 1 else asked[1] > 4
  assert ("fills --cache" in capsys.readouterr().err) == (kept == 2)


def test_an_encoder_that_learns_is_asked_every_time(place, tmp_path):
  loop = loop_of(place, "sam", tmp_path, targets="everywhere")
  loop.losses(([0, 1], 2))["total"].backward()
  assert not loop.kept


@pytest.fixture
def hub(place, tmp_path, monkeypatch):
  """Small bases by the names that a hub would have; weights in pickles lie beside them. -> what is asked for."""
  from huggingface_hub import constants

  folders = {}
  for kind in ("dino", "sam"):
    folders[f"someone/tiny-{kind}"] = Path(shutil.copytree(place / kind, tmp_path / "served" / kind))
    (tmp_path / "served" / kind / "pytorch_model.bin").write_bytes(b"code")
  with served(folders) as (url, asked):
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("FAIR_WEIGHTS", str(tmp_path / "none"))
    yield asked


def from_hub(*words):
  return options("--grounding-dino", "someone/tiny-dino", "--sam", "someone/tiny-sam", "--device", "cpu", *words)


def test_bases_are_downloaded_where_that_is_asked_for(hub):
  """Never by themselves; no pickle; and afterwards they are here."""
  with pytest.raises(UserError, match=r"no weights 'someone/tiny-sam'.* with --download"):
    train_teacher.find_base(from_hub(), "sam")
  assert not hub
  device = choose_device("cpu", "float32")
  for key, name in (("sam", "someone/tiny-sam"), ("grounding_dino", "someone/tiny-dino")):
    path, base = train_teacher.find_base(from_hub("--download"), key)
    assert base == name and path.is_dir()
    assert train_teacher.load_base(from_hub(), key, path, device).model is not None
  assert any(p.endswith("/model.safetensors") for p in hub) and not any(p.endswith(".bin") for p in hub)
  count = len(hub)
  assert train_teacher.find_base(from_hub(), "sam")[0].is_dir() and len(hub) == count
  with pytest.raises(UserError, match=r"someone/other could not be downloaded"):
    train_teacher.find_base(options("--sam", "someone/other", "--download"), "sam")


@pytest.mark.slow
def test_tuning_a_base_of_the_hub_leaves_its_name(place, tmp_path, hub):
  out = tmp_path / "exp"
  words = ["--sam", "someone/tiny-sam", "--download", "--teachers", "sam", "--epochs", "1"]
  said = run(place, out, *words, val=None)
  assert said["teachers"]["sam"]["base"] == "someone/tiny-sam" and "cache" not in (out / "metadata.json").read_text()
  count = len(hub)
  assert GroundedSAM.of(out, "cpu").has_masks and len(hub) == count  # from the cache


def test_tensorboard_is_told_what_the_log_is(place, tmp_path):
  """Losses of steps and held-out metrics."""
  pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install -e .[track]")
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

  out = tmp_path / "exp"
  run(place, out, "--teachers", "sam", "--epochs", "20", "--batch-size", "4", "--trackers", "tensorboard", val="train")
  lines = [json.loads(x) for x in (out / "runs/sam/log.jsonl").read_text().splitlines()]
  folders = {p.parent for p in (out / "logs").rglob("events.out.tfevents.*")}
  folder = min(folders, key=lambda p: len(p.parts))  # the options lie in one below
  events = EventAccumulator(str(folder)).Reload()
  for tag, want in (
    ("loss", {x["step"]: x["loss"] for x in lines if "loss" in x}),
    ("val/mask_iou", {x["step"]: x["val"]["mask_iou"] for x in lines if x["step"] and x.get("val")}),
  ):
    got = {e.step: e.value for e in events.Scalars(tag)}
    assert got.keys() == want.keys() and len(got) > 0
    assert all(got[k] == pytest.approx(want[k], rel=1e-5) for k in got)
