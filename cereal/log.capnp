using Car = import "car.capnp";
using Custom = import "custom.capnp";
using Deprecated = import "deprecated.capnp";

@0xf3b1f17e25a4285b;

# openpilot's log format as of August 2026, wire-compatible: the same ordinals, types, defaults and unions.
# Names are not on the wire, so one schema reads logs of every age; cereal/services.py knows the older spellings.
# Fields named fooDEPRECATED are upstream's `deprecated.foo`.

const logVersion :Int32 = 1;

struct InitData @0xe71008caeb3fb65c {
  kernelArgs @0 :List(Text);
  gctxDEPRECATED @1 :Text;
  dongleId @2 :Text;
  deviceType @3 :InitData.DeviceType;
  version @4 :Text;
  androidBuildInfoDEPRECATED @5 :Deprecated.AndroidBuildInfo;
  androidSensorsDEPRECATED @6 :List(Deprecated.AndroidSensor);
  chffrAndroidExtraDEPRECATED @7 :InitData.ChffrAndroidExtra;
  pandaInfo @8 :InitData.PandaInfo;
  dirty @9 :Bool;
  gitCommit @10 :Text;
  gitBranch @11 :Text;
  passive @12 :Bool;
  gitRemote @13 :Text;
  iosBuildInfoDEPRECATED @14 :Deprecated.IosBuildInfo;
  kernelVersion @15 :Text;
  androidProperties @16 :Map(Text, Text);
  params @17 :Map(Text, Data);
  osVersion @18 :Text;
  commands @19 :Map(Text, Data);
  wallTimeNanos @20 :UInt64;
  gitCommitDate @21 :Text;
  bootlogId @22 :Text;
  gitSrcCommit @23 :Text;
  gitSrcCommitDate @24 :Text;

  struct PandaInfo @0xe673e8725cdff0ad {
    hasPanda @0 :Bool;
    dongleId @1 :Text;
    stVersion @2 :Text;
    espVersion @3 :Text;
  }

  enum DeviceType @0x9d5d7238eba86608 {
    unknown @0;
    neo @1;
    chffrAndroid @2;
    chffrIos @3;
    tici @4;
    pc @5;
    tizi @6;
    mici @7;
  }

  struct ChffrAndroidExtra @0x9cfb5d53a4f615a5 {
    allCameraCharacteristics @0 :Map(Text, Text);
  }
}

struct Map @0xf8b13ce2183eb696 (Key, Value) {
  entries @0 :List(Entry);

  struct Entry @0xa5dfdd084a6eea0e {
    key @0 :Key;
    value @1 :Value;
  }
}

struct Sentinel @0xef0382d244f56e38 {
  type @0 :Sentinel.SentinelType;
  signal @1 :Int32;

  enum SentinelType @0xa2d8e61eb6f7031a {
    endOfSegment @0;
    endOfRoute @1;
    startOfSegment @2;
    startOfRoute @3;
  }
}

struct FrameData @0xea0245f695ae0a33 {
  frameId @0 :UInt32;
  encodeId @1 :UInt32;
  timestampEof @2 :UInt64;
  frameLengthDEPRECATED @3 :Int32;
  integLines @4 :Int32;
  globalGainDEPRECATED @5 :Int32;
  image @6 :Data;
  frameTypeDEPRECATED @7 :Deprecated.FrameTypeDEPRECATED;
  timestampSof @8 :UInt64;
  androidCaptureResultDEPRECATED @9 :Deprecated.AndroidCaptureResult;
  transform @10 :List(Float32);
  lensPosDEPRECATED @11 :Int32;
  lensSagDEPRECATED @12 :Float32;
  lensErrDEPRECATED @13 :Float32;
  lensTruePosDEPRECATED @14 :Float32;
  gain @15 :Float32;
  focusValDEPRECATED @16 :List(Int16);
  focusConfDEPRECATED @17 :List(UInt8);
  sharpnessScoreDEPRECATED @18 :List(UInt16);
  recoverStateDEPRECATED @19 :Int32;
  highConversionGain @20 :Bool;
  measuredGreyFraction @21 :Float32;
  targetGreyFraction @22 :Float32;
  processingTime @23 :Float32;
  temperaturesC @24 :List(Float32);
  frameIdSensor @25 :UInt32;
  sensor @26 :FrameData.ImageSensor;
  exposureValPercent @27 :Float32;
  requestId @28 :UInt32;

  enum ImageSensor @0xd810b1e7705dd69c {
    unknown @0;
    ar0231 @1;
    ox03c10 @2;
    os04c10 @3;
  }
}

struct Thumbnail @0xb65fce64120af7d3 {
  frameId @0 :UInt32;
  timestampEof @1 :UInt64;
  thumbnail @2 :Data;
  encoding @3 :Thumbnail.Encoding;

  enum Encoding @0xce7b9bb221c070c2 {
    unknown @0;
    jpeg @1;
    keyframe @2;
  }
}

struct EncodeIndex @0x89d394e3541735fc {
  frameId @0 :UInt32;
  type @1 :EncodeIndex.Type;
  encodeId @2 :UInt32;
  segmentNum @3 :Int32;
  segmentId @4 :UInt32;
  segmentIdEncode @5 :UInt32;
  timestampSof @6 :UInt64;
  timestampEof @7 :UInt64;
  flags @8 :UInt32;
  len @9 :UInt32;

  enum Type @0xc0ad259ec157ccd3 {
    bigBoxLossless @0;
    fullHEVC @1;
    bigBoxHEVCDEPRECATED @2;
    chffrAndroidH264DEPRECATED @3;
    fullLosslessClipDEPRECATED @4;
    frontDEPRECATED @5;
    qcameraH264 @6;
    livestreamH264 @7;
  }
}

struct EncodeData @0xcf9aeab355dd85f0 {
  idx @0 :EncodeIndex;
  data @1 :Data;
  header @2 :Data;
  unixTimestampNanos @3 :UInt64;
  width @4 :UInt32;
  height @5 :UInt32;
}

struct ModelDataV2 @0xc4713f6b0d36abe9 {
  frameId @0 :UInt32;
  frameAge @1 :UInt32;
  frameDropPerc @2 :Float32;
  timestampEof @3 :UInt64;
  position @4 :XYZTData;
  orientation @5 :XYZTData;
  velocity @6 :XYZTData;
  orientationRate @7 :XYZTData;
  laneLines @8 :List(XYZTData);
  laneLineProbs @9 :List(Float32);
  roadEdges @10 :List(XYZTData);
  leadsDEPRECATED @11 :List(ModelDataV2.LeadDataV2DEPRECATED);
  meta @12 :ModelDataV2.MetaData;
  laneLineStds @13 :List(Float32);
  roadEdgeStds @14 :List(Float32);
  modelExecutionTime @15 :Float32;
  rawPredictions @16 :Data;
  gpuExecutionTimeDEPRECATED @17 :Float32;
  leadsV3 @18 :List(ModelDataV2.LeadDataV3);
  acceleration @19 :XYZTData;
  frameIdExtra @20 :UInt32;
  temporalPoseDEPRECATED @21 :ModelDataV2.Pose;
  navEnabledDEPRECATED @22 :Bool;
  confidence @23 :ModelDataV2.ConfidenceClass;
  locationMonoTimeDEPRECATED @24 :UInt64;
  lateralPlannerSolutionDEPRECATED @25 :Deprecated.LateralPlannerSolution;
  action @26 :ModelDataV2.Action;
  big @27 :Bool;

  struct Action @0x94d0bcb35a764584 {
    desiredCurvature @0 :Float32;
    desiredAcceleration @1 :Float32;
    shouldStop @2 :Bool;
  }

  struct MetaData @0xd1646ab3b45cfabd {
    engagedProb @0 :Float32;
    desirePrediction @1 :List(Float32);
    brakeDisengageProbDEPRECATED @2 :Float32;
    gasDisengageProbDEPRECATED @3 :Float32;
    steerOverrideProbDEPRECATED @4 :Float32;
    desireState @5 :List(Float32);
    disengagePredictions @6 :ModelDataV2.DisengagePredictions;
    hardBrakePredicted @7 :Bool;
    laneChangeState @8 :LaneChangeState;
    laneChangeDirection @9 :LaneChangeDirection;
  }

  struct DisengagePredictions @0x860aa5ddbcdc8d25 {
    t @0 :List(Float32);
    brakeDisengageProbs @1 :List(Float32);
    gasDisengageProbs @2 :List(Float32);
    steerOverrideProbs @3 :List(Float32);
    brake3MetersPerSecondSquaredProbs @4 :List(Float32);
    brake4MetersPerSecondSquaredProbs @5 :List(Float32);
    brake5MetersPerSecondSquaredProbs @6 :List(Float32);
    gasPressProbs @7 :List(Float32);
    brakePressProbs @8 :List(Float32);
  }

  struct LeadDataV3 @0xd698881ad0ce7feb {
    prob @0 :Float32;
    probTime @1 :Float32;
    t @2 :List(Float32);
    x @3 :List(Float32);
    xStd @4 :List(Float32);
    y @5 :List(Float32);
    yStd @6 :List(Float32);
    v @7 :List(Float32);
    vStd @8 :List(Float32);
    a @9 :List(Float32);
    aStd @10 :List(Float32);
  }

  struct LeadDataV2DEPRECATED @0x8bdee7ea1f8aba33 {
    prob @0 :Float32;
    t @1 :Float32;
    xyva @2 :List(Float32);
    xyvaStd @3 :List(Float32);
  }

  struct Pose @0xfb3ec0702e67884f {
    trans @0 :List(Float32);
    rot @1 :List(Float32);
    transStd @2 :List(Float32);
    rotStd @3 :List(Float32);
  }

  enum ConfidenceClass @0xaa3247d9d2a61cd4 {
    red @0;
    yellow @1;
    green @2;
  }
}

struct XYZTData @0xc3cbae1fd505ae80 {
  x @0 :List(Float32);
  y @1 :List(Float32);
  z @2 :List(Float32);
  t @3 :List(Float32);
  xStd @4 :List(Float32);
  yStd @5 :List(Float32);
  zStd @6 :List(Float32);
}

struct DrivingModelData @0xe8f9ba819993a776 {
  frameId @0 :UInt32;
  frameIdExtra @1 :UInt32;
  action @2 :ModelDataV2.Action;
  laneLineMeta @3 :DrivingModelData.LaneLineMeta;
  meta @4 :DrivingModelData.MetaData;
  path @5 :DrivingModelData.PolyPath;
  frameDropPerc @6 :Float32;
  modelExecutionTime @7 :Float32;

  struct PolyPath @0xca1e4710874d12b5 {
    xCoefficients @0 :List(Float32);
    yCoefficients @1 :List(Float32);
    zCoefficients @2 :List(Float32);
  }

  struct LaneLineMeta @0x996ef0369d7e5625 {
    leftY @0 :Float32;
    rightY @1 :Float32;
    leftProb @2 :Float32;
    rightProb @3 :Float32;
  }

  struct MetaData @0xa0cfcfa4ed19ac5d {
    laneChangeState @0 :LaneChangeState;
    laneChangeDirection @1 :LaneChangeDirection;
  }
}

struct CameraOdometry @0xfa9a296b9fd41a96 {
  trans @0 :List(Float32);
  rot @1 :List(Float32);
  transStd @2 :List(Float32);
  rotStd @3 :List(Float32);
  frameId @4 :UInt32;
  timestampEof @5 :UInt64;
  wideFromDeviceEuler @6 :List(Float32);
  wideFromDeviceEulerStd @7 :List(Float32);
  roadTransformTrans @8 :List(Float32);
  roadTransformTransStd @9 :List(Float32);
}

