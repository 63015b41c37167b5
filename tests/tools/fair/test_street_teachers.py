"""Teachers of real streets beside their networks' own raw outputs, and beside CamVid's truth."""

import importlib.util

import cv2
import numpy as np
import onnxruntime as ort
import pytest

from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.tools.fair.labels.aim import find_vanishing, vanishing_of
from openpilot.tools.fair.labels.labeling import run_teacher
from openpilot.tools.fair.labels.sources.routes import find_views
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.views import FOCAL_OF_WIDTH, segment_view
from openpilot.tools.fair.registry import load_teacher
from openpilot.tools.fair.teacher import Clip
from openpilot.tools.lib.errors import UserError
from openpilot.tools.lib.logreader import LogReader
from openpilot.tools.lib.route import Route

ROAD, UNKNOWN, SHOWN = 3, 11, 5  # of CamVid's class ids; frames of each drive that are looked at
LITERT = importlib.util.find_spec("ai_edge_litert") is not None


def session(path):
  options = ort.SessionOptions()
  options.intra_op_num_threads = 1
  return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture
def street(shared_data):
  """Frames of two drives of CamVid with their class maps."""
  root = shared_data / "camvid"
  parts = [(part, sorted((root / part).glob("*.png"))) for part in ("val", "train")]
  files = [(part, f) for part, found in parts for f in found[:: len(found) // SHOWN][:SHOWN]]
  return [(cv2.imread(str(f))[..., ::-1], cv2.imread(str(root / f"{part}annot" / f.name), 0)) for part, f in files]


def clip_of(rgb):
  return Clip(np.ascontiguousarray(rgb.transpose(2, 0, 1))[None])


def weights(shared_data, name):
  return shared_data / "weights" / name


def whole(name, path, rgb):
  teacher = load_teacher(name, path, device="cpu")
  teacher.whole = True
  teacher.prepare(*rgb.shape[:2])
  return teacher


def iou(pairs):
  pairs = [(road & (truth != UNKNOWN), (truth == ROAD)) for road, truth in pairs]
  return sum((a & b).sum() for a, b in pairs) / sum((a | b).sum() for a, b in pairs)


def test_road_segmentation_says_what_its_network_says(shared_data, street):
  path = weights(shared_data, "road-segmentation-adas-0001.onnx")
  rgb = street[0][0]
  teacher = whole("road-segmentation-adas", path, rgb)
  got = teacher.label(clip_of(rgb))[0]
  small = cv2.resize(rgb, (896, 512), interpolation=cv2.INTER_LINEAR)
  raw = session(path).run(None, {"data": small[None, ..., ::-1].astype(np.float32)})[0][0]
  for channel, name in enumerate(("road", "curb", "marking"), 1):
    np.testing.assert_allclose(got[name][0], raw[..., channel], atol=2 / 256)


@pytest.mark.slow
def test_road_segmentation_sees_camvids_road(shared_data, street):
  teacher = whole("road-segmentation-adas", weights(shared_data, "road-segmentation-adas-0001.onnx"), street[0][0])
  pairs = []
  for rgb, truth in street:
    said = teacher.label(clip_of(rgb))[0]
    p = cv2.resize((said["road"][0] + said["marking"][0]).astype(np.float32), truth.shape[::-1])
    pairs.append((p > 0.5, truth))
  assert iou(pairs) > 0.967 - 0.02


@pytest.mark.skipif(not LITERT, reason="ai-edge-litert is not installed: pip install -e .[tflite]")
def test_cityscapes_says_what_its_network_says_and_sees_camvids_road(shared_data, street):
  from ai_edge_litert.interpreter import Interpreter

  path = weights(shared_data, "deeplab_mobilenet_edgetpu_slim_cityscapes_quant.tflite")
  teacher = whole("cityscapes-edgetpu", path, street[0][0])
  said = [teacher.label(clip_of(rgb))[0]["segmentation"][0] for rgb, _ in street]
  net = Interpreter(str(path), num_threads=1)
  net.allocate_tensors()
  square = np.full((513, 513, 3), 114, np.uint8)
  square[64:449] = cv2.resize(street[0][0], (513, 385), interpolation=cv2.INTER_LINEAR)
  net.set_tensor(net.get_input_details()[0]["index"], square[None])
  net.invoke()
  raw = net.get_tensor(net.get_output_details()[0]["index"])[0, 64:449]
  assert (said[0] == raw).mean() > 0.999
  roads = [
    cv2.resize(s, t.shape[::-1], interpolation=cv2.INTER_NEAREST) == 0 for s, (_, t) in zip(said, street, strict=True)
  ]
  assert iou(list(zip(roads, [t for _, t in street], strict=True))) > 0.92 - 0.02


@pytest.mark.skipif(LITERT, reason="ai-edge-litert is installed")
def test_cityscapes_says_what_it_needs(shared_data):
  with pytest.raises(UserError, match="ai-edge-litert"):
    load_teacher("cityscapes-edgetpu", weights(shared_data, "deeplab_mobilenet_edgetpu_slim_cityscapes_quant.tflite"))


def test_deimv2_says_what_its_network_says(shared_data, street):
  path = weights(shared_data, "deimv2_hgnetv2_atto_coco.onnx")
  rgb = street[0][0]
  teacher = whole("deimv2-atto", path, rgb)
  table = teacher.label(clip_of(rgb))[0]["boxes"]
  small = cv2.resize(rgb, (320, 320), interpolation=cv2.INTER_LINEAR).transpose(2, 0, 1)[None] * np.float32(1 / 255)
  h, w = rgb.shape[:2]
  names = ("labels", "boxes", "scores")
  raw = dict(
    zip(names, session(path).run(names, {"images": small, "orig_target_sizes": np.array([[w, h]])}), strict=True)
  )
  good = (raw["scores"][0] >= 0.3) & np.isin(raw["labels"][0], list(teacher.config["boxes"]["classes"]))
  want = np.clip(raw["boxes"][0][good], 0, [w, h, w, h]) - 0.5
  got = np.stack([table[k] for k in ("x0", "y0", "x1", "y1")], axis=1)
  assert len(want) == len(got) > 2
  np.testing.assert_allclose(got, want, atol=0.05)
  names = list(teacher.config["boxes"]["classes"].values())
  assert [teacher.classes[c] for c in table["cls"]] == [
    names[list(teacher.config["boxes"]["classes"]).index(k)] for k in raw["labels"][0][good]
  ]


@pytest.mark.parametrize("weight", ["road-segmentation-adas", "cityscapes-edgetpu", "deimv2-atto"])
def test_the_registry_knows_license_and_size(weight):
  from openpilot.tools.fair.registry import TEACHERS

  assert TEACHERS[weight].license == "Apache-2.0" and TEACHERS[weight].size.endswith("M")


@pytest.mark.slow
def test_the_guessed_focal_length_beside_a_chessboards(shared_data):
  """Six pictures of a board of 9 x 6 corners by one dashboard camera: the guess is within a tenth."""
  board = np.zeros((54, 3), np.float32)
  board[:, :2] = np.mgrid[:9, :6].T.reshape(-1, 2)
  corners = []
  for path in sorted((shared_data / "stills" / "carnd_chessboard").glob("*.jpg")):
    gray = cv2.imread(str(path), 0)
    found, at = cv2.findChessboardCorners(gray, (9, 6))
    assert found, path
    corners.append(cv2.cornerSubPix(gray, at, (7, 7), (-1, -1), (3, 30, 0.01)))
  error, k, *_ = cv2.calibrateCamera([board] * len(corners), corners, (1280, 720), None, None)
  assert error < 1 and abs(FOCAL_OF_WIDTH * 1280 / k[0, 0] - 1) < 0.1


@pytest.mark.slow
def test_the_vanishing_point_beside_a_logs_calibration(shared_data):
  """A minute of motorway whose log knows the mounting: within 4 pixels of 526x330, 1 in 180 of the focal length."""
  (segment,) = Route(str(shared_data / "realdata" / "2023-07-27--13-01-19--0"), None).segments
  view = segment_view(segment, "qcamera")
  at, spread, n = find_vanishing(view)
  assert view.calibrated and n > 20 and spread < 8
  assert np.abs(at - vanishing_of(view.rpy, view.intrinsics)).max() < 4


def strip_ahead(log, begin, height=1.22, half=0.9, near=6.0, far=45.0):
  """(256, 512) bool: where the car drives in the next four seconds, by its own motion, in the view."""
  times, moved, turned = log
  some = (times >= begin) & (times < begin + 4e9)
  dt = np.diff(times[some]) * 1e-9
  yaw = np.cumsum(turned[some][1:, 2] * dt)
  speed = moved[some][1:, 0] * dt
  path = np.stack([np.cumsum(speed * np.cos(yaw)), np.cumsum(speed * np.sin(yaw))], axis=1)
  path = path[(path[:, 0] > near) & (path[:, 0] < far)]
  mask = np.zeros((256, 512), np.uint8)
  if len(path) > 4:
    edge = np.concatenate([path - [0, half], path[::-1] + [0, half]])
    fl, cx, cy = medmodel_intrinsics[0, 0], *medmodel_intrinsics[:2, 2]
    pixels = np.stack([cx + fl * edge[:, 1] / edge[:, 0], cy + fl * height / edge[:, 0]], axis=1)
    cv2.fillPoly(mask, [np.round(pixels * 16).astype(np.int32)], 1, shift=4)
  return mask > 0


def motion_of(path):
  rows = [
    (e.cameraOdometry.timestampEof, list(e.cameraOdometry.trans), list(e.cameraOdometry.rot))
    for e in LogReader([path], services=["cameraOdometry"])
  ]
  return tuple(np.array(x, float) for x in zip(*rows, strict=True))


@pytest.mark.slow
def test_twinlitenet_sees_the_road_in_whole_pictures_alone(shared_data, tmp_path):
  """Of the strip that the car then drives on."""
  folder = shared_data / "realdata" / "2023-07-27--13-01-19--0"
  views = find_views([str(folder)], None, "qcamera", 240, None)
  teacher = load_teacher("twinlitenet", weights(shared_data, "twinlitenet.onnx"), device="cpu")
  store, log = LabelStore(tmp_path, create=True), motion_of(views[0].segment.log_path)
  shares = {}
  for sees in ("picture", "view"):
    (group,) = run_teacher(teacher, views, store, progress=False, sees=sees, every=240)
    strips = [strip_ahead(log, e.timestamp_eof) for e in views[0].entries]
    maps = [cv2.resize(m.astype(np.float32), (512, 256)) for m in group.dense("drivable")]
    shares[sees] = np.mean([(m[s] > 0.5).mean() for m, s in zip(maps, strips, strict=True) if s.sum() > 500])
  assert shares["picture"] > 0.25 and shares["view"] < 0.2 and shares["picture"] > 3 * shares["view"], shares
