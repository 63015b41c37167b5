#!/usr/bin/env python3
"""Labels routes, folders of pictures and videos with teachers. Killed at any moment, the same command goes on where it
stopped, and the result is that of an unbroken run. Several commands may fill one store."""

from openpilot.tools.fair.labels.jobs import make_jobs, only, parse_shard, read_plan, shards_of, write_plan
from openpilot.tools.fair.labels.label_options import Options, shown
from openpilot.tools.fair.labels.loading import held_teachers, inputs, source_options, teacher_names
from openpilot.tools.fair.labels.passes import Failures
from openpilot.tools.fair.labels.remote import url_of
from openpilot.tools.fair.labels.sources import find_pieces, open_pieces
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.worker import (
  Worker,
  check_teacher,
  keep_license,
  label_all,
  label_jobs,
  say_stale,
  split,
)
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import parse


def main() -> int:
  args = parse(Options, __doc__, "label")
  if args.every < 1 or args.batch_size < 1:
    raise UserError("--every and --batch-size are at least 1")
  shard = parse_shard(args.shard) if args.shard is not None else None
  wanted = read_plan(args.only) if args.only is not None else None
  size, spec, _ = shown(args)
  if args.workers is not None and args.workers < 1:
    raise UserError("--workers is at least 1")
  part = args.plan is not None or shard is not None or wanted is not None
  if args.estimate:
    if args.ray is not None or part:
      raise UserError("--estimate is of the whole work, on this machine; leave --ray, --plan, --shard and --only out")
    from openpilot.tools.fair.labels.estimate import estimate

    estimate(args)
    return 0
  if args.segments is not None:
    raise UserError("--segments is for --estimate; name the routes to label")
  if args.ray is not None:
    if part:
      raise UserError("--ray shares the work out itself; leave --plan, --shard and --only out")
    teacher_names(args)
    from openpilot.tools.fair.labels.cluster import label_on

    return label_on(args)
  # a job after the other where what they need is fetched: it need not all be here at once
  part = part or bool(args.connect) or any(url_of(p) for p in args.paths)
  held, told = held_teachers(args), source_options(args)
  if not part:
    found, unopened = open_pieces(find_pieces(inputs(args), told, args.source))
    views, parts = split(found)
    for name, teacher in held.items():
      if name != "frames":
        check_teacher(teacher, views, parts, size, spec)
    store, failures = LabelStore(args.output, create=True), Failures()
    keep_license(store, parts, args.license)
    groups = label_all(list(held.values()), found, store, args, failures)
    failures.final.update({(teacher, piece): e for teacher in held for piece, e in unopened.items()})
    store.finish()
    say_stale(store, groups, args.prune)
    return failures.finish()
  jobs = make_jobs(find_pieces(inputs(args), told, args.source), {n: t.stateful for n, t in held.items()})
  if wanted is not None:
    jobs = only(jobs, wanted)
  k, n = shard or (0, 1)
  if args.plan is not None:
    table = write_plan(args.plan, jobs, n)
    print(f"{args.plan}: {len(jobs)} jobs, {table.num_rows} pieces for {n} parts; nothing was labeled")
    return 0
  own = [j for j, part in zip(jobs, shards_of(jobs, n), strict=True) if part == k]
  return label_jobs(Worker(held, LabelStore(args.output, create=True), args), own)


if __name__ == "__main__":
  raise SystemExit(cli(main)())
