"""What decides a run of train.py, and its learning rate."""

from dataclasses import dataclass, field

from openpilot.tools.learn.schedule import learning_rate
from openpilot.tools.lib.options import option


@dataclass
class Config:
  """All that decides a run, beside the base, the teacher and the data."""

  epochs: int = 10
  batch_size: int = 32  # clips
  accumulate: int = 1  # parts that a batch is cut into, to save memory
  clip: int = 8  # steps at 5 Hz
  burn_in: int = 0
  hop: int = 0  # frames from clip to clip; 0: clips do not overlap
  dora_rank: int = 16
  dora_alpha: float | None = None
  dora_dropout: float = 0.0
  targets: list[str] | None = None
  full: bool = False  # all parameters learn, no adapter
  augment: bool = False  # mirrors, light, noise
  lr: float = 1e-4
  weight_decay: float = 0.0
  warmup: float = 0.05  # share of the run
  clip_norm: float = 1.0
  path_weight: float = 1.0
  teacher_weight: float = 1.0
  weights: dict[str, float] = field(default_factory=dict)  # of losses
  val_share: float = 0.1
  precision: str = "no"
  seed: int = 0


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
  """By the names of Config's fields."""

  dora_rank: int = option(Config.dora_rank, help="of the adapter; clipped where a layer is smaller")
  dora_alpha: float | None = option(None, help="the update is scaled by alpha / rank; default: the rank")
  dora_dropout: float = option(Config.dora_dropout, help="share of an adapter's inputs left out while training")
  targets: tuple[str, ...] | None = option(
    None, nargs="+", help="patterns of layers' names to adapt; default: dense layers, recurrent ones and heads"
  )


def rate(config: Config, step: int, total: int) -> float:
  """Linear warm-up, then a cosine down to a hundredth."""
  warm = max(1, round(config.warmup * total))
  return learning_rate(config.lr, step, total, warm, floor=0.01, start=warm)
