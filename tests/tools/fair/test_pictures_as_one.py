"""Students of pictures taught by several processes are those of one: the same losses of all their parts, whatever the
number, also where it changes on the way; and the first one alone reads the data and lets teachers label it."""

import json

import images_student_fixture as squares
import oriented_fixture as turned
import pytest
import torch
from test_distill_as_one import assert_alike, losses_of, seen
from torchrun import torchrun

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
sys.path.insert(0, os.environ["FIXTURES"])
import images_student_fixture, test_train_obb
from openpilot.tools.fair.distillation import distill
from openpilot.tools.fair.images import train_obb, train_student
from openpilot.tools.fair.labels import labeling
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.teacher import Entry
from openpilot.tools.lib.errors import cli
command, out = sys.argv[1], Path(sys.argv[sys.argv.index("--output") + 1])
kind = {"student": images_student_fixture.ColorTeacher, "obb": test_train_obb.Colors}[command]
def label(self, *words, real=kind.label):
  (out / f"labeled-by-{os.environ.get('RANK', '0')}").touch()
  return real(self, *words)
kind.label = label
TEACHERS["colors"] = Entry(kind, "", "MIT", "", "colors")
kill = os.environ.get("KILL", "").split(",")  # rank, step
def start(*words, real=distill.start):
  run, was = real(*words)
  run.log_every, losses = 1, run.losses
  def taught(batch):
    with open(out / f"seen-{os.getpid()}.jsonl", "a") as f:
      f.write(json.dumps([run.step, batch["clips"]]) + "\\n")
    parts = losses(batch)
    if kill == [str(run.accelerator.process_index), str(run.step)]:
      os.kill(os.getpid(), signal.SIGKILL)
    return parts
  run.losses = taught
  return run, was
distill.start = start
sys.argv[1:] = sys.argv[2:]
raise SystemExit(cli({"student": train_student.main, "obb": train_obb.main}[command])())
"""


@pytest.fixture(scope="module")
def learn(tmp_path_factory, request):
  """(command, processes, folder, words, environment) -> what torchrun said. Twelve pictures to learn from, of which two
  are without labels and others, of the squares, have no masks."""
  root = tmp_path_factory.mktemp("as_one")
  data = squares.write(root / "squares", 10)
  coco = json.loads(data.read_text())
  for a in coco["annotations"]:
    if a["image_id"] % 3 == 0:
      a.pop("segmentation")
  data.write_text(json.dumps(coco))
  squares.write(root / "val", 2, seed=1)
  squares.write(root / "free", 2, seed=2, labels=False)
  turned.yolo(root / "turned", {"train": (10, 0), "val": (2, 1)})
  turned.render(root / "turned_free", 2, 2)
  (root / "script.py").write_text(SCRIPT)
  words = {
    "student": ["--data", data, "--val", root / "val/annotations.json", "--unlabeled", root / "free/images"],
    "obb": ["--data", root / "turned", "--unlabeled", root / "turned_free", "--teacher", "colors", "--turn", 40],
  }
  words["student"] += ["--teachers", "colors", "--untuned", "--alias", "red=flurb", "--alias", "blue=zott"]
  both = ["--size", "nano", "--picture-size", 96, "--workers", 0, "--no-export"]

  def learn(command, processes, out, *more, **env):
    out.mkdir(exist_ok=True)
    env = {"FIXTURES": str(request.path.parent), **env}
    return torchrun(processes, root / "script.py", command, *words[command], *both, "--output", out, *more, **env)

  return learn


@pytest.mark.parametrize(
  "command, parts",
  [
    ("student", ["objects/heat", "objects/mask", "objects/dice", "logits/cells", "features/features"]),
    ("obb", ["oriented/heat", "oriented/probiou", "oriented/angle", "patches/all"]),
  ],
)
def test_two_and_four_processes_have_the_losses_of_one(learn, tmp_path, command, parts):
  for processes in (1, 2, 4):
    r = learn(command, processes, tmp_path / str(processes), "--batch-size", 5, "--steps", 1)
    assert r.returncode == 0, r.stderr[-3000:]
    assert [p.name for p in (tmp_path / str(processes)).glob("labeled-by-*")] == ["labeled-by-0"]
    assert r.stdout.count("pictures     10 labeled, 2 unlabeled") == r.stdout.count("\nnext\n") == 1, r.stdout
  want = losses_of(tmp_path / "1")
  assert len(want) == 1 and set(parts) <= set(want[1])
  for processes in ("2", "4"):
    assert_alike(losses_of(tmp_path / processes), want, 1e-3)


@pytest.mark.parametrize("command", ["student", "obb"])
def test_the_first_is_killed_and_another_number_goes_on(learn, tmp_path, command):
  """An epoch of three steps: one of two is killed in its second, and four go on."""
  out, told = tmp_path / "killed", ["--batch-size", 4, "--steps", 3]
  r = learn(command, 2, out, *told, KILL="0,1")
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  assert f"a process of this run is gone; {out / 'last.pt'} is saved at step 1: the same" in r.stderr
  assert torch.load(out / "last.pt", weights_only=True)["step"] == 1
  for p in out.glob("seen-*.jsonl"):  # of the step that was not done
    p.write_text("".join(x + "\n" for x in p.read_text().splitlines() if json.loads(x)[0] < 1))
  r = learn(command, 4, out, *told, "--resume")
  assert r.returncode == 0, r.stderr[-3000:]
  assert seen(out, range(3)) == list(range(12))  # each picture once


def test_what_the_first_finds_wrong_is_said_once(learn, tmp_path):
  r = learn("student", 2, tmp_path / "out", "--alias", "red=nothing")
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  assert "error: --alias red=nothing: write NAME=CLASS" in r.stderr and "Traceback" not in r.stderr.split("error: ")[0]
