"""A stand-in for an upstream tree: this repository's processes on messaging, VisionIPC, params and cameras with exactly
upstream's API and manners.

Queues lie in files, as msgq's in /dev/shm: of two publishers the newest wins and the older one's send raises
MultiplePublishersError; a message over a third of its queue aborts the process; nothing has a close(). install(DATE)
makes such a tree of this process; site(DATE, folder) of every Python that starts with what it returns as PYTHONPATH.
"""

import contextlib
import mmap
import os
import struct
import sys
import tempfile
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]
HEAD = struct.Struct("<QQ")  # the publisher that may write; bytes written so far
DEFAULT_SIZE = 10 * 1024 * 1024


@dataclass(frozen=True)
class Tree:
  """What changed between upstream's trees, as far as fairmodeld meets it."""

  root_layout: bool = False  # cereal is a package of its own
  array_data: bool = False  # VisionBuf.data is a numpy array; since May 2026 a memoryview
  queue_size: bool = True  # Service has it
  old_cameras: bool = False  # fcam, ecam
  old_names: bool = False  # liveCalibration, roadCameraState, VISION_STREAM_ROAD
  bytes_params: bool = False  # Params before 0.10


TREES = {
  "2025-03": Tree(
    root_layout=True, array_data=True, queue_size=False, old_cameras=True, old_names=True, bytes_params=True
  ),
  "2025-12": Tree(root_layout=True, array_data=True, queue_size=False, old_cameras=True, old_names=True),
  "2026-03": Tree(root_layout=True, array_data=True, old_cameras=True, old_names=True),
  "2026-06": Tree(root_layout=True, old_cameras=True, old_names=True),
  "2026-07": Tree(old_cameras=True, old_names=True),
  "2026-08": Tree(),
}


# *** msgq ***


class IpcError(Exception):
  pass


class MultiplePublishersError(IpcError):
  pass


class Queue:
  def __init__(self, endpoint, size):
    folder = (
      Path(os.environ.get("TMPDIR") or "/tmp")
      / f"msgq_like-{os.getuid()}"
      / (os.environ.get("OPENPILOT_PREFIX") or "default")
    )
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / endpoint, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, HEAD.size + size)
    self.map, self.size = mmap.mmap(fd, HEAD.size + size), size
    os.close(fd)

  @property
  def head(self):
    return HEAD.unpack_from(self.map)

  def _parts(self, at, n):
    """(where, how many bytes) of n bytes from `at` on, around the end."""
    at %= self.size
    first = min(n, self.size - at)
    return [(HEAD.size + at, first), (HEAD.size, n - first)]

  def write(self, uid, dat):
    _, end = self.head
    dat = struct.pack("<Q", len(dat)) + dat
    done = 0
    for at, n in self._parts(end, len(dat)):
      self.map[at : at + n] = dat[done : done + n]
      done += n
    HEAD.pack_into(self.map, 0, uid, end + len(dat))

  def read(self, at, n):
    return b"".join(self.map[a : a + m] for a, m in self._parts(at, n))


class PubSocket:
  def __init__(self, endpoint, queue_size=DEFAULT_SIZE):
    self.queue = Queue(endpoint, queue_size)
    self.uid = int.from_bytes(os.urandom(8), "little")
    HEAD.pack_into(self.queue.map, 0, self.uid, self.queue.head[1])  # the newest wins

  def send(self, dat):
    if self.queue.head[0] != self.uid:
      raise MultiplePublishersError
    if 3 * (len(dat) + 8) > self.queue.size:
      os.abort()
    self.queue.write(self.uid, dat)

  def all_readers_updated(self):
    return True


