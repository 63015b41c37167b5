"""By its former name."""

from openpilot.tools.lib.truth import IGNORE as IGNORE, MAP_H as MAP_H, MAP_W as MAP_W
