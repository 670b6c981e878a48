"""The memory-bound Triton passes against the eager ones, bit by bit, and what the compiler makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton_aot import DEVICE, SHARED_LIMIT, Compiled, Source, compile_all

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # of the interpreter's numpy

from isomerge.backends import eager  # noqa: E402
from isomerge.backends.triton import passes  # noqa: E402

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
every_pair = pytest.mark.parametrize(("mine", "theirs"), list(itertools.product(DTYPES, DTYPES)))
SIZES = {
    "one": (1, 1, 1, 1),
    "block": (1, 2, 1, passes.PASS.columns),
    "more": (2, 3, 3, passes.PASS.columns + 1),
    "odd": (3, 1, 37, 61),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def models(batch: int, T: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """(tuned [batch, T, m, n], base [batch, m, n]), the deltas a hundredth of the base."""
    base = normal(batch, m, n)
    return (base.unsqueeze(1) + 0.01 * normal(batch, T, m, n, seed=1)).to(DEVICE), base.to(DEVICE)


def same_sums(mine: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert torch.equal(mine[0], expected[0])
    for a, b in zip(mine[1:], expected[1:], strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0, equal_nan=True)


# ---- delta_sum
@every_pair
def test_delta_sum_has_the_bits_of_the_eager_one(mine: torch.dtype, theirs: torch.dtype) -> None:
    tuned, base = models(2, 3, 30, 71)
    tuned, base = tuned.to(mine), base.to(theirs)
    before = tuned.clone(), base.clone()
    result = passes.delta_sum(tuned, base)
    same_sums(result, eager.delta_sum(tuned, base))
    assert result[0].dtype == (torch.float64 if torch.float64 in (mine, theirs) else torch.float32)
    assert torch.equal(tuned, before[0])
    assert torch.equal(base, before[1])


@pytest.mark.parametrize(("batch", "T", "m", "n"), SIZES.values(), ids=SIZES)
def test_delta_sum_of_sizes_around_a_block(batch: int, T: int, m: int, n: int) -> None:
    tuned, base = models(batch, T, m, n)
    same_sums(passes.delta_sum(tuned.bfloat16(), base.float()), eager.delta_sum(tuned.bfloat16(), base.float()))


def test_delta_sum_of_strided_transposed_and_expanded_stacks() -> None:
    tuned, base = models(4, 4, 14, 30)
    tuned, base = tuned.float(), base.float()
    gaps = tuned[::2, ::2, ::3, 4:], base[::2, ::3, 4:]
    same_sums(passes.delta_sum(*gaps), eager.delta_sum(*gaps))
    by_columns = tuned.mT.contiguous().mT, base.mT.contiguous().mT
    same_sums(passes.delta_sum(*by_columns), passes.delta_sum(tuned, base))
    mixed = tuned.mT.contiguous().mT, base
    same_sums(passes.delta_sum(*mixed), passes.delta_sum(tuned, base))
    expanded = tuned[:1, :1].expand(2, 3, 14, 30), base[:1].expand(2, 14, 30)
    same_sums(passes.delta_sum(*expanded), eager.delta_sum(*expanded))
    deep = tuned.view(2, 2, 4, 14, 30), base.view(2, 2, 14, 30)
    assert passes.delta_sum(*deep)[1].shape == (2, 2, 4)
    same_sums([part.flatten(0, 1) for part in passes.delta_sum(*deep)], passes.delta_sum(tuned, base))
    same_sums([part[3] for part in passes.delta_sum(tuned, base)], passes.delta_sum(tuned[3], base[3]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_the_norms(bad: float) -> None:
    tuned, base = models(2, 3, 40, 80)
    tuned, base = tuned.bfloat16(), base.bfloat16()
    tuned[1, 2, 39, 79] = bad
    _, norms, norm = passes.delta_sum(tuned, base)
    assert norms.isfinite().tolist() == [[True] * 3, [True, True, False]]
    assert norm.isfinite().tolist() == [True, False]
    tuned[0, 1, 0, 0] = base[0, 0, 0] = bad  # Inf - Inf
    assert not passes.delta_sum(tuned, base)[1][0].isfinite().any()


def test_squares_beyond_float32_do_not_overflow_and_sums_do() -> None:
    tuned, base = torch.full((1, 2, 4, 5), 3e38, device=DEVICE), torch.zeros(1, 4, 5, device=DEVICE)
    total, norms, norm = passes.delta_sum(tuned, base)
    torch.testing.assert_close(norms.cpu(), torch.full((1, 2), 3e38 * 20**0.5, dtype=torch.float64))
    assert bool(total.isinf().all())
    assert bool(norm.isinf())


# ---- finalize
@every_pair
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_finalize_has_the_bits_of_the_eager_one(mine: torch.dtype, theirs: torch.dtype, out_dtype: torch.dtype) -> None:
    base, update = normal(3, 29, 75).to(DEVICE, mine), normal(3, 29, 75, seed=1).to(DEVICE, theirs)
    scale = torch.tensor([0.3, -1.52, 0.0], dtype=torch.float64, device=DEVICE)
    before = base.clone(), update.clone()
    merged = passes.finalize(base, update, scale=scale, out_dtype=out_dtype)
    assert merged.dtype == out_dtype
    assert torch.equal(merged, eager.finalize(base, update, scale=scale, out_dtype=out_dtype))
    assert torch.equal(base, before[0])
    assert torch.equal(update, before[1])


@pytest.mark.parametrize(("batch", "T", "m", "n"), SIZES.values(), ids=SIZES)
def test_finalize_of_sizes_around_a_block_and_of_any_strides(batch: int, T: int, m: int, n: int) -> None:
    base, update = normal(batch, m, n).to(DEVICE, torch.bfloat16), normal(batch, m, n, seed=1).to(DEVICE).float()
    scale = torch.full((batch,), 0.7, dtype=torch.float64, device=DEVICE)
    expected = eager.finalize(base, update, scale=scale, out_dtype=torch.bfloat16)
    for a, b in ((base, update), (base.mT.contiguous().mT, update.mT.contiguous().mT), (base, update.mT.clone().mT)):
        assert torch.equal(passes.finalize(a, b, scale=scale, out_dtype=torch.bfloat16), expected)
    for a, b in zip(passes.finalize(base, update, scale=scale, out_dtype=torch.bfloat16), expected, strict=True):
        assert torch.equal(a, b)
    alone = passes.finalize(base[0], update[0], scale=scale[0], out_dtype=torch.bfloat16)
    assert torch.equal(alone, expected[0])


def test_rounding_of_halves_overflow_and_nan() -> None:
    values = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, 7e4, torch.inf, torch.nan, 1e-45, 0.0])
    base, update = torch.zeros(1, len(values), device=DEVICE), values[None].to(DEVICE)
    for dtype in (torch.bfloat16, torch.float16):
        scale = torch.ones((), dtype=torch.float64, device=DEVICE)
        merged = passes.finalize(base, update, scale=scale, out_dtype=dtype)
        torch.testing.assert_close(merged, update.to(dtype), rtol=0, atol=0, equal_nan=True)


# ---- column_sums
@pytest.mark.parametrize(("B", "count", "columns"), [(1, 1, 1), (2, 64, 16), (3, 65, 17), (1, 200, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_column_sums_are_those_of_float64(B: int, count: int, columns: int, dtype: torch.dtype) -> None:
    partial = normal(B, count, columns).square().to(DEVICE, dtype)
    result = passes.column_sums(partial)
    torch.testing.assert_close(result, partial.double().sum(1), rtol=1e-14, atol=0)
    for mine, alone in zip(result, partial, strict=True):
        assert torch.equal(mine, passes.column_sums(alone[None])[0])


# ---- offsets
def test_offsets_beyond_31_bits() -> None:
    """Two tasks 2³¹ elements apart: 4 GiB of addresses, of which two pages are touched."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    tuned, base = memory.as_strided((2, 4, 5), (2**31, 5, 1)), torch.zeros(4, 5, device=DEVICE)
    tuned.copy_(normal(2, 4, 5))
    same_sums(passes.delta_sum(tuned, base), eager.delta_sum(tuned, base))
    scale = torch.ones(2, dtype=torch.float64, device=DEVICE)
    merged = passes.finalize(tuned, tuned, scale=scale, out_dtype=torch.float32)
    assert torch.equal(merged, 2 * tuned.float())


