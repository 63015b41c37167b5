"""What labeling does around the network: threads that make their own batches, color from the decoder's planes, and a
graph without the classes of no road."""

import queue
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from openpilot.tools.fair.labels.canvas import Canvas
from openpilot.tools.fair.labels.pipeline import Item, Work, ahead, clip_of, load, prefetch
from openpilot.tools.fair.labels.views import SegmentView, ViewWarp
from openpilot.tools.fair.onnx.graph import yolox_classes
from openpilot.tools.lib.onnx_batch import free_batch


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_order_is_kept_and_no_thread_stays(threads):
  before = threading.active_count()
  uneven = [0.01, 0, 0.02, 0, 0, 0.005] * 5

  def slowly(i):
    time.sleep(uneven[i])
    return i * 10

  assert list(ahead(slowly, range(30), threads)) == [(i, i * 10) for i in range(30)]
  assert list(ahead(slowly, [], threads)) == []
  assert threading.active_count() <= before  # those of other tests may end meanwhile


def test_what_is_made_ahead_is_bounded_and_stops_with_its_user():
  before, made = threading.active_count(), []
  results = ahead(lambda i: i, (made.append(i) or i for i in range(1000)), 2)
  assert next(results) == (0, 0)
  time.sleep(0.1)
  assert len(made) <= 6
  results.close()
  assert threading.active_count() <= before  # those of other tests may end meanwhile


@pytest.mark.parametrize("where", ["source", "function"])
def test_errors_come_up_in_their_place(where):
  before, seen = threading.active_count(), []

  def source():
    for i in range(20):
      if where == "source" and i == 7:
        raise ValueError("the seventh")
      yield i

  def function(i):
    if where == "function" and i == 7:
      raise ValueError("the seventh")
    return i

  with pytest.raises(ValueError, match="the seventh"):
    for i, _ in ahead(function, source(), 3):
      seen.append(i)
  assert seen == list(range(7)) and threading.active_count() <= before


