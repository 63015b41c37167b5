"""What a class is on a road: its role. The runtime asks for roles and knows no class by its name."""

from collections.abc import Mapping, Sequence
from typing import Any

# background; ground: the plane that the car drives on; marking: paint on it; movable: what may move by itself
ROLES = ("background", "ground", "marking", "movable")
# The one table of names: of bundles from before manifests had roles, and of messages, which carry names alone.
FORMER = {
  "background": "background",
  "road": "ground",
  "lane": "marking",
  "vehicle": "movable",
  "pedestrian": "movable",
  "cyclist": "movable",
}
Channels = Mapping[str, tuple[int, ...]]  # role -> the classes that have it, by their index


def folded(name: str) -> str:
  """A name as it is compared: letters' case, '_', '-' and blanks do not matter."""
  return " ".join(name.lower().replace("_", " ").replace("-", " ").split())


def roles_of(output: Mapping[str, Any]) -> dict[str, str]:
  """An output's entry in the manifest -> {class: role}, of its classes that have one."""
  said = output.get("roles", FORMER)
  return {name: said[name] for name in output.get("classes", ()) if name in said}


def channels_of(classes: Sequence[str], roles: Mapping[str, str] = FORMER) -> Channels:
  """The channels of every role, of classes in their order."""
  return {role: tuple(k for k, name in enumerate(classes) if roles.get(name) == role) for role in ROLES}
