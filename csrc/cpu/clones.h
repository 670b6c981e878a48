// One function for every processor: the compiler makes a version for each width of vectors, the loader takes the best.
// All versions give the same bits, for nothing here is contracted to fused products (-ffp-contract=off) or reordered.
// Versions for AVX-512 were no faster: the passes wait for memory. -DISOMERGE_CLONES= leaves the plainest one alone.

#pragma once

#include <climits>  // for __GLIBC__

#ifndef ISOMERGE_CLONES
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define ISOMERGE_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define ISOMERGE_CLONES
#endif
#endif

#define ISOMERGE_INLINE inline __attribute__((always_inline))
#define ISOMERGE_LAMBDA __attribute__((always_inline))
