"""What students tell apart: the order of their outputs' channels. Which of a teacher's names are which:
distillation/classes.json."""

from openpilot.tools.sim.render import CLASSES

SEGMENTATION = list(CLASSES)
OBJECTS = ["vehicle", "pedestrian", "cyclist"]
