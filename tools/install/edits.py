"""What the overlay changes in openpilot's own files. Each edit is a function of one file's text, without access to
disks.

Places are found by what they mean, in trees from March 2025 on: the structs by their ids, the slots by their ordinals,
tables by their names."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from openpilot.cereal.services import SERVICE_LIST, QueueSize
from openpilot.common.params import KEYS
from openpilot.tools.install.blocks import Edit, Missing, after, append, brackets, find, line_of, prepend, region
from openpilot.tools.install.layout import Layout

ROOT = Path(__file__).resolve().parents[2]
MODULE = "openpilot.selfdrive.modeld.fair"
# as the manager knows them: (module, when it runs while the flag is on)
PROCESSES = {"fairmodeld": ("fairmodeld", "started"), "fairoffroad": ("offroad", "not started")}
SERVICES = {name: s for name, s in SERVICE_LIST.items() if name.startswith("fair")}
NOT_COMPARED = ("fairState", "fairFeatures")  # the number of fairState depends on the clock; features are off
CPU = {f"{MODULE}.fairmodeld": 1.0, f"{MODULE}.worker": 30.0}  # % of one core, in test_onroad's table
RLOG = 1.0  # MB a minute of all fair* services in the rlog


class Refused(ValueError):
  """The tree has something of its own in the place of an edit. The message names it."""


@dataclass(frozen=True)
class Slot:
  field: str  # our slots in Event
  ordinal: int
  struct: str  # our structs in custom.capnp
  id: str
  text: tuple[str, ...]  # the struct's lines

  @property
  def number(self) -> int:
    """N of openpilot's CustomReservedN."""
    return self.ordinal - (107 if self.ordinal < 117 else 126)


@cache
def slots() -> tuple[Slot, ...]:
  """Ours, as cereal/ here has them."""
  log, custom = ((ROOT / "cereal" / name).read_text() for name in ("log.capnp", "custom.capnp"))
  structs = {
    m.group(1): (m.group(2), custom[m.start() : brackets(custom, m.end() - 1, "#")[0] + 1])
    for m in re.finditer(r"^struct (\w+) @(0x[0-9a-f]+) \{", custom, re.MULTILINE)
  }
  fields = re.findall(r"^\s*(\w+) @(\d+) :Custom\.(\w+);", log, re.MULTILINE)
  return tuple(
    Slot(f, int(n), s, structs[s][0], tuple(structs[s][1].split("\n")))
    for f, n, s in fields
    if not s.startswith("CustomReserved")
  )


def ordinals() -> str:
  numbers = [s.ordinal for s in slots()]
  return f"@{min(numbers)} to @{max(numbers)}"


def adjacent(edits: list[Edit]) -> list[Edit]:
  """Joins edits of consecutive lines, so that they share one pair of marks."""
  out: list[Edit] = []
  for e in sorted(edits, key=lambda e: e.start):
    if out and out[-1].stop == e.start:
      out[-1] = Edit(out[-1].start, e.stop, out[-1].lines + e.lines)
    else:
      out.append(e)
  return out


def ours_alone(text: str, names: Iterable[str], quoted: bool = True) -> None:
  """Raises Refused where the tree has one of our names already, added by hand or by an old version."""
  for name in names:
    if re.search(f'"{name}"' if quoted else rf"^[ \t]*(struct[ \t]+)?{name}[ \t]*@", text, re.MULTILINE):
      raise Refused(f"{name} is there already, outside of our blocks; remove by hand what was added by hand")


