"""What every evaluation of `images evaluate` shares: whose class is whose, and the lines that end what is printed."""

from collections.abc import Sequence
from typing import Any

from openpilot.tools.fair.spec import plain
from openpilot.tools.lib.errors import UserError, printable


def known_names(names: Sequence[str], args: Any) -> dict[str, int]:
  """The data's name, plain -> the student's class, --alias included. Raises UserError."""
  known = {plain(n): k for k, n in enumerate(names)}
  for item in args.alias:
    name, equals, cls = item.partition("=")
    if not equals or plain(cls) not in known:
      raise UserError(f"--alias {item}: write NAME=CLASS, with one of {printable(', '.join(names), 200)}")
    known[plain(name)] = known[plain(cls)]
  return known


def listed_others(other: Sequence[str], names: Sequence[str], args: Any) -> str:
  """The data's classes that the student does not know, to be said as left out. Raises UserError where they may not
  be."""
  said = printable(", ".join(other), 200)
  if not args.ignore_classes:
    raise UserError(
      f"{args.data} labels {said}, and the student tells {printable(', '.join(names), 200)} apart; say which is "
      "which with --alias NAME=CLASS, or leave them out with --ignore-classes"
    )
  return said


def nothing_known(names: Sequence[str], args: Any) -> UserError:
  return UserError(f"{args.data} has no label of a class that the student knows: {printable(', '.join(names), 200)}")


def text(v: float | None) -> str:
  return "-" if v is None else f"{v:.3f}"


def last_lines(r: dict[str, Any], classes: dict[str, Any]) -> list[str]:
  """Of results: what is right at the score, then the classes with the most objects."""
  a = r["at_score"]
  out = [f"at {r['score']:<10g}precision {text(a['precision'])}, recall {text(a['recall'])}, F1 {text(a['f1'])}"]
  ranked = sorted(classes.items(), key=lambda x: -x[1]["truths"])[:12]
  if len(classes) > 1:
    out.append("AP50         " + ", ".join(f"{n} {text(c['ap50'])} of {c['truths']}" for n, c in ranked))
  if ranked:
    best = ", ".join(f"{n} {text(c['best_f1'])} at {c['best_score']:.2f}" for n, c in ranked)
    out.append(f"best F1      {best}")
  return out
