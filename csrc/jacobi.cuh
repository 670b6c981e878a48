// Eigenvalues and eigenvectors of small symmetric matrices.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

// For each of `batch` symmetric matrices G [s, s], 1 <= s <= 128, row-major, of which the lower triangle is read:
// values [s] ascending and vectors [s, s], in columns, such that G vectors = vectors diag(values), float64.
//
// status [batch]: the number of sweeps taken (0 for a diagonal matrix), -1 where G is not finite (values and vectors
// are then NaN), -2 where the off-diagonal entries did not vanish within the largest number of sweeps (values and
// vectors are what was reached). 6 to 10 sweeps of 8 s³ operations are usual; one read of G, one write of each result.
cudaError_t small_eigh_launch(const double* G, double* values, double* vectors, std::int32_t* status,
                              std::int64_t batch, std::int64_t s, cudaStream_t stream);
}
