"""The plan: what is done to each tensor, what it costs, and every mistake that headers can show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from isomerge.checkpoint import Checkpoint, from_state_dict, open_checkpoint
from isomerge.deltas import PIECE_ELEMENTS
from isomerge.errors import InputError
from isomerge.merge import merge, open_job
from isomerge.methods import METHODS
from isomerge.output import check_output
from isomerge.plan import Plan, build_plan
from isomerge.schedule import process_bytes, step_bytes
from isomerge.settings import Model, Rule, Settings

State = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def _no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan comes from headers alone: reading a tensor fails the test."""

    def read(self: Checkpoint, name: str, start: int = 0, count: int | None = None) -> Tensor:
        raise AssertionError(f"the plan read {name}")

    monkeypatch.setattr(Checkpoint, "read", read)


def plan_of(
    base: State, *experts: State, method: str = "iso_cts", group_bytes: int | None = None, **keys: object
) -> Plan:
    models = tuple(Model(f"e{i}") for i in range(len(experts)))
    settings = Settings(method=method, base=Model("base"), models=models, **keys)  # type: ignore[arg-type]
    opened = [from_state_dict(expert, f"e{i}") for i, expert in enumerate(experts)]
    return build_plan(settings, from_state_dict(base, "base"), opened, group_bytes=group_bytes)


def without(state: State, *names: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name not in names}


BASE = tiny.bert_state(0)
EXPERT = tiny.tuned(BASE, 1)
QUERY = "encoder.layer.0.attention.self.query.weight"


def test_assignments_and_totals() -> None:
    plan = plan_of(BASE, EXPERT, EXPERT, alpha=1.5)
    by_name = {a.name: a for a in plan.assignments}
    assert list(by_name) == list(BASE)
    assert by_name[QUERY].call is not None
    assert (by_name[QUERY].call.method, by_name[QUERY].call.alphas) == ("iso_cts", (1.5,))
    assert by_name[QUERY].call.parameters == {"common_space_fraction": 0.8}
    words = by_name["embeddings.word_embeddings.weight"]
    assert words.call is not None
    assert (words.call.method, words.call.alphas) == ("average", (1.5,))
    assert by_name["embeddings.position_ids"].call is None
    totals = plan.by_method
    assert {name: (total.tensors, total.matrices) for name, total in totals.items()} == {
        "keep": (1, 0),
        "average": (14, 0),
        "iso_cts": (13, 13),
    }
    assert totals["iso_cts"].shapes == {(16, 16): 9, (24, 16): 2, (16, 24): 2}
    flops = METHODS["iso_cts"].flops
    assert totals["iso_cts"].flops == 9 * flops(16, 16, 2) + 2 * flops(24, 16, 2) + 2 * flops(16, 24, 2)
    size = sum(value.nbytes for value in BASE.values())
    assert plan.bytes_written == sum(total.bytes_written for total in totals.values()) == size
    assert plan.bytes_read == sum(total.bytes_read for total in totals.values())
    assert plan.bytes_read == 3 * size - 2 * BASE["embeddings.position_ids"].nbytes
    assert plan.warnings == ()


def test_groups_hold_equal_shapes_and_keep_to_the_bound() -> None:
    bound = 3 * 2 * 16 * 16 * 4  # three units of two experts
    plan = plan_of(BASE, EXPERT, EXPERT, group_bytes=bound)
    names = []
    for step in plan.steps:
        assert len(step.group.units) * 2 * step.group.m * step.group.n * 4 <= bound or len(step.group.units) == 1
        assert {unit.count for unit in step.group.units} == {step.group.m * step.group.n}
        names += [unit.name for unit in step.group.units]
    assert sorted(names) == sorted(a.name for a in plan.assignments if a.call)
    assert max(len(step.group.units) for step in plan.steps if step.kind == "matrix") == 3
    assert len(plan_of(BASE, EXPERT, EXPERT).steps) < len(plan.steps)


