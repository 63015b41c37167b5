"""What all tests of tools/dgx share."""

from collections.abc import Iterator

import pytest
import torch


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