def log_capnp(text: str) -> list[Edit]:
  start, end = region(text, r"^struct Event\b[^{]*\{", "struct Event", "#")
  event, edits = text[start:end], []
  ours_alone(event, (slot.field for slot in slots()), quoted=False)
  if not re.search(r"@13[6-9]\s*:\s*Custom\.", event):
    raise Refused("no custom slots from @136 on: openpilot has them since 2025-01-18; merge a newer upstream first")
  for slot in slots():
    m = re.search(rf"^([ \t]*)(\w+)[ \t]*@{slot.ordinal}[ \t]*:[ \t]*([\w.]+)[ \t]*;.*$", event, re.MULTILINE)
    if m is None:
      raise Missing(f"the field @{slot.ordinal} of struct Event")
    if (m.group(2), m.group(3)) != (f"customReserved{slot.number}", f"Custom.CustomReserved{slot.number}"):
      raise Refused(
        f"slot @{slot.ordinal} is in use: {m.group(2)} :{m.group(3)}; ours need {ordinals()}, which upstream "
        "leaves free"
      )
    line = line_of(text, start + m.start(2))
    edits.append(Edit(line, line + 1, (f"{m.group(1)}{slot.field} @{slot.ordinal} :Custom.{slot.struct};",)))
  return adjacent(edits)


def custom_capnp(text: str) -> list[Edit]:
  edits = []
  ours_alone(text, (slot.struct for slot in slots()), quoted=False)
  for slot in slots():
    m = find(text, rf"^struct[ \t]+(\w+)[ \t]*@{slot.id}[^{{\n]*\{{", f"struct CustomReserved{slot.number} @{slot.id}")
    close, last = brackets(text, m.end() - 1, "#")
    if m.group(1) != f"CustomReserved{slot.number}" or last != m.end():
      raise Refused(
        f"slot @{slot.ordinal} is in use: struct {m.group(1)} {'' if last == m.end() else 'with fields '}has the id "
        f"{slot.id}"
      )
    edits.append(Edit(line_of(text, m.start()), line_of(text, close) + 1, slot.text))
  return edits


def services(text: str) -> list[Edit]:
  ours_alone(text, SERVICES)
  queues, new = re.search(r"^class QueueSize\b", text, re.MULTILINE) is not None, []
  for name, s in SERVICES.items():
    entry = [str(s.should_log), f"{s.frequency:g}" + ("" if s.frequency % 1 else ".")]
    queue = QueueSize(s.queue_size) if queues else QueueSize.SMALL
    if s.decimation is not None or queue != QueueSize.SMALL:
      entry.append(str(s.decimation))
    if queue != QueueSize.SMALL:
      entry.append(f"QueueSize.{queue.name}")
    new.append(f'  "{name}": ({", ".join(entry)}),')
  return prepend(text, r"^_services\b[^={\n]*= *\{", "_services = {", new, "#")


def params_keys(text: str) -> list[Edit]:
  ours_alone(text, (name for name in KEYS if name.startswith("Fair")))
  opener = r"^[^\n]*\bkeys *= *\{"
  what = "the table keys = {"
  start, end = region(text, opener, what, "//")
  first = re.search(r'^([ \t]*)\{ *"\w+" *,', text[start:end], re.MULTILINE)
  if first is None:
    raise Missing(f'{what} with entries {{"Name", ...}}')
  typed, indent = re.search(r'\{ *"\w+" *, *\{', text[start:end]) is not None, first.group(1)
  new = []
  for name, key in KEYS.items():
    if name.startswith("Fair"):
      flags = " | ".join(str(f.name) for f in type(key.flags) if f in key.flags and f.name != "ALL")
      new.append(f'{indent}{{"{name}", {{{flags}, {key.type.name}}}}},' if typed else f'{indent}{{"{name}", {flags}}},')
  return append(text, opener, what, new, "//")


def process_config(text: str) -> list[Edit]:
  ours_alone(text, PROCESSES)
  at = line_of(text, find(text, r"^procs\b[^=\n]*= *\[", "procs = [").start())
  rules, entries = [], []
  for name, (module, when) in PROCESSES.items():
    rules += [
      f"def {name}(started: bool, params: Params, CP) -> bool:",
      f'  return {when} and params.get_bool("FairEnabled")',
      "",
    ]
    entries.append(f'  PythonProcess("{name}", "{MODULE}.{module}", {name}),')
  return [Edit(at, at, tuple(rules)), *append(text, r"^procs\b[^=\n]*= *\[", "procs = [", entries, "#")]


def selfdrived(text: str) -> list[Edit]:
  names = ", ".join(f'"{p}"' for p in PROCESSES)
  new = [f"not_running -= {{{names}}}  # they only advise: no event"]
  return after(text, r"^[ \t]*not_running *= *\{", "not_running = {", new, "#")


