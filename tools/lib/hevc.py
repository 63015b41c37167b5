"""Raw HEVC, as comma's encoders write it: where each picture begins, and its number by its picture order count (ITU-T
H.265, 7.3)."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from openpilot.tools.lib.errors import UserError

VCL = 32  # NAL types below are slices
IRAP = range(16, 24)  # pictures at which decoding may begin
IDR = (19, 20)  # those at which the count restarts
SPS, PPS = 33, 34
PARAMETER_SETS = (32, 33, 34)
MAX_UNITS = 2_000_000  # of a file: a day of pictures


class Bits:
  """Reads a NAL unit's payload bit by bit, emulation prevention bytes removed."""

  def __init__(self, payload: bytes):
    clean = payload.replace(b"\0\0\3", b"\0\0")
    self.value, self.left = int.from_bytes(clean, "big"), 8 * len(clean)

  def u(self, n: int) -> int:
    self.left -= n
    if self.left < 0:
      raise ValueError("cut short")
    return self.value >> self.left & (1 << n) - 1

  def ue(self) -> int:
    zeros = 0
    while not self.u(1):
      zeros += 1
      if zeros > 32:
        raise ValueError("no Exp-Golomb code")
    return (1 << zeros) - 1 + self.u(zeros)


@dataclass
class Counting:
  """What the parameter sets define about the slices' headers."""

  poc_bits: int = 0  # 0: not known, pictures are counted
  separate_planes: bool = False
  output_flag: bool = False
  extra_bits: int = 0

  def sps(self, payload: bytes) -> None:
    b = Bits(payload)
    b.u(4)
    layers = b.u(3)
    b.u(1 + 88 + 8)
    present = [(b.u(1), b.u(1)) for _ in range(layers)]
    if layers:
      b.u(2 * (8 - layers))
    for profile, level in present:
      b.u(88 * profile + 8 * level)
    b.ue()
    self.separate_planes = b.ue() == 3 and bool(b.u(1))
    b.ue(), b.ue()
    if b.u(1):
      b.ue(), b.ue(), b.ue(), b.ue()
    b.ue(), b.ue()
    self.poc_bits = min(16, b.ue() + 4)

  def pps(self, payload: bytes) -> None:
    b = Bits(payload)
    b.ue(), b.ue()
    b.u(1)
    self.output_flag = bool(b.u(1))
    self.extra_bits = b.u(3)

  def poc(self, kind: int, payload: bytes) -> int:
    """The low bits of the picture order count, from the first slice's header."""
    if kind in IDR:
      return 0
    b = Bits(payload)
    b.u(1)
    if kind in IRAP:
      b.u(1)
    b.ue()
    b.u(self.extra_bits)
    b.ue()
    b.u(self.output_flag + 2 * self.separate_planes)
    return b.u(self.poc_bits)


@dataclass
class Stream:
  packets: list[tuple[int, int]]  # offset and end of each picture, in decoding order
  positions: np.ndarray  # of each packet: its picture's place in display order
  keys: list[tuple[int, int]]  # pictures at which decoding may begin: packet, place
  # of each place: the picture's number in the recording; the first is 0 unless a group's beginning is lost
  numbers: np.ndarray
  gop: int  # pictures between keys where that is constant, else 0
  breaks: list[int]  # places before which pictures, perhaps whole groups, are lost
  sets: bytes  # the parameter sets at the file's beginning, or the first ones in it


def scan(dat: bytes) -> Stream:
  """Access units of an Annex B stream: a picture begins with the first slice (first_slice_segment_in_pic_flag) or the
  parameter sets before it."""
  packets: list[tuple[int, int]] = []
  kinds: list[int] = []
  counts: list[int | None] = []  # picture order counts, low bits
  counting = Counting()
  bits: list[int] = []
  pos, unit, begin, sets = dat.find(b"\x00\x00\x01"), -1, -1, b""
  units, sets_done = 0, False
  while pos >= 0 and pos + 6 <= len(dat):
    units += 1
    if units > MAX_UNITS:
      raise UserError(f"it has more than {MAX_UNITS} parts, which no segment has")
    kind = (dat[pos + 3] >> 1) & 63
    at = pos - 1 if pos > 0 and dat[pos - 1] == 0 else pos
    if kind < VCL:
      if dat[pos + 5] & 0x80:  # the first slice of a picture
        start = begin if begin >= 0 else at
        if unit >= 0:
          packets.append((unit, start))
        kinds.append(kind)
        count = None
        if counting.poc_bits:
          try:
            count = counting.poc(kind, dat[pos + 5 : pos + 21])
          except ValueError:
            pass
        counts.append(count)
        bits.append(counting.poc_bits)
        unit = start
      begin = -1
    elif kind in PARAMETER_SETS or kind in (35, 39):  # parameter sets, delimiter, prefix SEI belong to the next picture
      begin = at if begin < 0 else begin
      if kind in PARAMETER_SETS:
        following = dat.find(b"\x00\x00\x01", pos + 3)
        stop = min(following if following >= 0 else len(dat), pos + 1024)
        payload = dat[pos + 5 : stop]
        try:
          if kind == SPS:
            counting.sps(payload)
          elif kind == PPS:
            counting.pps(payload)
        except ValueError:
          pass
        if not sets_done:
          sets += dat[at:stop]
    sets_done = sets_done or (kind < VCL and bool(sets))
    pos = dat.find(b"\x00\x00\x01", pos + 3)
  if unit >= 0:
    packets.append((unit, len(dat)))
  return place(packets, kinds, counts, max(bits, default=0), sets)


