"""Options classes: flags, config files, aliases, errors of one line."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from openpilot.tools.lib.errors import UserError, above_zero
from openpilot.tools.lib.options import command_line, option, parse, save


@dataclass(frozen=True)
class Options:
  route: str = option(positional=True, help="a folder")
  output: Path = option(Path("out/x"), aliases=("--out",), help="where to")
  batch_size: int = option(16, aliases=("--batch",), help="frames a step")
  seconds: float | None = option(None, parse=above_zero, help="at most")
  weight: tuple[str, ...] = option((), help="of a task")
  camera: str = option("road", choices=("road", "wide"), help="which, 100%")
  resume: bool = option(False, help="go on")
  augment: bool = option(True, help="do not augment")


def made(*argv: str) -> Options:
  return parse(Options, "What it does.", "thing", argv)


def test_flags_aliases_and_underscores():
  assert made("r") == Options("r")
  o = made("r", "--out", "a", "--batch_size=4", "--weight", "a=1", "--weight", "b=2", "--resume", "--no-augment")
  assert o == Options("r", Path("a"), 4, None, ("a=1", "b=2"), "road", True, False)
  assert made("r", "--batch", "3", "--output", "b", "--seconds", "2.5", "--camera", "wide") == Options(
    "r", Path("b"), 3, 2.5, (), "wide"
  )


def test_config_file_and_what_is_typed_over_it(tmp_path):
  (tmp_path / "run.yaml").write_text("route: x\nbatch-size: 8\nweight: [a=1]\nresume: true\nout: here\nseconds: null\n")
  config = str(tmp_path / "run.yaml")
  assert made("--config", config) == Options("x", Path("here"), 8, None, ("a=1",), "road", True)
  assert made("y", "--config", config, "--batch", "2").batch_size == 2
  assert made("y", "--config", config).route == "y"
  (tmp_path / "run.json").write_text('{"route": "z", "augment": false}')
  assert made(f"--config={tmp_path / 'run.json'}") == Options("z", augment=False)


def test_a_runs_folder_starts_it_again(tmp_path):
  was = made("r", "--out", str(tmp_path), "--weight", "a=1", "--seconds", "3", "--no-augment")
  save(was, tmp_path)
  assert made("--config", str(tmp_path)) == was


@dataclass(frozen=True)
class More:
  base: Path = option(positional=True, help="a file")
  step: str = option("all", choices=("one", "all"), help="which")
  targets: tuple[str, ...] | None = option(None, nargs="+", help="several words")
  box: tuple[float, ...] | None = option(None, nargs=2, help="two numbers")
  pretrained: str | bool = option(False, bare=True, path=True, help="or a file")
  reference: str | None = option(None, bare="plain", choices=("plain", "speed"), help="which")
  init: tuple[str, ...] = option((), path=True, help="RUN[:PART]")
  live: str | None = option(None, path=True, help="NAME[=FILE]")
  augment: bool = option(True, help="do not augment")
  resume: bool = option(False, help="go on")


def more(*argv: str) -> More:
  return parse(More, None, "thing", argv)


def test_words_bare_flags_and_what_starts_them_again(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "run").mkdir()
  (tmp_path / "w.pt").touch()
  words = "b --targets x y --targets z --box 1 -2.5 --pretrained --reference --init run --init run:lanes --init gone:a"
  typed = more(*words.split(), "--live", "dino=w.pt", "--resume")
  assert (typed.targets, typed.box, typed.pretrained, typed.reference) == (("x", "y", "z"), (1, -2.5), True, "plain")
  save(typed, tmp_path / "run")
  (tmp_path / "elsewhere").mkdir()
  monkeypatch.chdir(tmp_path / "elsewhere")
  run = str(tmp_path / "run")
  again = more("--config", run)
  assert again.base == tmp_path / "b" and again.init == (run, f"{run}:lanes", "gone:a") and not again.resume
  assert again.live == f"dino={tmp_path / 'w.pt'}" and (again.targets, again.box) == (typed.targets, typed.box)
  assert more(*shlex.split(command_line(typed))) == typed
  assert more("c", "--config", run, "--pretrained", "f", "--reference", "speed", "--targets", "q") == replace(
    again, base=Path("c"), pretrained="f", reference="speed", targets=("q",)
  )
  (tmp_path / "a.yaml").write_text("base: b\nno-augment: true\nbox: [1]\n")
  with pytest.raises(UserError, match="box: it is a list of 2"):
    more("--config", str(tmp_path / "a.yaml"))
  (tmp_path / "a.yaml").write_text("base: b\nno-augment: true\npretrained: true\n")
  assert more("--config", str(tmp_path / "a.yaml")) == More(Path("b"), augment=False, pretrained=True)
  (tmp_path / "a.yaml").write_text("base: b\nno-step: true\n")
  with pytest.raises(UserError, match="'no-step' is no option"):
    more("--config", str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
  "text, message",
  [
    ("rout: x", "'rout' is no option"),
    ("batch_size: many", "batch_size: 'many' is no number"),
    ("batch_size: 2.5", "'2.5' is no number"),
    ("resume: 1", "resume: '1' is no bool"),
    ("camera: rear", "'rear'; there are road, wide"),
    ("seconds: -1", "seconds: '-1' is not a number of 0 or above"),
    ("output: [a, b]", "output"),
    ("- a", "no mapping"),
    ("a: [", "run.yaml"),
  ],
)
def test_wrong_configs(tmp_path, text, message):
  (tmp_path / "run.yaml").write_text(text)
  with pytest.raises(UserError) as e:
    made("r", "--config", str(tmp_path / "run.yaml"))
  assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
  "argv, message",
  [
    ((), "required: route; see `thing --help`"),
    (("r", "--outt", "x"), "unrecognized arguments: --outt x"),
    (("r", "--batch", "x"), "--batch-size: 'x' is no number"),
    (("r", "--camera", "rear"), "--camera: 'rear'; there are road, wide"),
    (("r", "--seconds", "0"), "--seconds: '0' is not a number above 0"),
    (("r", "--config", "nowhere.yaml"), "nowhere.yaml"),
  ],
)
def test_wrong_words(argv, message):
  with pytest.raises(UserError) as e:
    made(*argv)
  assert message in str(e.value) and "\n" not in str(e.value)


def test_help_shows_one_name_and_the_true_defaults(capsys):
  with pytest.raises(SystemExit) as e:
    made("--help")
  assert e.value.code == 0
  said = capsys.readouterr().out
  assert "--output" in said and "--out " not in said and "--batch-size" in said and "--batch " not in said
  assert "(default: 16)" in said and "(default: out/x)" in said and "--no-augment" in said and "100%" in said
  assert "What it does." in said
