"""Parts of a data set: reproducible, classes in their shares, what belongs together in one part."""

import itertools
import json

import numpy as np
import pytest
from images_fixture import make, picture, write
from PIL import Image

pytest.importorskip("scipy")

from openpilot.tools.fair.images import twins, validate
from openpilot.tools.fair.images.split import Part, read_split, split, table_lines
from openpilot.tools.fair.images.twins import alike, bits_of, groups_of, is_video, series_of
from openpilot.tools.lib.errors import UserError

PARTS = read_split("train:0.7,val:0.15,test:0.15")


def random_classes(n, shares, seed=0):
  return np.random.default_rng(seed).random((n, len(shares))) < np.array(shares)


def of(part):
  return np.bincount(part, minlength=len(PARTS)) / len(part)


def alone(n):
  return [[i] for i in range(n)]


def test_shares_of_pictures_and_classes():
  n = 1000
  classes = random_classes(n, (0.6, 0.3, 0.1, 0.03))
  part = split(alone(n), [f"{i}.png" for i in range(n)], classes, PARTS, 42, True)
  np.testing.assert_allclose(of(part), (0.7, 0.15, 0.15), atol=0.005)
  for c in range(4):
    has = part[classes[:, c]]
    np.testing.assert_allclose(of(has), (0.7, 0.15, 0.15), atol=max(0.01, 1.5 / len(has)))


def test_a_seed_decides_and_the_order_of_the_data_does_not():
  n = 200
  names, classes = [f"p{i}.png" for i in range(n)], random_classes(n, (0.5, 0.05))
  first = split(alone(n), names, classes, PARTS, 42, True)
  order = np.random.default_rng(1).permutation(n)
  again = split(alone(n), [names[i] for i in order], classes[order], PARTS, 42, True)
  np.testing.assert_array_equal(again, first[order])
  assert (split(alone(n), names, classes, PARTS, 43, True) != first).any()
  # pinned: the same on every machine
  few = split(alone(12), names[:12], classes[:12, :0], PARTS, 42, False)
  assert "".join(map(str, few)) == "000210021000"


@pytest.mark.parametrize("count", [3, 4, 6])
@pytest.mark.parametrize("seed", range(5))
def test_a_rare_class_is_in_each_part(count, seed):
  n = 300
  classes = random_classes(n, (0.5, 0.2, 0.0, 0.0), seed)
  for c in (2, 3):
    classes[np.random.default_rng(seed + c).permutation(n)[:count], c] = True
  part = split(alone(n), [f"{i}" for i in range(n)], classes, PARTS, seed, True)
  for c in range(4):
    assert set(part[classes[:, c]]) == {0, 1, 2}
  np.testing.assert_allclose(of(part), (0.7, 0.15, 0.15), atol=0.01)


def test_many_rare_classes_leave_the_shares_of_pictures():
  """40 classes of four pictures each: those that are moved so that each part has all are made good."""
  n, rng = 200, np.random.default_rng(3)
  classes = np.zeros((n, 40), bool)
  for c in range(40):
    classes[rng.permutation(n)[:4], c] = True
  part = split(alone(n), [str(i) for i in range(n)], classes, PARTS, 42, True)
  assert all(set(part[classes[:, c]]) == {0, 1, 2} for c in range(40))
  np.testing.assert_allclose(of(part), (0.7, 0.15, 0.15), atol=0.01)


def test_a_class_of_fewer_pictures_than_parts_is_said():
  classes = np.zeros((40, 2), bool)
  classes[:, 0] = classes[:2, 1] = True
  part = split(alone(40), [str(i) for i in range(40)], classes, PARTS, 42, True)
  rows, said = table_lines(PARTS, part, classes, ["common", "rare"])
  assert rows[1].split() == ["pictures", "28", "(70%)", "6", "(15%)", "6", "(15%)"]
  assert len(said) == len(set(range(3)) - set(part[:2])) and all("has nothing of rare" in s for s in said)


def test_groups_stay_whole():
  rng = np.random.default_rng(0)
  sizes = rng.integers(1, 12, 60)
  ends = np.cumsum(sizes)
  groups = [list(range(e - s, e)) for s, e in zip(sizes, ends, strict=True)]
  n = int(ends[-1])
  classes = random_classes(n, (0.5, 0.1))
  for stratify in (True, False):
    part = split(groups, [str(i) for i in range(n)], classes, PARTS, 7, stratify)
    assert all(len(set(part[g])) == 1 for g in groups)
    np.testing.assert_allclose(of(part), (0.7, 0.15, 0.15), atol=0.03)


@pytest.mark.parametrize(
  "text, says",
  [
    ("train:0.7,val:0.2", "add up to 0.9"),
    ("train", "NAME:SHARE"),
    ("train:x", "NAME:SHARE"),
    ("train:nan,val:1", "NAME:SHARE"),
    ("train:-1,val:2", "NAME:SHARE"),
    ("../x:0.5,val:0.5", "NAME:SHARE"),
    (":0.5,val:0.5", "NAME:SHARE"),
    ("a:0.5,a:0.5", "twice"),
  ],
)
def test_splits_that_are_none(text, says):
  with pytest.raises(UserError, match=says):
    read_split(text)
  assert read_split("a:1") == (Part("a", 1.0),)


