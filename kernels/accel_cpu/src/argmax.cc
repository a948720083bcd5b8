#include "argmax.h"

#include <string.h>

namespace accel_cpu {
namespace {

// Vectors of 16 bytes, which every instruction set has: reading the values takes longer than comparing them.
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Mask __attribute__((vector_size(16)));

constexpr int64_t kLanes = 4, kVectors = 8, kBlock = 256;  // of a block only its largest value is kept at first
constexpr int64_t kPart = 16384;                           // values of one task, where rows are few
constexpr int64_t kMaxParts = 64;                          // of all rows together

struct Best {
  float value;
  int64_t index;
};

bool is_nan(float value) { return value != value; }

bool beats(float one, float other) { return one > other || (is_nan(one) && !is_nan(other)); }

// Of a whole block; NaN where it holds one.
float largest_of_block(const float* x) {
  Floats top[kVectors];
  Mask ordered = {-1, -1, -1, -1};
  for (int64_t start = 0; start < kBlock; start += kLanes * kVectors) {
    ACCEL_UNROLL
    for (int64_t i = 0; i < kVectors; ++i) {
      Floats value;
      memcpy(&value, x + start + i * kLanes, sizeof value);
      ordered &= value == value;
      top[i] = start == 0 ? value : (value > top[i] ? value : top[i]);
    }
  }
  float result = top[0][0];
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (ordered[lane] == 0) return __builtin_nanf("");
    for (const Floats& values : top) result = values[lane] > result ? values[lane] : result;
  }
  return result;
}

float largest(const float* x, int64_t count) {
  if (count == kBlock) return largest_of_block(x);
  float result = x[0];
  for (int64_t i = 1; i < count; ++i) result = beats(x[i], result) ? x[i] : result;
  return result;
}

// Of x[first, last), which holds one value at least.
Best best_of(const float* x, int64_t first, int64_t last) {
  Best best = {0.0f, -1};
  for (int64_t start = first; start < last && !(best.index >= 0 && is_nan(best.value)); start += kBlock) {
    const float top = largest(x + start, last - start < kBlock ? last - start : kBlock);
    if (best.index < 0 || beats(top, best.value)) best = {top, start};
  }
  while (is_nan(best.value) ? !is_nan(x[best.index]) : x[best.index] != best.value) ++best.index;
  return {x[best.index], best.index};
}

struct Work {
  const float* x;
  int64_t rows, width, parts;  // parts of each row
  Best found[kMaxParts];       // [rows, parts], unused where parts == 1
  int64_t* indices;
  float* values;
};

void run_part(void* data, size_t task) {
  Work& work = *static_cast<Work*>(data);
  const int64_t row = static_cast<int64_t>(task) / work.parts, part = static_cast<int64_t>(task) % work.parts;
  const float* x = work.x + row * work.width;
  const Best best = best_of(x, work.width * part / work.parts, work.width * (part + 1) / work.parts);
  if (work.parts > 1) {
    work.found[task] = best;
  } else {
    work.indices[row] = best.index;
    work.values[row] = best.value;
  }
}

}  // namespace

Outcome argmax(const float* x, int64_t rows, int64_t width, int64_t* indices, float* values, const Pool& pool) {
  if (rows == 0) return Outcome::kDone;
  Work work;
  work.x = x;
  work.rows = rows;
  work.width = width;
  work.indices = indices;
  work.values = values;
  const int64_t wanted = (width + kPart - 1) / kPart, allowed = kMaxParts / rows;
  work.parts = allowed < 1 ? 1 : wanted < allowed ? wanted : allowed;
  if (!pool.run(pool, run_part, static_cast<size_t>(rows * work.parts), &work)) return Outcome::kPoolFailed;
  for (int64_t row = 0; row < rows && work.parts > 1; ++row) {
    const Best* found = work.found + row * work.parts;
    Best best = found[0];
    for (int64_t part = 1; part < work.parts; ++part) {
      if (beats(found[part].value, best.value)) best = found[part];
    }
    indices[row] = best.index;
    values[row] = best.value;
  }
  return Outcome::kDone;
}

}  // namespace accel_cpu
