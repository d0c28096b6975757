// Accesses beyond what the checked build watches, for test_checked.py: ./program ACCESS INDEX, of 15 elements each.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/counted.h"

using namespace DETOPS_NAMESPACE;

int main(int count, char** words) {
  if (count != 3) return 2;
  const char* const access = words[1];
  const int64_t index = std::atoll(words[2]);
  std::vector<int> values(15);
  const Counted<int> view("some_op", "rows of a level", values.data(), 15);
  CountedArray<int, 15> array("some_op", "corners");
  if (std::strcmp(access, "view") == 0) view[index] = 1;
  if (std::strcmp(access, "part") == 0) view.part(5, 5)[index] = 1;
  if (std::strcmp(access, "part of") == 0) view.part(index, 5)[0] = 1;
  if (std::strcmp(access, "array") == 0) array[index] = 1;
  if (std::strcmp(access, "vector") == 0) values[index] = 1;
  std::puts("done");
}
