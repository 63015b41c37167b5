#!/usr/bin/env bash
# The front door. `tools/op.sh help` lists the commands; each makes the virtual environment that it needs.
set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${FAIR_VENV:-$ROOT/.venv}"
case "$VENV" in /*) ;; *) VENV="$PWD/$VENV" ;; esac
[ -t 2 ] || export TQDM_MININTERVAL="${TQDM_MININTERVAL:-10}"  # logs want few lines of a progress bar
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONSAFEPATH=1         # a file numpy.py in the folder that one works in is no numpy: of this Python and of all that it starts
export ORT_DISABLE_TELEMETRY=1  # ONNX Runtime sends facts of the machine home unless told not to

die() { echo "error: $*" >&2; exit 2; }

case "$(uname -s)" in
  MINGW*|MSYS*|CYGWIN*) die "Windows itself is not supported; run this inside WSL ('wsl --install' in PowerShell gives it), where it is Linux" ;;
esac

find_python() {
  local p
  for p in "${FAIR_PYTHON:-}" python3.11 python3.12 python3.13 python3 python; do
    [ -n "$p" ] || continue
    if "$p" -I -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then command -v "$p"; return; fi
  done
  die "no Python 3.11, 3.12 or 3.13 with venv on the path; install one, or name it in FAIR_PYTHON"
}

# covers HAVE EXTRAS: whether the extras HAVE bring all that EXTRAS do. `pyproject.toml` has teach in train, and compile in test.
covers() {
  local have=",$1," extra
  case "$have" in *,train,*) have="${have}teach," ;; esac
  case "$have" in *,test,*) have="${have}compile," ;; esac
  for extra in ${2//,/ }; do
    case "$have" in *",$extra,"*) ;; *) return 1 ;; esac
  done
}

# installed EXTRAS: whether the virtual environment has what `pyproject.toml` lists under these extras, and its Python runs.
installed() {
  local stamp have
  SUM="$(cksum < "$ROOT/pyproject.toml" | cut -d' ' -f1)"
  if [ -e "$VENV/.installing" ] || [ -e "$VENV/.making" ] || [ ! -x "$VENV/bin/python" ]; then return 1; fi
  for stamp in "$VENV"/.installed-*-"$SUM"; do
    have="${stamp##*/.installed-}"
    if [ -e "$stamp" ] && covers "${have%-*}" "$1"; then return 0; fi
  done
  return 1
}

# one_at_a_time: holds $VENV.lock, by file descriptor 9, until this shell and all that it started have ended, however they end.
one_at_a_time() {
  mkdir -p "$(dirname "$VENV")" && : 2>/dev/null >> "$VENV.lock" || die "cannot write beside $VENV; name another folder in FAIR_VENV"
  exec 9>> "$VENV.lock"
  "$1" -I -c '
import fcntl, sys
try:
  fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
  print(f"another op.sh sets up {sys.argv[1]}; waiting for it", file=sys.stderr, flush=True)
  fcntl.flock(9, fcntl.LOCK_EX)
except OSError as e:
  print(f"warning: {sys.argv[1]}.lock cannot be locked here ({e.strerror}); do not run two set-ups at once", file=sys.stderr)
' "$VENV" || exit 130
}

# make_venv PYTHON: a virtual environment with pip; what an interrupted set-up left of one is removed. Nothing that is not ours is.
make_venv() {
  if [ -e "$VENV/.making" ] || { [ -e "$VENV/pyvenv.cfg" ] && ! "$VENV/bin/python" -I -c '' 2>/dev/null; }; then
    echo "the virtual environment $VENV is incomplete; making it anew"
    rm -rf "$VENV"
  fi
  if [ ! -x "$VENV/bin/python" ]; then
    if [ -d "$VENV" ] && [ -n "$(ls -A "$VENV")" ] && [ ! -d "$VENV/bin" ]; then die "$VENV is there and is no virtual environment; name another folder in FAIR_VENV"; fi
    echo "making the virtual environment $VENV"
    # written before and removed after: one that is there tells of a set-up that was killed
    if ! { mkdir -p "$VENV/.making" && "$1" -I -m venv "$VENV" && rmdir "$VENV/.making"; }; then
      rm -rf "$VENV"
      die "could not make $VENV; is the disk full? On Debian and Ubuntu: apt-get install python3-venv"
    fi
  elif ! "$VENV/bin/python" -I -m pip --version > /dev/null 2>&1; then
    echo "the virtual environment $VENV has no pip; bringing it"
    "$VENV/bin/python" -I -m ensurepip --upgrade > /dev/null || die "$VENV has no pip, and ensurepip fails; remove that folder and run the command again"
  fi
}

