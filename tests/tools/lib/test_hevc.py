"""Where pictures begin in HEVC and which they are: of streams built bit by bit as ITU-T H.265, 7.3, has them."""

import numpy as np
import pytest

from openpilot.tools.lib.hevc import scan

VPS, SPS, PPS, IDR, TRAIL = 32, 33, 34, 19, 1
POC_BITS = 8


def ue(value: int) -> str:
  code = f"{value + 1:b}"
  return "0" * (len(code) - 1) + code


def nal(kind: int, bits: str) -> bytes:
  """Start code, a header of layer 0, and the payload with its stop bit."""
  bits += "1"
  bits += "0" * (-len(bits) % 8)
  payload = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
  assert b"\0\0" not in payload
  return b"\0\0\1" + bytes([kind << 1, 1]) + payload


def sps() -> bytes:
  size = ue(95) + ue(63) + "0" + ue(0) + ue(0)
  return nal(SPS, "0001" + "000" + "1" + "10" * 44 + "01011010" + ue(0) + ue(1) + size + ue(POC_BITS - 4) + "1" * 9)


def pps(output_flag: int, extra: int) -> bytes:
  return nal(PPS, ue(0) + ue(0) + "0" + str(output_flag) + f"{extra:03b}" + "1" * 9)


def slice_of(poc: int, output_flag: int, extra: int) -> bytes:
  """The first of a picture; 0 is a key, which has no count."""
  if poc == 0:
    return nal(IDR, "1" + "0" + ue(0) + "1" * 60)
  reserved = "101"[:extra]
  return nal(TRAIL, "1" + ue(0) + reserved + ue(1) + "1" * output_flag + f"{poc:0{POC_BITS}b}" + "1" * 60)


def stream(pocs: list[int], output_flag: int = 0, extra: int = 0) -> bytes:
  units = [slice_of(p, output_flag, extra) for p in pocs]
  return nal(VPS, "1" * 40) + sps() + pps(output_flag, extra) + b"".join(units)


@pytest.mark.parametrize(("output_flag", "extra"), [(0, 0), (1, 0), (0, 2), (1, 3)])
def test_a_slices_header_is_as_long_as_its_parameter_set_says(output_flag, extra):
  """The third picture behind the first key, and one of the second's, are lost."""
  got = scan(stream([0, 1, 2, 4, 5, 6, 7, 8, 9, 0, 1, 3, 4, 5, 6, 7, 8, 9], output_flag, extra))
  want = [*(0, 1, 2, 4, 5, 6, 7, 8, 9), *(10, 11, 13, 14, 15, 16, 17, 18, 19)]
  assert got.numbers.tolist() == want and got.keys == [(0, 0), (9, 9)] and len(got.packets) == len(want)


@pytest.mark.parametrize("tail", [b"\0\0\1" + bytes([TRAIL << 1, 1, 0x80])[:n] for n in range(4)])
def test_a_stream_cut_behind_a_start_code(tail):
  """A slice of which only the beginning is there is counted from its first bit on."""
  whole = stream([0, 1, 2, 3])
  assert scan(whole + tail).numbers.tolist()[:4] == [0, 1, 2, 3]
  assert len(scan(whole + tail).packets) == 4 + (len(tail) == 6)


@pytest.mark.parametrize("short", [0, 1, 2, 3])
def test_a_group_that_ends_early_is_told(short):
  """Four groups of ten; behind the one that lost its last three pictures whole groups may be lost too."""
  groups = [[*range(10)] for _ in range(4)]
  del groups[short][7:]
  got = scan(stream([p for g in groups for p in g]))
  assert got.gop == 10 and got.breaks == ([10 * short + 7] if short < 3 else [])
  assert got.numbers.tolist() == [10 * i + p for i, g in enumerate(groups) for p in g]
  assert np.diff([a for a, _ in got.packets]).min() > 0
