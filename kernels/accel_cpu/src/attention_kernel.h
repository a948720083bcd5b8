// Attention of one head, written once for every instruction set. No include guard on purpose, as tile_kernel.h.
//
// A says in what products are formed:
//   V            vectors of floats, as vector_math.h and tile_kernel.h have them; V::reduce_max, V::reduce_add
//   E, kPair     an element, and how many neighbours of the summed dimension one product takes
//   V::kQueries, V::kScalesToZero: whether scale2 takes any n
//   kRows        queries whose sums are in registers at once, times two vectors
//   kDegree      of the polynomial for 2^x: as exact as what E holds
//   Pair         one vector of such neighbours: load(p), broadcast(p); dot(sums, a, b)
//   convert(to, x, count, factor, padded): count values times factor, then zeros up to padded
//   store(to, a, b): two vectors of floats side by side
//   interleave(to, a, b): as pairs, where kPair is 2
//   pack_keys(to, rows, steps): 2 L rows -> [steps][2 L] pairs
//
// Both products are panels: a panel holds 2 L columns, [steps][2 L][kPair], and is multiplied with kRows rows of
// elements. The columns are keys, and then the values' features. A row's scores stay in memory as a whole: they are
// written once, by the first product, and become its weights in place.

template <class V, int DEGREE>
inline typename V::F power_of_two(typename V::F x) {  // for x <= 0; relative error 7e-5 or 1e-7
  using F = typename V::F;
  if constexpr (!V::kScalesToZero) x = V::max(V::set(-127.0f), x);
  const F n = V::round(x);
  const F r = V::sub(x, n);
  F p;
  if constexpr (DEGREE == 3) {
    p = V::fma(r, V::set(0.0551716685f), V::set(0.242611125f));
    p = V::fma(p, r, V::set(0.693260968f));
    p = V::fma(p, r, V::set(0.999928057f));
  } else {
    p = V::fma(r, V::set(0.00132764725f), V::set(0.00967554189f));
    p = V::fma(p, r, V::set(0.0555071309f));
    p = V::fma(p, r, V::set(0.240221202f));
    p = V::fma(p, r, V::set(0.693146944f));
    p = V::fma(p, r, V::set(1.00000012f));
  }
  return V::scale2(p, n);
}

// Products in float32.
template <class Vector>
struct Floats {
  using V = Vector;
  using E = float;
  using Pair = typename V::F;
  static constexpr int kPair = 1, kRows = V::kQueries, kDegree = 5;

  static Pair load(const E* p) { return V::load(p); }
  static Pair broadcast(const E* p) { return V::set(*p); }
  static Pair dot(Pair sums, Pair a, Pair b) { return V::fma(a, b, sums); }
  static void store(E* to, Pair a, Pair b) {
    V::store(to, a);
    V::store(to + V::L, b);
  }
  static void convert(E* to, const float* x, int64_t count, float factor, int64_t padded) {
    for (int64_t i = 0; i < count; ++i) to[i] = x[i] * factor;
    for (int64_t i = count; i < padded; ++i) to[i] = 0.0f;
  }
  static void interleave(E*, Pair, Pair) {}
  static void pack_keys(E* to, const E* const* rows, int64_t steps) {
    for (int c = 0; c < 2 * V::L; ++c) {
      for (int64_t step = 0; step < steps; ++step) to[step * 2 * V::L + c] = rows[c][step];
    }
  }
};

// Where a head's parts lie in the memory of a task.
template <class A>
struct HeadLayout {
  using E = typename A::E;
  static constexpr int64_t kColumns = 2 * A::V::L;

  int64_t keys;      // padded to whole panels
  int64_t features;  // of the values, padded to whole panels
  int64_t steps;     // of the first product
  int64_t row;       // floats from one row of scores to the next: no power of two, as cache sets go
  int64_t query;     // elements from one query to the next

  HeadLayout(int64_t length, int64_t size)
      : keys(round_up(length, kColumns)),
        features(round_up(size, kColumns)),
        steps((size + A::kPair - 1) / A::kPair),
        row(keys + 16),
        query(round_up(size, kLineBytes)) {}

  int64_t key_bytes() const { return round_up(keys * steps * A::kPair * sizeof(E), kLineBytes); }
  int64_t value_bytes() const { return round_up(features * keys * sizeof(E), kLineBytes); }
  int64_t bias_bytes() const { return round_up(keys * sizeof(float), kLineBytes); }
  int64_t query_bytes() const { return round_up(A::kRows * query * sizeof(E), kLineBytes); }
  int64_t score_bytes() const { return round_up(A::kRows * row * sizeof(float), kLineBytes); }
  int64_t row_bytes() const { return round_up(kColumns * query * sizeof(E), kLineBytes); }
  int64_t bytes() const {
    return key_bytes() + value_bytes() + bias_bytes() + query_bytes() + score_bytes() + row_bytes();
  }
};

