"""Cases of `gpu.py`: the drivers of SVDs, whole methods against the papers, merges from disk to disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import memory
import papers
import torch
from deltas import VIT_B32
from gpu_measure import SPECTRAL, Candidate, Case, Problem
from gpu_setting import DRIVERS, INPUT_BYTES, LARGE, LARGEST, SVDS, Model, Setting, summed
from torch import Tensor

import isomerge
from isomerge import methods, ops
from isomerge.checkpoint import open_checkpoint


def driver_cases(setting: Setting) -> Iterator[Case]:
    """cuSOLVER's SVDs, one row each, as one that takes too long ends the process; on a CPU the only one there is."""

    def build(driver: str | None, m: int, n: int) -> Problem:
        A, (U, _, Vh) = summed(setting, 1, m, n)
        svd = partial(torch.linalg.svd, full_matrices=False, driver=driver)
        svd(setting.normal(64, 64))  # makes cuSOLVER's handle
        run = {driver or "torch": Candidate(lambda: svd(A[0]), once=True)}
        return Problem(run, "torch", lambda r: r[0] @ r[2], lambda: U @ Vh, None, facts={"m": m, "n": n})

    shapes = dict.fromkeys(shape for model in setting.models for shape in model.counts if max(shape) <= LARGEST)
    for m, n in sorted(shapes, key=lambda shape: (min(shape), max(shape))):
        for driver in DRIVERS if setting.device.type == "cuda" else (None,):
            yield Case("svd", f"{m}x{n}", partial(build, driver, m, n))


def method_cases(setting: Setting) -> Iterator[Case]:
    """Smaller models first; of Llama the papers' side is one SVD, multiplied, and large answers are not checked."""
    for model in setting.models:
        for method in SVDS:
            for (m, n), count in model.counts.items():
                build = partial(_method, setting, model, method, m, n, count)
                yield Case(method, f"{model.name} {m}x{n}", build)


def _method(setting: Setting, model: Model, method: str, m: int, n: int, count: int) -> Problem:
    T, L, X = setting.tasks, model.layers, None
    if method == "esm":
        L = max(1, min(L, int(INPUT_BYTES / (4 * T * model.tokens * n))))
        X = setting.inputs(model.tokens, n, L, T)
    deltas = setting.deltas(L, m, n)

    def merged(D: Tensor = deltas, backend: str = "auto") -> Tensor:
        if X is None:
            result: Tensor = getattr(methods, method)(D, backend=backend)
            return result
        moments = ops.shift_cov(X[: len(D)].to(D.dtype), D if m < n else None, backend=backend)
        return methods.esm(D, moments, backend=backend)

    def published(dtype: torch.dtype = torch.float32) -> Tensor:
        with patch.object(papers, "svd", setting.svd if dtype == torch.float32 else papers.svd):
            first = deltas[0].to(dtype)
            return (papers.METHODS[method](first) if X is None else papers.esm(first, X[0].to(dtype)))[None]

    exact: Callable[[], Tensor] | None = partial(published, torch.float64)
    one, note = Candidate(published, layers=1.0, once=True), ""
    if (min(m, n) if X is None else m) > LARGE or max(m, n) > LARGEST:
        A = deltas[0, 0] if X is None or m > LARGEST else X[0, 0] @ deltas[0, 0].mT
        one = Candidate(lambda: setting.svd(A), layers=1 / SVDS[method](T), once=True, checked=False)
        note = f"papers: {SVDS[method](T)} x one SVD of {A.shape[0]}x{A.shape[1]}"
        exact = partial(merged, deltas[:1].double(), "eager")
        if max(m, n) > LARGEST:
            exact, note = None, f"{note}; answer not checked"
    facts = {"model": model.name, "matrices": count, "T": T, "shapes": len(model.counts), "note": note}
    run = {"papers": one, "isomerge": Candidate(merged)}
    first = None if exact is None else lambda: exact()[0]
    return Problem(run, "papers", lambda M: M[0], first, SPECTRAL, L, facts=facts)


def merge_cases(setting: Setting) -> Iterator[Case]:
    """Whole merges of eight ViT-B/32 experts, float32 out, on the CPU and on the device."""
    for method in ("iso_c", "tsvm", "iso_cts"):
        yield Case(f"merge {method}", "tiny" if setting.quick else "ViT-B/32 on disk", partial(_merge, setting, method))


@lru_cache(maxsize=1)
def _models(quick: bool) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="isomerge-gpu-")
    shapes = {f"model.visual.blocks.0.{name}.weight": (48, 16) for name in VIT_B32} if quick else memory.MATRICES
    with patch.object(memory, "MATRICES", shapes):
        memory.write_models(Path(folder.name))
    return folder


def _merge(setting: Setting, method: str) -> Problem:
    folder = Path(_models(setting.quick).name)
    experts = [{"model": str(folder / f"expert{t}.safetensors")} for t in range(memory.EXPERTS)]
    recipe = {"merge_method": method, "base_model": str(folder / "base.safetensors"), "models": experts}
    recipe["out_dtype"] = "float32"

    def merged(device: str) -> Path:
        out = folder / device
        isomerge.merge(recipe, out, overwrite=True, device=device)
        return out

    def update(out: Path) -> Tensor:
        base, result = open_checkpoint(folder / "base.safetensors"), open_checkpoint(out)
        return torch.cat([(result.read(name) - base.read(name).float()).flatten() for name in sorted(base.tensors)])

    run = {"cpu": Candidate(lambda: merged("cpu"), once=True)}
    if setting.device.type == "cuda":
        run["cuda"] = Candidate(lambda: merged("cuda"))
    # each is within SPECTRAL of float64, so they are within twice that of one another
    return Problem(run, "cpu", update, lambda: update(folder / "cpu").double(), 2 * SPECTRAL, facts={"method": method})
