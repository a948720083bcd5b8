#include "attention.h"

#include "scratch.h"

namespace accel_cpu {
namespace {

constexpr int64_t kFewestQueries = 64;     // below, packing a head's keys and values would take too large a part
constexpr int64_t kTasksPerProcessor = 6;  // so that all end at nearly the same time
constexpr int64_t kQueryMultiple = 8;      // queries of which kernels compute whole groups

struct Work {
  const KernelTable* kernels;
  const AttentionInputs* inputs;
  float* result;
  int64_t parts;  // of a head's queries
  bool failed;
};

// One head of one sequence, or a part of its queries.
void attend_task(void* data, size_t index) {
  Work& work = *static_cast<Work*>(data);
  const AttentionInputs& in = *work.inputs;
  const int64_t part = static_cast<int64_t>(index) % work.parts;
  const int64_t head = static_cast<int64_t>(index) / work.parts % in.heads;
  const int64_t sequence = static_cast<int64_t>(index) / work.parts / in.heads;
  const Scratch scratch(work.kernels->attention_bytes(in.length, in.size));
  if (scratch.data() == nullptr) {
    __atomic_store_n(&work.failed, true, __ATOMIC_RELAXED);
    return;
  }
  const int64_t row = sequence * in.length, column = head * in.size, width = in.heads * in.size;
  const AttentionHead one = {in.q + row * in.q_stride + column,
                             in.k + row * in.kv_stride + column,
                             in.v + row * in.kv_stride + column,
                             in.q_stride,
                             in.kv_stride,
                             width,
                             in.mask == nullptr ? nullptr : in.mask + row,
                             in.length,
                             in.size,
                             in.scale,
                             work.result + row * width + column};
  const int64_t groups = (in.length + kQueryMultiple - 1) / kQueryMultiple;
  const int64_t first = groups * part / work.parts * kQueryMultiple;
  const int64_t last = groups * (part + 1) / work.parts * kQueryMultiple;
  work.kernels->attend(one, first, last < in.length ? last : in.length, scratch.data());
}

}  // namespace

Outcome attention(const KernelTable& kernels, const AttentionInputs& inputs, float* result, const Pool& pool) {
  const int64_t heads = inputs.batch * inputs.heads;
  if (heads == 0 || inputs.length == 0) return Outcome::kDone;
  Work work{&kernels, &inputs, result, 1, false};
  const int64_t wanted = kTasksPerProcessor * processors();
  while (heads * work.parts < wanted && inputs.length / (work.parts * 2) >= kFewestQueries) work.parts *= 2;
  if (!pool.run(pool, attend_task, static_cast<size_t>(heads * work.parts), &work)) return Outcome::kPoolFailed;
  return work.failed ? Outcome::kOutOfMemory : Outcome::kDone;
}

}  // namespace accel_cpu
