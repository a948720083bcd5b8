// Quantisation of rows, products of tiles and their epilogue, written once for every instruction set. No include guard
// on purpose: each instruction set's file includes it once, inside its own anonymous namespace and target.
//
// V offers beside what vector_math.h needs:
//   L           floats, or int32, per vector
//   I           int32 vector; set_int, to_float
//   W8, W4      weights of 4 inputs of L outputs: load8(p); load4(p, low, high): inputs 0..3, 4..7
//   X           4 activations, in every lane: broadcast(p)
//   dot(acc, w, x)  acc + the products' sums; exact
//   kZero8, kZero4  what V's dot adds to each weight: 128 or 8 where it takes them unsigned, else 0
//   load, store, load_scales (L float16)
//   magnitude(largest, x): running maximum of the bits of |x|, as an integer vector; largest_bits(v)
//   reduce_add(floats)
//   prefetch_read(p), prefetch_write(p)
//   quantize(p, x, inverse) -> I: clamps x * inverse to +-127, rounds to even, stores L bytes; sum(I)
//   kRows, kVectors, kBlockRows, kBlockVectors: register blocking

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kSmallest = 1e-30f;  // magnitudes below count as zero: their inverse would overflow

struct BlockScale {
  float scale;    // NaN where a value is NaN or infinite: so becomes the whole result row
  float inverse;  // 0: every quantised value is 0
};

inline BlockScale block_scale(uint32_t magnitude_bits, float fixed_scale) {
  if (magnitude_bits >= kInfinityBits) {
    return {__builtin_nanf(""), 0.0f};
  }
  if (fixed_scale > 0.0f) {
    return {fixed_scale, 1.0f / fixed_scale};
  }
  float largest;
  __builtin_memcpy(&largest, &magnitude_bits, sizeof largest);
  return largest < kSmallest ? BlockScale{0.0f, 0.0f} : BlockScale{largest / 127.0f, 127.0f / largest};
}

// One row's block of count values; returns what its accumulators start from.
template <class V>
inline int32_t quantize_block(const float* x, int64_t count, float fixed_scale, int32_t zero, int8_t* values,
                              float* scale) {
  constexpr int L = V::L;
  const int64_t whole = count / L * L;
  float tail[L] = {};
  for (int64_t i = whole; i < count; ++i) tail[i - whole] = x[i];
  typename V::I largest = V::set_int(0);
  for (int64_t i = 0; i < whole; i += L) largest = V::magnitude(largest, V::load(x + i));
  if (whole < count) largest = V::magnitude(largest, V::load(tail));
  const BlockScale found = block_scale(V::largest_bits(largest), fixed_scale);
  *scale = found.scale;
  const bool nothing = found.inverse == 0.0f;  // infinity * 0 is no number
  const typename V::F inverse = V::set(found.inverse);
  typename V::I total = V::set_int(0);
  for (int64_t i = 0; i < whole; i += L) {
    total = V::add_int(total, V::quantize(values + i, nothing ? V::set(0.0f) : V::load(x + i), inverse));
  }
  if (whole < count) {
    int8_t rest[L];
    total = V::add_int(total, V::quantize(rest, nothing ? V::set(0.0f) : V::load(tail), inverse));
    for (int64_t i = whole; i < count; ++i) values[i] = rest[i - whole];
  }
  return -zero * V::sum(total);
}

