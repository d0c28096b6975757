// The identity of the library, as JSON for detops/_library.py: what it was built from and for, and what it finds here.

#include <string>

#include <torch/headeronly/version.h>

#if defined(DETOPS_WITH_CUDA)
#include "common/launch_cuda.cuh"
#endif

#define DETOPS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// The clone of DETOPS_CLONES (common/parallel_cpu.h) that the loader picks on this processor.
const char* instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "AVX-512 (x86-64-v4)";
  if (__builtin_cpu_supports("x86-64-v3")) return "AVX2 (x86-64-v3)";
#endif
  return "baseline";
}

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "gcc " __VERSION__;
#endif
}

std::string text(const std::string& value) { return '"' + value + '"'; }

std::string field(const char* name, const std::string& value) { return text(name) + ": " + value + ", "; }

std::string describe() {
  std::string fields;
  fields += field("torch", text(TORCH_VERSION));
  fields += field("compiler", text(compiler()));
  fields += field("cpu", text(instruction_set()));
#if defined(DETOPS_WITH_CUDA)
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  const int major = CUDART_VERSION / 1000, minor = CUDART_VERSION % 1000 / 10;
  fields += field("cuda", text(std::to_string(major) + "." + std::to_string(minor)));
  fields += field("architectures", text(DETOPS_CUDA_ARCHITECTURES));
  fields += field("driver", std::to_string(driver));
  fields += field("cuda_stream", detops::find_current_stream_function() != nullptr ? "true" : "false");
#else
  fields += field("cuda", "null");
  fields += field("architectures", "null");
  fields += field("driver", "null");
  fields += field("cuda_stream", "null");
#endif
  return "{" + fields + text("version") + ": " + text(DETOPS_VERSION) + "}";
}

}  // namespace

// Apart from the rest, because it asks no driver.
DETOPS_EXPORT const char* detops_version() { return DETOPS_VERSION; }

DETOPS_EXPORT const char* detops_build_info() {
  static const std::string info = describe();
  return info.c_str();
}
