// CUDA's small vector types, with its alignments: a vector access to a wrongly aligned address is as much an error in
// the emulation (under UndefinedBehaviorSanitizer) as on a GPU.
#pragma once

#define DETOPS_VECTOR_TYPES(name, type, align2, align4)                       \
  struct alignas(align2) name##2 { type x, y; };                              \
  struct name##3 { type x, y, z; };                                           \
  struct alignas(align4) name##4 { type x, y, z, w; };                        \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }

DETOPS_VECTOR_TYPES(char, signed char, 2, 4)
DETOPS_VECTOR_TYPES(uchar, unsigned char, 2, 4)
DETOPS_VECTOR_TYPES(short, short, 4, 8)
DETOPS_VECTOR_TYPES(ushort, unsigned short, 4, 8)
DETOPS_VECTOR_TYPES(int, int, 8, 16)
DETOPS_VECTOR_TYPES(uint, unsigned, 8, 16)
DETOPS_VECTOR_TYPES(longlong, long long, 16, 16)
DETOPS_VECTOR_TYPES(ulonglong, unsigned long long, 16, 16)
DETOPS_VECTOR_TYPES(float, float, 8, 16)
DETOPS_VECTOR_TYPES(double, double, 16, 16)

#undef DETOPS_VECTOR_TYPES

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};
