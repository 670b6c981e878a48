"""`isomerge inspect`: its numbers against SVDs of the feature shifts themselves, its tables, pictures and errors."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from command_line import COMMAND, Run, read_terminal
from matplotlib.colors import to_rgb
from PIL import Image
from safetensors.torch import save_file
from test_cli import tree
from torch import Tensor

from isomerge.checkpoint import from_state_dict
from isomerge.errors import InputError
from isomerge.inspect import inspect
from isomerge.inspect.energy import GRID, Kept, kept, spectrum
from isomerge.statistics import Layer, fingerprint, write_statistics

State = dict[str, Tensor]
QUERY, KEY, INNER, OUTPUT, POOLER = (
    "encoder.layer.0.attention.self.query.weight",
    "encoder.layer.0.attention.self.key.weight",
    "encoder.layer.0.intermediate.dense.weight",
    "encoder.layer.0.output.dense.weight",
    "pooler.dense.weight",
)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(tokens: int, n: int, seed: int = 0) -> Tensor:
    """Inputs whose directions have different energies."""
    return normal(tokens, n, seed=seed) @ torch.diag(torch.linspace(0.1, 3, n, dtype=torch.float64))


def expected(X: Tensor, delta: Tensor, s: int) -> tuple[float, float, float]:
    """The three shares by definition: SVDs of the shifts Y = X Δᵀ and of Δ, in float64."""
    X, delta = X.double(), delta.double()
    Y = X @ delta.mT
    shifts = torch.linalg.svdvals(Y).square()
    U, sigma, _ = torch.linalg.svd(delta, full_matrices=False)
    projected = Y @ U[:, :s]
    squares = sigma.square()
    return (
        float(shifts[:s].sum() / shifts.sum()),
        float(squares[:s].sum() / squares.sum()),
        float(projected.square().sum() / Y.square().sum()),
    )


def energies(found: Kept | None) -> tuple[float | None, float | None, float | None]:
    assert found is not None
    return found.esd, found.svd, found.svd_shift


# One layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("space", ["input", "output"])
@pytest.mark.parametrize(("m", "n", "tokens"), [(24, 24, 60), (20, 33, 60), (40, 18, 60), (30, 30, 11)])
def test_kept_energy_is_that_of_the_shifts(m: int, n: int, tokens: int, space: str, dtype: torch.dtype) -> None:
    X, delta = inputs(tokens, n), normal(m, n, seed=1)
    Y = X if space == "input" else X @ delta.mT
    moment = (Y.mT @ Y).to(dtype)
    for s in (1, 5, m // 2, m):
        found = kept(delta, moment, space, s)
        assert energies(found) == pytest.approx(expected(X, delta, s), abs=1e-6 if dtype is torch.float32 else 1e-12)
        assert found.s == s
        assert found.rank == min(m, n, tokens)


def test_what_svd_keeps_of_the_shifts_is_never_more_than_esd() -> None:
    X, delta = inputs(50, 20), normal(30, 20, seed=1)
    for s in range(1, 31):
        found = kept(delta, X.mT @ X, "input", s)
        assert found.esd is not None
        assert found.svd_shift is not None
        assert found.svd_shift <= found.esd + 1e-12


def test_equal_inputs_in_all_directions_make_esd_the_svd() -> None:
    found = kept(normal(12, 9, seed=1), torch.eye(9), "input", 4)
    assert found.esd == pytest.approx(found.svd, abs=1e-6)
    assert found.svd_shift == pytest.approx(found.svd, abs=1e-6)


def test_energies_do_not_depend_on_scale() -> None:
    X, delta = inputs(50, 20), normal(16, 20, seed=1)
    for space, Y in (("input", X), ("output", X @ delta.mT)):
        small, large = (kept(delta * size, Y.mT @ Y * 1e30, space, 5) for size in (1e-12, 1e9))
        assert energies(small) == pytest.approx(expected(X, delta, 5), abs=1e-9)
        assert energies(large) == pytest.approx(energies(small), abs=1e-12)


def test_curves_pass_through_the_energies() -> None:
    X, delta = inputs(50, 20), normal(40, 20, seed=1)
    found = kept(delta, X.mT @ X, "input", 8)
    ideal = [expected(X, delta, k) for k in range(41)]
    for which, curve in enumerate(found.curves):
        assert len(curve) == len(GRID)
        assert list(curve) == sorted(curve)
        assert curve[-1] == pytest.approx(1)
        for share, value in zip(GRID, curve, strict=True):
            below = min(39, int(share * 40))
            low, high = ideal[below][which], ideal[below + 1][which]
            assert value == pytest.approx(low + (share * 40 - below) * (high - low), abs=1e-9)


def test_without_energy_there_is_no_share() -> None:
    moment = inputs(30, 8).mT @ inputs(30, 8)
    nothing = kept(torch.zeros(6, 8), moment, "input", 2)
    assert energies(nothing) == (None, None, None)
    assert nothing.curves == ((), (), ())
    unseen = kept(normal(6, 8), torch.zeros(8, 8), "input", 2)
    assert (unseen.esd, unseen.svd_shift, unseen.rank) == (None, None, 0)
    assert unseen.svd == pytest.approx(expected(torch.eye(8), normal(6, 8), 2)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spectrum(dtype: torch.dtype) -> None:
    X = inputs(50, 200)
    found = spectrum((X.mT @ X).to(dtype))
    values = torch.linalg.svdvals(X).square()
    assert found.rank == 50  # as many as there are tokens
    assert found.leading is not None
    for share, count in zip(found.leading, (2, 10, 25), strict=True):
        assert share == pytest.approx(float(values[:count].sum() / values.sum()), abs=1e-5)
    assert found.curve[0] == 1
    at_ten_percent = found.curve[min(range(len(GRID)), key=lambda i: abs(GRID[i] - 0.0995))]
    assert at_ten_percent == pytest.approx(float(values[18] / values[0]), rel=0.2)
    assert found.curve[-1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_spectrum_of_inputs_is_that_of_their_moment(dtype: torch.dtype) -> None:
    X = inputs(50, 200).to(dtype)
    found, same = spectrum(X), spectrum((X.double().mT @ X.double()).float())
    assert found.rank == same.rank == 50
    assert found.leading == pytest.approx(same.leading, abs=1e-6)
    assert found.curve == pytest.approx(same.curve, abs=1e-6)
    assert spectrum(torch.full((3, 8), 1e30, dtype=torch.float32)).rank == 1  # whose moment overflows
    assert spectrum(torch.zeros(3, 8)).leading is None


def test_the_rank_of_a_float32_moment_is_above_its_rounding() -> None:
    Q, _ = torch.linalg.qr(normal(20, 20))
    moment = Q @ torch.diag(torch.tensor([1.0] * 4 + [1e-4] * 5 + [1e-9] * 11, dtype=torch.float64)) @ Q.mT
    assert spectrum(moment.float()).rank == 9
    assert spectrum(moment).rank == 20


def test_the_spectrum_of_a_zero_moment() -> None:
    found = spectrum(torch.zeros(5, 5))
    assert (found.rank, found.leading, found.curve) == (0, None, ())


# Files ------------------------------------------------------------------------------------------------------------


def inputs_of(name: str, state: State, seed: int, tokens: int) -> Tensor:
    """Inputs of a layer in one expert; query, key and value have the same."""
    place = sorted(tiny.matrices(state)).index(tiny.read_from(name))
    return inputs(tokens, state[name].shape[1], seed=100 * seed + place)


def save(
    folder: Path,
    experts: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    output: str = "output.dense",
    tokens: int = 30,
) -> list[State]:
    """Models below `folder` and their statistics `s0.safetensors`, ..; layers with `output` in their name by shifts."""
    states = tiny.bert_models(folder, experts, dtype)
    for i, expert in enumerate(states[1:]):
        moments = {}
        for name in tiny.matrices(expert):
            Y = inputs_of(name, expert, i, tokens)
            if output in name and len(set(expert[name].shape)) == 2:
                Y = Y @ (expert[name].double() - states[0][name].double()).mT
            moments[name] = (Y.mT @ Y).float()
        tiny.save_statistics(folder / f"s{i}.safetensors", states[0], expert, moments, tokens=tokens)
    return states


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path)
    return tmp_path


def pair(folder: Path) -> list[str | Path]:
    """The arguments for both files with their models."""
    models: list[str | Path] = ["--base", folder / "base", "--model", folder / "e0", "--model", folder / "e1"]
    return [folder / "s0.safetensors", folder / "s1.safetensors", *models]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_and_models(tmp_path: Path, dtype: torch.dtype) -> None:
    states = save(tmp_path, 3, dtype=dtype)
    seen: list[tuple[int, int, str]] = []
    found = inspect(
        [tmp_path / f"s{i}.safetensors" for i in range(3)],
        base=tmp_path / "base",
        models=[tmp_path / f"e{i}" for i in range(3)],
        progress=lambda *state: seen.append(state),
    )
    assert found.tasks == 3
    for i, file in enumerate(found.files):
        assert (file.samples, file.tokens, file.moments, file.warnings) == (4, 30, 9, [])
        assert set(file.layers) == set(tiny.matrices(states[0]))
        for name, layer in file.layers.items():
            delta = states[i + 1][name].double() - states[0][name].double()
            assert (layer.m, layer.n) == delta.shape
            assert layer.layer.space == (
                "output" if name.endswith("1.output.dense.weight") or name == OUTPUT else "input"
            )
            X = inputs_of(name, states[0], i, 30)
            assert energies(layer.kept) == pytest.approx(expected(X, delta, delta.shape[0] // 3), abs=1e-5)
            assert layer.kept is not None
            assert layer.kept.s == delta.shape[0] // 3
    assert [state[:2] for state in seen] == [(k + 1, 39) for k in range(39)]
    assert {state[2] for state in seen} == set(tiny.matrices(states[0]))


def test_tasks_set_the_rank(saved: Path) -> None:
    found = inspect([saved / "s0.safetensors"], base=saved / "base", models=[saved / "e0"], tasks=5)
    layers = found.files[0].layers
    assert (found.tasks, layers[QUERY].kept.s, layers[INNER].kept.s) == (5, 16 // 5, 24 // 5)  # type: ignore[union-attr]


def test_files_alone(saved: Path) -> None:
    found = inspect([saved / "s0.safetensors", saved / "s1.safetensors"])
    assert (found.tasks, found.base) == (None, None)
    for i, file in enumerate(found.files):
        layer = file.layers[INNER]
        values = torch.linalg.svdvals(inputs_of(INNER, tiny.load_output(saved / f"e{i}"), i, 30)).square()
        assert layer.figures["leading_12.5"] == pytest.approx(float(values[:2].sum() / values.sum()), abs=1e-5)
        assert (layer.layer.tokens, layer.layer.space, layer.layer.size, layer.rank) == (30, "input", 16, 16)
        assert file.layers[QUERY].spectrum is file.layers[KEY].spectrum  # one moment, looked at once
        assert [names for names in file.shared if QUERY in names] == [
            [KEY, QUERY, "encoder.layer.0.attention.self.value.weight"]
        ]


def test_summaries_by_layer_type(saved: Path) -> None:
    (file,) = inspect([saved / "s0.safetensors"], base=saved / "base", models=[saved / "e0"], tasks=2).files
    types = file.types
    assert len(types) == 8
    queries = [file.layers[QUERY.replace("0", block)].kept for block in "01"]
    found = types["encoder.layer.*.attention.self.query.weight"]
    assert found.layers == 2
    values = [layer.esd for layer in queries if layer is not None and layer.esd is not None]
    assert found.mean["esd"] == pytest.approx(sum(values) / 2)
    assert found.least["esd"] == min(values)
    assert types["all"].layers == 13
    assert types["all"].least["svd"] == min(layer.figures["svd"] or 1 for layer in file.layers.values())


def test_natural_order(tmp_path: Path) -> None:
    layers = {f"layer.{i}.weight": Layer(3, "input", 4, f"layer.{i}.weight") for i in range(12)}
    write_statistics(tmp_path / "s", {name: torch.eye(4) for name in layers}, layers, samples=1, fingerprint="x")
    (file,) = inspect([tmp_path / "s"]).files
    assert list(file.layers) == list(layers)


def test_weights_stored_in_out(tmp_path: Path) -> None:
    """GPT-2 stores [in, out]: Δ is the transpose of what is stored."""
    name = "h.0.attn.c_attn.weight"
    base = {name: normal(8, 24, dtype=torch.float32)}
    expert = {name: base[name] + normal(8, 24, seed=1, dtype=torch.float32)}
    for folder, state in (("base", base), ("e0", expert)):
        tiny.save_model(tmp_path / folder, state)
    X = inputs(40, 8)
    write_statistics(
        tmp_path / "s",
        {name: X.mT @ X},
        {name: Layer(40, "input", 8, name)},
        samples=1,
        fingerprint=fingerprint(from_state_dict(expert, "e"), [name]),
    )
    (file,) = inspect([tmp_path / "s"], base=tmp_path / "base", models=[tmp_path / "e0"], tasks=6).files
    layer = file.layers[name]
    assert (layer.m, layer.n) == (24, 8)
    delta = (expert[name].double() - base[name].double()).mT
    assert energies(layer.kept) == pytest.approx(expected(X, delta, 4), abs=1e-7)


def test_an_expert_equal_to_the_base_in_a_layer(tmp_path: Path) -> None:
    states = tiny.bert_models(tmp_path, 1)
    expert = {**states[1], POOLER: states[0][POOLER]}
    tiny.save_model(tmp_path / "e0", expert)
    moments = tiny.second_moments(states[0], expert, 0)
    tiny.save_statistics(tmp_path / "s", states[0], expert, moments)
    found = inspect([tmp_path / "s"], base=tmp_path / "base", models=[tmp_path / "e0"], tasks=2)
    (file,) = found.files
    assert energies(file.layers[POOLER].kept) == (None, None, None)
    assert file.types[POOLER].mean["esd"] is None
    assert file.types["all"].mean["esd"] is not None
    assert len(file.curve(0)) == len(GRID)
    assert json.loads(json.dumps(found.data(), allow_nan=False))["files"][0]["layers"][POOLER]["esd"] is None


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    states = save(tmp_path, 1, tokens=5)
    tiny.save_model(tmp_path / "base", {name: value for name, value in states[0].items() if name != POOLER})
    (file,) = inspect([tmp_path / "s0.safetensors"], base=tmp_path / "base", models=[tmp_path / "e0"], tasks=2).files
    assert POOLER not in file.layers
    assert len(file.layers) == 12
    few, left = sorted(file.warnings)
    assert few.startswith("12 layers saw fewer tokens than directions are kept: 5 tokens for ")
    assert left == f"{POOLER} is left out: the base {tmp_path / 'base'} does not have it"


# The command ------------------------------------------------------------------------------------------------------


def rows(text: str) -> dict[str, list[str]]:
    """First word of a line -> the others; of the first line that starts with it."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if words := line.split():
            found.setdefault(words[0], words[1:])
    return found


