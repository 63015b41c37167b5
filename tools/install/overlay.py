#!/usr/bin/env python3
"""Installs fairmodeld into an openpilot checkout: its folder, the bundles to run, and marked edits of openpilot's own
files.

Everything is planned first, and written only where all of it fits. Run it again after a merge of upstream; it changes
only what is out of date."""

from dataclasses import dataclass
from collections import Counter
from pathlib import Path

from openpilot.tools.lib.options import option, parse
from openpilot.tools.install.layout import find_layout
from openpilot.tools.install.plan import Plan, carry_out, plan_overlay, plan_uninstall
from openpilot.tools.lib.errors import UserError, cli


def tell(plan: Plan, would: bool) -> None:
  """Prints one line per edited file, and one per folder of added or removed files."""
  print(plan.layout.name + (f", bundles {', '.join(plan.bundles)}" if plan.bundles else ""))
  folders: Counter[tuple[str, str]] = Counter()
  for c in plan.changes:
    if c.what in ("edit", "take out"):
      print(f"  {'would ' if would else ''}{c.what}: {c.name}")
    elif c.what != "list":
      head, inside, _ = c.name.partition("selfdrive/modeld/fair")
      folders[c.what, head + inside if inside else str(Path(c.name).parent)] += 1
  for (what, folder), n in folders.items():
    print(f"  {'would ' if would else ''}{what}: {n} files in {folder}")
  for note in plan.notes:
    print(f"  note: {note}")


@dataclass(frozen=True)
class Options:
  path: Path = option(positional=True, help="an openpilot checkout, of March 2025 or newer")
  bundle: tuple[str, ...] = option(
    (),
    metavar="NAME",
    help="a bundle of models/, or a folder (with a slash in it); may be repeated; default: the installed ones, or "
    "fair_unified_small",
  )
  check: bool = option(
    False,
    help="write nothing, print what would be done; exit code 0: all is up to date, 1: something is to do, 2: it cannot "
    "be done",
  )
  uninstall: bool = option(False, help="remove all of it again")


def main() -> int:
  args = parse(Options, __doc__, "overlay")
  if args.uninstall and args.bundle:
    raise UserError("--uninstall removes all bundles; leave --bundle out")
  layout = find_layout(args.path)
  plan = plan_uninstall(layout) if args.uninstall else plan_overlay(layout, list(args.bundle) or None)
  if not plan.changes:
    print(f"nothing to do: {'nothing is installed' if args.uninstall else 'all is up to date'} in {args.path}")
    return 0
  tell(plan, args.check)
  if args.check:
    print("out of date: run it without --check" if plan.laid and not args.uninstall else "nothing was written")
    return 1
  carry_out(plan)
  if not args.uninstall:
    print(
      "next: build it (scons), then `python -m openpilot.selfdrive.modeld.fair.flag on`; what it costs and how to "
      f"undo it: {layout.folder}/MAINTAINERS.md"
    )
  return 0


if __name__ == "__main__":
  raise SystemExit(cli(main)())
