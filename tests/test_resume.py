"""A merge that died goes on from what it has written, to the same bytes; and says why when it must not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from command_line import Run
from killed import content, trials
from safetensors.torch import save_file

from isomerge.checkpoint import Writer, hidden_folder
from isomerge.checkpoint.journal import Journal, difference
from isomerge.delta_reader import DeltaReader
from isomerge.deltas import Group
from isomerge.errors import InputError
from isomerge.merge import merge

JOURNAL = "isomerge_journal.jsonl"
RECIPES: dict[str, dict[str, object]] = {
    "iso_c": {},
    "esm": {"merge_method": "esm"},
    "two outputs": {"parameters": {"alpha": [0.5, 1]}},
    "kept tensors": {"merge_method": "dare_ties", "rules": [{"filter": "embeddings.*", "keep_base": True}]},
}


class Died(BaseException):
    """Stands in for the death of a process in tests that count what the next one does."""


@pytest.fixture
def models(tmp_path: Path) -> Path:
    states = tiny.bert_models(tmp_path)
    for t, state in enumerate(states[1:]):
        tiny.save_statistics(tmp_path / f"s{t}", states[0], state, tiny.second_moments(states[0], state, t))
    return tmp_path


def recipe_of(folder: Path, case: str = "iso_c", **change: object) -> Path:
    recipe = {**tiny.recipe_for("iso_c"), **RECIPES[case], **change}
    if recipe["merge_method"] == "esm":
        recipe["models"] = [{"model": f"e{t}", "statistics": f"s{t}"} for t in range(3)]
    return tiny.write_recipe(folder, recipe)


def die_at_note(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], object]) -> None:
    """From now on `action` is done in place of the `number`-th note of a writer."""
    real, left = Writer.note, number

    def note(writer: Writer, record: object, receipts: object) -> None:
        nonlocal left
        if left == 0:
            action()
        left -= 1
        real(writer, record, receipts)  # type: ignore[arg-type]

    monkeypatch.setattr(Writer, "note", note)


def killed_at_note(number: int, recipe: Path, out: Path, **options: object) -> bool:
    """A merge in a process that kills itself at a note; whether it came to that."""
    pid = os.fork()
    if pid == 0:
        with pytest.MonkeyPatch.context() as patch:
            die_at_note(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try:
                merge(recipe, out, **options)  # type: ignore[arg-type]
            finally:
                os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def interrupted(monkeypatch: pytest.MonkeyPatch, recipe: Path, out: Path, number: int = 5, **options: object) -> None:
    """Leaves a merge of which `number` groups are done."""

    def die() -> None:
        raise Died

    with monkeypatch.context() as patch:
        die_at_note(patch, number, die)
        with pytest.raises(Died):
            merge(recipe, out, group_bytes=1, **options)  # type: ignore[arg-type]
    assert hidden_folder(out).is_dir()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """The groups that are read from now on."""
    read: list[Group] = []
    real_read, real_map = DeltaReader.read, DeltaReader.map
    monkeypatch.setattr(DeltaReader, "read", lambda self, group: (read.append(group), real_read(self, group))[1])
    monkeypatch.setattr(DeltaReader, "map", lambda self, group, f: (read.append(group), real_map(self, group, f))[1])
    return read


# Going on -------------------------------------------------------------------------------------------------------


def test_random_kills(tmp_path: Path) -> None:
    done = trials(tmp_path, 5, seed=0)
    assert sum(killed.kills for killed in done) >= 5
    assert all(killed.same for killed in done)


@pytest.mark.parametrize("case", RECIPES)
def test_killed_at_every_group_the_bytes_are_the_same_and_one_group_is_computed_again(
    models: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(models, case)
    read = counted(monkeypatch)
    whole = merge(recipe, models / "whole", group_bytes=1, shard_bytes=3000)
    groups, number = len(read), 0
    while killed_at_note(number, recipe, models / "out", group_bytes=1, shard_bytes=3000):
        read.clear()
        report = merge(recipe, models / "out", group_bytes=1, shard_bytes=3000)
        assert content(models / "out") == content(models / "whole")
        assert hidden_folder(models / "out").exists() is False
        if case != "esm":
            assert len(read) <= groups - max(0, number - 8)  # eight tensors at most are copied, with a note each
        assert [record.update_norm for record in report.tensors] == [record.update_norm for record in whole.tensors]
        assert [record.delta_sum_norm for record in report.tensors] == [r.delta_sum_norm for r in whole.tensors]
        assert (report.totals.bytes_read, report.totals.bytes_written) == (
            whole.totals.bytes_read,
            whole.totals.bytes_written,
        )
        shutil.rmtree(models / "out")
        number += 3
    assert number > 12
    shutil.rmtree(models / "out")


def test_only_the_group_under_way_is_computed_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, read = recipe_of(models), counted(monkeypatch)
    merge(recipe, models / "whole", group_bytes=1)
    every = [group.units for group in read]
    interrupted(monkeypatch, recipe, models / "out", number=7)  # the first note is that of a tensor copied
    read.clear()
    report = merge(recipe, models / "out", group_bytes=1)
    assert [group.units for group in read] == every[6:]
    assert report.totals.restored == 7
    assert content(models / "out") == content(models / "whole")


def test_updates_that_wait_are_not_computed_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, read = recipe_of(models, "esm"), counted(monkeypatch)
    merge(recipe, models / "whole", group_bytes=1)
    every = [group.units for group in read]
    for number in range(len(every) + 6):
        interrupted(monkeypatch, recipe, models / "out", number=number) if number else None
        read.clear()
        merge(recipe, models / "out", group_bytes=1)
        missing = [group.units for group in read]
        assert missing == every[len(every) - len(missing) :]
        computed = number - 1 - (len(every) - len(missing))  # notes that were of no group: a copy, releases
        assert computed <= 6
        assert content(models / "out") == content(models / "whole")
        shutil.rmtree(models / "out")


@pytest.mark.parametrize("budget", [{"group_bytes": 100_000}, {"max_memory": 2 * 10**9}, {}], ids=str)
def test_another_budget_goes_on_to_the_same_bytes(
    models: Path, budget: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(models)
    merge(recipe, models / "whole")
    interrupted(monkeypatch, recipe, models / "out")
    assert merge(recipe, models / "out", **budget).totals.restored == 5  # type: ignore[arg-type]
    assert content(models / "out") == content(models / "whole")


def test_what_the_disk_has_lost_is_computed_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(models)
    merge(recipe, models / "whole", shard_bytes=1500)
    for damage in ("part", "whole shard", "header", "journal", "torn journal", "all files"):
        interrupted(monkeypatch, recipe, models / "out", number=12, shard_bytes=1500)
        hidden = hidden_folder(models / "out")
        parts, shards = sorted(hidden.glob("*.part")), sorted(hidden.glob("*.safetensors"))
        assert parts
        assert shards
        if damage == "part":
            for part in parts:
                flip(part, -1)
        elif damage == "whole shard":
            flip(shards[0], -1)
        elif damage == "header":
            flip(parts[0], 20)
        elif damage == "journal":
            flip(hidden / JOURNAL, (hidden / JOURNAL).stat().st_size // 2)
        elif damage == "torn journal":
            os.truncate(hidden / JOURNAL, (hidden / JOURNAL).stat().st_size - 7)
        else:
            for file in (*parts, *shards):
                file.unlink()
        merge(recipe, models / "out", shard_bytes=1500)
        assert content(models / "out") == content(models / "whole"), damage
        shutil.rmtree(models / "out")


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_an_output_that_is_replaced_stays_until_the_new_one_is_whole(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = recipe_of(models, merge_method="average")
    merge(old, models / "out")
    before = content(models / "out")
    new = recipe_of(models)
    interrupted(monkeypatch, new, models / "out", overwrite=True)
    assert content(models / "out") == before
    assert merge(new, models / "out", overwrite=True).totals.restored == 5
    merge(new, models / "whole")
    assert content(models / "out") == content(models / "whole")


# Refusing -------------------------------------------------------------------------------------------------------


def change_recipe(folder: Path) -> str:
    recipe_of(folder, parameters={"alpha": 0.9})
    return r"recipe\.parameters\.alpha: 1\.0 then, 0\.9 now"


def change_base(folder: Path) -> str:
    save_file(tiny.bert_state(0), folder / "base" / "model.safetensors", {"format": "pt", "other": "header"})
    return r"base\.digest: '[0-9a-f]{64}' then, '[0-9a-f]{64}' now"


def change_values(folder: Path) -> str:
    tiny.save_model(folder / "e1", tiny.tuned(tiny.bert_state(0), 77))
    return r"experts\[1\]\.modified\.model\.safetensors: '20\S+Z' then, '20\S+Z' now"


def drop_expert(folder: Path) -> str:
    recipe_of(folder, models=[{"model": "e0"}, {"model": "e1"}])
    return r"recipe\.models\[2\]"


CHANGES: tuple[Callable[[Path], str], ...] = (change_recipe, change_base, change_values, drop_expert)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_merge_does_not_go_on(
    models: Path, change: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(models)
    interrupted(monkeypatch, recipe, models / "out")
    expected = change(models)
    with pytest.raises(InputError, match=expected) as caught:
        merge(recipe, models / "out")
    assert "--restart" in str(caught.value)
    assert hidden_folder(models / "out").is_dir(), "what is done is lost"
    report = merge(recipe, models / "out", restart=True)
    assert report.totals.restored == 0
    merge(recipe, models / "whole")
    assert content(models / "out") == content(models / "whole")


def test_another_library_or_processor_does_not_go_on(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their products and eigensolves round in ways of their own."""
    recipe = recipe_of(models)
    interrupted(monkeypatch, recipe, models / "out")
    with monkeypatch.context() as patch:
        patch.setattr("isomerge.report._scipy_version", lambda: "0.1")
        with pytest.raises(InputError, match=r"versions\.scipy: '\S+' then, '0\.1' now"):
            merge(recipe, models / "out")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "NONE")
    with pytest.raises(InputError, match=r"instructions: '\S+' then, 'NONE' now"):
        merge(recipe, models / "out")


