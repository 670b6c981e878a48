from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from isomerge.assignments import check_settings
from isomerge.errors import InputError
from isomerge.recipe import dump_recipe, load_recipe, parse_recipe
from isomerge.settings import Rule

GOOD = {
    "merge_method": "iso_cts",
    "base_model": "models/base",
    "models": [
        {"model": "models/a", "parameters": {"weight": 0.5}},
        {"model": "/absolute/b", "statistics": "b.stats.safetensors"},
    ],
    "parameters": {"alpha": 1.2, "common_space_fraction": 0.8},
    "scope": "paper",
    "rules": [
        {"filter": "*.mlp.*", "parameters": {"common_space_fraction": 0.9, "lambda": 2}},
        {"filter": "lm_head.*", "merge_method": "average"},
        {"filter": "*.bias", "keep_base": True},
    ],
    "dtype": "float64",
    "out_dtype": "bfloat16",
    "seed": 7,
}


def test_every_key_arrives(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    settings = load_recipe(path)
    assert (settings.method, settings.alpha, settings.scope, settings.seed) == ("iso_cts", 1.2, "paper", 7)
    assert settings.parameters == {"common_space_fraction": 0.8}
    assert settings.base.path == tmp_path / "models/base"  # relative to the recipe
    assert [m.path for m in settings.models] == [tmp_path / "models/a", Path("/absolute/b")]
    assert [m.weight for m in settings.models] == [0.5, 1.0]
    assert settings.models[1].statistics == "b.stats.safetensors"
    assert [m.statistics_path for m in settings.models] == [None, tmp_path / "b.stats.safetensors"]
    assert settings.rules == (
        Rule("*.mlp.*", None, {"common_space_fraction": 0.9}, 2.0, False),
        Rule("lm_head.*", "average"),
        Rule("*.bias", keep_base=True),
    )
    assert (settings.dtype, settings.out_dtype) == (torch.float64, torch.bfloat16)


def test_defaults() -> None:
    settings = parse_recipe({"merge_method": "iso_c", "base_model": "b", "models": [{"model": "e"}]}, Path("here"))
    assert (settings.alpha, settings.scope, settings.rules, settings.seed) == (1.0, "default", (), 0)
    assert (settings.dtype, settings.out_dtype) == (torch.float32, None)
    assert settings.models[0].path == Path("here/e")


def test_the_first_matching_rule_wins() -> None:
    rules = [{"filter": "a.*", "keep_base": True}, {"filter": "*.weight", "merge_method": "average"}]
    settings = parse_recipe({**GOOD, "rules": rules}, Path())
    assert [settings.rule_for(name) for name in ("a.weight", "b.weight", "b.bias")] == [0, 1, None]


@pytest.mark.parametrize("alias", ["alpha", "lambda", "scaling_factor"])
def test_aliases_of_alpha(alias: str) -> None:
    assert parse_recipe({**GOOD, "parameters": {alias: 0.3}}, Path()).alpha == 0.3


def test_a_dumped_recipe_is_the_same_merge() -> None:
    settings = parse_recipe(GOOD, Path())
    assert parse_recipe(yaml.safe_load(dump_recipe(settings)), Path()) == settings


WRONG = {
    "no experts": ({"models": []}, "models: no experts"),
    "no models key": ({"models": None}, "models: expected a valid list, got nothing"),
    "missing method": ({"merge_method": ...}, "merge_method: missing"),
    "unknown key": ({"out_dtyp": "float32"}, "out_dtyp: unknown key; did you mean `out_dtype`?"),
    "unknown key of a model": ({"models": [{"model": "a", "wieght": 1}]}, "models[0].wieght: unknown key"),
    "unknown key of a rule": ({"rules": [{"filtre": "*"}]}, "rules[0].filtre: unknown key; did you mean `filter`?"),
    "slices": ({"slices": []}, "slices: mergekit's `slices` is not supported by isomerge"),
    "tokenizer": ({"tokenizer": {}}, "mergekit's `tokenizer` is not supported"),
    "chat_template": ({"chat_template": "auto"}, "mergekit's `chat_template` is not supported"),
    "two alphas": ({"parameters": {"alpha": 1, "lambda": 1}}, "`alpha` and `lambda` are the same parameter"),
    "alphas that are equal": ({"parameters": {"alpha": [1, 1.0]}}, "parameters.alpha: expected a number or a list of"),
    "alpha not finite": ({"parameters": {"alpha": float("nan")}}, "parameters.alpha: expected a finite number"),
    "alpha a boolean": ({"parameters": {"alpha": True}}, "parameters.alpha: expected a finite number, got True"),
    "alpha as YAML text": ({"parameters": {"alpha": "1e-1"}}, "text in YAML: write 0.1"),
    "weight": ({"models": [{"model": "a", "parameters": {"weight": "x"}}]}, "models[0].parameters.weight: expected"),
    "density per model": ({"models": [{"model": "a", "parameters": {"density": 1}}]}, "models[0].parameters.density:"),
    "model a mapping": ({"models": [{"model": {"path": "a"}}]}, "models[0].model: expected a valid string, got a mapp"),
    "models not a list": ({"models": {"model": "a"}}, "models: expected a valid list, got a mapping"),
    "scope": ({"scope": "papers"}, "scope: expected 'default' or 'paper', got 'papers'"),
    "dtype": ({"dtype": "bfloat16"}, "dtype: expected 'float32' or 'float64', got 'bfloat16'"),
    "seed": ({"seed": 1.5}, "seed: expected"),
    "empty rule": ({"rules": [{"filter": "*"}]}, "rules[0]: changes nothing"),
    "keep and merge": ({"rules": [{"filter": "*", "keep_base": True, "merge_method": "ties"}]}, "rules[0]: keep_base"),
    "keep false": ({"rules": [{"filter": "*", "keep_base": False}]}, "rules[0].keep_base: expected True"),
    "unknown method": ({"merge_method": "iso_ct"}, "merge_method: unknown method 'iso_ct' (did you mean iso_cts?)"),
    "unknown parameter": ({"parameters": {"comon_space_fraction": 0.5}}, "(did you mean common_space_fraction?)"),
    "fraction": ({"parameters": {"common_space_fraction": 1.2}}, "parameters.common_space_fraction: expected a value"),
    "method of a rule": ({"rules": [{"filter": "*", "merge_method": "tie"}]}, "rules[0].merge_method: unknown method"),
    "parameter of a rule": (
        {"rules": [{"filter": "*", "merge_method": "ties", "parameters": {"density": 2}}]},
        "rules[0].parameters.density: expected a value from 0 to 1, got 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line_that_names_the_key(case: str) -> None:
    change, expected = WRONG[case]
    data = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    with pytest.raises(InputError) as caught:
        check_settings(parse_recipe(data, Path(), source="recipe.yaml"))
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ")
    assert expected in message
    assert "\n" not in message


def test_parameters_of_the_recipe_belong_to_its_own_method() -> None:
    rules = [{"filter": "*.mlp.*", "merge_method": "ties"}]  # would refuse common_space_fraction
    check_settings(parse_recipe({**GOOD, "rules": rules}, Path()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("merge_method: a\nmerge_method: b\n", "line 2, column 1: not valid YAML: the key `merge_method` twice"),
        ("models: [{model: a, model: b}]\n", "the key `model` twice"),
        ("merge_method: [unclosed\n", "not valid YAML"),
        ("rules: [{filter: *.mlp}]\n", "not valid YAML"),
        ("", "expected keys such as `merge_method:`"),
        ("- a\n- b\n", "got a list"),
        ("!!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith("broken.yaml: ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such recipe file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(InputError, match="cannot be read as a recipe"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as a recipe"):
        load_recipe(tmp_path / "binary.yaml")
