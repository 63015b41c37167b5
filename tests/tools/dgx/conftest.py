"""What all tests of tools/dgx share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from driving_fixture import write_data

from openpilot.tools.dgx.training.reference import save_reference


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
  """The small network of openpilot's interface; no test writes to it."""
  return save_reference(tmp_path_factory.mktemp("base") / "reference.onnx")


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Path:
  """Another one."""
  return save_reference(tmp_path_factory.mktemp("reference") / "reference.onnx", seed=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
  """Driving data, to be read."""
  return write_data(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch) -> Iterator[None]:
  """Two threads on two busy cores are many times slower than one, and sum in another order."""
  monkeypatch.setenv("FAIR_ORT_THREADS", "1")
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed() -> None:
  torch.manual_seed(0)
