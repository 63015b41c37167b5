"""Pictures of a batch: what the student says beside what it is told, a row for each frame."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from openpilot.tools.fair.labels.placement import rgb_of
from openpilot.tools.fair.spec import StudentSpec
from openpilot.tools.fair.tasks import TASKS
from openpilot.tools.lib.files import atomic_path

ROWS = 6
WIDTH = 256  # pixels of each picture


def draw_samples(
  path: Path, batch: dict[str, Any], out: dict[str, torch.Tensor], tasks: Sequence[str], spec: StudentSpec
) -> None:
  """Writes a PNG. out: the student's outputs of the batch."""
  host = {k: v.detach().float().cpu().numpy() for k, v in out.items()}
  rows = []
  n = len(batch["frame"])
  size = WIDTH, round(WIDTH * spec.input.height / spec.input.width)
  for i in np.unique(np.linspace(0, n - 1, min(n, ROWS)).astype(int)):
    rgb = rgb_of(batch["frame"][i].numpy())
    row = [rgb]
    for task in TASKS.values():
      if task.name in tasks and task.sketch is not None:
        row += task.sketch(rgb, int(i), batch, host, spec)
    small = [np.asarray(Image.fromarray(np.ascontiguousarray(p)).resize(size)) for p in row]
    rows.append(np.concatenate(small, axis=1))
  width = max(r.shape[1] for r in rows)
  picture = np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1]), (0, 0))) for r in rows])
  with atomic_path(path) as tmp:
    Image.fromarray(picture).save(tmp)
