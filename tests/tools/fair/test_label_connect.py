"""Routes of comma connect, from a stand-in of its HTTP answers."""

import email.message
import http.server
import json
import threading
import urllib.parse

import pytest
from test_label_claims import Mean, contents
from test_label_claims import route as small_route

from openpilot.tools.fair.labels import label, loading
from openpilot.tools.lib import connect
from openpilot.tools.lib.connect import TOKEN, Connect, parse_route
from openpilot.tools.lib.errors import UserError, cli

route = small_route  # a fixture of theirs
DONGLE, LOG = "0123456789abcdef", "0000002c--d68dde99ca"
NAME = f"{DONGLE}|{LOG}"


class Api(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args): ...

  def reply(self, code, body, length=None):
    self.send_response(code)
    self.send_header("Content-Length", str(len(body) if length is None else length))
    self.end_headers()
    self.wfile.write(body)

  def do_GET(self):
    said, path = self.server.said, urllib.parse.urlsplit(self.path)
    said["asked"].append((path.path, self.headers.get("Authorization")))
    if said["stumbles"]:
      said["stumbles"] -= 1
      return self.reply(503, b"{}")
    here = f"http://127.0.0.1:{self.server.server_address[1]}"
    if path.path.startswith("/v1/route/"):
      if self.headers.get("Authorization") != "JWT good":
        return self.reply(401, json.dumps({"error": 401, "description": "Unauthorized"}).encode())
      if path.path != f"/v1/route/{DONGLE}%7C{LOG}/files":
        return self.reply(404, json.dumps({"error": 404, "description": "not found"}).encode())
      if said["answer"] is not None:
        return self.reply(200, said["answer"], said["length"])
      said["signed"] += 1
      files = {"cameras": [], "logs": [f"{here}/other/{DONGLE}/{LOG}/0/notes.txt?sig={said['signed']}"]}
      files["qcameras"] = [f"{here}/qcameras/{DONGLE}/{LOG}/{k}/qcamera.ts?sig={said['signed']}" for k in range(2)]
      files["qcameras"] += [f"{here}/x/{DONGLE}/00000001--aaaaaaaaaa/0/qcamera.ts", f"{here}/../0/qcamera.ts", 3]
      files["qcameras"].append(f"http://[bad/{DONGLE}/{LOG}/0/qcamera.ts")
      if said["quoted"]:
        files["qcameras"] = [str(u).replace("--", "%2D%2D") for u in files["qcameras"]]
      return self.reply(200, json.dumps(files).encode())
    if f"sig={said['signed']}" != path.query:
      return self.reply(403, b"expired")
    number = path.path.split("/")[-2]
    body = (said["route"] / f"{LOG}--{number}" / "qcamera.ts").read_bytes()
    if said["page"]:
      return self.reply(200, b"<html>sign in</html>")
    if said["lacks"] == number:
      return self.reply(404, b"")
    if said["cuts"]:
      said["cuts"] -= 1
      return self.reply(200, body[:100], len(body))
    self.reply(200, body)


