"""Openpilot checkouts in small, of both layouts and several ages, written by the tests themselves: what the overlay
looks for, and a few lines around it."""

import os
import subprocess
from pathlib import Path

IDS = [
  "0xcb9fd56c7057593a",
  "0xc2243c65e0340384",
  "0x9ccdc8676701b412",
  "0xcd96dafb67a082d0",
  "0xb057204d7deadf3f",
  "0xbd443b539493bc68",
  "0xfc6241ed8877b611",
  "0xa30662f84033036c",
  "0xc86a3d38d13eb3ef",
  "0xa4f1eb3323f5f582",
]

LOG = """using Custom = import "custom.capnp";
@0xf3b1f17e25a4285b;

struct Other @0xc4fa6047f024e718 {  # has ordinals of ours too
%s
}

struct Event {
  logMonoTime @0 :UInt64;
  union {
%s
    # DO change the name of the field and struct
%s

    # *********** legacy + deprecated ***********
    model @9 :UInt8;
  }
}
"""
SERVICES = """#!/usr/bin/env python3
%sclass Service:
  def __init__(self, should_log, frequency, decimation=None, queue_size=None):
    self.should_log, self.frequency, self.decimation, self.queue_size = should_log, frequency, decimation, queue_size

_services: dict[str, tuple] = {
  # service: (should_log, frequency, qlog decimation (optional))
  "gyroscope": (True, 104., 104),
  "accelerometer": (True, 104., 104),
  "temperatureSensor": (True, 2., 200),
  "%s": (True, 20., 20),
  "%s": (True, 4., 4),
  "customReservedRawData0": (True, 0.),
}
SERVICE_LIST = {name: Service(*vals) for idx, (name, vals) in enumerate(_services.items())}
"""
QUEUES = """from enum import IntEnum
class QueueSize(IntEnum):
  BIG = 10 * 1024 * 1024
  MEDIUM = 2 * 1024 * 1024
  SMALL = 250 * 1024

"""
TYPED = '    {"Version", {PERSISTENT, STRING}},\n'
UNTYPED = '    {"Version", PERSISTENT},\n'
KEYS = """#pragma once
#include <string>

inline static std::unordered_map<std::string, %s> keys = {
    {"AccessToken", %s},  // }; no end of it
%s};
"""
PROCESSES = """import operator
from openpilot.system.manager.process import PythonProcess, NativeProcess

def only_onroad(started, params, CP):
  return started

procs = [
  PythonProcess("modeld", "selfdrive.modeld.modeld", only_onroad),
  # a ] in a comment, and a string: "]"
  NativeProcess("bridge", "cereal/messaging", ["./bridge"], only_onroad),
]

managed_processes = {p.name: p for p in procs}
"""
SELFDRIVED = """class SelfdriveD:
  def update_events(self):
    not_running = {p.name for p in self.sm['managerState'].processes if not p.running and p.shouldBeRunning}
    if self.sm.recv_frame['managerState'] and not_running:
      self.events.append("processNotRunning")
"""
# no newline at its end
SCONS_CALLS = "SConscript(['pandad/SConscript'])\nSConscript(['modeld/SConscript'])\nSConscript(['ui/SConscript'])"
SCONS_LIST = "SConscript([\n  '%sselfdrive/pandad/SConscript',\n  '%sselfdrive/modeld/SConscript',\n])\n"
ONROAD = """from openpilot.common.params import Params
MAX_TOTAL_CPU = 350.  # total for all 8 cores
PROCS = {
  "selfdrive.modeld.modeld": 22.0,
}
LOGS_SIZE = {  # MB per segment
  "rlog.zst": 8.1,
}
LOGS_SIZE.update(dict.fromkeys(['fcamera.hevc'], 76.5))
"""
REPLAY = """class MessageBasedRcvCallback:
  pass

class ProcessConfig:
  main_pub_drained: bool = %s

CONFIGS = [
  ProcessConfig(
    proc_name="modeld",
    main_pub=vipc_get_endpoint_name("camerad", meta_from_camera_state("roadCameraState").stream),
  ),
]
"""
PLAYER = """Replay::Replay(std::vector<std::string> block) {
  if (!(flags_ & REPLAY_FLAG_ALL_SERVICES)) {
    block.insert(block.end(), {"uiDebug", "userBookmark"});
  }
}
"""
LINT = '#!/usr/bin/env bash\nGIT_FILES="$(git ls-files%s)"\nALL_FILES=""\n'


