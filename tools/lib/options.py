"""A command's options: one frozen dataclass, whose fields are its flags.

  @dataclass(frozen=True)
  class Options:
    route: str = option(positional=True, help="a folder with segments")
    output: Path = option(Path("out/x.mp4"), aliases=("--out",), help="the video")
    seconds: float | None = option(None, parse=above_zero, help="stop after so many seconds")

  options = parse(Options, __doc__, "show")

Every command so made takes `--config FILE`: YAML or JSON of the same names, or a run's folder (its options.yaml). What
is typed wins over it. `--batch_size` is `--batch-size`. Old spellings are aliases: accepted, not shown by --help.

A command that makes a run calls save(): `--config RUN` then starts the same again, and with --resume goes on.
"""

import argparse
import dataclasses
import shlex
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
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
  choices: Sequence[Any] = (),
  metavar: str | tuple[str, ...] | None = None,
  parse: Callable[[str], Any] | None = None,
  nargs: str | int | None = None,
  bare: Any = None,
  path: bool = False,
) -> Any:
  """A field of an options class. Without a default it is required. parse: text -> value, for what the type alone does
  not say; it raises UserError. A tuple's flag may be given again; a positional tuple takes all that is left.

  nargs: words that a tuple's flag takes each time, "+" or a number. bare: the value of a flag with no word after it.
  path: it may be a path, alone, before a colon or after an equals sign, or a name; save() makes paths absolute."""
  meta = {"help": help, "aliases": aliases, "positional": positional, "nargs": nargs, "bare": bare, "path": path}
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
    return one, many, len(of) < len(args)
  if typing.get_origin(hint) in (tuple, list):
    return args[0], True, False
  return hint, False, False


def reader(field: Any, hint: Any) -> Callable[[Any], Any]:
  """Text, or what a config file holds -> one value of the field."""
  one, _, _ = kind_of(hint)
  own, bare, yes_too = field.metadata["parse"], field.metadata["bare"], bool in typing.get_args(hint)

  def read(value: Any) -> Any:
    if (isinstance(value, bool) and yes_too) or (bare is not None and value == bare):
      return value
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
      raise UserError(f"'{printable(value)[:60]}'; there are {listed(field.metadata['choices'])}")
    return found

  return read


def listed(values: Sequence[Any]) -> str:
  return ", ".join(map(str, values))


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
    name = str(key).replace("-", "_")
    field = fields.get(name)
    positive = fields.get(name.removeprefix("no_"))
    if field is None and positive is not None and positive.default is True and isinstance(value, bool):
      field, value = positive, not value  # as the flag is spelled
    if field is None:
      raise UserError(f"--config {path}: '{printable(key)[:60]}' is no option; there are {', '.join(sorted(fields))}")
    read, (_, many, none) = reader(field, hints[field.name]), kind_of(hints[field.name])
    try:
      if value is None and none:
        out[field.name] = None
      elif many:
        out[field.name] = tuple(read(v) for v in (value if isinstance(value, list) else [value]))
        if isinstance(n := field.metadata["nargs"], int) and len(out[field.name]) != n:
          raise UserError(f"it is a list of {n}")
      else:
        out[field.name] = read(value)
    except UserError as e:
      raise UserError(f"--config {path}: {key}: {e}") from None
  return out


def default_text(default: Any, one: type) -> str:
  if default in (None, "", ()) or one is bool or isinstance(default, bool) or default is dataclasses.MISSING:
    return ""
  if isinstance(default, Path) and default.is_relative_to(Path.cwd()):
    default = default.relative_to(Path.cwd())
  return f" (default: {listed(default) if isinstance(default, (tuple, list)) else default})"


def make_parser(cls: Any, description: str | None, prog: str, given: dict[str, Any]) -> Parser:
  p = Parser(prog=prog, description=description, formatter_class=Help)
  hints = typing.get_type_hints(cls)
  for f in dataclasses.fields(cls):
    one, many, _ = kind_of(hints[f.name])
    required = f.default is dataclasses.MISSING and f.name not in given
    default = given.get(f.name, f.default)
    said = f.metadata["help"] + default_text(default, one)
    common: dict[str, Any] = {"help": said.replace("%", "%%"), "default": argparse.SUPPRESS}
    if one is not bool:
      common |= {"type": checked(f, hints[f.name]), "metavar": f.metadata["metavar"]}
      if f.metadata["choices"] and f.metadata["metavar"] is None:
        common["metavar"] = "{" + ",".join(map(str, f.metadata["choices"])) + "}"
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
      if f.metadata["nargs"] is not None:
        common["nargs"] = f.metadata["nargs"]
      elif f.metadata["bare"] is not None:
        common |= {"nargs": "?", "const": f.metadata["bare"]}
      action = "store" if not many else "append" if f.metadata["nargs"] is None else "extend"
      action = "store" if isinstance(f.metadata["nargs"], int) else action
      p.add_argument(*flags, dest=f.name, required=required, action=action, **common)
  p.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="YAML or JSON of these options")
  return p


def checked(field: Any, hint: Any) -> Callable[[str], Any]:
  """reader() for argparse, whose own message would hide ours."""
  read, where = reader(field, hint), field.name if field.metadata["positional"] else flag_of(field)

  def convert(text: str) -> Any:
    if text is argparse.SUPPRESS:
      return text  # of a positional that a config file gives
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


def absolute(text: str) -> str:
  """A text that may be a path, alone, as PATH:PART or NAME=PATH: the path made absolute where there is such a file."""
  for before, mark, after in ((text, "", ""), text.rpartition(":")):
    if before and Path(before).exists():
      return f"{Path(before).absolute()}{mark}{after}"
  name, mark, path = text.partition("=")
  return f"{name}={Path(path).absolute()}" if mark and path and Path(path).exists() else text


def save(options: Any, folder: Path) -> None:
  """Writes options.yaml, from which `--config FOLDER` starts the command again: paths are made absolute, --resume is
  left out. It names folders of this machine: nothing of it may be published."""
  import yaml

  def simple(field: Any, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
      return [simple(field, v) for v in value]
    if field.metadata["path"] and isinstance(value, (str, Path)):
      return absolute(str(value))
    return str(value.absolute()) if isinstance(value, Path) else value

  fields = [f for f in dataclasses.fields(options) if f.name != "resume"]
  with atomic_path(folder / FILE) as tmp:
    tmp.write_text(yaml.safe_dump({f.name: simple(f, getattr(options, f.name)) for f in fields}, sort_keys=False))


def command_line(options: Any) -> str:
  """What is typed for these options, wherever they came from; defaults are left out."""

  def words(field: Any, value: Any) -> Iterator[str]:
    flag, many = flag_of(field), isinstance(value, tuple)
    if field.metadata["positional"]:
      yield from map(str, value if many else [value])
    elif isinstance(value, bool) and field.metadata["bare"] is None:
      yield flag if value else f"--no-{flag[2:]}"
    elif many and field.metadata["nargs"] is not None:
      yield from (flag, *map(str, value))
    else:
      for v in value if many else [value]:
        bare = field.metadata["bare"] is not None and v == field.metadata["bare"]
        yield from [flag] if bare else [f"{flag}={v}"] if str(v).startswith("-") else [flag, str(v)]

  fields = sorted(dataclasses.fields(options), key=lambda f: not f.metadata["positional"])
  said = [(f, getattr(options, f.name)) for f in fields]
  return shlex.join(w for f, v in said if v != f.default and v is not None for w in words(f, v))
