// Placeholder of the ops' host interface; the real one replaces it.
#pragma once

#include <cstdint>

namespace cmpose {

void fill(float* out, int64_t size, float value, void* stream);

}  // namespace cmpose
