"""Cases of `gpu.py`: the roofs of the device, every primitive, every op.

The yardstick is torch on the same device: float32 `torch.linalg.svd` and eigh, IEEE float32 products; of a stack it
computes one matrix, and its time counts for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_measure import SPECTRAL, Candidate, Case, Problem
from gpu_setting import EPS, LARGEST, MOMENT, Setting, among, projected, summed, svd64
from torch import Tensor

from isomerge import ops
from isomerge.backends import BACKENDS
from isomerge.backends.primitives import FORMATS, Primitives, TorchPrimitives, float32_products


def polar_flops(m: int, n: int) -> dict[str, float]:
    """Float64 Gram and Cholesky; nine quintic steps of 4 r³ at 39/9 bf16 products on the factor; two products."""
    r, b = min(m, n), max(m, n)
    return {"fp64": r * r * b + r**3, "bf16": 39 * 4 * r**3 + 12 * r * r * b * (b > r)}


def eigen_flops(m: int, n: int, k: int) -> dict[str, float]:
    """Float64 Gram, eigensolve of the small side (9 r³) and the product of A with k vectors."""
    r, b = min(m, n), max(m, n)
    return {"fp64": r * r * b + 9.0 * r**3 + 2.0 * m * n * k}


def polar(setting: Setting, L: int, m: int, n: int) -> Problem:
    A, (U, _, Vh) = summed(setting, L, m, n)

    def torch_way() -> Tensor:
        U, _, Vh = setting.svd(A[0])
        return (U @ Vh)[None]

    run = among(lambda who: ops.polar(A, backend=who).factor, setting.backends("polar"), torch_way)
    work = {unit: L * count for unit, count in polar_flops(m, n).items()}
    return Problem(run, "torch", lambda X: X[0], lambda: U @ Vh, SPECTRAL, L, work, 8.0 * A.numel())


def polar_product(setting: Setting, L: int, m: int, n: int) -> Problem:
    q = min(m, n)
    A, B, scale = setting.normal(L, m, q), setting.normal(L, q, n, seed=1), setting.normal(L, q, seed=2).abs()

    def product(svd: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        left, right = ((U @ Vh) for U, _, Vh in map(svd, (A[0], B[0])))
        return ((left * scale[0].to(dtype)) @ right)[None]

    run = among(
        lambda who: ops.polar_product(A, B, scale=scale, backend=who).product,
        setting.backends("polar_product"),
        partial(product, setting.svd, torch.float32),
    )
    both = [polar_flops(m, q), polar_flops(q, n), {"fp64": 0.0, "bf16": 12.0 * m * n * q}]
    work = {unit: L * sum(part[unit] for part in both) for unit in ("fp64", "bf16")}
    moved = 4.0 * (A.numel() + B.numel() + L * m * n)
    return Problem(run, "torch", lambda X: X[0], lambda: product(svd64, torch.float64)[0], SPECTRAL, L, work, moved)


def rsvd(setting: Setting, L: int, m: int, n: int) -> Problem:
    A, (U, _, Vh) = summed(setting, L, m, n)
    k = min(m, n) // 8
    run = among(
        lambda who: ops.rsvd(A, k, backend=who),
        setting.backends("rsvd"),
        lambda: [part[None] for part in setting.svd(A[0])],
    )

    def answer(triplets: Sequence[Tensor]) -> Tensor:
        U, _, Vh = triplets
        return U[0, :, :k] @ Vh[0, :k]

    work = {unit: L * count for unit, count in eigen_flops(m, n, k).items()}
    moved = 4.0 * (A.numel() + L * k * (m + n))
    return Problem(run, "torch", answer, lambda: U[:, :k] @ Vh[:k], SPECTRAL, L, work, moved, {"k": k})


def subspace(setting: Setting, L: int, m: int, n: int) -> Problem:
    A, (U, _, _) = summed(setting, L, m, n)
    k = int(0.8 * min(m, n))
    run = among(
        lambda who: ops.subspace(A, k, backend=who), setting.backends("subspace"), lambda: setting.svd(A[0])[0][None]
    )
    work = {unit: L * count for unit, count in eigen_flops(m, n, k if m > n else 0).items()}
    moved = 4.0 * (A.numel() + L * m * k)

    def answer(Q: Tensor) -> Tensor:
        return projected(Q[0, :, :k], setting)

    return Problem(run, "torch", answer, lambda: answer(U[None]), SPECTRAL, L, work, moved, {"k": k})


def principal(setting: Setting, L: int, m: int, n: int) -> Problem:
    X, delta, k = setting.inputs(2 * n, n)[0, 0], setting.deltas(L, m, n)[:, 0], m // setting.tasks
    M = ops.shift_cov(X, backend="eager").expand(L, n, n)

    def torch_way(dtype: torch.dtype = torch.float32) -> tuple[Tensor, None]:
        D = delta[0].to(dtype)
        return torch.linalg.eigh(D @ M[0].to(dtype) @ D.mT).eigenvectors.flip(1)[None], None

    run = among(lambda who: ops.principal(M, k, delta=delta, backend=who), setting.backends("principal"), torch_way)
    if m > LARGEST:
        run.pop("torch")
    r, b = min(m, n), max(m, n)
    work = {"fp64": L * (3.0 * r * r * b + 9.0 * r**3 + 2.0 * m * r * k)}
    moved = 4.0 * L * (n * n + m * n + m * k)

    def answer(result: tuple[Tensor, Any]) -> Tensor:
        return projected(result[0][0, :, :k], setting)

    exact = None if m > LARGEST else lambda: answer(torch_way(torch.float64))
    return Problem(run, "torch", answer, exact, SPECTRAL, L, work, moved, {"k": k})


def shift_cov(setting: Setting, m: int, n: int, dtype: torch.dtype, shifts: bool) -> Problem:
    """Of bfloat16 and float32 inputs, alone or shifted by a float32 delta: products of one plane, of 1 x 3 or 3 x 3."""
    N = 96 if setting.quick else 65536
    X = setting.inputs(N, n)[0, 0].to(dtype)
    delta = setting.deltas(1, m, n)[0, 0] if shifts else None
    d = n if delta is None else m

    def product(dtype: torch.dtype) -> Tensor:
        Y = X.to(dtype) if delta is None else X.to(dtype) @ delta.to(dtype).mT
        return Y.mT @ Y

    run = among(
        lambda who: ops.shift_cov(X, delta, backend=who),
        setting.backends("shift_cov"),
        lambda: product(torch.float32),
        None,
    )
    half = dtype == torch.bfloat16
    inputs = (1 if half else 6) * float(N) * n * n
    shifted = (3 if half else 6) * 2.0 * N * m * n + 6.0 * N * m * m
    moved = float(X.element_size() * X.numel() + 4 * (d * d + m * n * shifts))
    facts = {"tokens": N, "inputs": "bf16" if half else "fp32", "shifts": shifts, "d": d}
    work = {"bf16": shifted if shifts else inputs}
    return Problem(run, "torch", lambda C: C, lambda: product(torch.float64), MOMENT, 1, work, moved, facts)


def project_scale(setting: Setting, L: int, m: int, n: int) -> Problem:
    T, s = setting.tasks, m // setting.tasks
    Q, W, scale = setting.normal(L, T, m, s), setting.deltas(L, m, n), setting.normal(L, T, s, seed=1)

    def product(layers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        left, right, factors = (part[:layers].to(dtype) for part in (Q, W, scale))
        C = (factors.unsqueeze(-1) * (left.mT @ right)).flatten(-3, -2)
        return C, C.square().sum(-2)

    run = among(
        lambda who: ops.project_scale(Q, W, scale, backend=who),
        setting.backends("project_scale"),
        lambda: product(L, torch.float32),
        None,
    )
    work, moved = {"bf16": 6 * 2.0 * L * T * m * n * s}, 4.0 * (Q.numel() + W.numel() + L * T * s * n)

    def answer(result: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([result[0][0], result[1][:1].sqrt()])

    return Problem(run, "torch", answer, lambda: answer(product(1, torch.float64)), EPS, L, work, moved, {"s": s})


def delta_sum(setting: Setting, L: int, m: int, n: int) -> Problem:
    base = setting.normal(L, m, n, seed=7).mul_(0.02).bfloat16()
    tuned = setting.deltas(L, m, n).add_(base.unsqueeze(1)).bfloat16()

    def sums(layers: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        deltas = tuned[:layers].to(dtype) - base[:layers].to(dtype).unsqueeze(1)
        total = deltas.sum(1)
        return total, torch.linalg.matrix_norm(deltas), torch.linalg.matrix_norm(total)

    run = among(
        lambda who: ops.delta_sum(tuned, base, backend=who),
        setting.backends("delta_sum"),
        lambda: sums(L, torch.float32),
        None,
    )
    moved = 2.0 * (tuned.numel() + base.numel()) + 4.0 * base.numel()

    def answer(result: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([part[0].flatten() for part in result])

    return Problem(run, "torch", answer, lambda: answer(sums(1, torch.float64)), EPS, L, bytes=moved)


def finalize(setting: Setting, L: int, m: int, n: int) -> Problem:
    base, update = setting.normal(L, m, n, seed=7).mul_(0.02).bfloat16(), setting.normal(L, m, n).mul_(1e-3)
    run = among(
        lambda who: ops.finalize(base, update, 1.2, out_dtype=torch.bfloat16, backend=who),
        setting.backends("finalize"),
        lambda: (base.float() + 1.2 * update).bfloat16(),
        None,
    )

    def exact() -> Tensor:
        return base[0].double() + 1.2 * update[0].double()

    return Problem(run, "torch", lambda merged: merged[0], exact, EPS, L, bytes=8.0 * base.numel())


def matmul(setting: Setting, L: int, m: int, n: int) -> Problem:
    A, B = setting.normal(L, m, n), setting.normal(L, n, m, seed=1)
    run = among(lambda who: ops.matmul(A, B, backend=who), setting.backends("matmul"), lambda: A @ B, None)
    work, moved = {"fp32": 2.0 * L * m * m * n}, 4.0 * (A.numel() + B.numel() + L * m * m)
    return Problem(run, "torch", lambda C: C[0], lambda: A[0].double() @ B[0].double(), EPS, L, work, moved)


STACKED = {
    "polar": polar,
    "polar_product": polar_product,
    "rsvd": rsvd,
    "subspace": subspace,
    "principal": principal,
    "project_scale": project_scale,
    "delta_sum": delta_sum,
    "finalize": finalize,
    "matmul": matmul,
}


def op_cases(setting: Setting) -> Iterator[Case]:
    """The square shapes of all models first, then tall ones, then wide: if time runs out, each kind has its rows."""
    shapes = [(model, m, n) for model in setting.models for m, n in model.counts]
    for model, m, n in sorted(shapes, key=lambda item: (item[1] != item[2], item[1] < item[2])):
        label = f"{model.name} {m}x{n}"
        for op in (op for op in BACKENDS["triton"].ops if op in STACKED):
            yield Case(op, label, partial(STACKED[op], setting, model.layers, m, n))
        for dtype in (torch.bfloat16, torch.float32):
            for shifts in (False, True):
                yield Case("shift_cov", label, partial(shift_cov, setting, m, n, dtype, shifts))


def ceiling_cases(setting: Setting) -> Iterator[Case]:
    """Bytes read plus written by a copy; products of random matrices, large ones and many small ones."""
    for megabytes in (1,) if setting.quick else (256, 4096):
        yield Case("copy", f"{megabytes} MB", partial(_copy, setting, megabytes * 10**6))
    for unit in ("bf16", "tf32", "fp32", "fp64") if setting.device.type == "cuda" else ("fp32", "fp64"):
        for L, r in [(2, 32)] if setting.quick else [(1, 4096), (1, 8192), (96, 768)]:
            yield Case(unit, f"{L} x {r}x{r}", partial(_gemm, setting, unit, L, r))


def _copy(setting: Setting, size: int) -> Problem:
    source = setting.normal(size // 4)
    target = torch.empty_like(source)
    facts = {"unit": "copy", "amount": 2 * size, "of": "B"}
    run = {"torch": Candidate(lambda: target.copy_(source))}
    return Problem(run, "torch", lambda C: C, source.double, None, facts=facts)


def _gemm(setting: Setting, unit: str, L: int, r: int) -> Problem:
    dtype = {"bf16": torch.bfloat16, "fp64": torch.float64}.get(unit, torch.float32)
    A, B = (setting.normal(L, r, r, seed=seed).to(dtype) for seed in (0, 1))

    def product() -> Tensor:
        with float32_products("tf32" if unit == "tf32" else "ieee", setting.device):
            return A @ B

    facts = {"unit": unit, "amount": 2 * L * r**3, "of": "FLOP"}
    run = {"torch": Candidate(product)}
    return Problem(run, "torch", lambda C: C[0], lambda: A[0].double() @ B[0].double(), None, L, facts=facts)


UNITS = {"bf16": ("bf16", 1), "bf16x3": ("bf16", 3), "bf16x6": ("bf16", 6), "tf32": ("tf32", 1), "tf32x3": ("tf32", 3)}
"""Format -> the unit that multiplies, and how often; "fp32" and "fp64" are units themselves."""


def primitive_cases(setting: Setting) -> Iterator[Case]:
    """The products of the iterations in every format: one large matrix, and a ViT-B/32's worth of small ones."""
    for L, r in [(2, 24)] if setting.quick else [(1, 4096), (12, 768), (24, 1024)]:
        for name in ("gram", "polynomial", "apply"):
            for format in FORMATS:
                yield Case(f"{name} {format}", f"{L} x {r}x{r}", partial(_primitive, setting, L, r, name, format))


