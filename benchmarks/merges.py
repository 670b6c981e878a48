"""Whole merges against the papers' computation: `python benchmarks/merges.py [methods] [esm] [models]`.

methods  one ViT-B/32 block (synthetic deltas), T = 8 and 20: time and error of both, interleaved in this process
esm      the same block, T = 8, from synthetic inputs of its layers: the moments are part of the time
models   the real experts of the demo (run `make demo` first): the same on every matrix of the model
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import measure
import papers
import torch
from deltas import VIT_B32, activations, synthetic
from torch import Tensor

from isomerge import methods, ops
from isomerge.checkpoint import open_checkpoint
from isomerge.families import classify, recognise

LAYERS = 2  # matrices of a shape that are merged together, as `isomerge merge` does on two cores
COLUMNS = ("T", "matrix", "method", "papers s", "isomerge s", "ratio", "papers error", "isomerge error")


def update(name: str) -> Callable[[Tensor], Tensor]:
    function: Callable[[Tensor], Tensor] = getattr(methods, name)
    return function


def compare(stack: Tensor, name: str, rounds: int) -> dict[str, float]:
    """Seconds per matrix and worst error of both on deltas [L, T, m, n]; the answer is checked."""
    run = {
        "papers": lambda: torch.stack([papers.METHODS[name](d) for d in stack]),
        "isomerge": lambda: update(name)(stack),
    }
    run["isomerge"]()
    times, results = measure.interleaved(run, rounds)
    exact = papers.METHODS[name](stack[0].double())
    errors = {who: measure.error(result[0], exact) for who, result in results.items()}
    assert errors["isomerge"] <= max(2 * errors["papers"], 1e-4), (name, tuple(stack.shape), errors)
    return {
        **{f"{who} s": value / len(stack) for who, value in times.items()},
        **{f"{who} error": value for who, value in errors.items()},
    }


def row(T: int, matrix: str, method: str, got: dict[str, float]) -> list[object]:
    ratio = f"{got['papers s'] / got['isomerge s']:.1f}"
    errors = [f"{got[f'{who} error']:.1e}" if f"{who} error" in got else "" for who in ("papers", "isomerge")]
    return [T, matrix, method, f"{got['papers s']:.3f}", f"{got['isomerge s']:.3f}", ratio, *errors]


def run_methods(rounds: int, tasks: list[int], names: list[str]) -> None:
    rows, data = [], []
    for T in tasks:
        for method in names:
            totals = {"papers s": 0.0, "isomerge s": 0.0}
            for matrix, shape in VIT_B32.items():
                stack = torch.stack([synthetic(T, *shape, seed=layer + 1) for layer in range(LAYERS)])
                got = compare(stack, method, rounds)
                rows.append(row(T, f"{matrix} {shape[0]}x{shape[1]}", method, got))
                data.append({"T": T, "matrix": matrix, "method": method, **got})
                totals = {key: totals[key] + got[key] for key in totals}
                print(*rows[-1], flush=True)
            rows.append(row(T, "**whole block**", method, totals))
            print(*rows[-1], flush=True)
    title = f"One ViT-B/32 block, seconds per matrix, median of {rounds} interleaved rounds"
    name = "-".join(["methods-cpu", *(f"T{T}" for T in tasks)])
    print(measure.save(name, title, [measure.table(COLUMNS, rows)], {"rows": data}))


def esm(deltas: Tensor, inputs: Tensor) -> Tensor:
    """From inputs [L, T, N, n]: their second moments, or for wide matrices those of the shifts, and the merge."""
    m, n = deltas.shape[-2:]
    return methods.esm(deltas, ops.shift_cov(inputs, deltas if m < n else None))


def run_esm(rounds: int, token_counts: list[int]) -> None:
    """isomerge works on two layers at a time, as it merges; the papers' computation on the first of them."""
    T = 8
    rows, data = [], []
    for tokens in token_counts:
        totals = {"papers s": 0.0, "isomerge s": 0.0}
        for matrix, shape in VIT_B32.items():
            deltas = torch.stack([synthetic(T, *shape, seed=layer + 1) for layer in range(LAYERS)])
            inputs = torch.stack([activations(T, tokens, shape[1], seed=layer + 1) for layer in range(LAYERS)])
            first = deltas[0], inputs[0]
            run = {"papers": lambda first=first: papers.esm(*first), "isomerge": lambda d=deltas, x=inputs: esm(d, x)}
            times, results = measure.interleaved(run, rounds)
            times["isomerge"] /= LAYERS
            moments = ops.shift_cov(first[1], precision="exact")
            exact = methods.esm(first[0].double(), moments, backend="reference")
            papers_error, error = (measure.error(r, exact) for r in (results["papers"], results["isomerge"][0]))
            assert error <= max(2 * papers_error, 1e-4), (matrix, tokens, error, papers_error)
            got = {
                "papers s": times["papers"],
                "isomerge s": times["isomerge"],
                "papers error": papers_error,
                "isomerge error": error,
            }
            rows.append(row(T, f"{matrix} {shape[0]}x{shape[1]}, {tokens} tokens", "esm", got))
            data.append({"T": T, "matrix": matrix, "tokens": tokens, **got})
            totals = {key: totals[key] + got[key] for key in totals}
            print(*rows[-1], flush=True)
        rows.append(row(T, f"**whole block**, {tokens} tokens", "esm", totals))
        print(*rows[-1], flush=True)
    title = f"ESM on one ViT-B/32 block, seconds per matrix, median of {rounds} interleaved rounds"
    print(measure.save("esm-cpu", title, [measure.table(COLUMNS, rows)], {"rows": data}))


