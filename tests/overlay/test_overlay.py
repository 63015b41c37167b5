"""tools/install on openpilot checkouts in small: what it lays, that it does so once, what it refuses, and that all of
it goes again."""

import ast
import json
import re
import shutil
import subprocess
import sys

import pytest

from openpilot.cereal.services import SERVICE_LIST
from openpilot.tools.install import edits, overlay, plan
from openpilot.tools.install.blocks import BEGIN
from small_tree import SELFDRIVED, files, git, make, write

SCHEMA = """
import capnp, json, sys
event = capnp.load(sys.argv[1]).Event.schema.fields
ours = {n: f for n, f in event.items() if n.startswith(("fair", "custom"))}
print(json.dumps({n: [f.proto.ordinal.explicit, f.schema.node.id] for n, f in ours.items()}))
"""
LAYOUTS = {
  "2025-03": (False, False, False),
  "2025-08": (False, True, False),
  "2026-06": (False, True, True),
  "2026-08": (True, True, True),
}


@pytest.fixture(autouse=True)
def small_folder(monkeypatch, tmp_path_factory):
  """A folder and bundles of a few files in the place of ours: the tests need not copy networks."""
  here = tmp_path_factory.mktemp("here")
  write(
    here / "selfdrive/modeld/fair",
    {"fairmodeld.py": "#!/usr/bin/env python3\n", "heads/depth.py": "import numpy\n", "__pycache__/x.pyc": "no"},
  )
  for name in (plan.DEFAULT, "other"):
    write(
      here / "models" / name,
      {
        "manifest.json": name,
        "net.onnx": "network of " + name,
        "compiled/net.pkl": "no",
        "notes.txt": "not of the manifest",
      },
    )

  class Bundle:
    def __init__(self, path):
      if not (path / "manifest.json").is_file():
        raise plan.BundleError(f"no bundle at {path}")
      if (path / "net.onnx").read_text() != "network of " + (path / "manifest.json").read_text():
        raise plan.BundleError(f"{path / 'net.onnx'} was changed")
      self.path, self.manifest = path, {"sha256": {"net.onnx": ""}}

  monkeypatch.setattr(plan, "load_bundle", Bundle)
  monkeypatch.setattr(plan, "HERE", here)
  return here


@pytest.fixture(params=LAYOUTS)
def tree(request, tmp_path):
  return make(tmp_path / "tree", *LAYOUTS[request.param])


@pytest.fixture
def nested(tmp_path):
  return make(tmp_path / "tree")


def run(monkeypatch, capsys, *args):
  """(exit code, what it says)"""
  monkeypatch.setattr("sys.argv", ["overlay", *map(str, args)])
  rc = overlay.cli(overlay.main)()
  out, err = capsys.readouterr()
  assert not err or (rc == 2 and err.count("\n") == 1 and err.startswith("error: "))
  return rc, out + err


@pytest.fixture
def op(monkeypatch, capsys):
  return lambda *args: run(monkeypatch, capsys, *args)


def contents(root):
  files = [p for p in root.rglob("*") if p.is_file() and ".git" not in p.relative_to(root).parts]
  return {p.relative_to(root).as_posix(): (p.read_bytes(), p.stat().st_mode) for p in files}


def package(tree):
  return "openpilot/" if (tree / "openpilot/cereal").is_dir() else ""


def test_laid_once_and_taken_out_to_the_byte(tree, op):
  before, p = contents(tree), package(tree)
  rc, said = op(tree, "--check")
  assert rc == 1 and f"would edit: {p}cereal/log.capnp" in said and contents(tree) == before
  rc, said = op(tree)
  assert rc == 0 and ("nested" if p else "root") in said
  laid = contents(tree)
  assert f"{p}selfdrive/modeld/fair/heads/depth.py" in laid and f"{p}models/{plan.DEFAULT}/net.onnx" in laid
  assert laid[f"{p}selfdrive/modeld/fair/fairmodeld.py"][1] & 0o111, (
    "a script with a shebang must be executable: the tree's lint says so"
  )
  assert not [n for n in laid if "compiled" in n or "__pycache__" in n or "notes" in n]
  assert {n for n in laid if n in before and laid[n] != before[n]} == {
    e.name for e in edits.file_edits(plan.Layout(tree, p))
  }
  for args in ((), ("--check",)):
    rc, said = op(tree, *args)
    assert rc == 0 and "nothing to do" in said and contents(tree) == laid
  assert git(tree, "check-ignore", "-v", f"{p}selfdrive/modeld/fair/built/x.json")
  assert "unset" in git(tree, "check-attr", "filter", f"{p}models/{plan.DEFAULT}/net.onnx")
  rc, said = op(tree, "--uninstall", "--check")
  assert rc == 1 and contents(tree) == laid
  assert op(tree, "--uninstall")[0] == 0
  assert contents(tree) == before and git(tree, "status", "--porcelain") == ""
  rc, said = op(tree, "--uninstall")
  assert rc == 0 and "nothing is installed" in said


