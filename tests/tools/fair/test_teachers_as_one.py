"""Teachers tuned by several processes are those of one: the same losses, whatever the number, also where it changes on
the way; adapters are saved once."""

import json

import numpy as np
import pytest
from images_fixture import write
from PIL import Image
from torchrun import torchrun

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.torch")

from test_distill_as_one import assert_alike, losses_of
from test_train_teacher import make_place

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
from openpilot.tools.fair.grounded_sam.tune import DetectorLoop, SegmenterLoop, TeacherLoop
from openpilot.tools.fair.images import train_teacher
from openpilot.tools.lib.errors import cli
out = Path(os.environ["SEEN"])
kill = os.environ.get("KILL", "").split(",")  # rank, step
def begun(self, *words, real=TeacherLoop.__init__, **more):
  real(self, *words, **more)
  self.log_every = 1
TeacherLoop.__init__ = begun
def batches(self, real=TeacherLoop.batches):
  for rows in real(self):
    with open(out / f"seen-{os.getpid()}.jsonl", "a") as f:
      f.write(json.dumps([self.step, [i for piece, _ in self.pieces(rows) for i in self.mine(piece)]]) + "\\n")
    yield rows
TeacherLoop.batches = batches
for kind in (DetectorLoop, SegmenterLoop):
  def losses(self, piece, real=kind.losses):
    parts = real(self, piece)
    if hasattr(self, "bar") and kill == [str(self.rank), str(self.step)]:
      os.kill(os.getpid(), signal.SIGKILL)
    return parts
  kind.losses = losses
raise SystemExit(cli(train_teacher.main)())
"""


@pytest.fixture(scope="module")
def tune(tmp_path_factory):
  """(teacher, processes, folder, words, environment) -> what torchrun said. Of six pictures to learn from one is of
  another size, and one has no masks."""
  place = make_place(tmp_path_factory.mktemp("as_one"))
  folder = place / "train"
  coco = json.loads((folder / "annotations.json").read_text())
  for i, height in ((4, 64), (5, 96)):
    image = np.asarray(Image.open(folder / "images" / f"{i - 4}.png"))[:height] ^ 1  # no copy, which would be left out
    Image.fromarray(image).save(folder / "images" / f"{i}.png")
    coco["images"].append({**coco["images"][0], "id": i + 1, "file_name": f"{i}.png", "height": height})
    for a in [a for a in coco["annotations"] if a["image_id"] == i - 3]:
      x, y, w, h = a["bbox"]
      h = min(h, height - y)
      new = {**a, "id": len(coco["annotations"]) + 1, "image_id": i + 1, "bbox": [x, y, w, h], "area": w * h}
      new["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
      if i == 5:
        del new["segmentation"]
      coco["annotations"].append(new)
  path = write(folder, coco)
  (place / "script.py").write_text(SCRIPT)
  for p in (place / "val" / "images").iterdir():
    Image.open(p).save(folder / "images" / p.name)
  words = ["--data", path, "--val", place / "val/annotations.json", "--images", folder / "images", "--device", "cpu"]
  words += ["--grounding-dino", place / "dino", "--sam", place / "sam", "--trackers", "", "--lora.r", 4]
  words += ["--warmup", 0, "--lr", 1e-3, "--prompts", "each", "--epochs", 1]

  def tune(teacher, processes, out, *more, **env):
    told = [*words, "--teachers", teacher, "--output", out, *more]
    return torchrun(processes, place / "script.py", *told, **{"SEEN": str(out.parent), **env})

  return tune


def adapter(out, name):
  return safetensors.load_file(out / "teachers" / f"{name}_lora" / "adapter_model.safetensors")


def gradient_of(out, name):
  """Of the one step that was done: what Adam remembers of it."""
  state = torch.load(out / "runs" / name / "last.pt", weights_only=True)["optimizer"]["state"]
  return torch.cat([s["exp_avg"].flatten() for s in state.values()])


@pytest.mark.parametrize("teacher, parts", [("grounding-dino", ["loss_ce", "loss_giou"]), ("sam", ["dice", "focal"])])
def test_two_and_four_processes_have_the_losses_and_gradients_of_one(tune, tmp_path, teacher, parts):
  """A step of two batches: of five pictures, which four processes share as 2, 1, 1, 1, and of one, of which some have
  none."""
  name = teacher.replace("-", "_")
  found = {}
  for processes in (1, 2, 4):
    out = tmp_path / str(processes) / "made"
    out.parent.mkdir()
    r = tune(teacher, processes, out, "--batch-size", 5, "--accumulate", 2)
    assert r.returncode == 0, r.stderr[-3000:]
    assert r.stdout.count("6 to learn from, 2 held out") == r.stdout.count(" MB in ") == 1, r.stdout
    said = json.loads((out / "metadata.json").read_text())["teachers"][name]
    found[processes] = losses_of(out / "runs" / name), gradient_of(out, name), adapter(out, name), said["before"]
  losses, gradient, weights, before = found[1]
  assert list(losses) == [1] and set(parts) <= set(losses[1]) and before and gradient.norm() > 0
  for processes in (2, 4):
    own, other, adapted, same = found[processes]
    assert_alike(own, losses, 1e-4)
    assert (other - gradient).norm() < 1e-3 * gradient.norm()
    assert adapted.keys() == weights.keys() and same == before


@pytest.mark.parametrize("teacher", ["grounding-dino", "sam"])
def test_one_is_killed_and_another_number_goes_on(tune, tmp_path, teacher):
  """An epoch of three steps: the first of two is killed in the second, and four go on."""
  out, name = tmp_path / "made", teacher.replace("-", "_")
  r = tune(teacher, 2, out, "--batch-size", 2, KILL="0,1")
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  last = out / "runs" / name / "last.pt"
  assert f"a process of this run is gone; {last} is saved at step 1: the same" in r.stderr
  assert torch.load(last, weights_only=True)["step"] == 1 and not (out / "metadata.json").exists()
  before = [json.loads(x) for p in tmp_path.glob("seen-*") for x in p.read_text().splitlines()]
  for p in tmp_path.glob("seen-*"):
    p.unlink()
  r = tune(teacher, 4, out, "--batch-size", 2, "--resume")
  assert r.returncode == 0, r.stderr[-3000:]
  after = [json.loads(x) for p in tmp_path.glob("seen-*") for x in p.read_text().splitlines()]
  assert {step for step, _ in after} == {1, 2}
  assert sorted(i for step, rows in [x for x in before if x[0] < 1] + after for i in rows) == list(range(6))
  assert adapter(out, name)


def test_what_is_wrong_is_said_once(tune, tmp_path):
  r = tune("sam", 2, tmp_path / "made", "--prompt", "car=x")
  assert r.returncode != 0 and r.stderr.count("error: ") == 1, r.stderr[-3000:]
  assert "with one of the classes glorp, snark" in r.stderr and not (tmp_path / "made").exists()
