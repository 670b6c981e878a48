"""Triton second moments and projections against float64, their sums in truncating arithmetic, and the compiled code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from spectra import relative
from torch import Tensor
from triton_aot import DEVICE, SHARED_LIMIT, Compiled, Source, compile_all

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from isomerge.backends import eager  # noqa: E402
from isomerge.backends.triton import moments, projection, shifts, sums  # noqa: E402
from isomerge.backends.triton.launch import Launch, interpreted  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of the interpreter's numpy

EPS = torch.finfo(torch.float32).eps
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (*HALVES, torch.float32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that the interpreter can afford, several of them for matrices of side 40, and several shares of tokens."""
    tile = Launch(32, 32, 16, 4, 1)
    monkeypatch.setattr(moments, "MOMENTS", dict.fromkeys(moments.MOMENTS, tile))
    monkeypatch.setattr(moments, "REDUCTION", Launch(16, 32, 1, 4, 1))
    monkeypatch.setattr(shifts, "SHIFTS", dict.fromkeys(shifts.SHIFTS, tile))
    monkeypatch.setattr(projection, "LAUNCHES", (Launch(16, 32, 16, 4, 1), tile))
    for module in (moments, shifts):
        monkeypatch.setattr(module, "FLUSH", 32)
    monkeypatch.setattr(moments, "MIN_TOKENS", 64)
    monkeypatch.setattr(moments, "MAX_TOKENS", 64)


def second_moment(X: Tensor, delta: Tensor | None) -> Tensor:
    Y = X.double() if delta is None else X.double() @ delta.double().mT
    return Y.mT @ Y


