"""A command's options: one frozen dataclass, whose fields are its flags.

  @dataclass(frozen=True)
  class Options:
    route: str = option(positional=True, help="a folder with segments")
    output: Path = option(Path("out/x.mp4"), aliases=("--out",), help="the video")
    seconds: float | None = option(None, parse=above_zero, help="stop after so many seconds")

  options = parse(Options, __doc__, "show")

Every command so made takes `--config FILE`: YAML or JSON of the same names, or a run's folder (its options.yaml). What
is typed wins over it. `--batch_size` is `--batch-size`. Old spellings are aliases: accepted, not shown by --help.
"""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import atomic_path, read_yaml

T = TypeVar("T")
FILE = "options.yaml"  # in a run's folder


def option(
  default: Any = dataclasses.MISSING,
  *,
  help: str,  # noqa: A002
  aliases: Sequence[str] = (),
  positional: bool = False,
  choices: Sequence[str] = (),
  metavar: str | None = None,
  parse: Callable[[str], Any] | None = None,
) -> Any:
  """A field of an options class. Without a default it is required. parse: text -> value, for what the type alone does
  not say; it raises UserError. A tuple's flag may be given again; a positional tuple takes all that is left."""
  meta = {"help": help, "aliases": aliases, "positional": positional}
  return dataclasses.field(
    default=default, metadata={**meta, "choices": tuple(choices), "metavar": metavar, "parse": parse}
  )


class Parser(argparse.ArgumentParser):
  def error(self, message: str) -> typing.NoReturn:
    raise UserError(f"{message}; see `{self.prog} --help`")


class Help(argparse.RawDescriptionHelpFormatter):
  """Of a flag's names it shows the first."""

  def _format_action_invocation(self, action: argparse.Action) -> str:
    flags = list(action.option_strings)
    if len(flags) > 1 and not isinstance(action, argparse._HelpAction):
      action = type("Shown", (), {**vars(action), "option_strings": flags[:1], "format_usage": action.format_usage})()
    return super()._format_action_invocation(action)


def kind_of(hint: Any) -> tuple[type, bool, bool]:
  """-> the type of one value, whether there may be several, whether there may be none."""
  args = typing.get_args(hint)
  if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
    of = [a for a in args if a is not type(None)]
    one, many, _ = kind_of(of[0])
    return one, many, True
  if typing.get_origin(hint) in (tuple, list):
    return args[0], True, False
  return hint, False, False


def reader(field: Any, hint: Any) -> Callable[[Any], Any]:
  """Text, or what a config file holds -> one value of the field."""
  one, _, _ = kind_of(hint)
  own = field.metadata["parse"]

  def read(value: Any) -> Any:
    try:
      if one is bool:
        if not isinstance(value, bool):
          raise ValueError
        return value
      if isinstance(value, (bool, list, dict)) or (
        one in (int, float) and isinstance(value, str) and not value.strip()
      ):
        raise ValueError
      if one is int and isinstance(value, float):
        raise ValueError
      found = own(str(value)) if own is not None else one(value)
    except (ValueError, TypeError):
      raise UserError(f"'{printable(value)[:60]}' is no {'number' if one in (int, float) else one.__name__}") from None
    if field.metadata["choices"] and found not in field.metadata["choices"]:
      raise UserError(f"'{printable(value)[:60]}'; there are {', '.join(field.metadata['choices'])}")
    return found

  return read


def flag_of(field: Any) -> str:
  return "--" + field.name.replace("_", "-")


def read_config(cls: Any, path: Path) -> dict[str, Any]:
  """A config file, or a run's folder -> values by field. Raises UserError."""
  path = path / FILE if path.is_dir() else path
  try:
    said = read_yaml(path)
  except (OSError, ValueError) as e:
    raise UserError(f"--config {path}: {printable(e)[:160]}") from None
  if not isinstance(said, dict):
    raise UserError(f"--config {path}: it is no mapping of options to values")
  hints, fields = typing.get_type_hints(cls), {}
  for f in dataclasses.fields(cls):
    for name in (f.name, *(a.lstrip("-") for a in f.metadata["aliases"])):
      fields[name.replace("-", "_")] = f
  out: dict[str, Any] = {}
  for key, value in said.items():
    field = fields.get(str(key).replace("-", "_"))
    if field is None:
      raise UserError(f"--config {path}: '{printable(key)[:60]}' is no option; there are {', '.join(sorted(fields))}")
    read, (_, many, none) = reader(field, hints[field.name]), kind_of(hints[field.name])
    try:
      if value is None and none:
        out[field.name] = None
      elif many:
        out[field.name] = tuple(read(v) for v in (value if isinstance(value, list) else [value]))
      else:
        out[field.name] = read(value)
    except UserError as e:
      raise UserError(f"--config {path}: {key}: {e}") from None
  return out


