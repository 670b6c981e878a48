"""The small dense kernels, csrc/cholesky.cu and csrc/jacobi.cu, run on the CPU by the emulator, against float64."""

from __future__ import annotations

from pathlib import Path

import emulate
import pytest
import torch
from spectra import orthonormal, relative
from torch import Tensor

from isomerge.backends import iterations

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="needs g++")

EPS = torch.finfo(torch.float64).eps
SIDES = (1, 2, 3, 15, 16, 17, 31, 33, 38, 64, 65, 97, 128)  # around the sides of tiles and of compiled variants
SHARED_LIMIT = 163 * 1024  # bytes per block on sm_80, the least of the devices that the extension is built for


def outputs(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [emulate.guarded(torch.full(shape, torch.nan, dtype=torch.float64)) for shape in shapes]


def cholesky(G: Tensor, shift: float = 1e-15, order: str = "forward", kernels: emulate.Library | None = None):
    kernels = kernels or emulate.library("cholesky.cu")
    B, s, _ = G.shape
    L, inverse = outputs((B, s, s), (B, s, s))
    status = emulate.guarded(torch.full((B,), 99, dtype=torch.int32))
    kernels.run("cholesky_inverse_launch", emulate.guarded(G), L, inverse, status, B, s, shift, None, order=order)
    return L.clone(), inverse.clone(), status.clone()


def eigh(G: Tensor, order: str = "forward", kernels: emulate.Library | None = None):
    kernels = kernels or emulate.library("jacobi.cu")
    B, s, _ = G.shape
    values, vectors = outputs((B, s), (B, s, s))
    status = emulate.guarded(torch.full((B,), 99, dtype=torch.int32))
    kernels.run("small_eigh_launch", emulate.guarded(G), values, vectors, status, B, s, None, order=order)
    return values.clone(), vectors.clone(), status.clone()


def tall(s: int, B: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(B, s + 5, s, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + s))


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    Q = orthonormal(len(values), len(values), seed)
    G = (Q * values) @ Q.mT
    return (G + G.mT) / 2


def mutant(tmp_path: Path, source: str, old: str, new: str) -> emulate.Library:
    """A source of csrc/ with its last occurrence of `old` replaced."""
    text = (emulate.ROOT / "csrc" / source).read_text("utf-8")
    assert old in text
    path = tmp_path / source
    path.write_text(new.join(text.rsplit(old, 1)), "utf-8")
    return emulate.library(str(path))


# ---------------------------------------------------------------------------------------------- Cholesky


@pytest.mark.parametrize("s", SIDES)
def test_cholesky_factor_and_inverse(s: int) -> None:
    X = tall(s)
    G = X.mT @ X
    L, inverse, status = cholesky(G)
    assert status.tolist() == [0, 0]
    assert L.equal(L.tril())
    assert inverse.equal(inverse.tril())
    # The bounds of Higham (2002), theorems 10.3 and 14.3 with one rounding more per entry for the reciprocal pivot
    shifted = G + 1e-15 * G.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] * torch.eye(s)
    bound = (s + 4) * EPS
    assert ((L @ L.mT - shifted).abs() <= bound * (L.abs() @ L.mT.abs())).all()
    assert ((inverse @ L - torch.eye(s)).abs() <= bound * (inverse.abs() @ L.abs())).all()


