// For every CPU: vectors of 16 bytes, which compilers turn into what the CPU has (SSE2, NEON) or into plain code.
#include "kernels.h"

namespace accel_cpu {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bytes are taken out of words by shifts");

using Float4 = float __attribute__((vector_size(16)));
using Int4 = int32_t __attribute__((vector_size(16)));
using Short8 = int16_t __attribute__((vector_size(16)));

template <class To, class From>
inline To cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

struct Portable {
  static constexpr int L = 4;
  using F = Float4;
  using I = Int4;
  // Products are formed in 16 bits: inputs 0 and 2, and 1 and 3, of each output; 2 * 127 * 128 fits.
  struct X {
    Short8 even, odd;
  };
  using W8 = X;
  using W4 = X;

  static constexpr int kZero8 = 0, kZero4 = 0;
  static constexpr int kRows = 3, kVectors = 2, kBlockRows = 2, kBlockVectors = 2, kFewRows = 1, kFewVectors = 4;
  static constexpr int kQueries = 4;
  static constexpr bool kScalesToZero = false;

  static F set(float x) { return F{x, x, x, x}; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F round(F x) {  // to even, for |x| < 2^22: the sum has no room for a fraction
    const F shift = set(12582912.0f);
    return (x + shift) - shift;
  }
  static F scale2(F x, F n) {
    const F finite = n == n ? n : set(0.0f);  // where n is NaN, so is x
    return x * cast<F>((__builtin_convertvector(finite, I) + 127) << 23);
  }
  static F select_negative(F x, F a, F b) { return x < 0.0f ? a : b; }
  static F load(const float* p) {
    F x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { __builtin_memcpy(p, &x, sizeof x); }
  static void prefetch_read(const float* p) { __builtin_prefetch(p, 0); }
  static void prefetch_write(const float* p) { __builtin_prefetch(p, 1); }
  static F load_scales(const uint16_t* p) {
    return F{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
  }

  static float reduce_max(F x) {
    for (int i = 1; i < L; ++i) x[0] = x[i] > x[0] ? x[i] : x[0];
    return x[0];
  }
  static float reduce_add(F x) { return x[0] + x[1] + x[2] + x[3]; }

  static I set_int(int32_t x) { return I{x, x, x, x}; }
  static I add_int(I a, I b) { return a + b; }
  static F to_float(I x) { return __builtin_convertvector(x, F); }
  static int32_t sum(I x) { return x[0] + x[1] + x[2] + x[3]; }

  static I magnitude(I largest, F x) {
    const I bits = cast<I>(x) & 0x7fffffff;
    return bits > largest ? bits : largest;
  }
  static uint32_t largest_bits(I x) {
    int32_t largest = 0;
    for (int i = 0; i < L; ++i) largest = x[i] > largest ? x[i] : largest;
    return static_cast<uint32_t>(largest);
  }
  static I quantize(int8_t* p, F x, F inverse) {
    const F value = max(set(-127.0f), min(set(127.0f), mul(x, inverse)));
    const I whole = __builtin_convertvector(round(value), I);
    for (int i = 0; i < L; ++i) p[i] = static_cast<int8_t>(whole[i]);
    return whole;
  }

  static X widen(Short8 bytes) { return {static_cast<Short8>(bytes << 8) >> 8, bytes >> 8}; }
  static Short8 load_bytes(const uint8_t* p) {
    Short8 bytes;
    __builtin_memcpy(&bytes, p, sizeof bytes);
    return bytes;
  }
  static W8 load8(const uint8_t* p) { return widen(load_bytes(p) ^ static_cast<int16_t>(0x8080)); }
  static void load4(const uint8_t* p, W4& low, W4& high) {
    const Short8 both = load_bytes(p);
    low = {(both & 15) - 8, (both >> 8 & 15) - 8};
    high = {(both >> 4 & 15) - 8, (both >> 12 & 15) - 8};
  }
  static X broadcast(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return widen(cast<Short8>(set_int(four)));
  }
  static I dot(I sums, W8 w, X x) {
    const I pairs = cast<I>(w.even * x.even + w.odd * x.odd);
    return sums + (static_cast<I>(pairs << 16) >> 16) + (pairs >> 16);
  }
};

#include "vector_math.h"

#include "tile_kernel.h"

#include "attention_kernel.h"

constexpr KernelTable kTable{"portable", quantize_rows<Portable>, multiply<Portable>,
                             attention_bytes<Floats<Portable>>, attend<Floats<Portable>>};

}  // namespace

const KernelTable* portable_kernels() { return &kTable; }

void gather_rows(const Weight& weight, const int64_t* ids, int64_t first, int64_t last, float* result) {
  const WeightShape& shape = weight.shape;
  const int64_t blocks = shape.blocks();
  const int64_t block = shape.block == 0 ? shape.inputs : shape.block;
  for (int64_t index = first; index < last; ++index) {
    const int64_t panel = ids[index] / kPanel;
    const int64_t column = ids[index] % kPanel;
    const int64_t width = shape.tiles(panel) * kTile;
    const uint8_t* w = weight.values + panel * kPanel * shape.bytes_per_output() + column * 4;
    const uint16_t* halves = static_cast<const uint16_t*>(weight.scales) + panel * kPanel * blocks + column;
    for (int64_t start = 0; start < shape.inputs; start += block) {
      const float scale = shape.block == 0 ? static_cast<const float*>(weight.scales)[ids[index]]
                                           : half_to_float(halves[start / block * width]);
      const int64_t stop = start + block < shape.inputs ? start + block : shape.inputs;
      float* values = result + index * shape.inputs;
      for (int64_t k = start; k < stop; ++k) {
        const int64_t part = shape.bits == 8 ? k / 4 : k / 8;
        const int byte = w[part * width * 4 + k % 4];
        const int value = shape.bits == 8 ? byte - 128 : (k % 8 < 4 ? byte & 15 : byte >> 4) - 8;
        values[k] = static_cast<float>(value) * scale;
      }
    }
  }
}

}  // namespace accel_cpu
