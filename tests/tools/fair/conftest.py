"""What all tests of teachers and students share."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
  """Two threads on two busy cores are many times slower than one, and sum in another order."""
  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture
def rng() -> np.random.Generator:
  seed = int(np.random.SeedSequence().entropy) % 2**32  # fresh each run; pytest shows it where a test fails
  print("seed", seed)
  return np.random.default_rng(seed)
