"""A file of the label store that is cut short, grown or gone is named, with what to do, by all that read it: no
traceback, and no zeros in its place."""

import sys

import pytest
from label_fixture import write_store

from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.distillation.batch import Batches, load
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.evaluation.evaluate import Options, evaluate
from openpilot.tools.fair.evaluation.scenes import open_segments
from openpilot.tools.fair.labels import browse as listing
from openpilot.tools.fair.labels.dataset import LabelDataset
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.lib.options import parse
from openpilot.tools.lib.errors import UserError, cli

SEGMENT = "00000001--aaaaaaaaaa--0"


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def grow(path):
  path.write_bytes(path.read_bytes() + b"junk")


HOW = {  # label of the simulator or the frames, what happens to the file of its second chunk
  "shard": ("simulator", "depth.zarr/c/1/0/0", cut),
  "frames": ("frames", "frame.zarr/c/1/0/0/0", cut),
  "gone": ("frames", "frame.zarr/c/1/0/0/0", lambda p: p.unlink()),
  "table": ("simulator", "objects/00001.parquet", grow),
}


@pytest.fixture(params=HOW)
def damaged(request, tmp_path):
  """-> the store, and the file's path."""
  store = write_store(tmp_path / "s", n=CHUNK + 8)
  teacher, name, damage = HOW[request.param]
  (group,) = store.groups(teacher, SEGMENT)
  path = group.path / name
  damage(path)
  return tmp_path / "s", path


def command(monkeypatch, capsys, main, *words):
  monkeypatch.setattr(sys, "argv", ["x", *map(str, words)])
  code = cli(main)()
  out = capsys.readouterr()
  return code, out.out, out.err


def test_op_labels_names_it(damaged, monkeypatch, capsys, tmp_path):
  root, path = damaged
  code, out, err = command(monkeypatch, capsys, listing.main, root)
  said = out + err
  assert (
    code == 1
    and f"damaged: chunk 1 of {SEGMENT}" in said
    and str(path) in said
    and "--repair" in said
    and "1 damaged chunks" in out
  )
  assert out.count("depth: float16[64, 128] m: min") >= 1  # of the groups that are whole
  code, out, err = command(monkeypatch, capsys, listing.main, root, "--video", tmp_path / "v.mp4")
  assert (
    code == 2
    and err.strip().splitlines()[-1].startswith(f"error: {path} is damaged")
    and "--repair" in err
    and not (tmp_path / "v.mp4").exists()
  )


def test_training_names_it(damaged, monkeypatch, capsys, tmp_path):
  root, path = damaged
  clips = Clips(root, ["depth", "objects"], 1)
  every = [(0, [i], False) for i in range(len(clips))]
  for workers in (0, 1):
    with pytest.raises(UserError) as e:
      for _ in load(Batches(clips, 0, False), every, workers):
        pass
    assert str(e.value).startswith(f"{path} is damaged") and "--repair" in str(e.value) and "\n" not in str(e.value)
  with pytest.raises(UserError, match="is damaged"):
    LabelDataset(root, ["frames/frame", "simulator/depth", "simulator/objects"]).__getitems__(list(range(2 * CHUNK)))


def test_evaluation_names_it(damaged, monkeypatch, tmp_path):
  root, path = damaged
  from test_evaluate import write_bundle

  bundle = write_bundle(tmp_path / "b", ("depth", "objects"))
  assert open_segments(root, {"simulator"}, [])
  with pytest.raises(UserError) as e:
    evaluate(parse(Options, None, "evaluate", [str(bundle), str(root), "--out", str(tmp_path / "out")]))
  assert (
    str(e.value).startswith(f"{path} is damaged") and "--repair" in str(e.value) and not (tmp_path / "out").exists()
  )


def test_distill_ends_with_one_line(tmp_path, monkeypatch, capsys):
  store = write_store(tmp_path / "s")
  for group in store.groups("simulator"):
    cut(group.path / "depth.zarr/c/0/0/0")
  words = [
    "--labels",
    tmp_path / "s",
    "--student",
    "depth-nano",
    "--out",
    tmp_path / "run",
    "--steps",
    2,
    "--batch",
    4,
    "--workers",
    1,
  ]
  code, _, err = command(monkeypatch, capsys, distill.main, *words)
  assert (
    code == 2
    and err.strip().splitlines()[-1].startswith("error: ")
    and "depth.zarr/c/0/0/0 is damaged" in err
    and "Traceback" not in err
  )


def test_an_array_without_its_description_is_named(tmp_path):
  store = write_store(tmp_path / "s")
  (group,) = store.groups("simulator", SEGMENT)
  grow(group.path / "depth.zarr" / "zarr.json")
  with pytest.raises(UserError, match=r"depth\.zarr.zarr\.json is damaged"):
    LabelStore(tmp_path / "s").groups("simulator", SEGMENT)[0].read("depth", 0, 1)