def test_groups_occupy_the_threads_within_the_memory_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr("isomerge.plan.physical_bytes", lambda: 2**40)

    def state(words: int) -> dict[str, Tensor]:  # views of one number each: sizes without memory
        shapes = {f"layers.{i}.fc.weight": (2048, 2048) for i in range(7)} | {"embed_tokens.weight": (words, 2048)}
        return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}

    def lengths(plan: Plan) -> list[int]:
        return [len(step.group.units) for step in plan.steps if step.kind == "matrix"]

    few, many = state(10), state(100_000)
    assert lengths(plan_of(few, *[few] * 8)) == [1] * 7  # 134 MB of deltas each
    roomy = plan_of(many, *[many] * 8)
    assert lengths(roomy) == [3, 3, 1]
    size = sum(value.numel() * 4 for value in many.values())
    assert roomy.peak_bytes < size + 3 * 8 * many["embed_tokens.weight"].numel() * 4 + 500_000_000
    monkeypatch.setattr("isomerge.plan.physical_bytes", lambda: 5 * 2**30)
    assert lengths(plan_of(many, *[many] * 8)) == [2, 2, 2, 1]


def test_elementwise_methods_take_every_floating_tensor() -> None:
    plan = plan_of(BASE, EXPERT, method="ties", parameters={"density": 0.5})
    assert {a.call.method for a in plan.assignments if a.call} == {"ties"}
    assert plan.matrices == 0


def test_out_dtype_changes_floating_tensors_only() -> None:
    plan = plan_of(BASE, EXPERT, out_dtype=torch.float16)
    assert {a.out_dtype for a in plan.assignments} == {torch.float16, torch.int64}


def refused(expected: str, base: State, *experts: State, **keys: object) -> None:
    with pytest.raises(InputError) as caught:
        plan_of(base, *experts, **keys)  # type: ignore[arg-type]
    message = str(caught.value)
    assert expected in message, message
    assert "\n" not in message


def test_a_missing_tensor_names_file_and_key() -> None:
    refused(f"e1: {QUERY} is missing, the base base has it", BASE, EXPERT, without(EXPERT, QUERY))
    refused("(and 1 more)", BASE, without(EXPERT, QUERY, "pooler.dense.weight"))
    prefixed = {f"bert.{name}": value for name, value in EXPERT.items()}
    refused(
        f"the closest name there is bert.{next(iter(BASE)).replace('position_ids', 'word_embeddings.weight')}",
        BASE,
        prefixed,
    )


def test_tensors_that_are_kept_may_be_missing() -> None:
    assert plan_of(BASE, without(EXPERT, "embeddings.position_ids")).warnings == ()
    plan = plan_of(BASE, without(EXPERT, "pooler.dense.weight"), rules=(Rule("pooler.*", keep_base=True),))
    assert next(a for a in plan.assignments if a.name == "pooler.dense.weight").call is None


def test_shapes() -> None:
    refused(f"e0: {QUERY}: shape [8, 32], the base base has [16, 16]", BASE, {**EXPERT, QUERY: torch.zeros(8, 32)})
    words = "embeddings.word_embeddings.weight"
    padded = {**EXPERT, words: torch.zeros(64, 16)}
    refused(f"e0: {words}: 64 rows, the base base has 40", BASE, padded)
    assert plan_of(BASE, padded, rules=(Rule(words, keep_base=True),)).matrices == 13


def test_kinds_of_dtype() -> None:
    integers = {**EXPERT, QUERY: torch.zeros(16, 16, dtype=torch.int8)}
    refused(f"e0: {QUERY}: integers of type int8, where the base has float32", BASE, integers)
    refused(f"e0: {QUERY}: float32 where the base base has int8", {**BASE, QUERY: integers[QUERY]}, EXPERT)
    refused(f"base: {QUERY}: integers of type int8; quantised", {**BASE, QUERY: integers[QUERY]}, integers)
    scaled = {**BASE, QUERY: BASE[QUERY].to(torch.float8_e4m3fn)}
    refused(f"base: {QUERY}: stored as float8_e4m3fn", scaled, EXPERT)
    refused(f"e0: {QUERY}: values of type float8_e4m3fn, where the base has float32", BASE, scaled)
    assert plan_of({**BASE, QUERY: integers[QUERY]}, EXPERT, rules=(Rule(QUERY, keep_base=True),)).matrices == 12
    assert plan_of(BASE, tiny.tuned(tiny.bert_state(0, torch.bfloat16), 1)).matrices == 13  # another float is fine


