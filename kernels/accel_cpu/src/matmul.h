// A product with a quantised weight, cut into tasks for threads.
#pragma once

#include "kernels.h"

namespace accel_cpu {

// Threads: run calls task(data, index) for every index below count, in any order, and returns when all are done.
struct Pool {
  using Task = void (*)(void* data, size_t index);
  bool (*run)(const Pool& pool, Task task, size_t count, void* data);  // false: the threads refused
  const void* api;
  const void* context;
};

int64_t processors();  // that are online

enum class Outcome { kDone, kOutOfMemory, kPoolFailed };

// Rows times the weight.
Outcome quantized_matmul(const KernelTable& kernels, const Weight& weight, const Source& source, int64_t rows,
                         const Epilogue& epilogue, const Pool& pool);

Outcome quantized_gather(const Weight& weight, const int64_t* ids, int64_t count, float* result, const Pool& pool);

}  // namespace accel_cpu
