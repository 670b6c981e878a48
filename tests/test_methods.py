"""Merge methods: published golden values, their laws, and agreement with the plain SVD definitions in float64."""

from __future__ import annotations

from collections.abc import Callable

import papers
import pytest
import torch
from spectra import ON_CPU, matrix, orthonormal, projector, relative
from torch import Tensor

from isomerge import InputError, methods
from isomerge.methods import METHODS, check_parameters
from isomerge.methods.iso import subspace_sizes

DATA_FREE = {name: row for name, row in METHODS.items() if not row.moments}  # the others are in test_esm.py
SPECTRAL = ("iso_c", "iso_cts", "tsvm")
SHAPES = {"square": (40, 40), "tall": (72, 24), "wide": (24, 72)}
BACKENDS = ("eager", "reference")


def random_deltas(T: int, m: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(T, m, n, generator=generator, dtype=torch.float64).to(dtype)


def golden_deltas() -> Tensor:
    i, j = torch.arange(12, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    return torch.stack([(t + 1) * torch.sin(0.7 * (i + 1) * (j + 2) * (t + 1) + 0.3 * (i + 1) ** 2) for t in range(2)])


# ---- golden values of the released code in float64: Frobenius norm, largest and least singular value, four entries
GOLDEN = {
    "task_arithmetic": (
        methods.task_arithmetic, {},
        (15.8215465016, 8.6802421152, 0.2521336337, 1.0748261353, -1.2795970548, 1.5156355309, -1.2879680424),
    ),
    "iso_c": (
        methods.iso_c, {},
        (13.9875299763, 4.9453386492, 4.9453386492, 0.9937712396, -1.3949443891, 0.4402521385, -0.6825583968),
    ),
    "iso_cts 0.8": (
        methods.iso_cts, {"common_space_fraction": 0.8},
        (15.0124569816, 5.3077050670, 5.3077050670, 2.4119538378, -0.6627993441, -0.1535931210, -0.6952053189),
    ),
    "iso_cts 0.5": (
        methods.iso_cts, {"common_space_fraction": 0.5},
        (15.1082446797, 5.3415711324, 5.3415711324, 2.2032614062, 0.5288622029, 0.4001953569, -0.7871862159),
    ),
    "tsvm": (
        methods.tsvm, {},
        (13.4899855168, 6.5040255628, 2.6219918442, 2.3301087021, 0.2778070165, 0.7075673530, -1.4887368885),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize("backend", ON_CPU)
def test_golden_values(name: str, backend: str) -> None:
    function, parameters, expected = GOLDEN[name]
    how = {} if name == "task_arithmetic" else {"backend": backend}
    update = function(golden_deltas(), **parameters, **how)
    S = torch.linalg.svdvals(update)
    actual = torch.stack([update.norm(), S[0], S[-1], update[0, 0], update[0, 1], update[5, 3], update[11, 7]])
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-10)


# ---- agreement with the definition: one float64 SVD per matrix and task
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("T", [1, 2, 7, 8, 20])
@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_agrees_with_the_plain_svd_definition(shape: tuple[int, int], T: int, name: str, dtype: torch.dtype) -> None:
    deltas = random_deltas(T, *shape, dtype=dtype).float()
    expected = papers.METHODS[name](deltas.double())
    allowed = max(2 * relative(papers.METHODS[name](deltas), expected), 1e-4)
    assert relative(METHODS[name].function(deltas), expected) <= allowed
    assert relative(METHODS[name].function(deltas.double(), backend="reference"), expected) <= 1e-7


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("T", [1, 3, 8])
def test_iso_cts_agrees_at_every_common_fraction(shape: tuple[int, int], fraction: float, T: int) -> None:
    deltas = random_deltas(T, *shape)
    expected = papers.iso_cts(deltas.double(), fraction)
    allowed = max(2 * relative(papers.iso_cts(deltas, fraction), expected), 1e-4)
    assert relative(methods.iso_cts(deltas, common_space_fraction=fraction), expected) <= allowed


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", [(300, 300), (500, 160), (160, 500)], ids=["square", "tall", "wide"])
def test_agrees_on_larger_deltas_with_decaying_spectra(name: str, shape: tuple[int, int]) -> None:
    deltas = torch.stack([matrix("decay", *shape, seed=t) for t in range(4)]).float()
    deltas += 1e-3 * random_deltas(4, *shape, seed=9)
    expected = papers.METHODS[name](deltas.double())
    allowed = max(2 * relative(papers.METHODS[name](deltas), expected), 1e-4)
    assert relative(METHODS[name].function(deltas), expected) <= allowed


# ---- laws
def every_method() -> list[tuple[str, Callable[..., Tensor], dict[str, object]]]:
    return [(name, row.function, {"seed": 3} if row.seeded else {}) for name, row in DATA_FREE.items()]


@pytest.mark.parametrize(("name", "function", "how"), every_method(), ids=DATA_FREE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [*SHAPES.values(), (33, 65), (65, 33)], ids=[*SHAPES, "odd wide", "odd tall"])
def test_stacks_equal_one_by_one_and_inputs_are_left_alone(
    name: str, function: Callable[..., Tensor], how: dict[str, object], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    stack = torch.stack([random_deltas(3, *shape, seed=i, dtype=dtype) for i in range(2)])
    before = stack.clone()
    updates = function(stack, **how)
    assert updates.shape == (2, *shape)
    assert torch.equal(stack, before)
    if not METHODS[name].seeded:  # a seed stands for one matrix: in a stack the draws go on
        for i in range(2):
            assert torch.equal(function(stack[i], **how), updates[i])


@pytest.mark.parametrize("name", [name for name, row in DATA_FREE.items() if not row.seeded])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_order_of_the_experts_does_not_matter_and_scale_comes_through(name: str, shape: tuple[int, int]) -> None:
    deltas = random_deltas(5, *shape)
    function = METHODS[name].function
    update = function(deltas)
    assert relative(function(deltas[[3, 0, 4, 2, 1]]), update) < 1e-4
    assert relative(function(deltas * 2.0**-20), update * 2.0**-20) < 1e-4


@pytest.mark.parametrize("name", DATA_FREE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("T", [1, 3])
def test_zero_deltas_give_a_zero_update(name: str, shape: tuple[int, int], T: int) -> None:
    assert torch.equal(METHODS[name].function(torch.zeros(T, *shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_iso_c_preserves_the_nuclear_norm_in_a_flat_spectrum(shape: tuple[int, int]) -> None:
    deltas = random_deltas(4, *shape)
    summed, update = deltas.sum(0).double(), methods.iso_c(deltas).double()
    nuclear = torch.linalg.matrix_norm(summed, "nuc")
    r = min(shape)
    torch.testing.assert_close(torch.linalg.svdvals(update), (nuclear / r).expand(r), rtol=1e-4, atol=0)
    torch.testing.assert_close((update * summed).sum(), nuclear**2 / r, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_iso_cts_has_a_flat_spectrum_and_is_iso_c_at_fraction_one(shape: tuple[int, int]) -> None:
    deltas = random_deltas(4, *shape)
    S = torch.linalg.svdvals(methods.iso_cts(deltas).double())
    assert (S[0] / S[-1]).item() < 1 + 1e-3
    assert torch.equal(methods.iso_cts(deltas, common_space_fraction=1.0), methods.iso_c(deltas))


def test_one_expert() -> None:
    delta = random_deltas(1, 30, 20)
    assert relative(methods.tsvm(delta), delta[0]) < 1e-5
    assert torch.equal(methods.average(delta), delta[0])
    assert torch.equal(methods.task_arithmetic(delta), delta[0])
    assert torch.equal(methods.ties(delta, density=1.0), delta[0])
    S = torch.linalg.svdvals(methods.iso_c(delta))
    torch.testing.assert_close(S, torch.linalg.svdvals(delta[0]).mean().expand(20), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rank_deficient_sums_stay_in_their_subspace(name: str, shape: tuple[int, int]) -> None:
    m, n = shape
    left, right = orthonormal(m, 6, 1), orthonormal(n, 6, 2)
    cores = random_deltas(2, 6, 6, dtype=torch.float64)
    deltas = (left @ cores @ right.mT).float()
    update = METHODS[name].function(deltas).double()
    inside = projector(left) @ update @ projector(right)
    assert relative(update, inside) < 1e-4
    assert relative(update, METHODS[name].function(deltas, backend="reference")) < 1e-4
    if name == "iso_c":  # the mean runs over the rank, not over min(m, n)
        U, S, Vh = torch.linalg.svd(deltas.sum(0).double(), full_matrices=False)
        assert relative(update, S[:6].mean() * U[:, :6] @ Vh[:6]) < 1e-4


@pytest.mark.parametrize("name", SPECTRAL)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_duplicates_zero_experts_and_low_rank_experts_are_legal(name: str, shape: tuple[int, int]) -> None:
    deltas = random_deltas(2, *shape)
    low_rank = torch.stack([matrix("rank_one", *shape, seed=t) for t in range(3)]).float()
    for stack in (
        deltas[[0, 0, 0]],
        torch.cat([deltas, torch.zeros(1, *shape)]),
        torch.cat([deltas[:1], -deltas[:1]]),
        torch.cat([deltas, low_rank]),
        low_rank,
    ):
        update = METHODS[name].function(stack)
        assert update.isfinite().all()
        difference = update - METHODS[name].function(stack, backend="reference")
        assert difference.norm() < 2e-4 * stack.norm()


def test_tsvm_of_duplicates_is_the_truncated_expert() -> None:
    delta = random_deltas(1, 40, 24, dtype=torch.float64)[0]
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    # polar([U, U]) = [U, U] / sqrt(2): twice S over two factors of 1 / sqrt(2) is S
    assert relative(methods.tsvm(torch.stack([delta, delta])), (U[:, :12] * S[:12]) @ Vh[:12]) < 1e-6


def test_more_experts_than_directions() -> None:
    deltas = random_deltas(9, 4, 30)
    assert torch.equal(methods.tsvm(deltas), torch.zeros(4, 30))
    assert torch.equal(methods.iso_cts(deltas), methods.iso_c(deltas))


@pytest.mark.parametrize(
    ("r", "T", "fraction", "expected"),
    [
        (768, 8, 0.8, (616, 19)), (768, 14, 0.8, (614, 11)), (768, 20, 0.8, (608, 8)),
        (1024, 8, 0.8, (816, 26)), (512, 20, 0.8, (412, 5)), (50, 20, 0.8, (50, 0)), (50, 8, 0.8, (42, 1)),
        (257, 14, 0.8, (201, 4)), (11, 4, 0.0, (3, 2)), (8, 8, 1.0, (8, 0)), (5, 1, 0.0, (0, 5)),
    ],
)  # fmt: skip
def test_subspace_sizes_as_published(r: int, T: int, fraction: float, expected: tuple[int, int]) -> None:
    assert subspace_sizes(r, T, fraction) == expected


# ---- worked examples
EXAMPLE = torch.tensor([[[4.0, -3.0, 0.5], [1.0, 0.0, -2.0]], [[-1.0, -5.0, 2.0], [3.0, 0.1, -2.0]]])


def test_linear_methods_by_hand() -> None:
    assert torch.equal(methods.task_arithmetic(EXAMPLE), torch.tensor([[3.0, -8.0, 2.5], [4.0, 0.1, -4.0]]))
    assert torch.equal(methods.average(EXAMPLE), torch.tensor([[1.5, -4.0, 1.25], [2.0, 0.05, -2.0]]))


def test_ties_by_hand() -> None:
    # density 1/2 keeps {4, -3, -2} and {-5, 3, 2, -2 (tied with 2)}; elected signs + - + / + 0 -
    expected = torch.tensor([[4.0, -4.0, 2.0], [3.0, 0.0, -2.0]])
    assert torch.equal(methods.ties(EXAMPLE, density=0.5), expected)
    # all kept: 4 - 1 > 0 keeps 4; the other entries agree
    expected = torch.tensor([[4.0, -4.0, 1.25], [2.0, 0.1, -2.0]])
    assert torch.equal(methods.ties(EXAMPLE, density=1.0), expected)
    assert torch.equal(methods.ties(EXAMPLE, density=0.0), torch.zeros(2, 3))


def test_ties_gives_cancelled_entries_the_majority_sign() -> None:
    deltas = torch.tensor([[[1.0, 2.0, 3.0]], [[-1.0, 2.0, 1.0]]])  # the first entry cancels, the others are positive
    assert torch.equal(methods.ties(deltas, density=1.0), torch.tensor([[1.0, 2.0, 2.0]]))


def test_dare_is_unbiased_seeded_and_keeps_the_density() -> None:
    deltas = torch.ones(2, 100, 200)
    for function in (methods.dare_linear, methods.dare_ties):
        assert torch.equal(function(deltas, seed=1), function(deltas, seed=1))
        assert not torch.equal(function(deltas, seed=1), function(deltas, seed=2))
        assert torch.equal(function(deltas, density=1.0), function(deltas, density=1.0, seed=5))
    update = methods.dare_linear(deltas, density=0.25)
    assert set(update.unique().tolist()) == {0.0, 4.0, 8.0}
    assert update.mean().item() == pytest.approx(2.0, abs=0.05)  # 20 000 entries: standard error 0.017
    assert set(methods.dare_ties(deltas, density=0.25).unique().tolist()) == {0.0, 4.0}
    one, other = (methods.dare_linear(deltas[t : t + 1], density=0.25, seed=0) for t in (0, 1))
    assert torch.equal(one, other)  # each is the first task
    assert not torch.equal(update, 2 * methods.dare_linear(deltas[:1], density=0.25))  # tasks are dropped apart


# ---- the table
def test_parameters_get_defaults_and_checks() -> None:
    assert check_parameters("iso_cts", {}) == {"common_space_fraction": 0.8}
    assert check_parameters("iso_cts", {"common_space_fraction": 1}) == {"common_space_fraction": 1.0}
    assert check_parameters("iso_c", {}) == {}


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("isoc", {}, r"unknown method 'isoc' \(did you mean iso_c\?\); known: average, "),
        ("iso_cts", {"common_space_fracton": 0.8}, r"of iso_cts \(did you mean common_space_fraction\?\)"),
        ("iso_c", {"density": 0.8}, "unknown parameter of iso_c; expected one of: alpha"),
        ("iso_cts", {"common_space_fraction": 1.2}, "expected a value from 0 to 1, got 1.2"),
        ("iso_cts", {"common_space_fraction": float("nan")}, "expected a value from 0 to 1, got nan"),
        ("ties", {"density": "high"}, "parameters.density: expected a float, got 'high'"),
        ("ties", {"density": True}, "parameters.density: expected a float, got True"),
        ("dare_ties", {"density": 0}, "expected a value from 1e-06 to 1, got 0.0"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_one_line(method: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_parameters(method, parameters)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", METHODS)
def test_costs_are_positive_and_grow(name: str) -> None:
    row = METHODS[name]
    assert 0 < row.flops(64, 32, 2) < row.flops(128, 64, 2) < row.flops(128, 64, 8) or row.name == "iso_c"
    assert 0 < row.peak_floats(64, 32, 2) < row.peak_floats(128, 64, 2)


@pytest.mark.parametrize("name", ["average", "task_arithmetic"])
def test_the_update_of_one_task_is_no_view_of_its_delta(name: str) -> None:
    deltas = torch.randn(2, 1, 3, 4)
    update = methods.METHODS[name].function(deltas)
    assert torch.equal(update, deltas[:, 0])
    assert update.data_ptr() != deltas.data_ptr()
