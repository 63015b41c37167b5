"""Label stores that are no folder: s3://BUCKET/PREFIX, gs://BUCKET/PREFIX.

Their files are those of a folder (store.py), kept by objects of the same names. A mirror on this machine has what was
read or written: what is written goes to the mirror first and then to the store, a chunk's JSON last, so that nothing is
ever renamed; what is read is fetched once, and again where the store has another version of it. Who reads keeps the
mirror for the next time; who writes has one of his own, which goes when he does.

.index.json names the groups, since listing a large store takes long. Whoever makes a group removes it; the command that
is done writes it anew. It is not trusted: a group that is named and not there is left out."""

import atexit
import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from openpilot.tools.fair.labels import mirrors
from openpilot.tools.lib.errors import UserError, printable, warn
from openpilot.tools.lib.files import atomic_path, machine_id, read_json, still_runs, write_bytes

URL = re.compile(r"(s3|gs):/+([^/].*)")  # a Path of a URL has one slash
FILE_URL = re.compile(r"file:/+(.*)")
INDEX, TAGS = ".index.json", ".tags.json"
AT_ONCE = 16  # requests
RETRIES: Any = {"max_retries": 8, "retry_timeout": timedelta(seconds=90)}
TIMEOUTS = {"timeout": "60s", "connect_timeout": "5s"}
LIMIT = 1 << 32  # bytes of one object
OTHER_URL = re.compile(r"([A-Za-z][A-Za-z0-9+-]+):/+.*|[sS]3:.*")  # also with one slash
NO_BUCKET = "<Code>NoSuchBucket<"
LACKING = {  # what is said where nobody gave credentials
  "s3": "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the like",
  "gs": "no credentials; set GOOGLE_APPLICATION_CREDENTIALS, or the like",
}
# a machine of the cloud is asked for credentials where there are none; names of objects may hold any word
ASKED = re.compile(r"https?://[^/\s]+/(?:latest/(?:api/token|meta-data/)|computeMetadata/)")
NAMES = re.compile(r"https?://\S+|(?<=Object at location ).+?(?= not found:)|(?<=to complete for path ).+?(?=: Error )")
KNOWN = (  # what an error says, without names, and what is said of it
  (re.compile(NO_BUCKET), "there is no such bucket"),
  (
    re.compile(r"<Code>(?:ExpiredToken|InvalidToken|InvalidAccessKeyId|SignatureDoesNotMatch)<|status code: 401"),
    "the credentials are not accepted",
  ),
  (re.compile(r"status code: 403"), "no permission; look at the rights of these credentials"),
)
SMALL = re.compile(r"(?:group\.json|frames\.parquet|(?:[^/]+/)?zarr\.json|chunks/[0-9]+\.(?:json|npz))")


def url_of(place: str | Path) -> str | None:
  """The URL of a store that is no folder, None of a folder."""
  found = URL.fullmatch(str(place))
  return f"{found[1]}://{found[2].rstrip('/')}" if found else None


def folder_of(place: str | Path) -> Path:
  """The folder that a path or file:// names. Raises UserError of another URL, which would be made a folder of that
  name."""
  found = FILE_URL.fullmatch(str(place))
  if not found and OTHER_URL.fullmatch(str(place)) and not Path(place).exists():
    raise UserError(
      f"{printable(place, 80)} is no folder; write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER"
    )
  return Path(f"/{found[1]}") if found else Path(place)


def reason_of(error: Exception, scheme: str) -> str:
  """Of an error of obstore's: what is known of it, and what it was in its own words."""
  text = str(error).partition("Debug source:")  # which has the same, and the name, again
  plain = NAMES.sub("", text[0])
  if ASKED.search(text[0]) or re.search(r"redential error|Missing (?:AccessKeyId|SecretAccessKey)", plain):
    why = LACKING[scheme]
  else:
    why = next((says for words, says in KNOWN if words.search(plain)), "the store does not answer as it should")
  own = printable(plain.partition(" - ")[2] or plain, 200)
  deeper = re.search(r'message: "([^"]+)"', text[2])
  return f"{why} ({own}{f': {deeper[1]}' if deeper and deeper[1] not in own else ''})"


def writing_mirror() -> Path:
  """A folder of this process alone. Those of processes that were killed are removed."""
  place = mirrors.cache_folder() / "writing"
  for path in place.iterdir() if place.is_dir() else ():
    machine, _, rest = path.name.partition("-")
    if still_runs(machine, rest.partition("-")[0]) is False:
      shutil.rmtree(path, ignore_errors=True)
  mirror = place / f"{machine_id()}-{os.getpid()}-{secrets.token_hex(4)}"
  atexit.register(shutil.rmtree, mirror, ignore_errors=True)
  return mirror


def open_url(url: str) -> Any:
  """obstore's client. A server without TLS is talked to where the environment names one."""
  from obstore.store import from_url

  ends = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3")
  plain = any(os.environ.get(k, "").startswith("http:") for k in ends)
  options: Any = {**TIMEOUTS, **({"allow_http": True} if plain else {})}
  return from_url(url, client_options=options, retry_config=RETRIES)