def default_text(field: Any, default: Any, one: type) -> str:
  if default in (None, "", ()) or one is bool or default is dataclasses.MISSING or "default" in field.metadata["help"]:
    return ""
  shown = ", ".join(map(str, default)) if isinstance(default, (tuple, list)) else str(default)
  return f" (default: {shown})"


def make_parser(cls: Any, description: str | None, prog: str, given: dict[str, Any]) -> Parser:
  p = Parser(prog=prog, description=description, formatter_class=Help)
  hints = typing.get_type_hints(cls)
  for f in dataclasses.fields(cls):
    one, many, _ = kind_of(hints[f.name])
    required = f.default is dataclasses.MISSING and f.name not in given
    default = given.get(f.name, f.default)
    said = f.metadata["help"] + default_text(f, f.default, one)
    common: dict[str, Any] = {"help": said.replace("%", "%%"), "default": argparse.SUPPRESS}
    if one is not bool:
      common |= {"type": checked(f, hints[f.name]), "metavar": f.metadata["metavar"]}
      if f.metadata["choices"] and f.metadata["metavar"] is None:
        common["metavar"] = "{" + ",".join(f.metadata["choices"]) + "}"
    if f.metadata["positional"]:
      nargs = ("+" if required else "*") if many else (None if required else "?")
      common["metavar"] = common["metavar"] or f.name
      p.add_argument(f.name, nargs=nargs, **common)
      continue
    flags = [flag_of(f), *f.metadata["aliases"]]
    if one is bool:
      if default is True:
        flags = ["--no-" + flag_of(f)[2:], *f.metadata["aliases"]]
      p.add_argument(*flags, dest=f.name, action="store_const", const=default is not True, **common)
    else:
      p.add_argument(*flags, dest=f.name, required=required, action="append" if many else "store", **common)
  p.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="YAML or JSON of these options")
  return p


def checked(field: Any, hint: Any) -> Callable[[str], Any]:
  """reader() for argparse, whose own message would hide ours."""
  read, where = reader(field, hint), field.name if field.metadata["positional"] else flag_of(field)

  def convert(text: str) -> Any:
    try:
      return read(text)
    except UserError as e:
      raise UserError(f"{where}: {e}") from None

  return convert


def parse(cls: type[T], description: str | None, prog: str, argv: Sequence[str] | None = None) -> T:
  """The command line (sys.argv's by default) as an instance of `cls`. Raises UserError."""
  words = [
    "--" + w[2:].partition("=")[0].replace("_", "-") + "".join(w[2:].partition("=")[1:]) if w.startswith("--") else w
    for w in (sys.argv[1:] if argv is None else argv)
  ]
  first = Parser(prog=prog, add_help=False, allow_abbrev=False)
  first.add_argument("--config", type=Path)
  config = first.parse_known_args(list(words))[0].config
  given = read_config(cls, config) if config is not None else {}
  typed = vars(make_parser(cls, description, prog, given).parse_args(words))
  typed.pop("config", None)
  hints = typing.get_type_hints(cls)
  for f in dataclasses.fields(cls):  # type: ignore[arg-type]
    if kind_of(hints[f.name])[1] and f.name in typed:
      typed[f.name] = tuple(typed[f.name])
  # a positional that was left out comes as its default, None or empty
  typed = {k: v for k, v in typed.items() if not (v in (None, ()) and k in given)}
  return cls(**{**given, **typed})


def save(options: Any, folder: Path) -> None:
  """Writes options.yaml, from which `--config FOLDER` starts the command again."""
  import yaml

  def simple(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
      return [simple(v) for v in value]
    return str(value) if isinstance(value, Path) else value

  said = {f.name: simple(getattr(options, f.name)) for f in dataclasses.fields(options)}
  with atomic_path(folder / FILE) as tmp:
    tmp.write_text(yaml.safe_dump(said, sort_keys=False))
