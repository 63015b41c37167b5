"""Texts that are printed or published: commands that can be typed as they are, and nothing that identifies a person."""

import re
import shlex
import unicodedata
from itertools import pairwise
from pathlib import Path

# a device's id in front of a drive, the drive (by its time, or by a count and a random number), its segment
ROUTE = re.compile(
  r"(?:(?<![0-9A-Za-z])[0-9a-f]{16}[|_/](?:\w+/)?)?(?<![0-9A-Za-z])(?:\d{4}-\d\d-\d\d--\d\d-\d\d-\d\d|[0-9a-f]{8}--[0-9a-f]{10})(?![0-9A-Za-z])(?:--\d+|/\d+)?"
)
VIN = re.compile(
  r"(?<![0-9A-Za-z])(?=[A-HJ-NPR-Z0-9]*\d)(?=[A-HJ-NPR-Z0-9]*[A-HJ-NPR-Z])[A-HJ-NPR-Z0-9]{17}(?![0-9A-Za-z])"
)
ABSOLUTE = re.compile(r"(?<![\w./:~-])(?:file://)?(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\'\"`,;:()<>|]+)+[/\\]?")
DONGLE = re.compile(r"(?<![0-9A-Za-z])[0-9a-f]{16}(?=[|/])")


def drawn(text: str) -> str:
  """As Pillow's own font can draw it, which has a box for most of what is no ASCII: letters without their marks, ß as
  ss, dashes as hyphens."""
  for a, b in (("ß", "ss"), ("\u2013", "-"), ("\u2014", "-")):
    text = text.replace(a, b)
  plain = unicodedata.normalize("NFKD", text)
  return "".join(c for c in plain if not unicodedata.combining(c))


def command(*words: str | Path) -> str:
  """A command line for a shell, quoted where needed."""
  return shlex.join(map(str, words))


def public(text: str | Path) -> str:
  """text without what identifies a person: names of drives and devices, VINs, and all of a path but its last part. For
  texts that ship or may be published."""
  text = ROUTE.sub("ROUTE", str(text))
  text = DONGLE.sub("DEVICE", text)
  text = VIN.sub("VIN", text)
  return ABSOLUTE.sub(lambda m: re.split(r"[/\\]", m[0].rstrip("/\\"))[-1], text)


def public_path(path: str | Path) -> str:
  """The last part of a path, without what identifies a person."""
  return public(Path(path).name or Path(path).resolve().name)


def public_command(text: str) -> str:
  """A command line's options without what identifies a person: of a path the last part stays. Where paths with spaces
  were not quoted, so that they cannot be recognized, all values are left out."""
  try:
    words = shlex.split(text)
  except ValueError:
    words = text.split()
  stray = any(not a.startswith("-") and not b.startswith("-") for a, b in pairwise(["value", *words]))
  said = []
  for word in words:
    name, mark, value = word.rpartition("=")
    if re.match(r"[/~\\]|[A-Za-z]:[/\\]|file:", value):
      value = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    said.append("..." if stray and not word.startswith("-") else public(name + mark + value))
  return shlex.join(said)
