"""Scheduling helpers with openpilot's names. What the machine does not allow (a PC, a plain user) is left out silently,
as openpilot does on PC."""

import gc
import os
import sys
import time

DT_MDL = 0.05  # s, model


class Priority:
  CTRL_LOW = 51
  MODEL = 54  # modeld's; fairmodeld must stay below it
  CTRL_HIGH = 53


def set_core_affinity(cores: list[int]) -> None:
  if sys.platform == "linux" and os.path.isfile("/TICI"):
    os.sched_setaffinity(0, cores)


def config_realtime_process(cores: int | list[int], priority: int) -> None:
  """No garbage collection pauses; on a comma device also SCHED_FIFO and the given cores."""
  gc.disable()
  if sys.platform == "linux" and os.path.isfile("/TICI"):
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    set_core_affinity(cores if isinstance(cores, list) else [cores])


class Ratekeeper:
  """Keeps a loop at `rate` Hz: call keep_time() once a turn. `lagging` turns true while the loop falls behind."""

  def __init__(self, rate: float, print_delay_threshold: float | None = 0.0):
    self.interval = 1.0 / rate
    self.next_frame_time = time.monotonic() + self.interval
    self.print_delay_threshold = print_delay_threshold
    self.frame, self.remaining = 0, 0.0

  @property
  def lagging(self) -> bool:
    return self.remaining < 0

  def monitor_time(self) -> bool:
    self.remaining = self.next_frame_time - time.monotonic()
    lagged = self.print_delay_threshold is not None and self.remaining < -self.print_delay_threshold
    self.next_frame_time += self.interval
    self.frame += 1
    return lagged

  def keep_time(self) -> bool:
    lagged = self.monitor_time()
    if self.remaining > 0:
      time.sleep(self.remaining)
    elif self.remaining < -1.0:  # after a pause go on from now instead of racing to catch up
      self.next_frame_time = time.monotonic() + self.interval
    return lagged
