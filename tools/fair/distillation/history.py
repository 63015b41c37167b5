"""What a student was shown: of each run of its line the steps and frames, and the sources with their shares. It goes
into the checkpoints, and from there into the card."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openpilot.tools.fair.distillation.data import Clips
from openpilot.tools.fair.distillation.sampling import shares, weights_of
from openpilot.tools.fair.labels.origins import origin_of, read_origins

History = list[dict[str, Any]]


def sources_of(train: Clips, sample: Sequence[str]) -> list[dict[str, Any]]:
  """Where the clips come from: kind, name, license, segments, clips, and share of what is drawn."""
  said, clips = read_origins(train.root), train.per_segment()
  drawn = weights_of([s.name for s in train.segments], sample) * clips
  found: dict[tuple[str, str, str], list[int]] = {}
  for i, s in enumerate(train.segments):
    o = origin_of(s.name, s.groups, said)  # all of them: what learns of frames alone reads no label
    found.setdefault((o.kind, o.name, o.license), []).append(i)
  out = []
  for (kind, name, license), at in found.items():
    share = float(drawn[at].sum() / max(drawn.sum(), 1e-9))
    count = {"segments": len(at), "clips": int(clips[at].sum()), "share": round(share, 4)}
    out.append({"kind": kind, "name": name, "license": license, **count})
  return sorted(out, key=lambda x: (-x["share"], x["kind"], x["name"]))


def entry(train: Clips, sample: Sequence[str]) -> dict[str, Any]:
  """Of a run, without its steps and frames."""
  names = [s.name for s in train.segments]
  return {"sources": sources_of(train, sample), "sample": shares(names, train.per_segment(), sample)}


def earlier(state: Mapping[str, Any]) -> History:
  """Of a checkpoint, or what is read of a bundle; of one that does not say it, that it is not known."""
  return list(state["history"]) if "history" in state else [{"steps": state["step"], "frames": 0, "sources": None}]


def joined(a: History, b: History) -> History:
  """Of two students of which one is made: what they have in common counts once. A bundle tells less of a run than its
  checkpoint does: steps, frames and shares say whether it is the same."""

  def told(run: Mapping[str, Any]) -> Any:
    sources = run["sources"]
    shares = None if sources is None else [(s["kind"], s["name"], s["license"], s["share"]) for s in sources]
    return run["steps"], run["frames"], shares

  known = [told(x) for x in a]
  return a + [x for x in b if told(x) not in known]


def totals(history: History) -> tuple[list[dict[str, Any]], bool]:
  """-> the sources of all runs that are known, each with its share of all frames; and whether all are known."""
  frames: dict[tuple[str, str, str], float] = {}
  for run in history:
    for s in run["sources"] or ():
      key = s["kind"], s["name"], s["license"]
      frames[key] = frames.get(key, 0.0) + run["frames"] * s["share"]
  whole = sum(frames.values())
  found = [
    {"kind": k, "name": n, "license": x, "share": f / whole} for (k, n, x), f in frames.items() if whole and f > 0
  ]
  return sorted(found, key=lambda x: (-x["share"], x["kind"], x["name"])), all(
    r["sources"] is not None for r in history
  )


def by_kind(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Share of each kind, the largest first."""
  kinds = dict.fromkeys(x["kind"] for x in found)
  out = {k: float(np.sum([x["share"] for x in found if x["kind"] == k])) for k in kinds}
  return dict(sorted(out.items(), key=lambda x: -x[1]))
