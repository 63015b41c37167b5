"""Batches from a DataLoader's workers. torch hands them over in shared memory; where that is full, as Docker's 64 MB
soon are, it waits for ever for the batch that did not come. Here a batch that finds no room goes through a pipe."""

import multiprocessing.queues
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch

from openpilot.tools.learn.processes import leave_interrupts_to_the_trainer
from openpilot.tools.lib.errors import UserError

SHARED = "/dev/shm"


def _map(x: Any, change: Callable[[Any], Any]) -> Any:
  if isinstance(x, dict):
    return {k: _map(v, change) for k, v in x.items()}
  if isinstance(x, (list, tuple)):
    return type(x)(_map(v, change) for v in x)
  return change(x)


class Piped:
  """A batch without shared memory. Every tensor is a numpy array in a tuple of its own."""

  def __init__(self, batch: Any):
    self.batch = _map(batch, lambda x: _Array(x.numpy()) if torch.is_tensor(x) else x)

  def opened(self) -> Any:
    return _map(self.batch, lambda x: torch.from_numpy(x.array) if isinstance(x, _Array) else x)


class _Array:
  def __init__(self, array: Any):
    self.array = array


class Collate:
  """A DataLoader's collate_fn that does what `collate` does, and lays a worker's batch into shared memory; where there
  is no room for it, it is Piped."""

  def __init__(self, collate: Callable[[Any], Any]):
    self.collate = collate
    self.said = False

  def __call__(self, items: Any) -> Any:
    batch, worker = self.collate(items), torch.utils.data.get_worker_info()
    if worker is None:
      return batch
    try:
      # now: torch does it later, in a thread, where it is too late
      return _map(batch, lambda x: x.share_memory_() if torch.is_tensor(x) else x)
    except RuntimeError as e:
      if not self.said and worker.id == 0:
        why = " ".join(str(e).split())
        print(
          f"warning: {why}; batches go through a pipe, which is slower (Docker: --shm-size=8g)",
          file=sys.stderr,
          flush=True,
        )
      self.said = True
    return Piped(batch)


def _give_up(error: Exception, _: object) -> NoReturn:
  """In a worker, of a batch that cannot be handed over: torch would say so, and the other side wait for ever. The end
  of this process it notices."""
  print(
    f"error: a reading process cannot hand over its batch: {' '.join(str(error).split())}", file=sys.stderr, flush=True
  )
  os._exit(0)  # not 1: torch would raise in the middle of a step


def begin(worker: int) -> None:
  """A DataLoader's worker_init_fn."""
  leave_interrupts_to_the_trainer(worker)
  multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_give_up)  # type: ignore[attr-defined]


def handed_over(loader: Iterable[Any]) -> Iterator[Any]:
  """What a DataLoader with Collate and begin() yields. Raises UserError where a worker died."""
  try:
    for batch in loader:
      yield batch.opened() if isinstance(batch, Piped) else batch
  except (RuntimeError, OSError, EOFError) as e:
    if not isinstance(e, (ConnectionError, EOFError)) and "DataLoader worker" not in str(e):
      raise
    hint = f"is there memory enough, and room in {SHARED} (Docker: --shm-size=8g)? --workers 0 reads without them"
    raise UserError(f"a reading process died ({' '.join(str(e).split())[:120]}); {hint}") from None
