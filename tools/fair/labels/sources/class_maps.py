"""Pictures with class maps: one picture of class ids, or of colors, for each; in CamVid's layout, Cityscapes', and
others with a suffix behind the name or in nested folders."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from openpilot.tools.fair.labels.sources.pictures import Carries, Pictures, Still, below, look_at, name_of, say_left_out
from openpilot.tools.fair.labels.sources.source import Said, SourceOptions
from openpilot.tools.lib.errors import UserError, warn
from openpilot.tools.lib.files import MB, read_bytes
from openpilot.tools.lib.pictures import MODES_16, PictureError, find_pictures, open_image, reasons, to_rgb
from openpilot.tools.sim.truth import IGNORE

PICTURE_SUFFIXES = ("", "_leftImg8bit")  # of pictures' names, which their maps' do not have
MAP_SUFFIXES = (
  "", "_L", "_mask", "_label", "_labels", "_gt", "_seg", "_gtFine_labelIds", "_gtFine_labelTrainIds", "_labelIds",
)  # fmt: skip
BESIDE = ("annot", "ann", "annotations", "masks", "labels", "gt")  # folders beside the pictures'
Palette = Sequence[tuple[tuple[int, int, int], str]]


def read_palette(text: str) -> Palette:
  """'402020=road,ff0000=lane', or a file of lines 'R G B name' -> colors and their classes' names. Raises UserError."""
  path, wrong = Path(text), f"--palette {text[:80]}: write RRGGBB=NAME,..., or name a file of lines 'R G B NAME'"
  out: list[tuple[tuple[int, int, int], str]] = []
  try:
    if "=" not in text or path.is_file():
      for line in read_bytes(path, MB).decode("utf-8", "replace").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
          r, g, b, name = line.split(None, 3)
          out.append(((int(r), int(g), int(b)), name.strip()))
    else:
      for item in text.split(","):
        color, _, name = item.partition("=")
        color = color.strip().removeprefix("#")
        if len(color) != 6 or not name.strip():
          raise ValueError
        out.append(((int(color[:2], 16), int(color[2:4], 16), int(color[4:], 16)), name.strip()))
    if not out or any(not 0 <= v <= 255 for c, _ in out for v in c):
      raise ValueError
  except (OSError, ValueError) as e:
    raise UserError(f"{wrong}{f' ({e.strerror})' if isinstance(e, OSError) and e.strerror else ''}") from None
  return out


def read_ids(path: Path) -> np.ndarray:
  """(H, W) uint8 class ids, those of 255 and more unknown. Raises PictureError; UserError where its pixels are
  colors."""
  with reasons(path):
    image = open_image(path)
    if image.mode in ("L", "P", "1", *MODES_16):
      return np.asarray(image).astype(np.int64).clip(0, IGNORE).astype(np.uint8)
  raise UserError(
    f"{path} is a picture of mode {image.mode}; class ids are one number a pixel: of colors say their classes with "
    "--palette"
  )


def read_colors(path: Path, palette: Palette, classes: Sequence[str]) -> tuple[np.ndarray, Counter[int]]:
  """-> (H, W) uint8 index into classes, 255 where the palette does not have the color; and how many pixels have which
  other colors (0xRRGGBB). Raises PictureError."""
  with reasons(path):
    rgb = np.asarray(to_rgb(open_image(path)).convert("RGB"), np.uint32)
  code = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
  out = np.full(code.shape, IGNORE, np.uint8)
  rest = np.ones(code.shape, bool)
  for (r, g, b), name in palette:
    here = code == (r << 16 | g << 8 | b)
    out[here], rest[here] = classes.index(name), False
  colors, counts = np.unique(code[rest], return_counts=True)
  return out, Counter(dict(zip(colors.tolist(), counts.tolist(), strict=True)))


def match(pictures: list[Path], folder: Path, maps: list[Path], annotations: Path, suffix: str) -> dict[Path, Path]:
  """picture -> its class map, by path below the two folders without ending, else by name alone; of the suffixes that
  are known the one that fits most is taken."""
  there: dict[str, Path] = {}
  for m in maps:
    relative = m.relative_to(annotations).with_suffix("")
    there.setdefault(relative.as_posix(), m)
  flat: dict[str, list[Path]] = {}
  for m in maps:
    flat.setdefault(m.stem, []).append(m)
  best: dict[Path, Path] = {}
  for end in PICTURE_SUFFIXES:
    for more in (suffix,) if suffix else MAP_SUFFIXES:
      found: dict[Path, Path] = {}
      for p in pictures:
        stem = p.relative_to(folder).with_suffix("").as_posix()
        if not stem.endswith(end):
          continue
        key = stem.removesuffix(end) + more
        alone = flat.get(Path(key).name, [])
        if key in there:
          found[p] = there[key]
        elif len(alone) == 1:
          found[p] = alone[0]
      if len(found) > len(best):
        best = found
  return best