mend() { "$VENV/bin/python" -I "$ROOT/tools/lib/half_installed.py"; }

# setup EXTRAS: the virtual environment with what `pyproject.toml` lists under these extras. Nothing is done where that is there already. Whatever ends it
# half-way, killed or with a full disk, the next command goes on from there; of several at once, one works and the others wait.
setup() {
  local extras="$1" python
  if installed "$extras"; then return; fi
  python="$(find_python)"
  one_at_a_time "$python"
  if ! installed "$extras"; then
    make_venv "$python"
    if [ -e "$VENV/.installing" ]; then mend; fi
    echo "installing: runtime${extras:+, ${extras//,/, }} (once; FAIR_PIP_ARGS is passed on to pip)"
    # --no-compile: Python compiles what is imported, a small part of it
    mkdir -p "$VENV/.installing" || die "cannot write to $VENV; is the disk full?"
    if ! "$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check ${FAIR_PIP_ARGS:-} -e "$ROOT${extras:+[$extras]}"; then
      mend && rmdir "$VENV/.installing"  # what was there before still works
      die "pip could not install the packages; is a package index reachable, and room on the disk? Run the command again to go on"
    fi
    { : > "$VENV/.installed-$extras-$SUM"; } 2>/dev/null || die "cannot write to $VENV; is the disk full?"
    rmdir "$VENV/.installing"
  fi
  exec 9>&-
}

py() { exec "$VENV/bin/python" -P -m "$@"; }

lint() {
  setup tools,train,test
  cd "$ROOT"
  "$VENV/bin/python" -m ruff check cereal selfdrive tools tests
  "$VENV/bin/python" -m ruff format --check cereal selfdrive tools tests
  "$VENV/bin/python" -m mypy -p openpilot.cereal -p openpilot.common -p openpilot.selfdrive.manager -p openpilot.selfdrive.modeld -p openpilot.tools
}

