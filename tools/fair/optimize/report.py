"""The page of an optimization, its summary for the terminal, and what a bundle's card says of its variants."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openpilot.tools.fair.evaluation.groups import GROUPS
from openpilot.tools.replay.report import load_template

WIDTH, HEIGHT, EDGE = 520, 260, 48  # of the plot, pixels
LEAST_COST = 0.0002  # that is shown of a tensor
RULE = (
  "Of the variants for this processor, LiteRT's among them, whose metrics are all shown to stay within what they may "
  "lose, the one whose median is shortest with one thread; float where none is. A metric is within where the whole 95% "
  "interval of its loss is, beyond where none of it is, and undecided where it holds the limit: then more routes are "
  "needed to tell."
)
COMMA_FOUR = (
  "A comma four runs the float graph in tinygrad, which computes 8-bit graphs in float: they give it no speed. What "
  "ships for it is float16, which its compiler makes of the float graph by itself."
)


def losses(variant: dict[str, Any]) -> float:
  """Of the metric that is nearest to its limit: its share of it, 0 of float."""
  shares = [m["loss"] / m["limit"] for m in variant.get("metrics", []) if m["limit"]]
  return max(shares, default=0.0)


def plot(variants: Sequence[dict[str, Any]], max_loss: float) -> dict[str, Any]:
  """Points of speed (ms, to the right is slower) against loss (in parts of what is allowed, downwards is worse), in
  pixels of an SVG."""
  ms = [v["ms"][1]["p50"] for v in variants]
  worst = max(1.2, *(losses(v) for v in variants))
  low, high = min(0.0, *(losses(v) for v in variants)), worst
  right = max(ms) * 1.1

  def place(x: float, y: float) -> tuple[float, float]:
    across, down = (WIDTH - 2 * EDGE) * x / right, (HEIGHT - 2 * EDGE) * (y - low) / (high - low)
    return round(EDGE + across, 1), round(EDGE + down, 1)

  points = []
  for v, t in zip(variants, ms, strict=True):
    x, y = place(t, losses(v))
    points.append({"x": x, "y": y, "label": v["label"], "here": v["here"]})
  return {
    "points": points,
    "limit": place(0, 1)[1],
    "none": place(0, 0)[1],
    "width": WIDTH,
    "height": HEIGHT,
    "edge": EDGE,
  }


def reasons(variant: dict[str, Any]) -> dict[str, list[str]]:
  """Of all graphs: why nodes stay float, and which."""
  out: dict[str, list[str]] = {}
  for left in variant.get("float", {}).values():
    for why, nodes in left.items():
      out.setdefault(why, []).extend(nodes)
  return out


def counted(variant: dict[str, Any]) -> str:
  """Of its metrics how many have each verdict."""
  return ", ".join(f"{n} {what}" for what, n in variant["counts"].items() if n)


def in_short(variant: dict[str, Any]) -> str:
  """Its speed, and what it loses, where that was judged."""
  said = f"; {counted(variant)}; {variant['worst']}" if "worst" in variant else ""
  return f"x{variant['ms'][1]['ratio']:.2f} as fast as ONNX Runtime with the float graph{said}"


def undecided(variant: dict[str, Any], results: dict[str, Any]) -> str:
  routes = results["judged"]["routes"]
  return (
    f"{variant['label']} is undecided: of what {sum(variant['counts'].values())} metrics lose on {routes} routes, "
    f"{counted(variant)} by --max-loss {results['max_loss']:g}; {variant['worst']}"
  )


def interval(row: dict[str, Any]) -> str:
  return "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"


def loss_words(row: dict[str, Any]) -> str:
  if row["metric"].startswith("recall"):
    return f"{100 * row['loss']:+.2f} points"
  return f"{row['loss']:+.2%}"


def costs(source: dict[str, Any]) -> str:
  """The three metrics that it costs most."""
  most = sorted(source["costs"].items(), key=lambda x: -x[1])[:3]
  return ", ".join(
    f"{name} {100 * c:.2f}{' points' if 'recall' in name else '%'}" for name, c in most if c >= LEAST_COST
  )


def summary(results: dict[str, Any]) -> str:
  c, j = results["calibration"], results["judged"]
  lines = [
    (
      f"{results['bundle']}: calibrated on {c['taken']} frames of {c['routes']} routes, judged on {j['frames']} of "
      f"{j['routes']} others, by {results['truth']}"
    ),
    f"{'variant':<16} {'MB':>5} {'ms p50':>8} {'p99':>7} {'2 threads':>10} {'speed':>6}  metrics, the worst",
  ]
  for v in results["variants"]:
    one, two = v["ms"][1], v["ms"][2]
    away = "" if v["here"] else "  (ms of another processor's form)"
    said = f"{counted(v)}; {v['worst']}" if "worst" in v else ""
    lines.append(
      f"{v['label']:<16} {v['bytes'] / 1e6:>5.2f} {one['p50']:>8.1f} {one['p99']:>7.1f} {two['p50']:>10.1f} "
      f"x{one['ratio']:<5.2f}  {said}{away}"
    )
  r = results["recommendation"]
  lines.append(f"recommended: {r['variant']}: {r['why']}")
  return "\n".join(lines)


def card(variants: Sequence[dict[str, Any]], results: dict[str, Any], data: str) -> str:
  """Markdown for the bundle's card."""
  whole = results["variants"][0]
  rows = []
  for v in variants:
    speed = f"x{v['ms'][1]['ratio']:.2f}" if v["here"] else "not timed there"
    said = f"{counted(v)}; {v['worst']}"
    rows.append(f"| {v['target']} | {v['bytes'] / 1e6:.2f} of {whole['bytes'] / 1e6:.2f} MB | {speed} | {said} |")
  j = results["judged"]
  return (
    f"`tools/op.sh optimize` on `{data}`: judged on {j['frames']} frames of {j['routes']} routes that did not "
    f"calibrate, by {results['truth']}; a metric may lose {results['max_loss']:.1%}, a recall half as many points. "
    "It is within where the whole 95% interval is, by route, and undecided where that holds the limit. "
    "ONNX Runtime takes the variant of its processor; where there is none, and in tinygrad, the float graph runs.\n\n"
    "| processor | file | speed, one thread | metrics; the one that loses most |\n|---|---|---|---|\n" + "\n".join(rows)
  )


def page(results: dict[str, Any]) -> str:
  template = load_template(Path(__file__).with_name("page.html.j2"))
  return template.render(
    r=results,
    plot=plot(results["variants"], results["max_loss"]),
    rule=RULE,
    comma_four=COMMA_FOUR,
    reasons=reasons,
    interval=interval,
    loss_words=loss_words,
    losses=losses,
    counted=counted,
    costs=costs,
    title_of=lambda task: GROUPS[task].title,
    definition_of=lambda task: GROUPS[task].words,
  )