def test_schema_and_services_of_what_was_laid(tree, op):
  op(tree)
  p = package(tree)
  r = subprocess.run(
    [sys.executable, "-c", SCHEMA, tree / p / "cereal/log.capnp"], capture_output=True, text=True, check=True
  )
  fields = json.loads(r.stdout)
  for slot in edits.slots():
    assert fields[slot.field] == [slot.ordinal, int(slot.id, 16)]
  assert {f"customReserved{n}" for n in range(10, 20)} - set(fields) == {
    f"customReserved{s.number}" for s in edits.slots()
  }
  names: dict = {}
  exec(compile((tree / p / "cereal/services.py").read_text(), "services.py", "exec"), names)
  for name in edits.SERVICES:
    theirs, ours = names["SERVICE_LIST"][name], SERVICE_LIST[name]
    assert (theirs.should_log, theirs.frequency, theirs.decimation) == (
      ours.should_log,
      ours.frequency,
      ours.decimation,
    )
    if "QueueSize" in names:
      assert (theirs.queue_size or names["QueueSize"].SMALL) == ours.queue_size
    else:
      assert theirs.queue_size is None
  keys = (tree / p / "common/params_keys.h").read_text()
  assert (
    '{"FairEnabled", {PERSISTENT, BOOL}},' if "ParamKeyAttributes" in keys else '{"FairEnabled", PERSISTENT},'
  ) in keys
  replay = (tree / p / "selfdrive/test/process_replay/process_replay.py").read_text()
  assert ("main_pub_drained=False" in replay) == (not p) and (
    '"narrowRoadCameraState"]' if p else '"roadCameraState"]'
  ) in replay
  player = (tree / p / "tools/replay/replay.cc").read_text()
  assert re.search(
    r'"userBookmark"\}\);\n +// begin .*\n    block\.insert\(block\.end\(\), \{"fairState", .*\}\);\n', player
  )
  for path in tree.rglob("*.py"):
    ast.parse(path.read_text())


def test_the_event_leaves_ours_out(nested, op):
  op(nested)
  names: dict = {}
  exec((nested / "openpilot/selfdrive/selfdrived/selfdrived.py").read_text(), names)

  class P:
    def __init__(self, name):
      self.name, self.running, self.shouldBeRunning = name, False, True

  class State:
    recv_frame = {"managerState": 1}
    processes: list = []

    def __getitem__(self, name):
      return self

  for dead, raised in (([*edits.PROCESSES], False), (["fairmodeld", "radard"], True), ([], False)):
    d = names["SelfdriveD"]()
    d.sm, d.events = State(), []
    d.sm.processes = [P(n) for n in dead]
    d.update_events()
    assert bool(d.events) == raised


def test_after_a_merge_it_is_out_of_date_and_mended(nested, op):
  """Upstream changes lines around ours; then ours change too."""
  op(nested)
  git(nested, "add", "--all")
  git(nested, "commit", "--quiet", "--message=overlay")
  git(nested, "checkout", "--quiet", "-b", "upstream", "HEAD~")
  services, log = nested / "openpilot/cereal/services.py", nested / "openpilot/cereal/log.capnp"
  services.write_text(
    services.read_text().replace('  "narrowRoadCameraState": (True, 20., 20),\n', '  "newService": (True, 20., 20),\n')
  )
  log.write_text(log.read_text().replace("    model @9 :UInt8;", "    model @9 :UInt16;"))
  git(nested, "commit", "--quiet", "--all", "--message=upstream goes on")
  git(nested, "checkout", "--quiet", "master")
  git(nested, "merge", "--quiet", "upstream")
  rc, said = op(nested, "--check")  # narrowRoadCameraState is gone: process_replay's entry is another
  assert (
    rc == 1
    and "out of date" in said
    and "would edit: openpilot/selfdrive/test/process_replay/process_replay.py" in said
    and "services.py" not in said
  )
  assert op(nested)[0] == 0 and op(nested, "--check")[0] == 0
  assert '"roadCameraState"],' in (nested / "openpilot/selfdrive/test/process_replay/process_replay.py").read_text()
  git(nested, "add", "--all")
  git(nested, "commit", "--quiet", "--message=overlay again")
  assert op(nested, "--uninstall")[0] == 0
  git(nested, "add", "--all")
  assert git(nested, "diff", "--cached", "upstream") == ""


