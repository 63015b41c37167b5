"""One pass over clips, for those who write their own loop. train.py has the whole one: accumulation, mixed precision,
several GPUs, checkpoints."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from openpilot.tools.dgx.training.constants import ACTION_T_LEN
from openpilot.tools.dgx.training.student import Student
from openpilot.tools.dgx.training.teacher import LATERAL_DELAY, DrivingTeacher
from openpilot.tools.learn.checkpoint import to_device
from openpilot.tools.lib.errors import UserError

CLIP_NORM = 1.0


def filled(batch: Mapping[str, Any]) -> dict[str, Any]:
  """A batch of clips, where "traffic" may stand for "traffic_convention", with what frames and desire alone leave
  open: the wide camera's frames are the narrow one's, actions are wanted after LATERAL_DELAY."""
  out = {k: v for k, v in batch.items() if torch.is_tensor(v)}
  if "traffic" in out:
    out.setdefault("traffic_convention", out.pop("traffic"))
  out.setdefault("big_frames", out["frames"])
  out.setdefault("action_t", torch.full((len(out["frames"]), ACTION_T_LEN), LATERAL_DELAY))
  return out


def train_epoch(
  student: Student,
  teacher: DrivingTeacher | None,
  dataloader: Iterable[Mapping[str, Any]],
  optimizer: torch.optim.Optimizer,
  device: torch.device | str,
) -> dict[str, float]:
  """Batches of clips at 5 Hz: frames (B, T, 12, 128, 256) uint8, desire (B, T, 8), traffic (B, 2), and what else
  shards.DrivingClips gives. One step of the optimizer, which holds what is learned, after each batch; gradients are cut
  to a norm of CLIP_NORM. teacher: labels each batch; None: the drive alone teaches. -> the mean of each loss. Raises
  UserError where a loss is not finite: that step is not taken."""
  student.train()
  sums: dict[str, float] = {}
  count = 0
  for batch in dataloader:
    b = to_device(filled(batch), torch.device(device))
    if teacher is not None:
      b["labels"] = to_device({k: v.float() for k, v in teacher.label(b).items()}, torch.device(device))
    losses = student(b)
    if not torch.isfinite(losses["total"]):
      bad = ", ".join(k for k, v in losses.items() if not torch.isfinite(v))
      raise UserError(f"the loss of batch {count} is not finite ({bad}); take a lower rate, or look at its clips")
    optimizer.zero_grad(set_to_none=True)
    losses["total"].backward()
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(learned, CLIP_NORM)
    optimizer.step()
    count += 1
    for k, v in losses.items():
      sums[k] = sums.get(k, 0.0) + float(v.detach())
  return {k: v / count for k, v in sums.items()}
