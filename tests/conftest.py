"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parents[1])
# what tests start finds our modules from any folder, and takes nothing of the working folder for a module: as
# tools/op.sh has it
os.environ["PYTHONPATH"] = os.pathsep.join(
  dict.fromkeys(filter(None, (ROOT, *os.environ.get("PYTHONPATH", "").split(os.pathsep))))
)
os.environ["PYTHONSAFEPATH"] = "1"
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

SHARED_DATA = Path(os.environ.get("FAIR_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))

signal.signal(
  signal.SIGINT, signal.default_int_handler
)  # a shell that starts us in the background has it ignored, which children inherit


@pytest.fixture(scope="session", autouse=True)
def own_data(tmp_path_factory):
  """What is compiled in tests, and the key, lie in a folder of their own."""
  with pytest.MonkeyPatch.context() as m:
    m.setenv("FAIR_DATA_DIR", str(tmp_path_factory.mktemp("data")))
    yield


@pytest.fixture(autouse=True)
def nothing_said():
  """A warning is printed once a process: what another test has heard is said again."""
  from openpilot.tools.lib import errors

  errors._said.clear()


@pytest.fixture
def shared_data() -> Path:
  """The folder of real routes, images and small networks; a test that needs it skips where it is absent."""
  if not SHARED_DATA.is_dir():
    pytest.skip(f"no shared data at {SHARED_DATA}: set FAIR_SHARED_DATA to run this test")
  return SHARED_DATA


@pytest.fixture
def prefix(monkeypatch, tmp_path) -> Iterator[str]:
  """A private OPENPILOT_PREFIX, so that tests never meet a running openpilot or each other."""
  name = f"test-{os.getpid()}-{abs(hash(str(tmp_path))) % 10**8}"
  monkeypatch.setenv("OPENPILOT_PREFIX", name)
  monkeypatch.setenv("PARAMS_ROOT", str(tmp_path / "params"))
  yield name
  from openpilot.cereal.messaging import remove_sockets

  monkeypatch.setenv("OPENPILOT_PREFIX", name)  # which a test may have changed
  remove_sockets()
