"""grounded_sam_platform.md: its blocks about the student, and about reading the data. What the note leaves to the
reader (load_config, load_json) is the plain reading of such a file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from note_blocks import Block, runs, same_call

from openpilot.tools.fair.images.dataset import inspect_dataset
from openpilot.tools.fair.images.families import select_student_model
from openpilot.tools.fair.images.predict import Predictor
from openpilot.tools.fair.students.student import student_names
from openpilot.tools.lib.errors import UserError

NOTE = "grounded_sam_platform.md"
BUNDLE = Path(__file__).resolve().parents[2] / "models" / "fair_objects_small"


def data() -> dict[str, Any]:
  annotation = {"id": 1, "image_id": 1, "category_id": 4, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 4, 2, 4, 6]]}
  return {"images": [{"id": 1}], "annotations": [annotation], "categories": [{"id": 4, "name": "flurb"}]}


@runs(NOTE, 2)
def one_pass_without_a_prompt(block: Block) -> None:
  predictor = Predictor(BUNDLE)

  def student(image: np.ndarray) -> dict[str, Any]:
    (found,) = predictor([image])
    return {"boxes": found.boxes, "masks": found.masks, "class_ids": found.classes}

  names = block.run(student=student, input_image=np.zeros((256, 512, 3), np.uint8))
  assert len(names["boxes"]) == len(names["class_ids"]) == len(names["masks"])


def write_config() -> None:
  folder = Path("experiments/exp1")
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "distillation_config.yaml").write_text(yaml.safe_dump({"class_mapping": {0: "flurb", 1: "zott"}}))


def asked(block: Block) -> list[str]:
  """Which prompts the block gives to the teacher."""
  prompts: list[str] = []
  write_config()
  block.run(
    load_config=lambda path: yaml.safe_load(Path(path).read_text()),
    teacher=lambda image, text_prompt: prompts.append(text_prompt),
    student=lambda image: None,
    image=None,
  )
  return prompts


@runs(NOTE, 13)
def the_teacher_is_asked_for_each_class(block: Block) -> None:
  assert asked(block) == ["flurb", "zott"]


@runs(NOTE, 14)
def names_come_from_the_config(block: Block) -> None:
  assert asked(block)[-2:] == ["flurb", "zott"]


@runs(NOTE, 15)
def the_data_decides(block: Block) -> None:
  loaded: list[int] = []
  more = {"detect_mode": lambda data: 0, "PIPELINE_CONFIG": [None], "data": data()}
  names = block.run(inspect_dataset=inspect_dataset, load_grounding_dino=lambda: loaded.append(1), **more)
  assert names["info"]["has_boxes"] and loaded == [1]


@runs(NOTE, 16)
def the_data_is_read_anew(block: Block) -> None:
  Path("train.json").write_text(json.dumps(data()))
  names = block.run(
    save_json=lambda path, x: Path(path).write_text(json.dumps(x)),
    load_json=lambda path: json.loads(Path(path).read_text()),
    inspect_dataset=inspect_dataset,
  )
  assert names["info"]["has_masks"]


@runs(NOTE, 18)
def key_points_are_seen(block: Block) -> None:
  coco = data()
  coco["annotations"][0]["keypoints"] = [1, 2, 2]
  loaded: list[int] = []
  names = block.run(inspect_dataset=inspect_dataset, data=coco, load_pose_model=lambda: loaded.append(1))
  assert names["info"]["has_keypoints"] and loaded == [1]


@runs(NOTE, 19)
def inspection_says_the_same(block: Block) -> None:
  theirs = block.run()["inspect_dataset"]
  assert theirs(data()) == inspect_dataset(data())


@runs(NOTE, 22)
def the_student_is_chosen_by_the_data(block: Block) -> None:
  theirs = block.run()["select_student_model"]
  same_call(select_student_model, theirs)
  both, boxes, masks = ({"has_boxes": b, "has_masks": m} for b, m in ((True, True), (True, False), (False, True)))
  chosen = [select_student_model(x) for x in (both, boxes, masks)]
  assert [theirs(x) for x in (both, boxes, masks)] == ["yolov8s-seg", "yolov8s", "fastsam-s"]
  assert chosen == ["objects-small", "detector-small", "objects-small"] and set(chosen) <= set(student_names())
  for f, error in ((theirs, ValueError), (select_student_model, UserError)):
    with pytest.raises(error):
      f({"has_boxes": False, "has_masks": False})
