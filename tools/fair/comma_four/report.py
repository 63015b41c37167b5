#!/usr/bin/env python3
"""Compiles a bundle for one target. For a comma four, without having one: what its GPU would have to do, from the
machine code that is made for it here.

op compile BUNDLE --target comma-four [--report] [--json FILE]      BUNDLE may be a single .onnx file too
op compile BUNDLE [--target tinygrad-cpu | tinygrad-cuda | tinygrad-qcom | tensorrt]

For comma-four nothing is kept; the command fails where a graph has more multiply-accumulates, bytes or kernels than
budgets.json allows it."""

import importlib.util
import json
import subprocess
import tempfile
from dataclasses import dataclass, asdict
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.artifact import ArtifactError, package_version
from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.compile import TARGETS, CompileError, build, missing
from openpilot.selfdrive.modeld.fair.runners.tinygrad import find_clang
from openpilot.tools.lib.options import option, parse
from openpilot.tools.fair.comma_four.adreno import FLAGS
from openpilot.tools.fair.comma_four.cost import over_budget, read_budgets, read_gpu, seconds, total
from openpilot.tools.lib import python
from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.files import atomic_path

COMMA_FOUR = "comma-four"
TIMEOUT = 3600.0  # s for one graph; a large one took six minutes on a slow machine
MEASURE = "DEBUG=2 python -m openpilot.selfdrive.modeld.fair.compile {} --target tinygrad-qcom"


def lower(path: Path, timeout: float = TIMEOUT) -> list[dict[str, Any]]:
  """A graph's kernels for the Adreno 630, see adreno.describe(). Raises UserError."""
  for package, wanted in (("tinygrad", "tinygrad"), ("tinymesa", "tinymesa==25.2.7.2")):
    if importlib.util.find_spec(package) is None:
      raise UserError(f"{package} is not installed, which makes the comma four's machine code; pip install '{wanted}'")
  if (cc := find_clang()) is None:
    raise UserError("tinygrad's CPU device wants a C compiler; install clang, or pip install ziglang")
  with tempfile.TemporaryDirectory() as folder:
    out = Path(folder) / "kernels.json"
    env = python.environment(**FLAGS, CC=cc)
    command = python.command("-m", "openpilot.tools.fair.comma_four.adreno", path.resolve(), out)
    try:
      done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
      raise UserError(f"{path} was not compiled within {timeout:.0f} s; give more with --timeout") from None
    if done.returncode:
      raise UserError(f"{path} does not compile for the Adreno 630: {python.why_failed(done)}")
    return json.loads(out.read_text())


def measure(path: Path, name: str, timeout: float) -> dict[str, Any]:
  """One graph: totals, its kernels with their times (s) at the slow and the fast share of the GPU's peaks."""
  gpu, kernels = read_gpu(), lower(path, timeout)
  for k in kernels:
    k["seconds"] = [seconds(k, gpu, share) for share in gpu["share"]]
  cost = total(path, kernels)
  times = [sum(k["seconds"][i] for k in kernels) for i in (0, 1)]
  return {
    "graph": name,
    **asdict(cost),
    "bytes": cost.bytes,
    "seconds": times,
    "instructions": sum(k["instructions"] for k in kernels),
    "kernel": kernels,
  }


def table(graph: dict[str, Any], limit: int | None) -> str:
  """The kernels that take longest first; bytes in kB, times in microseconds."""
  kernels = sorted(graph["kernel"], key=lambda k: -k["seconds"][0])
  lines = [
    f"{'kernel':<40} {'instr.':>6} {'regs':>4} {'half':>4} {'read kB':>8} {'written':>8} {'MFLOP':>7} {'us':>13}"
  ]
  for k in kernels[:limit]:
    slow, fast = (x * 1e6 for x in k["seconds"])
    sizes = f"{k['read'] / 1e3:>8.0f} {k['written'] / 1e3:>8.0f} {k['flops'] / 1e6:>7.2f}"
    spilled = f"  spills {k['spilled']} B" if k["spilled"] else ""
    lines.append(
      f"{k['name'][:40]:<40} {k['instructions']:>6} {k['registers']:>4} {k['half_registers']:>4} {sizes} {fast:>5.0f} "
      f"to {slow:>4.0f}{spilled}"
    )
  if limit is not None and len(kernels) > limit:
    rest = [sum(k["seconds"][i] for k in kernels[limit:]) * 1e6 for i in (0, 1)]
    lines.append(f"{f'and {len(kernels) - limit} more':<40} {'':>50} {rest[1]:>5.0f} to {rest[0]:>4.0f}")
  return "\n".join(lines)