def test_upstream_moved_its_code(tmp_path, op):
  """June 2026: all of it goes into openpilot/; a merge takes the edits along, but not our folders."""
  tree = make(tmp_path / "tree", False, True, True)
  op(tree, "--bundle", "other")
  (tree / "openpilot").mkdir()
  for name in ("cereal", "common", "system", "tools"):
    git(tree, "mv", name, "openpilot")
  git(tree, "add", "--all")
  for name in ("selfdrive/selfdrived", "selfdrive/test", "selfdrive/modeld/modeld.py"):
    (tree / "openpilot" / name).parent.mkdir(parents=True, exist_ok=True)
    git(tree, "mv", name, f"openpilot/{name}")
  write(tree, {"SConstruct": (tree / "SConstruct").read_text().replace("'selfdrive/", "'openpilot/selfdrive/")})
  git(tree, "add", "--all")
  git(tree, "commit", "--quiet", "--message=merged")
  assert op(tree, "--check")[0] == 1
  rc, said = op(tree)
  assert rc == 0 and "nested" in said
  assert (
    not (tree / "selfdrive").exists()
    and not (tree / "models").exists()
    and (tree / "openpilot/models/other/net.onnx").is_file()
  )
  assert op(tree, "--check")[0] == 0
  git(tree, "add", "--all")
  git(tree, "commit", "--quiet", "--message=overlay again")
  assert op(tree, "--uninstall")[0] == 0
  left = contents(tree)
  assert not [n for n in left if "fair" in n or "models" in n] and BEGIN.encode() not in b"".join(
    d for d, _ in left.values()
  )


def test_a_newer_folder_takes_the_older_ones_place(nested, op, small_folder):
  op(nested, "--bundle", "other", "--bundle", plan.DEFAULT)
  (small_folder / "selfdrive/modeld/fair/heads/depth.py").unlink()
  (small_folder / "selfdrive/modeld/fair/fairmodeld.py").write_text("#!/usr/bin/env python3\n# newer\n")
  rc, said = op(nested, "--check")
  assert rc == 1 and "out of date" in said
  assert op(nested)[0] == 0
  fair = nested / "openpilot/selfdrive/modeld/fair"
  assert not (fair / "heads").exists() and "newer" in (fair / "fairmodeld.py").read_text()
  assert (nested / "openpilot/models/other/net.onnx").is_file(), "bundles that are laid stay"
  assert op(nested, "--bundle", "other")[0] == 0
  assert sorted(p.name for p in (nested / "openpilot/models").iterdir()) == ["other"]


def refused(op, tree, words, *args):
  before = contents(tree)
  rc, said = op(tree, *args)
  assert rc == 2 and words in said, said
  assert contents(tree) == before


def texts(**layout):
  return {n.rsplit("/", 1)[-1]: t for n, t in files(**{"nested": True, "typed": True, "queues": True} | layout).items()}


def test_a_slot_in_use(tmp_path, op):
  log, custom, slot = texts()["log.capnp"], texts()["custom.capnp"], edits.slots()[0]
  n = slot.number
  taken = log.replace(
    f"customReserved{n} @{slot.ordinal} :Custom.CustomReserved{n}", f"laneCenter @{slot.ordinal} :Custom.LaneCenter"
  )
  struct = custom.replace(
    f"struct CustomReserved{n} @{slot.id} {{", f"struct LaneCenter @{slot.id} {{\n  y @0 :Float32;"
  )
  refused(op, make(tmp_path / "a", cereal_log_capnp=taken), f"log.capnp: slot @{slot.ordinal} is in use: laneCenter")
  refused(op, make(tmp_path / "b", custom_capnp=struct), "custom.capnp: slot")
  filled = custom.replace(
    f"struct CustomReserved{n} @{slot.id} {{", f"struct CustomReserved{n} @{slot.id} {{\n  y @0 :Float32;"
  )
  refused(op, make(tmp_path / "c", custom_capnp=filled), "with fields")


