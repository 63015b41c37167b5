"""What a card says of where a student's pictures came from, and of its teachers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from label_fixture import write_store

from openpilot.selfdrive.modeld.fair.bundle import schema, violation
from openpilot.tools.fair.bundle.sources import (
  data_lines,
  over_teachers,
  shown_runs,
  source_table,
  teacher_table,
  warning,
)
from openpilot.tools.fair.distillation.config import Config
from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.history import earlier, entry, joined, totals
from openpilot.tools.fair.distillation.trainer import Run
from openpilot.tools.fair.evaluation.scenes import open_segments
from openpilot.tools.fair.labels.origins import read_origins
from openpilot.tools.fair.students.onnx_import import history_of
from openpilot.tools.lib.errors import UserError

SIM, YOLO = {"model": "the simulator's truth"}, {"model": "yolox_nano.onnx"}
TOY = {"kind": "simulated drives", "name": "this project's simulator", "license": "MIT"}
WET = {"kind": "real clips", "name": "wet motorway", "license": "BSD-3-Clause"}
NIGHT = {"kind": "stills", "name": "night", "license": "MIT"}


def shown(frames, *sources, **more):
  return {"steps": 1, "frames": frames, "sources": [{**s, "share": x} for s, x in sources], "sample": [], **more}


@pytest.mark.parametrize(
  ("history", "teachers", "says", "hides"),
  [
    ([shown(8, (TOY, 1.0))], [SIM], "nothing but this project's ray-cast simulator", "learned from simulated"),
    (
      [shown(8, (TOY, 0.6), (WET, 0.4))],
      [SIM, YOLO],
      "simulated drives (60%) and real clips (40%), by share",
      "nothing but",
    ),
    ([shown(8, (TOY, 0.6), (WET, 0.4))], [SIM, YOLO], "is a guess, and must control nothing", "not recorded"),
    (
      [shown(8, (TOY, 0.2), (WET, 0.7), (NIGHT, 0.1))],
      [SIM, YOLO],
      "real clips (70%), simulated drives (20%) and st",
      "guess",
    ),
    (
      [shown(8, (WET, 1.0))],
      [YOLO],
      "learned from real clips (100%), by share of the frames that it was shown. It adv",
      "sim",
    ),
    (
      [{"steps": 5, "frames": 0, "sources": None}, shown(8, (WET, 1.0))],
      [SIM, YOLO],
      "were shown is not recorded. Sim",
      "It adv",
    ),
    ([{"steps": 5, "frames": 0, "sources": None}, shown(8, (TOY, 1.0))], [SIM], "is not recorded", "nothing but"),
    (None, [SIM], "**Not made for real streets.** It has learned from nothing but", "shares"),
    (None, [SIM, YOLO], "their shares are not recorded", "nothing but"),
    (None, [YOLO], "It advises; it must control nothing.", "simulator"),
  ],
)
def test_what_a_student_was_shown_is_said(history, teachers, says, hides):
  state = {"provenance": teachers, **({} if history is None else {"history": history})}
  assert says in warning(state) and hides not in warning(state)
  assert "mostly" not in warning(state)


def test_shares_are_of_all_frames_of_a_students_line():
  """By hand: 100 frames of which 60 are simulated, then 300 of which 30 are."""
  history = [shown(100, (TOY, 0.6), (WET, 0.4)), shown(300, (TOY, 0.1), (NIGHT, 0.9))]
  found, known = totals(history)
  assert known and {x["kind"]: pytest.approx(x["share"]) for x in found} == {
    "stills": 270 / 400,
    "simulated drives": 90 / 400,
    "real clips": 40 / 400,
  }
  history[-1]["sample"] = [{"of": "night*", "weight": 6, "segments": 1, "clips": 4, "share": 0.9}]
  table = source_table({"history": history})
  assert "| stills | night | MIT | 68% |" in table and "| real clips | wet motorway | BSD-3-Clause | 10% |" in table
  assert "In the last run night* drawn with weight 6" in table
  assert data_lines({"history": history})[0] == "stills, night (MIT): 68% of the frames shown"
  put_together = [*history, shown(0, (WET, 1.0))]  # of no steps
  assert totals(put_together)[0] == found
  assert joined(history, history[:1]) == history and source_table({}) == "" and data_lines({}) == []


def test_a_bundle_says_what_its_student_was_shown_to_those_that_start_from_it():
  """Run by run, by the manifest's schema; of a run that did not record its sources that it did not."""
  history = [{"steps": 9, "frames": 0, "sources": None}, shown(100, (TOY, 0.6), (WET, 0.4))]
  said = shown_runs({"history": history})
  assert violation(said, schema()["properties"]["provenance"]["properties"]["history"]) is None
  bundle = SimpleNamespace(manifest={"provenance": {"history": said}})
  read = history_of(bundle)["history"]
  assert totals(read) == totals(history) and read[0] == history[0]
  assert history_of(SimpleNamespace(manifest={"provenance": {}})) == {}