def summary(graph: dict[str, Any]) -> str:
  slow, fast = (x * 1e3 for x in graph["seconds"])
  size = f"{graph['parameters'] / 1e6:.2f} M parameters, {graph['macs'] / 1e6:.0f} M MACs"
  work = f"{graph['kernels']} kernels of {graph['instructions']:,} instructions, {graph['flops'] / 1e9:.2f} GFLOP"
  memory = f"{graph['read'] / 1e6:.1f} MB read, {graph['written'] / 1e6:.1f} MB written"
  return f"graph '{graph['graph']}': {size}, {work}, {memory}, {fast:.1f} to {slow:.1f} ms"


def assumptions(bundle: Path) -> str:
  gpu = read_gpu()
  low, high = gpu["share"]
  return "\n".join(
    [
      (
        f"times: NOT measured, not calibrated. {gpu['name']} at {low:.0%} to {high:.0%} of its rate and bandwidth, "
        "without the time between two kernels."
      ),
      f"  rate {gpu['flops_per_s'] / 1e9:.0f} GFLOP/s: {gpu['flops_source']}",
      f"  bandwidth {gpu['bytes_per_s'] / 1e9:.1f} GB/s: {gpu['bytes_source']}",
      (
        f"  tinygrad {package_version('tinygrad')}, tinymesa {package_version('tinymesa')}; bytes: each of a buffer's "
        "once a kernel; registers: of 4 values"
      ),
      f"  measured on a device, kernel by kernel, by: {MEASURE.format(bundle)}",
    ]
  )


@dataclass(frozen=True)
class Options:
  bundle: Path = option(positional=True, help="a bundle's folder")
  target: tuple[str, ...] = option(
    (), choices=(COMMA_FOUR, *TARGETS), help="may be repeated; default: all that can be built on this machine"
  )
  report: bool = option(False, help="of comma-four: each kernel, not only the sums")
  kernels: int | None = option(None, metavar="N", help="of the report: only the N that take longest")
  json: Path | None = option(None, help="of comma-four: write all of it")
  budgets: Path | None = option(None, help="limits; default: tools/fair/comma_four/budgets.json")
  timeout: float = option(TIMEOUT, metavar="S", help="seconds for one graph")
  output: Path | None = option(
    None, aliases=("--out",), help="of the other targets: where artifacts go; default: where this machine keeps its own"
  )


def comma_four(bundle: Path, args: Options) -> None:
  """Prints and checks. Raises UserError where a budget is broken."""
  with tempfile.TemporaryDirectory() as tmp:
    if bundle.suffix == ".onnx":
      graphs = [(bundle, bundle.stem)]
    else:
      graphs, loaded = [], load_bundle(bundle)
      for (
        g
      ) in loaded.graphs:  # copies of the bytes that were hashed: what is compiled is read by path, in another process
        graphs.append((Path(tmp) / g["file"], g["name"]))
        graphs[-1][0].write_bytes(loaded.onnx(g))
    report_on(bundle, graphs, args)


def report_on(bundle: Path, graphs: list[tuple[Path, str]], args: Options) -> None:
  """graphs: (ONNX file, name)."""
  budgets = read_budgets(args.budgets) if args.budgets else read_budgets()
  found, broken = [], []
  for path, name in graphs:
    graph = measure(path, name, args.timeout)
    found.append(graph)
    print(summary(graph))
    if args.report:
      print(table(graph, args.kernels), end="\n\n")
    broken += over_budget(name, total(path, graph["kernel"]), budgets)
  print(assumptions(bundle))
  if args.json is not None:
    with atomic_path(args.json) as tmp:
      versions = {p: package_version(p) for p in ("tinygrad", "tinymesa")}
      tmp.write_text(
        json.dumps({"bundle": bundle.name, "gpu": read_gpu(), "versions": versions, "graphs": found}, indent=1)
      )
  if broken:
    raise UserError(f"over budget: {'; '.join(broken)}; make the student smaller, or the budget larger with its reason")


def main() -> None:
  args = parse(Options, __doc__, "compile")
  if (args.kernels is not None and args.kernels < 1) or args.timeout <= 0:
    raise UserError("--kernels and --timeout are over zero")
  if not args.bundle.exists():
    raise UserError(f"there is no {args.bundle}; give a bundle's folder")
  for target in args.target or [t for t in TARGETS if t != "onnx" and missing(t) is None] or ["onnx"]:
    if target == COMMA_FOUR:
      comma_four(args.bundle, args)
      continue
    bundle = load_bundle(args.bundle)
    for said in build(bundle, target, args.output, args.timeout):
      print(f"{bundle.name}, graph '{said['graph']}', {target}: {said['size'] / 1e6:.1f} MB in {said['seconds']:.0f} s")
    if target == "onnx":
      print(f"{bundle.name}: nothing to build, ONNX Runtime takes it as it is")


if __name__ == "__main__":
  raise SystemExit(cli(main, (ArtifactError, BundleError, CompileError))())