# ---- code generation
MODULE = "isomerge.backends.triton.passes:"
CONSTANTS = {"BLOCK": passes.PASS.columns}
DELTA_SUM = Source(
    MODULE + "_delta_sum_kernel",
    {
        "tuned": "*bf16",
        "base": "*bf16",
        "total": "*fp32",
        "squares": "*fp64",
        **dict.fromkeys(("tasks", "size", "pieces", "tuned_batch", "tuned_task", "base_batch"), "i32"),
    },
    CONSTANTS,
    passes.PASS.options,
    ("tuned", "base", "total", "squares", "size", "tuned_batch", "tuned_task", "base_batch"),
)
FINALIZE = Source(
    MODULE + "_finalize_kernel",
    {
        "base": "*bf16",
        "update": "*fp32",
        "scale": "*fp64",
        "out": "*bf16",
        **dict.fromkeys(("size", "pieces", "base_batch", "update_batch"), "i32"),
    },
    {"DOUBLE": False, **CONSTANTS},
    passes.FINALIZE.options,
    ("base", "update", "scale", "out", "size", "base_batch", "update_batch"),
)
COLUMN_SUMS = Source(
    MODULE + "_column_sums_kernel",
    {"partial": "*fp64", "out": "*fp64", "count": "i32", "columns": "i32"},
    {"ROWS": passes.COLUMN_SUMS.rows, "COLUMNS": passes.COLUMN_SUMS.columns},
    passes.COLUMN_SUMS.options,
    ("partial", "out", "columns"),
)


