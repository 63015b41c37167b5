"""What students learn, a module a task, in one registry that other packages may add to: `register(Task(...))`."""

from openpilot.tools.fair.spec import ClassSet, road_classes
from openpilot.tools.fair.tasks import (
  depth,
  detector,
  features,
  lanes,
  logits,
  objects,
  oriented,
  patches,
  segmentation,
)
from openpilot.tools.fair.tasks.task import Said, Targets, Task, names_of, say
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError

__all__ = [
  "TASKS",
  "Said",
  "Targets",
  "Task",
  "find_task",
  "names_of",
  "register",
  "say",
  "task_name",
  "task_of",
  "tasks_of",
]

TASKS: dict[str, Task] = {}  # in the order in which losses are summed
BEFORE = {"points": "lanes"}  # names in options, configurations and checkpoints of before


def register(task: Task) -> None:
  """Raises UserError where the name is taken."""
  if task.name in TASKS or task.name in BEFORE:
    raise UserError(f"there is a task '{task.name}' already; give yours another name")
  TASKS[task.name] = task


for module in (depth, segmentation, features, objects, detector, lanes, logits, oriented, patches):
  register(module.TASK)


def task_name(name: str) -> str:
  """A task's name as it is now."""
  return BEFORE.get(name, name)


def find_task(name: str) -> Task:
  """By its name of now or before. Raises UserError."""
  if task_name(name) not in TASKS:
    raise UserError(f"no task '{name}'; there are {', '.join(TASKS)}")
  return TASKS[task_name(name)]


def task_of(label: Label, classes: ClassSet | None = None) -> tuple[str, ...]:
  """Names of the tasks that a label can teach. classes: by default the road's."""
  return tuple(name for name, t in TASKS.items() if t.teaches(label, classes or road_classes()))


def tasks_of(head: str) -> list[str]:
  """What a head of a student can learn, its namesake first."""
  return sorted((n for n, t in TASKS.items() if t.head == head), key=lambda n: n != head)
