"""What a manifest makes of a graph: which head decodes what, which arrays go in, when it has its turn."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import Bundle, BundleError, spec_slots
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W
from openpilot.selfdrive.modeld.fair.heads import HEADS, part_of
from openpilot.selfdrive.modeld.fair.heads.ground import DEFAULT_HEIGHT
from openpilot.selfdrive.modeld.fair.lanes import LaneTracker
from openpilot.selfdrive.modeld.fair.roles import channels_of, roles_of

VIEW = (VIEW_H, VIEW_W)
OBJECT_HEADS = ("objects", "detector")  # the order in which they are preferred where both see one thing


@dataclass
class Plan:
  """One graph: what goes in, what its outputs are decoded by, what it remembers."""

  graph: dict[str, Any]
  heads: dict[str, dict[str, dict[str, Any]]]  # head -> part -> entry of the output
  inputs: dict[str, np.ndarray] = field(default_factory=dict)  # all but the frame: the same arrays at every call
  slots: LaneTracker | None = None
  rare: frozenset[str] = frozenset()  # heads that do not have their turn at every run
  last_frame: int | None = None
  runs: int = 0
  owed: bool = False  # its turn came and the budget had no room for it: it is the first of the next frame


def check_input(bundle: Bundle) -> None:
  """Raises BundleError where fairmodeld cannot make the picture that the bundle's graphs take."""
  said = bundle.manifest.get("input")
  if said is not None and (said["kind"] != "model_frame" or (said["height"], said["width"]) != VIEW):
    picture = "RGB pictures" if said["kind"] == "rgb" else "model frames"
    raise BundleError(
      f"{bundle.path} takes {picture} of {said['width']}x{said['height']}; fairmodeld makes openpilot's packed model "
      f"frames of {VIEW_W}x{VIEW_H} alone. Judge it with `op evaluate`, or distill and export a student of such frames"
    )


def plan_turns(where: str, graph: dict[str, Any]) -> None:
  """Raises BundleError where a phase is beyond its period, or an output that must be seen every time is not."""
  for what, entry in ((where, graph), *((f"{where}: output '{o['name']}'", o) for o in graph["outputs"])):
    if entry.get("phase", 0) >= entry.get("period", 1):
      raise BundleError(
        f"{what} has the phase {entry['phase']} of a period of {entry.get('period', 1)}; it must be less"
      )
  if any(o.get("head") == "lanes" and o.get("period", 1) > 1 for o in graph["outputs"]):
    raise BundleError(
      f"{where}: points of lanes go back into the graph at every run, their outputs have no period; give the graph one"
    )