struct ExtrinsicsCalibration @0x96df70754d8390bc {
  warpMatrixDEPRECATED @0 :List(Float32);
  calStatusDEPRECATED @1 :Int8;
  calCycle @2 :Int32;
  calPerc @3 :Int8;
  extrinsicMatrix @4 :List(Float32);
  warpMatrix2DEPRECATED @5 :List(Float32);
  warpMatrixBigDEPRECATED @6 :List(Float32);
  rpyCalib @7 :List(Float32);
  rpyCalibSpread @8 :List(Float32);
  validBlocks @9 :Int32;
  wideFromDeviceEuler @10 :List(Float32);
  calStatus @11 :ExtrinsicsCalibration.Status;
  height @12 :List(Float32);

  enum Status @0xcaaa029466ad394d {
    uncalibrated @0;
    calibrated @1;
    invalid @2;
    recalibrating @3;
  }
}

struct LateralDelay @0x98dfdb22c44df8d4 {
  lateralDelay @0 :Float32;
  validBlocks @1 :Int32;
  status @2 :LateralDelay.Status;
  lateralDelayEstimate @3 :Float32;
  points @4 :List(Float32);
  lateralDelayEstimateStd @5 :Float32;
  calPerc @6 :Int8;
  version @7 :Int32;

  enum Status @0x9624c5ebffc17eac {
    unestimated @0;
    estimated @1;
    invalid @2;
  }
}

struct DeviceMotion @0xc24ca2b57206b44d {
  orientationNED @0 :DeviceMotion.XYZMeasurement;
  velocityDevice @1 :DeviceMotion.XYZMeasurement;
  accelerationDevice @2 :DeviceMotion.XYZMeasurement;
  angularVelocityDevice @3 :DeviceMotion.XYZMeasurement;
  inputsOK @4 :Bool;
  posenetOK @5 :Bool;
  sensorsOK @6 :Bool;
  debugFilterState @7 :DeviceMotion.FilterState;
  timestamp @8 :UInt64;

  struct XYZMeasurement @0xf9c93a8733ccd82b {
    x @0 :Float32;
    y @1 :Float32;
    z @2 :Float32;
    xStd @3 :Float32;
    yStd @4 :Float32;
    zStd @5 :Float32;
    valid @6 :Bool;
  }

  struct FilterState @0xdacbb6c4e0cb5f66 {
    value @0 :List(Float64);
    std @1 :List(Float64);
    valid @2 :Bool;
    observations @3 :List(DeviceMotion.FilterState.Observation);

    struct Observation @0x81065ba2cacc8266 {
      kind @0 :Int32;
      value @1 :List(Float32);
      error @2 :List(Float32);
    }
  }
}

struct LiveLocationKalman @0xebc5703d1ee7c129 {
  positionECEF @0 :LiveLocationKalman.Measurement;
  positionGeodetic @1 :LiveLocationKalman.Measurement;
  velocityECEF @2 :LiveLocationKalman.Measurement;
  velocityNED @3 :LiveLocationKalman.Measurement;
  velocityDevice @4 :LiveLocationKalman.Measurement;
  accelerationDevice @5 :LiveLocationKalman.Measurement;
  orientationECEF @6 :LiveLocationKalman.Measurement;
  orientationNED @7 :LiveLocationKalman.Measurement;
  angularVelocityDevice @8 :LiveLocationKalman.Measurement;
  calibratedOrientationNED @9 :LiveLocationKalman.Measurement;
  velocityCalibrated @10 :LiveLocationKalman.Measurement;
  accelerationCalibrated @11 :LiveLocationKalman.Measurement;
  angularVelocityCalibrated @12 :LiveLocationKalman.Measurement;
  gpsWeek @13 :Int32;
  gpsTimeOfWeek @14 :Float64;
  status @15 :LiveLocationKalman.Status;
  unixTimestampMillis @16 :Int64;
  inputsOK @17 :Bool = true;
  posenetOK @18 :Bool = true;
  gpsOK @19 :Bool = true;
  calibratedOrientationECEF @20 :LiveLocationKalman.Measurement;
  sensorsOK @21 :Bool = true;
  deviceStable @22 :Bool = true;
  timeSinceReset @23 :Float64;
  excessiveResets @24 :Bool;
  timeToFirstFix @25 :Float32;
  filterState @26 :LiveLocationKalman.Measurement;

  struct Measurement @0xbf23f9ed66dace1c {
    value @0 :List(Float64);
    std @1 :List(Float64);
    valid @2 :Bool;
  }

  enum Status @0x8e4dc8cc4b51fc01 {
    uninitialized @0;
    uncalibrated @1;
    valid @2;
  }
}

struct GpsLocationData @0xe946524859add50e {
  flags @0 :UInt16;
  latitude @1 :Float64;
  longitude @2 :Float64;
  altitude @3 :Float64;
  speed @4 :Float32;
  bearingDeg @5 :Float32;
  horizontalAccuracy @6 :Float32;
  unixTimestampMillis @7 :Int64;
  source @8 :GpsLocationData.SensorSource;
  vNED @9 :List(Float32);
  verticalAccuracy @10 :Float32;
  bearingAccuracyDeg @11 :Float32;
  speedAccuracy @12 :Float32;
  hasFix @13 :Bool;
  satelliteCount @14 :Int8;

  enum SensorSource @0xd3ff79f25c734863 {
    android @0;
    iOS @1;
    car @2;
    velodyne @3;
    fusion @4;
    external @5;
    ublox @6;
    trimble @7;
    qcomdiag @8;
    unicore @9;
  }
}

struct CanData @0x8785009a964c7c59 {
  address @0 :UInt32;
  busTimeDEPRECATED @1 :UInt16;
  dat @2 :Data;
  src @3 :UInt8;
}

struct DeviceState @0xa4d8b5af2aa492eb {
  cpu0DEPRECATED @0 :UInt16;
  cpu1DEPRECATED @1 :UInt16;
  cpu2DEPRECATED @2 :UInt16;
  cpu3DEPRECATED @3 :UInt16;
  memDEPRECATED @4 :UInt16;
  gpuDEPRECATED @5 :UInt16;
  batDEPRECATED @6 :UInt32;
  freeSpacePercent @7 :Float32;
  batteryPercentDEPRECATED @8 :Int16;
  batteryStatusDEPRECATED @9 :Text;
  fanSpeedPercentDesired @10 :UInt16;
  started @11 :Bool;
  usbOnlineDEPRECATED @12 :Bool;
  startedMonoTime @13 :UInt64;
  thermalStatus @14 :DeviceState.ThermalStatus;
  batteryCurrentDEPRECATED @15 :Int32;
  batteryVoltageDEPRECATED @16 :Int32;
  chargingErrorDEPRECATED @17 :Bool;
  chargingDisabledDEPRECATED @18 :Bool;
  memoryUsagePercent @19 :Int8;
  cpuUsagePercentDEPRECATED @20 :Int8;
  pa0DEPRECATED @21 :UInt16;
  networkType @22 :DeviceState.NetworkType;
  offroadPowerUsageUwh @23 :UInt32;
  networkStrength @24 :DeviceState.NetworkStrength;
  carBatteryCapacityUwh @25 :UInt32;
  cpuTempC @26 :List(Float32);
  gpuTempC @27 :List(Float32);
  memoryTempC @28 :Float32;
  batteryTempCDEPRECATED @29 :Float32;
  ambientTempCDEPRECATED @30 :Float32;
  networkInfo @31 :DeviceState.NetworkInfo;
  lastAthenaPingTime @32 :UInt64;
  gpuUsagePercent @33 :Int8;
  cpuUsagePercent @34 :List(Int8);
  nvmeTempCDEPRECATED @35 :List(Float32);
  modemTempC @36 :List(Float32);
  screenBrightnessPercent @37 :Int8;
  thermalZones @38 :List(DeviceState.ThermalZone);
  pmicTempC @39 :List(Float32);
  powerDrawW @40 :Float32;
  networkMetered @41 :Bool;
  somPowerDrawW @42 :Float32;
  networkStats @43 :DeviceState.NetworkStats;
  maxTempC @44 :Float32;
  deviceType @45 :InitData.DeviceType;
  intakeTempC @46 :Float32;
  exhaustTempC @47 :Float32;
  gnssTempC @48 :Float32;
  dspTempC @49 :Float32;
  bottomSocTempC @50 :Float32;
  chestnutPresent @51 :Bool;
  usbState @52 :UsbState;

  struct ThermalZone @0xd0790029853df66f {
    name @0 :Text;
    temp @1 :Float32;
  }

  struct NetworkInfo @0x9d57532d82c04afc {
    technology @0 :Text;
    operator @1 :Text;
    band @2 :Text;
    channel @3 :UInt16;
    extra @4 :Text;
    state @5 :Text;
  }

  struct NetworkStats @0xb98c64ea27898ea0 {
    wwanTx @0 :Int64;
    wwanRx @1 :Int64;
  }

  enum ThermalStatus @0xaf0f7110c254f77e {
    ok @0;
    warmDEPRECATED @1;
    overheated @2;
    critical @3;
  }

  enum NetworkType @0xbbc79cc958d1049d {
    none @0;
    wifi @1;
    cell2G @2;
    cell3G @3;
    cell4G @4;
    cell5G @5;
    ethernet @6;
  }

  enum NetworkStrength @0xdd308c8a13203e13 {
    unknown @0;
    poor @1;
    moderate @2;
    good @3;
    great @4;
  }
}

struct UsbState @0x8b644b0be77bac9f {
  devices @0 :List(UsbState.Device);

  struct Device @0x959cf89c9c01ce9a {
    busnum @0 :UInt8;
    devnum @1 :UInt8;
    vendorId @2 :UInt16;
    productId @3 :UInt16;
    speedMbps @4 :UInt16;
    product @5 :Text;
    manufacturer @6 :Text;
    linkErrorCount @7 :UInt16;
    usb3Lane @8 :UsbState.Device.Usb3Lane;

    enum Usb3Lane @0xa7053446d13dbfe4 {
      unknown @0;
      a @1;
      b @2;
    }
  }
}

struct ChestnutState @0x8fd70f1cb19dc3aa {
  tempC @0 :Float32;
  memoryTempC @1 :Float32;
  powerDrawW @2 :Float32;
  powerLimitW @3 :Float32;
  gpuUsagePercent @4 :UInt8;
  gpuClockMhz @5 :UInt16;
  fanSpeedRpm @6 :UInt16;
  pcieLtssm @7 :UInt8;
  supplyVoltage @8 :UInt16;
  supplyCurrent @9 :Int16;
}

