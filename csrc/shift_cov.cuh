// shift_cov: out[b] += Yᵀ Y, Y = X or X Δᵀ: the second moment of a layer's inputs or of its feature shifts.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

// Bytes of scratch memory that `shift_cov_launch` needs for these sizes; m = 0 means no delta. Pure in its arguments.
std::int64_t shift_cov_workspace_bytes(std::int64_t batch, std::int64_t tokens, std::int64_t n, std::int64_t m);

// X [batch, tokens, n], bfloat16 (x_bytes = 2) or float32 (4), elements of a row adjacent, other strides in elements.
// delta [batch, m, n] float32 likewise, or null with m = 0: then Y = X and d = n, else d = m.
// out [batch, d, d] contiguous, float32 (out_bytes = 4) or float64 (8): added to, symmetric to the bit if it was.
// workspace: 16-byte aligned, contents do not matter before and are undefined after. Any alignment of X and delta is
// right, one of 16 bytes for the base and every stride is fast. tokens = 0 leaves out as it is.
cudaError_t shift_cov_launch(const void* X, std::int64_t x_bytes, std::int64_t batch, std::int64_t tokens,
                             std::int64_t n, std::int64_t x_batch_stride, std::int64_t x_row_stride,
                             const float* delta, std::int64_t m, std::int64_t delta_batch_stride,
                             std::int64_t delta_row_stride, void* out, std::int64_t out_bytes, void* workspace,
                             cudaStream_t stream);
}
