// What is done element by element between an expert's two products, with its derivatives. See native.cpp.
//
// Letters: n rows of one expert, F expert width, H width of the first product (2F when gated, the gate half first;
// else F).

#pragma once

#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <string>

namespace {

// ---- activations: value and derivative at x ----

#define ACTIVATION(name, ...)                                     \
  struct name {                                                   \
    template <class T>                                            \
    static inline void at(T x, T& value, T& slope) { __VA_ARGS__ } \
  };

inline double exponential(double x) { return std::exp(x); }

// The C library's is not vectorised unless the whole file is compiled with -ffast-math. x = n ln 2 + r with |r| at
// most ln(2) / 2, and 2^n comes from the bits of the exponent; Taylor's series of degree 7 is exact to 1e-8 there.
inline float exponential(float x) {
  // Far enough for all that is done with it here, and no result, nor its inverse, is a slow denormal number.
  x = x < -60.0f ? -60.0f : x > 60.0f ? 60.0f : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // rounds to a whole number
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p =
      1 + r * (1 + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040)))))));
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}

template <class T> inline T logistic(T x) { return T(1) / (T(1) + exponential(-x)); }

ACTIVATION(Silu, T s = logistic(x); value = x * s; slope = s * (T(1) + x * (T(1) - s));)
ACTIVATION(QuickGelu, T s = logistic(T(1.702) * x); value = x * s; slope = s * (T(1) + T(1.702) * x * (T(1) - s));)
ACTIVATION(ClampedQuickGelu, T g = x > T(7) ? T(7) : x; QuickGelu::at(g, value, slope); slope = x > T(7) ? T(0) : slope;)
ACTIVATION(ClampedPlusOne, T u = x < T(-7) ? T(-7) : x > T(7) ? T(7) : x; value = u + T(1);
           slope = x < T(-7) || x > T(7) ? T(0) : T(1);)
ACTIVATION(Sigmoid, value = logistic(x); slope = value * (T(1) - value);)
ACTIVATION(Tanh, value = std::tanh(x); slope = T(1) - value * value;)
ACTIVATION(Linear, value = x; slope = T(1);)
ACTIVATION(Relu, slope = x > T(0) ? T(1) : T(0); value = x * slope;)
ACTIVATION(LeakyRelu, slope = x > T(0) ? T(1) : T(0.01); value = x * slope;)
ACTIVATION(SquaredRelu, T r = x < T(0) ? T(0) : x; value = r * r; slope = T(2) * r;)
ACTIVATION(Relu6, slope = x > T(0) && x < T(6) ? T(1) : T(0); value = x < T(0) ? T(0) : x > T(6) ? T(6) : x;)
ACTIVATION(Gelu, T c = T(0.5) * (T(1) + std::erf(x * T(M_SQRT1_2))); value = x * c;
           slope = c + x * T(0.5 * M_SQRT1_2 * M_2_SQRTPI) * exponential(T(-0.5) * x * x);)
ACTIVATION(ClippedGelu, Gelu::at(x, value, slope); slope = value > T(10) ? T(0) : slope;
           value = value > T(10) ? T(10) : value;)
ACTIVATION(TanhGelu, T k = T(M_SQRT1_2 * M_2_SQRTPI); T s = logistic(T(2) * k * (x + T(0.044715) * x * x * x));
           value = x * s;  // (1 + tanh(u)) / 2 = logistic(2 u)
           slope = s + x * T(2) * s * (T(1) - s) * k * (T(1) + T(3 * 0.044715) * x * x);)
ACTIVATION(Mish, T e = std::exp(-std::abs(x)); T p = std::log1p(e) + (x > T(0) ? x : T(0)); T t = std::tanh(p);
           value = x * t; slope = t + x * (T(1) - t * t) * logistic(x);)
ACTIVATION(Hardswish, T r = x + T(3); r = r < T(0) ? T(0) : r > T(6) ? T(6) : r; value = x * r / T(6);
           slope = x <= T(-3) ? T(0) : x >= T(3) ? T(1) : x / T(3) + T(0.5);)
ACTIVATION(Laplace, T z = (x - T(0.707107)) / T(0.282095 * M_SQRT2); value = T(0.5) * (T(1) + std::erf(z));
           slope = exponential(-z * z) * T(0.5 * M_2_SQRTPI / (0.282095 * M_SQRT2));)

// In parallel where all threads work on one expert; a thread with experts of its own does its rows itself.
template <class Row>
void for_rows(int64_t n, const Row& row) {
  at::parallel_for(0, n, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) row(i);
  });
}

// ---- element by element, rows of an expert; `gate` and `up` are the halves of a row of H ----

// What is stored as S is computed in this: float, or double with double.
template <class S>
using Wide = at::opmath_type<S>;

