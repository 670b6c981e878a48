// project_scale: C[b, t s + i] = row_scale[b, t, i] (Q_tᵀ W_t)[i] and the sums of squares of the columns of C.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

extern "C" {

// Bytes of scratch memory that `project_scale_launch` needs for the same sizes. Pure in its arguments.
std::int64_t project_scale_workspace_bytes(std::int64_t batch, std::int64_t tasks, std::int64_t n, std::int64_t s);

// Q [batch tasks, m, s] float32 and W [batch tasks, m, n], bfloat16 (w_bytes = 2) or float32 (4): elements of a row
// adjacent, other strides in elements. row_scale [batch, tasks, s] float32, contiguous.
// C [batch, tasks s, n] float32 and column_squares [batch, n] float64, contiguous, are written, not added to.
// workspace: 16-byte aligned, contents do not matter. Any alignment of Q and W is right, 16 bytes for the base and
// every stride is fast. m = 0 writes zeros.
cudaError_t project_scale_launch(const float* Q, std::int64_t q_matrix_stride, std::int64_t q_row_stride, const void* W,
                                 std::int64_t w_bytes, std::int64_t w_matrix_stride, std::int64_t w_row_stride,
                                 const float* row_scale, std::int64_t batch, std::int64_t tasks, std::int64_t m,
                                 std::int64_t n, std::int64_t s, float* C, double* column_squares, void* workspace,
                                 cudaStream_t stream);
}
