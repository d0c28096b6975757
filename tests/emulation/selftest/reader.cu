// Reads one element of memory that somebody else allocated: a library for Python.
#include "cuda_on_cpu.h"

__global__ void read_kernel(const float* values, int index, float* out) { *out = values[index]; }

extern "C" __attribute__((visibility("default"))) float read_element(const float* values, int index) {
  float out = 0;
  DETOPS_LAUNCH(read_kernel, 1, 1, 0, nullptr, values, index, &out);
  return out;
}
