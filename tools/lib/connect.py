"""Routes of comma connect, by its HTTP API: which files there are, and their bytes. As openpilot's tools/lib/api.py and
route.py ask for them; API_HOST names another host, as there."""

import contextlib
import errno
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

from openpilot.tools.lib.errors import UserError, printable, system_errno, warn
from openpilot.tools.lib.files import MB, atomic_path
from openpilot.tools.lib.route import CONNECT, NAMES, RANGE

T = TypeVar("T")
TOKEN = "COMMA_JWT"
HOST = "https://api.commadotai.com"
TRIES, AGAIN = 5, (429, 500, 502, 503, 504)
TIMEOUT = 30.0  # s
WAIT = 1.0  # s before the second try; twice as long before each further one
ANSWER_LIMIT = 64 * MB  # bytes
FILE_LIMIT = 1 << 32
FRESH = 1800.0  # s for which signed addresses are used


def host() -> str:
  return os.environ.get("API_HOST", HOST).rstrip("/")


def parse_route(text: str) -> tuple[str, str, str]:
  """<dongle>|<log id>, with / or _ too, or connect's address; behind it /n or /first:last -> (dongle, log id, that part
  or ''). Raises UserError."""
  found = CONNECT.match(text)
  if not found or not re.fullmatch(r"[\w-]+", found["log"]):
    raise UserError(f"--connect {printable(text, 80)}: write DONGLE|LOG, as 0123456789abcdef|0000002c--d68dde99ca")
  rest = (found["rest"] or "")[1:]
  if rest and not RANGE.match(rest):
    warn(f"'/{printable(rest, 40)}' behind the route's name is not used; write /2 or /2:5 for some of its segments")
    rest = ""
  return found["dongle"], found["log"], rest


class NoRedirect(urllib.request.HTTPRedirectHandler):
  """Who answers an asking with a token elsewhere would be given the token."""

  def redirect_request(self, *_: Any) -> None:
    return None


class Expired(UserError):
  """A signed address is not accepted any more."""


def ask(url: str, what: str, read: Callable[[Any], T], token: str = "") -> T:
  """read(answer), tried again where the other side stumbles. what: for people. Raises UserError."""
  parts = urllib.parse.urlsplit(url)
  at = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
  if parts.scheme != "https" and not (parts.scheme == "http" and host().startswith("http:")):
    raise UserError(f"{what}: its address is none of https")
  request = urllib.request.Request(url, headers={"User-Agent": "openpilot-fair"})
  if token:
    request.add_unredirected_header("Authorization", f"JWT {token}")
  opener = urllib.request.build_opener(*([NoRedirect] if token else []))
  for n in range(TRIES):
    try:
      with opener.open(request, timeout=TIMEOUT) as answer:
        return read(answer)
    except urllib.error.HTTPError as e:
      if e.code in (401, 403) and token:
        raise UserError(f"{what}: the token in {TOKEN} is not accepted for it ({e.code})") from None
      if e.code in (401, 403):
        raise Expired(f"{what}: its signed address is not accepted ({e.code})") from None
      if e.code == 404:
        gone = "there is no such route, or it is not shared with you" if token else f"{at} does not have it any more"
        raise UserError(f"{what}: {gone} (404)") from None
      if e.code not in AGAIN or n == TRIES - 1:
        raise UserError(f"{what}: {at} answers {e.code}") from None
    except (OSError, HTTPException) as e:  # no connection, or lost on the way
      if system_errno(e) in (errno.ENOSPC, errno.EDQUOT):
        raise
      if n == TRIES - 1:
        raise UserError(f"{what}: {at} does not answer ({printable(e, 80)})") from None
    time.sleep(WAIT * 2**n)
  raise AssertionError


def is_whole(answer: Any, total: int) -> None:
  """Raises OSError where fewer bytes came than were promised."""
  want = answer.headers.get("Content-Length")
  if want is not None and total != int(want):
    raise ConnectionError(f"cut short at {total} of {want} bytes")


def take(answer: Any) -> bytes:
  """An answer's body. Raises OSError where it is cut short, UserError where it is too long."""
  data = answer.read(ANSWER_LIMIT + 1)
  if len(data) > ANSWER_LIMIT:
    raise UserError(f"{host()} answers with over {ANSWER_LIMIT} bytes, which is no list of files")
  is_whole(answer, len(data))
  return data


def copy(answer: Any, path: Path) -> None:
  """An answer's body into a file. Raises OSError where it is cut short, UserError where it is too long, or a page."""
  total = 0
  if answer.headers.get_content_type() == "text/html":
    raise UserError(f"{urllib.parse.urlsplit(answer.geturl()).hostname} answers with a page in place of the file")
  with open(path, "wb") as f:
    while part := answer.read(MB):
      total += len(part)
      if total > FILE_LIMIT:
        raise UserError(f"a file of over {FILE_LIMIT} bytes is none of a route's")
      f.write(part)
  is_whole(answer, total)


class Connect:
  """One route."""

  def __init__(self, dongle: str, log: str):
    self.dongle, self.log = dongle, log
    self.name = f"{dongle}|{log}"
    self.told = -FRESH
    self.urls: dict[str, str] = {}

  def files(self) -> dict[str, str]:
    """'<log id>--<n>/<file>' -> its signed address. Raises UserError."""
    if time.monotonic() - self.told < FRESH:
      return self.urls
    token = os.environ.get(TOKEN, "").strip()
    if not token or not token.isascii() or not token.isprintable():
      raise UserError(f"--connect needs a token: set {TOKEN}, from https://jwt.comma.ai")
    url = f"{host()}/v1/route/{urllib.parse.quote(self.name, safe='')}/files"
    data = ask(url, self.name, take, token)
    try:
      lists = [x for x in json.loads(data).values() if isinstance(x, list)]
      urls = [u for x in lists for u in x if isinstance(u, str)]
    except (ValueError, AttributeError, RecursionError):
      raise UserError(f"{self.name}: {host()} answers with something that is no list of files") from None
    self.urls, self.told = {}, time.monotonic()
    for u in urls:
      with contextlib.suppress(ValueError):  # no URL
        *_, dongle, log, n, file = ("", "", "", *map(urllib.parse.unquote, urllib.parse.urlsplit(u).path.split("/")))
        if (dongle, log) == (self.dongle, self.log) and re.fullmatch("[0-9]{1,6}", n) and file in NAMES:
          self.urls.setdefault(f"{log}--{int(n)}/{file}", u)
    return self.urls

  def download(self, name: str, path: Path) -> None:
    """A file into another, whole or not at all. Raises UserError."""
    what = f"{self.name}, {name}"
    for last in (False, True):
      if name not in self.files():
        raise UserError(f"{what}: it is gone")
      try:
        with atomic_path(path) as tmp:
          ask(self.urls[name], what, lambda answer: copy(answer, tmp))
        return
      except Expired:
        self.told = -FRESH  # new addresses
        if last:
          raise
