// AVX-512 with BF16: vdpbf16ps adds two products of bfloat16 to each float32.
#include "kernels.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,fma")
#endif

namespace accel_cpu {
namespace {

#include "avx512_floats.h"

#include "attention_kernel.h"

struct Brain {
  using V = Avx512Floats;
  using E = uint16_t;
  using Pair = __m512i;
  static constexpr int kPair = 2, kRows = V::kQueries, kDegree = 3;

  static Pair load(const E* p) { return _mm512_loadu_si512(p); }
  static Pair broadcast(const E* p) {
    int32_t two;
    __builtin_memcpy(&two, p, sizeof two);
    return _mm512_set1_epi32(two);
  }
  static V::F dot(V::F sums, Pair a, Pair b) {  // by hand, as vpdpbusd
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
  }
  static Pair round(V::F a, V::F b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
  static void store(E* to, V::F a, V::F b) { _mm512_storeu_si512(to, round(a, b)); }
  static void interleave(E* to, V::F a, V::F b) {
    const __m512i both = round(a, b);
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static V::F some(const float* x, int64_t count) {
    if (count >= V::L) return V::load(x);
    return count <= 0 ? V::set(0.0f) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), x);
  }
  static void convert(E* to, const float* x, int64_t count, float factor, int64_t padded) {
    const V::F by = V::set(factor);
    for (int64_t i = 0; i < padded; i += 2 * V::L) {
      store(to + i, V::mul(some(x + i, count - i), by), V::mul(some(x + i + V::L, count - i - V::L), by));
    }
  }
  // 16 rows of 16 pairs become 16 columns: pairs of pairs, quarters, and then quarters of the vectors.
  static void transpose(E* to, const E* const* rows, int64_t steps) {
    __m512i a[16], b[16];
    ACCEL_UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(rows[i]);
    ACCEL_UNROLL for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    ACCEL_UNROLL for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
      a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
      a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
      a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    ACCEL_UNROLL for (int i = 0; i < 4; ++i) {
      const __m512i even = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
      const __m512i even2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88),
                    odd2 = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
      b[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
      b[i + 8] = _mm512_shuffle_i32x4(even, even2, 0xdd);
      b[i + 4] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
      b[i + 12] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
    ACCEL_UNROLL for (int i = 0; i < 16; ++i) {
      if (i < steps) _mm512_storeu_si512(to + i * 4 * V::L, b[i]);
    }
  }
  static void pack_keys(E* to, const E* const* rows, int64_t steps) {
    for (int half = 0; half < 2; ++half) {
      const E* some[16];
      for (int64_t step = 0; step < steps; step += 16) {
        for (int i = 0; i < 16; ++i) some[i] = rows[half * 16 + i] + step * 2;
        transpose(to + step * 4 * V::L + half * 2 * V::L, some, steps - step);
      }
    }
  }
};

}  // namespace

bool has_avx512_bf16() { return true; }

size_t avx512_bf16_attention_bytes(int64_t length, int64_t size) { return attention_bytes<Brain>(length, size); }

void avx512_bf16_attend(const AttentionHead& head, int64_t first_query, int64_t last_query, char* memory) {
  attend<Brain>(head, first_query, last_query, memory);
}

}  // namespace accel_cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#else

namespace accel_cpu {
bool has_avx512_bf16() { return false; }
size_t avx512_bf16_attention_bytes(int64_t, int64_t) { return 0; }
void avx512_bf16_attend(const AttentionHead&, int64_t, int64_t, char*) {}
}  // namespace accel_cpu

#endif
