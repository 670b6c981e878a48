"""ESM: the published golden value, its laws, and agreement with the plain SVD form in float64."""

from __future__ import annotations

import math

import papers
import pytest
import torch
from deltas import activations, synthetic
from spectra import ON_CPU, projector, relative
from test_methods import golden_deltas
from torch import Tensor

from isomerge import InputError, methods, ops
from isomerge.methods import METHODS, check_parameters, esm, layer_factors

SHAPES = {"square": (40, 40), "tall": (72, 24), "wide": (24, 72)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
OFF = {"eigenvalue_power": 0.0, "task_exponent": 0.0, "dimension_exponent": 0.0}


def golden_inputs() -> Tensor:
    k, j = torch.arange(30, dtype=torch.float64)[:, None], torch.arange(8, dtype=torch.float64)
    return torch.stack([torch.cos(0.333 * (k + 1) * (j + 1) * (t + 2) + 0.11 * (k + 1) ** 2) for t in range(2)])


def sample(T: int, m: int, n: int, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Deltas [T, m, n] and inputs [T, tokens, n] in float64."""
    return synthetic(T, m, n, seed=seed).double(), activations(T, tokens, n, seed=seed).double()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("space", ["input", "output"])
def test_golden_value_of_the_released_code_in_float64(backend: str, space: str) -> None:
    deltas, inputs = golden_deltas(), golden_inputs()
    moments = ops.shift_cov(inputs, deltas if space == "output" else None)
    update = 2 * esm(deltas, moments, precision="exact", backend=backend)  # its update is twice ours
    S = torch.linalg.svdvals(update)
    actual = torch.stack([update.norm(), S[0], S[-1], update[0, 0], update[0, 1], update[5, 3], update[11, 7]])
    expected = (35.6738904649, 12.6126249295, 12.6126249295, 3.2329704932, -0.3236063347, 0.8294925205, -0.3208608287)
    # eager takes the factors from Gram matrices, which squares the condition number of the 12 x 12 concatenation, 5e3
    atol = 2e-10 if backend == "reference" else 1e-7
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=atol)


@every_shape
@pytest.mark.parametrize("T", [1, 2, 5, 8])
@pytest.mark.parametrize("space", ["input", "output"])
@pytest.mark.parametrize("backend", ON_CPU)
def test_the_form_without_svds_equals_the_plain_form(shape: tuple[int, int], T: int, space: str, backend: str) -> None:
    if shape[0] // T > min(shape):
        pytest.skip("more directions per task than the shifts have: the plain form fills them arbitrarily")
    if space == "output" and shape[0] == shape[1]:
        pytest.skip("moments of a square layer are those of its inputs")
    deltas, inputs = sample(T, *shape)
    moments = ops.shift_cov(inputs, deltas if space == "output" else None)
    expected = papers.esm(deltas, inputs)
    assert relative(esm(deltas, moments, precision="exact", backend=backend), expected) <= 1e-10


@pytest.mark.parametrize("shape", [(160, 160), (480, 160), (160, 480)], ids=["square", "tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32 moments", "float64 moments"])
def test_float32_is_as_good_as_the_float32_svds(shape: tuple[int, int], dtype: torch.dtype) -> None:
    deltas, inputs = synthetic(8, *shape), activations(8, 1600, shape[1])
    expected = papers.esm(deltas.double(), inputs.double())
    allowed = max(2 * relative(papers.esm(deltas, inputs), expected), 1e-4)
    space = deltas if shape[0] < shape[1] else None
    assert relative(esm(deltas, ops.shift_cov(inputs, space).to(dtype)), expected) <= allowed


@every_shape
def test_laws(shape: tuple[int, int]) -> None:
    deltas, inputs = sample(4, *shape)
    moments = ops.shift_cov(inputs)
    update = esm(deltas, moments, precision="exact")
    close = 1e-9
    order = torch.tensor([2, 0, 3, 1])
    assert relative(esm(deltas[order], moments[order], precision="exact"), update) <= close  # order of tasks
    assert relative(esm(deltas, ops.shift_cov(3.7 * inputs), precision="exact"), update) <= close  # scale of the inputs
    signs = torch.where(torch.arange(inputs.shape[1]) % 3 == 0, -1.0, 1.0).double()[:, None]
    assert relative(esm(deltas, ops.shift_cov(signs * inputs), precision="exact"), update) <= close  # signs of samples
    assert relative(esm(2 * deltas, moments, precision="exact"), 2 * update) <= close
    S = torch.linalg.svdvals(update)
    assert (S[0] / S[-1] - 1).item() <= 1e-9  # a partial isometry times a number


def test_one_task_without_scaling_is_iso_c() -> None:
    deltas, inputs = sample(1, 30, 30)
    assert relative(esm(deltas, ops.shift_cov(inputs), **OFF, precision="exact"), methods.iso_c(deltas)) <= 1e-9


@pytest.mark.parametrize("switch", ["eigenvalue_power", "task_exponent", "dimension_exponent"])
def test_every_level_can_be_switched_off_alone(switch: str) -> None:
    deltas, inputs = sample(3, 24, 36)
    deltas *= torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None, None]
    moments = ops.shift_cov(inputs)
    on = {"eigenvalue_power": 0.15, "task_exponent": 2.0, "dimension_exponent": 2.0}
    full, without, none = (esm(deltas, moments, **given) for given in (on, on | {switch: 0.0}, OFF))
    assert relative(without, full) > 1e-3
    assert relative(without, none) > 1e-3


def test_identity_moments_give_the_singular_subspaces() -> None:
    deltas = sample(3, 24, 36)[0]
    moments = torch.eye(36, dtype=torch.float64).expand(3, 36, 36)
    identity_inputs = torch.eye(36, dtype=torch.float64).expand(3, 36, 36)
    assert relative(esm(deltas, moments, precision="exact"), papers.esm(deltas, identity_inputs)) <= 1e-10


@every_shape
@pytest.mark.parametrize("backend", ON_CPU)
def test_few_tokens_null_directions_and_zero_tasks_are_legal(shape: tuple[int, int], backend: str) -> None:
    deltas, inputs = sample(2, *shape, tokens=3)  # three directions of the m // 2 that are asked for
    update = esm(deltas, ops.shift_cov(inputs), backend=backend)
    assert torch.isfinite(update).all()
    S = torch.linalg.svdvals(update)
    assert int((S > 1e-9 * S[0]).sum()) == 6
    E = ops.principal(ops.shift_cov(inputs), 3, delta=deltas).vectors
    inside = projector(torch.linalg.qr(torch.cat([E[0], E[1]], dim=1)).Q)
    assert relative(inside @ update, update) <= 1e-7  # nothing outside the essential subspaces
    zero = esm(torch.zeros_like(deltas), ops.shift_cov(inputs), backend=backend)
    assert torch.equal(zero, torch.zeros_like(zero))
    half = deltas * torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None]
    assert torch.isfinite(esm(half, ops.shift_cov(inputs), backend=backend)).all()
    none = esm(deltas, torch.zeros(2, shape[1], shape[1], dtype=torch.float64), backend=backend)
    assert torch.equal(none, torch.zeros_like(none))
    twice = esm(deltas[:1].expand(2, -1, -1), ops.shift_cov(inputs[:1]).expand(2, -1, -1), backend=backend)
    assert torch.isfinite(twice).all()


def test_more_tasks_than_directions_give_zero() -> None:
    deltas, inputs = sample(5, 3, 4)
    assert torch.equal(esm(deltas, ops.shift_cov(inputs)), torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 30), (33, 65), (65, 33)])
def test_stacks_equal_one_by_one_and_inputs_are_left_alone(shape: tuple[int, int], dtype: torch.dtype) -> None:
    pairs = [sample(3, *shape, seed=seed) for seed in range(2)]
    deltas = torch.stack([pair[0] for pair in pairs]).to(dtype)
    moments = torch.stack([ops.shift_cov(pair[1]) for pair in pairs]).to(dtype)
    before = deltas.clone(), moments.clone()
    updates = esm(deltas, moments)
    assert updates.shape == (2, *shape)
    for i in range(2):
        assert torch.equal(esm(deltas[i], moments[i]), updates[i])
    assert torch.equal(deltas, before[0])
    assert torch.equal(moments, before[1])


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 4, 4), (3, 4, 5), (4, 4)])
def test_moments_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"moments must be \[..., T, n, n\] or \[..., T, m, m\]"):
        esm(torch.ones(3, 6, 7), torch.ones(shape))


# ---- the level between layers
def test_layer_factors() -> None:
    norms = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(layer_factors(norms, 2.0), torch.tensor([0.25, 1.0, 2.25], dtype=torch.float64))
    assert torch.equal(layer_factors(norms, 0.0), torch.ones(3, dtype=torch.float64))
    assert torch.equal(layer_factors(torch.tensor([7.0]), 2.0), torch.ones(1))
    assert torch.equal(layer_factors(torch.zeros(3), 2.0), torch.ones(3))
    assert layer_factors(torch.tensor([0.0, 2.0]), 2.0)[0] == 0


def test_presets_and_their_overrides() -> None:
    vit = check_parameters("esm", {})
    assert vit == {"eigenvalue_power": 0.15, "task_exponent": 2.0, "dimension_exponent": 2.0, "layer_exponent": 2.0}
    text = check_parameters("esm", {"preset": "text", "dimension_exponent": 1})
    assert text == {"eigenvalue_power": 0.15, "task_exponent": 0.0, "dimension_exponent": 1.0, "layer_exponent": 2.0}
    for wrong, message in (
        ({"preset": "texts"}, r"parameters.preset: expected one of vit, text, got 'texts' \(did you mean text\?\)"),
        ({"preset": 3}, "expected one of vit, text, got 3"),
        ({"layer_exponent": -1.0}, "expected a value from 0 to 8, got -1.0"),
        ({"task_exponents": 1.0}, r"did you mean task_exponent\?"),
    ):
        with pytest.raises(InputError, match=message):
            check_parameters("esm", wrong)
    assert METHODS["esm"].moments
    assert math.isfinite(METHODS["esm"].flops(768, 768, 8))