def test_series():
  assert series_of("clip/a_0017.png") == ("clip/a_", 17)
  assert series_of("IMG_3_jpg.rf.0a1b2c3d4e5f.jpg") == series_of("IMG_3_jpg.rf.99aa88bb77cc.jpg") == ("./IMG_", 3)
  assert series_of("left.png") == ("./left", None)
  assert series_of("7.png") == ("./", 7)


def test_frames_and_versions_stay_together():
  names = ["a_1.png", "b_1.png", "a_2.png", "x.png", "y_jpg.rf.00000000.jpg", "y_jpg.rf.11111111.jpg", "s/a_3.png", "z"]
  groups, said = groups_of(names, [None] * 8, [(3, 7)], 5)
  assert sorted(groups) == [[0, 2], [1], [3, 7], [4, 5], [6]] and said == []
  groups, said = groups_of(names, [None] * 8, [], 5, videos=False)
  assert sorted(groups) == [[0], [1], [2], [3], [4, 5], [6], [7]]


def video(n, w=64, h=48):
  """A camera that pans over a wide picture."""
  wide = np.asarray(picture(0, 16 * w, h))
  return [bits_of(Image.fromarray(wide[:, 3 * k : 3 * k + w])) for k in range(n)]


def test_a_series_that_is_too_long_is_taken_in_runs_or_one_by_one():
  names = [f"v{k:04}.png" for k in range(60)]
  groups, (said,) = groups_of(names, video(60), [], 42)
  assert [len(g) for g in groups] == [3] * 20 and all(b == a + 1 for g in groups for a, b in itertools.pairwise(g))
  assert "60 pictures are called 'v' and a number" in said and "in runs of 3 in a row" in said
  photographs = [bits_of(picture(k)) for k in range(60)]
  groups, (said,) = groups_of(names, photographs, [], 42)
  assert groups == alone(60) and "one by one" in said
  assert is_video(video(60)) and not is_video(photographs)


def test_pictures_that_look_alike():
  """Of other sizes, a little brighter, saved with loss; not others, and not those of one color."""
  from io import BytesIO

  a = picture(1, 320, 240)
  lossy = BytesIO()
  a.save(lossy, "JPEG", quality=30)
  brighter = Image.fromarray((np.asarray(a) * 0.9 + 20).astype(np.uint8))
  gray = Image.new("RGB", (64, 48), (90, 90, 90))
  found = [bits_of(x) for x in (picture(2), a, gray, a.resize((100, 75)), Image.open(lossy), brighter, gray)]
  assert found[2] is None and alike(found) == [(1, 3), (1, 4), (1, 5)]


def test_alike_is_a_chain(monkeypatch):
  """Each a few bits from the next, over several blocks; of very many pictures only equal ones."""
  bits = np.zeros((9, 256), np.uint8)
  for k in range(9):
    bits[k, : 6 * k] = 1
  rows: list = [np.packbits(b) for b in bits]
  far = np.packbits(np.ones(256, np.uint8))
  monkeypatch.setattr(twins, "BLOCK", 2)
  assert alike([far, *rows, far]) == [*((1, k) for k in range(2, 10)), (0, 10)]
  monkeypatch.setattr(twins, "ALL_PAIRS", 3)
  assert alike([far, *rows, far]) == [(0, 10)]
  assert alike([None, None]) == []


def test_the_command_keeps_them_together(tmp_path, monkeypatch, capsys):
  names = [f"drive_{v}_{k}.png" for v in range(6) for k in range(3)] + ["m.png", "n.png"]
  coco = make(tmp_path, names)
  picture(18).resize((128, 96)).save(tmp_path / "images/n.png")  # as m, at another size
  where = []
  for seed in (42, 42, 1):
    words = ["--data", write(tmp_path, coco), "--split", "train:0.5,val:0.25,test:0.25", "--stratify"]
    monkeypatch.setattr("sys.argv", ["validate", *map(str, words), "--random-seed", str(seed)])
    validate.main()
    parts = [json.loads((tmp_path / f"{p}.json").read_text()) for p in ("train", "val", "test")]
    part = {i["file_name"]: k for k, p in enumerate(parts) for i in p["images"]}
    assert sorted(part) == sorted(names) and part["m.png"] == part["n.png"]
    for v in range(6):
      assert len({part[f"drive_{v}_{k}.png"] for k in range(3)}) == 1
    for p in parts:
      ids = {i["id"] for i in p["images"]}
      assert ids and {a["image_id"] for a in p["annotations"]} == ids and len(p["categories"]) == 3
    assert sum(len(p["annotations"]) for p in parts) == 40
    where.append(part)
    assert "7 groups of several stay together" in capsys.readouterr().out
  assert where[0] == where[1] != where[2]
