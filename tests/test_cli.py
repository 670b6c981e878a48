"""The command line: exit codes, one-line errors, and nothing left behind."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import tiny
import torch
from command_line import COMMAND, Run, read_terminal

import isomerge
from isomerge.checkpoint import open_checkpoint
from isomerge.errors import InputError
from isomerge.methods import METHODS

QUERY = "encoder.layer.0.attention.self.query.weight"


def run_process(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


def tree(folder: Path) -> list[tuple[str, int]]:
    """Every file below a folder with its time of change."""
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    tiny.bert_models(tmp_path)
    return tiny.write_recipe(tmp_path, tiny.recipe_for("iso_cts", parameters={"alpha": 1.2}))


def edit(recipe: Path, **keys: object) -> None:
    tiny.write_recipe(recipe.parent, tiny.recipe_for("iso_cts", **keys))


def change_expert(recipe: Path, name: str, value: torch.Tensor | None) -> None:
    state = tiny.load_output(recipe.parent / "e1")
    del state[name]
    tiny.save_model(recipe.parent / "e1", state if value is None else {**state, name: value})


def truncate(recipe: Path) -> None:
    shard = recipe.parent / "e1" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no recipe": (lambda r: r.unlink(), "recipe.yaml: no such recipe file"),
    "missing model": (lambda r: shutil.rmtree(r.parent / "e1"), "e1"),
    "truncated shard": (truncate, "e1/model.safetensors"),
    "missing key": (lambda r: change_expert(r, QUERY, None), f"e1: {QUERY} is missing"),
    "shape": (lambda r: change_expert(r, QUERY, torch.zeros(8, 16)), f"e1: {QUERY}: 8 rows"),
    "integers": (lambda r: change_expert(r, QUERY, torch.zeros(16, 16, dtype=torch.int8)), f"e1: {QUERY}: integers"),
    "method": (lambda r: tiny.write_recipe(r.parent, tiny.recipe_for("iso_ctx")), "did you mean iso_cts?"),
    "key": (lambda r: edit(r, paramaters={}), "paramaters: unknown key; did you mean `parameters`?"),
    "parameter": (lambda r: edit(r, parameters={"common_space": 0.5}), "(did you mean common_space_fraction?)"),
    "fraction": (
        lambda r: edit(r, parameters={"common_space_fraction": -0.1}),
        "expected a value from 0 to 1, got -0.1",
    ),
    "no experts": (lambda r: edit(r, models=[]), "recipe.yaml: models: no experts"),
    "output exists": (lambda r: (r.parent / "out").mkdir(), "out: exists already"),
    "float16": (lambda r: edit(r, parameters={"alpha": 1e6}, out_dtype="float16"), "overflow float16"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_wrong_input_exits_2_with_one_line_and_writes_nothing(recipe: Path, case: str, run: Run) -> None:
    spoil, expected = MISTAKES[case]
    spoil(recipe)
    before = tree(recipe.parent)
    done = run("merge", recipe, recipe.parent / "out", "--quiet")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("isomerge: ")
    assert expected in line
    assert done.stdout == ""
    assert tree(recipe.parent) == before


def test_processes_end_with_the_code(recipe: Path) -> None:
    truncate(recipe)
    before = tree(recipe.parent)
    done = run_process("merge", recipe, recipe.parent / "out")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "e1/model.safetensors" in done.stderr
    assert tree(recipe.parent) == before


def test_disk_too_small(recipe: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(recipe.parent)
    usage = shutil.disk_usage(recipe.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=9_000))
    for command in ("merge", "plan"):
        done = run(command, recipe, recipe.parent / "out")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert "out: needs 20 kB, 9 kB are free there" in line
    assert tree(recipe.parent) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mrge"], "No such command 'mrge'"),
        (["merge"], "Missing argument"),
        (["merge", "a", "b", "--forse"], "--forse"),
        (["merge", "a", "b", "--shard-size", "5XB"], "--shard-size 5XB: expected a size such as 5GB"),
        (["merge", "a", "b", "--shard-size", "0"], "expected at least one byte"),
    ],
)
def test_usage_errors_exit_2_with_one_line(arguments: list[str], expected: str, run: Run) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("isomerge: ")
    assert expected in line


def test_merge_writes_a_model_and_says_so(recipe: Path, run: Run) -> None:
    out = recipe.parent / "out"
    done = run("merge", recipe, out, "--shard-size", "5kB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{out}: 28 tensors, 13 matrices, ")
    assert done.stderr.splitlines()[-1].startswith("100%  ")  # plain lines where there is no terminal
    assert len(list(out.glob("model-*.safetensors"))) > 2
    again = run("merge", recipe, out, "--force", "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert not list(out.glob("model-*.safetensors"))  # replaced, not mixed


def test_a_bar_on_a_terminal(recipe: Path) -> None:
    ours, theirs = pty.openpty()
    command = [*COMMAND, "merge", str(recipe), str(recipe.parent / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as child:
        os.close(theirs)
        shown = read_terminal(ours)
        child.wait()
    assert child.returncode == 0
    assert b"13/13 matrices" in shown


def test_failures_while_running_exit_1(recipe: Path, run: Run) -> None:
    edit(recipe, parameters={"alpha": 1e39})
    before = tree(recipe.parent)
    done = run("merge", recipe, recipe.parent / "out", "--quiet")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("isomerge: failed: ArithmeticError: ")
    assert "Traceback" in run("merge", recipe, recipe.parent / "out", "--quiet", "--debug").stderr
    assert tree(recipe.parent) == before


def test_allow_nonfinite(recipe: Path, run: Run) -> None:
    change_expert(recipe, QUERY, torch.full((16, 16), torch.inf))
    done = run("merge", recipe, recipe.parent / "out", "--allow-nonfinite")
    assert done.returncode == 0, done.stderr
    assert "e1: 256 non-finite values were left out of the merge" in done.stdout


def slow_recipe(folder: Path) -> Path:
    """A merge that takes a second or more after its output was begun."""
    random = torch.Generator().manual_seed(0)
    sides = [320 - 8 * (i // 4) for i in range(24)]  # six groups: the first is noted long before the last
    base = {f"layers.{i}.fc.weight": torch.randn(side, side, generator=random) for i, side in enumerate(sides)}
    for name, state in (("base", base), ("e0", tiny.tuned(base, 1)), ("e1", tiny.tuned(base, 2))):
        tiny.save_model(folder / name, state)
    return tiny.write_recipe(folder, tiny.recipe_for("iso_cts", experts=2))


def started(recipe: Path) -> tuple[subprocess.Popen[str], Path]:
    """A merge in another process, and its hidden folder once some of the weights are in it."""
    command = [*COMMAND, "merge", str(recipe), str(recipe.parent / "out"), "--quiet"]

    def listen() -> None:  # a job in the background may have been told to ignore it, and hands that on
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        for folder in recipe.parent.glob(".out*"):
            with suppress(FileNotFoundError):  # it is made anew right after it was made
                if b'"record"' in (folder / "isomerge_journal.jsonl").read_bytes():
                    return child, folder
        time.sleep(0.002)
    raise AssertionError(f"the merge ended before it could be stopped: {child.communicate()}")


def test_a_killed_merge_leaves_nothing_that_loads(tmp_path: Path, run: Run) -> None:
    recipe = slow_recipe(tmp_path)
    child, partial = started(recipe)
    child.kill()
    child.communicate()
    assert not (tmp_path / "out").exists()
    assert partial.is_dir()  # it was killed in the middle
    with pytest.raises(InputError):
        open_checkpoint(partial)
    assert not (partial / "config.json").exists()
    assert run("merge", recipe, tmp_path / "out", "--quiet").returncode == 0
    assert len(tiny.load_output(tmp_path / "out")) == 24
    assert not list(tmp_path.glob(".out*"))  # the leftover is gone too


def test_an_interrupted_merge_says_how_to_go_on(tmp_path: Path, run: Run) -> None:
    recipe = slow_recipe(tmp_path)
    child, partial = started(recipe)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130, errors
    assert errors.splitlines() == [
        f"isomerge: interrupted; what is merged is kept in {partial}: the same command goes on from there, "
        "--restart discards it"
    ]
    assert not (tmp_path / "out").exists()
    done = run("merge", recipe, tmp_path / "out")
    assert re.search(r"\d+ parts from an interrupted merge", done.stdout)
    assert not partial.exists()


def test_plan_reads_headers_and_writes_nothing(recipe: Path, run: Run) -> None:
    edit(recipe, rules=[{"filter": "*.mpl.*", "keep_base": True}])
    before = tree(recipe.parent)
    done = run("plan", recipe, recipe.parent / "out", "--tensors")
    assert done.returncode == 0, done.stderr
    for part in ("iso_cts", "9 of 16x16", "peak memory about", "disk ", 'warning: recipe.yaml: rules[0] ("*.mpl.*")'):
        assert part in done.stdout
    assert f"{QUERY}  16x16  matrix  iso_cts(common_space_fraction=0.8)" in done.stdout.splitlines()
    data = json.loads(run("plan", recipe, "--json", "--tensors").stdout)
    assert data["methods"]["iso_cts"]["matrices"] == data["matrices"] == 13
    assert len(data["assignments"]) == data["tensors"] == 28
    assert data["disk_bytes"] == data["bytes_written"]
    assert "assignments" not in json.loads(run("plan", recipe, "--json").stdout)
    assert run("plan", recipe, recipe.parent / "base").returncode == 2
    assert tree(recipe.parent) == before


def test_methods_lists_every_row(run: Run) -> None:
    text = run("methods").stdout
    for method in METHODS.values():
        assert f"{method.name}  {method.title}" in text
        for parameter in method.parameters:
            assert f"    {parameter.name}: {parameter.type.__name__}" in text


def test_doctor_shows_every_backend_and_what_is_missing(run: Run) -> None:
    from isomerge.backends import BACKENDS, OPS, refusal

    done = run("doctor")
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    told = " ".join(done.stdout.split())  # long cells are folded
    for backend, row in BACKENDS.items():
        reason = refusal(row.ops[0], backend, torch.device("cpu"))
        ops = "all" if row.ops == OPS else ", ".join(row.ops)
        start = told.index(f"{backend} yes" if reason is None else f"{backend} no: ")
        assert set(f"{reason or 'yes'} {ops}".replace(",", " ").split()) <= set(told[start:].replace(",", " ").split())


def test_version_and_help(run: Run) -> None:
    assert run("--version").stdout == f"isomerge {isomerge.__version__}\n"
    for arguments in ([], ["--help"]):
        done = run(*arguments)
        assert done.returncode == 0
        for command in ("merge", "plan", "methods", "doctor"):
            assert command in done.stdout


def test_workers(recipe: Path, run: Run) -> None:
    done = run("merge", recipe, recipe.parent / "out", "--workers", 3)
    assert done.returncode == 0, done.stderr
    done = run("merge", recipe, recipe.parent / "out2", "--workers", 0)
    assert done.returncode == 2
    assert "workers: expected 1 or more, got 0" in done.stderr
    assert not (recipe.parent / "out2").exists()


def test_names_in_hostile_files_reach_no_terminal(recipe: Path, run: Run) -> None:
    wild = "evil\n\x1b[2Jname"
    states = tiny.bert_models(recipe.parent)
    tiny.save_model(recipe.parent / "e1", {**states[2], wild: torch.ones(2)})
    done = run("plan", recipe, "--no-time")
    assert done.returncode == 0, done.stderr
    assert r"left out: evil\n\x1b[2Jname" in done.stdout
    tiny.save_model(recipe.parent / "base", {**states[0], wild: torch.ones(3)})
    done = run("merge", recipe, recipe.parent / "out", "--quiet")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert r"evil\n\x1b[2Jname" in line


def test_a_config_that_is_a_bomb_is_no_config(recipe: Path, run: Run) -> None:
    (recipe.parent / "base" / "config.json").write_text('{"a": ' + "[" * 100_000)
    edit(recipe, out_dtype="bfloat16")
    done = run("merge", recipe, recipe.parent / "out", "--quiet")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "methods"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