def scons_list(text: str) -> list[Edit]:
  """Beside modeld's own in a list of SConscripts, or in a call of its own (selfdrive/SConscript, before March 2026)."""
  m = re.search(r"""^([ \t]*)(["'])((?:[\w./]*/)?modeld)/SConscript\2,[ \t]*(#.*)?$""", text, re.MULTILINE)
  if m is not None:
    new = f"{m.group(1)}{m.group(2)}{m.group(3)}/fair/SConscript{m.group(2)},"
  else:
    m = re.search(
      r"""^([ \t]*)SConscript\(\[?(["'])((?:[\w./]*/)?modeld)/SConscript\2\]?\)[ \t]*(#.*)?$""", text, re.MULTILINE
    )
    if m is None:
      raise Missing("modeld/SConscript, on a line of its own")
    new = f"{m.group(1)}SConscript([{m.group(2)}{m.group(3)}/fair/SConscript{m.group(2)}])"
  at = line_of(text, m.start(2)) + 1
  return [Edit(at, at, (new,))]


def gitattributes(models: str, text: str) -> list[Edit]:
  """Below upstream's rule, which it reverts for our bundles: the last matching rule counts."""
  rules = [m.start() for m in re.finditer(r"^\*\.onnx\s.*filter=lfs.*$", text, re.MULTILINE)]
  if not rules:
    raise Missing("*.onnx filter=lfs")
  at = line_of(text, rules[-1]) + 1
  return [Edit(at, at, (f"/{models}/*/*.onnx -filter -diff -merge -text",))]


def gitignore(folder: str, text: str) -> list[Edit]:
  lines = text.split("\n")
  at = len(lines) - (not lines[-1])
  return [Edit(at, at, (f"/{folder}/built/",))]


def lint(models: str, text: str) -> list[Edit]:
  """Bundles are not source code: networks exceed the size limit of files, and manifests have their own spelling."""
  m = find(text, r'^GIT_FILES="\$\(git ls-files.*\)"$', 'GIT_FILES="$(git ls-files ...)"')
  at = line_of(text, m.start()) + 1
  return [
    Edit(at, at, (f"""GIT_FILES="$(echo "$GIT_FILES" | grep -v -e '^{models}/' -e '/fair/bundle.schema.json$')\"""",))
  ]


def test_onroad(text: str) -> list[Edit]:
  for name in ("PROCS", "MAX_TOTAL_CPU"):
    find(text, rf"^{name} *=", f"{name} =")
  find(text, r'^ *"rlog\.zst": ', '"rlog.zst" in LOGS_SIZE')
  new = [
    'if Params().get_bool("FairEnabled"):  # the table is full without: eight cores have 800',
    *(f'  PROCS["{name}"] = {cpu}' for name, cpu in CPU.items()),
    f"  MAX_TOTAL_CPU += {sum(CPU.values())}",
    f'  LOGS_SIZE["rlog.zst"] += {RLOG}',
  ]
  return after(text, r"^LOGS_SIZE *= *\{", "LOGS_SIZE = {", new, "#")


def process_replay(camera: str, calibration: str, text: str) -> list[Edit]:
  subs = [name for name in SERVICES if name not in NOT_COMPARED]
  ignore = [f'"{name}.modelExecutionTime"' for name in subs]
  new = [
    "  ProcessConfig(",
    '    proc_name="fairmodeld",',
    f'    pubs=["deviceState", "{camera}", "{calibration}", "modelV2", "carState", "cameraOdometry"],',
    "    subs=[" + ", ".join(f'"{name}"' for name in subs) + "],",
    f'    ignore=["logMonoTime", {", ".join(ignore[:2])},',
    f"            {', '.join(ignore[2:])}],",
    f'    should_recv_callback=MessageBasedRcvCallback("{camera}"),',
    "    tolerance=NUMPY_TOLERANCE,",
    "    processing_time=0.020,",
    f'    main_pub=vipc_get_endpoint_name("camerad", meta_from_camera_state("{camera}").stream),',
    *(["    main_pub_drained=False,"] if re.search(r"main_pub_drained: bool = True", text) else []),
    f'    vision_pubs=["{camera}"],',
    f'    ignore_alive_pubs=["{camera}"],',
    "  ),",
  ]
  for name in ("MessageBasedRcvCallback", "vipc_get_endpoint_name", "meta_from_camera_state"):
    find(text, rf"\b{name}\b", name)
  return append(text, r"^CONFIGS\b[^=\n]*= *\[", "CONFIGS = [", new, "#")


