"""Single pictures of road cameras, each with its own aim."""

import numpy as np
import pytest
from PIL import Image

from openpilot.selfdrive.modeld.fair.frames import unpack_rgb
from openpilot.tools.fair.distillation.data import Clips, valid_of
from openpilot.tools.fair.labels import label, loading
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.origins import origin_of
from openpilot.tools.fair.labels.placement import rgb_of
from openpilot.tools.fair.labels.sources import SourceOptions, open_sources
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.teacher import Label
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.options import parse

# name -> width, height, focal length, row of the horizon
PICTURES = {"night.png": (1280, 720, 1100.0, 420.0), "day/a.png": (640, 361, 600.0, 140.0)}
AIM = "day/*: {focal: 600, horizon: 140}\nnight*: {horizon: 420}\n"


def picture(width, height, horizon):
  """Gray, red above the horizon."""
  rgb = np.full((height, width, 3), 90, np.uint8)
  rgb[: round(horizon)] = (220, 40, 40)
  return rgb


@pytest.fixture
def stills(tmp_path):
  (tmp_path / "in" / "day").mkdir(parents=True)
  for name, (w, h, _, horizon) in PICTURES.items():
    Image.fromarray(picture(w, h, horizon)).save(tmp_path / "in" / name)
  (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
  (tmp_path / "aim.yaml").write_text(AIM)
  return tmp_path / "in"


def opened(stills, **more):
  options = SourceOptions(aim=stills.parent / "aim.yaml", focal=1100.0, name="roads")
  return open_sources([str(stills)], SourceOptions(**{**vars(options), **more}), "stills")


class Red:
  """What is red, a class map of the whole picture."""

  name, model_id, checkpoint_hash, license, stateful, sees, whole = "red", "", "1", "MIT", False, "picture", False

  def prepare(self, height, width):
    self.labels = [Label("segmentation", "dense", "uint8", (height, width), "class", ("road", "background"))]

  def settings(self):
    return {}

  def label(self, clip, state=None):
    return {"segmentation": (clip.rgb[:, 0].astype(int) - clip.rgb[:, 1] > 60).astype(np.uint8)}, None


def test_each_is_warped_by_its_own_camera(stills, tmp_path, capsys):
  """The horizon lies at the view's own row, 47.6, in both; labels of the whole picture lie there too; what the camera
  does not see is not valid; one that cannot be read is left out and said."""
  views = opened(stills)
  assert "broken.jpg" in capsys.readouterr().err
  assert [v.name for v in views] == ["roads-night--0", "roads-day-a--0"]
  assert [v.intrinsics[0, 0] for v in views] == [1100, 600] and not any(v.estimated for v in views)
  store = LabelStore(tmp_path / "labels", create=True)
  frames = run_teacher(FrameTeacher(), views, store, progress=False)
  red = run_teacher(Red(), views, store, progress=False)
  for (w, h, focal, horizon), g, m in zip(PICTURES.values(), frames, red, strict=True):
    rgb = unpack_rgb(g.row("frame", 0)).astype(int)
    edge = np.argmax(rgb[:, 200:300, 0] - rgb[:, 200:300, 1] < 60, axis=0).mean()
    assert abs(edge - 47.6) < 1.5
    ids = m.row("segmentation", 0)
    assert abs(np.argmax(ids[:, 200:300] == 0, axis=0).mean() - edge) < 1.5
    valid = valid_of(g)
    half = 910 / focal * w / 2  # of the view's pixels, beside its middle, near the horizon
    assert abs(valid[48].sum() - min(512, 2 * half)) < 4
    below = (h - horizon) / focal * 910  # rows of the view below the horizon, where pitch is small
    assert abs(valid[:, 256].sum() - min(256, 47.6 + below)) < 8
    assert valid.all() or (ids[~valid] == 255).mean() > 0.95
    assert origin_of(g.segment, {"frames": g}, []).kind == "stills"


def test_a_still_is_a_clip_in_which_nothing_moves(stills, tmp_path):
  views, store = opened(stills), LabelStore(tmp_path / "labels", create=True)
  for teacher in (FrameTeacher(), Red()):
    run_teacher(teacher, views, store, progress=False)
  clips = Clips(tmp_path / "labels", ["segmentation"], 4)
  assert len(clips) == 2
  clip = clips.read(1)
  assert clip.frames.shape == (4, 6, 128, 256) and (clip.frames == clip.frames[0]).all()
  assert len(clip.said["segmentation"].values) == 4 and rgb_of(clip.frames[3]).std() > 10


def test_a_guessed_camera_says_so(stills):
  """Without a horizon, or with a guessed focal length, nothing teaches meters."""
  assert [v.estimated for v in opened(stills, aim=None)] == [True, True]
  assert [v.estimated for v in opened(stills, aim=None, horizon=100.0)] == [False, False]
  (stills.parent / "aim.yaml").write_text("'*': {horizon: 100}")
  views = opened(stills, focal="auto")
  assert [v.estimated for v in views] == [True, True] and views[1].intrinsics[0, 0] == 0.85 * 640


@pytest.mark.parametrize(
  ("text", "more", "message"),
  [
    ("- a", {}, "it is no table"),
    ("a: {zoom: 2}", {}, "'a' says something else than focal and horizon"),
    ("a: {focal: wide}", {}, "focal wide is no number of pixels"),
    ("a: {focal: -1}", {}, "a focal length is above 0"),
    ("nothing*: {focal: 900}", {}, "'nothing.' fits no picture"),
    (AIM, {"horizon": "auto"}, "of single pictures it cannot be seen"),
    ("day*: {horizon: 1}", {"focal": None}, "give its focal length in pixels with --focal or --aim"),
  ],
)
def test_bad_aims_are_said(stills, text, more, message):
  (stills.parent / "aim.yaml").write_text(text)
  (stills / "broken.jpg").unlink()
  with pytest.raises(UserError, match=message):
    opened(stills, **more)


def test_the_command_takes_an_aim_for_stills_alone(stills, tmp_path, monkeypatch):
  words = [
    str(stills),
    "--teachers",
    "yolox-nano",
    "--output",
    str(tmp_path / "s"),
    "--aim",
    str(tmp_path / "aim.yaml"),
  ]
  options = parse(label.Options, None, "label", [*words, "--source", "stills"])
  assert options.aim == tmp_path / "aim.yaml"
  monkeypatch.setattr("sys.argv", ["label", *words])
  monkeypatch.setattr(loading, "load_teacher", lambda *a, **k: Red())
  with pytest.raises(UserError, match="add --source stills"):
    label.main()
