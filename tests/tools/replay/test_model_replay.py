"""The regression of bundles: what has moved is found and measured, last bits are not."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fair_bundle import write_bundle
from openpilot.selfdrive.modeld.fair.bundle import MANIFEST, MODELS_DIR, load_bundle, write_manifest
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.route import Route
from openpilot.tools import model_replay
from openpilot.tools.model_replay import REFS, compare, drives, pack, replay_bundle, unpack
from openpilot.tools.sim.write_route import write_route


def said(frames=30, seed=0):
  r = np.random.default_rng(seed)
  frame = np.arange(frames, dtype=np.float16)[:, None]
  boxes = np.hstack(
    [np.repeat(np.arange(frames), 3)[:, None], np.tile([1, 2, 5], frames)[:, None], r.uniform(0, 200, (3 * frames, 4))]
  )
  return {
    "fairDepth.log": np.hstack([frame, r.uniform(1, 4, (frames, 128)).astype(np.float16)]),
    "fairObjects.#box": boxes.astype(np.float32),
  }


def test_what_moved_and_by_how_much():
  want = said()
  rows = {r["field"]: r for r in compare(want, unpack(pack(want)))}
  assert set(rows) == {"fairDepth.log", "fairObjects.box"} and not any(
    r["moved"] or r["max"] or r["parted"] for r in rows.values()
  )
  got = said()
  got["fairDepth.log"][:, 1:] += (
    np.random.default_rng(1).normal(0, 1e-3, (30, 128)).astype(np.float16)
  )  # a tenth of the tolerance
  got["fairObjects.#box"][7, 2] += 5  # one edge of 360, on an object's own
  rows = {r["field"]: r for r in compare(want, got)}
  assert not any(r["moved"] for r in rows.values()) and 0 < rows["fairDepth.log"]["max"] < 0.01
  assert rows["fairObjects.box"]["max"] == pytest.approx(5, abs=1e-3) and rows["fairObjects.box"]["frame"] == 2
  got["fairDepth.log"][12, 3:13] += 0.5  # ten cells of one frame are in reach, twenty are not
  row = compare(want, got)[0]
  assert not row["moved"] and row["beyond"] == 10 and row["frame"] == 12
  got["fairDepth.log"][12, 20:40] = np.nan
  row = compare(want, got)[0]
  assert row["moved"] and row["beyond"] == 30 and row["max"] == pytest.approx(0.5, abs=0.02)
  everywhere = said()
  everywhere["fairDepth.log"][:, 1:] *= 1.02
  row = compare(want, everywhere)[0]
  assert row["moved"] and row["mean"] == pytest.approx(0.05, abs=0.005)
  # of identities that one run has and the other never: all rows are without a partner
  some, none = {"a#": np.array([[3, 1, 0.5], [4, 1, 0.5]])}, {"a#": np.zeros((0, 3))}
  for x, y in ((some, none), (none, some)):
    row = compare(x, y)[0]
    assert row["moved"] and row["parted"] == 2 and row["values"] == 0 and row["frame"] == 3
  assert not compare(none, none)[0]["moved"]


def test_identities_and_fields_that_only_one_has():
  want, got = said(), said()
  got["fairObjects.#box"][got["fairObjects.#box"][:, 1] == 5, 1] = 6  # another identity in all frames
  row = compare(want, got)[1]
  assert row["moved"] and row["parted"] == 60 and row["max"] == 0
  assert [r["moved"] for r in compare(want, {k: v for k, v in want.items() if "Depth" in k})] == [False, True]
  assert [r["moved"] for r in compare(want, {k: v for k, v in want.items() if "Objects" in k})] == [True, False]


def change(bundle, factor):
  """The same bundle with all weights times a factor."""
  path = bundle.path / "scene.onnx"
  model = onnx.load(str(path))
  for i, w in enumerate(model.graph.initializer):
    model.graph.initializer[i].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w) * np.float32(factor), w.name))
  onnx.save(model, str(path))
  return write_manifest(bundle.path, {k: v for k, v in bundle.manifest.items() if k != "sha256"})


def test_a_bundle_against_its_reference(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(model_replay, "SECONDS", 0.4)
  there = {"simulated": (Route(write_route(tmp_path / "sim", seed=3, seconds=0.4)).segments, "road", 0.0)}
  bundle, refs = write_bundle(tmp_path / "tiny"), tmp_path / "refs"
  refs.mkdir()
  assert (
    not replay_bundle(bundle, there, refs, False)
    and "no reference: make one with model_replay" in capsys.readouterr().out
  )
  assert replay_bundle(bundle, there, refs, True)
  reference = json.loads((refs / "tiny.json").read_text())
  assert reference["manifest"] == bundle.manifest_hash and reference["drives"]["simulated"]["frames"] == 8
  assert replay_bundle(bundle, there, refs, False) and "8 frames, the same byte for byte" in capsys.readouterr().out
  # the last bits, as of another processor: not the same bytes, and a pass
  assert replay_bundle(change(bundle, 1 + 3e-5), there, refs, False)
  out = capsys.readouterr().out
  assert (
    "within the tolerance; not the same bytes, model frames are the same" in out
    and "the reference is of another manifest" in out
    and "MOVED" not in out
  )
  # what is learned anew has moved
  assert not replay_bundle(change(bundle, 1.3), there, refs, False)
  out = capsys.readouterr().out
  assert "simulated: 8 frames of 8, MOVED" in out
  assert any(line.split()[0] == "fairDepth.log" and line.endswith("MOVED") for line in out.splitlines() if line.strip())
  with pytest.raises(UserError, match="real drive is missing"):
    replay_bundle(bundle, {"real": None}, refs, True)


def test_data_that_was_named_must_be_there(tmp_path, capsys, monkeypatch):
  """The default folder may be absent: then that half is said to be unchecked."""

  def run(*words) -> int:
    monkeypatch.setattr(
      "sys.argv",
      ["model-replay", str(bundle), "--refs", str(tmp_path), "--cache", str(tmp_path / "cache"), *map(str, words)],
    )
    return cli(model_replay.main)()

  bundle = write_bundle(tmp_path / "tiny").path
  monkeypatch.setattr(model_replay, "write_route", lambda folder, *_: (tmp_path / "rendered").touch())
  monkeypatch.setattr(model_replay, "replay_bundle", lambda *_: True)
  monkeypatch.setattr(model_replay, "SHARED_DATA", tmp_path / "nope")
  monkeypatch.delenv("FAIR_SHARED_DATA", raising=False)
  assert run("--data", tmp_path / "nope") == 2
  assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nope'} is not there, and so no realdata/")
  assert run("--data", tmp_path) == 2 and f"{tmp_path} has no realdata/" in capsys.readouterr().err
  monkeypatch.setenv("FAIR_SHARED_DATA", str(tmp_path / "nope"))
  assert run() == 2 and "is not there" in capsys.readouterr().err
  assert not (tmp_path / "rendered").exists()  # refused before any work
  monkeypatch.delenv("FAIR_SHARED_DATA")
  monkeypatch.setattr(model_replay, "Route", lambda path: type("R", (), {"segments": []}))
  assert run() == 0 and (tmp_path / "rendered").exists()


def test_every_bundle_that_ships_has_a_reference():
  for folder in sorted(m.parent for m in MODELS_DIR.glob(f"*/{MANIFEST}")):
    reference = json.loads((REFS / f"{folder.name}.json").read_text())
    assert reference["manifest"] == load_bundle(folder).manifest_hash and set(reference["drives"]) == {
      "real",
      "simulated",
    }
    assert (REFS / f"{folder.name}.json").stat().st_size < 150_000  # boxes of forty frames grow with what is found
    said = {name: unpack(run["values"]) for name, run in reference["drives"].items()}
    assert all(run["frames"] == 40 for run in reference["drives"].values()) and said["simulated"]
    heads = {o.get("head") for g in load_bundle(folder).graphs for o in g["outputs"]}
    for head, value in (("depth", "fairDepth.log"), ("segmentation", "fairSegmentation.share")):
      assert all((value in values) == (head in heads) for values in said.values())


@pytest.mark.slow
def test_bundles_that_ship_say_what_they_said(tmp_path, shared_data, capsys):
  there = drives(shared_data, tmp_path)
  assert there["real"] is not None and there["simulated"] is not None
  for folder in sorted(m.parent for m in MODELS_DIR.glob(f"*/{MANIFEST}")):
    assert replay_bundle(load_bundle(folder), there, REFS, False), capsys.readouterr().out
