"""Draws fair* messages over the picture that they are about: classes tinted, boxes around visible objects, distances of
the lead and the nearest, our lane lines, openpilot's path, lane lines and road edges as its UI draws them, depth in a
corner."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openpilot.common.transformations.camera import project
from openpilot.common.transformations.model import get_warp_matrix
from openpilot.common.transformations.orientation import rot_from_euler
from openpilot.selfdrive.modeld.fair.calibration import mounting
from openpilot.selfdrive.modeld.fair.frames import VIEW_H, VIEW_W, camera_intrinsics
from openpilot.selfdrive.modeld.fair.heads.ground import view_ground
from openpilot.selfdrive.modeld.fair.heads.lanes import on_line
from openpilot.selfdrive.modeld.fair.publish import class_map_from_message, depth_from_message, mask_from_message
from openpilot.selfdrive.modeld.fair.roles import FORMER
from openpilot.tools.lib.colors import TINT, TURBO, class_colors, depth_picture, depth_scale, track_color
from openpilot.tools.lib.said import drawn

ABOUT = ("fairDepth", "fairSegmentation", "fairObjects", "fairLanes")  # each belongs to one frame
HELD = 3  # frames that a map of depth stays in the picture
LABELS = 5  # objects with a distance: the lead, then the nearest
HIDDEN = 2  # occluded objects that are drawn: the nearest
LEAD_OFFSET = 1.5  # m from the middle of the path, within which an object is in the way
LINE_PROB = 0.25  # lines below are not drawn
HEIGHT = 1.22  # m, of the camera where the log does not hold it
WHITE, GREEN, RED, YELLOW, GRAY = (255, 255, 255), (23, 220, 110), (255, 60, 50), (255, 210, 60), (200, 200, 200)
CYAN = (0, 225, 255)  # our lane lines
SHADE = (0, 0, 0, 150)  # under text


def at_view(mask: np.ndarray) -> np.ndarray:
  """(h, w) bool over the whole view -> (VIEW_H, VIEW_W) bool with a smooth outline."""
  up = Image.fromarray(mask.astype(np.uint8) * 255).resize((VIEW_W, VIEW_H), Image.Resampling.BILINEAR)
  return np.asarray(up) >= 128


def distance(o: Any) -> float:
  """Meters ahead of an object of fairObjects; infinite where unknown."""
  if len(o.position):
    return float(o.position[0])
  return float(o.depth) if o.depth > 0 else np.inf


def label_text(o: Any, classes: list[str], lead: bool) -> str:
  """'lead 27 m', 'pedestrian 12 m', with the standard deviation where that is more than a fifth; 'sign' of what nobody
  knows the distance of."""
  name = drawn(classes[o.classId]) if o.classId < len(classes) else f"class {o.classId}"
  if not np.isfinite(distance(o)):
    return name
  meters = f"{distance(o):.0f}"
  if len(o.positionStd) and o.positionStd[0] > 0.2 * distance(o):
    meters += f" \u00b1{o.positionStd[0]:.0f}"
  return f"{'lead' if lead else name} {meters} m"


class Labels:
  """Texts that do not cover each other: the first ones keep their place, and those that find none are left out."""

  def __init__(self, d: ImageDraw.ImageDraw, font: Any, size: tuple[int, int]):
    self.d, self.font, self.size = d, font, size
    self.taken: list[tuple[float, float, float, float]] = []

  def reserve(self, x0: float, y0: float, x1: float, y1: float) -> bool:
    """False where the place is taken."""
    if any(x0 < b[2] and b[0] < x1 and y0 < b[3] and b[1] < y1 for b in self.taken):
      return False
    self.taken.append((x0, y0, x1, y1))
    return True

  def beside(self, box: np.ndarray, text: str, color: tuple[int, int, int]) -> bool:
    """Above the box (x0, y0, x1, y1), below it, or to its right. False where all three are taken."""
    x0, y0, x1, y1 = self.d.textbbox((0, 0), text, font=self.font)
    w, h = x1 - x0 + 8, y1 - y0 + 6
    for left, top in ((box[0], box[1] - h - 2), (box[0], box[3] + 2), (box[2] + 2, box[1])):
      left = min(max(left, 0), self.size[0] - w)
      if 0 <= top <= self.size[1] - h and self.reserve(left, top, left + w, top + h):
        self.d.rounded_rectangle((left, top, left + w, top + h), 3, fill=SHADE)
        self.d.text((left + 4 - x0, top + 3 - y0), text, fill=color, font=self.font)
        return True
    return False


class Overlay:
  """Draws on frames of one size. Messages come first, by message(); then draw() the frame that they are about.

  roles: {class: role} of the bundle's classes, by which they are colored; messages carry names alone."""

  def __init__(self, width: int, height: int, wide: bool = False, roles: Mapping[str, str] = FORMER):
    self.width, self.height, self.wide, self.roles = width, height, wide, roles
    self.scale = 2 if width < 1000 else 1
    self.size = (width * self.scale // 2 * 2, height * self.scale // 2 * 2)
    self.rpy = np.zeros(3)
    self.camera_height = HEIGHT
    self.device: str | None = None
    self.sensor: str | None = None
    self.latest: dict[str, Any] = {}
    self.depth: tuple[int, Any] | None = None  # newest frame and message: depth comes at half the rate
    self.by_frame: dict[int, dict[str, Any]] = {}
    self.maps: tuple[Any, ...] | None = None
    self.font_size = 15 * self.size[0] // 1344 + 4
    self.font = ImageFont.load_default(size=self.font_size)

  def message(self, event: Any) -> None:
    which = event.which()
    m = getattr(event, which)
    if which in (*ABOUT, "modelV2"):
      self.by_frame.setdefault(m.frameId, {})[which] = event
    elif which == "extrinsicsCalibration":
      rpy, height = mounting(m)
      if rpy is not None:
        self.rpy, self.maps, self.camera_height = np.array(rpy), None, height or HEIGHT
    elif which == "deviceState":
      self.device, self.maps = str(m.deviceType), None if str(m.deviceType) != self.device else self.maps
    elif which == "narrowRoadCameraState":
      self.sensor, self.maps = str(m.sensor), None if str(m.sensor) != self.sensor else self.maps
    else:
      self.latest[which] = event

  def _geometry(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """intrinsics; the picture's pixels that the view covers, and for each the view pixel that shows it, both as indices
    into the flat images."""
    if self.maps is None:
      intrinsics = camera_intrinsics(self.width, self.height, self.device, self.sensor, self.wide)
      inverse = np.linalg.inv(get_warp_matrix(self.rpy, intrinsics))
      u, v = np.meshgrid(np.arange(self.size[0]) / self.scale, np.arange(self.size[1]) / self.scale)
      p = inverse @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
      with np.errstate(divide="ignore", invalid="ignore"):
        x, y = p[:2] / p[2]
      inside = np.flatnonzero((p[2] > 0) & (x >= -0.5) & (x < VIEW_W - 0.5) & (y >= -0.5) & (y < VIEW_H - 0.5))
      self.maps = (intrinsics, inside, np.round(y[inside]).astype(int) * VIEW_W + np.round(x[inside]).astype(int))
    return self.maps

  def draw(self, rgb: np.ndarray, frame_id: int) -> np.ndarray:
    """(height, width, 3) uint8 -> the annotated picture, (size[1], size[0], 3) uint8."""
    intrinsics = self._geometry()[0]
    found = self.by_frame.get(frame_id, {})
    said = {which: getattr(found[which], which) for which in ABOUT if which in found and found[which].valid}
    picture = np.asarray(Image.fromarray(rgb).resize(self.size, Image.Resampling.BILINEAR)).copy()
    tints: list[tuple[np.ndarray, tuple[int, int, int]]] = []  # masks of the view, later ones over earlier ones
    legend: dict[str, tuple[int, int, int]] = {}
    if "fairSegmentation" in said:
      m = said["fairSegmentation"]
      class_map = class_map_from_message(m)
      legend = class_colors(list(m.classes), self.roles)
      tints += [(class_map == i, legend[name]) for i, name in enumerate(m.classes) if name in legend]
    if "fairObjects" in said:
      seen = [(mask_from_message(o), track_color(o.trackId)) for o in said["fairObjects"].objects if not o.occluded]
      tints += [(mask, color) for mask, color in seen if mask is not None]
    self._tint(picture, tints)
    image = Image.fromarray(picture)
    d = ImageDraw.Draw(image, "RGBA")
    labels = Labels(d, self.font, self.size)
    model = found["modelV2"].modelV2 if "modelV2" in found else None
    if model is not None:
      self._model(d, model, intrinsics)
      legend["openpilot's path and lines"] = WHITE
    to_camera = get_warp_matrix(self.rpy, intrinsics)
    if "fairLanes" in said:
      self._lanes(d, said["fairLanes"], to_camera)
      legend["lane lines followed"] = CYAN
    self._header(d, labels, frame_id, [found[which] for which in ABOUT if which in found])
    self._legend(d, labels, legend)
    if "fairDepth" in found:
      self.depth = (frame_id, found["fairDepth"])
    if self.depth is not None and 0 <= frame_id - self.depth[0] <= HELD and self.depth[1].valid:
      m = self.depth[1].fairDepth
      self._inset(
        image, d, labels, depth_from_message(m), "depth, m" if m.metric else "depth, relative: its scale is not known"
      )
    if "fairObjects" in said:
      self._objects(d, labels, said["fairObjects"], to_camera, model)
    for old in [k for k in self.by_frame if k <= frame_id]:
      del self.by_frame[old]
    return np.asarray(image)

  def _picture(self, px: np.ndarray, to_camera: np.ndarray) -> np.ndarray:
    """(N, 2) view pixels -> (N, 2) picture pixels."""
    p = np.concatenate([px, np.ones((len(px), 1))], axis=1) @ to_camera.T
    return p[:, :2] / p[:, 2:] * self.scale

  def _tint(self, picture: np.ndarray, tints: list[tuple[np.ndarray, tuple[int, int, int]]]) -> None:
    _, inside, view = self._geometry()
    index = np.zeros(VIEW_H * VIEW_W, np.uint8)  # which tint; 0 none
    for i, (mask, _) in enumerate(tints[:255], 1):
      if mask.any():
        index[at_view(mask).ravel()] = i
    at = index[view]
    pixels, at = inside[at > 0], at[at > 0]
    colors = np.array([(0, 0, 0), *(color for _, color in tints[:255])], np.float32) * TINT
    flat = picture.reshape(-1, 3)
    flat[pixels] = flat[pixels] * np.float32(1 - TINT) + colors[at]

  def _objects(self, d: ImageDraw.ImageDraw, labels: Labels, m: Any, to_camera: np.ndarray, model: Any) -> None:
    """Boxes of visible objects; distances of the lead and the nearest; thin gray boxes of the nearest occluded ones."""
    classes, lead = list(m.classes), lead_of(m.objects, model)
    near = sorted(m.objects, key=distance)
    for o in [o for o in near if o.occluded and np.isfinite(distance(o))][:HIDDEN]:
      self._box(d, o, to_camera, (*GRAY, 90), 1)
    seen = [o for o in near if not o.occluded]
    for o in reversed(seen):  # draw the nearest last, on top
      self._box(d, o, to_camera, track_color(o.trackId), 3 if lead is not None and o.trackId == lead.trackId else 2)
    first = ([lead] if lead is not None else []) + [o for o in seen if lead is None or o.trackId != lead.trackId]
    for o in first[:LABELS]:
      corners = self._corners(o, to_camera)
      labels.beside(
        np.concatenate([corners.min(0), corners.max(0)]), label_text(o, classes, o is lead), track_color(o.trackId)
      )

  def _corners(self, o: Any, to_camera: np.ndarray) -> np.ndarray:
    x0, y0, x1, y1 = o.box
    return self._picture(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), to_camera)

  def _box(self, d: ImageDraw.ImageDraw, o: Any, to_camera: np.ndarray, color: tuple[int, ...], width: int) -> None:
    corners = [tuple(c) for c in self._corners(o, to_camera).tolist()]
    d.line([*corners, corners[0]], fill=color, width=width)

  def _lanes(self, d: ImageDraw.ImageDraw, m: Any, to_camera: np.ndarray) -> None:
    """Each line's curve, stronger with its probability, and its visible points."""
    ground = None
    for line in m.lines:
      if line.prob < LINE_PROB:
        continue
      color = (*CYAN, round(255 * min(1.0, line.prob)))
      if len(line.roadX) > 1 and len(line.fit) == 4:
        ground = ground or view_ground("medmodel", line.roadZ[0])
        ahead = np.linspace(min(line.roadX), max(line.roadX), 30)
        px = ground.view(
          np.stack([ahead, on_line(np.array(list(line.fit)), ahead), np.full(30, ground.height)], axis=1)
        )
        d.line([tuple(c) for c in self._picture(px, to_camera).tolist()], fill=color, width=3)
      for (u, v), seen in zip(
        self._picture(np.stack([list(line.x), list(line.y)], axis=1), to_camera).tolist(), line.visibility, strict=True
      ):
        if seen >= 0.5:
          d.ellipse((u - 2, v - 2, u + 2, v + 2), fill=color)

  def _ribbon(
    self, d: ImageDraw.ImageDraw, xyz: np.ndarray, half_width: float, intrinsics: np.ndarray, color: tuple[int, ...]
  ) -> None:
    """A band on the road along xyz (N, 3), device frame, meters."""
    rotation, sides = rot_from_euler(self.rpy), []
    for offset in (-half_width, half_width):
      px, z = project(xyz + [0, offset, 0], intrinsics, rotation)
      sides.append(
        [(float(u * self.scale), float(v * self.scale)) for (u, v), depth in zip(px, z, strict=True) if 2 < depth < 100]
      )
    if len(sides[0]) > 1 and len(sides[1]) > 1:
      d.polygon(sides[0] + sides[1][::-1], fill=color)

  def _model(self, d: ImageDraw.ImageDraw, m: Any, intrinsics: np.ndarray) -> None:
    """modelV2 as openpilot's UI draws it (selfdrive/ui/onroad/model_renderer.py): the path on the road, lane lines by
    probability, road edges red."""

    def points(line: Any, down: float = 0.0) -> np.ndarray:
      return np.stack([list(line.x), list(line.y), list(line.z)], axis=1) + [0, 0, down]

    if len(m.position.x) > 1:
      self._ribbon(d, points(m.position, self.camera_height), 0.9, intrinsics, (*GREEN, 45))
    for line, prob in zip(m.laneLines, m.laneLineProbs, strict=False):
      if prob >= LINE_PROB and len(line.x) > 1:
        self._ribbon(d, points(line), 0.05, intrinsics, (*WHITE, round(220 * min(1.0, prob))))
    for edge, std in zip(m.roadEdges, m.roadEdgeStds, strict=False):
      if std < 1 and len(edge.x) > 1:
        self._ribbon(d, points(edge), 0.05, intrinsics, (*RED, round(200 * (1 - std))))

  def _inset(self, image: Image.Image, d: ImageDraw.ImageDraw, labels: Labels, z: np.ndarray, title: str) -> None:
    w = self.size[0] // 5
    h = w * z.shape[0] // z.shape[1]
    left, top = self.size[0] - w - 8, self.font_size + 16
    labels.reserve(left, top, left + w, top + h + 3 * self.font_size)
    image.paste(Image.fromarray(depth_picture(z)).resize((w, h), Image.Resampling.BILINEAR), (left, top))
    d.rectangle((left - 1, top - 1, left + w, top + h), outline=WHITE)
    d.text((left + 4, top + 2), title, fill=WHITE, font=self.font, stroke_width=2, stroke_fill=(0, 0, 0))
    image.paste(Image.fromarray(TURBO[None].repeat(8, 0)).resize((w, 8)), (left, top + h + 3))
    for meters in (2, 5, 10, 20, 50, 120):
      x = left + float(depth_scale(meters)) * w
      d.text(
        (x, top + h + 12),
        f"{meters}",
        fill=WHITE,
        font=self.font,
        anchor={2: "lt", 120: "rt"}.get(meters, "mt"),
        stroke_width=2,
        stroke_fill=(0, 0, 0),
      )

  def _header(self, d: ImageDraw.ImageDraw, labels: Labels, frame_id: int, events: list[Any]) -> None:
    parts: list[tuple[str, tuple[int, int, int]]] = []
    if "carState" in self.latest:
      parts.append((f"{self.latest['carState'].carState.vEgo * 3.6:.0f} km/h", WHITE))
    if events:
      m = getattr(events[0], events[0].which())
      parts.append((m.bundle + (f", {m.modelExecutionTime * 1e3:.1f} ms" if m.modelExecutionTime > 0 else ""), WHITE))
      if not all(e.valid for e in events):
        parts.append(("not valid", RED))
    else:
      parts.append(("no fair message of this frame", YELLOW))
    if "fairState" in self.latest:
      s = self.latest["fairState"].fairState
      if s.framesDropped:
        parts.append((f"{s.framesDropped} of {s.framesReceived} frames dropped", YELLOW))
      if s.fault:
        parts.append((f"fault: {s.fault[:60]}", RED))
    parts.append((f"frame {frame_id}", GRAY))
    d.rectangle((0, 0, self.size[0], self.font_size + 10), fill=SHADE)
    labels.reserve(0, 0, self.size[0], self.font_size + 10)
    x = 8.0
    for text, color in parts:
      d.text((x, 4), text, fill=color, font=self.font)
      x += d.textlength(text, font=self.font) + 2 * self.font_size

  def _legend(self, d: ImageDraw.ImageDraw, labels: Labels, legend: dict[str, tuple[int, int, int]]) -> None:
    top = self.size[1] - self.font_size - 10
    d.rectangle((0, top, self.size[0], self.size[1]), fill=SHADE)
    labels.reserve(0, top, *self.size)
    x, side = 8.0, self.font_size * 2 // 3
    for name, color in ((drawn(n), c) for n, c in legend.items()):
      d.rectangle((x, top + 8, x + side, top + 8 + side), fill=color)
      d.text((x + side + 6, top + 4), name, fill=WHITE, font=self.font)
      x += side + d.textlength(name, font=self.font) + 2 * self.font_size


def lead_of(objects: Any, model: Any = None) -> Any:
  """The nearest object in sight on the path of modelV2, straight ahead where there is none; None where nothing is in
  the way."""
  path = (
    (list(model.position.x), list(model.position.y))
    if model is not None and len(model.position.x) > 1
    else ([0.0, 1.0], [0.0, 0.0])
  )
  ahead = [
    o
    for o in objects
    if not o.occluded
    and len(o.position)
    and o.position[0] > 0
    and abs(o.position[1] - np.interp(o.position[0], *path)) < LEAD_OFFSET
  ]
  return min(ahead, key=distance, default=None)