// LayerNorm of one row. The mean first, then the deviation from it: nothing cancels.
template <class V>
void normalize_row(const float* x, int64_t count, const Source& source, float* y) {
  using F = typename V::F;
  const int64_t whole = count / V::L * V::L;
  F sums = V::set(0.0f);
  for (int64_t i = 0; i < whole; i += V::L) sums = V::add(sums, V::load(x + i));
  float sum = V::reduce_add(sums);
  for (int64_t i = whole; i < count; ++i) sum += x[i];
  const float mean = sum / static_cast<float>(count);
  const F middle = V::set(mean);
  F squares = V::set(0.0f);
  for (int64_t i = 0; i < whole; i += V::L) {
    const F distance = V::sub(V::load(x + i), middle);
    squares = V::fma(distance, distance, squares);
  }
  float square = V::reduce_add(squares);
  for (int64_t i = whole; i < count; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float factor = inverse_root(square / static_cast<float>(count) + source.epsilon);
  const F scale = V::set(factor);
  const float *weight = source.norm_weight, *bias = source.norm_bias;
  for (int64_t i = 0; i < whole; i += V::L) {
    const F even = V::mul(V::sub(V::load(x + i), middle), scale);
    V::store(y + i, V::fma(even, V::load(weight + i), bias == nullptr ? V::set(0.0f) : V::load(bias + i)));
  }
  for (int64_t i = whole; i < count; ++i) {
    y[i] = (x[i] - mean) * factor * weight[i] + (bias == nullptr ? 0.0f : bias[i]);
  }
}

template <class V>
void quantize_rows(const Source& from, int64_t first, int64_t last, const WeightShape& shape,
                   const QuantizedRows& rows) {
  const int64_t blocks = shape.blocks();
  const int64_t block = shape.block == 0 ? shape.inputs : shape.block;
  const int32_t zero = shape.bits == 8 ? V::kZero8 : V::kZero4;
  for (int64_t row = first; row < last; ++row) {
    const float* source = from.x + row * shape.inputs;
    if (from.norm_weight != nullptr) {
      float* normalised = from.normalised + row * shape.inputs;
      normalize_row<V>(source, shape.inputs, from, normalised);
      source = normalised;
    }
    int8_t* values = rows.values + row * rows.stride;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = b * block;
      const int64_t count = start + block < shape.inputs ? block : shape.inputs - start;
      rows.starts[row * blocks + b] = quantize_block<V>(source + start, count, from.fixed_scale, zero, values + start,
                                                        rows.scales + row * blocks + b);
    }
    for (int64_t i = shape.inputs; i < shape.padded_inputs(); ++i) values[i] = 0;
  }
}

// One step of a product: 4 (8 bits) or 8 (4 bits) inputs of N vectors of outputs times M rows.
template <class V, int BITS, int M, int N>
struct Step {
  using I = typename V::I;

  static constexpr int kInputs = BITS == 8 ? 4 : 8;

  static inline void run(I (&sums)[M][N], const int8_t* x, int64_t stride, const uint8_t* w) {
    if constexpr (BITS == 8) {
      typename V::W8 weights[N];
      ACCEL_UNROLL for (int n = 0; n < N; ++n) weights[n] = V::load8(w + n * V::L * 4);
      accumulate(sums, x, stride, weights);
    } else {
      typename V::W4 low[N], high[N];
      ACCEL_UNROLL for (int n = 0; n < N; ++n) V::load4(w + n * V::L * 4, low[n], high[n]);
      accumulate(sums, x, stride, low);
      accumulate(sums, x + 4, stride, high);
    }
  }

  template <class W>
  static inline void accumulate(I (&sums)[M][N], const int8_t* x, int64_t stride, const W (&weights)[N]) {
    ACCEL_UNROLL for (int m = 0; m < M; ++m) {
      const typename V::X value = V::broadcast(x + m * stride);
      ACCEL_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = V::dot(sums[m][n], weights[n], value);
    }
  }
};

// Where a product of M rows and N vectors of outputs finds its operands.
struct Operands {
  const int8_t* x;        // of the first row
  int64_t stride;
  const float* x_scales;  // [M, blocks]
  const int32_t* starts;  // [M, blocks]
  int64_t blocks;
  int64_t inputs;         // padded
  int64_t block;
  const uint8_t* w;       // of the first vector
  int64_t w_step;         // bytes from one step to the next
  const void* w_scales;
  int64_t scales_step;    // outputs from one block's scales to the next
  float* sums;            // [M, kPanel]
};

// One scale per output.
template <class V, int BITS, int M, int N>
void row_product(const Operands& a) {
  using S = Step<V, BITS, M, N>;
  typename V::I sums[M][N];
  ACCEL_UNROLL for (int m = 0; m < M; ++m) {
    ACCEL_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = V::set_int(a.starts[m]);
  }
  const uint8_t* w = a.w;
  const int8_t* x = a.x;
  for (int64_t k = 0; k < a.inputs; k += S::kInputs) {
    S::run(sums, x, a.stride, w);
    x += S::kInputs;
    w += a.w_step;
  }
  const float* scales = static_cast<const float*>(a.w_scales);
  ACCEL_UNROLL for (int n = 0; n < N; ++n) {
    const typename V::F w_scale = V::load(scales + n * V::L);
    ACCEL_UNROLL for (int m = 0; m < M; ++m) {
      const typename V::F scale = V::mul(w_scale, V::set(a.x_scales[m]));
      V::store(a.sums + m * kPanel + n * V::L, V::mul(V::to_float(sums[m][n]), scale));
    }
  }
}

