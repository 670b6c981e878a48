"""The iterative algorithms over plain torch primitives."""

from __future__ import annotations

import pytest
import torch
from spectra import orthonormal as random_orthonormal
from spectra import projector, relative
from torch import Tensor

from isomerge import ops
from isomerge.backends.eigen import gram
from isomerge.backends.iterations import block_krylov, chebyshev_subspace, eigh, orthonormal


def operator(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors."""
    V = random_orthonormal(len(values), len(values), 4)
    return (V * values) @ V.mT, V


def test_orthonormal_of_nearly_dependent_columns() -> None:
    X = torch.randn(200, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    X[:, 1] = X[:, 0] + 1e-7 * X[:, 1]
    Q = orthonormal(X)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(12, dtype=Q.dtype), rtol=0, atol=1e-12)
    assert relative(Q @ (Q.mT @ X), X) < 1e-12


def test_block_krylov_resolves_a_flat_spectrum_where_power_iteration_does_not() -> None:
    values = torch.linspace(1, 0.5, 400, dtype=torch.float64)
    G, V = operator(values)
    exact = projector(V[:, :6])
    calls = []

    def apply(X: torch.Tensor) -> torch.Tensor:
        calls.append(X.shape[1])
        return G @ X

    Q = block_krylov(apply, 400, 6, like=G, tol=1e-9, seed=0)
    assert relative(projector(Q), exact) < 1e-5
    power = torch.randn(400, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for _ in calls:
        power = orthonormal(G @ power)
    assert relative(projector(power), exact) > 0.1


def test_block_krylov_of_float32_stops_at_its_own_precision() -> None:
    G, V = operator(torch.logspace(0, -2, 300, dtype=torch.float64))
    G32 = G.float()
    Q = block_krylov(lambda X: G32 @ X, 300, 4, like=G32, tol=0.0, seed=0)
    assert relative(projector(Q), projector(V[:, :4])) < 1e-5


def test_block_krylov_of_low_rank_and_zero_operators() -> None:
    G, V = operator(torch.cat([torch.ones(3), torch.zeros(97)]).double())
    Q = block_krylov(lambda X: G @ X, 100, 3, like=G, tol=1e-9, seed=0)
    assert relative(projector(Q), projector(V[:, :3])) < 1e-9
    Q = block_krylov(lambda X: 0 * X, 100, 5, like=G, tol=1e-9, seed=0)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(5, dtype=Q.dtype), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values", [torch.logspace(0, -1, 300), torch.logspace(0, -4, 300), torch.ones(300) / 2 + torch.eye(300)[0]]
)
def test_chebyshev_subspace_keeps_its_word(values: torch.Tensor, dtype: torch.dtype) -> None:
    G, V = operator(values.double())
    k = 1 if values[1] == values[2] else 8
    for scale in (1.0, 1e-12):
        X = chebyshev_subspace((G * scale).to(dtype), k, tol=1e-5, noise=1e-8, rounds=20)
        assert X is not None
        assert X.dtype == dtype
        assert relative(projector(X), projector(V[:, :k])) <= 1e-5


def test_chebyshev_subspace_declines_what_it_cannot_resolve() -> None:
    values = torch.ones(300).double()
    values[0] = 2.0
    G, _ = operator(values)
    assert chebyshev_subspace(G, 8, tol=1e-5, noise=1e-8) is None  # the 8th of 299 equal eigenvalues
    flat, _ = operator(torch.linspace(1, 0.999, 300, dtype=torch.float64))
    assert chebyshev_subspace(flat, 8, tol=1e-5, noise=1e-8) is None  # too slow
    assert chebyshev_subspace(flat, 8, tol=1e-5, noise=1e-3, rounds=50) is None  # too noisy
    assert chebyshev_subspace(torch.zeros(300, 300), 8, tol=1e-5, noise=1e-8) is None


@pytest.mark.parametrize("seed", range(4))
def test_eigh_answers_where_lapack_gives_up(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(1536, 380, generator=generator) * torch.logspace(0, -3, 380)
    A[:, 130:] = 0  # bases of which a share is null: float32 divide and conquer raises on three of these four
    A = A[:, torch.randperm(380, generator=generator)]
    G = gram(A)
    values, V = eigh(G)
    assert torch.isfinite(V).all()
    torch.testing.assert_close(V.mT @ V, torch.eye(380), rtol=0, atol=1e-5)
    torch.testing.assert_close((V * values) @ V.mT, G, rtol=0, atol=1e-5 * values[-1].item())
    expected = ops.polar(A, backend="reference").factor
    assert torch.linalg.vector_norm(ops.polar(A).factor - expected) <= 1e-4 * torch.linalg.vector_norm(expected)


def test_eigh_falls_back_to_an_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(G: Tensor) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    G = gram(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).double())
    expected = torch.linalg.eigvalsh(G)
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    values, V = eigh(G)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close((V * values) @ V.mT, G)