def ones(source: Source, *names: str) -> Source:
    """The same kernel as it is compiled where these arguments are 1."""
    return replace(source, constants={**source.constants, **dict.fromkeys(names, 1)}, aligned=source.aligned[:1])


def floats(source: Source, **types: str) -> Source:
    return replace(source, signature={**source.signature, **types})


SOURCES: Mapping[str, Source] = {
    "delta_sum": DELTA_SUM,
    "delta_sum fp32": floats(DELTA_SUM, tuned="*fp32", base="*fp32"),
    "delta_sum fp64": floats(DELTA_SUM, tuned="*fp64", base="*fp64", total="*fp64"),
    "delta_sum 8.0": replace(DELTA_SUM, capability=80),
    "delta_sum of one": ones(DELTA_SUM, "tasks", "size", "pieces", "tuned_batch", "tuned_task", "base_batch"),
    "delta_sum unaligned": replace(DELTA_SUM, aligned=("tuned", "base", "total")),
    "finalize": FINALIZE,
    "finalize 8.0": replace(FINALIZE, capability=80),
    "finalize fused": replace(FINALIZE, options=passes.PASS.options),
    "finalize fp64": replace(
        floats(FINALIZE, base="*fp64", update="*fp64"), constants={**FINALIZE.constants, "DOUBLE": True}
    ),
    "finalize of one": ones(FINALIZE, "size", "pieces", "base_batch", "update_batch"),
    "column_sums": COLUMN_SUMS,
    "column_sums fp32": floats(COLUMN_SUMS, partial="*fp32"),
    "column_sums of one": ones(COLUMN_SUMS, "count", "columns"),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Compiled]:
    return dict(zip(SOURCES, compile_all(list(SOURCES.values()), tmp_path_factory.mktemp("aot")), strict=True))


@pytest.mark.parametrize("name", SOURCES)
def test_no_kernel_spills(compiled: Mapping[str, Compiled], name: str) -> None:
    kernel = compiled[name]
    assert kernel.stack == kernel.local == 0
    assert kernel.shared <= SHARED_LIMIT[SOURCES[name].capability]


@pytest.mark.parametrize("name", ["delta_sum", "delta_sum fp32", "delta_sum 8.0", "finalize", "finalize 8.0"])
def test_registers_leave_half_of_the_threads_or_more(compiled: Mapping[str, Compiled], name: str) -> None:
    assert compiled[name].registers <= 65536 // 1024


@pytest.mark.parametrize("name", ["delta_sum", "delta_sum fp32", "delta_sum fp64", "delta_sum 8.0"])
def test_delta_sum_moves_16_bytes_at_a_time(compiled: Mapping[str, Compiled], name: str) -> None:
    kernel = compiled[name]
    wide = kernel.count(r"ld\.global(\.\w+)*\.v4\.b32|ld\.global(\.\w+)*\.v2\.b64")
    assert wide == kernel.count(r"ld\.global") > 0
    assert kernel.count(r"st\.global(\.\w+)*\.(v4\.b32|v2\.b64)") > 0
    assert compiled["delta_sum unaligned"].count(r"ld\.global(\.\w+)*\.v4\.b32") == 0  # what the sizes decide


def test_finalize_moves_16_bytes_at_a_time_and_rounds_the_product(compiled: Mapping[str, Compiled]) -> None:
    for name in ("finalize", "finalize 8.0"):
        kernel = compiled[name]
        assert kernel.count(r"ld\.global(\.\w+)*\.v4\.b32") == kernel.count(r"ld\.global") - 1  # and the scale
        assert kernel.count(r"st\.global(\.\w+)*\.v4\.b32") == kernel.count(r"st\.global") > 0
        assert kernel.count(r"fma\.rn\.f32") == 0
        assert kernel.count(r"mul(\.rn)?\.f32") > 0
    assert compiled["finalize fused"].count(r"fma\.rn\.f32") > 0  # what the option prevents