def test_what_others_use_stays(tmp_path, op):
  """sunnypilot's AssistedDrivingMilestoneState stands in CustomReserved10, which is none of ours."""
  assert min(s.ordinal for s in edits.slots()) > 136 or pytest.skip("the slots are still the lower ones")
  log = texts()["log.capnp"].replace(
    "customReserved10 @136 :Custom.CustomReserved10", "milestone @136 :Custom.Milestone"
  )
  custom = texts()["custom.capnp"].replace(
    f"struct CustomReserved10 @{'0xcb9fd56c7057593a'} {{", "struct Milestone @0xcb9fd56c7057593a {\n  km @0 :Float32;"
  )
  tree = make(tmp_path / "a", cereal_log_capnp=log, custom_capnp=custom)
  assert op(tree)[0] == 0
  assert "milestone @136 :Custom.Milestone;" in (tree / "openpilot/cereal/log.capnp").read_text()


def test_trees_that_are_too_old_or_none(tmp_path, op):
  log = "\n".join(line for line in texts()["log.capnp"].split("\n") if "customReserved1" not in line)
  refused(op, make(tmp_path / "old", cereal_log_capnp=log), "2025-01-18")
  (tmp_path / "empty").mkdir()
  refused(op, tmp_path / "empty", "is no openpilot checkout")
  refused(op, tmp_path / "nowhere", "is no folder")
  no_git = make(tmp_path / "no_git")
  shutil.rmtree(no_git / ".git")
  refused(op, no_git, "is no git checkout")
  inside = make(tmp_path / "outer") / "inside"
  write(inside, files(True, True, True))
  refused(op, inside, "lies inside the git checkout")
  bare = tmp_path / "bare"
  write(bare, files(True, True, True))
  git_init = git(bare.parent, "init", "--quiet", str(bare))
  assert git_init == ""
  refused(op, bare, "nothing is committed")


def test_a_place_that_is_not_there_is_named(tmp_path, op):
  refused(
    op,
    make(tmp_path / "a", selfdrived_py=SELFDRIVED.replace("not_running = {", "stopped = {")),
    "selfdrived.py: did not find not_running = {",
  )
  refused(
    op, make(tmp_path / "b", process_config_py="procs = list_of()\n"), "process_config.py: did not find procs = ["
  )
  refused(op, make(tmp_path / "c", params_keys_h=None), "params.cc is missing")
  tree = make(tmp_path / "d", test_onroad_py="PROCS = {\n}\n", lint_sh=None)  # what only tests and tools need
  rc, said = op(tree)
  assert (
    rc == 0
    and "note: openpilot/selfdrive/test/test_onroad.py: did not find MAX_TOTAL_CPU" in said
    and "note: scripts/lint/lint.sh is not there" in said
  )


def test_other_places_of_the_same_files(tmp_path, op):
  """Keys in params.cc, processes in selfdrive/manager, no lint and no LFS."""
  tree = make(tmp_path / "tree", False, False, False, lint_sh=None, gitattributes="* text=auto\n", gitignore=None)
  (tree / "selfdrive/manager").mkdir()
  git(tree, "mv", "common/params_keys.h", "common/params.cc")
  git(tree, "mv", "system/manager/process_config.py", "selfdrive/manager/process_config.py")
  git(tree, "commit", "--quiet", "--message=older")
  before = contents(tree)
  rc, said = op(tree)
  assert rc == 0 and said.count("note: ") == 2 and "note: .gitattributes: did not find *.onnx filter=lfs" in said
  assert (
    '"FairEnabled"' in (tree / "common/params.cc").read_text()
    and '"fairmodeld"' in (tree / "selfdrive/manager/process_config.py").read_text()
  )
  assert (tree / ".gitignore").read_text().count("\n") == 3
  assert op(tree, "--check")[0] == 0 and op(tree, "--uninstall")[0] == 0 and contents(tree) == before


