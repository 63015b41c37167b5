"""A bundle's trial run, in a process of its own: whatever its graphs do, the one that runs goes on. The last line of
its output says what came of it."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openpilot.selfdrive.modeld.fair.bundle import BundleError, load_bundle
from openpilot.selfdrive.modeld.fair.machine import at_ease
from openpilot.selfdrive.modeld.fair.model import FairModel

CAMERA, SIZE = (
  (1344, 760, 1408, 1408 * 768),
  2_428_928,
)  # width, height, stride, uv_offset; bytes of a comma four's buffer


@at_ease()
def main(argv: Sequence[str]) -> int:
  p = argparse.ArgumentParser(prog="trial", description=__doc__)
  p.add_argument("bundle", type=Path)
  p.add_argument("--runner")
  args = p.parse_args(argv)
  try:
    bundle = load_bundle(args.bundle)
    model = FairModel(bundle, runner=args.runner)
  except BundleError as e:
    print(f"error: {e}")
    return 2
  model.set_camera(*CAMERA)
  r = np.random.default_rng(0)
  for frame_id, buf in enumerate(
    (np.zeros(SIZE, np.uint8), np.full(SIZE, 255, np.uint8), r.integers(0, 256, SIZE, np.uint8))
  ):
    with contextlib.suppress(Exception):  # what fails on a frame is a fault of that frame
      model.process(buf, frame_id, frame_id * 50_000_000, frame_id * 50_000_000)
  print(f"ok {bundle.manifest_hash}")
  return 0


if __name__ == "__main__":
  raise SystemExit(main(sys.argv[1:]))
