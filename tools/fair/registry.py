"""Every teacher in a few lines. `tools/op.sh teachers` lists them."""

from openpilot.tools.fair.teacher import Entry

TEACHERS: dict[str, Entry] = {
  "openpilot": Entry("openpilot.teacher:OpenpilotTeacher", "", "MIT", "", "lane lines, path, leads out of the route's own log"),
  "yolox-nano": Entry("onnx.teacher:OnnxTeacher", "yolox_nano.onnx", "Apache-2.0", "0.9M", "boxes of COCO's road users", {"config": "yolox_nano"}),
  "rtmdet-nano-person": Entry("onnx.teacher:OnnxTeacher", "rtmdet_nano_person.onnx", "Apache-2.0", "1.0M", "boxes of persons", {"config": "rtmdet_nano_person"}),
  "twinlitenet": Entry("onnx.teacher:OnnxTeacher", "twinlitenet.onnx", "MIT", "0.4M", "drivable area, lane markings", {"config": "twinlitenet"}),
  "detr-resnet-50": Entry("detr.teacher:DetrTeacher", "facebook/detr-resnet-50", "Apache-2.0", "41.5M", "boxes of road users, signs, animals"),
  "rtdetr-v2-r18": Entry("detr.teacher:DetrTeacher", "PekingU/rtdetr_v2_r18vd", "Apache-2.0", "20.2M", "boxes of road users, signs, animals"),
  "rtdetr-v2-r50": Entry("detr.teacher:DetrTeacher", "PekingU/rtdetr_v2_r50vd", "Apache-2.0", "42.9M", "boxes of road users, signs, animals"),
  "d-fine-nano": Entry("detr.teacher:DetrTeacher", "ustc-community/dfine-nano-coco", "Apache-2.0", "3.8M", "boxes of road users, signs, animals"),
  "d-fine-small": Entry("detr.teacher:DetrTeacher", "ustc-community/dfine-small-coco", "Apache-2.0", "10.3M", "boxes of road users, signs, animals"),
  "raft-tracker": Entry("cotracker.tracker:RaftTeacher", "raft-small.pth", "BSD-3-Clause", "1.0M", "tracks of points on the road and its lines"),
}