class SubSocket:
  size = DEFAULT_SIZE  # as its publisher's; install() knows them

  def __init__(self, endpoint, conflate=False, timeout=None):
    self.queue, self.conflate, self.timeout = Queue(endpoint, SIZES.get(endpoint, DEFAULT_SIZE)), conflate, timeout
    self.at = self.queue.head[1]

  def ready(self):
    return self.queue.head[1] != self.at

  def receive(self, non_blocking=False):
    end = time.monotonic() + (0 if non_blocking else 1e9 if self.timeout is None else self.timeout / 1000)
    while not self.ready():
      if time.monotonic() >= end:
        return None
      time.sleep(0.001)
    while True:
      written = self.queue.head[1]
      if not 0 <= written - self.at <= self.queue.size:  # overtaken; or of two that wrote at once one took the end back
        self.at = written
        return None
      (size,) = struct.unpack("<Q", self.queue.read(self.at, 8))
      dat, after = self.queue.read(self.at + 8, size), self.at + 8 + size
      if self.queue.head[1] - self.at > self.queue.size:  # while it was read
        continue
      self.at = after
      if not self.conflate or after == written:
        return dat

  def setTimeout(self, timeout):
    self.timeout = timeout


class Poller:
  def __init__(self):
    self.subs = []

  def registerSocket(self, sub):
    self.subs.append(sub)

  def poll(self, timeout):
    end = time.monotonic() + timeout / 1000
    while not (found := [s for s in self.subs if s.ready()]) and time.monotonic() < end:
      time.sleep(0.001)
    return found


SIZES = {}


class ClosingPubSocket(PubSocket):
  """For this repository's own server and masters, which close what they made."""

  def close(self):
    pass


class ClosingSubSocket(SubSocket):
  def close(self):
    pass


def transport(put=setattr, pub=ClosingPubSocket, sub=ClosingSubSocket):
  """This process's sockets become msgq's. put: pytest's monkeypatch.setattr in the process of the tests."""
  from openpilot.cereal import messaging, visionipc
  from openpilot.cereal.services import SERVICE_LIST

  SIZES.update({name: int(s.queue_size) for name, s in SERVICE_LIST.items()})
  for module in (messaging, visionipc):
    put(module, "PubSocket", pub)
    put(module, "SubSocket", sub)
  put(messaging, "Poller", Poller)
  put(messaging, "MultiplePublishersError", MultiplePublishersError)
  return messaging, visionipc


# *** the tree around it ***


def module(name, **content):
  m = types.ModuleType(name)
  m.__dict__.update(content)
  return m


class Namesake:
  """An object with these attributes and no others."""

  def __init__(self, **content):
    self.__dict__.update(content)


def client_class(visionipc, array_data):
  class VisionIpcClient:
    """msgq's: no close(), None for the size where nothing is connected, data that is only there while the buffers
    are."""

    def __init__(self, name, stream, conflate):
      self.client, self.endpoint, self.connected = (
        visionipc.VisionIpcClient(name, int(stream), conflate),
        f"visionipc_{name}_{int(stream)}",
        False,
      )

    def recv(self, timeout_ms=100):
      buf = self.client.recv(timeout_ms)
      if buf is None:
        if (
          self.connected and not self.client.is_connected()
        ):  # its server has gone: msgq notices by the first frame of another one
          self.ear.setTimeout(timeout_ms)
          self.connected = self.ear.receive() is None
        return None
      return Namesake(
        data=np.asarray(buf.data) if array_data else memoryview(buf.data),
        width=buf.width,
        height=buf.height,
        stride=buf.stride,
        uv_offset=buf.uv_offset,
      )

    def connect(self, blocking):
      self.connected = self.client.connect(blocking)
      self.ear = visionipc.SubSocket(self.endpoint, conflate=True)
      return self.connected

    def is_connected(self):
      return self.connected

    @staticmethod
    def available_streams(name, block):
      return visionipc.VisionIpcClient.available_streams(name, block)

  for name in ("width", "height", "stride", "uv_offset", "buffer_len"):
    setattr(
      VisionIpcClient,
      name,
      property(lambda self, name=name: getattr(self.client, name) if self.client.is_connected() else None),
    )
  for name in ("num_buffers", "frame_id", "timestamp_sof", "timestamp_eof", "valid"):
    setattr(VisionIpcClient, name, property(lambda self, name=name: getattr(self.client, name)))
  return VisionIpcClient


