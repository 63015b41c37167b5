"""What labeling would take, of a teacher whose cost and size are known, by a clock that stands still but for what is
put onto it."""

import threading

import numpy as np
import pytest
from PIL import Image
from test_label_claims import FRAMES, Mean, Small
from test_label_claims import route as small_route

from openpilot.tools.fair.labels import estimate as module
from openpilot.tools.fair.labels import label, loading
from openpilot.tools.fair.labels.estimate import Amount, Cost, Sample, add_up, cut, figure, size_text, time_text
from openpilot.tools.fair.labels.meta import CHUNK
from openpilot.tools.fair.labels.sources import Piece, SourceOptions, open_sources
from openpilot.tools.fair.labels.sources.routes import RoutePiece
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.views import ViewWarp
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import cli

route = small_route  # a fixture of theirs
LOADING, OPENING, DECODE, NETWORK, FIRST = 3.0, 2.0, 0.02, 0.1, 7.0  # s
BYTES = 2000  # that no codec makes fewer


class Costly(Mean):
  def __init__(self, spend, stateful=False):
    super().__init__()
    self.spend, self.stateful, self.name = spend, stateful, "tracks" if stateful else "costly"
    self.labels = [Label("noise", "dense", "uint8", (BYTES,))]

  def label(self, clip, state=None):
    self.spend(NETWORK * len(clip.rgb) + (0 if self.calls else FIRST))
    self.calls.append(clip.frame_ids)
    noise = np.random.default_rng(clip.frame_ids).integers(0, 256, (len(clip.rgb), BYTES), np.uint8)
    return {"noise": noise}, state


@pytest.fixture
def spend(monkeypatch):
  """A clock, and what is known to take time."""
  t, lock = [0.0], threading.Lock()

  def spend(seconds):
    with lock:
      t[0] += seconds

  monkeypatch.setattr(module, "clock", lambda: t[0])

  def slower(real, seconds):
    def call(self, *args):
      spend(seconds)
      return real(self, *args)

    return call

  for cls, name, seconds in ((ViewWarp, "rgb_of", DECODE), (RoutePiece, "open", OPENING)):
    monkeypatch.setattr(cls, name, slower(getattr(cls, name), seconds))
  return spend


def run(monkeypatch, capsys, paths, out, *more, teachers=()):
  monkeypatch.setattr(loading, "load_teachers", lambda args: list(teachers))
  words = [*map(str, paths), "--teachers", "x", "--output", str(out), "--no-frames", *more]
  monkeypatch.setattr("sys.argv", ["label", *words])
  code = cli(label.main)()
  return code, capsys.readouterr()


def test_hours_and_disk_are_those_of_a_teacher_that_is_known(route, tmp_path, monkeypatch, capsys, spend):
  made = []
  real = module.add_up
  monkeypatch.setattr(module, "add_up", lambda *a: made.append(real(*a)) or made[-1])
  monkeypatch.setattr(module, "SECONDS", 1.0)  # a chunk of each segment

  def estimate(*more):
    teacher = Costly(spend)
    words = ("--focal", "110", "--estimate", *more)
    code, said = run(monkeypatch, capsys, [route], tmp_path / "s", *words, teachers=[teacher])
    assert code == 0 and not (tmp_path / "s").exists(), said.err
    assert sorted(x for call in teacher.calls for x in call)[-1] < CHUNK  # its real work, of the sample alone
    return made[-1], said.out

  out, said = estimate()
  frames = sum(FRAMES)
  assert out.frames == pytest.approx(frames)  # of all, from the size of the videos
  assert out.worker_seconds.value == pytest.approx(2 * OPENING + frames * (DECODE + NETWORK))
  assert out.start == pytest.approx(FIRST + 8 * NETWORK + 8 * DECODE)  # loading takes no time here
  assert out.seconds.value == pytest.approx(out.start + out.worker_seconds.value)
  assert out.network_seconds == pytest.approx(frames * NETWORK) and not out.waits
  assert out.bytes.value == pytest.approx(frames * BYTES, rel=0.1)
  assert f"costly        120 ms a frame, measured over {2 * CHUNK} frames of 2 segments; alone decoding 20 ms" in said
  assert "2 segments, one worker like this machine: 38.4 s; 0.00844 hours of workers" in said
  many, said = estimate("--segments", "1000000", "--workers", "1000")
  assert many.bytes.value == pytest.approx(out.bytes.value * 500_000)
  assert many.seconds.value == pytest.approx(out.start + out.worker_seconds.value * 500)
  assert (
    "1000000 segments, 1000 workers like this machine: 4.22 h; 4,222 hours" in said and "nothing was labeled" in said
  )
  # and the truth
  run(monkeypatch, capsys, [route], tmp_path / "s", "--focal", "110", teachers=[Costly(lambda _: None)])
  assert sum(g.size for g in LabelStore(tmp_path / "s").groups()) == pytest.approx(out.bytes.value, rel=0.05)


def test_more_frames_are_measured_of_a_teacher_that_is_fast(route, tmp_path, monkeypatch, capsys, spend):
  for seconds, measured in ((2 * (DECODE + NETWORK) * 2 * CHUNK * 1.01, 2 * CHUNK + FRAMES[1]), (1e3, sum(FRAMES))):
    monkeypatch.setattr(module, "SECONDS", seconds)
    words = ([route], tmp_path / "s", "--focal", "110", "--estimate")
    code, said = run(monkeypatch, capsys, *words, teachers=[Costly(spend, stateful=True)])
    assert code == 0 and f"measured over {measured} frames of 2 segments" in said.out