class Bucket:
  """The objects below a URL, by names as a folder's files have them. Safe for threads, not for processes that were
  forked."""

  def __init__(self, url: str):
    try:
      import obstore
      from obstore.exceptions import BaseError
    except ImportError:
      raise UserError(f"{url} needs obstore, which is not installed; run `pip install -e '.[scale]'`") from None
    self.url, self.obstore, self.errors = url, obstore, obstore.exceptions
    self.base_error: type[Exception] = BaseError
    wrong = next((x for x in ("?", "#", "//") if x in url.partition("://")[2]), None)
    if wrong:  # what follows would be dropped, so that two stores were one
      raise UserError(f"{printable(url, 80)}: a URL with '{wrong}' in it is not taken; choose a name without it")
    with self.said():
      self.store = open_url(url)

  @contextlib.contextmanager
  def said(self) -> Iterator[None]:
    """What the store answers as one line. Raises UserError."""
    try:
      yield
    except (self.base_error, OSError) as e:
      raise UserError(f"{self.url}: {reason_of(e, self.url.partition(':')[0])}") from None

  def get(self, name: str) -> bytes | None:
    """None where there is none."""
    with self.said():
      try:
        found = self.obstore.get(self.store, name)
        if found.meta["size"] > LIMIT:
          raise UserError(f"{self.url}/{name} has {found.meta['size']} bytes, more than such a file may have")
        return bytes(found.bytes())
      except FileNotFoundError as e:  # what obstore raises
        if NO_BUCKET in str(e):
          raise UserError(f"{self.url}: there is no such bucket") from None
        return None

  def put(self, name: str, data: bytes) -> None:
    with self.said():
      self.obstore.put(self.store, name, data)

  def create(self, name: str, data: bytes) -> bool:
    """False where it is there already."""
    with self.said():
      try:
        self.obstore.put(self.store, name, data, mode="create")
        return True
      except (self.errors.AlreadyExistsError, self.errors.PreconditionError):
        # a try whose answer was lost may have made it
        return self.get(name) == data

  def remove(self, name: str) -> None:
    with self.said(), contextlib.suppress(FileNotFoundError):
      self.obstore.delete(self.store, name)

  def names(self, prefix: str) -> dict[str, str]:
    """name -> what changes with its content, of all below a prefix, which ends at a slash or is empty."""
    with self.said():
      return {x["path"]: f"{x['e_tag']} {x['size']}" for part in self.obstore.list(self.store, prefix) for x in part}

  def folders(self, prefix: str | None = None) -> list[str]:
    """Names of what would be folders right below a prefix."""
    with self.said():
      return list(self.obstore.list_with_delimiter(self.store, prefix)["common_prefixes"])

  def download(self, name: str, path: Path) -> None:
    """A large object into a file, whole or not at all. Raises UserError."""
    with self.said(), atomic_path(path) as tmp, open(tmp, "wb") as f:
      try:
        for part in self.obstore.get(self.store, name):
          f.write(part)
      except FileNotFoundError:
        raise UserError(f"{self.url}/{name} is gone") from None


class Remote(Bucket):
  """A label store, with its mirror. Processes that were forked read what is in the mirror already."""

  def __init__(self, url: str, writes: bool):
    super().__init__(url)
    self.mirror = writing_mirror() if writes else mirrors.unit("labels", url)
    if not writes:
      mirrors.use(self.mirror, url)
      mirrors.make_room()

  def fetch(self, name: str) -> Path | None:
    """Into the mirror. None where there is none."""
    data = self.get(name)
    if data is None:
      return None
    write_bytes(self.mirror / name, data)
    return self.mirror / name

  def fetch_all(self, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
      list(pool.map(self.fetch, names))

  def send(self, path: Path) -> None:
    """A file of the mirror."""
    self.put(self.name(path), path.read_bytes())

  def name(self, path: Path) -> str:
    return path.relative_to(self.mirror).as_posix()

  def sync(self, group: str) -> dict[str, str]:
    """A group's small files into the mirror, and out of it what is not there any more, or was another version. -> its
    objects, as names() has them."""
    there = self.names(f"{group}/")
    place = self.mirror / group
    try:
      known = read_json(place / TAGS)
      assert isinstance(known, dict)
    except (OSError, ValueError, AssertionError):
      known = {}
    for path in place.rglob("*") if place.is_dir() else ():
      name = self.name(path)
      if path.is_file() and path.name != TAGS and known.get(name) != there.get(name, ""):
        path.unlink(missing_ok=True)
    for name in there:
      if SMALL.fullmatch(name[len(group) + 1 :]) and not (self.mirror / name).exists():
        self.fetch(name)
    if there:
      write_bytes(place / TAGS, json.dumps(there).encode())
    return there

  def groups(self) -> list[str]:
    """Names of all groups, from the index, else from a listing."""
    data = self.get(INDEX)
    if data is not None:
      try:
        found = json.loads(data)["groups"]
        if all(isinstance(g, str) and re.fullmatch(r"[^/.][^/]*/[^/.][^/]*", g) for g in found):
          return sorted(found)
      except (ValueError, KeyError, TypeError, RecursionError):
        pass
      warn(f"{self.url}/{INDEX} is damaged; the store is listed instead")
    with ThreadPoolExecutor(AT_ONCE) as pool:
      below = pool.map(self.folders, (s for s in self.folders() if not s.startswith(".")))
      return sorted(g for some in below for g in some)

  def write_index(self) -> None:
    self.remove(INDEX)
    self.put(INDEX, json.dumps({"groups": self.groups()}).encode())

  # *** claims: as claims.Folder has them ***

  def read(self, name: str) -> bytes | None:
    return self.get(name)

  def rewrite(self, name: str, data: bytes) -> bool:
    self.put(name, data)
    return True
