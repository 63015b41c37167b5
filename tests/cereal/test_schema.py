"""The schema against the field tables that it was written from: every ordinal on the same bits and the same union tag."""

import re

import pytest

from openpilot.cereal import car, log
from openpilot.cereal.services import RENAMED, SERVICE_LIST

BITS = {
  "bool": 1,
  "int8": 8,
  "uint8": 8,
  "int16": 16,
  "uint16": 16,
  "enum": 16,
  "int32": 32,
  "uint32": 32,
  "float32": 32,
  "int64": 64,
  "uint64": 64,
  "float64": 64,
}

# struct, field, where upstream's compiler put it
SELECTION = [
  ("FrameData", "frameId", "data bits 0..31"),
  ("FrameData", "timestampSof", "data bits 256..319"),
  ("FrameData", "sensor", "data bits 640..655"),
  ("EncodeIndex", "segmentId", "data bits 128..159"),
  ("EncodeIndex", "timestampEof", "data bits 256..319"),
  ("ModelDataV2", "laneLines", "ptr 4"),
  ("ModelDataV2", "leadsV3", "ptr 12"),
  ("ModelDataV2", "timestampEof", "data bits 128..191"),
  ("ExtrinsicsCalibration", "rpyCalib", "ptr 4"),
  ("ExtrinsicsCalibration", "calStatus", "data bits 16..31"),
  ("DeviceState", "started", "data bit 192"),
  ("Car.CarState", "vEgo", "data bits 0..31"),
  ("Car.CarState", "steeringAngleDeg", "data bits 128..159"),
  ("Car.CarState", "leftBlinker", "data bit 69"),
  ("CameraOdometry", "wideFromDeviceEuler", "ptr 4"),
  ("DeviceMotion", "angularVelocityDevice", "ptr 3"),
  ("RadarState.LeadData", "radarTrackId", "data bits 416..447"),
]


def struct_schema(path):
  obj = car if path.startswith("Car.") else log
  for p in path.split("."):
    obj = obj if p == "Car" and obj is car else getattr(obj, p)
  return obj.schema


def layout(schema, by_name=False):
  """ordinal (or name) -> (place on the wire, union tag)."""
  out = {}
  for f in schema.node.struct.fields:
    if f.which() == "group":
      out |= layout(schema.fields[f.name].schema, by_name)
      continue
    kind = f.slot.type.which()
    if kind in BITS:
      start = f.slot.offset * BITS[kind]
      place = f"data bit {start}" if kind == "bool" else f"data bits {start}..{start + BITS[kind] - 1}"
    else:
      place = f"ptr {f.slot.offset}"
    out[f.name if by_name else f.ordinal.explicit] = (place, f.discriminantValue)
  return out


@pytest.mark.parametrize(("struct", "field", "place"), SELECTION)
def test_selected_fields(struct, field, place):
  assert layout(struct_schema(struct), by_name=True)[field][0] == place


def test_event_tags():
  tags = {f.ordinal.explicit: f.discriminantValue for f in log.Event.schema.node.struct.fields}
  assert tags[0] == tags[67] == 0xFFFF  # outside the union
  for ordinal, tag in tags.items():
    if ordinal not in (0, 67):
      assert tag == ordinal - (1 if ordinal < 67 else 2)
  assert sorted(tags) == list(range(153))
  names = {f.name: f.ordinal.explicit for f in log.Event.schema.node.struct.fields}
  ours = ["fairState", "fairDepth", "fairObjects", "fairSegmentation", "fairLanes", "fairFeatures"]
  assert [names[n] for n in ours] == list(range(140, 146))
  assert log.Event.new_message().valid is True


def test_every_row_of_the_tables(shared_data):
  text = (shared_data.parent / "facts" / "cereal_schema.md").read_text()
  rows = 0
  table = r"^### (\S+) \((0x[0-9a-f]+)\) data words (\d+), pointers (\d+)[^\n]*\n\| @ \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)*)"
  for name, ident, words, pointers, body in re.findall(table, text, re.M):
    if name.startswith("Custom."):
      continue
    schema = struct_schema(name)
    ours = layout(schema)
    assert hex(schema.node.id) == ident and (schema.node.struct.dataWordCount, schema.node.struct.pointerCount) == (int(words), int(pointers)), name
    for line in body.strip().split("\n"):
      c = [x.strip() for x in line.strip("|").split("|")]
      if c[0].isdigit() and c[2] != "Void":
        assert ours[int(c[0])][0] == c[3] and (c[4] == "" or ours[int(c[0])][1] == int(c[4])), (name, c, ours[int(c[0])])
        rows += 1
  assert rows > 900


def test_services():
  for name, s in SERVICE_LIST.items():
    assert name in log.Event.schema.union_fields and s.frequency <= 104 and s.decimation != 0 and s.queue_size >= 250 * 1024
  for old, new in RENAMED.items():
    assert old not in SERVICE_LIST and new in log.Event.schema.union_fields
