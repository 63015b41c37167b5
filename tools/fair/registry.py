"""Every teacher in a few lines. `tools/op.sh teachers` lists them."""

from openpilot.tools.fair.teacher import Entry

TEACHERS: dict[str, Entry] = {
  "yolox-nano": Entry("onnx.teacher:OnnxTeacher", "yolox_nano.onnx", "Apache-2.0", "0.9M", "boxes of COCO's road users", {"config": "yolox_nano"}),
  "rtmdet-nano-person": Entry("onnx.teacher:OnnxTeacher", "rtmdet_nano_person.onnx", "Apache-2.0", "1.0M", "boxes of persons", {"config": "rtmdet_nano_person"}),
  "twinlitenet": Entry("onnx.teacher:OnnxTeacher", "twinlitenet.onnx", "MIT", "0.4M", "drivable area, lane markings", {"config": "twinlitenet"}),
}