def sources_file(root, *entries):
  (root / "sources.yaml").write_text(yaml.safe_dump(list(entries)))


def test_a_stores_sources(tmp_path):
  """Simulated drives are known as such; of others the file says it, the last entry that fits."""
  write_store(tmp_path, ("00000001--aaaaaaaaaa", "00000002--bbbbbbbbbb", "00000003--cccccccccc"), n=4, teacher="yolox")
  clips = Clips(tmp_path, ["depth"], 1)
  assert entry(clips, [])["sources"] == [
    {"kind": "real clips", "name": "", "license": "not stated", "segments": 3, "clips": 12, "share": 1.0}
  ]
  wet = {"segments": "*", "name": "wet motorway", "license": "BSD-3-Clause", "conditions": ["day", "rain"]}
  sources_file(
    tmp_path,
    wet,
    {"segments": "00000003*", "name": "night", "license": "MIT", "kind": "stills", "conditions": ["night"]},
  )
  said = entry(Clips(tmp_path, ["depth"], 1), ["00000003*=6"])
  assert said["sources"] == [
    {"kind": "stills", "name": "night", "license": "MIT", "segments": 1, "clips": 4, "share": 0.75},
    {"kind": "real clips", "name": "wet motorway", "license": "BSD-3-Clause", "segments": 2, "clips": 8, "share": 0.25},
  ]
  assert said["sample"][0]["share"] == 0.75
  assert [s.conditions for s in open_segments(tmp_path, {"yolox"}, [])] == [["day", "rain"]] * 2 + [["night"]]
  write_store(tmp_path / "sim", ("00000001--aaaaaaaaaa",), n=4)
  found = entry(Clips(tmp_path / "sim", ["depth"], 1), [])["sources"][0]
  assert (found["kind"], found["license"], found["share"]) == ("simulated drives", "MIT", 1.0)
  unread = Clips(tmp_path / "sim", [], 1)  # a float student teaches, and no label is read
  assert entry(unread, [])["sources"][0]["kind"] == "simulated drives"
  write_store(tmp_path / "sim", ("00000001--aaaaaaaaaa",), n=4, teacher="yolox")
  other = Clips(tmp_path / "sim", ["depth"], 1, prefer=["yolox"])  # nor the simulator's
  assert entry(other, [])["sources"][0]["kind"] == "simulated drives"


