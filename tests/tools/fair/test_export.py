"""From a training run to a bundle that the runtime loads: what was not learned is not published, what is unfinished is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from label_fixture import write_store

from openpilot.selfdrive.modeld.fair.bundle import load_bundle
from openpilot.selfdrive.modeld.fair.runners.onnx import OnnxRunner
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.optimize import export
from openpilot.tools.lib.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  root = tmp_path_factory.mktemp("export")
  write_store(root / "s", licence="CC-BY-NC-4.0")
  argv = ["distill", "--labels", root / "s", "--student", "depth-nano", "--out", root / "run", "--steps", 3, "--batch", 4, "--eval-every", 2, "--workers", 0]
  with pytest.MonkeyPatch.context() as m:
    m.setattr(sys, "argv", [*map(str, argv), "--accept-licence", "CC-BY-NC-4.0"])
    distill.main()
  return root / "run"


def export_to(monkeypatch, *args):
  monkeypatch.setattr(sys, "argv", ["export", *map(str, args)])
  export.main()


def test_a_run_becomes_a_bundle(run, tmp_path, monkeypatch):
  out = tmp_path / "models" / "my-depth"
  with pytest.raises(UserError, match="CC-BY-NC-4"):
    export_to(monkeypatch, run, "--out", out)
  assert not out.exists()
  for _ in range(2):  # a second time it is replaced whole
    export_to(monkeypatch, run, "--out", out, "--accept-licence", "CC-BY-NC-4.0", "--labels", run.parent / "s")
  bundle = load_bundle(out)
  assert [o["name"] for o in bundle.graphs[0]["outputs"]] == ["depth"]  # nobody taught features
  p = bundle.manifest["provenance"]
  assert p["licence"] == "CC-BY-NC-4.0" and p["teachers"] == [{"model": "simulator", "checkpoint_hash": "a", "licence": "CC-BY-NC-4.0"}]
  assert any(m["name"] == "held-out loss depth/metric" for m in bundle.manifest["metrics"])
  assert "Not made for real streets" in (out / "README.md").read_text() and [x.name for x in out.parent.iterdir()] == ["my-depth"]
  student, _, _ = export.load_student(run)
  frame = np.random.default_rng(0).integers(0, 256, (1, 6, 128, 256), dtype=np.uint8)
  got = OnnxRunner(out / bundle.graphs[0]["file"], bundle.graphs[0], 1).run({"frame": frame})
  want = student(torch.from_numpy(frame))["depth"].detach().numpy()
  assert np.allclose(got["depth"], want, atol=1e-3)  # log metres, float32 summed in another order


def test_an_evaluation_goes_into_the_card(run, tmp_path, monkeypatch):
  (tmp_path / "e.json").write_text(json.dumps({"metrics": [{"name": "abs_rel", "value": 0.125, "data": "held-out routes"}]}))
  out = tmp_path / "b"
  export_to(monkeypatch, run, "--out", out, "--accept-licence", "CC-BY-NC-4.0", "--evaluation", tmp_path / "e.json")
  assert "| abs_rel | 0.125 | held-out routes |" in (out / "README.md").read_text()
  (tmp_path / "e.json").write_text("{}")
  with pytest.raises(UserError, match="no evaluation's JSON"):
    export_to(monkeypatch, run, "--out", out, "--accept-licence", "CC-BY-NC-4.0", "--evaluation", tmp_path / "e.json")


def test_an_unfinished_run_is_refused(run, tmp_path, monkeypatch):
  unfinished = tmp_path / "run"
  unfinished.mkdir()
  for name in ("best.pt", "environment.json", "log.jsonl"):
    (unfinished / name).write_bytes((run / name).read_bytes())
  state = torch.load(run / "last.pt", weights_only=True)
  torch.save({**state, "step": 2}, unfinished / "last.pt")
  with pytest.raises(UserError, match="at step 2 of 3; let it finish"):
    export_to(monkeypatch, unfinished, "--out", tmp_path / "b", "--accept-licence", "CC-BY-NC-4.0")
  assert not (tmp_path / "b").exists()
