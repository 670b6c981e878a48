"""The Triton products against float64: every format in the accuracy that it claims, symmetry to the bit, the code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from spectra import relative
from torch import Tensor
from triton_aot import DEVICE, SHARED_LIMIT, Source, compile_all

from isomerge.backends.primitives import FORMATS

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from isomerge.backends.triton import gemm as gemm_module  # noqa: E402
from isomerge.backends.triton import launch as launch_module  # noqa: E402
from isomerge.backends.triton.gemm import STRIDE, gemm  # noqa: E402
from isomerge.backends.triton.launch import Launch, batched, launching  # noqa: E402
from isomerge.backends.triton.planes import DEPTH, ROUNDINGS, planes  # noqa: E402
from isomerge.backends.triton.primitives import TritonPrimitives  # noqa: E402
from isomerge.backends.triton.schedule import LAUNCHES, fitting, grouping, programs, usable  # noqa: E402
from isomerge.backends.triton.tiles import nearest, triangle  # noqa: E402

SMALL, WIDE = Launch(16, 16, 32, 4, 1), Launch(16, 32, 32, 4, 1)
SHAPES = ((1, 1), (1, 40), (40, 1), (7, 5), (64, 64), (65, 130), (130, 33))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fills what `torch.empty` returns with NaN: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def primitives() -> TritonPrimitives:
    return TritonPrimitives(torch.device(DEVICE))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def symmetric(*shape: int, seed: int = 0) -> Tensor:
    A = random(*shape, seed=seed)
    return A + A.mT


def unit(format: str) -> float:
    """Largest relative error of one operand, rounded to nearest in planes that are."""
    count, bits, _ = ROUNDINGS[format]
    return 2.0 ** -(count * (bits + 1))


def bound(format: str, left: Tensor, right: Tensor) -> Tensor:
    """Elementwise bound of the error of left right: |left| |right| times what is rounded off, dropped, and summed.

    Both operands lose `unit`; of p planes the products of planes i + j >= p are dropped, each at most `unit` and less
    than p of that size. Float32 sums lose half an ulp for each of the k additions.
    """
    count = ROUNDINGS[format].planes
    rounding = unit(format) if format != "fp32" else 0.0
    depth = left.shape[-1] + 4
    return (left.double().abs() @ right.double().abs()) * ((2.1 + count) * rounding + depth * count * 2.0**-24)


# ---------------------------------------------------------------------------------------------------------- decoding


@triton.jit
def _decode_kernel(index, i, j, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    row, column = triangle(tl.load(index + at))
    tl.store(i + at, row)
    tl.store(j + at, column)


def test_the_decode_of_the_triangle_is_exact_at_both_ends_of_every_row() -> None:
    rows = torch.arange(2**15, dtype=torch.int64).mul(46338).div(2**15 - 1, rounding_mode="floor")
    first = rows * (rows + 1) // 2
    index = torch.cat([first, first + rows])
    i, j = torch.empty(2, len(index), dtype=torch.int32, device=DEVICE)
    _decode_kernel[(1,)](index.int().to(DEVICE), i, j, SIZE=len(index))
    assert torch.equal(i.cpu().long(), rows.repeat(2))
    assert torch.equal(j.cpu().long(), torch.cat([torch.zeros_like(rows), rows]))
    root = ((8 * index.float() + 1).sqrt() - 1) / 2
    assert not torch.equal(root.long(), rows.repeat(2)), "the float32 root alone is wrong somewhere"


def visited(launch: Launch, group: int, m: int, n: int, half: bool) -> Tensor:
    """What a product of ones leaves: NaN where no program has been."""
    depth = DEPTH
    left, right = torch.ones(1, 1, m, depth, device=DEVICE), torch.ones(1, 1, n, depth, device=DEVICE)
    return gemm(left, right, torch.Size((m, n)), "fp32", symmetric=half, launch=launch)


@pytest.mark.parametrize("group", [1, 8])
@pytest.mark.parametrize(
    ("launch", "m", "n", "half"),
    [(SMALL, 150, 150, True), (SMALL, 33, 70, False), (WIDE, 40, 150, False), (SMALL, 16, 16, True)],
)
def test_every_tile_is_visited(
    launch: Launch, m: int, n: int, half: bool, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm_module, "grouping", lambda size: group)
    assert torch.equal(visited(launch, group, m, n, half), torch.full((m, n), float(DEPTH), device=DEVICE))


def test_a_tile_that_is_not_visited_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm_module, "programs", lambda *arguments: programs(*arguments) - 1)
    assert visited(SMALL, 1, 40, 40, True).isnan().any()


@pytest.mark.parametrize(
    ("shape", "batch", "half", "tile"),
    [
        ((768, 768), 1, True, (64, 64)),  # 78 tiles, 1 wave x 128; 21 of 128: 1 x 256
        ((768, 768), 12, True, (128, 128)),  # 252 tiles, 2 waves x 256; 936 of 64: 8 x 128
        ((4096, 4096), 1, True, (128, 128)),  # 528 tiles, 4 waves
        ((4096, 4096), 1, False, (128, 256)),  # 512 tiles, 4 x 384; 1024 of 128: 8 x 256
        ((14336, 14336), 1, True, (128, 128)),  # wide tiles are not for symmetric results
    ],
)
def test_tiles_fill_the_device(shape: tuple[int, int], batch: int, half: bool, tile: tuple[int, int]) -> None:
    launch = fitting("bf16", *shape, batch, half)
    assert (launch.rows, launch.columns) == tile


def test_launches_keep_the_order_of_summation() -> None:
    assert set(LAUNCHES) == set(ROUNDINGS) == set(FORMATS) - {"fp64"}
    for format, rows in LAUNCHES.items():
        assert len({row.depth for row in rows}) == 1
        assert DEPTH % rows[0].depth == 0
        assert all(row.columns in (row.rows, 2 * row.rows) for row in rows)
        assert fitting(format, 3, 3, 1, True).rows == rows[-1].rows
        before = fitting(format, 4096, 4096, 1, True, 80)
        assert before.rows == (64 if ROUNDINGS[format].planes > 1 or format == "fp32" else 128)
    assert grouping(4096 * 4096 * 2) == 1
    assert grouping(14336 * 14336 * 2) == 8


# ---------------------------------------------------------------------------------------------------------- rounding


@triton.jit
def _nearest_kernel(X, out, BITS: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, nearest(tl.load(X + at), BITS))


def hostile() -> Tensor:
    """1024 float32: random over the whole exponent range, ties of both formats, signs, zeros, infinities, NaN."""
    X = random(1024) * torch.logspace(-38, 38, 1024, device=DEVICE)
    ties = 1 + (2 * torch.arange(64, device=DEVICE) + 1) * 2.0**-8
    finer = 1 + (2 * torch.arange(64, device=DEVICE) + 1) * 2.0**-11
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1.0], device=DEVICE)
    not_a_number = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32, device=DEVICE).view(torch.float32)
    return torch.cat([X[: 1024 - 266], ties, -ties, finer, -finer, special, not_a_number])


@pytest.mark.parametrize("bits", [7, 10])
def test_rounding_is_to_nearest_ties_to_even(bits: int) -> None:
    X = hostile()
    out = torch.empty_like(X)
    _nearest_kernel[(1,)](X, out, BITS=bits, SIZE=len(X))
    if bits == 7:
        expected = X.bfloat16().float()
    else:
        scale = 2.0 ** (X.double().abs().log2().floor().clamp(min=-126) - bits)  # subnormal below
        expected = torch.where(X.isfinite() & (X != 0), (X.double() / scale).round() * scale, X.double()).float()
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1), (3, 64), (70, 65), (2, 3, 5, 7), (0, 4, 4), (2, 0, 3), (2, 3, 0)])
def test_planes_sum_to_the_matrix_and_are_padded_with_zeros(shape: tuple[int, ...]) -> None:
    X = random(*shape)
    before = X.clone()
    B, (m, n) = X.shape[:-2].numel(), shape[-2:]
    for format, (count, _, dtype) in ROUNDINGS.items():
        parts = planes(X, format)
        assert parts.dtype == dtype
        assert parts.shape == (count, B, m, -(-n // DEPTH) * DEPTH)
        assert not parts[..., n:].any()
        sums = parts[..., :n].double().sum(0)
        error = (sums - batched(X).double()).abs()
        assert (error <= (unit(format) if format not in ("fp32", "bf16x6") else 0) * batched(X).double().abs()).all()
    assert torch.equal(X, before)


def test_planes_of_views() -> None:
    X = random(2, 40, 70)
    views = (X.mT, X[1:, 1::3, 5:], X[:1, :9].expand(2, 9, 70), X[:, None, ::20].transpose(0, 2), X[0, :, ::2])
    for view in views:
        assert torch.equal(planes(view, "bf16x3"), planes(view.contiguous(), "bf16x3"))
    assert batched(X[::2, 1::3]).data_ptr() == X[::2, 1::3].data_ptr()


def test_operands_are_float32_on_one_device_that_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected float32 operands"):
        planes(random(3, 3).double(), "bf16")
    with (
        pytest.raises(ValueError, match=r"on one device, got .*meta"),
        launching(random(2), torch.empty(2, device="meta")),
    ):
        pass
    monkeypatch.setattr(launch_module, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="expected tensors on a CUDA device, got cpu"), launching(torch.ones(2)):
        pass


# ---------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("format", ROUNDINGS)
def test_accuracy_is_that_of_the_format(format: str, primitives: TritonPrimitives) -> None:
    X = random(100, 150)
    exact = X.double() @ X.double().mT
    error = relative(primitives.gram(X, format=format), exact)
    floor = 2 * relative(X @ X.mT, exact)
    assert error <= max(FORMATS[format].unit, floor)
    if FORMATS[format].unit > floor:
        assert error > FORMATS[format].unit / 4, "the operands were not rounded"


@pytest.mark.parametrize(("format", "bits"), [("bf16", 7), ("tf32", 10)])
def test_truncated_operands_would_miss_the_accuracy(format: str, bits: int) -> None:
    X = random(100, 150)
    cut = (X.view(torch.int32) >> (23 - bits) << (23 - bits)).view(torch.float32).double()
    assert relative(cut @ cut.mT, X.double() @ X.double().mT) > FORMATS[format].unit


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_primitives_against_float64(format: str, shape: tuple[int, int], primitives: TritonPrimitives) -> None:
    r, _ = shape
    X, A = random(*shape), symmetric(r, r, seed=1)
    P = random(r, r, seed=2)
    if format == "fp64":
        X, A, P = X.double(), A.double(), P.double()
    copies = [T.clone() for T in (X, A, P)]
    b, c, a = -1.75, 0.375, 1.5
    results = {
        "gram": (primitives.gram(X, format=format), X, X.mT, 1.0, None, 0.0),
        "polynomial": (primitives.polynomial(A, b, c, format=format), A, A, c, A, b),
        "apply": (primitives.apply(P, X, a, format=format), P, X, 1.0, X, a),
    }
    for name, (out, left, right, alpha, addend, beta) in results.items():
        exact = alpha * (left.double() @ right.double())
        if addend is not None:
            exact = exact + beta * addend.double()
        assert out.dtype == FORMATS[format].dtype
        assert out.is_contiguous()
        allowed = exact.abs() * 2.0**-21
        allowed = allowed + (0 if format == "fp64" else abs(alpha) * bound(format, left, right))
        if addend is not None:
            allowed = allowed + abs(beta) * addend.double().abs() * 2.0**-22
        assert ((out.double() - exact).abs() <= allowed + 1e-12).all(), name
        if name != "apply":
            assert torch.equal(out, out.mT), name
    for T, copy in zip((X, A, P), copies, strict=True):
        assert torch.equal(T, copy)


def test_a_full_product_of_commuting_matrices_is_not_symmetric_to_the_bit() -> None:
    A = symmetric(40, 40)
    B = A @ A + A
    left, right = planes(A, "bf16"), planes((B + B.mT) / 2, "bf16")
    full = gemm(left, right, A.shape, "bf16")
    half = gemm(left, right, A.shape, "bf16", symmetric=True)
    assert not torch.equal(full, full.mT)
    assert torch.equal(half, half.mT)
    assert torch.equal(half.tril(), full.tril())


@pytest.mark.parametrize("format", ["bf16", "bf16x6", "fp32"])
def test_a_batch_is_its_matrices_one_by_one(format: str, primitives: TritonPrimitives) -> None:
    X = random(2, 3, 90, 70)[:, ::2, :, 1::2]  # [2, 2, 90, 35], strided
    G = primitives.gram(X, format=format)
    Z = primitives.apply(G, X, 0.5, format=format)
    assert G.shape == (2, 2, 90, 90)
    for i in range(2):
        for j in range(2):
            assert torch.equal(G[i, j], primitives.gram(X[i, j], format=format))
            assert torch.equal(Z[i, j], primitives.apply(G[i, j], X[i, j].contiguous(), 0.5, format=format))


def test_small_tiles_give_the_same(primitives: TritonPrimitives) -> None:
    X, P = random(2, 75, 100), random(2, 75, 75)
    left, right = planes(P, "bf16x3"), planes(X.mT, "bf16x3")
    allowed = 2 * bound("bf16x3", P, X) + 2.0**-21 * X.abs()
    for launch in (Launch(32, 32, 32, 4, 1), Launch(32, 64, 32, 4, 1)):
        tiled = gemm(left, right, X.shape, "bf16x3", addend=X, beta=0.5, launch=launch)
        assert ((tiled - primitives.apply(P, X, 0.5, format="bf16x3")).abs() <= allowed).all()


@pytest.mark.parametrize("format", FORMATS)
def test_empty_zero_and_rank_one(format: str, primitives: TritonPrimitives) -> None:
    dtype = FORMATS[format].dtype
    for shape in ((0, 3, 4), (2, 0, 4), (0, 0)):
        X = random(*shape).to(dtype)
        G = primitives.gram(X, format=format)
        assert G.shape == (*shape[:-1], shape[-2])
        assert primitives.apply(G, X, 1.0, format=format).shape == shape
    X = torch.empty(2, 5, 0, dtype=dtype, device=DEVICE)
    assert torch.equal(primitives.gram(X, format=format), torch.zeros(2, 5, 5, dtype=dtype, device=DEVICE))
    zero = torch.zeros(20, 30, dtype=dtype, device=DEVICE)
    assert not primitives.apply(primitives.gram(zero, format=format), zero, 1.5, format=format).any()
    column = torch.arange(1.0, 31.0, dtype=dtype, device=DEVICE)[:, None]
    assert torch.equal(primitives.gram(column, format=format), column * column.mT), "small integers are exact"


@pytest.mark.parametrize("format", ROUNDINGS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter's numpy
def test_what_is_not_finite_stays_visible_where_it_belongs(
    format: str, bad: float, primitives: TritonPrimitives
) -> None:
    X = random(2, 70, 30)
    X[1, 66, 29] = bad
    G = primitives.gram(X, format=format)
    assert not G[1, 66].isfinite().any()
    assert not G[1, :, 66].isfinite().any()
    G[1, 66], G[1, :, 66] = 0, 0
    assert G.isfinite().all()


def test_operands_that_do_not_fit_are_refused() -> None:
    left, right = planes(random(2, 6, 5), "bf16"), planes(random(2, 7, 5), "bf16")
    shape = torch.Size((2, 6, 7))
    assert gemm(left, right, shape, "bf16").shape == shape
    with pytest.raises(ValueError, match="planes of one batch and depth"):
        gemm(left, right[:, :1], shape, "bf16")
    with pytest.raises(ValueError, match="planes of one batch and depth"):
        gemm(left, planes(random(2, 7, 65), "bf16"), shape, "bf16")
    with pytest.raises(ValueError, match="planes of 7 and 7 rows"):
        gemm(left, right, torch.Size((2, 7, 7)), "bf16")
    with pytest.raises(ValueError, match="planes of 6 and 7 rows"):
        gemm(left, right, shape, "bf16", symmetric=True)
    with pytest.raises(ValueError, match=r"expected an addend \[2, 6, 7\], got \[6, 7\]"):
        gemm(left, right, shape, "bf16", addend=random(6, 7), beta=1.0)
    long = torch.empty(1, 1, 1, STRIDE, device="meta")
    with pytest.raises(ValueError, match="expected less than 8388608 columns"):
        gemm(long, long, torch.Size((1, 1)), "fp32")


# -------------------------------------------------------------------------------------------------------------- code

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def product_source(format: str, launch: Launch, symmetric: bool, capability: int) -> Source:
    count, bits, dtype = ROUNDINGS[format]
    sizes = {"rows": "i32", "columns": "i32", "depth": "i32"}
    strides = dict.fromkeys(("left_plane", "left_batch", "right_plane", "right_batch"), "i64")
    pointers = {"left": POINTERS[dtype], "right": POINTERS[dtype], "addend": "*fp32", "out": "*fp32"}
    constants = {
        "SYMMETRIC": symmetric,
        "ADD": True,
        "PLANES": count,
        "PRECISION": "tf32" if bits == 10 else "ieee",
        "GROUP": 8,
        "ROWS": launch.rows,
        "COLUMNS": launch.columns,
        "DEPTH": launch.depth,
    }
    return Source(
        kernel="isomerge.backends.triton.gemm:_gemm_kernel",
        signature=pointers | sizes | strides | {"programs": "i32", "alpha": "fp32", "beta": "fp32"},
        constants=constants,
        options=launch.options,
        aligned=(*pointers, *sizes, *strides),
        capability=capability,
    )


def planes_source(capability: int) -> Source:
    sizes = dict.fromkeys(("rows", "columns", "batch_stride", "row_stride", "padded"), "i32") | {"plane_stride": "i64"}
    return Source(
        kernel="isomerge.backends.triton.planes:_planes_kernel",
        signature={"X": "*fp32", "out": "*bf16"} | sizes,
        constants={"column_stride": 1, "COUNT": 3, "BITS": 7, "ROWS": 64, "COLUMNS": 64},
        options={"num_warps": 4, "num_stages": 1},
        aligned=("X", "out", *sizes),
        capability=capability,
    )


def test_code_on_both_generations(tmp_path: Path) -> None:
    """Tensor cores, 16-byte accesses, 64-bit offsets, resources: of every tile, symmetric where it is used so."""
    cases = [
        (format, launch, launch in usable(format, True, capability), capability)
        for capability in (90, 80)
        for format, launches in LAUNCHES.items()
        for launch in launches
    ]
    compiled = compile_all([product_source(*case) for case in cases] + [planes_source(90), planes_source(80)], tmp_path)
    for (format, launch, symmetric, capability), code in zip(cases, compiled[:-2], strict=True):
        label = f"{format} {launch} {symmetric} {capability}: {code}"
        assert code.shared <= SHARED_LIMIT[capability], label
        assert code.stack == 0, label
        assert code.local == 0, label
        instruction, other = (r"wgmma\.mma_async", r"mma\.sync")[:: 1 if capability == 90 else -1]
        assert (code.count(instruction) > 0) == (format != "fp32"), label
        assert code.count(other) == 0, label
        assert code.count(r"cp\.async\.cg") > 0, label
        assert code.count(r"cp\.async\.ca") == 0, label
        assert code.count(r"st\.global") == code.count(r"st\.global\.v4") > 0, label
        assert code.count(r"ld\.global") == code.count(r"ld\.global\.v4") > 0, label
        # one step is added to the accumulator outside the tensor cores, if and only if there are several planes
        added = launch.rows * launch.columns // (32 * launch.warps)
        assert (code.count(r"add(\.rn)?\.f32") >= added) == (ROUNDINGS[format].planes > 1), label
        # offsets to a tile have 64 bits, but for the steps of the loop
        steps = re.findall(r"tt\.addptr %\w+, (%\w+) : !tt\.ptr<\w+>, i32", code.ttir)
        assert steps == [f"%c{launch.depth}_i32"] * 2, label
    for code in compiled[-2:]:
        assert code.stack == code.local == 0
        assert code.count(r"ld\.global") == code.count(r"ld\.global\.v4") > 0
        assert code.count(r"st\.global") == code.count(r"st\.global\.v[24]") > 0
        assert not [line for line in code.ttir.splitlines() if "tt.addptr" in line and "xi32>" in line]
