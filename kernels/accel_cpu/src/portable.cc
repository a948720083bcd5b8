// Plain C++ for every CPU; loops over short arrays, which compilers turn into what vectors the CPU has.
#include "kernels.h"

namespace accel_cpu {
namespace {

struct Portable {
  static constexpr int L = 16;
  struct F {
    float v[L];
  };
  struct I {
    int32_t v[L];
  };
  struct X {
    int8_t v[4];
  };
  struct W8 {
    int8_t v[L * 4];
  };
  using W4 = W8;

  static constexpr int kZero8 = 0, kZero4 = 0;
  static constexpr int kRows = 2, kVectors = 1, kBlockRows = 2, kBlockVectors = 1, kFewRows = 1, kFewVectors = 1;

  template <class Function>
  static F each(Function function) {
    F result;
    for (int i = 0; i < L; ++i) result.v[i] = function(i);
    return result;
  }

  static F set(float x) {
    return each([&](int) { return x; });
  }
  static F add(F a, F b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
  }
  static F sub(F a, F b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
  }
  static F mul(F a, F b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
  }
  static F div(F a, F b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
  }
  static F fma(F a, F b, F c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static F min(F a, F b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
  }
  static F max(F a, F b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
  }
  static float round_one(float x) {  // to even, for |x| < 2^22: the sum has no room for a fraction
    constexpr float kShift = 12582912.0f;
    return (x + kShift) - kShift;
  }
  static F round(F x) {
    return each([&](int i) { return round_one(x.v[i]); });
  }
  static F scale2(F x, F n) {
    return each([&](int i) {
      const float exponent = n.v[i] == n.v[i] ? n.v[i] : 0.0f;  // x is NaN too then
      const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(exponent) + 127) << 23;
      float power;
      __builtin_memcpy(&power, &bits, sizeof power);
      return x.v[i] * power;
    });
  }
  static F select_negative(F x, F a, F b) {
    return each([&](int i) { return x.v[i] < 0.0f ? a.v[i] : b.v[i]; });
  }
  static F load(const float* p) {
    return each([&](int i) { return p[i]; });
  }
  static void store(float* p, F x) {
    for (int i = 0; i < L; ++i) p[i] = x.v[i];
  }
  static F load_scales(const uint16_t* p) {
    return each([&](int i) { return half_to_float(p[i]); });
  }

  static I set_int(int32_t x) {
    I result;
    for (int i = 0; i < L; ++i) result.v[i] = x;
    return result;
  }
  static I add_int(I a, I b) {
    for (int i = 0; i < L; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F to_float(I x) {
    return each([&](int i) { return static_cast<float>(x.v[i]); });
  }
  static int32_t sum(I x) {
    int32_t total = 0;
    for (int i = 0; i < L; ++i) total += x.v[i];
    return total;
  }

  static I magnitude(I largest, F x) {
    for (int i = 0; i < L; ++i) {
      int32_t bits;
      __builtin_memcpy(&bits, &x.v[i], sizeof bits);
      bits &= 0x7fffffff;
      largest.v[i] = bits > largest.v[i] ? bits : largest.v[i];
    }
    return largest;
  }
  static uint32_t largest_bits(I x) {
    int32_t largest = 0;
    for (int i = 0; i < L; ++i) largest = x.v[i] > largest ? x.v[i] : largest;
    return static_cast<uint32_t>(largest);
  }
  static I quantize(int8_t* p, F x, F inverse) {
    const F value = round(max(set(-127.0f), min(set(127.0f), mul(x, inverse))));
    I whole;
    for (int i = 0; i < L; ++i) {
      whole.v[i] = static_cast<int32_t>(value.v[i]);
      p[i] = static_cast<int8_t>(whole.v[i]);
    }
    return whole;
  }

  static W8 load8(const uint8_t* p) {
    W8 result;
    for (int i = 0; i < L * 4; ++i) result.v[i] = static_cast<int8_t>(p[i] ^ 0x80);
    return result;
  }
  static void load4(const uint8_t* p, W4& low, W4& high) {
    for (int i = 0; i < L * 4; ++i) {
      low.v[i] = static_cast<int8_t>((p[i] & 15) - 8);
      high.v[i] = static_cast<int8_t>((p[i] >> 4) - 8);
    }
  }
  static X broadcast(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static I dot(I sums, const W8& w, X x) {
    for (int i = 0; i < L; ++i) {
      for (int j = 0; j < 4; ++j) sums.v[i] += w.v[4 * i + j] * x.v[j];
    }
    return sums;
  }
};

#include "vector_math.h"

#include "tile_kernel.h"

constexpr KernelTable kTable{"portable", quantize_rows<Portable>, multiply<Portable>};

}  // namespace

const KernelTable* portable_kernels() { return &kTable; }

float half_to_float(uint16_t half) {
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

void gather_rows(const Weight& weight, const int64_t* ids, int64_t first, int64_t last, float* result) {
  const WeightShape& shape = weight.shape;
  const int64_t blocks = shape.blocks();
  const int per_step = shape.bits == 8 ? 4 : 8;
  for (int64_t index = first; index < last; ++index) {
    const int64_t panel = ids[index] / kPanel;
    const int64_t column = ids[index] % kPanel;
    const int64_t width = shape.tiles(panel) * kTile;
    const uint8_t* w = weight.values + panel * kPanel * shape.bytes_per_output() + column * 4;
    float* row = result + index * shape.inputs;
    for (int64_t k = 0; k < shape.inputs; ++k) {
      const int64_t within = k % per_step;
      const uint8_t byte = w[k / per_step * width * 4 + within % 4];
      const int value = shape.bits == 8 ? byte - 128 : (within < 4 ? byte & 15 : byte >> 4) - 8;
      float scale;
      if (shape.block == 0) {
        scale = static_cast<const float*>(weight.scales)[ids[index]];
      } else {
        const uint16_t* scales = static_cast<const uint16_t*>(weight.scales) + panel * kPanel * blocks;
        scale = half_to_float(scales[k / shape.block * width + column]);
      }
      row[k] = static_cast<float>(value) * scale;
    }
  }
}

}  // namespace accel_cpu
