// A product with a quantised weight, cut into tasks for a thread pool.
#pragma once

#include "kernels.h"

namespace accel_cpu {

// Runs task(data, index) for every index below count, in any order, on any threads; returns when all are done.
class Pool {
 public:
  using Task = void (*)(void* data, size_t index);
  virtual bool run(Task task, size_t count, void* data) = 0;  // false: the pool failed

 protected:
  ~Pool() = default;
};

enum class Outcome { kDone, kOutOfMemory, kPoolFailed };

// x [rows, inputs] times the weight; fixed_scale 0: activations are quantised by their own magnitude.
Outcome quantized_matmul(const KernelTable& kernels, const Weight& weight, const float* x, int64_t rows,
                         float fixed_scale, const Epilogue& epilogue, Pool& pool);

Outcome quantized_gather(const Weight& weight, const int64_t* ids, int64_t count, float* result, Pool& pool);

}  // namespace accel_cpu
