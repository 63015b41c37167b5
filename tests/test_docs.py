"""What the READMEs tell people to type exists: files behind links, commands of tools/op.sh, options."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
  p
  for p in ROOT.rglob("*.md")
  if not any(x.startswith(".") or x in ("out", "build") for x in p.relative_to(ROOT).parts[:-1])
  and p.relative_to(ROOT).parts[0] not in ("openpilot", "models")  # bundles' cards are hashed: they stay as they were
)
FORMER = {"--out", "--batch", "--accept-licence", "--licence", "--jobs"}  # still accepted
names = [str(p.relative_to(ROOT)) for p in PAGES]


def anchors(page: Path) -> set[str]:
  """As GitHub makes them of headings."""
  heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def commands(page: Path) -> list[str]:
  """Lines of its bash blocks, joined where they go on."""
  blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
  return [line.split("  #")[0] for b in blocks for line in b.replace("\\\n", " ").splitlines() if line[:1] != "#"]


@cache
def all_options() -> set[str]:
  """Of all commands: argparse's, and fields of options' dataclasses."""
  source = "".join(p.read_text() for top in ("tools", "selfdrive", "tests/bench") for p in (ROOT / top).rglob("*.py"))
  fields = re.findall(r"^  (\w+): [^=\n]* = (?:option|flag)\(", source, re.MULTILINE)
  return {
    *re.findall(r"[\"'](--[a-z][a-z0-9-]*)[\"']", source),
    *(f"--{no}{x.replace('_', '-')}" for x in fields for no in ("", "no-")),
    "--nproc-per-node",  # torchrun's
  }


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links(page):
  for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
    if not target.startswith("https://"):
      path, _, anchor = target.partition("#")
      found = page.parent / path if path else page
      assert found.exists(), target
      assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_commands_and_their_options(page):
  script = (ROOT / "tools" / "op.sh").read_text()
  known = set(re.findall(r"^ +([a-z-]+)\)", script, re.MULTILINE)) | {"help"}
  for text in re.findall(r"(?:tools/op\.sh|`op) ((?:dgx )?[a-z][a-z-]*)", page.read_text()):
    assert set(text.split()) <= known, text
  options = all_options()
  for line in commands(page):
    if re.search(r"op\.sh|\$D |tools/dgx|tests/bench", line):
      assert set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", line)) <= options - FORMER, line


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_lines_can_be_read(page):
  for line in page.read_text().splitlines():
    assert len(line) <= 120 or line.startswith(("|", " route", " sim")) or "](" in line, line
