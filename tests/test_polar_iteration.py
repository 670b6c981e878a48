"""The polar iteration on emulated tensor-core arithmetic: schedules, the ladder of formats, and every way out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rounding import RoundedPrimitives
from spectra import SHAPES, SPECTRA, matrix, orthonormal, relative
from torch import Tensor

from isomerge import ops
from isomerge.backends import polar_iteration, reference
from isomerge.backends.coefficients import NEWTON_SCHULZ, Step, quintic, schedule
from isomerge.backends.polar_iteration import Conditioning, conditioning, ladder, newton_schulz, polar, spectral_bound
from isomerge.backends.primitives import FORMATS, PLANE_PRODUCTS, TorchPrimitives, float32_products

RTOL = ops.RANK_RTOL
BOUND = {"fast": 2e-2, "default": 1e-4, "exact": 1e-6}
CPU = torch.device("cpu")
ALL = tuple(FORMATS)


pytestmark = pytest.mark.usefixtures("one_thread")


def with_values(values: Tensor, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A [r, n] in float32 with these singular values, and the polar factor of that very matrix in float64."""
    r = len(values)
    A = ((orthonormal(r, r, 2 * seed + 1) * values.double()) @ orthonormal(n, r, 2 * seed + 2).mT).float()
    U, _, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    return A, U @ Vh


def logarithmic(kappa: float, r: int = 256) -> tuple[Tensor, Tensor]:
    return with_values(torch.logspace(0, -torch.tensor(kappa).log10().item(), r, dtype=torch.float64), r)


def composed(steps: tuple[Step, ...], x: float) -> float:
    for step in steps:
        x = step(x)
    return x


def of_length(count: int, lower: float, safety: float) -> tuple[Step, ...]:
    """The schedule of `count` steps, whatever it reaches."""
    tolerances = (10.0 ** (-i / 2) for i in range(1, 30))
    return next(steps for tolerance in tolerances if len(steps := schedule(lower, tolerance, safety)) == count)


def iterate(A: Tensor, steps: tuple[Step, ...], formats: tuple[str, ...]) -> Tensor:
    return newton_schulz(A.to(FORMATS[formats[0]].dtype)[None], None, steps, formats, RoundedPrimitives())[0].double()


def defect(X: Tensor) -> float:
    """||X Xᵀ - I||_F / sqrt(r)."""
    X = X.double()
    return relative(X @ X.mT, torch.eye(X.shape[0]))


def svd32_error(A: Tensor, expected: Tensor) -> float:
    U, S, Vh = torch.linalg.svd(A.float(), full_matrices=False)
    return relative((U * (S > RTOL * S[:1])) @ Vh, expected)


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    ("kappa", "counts"),
    [
        (1e1, (2, 3, 3, 4, 4, 5)),
        (1e2, (4, 5, 5, 5, 6, 6)),
        (1e3, (6, 6, 6, 7, 7, 8)),
        (1e4, (7, 8, 8, 9, 9, 9)),
        (1e5, (9, 9, 10, 10, 10, 11)),
        (1e6, (10, 11, 11, 12, 12, 12)),
        (1e7, (12, 12, 13, 13, 14, 14)),
    ],
)
def test_steps_that_a_condition_number_takes(kappa: float, counts: tuple[int, ...]) -> None:
    assert (
        tuple(len(schedule(1 / kappa, tolerance, 0.0)) for tolerance in (1e-1, 1e-2, 1e-3, 1e-5, 1e-7, 1e-12)) == counts
    )


