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

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using X = __m512i;
  struct W8 {
    __m512i v;
  };
  using W4 = W8;

  static constexpr int L = 16;
  static constexpr int kZero8 = 128, kZero4 = 8;
  static constexpr int kRows = 6, kVectors = 4, kBlockRows = 6, kBlockVectors = 2, kFewRows = 3, kFewVectors = 4;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale2(F x, F n) { return _mm512_scalef_ps(x, n); }
  static F select_negative(F x, F a, F b) {
    return _mm512_mask_blend_ps(_mm512_movepi32_mask(_mm512_castps_si512(x)), b, a);
  }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
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

constexpr KernelTable kTable{"avx512vnni", quantize_rows<Avx512>, multiply<Avx512>};

}  // namespace

const KernelTable* avx512_kernels() { return &kTable; }

}  // namespace accel_cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace accel_cpu {
const KernelTable* avx512_kernels() { return nullptr; }
}  // namespace accel_cpu

#endif
