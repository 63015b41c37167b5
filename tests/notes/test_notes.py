"""The design notes' Python blocks run as typed, on small checkpoints, or docs/notes_names.md says why not."""

import importlib

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from note_blocks import REASONS, RUNS, not_run, read_blocks, rows

for module in ("runs_bridge", "runs_dgx", "runs_fair", "runs_platform", "runs_student", "runs_teacher"):
  importlib.import_module(module)

NOTES = {
  "dgx_training.md",
  "dinov3_bridge.md",
  "dinov3_detr_plan.md",
  "fair_integration.md",
  "grounded_sam_platform.md",
}


@pytest.fixture
def blocks(shared_data):
  folder = shared_data.parent / "notes"
  if not folder.is_dir():
    pytest.skip(f"no design notes at {folder}: they lie outside the repository")
  return read_blocks(folder)


def test_every_block_runs_or_stands_in_the_table(blocks):
  assert {note for note, _ in blocks} <= NOTES
  assert not set(RUNS) & set(not_run())
  assert set(blocks) == set(RUNS) | set(not_run())


@pytest.mark.parametrize("key", sorted(RUNS), ids=lambda k: f"{k[0]}-{k[1]}")
def test_block(blocks, at_home, tmp_path, key):
  for made in (*at_home.weights.iterdir(), *at_home.home.iterdir()):
    (tmp_path / made.name).symlink_to(made)
  with pytest.MonkeyPatch.context() as m:
    m.chdir(tmp_path)
    RUNS[key](blocks[key])


@pytest.mark.parametrize("name, where", [row[:2] for row in rows("Names")])
def test_a_name_is_where_the_page_says(name, where):
  if not where.startswith("comes with"):
    module, attribute = where.strip("`").split(":")
    found = importlib.import_module(module)
    for part in attribute.split("."):
      found = getattr(found, part)
    assert callable(found) and name.strip("`").split("(")[0].split(".")[-1] == attribute.split(".")[-1]


@pytest.mark.parametrize("key", sorted(REASONS), ids=lambda k: f"{k[0]}-{k[1]}")
def test_a_block_that_cannot_run_does_not(blocks, at_home, key):
  assert key in not_run()
  REASONS[key](blocks[key])