class ClassMapPart(Pictures):
  """stills[i].more: the class map's path."""

  def __init__(
    self, name: str, folder: Path, stills: list[Still], license: str, classes: Sequence[str], palette: Palette
  ):
    super().__init__(name, folder, stills, license, Carries(maps=tuple(classes)))
    self.classes, self.palette = tuple(classes), palette

  def ids(self, path: Path) -> tuple[np.ndarray, Counter[int]]:
    """-> ids, and how many pixels have another color, or an id without a name."""
    if self.palette:
      return read_colors(path, self.palette, self.classes)
    ids = read_ids(path)
    values, counts = np.unique(ids, return_counts=True)
    rest = {int(v): int(n) for v, n in zip(values, counts, strict=True) if v >= len(self.classes)}
    return np.where(ids < len(self.classes), ids, IGNORE).astype(np.uint8), Counter(rest)

  def said(self, row: int) -> Said:
    return Said(ids=self.ids(self.stills[row].more)[0])


def same_proportions(still: Still, shape: tuple[int, ...]) -> bool:
  """Whether a class map (h, w) shows the same part as its picture, to a pixel of the coarser one."""
  h, w = shape
  return abs(still.height * w / still.width - h) <= 1 or abs(h * still.width / w - still.height) <= 1


def check_maps(part: ClassMapPart, where: str) -> None:
  """Reads them all; those that cannot be read, or are of other proportions than their pictures, are left out by name.
  Raises UserError where none is left."""
  good: list[Still] = []
  bad: list[str] = []
  rest: Counter[int] = Counter()
  total = 0
  for s in tqdm(part.stills, desc="check", unit="map", leave=False):
    try:
      ids, other = part.ids(s.more)
    except PictureError as e:
      bad.append(str(e))
      continue
    if not same_proportions(s, ids.shape):
      bad.append(f"{s.name} is {s.width}x{s.height}, its class map {ids.shape[1]}x{ids.shape[0]}: other proportions")
      continue
    good.append(s)
    rest += other
    total += ids.size
  say_left_out(bad, len(part.stills), where)
  if not good:
    raise UserError(
      f"{bad[0]}{f', and {len(bad) - 1} more' if len(bad) > 1 else ''}; no picture is left: mend them, or cut them to "
      "the same part"
    )
  if total and sum(rest.values()) == total:
    raise UserError(f"{where}: no pixel of its class maps has a color of --palette, or an id of --classes")
  if rest:
    what = ", ".join(f"{k:06x}" if part.palette else str(k) for k, _ in rest.most_common(5))
    kind = "colors that --palette does not have" if part.palette else "ids that --classes does not name"
    warn(f"{where}: {sum(rest.values()) / total:.1%} of the pixels have {kind} ({what}); they count nowhere")
  part.keep(good)


class ClassMaps:
  says = "a folder of pictures whose class maps lie in --annotations (--classes, or --palette)"

  def accepts(self, path: str, options: SourceOptions) -> bool:
    return options.annotations is not None and Path(path).is_dir()

  def open(self, paths: list[str], options: SourceOptions) -> list[Pictures]:
    return [self._open(Path(p), options) for p in paths]

  def _open(self, folder: Path, options: SourceOptions) -> Pictures:
    if not folder.is_dir() or not (pictures := find_pictures(folder)):
      raise UserError(f"no pictures in {folder}")
    annotations = options.annotations or next((f for b in BESIDE if (f := folder.parent / b).is_dir()), None)
    if annotations is None or not annotations.is_dir():
      raise UserError(f"the class maps of {folder}: name their folder with --annotations")
    classes = tuple(dict.fromkeys(n for _, n in options.palette)) or options.classes
    if not classes:
      raise UserError("the class maps' ids need names: --classes NAME,NAME,..., or --palette")
    if len(classes) > IGNORE:
      raise UserError(f"{len(classes)} classes; at most {IGNORE}")
    maps = match(pictures, folder, find_pictures(annotations), annotations, options.suffix)
    say_left_out(
      [f"{below(p, folder)} has no class map" for p in pictures if p not in maps], len(pictures), str(folder)
    )
    if not maps:
      raise UserError(
        f"none of the {len(pictures)} pictures of {folder} has a class map in {annotations}, as "
        f"{pictures[0].stem}.png; --suffix says what stands behind the name"
      )
    stills = look_at([(p, below(p, folder), m) for p, m in sorted(maps.items())], str(folder))
    name = options.name or name_of(folder)
    part = ClassMapPart(name, folder, stills, options.license, classes, options.palette)
    check_maps(part, str(folder))
    return part
