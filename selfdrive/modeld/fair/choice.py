"""Which bundle runs: the one that is wanted, made ready, and looked at once a second for another one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, fingerprint, load_bundle
from openpilot.selfdrive.modeld.fair.link import Link
from openpilot.selfdrive.modeld.fair.machine import at_ease
from openpilot.selfdrive.modeld.fair.model import FairModel

LOOK_PERIOD = 1.0  # s between two looks at whether the bundle is another one


class Choice:
  """choose: the folder of the bundle that is wanted now; it may raise BundleError. clock, runner, dense: FairModel's.
  link: to the supervisor; without one a new bundle is taken without a trial run."""

  def __init__(
    self, choose: Callable[[], Path], clock: Callable[[], float] | None, runner: str | None, dense: bool, link: Link
  ):
    self.choose, self.clock, self.runner, self.dense, self.link = choose, clock, runner, dense, link
    self.loaded: tuple[Any, ...] = ()  # folder and fingerprint of the model's bundle, or of the newest that was refused
    self.looked: tuple[Any, ...] = ()  # the same at the last look
    self.next_look = 0.0
    self.refused = ""
    self.trial = ""  # sha256 of the manifest of the bundle that is having its trial run

  def load(self, bundle: Bundle, running: Bundle | None = None) -> FairModel:
    """The bundle made ready to run, at no priority over others; `running` goes on meanwhile. Raises BundleError where
    it cannot run, or hung before."""
    if (why := self.link.refused.get(bundle.manifest_hash)) is not None:
      raise BundleError(f"bundle '{bundle.name}' {why}; it is refused until its files change")
    self.link.loading(bundle.manifest_hash)
    try:
      with at_ease():
        model = FairModel(bundle, self.clock, runner=self.runner, dense=self.dense)
    except BundleError:
      self.link.running(running.manifest_hash if running is not None else "")
      raise
    self.link.running(bundle.manifest_hash)
    return model

  def first(self) -> FairModel:
    """What is wanted now. Raises BundleError."""
    path = self.choose()
    self.loaded = self.looked = (path, fingerprint(path))
    return self.load(load_bundle(path))

  def other(self, running: Bundle, now: float) -> FairModel | None:
    """Between two frames: a bundle that was replaced, or another one that is wanted, made ready; None where all is as
    before. Raises BundleError, once, where it cannot run: `running` goes on."""
    if now < self.next_look:
      return None
    self.next_look = now + LOOK_PERIOD
    try:
      model = self._other(running)
    except BundleError as e:
      if str(e) == self.refused:
        return None
      self.refused = str(e)
      raise
    if model is not None:
      self.refused = ""
    return model

  def _other(self, running: Bundle) -> FairModel | None:
    path = self.choose()
    seen = (path, fingerprint(path))
    settled = seen == self.looked  # a copy under way changes from look to look
    self.looked = seen
    if seen != self.loaded and settled:
      self.loaded, self.trial = seen, ""
      bundle = load_bundle(path)
      if bundle.manifest_hash == running.manifest_hash:
        self.refused = ""
      elif self.link.there:
        self.trial = bundle.manifest_hash
        self.link.try_out(str(path), self.runner)
      else:
        return self.load(bundle, running)
    elif self.trial and (answer := self.link.answer()) is not None and answer["path"] == str(path):
      tried, self.trial = self.trial, ""
      if answer["error"] is not None:
        raise BundleError(answer["error"])
      bundle = load_bundle(path)
      if bundle.manifest_hash == answer["hash"] == tried:
        return self.load(bundle, running)
      self.loaded = ()  # it changed meanwhile: the next look begins anew
    return None
