#!/usr/bin/env python3
"""Holds our schema against openpilot's own, as a checkout has it: node by node, and value by value on every message of
the logs that are named.

PYTHONPATH=. python tests/cereal/upstream.py [--write] OPENPILOT_DIR [LOG ...]

--write makes upstream.txt anew, which test_schema.py reads: of each struct and enum that an Event can hold its id,
name, size on the wire, how many members it has, and a digest of their ordinals, names, places, types, union tags and
defaults. It holds no text of the schema. services.tsv likewise: each service, whether it is logged, its rate in Hz,
every how many go into the qlog (0: none), and the bytes of its queue."""

import argparse
import hashlib
import runpy
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import capnp

from openpilot.cereal import CEREAL_PATH
from openpilot.cereal.messaging import NO_TRAVERSAL_LIMIT
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.logreader import LogFile

TABLE = Path(__file__).with_name("upstream.txt")
SERVICES = Path(__file__).with_name("services.tsv")
BITS = {
  "bool": 1,
  "int8": 8,
  "uint8": 8,
  "int16": 16,
  "uint16": 16,
  "enum": 16,
  "int32": 32,
  "uint32": 32,
  "float32": 32,
  "int64": 64,
  "uint64": 64,
  "float64": 64,
}
OURS = range(140, 146)  # slots that upstream leaves empty
Node = dict[str, Any]


def our_name(name: str) -> str:
  """Upstream's deprecated.foo is our fooDEPRECATED, as it was upstream's before it had groups."""
  if not name.startswith("deprecated."):
    return name
  return name.removeprefix("deprecated.").removesuffix("DEPRECATED") + "DEPRECATED"


def nodes_of(event: Any) -> dict[int, Node]:
  """An Event's schema -> of every struct and enum that it can hold: id -> name, size, and its members, one row each."""
  out: dict[int, Node] = {}

  def kind(t: Any, schema: Any) -> str:
    which = t.which()
    if which == "list":
      element = t.list.elementType
      return f"list of {kind(element, schema.elementType if element.which() in ('struct', 'enum', 'list') else None)}"
    if which in ("struct", "enum"):
      visit(schema)
      return f"{which} {schema.node.id:x}"
    return str(which)

  def rows(schema: Any, prefix: str = "") -> Iterator[tuple]:
    for f in schema.node.struct.fields:
      if f.which() == "group":
        yield from rows(schema.fields[f.name].schema, f"{prefix}{f.name}.")
        continue
      which, default = f.slot.type.which(), f.slot.defaultValue
      place = (
        f"bit {f.slot.offset * BITS[which]}" if which in BITS else "" if which == "void" else f"pointer {f.slot.offset}"
      )
      value = str(getattr(default, default.which())) if which in BITS else ""
      of = schema.fields[f.name].schema if which in ("struct", "enum", "list") else None
      yield f.ordinal.explicit, our_name(prefix + f.name), place, kind(f.slot.type, of), f.discriminantValue, value

  def visit(schema: Any) -> None:
    node = schema.node
    if node.id in out:
      return
    out[node.id] = entry = {"name": node.displayName.split(":")[-1], "words": 0, "pointers": 0, "members": []}
    if node.which() == "enum":
      entry["members"] = [(i, e.name) for i, e in enumerate(node.enum.enumerants)]
    else:
      entry["words"], entry["pointers"] = node.struct.dataWordCount, node.struct.pointerCount
      entry["members"] = sorted(rows(schema))

  visit(event.schema)
  top = out[event.schema.node.id]
  ours = {row[3].removeprefix("struct ") for row in top["members"] if row[0] in OURS}
  top["members"] = [(*row[:1], "", *row[2:]) if row[0] in OURS else row for row in top["members"]]
  return {i: n for i, n in out.items() if f"{i:x}" not in ours and not n["name"].startswith("Fair")}


def digest(node: Node) -> str:
  return hashlib.sha256(repr(node["members"]).encode()).hexdigest()[:12]


def table(nodes: dict[int, Node]) -> str:
  rows = sorted(nodes.items(), key=lambda x: (x[1]["name"], x[0]))
  return "".join(
    f"{i:016x} {n['name']} {n['words']} {n['pointers']} {len(n['members'])} {digest(n)}\n" for i, n in rows
  )


def load(folder: Path, *imports: Path) -> tuple[Any, Any]:
  """-> the schema's module and its parser, which must live as long. Apart from the process's own, since ids are the
  same."""
  parser = capnp.SchemaParser()
  return parser.load(str(folder / "log.capnp"), imports=[str(p) for p in imports]), parser