def test_the_tables_hold_the_numbers(saved: Path, run: Run) -> None:
    before = tree(saved)
    done = run("inspect", *pair(saved))
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout[: done.stdout.index("s1.safetensors of")]
    found = inspect(
        [saved / f"s{i}.safetensors" for i in (0, 1)], base=saved / "base", models=[saved / "e0", saved / "e1"]
    )
    for name, layer in found.files[0].layers.items():
        shares = [f"{100 * value:.1f}" for value in energies(layer.kept) if value is not None]
        assert rows(first)[name] == [
            "30", layer.layer.space, f"{layer.m}x{layer.n}", str(layer.m // 2), str(layer.rank), *shares,
        ]  # fmt: skip
    total = found.files[0].types["all"]
    pairs = [
        w
        for key in total.mean
        for w in (f"{100 * (total.mean[key] or 0):.1f}", "/", f"{100 * (total.least[key] or 0):.1f}")
    ]
    assert rows(first)["all"] == ["13", *pairs]
    assert "one moment for encoder.layer.*.attention.self.key.weight, " in first
    assert "(2 times)" in first
    assert "s = floor(m / 2) directions" in done.stdout
    assert tree(saved) == before


def test_the_table_of_a_file_alone(saved: Path, run: Run) -> None:
    done = run("inspect", saved / "s0.safetensors")
    assert (done.returncode, done.stderr) == (0, "")
    (file,) = inspect([saved / "s0.safetensors"]).files
    for name, layer in file.layers.items():
        assert rows(done.stdout)[name] == [
            "30",
            layer.layer.space,
            "16",
            str(layer.rank),
            *(f"{100 * (value or 0):.1f}" for value in layer.figures.values()),
        ]
    assert "4 samples, up to 30 tokens; 13 layers, 9 moments" in done.stdout


def test_json(saved: Path, run: Run) -> None:
    data = json.loads(run("inspect", *pair(saved), "--tasks", "4", "--json").stdout)
    assert (data["tasks"], data["base"], len(data["files"])) == (4, str(saved / "base"), 2)
    found = inspect(
        [saved / f"s{i}.safetensors" for i in (0, 1)],
        base=saved / "base",
        models=[saved / "e0", saved / "e1"],
        tasks=4,
    )
    assert data == json.loads(json.dumps(found.data()))
    layer = data["files"][1]["layers"][INNER]
    assert (layer["m"], layer["n"], layer["s"], layer["size"]) == (24, 16, 6, 16)
    assert layer["esd"] == energies(found.files[1].layers[INNER].kept)[0]
    assert data["files"][0]["curves"]["share"] == list(GRID)
    alone = json.loads(run("inspect", saved / "s0.safetensors", "--json").stdout)
    assert set(alone["files"][0]["layers"][QUERY]) == {
        "tokens", "space", "size", "stored", "rank", "leading_1", "leading_5", "leading_12.5",
    }  # fmt: skip


def on_a_terminal(columns: int, *arguments: str | Path) -> str:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns)}
    command = [*COMMAND, *map(str, arguments)]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as child:
        os.close(theirs)
        shown = read_terminal(ours)
        _, errors = child.communicate()
    assert child.returncode == 0, errors
    return shown.decode()


