"""A label store from a stranger: what would run code, wait for ever, or fill the memory is one line that names the
file."""

import io
import json
import os
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from label_fixture import write_store

from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.stored import read_table
from openpilot.tools.lib.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  root = tmp_path_factory.mktemp("store") / "s"
  write_store(root, routes=("00000001--aaaaaaaaaa",), n=16)
  return root


@pytest.fixture
def store(whole, tmp_path):
  shutil.copytree(whole, tmp_path / "s")
  return tmp_path / "s"


def group(store):
  return LabelStore(store).groups("simulator")[0]


def path_of(store, name):
  return next(store.glob(f"*/simulator-*/{name}"))


def pipe(path):
  path.unlink()
  os.mkfifo(path)


def zero(path):
  path.unlink()
  path.symlink_to("/dev/zero")


def deep(path):
  path.write_text("[" * 100_000)


def use(store):
  """All that a reader asks of a store."""
  g = group(store)
  g.read("depth", 0, 16)
  g.read("segmentation", 3, 4)
  tables = [g.table(x.name) for x in g.labels if x.kind != "dense"]
  list(g.problems())
  return tables


def test_the_whole_one_is_read(store):
  assert [t.num_rows for t in use(store)] == [16, 64]


@pytest.mark.parametrize("spoil", [pipe, zero, deep])
@pytest.mark.parametrize(
  "name", ["group.json", "frames.parquet", "depth.zarr/zarr.json", "objects/00000.parquet", "depth.zarr/c/0/0/0"]
)
def test_files_that_are_none(store, name, spoil):
  spoil(path_of(store, name))
  with pytest.raises(UserError) as e:
    use(store)
  assert "\n" not in str(e.value) and str(path_of(store, ".").resolve()) in str(e.value)


@pytest.mark.parametrize("spoil", [pipe, zero, deep])
def test_a_commit_that_is_none_is_a_problem(store, spoil):
  spoil(path_of(store, "chunks/00000.json"))
  try:
    problems = list(group(store).problems())
  except UserError as e:
    assert "no ordinary file" in str(e)
  else:
    assert len(problems) == 1 and "is damaged" in problems[0][1]


@pytest.mark.parametrize("name", ["/etc/hostname", "../../../../etc/hostname", "objects/../../x", "x" * 5000])
def test_a_commit_names_no_file_outside(store, name):
  path = path_of(store, "chunks/00000.json")
  path.write_text(json.dumps({"files": {name: "0" * 64}, "bad": []}))
  assert [text for _, text in group(store).problems()] == [f"{path} is damaged"]


@pytest.mark.parametrize(
  ("label", "column", "values"),
  [
    ("objects", "cls", [2**31 - 1]),
    ("objects", "cls", [-1]),
    ("objects", "cls", [2]),
    ("objects", "cls", [0.5]),
    ("objects", "cls", [None]),
    ("objects", "row", [16]),
    ("objects", "row", [2**31 - 1]),
    ("points", "row", [-1]),
  ],
)
def test_classes_and_rows_are_the_groups(store, label, column, values):
  """A class of 2^31 - 1 made 16 GB of counts."""
  path = path_of(store, f"{label}/00000.parquet")
  table = pq.read_table(path)
  k = table.column_names.index(column)
  pq.write_table(table.set_column(k, column, pa.array((values * table.num_rows)[: table.num_rows])), path)
  with pytest.raises(UserError, match=f"{label}/00000.parquet is damaged .*'{column}'"):
    use(store)


@pytest.mark.parametrize("column", ["frame_id", "segment_id", "timestamp_eof"])
@pytest.mark.parametrize("spoil", ["gone", "texts"])
def test_frames_have_numbers(store, column, spoil):
  path = path_of(store, "frames.parquet")
  table = pq.read_table(path)
  texts = pa.array(["x"] * table.num_rows)
  table = (
    table.drop_columns([column])
    if spoil == "gone"
    else table.set_column(table.column_names.index(column), column, texts)
  )
  pq.write_table(table, path)
  with pytest.raises(UserError, match=f"no group of labels.*'{column}'"):
    use(store)


