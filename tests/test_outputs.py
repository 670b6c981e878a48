"""A list of alphas: as many outputs from one pass over the models, each with the bytes of a merge of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from killed import content

from isomerge.checkpoint import open_checkpoint
from isomerge.errors import InputError
from isomerge.merge import merge, merge_state_dicts, open_job
from isomerge.recipe import load_recipe

ALPHAS = [0.8, 1, 1.25]


def save(folder: Path) -> None:
    states = tiny.bert_models(folder)
    for t, state in enumerate(states[1:]):
        tiny.save_statistics(folder / f"s{t}", states[0], state, tiny.second_moments(states[0], state, t))


def recipe_of(folder: Path, method: str, **change: object) -> Path:
    recipe = tiny.recipe_for(method, **change)
    if method == "esm":
        recipe["models"] = [{"model": f"e{t}", "statistics": f"s{t}"} for t in range(3)]
    return tiny.write_recipe(folder, recipe)


@pytest.mark.parametrize("method", ["iso_c", "esm", "dare_ties", "average"])
def test_each_output_is_that_of_its_own_merge(tmp_path: Path, method: str) -> None:
    save(tmp_path)
    rules = [
        {"filter": "embeddings.*", "keep_base": True},
        {"filter": "pooler.*", "parameters": {"alpha": 2.0}},
    ]
    report = merge(recipe_of(tmp_path, method, rules=rules, parameters={"alpha": ALPHAS}), tmp_path / "all")
    assert sorted(entry.name for entry in (tmp_path / "all").iterdir()) == ["alpha-0.8", "alpha-1.0", "alpha-1.25"]
    for index, alpha in enumerate(ALPHAS):
        one = merge(recipe_of(tmp_path, method, rules=rules, parameters={"alpha": alpha}), tmp_path / f"{alpha}")
        folder = tmp_path / "all" / f"alpha-{float(alpha)}"
        assert content(folder) == content(tmp_path / f"{alpha}")
        assert load_recipe(folder / "isomerge_recipe.yaml").alpha == alpha
        written = json.loads((folder / "isomerge_report.json").read_text())
        assert written["settings"]["parameters"]["alpha"] == alpha
        for mine, theirs, record in zip(written["tensors"], one.tensors, report.tensors, strict=True):
            assert (mine["alpha"], mine["update_norm"]) == (theirs.alpha, theirs.update_norm)
            assert record.alpha is None or record.alpha[index] == theirs.alpha  # type: ignore[index]
        assert report.totals.bytes_read == one.totals.bytes_read, "one pass over the inputs"
        assert report.totals.bytes_written == len(ALPHAS) * one.totals.bytes_written
        with open_checkpoint(folder) as checkpoint:
            assert len(checkpoint.tensors) == 28


def test_the_plan_counts_every_output(tmp_path: Path) -> None:
    save(tmp_path)
    with open_job(recipe_of(tmp_path, "iso_c")) as job:
        one = job.plan
    with open_job(recipe_of(tmp_path, "iso_c", parameters={"alpha": ALPHAS})) as job:
        three = job.plan
    assert three.bytes_written == 3 * one.bytes_written == sum(t.bytes_written for t in three.by_method.values())
    assert three.disk_bytes == 3 * one.disk_bytes
    assert (three.bytes_read, three.flops) == (one.bytes_read, one.flops)
    assert three.peak_bytes > one.peak_bytes  # what is merged waits to be written


def test_a_list_of_one_is_a_list(tmp_path: Path) -> None:
    save(tmp_path)
    merge(recipe_of(tmp_path, "iso_c", parameters={"lambda": [1]}), tmp_path / "out")
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["alpha-1.0"]
    assert yaml.safe_load((tmp_path / "out" / "alpha-1.0" / "isomerge_recipe.yaml").read_text())["parameters"] == {
        "alpha": 1.0
    }


def test_replacing_several_outputs_by_one_and_back(tmp_path: Path) -> None:
    save(tmp_path)
    several, out = recipe_of(tmp_path, "iso_c", parameters={"alpha": ALPHAS}), tmp_path / "out"
    merge(several, out)
    with pytest.raises(InputError, match="exists already"):
        merge(several, out)
    merge(recipe_of(tmp_path, "iso_c"), out, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "alpha-0.8").exists()
    merge(recipe_of(tmp_path, "iso_c", parameters={"alpha": ALPHAS}), out, overwrite=True)
    assert sorted(entry.name for entry in out.iterdir()) == ["alpha-0.8", "alpha-1.0", "alpha-1.25"]


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        ([], r"parameters\.alpha: expected a number or a list of different ones, got \[\]"),
        ([1, 1.0], r"parameters\.alpha: expected a number or a list of different ones, got \[1, 1\.0\]"),
        ([1, "x"], r"parameters\.alpha\[1\]: expected a finite number, got 'x'"),
        ([[1]], r"parameters\.alpha\[0\]: expected one number, got a list"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, alpha: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_recipe(recipe_of(tmp_path, "iso_c", parameters={"alpha": alpha}))


def test_where_one_alpha_is_expected(tmp_path: Path) -> None:
    rules = [{"filter": "*", "parameters": {"alpha": [1, 2]}}]
    with pytest.raises(InputError, match=r"rules\[0\]\.parameters\.alpha: expected one number, got a list"):
        load_recipe(recipe_of(tmp_path, "iso_c", rules=rules))
    states = [tiny.bert_state(seed) for seed in range(2)]
    with pytest.raises(InputError, match=r"merge_state_dicts: parameters\.alpha: expected one number"):
        merge_state_dicts(states[0], [states[1]], method="iso_c", alpha=[1, 2])
