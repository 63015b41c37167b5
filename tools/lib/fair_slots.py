"""Finds our messages in logs made before they moved from Event @136..@141 to @140..@145. Forks have messages of their
own at @136 and above.

A message at an old slot is ours if its struct has the size that our schema had then, its content can be read as ours,
and a fairState of the same log names its bundle. All others at @136..@139 belong to a fork and are left as they are."""

import re
import struct
from collections.abc import Callable, Iterable
from typing import Any

from openpilot.cereal import log
from openpilot.tools.lib.guard import DAMAGE, open_event

MOVED = 4  # slots
# service -> (words, pointers) of its struct in releases before the move, oldest first
OLD_SIZES = {
  "fairState": ((9, 5), (11, 5)),
  "fairDepth": ((3, 2), (4, 2)),
  "fairObjects": ((2, 3),),
  "fairSegmentation": ((3, 5),),
  "fairLanes": ((2, 2),),
  "fairFeatures": ((3, 2),),
}
NEW_TAGS = {log.Event.schema.fields[s].proto.discriminantValue: s for s in OLD_SIZES}
OLD_TAGS = {tag - MOVED: s for tag, s in NEW_TAGS.items()}
HASH = re.compile(r"[0-9a-f]{64}")

# can the content be read as ours?
PLAUSIBLE: dict[str, Callable[[Any], bool]] = {
  "fairState": lambda m: (
    m.stream in ("", "narrowRoad", "wideRoad")
    and (not m.bundle if not m.bundleHash else HASH.fullmatch(m.bundleHash) is not None)
  ),
  "fairDepth": lambda m: len(m.data) == 2 * m.width * m.height,
  "fairObjects": lambda m: all(o.classId < len(m.classes) and len(o.box) == 4 for o in m.objects),
  "fairSegmentation": lambda m: len(m.runClass) == len(m.runLength),
  "fairLanes": lambda m: all(len(line.x) == len(line.y) == len(line.visibility) for line in m.lines),
  "fairFeatures": lambda m: len(m.data) == 2 * m.channels * m.width * m.height,
}


def content_size(dat: bytes) -> tuple[int, int, int]:
  """A message -> (words, pointers) of the struct that its Event holds, and the offset of the Event's tag in bytes. (0,
  0, 0): no plain Event with a struct."""
  count = struct.unpack_from("<I", dat)[0] + 1
  lengths = struct.unpack_from(f"<{count}I", dat, 4)
  first = (count + 2) // 2  # word
  starts = [first + sum(lengths[:i]) for i in range(count)]
  root = struct.unpack_from("<Q", dat, first * 8)[0]
  if root & 3 or not root >> 32 & 0xFFFF:
    return 0, 0, 0
  data = first + 1 + (root >> 2 & 0x3FFFFFFF)
  words = root >> 32 & 0xFFFF
  pointer = struct.unpack_from("<Q", dat, (data + words) * 8)[0]
  if pointer & 3 == 2:  # far: the pointer proper, or its double's tag, lies in another segment
    pad = starts[pointer >> 32] + (pointer >> 3 & 0x1FFFFFFF)
    pointer = struct.unpack_from("<Q", dat, (pad + (pointer >> 2 & 1)) * 8)[0]
  if pointer & 3:
    return 0, 0, 0
  return pointer >> 32 & 0xFFFF, pointer >> 48, (data + 1) * 8


def bundle_of_ours(dat: bytes, service: str, tag_at: int) -> str | None:
  """The bundle named by a message at an old slot, read as `service`; None where it cannot be read as ours."""
  moved = bytearray(dat)
  moved[tag_at : tag_at + 2] = struct.pack("<H", struct.unpack_from("<H", dat, tag_at)[0] + MOVED)
  try:
    m = getattr(open_event(bytes(moved)), service)
    return m.bundle if PLAUSIBLE[service](m) else None
  except DAMAGE:
    return None


def sort_out(messages: Iterable[tuple[int, int, bytes]]) -> tuple[dict[int, int], list[int]]:
  """A log's messages at @136..@145 as (number, union tag, bytes) -> of ours at an old slot, by number, where in their
  bytes the tag stands; and the numbers of those at @140..@145 that are not ours."""
  candidates: list[tuple[int, int, int, str, str]] = []
  other: list[int] = []
  for number, tag, dat in messages:
    try:
      words, pointers, tag_at = content_size(dat)
    except (struct.error, IndexError):
      words = pointers = tag_at = 0
    service = OLD_TAGS.get(tag, "")
    bundle = bundle_of_ours(dat, service, tag_at) if (words, pointers) in OLD_SIZES.get(service, ()) else None
    if bundle is not None:
      candidates.append((number, tag, tag_at, service, bundle))
    elif tag in NEW_TAGS:
      least = OLD_SIZES[NEW_TAGS[tag]][-1]
      if words < least[0] or pointers < least[1]:
        other.append(number)
  named = {bundle for *_, service, bundle in candidates if service == "fairState"}
  old = {
    number: tag_at
    for number, _, tag_at, service, bundle in candidates
    if bundle in named and (bundle or service == "fairState")
  }
  return old, other + [number for number, tag, *_ in candidates if number not in old and tag in NEW_TAGS]
