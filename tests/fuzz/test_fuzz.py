"""A little of each kind of the fuzz command; more where there is time."""

import importlib

import pytest

from tests.fuzz.fuzz import KINDS, fuzz

# of each kind: cases, and what they must come to at least, or the fuzz does not reach what it is for
FEW = {
  "logs": (12, {"read": 60}),
  "videos": (20, {"pictures": 100}),
  "manifests": (300, {"read": 5, "kinds of refusal": 15}),
  "messages": (2000, {"read": 2000, "faults": 300, "frames": 20, "lines": 20}),
  "camera": (2000, {"read": 2000, "frames": 100, "connected": 20, "served": 3}),
  "stores": (20, {"read": 2, "refused": 5}),
  "checkpoints": (10, {"read": 1, "refused": 4}),
}
MANY = {"logs": 250, "videos": 1500, "manifests": 4000, "messages": 50_000, "camera": 50_000, "stores": 300}


def run(kind: str, seed: int, cases: int, seconds: float) -> dict[str, int]:
  if kind in ("logs", "stores", "checkpoints"):
    for package in ("cv2", *(() if kind == "logs" else ("torch", "transformers", "zarr"))):
      pytest.importorskip(package)
  counts, wrong = fuzz(importlib.import_module(f"tests.fuzz.{kind}"), seed, cases, seconds)
  assert not wrong
  return counts


@pytest.mark.parametrize("kind", KINDS)
def test_some(kind):
  cases, least = FEW[kind]
  counts = run(kind, 2, cases, 600.0)
  assert counts["cases"] == cases and {k: counts[k] for k in least if counts[k] < least[k]} == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_minute_of_each(kind):
  counts = run(kind, 3, MANY.get(kind, 200), 60.0)  # the same on every machine, unless it is slow
  assert counts["read"] > 20
