"""Merges of models in memory: the semantics of every choice, on tensors small enough to compute by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import assert_same

from isomerge.deltas import unit_seed
from isomerge.errors import InputError
from isomerge.merge import merge_state_dicts
from isomerge.methods import METHODS


def test_scalars_and_empty_tensors() -> None:
    base = {"logit_scale": torch.tensor(2.0), "empty.weight": torch.zeros(0, 4), "fc.weight": torch.ones(1, 3)}
    expert = {"logit_scale": torch.tensor(3.0), "empty.weight": torch.zeros(0, 4), "fc.weight": torch.zeros(1, 3)}
    for method in tiny.WITHOUT_STATISTICS:
        found = merge_state_dicts(base, [expert], method=method)
        assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in base.items()}
    assert found["logit_scale"] == 3
    torch.testing.assert_close(merge_state_dicts(base, [expert], method="iso_c")["fc.weight"], torch.zeros(1, 3))


def test_no_package_beside_torch_is_needed_in_memory() -> None:
    probe = (
        "import sys\n"
        "for name in ('pydantic', 'yaml', 'typer', 'rich', 'safetensors', 'numpy', 'triton', 'psutil'):\n"
        "    sys.modules[name] = None\n"
        "import torch\n"
        "from isomerge.merge import merge_state_dicts\n"
        "base, expert = {'fc.weight': torch.eye(3)}, {'fc.weight': 2 * torch.eye(3)}\n"
        "found = merge_state_dicts(base, [expert], method='iso_c', rules=[{'filter': 'x', 'keep_base': True}])\n"
        "assert torch.allclose(found['fc.weight'], expert['fc.weight']), found\n"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_weights_multiply_deltas(tmp_path: Path) -> None:
    states = tiny.bert_models(tmp_path, experts=2)
    scaled = [
        {n: b + 0.25 * (s[n] - b) if b.is_floating_point() else b for n, b in states[0].items()} for s in states[1:]
    ]
    one = merge_state_dicts(states[0], states[1:], method="task_arithmetic", weights=[0.25, 0.25])
    two = merge_state_dicts(states[0], scaled, method="task_arithmetic")
    for name, value in two.items():
        torch.testing.assert_close(one[name], value, rtol=0, atol=3e-6)
    zero = merge_state_dicts(states[0], states[1:], method="task_arithmetic", weights=[1, 0])
    alone = merge_state_dicts(states[0], states[1:2], method="task_arithmetic")
    assert_same(zero, alone)


def test_rules(tmp_path: Path) -> None:
    states = tiny.bert_models(tmp_path)
    rules = [
        {"filter": "encoder.layer.0.*", "keep_base": True},
        {"filter": "*.intermediate.*", "merge_method": "average", "parameters": {"alpha": 0}},
        {"filter": "*word_embeddings*", "merge_method": "iso_c"},
        {"filter": "encoder.layer.*.bias", "merge_method": "tsvm"},
        {"filter": "*", "parameters": {"common_space_fraction": 0.25}},
    ]
    found = merge_state_dicts(states[0], states[1:], method="iso_cts", rules=rules)
    for name, value in states[0].items():
        if name.startswith("encoder.layer.0.") or "intermediate" in name:
            assert torch.equal(found[name], value), name
    deltas = {n: torch.stack([s[n] - states[0][n] for s in states[1:]]) for n in states[0]}
    words, pooler, bias = (
        "embeddings.word_embeddings.weight",
        "pooler.dense.weight",
        "encoder.layer.1.output.LayerNorm.weight",
    )
    assert torch.equal(found[words], states[0][words] + METHODS["iso_c"].function(deltas[words]))
    expected = METHODS["iso_cts"].function(deltas[pooler], common_space_fraction=0.25)
    assert torch.equal(found[pooler], states[0][pooler] + expected)
    torch.testing.assert_close(found[bias], states[0][bias] + deltas[bias].mean(0))


def test_transposed_layers_are_merged_as_out_x_in() -> None:
    random = torch.Generator().manual_seed(0)
    names = {"h.0.attn.c_attn.weight": (8, 24), "h.0.mlp.c_fc.weight": (8, 32), "wte.weight": (20, 8)}
    base = {name: torch.randn(shape, generator=random) for name, shape in names.items()}
    experts = [tiny.tuned(base, seed) for seed in (1, 2)]
    found = merge_state_dicts(base, experts, method="iso_cts", common_space_fraction=0.5)
    for name in list(names)[:2]:
        deltas = torch.stack([e[name] - base[name] for e in experts]).mT.contiguous()
        update = METHODS["iso_cts"].function(deltas, common_space_fraction=0.5).mT
        assert torch.equal(found[name], base[name] + update)


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks_of_experts_are_merged_slice_by_slice(transposed: bool) -> None:
    random = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"  # [in, out] or [out, in]: the shape of `down_proj` tells
    base = {
        "model.embed_tokens.weight": torch.randn(9, 8, generator=random),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(8, 8, generator=random),
        name: torch.randn(3, 8, 20, generator=random),
        name.replace("gate_up", "down"): torch.randn((3, 10, 8) if transposed else (3, 20, 4), generator=random),
    }
    experts = [tiny.tuned(base, seed) for seed in (1, 2)]
    found = merge_state_dicts(base, experts, method="iso_cts", common_space_fraction=0.5)
    for index in range(3):
        deltas = torch.stack([e[name][index] - base[name][index] for e in experts])
        deltas = deltas.mT.contiguous() if transposed else deltas
        update = METHODS["iso_cts"].function(deltas, common_space_fraction=0.5)
        assert torch.equal(found[name][index], base[name][index] + (update.mT if transposed else update))


def test_dtypes() -> None:
    base = tiny.bert_state(0, torch.bfloat16)
    experts = [tiny.tuned(base, 1), tiny.tuned(base, 2)]
    found = merge_state_dicts(base, experts, method="iso_c", out_dtype=torch.float32)
    wide = merge_state_dicts(
        {n: v.float() if v.is_floating_point() else v for n, v in base.items()}, experts, method="iso_c"
    )
    assert_same(found, wide)
    assert found["embeddings.position_ids"].dtype == torch.int64
    # float64 inputs are merged in float64: an update of 1e-12 would vanish in float32.
    exact = {n: v.double() if v.is_floating_point() else v for n, v in base.items()}
    moved = {n: v + 1e-12 if v.is_floating_point() else v for n, v in exact.items()}
    result = merge_state_dicts(exact, [moved], method="average")["pooler.dense.weight"]
    torch.testing.assert_close(result, moved["pooler.dense.weight"], rtol=0, atol=1e-15)
    assert not torch.equal(result, exact["pooler.dense.weight"])


def test_one_expert_equal_experts_and_the_base_itself() -> None:
    base = tiny.bert_state(0)
    expert = tiny.tuned(base, 1)
    for method in tiny.WITHOUT_STATISTICS:
        for experts in ([expert], [expert, expert], [base, expert], [base]):
            found = merge_state_dicts(base, experts, method=method)
            assert all(bool(torch.isfinite(v).all()) for v in found.values()), method
        assert_same(found, base)


def test_inputs_are_not_modified() -> None:
    base = tiny.bert_state(0)
    experts = [tiny.tuned(base, 1), tiny.tuned(base, 2)]
    copies = [{n: v.clone() for n, v in state.items()} for state in (base, *experts)]
    for method in tiny.WITHOUT_STATISTICS:
        found = merge_state_dicts(base, experts, method=method, weights=[2, 3], alpha=1.5)
        for state, copy in zip((base, *experts), copies, strict=True):
            assert_same(state, copy)
            assert not {v.data_ptr() for v in found.values()} & {v.data_ptr() for v in state.values()}
        assert list(found) == list(base)


def test_values_that_overflow_are_told_apart() -> None:
    base = {"fc.weight": torch.full((2, 2), -3e38)}
    with pytest.raises(InputError, match=r"4 differences from the base overflow float32; set `dtype: float64`"):
        merge_state_dicts(base, [{"fc.weight": torch.full((2, 2), 3e38)}], method="average")
    large = {"fc.weight": torch.full((2, 2), 3e38)}  # finite, with a sum that is not
    assert_same(merge_state_dicts(large, [large], method="average"), large)
    with pytest.raises(InputError, match=r"out_dtype: 4 values of fc.weight overflow float16"):
        merge_state_dicts(large, [large], method="average", out_dtype=torch.float16)
    with pytest.raises(ArithmeticError, match=r"fc.weight: average with alpha 1e\+30 gave non-finite"):
        merge_state_dicts(
            {"fc.weight": torch.zeros(2, 2)}, [{"fc.weight": torch.full((2, 2), 1e20)}], method="average", alpha=1e30
        )


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"method": "iso_d"}, "merge_state_dicts: merge_method: unknown method 'iso_d'"),
        ({"method": "iso_c", "density": 1}, "merge_state_dicts: parameters.density: unknown parameter"),
        ({"method": "iso_c", "weights": [1, 2]}, "weights: 2 for 1 experts"),
        ({"method": "iso_c", "weights": [float("inf")]}, r"weights\[0\]: expected a finite number"),
        ({"method": "iso_c", "scope": "all"}, "scope: expected one of default, paper"),
        ({"method": "iso_c", "out_dtype": torch.int8}, "out_dtype: expected one of bfloat16, float16"),
        ({"method": "iso_c", "rules": [{"filtre": "*"}]}, r"rules\[0\]: unknown key `filtre`"),
        (
            {"method": "iso_c", "rules": [{"filter": "*", "merge_method": "x"}]},
            r"rules\[0\].merge_method: unknown method",
        ),
        ({"method": "iso_c", "alpha": 1, "scaling_factor": 1}, "are the same parameter"),
    ],
)
def test_mistakes_in_memory(keywords: dict[str, object], expected: str) -> None:
    base = tiny.bert_state(0)
    with pytest.raises(InputError, match=expected):
        merge_state_dicts(base, [base], **keywords)  # type: ignore[arg-type]


def test_no_experts_in_memory() -> None:
    with pytest.raises(InputError, match="experts: none are given"):
        merge_state_dicts(tiny.bert_state(0), [], method="iso_c")


def test_seeds_depend_on_the_name_and_on_the_recipe_and_stay() -> None:
    assert len({unit_seed(seed, name) for seed in (0, 1) for name in ("a", "b")}) == 4
    assert unit_seed(0, "fc.weight") == 2422939889962470876
    base = {"a.weight": torch.zeros(40, 40), "b.weight": torch.zeros(40, 40)}
    expert = {name: torch.ones(40, 40) for name in base}
    found = merge_state_dicts(base, [expert], method="dare_linear", density=0.5)
    assert not torch.equal(found["a.weight"], found["b.weight"])
    other = merge_state_dicts(base, [expert], method="dare_linear", density=0.5, seed=1)
    assert not torch.equal(found["a.weight"], other["a.weight"])