@pytest.fixture
def api(route, monkeypatch, tmp_path):
  """-> what the stand-in is told, and what it was asked."""
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
  server.said = {
    "route": route,
    "asked": [],
    "signed": 0,
    "stumbles": 0,
    "cuts": 0,
    "answer": None,
    "length": None,
    "page": 0,
    "lacks": "",
    "quoted": False,
  }
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  monkeypatch.setenv("API_HOST", f"http://127.0.0.1:{server.server_address[1]}")
  monkeypatch.setenv(TOKEN, "good")
  monkeypatch.setenv("FAIR_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(connect, "WAIT", 0.001)
  yield server.said
  server.shutdown()
  server.server_close()


def run(monkeypatch, capsys, out, *words):
  monkeypatch.setattr(loading, "load_teachers", lambda args: [Mean()])
  told = ["--teachers", "x", "--focal", "110", "--output", str(out), "--no-frames"]
  monkeypatch.setattr("sys.argv", ["label", *map(str, words), *told])
  code = cli(label.main)()
  return code, [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]


def test_labels_are_those_of_the_route_on_disk(route, api, tmp_path, monkeypatch, capsys):
  """The other side stumbles, cuts a file short, and its addresses expire; whoever has the files is not told the
  token."""
  assert run(monkeypatch, capsys, tmp_path / "want", route)[0] == 0
  api["stumbles"], api["cuts"] = 2, 1
  real = Connect.files

  def files(self):
    out = real(self)
    if api["signed"] == 1:  # who was told them comes late
      api["signed"] = 2
    return out

  monkeypatch.setattr(Connect, "files", files)
  assert run(monkeypatch, capsys, tmp_path / "s", "--connect", NAME)[0] == 0
  assert contents(tmp_path / "s") == contents(tmp_path / "want")
  assert {token for path, token in api["asked"] if path.startswith("/v1/")} == {"JWT good"}
  assert {token for path, token in api["asked"] if not path.startswith("/v1/")} == {None}
  before = len(api["asked"])
  assert run(monkeypatch, capsys, tmp_path / "again", "--connect", f"https://connect.comma.ai/{DONGLE}/{LOG}")[0] == 0
  assert len(api["asked"]) == before + 1 and contents(tmp_path / "again") == contents(tmp_path / "want")
  assert run(monkeypatch, capsys, tmp_path / "one", "--connect", f"{NAME}/1")[0] == 0
  assert [p.name for p in (tmp_path / "one").iterdir() if p.is_dir() and p.name != ".claims"] == [f"{LOG}--1"]


@pytest.mark.parametrize(
  ("change", "words", "says"),
  [
    ({TOKEN: "bad"}, NAME, "the token in COMMA_JWT is not accepted for it (401)"),
    ({TOKEN: ""}, NAME, "--connect needs a token: set COMMA_JWT"),
    ({TOKEN: "a\nHost: b"}, NAME, "--connect needs a token: set COMMA_JWT"),
    ({}, f"{DONGLE}|00000099--aaaaaaaaaa", "there is no such route, or it is not shared with you (404)"),
    ({}, "my drive", "--connect my drive: write DONGLE|LOG"),
    ({}, f"{NAME}/7", "no such segments; there are 0, 1"),
    ({"API_HOST": "http://127.0.0.1:1"}, NAME, "does not answer"),
    ({"API_HOST": "file:///etc/passwd"}, NAME, "its address is none of https"),
  ],
)
def test_what_is_wrong_is_one_line(change, words, says, api, tmp_path, monkeypatch, capsys):
  for k, v in change.items():
    monkeypatch.setenv(k, v)
  code, err = run(monkeypatch, capsys, tmp_path / "s", "--connect", words)
  assert code == 2 and len(err) == 1 and says in err[0], err
  assert "bad" not in err[0] and not (tmp_path / "s").exists()


@pytest.mark.parametrize("answer", [b"[]", b"{", b"[" * 100_000, b'{"cameras": 3}', b"{}"])
def test_an_answer_that_is_no_list_of_files(answer, api, tmp_path, monkeypatch, capsys):
  api["answer"] = answer
  code, err = run(monkeypatch, capsys, tmp_path / "s", "--connect", NAME)
  assert code == 2 and len(err) == 1 and ("no list of files" in err[0] or "no segment with video" in err[0])


def test_an_answer_that_is_cut_short_is_asked_for_again(api, monkeypatch):
  api["answer"], api["length"] = b'{"qcameras": [', 5000
  with pytest.raises(UserError, match=r"does not answer \(cut short at 14 of 5000 bytes"):
    Connect(DONGLE, LOG).files()
  assert len(api["asked"]) == connect.TRIES


def test_a_page_that_came_in_place_of_a_video_is_not_kept(route, api, tmp_path, monkeypatch, capsys):
  """It was, and no later command asked for the video again. Nor is it said that it was tried thrice."""
  api["page"] = 1
  code, err = run(monkeypatch, capsys, tmp_path / "s", "--connect", NAME)
  assert code == 2 and "no segment of 0000002c--d68dde99ca can be read" in err[-1] and "times" not in "".join(err)
  api["page"] = 0
  assert run(monkeypatch, capsys, tmp_path / "s", "--connect", NAME)[0] == 0
  assert run(monkeypatch, capsys, tmp_path / "want", route)[0] == 0
  assert contents(tmp_path / "s") == contents(tmp_path / "want")


def test_a_page_that_says_so_is_refused(tmp_path):
  class Answer:
    headers = email.message.Message()

    def geturl(self):
      return "https://elsewhere/x"

  Answer.headers["Content-Type"] = "text/html; charset=utf-8"
  with pytest.raises(UserError, match="elsewhere answers with a page in place of the file"):
    connect.copy(Answer(), tmp_path / "x")


def test_a_file_that_is_gone_is_not_called_a_route(api, tmp_path, monkeypatch, capsys):
  api["lacks"] = "1"
  code, err = run(monkeypatch, capsys, tmp_path / "s", "--connect", NAME)
  failed = [x for x in err if x.startswith("failed: ")]
  assert code == 1 and len(failed) == 1 and "--1/qcamera.ts: http://127.0.0.1:" in failed[0], err
  assert failed[0].endswith("does not have it any more (404)") and "3 times" not in failed[0]


def test_addresses_may_be_quoted(api):
  api["quoted"] = True
  assert sorted(Connect(DONGLE, LOG).files()) == [f"{LOG}--{k}/qcamera.ts" for k in range(2)]


def test_without_a_path_or_a_route(api, tmp_path, monkeypatch, capsys):
  code, err = run(monkeypatch, capsys, tmp_path / "s")
  assert code == 2 and err == ["error: what is to be labeled? Give a PATH, or --connect ROUTE"]


def test_names_of_routes():
  for text in (NAME, f"{DONGLE}/{LOG}", f"{DONGLE}_{LOG}", f"https://connect.comma.ai/{DONGLE}/{LOG}"):
    assert parse_route(text) == (DONGLE, LOG, "")
  assert parse_route(f"{NAME}/2:5") == (DONGLE, LOG, "2:5") and parse_route(f"{NAME}/10/20")[2] == ""
  with pytest.raises(UserError, match="write DONGLE"):
    parse_route(f"{DONGLE}|../../v1/me")
