"""Printed commands can be typed; what is published tells of nobody."""

import ast
import re
import shlex
from pathlib import Path

import pytest
from PIL import ImageFont

from openpilot.tools.lib.said import command, drawn, public, public_command, public_path

ROOT = Path(__file__).resolve().parents[3]


def test_commands_can_be_typed():
  words = ("--out", Path("out/it's $HOME; rm -rf"), "a")
  assert (
    shlex.split(command(*words)) == ["--out", "out/it's $HOME; rm -rf", "a"]
    and command("--data", Path("out/x")) == "--data out/x"
  )


def test_no_printed_command_has_a_bare_path():
  """In all that is said, a value inside of `...` that starts with a program goes through command()."""
  found, seen = [], 0
  for path in [p for d in ("selfdrive", "tools") for p in (ROOT / d).rglob("*.py")]:
    for node in ast.walk(ast.parse(path.read_text())):
      if not isinstance(node, ast.JoinedStr):
        continue
      inside = ""
      for part in node.values:
        if isinstance(part, ast.Constant):
          for tick in re.findall(r"`|[^`]+", str(part.value)):
            inside = (" " if not inside else "") if tick == "`" else inside + tick if inside else ""
        elif isinstance(part, ast.FormattedValue) and re.match(r" *(tools/op\.sh|python) ", inside):
          seen += 1
          if not ast.unparse(part.value).startswith(("command(", "public(", "public_command(")):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(part.value)}")
  assert seen > 5 and not found


@pytest.mark.parametrize(("text", "want"), [
  ("--labels '/home/alice/x' --init /data/run:lanes", "--labels 'x' --init run:lanes"),
  ("a2a0ccea32023010|2023-07-27--13-01-19--3 x", "ROUTE x"),
  ("a2a0ccea32023010/2023-07-27--13-01-19/3", "ROUTE"),
  ("0000002c--d68dde99ca--1 frame 7", "ROUTE frame 7"),
  ("/data/media/0/realdata/2023-07-27--13-01-19--0", "ROUTE"),
  ("of a2a0ccea32023010/x", "of DEVICE/x"),
  ("VIN 1FTFW1E51MFA12345.", "VIN VIN."),
  ("~/drives/labels and C:\\Users\\bob\\labels", "labels and labels"),
  ("file:///home/alice/a.zarr", "a.zarr"),
  # what stays: relative names, hubs, hashes, units
  ("label store 44ab1507eb1f55bd, out/labels-val", "label store 44ab1507eb1f55bd, out/labels-val"),
  ("https://huggingface.co/facebook/dinov2-base", "https://huggingface.co/facebook/dinov2-base"),
  ("facebook/dinov2-base 5 m/s", "facebook/dinov2-base 5 m/s"),
])  # fmt: skip
def test_public(text, want):
  assert public(text) == want


@pytest.mark.parametrize(
  ("text", "want"),
  [
    ("--labels '/home/alice/Paris drives/labels' --out out/u1 --batch 8", "--labels labels --out out/u1 --batch 8"),
    (
      "--init=/home/al\\ ice/run:lanes --live-teacher yolox-nano='/home/al ice/y.onnx'",
      "--init=run:lanes --live-teacher yolox-nano=y.onnx",
    ),
    ("--labels '~/my drives/2023-07-27--13-01-19--0' --no-augment", "--labels ROUTE --no-augment"),
    ("--labels 'C:\\Users\\al ice\\x' --out r", "--labels x --out r"),
    # as it was kept before: without quotes, nobody knows where a path ends
    ("--labels /home/al ice/Paris drives/labels --out out/u1", "--labels ... ... ... --out ..."),
    ("--labels 'open", "--labels ''\"'\"'open'"),
    ("", ""),
  ],
)
def test_public_command(text, want):
  assert public_command(text) == want
  assert not any(word in public_command(text) for word in ("ice", "Paris", "home", "Users"))


def test_public_path():
  assert public_path("/home/alice/labels") == public_path("labels/") == public_path("../x/labels") == "labels"
  assert public_path(Path("/data/2023-07-27--13-01-19--0")) == "ROUTE"


PRIVATE = re.compile(
  r"/home/\w|/root/|/Users/\w|[0-9a-f]{16}[|/]\d|\d{4}-\d\d-\d\d--\d\d-\d\d-\d\d|[0-9a-f]{8}--[0-9a-f]{10}"
)


def test_nothing_that_ships_tells_of_anybody():
  shipped = [p for p in (ROOT / "models").rglob("*") if p.is_file() and "compiled" not in p.parts]
  assert len(shipped) >= 18
  for path in shipped:
    text = path.read_bytes().decode("latin-1")
    assert not PRIVATE.search(text), path
    if path.suffix in (".json", ".md"):
      assert public(text) == text or (
        path.suffix == ".json" and public(text).replace("\\", "") == text.replace("\\", "")
      ), path


@pytest.mark.parametrize(
  ("text", "seen"),
  [
    ("Fußgänger, ÉÑÇ", "Fussganger, ENC"),
    ("u\u0308", "u"),
    ("car 2 m ±1", "car 2 m ±1"),
    ("車", "車"),
    ("a \u2013 b\u2014c", "a - b-c"),
  ],
)
def test_letters_with_marks_are_drawn_as_letters(text, seen):
  assert drawn(text) == seen


def test_pillows_own_font_has_no_letters_with_marks():
  """The day it has them drawn() can go."""
  font = ImageFont.load_default(size=14)
  box = bytes(font.getmask("車"))
  assert bytes(font.getmask("ä")) == box and bytes(font.getmask("a")) != box
