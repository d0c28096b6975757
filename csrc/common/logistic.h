// Exponentials, logarithms and the logistic function in the precision of their argument, without a branch.
//
// Which to take: math::exp and its relatives (common/math.h) work in double and round once. They are for all that a
// decision hangs on. fast_exp, fast_log and `logistic` keep a float a float, which is twice as fast on a CPU and many
// times on a GPU (most have few units for double); against the true value they err by less than 5 units in the last
// place (2^32 / 37 inputs tried). They are for losses and decoded values, which nothing hangs on; for doubles they are
// math:: itself. Both kinds use +, -, *, / and bit operations alone: the same bits on every device.
#pragma once

#include "common/math.h"

namespace DETOPS_NAMESPACE {

// e^x for x in [-104, 89] or NaN: x = k ln2 + r, |r| <= ln2 / 2, e^x = 2^k (1 + r + r^2 P(r)).
DETOPS_HD float fast_exp_in_range(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRounder;
  const float k = shifted - kRounder;
  const float r = x - k * 0.693359375f - k * -2.12194440e-4f;  // ln2 in two parts, k times the first is exact
  const float series = 0.49999994f + r * (0.16666522f + r * (0.041668368f + r * (0.0083686186f + r * 0.0013815062f)));
  // 2^k may be no normal number. Its two halves are, and only the second product may round.
  const uint32_t exponents = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kRounder) + 2 * 127;
  const uint32_t half = exponents >> 1;
  return (1.0f + (r + r * r * series)) * bit_cast<float>(half << 23) * bit_cast<float>((exponents - half) << 23);
}

// e^x for x <= 0. Below -104 it is 0.
DETOPS_HD float fast_exp_of_nonpositive(float x) { return fast_exp_in_range(max_of(-104.0f, x)); }
DETOPS_HD double fast_exp_of_nonpositive(double x) { return math::exp(x); }

// e^x. Above 89 it is infinite. The float errs by less than a unit in the last place (every 37th float tried).
DETOPS_HD float fast_exp(float x) { return fast_exp_in_range(max_of(-104.0f, min_of(89.0f, x))); }
DETOPS_HD double fast_exp(double x) { return math::exp(x); }

// The natural logarithm, as exact; -infinity at 0 and -0, NaN below. x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), and
// log(1 + f) = 2 atanh(s) = f - s (f - R), s = f / (2 + f), R = 2 s^2 (1/3 + s^2/5 + s^4/7 + s^6/9).
DETOPS_HD float fast_log(float x) {
  const bool subnormal = x < 1.17549435e-38f;
  const uint32_t bits = bit_cast<uint32_t>(subnormal ? x * 8388608.0f : x);    // 2^23
  const uint32_t biased = (bits + (uint32_t(128) << 23) - 0x3f3504f3u) >> 23;  // k + 128; sqrt(1/2)
  const float k = static_cast<float>(static_cast<int32_t>(biased) - 128) - (subnormal ? 23.0f : 0.0f);
  const float f = bit_cast<float>(bits - (biased << 23) + (uint32_t(128) << 23)) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float rest = z * (0.666666667f + z * (0.4f + z * (0.285714286f + z * 0.222222222f)));
  const float high = k * 0.693359375f;  // exact
  const float sum = high + f;           // exact but for `low`: high is 0 or the greater one
  const float low = f - (sum - high);
  const float value = sum + (low + (k * -2.12194440e-4f - s * (f - rest)));
  const float at_most_zero =
      x == 0.0f ? -static_cast<float>(math::detail::infinity) : static_cast<float>(math::detail::not_a_number);
  return x > 0.0f ? (x - x == 0.0f ? value : x) : at_most_zero;
}
DETOPS_HD double fast_log(double x) { return math::log(x); }

// base^exponent for base > 0, each step rounded: it errs by |exponent log(base)| roundings, where math::pow errs by one
// and takes twice the time.
template <class T>
DETOPS_HD T fast_pow(T base, T exponent) {
  return math::exp(exponent * math::log(base));
}

// What a logit x says of a class.
template <class T>
struct Logistic {
  T present;  // sigmoid(x)
  T absent;   // 1 - sigmoid(x) = sigmoid(-x), without cancellation
  T excess;   // softplus(x) - max(x, 0) = log(1 + exp(-|x|))
};

// 1 / (1 + e) for sigmoid, log(1 + e) = 2 atanh(s) with s = e / (2 + e) <= 1/3: both from one division.
DETOPS_HD Logistic<float> logistic(float x) {
  const float e = fast_exp_of_nonpositive(x < 0.0f ? x : -x);
  const float quotient = 1.0f / ((1.0f + e) * (2.0f + e));
  const float larger = (2.0f + e) * quotient;
  const float s = e * ((1.0f + e) * quotient);
  const float z = s * s;
  const float series = z * (0.33333215f + z * (0.20010463f + z * (0.14005137f + z * 0.13987447f)));
  const bool negative = x < 0.0f;
  return {negative ? e * larger : larger, negative ? larger : e * larger, 2.0f * (s + s * series)};
}
DETOPS_HD Logistic<double> logistic(double x) {
  return {math::sigmoid(x), math::sigmoid(-x), math::softplus(x < 0.0 ? x : -x)};
}

}  // namespace DETOPS_NAMESPACE