def test_a_last_entry_without_a_comma_and_tables_of_one_line(tmp_path, op):
  """The comma is added, and goes again with the block; what cannot be edited line by line is named."""
  processes = texts()["process_config.py"].replace(
    '["./bridge"], only_onroad),\n]', '["./bridge"], only_onroad)  # no comma\n  # the end\n]'
  )
  tree = make(tmp_path / "a", process_config_py=processes)
  assert op(tree)[0] == 0
  laid = (tree / "openpilot/system/manager/process_config.py").read_text()
  assert '["./bridge"], only_onroad),  # no comma' in laid
  ast.parse(laid)
  assert op(tree, "--uninstall")[0] == 0 and git(tree, "status", "--porcelain") == ""
  refused(
    op, make(tmp_path / "b", process_config_py="procs = [\n  1, 2]\n"), "closed by a bracket on a line of its own"
  )
  refused(
    op, make(tmp_path / "c", process_config_py="procs = [\n  1, 2\n"), "did not find the end of what begins in line 1"
  )


def test_changes_that_are_not_committed(nested, op):
  services = nested / "openpilot/cereal/services.py"
  was = services.read_text()
  services.write_text(was.replace("20., 20", "20., 10"))
  refused(op, nested, "services.py has changes that are not committed")
  services.write_text(was)
  (nested / "README.md").write_text("other files may have some")
  assert op(nested)[0] == 0
  services.write_text(services.read_text().replace("20., 20", "20., 10"))
  refused(op, nested, "services.py has changes that are not committed")
  refused(op, nested, "services.py has changes that are not committed", "--uninstall")


def test_our_files_that_were_changed_there(nested, op, small_folder):
  op(nested)
  file = nested / "openpilot/selfdrive/modeld/fair/heads/depth.py"
  file.write_text("mine\n")
  refused(op, nested, "heads/depth.py was changed since it was installed")
  refused(op, nested, "heads/depth.py was changed since it was installed", "--uninstall")
  git(nested, "add", "--all")
  git(nested, "commit", "--quiet", "--message=mine")
  assert op(nested)[0] == 0 and file.read_text() == "import numpy\n"
  mine = file.with_name("mine.py")
  mine.write_text("not the overlay's\n")
  assert op(nested, "--uninstall")[0] == 0 and mine.is_file() and not file.exists()


@pytest.mark.parametrize("k", [1, 4, 15, 18])
def test_killed_in_the_middle(nested, op, k):
  """What is there then can be taken out, and can be finished."""
  before = contents(nested)
  for again in ("--uninstall", "--check"):
    made = plan.plan_overlay(plan.Layout(nested, "openpilot/"))
    made.changes = made.changes[:k]
    plan.carry_out(made)
    if again == "--uninstall":
      assert op(nested, again)[0] == 0 and contents(nested) == before and git(nested, "status", "--porcelain") == ""
    else:
      assert op(nested)[0] == 0 and op(nested, again)[0] == 0


def test_without_its_list(nested, op):
  op(nested)
  (nested / "openpilot/selfdrive/modeld/fair/overlay.json").unlink()
  refused(op, nested, "overlay.json is gone", "--uninstall")
  assert op(nested)[0] == 0 and op(nested, "--uninstall")[0] == 0 and git(nested, "status", "--porcelain") == ""


def test_laid_by_hand_before(tmp_path, op):
  log = texts()["log.capnp"].replace(
    "customReserved10 @136 :Custom.CustomReserved10", "fairState @136 :Custom.FairState"
  )
  refused(op, make(tmp_path / "a", cereal_log_capnp=log), "fairState is there already")
  keys = texts()["params_keys.h"].replace('"Version"', '"FairEnabled"')
  refused(op, make(tmp_path / "b", params_keys_h=keys), "FairEnabled is there already")


def test_something_else_in_our_place(nested, op):
  write(nested, {"openpilot/selfdrive/modeld/fair/fairmodeld.py": "another project\n"})
  refused(op, nested, "is there already and is not the overlay's")


def test_bundles_that_cannot_be_laid(nested, op, small_folder):
  refused(op, nested, "--bundle nowhere: no bundle", "--bundle", "nowhere")
  refused(op, nested, "is chosen already", "--bundle", "other", "--bundle", "other")
  (small_folder / "models/other/net.onnx").write_text("cut sho")
  refused(op, nested, "was changed", "--bundle", "other")


