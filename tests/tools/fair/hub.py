"""A stand-in for the hub: a server on this machine that gives folders as models, and keeps what it was asked for."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c" * 40


def digest(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
  folders: dict[str, Path]
  asked: list[str]

  def log_message(self, *_: object) -> None:
    pass

  def do_HEAD(self) -> None:
    self.answer(False)

  def do_GET(self) -> None:
    self.answer(True)

  def answer(self, body: bool) -> None:
    path = self.path.split("?")[0]
    self.asked.append(path)
    for name, folder in self.folders.items():
      if path.startswith(f"/api/models/{name}"):
        there = sorted(folder.iterdir())
        tree = [
          {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": digest(p.read_bytes())} for p in there
        ]
        said = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p.name} for p in there]}
        self.send(json.dumps(tree if "/tree/" in path else said).encode(), "application/json", True)
        return
      file = folder / path.split("/")[-1]
      if path.startswith(f"/{name}/resolve/") and file.is_file():
        self.send(file.read_bytes(), "application/octet-stream", body)
        return
    self.send_response(404)
    self.send_header("X-Error-Code", "RepoNotFound")
    self.send_header("Content-Length", "0")
    self.end_headers()

  def send(self, data: bytes, kind: str, body: bool) -> None:
    self.send_response(200)
    headers = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Repo-Commit": COMMIT}
    for k, v in {**headers, "ETag": f'"{digest(data)}"'}.items():
      self.send_header(k, v)
    self.end_headers()
    if body:
      self.wfile.write(data)


@contextlib.contextmanager
def served(folders: dict[str, Path]) -> Iterator[tuple[str, list[str]]]:
  """{owner/name: folder} -> the server's address, and the paths that it is asked for."""
  handler = type("Served", (Handler,), {"folders": folders, "asked": []})
  server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
