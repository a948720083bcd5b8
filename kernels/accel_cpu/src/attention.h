// Attention of encoders, cut into tasks for threads.
#pragma once

#include "matmul.h"

namespace accel_cpu {

constexpr int64_t kMaxHeadSize = 256;

// Rows of q, k and v, of all heads side by side: [batch, length, heads * size], strides in floats.
struct AttentionInputs {
  const float *q, *k, *v;
  int64_t q_stride, kv_stride;
  const int32_t* mask;  // [batch, length]; nullptr: nothing is padding
  int64_t batch, length, heads, size;
  float scale;
};

// result [batch, length, heads * size]
Outcome attention(const KernelTable& kernels, const AttentionInputs& inputs, float* result, const Pool& pool);

}  // namespace accel_cpu
