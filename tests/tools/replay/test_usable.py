"""Which of a route's segments can be played, and from which of their files."""

from pathlib import Path

import pytest

from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.route import Segment
from openpilot.tools.replay import source

ROAD, SMALL = (1928, 1208), (526, 330)


def played(monkeypatch, *segments, camera="road"):
  """segments: {file: a video's size, or whether a log is sound}. -> camera, [(number, its video)]."""
  all_files = [{k: Path(f"{n}/{k}") for k in files} for n, files in enumerate(segments)]
  found = {all_files[n][k]: v for n, files in enumerate(segments) for k, v in files.items()}
  monkeypatch.setattr(source, "picture_size", lambda path: found[path])
  monkeypatch.setattr(source, "is_log", lambda path: None if found[path] else f"{path} is no log")
  out, chosen = source.usable([Segment("a", n, Path(), files) for n, files in enumerate(all_files)], camera)
  return chosen, [(s.num, str(s.files.get(source.VIDEOS[chosen]))) for s in out]


def test_videos_that_can_be_read_are_played(monkeypatch, capsys):
  got = played(monkeypatch, {"fcamera": ROAD, "rlog": True}, {"rlog": True}, {"fcamera": ROAD})
  assert got == ("road", [(0, "0/fcamera"), (1, "None"), (2, "2/fcamera")]) and capsys.readouterr().err == ""


def test_one_that_cannot_is_left_out(monkeypatch, capsys):
  assert played(monkeypatch, {"fcamera": ROAD}, {"fcamera": None}) == ("road", [(0, "0/fcamera")])
  assert "1/fcamera is not a video that can be read; segment a--1 is left out" in capsys.readouterr().err
  with pytest.raises(UserError, match="no segment of a can be read"):
    played(monkeypatch, {"fcamera": None}, {"fcamera": None})


def test_its_qcamera_plays_where_all_have_one_of_that_size(monkeypatch, capsys):
  both = {"fcamera": ROAD, "qcamera": SMALL}
  got = played(monkeypatch, both, {**both, "fcamera": None})
  assert got == ("qcamera", [(0, "0/qcamera"), (1, "1/qcamera")])
  assert "its qcamera is taken" in capsys.readouterr().err
  assert played(monkeypatch, {"fcamera": ROAD}, {**both, "fcamera": None}) == ("road", [(0, "0/fcamera")])
  assert played(monkeypatch, {"fcamera": None, "qcamera": SMALL}) == ("road", [(0, "0/qcamera")])


def test_the_qlog_stands_for_an_rlog(monkeypatch, capsys):
  got = played(monkeypatch, {"rlog": False, "qlog": True}, {"rlog": False, "qlog": False}, {"rlog": False})
  assert got == ("road", [(0, "None")])
  said = capsys.readouterr().err
  assert said.count("its qlog is taken") == 2 and said.count("is left out") == 2