template <class A>
struct Head {
  using E = typename A::E;
  HeadLayout<A> layout;
  E* keys;        // panels of keys
  E* values;      // panels of features
  float* bias;    // [keys]: added to the scores
  E* queries;     // [kRows, query]
  float* scores;  // [kRows, row]
  E* rows;        // [kColumns, query]: while keys are packed

  Head(int64_t length, int64_t size, char* memory) : layout(length, size) {
    const auto take = [&memory](int64_t bytes) {
      char* taken = memory;
      memory += bytes;
      return taken;
    };
    keys = reinterpret_cast<E*>(take(layout.key_bytes()));
    values = reinterpret_cast<E*>(take(layout.value_bytes()));
    bias = reinterpret_cast<float*>(take(layout.bias_bytes()));
    queries = reinterpret_cast<E*>(take(layout.query_bytes()));
    scores = reinterpret_cast<float*>(take(layout.score_bytes()));
    rows = reinterpret_cast<E*>(take(layout.row_bytes()));
  }
};

template <class A>
void pack_keys(const AttentionHead& head, const Head<A>& to) {
  constexpr int kColumns = HeadLayout<A>::kColumns;
  const typename A::E* rows[kColumns];
  for (int64_t first = 0; first < to.layout.keys; first += kColumns) {
    for (int c = 0; c < kColumns; ++c) {
      const int64_t key = first + c;
      typename A::E* row = to.rows + c * to.layout.query;
      A::convert(row, head.k + key * head.kv_stride, key < head.length ? head.size : 0, 1.0f, to.layout.query);
      rows[c] = row;
    }
    A::pack_keys(to.keys + first * to.layout.steps * A::kPair, rows, to.layout.steps);
  }
}

template <class A>
inline typename A::V::F load_values(const AttentionHead& head, int64_t key, int64_t feature) {
  using V = typename A::V;
  const int64_t left = head.size - feature;
  if (key >= head.length || left <= 0) return V::set(0.0f);
  const float* v = head.v + key * head.kv_stride + feature;
  if (left >= V::L) return V::load(v);
  float some[V::L] = {};
  for (int64_t i = 0; i < left; ++i) some[i] = v[i];
  return V::load(some);
}

template <class A>
void pack_values(const AttentionHead& head, const Head<A>& to) {
  using V = typename A::V;
  constexpr int kColumns = HeadLayout<A>::kColumns;
  typename A::E* place = to.values;
  for (int64_t first = 0; first < to.layout.features; first += kColumns) {
    for (int64_t key = 0; key < to.layout.keys; key += A::kPair) {
      for (int64_t feature = first; feature < first + kColumns; feature += V::L) {
        const typename V::F value = load_values<A>(head, key, feature);
        if constexpr (A::kPair == 2) {
          A::interleave(place, value, load_values<A>(head, key + 1, feature));
        } else {
          V::store(place, value);
        }
        place += V::L * A::kPair;
      }
    }
  }
}

// A hidden key's score is so far below every other that its weight is zero; finite, for rows with nothing else.
constexpr float kHidden = -1e30f;

template <class A>
void fill_bias(const AttentionHead& head, const Head<A>& to) {
  for (int64_t key = 0; key < to.layout.keys; ++key) {
    const bool hidden = key >= head.length || (head.mask != nullptr && head.mask[key] == 0);
    to.bias[key] = hidden ? kHidden : 0.0f;
  }
}

// kRows rows of elements times a panel.
template <class A>
inline void panel_product(const typename A::E* a, int64_t stride, const typename A::E* panel, int64_t steps,
                          typename A::V::F (&sums)[A::kRows][2]) {
  using V = typename A::V;
  ACCEL_UNROLL for (int m = 0; m < A::kRows; ++m) sums[m][0] = sums[m][1] = V::set(0.0f);
  for (int64_t step = 0; step < steps; ++step) {
    const auto left = A::load(panel), right = A::load(panel + V::L * A::kPair);
    ACCEL_UNROLL for (int m = 0; m < A::kRows; ++m) {
      const auto x = A::broadcast(a + m * stride);
      sums[m][0] = A::dot(sums[m][0], x, left);
      sums[m][1] = A::dot(sums[m][1], x, right);
    }
    panel += 2 * V::L * A::kPair;
    a += A::kPair;
  }
}

