"""One training run on several processes, as torchrun or accelerate start them: what all must agree on, and who
speaks."""

import contextlib
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from openpilot.tools.lib.errors import UserError, warnings_by

if TYPE_CHECKING:
  from accelerate import Accelerator
  from torch import Tensor, nn

T = TypeVar("T")
TRACKERS = ("tensorboard", "trackio")  # named as their packages
# for which the others wait for one: it may label a data set, or judge a student. One that is gone they notice before
PATIENCE = timedelta(days=2)
UNSAID = 20.0  # s, in which another process says what is wrong


def parse_trackers(text: str) -> tuple[str, ...]:
  """Names from a comma-separated list. Raises UserError for one that is not known, or not installed: Accelerate would
  leave it out without a word."""
  names = tuple(t for t in text.replace(" ", "").split(",") if t)
  if unknown := [t for t in names if t not in TRACKERS]:
    raise UserError(f"--trackers {unknown[0]}: there are {', '.join(TRACKERS)}")
  if absent := [t for t in names if importlib.util.find_spec(t) is None]:
    raise UserError(
      f"--trackers {absent[0]} is not installed: `pip install -e .[track]` brings {' and '.join(TRACKERS)}"
    )
  return names


def make_accelerator(precision: str, trackers: Sequence[str], out: Path, cpu: bool = False) -> "Accelerator":
  """trackers: of parse_trackers(). cpu: also where there is a GPU."""
  from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
  )  # a second, which tools that only read data need not wait

  handlers = [
    DistributedDataParallelKwargs(find_unused_parameters=True),  # heads that nothing teaches in a step
    InitProcessGroupKwargs(timeout=PATIENCE),
  ]
  cpu = cpu or only_cpu()
  return Accelerator(
    mixed_precision=precision, log_with=list(trackers) or None, project_dir=str(out), kwargs_handlers=handlers, cpu=cpu
  )


def only_cpu() -> bool:
  """Said to accelerate, else several processes on a CPU do not find each other."""
  import torch

  return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def is_first() -> bool:
  """Whether this process is the one that prints and writes; known before there is an Accelerator."""
  return int(os.environ.get("RANK", "0")) == 0


def leave_it_to_another() -> NoReturn:
  """Ends this process after the one that says what is wrong: torchrun ends all others where one has failed, and that
  one would not come to say it."""
  signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which torchrun sends then
  time.sleep(UNSAID)
  raise SystemExit(2)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
  """For what goes wrong alike in every process: only the first says it, the others exit with its code."""
  try:
    yield
  except UserError:
    if not is_first():
      leave_it_to_another()
    raise


def world_size() -> int:
  """Processes that torchrun started; known before there is an Accelerator."""
  return int(os.environ.get("WORLD_SIZE", "1"))


def check_share(size: int, processes: int) -> None:
  """Raises UserError where a step of `size` clips has none for some process."""
  if size < processes:
    raise UserError(
      f"--batch-size {size} is fewer clips than there are processes ({processes}); raise it, or start fewer"
    )


@contextlib.contextmanager
def one_run() -> Iterator[None]:
  """Around a command that several processes run as one: the first alone prints, and a warning is said by whoever comes
  to it first. What is raised passes; where another process is gone, before there is a loop that saves, that is a
  UserError of one of them."""
  with contextlib.ExitStack() as quiet:
    if world_size() > 1:
      stderr = sys.stderr

      def warned(line: str) -> None:
        if first_to_ask(line):
          stderr.write(line + "\n")

      quiet.enter_context(warnings_by(warned))
    if not is_first():
      nowhere = quiet.enter_context(open(os.devnull, "w"))
      quiet.enter_context(contextlib.redirect_stdout(nowhere))
      quiet.enter_context(contextlib.redirect_stderr(nowhere))
    try:
      yield
    except RuntimeError as e:
      if not is_lost(e):
        raise
      say_lost("nothing was learned since the last checkpoint, if there is one")
    if world_size() > 1:
      import torch.distributed as dist

      if dist.is_initialized():  # else torch warns
        dist.destroy_process_group()


