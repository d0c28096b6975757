// Symbols that the oldest glibc a wheel supports does not have.

// libstdc++'s headers ask this variable of glibc 2.32 whether references may be counted without atomic operations. Ours
// says no, and the library asks for no newer glibc.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
