"""Kills merges at random moments with SIGKILL, goes on with them, and compares the bytes with an undisturbed merge.

    python tests/killed.py --kills 50 --seed 0

Each trial is a merge of one of several recipes in a process of its own, killed after a random time, again and again
until it ends by itself; then every file but the report, which has times in it, is compared.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch

from isomerge.checkpoint import hidden_folder
from isomerge.output import REPORT

SIDE, LAYERS, EXPERTS = 192, 12, 3
RECIPES: dict[str, dict[str, object]] = {
    "iso_c": {},
    "esm": {},
    "ties": {},
    "task_arithmetic": {},
    "iso_cts": {"parameters": {"alpha": [0.8, 1.0]}},
}


@dataclass(frozen=True, slots=True)
class Whole:
    """A merge that nobody killed."""

    seconds: float  # from the hidden folder to the end
    content: dict[str, bytes]


@dataclass(frozen=True, slots=True)
class Killed:
    """One trial."""

    method: str
    kills: int  # that hit a merge which was going on
    different: list[str]  # files that are not those of an undisturbed merge; the output is left to be looked at

    @property
    def same(self) -> bool:
        return not self.different


def make(folder: Path) -> dict[str, Path]:
    """Models that take a second or so to merge, and a recipe for each of RECIPES."""
    generator = torch.Generator().manual_seed(0)
    base = {
        f"encoder.layer.{i}.{part}.weight": torch.randn(SIDE, SIDE, generator=generator)
        for i in range(LAYERS)
        for part in ("attention.self.query", "output.dense")
    }
    base["embeddings.word_embeddings.weight"] = torch.randn(3000, SIDE, generator=generator)
    states = [base, *(tiny.tuned(base, seed + 1) for seed in range(EXPERTS))]
    for name, state in zip(("base", "e0", "e1", "e2"), states, strict=True):
        tiny.save_model(folder / name, state)
    for t, state in enumerate(states[1:]):
        tiny.save_statistics(folder / f"s{t}", base, state, tiny.second_moments(base, state, t))
    recipes = {}
    for method, keys in RECIPES.items():
        recipe = tiny.recipe_for(method, EXPERTS, **keys)
        if method == "esm":
            recipe["models"] = [{"model": f"e{t}", "statistics": f"s{t}"} for t in range(EXPERTS)]
        recipes[method] = tiny.write_recipe(folder, recipe, f"{method}.yaml")
    return recipes


def content(folder: Path) -> dict[str, bytes]:
    """Every file but the report and the list of sums, which has the report's."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name not in (REPORT, "SHA256SUMS")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def merge(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    # groups of a matrix or two and small shards: many moments to be killed at
    code = "import sys, isomerge; isomerge.merge(sys.argv[1], sys.argv[2], group_bytes=900_000, shard_bytes=1_000_000)"
    return subprocess.Popen([sys.executable, "-c", code, str(recipe), str(out)], stderr=subprocess.PIPE)


def begun(child: subprocess.Popen[bytes], out: Path) -> None:
    """Waits until a merge has taken the hidden folder: most of the time goes by before that."""
    lock = hidden_folder(out) / ".lock"
    while child.poll() is None and not (lock.exists() and lock.read_text() == str(child.pid)):
        time.sleep(0.001)


def trial(method: str, recipe: Path, out: Path, whole: Whole, chance: random.Random) -> Killed:
    """Kills a merge until it ends before that, then compares."""
    kills = 0
    while True:
        child = merge(recipe, out)
        begun(child, out)
        try:
            child.wait(chance.uniform(0, whole.seconds))
        except subprocess.TimeoutExpired:
            child.kill()
        _, errors = child.communicate()
        if child.returncode not in (0, -signal.SIGKILL):
            raise AssertionError(f"{method}: {errors.decode()}")
        if out.exists():  # perhaps killed, but after its last rename
            break
        kills += 1
    found = content(out)
    different = [name for name in {**found, **whole.content} if found.get(name) != whole.content.get(name)]
    if not different:
        shutil.rmtree(out)
    return Killed(method, kills, different)


def trials(folder: Path, kills: int, seed: int) -> list[Killed]:
    """Trials of all recipes in turn, until that many kills have hit."""
    chance = random.Random(seed)
    recipes = make(folder)
    wholes = {method: undisturbed(recipe, folder / f"{method}-whole") for method, recipe in recipes.items()}
    done: list[Killed] = []
    while sum(killed.kills for killed in done) < kills:
        method = list(recipes)[len(done) % len(recipes)]
        done.append(trial(method, recipes[method], folder / f"out-{len(done)}", wholes[method], chance))
    return done


def undisturbed(recipe: Path, out: Path) -> Whole:
    child = merge(recipe, out)
    begun(child, out)
    started = time.monotonic()
    _, errors = child.communicate()
    assert child.returncode == 0, errors.decode()
    return Whole(time.monotonic() - started, content(out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    done = trials(folder, options.kills, options.seed)
    if all(killed.same for killed in done):
        shutil.rmtree(folder)
    for method in RECIPES:
        mine = [killed for killed in done if killed.method == method]
        kills, same = sum(killed.kills for killed in mine), sum(killed.same for killed in mine)
        print(
            f"{method}: {kills} kills in {len(mine)} merges, {same} of {len(mine)} with the bytes of an undisturbed one"
        )
        for killed in mine:
            if killed.different:
                print(f"{method}: after {killed.kills} kills other bytes in {', '.join(killed.different)}, in {folder}")
    return 0 if all(killed.same for killed in done) else 1


if __name__ == "__main__":
    sys.exit(main())
