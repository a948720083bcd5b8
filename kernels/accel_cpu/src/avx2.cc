// AVX2 without VNNI, exact: vpmaddubsw adds two products in 16 bits, which holds |q| * |x| <= 127 * 127 twice (8 bits,
// the sign moved to x) and 15 * 127 twice (4 bits), so that nothing saturates.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace accel_cpu {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  using X = __m256i;
  struct W8 {
    __m256i value, magnitude;
  };
  struct W4 {
    __m256i value;
  };

  static constexpr int L = 8;
  static constexpr int kZero8 = 0, kZero4 = 8;
  static constexpr int kRows = 4, kVectors = 2, kBlockRows = 2, kBlockVectors = 2, kFewRows = 1, kFewVectors = 4;
  static constexpr int kQueries = 4;
  static constexpr bool kScalesToZero = false;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F round(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F scale2(F x, F n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static F select_negative(F x, F a, F b) { return _mm256_blendv_ps(b, a, x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  // By hand: GCC takes a function of nothing but the builtin for one without effect, and leaves it out.
  static void prefetch_read(const float* p) { __asm__ volatile("prefetcht0 %0" : : "m"(*p)); }
  static void prefetch_write(const float* p) { __asm__ volatile("prefetchw %0" : : "m"(*p)); }
  static F load_scales(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }

  static float reduce_max(F x) {
    alignas(32) float lanes[L];
    _mm256_store_ps(lanes, x);
    for (int i = 1; i < L; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }
  static float reduce_add(F x) {
    alignas(32) float lanes[L];
    _mm256_store_ps(lanes, x);
    for (int i = 1; i < L; ++i) lanes[0] += lanes[i];
    return lanes[0];
  }

  static I set_int(int32_t x) { return _mm256_set1_epi32(x); }
  static I add_int(I a, I b) { return _mm256_add_epi32(a, b); }
  static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
  static int32_t sum(I x) {
    alignas(32) int32_t lanes[L];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
    int32_t total = 0;
    for (int i = 0; i < L; ++i) total += lanes[i];
    return total;
  }

  static I magnitude(I largest, F x) {
    return _mm256_max_epi32(largest, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
  }
  static uint32_t largest_bits(I x) {
    alignas(32) uint32_t lanes[L];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), x);
    uint32_t largest = 0;
    for (int i = 0; i < L; ++i) largest = lanes[i] > largest ? lanes[i] : largest;
    return largest;
  }
  static I quantize(int8_t* p, F x, F inverse) {
    const F value = max(set(-127.0f), min(set(127.0f), mul(x, inverse)));
    const I whole = _mm256_cvtps_epi32(value);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
    return whole;
  }

  static W8 load8(const uint8_t* p) {
    const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i value = _mm256_xor_si256(stored, _mm256_set1_epi8(static_cast<char>(0x80)));
    return {value, _mm256_abs_epi8(value)};
  }
  static void load4(const uint8_t* p, W4& low, W4& high) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    low.value = _mm256_and_si256(both, mask);
    high.value = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
  static X broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm256_set1_epi32(four);
  }
  static I add_pairs(I sums, __m256i pairs) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I dot(I sums, W8 w, X x) {
    return add_pairs(sums, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(x, w.value)));
  }
  static I dot(I sums, W4 w, X x) { return add_pairs(sums, _mm256_maddubs_epi16(w.value, x)); }
};

#include "vector_math.h"

#include "tile_kernel.h"

#include "attention_kernel.h"

constexpr KernelTable kTable{"avx2", quantize_rows<Avx2>, multiply<Avx2>, attention_bytes<Floats<Avx2>>,
                             attend<Floats<Avx2>>};

}  // namespace

const KernelTable* avx2_kernels() { return &kTable; }

}  // namespace accel_cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace accel_cpu {
const KernelTable* avx2_kernels() { return nullptr; }
}  // namespace accel_cpu

#endif
