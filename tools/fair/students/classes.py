"""The road's classes by the names that evaluation uses; tools/fair/spec.py is where classes are kept."""

from openpilot.tools.fair.spec import road_classes

SEGMENTATION = list(road_classes().maps)
OBJECTS = list(road_classes().boxes)
NAMES = {
  f"{word}_names": {n: c.name for c in road_classes().classes if getattr(c, kind) for n in (c.name, *c.aliases)}
  for word, kind in (("segmentation", "maps"), ("object", "boxes"))
}