struct ControlsState @0x97ff69c53601abf1 {
  vEgoDEPRECATED @0 :Float32;
  aEgoDEPRECATED @1 :Float32;
  vPidDEPRECATED @2 :Float32;
  vTargetLeadDEPRECATED @3 :Float32;
  upAccelCmd @4 :Float32;
  uiAccelCmd @5 :Float32;
  yActualDEPRECATED @6 :Float32;
  yDesDEPRECATED @7 :Float32;
  upSteerDEPRECATED @8 :Float32;
  uiSteerDEPRECATED @9 :Float32;
  aTargetMinDEPRECATED @10 :Float32;
  aTargetMaxDEPRECATED @11 :Float32;
  jerkFactorDEPRECATED @12 :Float32;
  angleSteersDEPRECATED @13 :Float32;
  hudLeadDEPRECATED @14 :Int32;
  cumLagMsDEPRECATED @15 :Float32;
  canMonoTimeDEPRECATED @16 :UInt64;
  radarStateMonoTimeDEPRECATED @17 :UInt64;
  mdMonoTimeDEPRECATED @18 :UInt64;
  enabledDEPRECATED @19 :Bool;
  steerOverrideDEPRECATED @20 :Bool;
  canMonoTimesDEPRECATED @21 :List(UInt64);
  vCruiseDEPRECATED @22 :Float32;
  rearViewCamDEPRECATED @23 :Bool;
  alertText1DEPRECATED @24 :Text;
  alertText2DEPRECATED @25 :Text;
  awarenessStatusDEPRECATED @26 :Float32;
  angleModelBiasDEPRECATED @27 :Float32;
  longitudinalPlanMonoTime @28 :UInt64;
  steeringAngleDesiredDegDEPRECATED @29 :Float32;
  longControlState @30 :Car.CarControl.Actuators.LongControlState;
  stateDEPRECATED @31 :SelfdriveState.OpenpilotState;
  vEgoRawDEPRECATED @32 :Float32;
  ufAccelCmd @33 :Float32;
  ufSteerDEPRECATED @34 :Float32;
  aTargetDEPRECATED @35 :Float32;
  activeDEPRECATED @36 :Bool;
  curvature @37 :Float32;
  alertStatusDEPRECATED @38 :SelfdriveState.AlertStatus;
  alertSizeDEPRECATED @39 :SelfdriveState.AlertSize;
  gpsPlannerActiveDEPRECATED @40 :Bool;
  engageableDEPRECATED @41 :Bool;
  alertBlinkingRateDEPRECATED @42 :Float32;
  driverMonitoringOnDEPRECATED @43 :Bool;
  alertTypeDEPRECATED @44 :Text;
  alertSoundDEPRECATED @45 :Text;
  vCurvatureDEPRECATED @46 :Float32;
  decelForTurnDEPRECATED @47 :Bool;
  startMonoTimeDEPRECATED @48 :UInt64;
  mapValidDEPRECATED @49 :Bool;
  lateralPlanMonoTime @50 :UInt64;
  forceDecel @51 :Bool;
  lateralControlState :union {
    indiStateDEPRECATED @52 :Deprecated.LateralINDIState;
    pidState @53 :ControlsState.LateralPIDState;
    lqrStateDEPRECATED @55 :Deprecated.LateralLQRState;
    angleState @58 :ControlsState.LateralAngleState;
    debugState @59 :ControlsState.LateralDebugState;
    torqueState @60 :ControlsState.LateralTorqueState;
    curvatureState @65 :ControlsState.LateralCurvatureState;
  }
  decelForModelDEPRECATED @54 :Bool;
  alertSound2DEPRECATED @56 :SelfdriveState.AudibleAlert;
  canErrorCounterDEPRECATED @57 :UInt32;
  desiredCurvature @61 :Float32;
  desiredCurvatureRateDEPRECATED @62 :Float32;
  vCruiseClusterDEPRECATED @63 :Float32;
  experimentalModeDEPRECATED @64 :Bool;
  personalityDEPRECATED @66 :LongitudinalPersonality;

  struct LateralPIDState @0xf28c5dc9e09375e3 {
    active @0 :Bool;
    steeringAngleDeg @1 :Float32;
    steeringRateDeg @2 :Float32;
    angleError @3 :Float32;
    p @4 :Float32;
    i @5 :Float32;
    f @6 :Float32;
    output @7 :Float32;
    saturated @8 :Bool;
    steeringAngleDesiredDeg @9 :Float32;
  }

  struct LateralAngleState @0xa2e4ea88ac9980f1 {
    active @0 :Bool;
    steeringAngleDeg @1 :Float32;
    output @2 :Float32;
    saturated @3 :Bool;
    steeringAngleDesiredDeg @4 :Float32;
  }

  struct LateralDebugState @0xa63a46f0f2889b2d {
    active @0 :Bool;
    steeringAngleDeg @1 :Float32;
    output @2 :Float32;
    saturated @3 :Bool;
  }

  struct LateralTorqueState @0xe774a050cbf689a4 {
    active @0 :Bool;
    error @1 :Float32;
    p @2 :Float32;
    i @3 :Float32;
    d @4 :Float32;
    f @5 :Float32;
    output @6 :Float32;
    saturated @7 :Bool;
    errorRate @8 :Float32;
    actualLateralAccel @9 :Float32;
    desiredLateralAccel @10 :Float32;
    desiredLateralJerk @11 :Float32;
    version @12 :Int32;
  }

  struct LateralCurvatureState @0xad9d8095c06f7c61 {
    active @0 :Bool;
    actualCurvature @1 :Float32;
    desiredCurvature @2 :Float32;
    error @3 :Float32;
    p @4 :Float32;
    i @5 :Float32;
    f @6 :Float32;
    output @7 :Float32;
    saturated @8 :Bool;
  }
}

struct SelfdriveState @0xb52430dc48f4a83b {
  state @0 :SelfdriveState.OpenpilotState;
  enabled @1 :Bool;
  active @2 :Bool;
  alertText1 @3 :Text;
  alertText2 @4 :Text;
  alertStatus @5 :SelfdriveState.AlertStatus;
  alertSize @6 :SelfdriveState.AlertSize;
  alertType @7 :Text;
  alertSoundDEPRECATED @8 :Car.CarControl.HUDControl.AudibleAlert;
  engageable @9 :Bool;
  experimentalMode @10 :Bool;
  personality @11 :LongitudinalPersonality;
  alertHudVisual @12 :Car.CarControl.HUDControl.VisualAlert;
  alertSound @13 :SelfdriveState.AudibleAlert;

  enum OpenpilotState @0xdbe58b96d2d1ac61 {
    disabled @0;
    preEnabled @1;
    enabled @2;
    softDisabling @3;
    overriding @4;
  }

  enum AlertStatus @0xa0d0dcd113193c62 {
    normal @0;
    userPrompt @1;
    critical @2;
  }

  enum AlertSize @0xe98bb99d6e985f64 {
    none @0;
    small @1;
    mid @2;
    full @3;
  }

  enum AudibleAlert @0xe9e600c8b9e6b62d {
    none @0;
    engage @1;
    disengage @2;
    refuse @3;
    warningSoft @4;
    warningImmediate @5;
    prompt @6;
    promptRepeat @7;
    promptDistracted @8;
    preAlert @9;
    complete @10;
  }
}

struct RadarState @0x9a185389d6fdd05f {
  warpMatrixDEPRECATED @0 :List(Float32);
  angleOffsetDEPRECATED @1 :Float32;
  calStatusDEPRECATED @2 :Int8;
  leadOne @3 :RadarState.LeadData;
  leadTwo @4 :RadarState.LeadData;
  cumLagMsDEPRECATED @5 :Float32;
  mdMonoTime @6 :UInt64;
  ftMonoTimeDEPRECATED @7 :UInt64;
  calCycleDEPRECATED @8 :Int32;
  calPercDEPRECATED @9 :Int8;
  canMonoTimesDEPRECATED @10 :List(UInt64);
  carStateMonoTimeDEPRECATED @11 :UInt64;
  radarErrorsDEPRECATED @12 :List(Car.RadarData.ErrorDEPRECATED);
  radarErrors @13 :Car.RadarData.Error;

  struct LeadData @0xb96f3ad9170cf085 {
    dRel @0 :Float32;
    yRel @1 :Float32;
    vRel @2 :Float32;
    aRelDEPRECATED @3 :Float32;
    vLead @4 :Float32;
    aLeadDEPRECATED @5 :Float32;
    dPathDEPRECATED @6 :Float32;
    vLatDEPRECATED @7 :Float32;
    vLeadK @8 :Float32;
    aLeadK @9 :Float32;
    fcwDEPRECATED @10 :Bool;
    present @11 :Bool;
    aLeadTau @12 :Float32;
    modelProb @13 :Float32;
    radar @14 :Bool;
    radarTrackId @15 :Int32 = -1;
  }
}

struct LongitudinalPlan @0xe00b5b3eba12876c {
  lateralValidDEPRECATED @0 :Bool;
  dPolyDEPRECATED @1 :List(Float32);
  longitudinalValidDEPRECATED @2 :Bool;
  vTargetDEPRECATED @3 :Float32;
  aTargetMinDEPRECATED @4 :Float32;
  aTargetMaxDEPRECATED @5 :Float32;
  jerkFactorDEPRECATED @6 :Float32;
  hasLead @7 :Bool;
  fcw @8 :Bool;
  modelMonoTime @9 :UInt64;
  radarStateMonoTimeDEPRECATED @10 :UInt64;
  laneWidthDEPRECATED @11 :Float32;
  gpsTrajectoryDEPRECATED @12 :Deprecated.GpsTrajectory;
  eventsDEPRECATED @13 :List(Car.OnroadEventDEPRECATED);
  vTargetFutureDEPRECATED @14 :Float32;
  longitudinalPlanSource @15 :LongitudinalPlan.LongitudinalPlanSource;
  vCruiseDEPRECATED @16 :Float32;
  aCruiseDEPRECATED @17 :Float32;
  aTarget @18 :Float32;
  gpsPlannerActiveDEPRECATED @19 :Bool;
  vMaxDEPRECATED @20 :Float32;
  vCurvatureDEPRECATED @21 :Float32;
  decelForTurnDEPRECATED @22 :Bool;
  hasLeftLaneDEPRECATED @23 :Bool;
  hasRightLaneDEPRECATED @24 :Bool;
  mapValidDEPRECATED @25 :Bool;
  vStartDEPRECATED @26 :Float32;
  aStartDEPRECATED @27 :Float32;
  radarValidDEPRECATED @28 :Bool;
  processingDelay @29 :Float32;
  radarCanErrorDEPRECATED @30 :Bool;
  commIssueDEPRECATED @31 :Bool;
  accels @32 :List(Float32);
  speeds @33 :List(Float32);
  jerks @34 :List(Float32);
  solverExecutionTime @35 :Float32;
  personalityDEPRECATED @36 :LongitudinalPersonality;
  shouldStop @37 :Bool;
  allowThrottle @38 :Bool;
  allowBrake @39 :Bool;

  enum LongitudinalPlanSource @0xb231a753cc079120 {
    cruise @0;
    lead0 @1;
    lead1 @2;
    lead2 @3;
    e2e @4;
  }
}

struct DriverMonitoringState @0xa0df507d7df1052d {
  lockout @0 :Bool;
  alertCountLockoutPercentDEPRECATED @1 :Int8;
  alertTimeLockoutPercentDEPRECATED @2 :Int8;
  alwaysOn @3 :Bool;
  alwaysOnLockout @4 :Bool;
  alertLevel @5 :DriverMonitoringState.AlertLevel;
  activePolicy @6 :DriverMonitoringState.MonitoringPolicy;
  isRHD @7 :Bool;
  rhdCalibration @8 :DriverMonitoringState.CalibrationState;
  visionPolicyState @9 :DriverMonitoringState.VisionPolicyState;
  wheeltouchPolicyState @10 :DriverMonitoringState.WheeltouchPolicyState;
  lockoutMinutesRemaining @11 :Int8;
  alert3Count @12 :Int8;
  noResponseCount @13 :Int8;
  noResponseForceDecel @14 :Bool;
  lockoutCount @15 :Int8;

