"""Sources of what is labeled: see source.py. Another package adds one with register_source(name, source)."""

from openpilot.tools.fair.labels.remote import FILE_URL, folder_of
from openpilot.tools.fair.labels.sources.class_maps import ClassMaps
from openpilot.tools.fair.labels.sources.coco import Coco
from openpilot.tools.fair.labels.sources.dota import Dota
from openpilot.tools.fair.labels.sources.pictures import PictureFolders, Pictures
from openpilot.tools.fair.labels.sources.fetched import RoutesByUrl, RoutesOfConnect
from openpilot.tools.fair.labels.sources.routes import Routes
from openpilot.tools.fair.labels.sources.source import (
  SOURCES,
  Piece,
  Source,
  SourceOptions,
  open_pieces,
  pieces_of,
  register_source,
)
from openpilot.tools.fair.labels.sources.stills import Stills
from openpilot.tools.fair.labels.sources.yolo import Yolo
from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.lib.errors import UserError

__all__ = [
  "SOURCES",
  "Part",
  "Piece",
  "Source",
  "SourceOptions",
  "find_pieces",
  "open_pieces",
  "open_sources",
  "register_source",
]

Part = SegmentView | Pictures

register_source("pictures", PictureFolders())
register_source("stills", Stills())
register_source("routes", Routes())
register_source("class_maps", ClassMaps())
register_source("yolo", Yolo())
register_source("coco", Coco())
register_source("dota", Dota())
register_source("url", RoutesByUrl())
register_source("connect", RoutesOfConnect())


def find_source(path: str, options: SourceOptions, named: str = "") -> Source:
  """The one named, or the newest that accepts the path, or the one for routes, which says best what is not there."""
  if named:
    if named not in SOURCES:
      raise UserError(f"no source '{named}'; there are {', '.join(f'{k}: {s.says}' for k, s in SOURCES.items())}")
    return SOURCES[named]
  return next((s for s in reversed(SOURCES.values()) if s.accepts(path, options)), SOURCES["routes"])


def by_source(paths: list[str], options: SourceOptions, named: str) -> list[tuple[Source, list[str]]]:
  """The sources of the paths, each with its own."""
  out: dict[int, tuple[Source, list[str]]] = {}
  for path in (str(folder_of(p)) if FILE_URL.fullmatch(p) else p for p in paths):
    source = find_source(path, options, named)
    out.setdefault(id(source), (source, []))[1].append(path)
  return list(out.values())


def open_sources(paths: list[str], options: SourceOptions, named: str = "") -> list[Part]:
  """All parts of all paths that can be opened, each once; the others are named. Raises UserError as find_pieces()."""
  return open_pieces(find_pieces(paths, options, named))[0]


def find_pieces(paths: list[str], options: SourceOptions, named: str = "") -> list[Piece]:
  """All pieces of all paths, each once; of routes they are not opened. Raises UserError where two folders of pictures
  go by one name."""
  pieces: dict[str, Piece] = {}
  for source, own in by_source(paths, options, named):
    for piece in pieces_of(source, own, options):
      same = pieces.setdefault(piece.name, piece)
      if same is piece or piece.part is None:
        continue
      if same.part is None or same.part.camera() != piece.part.camera():
        places = " and ".join(
          str(p.part.segment.dir) if p.part is not None else f"a segment of {p.route}" for p in (same, piece)
        )
        raise UserError(f"{places} would both be '{piece.name}' in the store; label one by one, each with a --name")
  return list(pieces.values())
