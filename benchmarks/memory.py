"""Memory and time of merging from disk, processes of their own: `python benchmarks/memory.py`.

Peak resident memory of `isomerge merge` on a base and eight experts of ViT-B/32 by every method, and of holding all
models in float32, as the papers' code does while it merges.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import measure
import torch
from deltas import VIT_B32, activations
from safetensors.torch import load_file, save_file

from isomerge import methods, ops
from isomerge.checkpoint import open_checkpoint
from isomerge.merge import open_job
from isomerge.statistics import Layer, fingerprint, write_statistics

EXPERTS = 8
TOKENS = 1600  # 32 images of 50
BLOCKS = 12
MATRICES = {f"model.visual.blocks.{i}.{name}.weight": shape for i in range(BLOCKS) for name, shape in VIT_B32.items()}


def write_models(folder: Path) -> None:
    """A ViT-B/32 visual tower and eight experts of it, bfloat16, 175 MB each."""
    shapes = {**MATRICES, "model.visual.conv1.weight": (768, 3, 32, 32)}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator).mul_(0.02) for name, shape in shapes.items()}
    save_file({name: weight.bfloat16() for name, weight in base.items()}, folder / "base.safetensors")
    for t in range(EXPERTS):
        tuned = {name: (w + 1e-3 * torch.randn(w.shape, generator=generator)).bfloat16() for name, w in base.items()}
        save_file(tuned, folder / f"expert{t}.safetensors")


def write_moments(folder: Path) -> None:
    """Statistics of each expert as `isomerge capture` writes them with the base: [768, 768] for every matrix.

    The inputs of a layer of one shape are the same in all blocks, which changes neither memory nor time.
    """
    inputs = {shape: activations(EXPERTS, TOKENS, shape[1]) for shape in dict.fromkeys(VIT_B32.values())}
    base = open_checkpoint(folder / "base.safetensors")
    for t in range(EXPERTS):
        expert = open_checkpoint(folder / f"expert{t}.safetensors")
        moments, layers = {}, {}
        for name, (m, n) in MATRICES.items():
            delta = expert.read(name).float() - base.read(name).float() if m < n else None
            moments[name] = ops.shift_cov(inputs[m, n][t], delta)
            layers[name] = Layer(TOKENS, "input" if delta is None else "output", len(moments[name]), name)
        shifts = [name for name, layer in layers.items() if layer.space == "output"]
        write_statistics(
            folder / f"expert{t}.stats.safetensors",
            moments,
            layers,
            samples=TOKENS // 50,
            fingerprint=fingerprint(expert, layers),
            base_fingerprint=fingerprint(base, shifts),
        )


def write_recipe(folder: Path, method: str) -> Path:
    lines = [f"merge_method: {method}", "base_model: base.safetensors", "models:"]
    for t in range(EXPERTS):
        lines.append(f"  - model: expert{t}.safetensors")
        if methods.METHODS[method].moments:
            lines.append(f"    statistics: expert{t}.stats.safetensors")
    path = folder / f"{method}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def peak_of(command: list[str]) -> int:
    """Peak resident bytes of a command, by the operating system's account of it."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def hold_all(folder: Path) -> None:
    """What the papers' code holds while it merges: every model and every task vector, in float32."""
    base = {name: weight.float() for name, weight in load_file(folder / "base.safetensors").items()}
    vectors = []
    for t in range(EXPERTS):
        tuned = load_file(folder / f"expert{t}.safetensors")
        vectors.append({name: tuned[name].float() - weight for name, weight in base.items()})
    merged = {name: weight + sum(vector[name] for vector in vectors) for name, weight in base.items()}
    print(len(merged), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    rows, data = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_models(folder)
        write_moments(folder)
        size = (folder / "base.safetensors").stat().st_size
        for method, row in methods.METHODS.items():
            recipe = str(write_recipe(folder, method))
            if row.moments:  # the polar factor of m x m bases takes more than the promise for all others
                with open_job(recipe) as job:
                    bound = job.plan.peak_bytes
            else:
                bound = size + 3 * EXPERTS * 3072 * 768 * 4 + 500_000_000
            command = [sys.executable, "-m", "isomerge.cli", "merge", "--quiet", recipe, str(folder / method)]
            elapsed, peak = measure.seconds(lambda command=command: peak_of(command))
            assert peak <= bound, (method, peak, bound)
            rows.append([method, f"{peak / 1e6:.0f}", f"{bound / 1e6:.0f}", f"{elapsed:.1f}"])
            data[method] = {"peak bytes": peak, "bound bytes": bound, "seconds": elapsed}
            print(*rows[-1], flush=True)
        code = f"import memory; from pathlib import Path; memory.hold_all(Path({str(folder)!r}))"
        here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "
        peak = peak_of([sys.executable, "-c", here + code])
        rows.append(["all models in memory", f"{peak / 1e6:.0f}", "", ""])
        data["all models in memory"] = {"peak bytes": peak}
    title = "Merging 8 bfloat16 experts of ViT-B/32 (175 MB each) from disk"
    header = ("method", "peak MB", "bound MB: base + 3 x largest group + 500, esm: the plan's", "s, start-up included")
    print(measure.save("memory-cpu", title, [measure.table(header, rows)], {"rows": data}))


if __name__ == "__main__":
    main()
