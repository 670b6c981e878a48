"""Recipes: changed as data, written out in one style or another, then changed as text."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import yaml

from isomerge.assignments import check_settings
from isomerge.methods import METHODS
from isomerge.recipe import dump_recipe, load_recipe

from . import mutate

_TOKENS = (
    *("&a ", "*a", "<<: ", "<<: *a", "!!int ", "!!float ", "!!bool ", "!!timestamp ", "!!binary ", "!!set ", "!!str "),
    *("!!omap ", "!!map ", "!x ", "!!python/name:os.system ", "!!python/object/apply:os.system ['true'] "),
    *(
        "|\n  ",
        ">\n  ",
        "---\n",
        "...\n",
        "%YAML 9.9\n",
        "# ",
        "? ",
        ": ",
        "- ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        '"',
        "\\",
    ),
    *('"\\U00110000"', '"\\ud800"', '"\\0"', '"\\x1b[2J"', '"\\n"', "\t", "\r", "\x85", "\u2028", "\ufeff", "\0", "é"),
    *("~", "~nobody/x", "1e-3", ".nan", "-.inf", "0x" + "f" * 5000, "9" * 400, "9" * 5000, "0b_", "0o7", "190:20:30"),
    *(
        "2001-99-99",
        "2001-01-01",
        "1_000",
        "._",
        "yes",
        "off",
        "=",
        "null",
        "[" * 60,
        "[" * 3000,
        "{a: " * 400,
        "- " * 900,
    ),
    *("a" * 2000, "😀", "\n", "\n  ", "\n    ", "\nrules:\n", "\nseed: "),
)
_PIECES = tuple(token.encode("utf-8") for token in _TOKENS)


def _ninefold(value: str) -> str:
    """Ten keys, each nine times the one before."""
    keys = zip("abcdefghi", "bcdefghij", strict=True)
    return "a: &a {x: 1}\n" + "".join(
        f"{new}: &{new} {value.format(', '.join([f'*{old}'] * 9))}\n" for old, new in keys
    )


_BOMBS = (_ninefold("[{}]"), _ninefold("{{<<: [{}]}}"), _ninefold("{{x: [{}]}}"))


class Recipes:
    """An accepted recipe can be written out and read again to the same settings."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "recipe.yaml"

    def make(self, random: Random) -> bytes:
        root = mutate.tree(_recipe(random))
        for _ in range(random.choice((0, 0, 1, 1, 2, 3))):
            root = mutate.change(root, random)
        content = mutate.text(root, random)
        if random.random() < 0.7:
            content = _block_style(content)
        if random.random() < 0.02:
            content += (
                "\n"
                + random.choice(_BOMBS)
                + random.choice(("", "parameters: {alpha: *j}\n", "models: *j\n", "seed: *j\n", "? *j\n: 1\n"))
            )
        raw = content.encode("utf-8", "surrogatepass")
        return mutate.scramble(raw, random, _PIECES) if random.random() < 0.6 else raw

    def check(self, content: bytes) -> str:
        self._path.write_bytes(content)
        settings = load_recipe(self._path)
        check_settings(settings)
        before = self._path.read_bytes()
        self._path.write_text(dump_recipe(settings), encoding="utf-8")
        again = load_recipe(self._path)
        assert again == settings, f"written out and read again it is another merge: {before!r}"
        return settings.method


def _recipe(random: Random) -> dict[str, object]:
    method = random.choice(list(METHODS))
    keys: dict[str, object] = {"merge_method": method, "base_model": random.choice(("base", "/abs/base", "~/x", "a b"))}
    keys["models"] = [_model(random) for _ in range(random.choice((1, 1, 2, 3)))]
    if random.random() < 0.6:
        keys["parameters"] = _parameters(method, random)
    if random.random() < 0.4:
        keys["rules"] = [_rule(random) for _ in range(random.choice((0, 1, 2)))]
    for name, values in {
        "scope": ("default", "paper", "papers"),
        "dtype": ("float32", "float64", "bfloat16"),
        "out_dtype": ("bfloat16", "float16", "float32", None),
        "seed": (0, 1, -1, 2**40, True, 1.5),
    }.items():
        if random.random() < 0.3:
            keys[name] = random.choice(values)
    if random.random() < 0.1:
        keys[random.choice(("slices", "tokenizer", "out_dtyp", "chat_template", ""))] = random.choice((1, [], {}, "x"))
    return keys


def _model(random: Random) -> dict[str, object]:
    model: dict[str, object] = {"model": random.choice(("a", "b.safetensors", "c/d.pt", "é"))}
    if random.random() < 0.3:
        model["parameters"] = {"weight": random.choice((0.5, 1, -2.0, "x", 1e300))}
    if random.random() < 0.5:
        model["statistics"] = "s.stats.safetensors"
    return model


def _rule(random: Random) -> dict[str, object]:
    rule: dict[str, object] = {"filter": random.choice(("*", "*.mlp.*", "lm_head.*", "[", ""))}
    if random.random() < 0.5:
        return {**rule, "keep_base": True}
    method = random.choice(list(METHODS))
    return {**rule, "merge_method": method, "parameters": _parameters(method, random)}


def _parameters(method: str, random: Random) -> dict[str, object]:
    found: dict[str, object] = {}
    if random.random() < 0.7:
        found[random.choice(("alpha", "lambda", "scaling_factor"))] = random.choice((1, 0.5, 1.2, -1, 1e-9, "1e-3"))
    for parameter in METHODS[method].parameters:
        if random.random() < 0.5:
            found[parameter.name] = random.choice((0.5, 1, 0, 2, parameter.default))
    return found


def _block_style(content: str) -> str:
    """The same recipe in YAML's block style, where it is still JSON."""
    try:
        return yaml.safe_dump(json.loads(content), sort_keys=False, allow_unicode=True)
    except (ValueError, RecursionError, yaml.YAMLError):
        return content
