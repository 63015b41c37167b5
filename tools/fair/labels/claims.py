"""Who fills which group, where several commands on one machine or many fill one store.

DIR/.claims/<segment>/<group>.<number>

A claim is a file that only one can create. Its owner rewrites it every BEAT seconds. It is void when the one who wants
the group has seen it unchanged for EXPIRE seconds by his own clock, so that clocks need not agree, or when its process
was one of this machine and is gone. Then the next number is taken, which again only one can create; the highest
counts, and an owner who finds a higher one stops.

Claims save work. Labels are right without them: files are replaced whole, and the same chunk is the same bytes whoever
writes it."""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.files import machine_id, still_runs

CLAIMS = ".claims"  # folder in a store
BEAT, EXPIRE = 10.0, 60.0  # s


def now() -> float:
  """s; where the system can say it, with the time that the machine slept."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Place(Protocol):
  """Where claims are kept, by names in the store: a folder, or remote.Remote."""

  def names(self, prefix: str) -> Iterable[str]: ...

  def create(self, name: str, data: bytes) -> bool:
    """False where it is there already."""

  def read(self, name: str) -> bytes | None: ...

  def rewrite(self, name: str, data: bytes) -> bool:
    """False where it is not there any more."""

  def remove(self, name: str) -> None: ...


class Folder:
  def __init__(self, root: Path):
    self.root = root

  def names(self, prefix: str) -> list[str]:
    return [p.relative_to(self.root).as_posix() for p in (self.root / prefix).rglob("*") if p.is_file()]

  def create(self, name: str, data: bytes) -> bool:
    path = self.root / name
    while True:
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as f:
          f.write(data)
        return True
      except FileExistsError:
        return False
      except FileNotFoundError:  # whoever released the last one here removed the folder
        continue

  def read(self, name: str) -> bytes | None:
    try:
      return (self.root / name).read_bytes()[:200]
    except FileNotFoundError:
      return None

  def rewrite(self, name: str, data: bytes) -> bool:
    try:
      with open(self.root / name, "r+b") as f:
        f.write(data)
      return True
    except FileNotFoundError:
      return False

  def remove(self, name: str) -> None:
    path = self.root / name
    path.unlink(missing_ok=True)
    for p in (path.parent, path.parent.parent):
      with contextlib.suppress(OSError):
        p.rmdir()


@dataclass
class Claim:
  group: str  # <segment>/<teacher>-<key>
  name: str  # in the store
  beats: int = 0
  last: float = 0.0  # when it was rewritten
  lost: bool = False


class Claims:
  """Of one store, as this process sees them. Safe for its threads."""

  def __init__(self, place: Place):
    self.place = place
    self.token = f"{machine_id()} {os.getpid()} {secrets.token_hex(8)}"
    self.held: dict[str, Claim] = {}
    self.seen: dict[str, tuple[bytes, float]] = {}  # others': what they say, and since when
    self.lock, self.wake = threading.RLock(), threading.Event()
    self.thread: threading.Thread | None = None

  def _there(self, group: str) -> list[str]:
    """All claims of a group, the one that counts last."""
    own = f"{CLAIMS}/{group}."
    found = [n for n in self.place.names(f"{CLAIMS}/{group.partition('/')[0]}/") if n.startswith(own)]
    return sorted((n for n in found if n[len(own) :].isdecimal()), key=lambda n: int(n[len(own) :]))

  def _says(self, beats: int) -> bytes:
    return f"{self.token} {beats:010d}\n".encode()

  def take(self, group: str) -> Claim | None:
    """The claim of a group; None while somebody holds it."""
    with self.lock:
      there = self._there(group)
      if there and self._alive(there[-1]):
        return None
      number = int(there[-1].rpartition(".")[2]) + 1 if there else 0
      name = f"{CLAIMS}/{group}.{number}"
      if not self.place.create(name, self._says(0)):
        return None
      claim = self.held[name] = Claim(group, name, last=now())
      if self.thread is None:
        self.thread = threading.Thread(target=self._beat_all, daemon=True)
        self.thread.start()
      return claim

  def _alive(self, name: str) -> bool:
    if name in self.held:
      return True
    said = self.place.read(name)
    if said is None:
      return False
    machine, _, rest = said.decode(errors="replace").partition(" ")
    if still_runs(machine, rest.partition(" ")[0]) is False:
      return False
    before = self.seen.get(name)
    if before is None or before[0] != said:
      self.seen[name] = said, now()
      return True
    return now() - before[1] < EXPIRE

  def taken(self, group: str) -> bool:
    """Whether somebody, of this process or another, fills it."""
    with self.lock:
      there = self._there(group)
      return bool(there) and self._alive(there[-1])

  def holds(self, claim: Claim) -> bool:
    """Asked before each write: False where another has taken it over, as of a process that was stopped for long."""
    if not claim.lost and now() - claim.last > EXPIRE / 2:
      self._beat(claim)
    return not claim.lost

  def _beat(self, claim: Claim) -> None:
    with self.lock:
      if claim.lost or claim.name not in self.held:
        return
      try:
        said = self.place.read(claim.name) if self._there(claim.group)[-1:] == [claim.name] else None
        if said is None or not said.startswith(self.token.encode()):
          claim.lost = True
        elif self.place.rewrite(claim.name, self._says(claim.beats + 1)):
          claim.beats, claim.last = claim.beats + 1, now()
        else:
          claim.lost = True
      except (OSError, UserError):  # if it lasts, the claim expires
        return

  def _beat_all(self) -> None:
    while not self.wake.wait(BEAT):
      with self.lock:
        if not self.held:
          self.thread = None
          return
        held = list(self.held.values())
      for claim in held:
        self._beat(claim)

  def release(self, claim: Claim) -> None:
    with self.lock:
      if self.held.pop(claim.name, None) is None:
        return
      there = self._there(claim.group)
      # the highest first: while it is there, no lower one is free
      for name in reversed(there if there[-1:] == [claim.name] and not claim.lost else []):
        self.place.remove(name)
        self.seen.pop(name, None)

  def sweep(self, finished: Callable[[str], bool]) -> None:
    """Removes what killed processes left of groups that are finished."""
    with self.lock:
      for name in sorted(self.place.names(f"{CLAIMS}/"), reverse=True):
        if name not in self.held and finished(name[len(CLAIMS) + 1 :].rpartition(".")[0]):
          self.place.remove(name)
