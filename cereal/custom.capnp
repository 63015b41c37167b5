@0xb526ba661d550a59;

# Messages of openpilot-fair, in the custom slots that openpilot and its known forks leave free: Event @140..@145.
# Struct ids are openpilot's own, so that this file can be laid over a checkout's. Pixels are of the model view
# (512x256), (x, y), integers at pixel centers; road quantities are in the calibrated frame: x forward, y right, z down, meters.
# A map of width w covers the whole view: map pixel i is centered on view pixel (i + 0.5) * 512 / w - 0.5, and likewise for y.

struct FairState @0xb057204d7deadf3f {
  frameId @0 :UInt32;              # newest camera frame that was processed
  timestampEof @1 :UInt64;
  bundle @2 :Text;                 # name of the bundle, empty while none is loaded
  bundleHash @3 :Text;             # sha256 of its manifest
  status @4 :Status;
  fault @5 :Text;                  # the newest fault in one line, empty if there was none since start
  faultCount @6 :UInt32;
  framesReceived @7 :UInt32;       # camera frames seen, those skipped as too old included
  framesProcessed @8 :UInt32;
  framesDropped @9 :UInt32;        # never processed because a newer one was there
  framesInvalid @10 :UInt32;       # processed, but an output was not finite or the input unusable
  frameDropPerc @11 :Float32;      # filtered, as modelV2's
  warpTime @12 :Float32;           # seconds, mean since the last fairState
  decodeTime @13 :Float32;
  publishTime @14 :Float32;
  graphs @15 :List(Graph);
  stream @16 :Text;                # VisionIPC stream in use: "narrowRoad" or "wideRoad"
  cameraWidth @17 :UInt32;
  cameraHeight @18 :UInt32;
  calibrated @19 :Bool;            # false: the warp uses the default (level, straight) mounting
  memoryMB @20 :Float32;           # resident set size of the process
  viewFilled @21 :Float32;         # fraction of the model view that the camera covers
  rate @22 :Float32;               # frames a second that are taken: the bundle's, less when the device is hot
  budget @23 :Float32;             # seconds that a frame may take
  framesNotDue @24 :UInt32;        # received, but not wanted at this rate: no drops
  depth @26 :FairDepth;            # the newest valid map of before this message, coarse; whole where the param FairLogDense says so
  segmentation @27 :FairSegmentation;
  framesLate @25 :UInt32;          # over the budget: dropped as modelV2 came too late (in framesDropped too), or a graph put off, or finished after it

  enum Status {
    starting @0;
    waitingForCamera @1;
    running @2;
    fault @3;
    stopped @4;
  }

  struct Graph {
    name @0 :Text;
    runs @1 :UInt32;
    executionTime @2 :Float32;     # seconds, mean since the last fairState
    executionTimeMax @3 :Float32;
    period @4 :UInt32;             # frames
    valid @5 :Bool;
    fault @6 :Text;
    late @7 :UInt32;               # times it was put off to the next frame, since the budget had no room for it
  }
}

struct FairDepth @0xbd443b539493bc68 {
  frameId @0 :UInt32;
  timestampEof @1 :UInt64;
  bundle @2 :Text;
  width @3 :UInt16;
  height @4 :UInt16;
  data @5 :Data;                   # height x width little-endian float16, row-major, z along the view's optical axis; NaN outside the camera image
  metric @6 :Bool;                 # true: meters; false: relative, up to one scale
  modelExecutionTime @7 :Float32;  # seconds
  scale @8 :Float32;               # factor in data that made meters of what the student gave: 1 where it gives meters itself, the camera's height, m, where it gives depth in those, 0 while unknown
  scaleStd @9 :Float32;            # its standard deviation, as a share of it
}

struct FairObjects @0xfc6241ed8877b611 {
  frameId @0 :UInt32;
  timestampEof @1 :UInt64;
  bundle @2 :Text;
  classes @3 :List(Text);
  objects @4 :List(Object);
  modelExecutionTime @5 :Float32;

  struct Object {
    trackId @0 :UInt32;            # the same through occlusion; never used again in one run
    classId @1 :UInt16;            # index into classes
    prob @2 :Float32;
    box @3 :List(Float32);         # x0, y0, x1, y1
    mask @4 :Text;                 # COCO compressed RLE counts, empty if there is none
    maskWidth @5 :UInt16;
    maskHeight @6 :UInt16;
    age @7 :UInt32;                # frames since it was first seen
    occluded @8 :Bool;
    visibility @9 :Float32;        # 0..1
    position @10 :List(Float32);   # x, y, z on the road, empty if unknown
    positionStd @11 :List(Float32);
    depth @12 :Float32;            # meters, of a metric depth map in the middle of the box; 0 where there is none
  }
}

struct FairSegmentation @0xa30662f84033036c {
  frameId @0 :UInt32;
  timestampEof @1 :UInt64;
  bundle @2 :Text;
  width @3 :UInt16;
  height @4 :UInt16;
  classes @5 :List(Text);
  runClass @6 :Data;               # uint8 per run: index into classes, 255 outside the camera image
  runLength @7 :List(UInt16);      # pixels per run; runs go down the columns, as in COCO's RLE
  classProb @8 :List(Float32);     # mean probability of each class over the pixels it was given to
  modelExecutionTime @9 :Float32;
}

struct FairLanes @0xc86a3d38d13eb3ef {
  frameId @0 :UInt32;
  timestampEof @1 :UInt64;
  bundle @2 :Text;
  lines @3 :List(Line);
  modelExecutionTime @4 :Float32;

  struct Line {
    lineId @0 :UInt32;
    prob @1 :Float32;
    kind @2 :Text;                 # "solid", "dashed", "edge", ... as the bundle names them
    x @3 :List(Float32);           # image points
    y @4 :List(Float32);
    visibility @5 :List(Float32);  # 0..1 per point
    roadX @6 :List(Float32);       # the same points on the road
    roadY @7 :List(Float32);
    roadZ @8 :List(Float32);
    fit @9 :List(Float32);         # y = sum fit[i] x^i on the road
    depth @10 :List(Float32);      # meters, of a metric depth map at each point, NaN where it has none; empty without such a map
  }
}

struct FairFeatures @0xa4f1eb3323f5f582 {
  frameId @0 :UInt32;
  timestampEof @1 :UInt64;
  bundle @2 :Text;
  channels @3 :UInt16;
  width @4 :UInt16;
  height @5 :UInt16;
  data @6 :Data;                   # channels x height x width little-endian float16
}

# The other slots, as openpilot leaves them.
struct CustomReserved0 @0x81c2f05a394cf4af {}
struct CustomReserved1 @0xaedffd8f31e7b55d {}
struct CustomReserved2 @0xf35cc4560bbf6ec2 {}
struct CustomReserved3 @0xda96579883444c35 {}
struct CustomReserved4 @0x80ae746ee2596b11 {}
struct CustomReserved5 @0xa5cd762cd951a455 {}
struct CustomReserved6 @0xf98d843bfd7004a3 {}
struct CustomReserved7 @0xb86e6369214c01c8 {}
struct CustomReserved8 @0xf416ec09499d9d19 {}
struct CustomReserved9 @0xa1680744031fdb2d {}
struct CustomReserved10 @0xcb9fd56c7057593a {}
struct CustomReserved11 @0xc2243c65e0340384 {}
struct CustomReserved12 @0x9ccdc8676701b412 {}
struct CustomReserved13 @0xcd96dafb67a082d0 {}