def shift_cov(X: Tensor, delta: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    d = X.shape[-1] if delta is None else delta.shape[-2]
    out = torch.zeros(*X.shape[:-2], d, d, device=X.device) if out is None else out
    assert moments.shift_cov(X, delta, out=out, precision="default") is out
    return out


def allowed(X: Tensor, delta: Tensor | None, exact: Tensor) -> float:
    """Twice the eager backend's error in float32, and the rounding of the result."""
    theirs = torch.zeros(exact.shape, device=X.device)
    return 2 * relative(eager.shift_cov(X, delta, out=theirs, precision="default"), exact) + EPS


# ---- shift_cov
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("delta_dtype", [None, *FLOATS])
@pytest.mark.parametrize(("tokens", "n", "m"), [(1, 5, 3), (33, 40, 20), (130, 18, 33)])
def test_shift_cov_is_the_second_moment(
    dtype: torch.dtype, delta_dtype: torch.dtype | None, tokens: int, n: int, m: int
) -> None:
    X = normal(tokens, n).to(DEVICE, dtype)
    delta = None if delta_dtype is None else normal(m, n, seed=1).to(DEVICE, delta_dtype)
    given = [tensor.clone() for tensor in (X, delta) if tensor is not None]
    exact, result = second_moment(X, delta), shift_cov(X, delta)
    assert relative(result, exact) <= allowed(X, delta, exact)
    assert torch.equal(result, result.mT)
    assert all(torch.equal(a, b) for a, b in zip((X, delta), given, strict=False))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("with_delta", [False, True])
def test_shift_cov_of_stacks_is_that_of_each_to_the_bit_and_adds_to_out(with_delta: bool) -> None:
    X = normal(2, 2, 70, 20).to(DEVICE).bfloat16()
    delta = normal(2, 2, 35, 20, seed=1).to(DEVICE).bfloat16() if with_delta else None
    d = 35 if with_delta else 20
    start = normal(2, 2, d, d, seed=2).to(DEVICE)
    start = start + start.mT
    for dtype in (torch.float32, torch.float64):
        out = shift_cov(X, delta, start.to(dtype, copy=True))
        exact = start.to(dtype).double() + second_moment(X, delta)
        assert relative(out, exact) <= 1e-6
        assert torch.equal(out, out.mT)
        index = (1, 0)
        alone = shift_cov(X[index], None if delta is None else delta[index], start[index].to(dtype, copy=True))
        assert torch.equal(alone, out[index])


@pytest.mark.usefixtures("small")
def test_shift_cov_of_strided_tensors() -> None:
    X = normal(2, 3, 20, 36).to(DEVICE).float().mT[..., ::2, :17]  # [2, 3, 18, 17], tokens contiguous
    delta = normal(2, 3, 17, 9, seed=1).to(DEVICE).float().mT
    assert torch.equal(shift_cov(X.bfloat16()), shift_cov(X.bfloat16().contiguous()))
    whole = shift_cov(X)
    assert torch.equal(whole, shift_cov(X.contiguous()))
    assert torch.equal(shift_cov(X[0], delta[0]), shift_cov(X[0].contiguous(), delta[0].contiguous()))
    assert torch.equal(shift_cov(X[:1, :1].expand(2, 1, 18, 17))[1, 0], whole[0, 0])
    memory = torch.zeros(3, 20, 2, 25, device=DEVICE)
    out = memory[:, :17, :, 1:18].transpose(1, 2).transpose(0, 1)  # [2, 3, 17, 17]: no one batch dimension, misaligned
    shift_cov(X, out=out)
    assert torch.equal(out, whole)
    assert not memory[:, 17:].any()
    assert not memory[..., 18:].any()
    assert not memory[..., 0].any()


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shift_cov_uses_the_lower_triangle_of_out(dtype: torch.dtype) -> None:
    X, out = normal(20, 70).to(DEVICE, dtype), normal(70, 70, seed=3).to(DEVICE).float()
    expected = out.tril() + out.tril(-1).mT
    assert relative(shift_cov(X, out=out), expected.double() + second_moment(X, None)) <= 1e-6
    assert torch.equal(out, out.mT)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_not_finite_shows_on_the_diagonal(bad: float, dtype: torch.dtype) -> None:
    X, delta = normal(40, 20).to(DEVICE, dtype), normal(9, 20, seed=1).to(DEVICE).float()
    X[39, 19] = bad
    assert shift_cov(X).diagonal().isfinite().tolist() == [True] * 19 + [False]
    assert not shift_cov(X, delta).diagonal().isfinite().any()
    X[39, 19], delta[3, 0] = 0, bad
    assert shift_cov(X, delta).diagonal().isfinite().tolist() == [True] * 3 + [False] + [True] * 5


def test_shift_cov_without_elements_and_what_it_does_not_do() -> None:
    for X, delta, d in ((torch.empty(0, 4), None, 4), (torch.ones(3, 4), torch.empty(0, 4), 0)):
        out = torch.eye(d, device=DEVICE)
        given = None if delta is None else delta.to(DEVICE)
        moments.shift_cov(X.to(DEVICE), given, out=out, precision="default")
        assert torch.equal(out, torch.eye(d, device=DEVICE))
    X, out = torch.ones(3, 4, device=DEVICE), torch.zeros(4, 4, device=DEVICE)
    for A, delta, precision in ((X.double(), None, "default"), (X, X.double(), "default"), (X, None, "exact")):
        with pytest.raises(ValueError, match='backend="eager"'):
            moments.shift_cov(A, delta, out=out, precision=precision)


def test_shares_of_the_tokens_depend_on_the_shape_and_fill_the_processors() -> None:
    tiles = {768: 21, 1024: 36, 2304: 171, 3072: 300, 4096: 528}  # of 128 x 128, for the sides of real layers
    assert {d: moments.splits_of(count, 8192) for d, count in tiles.items()} == {
        768: 6,
        1024: 7,
        2304: 3,
        3072: 2,
        4096: 1,
    }
    for count in range(1, 600, 7):
        for tokens in (1, 511, 512, 2048, 10**6):
            splits = moments.splits_of(count, tokens)
            assert 1 <= splits <= max(1, tokens // 512)
            programs = count * splits
            if tokens == 10**6:
                assert programs / (-(-programs // 132) * 132) >= 0.9
    assert [moments.workspace_tokens(d) for d in (1, 768, 1024, 4096, 14336)] == [8192, 7168, 5120, 2048, 2048]


@pytest.mark.usefixtures("small")
def test_token_offsets_beyond_31_bits() -> None:
    """18 tokens 2²⁷ elements apart: 4.5 GiB of addresses, of which as many pages are touched. One step is 2³¹ long."""
    memory = torch.empty(18 * 2**27, dtype=torch.bfloat16, device=DEVICE)
    X, delta = memory.as_strided((18, 20), (2**27, 1)), normal(7, 20, seed=1).to(DEVICE).bfloat16()
    X.copy_(normal(18, 20))
    assert torch.equal(shift_cov(X), shift_cov(X.contiguous()))
    assert torch.equal(shift_cov(X, delta), shift_cov(X.contiguous(), delta))
    W, Q, scale = X[None], normal(1, 18, 3).to(DEVICE).bfloat16(), torch.ones(1, 3, device=DEVICE)
    far, near = (projection.project_scale(Q, A, row_scale=scale)[0] for A in (W, W.contiguous()))
    assert torch.equal(far, near)


# ---- accuracy of long sums, and of planes
def truncated(x: Tensor) -> Tensor:
    """float64 x to float32, towards zero: as tensor cores round what they add to an accumulator."""
    nearest = x.float()
    towards_zero = nearest.nextafter(torch.zeros_like(nearest))
    return torch.where(nearest.double().abs() > x.abs(), towards_zero, nearest)


def test_a_million_tokens_lose_nothing() -> None:
    """The kernel's order of sums in arithmetic that truncates each block of 16 tokens: chains of FLUSH tokens, added to
    the nearest by share, then the shares. One chain, which it avoids, is off by 1e-3."""
    d, tokens = 6, 2**20
    X = (normal(tokens, d) + 0.5).bfloat16().double()
    blocks = X.view(-1, 16, d).mT @ X.view(-1, 16, d)  # [2¹⁶, d, d]
    exact = blocks.sum(0)
    splits = moments.splits_of(21, tokens)
    share = -(-tokens // (64 * splits)) * 64
    total = torch.zeros(d, d)
    for part in blocks.split(share // 16):
        count = -(-len(part) // (sums.FLUSH // 16)) * (sums.FLUSH // 16)
        padded = torch.cat([part, part.new_zeros(count - len(part), d, d)]).view(-1, sums.FLUSH // 16, d, d)
        chains = torch.zeros(len(padded), d, d)
        for step in padded.unbind(1):
            chains = truncated(chains.double() + step)
        summed = torch.zeros(d, d)
        for chain in chains:
            summed += chain
        total += summed
    assert relative(total, exact) <= 1e-6
    one_chain = torch.zeros(d, d)
    for step in blocks[: 2**14]:
        one_chain = truncated(one_chain.double() + step)
    assert relative(one_chain, blocks[: 2**14].sum(0)) > 1e-4  # a quarter of the tokens


@triton.jit
def _truncating_product(a, b, accumulator, PRECISION: tl.constexpr):
    """`tiles.product` on a tensor core that truncates to float32 once per call."""
    exact = accumulator.to(tl.float64) + tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    nearest = exact.to(tl.float32)
    beyond = tl.abs(nearest.to(tl.float64)) > tl.abs(exact)
    return tl.where(beyond, nearest.to(tl.int32, bitcast=True) - 1, nearest.to(tl.int32, bitcast=True)).to(
        tl.float32, bitcast=True
    )


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(not interpreted(), reason="the interpreter takes the place of the tensor core")
def test_chains_in_a_truncating_tensor_core_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "product", _truncating_product)
    monkeypatch.setattr(moments, "splits_of", lambda tiles, tokens: 1)
    X = (normal(2048, 4) + 2).to(DEVICE).bfloat16()
    exact = second_moment(X, None)
    flushed = relative(shift_cov(X), exact)
    monkeypatch.setattr(moments, "FLUSH", 2**20)
    one_chain = relative(shift_cov(X), exact)
    assert flushed <= 5e-7
    assert one_chain >= 2e-6  # 128 truncations


@pytest.mark.usefixtures("small")
def test_many_calls_add_up() -> None:
    X = (normal(800, 5) + 0.5).to(DEVICE).bfloat16()
    parts, exact = torch.zeros(5, 5, device=DEVICE), second_moment(X, None)
    for chunk in X.split(50):
        shift_cov(chunk, out=parts)
    assert relative(parts, exact) <= 1e-6
    assert relative(shift_cov(X), exact) <= 1e-6


@pytest.mark.usefixtures("small")
def test_shifts_are_kept_to_24_bits() -> None:
    X, delta = normal(20, 33).to(DEVICE).float(), normal(9, 33, seed=1).to(DEVICE).float()
    Y = shifts.shifts_workspace(1, 20, 9, X.device)
    split = moments._planes
    shifts.store_shifts(split(X[None], False), split(delta[None], False), Y, 20, 9, 33)
    exact = X.double() @ delta.double().mT
    planes = Y[:, 0, :, :9].double()
    assert relative(planes.sum(0), exact) <= 2 * relative(X @ delta.mT, exact) + EPS
    assert relative(planes[:2].sum(0), exact) > 1e-6  # what two planes would keep
    assert bool((planes[0] == exact.float().bfloat16()).double().mean() > 0.99)  # each the nearest


# ---- project_scale
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("T", "m", "n", "s"), [(1, 5, 7, 5), (2, 20, 33, 38), (2, 17, 40, 19), (5, 7, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_project_scale_is_the_scaled_concatenation(T: int, m: int, n: int, s: int, dtype: torch.dtype) -> None:
    Q, W = normal(2, T, m, s).to(DEVICE).float(), normal(2, T, m, n, seed=1).to(DEVICE, dtype)
    scale = normal(2, T, s, seed=2).to(DEVICE).float()
    given = [tensor.clone() for tensor in (Q, W, scale)]
    rows, squares = projection.project_scale(Q, W, row_scale=scale)
    exact = (scale.double().unsqueeze(-1) * (Q.double().mT @ W.double())).flatten(-3, -2)
    theirs, their_squares = eager.project_scale(Q, W.float(), row_scale=scale)
    assert relative(rows, exact) <= 2 * relative(theirs, exact) + EPS
    columns = exact.square().sum(-2)
    assert squares.dtype == torch.float64
    # squares are added in float32 within a tile of 16 or 32 rows: five levels of sums beside twice the error of rows
    assert relative(squares, columns) <= 2 * relative(their_squares, columns) + 5 * EPS
    assert all(torch.equal(a, b) for a, b in zip((Q, W, scale), given, strict=True))
    alone, alone_squares = projection.project_scale(Q[1], W[1], row_scale=scale[1])
    assert torch.equal(alone, rows[1])
    assert torch.equal(alone_squares, squares[1])


@pytest.mark.usefixtures("small")
def test_project_scale_of_strided_tensors() -> None:
    Q = normal(3, 2, 19, 40).to(DEVICE).float().mT[..., ::2, :]  # [3, 2, 20, 19]
    W = normal(3, 2, 20, 40, seed=1).to(DEVICE).float()[..., 1:22]
    scale = normal(3, 19, 2, seed=2).to(DEVICE).float().mT
    plain = projection.project_scale(Q.contiguous(), W.contiguous(), row_scale=scale.contiguous())
    for mine, expected in zip(projection.project_scale(Q, W, row_scale=scale), plain, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.usefixtures("small")
def test_what_is_not_finite_shows_in_the_squares() -> None:
    Q, W, scale = normal(2, 9, 5).float(), normal(2, 9, 40, seed=1).float(), torch.ones(2, 5)
    W[1, 8, 39] = torch.inf
    _, squares = projection.project_scale(Q.to(DEVICE), W.to(DEVICE), row_scale=scale.to(DEVICE))
    assert squares.isfinite().tolist() == [True] * 39 + [False]
    with pytest.raises(ValueError, match='backend="eager"'):
        projection.project_scale(Q.double(), W.double(), row_scale=scale.double())


@pytest.mark.parametrize(("s", "rows"), [(1, 64), (38, 64), (64, 64), (65, 128), (96, 128), (160, 64), (3584, 128)])
def test_strips_pad_least(s: int, rows: int) -> None:
    assert projection.fitting(s).rows == rows


# ---- code generation
PACKAGE = "isomerge.backends.triton."


def moment_source(planes: int, dtype: str = "bf16", **changes: object) -> Source:
    launch = moments.MOMENTS[planes]
    aligned = ("d", "share", "plane_stride", "batch_stride", "token_stride")
    return replace(
        Source(
            PACKAGE + "moments:_moment_kernel",
            {"Y": f"*{dtype}", "partial": "*fp32", **dict.fromkeys((*aligned, "tokens", "tiles", "splits"), "i32")},
            {
                "column_stride": 1,
                "PLANES": planes,
                "BLOCK": launch.rows,
                "DEPTH": launch.depth,
                "FLUSH": sums.FLUSH,
            },
            launch.options,
            ("Y", "partial", *aligned),
        ),
        **changes,
    )


def reduce_source(dtype: str, **changes: object) -> Source:
    launch = moments.REDUCTION
    aligned = ("d", "batch_stride", "row_stride")
    return replace(
        Source(
            PACKAGE + "moments:_reduce_kernel",
            {"partial": "*fp32", "out": f"*{dtype}", **dict.fromkeys((*aligned, "tiles", "splits"), "i32")},
            {"column_stride": 1, "BLOCK": moments.MOMENTS[1].rows, "ROWS": launch.rows, "COLUMNS": launch.columns},
            launch.options,
            ("partial", "out", *aligned),
        ),
        **changes,
    )


def shift_source(planes: tuple[int, int], **changes: object) -> Source:
    launch = shifts.SHIFTS[planes]
    aligned = ("m", "n", "X_plane", "X_batch", "X_token", "delta_plane", "delta_batch", "delta_row")
    aligned = (*aligned, "Y_plane", "Y_batch", "Y_token")
    return replace(
        Source(
            PACKAGE + "shifts:_shift_kernel",
            {"X": "*bf16", "delta": "*bf16", "Y": "*bf16", **dict.fromkeys((*aligned, "tokens", "programs"), "i32")},
            {
                "X_column": 1,
                "delta_column": 1,
                "LEFT": planes[0],
                "RIGHT": planes[1],
                "ROWS": launch.rows,
                "COLUMNS": launch.columns,
                "DEPTH": launch.depth,
                "FLUSH": sums.FLUSH,
            },
            launch.options,
            ("X", "delta", "Y", *aligned),
        ),
        **changes,
    )


def project_source(launch: Launch, **changes: object) -> Source:
    aligned = ("m", "n", "s", "Q_batch", "Q_task", "Q_row", "W_batch", "W_task", "W_row")
    return replace(
        Source(
            PACKAGE + "projection:_project_kernel",
            {
                **dict.fromkeys(("Q", "W", "row_scale", "C", "partial"), "*fp32"),
                **dict.fromkeys((*aligned, "tasks"), "i32"),
            },
            {"Q_column": 1, "W_column": 1, "ROWS": launch.rows, "COLUMNS": launch.columns, "DEPTH": launch.depth},
            launch.options,
            ("Q", "W", "row_scale", "C", "partial", *aligned),
        ),
        **changes,
    )


def ones(source: Source, names: Sequence[str]) -> Source:
    """The same kernel as it is compiled where these arguments are 1, and others not divisible."""
    return replace(source, constants={**source.constants, **dict.fromkeys(names, 1)}, aligned=())


PRODUCTS: Mapping[str, Source] = {
    "moment of bf16 9.0": moment_source(1),
    "moment of fp16 9.0": moment_source(1, "fp16"),
    "moment of planes 9.0": moment_source(3),
    **{f"shift of {planes} 9.0": shift_source(planes) for planes in shifts.SHIFTS},
    **{f"projection by {launch.rows} 9.0": project_source(launch) for launch in projection.LAUNCHES},
    "moment of bf16 8.0": moment_source(1, capability=80),
    "moment of planes 8.0": moment_source(3, capability=80),
    "shift of (1, 1) 8.0": shift_source((1, 1), capability=80),
    "shift of (3, 3) 8.0": shift_source((3, 3), capability=80),
    **{f"projection by {launch.rows} 8.0": project_source(launch, capability=80) for launch in projection.LAUNCHES},
}
OTHERS: Mapping[str, Source] = {
    "reduction to fp32": reduce_source("fp32"),
    "reduction to fp64": reduce_source("fp64"),
    "reduction to fp64 8.0": reduce_source("fp64", capability=80),
    "moment of one": ones(moment_source(3), ("tokens", "d", "tiles", "splits", "plane_stride", "token_stride")),
    "reduction of one": ones(reduce_source("fp32"), ("d", "tiles", "splits", "batch_stride", "row_stride")),
    "shift of one": ones(shift_source((1, 3)), ("tokens", "m", "n", "programs", "X_token")),
    "projection of 38": replace(
        project_source(projection.LAUNCHES[0]), aligned=("Q", "W", "row_scale", "C", "partial", "n", "W_row")
    ),
    "projection of one": ones(project_source(projection.LAUNCHES[0]), ("tasks", "m", "n", "s", "Q_row", "W_row")),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Compiled]:
    sources = {**PRODUCTS, **OTHERS}
    return dict(zip(sources, compile_all(list(sources.values()), tmp_path_factory.mktemp("aot")), strict=True))


@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_no_kernel_spills_and_shared_memory_suffices(compiled: Mapping[str, Compiled], name: str) -> None:
    kernel, source = compiled[name], {**PRODUCTS, **OTHERS}[name]
    assert kernel.stack == kernel.local == 0
    assert kernel.shared <= SHARED_LIMIT[source.capability]


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_on_tensor_cores_and_copies_asynchronous(compiled: Mapping[str, Compiled], name: str) -> None:
    kernel = compiled[name]
    operand = "f16.f16" if "fp16" in name else "bf16.bf16"
    if name.endswith("9.0"):
        assert kernel.count(rf"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.{operand}") > 0
    else:
        assert kernel.count(rf"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.{operand}\.f32") > 0
    assert kernel.count(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10") > 0
    assert kernel.count(r"cp\.async\.ca") == 0
    assert kernel.count(r"st\.global(\.\w+)*\.v4\.b32") > 0


def test_a_flush_does_not_drain_the_pipeline(compiled: Mapping[str, Compiled]) -> None:
    """In the loop a wgmma is left in flight while operands are copied; a flush and the end alone wait for all."""
    for name in ("moment of bf16 9.0", "shift of (1, 1) 9.0"):
        assert compiled[name].count(r"wgmma\.wait_group\.sync\.aligned\s+1;") == 1
        assert compiled[name].count(r"wgmma\.wait_group\.sync\.aligned\s+0;") == 2
