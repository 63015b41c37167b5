"""Single pictures from files: turned as their EXIF says, 16 bits scaled to 8, of a size that is looked at before it is
decoded. A format that is missing here is added with register_format(), from outside too."""

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from openpilot.tools.lib.errors import UserError, printable
from openpilot.tools.lib.files import LONG, ordinary

MAX_PIXELS = 1 << 27  # of a picture: 134 million, 400 MB when decoded
MAX_BYTES = 1 << 30  # of its file
MANY = 2_000_000  # files that are looked for in a folder
SAFE = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")  # Pillow's others run programs, or are rare
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".jp2")
MODES_16 = ("I;16", "I;16L", "I;16B", "I;16N", "I")

Reader = Callable[[Path], Image.Image | np.ndarray]


class PictureError(UserError):
  """A picture cannot be read; the message names it and says why."""


def open_pillow(path: Path) -> Image.Image:
  """Not decoded yet."""
  return Image.open(path, formats=SAFE)


FORMATS: dict[str, Reader] = dict.fromkeys(SUFFIXES, open_pillow)


def register_format(suffix: str, read: Reader) -> None:
  """suffix: with its dot, lower case. read: path -> a Pillow image, or an array (H, W) or (H, W, 3) of uint8 or uint16;
  whatever it raises is said as the reason why that picture cannot be read."""
  FORMATS[suffix] = read


def is_picture(path: Path) -> bool:
  """By its name."""
  return path.suffix.lower() in FORMATS


def find_pictures(folder: Path) -> list[Path]:
  """All in a folder and its folders, sorted. Links to folders are not followed, hidden folders left out."""
  found: list[Path] = []
  for root, folders, files in os.walk(folder):
    folders[:] = sorted(f for f in folders if not f.startswith("."))
    found += [Path(root, f) for f in sorted(files) if is_picture(Path(f)) and not f.startswith(".")]
    if len(found) > MANY:
      raise UserError(f"{printable(folder, LONG)} holds more than {MANY} pictures; name a part of it")
  return found


@contextlib.contextmanager
def reasons(path: Path) -> Iterator[None]:
  """Pillow's ways to fail have no common base, and a format from outside has its own."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of a large picture: MAX_PIXELS decides; of odd EXIF
      yield
  except (PictureError, MemoryError):
    raise
  except Exception as e:
    why = printable(getattr(e, "strerror", None) or e, 80) or type(e).__name__
    raise PictureError(f"{printable(path, LONG)} cannot be read ({why})") from None


def open_image(path: Path) -> Image.Image:
  """Of any mode, turned, not decoded where EXIF does not turn it. Raises PictureError."""
  with reasons(path):
    read = FORMATS.get(path.suffix.lower(), open_pillow)
    made: Any = read(ordinary(path, MAX_BYTES))
    image = made if isinstance(made, Image.Image) else Image.fromarray(np.asarray(made))
    if image.width * image.height > MAX_PIXELS:
      raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS >> 20} million pixels")
    return ImageOps.exif_transpose(image)


def picture_size(path: Path) -> tuple[int, int]:
  """(width, height) as it is shown, from its header. Raises PictureError."""
  with reasons(path):
    read = FORMATS.get(path.suffix.lower(), open_pillow)
    if read is not open_pillow:
      return open_image(path).size
    with open_pillow(ordinary(path, MAX_BYTES)) as image:
      if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} is more than {MAX_PIXELS >> 20} million pixels")
      turned = image.getexif().get(0x0112) in (5, 6, 7, 8)
      return (image.height, image.width) if turned else image.size


def orientation(path: Path) -> int:
  """EXIF's, 1 to 8; 1 where the file says nothing. Raises PictureError."""
  with reasons(path):
    if FORMATS.get(path.suffix.lower(), open_pillow) is not open_pillow:
      return 1
    with open_pillow(ordinary(path, MAX_BYTES)) as image:
      said = image.getexif().get(0x0112)
      return said if isinstance(said, int) and 1 <= said <= 8 else 1


def to_rgb(image: Image.Image) -> Image.Image:
  """Of 16 bits a channel scaled to 8: 65535 is white."""
  if image.mode in MODES_16:
    gray = np.asarray(image, np.int64)
    if image.mode != "I" or gray.max(initial=0) > 255:
      gray = (gray.clip(0, 65535) + 128) // 257
    image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
  elif image.mode == "F":
    raise ValueError("a picture of floats, whose white is not known")
  return image.convert("RGB")


def open_rgb(path: Path) -> Image.Image:
  """RGB of 8 bits, turned. Raises PictureError."""
  with reasons(path):
    return to_rgb(open_image(path))


def read_rgb(path: Path) -> np.ndarray:
  """(H, W, 3) uint8, turned. Raises PictureError."""
  return np.asarray(open_rgb(path))