@pytest.mark.parametrize(
    ("kappa", "count", "first", "second", "last"),
    [
        (1e2, 6, (8.0248117697, -22.9705063870, 16.6342915245), (3.6203137108, -2.6558499450, 0.5120633543), None),
        (
            1e3,
            7,
            (8.3877261804, -24.3745357729, 17.7289268572),
            (4.1442150611, -3.0191782528, 0.5526401625),
            (1.8750064168, -1.2500071297, 0.3750007130),
        ),
        (1e4, 9, (8.4257563271, -24.5217777014, 17.8437608475), (4.2077885648, -3.0623858601, 0.5574712692), None),
        (
            1e5,
            10,
            (8.4295774750, -24.5365732128, 17.8553002489),
            (4.2142785057, -3.0667872780, 0.5579634318),
            (1.8750601251, -1.2500668040, 0.3750066805),
        ),
    ],
)
def test_coefficients_of_the_published_table(
    kappa: float, count: int, first: tuple[float, ...], second: tuple[float, ...], last: tuple[float, ...] | None
) -> None:
    """Ten digits; where the last interval is narrow the table's own solve left 3e-8, so it is not compared there."""
    steps = of_length(count, 1 / kappa / 1.03, 0.01)
    printed = [(steps[0], first), (steps[1], second)] + ([] if last is None else [(steps[-1], last)])
    for step, expected in printed:
        assert step[:3] == pytest.approx(expected, rel=0, abs=6e-11 if step is not steps[-1] else 5e-10)


def test_a_quintic_alternates_between_equal_errors() -> None:
    for lower in (1e-6, 1e-2, 0.3, 0.9, 0.99, 0.9999):
        step = Step(*quintic(lower, 2 - lower), lower)
        x = torch.linspace(lower, 2 - lower, 20001, dtype=torch.float64)
        error = 1 - x * (step.a + x.square() * (step.b + x.square() * step.c))
        least, most = error.min().item(), error.max().item()
        assert most == pytest.approx(-least, rel=1e-4, abs=2e-15)
        assert most == pytest.approx(1 - step(lower), rel=1e-4, abs=2e-15)
        limit = max(abs(1 - composed((Step(*NEWTON_SCHULZ, 0),), y)) for y in (lower, 2 - lower))
        assert most < limit


@pytest.mark.parametrize("kappa", [3.0, 1e3, 1e6])
@pytest.mark.parametrize("safety", [0.0, 0.01])
def test_a_schedule_takes_the_whole_interval_to_one(kappa: float, safety: float) -> None:
    steps = schedule(1 / kappa, 1e-6, safety)
    for x in torch.logspace(0, -torch.tensor(kappa).log10().item(), 500, dtype=torch.float64).tolist():
        assert abs(1 - composed(steps, max(x, 1 / kappa))) <= 1.0001e-6
    assert abs(1 - composed(schedule(1 / kappa, 1e-1, safety), 1 / kappa)) > 1e-6  # a shorter one does not


def test_safety_contains_what_rounding_lifts() -> None:
    """σ = 1.01, where every schedule expects 1 at most."""
    damped, plain = (schedule(1e-4, 1e-6, safety) for safety in (polar_iteration.SAFETY, 0.0))
    assert max(composed(damped[:j], 1.01) for j in range(9)) < 2
    assert composed(damped, 1.01) == pytest.approx(1, abs=1e-6)
    assert composed(plain, 1.01) > 1e6


@pytest.mark.parametrize(
    ("kappa", "count", "values"),
    [
        (1e2, 6, (0.976, 0.50, 0.054, 0.79, 0.98, 1.000)),
        (1e3, 7, (0.883, 0.36, 0.037, 0.62, 0.90, 0.997)),
        (1e4, 9, (0.957, 0.45, 0.048, 0.74, 0.965, 0.9999)),
        (1e5, 10, (0.839, 0.32, 0.033, 0.56, 0.855, 0.993)),
    ],
)
def test_what_is_below_the_bound_stays_small(kappa: float, count: int, values: tuple[float, ...]) -> None:
    """σ at a third, a tenth and a hundredth of the bound; then a tenth after one, two and three further steps."""
    steps = of_length(count, 1 / kappa, 0.0)
    limit = (Step(*NEWTON_SCHULZ, 0),)
    found = [composed(steps, 1 / kappa / share) for share in (3, 10, 100)]
    found += [composed(steps + more * limit, 1 / kappa / 10) for more in (1, 2, 3)]
    assert found == pytest.approx(values, rel=0.02)  # printed to two digits at least


@pytest.mark.parametrize(("lower", "tolerance"), [(0.0, 1e-3), (1.1, 1e-3), (float("nan"), 1e-3), (0.1, 0.0)])
def test_impossible_schedules_are_refused(lower: float, tolerance: float) -> None:
    with pytest.raises(ValueError, match="schedule: expected"):
        schedule(lower, tolerance, 0.01)


