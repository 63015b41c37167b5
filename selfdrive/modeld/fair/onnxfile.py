"""ONNX files as they lie in memory: what they name outside themselves. A file may keep its weights in others, which
runners open by path, whatever lies there.

Only the framing of protobuf is read here; what the graph means is its runner's business."""

from collections.abc import Callable, Iterator

MAX_DEPTH = 64  # messages within messages; a graph within a graph is three of them
# message -> {number of a field: the message that it holds}, by onnx.proto; a test compares it with onnx's own
FIELDS: dict[str, dict[int, str]] = {
  "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
  "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
  "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
  "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
  "NodeProto": {5: "AttributeProto"},
  "AttributeProto": {
    5: "TensorProto",
    6: "GraphProto",
    10: "TensorProto",
    11: "GraphProto",
    22: "SparseTensorProto",
    23: "SparseTensorProto",
  },
  "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14  # of TensorProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


class OnnxError(ValueError):
  """A file that is no ONNX, or keeps weights where none may be kept. One line."""


def varint(data: memoryview, at: int) -> tuple[int, int]:
  """(value, where it ends)."""
  value = shift = 0
  while True:
    if at >= len(data) or shift > 63:
      raise OnnxError("is no ONNX file: it is cut short")
    byte = data[at]
    value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
    if byte < 128:
      return value, at


def fields(data: memoryview) -> Iterator[tuple[int, int, int, int, int, int]]:
  """(number, wire type, value of a varint, begin of the field, begin and end of its content), one after the other."""
  at = 0
  while at < len(data):
    begin = at
    tag, at = varint(data, at)
    wire, value, content = tag & 7, 0, at
    if wire == VARINT:
      value, at = varint(data, at)
    elif wire == BYTES:
      size, content = varint(data, at)
      at = content + size
    elif wire in (FIXED32, FIXED64):
      at += 4 if wire == FIXED32 else 8
    else:
      raise OnnxError("is no ONNX file")
    if at > len(data):
      raise OnnxError("is no ONNX file: it is cut short")
    yield tag >> 3, wire, value, begin, content, at


def encode(value: int) -> bytes:
  out = bytearray()
  while value > 127:
    out.append(value & 127 | 128)
    value >>= 7
  return bytes([*out, value])


def tensor(data: memoryview, read: Callable[[str], bytes]) -> bytes | None:
  """A TensorProto with its data inside; None where it lies there already."""
  where: dict[str, str] = {}
  outside, kept = False, bytearray()
  for number, wire, value, begin, content, end in fields(data):
    if number == DATA_LOCATION and wire == VARINT:
      outside |= value != 0
    elif number == EXTERNAL_DATA and wire == BYTES:
      outside = True
      entry = data[content:end]
      said = {n: bytes(entry[c:e]).decode(errors="replace") for n, w, _, _, c, e in fields(entry) if w == BYTES}
      where[said.get(KEY, "")] = said.get(VALUE, "")
    else:
      kept += data[begin:end]
  if not outside:
    return None
  try:
    name, offset = where["location"], int(where.get("offset") or 0)
    blob = read(name)
    size = int(where["length"]) if where.get("length") else len(blob) - offset
  except (KeyError, ValueError) as e:
    raise (
      e
      if isinstance(e, OnnxError)
      else OnnxError("keeps weights outside itself and does not say where; export it as one file")
    ) from None
  if not 0 <= offset <= offset + size <= len(blob):
    raise OnnxError(f"wants bytes {offset} to {offset + size} of {name[:60]!r}, which has {len(blob)}; export it again")
  return bytes(kept) + encode(RAW_DATA << 3 | BYTES) + encode(size) + blob[offset : offset + size]


def message(kind: str, data: memoryview, read: Callable[[str], bytes], depth: int) -> bytes | None:
  """The message with all weights inside; None where that is how it is."""
  if kind == "TensorProto":
    return tensor(data, read)
  if depth > MAX_DEPTH:
    raise OnnxError(f"has over {MAX_DEPTH} messages within each other")
  out, done = bytearray(), 0
  for number, wire, _, begin, content, end in fields(data):
    if (
      wire == BYTES
      and (inner := FIELDS[kind].get(number)) is not None
      and (new := message(inner, data[content:end], read, depth + 1)) is not None
    ):
      out += bytes(data[done:begin]) + encode(number << 3 | BYTES) + encode(len(new)) + new
      done = end
  return bytes(out + data[done:]) if done else None


def whole(model: bytes, read: Callable[[str], bytes]) -> bytes:
  """An ONNX file's bytes -> the same with all weights inside, as runners may have them. read: the name of a file
  outside -> its bytes, or OnnxError.

  Raises OnnxError where the file cannot be followed. Nothing outside is named without the word "location", so most
  files are only searched for it."""
  if model[4:8] == b"ORTM":
    raise OnnxError("is ONNX Runtime's own format, not ONNX; export it as ONNX")
  if b"location" not in model:
    return model
  return message("ModelProto", memoryview(model), read, 0) or model
