"""Where messages leave: no send ends the process, and of another publisher of the same services ours gets out of the
way.

On msgq the newest publisher of a service wins, and the older one's send raises MultiplePublishersError: so openpilot's
replay, which publishes every service there is, or a second fairmodeld, silences this one. What was taken is left alone
while somebody sends it, and taken back when nobody did for RETRY seconds. And whatever makes us send, a camera that
floods or a mistake of ours, readers and the log get no more than MOST messages a second of a service."""

from collections.abc import Callable, Sequence
from typing import Any

from openpilot.selfdrive.modeld.fair.ipc import messaging

RETRY = 5.0  # s between two looks at whether somebody else still sends
MOST = 200.0  # messages a second of a service: ten times what frames make, twice the fastest that openpilot has


class Lost:
  """A service that somebody else publishes."""

  def __init__(self, name: str, now: float):
    self.ear, self.look_at = messaging.sub_sock(name, conflate=True), now + RETRY

  def is_free(self, now: float) -> bool:
    """Nobody sent for RETRY seconds."""
    if now < self.look_at:
      return False
    self.look_at = now + RETRY
    return self.ear.receive(non_blocking=True) is None

  def close(self) -> None:
    if hasattr(self.ear, "close"):  # msgq's sockets have none
      self.ear.close()


class Sender:
  """A PubMaster that goes on.

  services: the first says who we are; where it can be known at once that another process has that one,
  MultiplePublishersError is raised. now: seconds of the clock that counts. fault: is told what went wrong, in one line;
  of another publisher once until all is ours again."""

  def __init__(self, services: Sequence[str], now: Callable[[], float], fault: Callable[[str], None]):
    self.now, self.fault = now, fault
    self.lost: dict[str, Lost] = {}
    self.room: dict[
      str, tuple[float, float]
    ] = {}  # service -> when it was looked at last, messages that may go out at once
    self.left_out, self.tell_at = 0, 0.0
    self.sock: dict[str, Any] = {}
    for name in services:
      try:
        self.sock[name] = messaging.pub_sock(name)
      except messaging.MultiplePublishersError:  # of ours, not msgq: there the newest wins
        if name == services[0]:
          raise
        self.lose(name)

  def lose(self, name: str) -> None:
    first = not self.lost
    self.lost[name] = Lost(name, self.now())
    self._close(self.sock.pop(name, None))
    if first:
      self.fault(
        f"another process publishes {name}: what it takes of ours is not sent until it stops; openpilot's replay takes "
        "all but what --block names"
      )

  def take_back(self, name: str) -> bool:
    """Whether the service is ours again."""
    if not self.lost[name].is_free(self.now()):
      return False
    try:
      self.sock[name] = messaging.pub_sock(name)
    except Exception:  # it is there and only silent
      return False
    self.lost.pop(name).close()
    return True

  def has_room(self, name: str) -> bool:
    """Whether the service sends no more than MOST messages a second; those left out are counted and told every RETRY
    seconds."""
    now = self.now()
    before, room = self.room.get(name, (now, MOST))
    room = min(MOST, room + max(0.0, now - before) * MOST)
    enough = room >= 1.0
    self.room[name] = (now, room - enough)
    if enough:
      return True
    self.left_out += 1
    if now >= self.tell_at:
      self.tell_at = now + RETRY
      self.fault(
        f"{name} would have sent over {MOST:g} messages a second; {self.left_out} messages were left out so far"
      )
    return False

  def send(self, name: str, dat: bytes) -> bool:
    """Whether it went out."""
    if not self.has_room(name):
      return False
    if name in self.lost and not self.take_back(name):
      return False
    try:
      self.sock[name].send(dat)
    except messaging.MultiplePublishersError:
      self.lose(name)
      return False
    except Exception as e:  # a full disk, a queue that is gone
      self.fault(f"{name} was not sent: {type(e).__name__}: {e}")
      return False
    return True

  @staticmethod
  def _close(sock: Any) -> None:
    if hasattr(sock, "close"):
      sock.close()

  def close(self) -> None:
    for lost in self.lost.values():
      lost.close()
    for sock in self.sock.values():
      self._close(sock)
