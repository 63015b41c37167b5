"""openpilot's messaging API over ZeroMQ: one PUB socket per service on an ipc endpoint, keyed by name and
OPENPILOT_PREFIX.

Both spellings of the services renamed in August 2026 meet at one endpoint. Inside an openpilot checkout its own
messaging (msgq) takes this one's place."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import capnp
import zmq

from openpilot.cereal import log
from openpilot.cereal.services import SERVICE_LIST, service_name

NO_TRAVERSAL_LIMIT = 2**64 - 1
AVG_FREQ_HISTORY = 100  # messages
DEFAULT_QUEUE_SIZE = 1024 * 1024
HIGH_WATER_MARK = 500  # messages that a slow reader may fall behind before it loses some; bounds memory
MAX_IPC_PATH = 100  # a unix socket's path is limited to 107 bytes

_context: tuple[int, zmq.Context] | None = None


class MultiplePublishersError(Exception):
  """A living process publishes this service already."""


class MessageTooLargeError(Exception):
  """The message takes more than a third of its service's queue, where msgq would abort the process."""


def context() -> zmq.Context:
  """This process's ZeroMQ context; a forked child gets its own, since one cannot be shared over fork."""
  global _context
  if _context is None or _context[0] != os.getpid():
    _context = (os.getpid(), zmq.Context())
  return _context[1]


def socket_folders() -> tuple[str, str, str]:
  """This user's folder, <tmp>/openpilot-<uid>, in it the prefix's, and that of a prefix whose sockets' paths would be
  too long."""
  prefix = os.environ.get("OPENPILOT_PREFIX", "") or "default"
  # not tempfile.gettempdir(): on a full disk it chooses another folder, where nobody listens
  own = os.path.join(os.environ.get("TMPDIR") or "/tmp", f"openpilot-{os.getuid()}")
  return own, os.path.join(own, prefix), os.path.join(own, hashlib.sha256(prefix.encode()).hexdigest()[:16])


def endpoint_path(endpoint: str) -> str:
  """The socket file of an endpoint: <tmp>/openpilot-<uid>/<prefix>/<endpoint>. Makes the folder where needed. Raises
  OSError where its path is too long."""
  own, folder, short = socket_folders()
  if len(folder) + 1 + len(endpoint) > MAX_IPC_PATH:
    folder = short
  if len(folder) + 1 + len(endpoint) > MAX_IPC_PATH:
    raise OSError(
      errno.ENAMETOOLONG,
      f"the folder of TMPDIR has too long a path for sockets ({len(own)} letters); set a shorter one, as TMPDIR=/tmp",
    )
  private_folder(own)
  private_folder(folder)
  return os.path.join(folder, endpoint)


def remove_sockets() -> None:
  """Ends an OPENPILOT_PREFIX that nobody else has: its sockets' files go, which ZeroMQ leaves."""
  own, *folders = socket_folders()
  for folder in folders:
    if os.path.dirname(os.path.realpath(folder)) == os.path.realpath(own):  # a prefix may be any path
      shutil.rmtree(folder, ignore_errors=True)


def private_folder(path: str) -> None:
  """Makes the folder for this user only, since whoever can write there can forge messages. Raises PermissionError where
  it is another user's, or a link."""
  with contextlib.suppress(FileExistsError):
    os.mkdir(path, 0o700)
  about = os.lstat(path)
  if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
    raise PermissionError(
      f"{path} is not a folder of user {os.getuid()}, so others could send messages through it; remove it, or set "
      "TMPDIR to another folder"
    )
  if about.st_mode & 0o077:  # made by an older version
    os.chmod(path, 0o700)