def test_shards_of_another_size_do_not_go_on(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(models)
    interrupted(monkeypatch, recipe, models / "out")
    with pytest.raises(InputError, match="shard_bytes: 5000000000 then, 3000 now"):
        merge(recipe, models / "out", shard_bytes=3000)


def test_non_finite_values_found_late_lose_nothing(models: Path, run: Run) -> None:
    state = tiny.tuned(tiny.bert_state(0), 1)
    state["pooler.dense.weight"][0, 0] = torch.nan
    tiny.save_model(models / "e0", state)
    recipe = recipe_of(models)
    with pytest.raises(InputError, match="non-finite"):
        merge(recipe, models / "out", group_bytes=1)
    assert hidden_folder(models / "out").is_dir()
    done = run("merge", recipe, models / "out")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()[-1:]
    assert line.startswith(f"isomerge: {models / 'e0'}: pooler.dense.weight: 1 non-finite values")
    assert line.endswith("the same command goes on from there, --restart discards it")
    assert not (models / "out").exists()
    report = merge(recipe, models / "out", group_bytes=1, allow_nonfinite=True)
    assert report.totals.restored > 5
    merge(recipe, models / "whole", allow_nonfinite=True)
    assert content(models / "out") == content(models / "whole")


def test_mistakes_leave_nothing(models: Path) -> None:
    recipe = recipe_of(models, out_dtype="float16", parameters={"alpha": 1e6})
    before = sorted(models.iterdir())
    with pytest.raises(InputError, match="overflow"):
        merge(recipe, models / "out", group_bytes=1)
    assert sorted(models.iterdir()) == before


# A full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 1 MB; skips where none may be mounted."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place  # type: ignore[misc]
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_fills_up(models: Path, small_disk: Path, run: Run) -> None:
    base = {f"layers.{i}.fc.weight": torch.randn(160, 160) for i in range(6)}  # 614 kB
    for name, state in (("base", base), *((f"e{t}", tiny.tuned(base, t)) for t in range(3))):
        tiny.save_model(models / name, state)
    recipe, out, rest = recipe_of(models), small_disk / "out", small_disk / "rest"
    merge(recipe, models / "whole", group_bytes=1)

    def fill(*_: object) -> None:
        rest.write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - 150_000)))

    with pytest.raises(OSError, match="No space left on device") as caught:
        merge(recipe, out, group_bytes=1, progress=lambda state: None if rest.exists() else fill())
    assert str(small_disk / ".out.partial") in str(caught.value)
    assert not out.exists()
    rest.unlink()
    report = merge(recipe, out, group_bytes=1)
    assert report.totals.restored > 0
    assert content(out) == content(models / "whole")
    shutil.rmtree(out)
    rest.write_bytes(bytes(700_000))
    done = run("merge", recipe, out)
    assert done.returncode == 2, done.stderr
    assert "are free there" in done.stderr
    assert [entry.name for entry in small_disk.iterdir()] == ["rest"]


