"""The passes in C++: every number as torch rounds it, every op bit for bit that of `eager`."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from isomerge import ops
from isomerge.backends import BACKENDS, BackendUnavailable, eager, extension, native, reference
from isomerge.backends.draws import draws

pytestmark = pytest.mark.skipif(native.availability() is not None, reason=str(native.availability()))

STORED = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = (1, 15, 16, 17, 1023, 1024, 1025, 5003)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def raw(values: Tensor) -> Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()])


def same(mine: Tensor, theirs: Tensor) -> bool:
    """To the bit, but for what kind of NaN it is."""
    numbers = ~theirs.isnan()
    return bool((mine.isnan() == ~numbers).all()) and torch.equal(raw(mine)[numbers], raw(theirs)[numbers])


def cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """By `finalize`, adding what changes nothing: -1 * 0 is -0, and -0 + -0 is -0."""
    return ops.finalize(values[None], torch.zeros(1, len(values)), -1.0, out_dtype=dtype, backend="native")[0]


# ---- numbers
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_is_widened_exactly(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same(cast(every, torch.float32), every.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_to_the_nearest_half_and_ties_to_even(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values.double()
    ties = ((every[1:] + every[:-1]) / 2).float()  # exact: a bit more than the halves have
    up, down = (torch.nextafter(ties, torch.tensor(end)) for end in (math.inf, -math.inf))
    largest = torch.finfo(dtype).max
    beyond = torch.tensor([largest, 65519.99, 65520.0, 65536.0, 3.4e38, math.inf, math.nan, 1e-45, 2e-8, 3e-8, 6e-8])
    random = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0))
    for values in (ties, up, down, beyond, -beyond, random.to(torch.int32).view(torch.float32)):
        assert same(cast(values, dtype), values.to(dtype))


def test_subnormals_are_kept_where_torch_flushes_them() -> None:
    tiny = torch.tensor([2.0**-24, 3 * 2.0**-24, 1e-5], dtype=torch.float16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush them")
    try:
        assert cast(tiny, torch.float32).tolist() == [2.0**-24, 3 * 2.0**-24, tiny[2].item()]
    finally:
        torch.set_flush_denormal(False)


# ---- subtract
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
@pytest.mark.parametrize(("stored", "expert"), list(itertools.product(STORED, STORED)))
@pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.3, -2.0, 0.0, 1.0, 1.7]])
def test_subtract_has_the_bits_of_eager(
    reduction: str, stored: torch.dtype, expert: torch.dtype, weights: list[float]
) -> None:
    for count in COUNTS:
        base = normal(count + 1)[1:].to(stored)  # not where an allocation begins
        tuned = [(base.float() + 0.01 * normal(count, seed=t + 1)).to(expert) for t in range(len(weights))]
        tuned[-1] = tuned[-1].to(stored)
        kept = [values.clone() for values in (base, *tuned)]
        results = []
        for backend in ("native", "eager"):
            out = torch.full((1 if reduction != "none" else len(weights), count), math.nan)
            base_out = torch.full((count,), math.nan)
            square = ops.subtract(
                base, tuned, weights, base_out=base_out, out=out, reduction=reduction, backend=backend
            )
            results.append((out, base_out, square))
        (mine, base_out, square), (theirs, _, _) = results
        assert same(mine, theirs)
        assert torch.equal(base_out, base.float())
        exact = sum(w * (t.double() - base.double()) for w, t in zip(weights, tuned, strict=True))
        # every delta, multiple and sum rounded in float32: T + 2 roundings of at most the sum of |deltas|
        bound = sum(abs(w) * (t.double() - base.double()).abs() for w, t in zip(weights, tuned, strict=True))
        slack = 2 * (len(weights) + 2) * torch.finfo(torch.float32).eps * (exact.abs() * bound).sum().item()
        assert abs(square - exact.square().sum().item()) <= slack + 1e-30
        assert all(torch.equal(now, before) for now, before in zip((base, *tuned), kept, strict=True))


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
def test_subtract_by_its_definition(backend: str) -> None:
    base, tuned = normal(4, 5, 6), [normal(4, 5, 6, seed=t).bfloat16() for t in (1, 2, 3)]
    weights, deltas = [1.0, -0.5, 2.0], torch.empty(3, 4, 5, 6)
    exact = torch.stack([w * (t.double() - base.double()) for w, t in zip(weights, tuned, strict=True)])
    square = ops.subtract(base, iter(tuned), weights, base_out=torch.empty_like(base), out=deltas, backend=backend)
    torch.testing.assert_close(deltas.double(), exact, rtol=3e-7, atol=3e-7)
    assert square == pytest.approx(exact.sum(0).square().sum().item(), rel=1e-5)
    for reduction, expected in (("sum", exact.sum(0)), ("mean", exact.mean(0))):
        out = torch.empty(1, 4, 5, 6)
        again = ops.subtract(
            base, tuned, weights, base_out=torch.empty_like(base), out=out, reduction=reduction, backend=backend
        )
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-6, atol=1e-6)
        assert again == pytest.approx(square, rel=1e-6)


def test_memory_with_gaps_and_float64_give_the_same() -> None:
    base, tuned = normal(20, 30), [normal(20, 30, seed=t) for t in (1, 2)]

    def deltas(out: Tensor, base_out: Tensor, base: Tensor = base, tuned: list[Tensor] = tuned) -> Tensor:
        ops.subtract(base, tuned, [1.0, 0.5], base_out=base_out, out=out, backend="native")
        assert torch.equal(base_out, base.to(base_out.dtype))
        return out

    plain = deltas(torch.empty(2, 20, 30), torch.empty(20, 30))
    apart = deltas(torch.empty(4, 20, 30)[::2], torch.empty(20, 30))
    turned = deltas(torch.empty(2, 30, 20).mT, torch.empty(30, 20).mT)
    strided = deltas(torch.empty(2, 20, 30), torch.empty(20, 30), base.mT.contiguous().mT, [t.mT.mT for t in tuned])
    for other in (apart, turned, strided):
        assert torch.equal(other, plain)
    double = deltas(torch.empty(2, 20, 30).double(), torch.empty(20, 30).double())
    assert torch.equal(double, torch.stack([tuned[0].double() - base, 0.5 * (tuned[1].double() - base)]))
    narrow = deltas(torch.empty(2, 20, 30), torch.empty(20, 30), base, [t.double() for t in tuned])
    assert torch.equal(narrow, plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1, 2])
@pytest.mark.parametrize("reduction", ops.REDUCTIONS)
def test_what_is_not_finite_shows_in_the_square(bad: float, where: int, reduction: str) -> None:
    for position in (0, 1030, 2000):
        models = [normal(2001, seed=t).bfloat16() for t in range(3)]
        models[where][position] = bad
        out = torch.empty(1 if reduction != "none" else 2, 2001)
        base, *tuned = models
        square = ops.subtract(
            base, tuned, [0.0, 1.0], base_out=torch.empty(2001), out=out, reduction=reduction, backend="native"
        )
        assert not math.isfinite(square)


def test_subtract_of_nothing_and_of_a_wrong_number() -> None:
    empty = torch.empty(0, 3)
    assert ops.subtract(empty, [empty], [1.0], base_out=torch.empty(0, 3), out=torch.empty(1, 0, 3)) == 0
    one, out = torch.ones(3), torch.empty(2, 3)
    for backend in ("native", "eager"):
        with pytest.raises(ValueError, match="expected 2 tensors, one for each weight, got 1"):
            ops.subtract(one, [one], [1.0, 1.0], base_out=torch.empty(3), out=out, backend=backend)
        with pytest.raises(ValueError, match="expected 2 tensors, one for each weight, got more"):
            ops.subtract(one, [one] * 3, [1.0, 1.0], base_out=torch.empty(3), out=out, backend=backend)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, "expected weights and a reduction"),
        ({"reduction": "median"}, "expected weights and a reduction"),
        ({"out": torch.empty(1, 3)}, r"out \(2, 3\) on one device, got \(3,\) on cpu and \(1, 3\) on cpu"),
        ({"base_out": torch.empty(4)}, r"got \(4,\)"),
        ({"base_out": torch.empty(3, device="meta")}, r"got \(3,\) on meta"),
        ({"out": torch.empty(2, 3).double()}, "must be float32 or float64, got torch.float32, torch.float64"),
        ({"base_out": torch.empty(3).half()}, "must be float32 or float64"),
        ({"tuned": [torch.ones(3), torch.ones(4)]}, r"expected floating tensors \(3,\) on cpu, got \(4,\)"),
        ({"tuned": [torch.ones(3), torch.ones(3).int()]}, "in torch.int32"),
        ({"tuned": [torch.ones(3), torch.ones(3, device="meta")]}, "on meta"),
    ],
)
@pytest.mark.parametrize("backend", ["native", "eager"])
def test_wrong_calls_of_subtract(backend: str, change: dict[str, object], message: str) -> None:
    given: dict[str, object] = {
        "tuned": [torch.ones(3)] * 2, "weights": [1.0, 1.0], "base_out": torch.empty(3), "out": torch.empty(2, 3)
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.subtract(torch.ones(3), backend=backend, **{**given, **change})  # type: ignore[arg-type]


# ---- finalize and frobenius
@pytest.mark.parametrize(("stored", "out_dtype"), list(itertools.product(STORED, STORED)))
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 1, 1025), (1, 2 * native.PIECE + 3)])
def test_finalize_has_the_bits_of_eager(stored: torch.dtype, out_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, update = normal(*shape).to(stored), normal(*shape, seed=1)
    scale = torch.linspace(-1.52, 0.123456789, base.shape[:-2].numel(), dtype=torch.float64).view(base.shape[:-2])
    for given in (update, update.bfloat16(), update.mT.contiguous().mT):
        mine, theirs = (
            ops.finalize(base, given, scale, out_dtype=out_dtype, backend=backend) for backend in ("native", "eager")
        )
        assert torch.equal(raw(mine), raw(theirs))


def test_finalize_in_float64_is_eagers() -> None:
    base, update = normal(5, 6).double(), normal(5, 6, seed=1)
    for b, u, out in ((base, update, torch.float32), (update, base, torch.float32), (update, update, torch.float64)):
        mine, theirs = (ops.finalize(b, u, 0.3, out_dtype=out, backend=name) for name in ("native", "eager"))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
def test_norms_neither_overflow_nor_underflow(backend: str) -> None:
    for count in (*COUNTS, 3 * native.PIECE + 5):
        for scale in (1.0, 1e30, 1e-30):
            values = normal(count) * scale
            exact = torch.linalg.vector_norm(values.double()).item()
            rel = 1e-4 if backend == "eager" and scale == 1 else 1e-12  # torch adds 1e5 squares in float32
            assert ops.frobenius(values, backend=backend) == pytest.approx(exact, rel=rel)
    assert ops.frobenius(torch.zeros(3, 4), backend=backend) == ops.frobenius(torch.empty(0, 4), backend=backend) == 0
    assert math.isnan(ops.frobenius(torch.tensor([1.0, math.nan]), backend=backend))
    assert ops.frobenius(torch.tensor([1.0, -math.inf]), backend=backend) == math.inf
    halves = torch.full((30, 20), 0.1).bfloat16()  # in bfloat16 the norm would be off by 1e-3
    assert ops.frobenius(halves.mT, backend=backend) == pytest.approx(halves[0, 0].item() * 600**0.5, rel=1e-6)
    with pytest.raises(ValueError, match="frobenius: expected float16"):
        ops.frobenius(torch.ones(3).int(), backend=backend)


# ---- thresholds and votes
def samples(count: int) -> dict[str, Tensor]:
    half = normal(count).bfloat16()
    return {
        "normal": normal(count),
        "log-normal": normal(count).mul(5).exp() * normal(count, seed=1).sign(),
        "whole numbers": torch.randint(-4, 5, (count,), generator=torch.Generator().manual_seed(1)).float(),
        "differences of halves": (half.float() * 1.001).bfloat16().float() - half.float(),
        "zeros": torch.zeros(count).copysign(normal(count)),
        "hostile": torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, 1.0, 1.0, -1.0]),
    }


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
@pytest.mark.parametrize("count", [1, 2, 33, 1000, 2**16 + 41])
def test_the_kth_largest_is_exact(backend: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "FEW", 0)
    for name, values in samples(count).items():
        magnitudes = values.abs().sort(descending=True).values
        for k in {1, 2, len(values) // 5, len(values) // 2, len(values) - 1, len(values)} & {
            *range(1, len(values) + 1)
        }:
            assert ops.kth_largest(values, k, backend=backend) == magnitudes[k - 1], (name, k)


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("count", [0, 1, 33, 1000])
def test_counted_digits_are_those_by_definition(backend: str, count: int) -> None:
    for name, values in samples(count + 1).items():
        for given in (values[:count], values[:count].double(), values[:count].bfloat16()):
            higher: tuple[int, ...] = ()
            for _ in range(given.element_size() // 2):
                mine, exact = (ops.count_digits(given, higher, backend=b) for b in (backend, "reference"))
                assert mine.dtype == torch.int64
                assert torch.equal(mine, exact), (name, higher)
                higher = (*higher, int(exact.argmax()))


def test_the_kth_largest_of_pieces() -> None:
    values = torch.cat(list(samples(2**16 + 41).values()))
    magnitudes = values.abs().sort(descending=True).values
    for k in (1, 77, len(values) // 3, len(values)):
        selection = ops.Selection(k, values.dtype)
        while not selection.found:
            counts = [ops.count_digits(piece, selection.higher) for piece in values.split(50_001)]
            selection.narrow(torch.stack(counts).sum(0))
        assert selection.value() == magnitudes[k - 1]


def test_wrong_calls_of_thresholds_and_votes() -> None:
    for values, k in ((torch.ones(3), 0), (torch.ones(3), 4), (torch.ones(2, 2), 1), (torch.ones(3).int(), 1)):
        with pytest.raises(ValueError, match="kth_largest: expected floating values"):
            ops.kth_largest(values, k)
    for values, higher in ((torch.ones(2, 2), ()), (torch.ones(3).int(), ()), (torch.ones(3), (1, 2))):
        with pytest.raises(ValueError, match="count_digits: expected floating values"):
            ops.count_digits(values, higher)
    for deltas, limits in (
        (torch.ones(3), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(0, 3), torch.ones(0)),
    ):
        with pytest.raises(ValueError, match="elect: expected floating deltas"):
            ops.elect(deltas, limits, 1)
        with pytest.raises(ValueError, match="votes: expected floating deltas"):
            ops.votes(deltas, limits)
    with pytest.raises(ValueError, match="expected a majority of -1, 0 or 1, got 2"):
        ops.elect(torch.ones(2, 3), torch.ones(2), 2)


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("count", [1, 33, 1000, 2**16 + 41])
def test_elections_have_the_bits_of_eager(T: int, count: int) -> None:
    kinds = [samples(count + t) for t in range(T)]
    for name in kinds[0]:
        if name == "hostile":
            continue  # Inf - Inf
        deltas = torch.stack([kind[name][:count].roll(t) for t, kind in enumerate(kinds)])
        for limits in (torch.zeros(T), deltas.abs().amax(1), deltas.abs().median(dim=1).values):
            mine, theirs = (ops.votes(deltas, limits, backend=backend) for backend in ("native", "eager"))
            assert mine == theirs, name
            for majority in (-1, 0, 1):
                mine, theirs = (ops.elect(deltas, limits, majority, backend=backend) for backend in ("native", "eager"))
                assert torch.equal(raw(mine), raw(theirs)), name
            if name == "whole numbers":  # else a sum may cancel in one arithmetic and not in the other
                exact = ops.elect(deltas, limits, 1, backend="reference").double()
                torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=0)
                assert ops.votes(deltas, limits) == ops.votes(deltas, limits, backend="reference")


@pytest.mark.parametrize("backend", ["native", "eager", "reference"])
def test_the_majority_decides_where_a_sum_is_zero(backend: str) -> None:
    deltas = torch.tensor([[2.0, 3.0, -1.0, 0.0, 0.5], [-2.0, 1.0, -3.0, 0.0, -4.0]])
    limits = torch.tensor([1.0, 1.0])
    assert ops.votes(deltas, limits, backend=backend) == -1  # 0 + 1 - 1 + 0 - 1
    for majority, first in ((-1, -2.0), (0, 0.0), (1, 2.0)):
        merged = ops.elect(deltas, limits, majority, backend=backend)
        assert merged.tolist() == [first, 2.0, -2.0, 0.0, -4.0]


def test_elect_of_gaps_halves_and_nothing() -> None:
    deltas, limits = normal(6, 100), torch.full((3,), 0.5)
    plain = ops.elect(deltas[::2].contiguous(), limits, 1)
    assert torch.equal(ops.elect(deltas[::2], limits, 1, backend="native"), plain)
    turned = deltas[::2].mT.contiguous().mT
    assert torch.equal(ops.elect(turned, limits, 1, backend="native"), plain)
    assert ops.votes(turned, limits, backend="native") == ops.votes(deltas[::2], limits)
    assert ops.elect(deltas.bfloat16(), torch.zeros(6), 1).dtype == torch.float32
    assert ops.elect(deltas.double(), torch.zeros(6), 1).dtype == torch.float64
    assert ops.elect(torch.empty(3, 0), torch.zeros(3), 1, backend="native").shape == (0,)
    assert ops.votes(torch.empty(3, 0), torch.zeros(3), backend="native") == 0


# ---- random dropping
def test_draws_are_those_of_the_published_generator() -> None:
    numbers = (  # the first of SplitMix64 from 1234567, by its authors' program
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    assert draws(1234567, 0, 5, torch.device("cpu")).tolist() == [number >> 32 for number in numbers]
    assert draws(1234567, 2, 3, torch.device("cpu")).tolist() == [number >> 32 for number in numbers[2:]]
    for backend in ("native", "eager", "reference"):
        for number in numbers:
            for beside in (-1, 0, 1):  # the density at which the number is still, or just not, below
                density = ((number >> 32) + beside) / 2**32
                kept = ops.drop(torch.ones(1), density, seed=1234567, first=numbers.index(number), backend=backend)
                assert bool(kept.any()) is (beside == 1)


@pytest.mark.parametrize("density", [2**-32, 1e-6, 0.2, 0.5, 1 - 2**-20, 1.0])
@pytest.mark.parametrize("seed", [0, 7, 2**63 - 1, 2**63, 2**64 - 1, 2**64 + 7, -1])
def test_dropping_has_the_bits_of_eager(density: float, seed: int) -> None:
    for count in COUNTS:
        values = normal(count + 1)[1:]
        for first in (0, 1000, 2**40):
            mine, theirs = (
                ops.drop(values, density, seed=seed, first=first, backend=name) for name in ("native", "eager")
            )
            assert torch.equal(raw(mine), raw(theirs))
    values = normal(500)
    exact = ops.drop(values.double(), density, seed=seed, backend="reference")
    torch.testing.assert_close(ops.drop(values, density, seed=seed).double(), exact, rtol=1e-6, atol=0)
    assert ops.drop(values, 1.0, seed=seed).equal(values)


def test_what_is_dropped_does_not_depend_on_parts_dtypes_or_gaps() -> None:
    values = normal(70_001)
    whole = ops.drop(values, 0.3, seed=5)
    parts = [ops.drop(part, 0.3, seed=5, first=i * 999) for i, part in enumerate(values.split(999))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(ops.drop(values[::3], 0.3, seed=5), ops.drop(values[::3].contiguous(), 0.3, seed=5))
    for other in (values.double(), values.bfloat16()):
        kept = ops.drop(other, 0.3, seed=5)
        assert torch.equal(kept != 0, whole != 0)
        assert kept.dtype == torch.promote_types(other.dtype, torch.float32)


def test_the_kept_are_as_many_as_they_should_and_of_no_order() -> None:
    count = 2**20
    for density in (0.01, 0.2, 0.9):
        spread = (density * (1 - density) / count) ** 0.5
        masks = [ops.drop(torch.ones(count), density, seed=seed).ne(0).double() for seed in (0, 1, 2**40)]
        for mask in masks:
            assert abs(mask.mean().item() - density) <= 5 * spread
            for lag in (1, 2, 64, 4096):  # covariance of neighbours, in standard errors of independent draws
                pair = (mask[:-lag] - density) * (mask[lag:] - density)
                assert abs(pair.mean().item()) <= 5 * density * (1 - density) / count**0.5
        pair = (masks[0] - density) * (masks[1] - density)
        assert abs(pair.mean().item()) <= 5 * density * (1 - density) / count**0.5


@pytest.mark.parametrize(
    ("values", "density", "first"),
    [
        (torch.ones(3), 0.0, 0),
        (torch.ones(3), 1.5, 0),
        (torch.ones(3), math.nan, 0),
        (torch.ones(3), 0.5, -1),
        (torch.ones(1, 3), 0.5, 0),
        (torch.ones(3).int(), 0.5, 0),
    ],
)
def test_wrong_calls_of_drop(values: Tensor, density: float, first: int) -> None:
    with pytest.raises(ValueError, match=r"drop: expected floating values \[n\], a density"):
        ops.drop(values, density, seed=0, first=first)


# ---- the door
def test_without_the_extension_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    def broken(name: str) -> object:
        raise ImportError("undefined symbol: pow")

    monkeypatch.setattr(extension, "import_module", missing)
    assert "isomerge._cpu is not built; install isomerge with ISOMERGE_CPU=1" in (native.availability() or "")
    monkeypatch.setattr(extension, "import_module", broken)
    assert native.availability() == "the extension isomerge._cpu does not load: undefined symbol: pow"
    with pytest.raises(BackendUnavailable, match="does not load"):
        ops.frobenius(torch.ones(3), backend="native")


def test_every_op_of_the_row_is_there() -> None:
    for op in BACKENDS["native"].ops:
        assert callable(getattr(native, op))
        assert callable(getattr(eager, op))
        assert callable(getattr(reference, op))