// By torch's own rules (to nearest even, what is not a number stays so). GCC vectorises these and no operators of
// at::BFloat16, and it vectorises nothing of at::Half: that is cast to float before it comes here.
inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(at::BFloat16 x) { return c10::detail::f32_from_bits(x.x); }
inline void store(double& to, double x) { to = x; }
inline void store(float& to, float x) { to = x; }
inline void store(at::BFloat16& to, float x) { to.x = c10::detail::round_to_nearest_even(x); }

template <class S>
struct Elementwise {
  void (*forward)(const S* h_nH, const Wide<S>* weight_n, S* a_nF, int64_t n, int64_t F);
  void (*backward)(const S* h_nH, const Wide<S>* weight_n, const S* d_a_nF, S* a_nF, S* d_h_nH, Wide<S>* d_weight_n,
                   int64_t n, int64_t F);
};

// A is the activation of `gate`, U what `up` goes through before it multiplies.
template <class S, class A, bool GATED, class U>
void forward_rows(const S* h_nH, const Wide<S>* weight_n, S* a_nF, int64_t n, int64_t F) {
  using T = Wide<S>;
  for_rows(n, [&](int64_t i) {
    const S *__restrict gate = h_nH + i * F * (GATED ? 2 : 1), *__restrict up = gate + F;
    const T weight = weight_n[i];
    S* __restrict a = a_nF + i * F;
    // No `omp simd`: GCC would leave what does not fill its widest vectors to a scalar loop.
    for (int64_t f = 0; f < F; f++) {
      T value, slope, times = 1, up_slope;
      A::template at<T>(load(gate[f]), value, slope);
      if constexpr (GATED) U::template at<T>(load(up[f]), times, up_slope);
      store(a[f], value * weight * times);
    }
  });
}

// Reads the gradient of what went into the second product, before its combine weight; leaves that input, weighted.
template <class S, class A, bool GATED, class U>
void backward_rows(const S* h_nH, const Wide<S>* weight_n, const S* d_a_nF, S* a_nF, S* d_h_nH, Wide<S>* d_weight_n,
                   int64_t n, int64_t F) {
  using T = Wide<S>;
  for_rows(n, [&](int64_t i) {
    const int64_t row = i * F * (GATED ? 2 : 1);
    const S *gate = h_nH + row, *up = gate + F, *d_a_F = d_a_nF + i * F;
    S *a = a_nF + i * F, *d_gate = d_h_nH + row, *d_up = d_gate + F;
    T weight = weight_n[i], sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t f = 0; f < F; f++) {
      T value, slope, times = 1, up_slope = 0, d_a = load(d_a_F[f]), gradient = d_a * weight;
      A::template at<T>(load(gate[f]), value, slope);
      if constexpr (GATED) U::template at<T>(load(up[f]), times, up_slope);
      sum += d_a * value * times;
      store(a[f], value * times * weight);
      store(d_gate[f], gradient * times * slope);
      if constexpr (GATED) store(d_up[f], gradient * value * up_slope);
    }
    d_weight_n[i] = sum;
  });
}

template <class S, class A, class U = Linear>
Elementwise<S> of(bool gated) {
  if (gated) return {forward_rows<S, A, true, U>, backward_rows<S, A, true, U>};
  return {forward_rows<S, A, false, U>, backward_rows<S, A, false, U>};
}

template <class S>
Elementwise<S> elementwise(const std::string& name, bool gated) {
  if (name == "silu" || name == "swish") return of<S, Silu>(gated);
  if (name == "gelu" || name == "gelu_python") return of<S, Gelu>(gated);
  if (name == "gelu_10") return of<S, ClippedGelu>(gated);
  if (name == "quick_gelu") return of<S, QuickGelu>(gated);
  if (name.starts_with("gelu_")) return of<S, TanhGelu>(gated);
  if (name == "relu") return of<S, Relu>(gated);
  if (name == "relu2") return of<S, SquaredRelu>(gated);
  if (name == "relu6") return of<S, Relu6>(gated);
  if (name == "leaky_relu") return of<S, LeakyRelu>(gated);
  if (name == "linear") return of<S, Linear>(gated);
  if (name == "sigmoid") return of<S, Sigmoid>(gated);
  if (name == "tanh") return of<S, Tanh>(gated);
  if (name == "mish") return of<S, Mish>(gated);
  if (name == "hardswish") return of<S, Hardswish>(gated);
  if (name == "swiglu_oai") return of<S, ClampedQuickGelu, ClampedPlusOne>(gated);
  TORCH_CHECK(name == "laplace", "no activation ", name);
  return of<S, Laplace>(gated);
}

}  // namespace