// Scores of kRows queries, and the largest of each.
template <class A>
void score(const Head<A>& head, float (&largest)[A::kRows]) {
  using V = typename A::V;
  using F = typename V::F;
  constexpr int kColumns = HeadLayout<A>::kColumns;
  const HeadLayout<A>& layout = head.layout;
  F tops[A::kRows];
  for (F& top : tops) top = V::set(kHidden);
  for (int64_t key = 0; key < layout.keys; key += kColumns) {
    F sums[A::kRows][2];
    panel_product<A>(head.queries, layout.query, head.keys + key * layout.steps * A::kPair, layout.steps, sums);
    const F bias[2] = {V::load(head.bias + key), V::load(head.bias + key + V::L)};
    ACCEL_UNROLL for (int m = 0; m < A::kRows; ++m) {
      float* row = head.scores + m * layout.row + key;
      const F one = V::add(sums[m][0], bias[0]), other = V::add(sums[m][1], bias[1]);
      V::store(row, one);
      V::store(row + V::L, other);
      tops[m] = V::max(tops[m], V::max(one, other));
    }
  }
  for (int m = 0; m < A::kRows; ++m) largest[m] = V::reduce_max(tops[m]);
}

// A row of scores -> 2^(score - largest), in place; returns one over their sum.
template <class A>
float weigh(float* scores, int64_t keys, float largest) {
  using V = typename A::V;
  using F = typename V::F;
  const F top = V::set(largest);
  F sum = V::set(0.0f);
  auto* weights = reinterpret_cast<typename A::E*>(scores);
  for (int64_t key = 0; key < keys; key += 2 * V::L) {
    const F one = power_of_two<V, A::kDegree>(V::sub(V::load(scores + key), top));
    const F other = power_of_two<V, A::kDegree>(V::sub(V::load(scores + key + V::L), top));
    sum = V::add(sum, V::add(one, other));
    A::store(weights + key, one, other);
  }
  return 1.0f / V::reduce_add(sum);
}

template <class A>
void write(const AttentionHead& head, typename A::V::F (&sums)[A::kRows][2], const float (&inverse)[A::kRows],
           int64_t query, int64_t count, int64_t feature) {
  using V = typename A::V;
  constexpr int kColumns = HeadLayout<A>::kColumns;
  const int64_t width = head.size - feature < kColumns ? head.size - feature : kColumns;
  ACCEL_UNROLL for (int m = 0; m < A::kRows; ++m) {
    if (m >= count) continue;
    float* result = head.result + (query + m) * head.result_stride + feature;
    const auto factor = V::set(inverse[m]);
    float some[kColumns];
    float* place = width == kColumns ? result : some;
    V::store(place, V::mul(sums[m][0], factor));
    V::store(place + V::L, V::mul(sums[m][1], factor));
    for (int64_t i = 0; width < kColumns && i < width; ++i) result[i] = some[i];
  }
}

template <class A>
void attend_rows(const AttentionHead& head, const Head<A>& packed, int64_t query, int64_t count) {
  const HeadLayout<A>& layout = packed.layout;
  constexpr float kLog2E = 1.44269504f;
  for (int m = 0; m < A::kRows; ++m) {  // rows behind the last one are zeros
    A::convert(packed.queries + m * layout.query, head.q + (query + m) * head.q_stride, m < count ? head.size : 0,
               head.scale * kLog2E, layout.query);
  }
  float largest[A::kRows], inverse[A::kRows];
  score(packed, largest);
  for (int m = 0; m < A::kRows; ++m) {
    inverse[m] = weigh<A>(packed.scores + m * layout.row, layout.keys, largest[m]);
  }
  const auto* weights = reinterpret_cast<const typename A::E*>(packed.scores);
  const int64_t stride = layout.row * static_cast<int64_t>(sizeof(float) / sizeof(typename A::E));
  for (int64_t feature = 0; feature < head.size; feature += HeadLayout<A>::kColumns) {
    typename A::V::F sums[A::kRows][2];
    panel_product<A>(weights, stride, packed.values + feature * layout.keys, layout.keys / A::kPair, sums);
    write<A>(head, sums, inverse, query, count, feature);
  }
}

template <class A>
size_t attention_bytes(int64_t length, int64_t size) {
  return static_cast<size_t>(HeadLayout<A>(length, size).bytes());
}

template <class A>
void attend(const AttentionHead& head, int64_t first_query, int64_t last_query, char* memory) {
  const Head<A> packed(head.length, head.size, memory);
  pack_keys(head, packed);
  pack_values(head, packed);
  fill_bias(head, packed);
  for (int64_t query = first_query; query < last_query; query += A::kRows) {
    const int64_t left = last_query - query;
    attend_rows(head, packed, query, left < A::kRows ? left : A::kRows);
  }
}