def test_the_sum_by_hand():
  pieces = [Piece(f"r{r}--{k}", f"r{r}", 100 * (k + 1)) for r in range(2) for k in range(3)]
  costs = {
    "boxes": Cost(1.0, 0.1, 0.2, [Sample(10, 5.0, 1000), Sample(10, 3.0, 3000)]),
    "tracks": Cost(2.0, 0.0, 1.0, [Sample(20, 20.0, 0), Sample(20, 24.0, 0)]),
  }
  order = {"boxes": False, "tracks": True}
  # 1200 of size, half as many frames: 600
  one = add_up(pieces, costs, order, (4.0, 3.0, 6.0), 0.5, 10.0, 6, 1)
  assert one.frames == 600 and one.start == 13
  assert one.worker_seconds == Amount(6 * 4 + 600 * 1.5, 6 * 3 + 600 * 1.3, 6 * 6 + 600 * 1.7)
  assert one.bytes == Amount(600 * 200, 600 * 100, 600 * 300) and one.network_seconds == 600 * 1.2
  assert one.seconds.value == 13 + one.worker_seconds.value
  many = add_up(pieces, costs, order, (4.0, 3.0, 6.0), 0.5, 10.0, 6, 5)
  assert many.worker_seconds.value == one.worker_seconds.value + 6 * 4  # each teacher opens them somewhere else
  assert many.waits and many.seconds.value == 13 + 300 * 1.1 + 3 * 4  # a route in order
  much = add_up(pieces, costs, order, (4.0, 3.0, 6.0), 0.5, 10.0, 6000, 5)
  assert not much.waits and much.seconds.value == pytest.approx(13 + 1000 * many.worker_seconds.value / 5)


def test_of_pictures_the_first_are_taken(tmp_path, rng, monkeypatch, capsys, spend):
  for k in range(5):
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(tmp_path / f"{k}.png")
  (part,) = open_sources([str(tmp_path)], SourceOptions())
  (some,) = cut([part], 3)
  assert len(some.entries) == len(some.stills) == 3 and len(part.entries) == len(part.stills) == 5
  teacher = Costly(spend)
  words = ([tmp_path], tmp_path / "s", "--size", "64x64", "--estimate")
  code, said = run(monkeypatch, capsys, *words, teachers=[teacher])
  assert code == 0 and "measured over 10 frames of one segment, twice" in said.out
  stills = open_sources([str(tmp_path)], SourceOptions(focal=110.0), "stills")
  assert cut(stills, 3) == stills[:3]


@pytest.mark.parametrize(
  ("words", "says"),
  [
    (["--estimate", "--plan", "x.parquet"], "leave --ray, --plan, --shard and --only out"),
    (["--estimate", "--shard", "0/2"], "leave --ray, --plan, --shard and --only out"),
    (["--estimate", "--ray"], "leave --ray, --plan, --shard and --only out"),
    (["--estimate", "--segments", "0"], "--segments is at least 1"),
    (["--estimate", "--workers", "0"], "--workers is at least 1"),
    (["--segments", "3"], "--segments is for --estimate"),
  ],
)
def test_what_makes_no_sense_is_one_line(words, says, route, tmp_path, monkeypatch, capsys):
  code, said = run(monkeypatch, capsys, [route], tmp_path / "s", *words, teachers=[Mean()])
  assert code == 2 and says in said.err and said.err.count("\n") == 1 and not (tmp_path / "s").exists()


def test_segments_that_cannot_be_opened_are_no_part_of_it(route, tmp_path, monkeypatch, capsys):
  for k in range(2):
    folder = tmp_path / "r" / f"0000002c--d68dde99ca--{k}"
    folder.mkdir(parents=True)
    video = (route / folder.name / "qcamera.ts").read_bytes()
    (folder / "qcamera.ts").write_bytes(b"no video" * 100 if k == 0 else video)
  words = ([tmp_path / "r"], tmp_path / "s", "--focal", "110", "--estimate")
  code, said = run(monkeypatch, capsys, *words, teachers=[Small()])
  assert code == 0 and "it is no part of the sample" in said.err and "of one segment, twice" in said.out
  (tmp_path / "r" / "0000002c--d68dde99ca--1" / "qcamera.ts").write_bytes(b"no video" * 100)
  code, said = run(monkeypatch, capsys, *words, teachers=[Small()])
  errors = [x for x in said.err.splitlines() if not x.startswith("warning: ")]
  assert code == 2 and len(errors) == 1 and "no segment of 0000002c--d68dde99ca can be read" in errors[0]


def test_figures_are_short():
  assert [figure(x) for x in (0.0012345, 12.345, 123.45, 1234567.8)] == ["0.00123", "12.3", "123", "1,234,568"]
  assert time_text(Amount(90.0, 60.0, 120.0)) == "1.5 min (1 to 2)" and time_text(Amount(7200, 7200, 7200)) == "2 h"
  assert size_text(Amount(2.5e12, 1e12, 3e12)) == "2.5 TB (1 to 3)" and size_text(Amount(512, 512, 512)) == "0.512 kB"