// One scale per block of inputs: sums in int32 within a block, in float32 over blocks.
template <class V, int BITS, int M, int N>
void block_product(const Operands& a) {
  using S = Step<V, BITS, M, N>;
  typename V::F totals[M][N];
  ACCEL_UNROLL for (int m = 0; m < M; ++m) {
    ACCEL_UNROLL for (int n = 0; n < N; ++n) totals[m][n] = V::set(0.0f);
  }
  const uint8_t* w = a.w;
  const int8_t* x = a.x;
  const uint16_t* scales = static_cast<const uint16_t*>(a.w_scales);
  for (int64_t b = 0; b < a.blocks; ++b) {
    typename V::I sums[M][N];
    ACCEL_UNROLL for (int m = 0; m < M; ++m) {
      ACCEL_UNROLL for (int n = 0; n < N; ++n) sums[m][n] = V::set_int(a.starts[m * a.blocks + b]);
    }
    const int64_t left = a.inputs - b * a.block;
    const int64_t count = left < a.block ? left : a.block;
    for (int64_t k = 0; k < count; k += S::kInputs) {
      S::run(sums, x, a.stride, w);
      x += S::kInputs;
      w += a.w_step;
    }
    ACCEL_UNROLL for (int n = 0; n < N; ++n) {
      const typename V::F w_scale = V::load_scales(scales + n * V::L);
      ACCEL_UNROLL for (int m = 0; m < M; ++m) {
        const typename V::F scale = V::mul(w_scale, V::set(a.x_scales[m * a.blocks + b]));
        totals[m][n] = V::fma(V::to_float(sums[m][n]), scale, totals[m][n]);
      }
    }
    scales += a.scales_step;
  }
  ACCEL_UNROLL for (int m = 0; m < M; ++m) {
    ACCEL_UNROLL for (int n = 0; n < N; ++n) V::store(a.sums + m * kPanel + n * V::L, totals[m][n]);
  }
}

// Bias, activation and gate of L sums.
template <class V, Activation ACTIVATION, bool GATED>
inline typename V::F finish(const float* sums, const float* bias) {
  using F = typename V::F;
  F value = V::load(sums);
  if (bias != nullptr) value = V::add(value, V::load(bias));
  value = activate<V>(ACTIVATION, value);
  if constexpr (GATED) {
    F up = V::load(sums + kTile);
    if (bias != nullptr) up = V::add(up, V::load(bias + kTile));
    value = V::mul(value, up);
  }
  return value;
}

// What follows a panel's sums [rows, kPanel], tile by tile. Bias and features are padded to whole tiles nowhere, but
// for a gated bias, which comes as its rows do.
template <class V, Activation ACTIVATION, bool GATED>
void finish_rows(const float* sums, int rows, int tiles, int64_t panel, int64_t row, const Epilogue& e) {
  constexpr int kStep = GATED ? 2 * kTile : kTile;
  const int64_t features = e.features;  // read once: for all the compiler knows, a store may change what e holds
  const float* residuals = e.residual;
  float* results = e.result;
  for (int column = 0; column < tiles * kTile; column += kStep) {
    const int64_t feature = (panel * kPanel + column) / (GATED ? 2 : 1);
    const int count = features - feature < kTile ? static_cast<int>(features - feature) : kTile;
    float padded_bias[kTile] = {};
    const float* bias = e.bias == nullptr ? nullptr : e.bias + panel * kPanel + column;
    if (bias != nullptr && count < kTile && !GATED) {
      for (int i = 0; i < count; ++i) padded_bias[i] = bias[i];
      bias = padded_bias;
    }
    for (int m = 0; m < rows; ++m) {
      const float* source = sums + m * kPanel + column;
      const int64_t place = (row + m) * features + feature;
      float whole[kTile];
      float* target = count == kTile ? results + place : whole;
      ACCEL_UNROLL for (int i = 0; i < kTile; i += V::L) {
        typename V::F value = finish<V, ACTIVATION, GATED>(source + i, bias == nullptr ? nullptr : bias + i);
        if (residuals != nullptr && count == kTile) value = V::add(value, V::load(residuals + place + i));
        V::store(target + i, value);
      }
      for (int i = 0; count < kTile && i < count; ++i) {
        results[place + i] = residuals == nullptr ? whole[i] : whole[i] + residuals[place + i];
      }
    }
  }
}

using Finish = void (*)(const float* sums, int rows, int tiles, int64_t panel, int64_t row, const Epilogue& e);

template <class V, bool GATED>
Finish finish_of(Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return finish_rows<V, Activation::kGelu, GATED>;
    case Activation::kGeluTanh:
      return finish_rows<V, Activation::kGeluTanh, GATED>;
    case Activation::kSilu:
      return finish_rows<V, Activation::kSilu, GATED>;
    case Activation::kNone:
      break;
  }
  return finish_rows<V, Activation::kNone, GATED>;
}

