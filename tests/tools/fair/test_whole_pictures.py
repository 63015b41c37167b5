"""Dense teachers and trackers that see whole pictures: what they say lies in the view where a homography that is
written down elsewhere puts it; the view alone gives the settings of before."""

import numpy as np
import pytest
import torch
import transformers
from dino_models import save_dinov2, save_folder
from sam2_models import save
from whole_pictures import RPY, bilinear, check_masks, homography, labeled, nearest, outside, places, turned_view

from openpilot.common.transformations.camera import view_frame_from_device_frame as VIEW
from openpilot.common.transformations.model import medmodel_intrinsics
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.frames import camera_intrinsics
from openpilot.tools.fair.cotracker.lane_points import road_grid
from openpilot.tools.fair.cotracker.raft import RaftSmall
from openpilot.tools.fair.cotracker.tracker import RaftTeacher
from openpilot.tools.fair.dinov2.teacher import DINOv2Wrapper
from openpilot.tools.fair.dinov3.config import DinoV3Config
from openpilot.tools.fair.dinov3.teacher import DinoV3Teacher
from openpilot.tools.fair.distillation.data import valid_of
from openpilot.tools.fair.labels.labeling import FrameTeacher, run_teacher
from openpilot.tools.fair.labels.picture import size_of_picture
from openpilot.tools.fair.labels.store import LabelStore
from openpilot.tools.fair.labels.views import SegmentView
from openpilot.tools.fair.sam.features import Sam2FeatureTeacher
from openpilot.tools.fair.sam.sam2 import SAM2VideoWrapper
from openpilot.tools.fair.teacher import Entry, Label

ENTRY = Entry("", "", "MIT", "", "")
TOLERANCE = 0.02  # of a map's range: OpenCV samples at 32nds of a pixel, and float16 keeps 11 bits


@pytest.fixture(scope="module")
def view(tmp_path_factory):
  return turned_view(tmp_path_factory.mktemp("drive"))


@pytest.fixture
def store(tmp_path):
  return LabelStore(tmp_path / "labels", create=True)


def depth_model(folder, kind, size):
  torch.manual_seed(0)
  vit = transformers.Dinov2Config(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=70, patch_size=14, out_indices=[1, 2, 3, 4],
    reshape_hidden_states=False,
  )  # fmt: skip
  head = {"reassemble_hidden_size": 32, "head_hidden_size": 8, "depth_estimation_type": kind, "max_depth": 80}
  config = transformers.DepthAnythingConfig(
    backbone_config=vit, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16, **head
  )
  return save_folder(
    transformers.DepthAnythingForDepthEstimation(config),
    folder,
    image_mean=[0.5] * 3,
    image_std=[0.5] * 3,
    resample=3,
    size=size,
  )


def dinov3_model(folder):
  torch.manual_seed(0)
  config = transformers.DINOv3ViTConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=16,
    num_register_tokens=4,
  )  # fmt: skip
  size = {"height": 224, "width": 224}
  return save_folder(
    transformers.DINOv3ViTModel(config), folder, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=2, size=size
  )


def dense_teachers(name, tmp_path):
  if name == "dinov2":
    return DINOv2Wrapper(weights=save_dinov2(tmp_path / "m"), layers=(0, -1), device="cpu", name=name)
  if name == "dinov3":
    return DinoV3Teacher(DinoV3Config(dinov3_model(tmp_path / "m"), "multiple"), "cpu")
  save("sam2_video", tmp_path / "m")
  return Sam2FeatureTeacher("sam2-features", ENTRY, tmp_path / "m", device="cpu")


@pytest.mark.parametrize("name, size", [("dinov2", (658, 420)), ("dinov3", (656, 416)), ("sam2", (526, 330))])
def test_features_of_a_whole_picture(name, size, tmp_path, view, store):
  """Beside bilinear sampling in NumPy, twice as fine and averaged, of all channels. The camera has 722 pixels of focal
  length, the view 910: a picture as fine as the view is 1.26 times as large."""
  teacher = dense_teachers(name, tmp_path)
  group, clip, said = labeled(teacher, view, store)
  assert clip.rgb.shape[:1:-1] == size and group.label("features").shape[1:] == (16, 32)
  at = places(clip, 32, 64, said["features"].shape)
  fine = bilinear(said["features"].astype(np.float64), at)
  want = fine.reshape(*fine.shape[:2], 16, 2, 32, 2).mean(axis=(3, 5))
  got = np.stack([group.row("features", i) for i in range(len(want))]).astype(np.float64)
  assert np.abs(got - want).max() < TOLERANCE * np.ptp(want) and np.std(want) > 0.1 * np.ptp(want)
  assert group.meta["teacher"]["settings"]["input"] == ([64, 64] if name == "sam2" else None)


