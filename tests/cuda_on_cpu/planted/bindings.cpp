// Module _C of the planted faults.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "planted.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("planted", [](const std::string& name, uintptr_t in, uintptr_t out, int fault) {
    cmpose::planted(name, reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), fault);
  });
  m.attr("MISSING_BARRIER") = static_cast<int>(cmpose::kMissingBarrier);
  m.attr("MISSING_SECOND_BARRIER") = static_cast<int>(cmpose::kMissingSecondBarrier);
  m.attr("LATE_WRITE") = static_cast<int>(cmpose::kLateWrite);
  m.attr("DIVERGENT_BARRIER") = static_cast<int>(cmpose::kDivergentBarrier);
  m.attr("HALF_AT_BARRIER") = static_cast<int>(cmpose::kHalfAtBarrier);
  m.attr("LANE_OUTSIDE_MASK") = static_cast<int>(cmpose::kLaneOutsideMask);
  m.attr("LANE_MISSING") = static_cast<int>(cmpose::kLaneMissing);
  m.attr("UNEQUAL_MASKS") = static_cast<int>(cmpose::kUnequalMasks);
  m.attr("SOURCE_OUTSIDE_MASK") = static_cast<int>(cmpose::kSourceOutsideMask);
  m.attr("MISSING_WAIT") = static_cast<int>(cmpose::kMissingWait);
  m.attr("MISSING_RING_BARRIER") = static_cast<int>(cmpose::kMissingRingBarrier);
  m.attr("UNALIGNED_COPY") = static_cast<int>(cmpose::kUnalignedCopy);
  m.attr("GLOBAL_OUT_OF_BOUNDS") = static_cast<int>(cmpose::kGlobalOutOfBounds);
  m.attr("SHARED_OUT_OF_BOUNDS") = static_cast<int>(cmpose::kSharedOutOfBounds);
  m.attr("OVERFLOW") = static_cast<int>(cmpose::kOverflow);
  m.attr("TOO_MUCH_SHARED") = static_cast<int>(cmpose::kTooMuchShared);
}