@pytest.mark.parametrize("focal, shrink", [(720, 1), (1500, 2), (2400, 3)])
def test_planes_give_what_pairs_gave(focal, shrink):
  """Bit for bit what sampling NV12's color in pairs gives, which is how labels have been made."""
  w, h = 526, 330
  view = SegmentView(
    None,
    "road",
    w,
    h,
    np.array([[focal, 0, w / 2], [0, focal, h / 2], [0, 0, 1.0]]),
    np.array([0.01, 0.05, -0.03]),
    True,
    [],
    "",
  )
  warp = ViewWarp(view, width=416, height=208)
  assert warp.shrink == shrink
  wide = np.random.default_rng(0).integers(
    0, 256, (h * 3 // 2, w + 50), dtype=np.uint8
  )  # a decoder's lines are longer than its picture
  y, u, v = wide[:h, :w], wide[h:, : w // 2], wide[h:, w // 2 : w]
  pairs = np.ascontiguousarray(np.stack([u, v], axis=2))
  sizes = [
    (p.shape[0] // shrink, p.shape[1] // shrink) for p in (y, pairs)
  ]  # what is over at the right and below is left out: by exactly `shrink`
  cut = [p[: a * shrink, : b * shrink] for p, (a, b) in zip((y, pairs), sizes, strict=True)]
  small = (
    [cv2.resize(p, (b, a), interpolation=cv2.INTER_AREA) for p, (a, b) in zip(cut, sizes, strict=True)]
    if shrink > 1
    else [y, pairs]
  )
  m = warp.maps
  luma, color = (
    cv2.remap(p, *x, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for p, x in zip(small, m, strict=True)
  )
  wanted = cv2.cvtColor(np.concatenate([luma, color.reshape(104, 416)]), cv2.COLOR_YUV2RGB_NV12)
  assert (warp.rgb_of((y, u, v)) == wanted).all()
  assert (warp.rgb(np.concatenate([y, pairs.reshape(h // 2, w)])) == wanted).all()


def yolox_tail(classes=20, sizes=((6, 8), (3, 4)), shared=False):
  """The end of a YOLOX of two grids, for one image."""
  r, nodes, constants, flat = np.random.default_rng(0), [], [], []

  def constant(name, value):
    if name not in [c.name for c in constants]:
      constants.append(numpy_helper.from_array(value, name))
    return name

  def conv(x, name, out):
    w, b = (
      constant(name + "w", r.normal(0, 1, (out, 16, 1, 1)).astype(np.float32)),
      constant(name + "b", r.normal(0, 1, out).astype(np.float32)),
    )
    nodes.append(helper.make_node("Conv", [x, w, b], [f"{name}{x}"], kernel_shape=[1, 1], group=1))
    return f"{name}{x}"

  for k, _ in enumerate(sizes):
    head = "" if shared else str(k)
    box, thing, kind = conv(f"x{k}", f"box{k}", 4), conv(f"x{k}", f"obj{k}", 1), conv(f"x{k}", f"cls{head}", classes)
    nodes.append(helper.make_node("Sigmoid", [thing], [f"o{k}"]))
    nodes.append(helper.make_node("Sigmoid", [kind], [f"c{k}"]))
    nodes.append(helper.make_node("Concat", [box, f"o{k}", f"c{k}"], [f"all{k}"], axis=1))
    nodes.append(
      helper.make_node(
        "Reshape", [f"all{k}", constant(f"s{k}", np.array([1, 5 + classes, -1], np.int64))], [f"flat{k}"]
      )
    )
    flat.append(f"flat{k}")
  nodes += [
    helper.make_node("Concat", flat, ["cat"], axis=2),
    helper.make_node("Transpose", ["cat"], ["output"], perm=[0, 2, 1]),
  ]
  inputs = [helper.make_tensor_value_info(f"x{k}", onnx.TensorProto.FLOAT, (1, 16, *s)) for k, s in enumerate(sizes)]
  n = sum(a * b for a, b in sizes)
  out = helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, (1, n, 5 + classes))
  graph = helper.make_graph(nodes, "tail", inputs, [out], constants)
  return free_batch(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def results(model, inputs):
  return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def test_classes_that_are_left_out_change_no_other():
  model = yolox_tail()
  r = np.random.default_rng(1)
  inputs = {
    "x0": r.normal(0, 1, (3, 16, 6, 8)).astype(np.float32),
    "x1": r.normal(0, 1, (3, 16, 3, 4)).astype(np.float32),
  }
  before, keep = results(model, inputs), [7, 0, 2, 19]
  assert yolox_classes(model, "output", keep)
  after = results(model, inputs)
  assert (
    after.shape == (3, 60, 9) and after.tobytes() == before[:, :, [0, 1, 2, 3, 4, *(5 + k for k in keep)]].tobytes()
  )


@pytest.mark.parametrize("model, classes", [(yolox_tail(shared=True), [0, 1]), (yolox_tail(), [0, 20])])
def test_a_graph_of_another_kind_is_left_alone(model, classes):
  before = model.SerializeToString()
  assert not yolox_classes(model, "output", classes) and not yolox_classes(model, "cat", classes)
  assert model.SerializeToString() == before


def test_the_real_network_says_the_same_of_the_road(shared_data):
  path = shared_data / "weights/yolox_nano.onnx"
  if not path.exists():
    pytest.skip("the shared data has no such weights")
  whole, cut = (free_batch(onnx.load(str(path))) for _ in range(2))
  keep = [0, 1, 2, 3, 5, 6, 7, 9, 11]
  assert yolox_classes(cut, "output", keep)
  x = {"images": np.random.default_rng(0).integers(0, 256, (2, 3, 416, 416)).astype(np.float32)}
  assert results(cut, x).tobytes() == results(whole, x)[:, :, [0, 1, 2, 3, 4, *(5 + k for k in keep)]].tobytes()


class Impatient(queue.Queue):
  """Who waits in it for what never comes is told after a while."""

  def get(self, block=True, timeout=None):
    return super().get(block, 10)


def test_what_a_thread_fetches_ahead_comes_in_order_and_ends(monkeypatch):
  monkeypatch.setattr(queue, "Queue", Impatient)
  before = threading.active_count()
  for n in (0, 1, 7):
    assert list(prefetch(iter(range(n)), 2)) == list(range(n))
  for x in prefetch(iter(range(100)), 2):  # one that goes away in the middle
    if x == 3:
      break

  def fails():
    yield 1
    raise KeyError("no more")

  got = []
  with pytest.raises(KeyError, match="no more"):
    for x in prefetch(fails(), 2):
      got.append(x)
  assert got == [1] and threading.active_count() <= before


class Numbered:
  """A renderer of pictures that hold their row's number; `bad` rows cannot be read."""

  def __init__(self, bad=()):
    self.bad = bad

  def read(self, rows):
    yield from ((r, r) for r in rows if r not in self.bad)

  def draw(self, picture, out):
    out[:] = picture
    return out


def test_the_frame_before_stands_for_one_that_cannot_be_read():
  """In its own segment; black where there is none before."""
  works = [
    Work(SimpleNamespace(renderer=lambda canvas, whole, b=bad: Numbered(b)), None, {0}) for bad in ((12, 13), (20,))
  ]
  rows = [(0, 11), (0, 12), (0, 13), (0, 14), (1, 20), (1, 21)]
  items = [Item(works[w], r) for w, r in rows]
  got = [int(p[1, 2, 0]) for _, images in load([[items[:4], items[4:]]], Canvas(width=8, height=4)) for p in images]
  assert got == [11, 11, 11, 14, 0, 21]
  assert [i.good for i in items] == [True, False, False, True, False, True]


def test_a_teacher_is_given_channels_first_and_when_it_was():
  entries = [SimpleNamespace(frame_id=100 + k, timestamp_eof=50 * k) for k in range(5)]
  log = SimpleNamespace(log_path=None)
  work = Work(SimpleNamespace(entries=entries, rpy=np.array([0.0, 0.1, 0.2]), segment=log), None, {0})
  images = np.arange(2 * 4 * 8 * 3, dtype=np.uint8).reshape(2, 4, 8, 3)
  clip = clip_of([Item(work, 2), Item(work, 3)], images, "rgb", np.eye(3))
  assert clip.rgb.shape == (2, 3, 4, 8) and (clip.rgb[1, 2] == images[1, :, :, 2]).all()
  assert clip.frame_ids == [102, 103] and clip.times == [100, 150] and (clip.intrinsics == np.eye(3)).all()