usage() {
  cat <<'EOF'
tools/op.sh COMMAND [ARGUMENTS]        every command has --help

Start
  demo             make a sample route, replay it through fairmodeld, leave video, log and report in out/demo
  test             install what the tests need and run them; arguments go to pytest
  lint             ruff and mypy
  setup            only make the virtual environment
  python ARGS      the virtual environment's Python, with torch and all tools

Drive: replay a route through fairmodeld
  replay ROUTE     publish a route's messages and camera frames
  fairmodeld       the student process: camera frames in, fair messages out
  manager          start and stop fairmodeld by the flag and deviceState
  flag             on | off | status: the feature flag FairEnabled, and the bundle to run
  record OUT       write the live fair messages to a log
  show LOG         draw a log's messages into its video
  process-replay ROUTE     run fairmodeld over a route without a clock: the same bytes every time
  compare-logs A B         list where two logs differ
  model-replay     compare every bundle's output on two drives with its reference; --update writes a new one
  sim OUT          write a simulated route with exact truth

Label and learn: from routes to a student
  teachers         list the teachers, their licenses, and whether their weights are here
  label PATH...    label routes, pictures, videos with teachers; --shard 3/64: a part; --ray: on a cluster; --estimate
  labels DIR       list, check and draw a label store
  agree DIR        what several teachers of a store agree on, as one more
  meters DIR       a relative teacher's depth in a store put to meters, as one more
  plane DIR        depth of the road plane, where the store's class maps say road
  students         list the students: parameters, multiply-adds, outputs
  distill          train a student on a label store
  average RUN RUN  the mean of runs of one student: before and after it learned on other data
  evaluate BUNDLE DATA     compare a bundle with its teachers and the truth: one page, and JSON
  export RUN       write a finished run as a bundle
  optimize BUNDLE  its graphs in 8 bits, as TFLite, for TensorRT, judged beside the float ones: --data, --int8, --format
                   or a run with fewer channels, to be distilled on: --data, --prune .4
                   --qat RUN: 8 bits as `distill --qat` learned them
  train-scene      render, train, export and evaluate the first bundle, scene-nano

Pictures: your own, with labels
  images validate  check labeled pictures, mend them, split them: --data, --fix, --split, --show
  images train-teacher     tune Grounding DINO and SAM on them: small adapters, LoRA
  images train-student     a student that needs no prompt, from labels, teachers, or both: --data, --val, --output
  images train-detr        a detection transformer on a frozen backbone, DINOv3 or another: a teacher, or its own end
  images train-obb         a student of oriented boxes, from YOLO-OBB, DOTA or COCO: --data, --teacher, --output
  images evaluate MODEL    COCO's AP, IoU, confusion, curves, worst pictures: one page, and JSON: --data
  images infer MODEL PATH...   what it finds in pictures and videos: COCO JSON, YOLO, CSV, drawn
  images augment   vary labeled pictures by what is known of them: --data, --what, --show, --output
  images optimize MODEL    smaller and faster: --quantize int8, --format onnx,tensorrt,tflite, --data, --output
  images benchmark MODEL...    how long it takes
  import DATA      put labeled pictures into a label store: COCO JSON, YOLO folders, class maps
  import-images    the same for class maps, as frames of a road camera

Tune openpilot's own driving model
  dgx data         routes to training data
  dgx train        tune the model with DoRA on the driven path, or on a larger model's outputs
  dgx distill      tune it on the features and depth of a label store
  dgx export       a tuned checkpoint to an ONNX file that modeld loads
  dgx evaluate     compare driving models by their path on other drives
  dgx replay       run a driving model over a route: modelV2 of every frame
  dgx benchmark    time a model in torch, ONNX Runtime, tinygrad and TensorRT
  dgx benchmark-tensorrt   the same for labeling, in TensorRT
  dgx gpu-check    what a GPU machine can do, in ten minutes: TensorRT, teachers, a step of each trainer

Device: openpilot checkouts and their hardware
  overlay PATH     install fairmodeld into an openpilot checkout; --check, --uninstall, --bundle NAME
  compile BUNDLE   compile for this machine: tinygrad, TensorRT; --target comma-four --report: the cost on a comma four
EOF
}