def cereal_of(checkout: Path) -> Path:
  folder = next(
    (f for f in (checkout / "openpilot" / "cereal", checkout / "cereal") if (f / "log.capnp").is_file()), None
  )
  if folder is None:
    raise UserError(f"{checkout} is no checkout of openpilot: no cereal/log.capnp")
  return folder


def services_table(services: dict[str, Any]) -> str:
  return "".join(
    f"{k}\t{s.should_log:d}\t{s.frequency:.6g}\t{s.decimation or 0}\t{s.queue_size:d}\n"
    for k, s in sorted(services.items())
  )


def load_upstream(checkout: Path) -> tuple[Any, Any]:
  folder = cereal_of(checkout)
  cars = [
    d
    for d in (folder, checkout / "opendbc_repo" / "opendbc" / "car", checkout / "opendbc" / "car")
    if (d / "car.capnp").is_file()
  ]
  if not cars:
    raise UserError(f"{checkout} has no opendbc/car/car.capnp: check its submodule out")
  return load(folder, folder, *cars)


def differences(theirs: dict[int, Node], ours: dict[int, Node]) -> list[str]:
  out = []
  for i, node in theirs.items():
    have = ours.get(i)
    if have is None:
      out.append(f"{node['name']} ({i:#x}): not in ours")
      continue
    if (node["words"], node["pointers"]) != (have["words"], have["pointers"]):
      out.append(
        f"{node['name']}: {node['words']} words and {node['pointers']} pointers, ours {have['words']} and "
        f"{have['pointers']}"
      )
    for row in sorted(set(node["members"]) ^ set(have["members"])):
      out.append(f"{node['name']}: {'only theirs' if row in node['members'] else 'only ours'}: {row}")
  return out + [f"{n['name']} ({i:#x}): only in ours" for i, n in ours.items() if i not in theirs]


def flat(value: Any) -> Any:
  """A message's dict with the deprecated fields among the others, by our names, in their order."""
  if isinstance(value, dict):
    inner = value.get("deprecated")
    items = [(k, v) for k, v in value.items() if k != "deprecated"]
    items += [(our_name(f"deprecated.{k}"), v) for k, v in inner.items()] if isinstance(inner, dict) else []
    return {k: flat(v) for k, v in sorted(items, key=lambda x: x[0])}
  return [flat(v) for v in value] if isinstance(value, list) else value


def values(dat: bytes, event: Any) -> Any:
  with event.from_bytes(dat, traversal_limit_in_words=NO_TRAVERSAL_LIMIT) as e:
    try:
      return flat(e.to_dict(verbose=True))
    except capnp.KjException as error:
      return f"unreadable: {str(error).splitlines()[0][:60]}"


def compare_log(path: Path, theirs: Any, ours: Any) -> tuple[Counter, list[str]]:
  """-> how many messages of each kind were compared, and the kinds that differ."""
  f = LogFile(path)
  counts: Counter = Counter()
  out = []
  for i in range(len(f.start)):
    a, b = values(f.raw(i), theirs), values(f.raw(i), ours)
    kind = next((k for k in a if k not in ("logMonoTime", "valid")), "") if isinstance(a, dict) else a
    counts[kind] += 1
    if repr(a) != repr(b) and len(out) < 20 and not kind.startswith("customReserved"):  # repr: nan is nan
      out.append(f"{path}: message {i}, {kind}: {str(a)[:200]} and ours {str(b)[:200]}")
  return counts, out


def main() -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("checkout", type=Path)
  p.add_argument("logs", type=Path, nargs="*")
  p.add_argument("--write", action="store_true")
  args = p.parse_args()
  theirs, _parser = load_upstream(args.checkout)
  ours, _parser_of_ours = load(Path(CEREAL_PATH), Path(CEREAL_PATH))
  upstream = nodes_of(theirs.Event)
  found = differences(upstream, nodes_of(ours.Event))
  print(
    f"{len(upstream)} structs and enums, {sum(len(n['members']) for n in upstream.values())} members: {len(found)} "
    "differences"
  )
  total: Counter = Counter()
  for path in args.logs:
    counts, lines = compare_log(path, theirs.Event, ours.Event)
    total += counts
    found += lines
    print(f"{path}: {sum(counts.values())} messages of {len(counts)} kinds, {len(lines)} differences", file=sys.stderr)
  print("\n".join(found))
  if args.logs:
    print(
      f"{sum(total.values())} messages of {len(total)} kinds: " + ", ".join(f"{k} {n}" for k, n in total.most_common())
    )
  if args.write:
    TABLE.write_text(table(upstream))
    SERVICES.write_text(services_table(runpy.run_path(str(cereal_of(args.checkout) / "services.py"))["SERVICE_LIST"]))
  return 1 if found else 0


if __name__ == "__main__":
  raise SystemExit(cli(main)())
