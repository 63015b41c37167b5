#!/usr/bin/env python3
"""Lists the teachers: what they label, under which license, and whether their weights are here. Of those named, their
options too."""

from collections.abc import Sequence
from dataclasses import dataclass

from openpilot.tools.fair.options import options_of
from openpilot.tools.fair.registry import TEACHERS
from openpilot.tools.fair.registry import find_entry
from openpilot.tools.fair.teacher import LICENSES, Entry, find_weights, weight_dirs
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.options import option, parse


def columns(rows: Sequence[tuple[str, ...]], right: tuple[int, ...] = ()) -> str:
  """Rows of cells -> lines, each column as wide as its widest cell, those of `right` set to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      f"{c:>{w}}" if i in right else f"{c:<{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  )


def weights_here(entry: Entry) -> str:
  try:
    return "here" if not entry.weights or find_weights(entry.weights) else ""
  except UserError:
    return "not here"


def license_of(entry: Entry) -> str:
  return entry.license + ("" if LICENSES.get(entry.license, False) else " *")


@dataclass(frozen=True)
class Options:
  names: tuple[str, ...] = option(
    (),
    positional=True,
    metavar="TEACHER",
    help="whose options are listed, or the description of an ONNX network, as net.yaml",
  )


def main() -> None:
  args = parse(Options, __doc__, "teachers")
  if not args.names:
    rows = [(name, license_of(e), e.size, weights_here(e), e.says) for name, e in TEACHERS.items()]
    print(columns([("teacher", "license", "size", "weights", "labels"), *rows], right=(2,)))
  for given in args.names:
    name, entry = find_entry(given)
    print(
      f"{name}: {entry.says or 'an ONNX network'}; license {license_of(entry)}; weights {entry.weights or 'none'}: "
      f"{weights_here(entry)}"
    )
    options = [(f"  --option {given}.{o.name}={o.default_text}", o.says) for o in options_of(given).values()]
    print(columns(options) if options else "  no options")
  print(
    "\n* restricts use, of what learns from it too: read it, then add --accept-license "
    f"{'|'.join(k for k, free in LICENSES.items() if not free)}"
  )
  print(
    f"weights are looked for in {', '.join(map(str, weight_dirs()))} and the hub's cache; FAIR_WEIGHTS names more "
    "folders"
  )
  print(
    "`tools/op.sh teachers TEACHER` lists its options, with their defaults after the equals sign; "
    "`tools/op.sh label --option` sets them"
  )


if __name__ == "__main__":
  raise SystemExit(cli(main)())
