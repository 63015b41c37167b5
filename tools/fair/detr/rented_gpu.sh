#!/usr/bin/env bash
# Trains a detection transformer on a rented GPU: data from the hub, every checkpoint back to it. Run again on another
# machine after one was taken away, it goes on. Arguments go to `images train-detr`.
#   HF_TOKEN=... DATA=USER/DATASET PUSH=USER/MODEL bash tools/fair/detr/rented_gpu.sh --head deformable
set -euo pipefail
: "${DATA:?a data set on the hub: a YOLO folder or a COCO JSON with its pictures}" "${PUSH:?a model on the hub, USER/NAME}"
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
EXP="${EXP:-out/$(basename "$PUSH")}"

tools/op.sh python -m pip install --quiet "trackio>=0.5" || echo "trackio is not installed; runs are not tracked" >&2
hub() { tools/op.sh python - "$@"; }

hub "$DATA" out/data <<'PY'
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], repo_type="dataset", local_dir=sys.argv[2])
PY
# the last checkpoint of a machine before this one
resume="$(hub "$PUSH" "$EXP" <<'PY'
import sys
from pathlib import Path
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError
repo, exp = sys.argv[1], Path(sys.argv[2])
try:
  names = list_repo_files(repo)
except RepositoryNotFoundError:  # the first machine; whatever else fails ends it, for a new run would replace that one
  names = []
if "last-checkpoint/trainer_state.json" in names and "detr.json" in names:
  import json, shutil
  snapshot_download(repo, allow_patterns=["last-checkpoint/*", "detr.json"], local_dir=exp / "hub")
  step = json.loads((exp / "hub/last-checkpoint/trainer_state.json").read_text())["global_step"]
  (exp / "runs").mkdir(parents=True, exist_ok=True)
  shutil.move(exp / "hub/last-checkpoint", exp / f"runs/checkpoint-{step}")
  shutil.move(exp / "hub/detr.json", exp / "detr.json")
  print("--resume")
PY
)"
tools/op.sh images train-detr --data out/data --output "$EXP" --push "$PUSH" $resume "$@"
