"""Options of commands that have been renamed: the former names are accepted, and not shown."""

import argparse
from typing import Any


def add_flag(p: argparse.ArgumentParser, name: str, *former: str, **how: Any) -> None:
  """As p.add_argument(name, **how); `former` names mean the same, and --help does not list them."""
  p.add_argument(name, *former, **how).option_strings = [name]  # for --help; the parser has a lookup of its own
