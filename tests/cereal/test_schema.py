"""The schema against the field tables that it was written from: every ordinal on the same bits and the same union
tag."""

import os
import re
from pathlib import Path

import pytest
import upstream

from openpilot.cereal import car, deprecated, log
from openpilot.cereal.services import RENAMED, SERVICE_LIST
from openpilot.tools.lib.logreader import LogReader

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
  head, _, rest = path.partition(".")
  files = {"Car": car, "Deprecated": deprecated}
  obj, names = (files[head], rest) if head in files else (log, path)
  for name in names.split("."):
    obj = getattr(obj, name)
  return obj.schema


def layout(schema, by_name=False):
  """ordinal (or name) -> (place on the wire, union tag)."""
  out = {}
  for f in schema.node.struct.fields:
    if f.which() == "group":
      out |= layout(schema.fields[f.name].schema, by_name)
      continue
    kind = f.slot.type.which()
    if kind in upstream.BITS:
      start = f.slot.offset * upstream.BITS[kind]
      place = f"data bit {start}" if kind == "bool" else f"data bits {start}..{start + upstream.BITS[kind] - 1}"
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
  table = (
    r"^### (\S+) \((0x[0-9a-f]+)\) data words (\d+), pointers (\d+)[^\n]*\n\| @ \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)*)"
  )
  for name, ident, words, pointers, body in re.findall(table, text, re.M):
    if name.startswith("Custom."):
      continue
    schema = struct_schema(name)
    ours = layout(schema)
    assert hex(schema.node.id) == ident and (schema.node.struct.dataWordCount, schema.node.struct.pointerCount) == (
      int(words),
      int(pointers),
    ), name
    for line in body.strip().split("\n"):
      c = [x.strip() for x in line.strip("|").split("|")]
      if c[0].isdigit() and c[2] != "Void":
        assert ours[int(c[0])][0] == c[3] and (c[4] == "" or ours[int(c[0])][1] == int(c[4])), (
          name,
          c,
          ours[int(c[0])],
        )
        rows += 1
  assert rows > 900


def test_every_enum_of_the_tables(shared_data):
  text = (shared_data.parent / "facts" / "cereal_schema.md").read_text()
  rows = re.findall(r"^- \*\*(\S+)\*\* \(0x([0-9a-f]+)\): (.*)$", text, re.M)
  nodes = upstream.nodes_of(log.Event)
  for name, ident, body in rows:
    if name == "Desire":  # of no field: modelV2's desireState is in its order
      continue
    members = [(int(v), n) for n, v in (x.split("=") for x in body.split(", "))]
    assert nodes[int(ident, 16)]["members"] == members, name
  assert len(rows) >= 30


def test_every_struct_and_enum_is_upstreams():
  """upstream.txt is of openpilot 516ec1e6 (2026-08-14) and opendbc c536b211; `tests/cereal/upstream.py CHECKOUT` says
  what differs, row by row."""
  ours = upstream.nodes_of(log.Event)
  have, want = set(upstream.table(ours).splitlines()), set(upstream.TABLE.read_text().splitlines())
  assert len(want) == 282 and sum(len(n["members"]) for n in ours.values()) == 2827
  assert have == want, sorted(have ^ want)[:10]


def test_the_table_would_notice():
  nodes = upstream.nodes_of(log.Event)
  before = upstream.table(nodes)
  for name, change in (
    ("PandaState.HarnessStatus", lambda m: m[:-1]),
    ("CarParams", None),
    ("EncodeIndex", lambda m: [m[1], m[0], *m[2:]]),
  ):
    node = next(n for n in nodes.values() if n["name"] == name)
    kept = node["members"]
    node["members"] = (
      change(kept)
      if change
      else [(*row[:3], "uint16" if row[1] == "steerControlType" else row[3], *row[4:]) for row in kept]
    )
    assert upstream.table(nodes) != before
    node["members"] = kept
  assert upstream.table(nodes) == before


@pytest.mark.skipif(not os.environ.get("OPENPILOT_DIR"), reason="OPENPILOT_DIR names no checkout of openpilot")
def test_a_checkouts_own_schema():
  theirs, _parser = upstream.load_upstream(Path(os.environ["OPENPILOT_DIR"]))
  assert upstream.differences(upstream.nodes_of(theirs.Event), upstream.nodes_of(log.Event)) == []


def test_enums_and_deprecated_fields_of_real_logs(shared_data):
  """Values as openpilot's own schema gives them."""
  data = shared_data / "realdata"

  def first(name, services):
    found = {}
    for e in LogReader(next((data / name).glob("?log.*")), services=services):
      m = getattr(e, e.which())
      found.setdefault(e.which(), m[0] if "panda" in e.which() and e.which().endswith("s") else m)
    return found

  m = first(
    "2021-02-27--13-45-18--24",
    ["carParams", "pandaStateDEPRECATED", "driverMonitoringStateDEPRECATED", "lateralPlanDEPRECATED", "carControl"],
  )
  assert [
    str(v) for v in (m["carParams"].steerControlType, m["carParams"].fingerprintSource, m["carParams"].networkLocation)
  ] == ["torque", "can", "fwdCamera"]
  assert (str(m["pandaStateDEPRECATED"].harnessStatus), str(m["pandaStateDEPRECATED"].faultStatus)) == (
    "notConnected",
    "none",
  )
  assert (m["driverMonitoringStateDEPRECATED"].isRHD, str(m["lateralPlanDEPRECATED"].laneChangeState)) == (False, "off")
  assert (str(m["carControl"].hudControl.visualAlert), str(m["carControl"].hudControl.audibleAlert)) == ("none", "none")
  m = first("2023-07-27--13-01-19--0", ["carParams", "pandaStates"])
  assert (
    str(m["carParams"].steerControlType),
    str(m["carParams"].fingerprintSource),
    str(m["pandaStates"].harnessStatus),
  ) == ("torque", "fw", "flipped")
  m = first("0000002c--d68dde99ca--1", ["carParams", "pandaStates", "selfdriveState"])
  assert (
    str(m["carParams"].steerControlType),
    str(m["pandaStates"].faultStatus),
    str(m["selfdriveState"].alertSound),
  ) == ("angle", "faultTemp", "none")


def test_services():
  for name, s in SERVICE_LIST.items():
    assert (
      name in log.Event.schema.union_fields and s.frequency <= 104 and s.decimation != 0 and s.queue_size >= 250 * 1024
    )
  for old, new in RENAMED.items():
    assert old not in SERVICE_LIST and new in log.Event.schema.union_fields


def test_services_are_upstreams():
  """services.tsv is of the same openpilot as upstream.txt; ours lack what we never read, and have the fair ones."""
  want = upstream.SERVICES.read_text().splitlines()
  have = upstream.services_table({k: s for k, s in SERVICE_LIST.items() if not k.startswith("fair")}).splitlines()
  assert len(have) == 55 and len(want) == 69 and sorted(set(have) - set(want)) == []
