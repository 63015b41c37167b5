"""The options of all commands: the same thing has the same flag, help says the true defaults, and what was typed can be
kept and started again."""

import importlib
import re
import shlex
import typing
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from openpilot.tools.lib.options import command_line, flag_of, kind_of, make_parser, parse, save

ROOT = Path(__file__).resolve().parents[2]
# command -> its module; `tools/op.sh` starts these
COMMANDS = {
  "demo": "tools.demo",
  "replay": "tools.replay.replay",
  "record": "tools.replay.record",
  "show": "tools.replay.show",
  "process-replay": "tools.replay.process_replay",
  "model-replay": "tools.model_replay",
  "compare-logs": "tools.replay.compare_logs",
  "sim": "tools.sim.write_route",
  "overlay": "tools.install.overlay",
  "train-scene": "tools.fair.scene_nano.train",
  "teachers": "tools.fair.list_teachers",
  "label": "tools.fair.labels.label",
  "labels": "tools.fair.labels.browse",
  "agree": "tools.fair.labels.agree",
  "meters": "tools.fair.labels.meters",
  "plane": "tools.fair.labels.plane",
  "import": "tools.fair.labels.import_labels",
  "import-images": "tools.fair.labels.import_images",
  "students": "tools.fair.students.list_students",
  "distill": "tools.fair.distillation.distill",
  "average": "tools.fair.distillation.average",
  "evaluate": "tools.fair.evaluation.evaluate",
  "export": "tools.fair.bundle.export",
  "optimize": "tools.fair.optimize.optimize",
  "compile": "tools.fair.comma_four.report",
  "dgx data": "tools.dgx.training.dataloader",
  "dgx train": "tools.dgx.training.train",
  "dgx distill": "tools.dgx.dense.dora_distillation",
  "dgx export": "tools.dgx.training.export",
  "dgx evaluate": "tools.dgx.training.evaluate",
  "dgx replay": "tools.dgx.driving_replay",
  "dgx benchmark": "tools.dgx.benchmark_inference",
  "dgx benchmark-tensorrt": "tools.dgx.benchmark_tensorrt",
  "dgx gpu-check": "tools.dgx.gpu_check",
  "images validate": "tools.fair.images.validate",
  "images train-teacher": "tools.fair.images.train_teacher",
  "images train-student": "tools.fair.images.train_student",
  "images train-detr": "tools.fair.images.train_detr",
  "images train-obb": "tools.fair.images.train_obb",
  "images evaluate": "tools.fair.images.evaluate",
  "images infer": "tools.fair.images.infer",
  "images augment": "tools.fair.images.augment",
  "images benchmark": "tools.fair.images.benchmark",
  "images optimize": "tools.fair.images.optimize",
}
# on the device, where tools/ is not: argparse
RUNTIME = {
  "flag": "selfdrive.modeld.fair.flag",
  "manager": "selfdrive.manager.manager",
  "fairmodeld": "selfdrive.modeld.fair.fairmodeld",
}
# field -> its type everywhere, the names that it must not have, and its former flag
SAME: dict[str, tuple[Any, tuple[str, ...], str | None]] = {
  "output": (Path, ("out", "out_dir", "output_dir", "outdir", "dest"), "--out"),
  "batch_size": (int, ("batch", "bs"), "--batch"),
  "accept_license": (str, ("accept_licence", "accept"), "--accept-licence"),
  "license": (str, ("licence",), "--licence"),
  "steps": (int, ("iterations", "iters"), None),
  "epochs": (int, ("epoch", "passes"), None),
  "seed": (int, ("random_seed",), None),
  "device": (str, ("gpu",), None),
  "workers": (int, ("num_workers", "jobs", "processes"), None),
  "ignore_classes": (bool, ("ignore_unknown", "skip_classes"), None),
  "tasks": (str, ("task", "heads"), None),
  "lr": (float, ("learning_rate",), None),
  "data_dir": (Path, ("data_folder",), None),
  "resume": (bool, ("continue", "go_on"), None),
}


def options_of(command: str) -> Any:
  return importlib.import_module(f"openpilot.{COMMANDS[command]}").Options


def word(field: Any, hint: Any) -> str:
  """Something that the field takes."""
  if field.metadata["choices"]:
    return str(field.metadata["choices"][-1])
  return "3" if kind_of(hint)[0] in (int, float) or field.metadata["parse"] else f"some/{field.name}"


def required(cls: Any) -> list[str]:
  """The least that must be typed."""
  hints, out = typing.get_type_hints(cls), []
  for f in sorted((f for f in fields(cls) if f.default is MISSING), key=lambda f: not f.metadata["positional"]):
    out += [*(() if f.metadata["positional"] else (flag_of(f),)), word(f, hints[f.name])]
  return out


def typed(field: Any, hint: Any, flag: str) -> list[str]:
  one, _, _ = kind_of(hint)
  count = field.metadata["nargs"] if isinstance(field.metadata["nargs"], int) else 1
  return [flag] if one is bool else [flag, *[word(field, hint)] * count]