def made_by_the_first(make: Callable[[], T]) -> T:
  """In every process what make() returns in the first, however long it takes there; it is pickled on the way. Raises
  the first's UserError."""
  if world_size() == 1:
    return make()
  from accelerate import PartialState

  PartialState(cpu=only_cpu(), timeout=PATIENCE)
  made: Any = None
  error: UserError | None = None
  if is_first():
    try:
      made = make()
    except UserError as e:
      error = e
  made, error = gathered_objects((made, error))[0]
  if error is not None:
    with said_once():
      raise error
  return made


def gathered(accelerator: "Accelerator", *values: "Tensor | float") -> list[list[float]]:
  """Scalars of each process, by rank: the same in all."""
  import torch

  mine = [float(v.detach()) if isinstance(v, torch.Tensor) else float(v) for v in values]
  if accelerator.num_processes == 1:
    return [mine]
  return accelerator.gather(torch.tensor([mine], device=accelerator.device)).tolist()


def gathered_objects(mine: Any) -> list[Any]:
  """What each process has, by rank; it is pickled on the way."""
  from accelerate.utils import gather_object

  return gather_object([mine])


def anywhere(accelerator: "Accelerator", flag: bool) -> bool:
  """Whether any process says so: a loop that one leaves alone hangs the others."""
  return any(f for (f,) in gathered(accelerator, flag))


def touch(model: "nn.Module") -> "Tensor":
  """0, with a zero gradient for every parameter that learns: what a process contributes that has nothing to learn from
  in a step, since the others wait for it.
  For a forward(): DistributedDataParallel takes what does not come out of there for unused."""
  import torch

  return torch.stack([0.0 * p.sum() for p in model.parameters() if p.requires_grad]).sum()


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "process group")


def is_lost(error: BaseException) -> bool:
  """Whether it says that another process of the run does not answer any more. torch's own errors of it have no class
  that is theirs alone on a CPU."""
  import torch

  if not torch.distributed.is_available() or not torch.distributed.is_initialized():
    return False
  return isinstance(error, torch.distributed.DistError) or any(w in str(error) for w in LOST)


def first_to_ask(name: str) -> bool:
  """Whether no other process of the run asked so before; also where the first one is gone. torchrun itself keeps the
  count."""
  from torch.distributed import distributed_c10d

  try:
    return distributed_c10d._get_default_store().add(f"openpilot-fair/{name}", 1) == 1
  except Exception:  # it is gone, too
    return is_first()


def say_lost(what: str) -> NoReturn:
  """Another process of the run is gone: what comes of it. Raises UserError in the first of those that are left."""
  if not first_to_ask("lost"):
    leave_it_to_another()
  raise UserError(f"a process of this run is gone; {what}")


def averaged_gradients(parameters: "Sequence[Tensor]") -> None:
  """Each one's mean over all processes, as DistributedDataParallel has it. What none has a gradient of keeps none."""
  import torch
  import torch.distributed as dist

  there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
  own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
  flat = torch.cat([there, *(g.flatten() for g in own)])
  dist.all_reduce(flat)
  counts, sums = flat.split([len(own), len(flat) - len(own)])
  means = (sums / dist.get_world_size()).split([g.numel() for g in own])
  for p, count, mean in zip(parameters, counts.tolist(), means, strict=True):
    if count:
      p.grad = mean.view_as(p)


STEP = 60  # s, longer than any step


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
  """Ctrl-C and SIGTERM, which torchrun sends when it is stopped itself, are put into the list: they wait for the end of
  a step, so that what is saved is whole."""
  caught: list[int] = []
  before = {s: signal.signal(s, lambda number, _: caught.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
  try:
    yield caught
  finally:
    for s, handler in before.items():
      signal.signal(s, handler)


def leave_interrupts_to_the_trainer(_: int) -> None:
  """A DataLoader's worker_init_fn: Ctrl-C, and a SIGTERM to all of a service, reach the workers too, but the trainer
  finishes its step first, and then ends them itself; one that it does not ends STEP seconds later."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, lambda *_: signal.alarm(STEP))