def test_features_of_the_view_alone_have_the_settings_of_before(tmp_path, view, store):
  teacher = dense_teachers("dinov2", tmp_path)
  run_teacher(teacher, [view], store, progress=False)
  (group,) = run_teacher(teacher, [view], store, progress=False, sees="view")
  assert group.meta["teacher"]["settings"]["input"] == [252, 518] and "picture" not in group.meta
  assert group.label("features").shape == (64, 18, 37)


@pytest.mark.parametrize("kind, unit", [("relative", "relative"), ("metric", "m")])
def test_depth_of_a_whole_picture(kind, unit, tmp_path, view, store):
  """The nearest pixel's; meters along the view's axis, by the ray of each pixel. Its short side is what its
  preprocessor says, in multiples of the patch."""
  folder = depth_model(tmp_path / "m", kind, {"height": 210, "width": 210})
  teacher = DINOv2Wrapper(weights=folder, device="cpu", name="depth")
  group, clip, said = labeled(teacher, view, store)
  assert clip.rgb.shape[2:] == (210, 336) and group.label("depth").shape == (1, 128, 256)
  at = places(clip, 128, 256, said["depth"].shape)
  want, clear = nearest(said["depth"][:, 0].astype(np.float64), at)
  if unit == "m":
    u, v = (np.arange(256) + 0.5) * 2 - 0.5, (np.arange(128) + 0.5) * 2 - 0.5
    ray = np.linalg.inv(medmodel_intrinsics) @ np.stack([*np.meshgrid(u, v), np.ones((128, 256))]).reshape(3, -1)
    in_camera = VIEW @ rot_from_euler(RPY) @ VIEW.T @ ray  # of a ray whose z in the view is 1
    want = want / in_camera[2].reshape(128, 256)
    assert np.ptp(in_camera[2]) > 0.03
  got = np.stack([group.row("depth", i) for i in range(len(want))])[:, 0].astype(np.float64)
  assert clear.mean() > 0.75 and group.label("depth").unit == unit
  np.testing.assert_allclose(got[:, clear], want[:, clear], rtol=2e-3)


def test_the_valid_mask_leaves_out_what_the_camera_does_not_see(tmp_path, view, store):
  """Turned so that the view reaches beyond the picture: there, and only there, nothing counts."""
  view = SegmentView(**{**vars(view), "rpy": np.array([0.0, 0.12, 0.2])})
  (frames,) = run_teacher(FrameTeacher(), [view], store, progress=False)
  group, clip, _ = labeled(dense_teachers("dinov3", tmp_path), view, store)
  clip.rpy = view.rpy
  beside, clear = outside(clip)
  assert 0.05 < beside.mean() < 0.6
  np.testing.assert_array_equal(valid_of(frames)[clear], ~beside[clear])
  assert np.isfinite(group.row("features", 0).astype(np.float32)).all()


@pytest.mark.parametrize(
  "camera, fine, want",
  [((1928, 1208), 1.0, (662, 416)), ((526, 330), 1.0, (662, 416)), ((1928, 1208), 2.0, (1326, 830))],
)
def test_a_picture_as_fine_as_the_view(camera, fine, want):
  """Both of comma's pictures, of which one is the other made smaller; within a pixel, as widths are even."""
  w, h = camera
  view = SegmentView(None, "road", w, h, camera_intrinsics(w, h), np.zeros(3), True, [], "")
  size = size_of_picture(type("T", (), {"as_fine": fine})(), view)
  assert np.abs(np.array(size) - want).max() <= 2
  view.intrinsics = np.diag([300.0, 300, 1])  # so wide that it would be 5 848 pixels: four times the view's area
  size = size_of_picture(type("T", (), {"as_fine": 1.0})(), view)
  assert size[0] * size[1] == pytest.approx(4 * 512 * 256, rel=0.01) and size[0] / size[1] == pytest.approx(
    w / h, rel=0.01
  )