class PubSocket:
  """Publishes bytes on one endpoint. A killed publisher's socket is taken over; a living one raises
  MultiplePublishersError."""

  def __init__(self, endpoint: str, queue_size: int = DEFAULT_QUEUE_SIZE):
    self.endpoint, self.max_size = endpoint, queue_size // 3
    path = endpoint_path(endpoint)
    self.lock = open(path + ".lock", "a+")
    try:
      fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self.lock.seek(0)
      owner = self.lock.read().strip() or "unknown"
      self.lock.close()
      raise MultiplePublishersError(
        f"'{endpoint}' is being published already, by process {owner}; stop it, or set another OPENPILOT_PREFIX"
      ) from None
    self.lock.truncate(0)
    # for the error of a second publisher; on a full disk it is missing, and the lock holds all the same
    with contextlib.suppress(OSError):
      os.write(self.lock.fileno(), str(os.getpid()).encode())
    self.sock = context().socket(zmq.PUB)
    self.sock.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    self.sock.setsockopt(zmq.LINGER, 0)
    self.sock.bind(f"ipc://{path}")

  def send(self, dat: bytes) -> None:
    if len(dat) > self.max_size:
      raise MessageTooLargeError(f"'{self.endpoint}': a message of {len(dat)} bytes, at most {self.max_size} fit")
    self.sock.send(dat)

  def all_readers_updated(self) -> bool:
    return True

  def close(self) -> None:
    self.sock.close()
    self.lock.close()


class SubSocket:
  """Reads one endpoint; it may be made before its publisher, and outlives the publisher's restarts."""

  def __init__(self, endpoint: str, conflate: bool = False, timeout: int | None = None):
    self.endpoint = endpoint
    self.sock = context().socket(zmq.SUB)
    if conflate:
      self.sock.setsockopt(zmq.CONFLATE, 1)
    self.sock.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    self.sock.setsockopt(zmq.LINGER, 0)
    self.sock.setsockopt(zmq.RECONNECT_IVL, 20)
    self.sock.setsockopt(zmq.SUBSCRIBE, b"")
    self.sock.setsockopt(zmq.RCVTIMEO, -1 if timeout is None else timeout)
    self.sock.connect(f"ipc://{endpoint_path(endpoint)}")

  def receive(self, non_blocking: bool = False) -> bytes | None:
    try:
      return self.sock.recv(zmq.NOBLOCK if non_blocking else 0)
    except zmq.Again:
      return None

  def setTimeout(self, timeout: int) -> None:
    self.sock.setsockopt(zmq.RCVTIMEO, timeout)

  def close(self) -> None:
    self.sock.close()


class Poller:
  def __init__(self) -> None:
    self.poller = zmq.Poller()
    self.subs: dict[zmq.Socket, SubSocket] = {}

  def registerSocket(self, sub: SubSocket) -> None:
    self.subs[sub.sock] = sub
    self.poller.register(sub.sock, zmq.POLLIN)

  def poll(self, timeout: int) -> list[SubSocket]:
    return [self.subs[s] for s, _ in self.poller.poll(timeout)]


def log_from_bytes(dat: bytes, struct: Any = log.Event) -> Any:
  """bytes of one message -> reader."""
  with struct.from_bytes(dat, traversal_limit_in_words=NO_TRAVERSAL_LIMIT) as msg:
    return msg


def new_message(service: str | None = None, size: int | None = None, **kwargs: Any) -> Any:
  """A log.Event builder with logMonoTime set to now and valid to False unless given; `size` for services that are
  lists."""
  args = {"valid": False, "logMonoTime": time.monotonic_ns(), **kwargs}
  dat = log.Event.new_message(**args)
  if service is not None:
    name = service_name(service)
    dat.init(name) if size is None else dat.init(name, size)
  return dat


def pub_sock(endpoint: str) -> PubSocket:
  name = service_name(endpoint)
  return PubSocket(name, SERVICE_LIST[name].queue_size if name in SERVICE_LIST else DEFAULT_QUEUE_SIZE)


