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

// x * Phi(x), Phi by erfc(z) = e^(-z^2) * Q(1 / (1 + 0.33 z)), z = |x| / sqrt(2); Q: minimax fit, relative error 2e-7.
template <class V>
inline typename V::F gelu_erf(typename V::F x) {
  using F = typename V::F;
  const F square = V::mul(x, x);
  const F z = V::mul(V::max(x, V::sub(V::set(0.0f), x)), V::set(0.707106781f));
  const F t = V::div(V::set(1.0f), V::fma(z, V::set(0.33f), V::set(1.0f)));
  F q = V::set(-0.135927755f);
  q = V::fma(q, t, V::set(0.462683828f));
  q = V::fma(q, t, V::set(-0.355431186f));
  q = V::fma(q, t, V::set(0.412534237f));
  q = V::fma(q, t, V::set(0.045014717f));
  q = V::fma(q, t, V::set(0.201922518f));
  q = V::fma(q, t, V::set(0.182837467f));
  q = V::fma(q, t, V::set(0.186366094f));
  q = V::mul(q, t);
  const F tail = V::mul(V::mul(V::set(0.5f), q), exponential<V>(V::mul(square, V::set(-0.5f))));
  return V::mul(x, V::select_negative(x, tail, V::sub(V::set(1.0f), tail)));
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