def test_warnings() -> None:
    extra = {**EXPERT, "classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(2)}
    (warning,) = plan_of(BASE, extra).warnings
    assert warning == "e0: 2 tensors that the base does not have are left out: classifier.weight, classifier.bias"
    rules = (Rule("*.query.*", "average"), Rule("*layer.0*query.weight", "ties"), Rule("*.mpl.*", "ties"))
    warnings = plan_of(BASE, EXPERT, rules=rules, source="r.yaml").warnings
    assert warnings == (
        'r.yaml: rules[1] ("*layer.0*query.weight") has no effect: an earlier rule takes every tensor it matches',
        'r.yaml: rules[2] ("*.mpl.*") has no effect: it matches no tensor',
    )
    assert "no tensor is merged" in plan_of(BASE, EXPERT, rules=(Rule("*", keep_base=True),)).warnings[0]


def test_the_base_as_an_expert_is_legal_and_said(tmp_path: Path) -> None:
    tiny.bert_models(tmp_path, experts=1)
    recipe = tiny.recipe_for("iso_c", models=[{"model": "base"}, {"model": "e0", "statistics": "s"}])
    with open_job(tiny.write_recipe(tmp_path, recipe)) as job:
        assert job.plan.warnings == (
            "recipe.yaml: models[0] is the base itself: an expert whose delta is zero",
            "recipe.yaml: models[1].statistics is not used by iso_c",
        )


HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def llama(head: bool, vocabulary: int = 30) -> dict[str, Tensor]:
    state = {EMBED: torch.ones(vocabulary, 8), "model.layers.0.self_attn.q_proj.weight": torch.ones(8, 8)}
    return {**state, HEAD: torch.ones(vocabulary, 8)} if head else state


def tied_plan(
    folder: Path, base: Mapping[str, object] | None, expert: Mapping[str, object] | None, heads: tuple[bool, bool]
) -> Plan:
    """A plan of two folders with these configs (None: no config.json)."""
    for name, config, head in (("base", base, heads[0]), ("expert", expert, heads[1])):
        tiny.save_model(folder / name, llama(head))
        (folder / name / "config.json").write_text(json.dumps(config))
        if config is None:
            (folder / name / "config.json").unlink()
    settings = Settings("average", Model("base"), (Model("expert"),))
    with open_checkpoint(folder / "base") as opened, open_checkpoint(folder / "expert") as other:
        return build_plan(settings, opened, [other])


def test_an_expert_that_ties_its_head(tmp_path: Path) -> None:
    plan = tied_plan(tmp_path, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}, (True, False))
    sources = {unit.name: unit.sources for step in plan.steps for unit in step.group.units}
    assert sources[HEAD] == (EMBED,)
    assert plan.warnings[0].endswith(f"ties {HEAD} to {EMBED} and the base does not: its {EMBED} is read for both")
    with pytest.raises(InputError, match=f"{HEAD} is missing"):
        tied_plan(tmp_path, {}, {"tie_word_embeddings": False}, (True, False))
    with pytest.raises(InputError, match=f"{HEAD} is missing"):
        tied_plan(tmp_path, None, None, (True, False))


def test_an_expert_that_unties_its_head(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"expert: {HEAD} is a weight of its own"):
        tied_plan(tmp_path, {}, {"tie_word_embeddings": False}, (False, True))
    plan = tied_plan(tmp_path, {}, {"tie_word_embeddings": True}, (False, True))  # a copy that tying makes again
    assert "1 tensors that the base does not have are left out: lm_head.weight" in plan.warnings[0]
    shared = llama(True)
    shared[HEAD] = shared[EMBED]
    refused(f"e0: {HEAD} and {EMBED} are two tensors here and one (tied) in the base", shared, llama(True))
    assert plan_of(shared, shared).assignments[0].aliases == (HEAD,)
    assert plan_of(llama(True), shared, method="average").warnings == ()  # the expert's embedding is read for both
    assert plan_of(shared, llama(False)).assignments[0].aliases == (HEAD,)