def voids(ordinals) -> str:
  return "\n".join(f"  f{i} @{i} :Void;" for i in ordinals)


def files(nested: bool, typed: bool, queues: bool) -> dict[str, str]:
  """name -> text. The newest trees are nested and typed and have queue sizes, the oldest nothing of it."""
  p = "openpilot/" if nested else ""
  fields = "\n".join(f"    customReserved{10 + i} @{136 + i} :Custom.CustomReserved{10 + i};" for i in range(10))
  structs = "\n".join(f"\nstruct CustomReserved{10 + i} @{id_} {{\n}}" for i, id_ in enumerate(IDS))
  names = ("narrowRoadCameraState", "extrinsicsCalibration") if nested else ("roadCameraState", "liveCalibration")
  replay = f"{p}selfdrive/test/process_replay"
  found = {
    f"{p}cereal/log.capnp": LOG % (voids(range(146)), voids(i for i in range(1, 136) if i != 9), fields),
    f"{p}cereal/custom.capnp": f"@0xb526ba661d550a59;\n{structs}\n",
    f"{p}cereal/services.py": SERVICES % (QUEUES if queues else "", *names),
    f"{p}common/params_keys.h": KEYS
    % (("ParamKeyAttributes", "{DONT_LOG, STRING}", TYPED) if typed else ("uint32_t", "DONT_LOG", UNTYPED)),
    f"{p}system/manager/process_config.py": PROCESSES,
    f"{p}selfdrive/selfdrived/selfdrived.py": SELFDRIVED,
    f"{p}selfdrive/modeld/modeld.py": "",
    f"{p}tools/replay/replay.cc": PLAYER,
    f"{p}selfdrive/test/test_onroad.py": ONROAD,
    f"{replay}/process_replay.py": REPLAY % (not nested),
    f"{replay}/test_processes.py": 'EXCLUDED_PROCS = {"modeld", "dmonitoringmodeld"}\n',
    f"{replay}/test_fuzzy.py": "NOT_TESTED = ['selfdrived', 'modeld']\nTEST_CASES = [x for x in NOT_TESTED]\n",
    "scripts/lint/lint.sh": LINT % (" openpilot" if nested else ""),
    "SConstruct": SCONS_LIST % (p, p) if typed else "SConscript(['selfdrive/SConscript'])\n",
    ".gitattributes": "* text=auto\n*.onnx filter=lfs diff=lfs merge=lfs -text\n",
    ".gitignore": "*.pyc\n*.pkl\nconfig.json",
  }
  if not typed:
    found["selfdrive/SConscript"] = SCONS_CALLS
  return found


def git(root: Path, *args: str) -> str:
  env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
  r = subprocess.run(
    ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-C", str(root), *args],
    capture_output=True,
    text=True,
    check=True,
    env=env,
  )
  return r.stdout


def write(root: Path, texts: dict[str, str]) -> None:
  for name, text in texts.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make(root: Path, nested: bool = True, typed: bool = True, queues: bool = True, **changed: str | None) -> Path:
  """A checkout with one commit. changed: by the end of a file's name, '_' for what no name may have, another text;
  None: not there."""
  texts = files(nested, typed, queues)
  for end, text in changed.items():
    name = next(n for n in texts if n.replace(".", "_").replace("/", "_").endswith(end))
    if text is None:
      del texts[name]
    else:
      texts[name] = text
  root.mkdir(parents=True, exist_ok=True)
  write(root, texts)
  git(root, "init", "--quiet", "--initial-branch=master")
  git(root, "add", "--all")
  git(root, "commit", "--quiet", "--message=upstream")
  return root