# ----------------------------------------------------------------------------------------------- primitives


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("r", [40, 300], ids=["whole", "panels"])
def test_primitives_are_as_accurate_as_their_format_says(format: str, r: int) -> None:
    generator = torch.Generator().manual_seed(0)
    dtype, unit, cost = FORMATS[format].dtype, FORMATS[format].unit, FORMATS[format].cost
    X = torch.randn(2, 3, 64, r, generator=generator, dtype=torch.float64).mT.to(dtype) / 8  # strided
    before = X.clone()
    primitives = RoundedPrimitives()
    G = primitives.gram(X, format=format)
    A = G / r
    P = primitives.polynomial(A, 0.5, -2.0, format=format)
    Y = primitives.apply(P, X, 1.5, format=format)
    a, p, x = A.double(), P.double(), X.double()
    for actual, product, rest in (
        (G, x @ x.mT, torch.zeros_like(a)),
        (P, -2 * a @ a, 0.5 * a),
        (Y, p @ x, 1.5 * x),
    ):
        assert actual.dtype == dtype
        error = relative(actual, product + rest) * (product + rest).norm()
        rounding = torch.finfo(dtype).eps * (product.norm() + rest.norm())
        assert error <= 1.25 * unit * product.norm() + rounding  # units have one digit
        if cost <= 3:  # and no better: the emulation does round
            assert error >= unit * product.norm() / 20
    for symmetric in (G, P):
        assert torch.equal(symmetric, symmetric.mT)
    assert torch.equal(X, before)


