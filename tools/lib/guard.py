"""Reading messages that somebody else wrote: bounds what a damaged one can cost; catches, counts and reports what it
raises."""

import struct
from collections import Counter
from types import TracebackType
from typing import Any

import capnp

from openpilot.cereal import log
from openpilot.tools.lib.errors import warn

# raised by fields that are out of bounds, of the wrong kind or not text; by enumerants unknown to the schema
# (RuntimeError); by odd numbers
DAMAGE = (capnp.KjException, RuntimeError, ValueError, OverflowError)
SPARE_WORDS = 2**17  # words that may be read of any message; a list that claims 2^29 elements without bytes is refused
NESTING = 64  # Cap'n Proto's own limit


def reading_limit(size: int) -> int:
  """Words that may be read of a message of so many bytes: several times its size, and a little more."""
  return SPARE_WORDS + 2 * size


def open_event(dat: bytes) -> Any:
  """bytes of one message -> log.Event reader that reads no more than reading_limit(). Raises capnp.KjException where it
  has no root."""
  with log.Event.from_bytes(dat, traversal_limit_in_words=reading_limit(len(dat))) as event:
    return event


_plans: dict[int, tuple[bool, list[tuple[str, str, bool]]]] = {}  # by the id of a struct's schema


def _plan(schema: Any) -> tuple[bool, list[tuple[str, str, bool]]]:
  """Whether the struct has a union; and (name, kind, in the union) of its pointer fields and groups. Plain numbers
  cannot be damaged."""
  node = schema.node
  if node.id in _plans:
    return _plans[node.id]
  out = []
  for name in schema.fieldnames:
    proto = schema.fields[name].proto
    kind = "group" if proto.which() == "group" else str(proto.slot.type.which())
    if kind == "list":
      element = str(proto.slot.type.list.elementType.which())
      kind = "structs" if element == "struct" else "texts" if element in ("text", "data", "list") else "numbers"
    if kind in ("group", "struct", "structs", "texts", "numbers", "text", "data"):
      out.append((name, kind, proto.discriminantValue != 0xFFFF))
  _plans[node.id] = bool(node.struct.discriminantCount), out
  return _plans[node.id]


def read_all(message: Any, depth: int = 0) -> None:
  """Reads all fields of a reader. Raises one of DAMAGE where a field cannot be read; to_dict() would leave it out."""
  if depth > NESTING:
    raise ValueError("nested too deep")
  has_union, fields = _plan(message.schema)
  union = message.which() if has_union else None
  for name, kind, in_union in fields:
    if in_union and name != union:
      continue
    value = getattr(message, name)
    if kind in ("group", "struct"):
      read_all(value, depth + 1)
    elif kind == "structs":
      for v in value:
        read_all(v, depth + 1)
    elif kind == "texts":
      for _ in value:
        pass


class Guard:
  """`with guard(event): ...` around code that reads a message: an error of a damaged one ends the block and is counted
  by kind; say() prints the counts in one line."""

  def __init__(self, where: str = "") -> None:
    self.where = where
    self.damaged: Counter[str] = Counter()
    self.kind = ""
    self.event: Any = None

  def __call__(self, event: Any) -> "Guard":
    self.event = event
    return self

  def __enter__(self) -> None: ...

  def __exit__(
    self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
  ) -> bool:
    if kind is None or not issubclass(kind, DAMAGE):
      return False
    self.count()
    return True

  def count(self) -> None:
    try:
      self.damaged[str(self.event.which())] += 1
    except (*DAMAGE, AttributeError):
      self.damaged["?"] += 1

  def say(self) -> None:
    if self.damaged:
      kinds = ", ".join(f"{n} {kind}" for kind, n in self.damaged.most_common(6))
      warn(f"{self.where}: damaged messages were left out: {kinds}")
    self.damaged = Counter()


def is_sound(dat: bytes) -> bool:
  """Whether every pointer stays inside the message, and the parts are no larger together than the message. as_builder()
  and total_size abort the process where this is not so. Walks it in Python: for small messages."""
  try:
    count = struct.unpack_from("<I", dat)[0] + 1
    if count > 512:
      return False
    lengths = struct.unpack_from(f"<{count}I", dat, 4)
    first = (count + 2) // 2
    if (first + sum(lengths)) * 8 > len(dat):
      return False
    words = struct.unpack_from(f"<{first + sum(lengths)}Q", dat)
  except struct.error:
    return False
  starts = [first + sum(lengths[:i]) for i in range(count)]
  ends = [s + n for s, n in zip(starts, lengths, strict=True)]
  left = len(words) + 16
  todo = [(0, starts[0], 0)] if lengths[0] else []  # segment, word of a pointer, depth
  while todo:
    seg, at, depth = todo.pop()
    left -= 1
    if left < 0 or depth > NESTING:
      return False
    p = words[at]
    if p == 0:
      continue
    begin: int | None = None
    if p & 3 == 2:  # far: a landing pad in another segment
      seg, pad, double = p >> 32, p >> 3 & 0x1FFFFFFF, p >> 2 & 1
      if seg >= count or starts[seg] + pad + 1 + double > ends[seg]:
        return False
      at = starts[seg] + pad
      p = words[at]
      if double:
        if p & 7 != 2 or p >> 32 >= count:
          return False
        seg, begin = p >> 32, starts[p >> 32] + (p >> 3 & 0x1FFFFFFF)
        p = words[at + 1]
      elif p & 3 == 2:
        return False
    if p & 3 == 3:  # a capability: logs have none
      return False
    if begin is None:
      offset = (p & 0xFFFFFFFF) >> 2
      begin = at + 1 + (offset - (1 << 30) if offset >> 29 else offset)
    if p & 3 == 0:
      data, pointers = p >> 32 & 0xFFFF, p >> 48
      size, inner = data + pointers, [(begin + data + i) for i in range(pointers)]
    else:
      kind, n = p >> 32 & 7, p >> 35
      inner = []
      if kind == 7:
        size = n + 1
        if begin < starts[seg] or begin + size > ends[seg]:
          return False
        tag = words[begin]
        elements, data, pointers = (tag & 0xFFFFFFFF) >> 2, tag >> 32 & 0xFFFF, tag >> 48
        if tag & 3 or elements * (data + pointers) > n or elements > n + SPARE_WORDS:
          return False
        if pointers:
          inner = [begin + 1 + e * (data + pointers) + data + i for e in range(elements) for i in range(pointers)]
      elif kind == 6:
        size = n
      else:
        size = (n * (0, 1, 8, 16, 32, 64)[kind] + 63) // 64
        if kind == 0 and n > SPARE_WORDS:
          return False
      if kind == 6 and begin >= starts[seg] and begin + n <= ends[seg]:
        inner = list(range(begin, begin + n))
    if begin < starts[seg] or begin + size > ends[seg]:
      return False
    todo += [(seg, i, depth + 1) for i in inner]
  return True