def sub_sock(
  endpoint: str, poller: Poller | None = None, conflate: bool = False, timeout: int | None = None
) -> SubSocket:
  sock = SubSocket(service_name(endpoint), conflate, timeout)
  if poller is not None:
    poller.registerSocket(sock)
  return sock


def drain_sock_raw(sock: SubSocket, wait_for_one: bool = False) -> list[bytes]:
  """All messages waiting in the socket; with wait_for_one it blocks until one comes or the socket's timeout passes."""
  ret: list[bytes] = []
  while True:
    dat = sock.receive(non_blocking=not (wait_for_one and not ret))
    if dat is None:
      return ret
    ret.append(dat)


def drain_sock(sock: SubSocket, wait_for_one: bool = False) -> list[Any]:
  return [log_from_bytes(m) for m in drain_sock_raw(sock, wait_for_one)]


def recv_sock(sock: SubSocket, wait: bool = False) -> Any | None:
  """The newest message waiting in the socket, the older ones dropped."""
  msgs = drain_sock_raw(sock, wait_for_one=wait)
  return log_from_bytes(msgs[-1]) if msgs else None


def recv_one(sock: SubSocket) -> Any | None:
  """The next message; blocks up to the socket's timeout."""
  dat = sock.receive()
  return None if dat is None else log_from_bytes(dat)


def recv_one_or_none(sock: SubSocket) -> Any | None:
  dat = sock.receive(non_blocking=True)
  return None if dat is None else log_from_bytes(dat)


def recv_one_retry(sock: SubSocket) -> Any:
  """The next message, however long it takes."""
  while True:
    dat = sock.receive()
    if dat is not None:
      return log_from_bytes(dat)


class PubMaster:
  def __init__(self, services: Sequence[str]):
    self.sock = {}
    for s in services:
      self.sock[service_name(s)] = pub_sock(s)

  def send(self, s: str, dat: bytes | capnp.lib.capnp._DynamicStructBuilder) -> None:
    self.sock[service_name(s)].send(dat if isinstance(dat, bytes) else dat.to_bytes())

  def all_readers_updated(self, s: str) -> bool:
    return self.sock[service_name(s)].all_readers_updated()

  def close(self) -> None:
    for sock in self.sock.values():
      sock.close()


class FrequencyTracker:
  """Whether messages come at their service's rate, as far as the reader's own rate can show."""

  def __init__(self, service_freq: float, update_freq: float, is_poll: bool):
    freq = max(min(service_freq, update_freq), 1.0)
    if is_poll or update_freq >= 2 * service_freq:
      min_freq = freq
    elif service_freq >= 2 * update_freq:
      min_freq = update_freq
    else:
      min_freq = freq / 2.0
    self.min_freq, self.max_freq = min_freq * 0.8, freq * 1.2
    self.recv_dts: deque[float] = deque(maxlen=AVG_FREQ_HISTORY)
    self.recv_time: float | None = None

  def record_recv_time(self, cur_time: float) -> None:
    if self.recv_time is not None:
      self.recv_dts.append(cur_time - self.recv_time)
    self.recv_time = cur_time

  @property
  def valid(self) -> bool:
    if not self.recv_dts:
      return False
    total = sum(self.recv_dts)
    return total > 0 and self.min_freq <= len(self.recv_dts) / total <= self.max_freq