  struct CalibrationState @0xcf5d6ac20c51e9b0 {
    calibratedPercent @0 :Int8;
    offset @1 :Float32;
  }

  enum AlertLevel @0x96090816b1289c99 {
    none @0;
    one @1;
    two @2;
    three @3;
  }

  struct VisionPolicyState @0xe00d55cd16ef95ac {
    awarenessPercent @0 :Int8;
    awarenessStep @1 :Float32;
    isDistracted @2 :Bool;
    distractedTypes @3 :DriverMonitoringState.VisionPolicyState.DistractedTypes;
    faceDetected @4 :Bool;
    pose @5 :DriverMonitoringState.VisionPolicyState.Pose;
    wheeltouchFallbackPercent @6 :Int8;
    uncertainOffroadAlertPercent @7 :Int8;

    struct DistractedTypes @0xfea3f4cb7265dd75 {
      pose @0 :Bool;
      eye @1 :Bool;
      phone @2 :Bool;
    }

    struct Pose @0xd33df88c8626ec40 {
      pitch @0 :Float32;
      yaw @1 :Float32;
      pitchCalib @2 :DriverMonitoringState.CalibrationState;
      yawCalib @3 :DriverMonitoringState.CalibrationState;
      calibrated @4 :Bool;
      uncertainty @5 :Float32;
    }
  }

  struct WheeltouchPolicyState @0xf35f5f0c8b6ed5fc {
    awarenessPercent @0 :Int8;
    awarenessStep @1 :Float32;
    driverInteracting @2 :Bool;
  }

  enum MonitoringPolicy @0xfc59c1779c0b5d25 {
    wheeltouch @0;
    vision @1;
  }
}

struct VehicleParameters @0xd9058dcb967c2753 {
  valid @0 :Bool;
  gyroBias @1 :Float32;
  angleOffsetDeg @2 :Float32;
  angleOffsetAverageDeg @3 :Float32;
  stiffnessFactor @4 :Float32;
  steerRatio @5 :Float32;
  sensorValid @6 :Bool;
  yawRateDEPRECATED @7 :Float32;
  posenetSpeed @8 :Float32;
  posenetValid @9 :Bool;
  angleOffsetFastStd @10 :Float32;
  angleOffsetAverageStd @11 :Float32;
  stiffnessFactorStd @12 :Float32;
  steerRatioStd @13 :Float32;
  roll @14 :Float32;
  filterStateDEPRECATED @15 :LiveLocationKalman.Measurement;
  debugFilterState @16 :VehicleParameters.FilterState;
  angleOffsetValid @17 :Bool = true;
  angleOffsetAverageValid @18 :Bool = true;
  steerRatioValid @19 :Bool = true;
  stiffnessFactorValid @20 :Bool = true;

  struct FilterState @0xd5b62d55f7ab4feb {
    value @0 :List(Float64);
    std @1 :List(Float64);
  }
}

struct Clocks @0xc95fb49a7bdc4618 {
  bootTimeNanosDEPRECATED @0 :UInt64;
  monotonicNanosDEPRECATED @1 :UInt64;
  monotonicRawNanosDEPRECATED @2 :UInt64;
  wallTimeNanos @3 :UInt64;
  modemUptimeMillisDEPRECATED @4 :UInt64;
}

struct Boot @0xa12e8670927a2549 {
  wallTimeNanos @0 :UInt64;
  lastKmsgDEPRECATED @1 :Data;
  lastPmsgDEPRECATED @2 :Data;
  launchLog @3 :Text;
  pstore @4 :Map(Text, Data);
  commands @5 :Map(Text, Data);
}

struct ManagerState @0xcf7154b31a69635b {
  processes @0 :List(ManagerState.ProcessState);

  struct ProcessState @0x869a54d2708469ea {
    name @0 :Text;
    pid @1 :Int32;
    running @2 :Bool;
    exitCode @3 :Int32;
    shouldBeRunning @4 :Bool;
  }
}

struct ProcLog @0xaf85387b3f681406 {
  cpuTimes @0 :List(ProcLog.CPUTimes);
  mem @1 :ProcLog.Mem;
  procs @2 :List(ProcLog.Process);

  struct Process @0xb0b85613f19e6d28 {
    pid @0 :Int32;
    name @1 :Text;
    state @2 :UInt8;
    ppid @3 :Int32;
    cpuUser @4 :Float32;
    cpuSystem @5 :Float32;
    cpuChildrenUser @6 :Float32;
    cpuChildrenSystem @7 :Float32;
    priority @8 :Int64;
    nice @9 :Int32;
    numThreads @10 :Int32;
    startTime @11 :Float64;
    memVms @12 :UInt64;
    memRss @13 :UInt64;
    processor @14 :Int32;
    cmdline @15 :List(Text);
    exe @16 :Text;
    memPss @17 :UInt64;
    memPssAnon @18 :UInt64;
    memPssShmem @19 :UInt64;
  }

  struct CPUTimes @0xf189c8c5bf2ce087 {
    cpuNum @0 :Int64;
    user @1 :Float32;
    nice @2 :Float32;
    system @3 :Float32;
    idle @4 :Float32;
    iowait @5 :Float32;
    irq @6 :Float32;
    softirq @7 :Float32;
  }

  struct Mem @0xfd095f94f08b3fd4 {
    total @0 :UInt64;
    free @1 :UInt64;
    available @2 :UInt64;
    buffers @3 :UInt64;
    cached @4 :UInt64;
    active @5 :UInt64;
    inactive @6 :UInt64;
    shared @7 :UInt64;
  }
}

struct OnroadEvent @0xc4fa6047f024e718 {
  name @0 :OnroadEvent.EventName;
  enable @1 :Bool;
  noEntry @2 :Bool;
  warning @3 :Bool;
  userDisable @4 :Bool;
  softDisable @5 :Bool;
  immediateDisable @6 :Bool;
  preEnable @7 :Bool;
  permanent @8 :Bool;
  overrideLongitudinal @9 :Bool;
  overrideLateral @10 :Bool;

  enum EventName @0x91f1992a1f77fb03 {
    canError @0;
    steerUnavailable @1;
    wrongGear @2;
    doorOpen @3;
    seatbeltNotLatched @4;
    espDisabled @5;
    wrongCarMode @6;
    steerTempUnavailable @7;
    reverseGear @8;
    buttonCancel @9;
    buttonEnable @10;
    pedalPressed @11;
    preEnableStandstill @12;
    gasPressedOverride @13;
    steerOverride @14;
    cruiseDisabled @15;
    speedTooLow @16;
    outOfSpace @17;
    overheat @18;
    calibrationIncomplete @19;
    calibrationInvalid @20;
    calibrationRecalibrating @21;
    controlsMismatch @22;
    pcmEnable @23;
    pcmDisable @24;
    radarFault @25;
    brakeHold @26;
    parkBrake @27;
    manualRestart @28;
    joystickDebug @29;
    longitudinalManeuver @30;
    steerTempUnavailableSilent @31;
    resumeRequired @32;
    driverDistracted1 @33;
    driverDistracted2 @34;
    driverDistracted3 @35;
    driverUnresponsive1 @36;
    driverUnresponsive2 @37;
    driverUnresponsive3 @38;
    belowSteerSpeed @39;
    lowBatteryDEPRECATED @40;
    accFaulted @41;
    sensorDataInvalid @42;
    commIssue @43;
    commIssueAvgFreq @44;
    tooDistracted @45;
    posenetInvalid @46;
    soundsUnavailableDEPRECATED @47;
    preLaneChangeLeft @48;
    preLaneChangeRight @49;
    laneChange @50;
    lowMemory @51;
    stockAeb @52;
    ldw @53;
    carUnrecognized @54;
    invalidLkasSetting @55;
    speedTooHigh @56;
    laneChangeBlocked @57;
    relayMalfunction @58;
    stockFcw @59;
    startup @60;
    startupNoCar @61;
    startupNoControl @62;
    startupNoSecOcKey @63;
    startupMaster @64;
    fcw @65;
    steerSaturated @66;
    belowEngageSpeed @67;
    noGps @68;
    wrongCruiseMode @69;
    modeldLagging @70;
    deviceFallingDEPRECATED @71;
    fanMalfunction @72;
    cameraMalfunction @73;
    cameraFrameRate @74;
    processNotRunning @75;
    dashcamMode @76;
    selfdriveInitializing @77;
    usbErrorDEPRECATED @78;
    cruiseMismatch @79;
    canBusMissing @80;
    selfdrivedLagging @81;
    resumeBlocked @82;
    steerTimeLimit @83;
    vehicleSensorsInvalid @84;
    locationdTemporaryError @85;
    locationdPermanentError @86;
    paramsdTemporaryError @87;
    paramsdPermanentError @88;
    actuatorsApiUnavailable @89;
    espActive @90;
    personalityChanged @91;
    aeb @92;
    radarTempUnavailable @93;
    steerDisengage @94;
    userBookmark @95;
    excessiveActuation @96;
    audioFeedbackDEPRECATED @97;
    stockLkas @98;
    lateralManeuver @99;
    bigModelLoading @100;
    bigModelReadyDEPRECATED @101;
    bigModelFailed @102;
    carNotReady @103;
  }
}

struct SensorEventData @0xa2b29a69d44529a1 {
  versionDEPRECATED @0 :Int32;
  sensorDEPRECATED @1 :Int32;
  typeDEPRECATED @2 :Int32;
  timestamp @3 :Int64;
  union {
    acceleration @4 :SensorEventData.SensorVec;
    magnetic @5 :SensorEventData.SensorVec;
    orientation @6 :SensorEventData.SensorVec;
    gyro @7 :SensorEventData.SensorVec;
    pressure @9 :SensorEventData.SensorVec;
    magneticUncalibrated @11 :SensorEventData.SensorVec;
    gyroUncalibrated @12 :SensorEventData.SensorVec;
    proximity @13 :Float32;
    light @14 :Float32;
    temperature @15 :Float32;
  }
  source @8 :SensorEventData.SensorSource;
  uncalibratedDEPRECATED @10 :Bool;

  struct SensorVec @0xa43429bd2bfc24fc {
    v @0 :List(Float32);
    statusDEPRECATED @1 :Int8;
  }

  enum SensorSource @0xe49b3ce8f7f48d0d {
    android @0;
    iOS @1;
    fiber @2;
    velodyne @3;
    bno055 @4;
    lsm6ds3 @5;
    bmp280 @6;
    mmc3416x @7;
    bmx055 @8;
    rpr0521 @9;
    lsm6ds3trc @10;
    mmc5603nj @11;
  }
}

struct OperatingSystemLogEntry @0xe80b0d46b8b39dbd {
  id @0 :UInt8;
  ts @1 :UInt64;
  priority @2 :UInt8;
  pid @3 :Int32;
  tid @4 :Int32;
  tag @5 :Text;
  message @6 :Text;
}