def test_conditions_beside_a_teacher_whose_source_is_a_list(tmp_path):
  """As `agree` writes it: the names of the labels that it was made of."""
  store = write_store(tmp_path, ("00000001--aaaaaaaaaa",), n=4)
  group = next(g for g in store.groups() if g.teacher == "simulator")
  meta = json.loads((group.path / "group.json").read_text())
  (group.path / "group.json").write_text(json.dumps({**meta, "source": ["yolox-nano-1234"]}))
  assert open_segments(tmp_path, {"simulator"}, [])[0].conditions == []


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("a: b", "it is no list"),
    ("- name: x", "entry 1 does not say which segments"),
    ("- {segments: '*', licence: MIT}", "entry 1 says 'licence'; known are"),
    ("- {segments: '*', license: 3}", "entry 1: license is no text"),
    ("- {segments: '*', kind: toys}", "entry 1: kind 'toys' is none of simulated drives"),
    ("- {segments: '*', conditions: night}", "entry 1: conditions is no list of words"),
    ("- {segments: [", "write a list of"),
  ],
)
def test_a_bad_file_of_sources_is_said(tmp_path, text, message):
  (tmp_path / "sources.yaml").write_text(text)
  with pytest.raises(UserError, match=message):
    read_origins(tmp_path)


def test_a_run_keeps_what_it_and_those_before_it_were_shown(tmp_path):
  """In its checkpoint: its own steps; of one that goes on those of before, once."""
  write_store(tmp_path / "s", n=4)

  def made(out):
    clips = Clips(tmp_path / "s", ["depth"], 1)
    return Run(Config("depth-nano", ["depth"], steps=2, batch=4), clips, None, tmp_path / out, "labels", workers=0)

  first = made("a")
  first.step = 2
  state = first.state()
  assert [(x["steps"], x["frames"]) for x in state["history"]] == [(2, 8)]
  second = made("b")
  second.warm_start({**state, "ema": first.ema.state_dict()})
  second.step = 1
  assert [(x["steps"], x["frames"]) for x in second.state()["history"]] == [(2, 8), (1, 4)]
  third = made("b")
  third.load({**second.state(), "best": 0.0})
  assert third.state()["history"] == second.state()["history"]
  assert earlier({"step": 7}) == [{"steps": 7, "frames": 0, "sources": None}]


def test_a_student_beside_its_best_teacher():
  """Of errors the smaller is better; a teacher that only agrees with another is none that the truth judged."""

  def cell(v):
    return {"value": v}

  tables = {
    "simulator": {
      "depth": {
        "s": {"abs_rel": cell(0.22)},
        "t1": {"abs_rel": cell(0.2)},
        "t2": {"abs_rel": cell(0.4)},
        "mean map": {"abs_rel": cell(0.1)},
      },
      "segmentation": {"s": {"miou": cell(0.9)}, "t1": {"miou": cell(0.8)}},
      "objects": {"s": {"ap": cell(0.9)}},
    },
    "t1": {"depth": {"s": {"abs_rel": cell(0.1)}, "t2": {"abs_rel": cell(0.1)}}},
  }
  night = {"simulator": {"depth": {"s": {"abs_rel": 0.5}, "t1": {"abs_rel": 0.25}}}}
  evaluation = {
    "truth": "simulator",
    "tables": tables,
    "kinds": {"s": "student", "t1": "teacher", "t2": "teacher", "mean map": "rival"},
    "conditions": {"night": {"segments": 1, "tables": night}},
  }
  assert over_teachers(evaluation, "s") == [
    ("depth", "abs_rel", "all", 0.22, "t1", 0.2),
    ("depth", "abs_rel", "night", 0.5, "t1", 0.25),
    ("segmentation", "miou", "all", 0.9, "t1", 0.8),
  ]
  table = teacher_table(evaluation, "s")
  assert "| Depth | abs_rel | all | 0.220 | t1 0.200 | 1.10, 10% behind |" in table
  assert "| Depth | abs_rel | night | 0.500 | t1 0.250 | 2.00, 100% behind |" in table
  assert "| 1.12, 12% ahead |" in table or "| 1.13, 13% ahead |" in table or "| 1.12, 13% ahead |" in table
  assert teacher_table({**evaluation, "truth": None}, "s") == ""
  assert np.isfinite([x[3] for x in over_teachers(evaluation, "s")]).all()