def test_output_places(tmp_path: Path) -> None:
    model = tmp_path / "models" / "base"
    model.mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "isomerge_report.json").write_text("{}")
    check_output(tmp_path / "new" / "deep", 10, [model])
    check_output(tmp_path / "empty", 10, [model], overwrite=True)
    check_output(tmp_path / "done", 10, [model], overwrite=True)
    for place, overwrite, expected in [
        ("done", False, "done: exists already; choose another folder, or replace it with --force"),
        ("file", False, "exists already"),
        ("file", True, "is not the output of a merge"),
        ("models", True, "the output would replace the input"),
        ("models/base", True, "the output would replace the input"),
        ("models/base/../base", True, "the output would replace the input"),
        ("file/below", False, "is not a folder that you may write to"),
    ]:
        with pytest.raises(InputError, match=expected):
            check_output(tmp_path / place, 10, [model], overwrite=overwrite)
    with pytest.raises(InputError, match=r"needs 1e\+03 TB, .* are free there"):
        check_output(tmp_path / "new", 10**15, [model])


def test_a_plan_is_refused_before_the_output_exists(tmp_path: Path) -> None:
    tiny.bert_models(tmp_path)
    tiny.save_model(tmp_path / "e1", without(EXPERT, QUERY))
    before = sorted(tmp_path.iterdir())
    recipe = tiny.write_recipe(tmp_path, tiny.recipe_for("iso_c"))
    with pytest.raises(InputError, match=f"e1: {QUERY} is missing"):
        merge(recipe, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == [*before, recipe]


def test_elements_take_the_memory_of_as_many_units_as_there_are_workers() -> None:
    state = {"w": torch.empty(1).expand(40 * PIECE_ELEMENTS)}
    base = from_state_dict(state, "base")
    settings = Settings("average", Model("base"), (Model("e0"), Model("e1")))

    def plan(workers: int, max_memory: int | None = None) -> Plan:
        return build_plan(settings, base, [base, base], workers=workers, max_memory=max_memory)

    one, three = plan(1), plan(3)
    unit = one.peak_bytes - process_bytes(1)
    assert one.steps == three.steps
    assert len(one.steps[0].group.units) > 3
    assert three.peak_bytes == process_bytes(3) + 3 * unit
    tight = plan(3, process_bytes(3) + 2 * unit)
    assert max(len(step.group.units) for step in tight.steps) == 2
    assert tight.peak_bytes == process_bytes(3) + 2 * unit
    assert process_bytes(9) > process_bytes(3)
    with pytest.raises(InputError, match="too little"):
        plan(3, process_bytes(3) + unit - 1)


def test_what_one_matrix_at_a_time_takes_is_counted_once() -> None:
    state = {f"layers.{i}.weight": torch.empty(1).expand(512, 2048) for i in range(4)}

    def peak(group_bytes: int) -> int:
        plan = plan_of(state, *[state] * 3, method="iso_c", group_bytes=group_bytes)
        return max(step_bytes(step, 3, 1) for step in plan.steps)

    row, elements = METHODS["iso_c"], 512 * 2048
    assert row.alone_floats(512, 2048) > 0
    unit = 4 * (6 * elements + int(row.peak_floats(512, 2048, 3)))  # deltas and base twice, base + update; the call
    assert peak(2**40) - peak(1) == 3 * unit
    assert peak(1) == unit + 4 * (3 * elements + int(row.alone_floats(512, 2048)))  # a raw tensor, two merged ones


def test_tasks_that_are_computed_side_by_side_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a single unit four threads take four tasks, each with memory of its own; of four units they take the units."""
    state = {f"layers.{i}.weight": torch.empty(1).expand(1024, 1024) for i in range(4)}

    def peak(threads: int, method: str, group_bytes: int) -> int:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        plan = plan_of(state, *[state] * 4, method=method, group_bytes=group_bytes)
        return max(step_bytes(step, 4, 1) for step in plan.steps)

    task = 4 * METHODS["tsvm"].task_floats(1024, 1024)
    assert task > 0
    assert peak(4, "tsvm", 1) - peak(1, "tsvm", 1) == 3 * task
    assert peak(4, "tsvm", 2**40) == peak(1, "tsvm", 2**40)
    assert peak(4, "iso_c", 1) == peak(1, "iso_c", 1)  # of one sum