struct PandaState @0xa7649e2575e4591e {
  voltage @0 :UInt32;
  current @1 :UInt32;
  ignitionLine @2 :Bool;
  controlsAllowed @3 :Bool;
  gasInterceptorDetectedDEPRECATED @4 :Bool;
  startedSignalDetectedDEPRECATED @5 :Bool;
  hasGpsDEPRECATED @6 :Bool;
  rxBufferOverflow @7 :UInt32;
  txBufferOverflow @8 :UInt32;
  gmlanSendErrsDEPRECATED @9 :UInt32;
  pandaType @10 :PandaState.PandaType;
  fanSpeedRpmDEPRECATED @11 :UInt16;
  usbPowerModeDEPRECATED @12 :Deprecated.UsbPowerModeDEPRECATED;
  ignitionCan @13 :Bool;
  safetyModel @14 :Car.CarParams.SafetyModel;
  faultStatus @15 :PandaState.FaultStatus;
  powerSaveEnabled @16 :Bool;
  uptime @17 :UInt32;
  faults @18 :List(PandaState.FaultType);
  safetyRxInvalid @19 :UInt32;
  safetyParamDEPRECATED @20 :Int16;
  harnessStatus @21 :PandaState.HarnessStatus;
  heartbeatLost @22 :Bool;
  alternativeExperience @23 :Int16;
  safetyTxBlocked @24 :UInt32;
  interruptLoad @25 :Float32;
  safetyParam2DEPRECATED @26 :UInt32;
  safetyParam @27 :UInt16;
  fanPower @28 :UInt8;
  canState0 @29 :PandaState.PandaCanState;
  canState1 @30 :PandaState.PandaCanState;
  canState2 @31 :PandaState.PandaCanState;
  safetyRxChecksInvalid @32 :Bool;
  spiErrorCount @33 :UInt16;
  fanStallCountDEPRECATED @34 :UInt8;
  sbu1Voltage @35 :Float32;
  sbu2Voltage @36 :Float32;
  soundOutputLevel @37 :UInt16;
  controlsAllowedRESERVED1 @38 :Bool;
  controlsAllowedRESERVED2 @39 :Bool;

  enum PandaType @0x8a58adf93e5b3751 {
    unknown @0;
    whitePanda @1;
    greyPanda @2;
    blackPanda @3;
    pedal @4;
    uno @5;
    dos @6;
    redPanda @7;
    redPandaV2 @8;
    tres @9;
    cuatro @10;
  }

  enum FaultType @0xcd55c07f69249798 {
    relayMalfunction @0;
    unusedInterruptHandled @1;
    interruptRateCan1 @2;
    interruptRateCan2 @3;
    interruptRateCan3 @4;
    interruptRateTach @5;
    interruptRateGmlanDEPRECATED @6;
    interruptRateInterrupts @7;
    interruptRateSpiDma @8;
    interruptRateSpiCs @9;
    interruptRateUart1 @10;
    interruptRateUart2 @11;
    interruptRateUart3 @12;
    interruptRateUart5 @13;
    interruptRateUartDma @14;
    interruptRateUsb @15;
    interruptRateTim1 @16;
    interruptRateTim3 @17;
    registerDivergent @18;
    interruptRateKlineInit @19;
    interruptRateClockSource @20;
    interruptRateTick @21;
    interruptRateExti @22;
    interruptRateSpi @23;
    interruptRateUart7 @24;
    sirenMalfunction @25;
    heartbeatLoopWatchdog @26;
  }

  struct PandaCanState @0xf8d2972deb0cd45c {
    busOff @0 :Bool;
    busOffCnt @1 :UInt32;
    errorWarning @2 :Bool;
    errorPassive @3 :Bool;
    lastError @4 :PandaState.PandaCanState.LecErrorCode;
    lastStoredError @5 :PandaState.PandaCanState.LecErrorCode;
    lastDataError @6 :PandaState.PandaCanState.LecErrorCode;
    lastDataStoredError @7 :PandaState.PandaCanState.LecErrorCode;
    receiveErrorCnt @8 :UInt8;
    transmitErrorCnt @9 :UInt8;
    totalErrorCnt @10 :UInt32;
    totalTxLostCnt @11 :UInt32;
    totalRxLostCnt @12 :UInt32;
    totalTxCnt @13 :UInt32;
    totalRxCnt @14 :UInt32;
    totalFwdCnt @15 :UInt32;
    canSpeed @16 :UInt16;
    canDataSpeed @17 :UInt16;
    canfdEnabled @18 :Bool;
    brsEnabled @19 :Bool;
    canfdNonIso @20 :Bool;
    irq0CallRate @21 :UInt32;
    irq1CallRate @22 :UInt32;
    irq2CallRate @23 :UInt32;
    canCoreResetCnt @24 :UInt32;

    enum LecErrorCode @0xc0db50b4d13283ff {
      noError @0;
      stuffError @1;
      formError @2;
      ackError @3;
      bit1Error @4;
      bit0Error @5;
      crcError @6;
      noChange @7;
    }
  }

  enum FaultStatus @0xf2fd0b8b0ac9adbb {
    none @0;
    faultTemp @1;
    faultPerm @2;
  }

  enum HarnessStatus @0xf69a3ed1e8c081bf {
    notConnected @0;
    normal @1;
    flipped @2;
  }
}

struct PeripheralState @0xceb8f49734857a88 {
  pandaType @0 :PandaState.PandaType;
  voltage @1 :UInt32;
  current @2 :UInt32;
  fanSpeedRpm @3 :UInt16;
  usbPowerModeDEPRECATED @4 :Deprecated.UsbPowerModeDEPRECATED;
}

struct LateralManeuverPlan @0xed12f1c294702e30 {
  desiredCurvature @0 :Float32;
}

struct DriverAssistance @0x9b669f73a9c1cfbc {
  leftLaneDeparture @0 :Bool;
  rightLaneDeparture @1 :Bool;
}

struct UserBookmark @0xfe346a9de48d9b50 {}

enum Desire @0xae674a34ba421466 {
  none @0;
  turnLeft @1;
  turnRight @2;
  laneChangeLeft @3;
  laneChangeRight @4;
  keepLeft @5;
  keepRight @6;
}

enum LaneChangeState @0xcd37924bf7b2d3d2 {
  off @0;
  preLaneChange @1;
  laneChangeStarting @2;
  laneChangeFinishing @3;
}

enum LaneChangeDirection @0x9d0bc0c1fe671176 {
  none @0;
  left @1;
  right @2;
}

enum LongitudinalPersonality @0xd692e23d1a247d99 {
  aggressive @0;
  standard @1;
  relaxed @2;
}

struct GPSNMEAData @0x9d291d7813ba4a88 {
  timestamp @0 :Int64;
  localWallTime @1 :UInt64;
  nmea @2 :Text;
}

struct QcomGnss @0xde94674b07ae51c1 {
  logTs @0 :UInt64;
  union {
    measurementReport @1 :QcomGnss.MeasurementReport;
    clockReport @2 :QcomGnss.ClockReport;
    drMeasurementReport @3 :QcomGnss.DrMeasurementReport;
    drSvPoly @4 :QcomGnss.DrSvPolyReport;
    rawLog @5 :Data;
  }

  struct MeasurementReport @0xf580d7d86b7b8692 {
    source @0 :QcomGnss.MeasurementSource;
    fCount @1 :UInt32;
    gpsWeek @2 :UInt16;
    glonassCycleNumber @3 :UInt8;
    glonassNumberOfDays @4 :UInt16;
    milliseconds @5 :UInt32;
    timeBias @6 :Float32;
    clockTimeUncertainty @7 :Float32;
    clockFrequencyBias @8 :Float32;
    clockFrequencyUncertainty @9 :Float32;
    sv @10 :List(QcomGnss.MeasurementReport.SV);

    struct SV @0xf10c595ae7bb2c27 {
      svId @0 :UInt8;
      glonassFrequencyIndex @1 :Int8;
      observationState @2 :QcomGnss.SVObservationState;
      observations @3 :UInt8;
      goodObservations @4 :UInt8;
      gpsParityErrorCount @5 :UInt16;
      glonassHemmingErrorCount @6 :UInt8;
      filterStages @7 :UInt8;
      carrierNoise @8 :UInt16;
      latency @9 :Int16;
      predetectInterval @10 :UInt8;
      postdetections @11 :UInt16;
      unfilteredMeasurementIntegral @12 :UInt32;
      unfilteredMeasurementFraction @13 :Float32;
      unfilteredTimeUncertainty @14 :Float32;
      unfilteredSpeed @15 :Float32;
      unfilteredSpeedUncertainty @16 :Float32;
      measurementStatus @17 :QcomGnss.MeasurementStatus;
      multipathEstimate @18 :UInt32;
      azimuth @19 :Float32;
      elevation @20 :Float32;
      carrierPhaseCyclesIntegral @21 :Int32;
      carrierPhaseCyclesFraction @22 :UInt16;
      fineSpeed @23 :Float32;
      fineSpeedUncertainty @24 :Float32;
      cycleSlipCount @25 :UInt8;
    }
  }

  struct MeasurementStatus @0xe501010e1bcae83b {
    subMillisecondIsValid @0 :Bool;
    subBitTimeIsKnown @1 :Bool;
    satelliteTimeIsKnown @2 :Bool;
    bitEdgeConfirmedFromSignal @3 :Bool;
    measuredVelocity @4 :Bool;
    fineOrCoarseVelocity @5 :Bool;
    lockPointValid @6 :Bool;
    lockPointPositive @7 :Bool;
    lastUpdateFromDifference @8 :Bool;
    lastUpdateFromVelocityDifference @9 :Bool;
    strongIndicationOfCrossCorelation @10 :Bool;
    tentativeMeasurement @11 :Bool;
    measurementNotUsable @12 :Bool;
    sirCheckIsNeeded @13 :Bool;
    probationMode @14 :Bool;
    glonassMeanderBitEdgeValid @15 :Bool;
    glonassTimeMarkValid @16 :Bool;
    gpsRoundRobinRxDiversity @17 :Bool;
    gpsRxDiversity @18 :Bool;
    gpsLowBandwidthRxDiversityCombined @19 :Bool;
    gpsHighBandwidthNu4 @20 :Bool;
    gpsHighBandwidthNu8 @21 :Bool;
    gpsHighBandwidthUniform @22 :Bool;
    multipathIndicator @23 :Bool;
    imdJammingIndicator @24 :Bool;
    lteB13TxJammingIndicator @25 :Bool;
    freshMeasurementIndicator @26 :Bool;
    multipathEstimateIsValid @27 :Bool;
    directionIsValid @28 :Bool;
  }

