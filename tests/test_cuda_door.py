"""isomerge.backends.cuda: what it checks, and that addresses, sizes and strides arrive as the kernels expect them.

The door runs over the real extension where there is a device, and everywhere over the same kernels emulated on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import emulate
import pytest
import torch
from spectra import relative
from torch import Tensor

from isomerge.backends import BackendUnavailable, cuda, extension, reference

SOURCES = ("cholesky.cu", "jacobi.cu", "shift_cov.cu", "project_scale.cu")
EPS = torch.finfo(torch.float32).eps

TRUNCATED = 36 * EPS
"""Tensor cores truncate sums of 16 products: six products of planes in two blocks, for X Δᵀ, which enters squared, and
for the moment. How accurate the kernels are is decided elsewhere; a wrong address, size or stride is wrong by 1."""


class EmulatedExtension:
    """The functions of isomerge._C over emulated kernels: entries `<name>_launch` in the order of their parameters."""

    def __init__(self) -> None:
        self.library = emulate.library(*SOURCES)

    def __getattr__(self, name: str) -> object:
        if name.endswith("_workspace_bytes"):
            return lambda *sizes: self.library.value(name, *sizes)
        return lambda *arguments: self.library.run(f"{name}_launch", *arguments)


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(emulate.COMPILER is None, reason="needs g++")),
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(bool(cuda.availability()), reason="no device")]
        ),
    ]
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        extension = EmulatedExtension()

        @contextmanager
        def launching(tensor: Tensor) -> Iterator[tuple[object, int]]:
            yield extension, 0

        monkeypatch.setattr(cuda, "DEVICE", "cpu")
        monkeypatch.setattr(cuda, "_launching", launching)
        monkeypatch.setattr(
            cuda, "_bytes", lambda like, count: emulate.guarded(torch.full((count,), 255, dtype=torch.uint8))
        )
    return str(request.param)


def randn(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def views(A: Tensor) -> dict[str, Tensor]:
    """The same matrices in other strides."""
    wide = torch.full((*A.shape[:-1], A.shape[-1] + 3), torch.nan, dtype=A.dtype, device=A.device)
    wide[..., 1:-2] = A
    return {"contiguous": A, "transposed": A.mT.contiguous().mT, "columns of wider ones": wide[..., 1:-2]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_delta", [False, True])
def test_shift_cov(device: str, dtype: torch.dtype, with_delta: bool) -> None:
    X = randn(2, 1, 21, 19, device=device, dtype=dtype)
    delta = randn(2, 1, 11, 19, device=device, seed=1) if with_delta else None
    d = 11 if with_delta else 19
    start = randn(2, 1, d, d, device=device, seed=2)
    start = start + start.mT
    expected = reference.shift_cov(X, delta, out=start.double(), precision="default")
    Y = X.float() if delta is None else X.float() @ delta.mT
    torch_error = relative(start + Y.mT @ Y, expected)
    for name, given in views(X).items():
        before = given.clone()
        for out in views(start.clone()).values():
            result = cuda.shift_cov(given, delta, out=out, precision="default")
            assert result is out
            assert relative(out, expected) <= 2 * torch_error + TRUNCATED, name
            assert out.equal(out.mT)
        assert given.equal(before)


def test_shift_cov_of_nothing_and_into_float64(device: str) -> None:
    out = torch.ones(3, 3, dtype=torch.float64, device=device)
    assert cuda.shift_cov(randn(0, 3, device=device), None, out=out, precision="default").equal(torch.ones_like(out))
    X = randn(5, 3, device=device)
    expected = reference.shift_cov(X, None, out=out.clone(), precision="default")
    assert relative(cuda.shift_cov(X, None, out=out, precision="default"), expected) <= TRUNCATED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_project_scale(device: str, dtype: torch.dtype) -> None:
    Q, W = randn(2, 3, 20, 5, device=device), randn(2, 3, 20, 17, device=device, dtype=dtype, seed=1)
    scale = randn(2, 3, 5, device=device, seed=2)
    expected, squares = reference.project_scale(Q, W, row_scale=scale)
    torch_error = relative((scale.unsqueeze(-1) * (Q.mT @ W.float())).flatten(-3, -2), expected)
    for q in views(Q).values():
        for w in views(W).values():
            C, actual = cuda.project_scale(q, w, row_scale=scale)
            assert (C.dtype, actual.dtype) == (torch.float32, torch.float64)
            assert relative(C, expected) <= 2 * torch_error + TRUNCATED
            assert relative(actual, squares) <= 4 * torch_error + 2 * TRUNCATED


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (0,)])
def test_small_cores(device: str, leading: tuple[int, ...]) -> None:
    X = randn(*leading, 12, 7, device=device).double()
    G = X.mT @ X
    L, inverse, status = cuda.cholesky_inverse(G)
    assert status.shape == leading
    assert not status.any()
    torch.testing.assert_close(L, torch.linalg.cholesky(G), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(inverse @ L, torch.eye(7, device=device).expand_as(G).double(), rtol=0, atol=1e-12)
    values, vectors, status = cuda.small_eigh(G.mT)
    assert status.shape == leading
    assert (status >= 0).all()
    torch.testing.assert_close(values, torch.linalg.eigvalsh(G), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(G @ vectors, vectors * values.unsqueeze(-2), rtol=0, atol=1e-12)
    assert cuda.cholesky_inverse(G - G, shift=0.0).status.eq(1).all()


# ---------------------------------------------------------------------------------------------- what it refuses

CPU = torch.ones(4, 4)
DOUBLE = torch.ones(4, 4, dtype=torch.float64)
TASKS = torch.ones(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cuda.shift_cov(CPU, None, out=CPU, precision="default"),
            "expected tensors on one cuda device, got cpu",
        ),
        (lambda: cuda.small_eigh(DOUBLE), "expected tensors on one cuda device"),
        (lambda: cuda.project_scale(TASKS, TASKS, row_scale=TASKS), "expected tensors on one cuda device"),
    ],
)
def test_other_devices_are_refused(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(BackendUnavailable, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: cuda.shift_cov(DOUBLE, None, out=DOUBLE, precision="default"),
            BackendUnavailable,
            "expected X in float32 or bfloat16 or float16, got float64",
        ),
        (
            lambda: cuda.shift_cov(CPU, None, out=CPU.half(), precision="default"),
            BackendUnavailable,
            "expected out in float32 or float64, got float16",
        ),
        (lambda: cuda.shift_cov(CPU, None, out=CPU, precision="exact"), BackendUnavailable, "is float64"),
        (
            lambda: cuda.shift_cov(CPU, None, out=torch.ones(5, 5), precision="default"),
            ValueError,
            r"expected out of shape \(4, 4\), got \(5, 5\)",
        ),
        (
            lambda: cuda.shift_cov(CPU, torch.ones(3, 5), out=torch.ones(3, 3), precision="default"),
            ValueError,
            r"expected delta of shape \(3, 4\), got \(3, 5\)",
        ),
        (
            lambda: cuda.project_scale(TASKS, torch.ones(2, 5, 7), row_scale=torch.ones(2, 3)),
            ValueError,
            r"expected W of shape \(2, 4, 7\), got \(2, 5, 7\)",
        ),
        (
            lambda: cuda.project_scale(TASKS, TASKS, row_scale=torch.ones(2, 4)),
            ValueError,
            r"expected row_scale of shape \(2, 3\), got \(2, 4\)",
        ),
        (lambda: cuda.small_eigh(CPU), BackendUnavailable, "expected G in float64, got float32"),
        (lambda: cuda.small_eigh(DOUBLE[:3]), ValueError, r"s <= 128, got \(3, 4\)"),
        (
            lambda: cuda.cholesky_inverse(torch.eye(129, dtype=torch.float64)),
            ValueError,
            r"s <= 128, got \(129, 129\)",
        ),
    ],
)
def test_what_the_kernels_cannot_take_is_refused_by_name(
    call: object, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    assert callable(call)
    with pytest.raises(error, match=message):
        call()


def test_without_the_extension_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(extension, "import_module", missing)
    assert "isomerge._C is not built" in (cuda.availability() or "")
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    with pytest.raises(BackendUnavailable, match="ISOMERGE_CUDA=1"):
        cuda.small_eigh(DOUBLE)

    def broken(name: str) -> object:
        raise ImportError("undefined symbol: cudaGraph")

    monkeypatch.setattr(extension, "import_module", broken)
    assert cuda.availability() == "the extension isomerge._C does not load: undefined symbol: cudaGraph"


def test_the_extension_has_one_door() -> None:
    package = emulate.ROOT / "isomerge"
    doors = [path for path in package.rglob("*.py") if "isomerge._C" in path.read_text("utf-8")]
    assert [str(path.relative_to(package)) for path in doors] == ["backends/cuda.py"]
    assert import_module("isomerge.backends.cuda") is cuda  # and importing it needs neither extension nor device