class SubMaster:
  """The newest message of each service. Attributes are dicts by service name, in the caller's spelling.

  updated: came in this update(); seen: ever; alive: within 10 periods; valid: as the sender set it; freq_ok: at the
  service's rate. Raises KeyError for a service that is not in SERVICE_LIST."""

  def __init__(
    self,
    services: Sequence[str],
    poll: str | None = None,
    ignore_alive: Sequence[str] | None = None,
    ignore_avg_freq: Sequence[str] | None = None,
    ignore_valid: Sequence[str] | None = None,
    addr: str = "127.0.0.1",
    frequency: float | None = None,
  ):
    self.services = list(services)
    self.frame = -1
    self.ignore_alive = list(ignore_alive or [])
    self.ignore_average_freq = list(ignore_avg_freq or [])
    self.ignore_valid = list(ignore_valid or [])
    rates = {s: SERVICE_LIST[service_name(s)].frequency for s in services}
    if frequency is not None:
      self.update_freq = frequency
    else:
      self.update_freq = rates[poll] if poll is not None else max(rates.values(), default=1.0)
    self.poller = Poller()  # only the polled service wakes update(); all others are read when it wakes
    self.sock: dict[str, SubSocket] = {}
    self.data: dict[str, Any] = {}
    for s in services:
      self.sock[s] = sub_sock(s, poller=self.poller if poll is None or s == poll else None, conflate=True)
      msg = new_message(None)
      field = log.Event.schema.fields[service_name(s)]
      msg.init(service_name(s), 0) if field.proto.slot.type.which() in ("list", "text", "data") else msg.init(
        service_name(s)
      )
      self.data[s] = getattr(msg.as_reader(), service_name(s))
    self.freq_tracker = {s: FrequencyTracker(rates[s], self.update_freq, s == poll) for s in services}
    self.updated = dict.fromkeys(services, False)
    self.seen = dict.fromkeys(services, False)
    self.alive = dict.fromkeys(services, False)
    self.freq_ok = dict.fromkeys(services, False)
    self.valid = dict.fromkeys(services, False)
    self.recv_time = dict.fromkeys(services, 0.0)
    self.recv_frame = dict.fromkeys(services, 0)
    self.logMonoTime = dict.fromkeys(services, 0)

  def __getitem__(self, s: str) -> Any:
    return self.data[s]

  def update(self, timeout: int = 100) -> None:
    self.poller.poll(timeout)
    msgs = []
    for s in self.services:
      dat = self.sock[s].receive(non_blocking=True)
      if dat is not None:
        msgs.append((s, log_from_bytes(dat)))
    self._take(time.monotonic(), msgs)

  def update_msgs(self, cur_time: float, msgs: Sequence[Any]) -> None:
    """As update(), with events and the time in seconds as arguments, for a replay without sockets."""
    names = {service_name(s): s for s in self.services}
    self._take(cur_time, [(names[m.which()], m) for m in msgs if m.which() in names])

  def _take(self, cur_time: float, msgs: Sequence[tuple[str, Any]]) -> None:
    self.frame += 1
    self.updated = dict.fromkeys(self.services, False)
    for s, msg in msgs:
      self.seen[s] = self.updated[s] = True
      self.freq_tracker[s].record_recv_time(cur_time)
      self.recv_time[s], self.recv_frame[s] = cur_time, self.frame
      self.data[s], self.logMonoTime[s], self.valid[s] = getattr(msg, service_name(s)), msg.logMonoTime, msg.valid
    for s in self.services:
      freq = SERVICE_LIST[service_name(s)].frequency
      self.alive[s] = self.seen[s] and (freq <= 1e-5 or cur_time - self.recv_time[s] < 10.0 / freq)
      self.freq_ok[s] = freq <= 1e-5 or self.freq_tracker[s].valid

  def all_alive(self, service_list: Sequence[str] | None = None) -> bool:
    return all(self.alive[s] for s in (service_list or self.services) if s not in self.ignore_alive)

  def all_freq_ok(self, service_list: Sequence[str] | None = None) -> bool:
    return all(self.freq_ok[s] for s in (service_list or self.services) if s not in self.ignore_average_freq)

  def all_valid(self, service_list: Sequence[str] | None = None) -> bool:
    return all(self.valid[s] for s in (service_list or self.services) if s not in self.ignore_valid)

  def all_checks(self, service_list: Sequence[str] | None = None) -> bool:
    return self.all_alive(service_list) and self.all_freq_ok(service_list) and self.all_valid(service_list)

  def close(self) -> None:
    for sock in self.sock.values():
      sock.close()