  struct ClockReport @0xca965e4add8f4f0b {
    hasFCount @0 :Bool;
    fCount @1 :UInt32;
    hasGpsWeek @2 :Bool;
    gpsWeek @3 :UInt16;
    hasGpsMilliseconds @4 :Bool;
    gpsMilliseconds @5 :UInt32;
    gpsTimeBias @6 :Float32;
    gpsClockTimeUncertainty @7 :Float32;
    gpsClockSource @8 :UInt8;
    hasGlonassYear @9 :Bool;
    glonassYear @10 :UInt8;
    hasGlonassDay @11 :Bool;
    glonassDay @12 :UInt16;
    hasGlonassMilliseconds @13 :Bool;
    glonassMilliseconds @14 :UInt32;
    glonassTimeBias @15 :Float32;
    glonassClockTimeUncertainty @16 :Float32;
    glonassClockSource @17 :UInt8;
    bdsWeek @18 :UInt16;
    bdsMilliseconds @19 :UInt32;
    bdsTimeBias @20 :Float32;
    bdsClockTimeUncertainty @21 :Float32;
    bdsClockSource @22 :UInt8;
    galWeek @23 :UInt16;
    galMilliseconds @24 :UInt32;
    galTimeBias @25 :Float32;
    galClockTimeUncertainty @26 :Float32;
    galClockSource @27 :UInt8;
    clockFrequencyBias @28 :Float32;
    clockFrequencyUncertainty @29 :Float32;
    frequencySource @30 :UInt8;
    gpsLeapSeconds @31 :UInt8;
    gpsLeapSecondsUncertainty @32 :UInt8;
    gpsLeapSecondsSource @33 :UInt8;
    gpsToGlonassTimeBiasMilliseconds @34 :Float32;
    gpsToGlonassTimeBiasMillisecondsUncertainty @35 :Float32;
    gpsToBdsTimeBiasMilliseconds @36 :Float32;
    gpsToBdsTimeBiasMillisecondsUncertainty @37 :Float32;
    bdsToGloTimeBiasMilliseconds @38 :Float32;
    bdsToGloTimeBiasMillisecondsUncertainty @39 :Float32;
    gpsToGalTimeBiasMilliseconds @40 :Float32;
    gpsToGalTimeBiasMillisecondsUncertainty @41 :Float32;
    galToGloTimeBiasMilliseconds @42 :Float32;
    galToGloTimeBiasMillisecondsUncertainty @43 :Float32;
    galToBdsTimeBiasMilliseconds @44 :Float32;
    galToBdsTimeBiasMillisecondsUncertainty @45 :Float32;
    hasRtcTime @46 :Bool;
    systemRtcTime @47 :UInt32;
    fCountOffset @48 :UInt32;
    lpmRtcCount @49 :UInt32;
    clockResets @50 :UInt32;
  }

  struct DrMeasurementReport @0x8053c39445c6c75c {
    reason @0 :UInt8;
    seqNum @1 :UInt8;
    seqMax @2 :UInt8;
    rfLoss @3 :UInt16;
    systemRtcValid @4 :Bool;
    fCount @5 :UInt32;
    clockResets @6 :UInt32;
    systemRtcTime @7 :UInt64;
    gpsLeapSeconds @8 :UInt8;
    gpsLeapSecondsUncertainty @9 :UInt8;
    gpsToGlonassTimeBiasMilliseconds @10 :Float32;
    gpsToGlonassTimeBiasMillisecondsUncertainty @11 :Float32;
    gpsWeek @12 :UInt16;
    gpsMilliseconds @13 :UInt32;
    gpsTimeBiasMs @14 :UInt32;
    gpsClockTimeUncertaintyMs @15 :UInt32;
    gpsClockSource @16 :UInt8;
    glonassClockSource @17 :UInt8;
    glonassYear @18 :UInt8;
    glonassDay @19 :UInt16;
    glonassMilliseconds @20 :UInt32;
    glonassTimeBias @21 :Float32;
    glonassClockTimeUncertainty @22 :Float32;
    clockFrequencyBias @23 :Float32;
    clockFrequencyUncertainty @24 :Float32;
    frequencySource @25 :UInt8;
    source @26 :QcomGnss.MeasurementSource;
    sv @27 :List(QcomGnss.DrMeasurementReport.SV);

    struct SV @0xf08b81df8cbf459c {
      svId @0 :UInt8;
      glonassFrequencyIndex @1 :Int8;
      observationState @2 :QcomGnss.SVObservationState;
      observations @3 :UInt8;
      goodObservations @4 :UInt8;
      filterStages @5 :UInt8;
      predetectInterval @6 :UInt8;
      cycleSlipCount @7 :UInt8;
      postdetections @8 :UInt16;
      measurementStatus @9 :QcomGnss.MeasurementStatus;
      carrierNoise @10 :UInt16;
      rfLoss @11 :UInt16;
      latency @12 :Int16;
      filteredMeasurementFraction @13 :Float32;
      filteredMeasurementIntegral @14 :UInt32;
      filteredTimeUncertainty @15 :Float32;
      filteredSpeed @16 :Float32;
      filteredSpeedUncertainty @17 :Float32;
      unfilteredMeasurementFraction @18 :Float32;
      unfilteredMeasurementIntegral @19 :UInt32;
      unfilteredTimeUncertainty @20 :Float32;
      unfilteredSpeed @21 :Float32;
      unfilteredSpeedUncertainty @22 :Float32;
      multipathEstimate @23 :UInt32;
      azimuth @24 :Float32;
      elevation @25 :Float32;
      dopplerAcceleration @26 :Float32;
      fineSpeed @27 :Float32;
      fineSpeedUncertainty @28 :Float32;
      carrierPhase @29 :Float64;
      fCount @30 :UInt32;
      parityErrorCount @31 :UInt16;
      goodParity @32 :Bool;
    }
  }

  struct DrSvPolyReport @0xb1fb80811a673270 {
    svId @0 :UInt16;
    frequencyIndex @1 :Int8;
    hasPosition @2 :Bool;
    hasIono @3 :Bool;
    hasTropo @4 :Bool;
    hasElevation @5 :Bool;
    polyFromXtra @6 :Bool;
    hasSbasIono @7 :Bool;
    iode @8 :UInt16;
    t0 @9 :Float64;
    xyz0 @10 :List(Float64);
    xyzN @11 :List(Float64);
    other @12 :List(Float32);
    positionUncertainty @13 :Float32;
    ionoDelay @14 :Float32;
    ionoDot @15 :Float32;
    sbasIonoDelay @16 :Float32;
    sbasIonoDot @17 :Float32;
    tropoDelay @18 :Float32;
    elevation @19 :Float32;
    elevationDot @20 :Float32;
    elevationUncertainty @21 :Float32;
    velocityCoeff @22 :List(Float64);
    gpsWeek @23 :UInt16;
    gpsTow @24 :Float64;
  }

  enum MeasurementSource @0xd71a12b6faada7ee {
    gps @0;
    glonass @1;
    beidou @2;
    unknown3 @3;
    unknown4 @4;
    unknown5 @5;
    sbas @6;
  }

  enum SVObservationState @0xe81e829a0d6c83e9 {
    idle @0;
    search @1;
    searchVerify @2;
    bitEdge @3;
    trackVerify @4;
    track @5;
    restart @6;
    dpo @7;
    glo10msBe @8;
    glo10msAt @9;
  }
}

struct UbloxGnss @0x85dddd7ce6cefa5d {
  union {
    measurementReport @0 :UbloxGnss.MeasurementReport;
    ephemeris @1 :UbloxGnss.Ephemeris;
    ionoData @2 :UbloxGnss.IonoData;
    hwStatus @3 :UbloxGnss.HwStatus;
    hwStatus2 @4 :UbloxGnss.HwStatus2;
    glonassEphemeris @5 :UbloxGnss.GlonassEphemeris;
    satReport @6 :UbloxGnss.SatReport;
  }

  struct MeasurementReport @0xa73ba546a29820f4 {
    rcvTow @0 :Float64;
    gpsWeek @1 :UInt16;
    leapSeconds @2 :UInt16;
    receiverStatus @3 :UbloxGnss.MeasurementReport.ReceiverStatus;
    numMeas @4 :UInt8;
    measurements @5 :List(UbloxGnss.MeasurementReport.Measurement);

    struct ReceiverStatus @0xfbb838d65160aab6 {
      leapSecValid @0 :Bool;
      clkReset @1 :Bool;
    }

    struct Measurement @0x8f8a655f5e326401 {
      svId @0 :UInt8;
      trackingStatus @1 :UbloxGnss.MeasurementReport.Measurement.TrackingStatus;
      pseudorange @2 :Float64;
      carrierCycles @3 :Float64;
      doppler @4 :Float32;
      gnssId @5 :UInt8;
      glonassFrequencyIndex @6 :UInt8;
      locktime @7 :UInt16;
      cno @8 :UInt8;
      pseudorangeStdev @9 :Float32;
      carrierPhaseStdev @10 :Float32;
      dopplerStdev @11 :Float32;
      sigId @12 :UInt8;

      struct TrackingStatus @0xe8efb3a802b299b2 {
        pseudorangeValid @0 :Bool;
        carrierPhaseValid @1 :Bool;
        halfCycleValid @2 :Bool;
        halfCycleSubtracted @3 :Bool;
      }
    }
  }

  struct Ephemeris @0xd8418c788118f85c {
    svId @0 :UInt16;
    year @1 :UInt16;
    month @2 :UInt16;
    day @3 :UInt16;
    hour @4 :UInt16;
    minute @5 :UInt16;
    second @6 :Float32;
    af0 @7 :Float64;
    af1 @8 :Float64;
    af2 @9 :Float64;
    iode @10 :Float64;
    crs @11 :Float64;
    deltaN @12 :Float64;
    m0 @13 :Float64;
    cuc @14 :Float64;
    ecc @15 :Float64;
    cus @16 :Float64;
    a @17 :Float64;
    toe @18 :Float64;
    cic @19 :Float64;
    omega0 @20 :Float64;
    cis @21 :Float64;
    i0 @22 :Float64;
    crc @23 :Float64;
    omega @24 :Float64;
    omegaDot @25 :Float64;
    iDot @26 :Float64;
    codesL2 @27 :Float64;
    gpsWeekDEPRECATED @28 :Float64;
    l2 @29 :Float64;
    svAcc @30 :Float64;
    svHealth @31 :Float64;
    tgd @32 :Float64;
    iodc @33 :Float64;
    transmissionTime @34 :Float64;
    fitInterval @35 :Float64;
    toc @36 :Float64;
    ionoCoeffsValid @37 :Bool;
    ionoAlpha @38 :List(Float64);
    ionoBeta @39 :List(Float64);
    towCount @40 :UInt32;
    toeWeek @41 :UInt16;
    tocWeek @42 :UInt16;
  }

  struct IonoData @0xc3a3a8de519a4a26 {
    svHealth @0 :UInt32;
    tow @1 :Float64;
    gpsWeek @2 :Float64;
    ionoAlpha @3 :List(Float64);
    ionoBeta @4 :List(Float64);
    healthValid @5 :Bool;
    ionoCoeffsValid @6 :Bool;
  }

  struct HwStatus @0xebb036b114275aa8 {
    noisePerMS @0 :UInt16;
    agcCnt @1 :UInt16;
    aStatus @2 :UbloxGnss.HwStatus.AntennaSupervisorState;
    aPower @3 :UbloxGnss.HwStatus.AntennaPowerStatus;
    jamInd @4 :UInt8;
    flags @5 :UInt8;

    enum AntennaSupervisorState @0xc23e1128ab4d5b53 {
      init @0;
      dontknow @1;
      ok @2;
      short @3;
      open @4;
    }

    enum AntennaPowerStatus @0xfe3b51a924e46559 {
      off @0;
      on @1;
      dontknow @2;
    }
  }

  struct HwStatus2 @0xf919b410b90e53c6 {
    ofsI @0 :Int8;
    magI @1 :UInt8;
    ofsQ @2 :Int8;
    magQ @3 :UInt8;
    cfgSource @4 :UbloxGnss.HwStatus2.ConfigSource;
    lowLevCfg @5 :UInt32;
    postStatus @6 :UInt32;

    enum ConfigSource @0xb2d0985eb51c97b9 {
      undefined @0;
      rom @1;
      otp @2;
      configpins @3;
      flash @4;
    }
  }

