// The faults of planted.cu, for its bindings.
#pragma once

#include <string>

#include "launch.cuh"

namespace cmpose {

enum Fault {
  kNone,
  kMissingBarrier,
  kMissingSecondBarrier,
  kLateWrite,
  kDivergentBarrier,
  kHalfAtBarrier,
  kLaneOutsideMask,
  kLaneMissing,
  kUnequalMasks,
  kSourceOutsideMask,
  kMissingWait,
  kMissingRingBarrier,
  kUnalignedCopy,
  kGlobalOutOfBounds,
  kSharedOutOfBounds,
  kOverflow,
  kTooMuchShared,
};

void planted(const std::string& name, const float* in, float* out, int fault);

}  // namespace cmpose
