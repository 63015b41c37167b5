"""Lane lines, road edges and path of a log's driving model: in the calibrated frame (x forward, y right, z down,
meters), origin at the camera.

modelV2 of an rlog has the lines as the model put them out; drivingModelData of a qlog has the path as polynomials in
time (degree 4, openpilot's fill_model_msg.py) and the lane lines' offsets beside the car. """

from typing import Any, NamedTuple

import numpy as np

CAMERA_HEIGHT = 1.22  # meters over the road, where the log does not say


class Line(NamedTuple):
  name: str  # lane0 to lane3 and edge0, edge1 from left to right, path
  score: float  # probability, of an edge 1 - std
  road: np.ndarray  # (N, 3)


def model_lines(model: Any, height: float = CAMERA_HEIGHT) -> list[Line]:
  """Of a modelV2; of its path, the ground below it. height: meters of the camera over the road."""
  probs, stds = list(model.laneLineProbs), list(model.roadEdgeStds)
  found = [(f"lane{i}", float(p), line) for i, (line, p) in enumerate(zip(model.laneLines, probs, strict=False))]
  found += [(f"edge{i}", float(np.clip(1 - s, 0, 1)), line) for i, (line, s) in enumerate(zip(model.roadEdges, stds, strict=False))]
  lines = [Line(name, score, np.stack([line.x, line.y, line.z], axis=1)) for name, score, line in found if len(line.x) == len(line.y) == len(line.z) > 1]
  path = model.position
  if len(path.x):
    lines.append(Line("path", 1.0, np.stack([path.x, path.y, np.array(path.z) + height], axis=1)))
  return lines


def driving_lines(data: Any, height: float, times: np.ndarray) -> list[Line]:
  """Of a drivingModelData, at these seconds along its path: the path, and the ego lane's two lines, which are the path
  moved aside, square to it, to where the lines pass the car; without these where the car stands, and the path has no
  direction. [] where the log has no path."""
  coefficients = [list(c) for c in (data.path.xCoefficients, data.path.yCoefficients, data.path.zCoefficients)]
  if not all(coefficients):
    return []
  path = np.stack([np.polynomial.polynomial.polyval(times, c) for c in coefficients], 1) + [0, 0, height]
  lines = [Line("path", 1.0, path)]
  if path[-1, 0] - path[0, 0] >= 1.0:
    heading = np.arctan2(np.gradient(path[:, 1]), np.gradient(path[:, 0]))
    square = np.stack([-np.sin(heading), np.cos(heading), np.zeros(len(times))], 1)
    meta = data.laneLineMeta
    for name, y, prob in (("lane1", meta.leftY, meta.leftProb), ("lane2", meta.rightY, meta.rightProb)):
      lines.append(Line(name, float(prob), path + (y - path[0, 1]) * square))
  return lines
