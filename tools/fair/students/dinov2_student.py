"""The student of a DINOv2 that gives depth and features, by name."""

from openpilot.tools.fair.students.student import Student, build


def DINOv2Student(size: str = "small", backbone: str | None = None, pretrained: bool = False) -> Student:
  """The student depth-`size` (nano, small, base), within 5M parameters: (B, 6, 128, 256) uint8 model frame ->
  {'features': (B, F, 16, 32), 'depth': (B, 1, 64, 128)}, depth in natural log of meters. See build(). Raises
  UserError."""
  return build(f"depth-{size}", backbone, pretrained)
