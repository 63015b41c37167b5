"""Unpacks logs: zstd, bz2 or plain, any number of frames, in bounded memory."""

import bz2
from collections.abc import Iterator
from pathlib import Path

import zstandard

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import ordinary_size

ZSTD_MAGIC, BZ2_MAGIC = b"\x28\xb5\x2f\xfd", b"BZh"
# limits of a log's unpacked size: at most; always allowed; in multiples of its file's size
MAX_BYTES, SMALL_BYTES, MAX_RATIO = 2**31, 2**26, 250
STEP = 1 << 20
CAREFUL = 4096  # zstd makes at most 128 KiB of each 4 bytes
BLOCK = 1 << 17  # what a block of zstd holds at most


def decompress(path: Path) -> tuple[bytes, str]:
  """-> the log's bytes, and what was wrong with the file's end ("" if nothing). Raises UserError where nothing can be
  read, or where it would take more memory than a log of its size ever does."""
  size = ordinary_size(path)
  if size > MAX_BYTES:
    raise UserError(
      f"{path} has {size >> 20} MiB; a log of more than {MAX_BYTES >> 20} MiB is not read: split it into segments"
    )
  try:
    dat = path.read_bytes()
  except OSError as e:
    raise UserError(f"cannot read {path}: {e.strerror}") from None
  if not dat:
    raise UserError(f"{path} is empty: the recording stopped before anything was written; leave this segment out")
  if dat[:4] != ZSTD_MAGIC and not is_skippable(dat) and dat[:3] != BZ2_MAGIC:
    return dat, ""
  limit = min(MAX_BYTES, max(SMALL_BYTES, MAX_RATIO * size))
  frames = unbz2 if dat[:3] == BZ2_MAGIC else unzstd
  most, end = (limit, 0) if frames is unbz2 else most_bytes(dat, limit)
  if end == len(dat) and (whole := one_frame(dat, most)):
    return whole, ""
  out, problem = gather(frames(dat, STEP if most <= limit else CAREFUL), limit)
  if problem and frames is unzstd:
    out, problem = gather(frames(dat, CAREFUL), limit)  # in small steps: all that stands before the damage
  if out is None:
    raise UserError(f"{path} of {size} bytes unpacks to more than {limit >> 20} MiB, which no log does; not read")
  if not any(out):
    raise UserError(
      f"{path} holds no readable data: {problem or 'it is empty inside'}; copy it again, or leave this segment out"
    )
  return out[0] if len(out) == 1 else b"".join(out), problem


def head(path: Path, size: int = 1 << 16) -> bytes:
  """About so many of a log's first bytes. Raises UserError where there are none."""
  if not ordinary_size(path):
    raise UserError(f"{path} is empty")
  with open(path, "rb") as f:
    dat = f.read(size)
  if dat[:4] == ZSTD_MAGIC or is_skippable(dat):
    parts = gather(unzstd(dat, CAREFUL), SMALL_BYTES)[0]
    return b"".join(parts or [])
  if dat[:3] == BZ2_MAGIC:
    with open(path, "rb") as f:
      return b"".join(gather(unbz2(f.read(1 << 20), STEP), STEP)[0] or [])  # a block of bz2 has up to 900 kB
  return dat


def gather(parts: Iterator[bytes], limit: int) -> tuple[list[bytes] | None, str]:
  """-> parts, None where they exceed `limit` bytes; and the error that stopped them."""
  out: list[bytes] = []
  total = 0
  try:
    for part in parts:
      out.append(part)
      total += len(part)
      if total > limit:
        return None, ""
  except (zstandard.ZstdError, OSError, EOFError) as e:
    return out, f"the compressed stream is {'' if isinstance(e, EOFError) else 'damaged: '}{e}"
  return out, ""


def is_skippable(dat: bytes) -> bool:
  return dat[1:4] == b"\x2a\x4d\x18" and 0x50 <= dat[0] <= 0x5F


def most_bytes(dat: bytes, limit: int) -> tuple[int, int]:
  """The largest size that a zstd file can unpack to, by the headers of its blocks; or a value above `limit`. And where
  its first frame ends, as these say; 0 where it begins with a skippable one."""
  pos = total = end = 0
  while pos + 6 <= len(dat) and total <= limit:
    if is_skippable(dat[pos : pos + 4]):
      pos += 8 + int.from_bytes(dat[pos + 4 : pos + 8], "little")
      continue
    first = pos == 0
    d = dat[pos + 4]
    single, size = d >> 5 & 1, (0, 2, 4, 8)[d >> 6]
    pos += 6 - single + (0, 1, 2, 4)[d & 3] + (size or single)
    while pos + 3 <= len(dat) and total <= limit:
      head = int.from_bytes(dat[pos : pos + 3], "little")
      kind = head >> 1 & 3
      total += head >> 3 if kind < 2 else BLOCK
      pos += 3 + (1 if kind == 1 else head >> 3)
      if head & 1:
        break
    pos += 4 * (d >> 2 & 1)
    end = pos if first else end
  return total, end


def one_frame(dat: bytes, most: int) -> bytes:
  """A zstd file of one frame, unpacked at once, which takes half the time of unzstd(); b"" where it is damaged or says
  that it unpacks to more than `most` bytes. most: of most_bytes(), which are allocated."""
  try:
    said = zstandard.get_frame_parameters(dat).content_size
    if said > most and said != zstandard.CONTENTSIZE_UNKNOWN:
      return b""
    return zstandard.ZstdDecompressor().decompress(dat, max_output_size=most)
  except zstandard.ZstdError:
    return b""


def unzstd(dat: bytes, step: int) -> Iterator[bytes]:
  """All frames, skippable ones left out. Raises EOFError where the last is cut short."""
  view = memoryview(dat)
  pos = 0
  while pos < len(dat):
    if is_skippable(dat[pos : pos + 4]):
      pos += 8 + int.from_bytes(dat[pos + 4 : pos + 8], "little")
      continue
    z = zstandard.ZstdDecompressor().decompressobj()
    while not z.eof:
      if pos >= len(dat):
        raise EOFError("cut short")
      piece = view[pos : pos + step]
      yield z.decompress(piece)
      pos += len(piece) - len(z.unused_data)


def unbz2(dat: bytes, step: int) -> Iterator[bytes]:
  """All streams. Raises EOFError where the last is cut short."""
  while dat[:3] == BZ2_MAGIC:
    b = bz2.BZ2Decompressor()
    yield b.decompress(dat, step)
    while not b.eof:
      if b.needs_input:
        raise EOFError("cut short")
      yield b.decompress(b"", step)
    dat = b.unused_data
