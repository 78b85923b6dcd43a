// CLONES: one function, three instruction sets (baseline, AVX2, AVX-512), of which the loader picks once per process.
//
// Not for a function that holds an OpenMP region: GCC cannot clone one. CMakeLists.txt finds out whether the compiler
// can clone at all.
#pragma once

#if defined(__x86_64__) && !defined(FASTDENSITY_NO_CLONES)
#define CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define CLONES
#endif

// What a cloned function calls must be compiled with it.
#define INLINE inline __attribute__((always_inline))