def test_names_are_shortened_on_narrow_terminals_alone(
    saved: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    narrow = on_a_terminal(80, "inspect", saved / "s0.safetensors")
    table = [line.rstrip() for line in narrow.splitlines() if " input " in line]
    assert len(table) == 11
    assert all(len(line) <= 80 for line in table)
    assert "e.l.0.a.self.query.weight" in {line.split()[0] for line in table}
    assert len({line.split()[0] for line in table}) == 11  # still told apart
    assert QUERY in on_a_terminal(140, "inspect", saved / "s0.safetensors")
    monkeypatch.setenv("COLUMNS", "40")
    assert QUERY in rows(run("inspect", saved / "s0.safetensors").stdout)


def foreign(folder: Path) -> None:
    shutil.rmtree(folder / "e1")
    shutil.copytree(folder / "e0", folder / "e1")


def another_base(folder: Path) -> None:
    tiny.save_model(folder / "base", tiny.bert_state(7))


def change(folder: Path, model: str, name: str, value: Tensor) -> None:
    tiny.save_model(folder / model, {**tiny.load_output(folder / model), name: value})


def only(folder: Path, *more: str | Path) -> list[str | Path]:
    return [folder / "s0.safetensors", *more]


def nothing(folder: Path) -> None:
    pass


ERRORS: dict[str, tuple[Callable[[Path], object], Callable[[Path], list[str | Path]], str]] = {
    "missing file": (nothing, lambda f: [f / "s9"], "s9: no such file"),
    "a folder": (nothing, lambda f: [f / "e0"], "e0: this is a folder, expected a statistics file"),
    "a model": (nothing, lambda f: [f / "e0" / "model.safetensors"], "model.safetensors: not a statistics file"),
    "no model": (nothing, lambda f: only(f, "--base", f / "base"), "which are 1, got 0"),
    "no base": (nothing, lambda f: only(f, "--model", f / "e0"), "models are given and no base"),
    "missing base": (nothing, lambda f: only(f, "--base", f / "b", "--model", f / "e0"), "b: no such file or folder"),
    "missing model": (nothing, lambda f: only(f, "--base", f / "base", "--model", f / "e9"), "e9: no such file"),
    "models and files": (nothing, lambda f: pair(f)[:-2], "which are 2, got 1"),
    "tasks alone": (nothing, lambda f: only(f, "--tasks", "2"), "tasks are given and no models"),
    "no tasks": (nothing, lambda f: [*pair(f), "--tasks", "0"], "tasks: expected at least 1, got 0"),
    "too many tasks": (nothing, lambda f: [*pair(f), "--tasks", "17"], "17 tasks for 16 rows"),
    "tasks in letters": (nothing, lambda f: [*pair(f), "--tasks", "two"], "--tasks"),
    "foreign model": (foreign, pair, "s1.safetensors: statistics of another model"),
    "foreign base": (another_base, pair, "s0.safetensors: statistics of "),
    "foreign order": (
        nothing,
        lambda f: [*pair(f)[:2], "--base", f / "base", "--model", f / "e1", "--model", f / "e0"],
        "s0.safetensors: statistics of another model",
    ),
    "no layer in common": (
        lambda f: (save(f, output="-"), tiny.save_model(f / "base", {"other": torch.zeros(2, 2)})),
        pair,
        "base has none of its layers",
    ),
    "shape": (lambda f: change(f, "base", QUERY, torch.zeros(8, 16)), pair, f"{QUERY}: shape [16, 16], the base"),
    "integers": (
        lambda f: change(f, "base", QUERY, torch.zeros(16, 16, dtype=torch.int8)),
        pair,
        f"base: {QUERY}: stored as int8",
    ),
    "NaN": (
        lambda f: change(f, "base", QUERY, torch.full((16, 16), torch.nan)),
        pair,
        f"base: {QUERY}: 256 non-finite values",
    ),
    "png elsewhere": (nothing, lambda f: only(f, "--png", f / "no" / "a.png"), "is not a folder"),
    "png a folder": (lambda f: (f / "a.png").mkdir(), lambda f: only(f, "--png", f / "a.png"), "this is a folder"),
    "png another kind": (nothing, lambda f: only(f, "--png", f / "s1.safetensors"), "must end in .png"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_input_exits_2_with_one_line_and_writes_nothing(
    saved: Path,
    case: str,
    run: Run,
) -> None:
    spoil, arguments, message = ERRORS[case]
    spoil(saved)
    before = tree(saved)
    extra = [] if case.startswith("png") else ["--png", saved / "a.png"]
    done = run("inspect", *arguments(saved), *extra)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("isomerge: ")
    assert message in line
    assert done.stdout == ""
    assert tree(saved) == before


def test_a_moment_that_does_not_fit_the_layer(tmp_path: Path) -> None:
    base = {"a.weight": normal(6, 4, dtype=torch.float32)}
    for folder, state in (("base", base), ("e0", base)):
        tiny.save_model(tmp_path / folder, state)
    digest = fingerprint(from_state_dict(base, "e"), base)
    layers = {"a.weight": Layer(9, "input", 5, "a.weight")}
    write_statistics(tmp_path / "s", {"a.weight": torch.eye(5)}, layers, samples=1, fingerprint=digest)
    with pytest.raises(InputError, match=r"a\.weight: second moments \[5, 5\] .* for a layer of 6 x 4"):
        inspect([tmp_path / "s"], base=tmp_path / "base", models=[tmp_path / "e0"])


def test_a_stack_of_matrices_is_left_out(tmp_path: Path) -> None:
    base = {"a.weight": normal(6, 4, dtype=torch.float32), "experts.up_proj": torch.zeros(2, 4, 4)}
    expert = {"a.weight": base["a.weight"] + 1, "experts.up_proj": torch.ones(2, 4, 4)}
    for folder, state in (("base", base), ("e0", expert)):
        tiny.save_model(tmp_path / folder, state)
    digest = fingerprint(from_state_dict(expert, "e"), base)
    layers = {name: Layer(9, "input", 4, name) for name in base}
    write_statistics(tmp_path / "s", dict.fromkeys(base, torch.eye(4)), layers, samples=1, fingerprint=digest)
    (file,) = inspect([tmp_path / "s"], base=tmp_path / "base", models=[tmp_path / "e0"]).files
    assert list(file.layers) == ["a.weight"]
    assert file.warnings == ["experts.up_proj is left out: shape [2, 4, 4], expected a matrix"]


def test_inspect_without_files() -> None:
    with pytest.raises(InputError, match="no statistics file is given"):
        inspect([])


# The picture ------------------------------------------------------------------------------------------------------


def columns_of(image: Image.Image, color: str) -> set[int]:
    """Pixel columns in which a colour occurs."""
    wanted = tuple(round(255 * part) for part in to_rgb(color))
    pixels, width = image.convert("RGB").load(), image.width
    assert pixels is not None
    return {x for x in range(width) for y in range(image.height) if pixels[x, y] == wanted}


def test_the_picture_has_both_curves_for_every_file(saved: Path, run: Run) -> None:
    before = tree(saved)
    done = run("inspect", *pair(saved), "--png", saved / "a.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"picture: {saved / 'a.png'}"
    assert {path for path, _ in set(tree(saved)) ^ set(before)} == {str(saved / "a.png")}
    with Image.open(saved / "a.png") as image:
        image.load()
        assert (image.format, image.size) == ("PNG", (1200, 456))
        for color in ("C0", "C1"):  # ESD and SVD, each across most of both panels
            found = columns_of(image, color)
            assert sum(x < 600 for x in found) > 300
            assert sum(x >= 600 for x in found) > 300


def test_the_picture_of_spectra(saved: Path, run: Run) -> None:
    done = run("inspect", saved / "s0.safetensors", "--png", saved / "a.png", "--json")
    assert json.loads(done.stdout)["base"] is None
    with Image.open(saved / "a.png") as image:
        image.load()
        assert image.size == (600, 456)
        colors = image.convert("RGB").getcolors(1 << 16)
    assert colors is not None
    blue = sum(count for count, (red, green, blue) in colors if blue > red + 40)  # lines are blended with the ground
    assert blue > 500


def test_a_picture_with_many_files_and_layers_without_energy(tmp_path: Path, run: Run) -> None:
    name = "a.weight"
    base = {name: normal(6, 4, dtype=torch.float32)}
    tiny.save_model(tmp_path / "base", base)
    digest = fingerprint(from_state_dict(base, "e"), base)
    layers = {name: Layer(9, "input", 4, name)}
    write_statistics(tmp_path / "s", {name: torch.zeros(4, 4)}, layers, samples=1, fingerprint=digest)
    paths = [tmp_path / "s"] * 5
    for arguments in ([], ["--base", tmp_path / "base", *(["--model", tmp_path / "base"] * 5)]):
        done = run("inspect", *paths, *arguments, "--png", tmp_path / "a.png")
        assert (done.returncode, done.stderr) == (0, "")
        assert "-" in rows(done.stdout)[name]
        with Image.open(tmp_path / "a.png") as image:
            assert image.size == (4 * 600, 2 * 456)


def test_a_picture_is_replaced_whole_or_not_at_all(
    saved: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = saved / "a.png"
    picture.write_bytes(b"old")
    before = tree(saved)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        done = run("inspect", saved / "s0.safetensors", "--png", picture)
    assert (done.returncode, done.stdout) == (2, "")
    assert "a.png: the picture cannot be written: No space left on device" in done.stderr
    assert tree(saved) == before
    assert run("inspect", saved / "s0.safetensors", "--png", picture).returncode == 0
    with Image.open(picture) as image:
        image.verify()


def test_without_matplotlib_one_line_names_the_extra(
    saved: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = tree(saved)
    for module in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what import takes for a missing module
    done = run("inspect", saved / "s0.safetensors", "--png", saved / "a.png")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "a picture needs matplotlib: pip install 'isomerge[plot]'" in line
    assert tree(saved) == before
    assert run("inspect", saved / "s0.safetensors").returncode == 0


def test_matplotlib_is_imported_for_pictures_alone(saved: Path) -> None:
    code = "import sys, isomerge.inspect as i; i.inspect(sys.argv[1:]); assert 'matplotlib' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(saved / "s0.safetensors")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_file_of_a_newer_format(saved: Path, run: Run) -> None:
    save_file({"a": torch.eye(2)}, saved / "new.safetensors", {"isomerge_statistics": '{"format": 99}'})
    done = run("inspect", saved / "new.safetensors")
    assert done.returncode == 2
    assert "new.safetensors: the format of the statistics is 99, expected 1" in done.stderr
