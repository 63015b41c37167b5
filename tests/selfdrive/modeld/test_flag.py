"""The flag command, with this repository's Params and with what openpilot's were in other years."""

import pytest

from openpilot.common.params import Params
from openpilot.selfdrive.modeld.fair import flag
from openpilot.selfdrive.modeld.fair.ipc import UnknownKeyName


class Untyped:
  """Before 0.10: bytes come back, put() takes no `block`."""

  def __init__(self):
    self.kept: dict[str, bytes] = {}

  def get(self, key, block=False, encoding=None):
    return self.kept.get(key)

  def get_bool(self, key, block=False):
    return self.kept.get(key) == b"1"

  def put(self, key, dat):
    self.kept[key] = dat.encode() if isinstance(dat, str) else dat

  def put_bool(self, key, val):
    self.kept[key] = b"1" if val else b"0"

  def remove(self, key):
    self.kept.pop(key, None)

  def get_param_path(self, key=""):
    return "/data/params"


class Later(Untyped):
  """Since 2026: what is written without block=True may be lost when the process ends."""

  def get(self, key, block=False, return_default=False):
    value = self.kept.get(key)
    return None if value is None else value.decode()

  def put(self, key, dat, block=False):
    if block:
      super().put(key, dat)

  def put_bool(self, key, val, block=False):
    if block:
      super().put_bool(key, val)


@pytest.mark.parametrize("kind", [Untyped, Later, None])
def test_on_and_off_in_every_age(kind, monkeypatch, prefix, capsys):
  params = Params() if kind is None else kind()
  monkeypatch.setattr(flag, "Params", lambda: params)
  assert (
    flag.main(["status"]) == 0
    and "FairEnabled off, bundle fair_unified_small (none is chosen)" in capsys.readouterr().out
  )
  assert (
    flag.main(["on", "--bundle", "scene-nano"]) == 0 and "FairEnabled on, bundle scene-nano," in capsys.readouterr().out
  )
  assert params.get_bool("FairEnabled")
  assert flag.main(["off"]) == 0 and "FairEnabled off, bundle scene-nano," in capsys.readouterr().out
  assert flag.main(["status", "--bundle", ""]) == 0 and params.get("FairBundle") is None


def test_a_bundle_that_is_not_there(prefix, capsys):
  assert flag.main(["on", "--bundle", "nowhere"]) == 2
  out, err = capsys.readouterr()
  assert not out and err.startswith("error: no bundle 'nowhere'") and err.count("\n") == 1
  assert not Params().get_bool("FairEnabled")


def test_a_build_from_before_the_overlay(monkeypatch, capsys):
  class Unbuilt(Untyped):
    def put_bool(self, key, val):
      raise UnknownKeyName(key)

  monkeypatch.setattr(flag, "Params", Unbuilt)
  assert flag.main(["on"]) == 2 and "build again" in capsys.readouterr().err
