"""The runner that an option names: what cannot run here is said, in place of ONNX Runtime's taking over."""

from typing import Any

from openpilot.selfdrive.modeld.fair.artifact import ArtifactError
from openpilot.selfdrive.modeld.fair.bundle import Bundle
from openpilot.selfdrive.modeld.fair.runners import RUNNERS, Runner, make_runner
from openpilot.tools.lib.errors import UserError


def named_runner(name: str, bundle: Bundle, graph: dict[str, Any], threads: int = 1) -> Runner:
  """Of --runner. Raises UserError where there is none of this name, or it cannot run the graph here; BundleError."""
  if name not in RUNNERS:
    raise UserError(f"--runner {name}: there are {', '.join(RUNNERS)}")
  try:
    return make_runner(name, bundle, graph, threads)
  except ArtifactError as e:
    raise UserError(f"--runner {name}: {e}") from None
  except ImportError as e:
    raise UserError(f"--runner {name}: {e.name or e} is not installed") from None
