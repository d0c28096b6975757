// exp, log, pow, atan, sines and cosines of degrees, and what losses build from them: the same bits on every device.
//
// The functions of libm and CUDA differ in their last bits, which is enough to turn a decision. These are built from
// +, -, *, / and bit operations alone, all of which IEEE 754 fixes to the last bit. They have no branch, table or
// integer-to-double instruction, so that a loop over them vectorises down to AVX2. They need -ffp-contract=off and
// -fmad=false (an fma rounds differently), rounding to nearest, and subnormals left on.
//
// The work is done in double; a float overload rounds the double result once. The error is below 1 unit in the last
// place of a double for exp, log and pow, below 2 for the others (tests/test_math.py; in 10 million inputs of each the
// worst were 0.93 and 1.88). All functions take all inputs; a NaN gives a NaN, whose payload is unspecified.
//
// Polynomials are minimax for the relative error of the result, from a Remez exchange in 240 bits, rounded to double.
#pragma once

#include <cstdint>
#include <limits>

#include "common/host_device.h"

namespace DETOPS_NAMESPACE::math {

template <class T>
struct SinCos {
  T sin, cos;
};

namespace detail {

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double log2_e = 1.4426950408889634;
constexpr double ln2_high = 0.6931471805592082;  // 40 bits: its product with an exponent is exact
constexpr double ln2_low = 7.371002565167799e-13;
constexpr double smallest_normal = std::numeric_limits<double>::min();
constexpr uint64_t sign_bit = uint64_t(1) << 63;

// Adding it rounds to an integer, to even at ties, which then stands in the low bits of the sum; for |x| < 2^51.
constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52

// The double 2^52 + integer, for integers in [0, 2^52): conversion without the instruction that AVX2 lacks.
DETOPS_HD double above_two_52(uint64_t integer) { return bit_cast<double>(integer | 0x4330000000000000u); }
constexpr double two_52 = 4503599627370496.0;

DETOPS_HD double magnitude(double x) { return bit_cast<double>(bit_cast<uint64_t>(x) & ~sign_bit); }

// The first 26 significant bits, so that products of two such are exact.
DETOPS_HD double leading_half(double x) { return bit_cast<double>(bit_cast<uint64_t>(x) & ~uint64_t(0x7ffffff)); }

// c[0] + c[1] x + c[2] x^2 + ..., two terms at a time: as many operations as one at a time, but a chain half as long.
DETOPS_HD double polynomial(double, double first) { return first; }
template <class... Rest>
DETOPS_HD double polynomial(double x, double first, double second, Rest... rest) {
  const double pair = first + x * second;
  if constexpr (sizeof...(rest) == 0) {
    return pair;
  } else {
    return pair + x * x * polynomial(x, rest...);
  }
}

// high + low: more digits than a double holds. low is small against high.
struct Pair {
  double high, low;
};
// a + b without error, for a = 0 or |a| >= |b|.
DETOPS_HD Pair exact_sum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

// exp(x + tail), for a tail that is small against x or 1:
//   x + tail = k ln2 + r, |r| <= ln2 / 2, exp = 2^k (1 + r + r^2/2 + r^3 P(r)).
DETOPS_HD double exp_of_sum(double x, double tail) {
  x = max_of(-746.0, min_of(710.0, x));  // beyond are 0 and infinity
  const double shifted = x * log2_e + rounder;
  const double k = shifted - rounder;
  const Pair r = exact_sum(x - k * ln2_high, tail - k * ln2_low);
  const double cubic = polynomial(r.high, 0.16666666666666433, 0.041666666666604034, 0.008333333333499908,
                                  0.0013888888926769838, 0.00019841269466238284, 2.4801508711240303e-05,
                                  2.7557641009513867e-06, 2.762517691929736e-07, 2.497829964899505e-08);
  const Pair start = exact_sum(1.0, r.high);
  const double value = start.high + (start.low + (r.low + r.high * r.high * (0.5 + r.high * cubic)));
  // 2^k may be no double. Its two halves are, and only the second product may round.
  const uint64_t exponents = bit_cast<uint64_t>(shifted) - bit_cast<uint64_t>(rounder) + 2 * 1023;
  const uint64_t half = exponents >> 1;
  return value * bit_cast<double>(half << 52) * bit_cast<double>((exponents - half) << 52);
}

// x = 2^k (1 + f), sqrt(1/2) <= 1 + f < sqrt(2), without error.
struct Split {
  double k, f;
};
DETOPS_HD Split split(double x) {
  const bool subnormal = x < smallest_normal;
  const uint64_t bits = bit_cast<uint64_t>(subnormal ? x * 18014398509481984.0 : x);    // 2^54
  const uint64_t biased = (bits + (uint64_t(1024) << 52) - 0x3fe6a09e667f3bcdu) >> 52;  // k + 1024; sqrt(1/2)
  const double k = above_two_52(biased) - (two_52 + 1024.0) - (subnormal ? 54.0 : 0.0);
  return {k, bit_cast<double>(bits - (biased << 52) + (uint64_t(1024) << 52)) - 1.0};
}

// (atanh(s)/s - 1 - z/3) / z^2 = 1/5 + z/7 + z^2/9 + ..., z = s^2, |s| <= (sqrt(2) - 1) / (sqrt(2) + 1)
DETOPS_HD double atanh_series(double z) {
  return polynomial(z, 0.20000000000001017, 0.14285714285094236, 0.11111111253065516, 0.09090892720649048,
                    0.07693356265513496, 0.06628887182135167, 0.06594053139055657);
}

// k ln2 + log(1 + f), with log(1 + f) = 2 atanh(s) = 2s + s R = f - s (f - R), s = f / (2 + f).
DETOPS_HD double log_of(Split x) {
  const double s = x.f / (2.0 + x.f);
  const double z = s * s;
  const double rest = 2.0 * z * (1.0 / 3.0 + z * atanh_series(z));
  const Pair sum = exact_sum(x.k * ln2_high, x.f);
  return sum.high + (sum.low + (x.k * ln2_low - s * (x.f - rest)));
}

// The same in a Pair, with an error of about 2^-65 of it: the product with y may be 745 and needs 53 bits behind the
// point.
DETOPS_HD Pair precise_log_of(Split x) {
  // s = s1 + s2, where s1 has 26 bits, and s2 is what is missing from s1 (2 + f) = f.
  const Pair divisor = exact_sum(2.0, x.f);
  const double divisor1 = leading_half(divisor.high);
  const double divisor2 = (divisor.high - divisor1) + divisor.low;
  const double reciprocal = 1.0 / divisor.high;
  const double s1 = leading_half(x.f * reciprocal);
  const double s2 = ((x.f - s1 * divisor1) - s1 * divisor2) * reciprocal;
  // z = z1 + z2 = s^2, and w = w1 + w2 = z/3 + z^2/5 + ..., so that atanh(s) = s + s w.
  const double z1 = s1 * s1;
  const double z2 = s2 * (2.0 * s1 + s2);
  const double z = z1 + z2;
  const double fifth = z * z * atanh_series(z);
  const double w = z * (1.0 / 3.0) + fifth;
  const double w1 = leading_half(w);
  const double w2 = ((z1 - 3.0 * w1) + z2) * (1.0 / 3.0) + fifth;
  const Pair first = exact_sum(x.k * ln2_high, 2.0 * s1);
  const Pair second = exact_sum(first.high, 2.0 * s1 * w1);
  const double small = 2.0 * (s2 + (s2 * w + s1 * w2));
  return {second.high, first.low + second.low + (x.k * ln2_low + small)};
}

// log(1 + u) for u in [0, 1]
DETOPS_HD double log1p_of_unit(double u) {
  const bool large = u > 0.41421356237309503;
  return log_of({large ? 1.0 : 0.0, large ? 0.5 * (u - 1.0) : u});
}

// The power x^y, given its value where 0 < x < infinity and y is finite.
DETOPS_HD double with_edges_of_pow(double value, double x, double y) {
  const double edge = (x > 1.0) == (y > 0.0) ? infinity : 0.0;
  const double powered = (x == 0.0) | (x == infinity) ? edge : value;
  const double defined = (x >= 0.0) & (y == y) ? powered : not_a_number;
  return (y == 0.0) | (x == 1.0) ? 1.0 : defined;
}

}  // namespace detail

// e^x; 0 and infinity where it leaves the range of doubles.
DETOPS_HD double exp(double x) { return detail::exp_of_sum(x, 0.0); }

// The natural logarithm; -infinity at 0 and -0, NaN below.
DETOPS_HD double log(double x) {
  const double value = detail::log_of(detail::split(x));
  const double at_most_zero = x == 0.0 ? -detail::infinity : detail::not_a_number;
  return x > 0.0 ? (x < detail::infinity ? value : x) : at_most_zero;
}

// x^y = exp(y log(x)) for x >= 0, log in a Pair; -0 counts as 0. As in C, pow(x, 0) = pow(1, y) = 1 even for NaN, and
// pow(0, y < 0) is infinity. NaN for x < 0 and y != 0.
DETOPS_HD double pow(double x, double y) {
  const double farthest = 18446744073709551616.0;  // 2^64: with it, all powers but that of 1 are 0 or infinity
  const double power = max_of(-farthest, min_of(farthest, y));
  const double power1 = detail::leading_half(power);
  const detail::Pair log = detail::precise_log_of(detail::split(x));
  const double log1 = detail::leading_half(log.high);
  const double log2 = (log.high - log1) + log.low;
  const detail::Pair product = detail::exact_sum(power1 * log1, (power - power1) * log1 + power * log2);
  const bool in_range = (product.high > -800.0) & (product.high < 800.0);
  return detail::with_edges_of_pow(detail::exp_of_sum(product.high, in_range ? product.low : 0.0), x, y);
}

// The arc tangent in radians: atan(x) = q pi/4 + atan(t) with t = x, (x - 1)/(x + 1) or -1/x for x up to 1/2, 2,
// infinity, and atan(t) = t + t z P(z), z = t^2 <= 1/4. Odd; -0 at -0.
DETOPS_HD double atan(double x) {
  const double a = detail::magnitude(x);
  const bool middle = a > 0.5;
  const bool far = a > 2.0;
  const double quarters = far ? 2.0 : (middle ? 1.0 : 0.0);
  const double t = (far ? -1.0 : (middle ? a - 1.0 : a)) / (far ? a : (middle ? a + 1.0 : 1.0));
  const double z = t * t;
  const double series =
      detail::polynomial(z, -0.33333333333332993, 0.1999999999990566, -0.1428571427659125, 0.11111110667883631,
                         -0.0909089643717404, 0.07692076736224093, -0.06663837761578356, 0.05858472462694411,
                         -0.051227371454010275, 0.04188455986541532, -0.027464836719496427, 0.010136855268884517);
  const detail::Pair sum = detail::exact_sum(quarters * 0.7853981633974483, t);
  const double value = sum.high + (sum.low + (t * z * series + quarters * 3.061616997868383e-17));
  return bit_cast<double>(bit_cast<uint64_t>(value) | (bit_cast<uint64_t>(x) & detail::sign_bit));
}

// The sine and cosine of an angle in degrees, of any size; NaN for infinite ones. The remainder r of x by 90,
// |r| <= 45, is exact, and so are multiples of 90: exactly 0, 1 and -1 (zeros are +0, but sin(-0) is -0).
// sin(r) = r pi/180 + r^3 P(r^2), cos(r) = 1 + r^2 P(r^2).
DETOPS_HD SinCos<double> sincos_degrees(double x) {
  // 2^12 = 1 modulo 45, so 2^12 n = n modulo 360 where 8 divides n: exponents from 69 on drop by twelves.
  const uint64_t bits = bit_cast<uint64_t>(x);
  const double excess = detail::above_two_52((bits >> 52) & 2047) - (detail::two_52 + 1023.0 + 62.0);
  const double twelves = max_of(0.0, excess) * (1.0 / 12.0) + detail::rounder - detail::rounder;
  const double folded = bit_cast<double>(bits - (bit_cast<uint64_t>(12.0 * twelves + detail::rounder) << 52));
  // Subtracting the nearest multiple is exact while that multiple is: in two steps for up to 2^69.
  const double turns = 94371840.0;  // 360 * 2^18
  const double near = folded - (folded * (1.0 / turns) + detail::rounder - detail::rounder) * turns;
  const double shifted = near * (1.0 / 90.0) + detail::rounder;
  const double r = near - (shifted - detail::rounder) * 90.0;
  const double z = r * r;
  const double sin_series =
      detail::polynomial(z, -8.860961557012962e-07, 1.3496016231614883e-11, -9.788384855967709e-17,
                         4.1412665864138485e-22, -1.1467583907469508e-27, 2.2167477000878065e-33);
  const double cos_series = detail::polynomial(z, -0.0001523087098933543, 3.866323851562977e-09,
                                               -3.9258319857360356e-14, 2.1354943021677387e-19, -7.227873620282702e-25,
                                               1.6678905890606384e-30, -2.7634523925154696e-36);
  const double r1 = detail::leading_half(r);
  const double degree1 = 0.01745329238474369, degree2 = 1.3519960527851425e-10;  // pi/180, the first with 26 bits
  const double sine = r1 * degree1 + ((r - r1) * degree1 + r * (degree2 + z * sin_series));
  const double cosine = 1.0 + z * cos_series;
  // 0 - x rather than -x, which would make -0 of 0.
  const uint64_t quadrant = bit_cast<uint64_t>(shifted);
  const bool odd = (quadrant & 1) != 0;
  const double sin = odd ? cosine : sine;
  const double cos = odd ? sine : cosine;
  const bool finite = x - x == 0.0;
  return {finite ? ((quadrant & 2) != 0 ? 0.0 - sin : sin) : detail::not_a_number,
          finite ? (((quadrant + 1) & 2) != 0 ? 0.0 - cos : cos) : detail::not_a_number};
}

// 1 / (1 + exp(-x)), as e / (1 + e) or 1 / (1 + e) with e = exp(-|x|).
DETOPS_HD double sigmoid(double x) {
  const bool negative = x < 0.0;
  const double e = exp(-detail::magnitude(x));
  const detail::Pair sum = detail::exact_sum(1.0, e);
  const double quotient = (negative ? e : 1.0) / sum.high;
  const double reciprocal = negative ? 1.0 - quotient : quotient;  // 1 / (1 + e), for what the sum has lost
  return quotient - quotient * reciprocal * sum.low;
}

// log(1 + exp(x)) = max(x, 0) + log(1 + exp(-|x|)), stable everywhere.
DETOPS_HD double softplus(double x) { return max_of(0.0, x) + detail::log1p_of_unit(exp(-detail::magnitude(x))); }

// log(sigmoid(x)), stable everywhere. Error as of softplus.
DETOPS_HD double log_sigmoid(double x) { return -softplus(-x); }

DETOPS_HD float exp(float x) { return static_cast<float>(exp(static_cast<double>(x))); }
DETOPS_HD float log(float x) { return static_cast<float>(log(static_cast<double>(x))); }
DETOPS_HD float pow(float x, float y) {
  return static_cast<float>(pow(static_cast<double>(x), static_cast<double>(y)));
}
DETOPS_HD float atan(float x) { return static_cast<float>(atan(static_cast<double>(x))); }
DETOPS_HD float sigmoid(float x) { return static_cast<float>(sigmoid(static_cast<double>(x))); }
DETOPS_HD float softplus(float x) { return static_cast<float>(softplus(static_cast<double>(x))); }
DETOPS_HD float log_sigmoid(float x) { return static_cast<float>(log_sigmoid(static_cast<double>(x))); }
DETOPS_HD SinCos<float> sincos_degrees(float x) {
  const SinCos<double> exact = sincos_degrees(static_cast<double>(x));
  return {static_cast<float>(exact.sin), static_cast<float>(exact.cos)};
}

}  // namespace DETOPS_NAMESPACE::math