def replay(text: str) -> list[Edit]:
  """openpilot's replay leaves the services of running processes, such as the UI's, to these, unless it gets --all."""
  m = find(text, r"^([ \t]*)block\.insert\(block\.end\(\), *\{.*\}\);$", "block.insert(block.end(), {...});")
  at = line_of(text, m.start()) + 1
  names = ", ".join(f'"{name}"' for name in SERVICES)
  return [Edit(at, at, (f"{m.group(1)}block.insert(block.end(), {{{names}}});",))]


def not_in_test(table: str, text: str) -> list[Edit]:
  """Tests that compare every configuration with upstream's references."""
  m = find(text, rf"^{table}\b[^=\n]*= *([\[{{])", f"{table} = ")
  names = ", ".join(f'"{p}"' for p in PROCESSES)
  new = f"{table} += [{names}]" if m.group(1) == "[" else f"{table} |= {{{names}}}"
  return after(text, rf"^{table}\b[^=\n]*= *[\[{{]", f"{table} = ", [new], "#")


@dataclass(frozen=True)
class FileEdit:
  name: str  # from the checkout's root
  edit: Callable[[str], list[Edit]]
  comment: str = "#"
  # True: the overlay does not work without it; False: it only serves tests and tools, and is left out with a note
  needed: bool = True
  new: bool = False  # may be created


def file_edits(layout: Layout) -> list[FileEdit]:
  """All edits of this checkout, also of files that should exist and do not."""
  p, first = layout.package, layout.first
  keys = first("common/params_keys.h") or p + "common/params.cc"
  config = (
    first("system/manager/process_config.py", "selfdrive/manager/process_config.py")
    or p + "system/manager/process_config.py"
  )
  old_scons = (layout.root / "selfdrive/SConscript").is_file() and not p
  camera, calibration = names_of(layout)
  tests = p + "selfdrive/test/process_replay/"
  return [
    FileEdit(p + "cereal/log.capnp", log_capnp),
    FileEdit(p + "cereal/custom.capnp", custom_capnp),
    FileEdit(p + "cereal/services.py", services),
    FileEdit(keys, params_keys, "//"),
    FileEdit(config, process_config),
    FileEdit(p + "selfdrive/selfdrived/selfdrived.py", selfdrived),
    FileEdit("selfdrive/SConscript" if old_scons else "SConstruct", scons_list),
    FileEdit(".gitattributes", partial(gitattributes, layout.models), needed=False),
    FileEdit(".gitignore", partial(gitignore, layout.folder), new=True),
    FileEdit("scripts/lint/lint.sh", partial(lint, layout.models), needed=False),
    FileEdit(p + "tools/replay/replay.cc", replay, "//", needed=False),
    FileEdit(p + "selfdrive/test/test_onroad.py", test_onroad, needed=False),
    FileEdit(tests + "process_replay.py", partial(process_replay, camera, calibration), needed=False),
    FileEdit(tests + "test_processes.py", partial(not_in_test, "EXCLUDED_PROCS"), needed=False),
    FileEdit(tests + "test_fuzzy.py", partial(not_in_test, "NOT_TESTED"), needed=False),
  ]


def names_of(layout: Layout) -> tuple[str, str]:
  """(the narrow camera's service, the calibration's) in the checkout's spelling: both were renamed in August 2026."""
  try:
    text = (layout.root / layout.package / "cereal/services.py").read_text()
  except (OSError, UnicodeDecodeError):
    text = ""
  return (
    "narrowRoadCameraState" if '"narrowRoadCameraState"' in text else "roadCameraState",
    "extrinsicsCalibration" if '"extrinsicsCalibration"' in text else "liveCalibration",
  )
