"""Label stores by URL as somebody else names them, and what is said where a server refuses."""

import http.server
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from openpilot.tools.fair.labels import remote
from openpilot.tools.fair.labels.remote import Bucket, folder_of
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.stored import write_table
from openpilot.tools.lib.errors import UserError

pytest.importorskip("obstore", reason="obstore is not installed")
ERROR = "<Error><Code>{}</Code><Message>no</Message></Error>"


class Refusing(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args): ...

  def do_GET(self):
    code, body = self.server.says
    self.send_response(code)
    self.send_header("Content-Length", str(len(body)))
    self.end_headers()
    self.wfile.write(body.encode())


@pytest.fixture
def server(monkeypatch, tmp_path):
  made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
  threading.Thread(target=made.serve_forever, daemon=True).start()
  monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{made.server_address[1]}")
  for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION"):
    monkeypatch.setenv(f"AWS_{name}", "x")
  monkeypatch.setenv("FAIR_CACHE", str(tmp_path / "cache"))
  monkeypatch.setitem(remote.RETRIES, "max_retries", 0)
  yield made
  made.shutdown()
  made.server_close()


@pytest.mark.parametrize(
  ("code", "word", "says"),
  [
    (500, "InternalError", "the store does not answer as it should (Server returned non-2xx status code: 500"),
    (403, "AccessDenied", "no permission"),
    (403, "SignatureDoesNotMatch", "the credentials are not accepted"),
    (400, "ExpiredToken", "the credentials are not accepted"),
    (401, "Unauthorized", "the credentials are not accepted"),
    (404, "NoSuchBucket", "there is no such bucket"),
  ],
)
def test_the_reason_is_not_read_out_of_a_name(code, word, says, server):
  """A bucket of tokens, a group whose key has 403 in it."""
  server.says = code, ERROR.format(word)
  bucket = Bucket("s3://tokens-401/metadata")
  for ask in (lambda: bucket.get("a--0/frames-403b1credentials/group.json"), lambda: bucket.names("NoSuchBucket/")):
    with pytest.raises(UserError) as e:
      ask()
    assert says in str(e.value)
    assert len(str(e.value)) < 400 and "\n" not in str(e.value)


def test_what_failed_below_is_said(server, monkeypatch):
  monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
  with pytest.raises(UserError, match=r"s3://b/x: the store does not answer as it should \(.*: Connection refused\)"):
    Bucket("s3://b/x").get("a")


def test_half_the_credentials(monkeypatch):
  monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
  monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
  with pytest.raises(UserError, match="no credentials; set AWS_ACCESS_KEY_ID"):
    Bucket("s3://b/x").get("a")


@pytest.mark.parametrize("url", ["s3://bucket/labels#1", "s3://bucket/labels?x=1", "s3://bucket//labels"])
def test_a_url_of_which_a_part_would_be_dropped(url):
  """s3://bucket/labels#1 and #2 were one store."""
  with pytest.raises(UserError, match="is not taken"):
    LabelStore(url, create=True)


@pytest.mark.parametrize("place", ["S3://b/x", "az://b/x", "https://b.s3.amazonaws.com/x", "s3:b/x", "file2:/x"])
def test_a_url_of_another_kind_is_made_no_folder(place, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for given in (place, Path(place)):
    with pytest.raises(UserError, match="is no folder; write s3://BUCKET/PREFIX"):
      LabelStore(given, create=True)
  assert not list(tmp_path.iterdir())


def test_a_folder_with_a_colon(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert folder_of("a:b/x") == Path("a:b/x")
  write_table(Path("a:b/x.parquet"), pa.table({"n": [1, 2]}))
  assert pq.read_table(tmp_path / "a:b" / "x.parquet")["n"].to_pylist() == [1, 2]