// Fetches the lines of a result before its product is computed: written after it, each would be waited for.
template <class V>
inline void prefetch_result(int rows, int tiles, int64_t panel, int64_t row, const Epilogue& e) {
  constexpr int kLine = 64 / static_cast<int>(sizeof(float));
  const int64_t width = tiles * kTile / (e.gated ? 2 : 1);
  const int64_t first = panel * kPanel / (e.gated ? 2 : 1);
  for (int m = 0; m < rows; ++m) {
    const int64_t place = (row + m) * e.features + first;
    for (int64_t column = 0; column < width; column += kLine) {
      V::prefetch_write(e.result + place + column);
      if (e.residual != nullptr) V::prefetch_read(e.residual + place + column);
    }
  }
}

template <class V, int BITS, bool BLOCKED, int M, int N>
inline void product(const Operands& a) {
  if constexpr (BLOCKED) {
    block_product<V, BITS, M, N>(a);
  } else {
    row_product<V, BITS, M, N>(a);
  }
}

// All vectors of a panel, N at a time and then fewer.
template <class V, int BITS, bool BLOCKED, int M, int N>
inline void panel_product(Operands a, int vectors) {
  constexpr int kScaleBytes = BLOCKED ? 2 : 4;
  for (; vectors >= N; vectors -= N) {
    product<V, BITS, BLOCKED, M, N>(a);
    a.w += N * V::L * 4;
    a.w_scales = static_cast<const char*>(a.w_scales) + N * V::L * kScaleBytes;
    a.sums += N * V::L;
  }
  if constexpr (N > 1) {
    if (vectors > 0) panel_product<V, BITS, BLOCKED, M, N / 2>(a, vectors);
  }
}

template <class V, int BITS, bool BLOCKED, int M>
inline void rows_product(int rows, const Operands& a, int vectors) {
  if (rows == M) {
    constexpr int kMany = BLOCKED ? V::kBlockVectors : V::kVectors;
    panel_product<V, BITS, BLOCKED, M, (M <= V::kFewRows ? V::kFewVectors : kMany)>(a, vectors);
  } else if constexpr (M > 1) {
    rows_product<V, BITS, BLOCKED, M - 1>(rows, a, vectors);
  }
}

template <class V, int BITS, bool BLOCKED>
void multiply_tiles(const Weight& weight, const QuantizedRows& rows, int64_t first_row, int64_t last_row,
                    int64_t first_panel, int64_t last_panel, const Epilogue& epilogue) {
  constexpr int kMost = BLOCKED ? V::kBlockRows : V::kRows;
  const WeightShape& shape = weight.shape;
  const int64_t count = last_row - first_row;
  const int64_t groups = (count + kMost - 1) / kMost;
  const Finish finish = epilogue.gated ? finish_of<V, true>(epilogue.activation)
                                       : finish_of<V, false>(epilogue.activation);
  alignas(64) float sums[kMost * kPanel];
  Operands a{};
  a.stride = rows.stride;
  a.blocks = shape.blocks();
  a.inputs = shape.padded_inputs();
  a.block = shape.block;
  a.sums = sums;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int tiles = shape.tiles(panel);
    a.w = weight.values + panel * kPanel * shape.bytes_per_output();
    a.w_step = tiles * kStepBytes;
    a.scales_step = tiles * kTile;
    a.w_scales = static_cast<const char*>(weight.scales) + panel * kPanel * a.blocks * (BLOCKED ? 2 : 4);
    for (int64_t group = 0; group < groups; ++group) {  // of nearly equal size: no short one at the end
      const int64_t row = first_row + count * group / groups;
      const int some = static_cast<int>(first_row + count * (group + 1) / groups - row);
      prefetch_result<V>(some, tiles, panel, row, epilogue);
      a.x = rows.values + row * rows.stride;
      a.x_scales = rows.scales + row * a.blocks;
      a.starts = rows.starts + row * a.blocks;
      rows_product<V, BITS, BLOCKED, kMost>(some, a, tiles * (kTile / V::L));
      finish(sums, some, tiles, panel, row, epilogue);
    }
  }
}

template <class V>
void multiply(const Weight& weight, const QuantizedRows& rows, int64_t first_row, int64_t last_row,
              int64_t first_panel, int64_t last_panel, const Epilogue& epilogue) {
  const auto run = weight.shape.bits == 8
                       ? (weight.shape.block == 0 ? multiply_tiles<V, 8, false> : multiply_tiles<V, 8, true>)
                       : (weight.shape.block == 0 ? multiply_tiles<V, 4, false> : multiply_tiles<V, 4, true>);
  run(weight, rows, first_row, last_row, first_panel, last_panel, epilogue);
}