def run_models(rounds: int, folder: Path) -> None:
    folders = sorted(path for path in (folder / "experts").iterdir() if (path / "config.json").exists())
    base, *experts = (open_checkpoint(path) for path in (folder / "base", *folders))
    family = recognise({name: info.shape for name, info in base.tensors.items()})
    by_shape: dict[tuple[int, ...], list[Tensor]] = {}
    for name, info in base.tensors.items():
        if classify(name, info.shape, info.dtype, family, "default").kind == "matrix":
            weight = base.read(name).float()
            by_shape.setdefault(info.shape, []).append(torch.stack([e.read(name).float() - weight for e in experts]))
    rows, data = [], []
    for method in papers.METHODS:
        totals = {"papers s": 0.0, "isomerge s": 0.0}
        for shape, layers in by_shape.items():
            stack = torch.stack(layers)
            got = compare(stack, method, rounds)
            rows.append(row(len(experts), f"{shape[0]}x{shape[1]}, {len(layers)} of them", method, got))
            data.append({"T": len(experts), "shape": shape, "matrices": len(layers), "method": method, **got})
            totals = {key: totals[key] + got[key] * len(layers) for key in totals}
        rows.append(row(len(experts), "**whole model**", method, totals))
        print(*rows[-1], flush=True)
    title = f"The demo's {len(experts)} experts of MiniLM-L6, seconds per matrix, median of {rounds} interleaved rounds"
    print(measure.save("models-cpu", title, [measure.table(COLUMNS, rows)], {"rows": data}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["methods", "esm", "models"], metavar="WHAT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, nargs="+", default=[8, 20], help="of `methods`")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1600, 8224], help="of `esm`: inputs per task")
    parser.add_argument("--names", nargs="+", default=list(papers.METHODS), help="of `methods`: which methods")
    parser.add_argument("--models", type=Path, default=Path(".demo"), help="the demo's cache: base/, experts/")
    arguments = parser.parse_args()
    for what in arguments.what:
        if what == "methods":
            run_methods(arguments.rounds, arguments.tasks, arguments.names)
        elif what == "esm":
            run_esm(arguments.rounds, arguments.tokens)
        elif arguments.models.exists():
            run_models(arguments.rounds, arguments.models)
        else:
            print(f"{arguments.models}: does not exist; run `make demo` first, or give --models FOLDER")