# The journal ----------------------------------------------------------------------------------------------------


def test_the_journal_keeps_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    lines = [{"a": 1}, {"b": [1.5, None, "é"]}, {}]
    journal = Journal(path)
    for line in lines:
        journal.append(line)
    journal.close()
    whole = path.read_bytes()
    ends = [end + 1 for end, byte in enumerate(whole) if byte == ord("\n")]
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        journal = Journal(path)
        assert journal.lines == lines[: sum(last <= end for last in ends)]
        journal.append({"next": 0})
        journal.close()
        assert Journal(path).lines == [*lines[: sum(last <= end for last in ends)], {"next": 0}]
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert Journal(path).lines == lines[: sum(last <= place for last in ends)]


def test_the_first_difference() -> None:
    then = {"a": 1, "b": {"c": [1, 2]}, "d": None}
    assert difference(then, json.loads(json.dumps(then))) is None
    assert difference(then, {**then, "b": {"c": (1, 2)}}) is None
    assert difference(then, {**then, "b": {"c": [1, 3]}}) == "b.c[1]: 2 then, 3 now"
    assert difference(then, {**then, "b": {"c": [1]}}) == "b.c[1]: 2 then, none now"
    assert difference(then, {"b": then["b"], "d": None, "e": "x"}) == "a: 1 then, none now"
    assert difference({"a": [1]}, {"a": {"b": 1}}) == "a: [1] then, {'b': 1} now"