def place(
  packets: list[tuple[int, int]], kinds: list[int], counts: list[int | None], poc_bits: int, sets: bytes
) -> Stream:
  """Display order and numbers of the pictures, from their counts."""
  n, size = len(packets), 1 << poc_bits
  steps = Counter(
    (b - a) % size
    for a, b, k in zip(counts, counts[1:], kinds[1:], strict=False)
    if a is not None and b is not None and k not in IDR
  )
  step, times = steps.most_common(1)[0] if steps else (1, 0)
  if (
    times * 5 >= sum(steps.values()) * 4 and 0 < step < size // 2
  ):  # displayed in coding order, as comma's encoders write them
    return as_they_come(packets, kinds, counts, size, step, sets)
  key = [k in IRAP for k in kinds]
  known = [c for c in counts if c is not None]
  if len(known) < n:  # no parameter sets, or a damaged header: counted
    return Stream(packets, np.arange(n), [(i, i) for i in range(n) if key[i]], np.arange(n), 0, [], sets)
  # full counts within each coded video sequence, which an IDR begins
  sequence, full = np.zeros(n, np.int64), np.zeros(n, np.int64)
  s, before = 0, 0
  for i, low in enumerate(known):
    if kinds[i] in IDR:
      s, before = s + 1, 0
    value = before - before % size + low
    value += -size if value - before > size // 2 and value >= size else size if before - value >= size // 2 else 0
    sequence[i], full[i] = s, value
    if kinds[i] not in range(0, 16, 2):  # a picture that no other refers to is not an anchor
      before = value
  order = np.lexsort((full, sequence))
  positions = np.empty(n, np.int64)
  positions[order] = np.arange(n)
  return Stream(packets, positions, [(i, int(positions[i])) for i in range(n) if key[i]], np.arange(n), 0, [], sets)


def as_they_come(
  packets: list[tuple[int, int]], kinds: list[int], counts: list[int | None], size: int, step: int, sets: bytes
) -> Stream:
  """For a stream without reordering: pictures are numbered by their count; one whose count fits neither neighbor is
  numbered by them."""
  kept: list[int] = []
  spans: list[int] = []  # pictures of each sequence that an IDR begins
  sequences: list[tuple[int, int]] = []  # of each kept picture: sequence, number in it
  last, number = -step, -1  # of the last kept picture
  for i, (kind, low) in enumerate(zip(kinds, counts, strict=True)):
    after = counts[i + 1] if i + 1 < len(counts) and kinds[i + 1] not in IDR else None
    if kind in IDR and i and after is not None and 0 < (after - last) % size < after:
      kind, low = 1, None  # noise that looks like a picture: the next one continues where the last one stopped
    if kind in IDR:
      if kept:
        spans.append(number + 1)
      last, number = 0, 0
    else:
      ahead = None if low is None else (low - last) % size
      limit = size // 2 if after is None else (after - last) % size
      if ahead is None or ahead == 0 or ahead % step or (ahead >= limit and after is not None):
        if limit == step and after is not None:
          continue  # no number is left for it: part of another picture
        ahead = step
      if not kept:  # the sequence's beginning is lost
        ahead = 0 if low is None else low + step
      last, number = (last + ahead) % size, number + ahead // step
    kept.append(i)
    sequences.append((len(spans), number))
  common = Counter(spans).most_common(1)
  regular = common[0][0] if common and common[0][1] * 2 > len(spans) and max(spans) == common[0][0] else 0
  base = np.concatenate([[0], np.cumsum([regular or x for x in spans])]).astype(np.int64)
  numbers = np.array([base[s] + k for s, k in sequences], np.int64)
  keys = [j for j, i in enumerate(kept) if kinds[i] in IRAP]
  gaps = Counter(np.diff(numbers[keys]).tolist()).most_common(1) if len(keys) > 1 else []
  gop = regular or (int(gaps[0][0]) if gaps and gaps[0][1] * 2 > len(keys) - 1 else 0)
  # where a sequence ends early, or the file begins within one, whole sequences may be lost too
  first = {s: j for j, (s, _) in reversed(list(enumerate(sequences)))}
  breaks = [first[s + 1] for s, x in enumerate(spans) if regular and x < regular and s + 1 in first]
  if len(numbers) and numbers[0] > 0:
    breaks.insert(0, 0)
  return Stream([packets[i] for i in kept], np.arange(len(kept)), [(j, j) for j in keys], numbers, gop, breaks, sets)