def test_every_command_of_op_sh_is_here():
  script = (ROOT / "tools" / "op.sh").read_text()
  found = dict(re.findall(r"^  ([a-z-]+)\) .*py openpilot\.([\w.]+)", script, re.MULTILINE))
  verbs: dict[str, str] = {}
  for group, block in re.findall(r"^  ([a-z]+)\)\n((?:    .*\n)+)", script, re.MULTILINE):
    package = re.search(r"openpilot\.([\w.]+)\.\$module", block)
    for verb, module in re.findall(r"^      ([a-z-]+)\) module=([\w.]+)", block, re.MULTILINE):
      assert package is not None
      verbs[f"{group} {verb}"] = f"{package[1]}.{module}"
  assert {**found, **verbs} == {**COMMANDS, **RUNTIME}
  others = {"test", "lint", "setup", "python", "dgx", "images", "help"}  # of the script itself
  assert set(re.findall(r"^  ([a-z-]+)(?:\||\))", script, re.MULTILINE)) == {*found, *others}


def test_all_commands_of_tools_are_started_by_op_sh_and_none_has_a_parser_of_its_own():
  text = {p.relative_to(ROOT): p.read_text() for p in (ROOT / "tools").rglob("*.py")}
  lib = Path("tools/lib/options.py")
  assert {p for p, t in text.items() if "ArgumentParser" in t} == {lib}
  modules = {".".join(p.with_suffix("").parts) for p, t in text.items() if "parse(Options, " in t and p != lib}
  assert modules == set(COMMANDS.values())


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_thing_has_the_same_flag(command):
  cls = options_of(command)
  hints, least = typing.get_type_hints(cls), required(cls)
  for f in fields(cls):
    assert f.name not in [x for _, others, _ in SAME.values() for x in others], f.name
    if f.name in SAME:
      kind, _, former = SAME[f.name]
      assert kind_of(hints[f.name])[0] is kind, f.name
      assert former is None or f.metadata["positional"] or former in f.metadata["aliases"], f.name
    for name in (*f.metadata["aliases"], flag_of(f).replace("-", "_").replace("__", "--", 1)):
      if f.metadata["positional"] or f.default is True:
        continue
      at = least.index(flag_of(f)) if flag_of(f) in least else len(least)
      rest = [*least[:at], *least[at + len(typed(f, hints[f.name], "")) :]]
      one, other = (parse(cls, None, "x", [*rest, *typed(f, hints[f.name], n)]) for n in (name, flag_of(f)))
      assert one == other, name
      assert getattr(one, f.name) != f.default or f.metadata["choices"], name


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_one_name_of_each_and_the_true_default(command, monkeypatch):
  monkeypatch.setenv("COLUMNS", "1000")
  monkeypatch.chdir(ROOT)
  cls = options_of(command)
  said = make_parser(cls, "", command, {}).format_help()
  default = parse(cls, None, command, required(cls))
  for f in fields(cls):
    assert f.metadata["help"].strip(), f.name
    choices = "{" + ",".join(map(str, f.metadata["choices"])) + "}" if f.metadata["choices"] else ""
    flag = f.metadata["metavar"] or choices or f.name if f.metadata["positional"] else flag_of(f)
    flag = f"--no-{flag[2:]}" if f.default is True else flag
    about = re.search(rf"^  {re.escape(flag)}(?![\w-]).*?(?=^  \S|\Z)", said, re.MULTILINE | re.DOTALL)
    assert about is not None, flag
    assert not [a for a in f.metadata["aliases"] if re.search(rf"(?<![\w-]){re.escape(a)}(?![\w-])", said)], flag
    value, shown = getattr(default, f.name), re.findall(r"\(default: (.*?)\)$", about[0].strip(), re.MULTILINE)
    if f.default is MISSING or value in (None, "", ()) or isinstance(value, bool):
      assert not shown, flag
    else:
      assert "default" not in f.metadata["help"], f"{flag}: two defaults"
      many = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
      assert shown == [str(value.relative_to(ROOT)) if isinstance(value, Path) and value.is_absolute() else many], flag


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_typed_can_be_kept_and_typed_again(command, tmp_path, monkeypatch):
  """Every option other than its default: through options.yaml, and through a command line."""
  monkeypatch.chdir(tmp_path)
  cls = options_of(command)
  hints, words = typing.get_type_hints(cls), required(cls)
  for f in fields(cls):
    if f.default is not MISSING and not f.metadata["positional"] and f.name != "resume":
      flag = f"--no-{flag_of(f)[2:]}" if f.default is True else flag_of(f)
      words += typed(f, hints[f.name], flag)
  options = parse(cls, None, command, words)
  assert parse(cls, None, command, shlex.split(command_line(options))) == options
  save(options, tmp_path)
  again = parse(cls, None, command, ["--config", str(tmp_path)])
  for f in fields(cls):
    value = getattr(options, f.name)
    many = isinstance(value, tuple)
    whole = [
      v.absolute() if isinstance(v, Path) and not f.metadata["path"] else v for v in (value if many else [value])
    ]
    assert getattr(again, f.name) == (tuple(whole) if many else whole[0]), f.name
