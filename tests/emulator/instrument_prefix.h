// Included before everything else in kernel sources that are built for the byte counters and the
// race detector (build.py). g++ leaves memcpy and its like uncounted: here they become calls of
// instrument.cpp's, by an assembler name, so that what the compiler itself copies (a large struct,
// which it has counted) still goes to the library's. Needs -fno-builtin-memcpy and so on.
#pragma once
#include <cstring>

extern "C" void* memcpy(void*, const void*, size_t) noexcept __asm__("emulator_memcpy");
extern "C" void* memmove(void*, const void*, size_t) noexcept __asm__("emulator_memmove");
extern "C" void* memset(void*, int, size_t) noexcept __asm__("emulator_memset");

// The same by the compiler's own names, which std::copy and std::fill use too.
#define __builtin_memcpy memcpy
#define __builtin_memmove memmove
#define __builtin_memset memset