def bytes_params(typed):
  class Params:
    """Before 0.10: all values are bytes, put() takes text or bytes and has no `block`."""

    def __init__(self, d=""):
      self.params = typed(d or None)

    def check_key(self, key):
      return self.params.check_key(key).encode()

    def get(self, key, block=False, encoding=None):
      self.check_key(key)
      try:
        value = (self.params.path / key).read_bytes()
      except FileNotFoundError:
        return None
      return value if encoding is None else value.decode(encoding)

    def get_bool(self, key, block=False):
      return self.get(key) == b"1"

    def put(self, key, dat):
      self.check_key(key)
      (self.params.path / key).write_bytes(dat.encode() if isinstance(dat, str) else dat)

    def put_bool(self, key, val):
      self.put(key, b"1" if val else b"0")

  return Params


def install(date):
  tree = TREES[date]
  messaging, visionipc = transport(pub=PubSocket, sub=SubSocket)
  import openpilot.cereal as cereal
  from openpilot.cereal.services import RENAMED, SERVICE_LIST
  from openpilot.common import params
  from openpilot.common.transformations import camera

  for master in (messaging.PubMaster, messaging.SubMaster):
    del master.close
  services = {}
  old = {new: name for name, new in RENAMED.items()}
  for name, s in SERVICE_LIST.items():
    about = {"should_log": s.should_log, "frequency": s.frequency, "decimation": s.decimation} | (
      {"queue_size": s.queue_size} if tree.queue_size else {}
    )
    services[old.get(name, name) if tree.old_names else name] = Namesake(**about)
  prefix = "cereal" if tree.root_layout else "openpilot.cereal"
  for name in [m for m in sys.modules if m == "openpilot.cereal" or m.startswith("openpilot.cereal.")]:
    del sys.modules[name]
  sys.modules[prefix] = module(prefix, log=cereal.log, messaging=messaging, __path__=[])
  sys.modules[f"{prefix}.messaging"] = messaging
  sys.modules[f"{prefix}.services"] = module(f"{prefix}.services", SERVICE_LIST=services)
  sys.modules[prefix].__spec__ = cereal.__spec__
  v = visionipc.VisionStreamType
  if tree.old_names:
    streams = Namesake(
      VISION_STREAM_ROAD=v.VISION_STREAM_ROAD,
      VISION_STREAM_DRIVER=v.VISION_STREAM_DRIVER,
      VISION_STREAM_WIDE_ROAD=v.VISION_STREAM_WIDE_ROAD,
    )
  else:
    streams = Namesake(
      **{f"VISION_STREAM_{n}": getattr(v, f"VISION_STREAM_{n}") for n in ("NARROW_ROAD", "CABIN", "WIDE_ROAD")}
    )
    sys.modules[f"{prefix}.visionipc"] = module(f"{prefix}.visionipc", VisionStreamType=streams)
  sys.modules["msgq"] = module("msgq", __path__=[])
  sys.modules["msgq.visionipc"] = module(
    "msgq.visionipc",
    VisionIpcClient=client_class(visionipc, tree.array_data),
    **({"VisionStreamType": streams} if tree.old_names else {}),
  )
  if tree.root_layout:
    sys.modules["openpilot.cereal"] = None  # there is none: import and find_spec say so
  if tree.bytes_params:
    params.Params = bytes_params(params.Params)
  names = ("fcam", "dcam", "ecam") if tree.old_cameras else ("narrow_road", "cabin", "wide_road")
  for key, c in camera.DEVICE_CAMERAS.items():
    camera.DEVICE_CAMERAS[key] = Namesake(**dict(zip(names, (c.narrow_road, c.cabin, c.wide_road), strict=True)))


@contextlib.contextmanager
def beside(date, folder, monkeypatch):
  """A tree of that date for what starts meanwhile, and this process on its transport: what to add to an environment.
  date None: this repository as it is."""
  if date is None:
    yield {}
    return
  transport(monkeypatch.setattr)
  with tempfile.TemporaryDirectory(prefix="q") as short:  # a socket's path has 107 characters
    monkeypatch.setenv("TMPDIR", short)
    yield {"PYTHONPATH": site(date, folder)}


def site(date, folder):
  """A PYTHONPATH by which every Python lives in that tree."""
  folder.mkdir(exist_ok=True)
  (folder / "sitecustomize.py").write_text(f"import msgq_like\nmsgq_like.install({date!r})\n")
  return os.pathsep.join(map(str, (folder, Path(__file__).parent, ROOT)))
