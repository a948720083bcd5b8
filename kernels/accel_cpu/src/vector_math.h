// Activation functions on vectors, written once for every instruction set. No include guard on purpose: each
// instruction set's file includes it once, inside its own anonymous namespace and target.
//
// V offers: F (floats), set(float), add, sub, mul, div, fma(a, b, c) = a * b + c, min, max (the second operand if
// either is NaN), round (to even), scale2(x, n) = x * 2^n for whole n in [-126, 127], select_negative(x, a, b).

// e^x to 2 ulp for x in [-87, 88], clamped outside; minimax polynomial on [-ln2/2, ln2/2].
template <class V>
inline typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  x = V::max(V::set(-87.0f), V::min(V::set(88.0f), x));
  const F n = V::round(V::mul(x, V::set(1.44269504f)));
  F r = V::fma(n, V::set(-0.693359375f), x);  // ln 2 in two parts: the first product is exact
  r = V::fma(n, V::set(2.12194440e-4f), r);
  F p = V::set(0.00138293612f);
  p = V::fma(p, r, V::set(0.0083748127f));
  p = V::fma(p, r, V::set(0.0416683614f));
  p = V::fma(p, r, V::set(0.166664203f));
  p = V::fma(p, r, V::set(0.499999915f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return V::scale2(p, n);
}

// x * sigmoid(v)
template <class V>
inline typename V::F times_sigmoid(typename V::F x, typename V::F v) {
  return V::div(x, V::add(V::set(1.0f), exponential<V>(V::sub(V::set(0.0f), v))));
}

// x * Phi(x), Phi by erf(x / sqrt(2)) = x P(x^2) up to 5.05, where it is 1 but for 4e-7; minimax fit in the argument
// scaled to [-1, 1]. Clamped, so that nothing is left of large negative numbers. Absolute error 1e-6.
template <class V>
inline typename V::F gelu_erf(typename V::F x) {
  using F = typename V::F;
  const F square = V::min(V::set(25.5025f), V::mul(x, x));
  const F u = V::fma(square, V::set(0.078423684f), V::set(-1.0f));
  F p = V::set(0.00141037407f);
  p = V::fma(p, u, V::set(-0.00368031277f));
  p = V::fma(p, u, V::set(0.00373583171f));
  p = V::fma(p, u, V::set(-0.00561035052f));
  p = V::fma(p, u, V::set(0.013602023f));
  p = V::fma(p, u, V::set(-0.0234403387f));
  p = V::fma(p, u, V::set(0.0337481275f));
  p = V::fma(p, u, V::set(-0.0472181439f));
  p = V::fma(p, u, V::set(0.0632054582f));
  p = V::fma(p, u, V::set(-0.0806914121f));
  p = V::fma(p, u, V::set(0.102306716f));
  p = V::fma(p, u, V::set(-0.13929081f));
  p = V::fma(p, u, V::set(0.279942632f));
  const F error = V::max(V::set(-1.0f), V::min(V::set(1.0f), V::mul(x, p)));
  return V::mul(x, V::fma(error, V::set(0.5f), V::set(0.5f)));
}

template <class V>
inline typename V::F activate(Activation activation, typename V::F x) {
  using F = typename V::F;
  switch (activation) {
    case Activation::kGelu:
      return gelu_erf<V>(x);
    case Activation::kGeluTanh: {  // 0.5 * (1 + tanh(u)) = sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3)
      const F cubic = V::fma(V::mul(x, x), V::set(0.0713548162f), V::set(1.59576912f));
      return times_sigmoid<V>(x, V::mul(x, cubic));
    }
    case Activation::kSilu:
      return times_sigmoid<V>(x, x);
    case Activation::kNone:
      break;
  }
  return x;
}
