import pytest

from openpilot.tools.lib.errors import UserError, cli
from openpilot.tools.lib.route import Route

LOG = "0000002c--d68dde99ca"
DONGLE = "0123456789abcdef"


def touch(*paths):
  for p in paths:
    p.parent.mkdir(parents=True, exist_ok=True)
    p.write_bytes(b"x")


LAYOUTS = {
  "dongle and bar": lambda d, n: d / f"{DONGLE}|{LOG}--{n}" / "rlog.zst",
  "dongle and underscore": lambda d, n: d / f"{DONGLE}_{LOG}--{n}" / "rlog.zst",
  "plain": lambda d, n: d / f"{LOG}--{n}" / "rlog.zst",
  "flat": lambda d, n: d / f"{DONGLE}_{LOG}--{n}--rlog.zst",
  "nested": lambda d, n: d / LOG / str(n) / "rlog.zst",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_ranges(tmp_path, layout):
  touch(*[LAYOUTS[layout](tmp_path, n) for n in (0, 1, 2, 10, 3)])
  root = tmp_path / LOG if layout == "nested" else tmp_path
  r = Route(root)
  assert (
    r.name == LOG
    and [s.num for s in r.segments] == [0, 1, 2, 3, 10]
    and all(s.rlog and s.log_path == s.rlog and s.qlog is None for s in r.segments)
  )
  for text, want in (("2", [2]), ("1:3", [1, 2]), (":2", [0, 1]), ("3:", [3, 10]), ("-1", [10])):
    assert [s.num for s in Route(f"{root}/{text}").segments] == want
  with pytest.raises(UserError, match="no such segments; there are 0, 1, 2, 3, 10"):
    Route(f"{root}/7")


def test_names_in_a_data_dir(tmp_path):
  touch(
    tmp_path / f"{DONGLE}|{LOG}--0" / "qlog.bz2",
    tmp_path / f"{DONGLE}|{LOG}--0" / "qcamera.ts",
    tmp_path / "2021-02-27--13-45-18--24" / "rlog.bz2",
  )
  for name in (LOG, f"{DONGLE}|{LOG}", f"{DONGLE}_{LOG}", f"{LOG}--0", f"{LOG}/0"):
    s = Route(name, tmp_path).segments
    assert len(s) == 1 and s[0].qlog and s[0].qcamera and s[0].rlog is None and s[0].fcamera is None
  assert Route("2021-02-27--13-45-18--24", tmp_path).segments[0].num == 24
  with pytest.raises(UserError, match="2 routes; name one"):
    Route(tmp_path)


def test_single_folder_and_single_file(tmp_path):
  touch(tmp_path / "drive" / "rlog", tmp_path / "clip.mp4")
  assert Route(tmp_path / "drive").segments[0].rlog == tmp_path / "drive" / "rlog"
  s = Route(tmp_path / "clip.mp4").segments[0]
  assert s.fcamera == tmp_path / "clip.mp4" and s.log_path is None


@pytest.mark.parametrize("name", ["nope", "nope/2:5"])
def test_what_is_missing_is_said(tmp_path, name, capsys):
  with pytest.raises(UserError, match="no route"):
    Route(name, tmp_path)
  assert cli(lambda: Route(tmp_path / name).segments and None)() == 2
  err = capsys.readouterr().err
  assert err.startswith("error: no route at") and err.count("\n") == 1
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match="there is nothing"):
    Route(tmp_path / "empty")
