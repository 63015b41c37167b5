"""Routes on disk, in openpilot's three local layouts and as plain folders.

DIR/<dongle>|<log id>--<n>/rlog.zst      (also <log id>--<n>/, <dongle>_<log id>--<n>/)
DIR/<dongle>_<log id>--<n>--rlog.zst     (flat)
DIR/<route>/<n>/rlog.zst                (comma2k19: DIR/<dongle>|<time>/<n>/raw_log.bz2, video.hevc)
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from openpilot.tools.lib.errors import UserError, warn

FILES = {  # attribute -> file names, the newest spelling first
  "rlog": ("rlog.zst", "rlog.bz2", "rlog", "raw_log.bz2"),
  "qlog": ("qlog.zst", "qlog.bz2", "qlog"),
  "fcamera": ("fcamera.hevc", "fcamera.mp4", "video.hevc"),
  "ecamera": ("ecamera.hevc", "ecamera.mp4"),
  "dcamera": ("dcamera.hevc", "dcamera.mp4"),
  "qcamera": ("qcamera.ts", "qcamera.mp4"),
}
NAMES = {name: attribute for attribute, names in FILES.items() for name in names}
VIDEO_SUFFIXES = (
  ".hevc",
  ".h265",
  ".mp4",
  ".ts",
  ".mkv",
  ".avi",
  ".mov",
  ".m4v",
  ".webm",
  ".mts",
  ".m2ts",
  ".3gp",
  ".mpg",
  ".mpeg",
  ".wmv",
  ".flv",
  ".gif",
)
SEGMENT = re.compile(r"^(?:(?P<dongle>[0-9a-f]{16})[|_])?(?P<log>.+?)--(?P<n>\d+)$")
FLAT = re.compile(r"^(?P<route>.+?)--(?P<n>\d+)--(?P<file>[^-]+)$")
CONNECT = re.compile(
  r"^(?:https?://)?(?:connect\.comma\.ai/)?(?P<dongle>[0-9a-f]{16})[|/_](?P<log>[^/|]+?)(?P<rest>/.*)?$"
)  # a route's name, or its address
RANGE = re.compile(r"^(?P<first>-?\d+)?(?P<colon>:)?(?P<last>-?\d+)?$")


@dataclass
class Segment:
  """One minute of a route. Missing files are None."""

  route: str
  num: int
  dir: Path
  files: dict[str, Path] = field(default_factory=dict)
  numbered: bool = True  # num is in the name of its folder or files

  @property
  def name(self) -> str:
    return f"{self.route}--{self.num}"

  @property
  def rlog(self) -> Path | None:
    return self.files.get("rlog")

  @property
  def qlog(self) -> Path | None:
    return self.files.get("qlog")

  @property
  def fcamera(self) -> Path | None:
    return self.files.get("fcamera")

  @property
  def ecamera(self) -> Path | None:
    return self.files.get("ecamera")

  @property
  def dcamera(self) -> Path | None:
    return self.files.get("dcamera")

  @property
  def qcamera(self) -> Path | None:
    return self.files.get("qcamera")

  @property
  def log_path(self) -> Path | None:
    """The rlog, else the qlog."""
    return self.rlog or self.qlog


def files_in(folder: Path) -> dict[str, Path]:
  there = {p.name.lower(): p for p in sorted(folder.iterdir(), reverse=True) if p.is_file()}
  return {
    attribute: next(there[n] for n in names if n in there)
    for attribute, names in FILES.items()
    if any(n in there for n in names)
  }


def log_of(name: str) -> str:
  """<dongle>|<log id>, either separator -> the log id."""
  return re.sub(r"^[0-9a-f]{16}[|_]", "", name)


def segments_in(folder: Path, deeper: int = 1) -> list[Segment]:
  """All segments in a folder, of any layout, sorted by route and number; where it has none, those of its subfolders."""
  found: dict[tuple[str, int], Segment] = {}
  folders = []
  for p in sorted(folder.iterdir()):
    if p.is_dir() and (m := SEGMENT.match(p.name)) and (files := files_in(p)):
      found[(m["log"], int(m["n"]))] = Segment(m["log"], int(m["n"]), p, files)
    elif p.is_dir() and p.name.isdecimal() and (files := files_in(p)):
      log = log_of(folder.resolve().name)
      found[(log, int(p.name))] = Segment(log, int(p.name), p, files)
    elif p.is_dir():
      folders.append(p)
    elif p.is_file() and (m := FLAT.match(p.name)) and m["file"] in NAMES:
      key = (log_of(m["route"]), int(m["n"]))
      found.setdefault(key, Segment(*key, folder)).files.setdefault(NAMES[m["file"]], p)
  # DIR/<route>/<n>, and comma2k19's Chunk_1/<route>/<n>
  for p in folders if deeper and not found else []:
    found |= {(s.route, s.num): s for s in segments_in(p, deeper - 1)}
  return [found[k] for k in sorted(found)]


class Route:
  """`Route("dir")`, `Route("dir/route/2:5")`, `Route("route", data_dir)`: the segments of one route that are on disk.

  name: a folder with segments, a segment's folder, one video or log file, or a route's name (dongle and separator
  optional, connect's addresses too) looked for in data_dir; each may be followed by /n or /first:last, a Python slice
  of segment numbers. Raises UserError saying where it looked and what is there."""

  def __init__(self, name: str | Path, data_dir: str | Path | None = None):
    text = str(name).rstrip("/")
    try:
      self._open(text, data_dir)
    except (OSError, ValueError) as e:  # a name too long, or with a zero in it; a folder that may not be read
      raise UserError(f"no route at '{text[:200]}': {getattr(e, 'strerror', None) or e}") from None
    self.name = self.segments[0].route

  def _open(self, text: str, data_dir: str | Path | None) -> None:
    self.segments = self._find(text, Path(data_dir) if data_dir else None)
    if not self.segments and (
      m := CONNECT.match(text)
    ):  # connect's name; the seconds behind it are not segment numbers
      rest = m["rest"] if m["rest"] and RANGE.match(m["rest"][1:]) else ""
      if m["rest"] and not rest:
        warn(f"'{m['rest']}' behind the route's name is not used; choose a part with --start and --seconds")
      short = f"{m['log']}{rest}"
      folder = Path(data_dir) if data_dir else Path()
      below = (folder / m["dongle"] / m["log"]).is_dir()
      if below or any(log_of(m["log"]) in (s.route, s.name) for s in segments_in(folder)):
        text = f"{m['dongle']}/{short}" if below else short
        self.segments = self._find(text, folder)
    if not self.segments:
      head, _, tail = text.rpartition("/")
      m = RANGE.match(tail)
      if not head or not m or not tail:
        raise UserError(self._nothing(text, data_dir))
      whole = self._find(head, Path(data_dir) if data_dir else None)
      if not whole:
        raise UserError(self._nothing(head, data_dir))
      self.segments = self._cut(whole, m, text)

  @staticmethod
  def _cut(segments: list[Segment], m: re.Match, text: str) -> list[Segment]:
    top = segments[-1].num + 1
    first, last = (None if m[k] is None else int(m[k]) for k in ("first", "last"))
    if not m["colon"]:
      first = first + top if first is not None and first < 0 else first
      wanted = range(first or 0, (first or 0) + 1)
    else:
      wanted = range(*slice(first, last).indices(top))
    cut = [s for s in segments if s.num in wanted]
    if not cut:
      raise UserError(f"'{text}': no such segments; there are {', '.join(str(s.num) for s in segments[:20])}")
    return cut

  @staticmethod
  def _nothing(text: str, data_dir: str | Path | None) -> str:
    where = Path(data_dir) if data_dir else Path(text)
    if where.exists() and not where.is_dir() and not where.is_file():
      return f"{where} is neither a folder nor a file"
    if not where.exists():
      place = f"'{text}'{f' in {data_dir}' if data_dir else ''}"
      what = f"no route at {place}: there is no such file or folder"
      return f"{what}; give a folder with segments, or a route's name and --data-dir"
    there = sorted(p.name for p in where.iterdir())[:6] if where.is_dir() else []
    found = "are " + ", ".join(there) if there else "is nothing"
    return f"no route '{text}' in {where}: no folder there holds rlog, qlog or camera files; there {found}"

  @staticmethod
  def _find(text: str, data_dir: Path | None) -> list[Segment]:
    path = Path(text) if data_dir is None else data_dir / text
    if path.is_file():
      kind = NAMES.get(path.name.lower()) or ("fcamera" if path.suffix.lower() in VIDEO_SUFFIXES else "rlog")
      m = SEGMENT.match(path.parent.name)
      return [
        Segment(m["log"], int(m["n"]), path.parent, {kind: path})
        if m
        else Segment(path.stem, 0, path.parent, {kind: path}, False)
      ]
    if path.is_dir():
      if files := files_in(path):
        if path.name.isdecimal():  # DIR/<route>/<n>
          return [Segment(log_of(path.resolve().parent.name), int(path.name), path, files)]
        m = SEGMENT.match(path.name)
        return [Segment(m["log"], int(m["n"]), path, files) if m else Segment(path.name, 0, path, files, False)]
      all_there = segments_in(path, 2)
      routes = sorted({s.route for s in all_there})
      if len(routes) > 1:
        raise UserError(
          f"{path} holds {len(routes)} routes; name one: {', '.join(routes[:6])}{' ...' if len(routes) > 6 else ''}, "
          f"as {path}/{routes[0]}"
        )
      return all_there
    # a route's name inside a folder: DIR/<dongle>|<log id>
    folder, name = (path.parent, path.name)
    if folder.is_dir():
      log_id = log_of(name)
      if m := SEGMENT.match(log_id):
        exact = [s for s in segments_in(folder) if s.route == m["log"] and s.num == int(m["n"])]
        if exact:
          return exact
      return [s for s in segments_in(folder) if s.route == log_id]
    return []
