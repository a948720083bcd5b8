// What each instruction set offers, as a table of functions; dispatch.cc picks one.
#pragma once

#include "layout.h"

// Before a loop of few turns over registers, which must not become memory.
#if defined(__clang__)
#define ACCEL_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ACCEL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace accel_cpu {

enum class Activation { kNone, kGelu, kGeluTanh, kSilu };

// Quantised rows of activations, and how to read them.
struct QuantizedRows {
  int8_t* values = nullptr;   // [rows, stride], zeros behind the inputs
  int64_t stride = 0;
  float* scales = nullptr;    // [rows, blocks]
  int32_t* starts = nullptr;  // [rows, blocks]: what an accumulator starts from, minus zero point times the sum of values
};

// The rows that a product takes. With norm_weight, they are normalised first, into normalised.
struct Source {
  const float* x = nullptr;            // [rows, inputs]
  float fixed_scale = 0.0f;            // 0: from each row's (block's) largest magnitude
  const float* norm_weight = nullptr;  // LayerNorm's, [inputs]
  const float* norm_bias = nullptr;    // [inputs] or nullptr
  float epsilon = 0.0f;
  float* normalised = nullptr;         // [rows, inputs]
};

// The result's side of a product.
struct Epilogue {
  const float* bias = nullptr;      // [features], of a gated weight [outputs], interleaved as its rows are
  const float* residual = nullptr;  // [rows, features], added last
  float* result = nullptr;          // [rows, features]
  int64_t features = 0;
  Activation activation = Activation::kNone;
  bool gated = false;               // tiles alternate: gate, up; result = activation(gate) * up
};

struct Weight {
  WeightShape shape;
  const uint8_t* values = nullptr;
  const void* scales = nullptr;  // float32 [outputs] or float16 [panels][blocks][outputs of the panel]
};

// One head of one sequence. Rows are strides of floats apart.
struct AttentionHead {
  const float *q, *k, *v;
  int64_t q_stride, kv_stride, result_stride;
  const int32_t* mask;  // [length]: 0 hides a key; nullptr: none is hidden
  int64_t length;       // of the sequence
  int64_t size;         // of the head
  float scale;          // of the scores
  float* result;
};

struct KernelTable {
  const char* name;

  // Quantises the rows [first, last).
  void (*quantize_rows)(const Source& source, int64_t first, int64_t last, const WeightShape& shape,
                        const QuantizedRows& rows);

  // Computes the outputs of panels [first_panel, last_panel) for rows [first_row, last_row).
  void (*multiply)(const Weight& weight, const QuantizedRows& rows, int64_t first_row, int64_t last_row,
                   int64_t first_panel, int64_t last_panel, const Epilogue& epilogue);

  // Memory that attend takes, aligned to kLineBytes.
  size_t (*attention_bytes)(int64_t length, int64_t size);

  // Results of the queries [first_query, last_query): softmax(q k^T scale) v.
  void (*attend)(const AttentionHead& head, int64_t first_query, int64_t last_query, char* memory);
};

const KernelTable* portable_kernels();
const KernelTable* avx2_kernels();    // nullptr: not in this build
const KernelTable* avx512_kernels();  // nullptr: not in this build
const KernelTable* avx512_bf16_kernels();

// Parts of the last one, compiled by themselves: not every compiler knows bfloat16.
bool has_avx512_bf16();
size_t avx512_bf16_attention_bytes(int64_t length, int64_t size);
void avx512_bf16_attend(const AttentionHead& head, int64_t first_query, int64_t last_query, char* memory);

// The best table that this CPU runs, or the one that ACCEL_CPU_ISA names; nullptr and a message if that cannot be.
const KernelTable* choose_kernels(const char** error);

// Rows of the table, dequantised: result [count, inputs]. Every id is in range.
void gather_rows(const Weight& weight, const int64_t* ids, int64_t first, int64_t last, float* result);

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000u | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x400) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign != 0 ? -value : value;
  }
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

// 1 / sqrt(x) by Newton's method: no call into the system's library. Of 0: a large number.
inline float inverse_root(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  bits = 0x5f375a86u - (bits >> 1);
  float y;
  __builtin_memcpy(&y, &bits, sizeof y);
  for (int i = 0; i < 4; ++i) y *= 1.5f - 0.5f * x * y * y;
  return y;
}

}  // namespace accel_cpu
