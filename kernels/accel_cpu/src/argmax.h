// The largest value of each row and where it stands.
#pragma once

#include "matmul.h"

namespace accel_cpu {

// x [rows, width] -> indices [rows], the lowest among equals, and values [rows]. A NaN wins over every number.
Outcome argmax(const float* x, int64_t rows, int64_t width, int64_t* indices, float* values, const Pool& pool);

}  // namespace accel_cpu
