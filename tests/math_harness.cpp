// Loops over arrays of every function of common/math.h, for tests/test_math.py.
#include "common/math.h"

namespace math = DETOPS_NAMESPACE::math;

#define LOOP(name, T, value)                                                                                   \
  extern "C" void name(const T* __restrict__ x, const T* __restrict__ y, T* __restrict__ out, int64_t count) { \
    (void)y;                                                                                                   \
    for (int64_t i = 0; i < count; ++i) out[i] = value;                                                        \
  }
#define LOOPS(name, value)            \
  LOOP(name##_float64, double, value) \
  LOOP(name##_float32, float, value)

LOOPS(exp, math::exp(x[i]))
LOOPS(log, math::log(x[i]))
LOOPS(pow, math::pow(x[i], y[i]))
LOOPS(atan, math::atan(x[i]))
LOOPS(sin_degrees, math::sincos_degrees(x[i]).sin)
LOOPS(cos_degrees, math::sincos_degrees(x[i]).cos)
LOOPS(sigmoid, math::sigmoid(x[i]))
LOOPS(softplus, math::softplus(x[i]))
LOOPS(log_sigmoid, math::log_sigmoid(x[i]))
