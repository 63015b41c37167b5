"""What openpilot's driving model takes and gives: names, shapes, units; the numbers are those of openpilot's
selfdrive/modeld.

Inputs (batch 1 on the device):
  img, big_img         (1, 12, 128, 256) uint8   two packed YUV420 frames of the narrow and the wide camera, the older
                       first, 4 camera frames (200 ms) apart
  desire_pulse         (1, 25, 8) float32        rising edges of the desire, the largest in each of 25 windows of 4
                       frames, the newest last
  traffic_convention   (1, 2) float32            one-hot: drives on the right, on the left
  action_t             (1, 2) float32            seconds ahead at which the lateral and longitudinal action are wanted
  features_buffer      (1, 24, 512) float32      the model's own hidden_state of 96, 92, ... 4 frames ago
Output: one vector (1, OUTPUT_SIZE) float32, cut by OUTPUT_SLICES. Positions are meters in the calibrated frame: x
forward, y right, z down."""

from math import prod

from openpilot.selfdrive.modeld.fair import frames

IDX_N = 33
T_IDXS = tuple(10.0 * (i / (IDX_N - 1)) ** 2 for i in range(IDX_N))  # s, of plan
X_IDXS = tuple(192.0 * (i / (IDX_N - 1)) ** 2 for i in range(IDX_N))  # m, of lane lines and road edges
LEAD_T_IDXS = (0.0, 2.0, 4.0, 6.0, 8.0, 10.0)  # s
LEAD_T_OFFSETS = (0.0, 2.0, 4.0)  # s, of the three leads
META_T_IDXS = (2.0, 4.0, 6.0, 8.0, 10.0)  # s

RUN_FREQ = 20  # Hz, of the camera and the model
CONTEXT_FREQ = 5  # Hz, of features_buffer and desire_pulse
FRAME_SKIP = RUN_FREQ // CONTEXT_FREQ
FEATURE_LEN = 512
DESIRE_LEN = 8
TRAFFIC_CONVENTION_LEN = 2
ACTION_T_LEN = 2
HISTORY = 24  # past features; the model appends the current one
DESIRE_HISTORY = HISTORY + 1
FRAME_SHAPE = frames.FRAME_SHAPE  # Y of even rows and columns, odd rows, odd columns, both; U; V

POSE_WIDTH = 6
WIDE_FROM_DEVICE_WIDTH = 3
LANE_LINES = 4
ROAD_EDGES = 2
LINE_WIDTH = 2  # y, z
LEAD_HYPOTHESES = 2
LEADS = 3
LEAD_STEPS = 6
LEAD_WIDTH = 4  # x, y, speed, acceleration
PLAN_HYPOTHESES = 5  # of models until 2025
PLAN_WIDTH = 15  # position, velocity, acceleration, euler, orientation rate: 3 each
DESIRE_PRED_STEPS = 4
META_WIDTH = 55
ACTION_WIDTH = 2  # lateral acceleration (curvature * speed^2), acceleration: m/s^2

INPUTS: dict[str, tuple[tuple[int, ...], str]] = {
  "img": ((1, 2 * FRAME_SHAPE[0], *FRAME_SHAPE[1:]), "uint8"),
  "big_img": ((1, 2 * FRAME_SHAPE[0], *FRAME_SHAPE[1:]), "uint8"),
  "desire_pulse": ((1, DESIRE_HISTORY, DESIRE_LEN), "float32"),
  "traffic_convention": ((1, TRAFFIC_CONVENTION_LEN), "float32"),
  "action_t": ((1, ACTION_T_LEN), "float32"),
  "features_buffer": ((1, HISTORY, FEATURE_LEN), "float32"),
}

# Mixture density outputs hold the means, then the logarithms of the scales; with several hypotheses each holds that and
# then its weights' logits.
OUTPUT_SIZES: dict[str, int] = {
  "pose": 2 * POSE_WIDTH,
  "wide_from_device_euler": 2 * WIDE_FROM_DEVICE_WIDTH,
  "road_transform": 2 * POSE_WIDTH,
  "lane_lines": 2 * LANE_LINES * IDX_N * LINE_WIDTH,
  "lane_lines_prob": 2 * LANE_LINES,  # openpilot reads the odd ones
  "road_edges": 2 * ROAD_EDGES * IDX_N * LINE_WIDTH,
  "desire_pred": DESIRE_PRED_STEPS * DESIRE_LEN,
  "meta": META_WIDTH,
  "lead": LEAD_HYPOTHESES * (2 * LEAD_STEPS * LEAD_WIDTH + LEADS),
  "lead_prob": LEADS,
  "hidden_state": FEATURE_LEN,
  "plan": 2 * IDX_N * PLAN_WIDTH,
  "desire_state": DESIRE_LEN,
  "action": 2 * ACTION_WIDTH,  # openpilot's files may have the means only: outputs.py reads both
}
OUTPUT_NAME = "outputs"
OUTPUT_SIZE = sum(OUTPUT_SIZES.values())


def output_slices() -> dict[str, slice]:
  """OUTPUT_SIZES one after the other."""
  out, start = {}, 0
  for name, size in OUTPUT_SIZES.items():
    out[name] = slice(start, start + size)
    start += size
  return out


# Shapes of what is parsed, batch left out.
PARSED_SHAPES: dict[str, tuple[int, ...]] = {
  "pose": (POSE_WIDTH,),
  "wide_from_device_euler": (WIDE_FROM_DEVICE_WIDTH,),
  "road_transform": (POSE_WIDTH,),
  "lane_lines": (LANE_LINES, IDX_N, LINE_WIDTH),
  "road_edges": (ROAD_EDGES, IDX_N, LINE_WIDTH),
  "lead": (LEADS, LEAD_STEPS, LEAD_WIDTH),
  "plan": (IDX_N, PLAN_WIDTH),
  "action": (ACTION_WIDTH,),
}
PLAN_SIZE = prod(PARSED_SHAPES["plan"])
LEAD_SIZE = prod(PARSED_SHAPES["lead"])