def test_a_bundle_of_ones_own(nested, op, tmp_path, small_folder):
  shutil.copytree(small_folder / "models/other", tmp_path / "own")
  assert op(nested, "--bundle", tmp_path / "own")[0] == 0
  assert (nested / "openpilot/models/own/net.onnx").is_file()
  shutil.rmtree(tmp_path / "own")
  assert op(nested)[0] == 0 and (nested / "openpilot/models/own/net.onnx").is_file()


def test_links_out_of_the_tree(nested, op, tmp_path):
  away = tmp_path / "away"
  away.mkdir()
  (nested / "openpilot/models").symlink_to(away)
  refused(op, nested, "is a link")
  (nested / "openpilot/models").unlink()
  services = nested / "openpilot/cereal/services.py"
  services.rename(away / "services.py")
  services.symlink_to(away / "services.py")
  refused(op, nested, "services.py is a link")
  assert BEGIN not in (away / "services.py").read_text()


def test_a_list_that_names_files_elsewhere(nested, op, tmp_path):
  op(nested)
  path, victim = nested / "openpilot/selfdrive/modeld/fair/overlay.json", tmp_path / "victim"
  victim.write_text("x")
  good = path.read_text()
  for name in (
    "openpilot/models/../../../victim",
    str(victim),
    "openpilot/selfdrive/modeld/modeld.py",
    "openpilot/models/x\nSConstruct",
  ):
    said = json.loads(good)
    said["files"][name] = plan.sha(b"" if name.endswith("modeld.py") else b"x")
    path.write_text(json.dumps(said))
    rc, out = op(nested, "--uninstall")
    assert rc == 2 and victim.exists() and (nested / "openpilot/selfdrive/modeld/modeld.py").exists(), out
  path.write_text('{"files": 7}')
  refused(op, nested, "is not the overlay's list", "--uninstall")


def test_marks_that_do_not_pair_up(nested, op):
  op(nested)
  services = nested / "openpilot/cereal/services.py"
  services.write_text(services.read_text().replace("  # end openpilot-fair\n", ""))
  refused(op, nested, "begins that does not end")


def test_ignored_files_are_not_laid(tmp_path, op):
  refused(op, make(tmp_path / "a", gitignore="models/\n"), "ignored by the checkout's .gitignore")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_puts_all_back(nested, op, monkeypatch, failure):
  before, count, real = contents(nested), [0], plan.write_atomic

  def fails(path, data, mode=0o644):
    count[0] += 1
    if count[0] == 12:
      raise failure
    real(path, data, mode)

  monkeypatch.setattr(plan, "write_atomic", fails)
  if isinstance(failure, OSError):
    rc, said = op(nested)
    assert rc == 2 and "No space left on device; everything was restored" in said
  else:
    monkeypatch.setattr("sys.argv", ["overlay", str(nested)])
    assert overlay.cli(overlay.main)() == 130
  assert count[0] >= 12 and contents(nested) == before and git(nested, "status", "--porcelain") == ""


def test_what_cannot_be_put_back_is_named(nested, op, monkeypatch):
  before, count, real = contents(nested), [0], plan.write_atomic

  def fails(path, data, mode=0o644):
    count[0] += 1
    if count[0] >= 4:  # the disk stays full: what is new goes, what was edited stays edited
      raise OSError(28, "No space left on device")
    real(path, data, mode)

  monkeypatch.setattr(plan, "write_atomic", fails)
  rc, said = op(nested)
  assert rc == 2 and "could not be restored, take them from git: " in said
  named = said.strip().split("from git: ")[1].split(", ")
  assert len(named) == 2 and {n for n, d in contents(nested).items() if d != before.get(n)} == set(named)


def test_what_was_built_goes_too(nested, op):
  op(nested)
  fair = "openpilot/selfdrive/modeld/fair"
  built = [
    f"openpilot/models/{plan.DEFAULT}/compiled/net.json",
    f"{fair}/built/net.json",
    f"{fair}/heads/__pycache__/depth.pyc",
  ]
  write(nested, dict.fromkeys(built, ""))
  assert op(nested, "--uninstall")[0] == 0
  assert git(nested, "status", "--porcelain", "--ignored") == ""
