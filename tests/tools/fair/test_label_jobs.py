"""Plans of work, and parts of it that different machines do."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_label_claims import Mean, Small, contents, find
from test_label_claims import route as small_route

from openpilot.tools.fair.labels import label, loading
from openpilot.tools.fair.labels.jobs import (
  COLUMNS,
  Job,
  make_jobs,
  only,
  parse_shard,
  read_plan,
  shards_of,
  write_plan,
)
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.sources import Piece
from openpilot.tools.fair.labels.sources.stills import StillView
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.lib.errors import UserError, cli

route = small_route  # a fixture of theirs


def pieces(rng, routes=5):
  return [
    Piece(f"route{r}--{k}", f"route{r}", int(rng.integers(1, 1000)))
    for r in range(routes)
    for k in range(int(rng.integers(1, 9)))
  ]


def test_every_piece_is_in_one_job_and_every_job_in_one_part(rng):
  there = pieces(rng)
  jobs = make_jobs(there, {"boxes": False, "tracks": True, "maps": False})
  for name in ("boxes", "tracks", "maps"):
    own = [j for j in jobs if j.teacher == name]
    assert sorted(p.name for j in own for p in j.pieces) == sorted(p.name for p in there)
    assert [j.size for j in own] == sorted((j.size for j in own), reverse=True)
    whole = {j.pieces[0].route: len(j.pieces) for j in own} if name == "tracks" else {}
    assert all(len(j.pieces) == 1 for j in own) or name == "tracks"
    assert all(n == sum(p.route == r for p in there) for r, n in whole.items())
  n = int(rng.integers(1, 40))
  parts = shards_of(jobs, n)
  assert len(parts) == len(jobs) and all(0 <= k < n for k in parts)
  assert parts == shards_of(make_jobs(there, {"boxes": False, "tracks": True, "maps": False}), n)  # whoever asks
  for name in ("boxes", "maps"):
    loads = np.zeros(n)
    for j, k in zip(jobs, parts, strict=True):
      loads[k] += j.size * (j.teacher == name)
    # of the longest first to the least loaded: the difference is at most one job
    assert loads.max() - loads.min() <= max(p.size for p in there)
  of = [
    {p.name: k for j, k in zip(jobs, parts, strict=True) if j.teacher == t for p in j.pieces} for t in ("boxes", "maps")
  ]
  assert of[0] == of[1]  # a part opens a segment once for both


def test_stills_are_jobs_in_the_blocks_that_share_batches(route):
  still = StillView(**vars(find(route)[0]))
  own = [Piece(f"s{k}", f"s{k}", 1, still) for k in range(2 * CHUNK + 3)]
  jobs = make_jobs(own, {"x": False})
  assert [len(j.pieces) for j in jobs] == [CHUNK, CHUNK, 3]
  assert only(jobs, {("x", "s0")}) == [j for j in jobs if j.pieces[0].name == "s0"]  # whole


def test_a_plan_is_written_and_read(tmp_path, rng):
  jobs = make_jobs(pieces(rng), {"boxes": False, "tracks": True})
  table = write_plan(tmp_path / "plan.parquet", jobs, 4)
  assert pq.read_table(tmp_path / "plan.parquet") == table and table.column_names == list(COLUMNS)
  assert read_plan(tmp_path / "plan.parquet") == {(j.teacher, p.name) for j in jobs for p in j.pieces}
  assert only(jobs, read_plan(tmp_path / "plan.parquet")) == jobs
  name = jobs[0].pieces[0].name
  (some,) = only(jobs, {("boxes", name)})
  assert some == Job("boxes", (jobs[0].pieces[0],))
  with pytest.raises(UserError, match="--only names nowhere by boxes, which is not among"):
    only(jobs, {("boxes", "nowhere")})
  pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
  for path in ("other.parquet", "none.parquet"):
    with pytest.raises(UserError, match="is no plan of work"):
      read_plan(tmp_path / path)


@pytest.mark.parametrize("text", ["64/64", "-1/4", "1", "1/0", "a/b", "1/2/3", "0/1000000"])
def test_a_part_that_is_none_is_one_line(text):
  with pytest.raises(UserError, match="write PART/PARTS"):
    parse_shard(text)
  assert parse_shard("3/64") == (3, 64)


def test_parts_of_the_work_make_one_machines_store(route, tmp_path, monkeypatch, capsys):
  """By the command itself; and a plan's rows alone."""

  def run(*more, out):
    monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean(), Small()])
    words = [str(route), "--teachers", "mean,counter", "--focal", "110", "--batch-size", "7", "--every", "2"]
    monkeypatch.setattr("sys.argv", ["label", *words, "--output", str(tmp_path / out), *more])
    code = cli(label.main)()
    return code, capsys.readouterr()

  assert run(out="whole")[0] == 0
  want = contents(tmp_path / "whole")
  for k in (2, 0, 1):
    assert run("--shard", f"{k}/3", out="parts")[0] == 0
    assert (k == 1) == (contents(tmp_path / "parts") == want)
  code, said = run("--plan", str(tmp_path / "p.parquet"), out="none")
  assert code == 0 and "5 jobs, 6 pieces for 1 parts; nothing was labeled" in said.out
  assert not (tmp_path / "none").exists()
  plan = pq.read_table(tmp_path / "p.parquet")
  assert plan["teacher"].to_pylist() == ["frames"] * 2 + ["mean"] * 2 + ["counter"] * 2
  for name in ("mean", "counter", "frames"):
    pq.write_table(plan.filter(pa.compute.equal(plan["teacher"], name)), tmp_path / "own.parquet")
    assert run("--only", str(tmp_path / "own.parquet"), out="rows")[0] == 0
  assert contents(tmp_path / "rows") == want
  code, said = run("--shard", "3/3", out="none")
  assert code == 2 and said.err.count("\n") == 1 and not (tmp_path / "none").exists()


@pytest.mark.parametrize("part", [[], ["--shard", "0/1"]])
def test_a_segment_that_cannot_be_opened_is_named_and_the_rest_is_done(route, part, tmp_path, monkeypatch, capsys):
  import shutil

  shutil.copytree(route, tmp_path / "r")
  bad = tmp_path / "r" / "0000002c--d68dde99ca--0" / "qcamera.ts"
  bad.write_bytes(b"no video" * 100)
  monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean()])
  words = [str(tmp_path / "r"), "--teachers", "mean", "--focal", "110", "--output", str(tmp_path / "s"), "--no-frames"]
  monkeypatch.setattr("sys.argv", ["label", *words, *part])
  assert cli(label.main)() == 1
  err = capsys.readouterr().err
  assert "failed: 0000002c--d68dde99ca--0 by mean" in err and "Traceback" not in err
  assert [g.segment[-1] for g in LabelStore(tmp_path / "s").groups()] == ["1"]
  shutil.rmtree(tmp_path / "r" / "0000002c--d68dde99ca--1")
  assert cli(label.main)() == 2  # nothing is left that can be labeled
