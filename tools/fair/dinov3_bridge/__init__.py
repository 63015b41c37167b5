"""DINOv3 under the names `dinov3_bridge.config` and `dinov3_bridge.model`; what they name is in tools/fair/dinov3.

The link `dinov3_bridge` beside `openpilot/` makes it importable wherever `openpilot` is."""