def _primitive(setting: Setting, L: int, r: int, name: str, format: str) -> Problem:
    dtype = FORMATS[format].dtype
    X = (setting.normal(L, r, r) / r**0.5).to(dtype)
    G = X @ X.mT
    arguments = {"gram": (X,), "polynomial": (G, -2.5, 0.5), "apply": (G, X, 1.5)}[name]

    def plainly(dtype: torch.dtype, layers: int = L) -> Tensor:
        A, B = X[:layers].to(dtype), G[:layers].to(dtype)
        if name == "gram":
            return A @ A.mT
        return B @ A + 1.5 * A if name == "apply" else 0.5 * (B @ B) - 2.5 * B

    providers: dict[str, Primitives] = {"torch's": TorchPrimitives(setting.device)}
    if setting.device.type == "cuda" and find_spec("triton"):
        from isomerge.backends.triton.primitives import TritonPrimitives

        providers["triton's"] = TritonPrimitives(setting.device)
    run = {"torch": Candidate(lambda: plainly(dtype))}
    for who, primitives in providers.items():
        if format in primitives.formats:
            run[who] = Candidate(partial(getattr(primitives, name), *arguments, format=format))
    unit, products = UNITS.get(format, (format, 1))
    half = 1 if name == "apply" else 0.5
    inputs = len({id(given) for given in arguments if isinstance(given, Tensor)})
    work, moved = {unit: products * half * L * 2.0 * r**3}, X.element_size() * (inputs + 1.0) * L * r * r
    floor = None if dtype == torch.float64 else 2 * FORMATS[format].unit  # no yardstick is finer than float64
    return Problem(run, "torch", lambda C: C[0], lambda: plainly(torch.float64, 1)[0], floor, L, work, moved)
