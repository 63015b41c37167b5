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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from openpilot.tools.lib.files import machine_id, process_runs

CLAIMS = ".claims"  # folder in a store
BEAT, EXPIRE = 10.0, 60.0  # s


def now() -> float:
  """s; where the system can say it, with the time that the machine slept."""
  return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@dataclass
class Claim:
  group: str  # <segment>/<teacher>-<key>
  path: Path
  beats: int = 0
  last: float = 0.0  # when it was rewritten
  lost: bool = False


class Claims:
  """Of one store, as this process sees them. Safe for its threads."""

  def __init__(self, root: Path):
    self.root = root
    self.token = f"{machine_id()} {os.getpid()} {secrets.token_hex(8)}"
    self.held: dict[Path, Claim] = {}
    self.seen: dict[Path, tuple[bytes, float]] = {}  # others': what they say, and since when
    self.lock, self.wake = threading.RLock(), threading.Event()
    self.thread: threading.Thread | None = None

  def _there(self, group: str) -> list[Path]:
    """All claims of a group, the one that counts last."""
    place, numbered = self.root / group, []
    with contextlib.suppress(FileNotFoundError):
      for p in place.parent.iterdir():
        name, _, number = p.name.rpartition(".")
        if name == place.name and number.isdecimal():
          numbered.append((int(number), p))
    return [p for _, p in sorted(numbered)]

  def _create(self, path: Path) -> bool:
    while True:
      try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as f:
          f.write(self._says(0))
        return True
      except FileExistsError:
        return False
      except FileNotFoundError:  # whoever released the last one here removed the folder
        continue

  def _says(self, beats: int) -> bytes:
    return f"{self.token} {beats:010d}\n".encode()

  def take(self, group: str) -> Claim | None:
    """The claim of a group; None while somebody holds it."""
    with self.lock:
      there = self._there(group)
      if there and self._alive(there[-1]):
        return None
      place = self.root / group
      number = int(there[-1].name.rpartition(".")[2]) + 1 if there else 0
      path = place.with_name(f"{place.name}.{number}")
      if not self._create(path):
        return None
      claim = self.held[path] = Claim(group, path, last=now())
      if self.thread is None:
        self.thread = threading.Thread(target=self._beat_all, daemon=True)
        self.thread.start()
      return claim

  def _alive(self, path: Path) -> bool:
    if path in self.held:
      return True
    try:
      said = path.read_bytes()[:200]
    except FileNotFoundError:
      return False
    machine, _, rest = said.decode(errors="replace").partition(" ")
    pid = rest.partition(" ")[0]
    if machine == machine_id() and pid.isdecimal() and not process_runs(int(pid)):
      return False
    before = self.seen.get(path)
    if before is None or before[0] != said:
      self.seen[path] = said, now()
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
      if claim.lost or claim.path not in self.held:
        return
      try:
        if self._there(claim.group)[-1:] != [claim.path] or not claim.path.read_bytes().startswith(self.token.encode()):
          claim.lost = True
          return
        with open(claim.path, "r+b") as f:
          f.write(self._says(claim.beats + 1))
      except FileNotFoundError:
        claim.lost = True
      except OSError:  # if it lasts, the claim expires
        return
      else:
        claim.beats, claim.last = claim.beats + 1, now()

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
      if self.held.pop(claim.path, None) is None:
        return
      there = self._there(claim.group)
      # the highest first: while it is there, no lower one is free
      for path in reversed(there if there[-1:] == [claim.path] and not claim.lost else []):
        path.unlink(missing_ok=True)
        self.seen.pop(path, None)
      self._remove_empty(claim.path.parent)

  def sweep(self, finished: Callable[[str], bool]) -> None:
    """Removes what killed processes left of groups that are finished."""
    with self.lock:
      for path in sorted(self.root.glob("*/*.*"), reverse=True) if self.root.is_dir() else ():
        if path not in self.held and finished(f"{path.parent.name}/{path.name.rpartition('.')[0]}"):
          path.unlink(missing_ok=True)
          self._remove_empty(path.parent)

  def _remove_empty(self, folder: Path) -> None:
    for p in (folder, self.root):
      with contextlib.suppress(OSError):
        p.rmdir()
