"""What the methods cost, per matrix [m, n] of T tasks: floating-point operations, and floats of working memory.

Operations are those of the CPU's algorithms. Memory is beside the deltas, and was measured: on a CPU of processes, for
a GPU of tensors (tests/played_gpu.py), for aspects of 1:4, 1:1 and 4:1, T of 2 and 8, full and low rank.
"""

from __future__ import annotations

from collections.abc import Callable

from isomerge.methods.iso import subspace_sizes

PART_FLOATS = 2**26
"""Floats in `PART_BYTES` of backends/batched.py: the matrices that a GPU works on at a time in float64."""


def _polar_flops(m: int, n: int) -> float:
    r = min(m, n)
    return 3.0 * m * n * r + 10.0 * r**3  # half a Gram, eigensolve and inverse root, product


def iso_c_flops(m: int, n: int, T: int) -> float:
    return T * m * n + _polar_flops(m, n)


def iso_cts_flops(m: int, n: int, T: int) -> float:
    r = min(m, n)
    k, s = subspace_sizes(r, T, 0.8)
    if m <= n:
        task = 2.0 * (m - k) * m * n + (m - k) ** 2 * n + 9.0 * (m - k) ** 3
    else:
        task = m * n * r + 2.0 * m * n * k + k * n**2 + 9.0 * n**3
    return T * task + _polar_flops(m, n) + _polar_flops(r, n) + _polar_flops(m, T * s) + 2.0 * m * n * r


def tsvm_flops(m: int, n: int, T: int) -> float:
    r = min(m, n)
    return (
        T * (m * n * r + 9.0 * r**3 + 2.0 * m * n * (r // T))
        + _polar_flops(m, r)
        + _polar_flops(r, n)
        + 2.0 * m * n * r
    )


def esm_flops(m: int, n: int, T: int) -> float:
    r, s = min(m, n), m // T
    task = 2.0 * r * m * n + 9.0 * r**3 + 4.0 * m * n * s
    return T * task + _polar_flops(m, T * s) + _polar_flops(T * s, n) + 2.0 * m * T * s * min(n, T * s)


def elementwise_flops(per_element: float) -> Callable[[int, int, int], float]:
    return lambda m, n, T: per_element * m * n * T


def spectral_floats(m: int, n: int, T: int) -> float:
    r = min(m, n)
    return 8.0 * m * n + 12.0 * r * r + 3.0 * (m + n) * r  # float64 copies of one matrix and its Gram, bases, factors


def spectral_task_floats(m: int, n: int) -> float:
    return 2.0 * m * n + 6.0 * min(m, n) ** 2  # one more of T = 4 or 8 took 1.4 to 1.6 m n of 4:1, 2.5 to 8 of squares


def esm_task_floats(m: int, n: int) -> float:
    return 2.0 * m * n + 5.0 * m * m + 4.0 * min(m, n) ** 2  # took 0.5 to 0.97 of it


def iso_c_floats(m: int, n: int, T: int) -> float:
    return 6.5 * m * n + 5.0 * min(m, n) ** 2  # a polar factor in float64: takes 0.82 to 0.96 of it, 1:1 to 8:1


def svd_floats(m: int, n: int) -> float:
    return 3.0 * m * n + 5.0 * min(m, n) ** 2  # a float64 SVD: takes 0.82 to 0.91 of both together


def esm_floats(m: int, n: int, T: int) -> float:
    side = max(m, n)
    return spectral_floats(m, n, T) + 12.0 * m * m + 4.0 * side * side  # concatenated bases, moments in float64


def elementwise_floats(per_element: float) -> Callable[[int, int, int], float]:
    return lambda m, n, T: per_element * m * n


def dare_ties_floats(m: int, n: int, T: int) -> float:
    return (T + 8.0) * m * n


# ---- on a GPU, of L matrices together, their updates included: tensors take 0.53 to 0.99 of it, less the 4 r² floats
# of each float64 eigensolve of side r that cuSOLVER is given room for


def iso_c_gpu_floats(m: int, n: int, T: int, L: int) -> float:
    return L * (4.2 * m * n + 22.5 * min(m, n) ** 2)


def tsvm_gpu_floats(m: int, n: int, T: int, L: int) -> float:
    return L * (5.2 * m * n + 25.5 * min(m, n) ** 2) + _parts_floats(m * n, T, L)


def iso_cts_gpu_floats(m: int, n: int, T: int, L: int) -> float:
    return L * (7.2 * m * n + 25.0 * min(m, n) ** 2) + _parts_floats(m * n, T, L)


def esm_gpu_floats(m: int, n: int, T: int, L: int) -> float:
    return L * (5.2 * m * n + 26.5 * m * m + 1.0 * n * n) + _parts_floats(max(m, n) ** 2, T, L)


def _parts_floats(elements: int, T: int, L: int) -> float:
    """Of the T L matrices in a part of a batched op, beyond the L that are counted: copies in float64, four times as
    much of Grams and bases, and twice in the eigensolver.
    """
    return 7.0 * max(0, min(PART_FLOATS, 2 * elements * T * L) - 2 * elements * L)
