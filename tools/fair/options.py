"""A teacher's options from the command line, `--option TEACHER.key=value`: the annotated keywords of what makes it, and
nothing besides.

Only `tools/op.sh teachers NAME` and --option import the teacher's module for this: it may want torch."""

import inspect
import math
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from openpilot.tools.fair.registry import find_entry, maker_of
from openpilot.tools.lib.errors import UserError

KINDS: dict[type, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
# what the registry or another flag says; model_size and registers: the weights say it
NOT_OPTIONS = ("name", "entry", "path", "weights", "license", "device", "model_size", "registers")


@dataclass(frozen=True)
class Option:
  name: str
  kind: type  # of KINDS
  many: bool  # a tuple of them
  default: Any

  @property
  def says(self) -> str:
    return KINDS[self.kind] + (", or several separated by commas" if self.many else "")

  @property
  def default_text(self) -> str:
    """As it would be written after the equals sign; '' where it is left to the teacher."""
    values = self.default if isinstance(self.default, tuple | list) else (self.default,)
    return "" if self.default is None else ",".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)

  def parse(self, text: str) -> Any:
    """Raises UserError where it is of another kind."""
    try:
      values = [self._one(x.strip()) for x in (text.split(",") if self.many else [text])]
    except (ValueError, KeyError, OverflowError):
      raise UserError(f"{self.name} is {self.says}, not '{text}'") from None
    return tuple(values) if self.many else values[0]

  def _one(self, text: str) -> Any:
    if not text:
      raise ValueError
    value = BOOLS[text.lower()] if self.kind is bool else self.kind(text)
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError
    return value


def _kind(annotation: Any) -> tuple[type, bool] | None:
  """An annotation -> one of KINDS, and whether many of it; None where it cannot be written in a command."""
  parts = list(get_args(annotation)) if get_origin(annotation) in (types.UnionType, Union) else [annotation]
  parts = [p for p in parts if p not in (types.NoneType, Path)]
  if len(parts) != 1:
    return None
  items = get_args(parts[0])
  if get_origin(parts[0]) is tuple and len(items) == 2 and items[1] is Ellipsis and items[0] in KINDS:
    return items[0], True
  return (parts[0], False) if parts[0] in KINDS else None


def _parameters(make: Callable[..., Any]) -> Iterator[inspect.Parameter]:
  """Of a function or class, and of those that it passes its ** on to: the class that a function returns, a class's
  bases, its PASSES_ON."""
  rest: list[Any] = [make]
  while rest:
    target = rest.pop(0)
    if isinstance(target, type):
      rest += [getattr(b, "__init__") for b in target.__mro__[:-1] if "__init__" in vars(b)]  # noqa: B009 (mypy forbids it as an attribute)
      rest += [target.PASSES_ON] if hasattr(target, "PASSES_ON") else []
      continue
    signature = inspect.signature(target)
    passes_on = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    yield from signature.parameters.values()
    if not passes_on:
      return
    if isinstance(signature.return_annotation, type):
      rest.insert(0, signature.return_annotation)


def options_of(name: str) -> dict[str, Option]:
  """A teacher's options by name, with the registry entry's defaults. Raises UserError where there is no such
  teacher."""
  name, entry = find_entry(name)
  make = maker_of(name, entry)
  fixed = (*NOT_OPTIONS, *getattr(make, "FIXED", ()))
  found: dict[str, Option] = {}
  for p in _parameters(make):
    kind = _kind(p.annotation)
    if kind is not None and p.name not in fixed and p.name not in found and p.default is not p.empty:
      found[p.name] = Option(p.name, *kind, entry.options.get(p.name, p.default))
  return found


def parse_options(items: list[str], teachers: list[str]) -> dict[str, dict[str, Any]]:
  """['sam3.prompts=car,tram', ...] -> of each of `teachers` its keyword arguments. Raises UserError on a teacher, key
  or value that is none."""
  out: dict[str, dict[str, Any]] = {t: {} for t in teachers}
  for item in items:
    left, equals, text = item.partition("=")
    name, _, key = left.rpartition(".")  # names have dots, keys have none
    if not equals or name not in out:
      raise UserError(f"--option {item}: write TEACHER.key=value, with one of --teachers ({', '.join(teachers)})")
    there = options_of(name)
    if key not in there:
      raise UserError(f"--option {item}: teacher '{name}' has no option '{key}'; it has {', '.join(there) or 'none'}")
    try:
      out[name][key] = there[key].parse(text)
    except UserError as e:
      raise UserError(f"--option {item}: {e}") from None
  return out
