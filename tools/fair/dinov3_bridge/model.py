"""DinoV3Teacher(config, device): extract_features (B, C), extract_feature_map (B, C, h, w)."""

from openpilot.tools.fair.dinov3.teacher import DinoV3Teacher

__all__ = ["DinoV3Teacher"]