cmd="${1:-help}"
[ $# -gt 0 ] && shift
case "$cmd" in
  demo) setup tools; py openpilot.tools.demo "$@" ;;
  test)
    setup tools,train,test
    cd "$ROOT"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    if [ $# -gt 0 ]; then py pytest "$@"; fi
    # fast ones first: what is broken shows in the first minute. Two workers; a file's tests share what they set up
    status=0
    "$VENV/bin/python" -m pytest -n "${FAIR_TEST_WORKERS:-2}" --dist loadfile -m "not slow" || status=$?
    "$VENV/bin/python" -m pytest -n "${FAIR_TEST_WORKERS:-2}" --dist loadfile -m slow || status=$?
    exit $status ;;
  lint) lint ;;
  replay) setup tools; py openpilot.tools.replay.replay "$@" ;;
  record) setup tools; py openpilot.tools.replay.record "$@" ;;
  show) setup tools; py openpilot.tools.replay.show "$@" ;;
  process-replay) setup tools; py openpilot.tools.replay.process_replay "$@" ;;
  model-replay) setup tools; py openpilot.tools.model_replay "$@" ;;
  compare-logs) setup tools; py openpilot.tools.replay.compare_logs "$@" ;;
  sim) setup tools; py openpilot.tools.sim.write_route "$@" ;;
  flag) setup tools; py openpilot.selfdrive.modeld.fair.flag "$@" ;;
  overlay) setup tools; py openpilot.tools.install.overlay "$@" ;;
  manager) setup tools; py openpilot.selfdrive.manager.manager "$@" ;;
  fairmodeld) setup tools; py openpilot.selfdrive.modeld.fair.fairmodeld "$@" ;;
  train-scene) setup tools,train; py openpilot.tools.fair.scene_nano.train "$@" ;;
  teachers) setup tools,teach; py openpilot.tools.fair.list_teachers "$@" ;;
  label) setup tools,teach; py openpilot.tools.fair.labels.label "$@" ;;
  labels) setup tools,teach; py openpilot.tools.fair.labels.browse "$@" ;;
  agree) setup tools,teach; py openpilot.tools.fair.labels.agree "$@" ;;
  meters) setup tools,teach; py openpilot.tools.fair.labels.meters "$@" ;;
  plane) setup tools,teach; py openpilot.tools.fair.labels.plane "$@" ;;
  images)
    verb="${1:-}"
    case "$verb" in
      validate) module=validate ;;
      train-teacher) module=train_teacher extras=tools,train ;;
      train-student) module=train_student extras=tools,train ;;
      train-detr) module=train_detr extras=tools,train ;;
      train-obb) module=train_obb extras=tools,train ;;
      evaluate) module=evaluate extras=tools,train ;;
      infer) module=infer ;;
      augment) module=augment extras=tools,train ;;
      benchmark) module=benchmark ;;
      optimize) module=optimize extras=tools,train ;;
      ""|help|-h|--help) usage | grep '^  images '; exit 0 ;;
      *) usage | grep '^  images ' >&2; die "unknown command 'images $verb'" ;;
    esac
    shift
    setup "${extras:-tools,teach}"
    py "openpilot.tools.fair.images.$module" "$@" ;;
  import) setup tools,teach; py openpilot.tools.fair.labels.import_labels "$@" ;;
  import-images) setup tools,teach; py openpilot.tools.fair.labels.import_images "$@" ;;
  students) setup tools,train; py openpilot.tools.fair.students.list_students "$@" ;;
  distill) setup tools,train; py openpilot.tools.fair.distillation.distill "$@" ;;
  average) setup tools,train; py openpilot.tools.fair.distillation.average "$@" ;;
  evaluate) setup tools,train; py openpilot.tools.fair.evaluation.evaluate "$@" ;;
  export) setup tools,train; py openpilot.tools.fair.bundle.export "$@" ;;
  optimize) setup tools,train; py openpilot.tools.fair.optimize.optimize "$@" ;;
  compile) setup tools,compile; py openpilot.tools.fair.comma_four.report "$@" ;;
  dgx)
    verb="${1:-}"
    case "$verb" in
      data) module=training.dataloader ;;
      train) module=training.train ;;
      distill) module=dense.dora_distillation ;;
      export) module=training.export ;;
      evaluate) module=training.evaluate ;;
      replay) module=driving_replay ;;
      benchmark) module=benchmark_inference ;;
      benchmark-tensorrt) module=benchmark_tensorrt ;;
      gpu-check) module=gpu_check ;;
      ""|help|-h|--help) usage | grep '^  dgx '; exit 0 ;;
      *) usage | grep '^  dgx ' >&2; die "unknown command 'dgx $verb'" ;;
    esac
    shift
    setup tools,train
    py "openpilot.tools.dgx.$module" "$@" ;;
  python)
    setup tools,train
    # a script finds its neighbors; what is typed, -m and -c find nothing of the folder that one works in
    case "${1:-}" in -*|"") ;; *) unset PYTHONSAFEPATH ;; esac
    exec "$VENV/bin/python" "$@" ;;
  setup) setup tools; echo "ready: $VENV" ;;
  help|-h|--help) usage ;;
  *) usage >&2; die "unknown command '$cmd'" ;;
esac
