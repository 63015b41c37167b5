"""DinoV3Config(root=Path): a local Hugging Face folder."""

from openpilot.tools.fair.dinov3.config import DinoV3Config

__all__ = ["DinoV3Config"]
