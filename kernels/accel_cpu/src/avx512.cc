// AVX-512 with VNNI: vpdpbusd multiplies 4 unsigned weights with 4 signed activations per lane and adds them up.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif

namespace accel_cpu {
namespace {

#include "avx512_floats.h"

struct Avx512 : Avx512Floats {
  using I = __m512i;
  using X = __m512i;
  struct W8 {
    __m512i v;
  };
  using W4 = W8;

  static constexpr int kZero8 = 128, kZero4 = 8;
  static constexpr int kRows = 6, kVectors = 4, kBlockRows = 6, kBlockVectors = 2, kFewRows = 3, kFewVectors = 4;

  // By hand: GCC takes a function of nothing but the builtin for one without effect, and leaves it out.
  static void prefetch_read(const float* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*p)); }
  static void prefetch_write(const float* p) { __asm__ volatile("prefetchw %0" : : "m"(*p)); }
  static F load_scales(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  static I set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }
  static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
  static int32_t sum(I x) { return _mm512_reduce_add_epi32(x); }

  static I magnitude(I largest, F x) {
    return _mm512_max_epi32(largest, _mm512_and_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
  }
  static uint32_t largest_bits(I x) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(x)); }
  static I quantize(int8_t* p, F x, F inverse) {
    const F value = max(set(-127.0f), min(set(127.0f), mul(x, inverse)));
    const I whole = _mm512_cvtps_epi32(value);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(whole));
    return whole;
  }

  static W8 load8(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static void load4(const uint8_t* p, W4& low, W4& high) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i both = _mm512_loadu_si512(p);
    low.v = _mm512_and_si512(both, mask);
    high.v = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  }
  static X broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
  }
  static I dot(I sums, W8 w, X x) {  // by hand: GCC copies accumulators around the intrinsic, at half the speed
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(w.v), "v"(x));
    return sums;
  }
};

#include "vector_math.h"

#include "tile_kernel.h"

#include "attention_kernel.h"

constexpr KernelTable kTable{"avx512vnni", quantize_rows<Avx512>, multiply<Avx512>,
                             attention_bytes<Floats<Avx512>>, attend<Floats<Avx512>>};
constexpr KernelTable kBrainTable{"avx512bf16", quantize_rows<Avx512>, multiply<Avx512>, avx512_bf16_attention_bytes,
                                  avx512_bf16_attend};

}  // namespace

const KernelTable* avx512_kernels() { return &kTable; }

const KernelTable* avx512_bf16_kernels() { return has_avx512_bf16() ? &kBrainTable : nullptr; }

}  // namespace accel_cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace accel_cpu {
const KernelTable* avx512_kernels() { return nullptr; }
const KernelTable* avx512_bf16_kernels() { return nullptr; }
}  // namespace accel_cpu

#endif