def test_torch_primitives_offer_what_a_device_computes() -> None:
    assert TorchPrimitives(CPU).formats == ("fp32", "fp64")
    planes = PLANE_PRODUCTS if hasattr(torch.ops.aten.bmm, "dtype") else ()  # torch 2.8
    assert set(TorchPrimitives(torch.device("cuda")).formats) == {*planes, "tf32", "fp32", "fp64"}
    X = matrix("decay", 300, 40)
    for dtype, format in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        G = TorchPrimitives(CPU).gram(X.to(dtype), format=format)
        assert torch.equal(G, G.mT)
        assert relative(G, X @ X.mT) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_planes_are_one_product_of_the_library(batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.bmm` returns float32 for bfloat16 on CUDA alone: here it is replaced by its definition."""
    calls = []

    def bmm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert left.dim() == right.dim() == 3
        assert left.dtype == right.dtype == torch.bfloat16
        calls.append(left.shape[-1])
        return left.to(out_dtype) @ right.to(out_dtype)

    monkeypatch.setattr(torch, "bmm", bmm)
    X = torch.randn(*batch, 6, 10, generator=torch.Generator().manual_seed(0))
    for format, pairs in PLANE_PRODUCTS.items():
        emulated = RoundedPrimitives().gram(X, format=format)
        assert torch.equal(TorchPrimitives(CPU).gram(X, format=format), emulated)
        assert calls.pop() == 10 * len(pairs)
    assert not calls


@pytest.fixture(params=["ieee", "tf32"])
def chosen(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the program has set CUDA's float32 products."""
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("torch before 2.9")
    before, settings.fp32_precision = settings.fp32_precision, request.param
    yield request.param
    settings.fp32_precision = before


@pytest.mark.parametrize("format", ["ieee", "tf32"])
def test_float32_products_follow_the_format_not_the_program(chosen: str, format: str) -> None:
    settings = torch.backends.cuda.matmul
    with float32_products(format, torch.device("cuda")):
        assert settings.fp32_precision == format
    assert settings.fp32_precision == chosen

    def fail() -> None:
        with float32_products(format, torch.device("cuda")):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert settings.fp32_precision == chosen
    with float32_products(format, CPU):
        assert settings.fp32_precision == chosen


@pytest.mark.parametrize("name", SPECTRA)
def test_spectral_bound_is_a_bound_and_tight(name: str) -> None:
    S = torch.stack([matrix(name, 96, 96), matrix("decay", 96, 96)])
    S = (S + S.mT) * torch.tensor([1.0, -1e-20])[:, None, None]  # indefinite, and of any size
    bound = spectral_bound(S, RoundedPrimitives())
    exact = torch.linalg.matrix_norm(S, ord=2)
    assert (bound >= exact).all()
    assert (bound <= 1.05 * 96 ** (1 / 16) * exact).all()


# ------------------------------------------------------------------------------------- the ladder of formats

LADDERS = [  # condition, formats, relative Frobenius error
    (1e2, "bf16x3 bf16x3" + 4 * " tf32", 5.3e-4),
    (1e3, "bf16x3 bf16x3 tf32" + 4 * " bf16", 5.7e-3),
    (1e3, "bf16x6 bf16x3 bf16x3" + 4 * " tf32", 7.0e-4),
    (1e4, "bf16x6 bf16x3 bf16x3 tf32 tf32" + 4 * " bf16", 5.0e-3),
    (1e4, "bf16x6 bf16x6 bf16x3 bf16x3 bf16x3" + 4 * " tf32", 5.8e-4),
    (1e4, 4 * "bf16x6 " + 5 * "bf16x3 ", 2.4e-5),
    (1e5, 6 * "bf16x6 " + 5 * "bf16x3 ", 1.3e-4),
    (1e5, 3 * "fp64 " + 3 * "bf16x6 " + 5 * "bf16x3 ", 1.3e-5),
    (1e6, 3 * "fp64 " + 3 * "bf16x6 " + 6 * "bf16x3 ", 4.9e-5),
    (1e5, 6 * "fp64 " + 5 * "bf16x6 ", 6.2e-7),
]


@pytest.mark.parametrize(("kappa", "formats", "published"), LADDERS)
def test_accuracy_of_a_ladder(kappa: float, formats: str, published: float) -> None:
    A, expected = logarithmic(kappa)
    sequence = tuple(formats.split())
    error = relative(iterate(A, of_length(len(sequence), 1 / kappa / 1.05, 0.005), sequence), expected)
    assert published / 2 <= error <= published * 2


@pytest.mark.parametrize(
    ("kappa", "tolerance", "formats"),
    [
        (1e2, 2e-3, LADDERS[0][1]),
        (1e3, 2e-2, LADDERS[1][1]),
        (1e3, 2e-3, LADDERS[2][1]),
        (1e4, 2e-2, LADDERS[3][1]),
        (1e4, 2e-3, LADDERS[4][1]),
    ],
)
def test_the_rule_chooses_the_cheapest_ladder(kappa: float, tolerance: float, formats: str) -> None:
    sequence = formats.split()
    steps = of_length(len(sequence), 1 / kappa / 1.05, 0.005)
    assert list(ladder(steps, RoundedPrimitives(), tolerance)) == [*sequence[:-1], "bf16x3"]


def test_accurate_first_not_accurate_last() -> None:
    A, expected = logarithmic(1e4)
    steps = of_length(9, 1e-4 / 1.05, 0.01)
    descending = iterate(A, steps, 4 * ("fp32",) + 5 * ("tf32",))
    early = iterate(A, steps, 7 * ("bf16",) + 2 * ("fp32",))
    assert 6e-4 < relative(descending, expected) < 2.4e-3  # published: 1.2e-3
    assert 5e-2 < relative(early, expected) < 2.2e-1  # 1.1e-1
    assert defect(early) < defect(descending) / 5  # orthogonality says the opposite


# ----------------------------------------------------------------------------------------------------- polar


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("formats", [ALL, ("fp32", "fp64")], ids=["tensor cores", "cpu"])
@pytest.mark.parametrize("precision", BOUND)
def test_polar_against_float64(shape: tuple[int, int], name: str, formats: tuple[str, ...], precision: str) -> None:
    A = matrix(name, *shape).float()
    before = A.clone()
    factor, nuclear_norm, rank = polar(A, RoundedPrimitives(*formats), rtol=RTOL, precision=precision)
    expected = reference.polar(A, rtol=RTOL, precision=precision)
    bound = BOUND[precision]
    allowed = max(2 * svd32_error(A, expected[0]), bound) if precision == "default" else bound
    assert relative(factor, expected[0]) <= allowed
    torch.testing.assert_close(nuclear_norm, expected[1], rtol=max(1e-5, bound**2), atol=0)  # turned vectors: squared
    assert torch.equal(rank, expected[2])
    assert torch.equal(A, before)


@pytest.mark.parametrize("precision", BOUND)
@pytest.mark.parametrize("aspect", [1, 4], ids=["square", "long"])
@pytest.mark.parametrize("kappa", [10.0, 1e3, 1e5])
def test_polar_of_larger_matrices_keeps_the_contract(kappa: float, aspect: int, precision: str) -> None:
    values = torch.logspace(0, -torch.tensor(kappa).log10().item(), 128, dtype=torch.float64)
    A, expected = with_values(values, 128 * aspect)
    primitives = RoundedPrimitives()
    factor, _, rank = polar(A.mT, primitives, rtol=RTOL, precision=precision)
    allowed = max(2 * svd32_error(A, expected), 1e-4) if precision == "default" else BOUND[precision]
    assert relative(factor.mT, expected) <= allowed
    assert rank == 128
    assert (set(primitives.products) == {"fp64", "bf16"}) == (precision == "exact")  # bf16: the bounds alone


def test_a_long_matrix_is_reduced_where_that_is_cheaper() -> None:
    steps = schedule(1e-4, 5e-6, 0.01)
    formats = ladder(steps, RoundedPrimitives(), 2e-4)
    assert not polar_iteration.reduces(formats, 1.0, 1e-4, 2e-4)
    assert polar_iteration.reduces(formats, 2.0, 1e-4, 2e-4)
    assert not polar_iteration.reduces(formats, 2.0, 1e-6, 2e-4)  # L^(-1) X would not be orthonormal


def test_float64_stays_float64() -> None:
    A = matrix("decay", 50, 90)
    factor, nuclear_norm, _ = polar(A, RoundedPrimitives(), rtol=RTOL, precision="fast")
    expected = reference.polar(A, rtol=RTOL, precision="exact")
    assert factor.dtype == torch.float64
    assert relative(factor, expected[0]) < 1e-11
    torch.testing.assert_close(nuclear_norm, expected[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("precision", BOUND)
def test_a_stack_of_mixed_conditioning(precision: str) -> None:
    names = ("decay", "cliff", "zero", "flat", "rank_one", "ill")
    A = torch.stack([matrix(name, 40, 64, seed=i) for i, name in enumerate(names)]).float().reshape(2, 3, 40, 64)
    strided = A.mT.contiguous().mT
    factor, nuclear_norm, rank = polar(strided, RoundedPrimitives(), rtol=RTOL, precision=precision)
    expected = reference.polar(A, rtol=RTOL, precision=precision)
    assert factor.shape == A.shape
    assert torch.equal(rank, expected[2])
    torch.testing.assert_close(nuclear_norm, expected[1], rtol=max(1e-5, BOUND[precision] ** 2), atol=0)
    for one, actual, exact in zip(A.flatten(0, 1), factor.flatten(0, 1), expected[0].flatten(0, 1), strict=True):
        assert relative(actual, exact) <= max(2 * svd32_error(one, exact), BOUND[precision])


def test_an_empty_stack() -> None:
    factor, nuclear_norm, rank = polar(torch.zeros(0, 3, 5, 4), RoundedPrimitives(), rtol=RTOL, precision="default")
    assert (factor.shape, nuclear_norm.shape, rank.shape) == ((0, 3, 5, 4), (0, 3), (0, 3))


# ------------------------------------------------------------------------------------------ the ways out of it


@pytest.fixture
def eigensolves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the matrices that took an eigensolve, as they come."""
    calls, solve = [], polar_iteration.by_eigenvectors

    def counted(X: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.extend(tuple(matrix.shape) for matrix in X)
        return solve(X, *arguments)

    monkeypatch.setattr(polar_iteration, "by_eigenvectors", counted)
    return calls


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("precision", BOUND)
def test_an_eigensolve_answers_for_deficient_matrices_alone(
    name: str, precision: str, eigensolves: list[tuple[int, ...]]
) -> None:
    polar(matrix(name, 40, 64).float(), RoundedPrimitives(), rtol=RTOL, precision=precision)
    assert eigensolves == ([(40, 64)] if name in ("rank_one", "zero", "cliff") else [])


def test_duplicate_rows_take_an_eigensolve(eigensolves: list[tuple[int, ...]]) -> None:
    A = matrix("decay", 40, 64).float()
    A[7] = A[21]
    factor, _, rank = polar(A, RoundedPrimitives(), rtol=RTOL, precision="default")
    assert eigensolves
    assert rank == 39
    assert relative(factor, reference.polar(A, rtol=RTOL, precision="")[0]) < 1e-6


@pytest.mark.parametrize("share", [0.5, 0.9, 1.1, 1.9, 2.5, 30.0])
@pytest.mark.parametrize("rtol", [RTOL, 1e-2])
@pytest.mark.parametrize("precision", BOUND)
def test_rank_next_to_the_null_threshold(
    share: float, rtol: float, precision: str, eigensolves: list[tuple[int, ...]]
) -> None:
    values = torch.cat([torch.ones(38), torch.full((2,), share * rtol)])
    A, _ = with_values(values, 40)
    _, _, rank = polar(A, RoundedPrimitives(), rtol=rtol, precision=precision)
    assert rank == (40 if share > 1 else 38)
    assert bool(eigensolves) == (share < 2)  # the margin, of which the bounds may take 1.17 here


@pytest.mark.parametrize("side", [64, 200])
def test_a_condition_beyond_float64_grams_is_not_iterated(side: int, eigensolves: list[tuple[int, ...]]) -> None:
    S = torch.cat([torch.ones(side - 2), torch.tensor([4 * RTOL, RTOL / 2])]).double()
    A = (orthonormal(side, side, 1) * S) @ orthonormal(side, side, 2).mT
    for rtol, rank in ((RTOL, side - 1), (1e-8, side)):
        result = polar(A, RoundedPrimitives(), rtol=rtol, precision="default")
        assert result[2] == rank
        assert relative(result[0], reference.polar(A, rtol=rtol, precision="")[0]) < 1e-8
    assert len(eigensolves) == 2


def test_a_failed_factorisation_bounds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves in L is arbitrary: here the identity."""
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda G: (torch.eye(40).expand_as(G).double(), torch.ones(1)))
    assert conditioning(matrix("cliff", 40, 40)[None], RoundedPrimitives()).lower == 0


def test_the_conditioning_is_a_bound() -> None:
    for name in ("flat", "decay", "ill", "repeated", "spiked"):
        X = torch.stack([matrix(name, 40, 64), 1e-3 * matrix(name, 40, 64, seed=1)]).float()
        condition = conditioning(X, RoundedPrimitives())
        S = torch.linalg.svdvals(X.double()) / condition.scale[:, None]
        assert (S[:, 0] <= 1).all()
        assert (S[:, 0] >= 0.8).all()
        assert (condition.lower <= S[:, -1]).all()
        assert (condition.lower >= 0.8 * S[:, -1]).all()


@pytest.mark.parametrize("factor", [10.0, 1e3])
@pytest.mark.parametrize("shape", [(40, 40), (40, 160)], ids=["square", "wide"])
def test_the_monitor_catches_a_schedule_that_is_too_short(
    factor: float, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch, eigensolves: list[tuple[int, ...]]
) -> None:
    A = matrix("ill", *shape).float()
    expected, norm, _ = reference.polar(A, rtol=RTOL, precision="")
    bound = max(2 * svd32_error(A, expected), 1e-4)
    iterated = polar_iteration.iterated

    def deceived(X: Tensor, condition: Conditioning, lower: float, *rest: object) -> object:
        return iterated(X, condition, min(1.0, lower * factor), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(polar_iteration, "iterated", deceived)
    guarded = polar(A, RoundedPrimitives(), rtol=RTOL, precision="default")
    assert bool(eigensolves) == (factor > 100)  # four steps make up for 10, not for 1000
    assert relative(guarded[0], expected) <= bound
    torch.testing.assert_close(guarded[1], norm, rtol=1e-5, atol=0)
    monkeypatch.setattr(polar_iteration, "orthonormal", lambda X, *_: [True] * len(X))
    blind = polar(A, RoundedPrimitives(), rtol=RTOL, precision="default")
    assert relative(blind[0], expected) > 10 * bound