def plan_heads(where: str, graph: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
  """Groups a graph's outputs by head; the part with classes also gets "channels", those of each role.

  Raises BundleError where a head is not known, lacks a part, or disagrees with its classes."""
  heads: dict[str, dict[str, dict[str, Any]]] = {}
  for out in graph["outputs"]:
    if "head" not in out:
      continue
    if out["head"] not in HEADS:
      raise BundleError(
        f"{where}: output '{out['name']}' wants the head '{out['head']}', this runtime has {', '.join(sorted(HEADS))}"
      )
    part, there = part_of(out), heads.setdefault(out["head"], {})
    head = HEADS[out["head"]]
    if part in there or part not in head.parts + head.more:
      why = "two outputs are" if part in there else f"output '{out['name']}' is"
      raise BundleError(
        f"{where}: {why} part '{part}' of the head '{out['head']}', its parts are {', '.join(head.parts + head.more)}; "
        "export the bundle again"
      )
    there[part] = out
  for name, there in heads.items():
    head = HEADS[name]
    wanted = (*head.parts, *(("coef", "proto") if "coef" in there or "proto" in there else ()))
    if missing := [p for p in wanted if p not in there]:
      raise BundleError(
        f"{where}: the head '{name}' lacks its part {', '.join(missing)}; there are {', '.join(there)}; export the "
        "bundle again"
      )
    if head.classes:
      out = there[head.classes]
      channels = out["shape"][head.axis] if len(out["shape"]) > head.axis else 0
      if len(out.get("classes", [])) != channels:
        raise BundleError(
          f"{where}: output '{out['name']}' has {channels} channels and {len(out.get('classes', []))} classes; export "
          "the bundle again"
        )
      there[head.classes] = {**out, "channels": channels_of(out["classes"], roles_of(out))}
  return heads


def check_apart(where: str, heads: Iterable[str], others: Iterable[Plan]) -> None:
  """Raises BundleError where another graph has one of a graph's heads that follow things from frame to frame: of the
  same frame one result would be lost, or two would be sent with ids of their own."""
  for other in others:
    if both := sorted({*heads} & {*other.heads} & {*OBJECT_HEADS, "lanes"}):
      raise BundleError(
        f"{where} has the head '{both[0]}', as has graph '{other.graph['name']}': what is followed is one graph's; "
        "export the bundle again"
      )


def plan_inputs(where: str, plan: Plan, view: tuple[int, int] = VIEW) -> None:
  """Makes the arrays of a graph's state and point slots. Raises BundleError where its inputs are not the newest frame,
  its state and its slots."""
  graph = plan.graph
  inputs, outputs = {i["name"]: i for i in graph["inputs"]}, {o["name"]: o for o in graph["outputs"]}
  for state in graph.get("state", []):
    into, out = inputs.get(state["input"]), outputs.get(state["output"])
    if into is None or out is None or (into["shape"], into["dtype"]) != (out["shape"], out["dtype"]):
      raise BundleError(
        f"{where}: state goes from output '{state['output']}' to input '{state['input']}', which must both exist and "
        "be alike; export it again"
      )
    try:
      plan.inputs[into["name"]] = np.full(into["shape"], state["initial"], into["dtype"])
    except (OverflowError, ValueError) as e:
      raise BundleError(
        f"{where}: state '{state['input']}' of {into['dtype']} cannot begin with {state['initial']} ({e}); export the "
        "bundle again"
      ) from None
  if (found := spec_slots(graph)) is not None:
    count, names = found
    plan.slots = LaneTracker(count, view)
    for key, array in (("points", plan.slots.points), ("mask", plan.slots.mask), ("fresh", plan.slots.fresh)):
      spec = inputs.get(names[key])
      if spec is None or spec["shape"] != list(array.shape) or spec["dtype"] != "float32":
        raise BundleError(
          f"{where}: its {count} point slots need an input '{names[key]}', float32{list(array.shape)}; export the "
          "bundle again"
        )
      plan.inputs[names[key]] = array
  if (plan.slots is None) != ("lanes" not in plan.heads):
    raise BundleError(
      f"{where}: point slots and the head 'lanes' belong together, it has one of them; export the bundle again"
    )
  if plan.slots is not None and plan.heads["lanes"]["points"]["shape"] != list(plan.slots.points.shape):
    name = plan.heads["lanes"]["points"]["name"]
    raise BundleError(
      f"{where}: output '{name}' must be of the shape {list(plan.slots.points.shape)}; export the bundle again"
    )
  more = inputs.keys() - plan.inputs.keys() - {"frame"}
  if more or "frame" not in inputs or inputs["frame"].get("frames", [0]) != [0]:
    what = f"not '{sorted(more)[0]}'" if more else "and the newest frame as 'frame'"
    raise BundleError(
      f"{where}: inputs are the newest frame, states and point slots, {what}; export the bundle again, or update "
      "selfdrive/modeld/fair"
    )


def make_plan(where: str, graph: dict[str, Any], others: Iterable[Plan] = ()) -> Plan:
  """where: what a BundleError begins with; graph: its entry in the manifest; others: of the bundle's other graphs.
  Raises BundleError where this runtime cannot run it beside them."""
  plan_turns(where, graph)
  heads = plan_heads(where, graph)
  check_apart(where, heads, others)
  plan = Plan(
    graph,
    heads,
    rare=frozenset(name for name, specs in heads.items() if any(s.get("period", 1) > 1 for s in specs.values())),
  )
  plan_inputs(where, plan)
  return plan


def try_heads(where: str, plan: Plan, outputs: dict[str, np.ndarray]) -> None:
  """Decodes what the graph made of nothing. Raises BundleError where a head cannot take its outputs' shapes or
  parameters."""
  for name, specs in plan.heads.items():
    try:
      with np.errstate(all="ignore"):
        HEADS[name].decode(
          {part: outputs[spec["name"]] for part, spec in specs.items()},
          specs,
          np.ones(VIEW, dtype=bool),
          DEFAULT_HEIGHT,
        )
    except Exception as e:  # whatever numpy says about shapes, or Python about parameters
      raise BundleError(
        f"{where}: the head '{name}' cannot decode its outputs ({type(e).__name__}: {e}); export the bundle again"
      ) from None
