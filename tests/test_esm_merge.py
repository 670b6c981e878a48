"""Merges with `merge_method: esm`: statistics from files or memory, factors over layers, and the spool in between."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import IO

import pytest
import tiny
import torch
from tiny import assert_same
from torch import Tensor

from isomerge.backends import eager
from isomerge.capture import capture
from isomerge.checkpoint import Checkpoint, from_state_dict
from isomerge.delta_reader import DeltaReader
from isomerge.errors import InputError
from isomerge.merge import Progress, merge, merge_state_dicts, open_job
from isomerge.methods import METHODS, check_parameters, esm, layer_factors, tsvm
from isomerge.moments import Moments, check_fingerprints
from isomerge.output import check_output
from isomerge.plan import build_plan
from isomerge.report import plan_data
from isomerge.schedule import SHIFT_TOKENS, layer_type
from isomerge.settings import Model, Settings
from isomerge.spool import Spool
from isomerge.statistics import Layer, fingerprint, open_statistics, write_statistics

State = dict[str, Tensor]
QUERY, KEY, POOLER = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.attention.self.key.weight",
    "pooler.dense.weight",
)


def save(
    folder: Path, experts: int = 3, *, dtype: torch.dtype = torch.float32, output: str = "", tokens: int = 30
) -> tuple[list[State], list[State]]:
    """Models and their statistics below `folder`: the state dicts, the base first, and the moments of each expert."""
    states = tiny.bert_models(folder, experts, dtype)
    moments = [tiny.second_moments(states[0], s, i, tokens=tokens, output=output) for i, s in enumerate(states[1:])]
    for i, values in enumerate(moments):
        tiny.save_statistics(folder / f"s{i}", states[0], states[i + 1], values, tokens=tokens)
    return states, moments


def esm_recipe(experts: int = 3, **keys: object) -> dict[str, object]:
    models = [{"model": f"e{i}", "statistics": f"s{i}"} for i in range(experts)]
    return {"merge_method": "esm", "base_model": "base", "models": models, **keys}


def update_of(
    name: str,
    states: Sequence[State],
    moments: Sequence[State],
    *,
    method: str = "esm",
    dtype: torch.dtype = torch.float32,
    weights: Sequence[float] | None = None,
    **parameters: object,
) -> Tensor:
    """The update of one matrix before factors, from one call on that matrix alone."""
    weights = weights or [1.0] * len(moments)
    deltas = torch.stack(
        [(s[name].to(dtype) - states[0][name].to(dtype)) * w for s, w in zip(states[1:], weights, strict=True)]
    )
    if method == "tsvm":
        return tsvm(deltas)
    stack = torch.stack([m[name].to(dtype) for m in moments])
    if stack.shape[-1] != deltas.shape[-1]:  # of shifts: they scale as the deltas do
        stack *= torch.tensor(weights, dtype=torch.float64).square().to(dtype)[:, None, None]
    values = check_parameters("esm", parameters)
    del values["layer_exponent"]
    return esm(deltas, stack, **values)  # type: ignore[arg-type]


def factors_of(updates: Mapping[str, Tensor], exponents: Mapping[str, float]) -> dict[str, float]:
    """The factor of every layer that stands among others of its type."""
    factors: dict[str, float] = {}
    types: dict[str, list[str]] = {}
    for name in updates:
        if exponents[name]:
            types.setdefault(re.sub(r"layer\.\d+", "layer.*", name), []).append(name)
    for names in types.values():
        norms = torch.stack([torch.linalg.vector_norm(updates[name], dtype=torch.float64) for name in names])
        for index, name in enumerate(names):
            if len(names) > 1:
                factors[name] = float(layer_factors(norms, exponents[name])[index])
    return factors


def plainly(
    states: Sequence[State],
    moments: Sequence[State],
    *,
    alpha: float = 1.0,
    without: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    weights: Sequence[float] | None = None,
    layer_exponent: float = 2.0,
    **parameters: object,
) -> tuple[State, dict[str, float]]:
    """What the definition says, layer by layer: (the merged state dict, the factors). `without` fall to tsvm."""
    base = states[0]
    updates = {
        name: update_of(
            name,
            states,
            moments,
            method="tsvm" if name in without else "esm",
            dtype=dtype,
            weights=weights,
            **parameters,
        )
        for name in tiny.matrices(base)
    }
    factors = factors_of(updates, dict.fromkeys(updates, layer_exponent))
    merged = {}
    for name, value in base.items():
        if not value.is_floating_point():
            merged[name] = value
            continue
        if name not in updates:
            deltas = [
                (s[name].to(dtype) - value.to(dtype)) * w
                for s, w in zip(states[1:], weights or [1.0] * len(moments), strict=True)
            ]
            updates[name] = torch.stack(deltas).mean(0)
        update = updates[name] * (alpha * factors.get(name, 1.0))
        merged[name] = (value.to(dtype) + update).to(value.dtype)
    return merged, factors


def refused(folder: Path, expected: str, recipe: Mapping[str, object] | None = None) -> str:
    """Merging is an InputError of one line with `expected`, and leaves nothing behind; the message."""
    path = tiny.write_recipe(folder, recipe or esm_recipe())
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as caught:
        merge(path, folder / "out")
    message = str(caught.value)
    assert expected in message, message
    assert "\n" not in message
    assert sorted(folder.iterdir()) == before
    return message


@pytest.fixture
def spools(monkeypatch: pytest.MonkeyPatch) -> list[IO[bytes]]:
    """The files of updates that were made."""
    made: list[IO[bytes]] = []
    real = Spool._open

    def opened(spool: Spool) -> IO[bytes]:
        file = real(spool)
        if file not in made:
            made.append(file)
        return file

    monkeypatch.setattr(Spool, "_open", opened)
    return made


# Results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["", "dense", "layer.1.intermediate"], ids=["inputs", "shifts", "both in one type"])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float32, "float64")],
    ids=["float32", "bfloat16", "float64"],
)
def test_the_merge_is_the_definition_from_disk_and_in_memory(
    tmp_path: Path, stored: torch.dtype, dtype: str, output: str
) -> None:
    states, moments = save(tmp_path, dtype=stored, output=output)
    recipe = esm_recipe(parameters={"alpha": 0.7}, dtype=dtype)
    report = merge(tiny.write_recipe(tmp_path, recipe), tmp_path / "out")
    expected, factors = plainly(states, moments, alpha=0.7, dtype=getattr(torch, dtype))
    found = tiny.load_output(tmp_path / "out")
    assert_same(found, expected)
    assert {r.name: r.layer_factor for r in report.tensors if r.layer_factor is not None} == factors
    assert len(factors) == 12  # all but the pooler's
    assert report.warnings == []
    if dtype == "float32":
        assert_same(merge_state_dicts(states[0], states[1:], method="esm", alpha=0.7, statistics=moments), found)
        files = [tmp_path / "s0", str(tmp_path / "s1"), moments[2]]
        assert_same(merge_state_dicts(states[0], states[1:], method="esm", alpha=0.7, statistics=files), found)


def test_factors_are_powers_of_relative_norms(tmp_path: Path) -> None:
    states, moments = save(tmp_path)
    recipe = esm_recipe(parameters={"alpha": 3, "layer_exponent": 1.5})
    report = merge(tiny.write_recipe(tmp_path, recipe), tmp_path / "out")
    names = [QUERY, QUERY.replace("layer.0", "layer.1")]
    norms = [float(torch.linalg.norm(update_of(name, states, moments))) for name in names]
    for name, norm in zip(names, norms, strict=True):
        record = next(r for r in report.tensors if r.name == name)
        assert record.layer_factor == pytest.approx((norm / (sum(norms) / 2)) ** 1.5, rel=1e-5)
        assert record.update_norm == pytest.approx(record.layer_factor * norm, rel=1e-5)
        total = sum(s[name] - states[0][name] for s in states[1:])
        assert record.delta_sum_norm == pytest.approx(float(torch.linalg.norm(total)), rel=1e-5)


def test_groups_of_moments_are_read_as_they_are_stored_and_scaled_with_shifts(tmp_path: Path) -> None:
    _, moments = save(tmp_path, output="dense")
    weights = [0.5, 2.0, -1.0]
    with open_job(tiny.write_recipe(tmp_path, esm_recipe())) as job:
        reader = DeltaReader(job.base, job.experts, weights, moments=job.statistics)
        for step in job.plan.steps:
            found = reader.read(step.group).moments
            if step.call.method != "esm":
                assert found is None
                continue
            assert found is not None
            for unit, mine in zip(step.group.units, found, strict=True):
                shifts = step.group.moment_size != step.group.n
                assert shifts == ("dense" in unit.name and POOLER != unit.name and ".attention." not in unit.name)
                for moment, values, weight in zip(mine, moments, weights, strict=True):
                    assert torch.equal(moment, values[unit.name] * (weight**2 if shifts else 1.0))


def is_wide(name: str) -> bool:
    """Whether a layer is 16 x 24: the others are square or tall."""
    return name.endswith(".output.dense.weight") and "attention" not in name


def save_inputs(folder: Path, how: str, tokens: int = 11, dtype: torch.dtype = torch.float32) -> list[State]:
    """Models and their statistics as inputs, those of the wide layers of the second expert as `how` says."""
    states = tiny.bert_models(folder, 3, torch.float32)
    for i, state in enumerate(states[1:]):
        values = {name: X.to(dtype) for name, X in tiny.random_inputs(states[0], i, tokens=tokens).items()}
        for name in filter(is_wide, values if i == 1 and how != "inputs" else ()):
            X = values[name].float()
            Y = X if how == "a moment" else X @ (state[name] - states[0][name]).mT
            values[name] = Y.mT @ Y
        tiny.save_statistics(folder / f"s{i}", states[0], state, values, tokens=tokens)
    return states


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ["inputs", "a moment", "a moment of shifts"])
def test_inputs_give_moments_of_their_shifts_where_these_are_smaller(
    tmp_path: Path, how: str, stored: torch.dtype, dtype: str
) -> None:
    states = save_inputs(tmp_path, how, dtype=stored)
    weights, wide = [0.5, 2.0, -1.0], 0
    inputs = [tiny.random_inputs(states[0], i, tokens=11) for i in range(3)]
    with (
        open_job(tiny.write_recipe(tmp_path, esm_recipe(dtype=dtype))) as job,
        DeltaReader(job.base, job.experts, weights, moments=job.statistics) as reader,
    ):
        for step in job.plan.steps:
            found = reader.read(step.group).moments
            if found is None:
                continue
            shifts = step.group.m < step.group.n and how != "a moment"
            wide += shifts
            assert step.group.moment_size == (step.group.m if shifts else step.group.n)
            for unit, mine in zip(step.group.units, found, strict=True):
                for t, moment in enumerate(mine):
                    Y = inputs[t][unit.name].to(stored).double()
                    if shifts:
                        Y = Y @ (weights[t] * (states[t + 1][unit.name] - states[0][unit.name]).double()).mT
                    exact = stored == torch.float64 and dtype == "float64" and (how == "inputs" or t != 1)
                    expected = Y.mT @ Y
                    error = float((moment.double() - expected).norm() / expected.norm())
                    assert error < (1e-6 if not exact or shifts else 1e-14), (unit.name, t)
    assert (wide > 0) == (how != "a moment")


@pytest.mark.parametrize("how", ["inputs", "a moment", "a moment of shifts"])
def test_a_merge_with_inputs_is_one_with_their_moments(tmp_path: Path, how: str) -> None:
    states = save_inputs(tmp_path, how)
    path = tiny.write_recipe(tmp_path, esm_recipe(parameters={"alpha": 0.7}))
    report = merge(path, tmp_path / "out")
    moments = [tiny.second_moments(states[0], s, i, tokens=11, output="output") for i, s in enumerate(states[1:])]
    if how == "a moment":
        moments = [tiny.second_moments(states[0], s, i, tokens=11) for i, s in enumerate(states[1:])]
    expected, _ = plainly(states, moments, alpha=0.7)
    found = tiny.load_output(tmp_path / "out")
    for name, value in expected.items():
        update = float((value - states[0][name]).double().norm())
        assert float((found[name] - value).double().norm()) <= 1e-4 * update, name
    for number, (group_bytes, workers) in enumerate([(1, 1), (12_000, 2), (None, 3)]):
        merge(path, tmp_path / f"out{number}", group_bytes=group_bytes, workers=workers)
        assert_same(tiny.load_output(tmp_path / f"out{number}"), found)
    assert any("fewer tokens" in warning for warning in report.warnings) == (11 < 16 // 3)


def test_inputs_that_overflow_are_an_error(tmp_path: Path) -> None:
    states = save_inputs(tmp_path, "inputs")
    inputs = tiny.random_inputs(states[0], 1, tokens=11)
    tiny.save_statistics(tmp_path / "s1", states[0], states[2], {**inputs, POOLER: inputs[POOLER] * 1e25}, tokens=11)
    refused(tmp_path, f"{tmp_path / 's1'}: {POOLER}: second moments overflow float32; set `dtype: float64`")
    merge(tiny.write_recipe(tmp_path, esm_recipe(dtype="float64")), tmp_path / "out")


def test_the_report_tells_which_statistics_and_where_it_was_computed(tmp_path: Path) -> None:
    save(tmp_path, tokens=30)
    merge(tiny.write_recipe(tmp_path, esm_recipe()), tmp_path / "out")
    report = json.loads((tmp_path / "out/isomerge_report.json").read_text())
    assert report["machine"]["device"] == "cpu"
    assert [expert["statistics"] for expert in report["experts"]] == ["s0", "s1", "s2"]
    for i, expert in enumerate(report["experts"]):
        with open_statistics(tmp_path / f"s{i}") as file:
            assert (expert["statistics_digest"], expert["samples"]) == (file.digest, file.samples)
    assert len({expert["statistics_digest"] for expert in report["experts"]}) == 3


@pytest.mark.parametrize("output", ["", "dense"], ids=["inputs", "shifts"])
def test_weights_multiply_deltas(tmp_path: Path, output: str) -> None:
    states, moments = save(tmp_path, output=output)
    weights = [0.5, 2.0, -1.0]
    recipe = esm_recipe()
    recipe["models"] = [
        {**m, "parameters": {"weight": w}}  # type: ignore[dict-item]
        for m, w in zip(recipe["models"], weights, strict=True)  # type: ignore[call-overload]
    ]
    merge(tiny.write_recipe(tmp_path, recipe), tmp_path / "out")
    assert_same(tiny.load_output(tmp_path / "out"), plainly(states, moments, weights=weights)[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bytes_do_not_depend_on_groups_or_shards(tmp_path: Path, dtype: str) -> None:
    save(tmp_path, output="intermediate")
    parameters = {"alpha": 1.3, "dimension_exponent": 1.5}
    path = tiny.write_recipe(tmp_path, esm_recipe(parameters=parameters, dtype=dtype, out_dtype=dtype))
    for number, (group_bytes, shard_bytes) in enumerate([(None, 10**9), (1, 10**9), (12_000, 10**9), (1, 3_000)]):
        merge(path, tmp_path / f"out{number}", group_bytes=group_bytes, shard_bytes=shard_bytes)
    whole = [(tmp_path / f"out{number}/model.safetensors").read_bytes() for number in range(3)]
    assert [content == whole[0] for content in whole] == [True] * 3
    # The recipe in the output runs again, beside the original, to the same bytes.
    again = tmp_path / "again.yaml"
    again.write_text((tmp_path / "out0/isomerge_recipe.yaml").read_text())
    merge(again, tmp_path / "out4")
    assert (tmp_path / "out4/model.safetensors").read_bytes() == whole[0]
    assert_same(tiny.load_output(tmp_path / "out3"), tiny.load_output(tmp_path / "out0"))


def test_parameters_and_rules(tmp_path: Path) -> None:
    states, moments = save(tmp_path)
    output, other = (f"encoder.layer.{i}.output.dense.weight" for i in (0, 1))
    rules = [
        {"filter": "*.query.*", "parameters": {"layer_exponent": 0}},
        {"filter": "*.key.*", "merge_method": "tsvm"},
        {"filter": "*.value.*", "parameters": {"preset": "text", "alpha": 0.5}},
        {"filter": output, "parameters": {"layer_exponent": 1, "alpha": 3}},  # the other of its type: 2 and 1
        {"filter": "encoder.layer.0.intermediate*", "keep_base": True},  # leaves one of its type
        {"filter": "*word_embeddings*", "merge_method": "esm"},  # has no statistics
    ]
    report = merge(tiny.write_recipe(tmp_path, esm_recipe(rules=rules)), tmp_path / "out")
    found = tiny.load_output(tmp_path / "out")
    records = {r.name: r for r in report.tensors}

    def check(name: str, update: Tensor, factor: float | None, alpha: float = 1.0) -> None:
        assert torch.equal(found[name], states[0][name] + update * (alpha * (1.0 if factor is None else factor))), name
        assert records[name].layer_factor == factor

    check(QUERY, update_of(QUERY, states, moments), None)
    check(KEY, update_of(KEY, states, moments, method="tsvm"), None)
    pair = {name: update_of(name, states, moments) for name in (output, other)}
    factors = factors_of(pair, {output: 1.0, other: 2.0})
    check(output, pair[output], factors[output], 3.0)
    check(other, pair[other], factors[other])
    values = {n: update_of(n, states, moments, preset="text") for n in tiny.matrices(states[0]) if ".value." in n}
    factors = factors_of(values, dict.fromkeys(values, 2.0))
    for name, update in values.items():
        check(name, update, factors[name], 0.5)
    lone = "encoder.layer.1.intermediate.dense.weight"
    check(lone, update_of(lone, states, moments), None)
    words = "embeddings.word_embeddings.weight"
    check(words, update_of(words, states, moments, method="tsvm"), None)
    assert report.warnings == [f"1 of 11 tensors have no statistics and are merged with tsvm: {words}"]


def test_a_rule_alone_needs_statistics(tmp_path: Path) -> None:
    states, moments = save(tmp_path)
    rules = [{"filter": "*.query.*", "merge_method": "esm", "parameters": {"layer_exponent": 0}}]
    path = tiny.write_recipe(tmp_path, esm_recipe(merge_method="iso_c", rules=rules))
    assert merge(path, tmp_path / "out").warnings == []
    assert torch.equal(tiny.load_output(tmp_path / "out")[QUERY], states[0][QUERY] + update_of(QUERY, states, moments))
    refused(tmp_path, "models[0].statistics: missing; esm", tiny.recipe_for("iso_c", rules=rules))


# Layers without statistics --------------------------------------------------------------------------------------


def test_layers_without_statistics_fall_to_tsvm_and_keep_their_factors(tmp_path: Path) -> None:
    states, moments = save(tmp_path)
    without = [name for name in tiny.matrices(states[0]) if "attention.output" in name or name == QUERY]
    for i, values in enumerate(moments):
        kept = {name: value for name, value in values.items() if name not in without}
        tiny.save_statistics(tmp_path / f"s{i}", states[0], states[i + 1], kept)
    report = merge(tiny.write_recipe(tmp_path, esm_recipe(parameters={"alpha": 1.1})), tmp_path / "out")
    expected, factors = plainly(states, moments, alpha=1.1, without=without)
    assert_same(tiny.load_output(tmp_path / "out"), expected)
    assert {r.name: r.layer_factor for r in report.tensors if r.layer_factor is not None} == factors
    assert {r.name for r in report.tensors if r.method == "tsvm"} == set(without)
    assert report.warnings == [
        f"3 of 13 tensors have no statistics and are merged with tsvm: {', '.join(sorted(without))}"
    ]


def test_stacks_of_experts_fall_to_tsvm_and_are_one_layer_each() -> None:
    random = torch.Generator().manual_seed(0)
    base = {"model.embed_tokens.weight": torch.randn(9, 8, generator=random)}
    for layer in range(2):
        base[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(8, 8, generator=random)
        base[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.randn(3, 8, 20, generator=random)
    experts = [tiny.tuned(base, seed) for seed in (1, 2)]
    linear = [name for name in base if name.endswith("q_proj.weight")]
    X = torch.randn(2, 2, 15, 8, generator=random)
    moments = [{name: X[t, i].mT @ X[t, i] for i, name in enumerate(linear)} for t in range(2)]
    found = merge_state_dicts(base, experts, method="esm", statistics=moments)
    stacks = [name for name in base if name.endswith("gate_up_proj")]
    updates = {name: tsvm(torch.stack([e[name] - base[name] for e in experts], 1)) for name in stacks}
    norms = torch.stack([torch.linalg.vector_norm(updates[name], dtype=torch.float64) for name in stacks])
    for name, factor in zip(stacks, layer_factors(norms, 2.0).tolist(), strict=True):
        torch.testing.assert_close(found[name], base[name] + factor * updates[name])


def test_transposed_layers_are_merged_as_out_x_in() -> None:
    random = torch.Generator().manual_seed(0)
    name = "h.0.attn.c_attn.weight"
    base = {name: torch.randn(8, 24, generator=random), "wte.weight": torch.randn(20, 8, generator=random)}
    experts = [tiny.tuned(base, seed) for seed in (1, 2)]
    X = torch.randn(2, 15, 8, generator=random)
    moments = X.mT @ X
    found = merge_state_dicts(base, experts, method="esm", statistics=[{name: moment} for moment in moments])
    deltas = torch.stack([e[name] - base[name] for e in experts]).mT.contiguous()
    assert torch.equal(found[name], base[name] + esm(deltas, moments).mT)


def test_weights_that_are_merged_as_stored_take_no_moments_of_the_other_side() -> None:
    random = torch.Generator().manual_seed(0)
    name = "h.0.attn.c_proj.weight"  # square and stored [in, out]: sizes alone would not tell
    base = {name: torch.randn(8, 8, generator=random), "h.0.attn.c_attn.weight": torch.randn(8, 24, generator=random)}
    experts = [tiny.tuned(base, seed) for seed in (1, 2)]
    statistics = [dict.fromkeys(base, torch.diag(torch.rand(8, generator=random))) for _ in experts]
    deltas = torch.stack([e[name] - base[name] for e in experts])
    paper = merge_state_dicts(base, experts, method="esm", statistics=statistics, scope="paper")
    assert torch.equal(paper[name], base[name] + tsvm(deltas))
    own = merge_state_dicts(base, experts, method="esm", statistics=statistics)
    update = esm(deltas.mT.contiguous(), torch.stack([s[name] for s in statistics])).mT
    assert torch.equal(own[name], base[name] + update)


def test_experts_that_are_the_base_leave_it() -> None:
    base = tiny.bert_state(0)
    moments = tiny.second_moments(base, base, 0)
    assert_same(merge_state_dicts(base, [base, base], method="esm", statistics=[moments, moments]), base)
    one = merge_state_dicts(base, [base, tiny.tuned(base, 1)], method="esm", statistics=[moments, moments])
    assert all(bool(torch.isfinite(value).all()) for value in one.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.3.mlp.weight", "encoder.layer.*.mlp.weight"),
        ("encoder.block.3.layer.0.SelfAttention.q.weight", "encoder.block.*.layer.0.SelfAttention.q.weight"),
        ("layers.2.blocks.1.attn.qkv.weight", "layers.2.blocks.*.attn.qkv.weight"),
        ("transformer.resblocks.7.attn.in_proj_weight", "transformer.resblocks.*.attn.in_proj_weight"),
        ("encoder.layers.encoder_layer_11.mlp.0.weight", "encoder.layers.encoder_layer_*.mlp.0.weight"),
        ("layers.12.moe.experts.3.w1.weight", "layers.*.moe.experts.3.w1.weight"),
        ("h.0.attn.c_attn.weight", "h.*.attn.c_attn.weight"),
        ("mlp.2.weight", "mlp.2.weight"),
        ("pooler.dense.weight", "pooler.dense.weight"),
    ],
)
def test_layer_types(name: str, expected: str) -> None:
    assert layer_type(name) == expected


# Mistakes -------------------------------------------------------------------------------------------------------


def test_missing_statistics(tmp_path: Path) -> None:
    save(tmp_path)
    recipe = esm_recipe()
    del recipe["models"][1]["statistics"]  # type: ignore[index]
    refused(tmp_path, "recipe.yaml: models[1].statistics: missing; esm needs the statistics of every expert", recipe)
    recipe["models"][1]["statistics"] = "absent"  # type: ignore[index]
    refused(tmp_path, f"{tmp_path / 'absent'}: no such file", recipe)
    recipe["models"][1]["statistics"] = "base/model.safetensors"  # type: ignore[index]
    refused(tmp_path, "model.safetensors: not a statistics file", recipe)


def test_statistics_are_found_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    (tmp_path / "recipes").mkdir()
    models = [{"model": f"../e{i}", "statistics": "s0"} for i in range(3)]
    path = tiny.write_recipe(tmp_path / "recipes", esm_recipe(base_model="../base", models=models))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="s0: does not exist; relative paths in a recipe start at the recipe's folder"):
        merge(path, tmp_path / "out")


def test_partial_statistics(tmp_path: Path) -> None:
    states, moments = save(tmp_path)
    tiny.save_statistics(
        tmp_path / "s1", states[0], states[2], {n: v for n, v in moments[1].items() if n not in (KEY, POOLER)}
    )
    s0, s1, s2 = (tmp_path / f"s{i}" for i in range(3))
    refused(tmp_path, f"{KEY}: {s0}, {s2} have second moments of it, {s1} has none; capture all experts alike")
    rules = [{"filter": name, "merge_method": "tsvm"} for name in (KEY, POOLER)]
    assert merge(tiny.write_recipe(tmp_path, esm_recipe(rules=rules)), tmp_path / "out").warnings == []


def test_statistics_of_another_model(tmp_path: Path) -> None:
    states, _ = save(tmp_path)
    (tmp_path / "s1").write_bytes((tmp_path / "s0").read_bytes())
    message = refused(tmp_path, f"{tmp_path / 's1'}: statistics of another model")
    names = tiny.matrices(states[0])
    theirs, own = (fingerprint(from_state_dict(states[i], ""), names)[:12] for i in (1, 2))
    assert f"fingerprint {theirs}, {tmp_path / 'e1'} has {own};" in message
    moments = tiny.second_moments(states[0], states[2], 1)
    extra = {**moments, "pooler.other.weight": moments[POOLER]}
    tiny.save_statistics(
        tmp_path / "s1",
        {**states[0], "pooler.other.weight": states[0][POOLER]},
        {**states[2], "pooler.other.weight": states[2][POOLER]},
        extra,
    )
    refused(tmp_path, f"{tmp_path / 'e1'} has no layer pooler.other.weight; capture them from {tmp_path / 'e1'}")


def test_shifts_from_another_base(tmp_path: Path) -> None:
    states, moments = save(tmp_path, output="intermediate")
    other = tiny.tuned(states[0], 9)
    tiny.save_statistics(tmp_path / "s2", other, states[3], moments[2])
    message = refused(tmp_path, f"{tmp_path / 's2'}: statistics of shifts from another base")
    shifts = [name for name, moment in moments[2].items() if len(moment) != states[0][name].shape[1]]
    theirs, own = (fingerprint(from_state_dict(state, ""), shifts)[:12] for state in (other, states[0]))
    assert f"fingerprint {theirs}, {tmp_path / 'base'} has {own}; capture them with {tmp_path / 'base'} as" in message
    tiny.save_statistics(tmp_path / "s2", states[0], states[3], moments[2])
    merge(tiny.write_recipe(tmp_path, esm_recipe()), tmp_path / "out")


def test_bfloat16_copies_have_the_same_statistics(tmp_path: Path) -> None:
    states, _ = save(tmp_path, dtype=torch.bfloat16)
    tiny.save_model(tmp_path / "e0", {n: v.float() if v.is_floating_point() else v for n, v in states[1].items()})
    merge(tiny.write_recipe(tmp_path, esm_recipe()), tmp_path / "out")


def test_sizes_and_spaces(tmp_path: Path) -> None:
    states, moments = save(tmp_path)
    name = "encoder.layer.1.intermediate.dense.weight"  # 24 x 16
    tiny.save_statistics(tmp_path / "s1", states[0], states[2], {**moments[1], name: torch.eye(10)})
    refused(
        tmp_path,
        f"{tmp_path / 's1'}: {name}: second moments [10, 10] in output space for a layer of 24 x 16; expected [16, 16] "
        "in input space or [24, 24] in output space",
    )
    tiny.save_statistics(tmp_path / "s1", states[0], states[2], {**moments[1], POOLER: torch.eye(10)})
    refused(tmp_path, "in output space for a layer of 16 x 16; expected [16, 16] in input space")
    tiny.save_statistics(tmp_path / "s1", states[0], states[2], {**moments[1], name: torch.eye(24)})
    refused(
        tmp_path,
        f"{name}: second moments in input space in {tmp_path / 's0'} and in output space in {tmp_path / 's1'}; "
        "capture all experts alike",
    )


def test_mistakes_in_memory() -> None:
    base = tiny.bert_state(0)
    expert = tiny.tuned(base, 1)
    good = tiny.second_moments(base, expert, 0)

    def wrong(expected: str, statistics: object) -> None:
        with pytest.raises(InputError, match=expected) as caught:
            merge_state_dicts(base, [expert, expert], method="esm", statistics=statistics)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)

    wrong(r"merge_state_dicts: statistics\[0\]: missing; esm needs", None)
    wrong(r"statistics: 1 for 2 experts; give a list with one per expert", [good])
    wrong(r"statistics: one value for 2 experts", good)
    wrong(r"statistics\[1\]: expected a file or a mapping from names to tensors, got NoneType", [good, None])
    wrong(
        rf"statistics\[1\]: '{POOLER}': expected second moments in float32 or float64, got torch.int64",
        [
            good,
            {**good, POOLER: torch.zeros(16, 16, dtype=torch.int64)},
        ],
    )
    wrong(rf"statistics\[1\]: '{POOLER}': expected second moments \[d, d\]", [good, {**good, POOLER: torch.zeros(16)}])
    wrong(rf"statistics\[1\]: {POOLER}: second moments \[5, 5\] in memory", [good, {**good, POOLER: torch.eye(5)}])
    bad = good[POOLER].clone()
    bad[2, 3] = float("nan")
    wrong(rf"statistics\[1\]: {POOLER}: the moment has 1 non-finite values", [good, {**good, POOLER: bad}])
    wrong(
        rf"{POOLER}: second moments overflow float32; set `dtype: float64`",
        [
            good,
            {**good, POOLER: good[POOLER].double() * 1e38},
        ],
    )


def test_few_tokens_are_said(tmp_path: Path) -> None:
    save(tmp_path, tokens=6)  # ranks are 5 and, for the layers with 24 rows, 8
    with open_job(tiny.write_recipe(tmp_path, esm_recipe())) as job:
        assert job.plan.warnings == tuple(
            f"{tmp_path / f's{i}'}: 2 layers saw fewer tokens than the directions that are kept of each expert; the "
            "fewest are 6 tokens for 8 directions in encoder.layer.0.intermediate.dense.weight: capture more samples"
            for i in range(3)
        )


def test_a_plan_comes_from_headers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states, _ = save(tmp_path, 2)
    models = (Model("e0", statistics="s0"), Model("e1", statistics="s1"))
    opened = [from_state_dict(state, name) for name, state in zip(("base", "e0", "e1"), states, strict=True)]

    def read(self: Checkpoint, name: str, start: int = 0, count: int | None = None) -> Tensor:
        raise AssertionError(f"the plan read {name}")

    monkeypatch.setattr(Checkpoint, "read", read)
    with open_statistics(tmp_path / "s0") as s0, open_statistics(tmp_path / "s1") as s1:
        statistics = [Moments(s0, "s0"), Moments(s1, "s1")]
        plan = build_plan(Settings("esm", Model("base"), models), opened[0], opened[1:], statistics=statistics)
        assert {a.moment_size for a in plan.assignments if a.call and a.call.method == "esm"} == {16, 24}
        with pytest.raises(AssertionError, match="the plan read"):
            check_fingerprints(opened[0], opened[1:], statistics)
    with pytest.raises(InputError, match=r"statistics\[0\]: missing; esm needs the statistics of every expert"):
        build_plan(Settings("esm", Model("base"), (Model("e0"),)), opened[0], opened[1:2])


# Costs ----------------------------------------------------------------------------------------------------------


def test_inputs_count_for_memory(tmp_path: Path) -> None:
    def peak(tokens: int) -> int:
        shape = (64, 4096)
        base = from_state_dict({f"layers.{i}.mlp.fc.weight": torch.zeros(1).expand(shape) for i in range(2)}, "base")
        path = tmp_path / f"{tokens}"
        layers = {name: Layer(tokens, "input", 4096, name) for name in base.tensors}
        write_statistics(path, dict.fromkeys(layers, torch.zeros(tokens, 4096)), layers, samples=1, fingerprint="f")
        settings = Settings("esm", Model("base"), tuple(Model(f"e{i}", statistics="s") for i in range(4)))
        with open_statistics(path) as statistics:
            opened = [Moments(statistics, "s")] * 4
            plan = build_plan(settings, base, [base] * 4, statistics=opened, group_bytes=1)
        assert {a.moment_size for a in plan.assignments} == {64}
        return plan.peak_bytes

    assert SHIFT_TOKENS == eager.TOKENS
    assert peak(1000) - peak(10) >= 1.9 * 990 * 4096 * 4  # as read, and in the dtype of the deltas


def test_the_plan_counts_moments_and_the_spool(tmp_path: Path) -> None:
    states, moments = save(tmp_path, output="intermediate")
    path = tiny.write_recipe(tmp_path, esm_recipe())
    size = sum(value.nbytes for value in states[0].values())
    again = sum(states[0][name].nbytes for name in tiny.matrices(states[0]) if name != POOLER)
    buffer = states[0]["embeddings.position_ids"].nbytes
    of_moments = sum(value.nbytes for values in moments for value in values.values())
    seen: list[Progress] = []
    with open_job(path) as job:
        plan = job.plan
        assert plan.bytes_read == 4 * size - 3 * buffer + again + of_moments
        assert plan.spool_bytes == 2 * 24 * 16 * 4  # the largest type: two layers
        assert plan.disk_bytes == plan.bytes_written + plan.spool_bytes
        data = json.loads(json.dumps(plan_data(plan, True)))
        assert (data["disk_bytes"], data["spool_bytes"]) == (plan.disk_bytes, plan.spool_bytes)
        query = next(entry for entry in data["assignments"] if entry["name"] == QUERY)
        assert (query["moment_size"], query["layer_type"]) == (16, layer_type(QUERY))
        assert plan.by_method["esm"].flops == sum(
            count * METHODS["esm"].flops(m, n, 3) for m, n, count in [(16, 16, 9), (24, 16, 2), (16, 24, 2)]
        )
        assert sum(total.bytes_read for total in plan.by_method.values()) == plan.bytes_read
    report = merge(path, tmp_path / "out", progress=seen.append)
    assert (report.totals.bytes_read, report.totals.bytes_written) == (plan.bytes_read, plan.bytes_written)
    assert (seen[-1].bytes_done, seen[-1].matrices_done) == (seen[-1].bytes_total, seen[-1].matrices_total)
    assert [p.bytes_done for p in seen] == sorted(p.bytes_done for p in seen)
    with pytest.raises(InputError, match=r"needs 1e\+03 TB"):
        check_output(tmp_path / "new", plan.disk_bytes + 10**15, [])


def test_moments_count_for_memory() -> None:
    def peak(size: int) -> int:
        shapes = {f"layers.{i}.mlp.fc.weight": (256, 4096) for i in range(2)}
        base = {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}
        moments = {name: torch.eye(size) for name in shapes}
        settings = Settings("esm", Model("base"), tuple(Model(f"e{i}", statistics="s") for i in range(4)))
        experts = [from_state_dict(base, f"e{i}") for i in range(4)]
        statistics = [Moments(moments, "s")] * 4
        plan = build_plan(settings, from_state_dict(base, "base"), experts, statistics=statistics, group_bytes=1)
        return plan.peak_bytes

    assert peak(4096) - peak(256) >= 2 * 4 * (4096**2 - 256**2) * 4  # two groups of moments in flight


def test_without_layer_exponent_there_is_no_spool(tmp_path: Path, spools: list[IO[bytes]]) -> None:
    states, moments = save(tmp_path)
    report = merge(tiny.write_recipe(tmp_path, esm_recipe(parameters={"layer_exponent": 0})), tmp_path / "out")
    assert spools == []
    assert all(record.layer_factor is None for record in report.tensors)
    expected, factors = plainly(states, moments, layer_exponent=0.0)
    assert factors == {}
    assert_same(tiny.load_output(tmp_path / "out"), expected)
    merge(tiny.write_recipe(tmp_path, esm_recipe()), tmp_path / "out2")
    assert len(spools) == 1
    assert spools[0].closed


def test_the_spool_is_hidden_and_holds_one_type_at_a_time(
    tmp_path: Path, spools: list[IO[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    path = tiny.write_recipe(tmp_path, esm_recipe())
    known = {*os.listdir(tmp_path)}
    beside: set[str] = set()
    sizes: list[int] = []

    def look(progress: Progress) -> None:
        beside.update(os.listdir(tmp_path))
        sizes.extend(os.fstat(spool.fileno()).st_size for spool in spools)

    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))  # the file belongs beside the output
    merge(path, tmp_path / "out", progress=look, group_bytes=1)
    assert beside - known == {".out.partial"}
    units = [16 * 16 * 4] * 4 + [24 * 16 * 4] * 2  # of the six types, two layers each: put, put, read, read
    assert sizes == [size for unit in units for size in (unit, 2 * unit, 2 * unit, 2 * unit)]
    assert sorted(os.listdir(tmp_path)) == sorted([*known, "out"])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_merge_lets_go_of_its_files(tmp_path: Path, spools: list[IO[bytes]], error: type) -> None:
    states, moments = save(tmp_path)
    path = tiny.write_recipe(tmp_path, esm_recipe())
    before = sorted(tmp_path.iterdir())

    def stop(progress: Progress) -> None:
        if spools and os.fstat(spools[0].fileno()).st_size:
            raise error

    with pytest.raises(error):
        merge(path, tmp_path / "out", progress=stop)
    assert [spool.closed for spool in spools] == [True]
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / ".out.partial"])
    bad = {name: value.clone() for name, value in states[2].items()}
    last = "encoder.layer.1.output.dense.weight"
    bad[last][0, 0] = float("nan")  # the first types have been through the spool when it is read
    tiny.save_model(tmp_path / "e1", bad)
    tiny.save_statistics(tmp_path / "s1", states[0], bad, moments[1])
    with pytest.raises(InputError, match=f"e1: {last}: 1 non-finite values"):
        merge(path, tmp_path / "out", restart=True)
    assert all(spool.closed for spool in spools)
    with pytest.raises(InputError, match="1 non-finite values"):
        merge_state_dicts(states[0], [states[1], bad, states[3]], method="esm", statistics=moments)
    assert len(spools) == 3
    assert all(spool.closed for spool in spools)


def test_a_full_disk_names_the_folder_and_the_layer(
    tmp_path: Path, spools: list[IO[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path)
    path = tiny.write_recipe(tmp_path, esm_recipe())
    before = sorted(tmp_path.iterdir())
    full = FileIO("/dev/full", "w")
    monkeypatch.setattr(Spool, "_open", lambda spool: full)
    with pytest.raises(OSError, match=r"update of encoder\.layer\.0\S+ until its layer factor is known: No space"):
        merge(path, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / ".out.partial"])  # a buffer was copied by then


def test_values_that_overflow_are_an_error(tmp_path: Path) -> None:
    base = {f"layers.{i}.mlp.fc.weight": torch.zeros(4, 4) for i in range(2)}
    expert = {name: torch.eye(4) * size for (name, size) in zip(base, (1e-3, 1e3), strict=True)}
    moments = dict.fromkeys(base, torch.eye(4))
    with pytest.raises(ArithmeticError, match=r"layers\.[01]\.mlp\.fc\.weight: esm with alpha 1e\+38 gave non-finite"):
        merge_state_dicts(base, [expert], method="esm", statistics=[moments], alpha=1e38)


def _live_bytes(known: set[int]) -> int:
    """Bytes of the tensors in memory whose storage is not one of `known`."""
    sizes = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in gc.get_objects()
        if type(value) is Tensor
    }
    return sum(size for place, size in sizes.items() if place not in known)


def test_updates_that_wait_are_not_in_memory(tmp_path: Path) -> None:
    layers, side, experts = 60, 96, 2
    base = {f"layers.{i}.mlp.fc.weight": torch.randn(side, side) for i in range(layers)}
    states = [base, *(tiny.tuned(base, seed) for seed in range(experts))]
    for name, state in zip(("base", "e0", "e1"), states, strict=True):
        tiny.save_model(tmp_path / name, state)
    for i in range(experts):
        moments = {name: torch.eye(side) * (i + 1 + k) for k, name in enumerate(base)}
        tiny.save_statistics(tmp_path / f"s{i}", base, states[i + 1], moments)
    known = {v.untyped_storage().data_ptr() for v in gc.get_objects() if type(v) is Tensor}
    live: list[int] = []
    path = tiny.write_recipe(tmp_path, esm_recipe(experts))
    report = merge(path, tmp_path / "out", group_bytes=1, progress=lambda _: live.append(_live_bytes(known)))
    unit = side * side * 4
    stack = (2 * experts + 1) * unit  # deltas, moments and base
    assert len(live) == 2 * layers
    assert max(live) >= stack, "nothing was seen"
    raw = torch.get_num_threads() * (1 + experts) * unit  # what each thread reads to
    assert max(live) <= 2 * stack + 4 * unit + raw  # two in flight; what is computed, read, cast and written now
    assert layers * unit > 1.5 * max(live), "the bound says nothing if all updates fit into it"
    assert sum(record.layer_factor is not None for record in report.tensors) == layers


@pytest.mark.parametrize("shifts", [False, True])
def test_a_real_model_from_capture_to_merge(tmp_path: Path, shifts: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24
    )
    base = transformers.BertModel(config).eval()
    base.save_pretrained(tmp_path / "base")
    states, moments = [base.state_dict()], []
    for i in range(2):
        expert = transformers.BertModel(config).eval()
        expert.load_state_dict(tiny.tuned(states[0], i, 0.05))
        expert.save_pretrained(tmp_path / f"e{i}")
        tokens = torch.randint(60, (4, 12), generator=torch.Generator().manual_seed(i))
        captured = capture(
            expert,
            [{"input_ids": tokens}],
            path=tmp_path / f"s{i}",
            checkpoint=tmp_path / f"e{i}",
            base=tmp_path / "base" if shifts else None,
        )
        states.append(expert.state_dict())
        moments.append({name: captured.moments[layer.stored] for name, layer in captured.layers.items()})
    report = merge(tiny.write_recipe(tmp_path, esm_recipe(2)), tmp_path / "out")
    assert not [r.name for r in report.tensors if r.method == "tsvm"]
    assert sum(r.layer_factor is not None for r in report.tensors) == 18
    found = tiny.load_output(tmp_path / "out")
    assert_same(merge_state_dicts(states[0], states[1:], method="esm", statistics=moments), found)
    merged = transformers.BertModel.from_pretrained(tmp_path / "out").eval()
    assert_same(merged.state_dict(), found)
    assert bool(torch.isfinite(merged(tokens).last_hidden_state).all())