  struct GlonassEphemeris @0xb9c5911198388e0c {
    svId @0 :UInt16;
    year @1 :UInt16;
    dayInYear @2 :UInt16;
    hour @3 :UInt16;
    minute @4 :UInt16;
    second @5 :Float32;
    x @6 :Float64;
    xVel @7 :Float64;
    xAccel @8 :Float64;
    y @9 :Float64;
    yVel @10 :Float64;
    yAccel @11 :Float64;
    z @12 :Float64;
    zVel @13 :Float64;
    zAccel @14 :Float64;
    svType @15 :UInt8;
    svURA @16 :Float32;
    age @17 :UInt8;
    svHealth @18 :UInt8;
    tkDEPRECATED @19 :UInt16;
    tb @20 :UInt16;
    tauN @21 :Float64;
    deltaTauN @22 :Float64;
    gammaN @23 :Float64;
    p1 @24 :UInt8;
    p2 @25 :UInt8;
    p3 @26 :UInt8;
    p4 @27 :UInt8;
    freqNumDEPRECATED @28 :UInt32;
    n4 @29 :UInt8;
    nt @30 :UInt16;
    freqNum @31 :Int16;
    tkSeconds @32 :UInt32;
  }

  struct SatReport @0xbb642aff76688f53 {
    iTow @0 :UInt32;
    svs @1 :List(UbloxGnss.SatReport.SatInfo);

    struct SatInfo @0xe89dce02ced79e43 {
      svId @0 :UInt8;
      gnssId @1 :UInt8;
      flagsBitfield @2 :UInt32;
      cno @3 :UInt8;
      elevationDeg @4 :Int8;
      azimuthDeg @5 :Int16;
      pseudorangeResidual @6 :Float32;
    }
  }
}

struct Joystick @0xe42401658e2715e2 {
  axes @0 :List(Float32);
  buttons @1 :List(Bool);
}

struct LiveMapDataDEPRECATED @0x943e268f93f711a6 {
  speedLimitValid @0 :Bool;
  speedLimit @1 :Float32;
  curvatureValid @2 :Bool;
  curvature @3 :Float32;
  wayId @4 :UInt64;
  roadX @5 :List(Float32);
  roadY @6 :List(Float32);
  lastGps @7 :GpsLocationData;
  roadCurvatureX @8 :List(Float32);
  roadCurvature @9 :List(Float32);
  distToTurn @10 :Float32;
  mapValid @11 :Bool;
  speedAdvisoryValid @12 :Bool;
  speedAdvisory @13 :Float32;
  speedLimitAheadValid @14 :Bool;
  speedLimitAhead @15 :Float32;
  speedLimitAheadDistance @16 :Float32;
}

struct LateralPlan @0xe1e9318e2ae8b51e {
  laneWidthDEPRECATED @0 :Float32;
  dPolyDEPRECATED @1 :List(Float32);
  cPolyDEPRECATED @2 :List(Float32);
  cProbDEPRECATED @3 :Float32;
  lPolyDEPRECATED @4 :List(Float32);
  lProbDEPRECATED @5 :Float32;
  rPolyDEPRECATED @6 :List(Float32);
  rProbDEPRECATED @7 :Float32;
  steeringAngleDegDEPRECATED @8 :Float32;
  mpcSolutionValid @9 :Bool;
  paramsValidDEPRECATED @10 :Bool;
  angleOffsetDegDEPRECATED @11 :Float32;
  modelValidDEPRECATED @12 :Bool;
  steeringRateDegDEPRECATED @13 :Float32;
  sensorValidDEPRECATED @14 :Bool;
  commIssueDEPRECATED @15 :Bool;
  posenetValidDEPRECATED @16 :Bool;
  desire @17 :Desire;
  laneChangeState @18 :LaneChangeState;
  laneChangeDirection @19 :LaneChangeDirection;
  dPathPoints @20 :List(Float32);
  dProbDEPRECATED @21 :Float32;
  curvatureDEPRECATED @22 :Float32;
  curvatureRateDEPRECATED @23 :Float32;
  rawCurvatureDEPRECATED @24 :Float32;
  rawCurvatureRateDEPRECATED @25 :Float32;
  psis @26 :List(Float32);
  curvatures @27 :List(Float32);
  curvatureRates @28 :List(Float32);
  useLaneLines @29 :Bool;
  solverExecutionTime @30 :Float32;
  modelMonoTime @31 :UInt64;
  solverCost @32 :Float32;
  solverState @33 :LateralPlan.SolverState;

  struct SolverState @0xfdca7c675b7021c6 {
    x @0 :List(List(Float32));
    u @1 :List(Float32);
  }
}

struct DriverMonitoringStateDEPRECATED @0xb83cda094a1da284 {
  eventsDEPRECATED @0 :List(Car.OnroadEventDEPRECATED);
  faceDetected @1 :Bool;
  isDistracted @2 :Bool;
  awarenessStatus @3 :Float32;
  isRHD @4 :Bool;
  rhdCheckedDEPRECATED @5 :Bool;
  posePitchOffset @6 :Float32;
  posePitchValidCount @7 :UInt32;
  poseYawOffset @8 :Float32;
  poseYawValidCount @9 :UInt32;
  stepChange @10 :Float32;
  awarenessActive @11 :Float32;
  awarenessPassive @12 :Float32;
  isLowStd @13 :Bool;
  hiStdCount @14 :UInt32;
  isPreviewDEPRECATED @15 :Bool;
  isActiveMode @16 :Bool;
  distractedType @17 :UInt32;
  events @18 :List(OnroadEvent);
  uncertainCount @19 :UInt32;
  phoneProbOffsetDEPRECATED @20 :Float32;
  phoneProbValidCountDEPRECATED @21 :UInt32;
}

struct UploaderState @0xde266b39b76b461e {
  immediateQueueSize @0 :UInt32;
  immediateQueueCount @1 :UInt32;
  rawQueueSize @2 :UInt32;
  rawQueueCount @3 :UInt32;
  lastTime @4 :Float32;
  lastSpeed @5 :Float32;
  lastFilename @6 :Text;
}

struct NavInstruction @0xc18216b27f8602af {
  maneuverPrimaryText @0 :Text;
  maneuverSecondaryText @1 :Text;
  maneuverDistance @2 :Float32;
  maneuverType @3 :Text;
  maneuverModifier @4 :Text;
  distanceRemaining @5 :Float32;
  timeRemaining @6 :Float32;
  timeRemainingTypical @7 :Float32;
  lanes @8 :List(NavInstruction.Lane);
  showFull @9 :Bool;
  speedLimit @10 :Float32;
  speedLimitSign @11 :NavInstruction.SpeedLimitSign;
  allManeuvers @12 :List(NavInstruction.Maneuver);

  struct Lane @0xa4cd1689c0a439d9 {
    directions @0 :List(NavInstruction.Direction);
    active @1 :Bool;
    activeDirection @2 :NavInstruction.Direction;
  }

  struct Maneuver @0xb3ec4a1a6ce20a45 {
    distance @0 :Float32;
    type @1 :Text;
    modifier @2 :Text;
  }

  enum Direction @0xeea5b9d8c9e5c192 {
    none @0;
    left @1;
    right @2;
    straight @3;
    slightLeft @4;
    slightRight @5;
  }

  enum SpeedLimitSign @0xb66e0aa568d09c66 {
    mutcd @0;
    vienna @1;
  }
}

struct NavRoute @0xa61452f6440d97d3 {
  coordinates @0 :List(NavRoute.Coordinate);

  struct Coordinate @0xc4c96f53ad1e7485 {
    latitude @0 :Float32;
    longitude @1 :Float32;
  }
}

struct GnssMeasurements @0xafd47016570e9d09 {
  measTime @0 :UInt64;
  gpsWeek @1 :Int16;
  gpsTimeOfWeek @2 :Float64;
  correctedMeasurements @3 :List(GnssMeasurements.CorrectedMeasurement);
  kalmanPositionECEF @4 :LiveLocationKalman.Measurement;
  kalmanVelocityECEF @5 :LiveLocationKalman.Measurement;
  positionECEF @6 :LiveLocationKalman.Measurement;
  velocityECEF @7 :LiveLocationKalman.Measurement;
  timeToFirstFix @8 :Float32;
  ephemerisStatuses @9 :List(GnssMeasurements.EphemerisStatus);

  struct CorrectedMeasurement @0xeaa4a17d86ac76b0 {
    constellationId @0 :GnssMeasurements.ConstellationId;
    svId @1 :UInt8;
    glonassFrequency @2 :Int8;
    pseudorange @3 :Float64;
    pseudorangeStd @4 :Float64;
    pseudorangeRate @5 :Float64;
    pseudorangeRateStd @6 :Float64;
    satPos @7 :List(Float64);
    satVel @8 :List(Float64);
    ephemerisSourceDEPRECATED @9 :GnssMeasurements.EphemerisSourceDEPRECATED;
  }

  struct EphemerisSourceDEPRECATED @0xbcc2ef5087c0ad85 {
    type @0 :GnssMeasurements.EphemerisType;
    gpsWeek @1 :Int16;
    gpsTimeOfWeek @2 :Int32;
  }

  struct EphemerisStatus @0xf3286be6a8bfb860 {
    constellationId @0 :GnssMeasurements.ConstellationId;
    svId @1 :UInt8;
    type @2 :GnssMeasurements.EphemerisType;
    source @3 :GnssMeasurements.EphemerisSource;
    gpsWeek @4 :UInt16;
    tow @5 :Float64;
  }

  enum ConstellationId @0x82079c2ea8450877 {
    gps @0;
    sbas @1;
    galileo @2;
    beidou @3;
    imes @4;
    qznss @5;
    glonass @6;
  }

  enum EphemerisType @0xc299bc1804b08d93 {
    nav @0;
    nasaUltraRapid @1;
    glonassIacUltraRapid @2;
    qcom @3;
  }

  enum EphemerisSource @0xf6e39b3396a699f6 {
    gnssChip @0;
    internet @1;
    cache @2;
    unknown @3;
  }
}

struct DriverStateV2 @0xfc010c40147563b0 {
  frameId @0 :UInt32;
  modelExecutionTime @1 :Float32;
  dspExecutionTimeDEPRECATED @2 :Float32;
  rawPredictions @3 :Data;
  poorVisionProbDEPRECATED @4 :Float32;
  wheelOnRightProb @5 :Float32;
  leftDriverData @6 :DriverStateV2.DriverData;
  rightDriverData @7 :DriverStateV2.DriverData;
  gpuExecutionTime @8 :Float32;

  struct DriverData @0xc9f73bb1cdf28a6a {
    faceOrientation @0 :List(Float32);
    faceOrientationStd @1 :List(Float32);
    facePosition @2 :List(Float32);
    facePositionStd @3 :List(Float32);
    faceProb @4 :Float32;
    leftEyeProb @5 :Float32;
    rightEyeProb @6 :Float32;
    leftBlinkProb @7 :Float32;
    rightBlinkProb @8 :Float32;
    sunglassesProb @9 :Float32;
    occludedProbDEPRECATED @10 :Float32;
    readyProbDEPRECATED @11 :List(Float32);
    notReadyProbDEPRECATED @12 :List(Float32);
    phoneProb @13 :Float32;
    sleepProb @14 :Float32;
  }
}

struct LateralTorqueParameters @0xe61690eb0b091692 {
  valid @0 :Bool;
  latAccelFactorRaw @1 :Float32;
  latAccelOffsetRaw @2 :Float32;
  frictionCoefficientRaw @3 :Float32;
  latAccelFactorFiltered @4 :Float32;
  latAccelOffsetFiltered @5 :Float32;
  frictionCoefficientFiltered @6 :Float32;
  totalBucketPoints @7 :Float32;
  decay @8 :Float32;
  maxResets @9 :Float32;
  points @10 :List(List(Float32));
  version @11 :Int32;
  useParams @12 :Bool;
  calPerc @13 :Int8;
}

