"""Numbers that the command line gives to segments by their names."""

import math
from collections.abc import Sequence

from openpilot.tools.lib.errors import UserError


def numbers_of(flag: str, items: Sequence[str], example: str, low: float, high: float) -> list[tuple[str, float]]:
  """'GLOB=NUMBER' each -> (glob, number from low to high). example: how it is written. Raises UserError."""
  out = []
  for item in items:
    glob, _, text = item.rpartition("=")
    try:
      number = float(text)
    except ValueError:
      number = math.nan
    if not glob or not low <= number <= high:
      raise UserError(f"{flag} {item}: write {example}, with a number from {low:g} to {high:g}")
    out.append((glob, number))
  return out
