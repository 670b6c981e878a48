// Cholesky factors of small symmetric positive definite matrices, and the inverses of those factors.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

// For each of `batch` matrices G [s, s], 1 <= s <= 128, row-major, of which the lower triangle is read:
//
//   factor L [s, s] and inverse L⁻¹ [s, s], both lower triangular with zeros above, of L Lᵀ = G + shift tr(G) I.
//
// CholeskyQR takes Q = X L⁻ᵀ with G = XᵀX. The shift, relative to the trace, keeps the factor defined where X is
// singular to rounding. status [batch]: 0, or i + 1 for the first pivot i that is not positive and finite; both results
// of that matrix are then NaN. float64 throughout; one read of G, one write of each result.
cudaError_t cholesky_inverse_launch(const double* G, double* factor, double* inverse, std::int32_t* status,
                                    std::int64_t batch, std::int64_t s, double shift, cudaStream_t stream);
}
