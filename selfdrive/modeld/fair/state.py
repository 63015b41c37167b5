"""What fairState tells of a graph, and of what went wrong."""

from dataclasses import dataclass
from typing import Any

USUAL = 0.1  # weight of a run in a graph's usual time
MAX_FAULT = 240  # characters


def first_line(e: Exception) -> str:
  return (str(e).strip() or type(e).__name__).splitlines()[0][:160]


def plain(fault: str) -> str:
  """What a message can carry: one line, not too long, nothing that is no text."""
  return " ".join(fault.encode(errors="replace").decode().split())[:MAX_FAULT]


@dataclass
class GraphStats:
  runs: int = 0
  total: float = 0.0  # s since the last fairState
  longest: float = 0.0
  count: int = 0
  valid: bool = True
  fault: str = ""
  usual: float = 0.0  # s, filtered: run and decode
  late: int = 0

  def ran(self, seconds: float) -> None:
    self.runs += 1
    self.count += 1
    self.total += seconds
    self.longest = max(self.longest, seconds)

  def took(self, seconds: float) -> None:
    """A run of the graph and all that is done for it."""
    self.usual += (seconds - self.usual) * (USUAL if self.runs > 1 else 1)

  def tell(self, entry: Any, graph: dict[str, Any]) -> None:
    """Fills an entry of fairState.graphs with what came since the last one. graph: its entry in the manifest."""
    entry.name, entry.runs, entry.period, entry.valid, entry.fault = (
      graph["name"],
      self.runs,
      graph["period"],
      self.valid,
      self.fault,
    )
    entry.late = self.late
    entry.executionTime, entry.executionTimeMax = self.total / max(1, self.count), self.longest
    self.total, self.longest, self.count = 0.0, 0.0, 0