def test_a_grid_on_the_road_of_a_turned_camera():
  """Its points, cast onto the ground, are up to 8 m aside and 60 m ahead, and all such are there."""
  k = np.array([[700.0, 0, 260], [0, 700, 160], [0, 0, 1]])
  grid = road_grid(330, 526, k, 10, rpy=RPY)
  x, y = (np.arange(5, n, 10) for n in (526, 330))
  everywhere = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
  rays = np.c_[everywhere, np.ones(len(everywhere))] @ np.linalg.inv(k).T @ VIEW @ rot_from_euler(RPY)
  ground = rays * (1.22 / np.where(rays[:, 2:] > 0, rays[:, 2:], np.nan))
  on_road = (ground[:, 0] > 0) & (ground[:, 0] <= 60) & (np.abs(ground[:, 1]) <= 8)
  assert sorted(map(tuple, grid)) == sorted(map(tuple, everywhere[on_road])) and len(grid) > 100
  level = road_grid(330, 526, k, 10)
  assert sorted(map(tuple, road_grid(330, 526, k, 10, rpy=np.zeros(3)))) == sorted(map(tuple, level))
  assert len(level) != len(grid)


def test_points_of_a_whole_picture(tmp_path, view, store):
  """Starts lie on the road by the picture's own geometry, and in the view where the homography puts them."""
  torch.manual_seed(0)
  torch.save(RaftSmall().state_dict(), tmp_path / "raft.pth")
  teacher = RaftTeacher("raft", ENTRY, tmp_path / "raft.pth", points="grid", iters=1, device="cpu")
  group, clip, said = labeled(teacher, view, store)
  table, own = group.table("points").to_pydict(), said["points"]
  assert np.abs(np.array(clip.rgb.shape[:1:-1]) - (662, 416)).max() <= 2
  first = own["frame"] == 0
  xy = np.stack([own["x"], own["y"], np.ones(len(own["x"]))])
  p = np.linalg.inv(homography(clip)) @ xy
  want = (p[:2] / p[2]).T
  inside = (want >= -0.5).all(1) & (want <= [511.5, 255.5]).all(1)
  got = np.stack([table["x"], table["y"]], axis=1)
  np.testing.assert_allclose(got[first], want[first], atol=0.01)
  np.testing.assert_array_equal(np.array(table["visible"]), own["visible"] & inside)
  assert first.sum() > 30 and inside[first].sum() > 20
  depth = 910 * 1.22 / (want[first][:, 1] - 47.6)  # in the view, whose camera is level
  assert (depth > 0).all() and depth.max() <= 60.5


class Told:
  """A detector of one thing in the middle of the picture."""

  name, checkpoint_hash, license, stateful = "told", "0" * 64, "MIT", False
  labels = (Label("boxes", "boxes", classes=("car",)),)

  def prepare(self, height, width):
    self.size = [height, width]

  def settings(self):
    return {"size": self.size}

  def label(self, clip, state=None):
    h, w = clip.rgb.shape[2:]
    box = {"x0": w * 0.3, "y0": h * 0.3, "x1": w * 0.7, "y1": h * 0.8, "score": 0.9, "cls": 0}
    return {"boxes": {"frame": np.zeros(1, np.int32), **{k: np.array([v], np.float32) for k, v in box.items()}}}, None


def test_masks_of_a_whole_picture(tmp_path, view, store):
  """SAM 2 is given pictures no finer than its network, and its masks lie in the view as the nearest pixel's; no setting
  depends on the picture's size."""
  save("sam2_video", tmp_path / "m")
  teacher = SAM2VideoWrapper("sam", ENTRY, tmp_path / "m", device="cpu", detector="told", load=lambda *a, **k: Told())
  group, clip, said = labeled(teacher, view, store)
  assert clip.rgb.shape[2:] == (40, 64) and said["objects"]["track"].size
  check_masks(group, clip, said)
  settings = group.meta["teacher"]["settings"]
  assert "size" not in settings and settings["detector"]["settings"] == {}
  (group,) = run_teacher(teacher, [view], store, progress=False, sees="view")
  assert group.meta["teacher"]["settings"]["size"] == [256, 512] and "picture" not in group.meta
  assert group.meta["teacher"]["settings"]["detector"]["settings"] == {"size": [256, 512]}
