"""Colors of classes: by role, then by name, never by a table of names."""

from openpilot.tools.lib.colors import ROLE_COLORS, class_colors, name_color

ROLES = {"sky": "background", "asphalt": "ground", "paint": "marking", "car": "movable", "man": "movable"}


def test_a_role_decides_the_color_and_of_what_has_none_the_name():
  got = class_colors(["sky", "asphalt", "paint", "car", "man", "pothole"], ROLES)
  assert "sky" not in got and list(got) == ["asphalt", "paint", "car", "man", "pothole"]
  assert got["asphalt"] == ROLE_COLORS["ground"][0] == (70, 110, 255) and got["paint"] == (255, 220, 0)
  assert (got["car"], got["man"]) == ROLE_COLORS["movable"]
  assert got["pothole"] == name_color("pothole") == class_colors(["pothole", "cone"], {})["pothole"]
  assert len(set(got.values())) == 5


def test_a_third_of_a_role_has_its_names_color():
  names = ["car", "man", "cow"]
  got = class_colors(names, dict.fromkeys(names, "movable"))
  assert got["cow"] == name_color("cow") and got["cow"] not in ROLE_COLORS["movable"]


def test_names_colors_are_known():
  """Equal on every machine: no hash() of Python's."""
  assert (name_color("pothole"), name_color("cone")) == ((215, 46, 81), (254, 246, 33))