struct UIDebug @0xfe35ad896ffaeacf {
  cpuTimeMillis @0 :Float32;
  frameTimeMillis @1 :Float32;
}

struct SoundPressure @0xdc24138990726023 {
  soundPressure @0 :Float32;
  soundPressureWeightedDb @1 :Float32;
  filteredSoundPressureWeightedDbDEPRECATED @2 :Float32;
  soundPressureWeighted @3 :Float32;
}

struct MapRenderState @0xa158dd2a4cfaa81b {
  locationMonoTime @0 :UInt64;
  renderTime @1 :Float32;
  frameId @2 :UInt32;
}

struct UiPlan @0xfc0c9bb05e3927c1 {
  position @0 :XYZTData;
  accel @1 :List(Float32);
  frameId @2 :UInt32;
}

struct DebugAlert @0xf585f6ba1d678656 {
  alertText1 @0 :Text;
  alertText2 @1 :Text;
}

struct Touch @0x8795cd2944faeab6 {
  sec @0 :Int64;
  usec @1 :Int64;
  type @2 :UInt8;
  code @3 :Int32;
  value @4 :Int32;
}

struct AudioData @0xa4e671db37b8ade5 {
  data @0 :Data;
  sampleRate @1 :UInt32;
}

struct Event @0xd314cfd957229c11 {
  logMonoTime @0 :UInt64;  # nanoseconds
  valid @67 :Bool = true;  # outside the union

  union {
    initData @1 :InitData;
    narrowRoadCameraState @2 :FrameData;  # roadCameraState before August 2026
    gpsNMEADEPRECATED @3 :GPSNMEAData;
    sensorEventDEPRECATED @4 :SensorEventData;
    can @5 :List(CanData);
    deviceState @6 :DeviceState;
    controlsState @7 :ControlsState;
    liveEventDEPRECATED @8 :List(Deprecated.LiveEventData);
    model @9 :Deprecated.ModelData;
    featuresDEPRECATED @10 :Deprecated.CalibrationFeatures;
    sensorEventsDEPRECATED @11 :List(SensorEventData);
    pandaStateDEPRECATED @12 :PandaState;
    radarState @13 :RadarState;
    liveUIDEPRECATED @14 :Deprecated.LiveUI;
    narrowRoadEncodeIdx @15 :EncodeIndex;  # roadEncodeIdx before August 2026
    liveTracksDEPRECATED @16 :List(Deprecated.LiveTracksDEPRECATED);
    sendcan @17 :List(CanData);
    logMessage @18 :Text;
    extrinsicsCalibration @19 :ExtrinsicsCalibration;  # liveCalibration before August 2026
    operatingSystemLog @20 :OperatingSystemLogEntry;
    gpsLocation @21 :GpsLocationData;
    carState @22 :Car.CarState;
    carControl @23 :Car.CarControl;
    longitudinalPlan @24 :LongitudinalPlan;
    liveLocationDEPRECATED @25 :Deprecated.LiveLocationData;
    ethernetDataDEPRECATED @26 :List(Deprecated.EthernetPacket);
    navUpdateDEPRECATED @27 :Deprecated.NavUpdate;
    cellInfoDEPRECATED @28 :List(Deprecated.CellInfo);
    wifiScanDEPRECATED @29 :List(Deprecated.WifiScan);
    androidGnssDEPRECATED @30 :Deprecated.AndroidGnss;
    qcomGnss @31 :QcomGnss;
    lidarPtsDEPRECATED @32 :Deprecated.LidarPts;
    procLog @33 :ProcLog;
    ubloxGnss @34 :UbloxGnss;
    clocks @35 :Clocks;
    liveMpcDEPRECATED @36 :Deprecated.LiveMpcData;
    liveLongitudinalMpcDEPRECATED @37 :Deprecated.LiveLongitudinalMpcData;
    navStatusDEPRECATED @38 :Deprecated.NavStatus;
    ubloxRaw @39 :Data;
    gpsPlannerPointsDEPRECATED @40 :Deprecated.GPSPlannerPoints;
    gpsPlannerPlanDEPRECATED @41 :Deprecated.GPSPlannerPlan;
    applanixRawDEPRECATED @42 :Data;
    trafficEventsDEPRECATED @43 :List(Deprecated.TrafficEvent);
    liveLocationTimingDEPRECATED @44 :Deprecated.LiveLocationData;
    orbslamCorrectionDEPRECATED @45 :Deprecated.OrbslamCorrection;
    liveLocationCorrectedDEPRECATED @46 :Deprecated.LiveLocationData;
    orbObservationDEPRECATED @47 :List(Deprecated.OrbObservation);
    gpsLocationExternal @48 :GpsLocationData;
    locationDEPRECATED @49 :Deprecated.LiveLocationData;
    uiNavigationEventDEPRECATED @50 :Deprecated.UiNavigationEvent;
    liveLocationKalmanDeprecatedDEPRECATED @51 :Deprecated.LiveLocationData;
    testJoystick @52 :Joystick;
    orbOdometryDEPRECATED @53 :Deprecated.OrbOdometry;
    orbFeaturesDEPRECATED @54 :Deprecated.OrbFeatures;
    applanixLocationDEPRECATED @55 :Deprecated.LiveLocationData;
    orbKeyFrameDEPRECATED @56 :Deprecated.OrbKeyFrame;
    uiLayoutStateDEPRECATED @57 :Deprecated.UiLayoutState;
    orbFeaturesSummaryDEPRECATED @58 :Deprecated.OrbFeaturesSummary;
    driverStateDEPRECATED @59 :Deprecated.DriverStateDEPRECATED;
    boot @60 :Boot;
    vehicleParameters @61 :VehicleParameters;  # liveParameters before August 2026
    liveMapDataDEPRECATED @62 :LiveMapDataDEPRECATED;
    cameraOdometry @63 :CameraOdometry;
    lateralPlanDEPRECATED @64 :LateralPlan;
    kalmanOdometryDEPRECATED @65 :Deprecated.KalmanOdometry;
    thumbnail @66 :Thumbnail;
    onroadEventsDEPRECATED @68 :List(Car.OnroadEventDEPRECATED);
    carParams @69 :Car.CarParams;
    cabinCameraState @70 :FrameData;  # driverCameraState before August 2026
    driverMonitoringStateDEPRECATED @71 :DriverMonitoringStateDEPRECATED;
    liveLocationKalmanDEPRECATED @72 :LiveLocationKalman;
    sentinel @73 :Sentinel;
    wideRoadCameraState @74 :FrameData;
    modelV2 @75 :ModelDataV2;
    cabinEncodeIdx @76 :EncodeIndex;  # driverEncodeIdx before August 2026
    wideRoadEncodeIdx @77 :EncodeIndex;
    managerState @78 :ManagerState;
    uploaderStateDEPRECATED @79 :UploaderState;
    peripheralState @80 :PeripheralState;
    pandaStates @81 :List(PandaState);
    navInstructionDEPRECATED @82 :NavInstruction;
    navRouteDEPRECATED @83 :NavRoute;
    navThumbnailDEPRECATED @84 :Thumbnail;
    errorLogMessage @85 :Text;
    narrowRoadEncodeData @86 :EncodeData;  # roadEncodeData before August 2026
    cabinEncodeData @87 :EncodeData;  # driverEncodeData before August 2026
    wideRoadEncodeData @88 :EncodeData;
    qNarrowRoadEncodeData @89 :EncodeData;  # qRoadEncodeData before August 2026
    qNarrowRoadEncodeIdx @90 :EncodeIndex;  # qRoadEncodeIdx before August 2026
    gnssMeasurementsDEPRECATED @91 :GnssMeasurements;
    driverStateV2 @92 :DriverStateV2;
    userBookmark @93 :UserBookmark;  # userFlag before August 2026
    lateralTorqueParameters @94 :LateralTorqueParameters;  # liveTorqueParameters before August 2026
    magnetometer @95 :SensorEventData;
    lightSensor @96 :SensorEventData;
    temperatureSensor @97 :SensorEventData;
    accelerometer @98 :SensorEventData;
    gyroscope @99 :SensorEventData;
    gyroscope2DEPRECATED @100 :SensorEventData;
    accelerometer2DEPRECATED @101 :SensorEventData;
    uiDebug @102 :UIDebug;
    soundPressure @103 :SoundPressure;
    navModelDEPRECATED @104 :Deprecated.NavModelData;
    mapRenderStateDEPRECATED @105 :MapRenderState;
    uiPlanDEPRECATED @106 :UiPlan;
    customReserved0 @107 :Custom.CustomReserved0;
    customReserved1 @108 :Custom.CustomReserved1;
    customReserved2 @109 :Custom.CustomReserved2;
    customReserved3 @110 :Custom.CustomReserved3;
    customReserved4 @111 :Custom.CustomReserved4;
    customReserved5 @112 :Custom.CustomReserved5;
    customReserved6 @113 :Custom.CustomReserved6;
    customReserved7 @114 :Custom.CustomReserved7;
    customReserved8 @115 :Custom.CustomReserved8;
    customReserved9 @116 :Custom.CustomReserved9;
    livestreamNarrowRoadEncodeIdx @117 :EncodeIndex;  # livestreamRoadEncodeIdx before August 2026
    livestreamWideRoadEncodeIdx @118 :EncodeIndex;
    livestreamCabinEncodeIdx @119 :EncodeIndex;  # livestreamDriverEncodeIdx before August 2026
    livestreamNarrowRoadEncodeData @120 :EncodeData;  # livestreamRoadEncodeData before August 2026
    livestreamWideRoadEncodeData @121 :EncodeData;
    livestreamCabinEncodeData @122 :EncodeData;  # livestreamDriverEncodeData before August 2026
    temperatureSensor2DEPRECATED @123 :SensorEventData;
    customReservedRawData0 @124 :Data;
    customReservedRawData1 @125 :Data;
    customReservedRawData2 @126 :Data;
    carOutput @127 :Car.CarOutput;
    drivingModelData @128 :DrivingModelData;
    deviceMotion @129 :DeviceMotion;  # livePose before August 2026
    selfdriveState @130 :SelfdriveState;
    radarTracks @131 :Car.RadarData;  # liveTracks before August 2026
    driverAssistance @132 :DriverAssistance;
    alertDebug @133 :DebugAlert;
    onroadEvents @134 :List(OnroadEvent);
    touch @135 :List(Touch);
    customReserved10 @136 :Custom.CustomReserved10;
    customReserved11 @137 :Custom.CustomReserved11;
    customReserved12 @138 :Custom.CustomReserved12;
    customReserved13 @139 :Custom.CustomReserved13;
    fairState @140 :Custom.FairState;
    fairDepth @141 :Custom.FairDepth;
    fairObjects @142 :Custom.FairObjects;
    fairSegmentation @143 :Custom.FairSegmentation;
    fairLanes @144 :Custom.FairLanes;
    fairFeatures @145 :Custom.FairFeatures;
    lateralDelay @146 :LateralDelay;  # liveDelay before August 2026
    rawAudioData @147 :AudioData;
    bookmarkButton @148 :UserBookmark;
    audioFeedbackDEPRECATED @149 :Deprecated.AudioFeedbackDEPRECATED;
    lateralManeuverPlan @150 :LateralManeuverPlan;
    driverMonitoringState @151 :DriverMonitoringState;
    chestnutState @152 :ChestnutState;
  }
}
