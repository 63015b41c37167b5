"""A little of the fuzz commands; a minute of each where there is time."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_videos


def test_some_logs():
  pytest.importorskip("cv2")
  import fuzz_logs

  counts, wrong = fuzz_logs.fuzz(2, 12, 600.0)
  assert not wrong and counts["logs"] == 12 and counts["read"] > 60


def test_some_videos():
  counts, wrong = fuzz_videos.fuzz(2, 20, 600.0)
  assert not wrong and counts["videos"] == 20 and counts["pictures"] > 100


@pytest.mark.slow
def test_a_minute_of_each():
  import fuzz_logs

  for fuzz, runs in ((fuzz_logs.fuzz, 250), (fuzz_videos.fuzz, 5000)):  # the same on every machine, unless it is slow
    counts, wrong = fuzz(3, runs, 60.0)
    assert not wrong and counts["read"] > 20