@pytest.mark.parametrize("s", [5, 38, 65, 128])
def test_cholesky_does_not_depend_on_the_order_of_threads(s: int) -> None:
    X = tall(s)
    G = X.mT @ X
    G[1, s // 2, s // 2] = -1  # the second matrix leaves the loop early
    kernels = emulate.library("cholesky.cu")
    *_, status = kernels.in_every_order(lambda order: cholesky(G, order=order))
    assert status.tolist() == [0, s // 2 + 1]
    (launch,) = kernels.launches
    assert launch.grid == (2, 1, 1)
    assert launch.threads == 256
    assert launch.shared_bytes <= SHARED_LIMIT


def test_cholesky_qr_of_ill_conditioned_columns() -> None:
    s = 38
    X = (orthonormal(90, s, 1) * torch.logspace(0, -7, s, dtype=torch.float64)) @ orthonormal(s, s, 2).mT
    Q = X
    for shift in (1e-15, 0.0):  # the second pass is of condition 1, where a shift would only shorten the columns
        _, inverse, status = cholesky((Q.mT @ Q)[None], shift=shift)
        assert status.item() == 0
        Q = Q @ inverse[0].mT
    theirs = iterations.orthonormal(X)
    eye = torch.eye(s, dtype=torch.float64)
    for error in (lambda Q: (Q.mT @ Q - eye).abs().max().item(), lambda Q: relative(Q @ (Q.mT @ X), X)):
        assert error(Q) <= error(theirs) + EPS
    assert (Q.mT @ Q - eye).abs().max() <= s * EPS


def test_the_shift_keeps_a_singular_matrix_going() -> None:
    G = torch.ones(1, 20, 20, dtype=torch.float64)
    L, inverse, status = cholesky(G)
    assert status.item() == 0
    assert (L.isfinite() & inverse.isfinite()).all()
    assert cholesky(G, shift=0.0)[2].item() == 2  # 1 - 1 * 1 is zero exactly


@pytest.mark.parametrize(
    ("row", "column", "value", "failed"),
    [(0, 0, 0.0, 1), (0, 0, torch.nan, 1), (19, 19, -1.0, 20), (17, 3, torch.nan, 18), (18, 2, torch.inf, 19)],
)
def test_cholesky_names_the_pivot_that_failed(row: int, column: int, value: float, failed: int) -> None:
    X = tall(20, B=3)
    G = X.mT @ X
    expected = cholesky(G, shift=0.0)
    G[1, row, column] = value
    L, inverse, status = cholesky(G, shift=0.0)  # the trace of a NaN would fail the first pivot
    assert status.tolist() == [0, failed, 0]
    assert (L[1].isnan() & inverse[1].isnan()).all()
    for actual, before in zip((L, inverse), expected, strict=False):
        assert actual[::2].equal(before[::2])  # the others are not touched


def test_cholesky_reads_the_lower_triangle_alone() -> None:
    X = tall(33)
    G = X.mT @ X
    for actual, expected in zip(cholesky(G.tril() + torch.full_like(G, torch.nan).triu(1)), cholesky(G), strict=True):
        assert actual.equal(expected)


def test_cholesky_without_its_barrier_is_caught(tmp_path: Path) -> None:
    kernels = mutant(
        tmp_path, "cholesky.cu", "      __syncthreads();\n\n      const double pivot", "      const double pivot"
    )
    X = tall(20)
    with pytest.raises(AssertionError, match="depends on the order"):
        kernels.in_every_order(lambda order: cholesky(X.mT @ X, order=order, kernels=kernels))


# ---------------------------------------------------------------------------------------------- Jacobi


def residuals(G: Tensor, values: Tensor, vectors: Tensor) -> tuple[float, float]:
    """max |G V - V diag(values)| relative to the norm of G, and max |VᵀV - I|."""
    norm = torch.linalg.matrix_norm(G, ord=2).clamp_min(1e-308)
    residual = (G @ vectors - vectors * values.unsqueeze(-2)).abs().amax((-1, -2)) / norm
    return residual.max().item(), (vectors.mT @ vectors - torch.eye(G.shape[-1])).abs().max().item()


def check_eigh(G: Tensor, values: Tensor, vectors: Tensor) -> None:
    s = G.shape[-1]
    expected, torch_vectors = torch.linalg.eigh(G)
    norm = expected.abs().amax(-1, keepdim=True)
    assert (values.diff(dim=-1) >= 0).all()
    assert ((values - expected).abs() <= s * EPS * norm).all()  # LAPACK's own bound, of which it reaches a tenth
    for ours, theirs in zip(residuals(G, values, vectors), residuals(G, expected, torch_vectors), strict=True):
        assert ours <= 2 * theirs + s * EPS


@pytest.mark.parametrize("s", SIDES)
def test_eigh_of_random_matrices(s: int) -> None:
    X = tall(s)
    G = torch.stack([X[0, :s] + X[0, :s].mT, X[1].mT @ X[1]])  # indefinite, definite
    values, vectors, status = eigh(G)
    assert ((status >= 0) & (status <= 12)).all()
    check_eigh(G, values, vectors)


@pytest.mark.parametrize("s", [5, 38, 65, 128])
def test_eigh_does_not_depend_on_the_order_of_threads(s: int) -> None:
    X = tall(s)
    kernels = emulate.library("jacobi.cu")
    values, *_ = kernels.in_every_order(lambda order: eigh(X.mT @ X, order=order))
    assert values.isfinite().all()
    (launch,) = kernels.launches
    assert launch.grid == (2, 1, 1)
    assert launch.threads == 4 * 32 * -(-s // 32)
    assert launch.shared_bytes <= SHARED_LIMIT


SPECTRA = {
    "zero": torch.zeros(21),
    "identity": torch.ones(21),
    "rank one": torch.zeros(21).index_fill(0, torch.tensor(0), 1.0),
    "repeated": torch.tensor([2.0] * 10 + [1.0] * 8 + [-1.0] * 3),
    "two clusters": torch.tensor([1.0] * 11 + [1e-10] * 10),
    "tiny": torch.logspace(0, -10, 21),
    "plus and minus": torch.linspace(-1, 1, 21),
    "spread": torch.logspace(8, -8, 21),
    "half and half": torch.tensor([1.0] * 50 + [0.25] * 50),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("scale", [1.0, 1e-290, 1e290])
def test_eigh_of_hostile_spectra(name: str, scale: float) -> None:
    G = symmetric(SPECTRA[name].double())[None]
    values, vectors, status = eigh(G * scale)
    assert 0 <= status.item() <= 16  # without its care for equal eigenvalues, "half and half" takes more than 24
    check_eigh(G, values / scale, vectors)  # the yardstick itself would overflow


def test_eigh_of_a_diagonal_matrix_takes_no_sweep() -> None:
    G = torch.diag(torch.tensor([3.0, -1.0, 2.0, 2.0, 0.0], dtype=torch.float64))[None]
    values, vectors, status = eigh(G)
    assert status.item() == 0
    assert values.equal(torch.tensor([[-1.0, 0.0, 2.0, 2.0, 3.0]], dtype=torch.float64))
    assert vectors[0].equal(torch.eye(5, dtype=torch.float64)[:, [1, 4, 2, 3, 0]])


def test_eigh_reads_the_lower_triangle_alone() -> None:
    G = symmetric(torch.linspace(-1, 1, 33).double())[None]
    for actual, expected in zip(eigh(G.tril() + torch.full_like(G, torch.nan).triu(1)), eigh(G), strict=True):
        assert actual.equal(expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_eigh_reports_what_is_not_finite(value: float) -> None:
    X = tall(20, B=3)
    G = X.mT @ X
    expected = eigh(G)
    G[1, 11, 4] = value
    values, vectors, status = eigh(G)
    assert status[1] == -1
    assert values[1].isnan().all()
    assert vectors[1].isnan().all()
    for actual, before in zip((values, vectors, status), expected, strict=True):
        assert actual[::2].equal(before[::2])


def test_eigh_says_when_it_did_not_converge(tmp_path: Path) -> None:
    kernels = mutant(tmp_path, "jacobi.cu", "kMaxSweeps = 40", "kMaxSweeps = 2")
    G = symmetric(torch.linspace(-1, 1, 33).double())[None]
    assert eigh(G, kernels=kernels)[2].item() == -2
    assert eigh(G)[2].item() > 2


def test_eigh_without_its_last_barrier_of_a_round_is_caught(tmp_path: Path) -> None:
    barrier = "      __syncthreads();\n    }\n  }\n"
    kernels = mutant(tmp_path, "jacobi.cu", barrier, barrier.replace("      __syncthreads();\n", ""))
    G = symmetric(torch.linspace(-1, 1, 38).double())[None]
    with pytest.raises(AssertionError, match="depends on the order"):
        kernels.in_every_order(lambda order: eigh(G, order=order, kernels=kernels))


# ---------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize(("batch", "s"), [(0, 4), (3, 0)])
def test_nothing_to_do_launches_nothing(batch: int, s: int) -> None:
    empty = torch.zeros(batch, s, s, dtype=torch.float64)
    for compute, source in ((cholesky, "cholesky.cu"), (eigh, "jacobi.cu")):
        compute(empty)
        assert emulate.library(source).launches == []


def test_sides_that_do_not_fit_are_refused() -> None:
    for compute in (cholesky, eigh):
        with pytest.raises(emulate.EmulationError, match=r"cudaError 1$"):
            compute(torch.eye(129, dtype=torch.float64)[None])
