"""tools/fair/detr/rented_gpu.sh, with stand-ins for the hub and for what it starts."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools/fair/detr/rented_gpu.sh"
HUB = """
import os, shutil
from pathlib import Path
from huggingface_hub.errors import RepositoryNotFoundError

def place(repo):
  if os.environ.get("SILENT") == repo:
    raise ConnectionError("the hub does not answer")
  where = Path(os.environ["HUB"]) / repo
  if not where.exists():
    raise RepositoryNotFoundError(repo)
  return where

def list_repo_files(repo):
  return [str(p.relative_to(place(repo))) for p in place(repo).rglob("*") if p.is_file()]

def snapshot_download(repo, local_dir, **_):
  shutil.copytree(place(repo), local_dir, dirs_exist_ok=True)
"""
OP = """#!/usr/bin/env bash
if [ "$1" = python ]; then shift; [ "$1" = -m ] && exit 0; exec "$PYTHON" "$@"; fi
printf '%s\\n' "$@" > started
"""


@pytest.fixture
def machine(tmp_path):
  """A fresh machine's checkout: the script, and stand-ins."""
  root = tmp_path / "tree"
  (root / "tools/fair/detr").mkdir(parents=True)
  shutil.copy(SCRIPT, root / "tools/fair/detr")
  (root / "tools/op.sh").write_text(OP)
  (root / "tools/op.sh").chmod(0o755)
  (tmp_path / "hub/me/data").mkdir(parents=True)
  (tmp_path / "hub/me/data/data.yaml").write_text("names: [a]")
  (tmp_path / "lib/huggingface_hub").mkdir(parents=True)
  (tmp_path / "lib/huggingface_hub/__init__.py").write_text(HUB)
  (tmp_path / "lib/huggingface_hub/errors.py").write_text("class RepositoryNotFoundError(Exception): pass")

  def run(**more: str) -> tuple[int, list[str]]:
    own = {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path / "lib"), "HUB": str(tmp_path / "hub")}
    env = {**os.environ, **own, "DATA": "me/data", "PUSH": "me/model", **more}
    words = ["bash", str(root / "tools/fair/detr/rented_gpu.sh"), "--head", "deformable"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    started = root / "started"
    return done.returncode, started.read_text().split() if started.exists() else []

  return tmp_path, root, run


def test_a_first_machine_starts_and_the_next_one_goes_on(machine):
  tmp, root, run = machine
  words = ["images", "train-detr", "--data", "out/data", "--output", "out/model", "--push", "me/model"]
  assert run() == (0, [*words, "--head", "deformable"])
  assert (root / "out/data/data.yaml").read_text() == "names: [a]"
  last = tmp / "hub/me/model/last-checkpoint"
  last.mkdir(parents=True)
  (last / "trainer_state.json").write_text('{"global_step": 37}')
  (tmp / "hub/me/model/detr.json").write_text("{}")
  assert run() == (0, [*words, "--resume", "--head", "deformable"])
  assert (root / "out/model/runs/checkpoint-37/trainer_state.json").exists() and (root / "out/model/detr.json").exists()


@pytest.mark.parametrize("repo", ["me/data", "me/model"])
def test_a_hub_that_does_not_answer_starts_nothing_anew(machine, repo):
  code, started = machine[2](SILENT=repo)
  assert code != 0 and not started


@pytest.mark.parametrize("lacks", ["DATA", "PUSH"])
def test_what_is_not_named_is_said(machine, lacks):
  code, started = machine[2](**{lacks: ""})
  assert code != 0 and not started