def test_a_table_without_rows_numbers(store):
  path = path_of(store, "objects/00000.parquet")
  pq.write_table(pq.read_table(path).drop_columns(["row"]), path)
  with pytest.raises(UserError, match=r"objects/00000\.parquet is damaged .*no column 'row'"):
    use(store)


@pytest.mark.parametrize("version", ["2\n", "x" * 5000, [], 2])
def test_a_version_is_told_in_a_line(store, version):
  (store / "store.json").write_text(json.dumps({"version": version}))
  with pytest.raises(UserError, match="label store of version") as e:
    use(store)
  assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_a_short_table_that_is_long_when_written_out(tmp_path):
  indices = pa.array(np.zeros(100_000, np.int32))
  table = pa.table({"row": np.zeros(1000, np.int32), "rle": pa.array(["x" * 1000] * 1000)})
  pq.write_table(table, tmp_path / "honest.parquet", compression="zstd")
  assert read_table(tmp_path / "honest.parquet").equals(table)
  dictionary = pa.DictionaryArray.from_arrays(indices, pa.array(["x" * 1_000_000]))
  pq.write_table(
    pa.table({"rle": dictionary}), tmp_path / "bomb.parquet", compression="zstd", store_schema=False
  )  # 100 GB of text
  assert os.path.getsize(tmp_path / "bomb.parquet") < 200_000
  with pytest.raises(ValueError, match=r"too long|are more than"):
    read_table(tmp_path / "bomb.parquet")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("shape", [16, 64, 4096]),
    ("shape", [10**9, 64, 128]),
    ("data_type", "float64"),
    ("zarr_format", 2),
    ("codecs", []),
    ("chunk_grid", {"name": "regular", "configuration": {"chunk_shape": [10**6, 64, 128]}}),
  ],
)
def test_arrays_are_what_the_group_says(store, key, value):
  path = path_of(store, "depth.zarr/zarr.json")
  path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
  with pytest.raises(UserError, match=r"depth\.zarr.* is damaged"):
    use(store)


def test_format_2_with_a_pickle_is_not_opened(store, tmp_path):
  """Old numcodecs run what a version 2 array names as its filter."""
  path = path_of(store, "depth.zarr/zarr.json").parent
  shutil.rmtree(path)
  path.mkdir()
  about = {
    "zarr_format": 2,
    "shape": [16, 64, 128],
    "chunks": [16, 64, 128],
    "dtype": "<f2",
    "compressor": None,
    "fill_value": 0,
    "order": "C",
    "filters": [{"id": "pickle", "protocol": 5}],
  }
  (path / ".zarray").write_text(json.dumps(about))
  (path / "0.0.0").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
  with pytest.raises(UserError, match=r"depth\.zarr.* is damaged"):
    use(store)
  assert not (tmp_path / "ran").exists()
  assert zarr.__version__ >= "3"


def test_a_state_that_claims_34_gigabytes(store):
  header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (8500000000,), }\n"
  data = io.BytesIO()
  with zipfile.ZipFile(data, "w") as z:
    z.writestr("memory.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
  path_of(store, "chunks/00000.json").with_suffix(".npz").write_bytes(data.getvalue())
  with pytest.raises(UserError, match=r"00000\.npz is damaged \(it holds arrays of over"):
    group(store).state(0)


@pytest.mark.parametrize(
  "change",
  [
    {"labels": [{"name": "depth", "kind": "dense", "dtype": "O", "shape": [1], "unit": "", "classes": []}]},
    {
      "labels": [
        {"name": "depth", "kind": "dense", "dtype": "float16", "shape": [10**9, 10**9], "unit": "", "classes": []}
      ]
    },
    {"labels": [{"name": "../x", "kind": "dense", "dtype": "uint8", "shape": [1], "unit": "", "classes": []}]},
    {"labels": [{"name": "depth"}]},
    {"labels": 5},
    {"teacher": []},
    {"view": {"name": "nose"}},
    {"view": {"name": "medmodel", "width": 0, "height": 256}},
    {"camera": {"width": "x"}},
  ],
)
def test_a_group_that_garbles_itself(store, change):
  path = path_of(store, "group.json")
  path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
  with pytest.raises(UserError) as e:
    use(store)
  assert "\n" not in str(e.value)
