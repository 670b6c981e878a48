"""What a capture adds to running the model: `python benchmarks/capture.py` (run `make demo` first).

The demo's experts on 32 of the texts that the demo captures with, cut to 32 tokens as there and padded to the longest
of eight: plain forward passes, and captures with and without the base, interleaved in one process.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import measure
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import isomerge
from isomerge.capture import Captured

TEXTS, BATCH, LONGEST = 32, 8, 32
COLUMNS = ("expert", "tokens", "padded", "forward ms", "with the base ms", "added", "without ms", "added")


def batches(base: Path, texts: list[str]) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(base)
    some = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    return [
        dict(tokenizer(part, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")) for part in some
    ]


def forward(model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> None:
    with torch.inference_mode():
        for batch in inputs:
            model(**batch)


def compare(folder: Path, expert: Path, rounds: int) -> dict[str, float]:
    """Seconds of a forward pass and of both captures; the moments are checked against float64."""
    samples = next(expert.with_name(f"{expert.name}-statistics").glob(f"{TEXTS}-*.txt"))
    inputs = batches(folder / "base", samples.read_text("utf-8").splitlines())
    model = AutoModel.from_pretrained(expert).eval()
    base = AutoModel.from_pretrained(folder / "base").state_dict()
    run = {
        "forward": lambda: forward(model, inputs),
        "with the base": lambda: isomerge.capture(model, inputs, base=base),
        "without": lambda: isomerge.capture(model, inputs),
    }
    measure.interleaved(run, 2)
    times, results = measure.interleaved(run, rounds)
    exact = isomerge.capture(model.double(), inputs, dtype=torch.float64)
    captured = results["without"]
    assert isinstance(captured, Captured)
    assert all(measure.error(moment, exact.moments[name]) < 1e-5 for name, moment in captured.moments.items())
    tokens = sum(int(batch["attention_mask"].sum()) for batch in inputs)
    return {**times, "tokens": tokens, "padded": sum(batch["attention_mask"].numel() for batch in inputs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--models", type=Path, default=Path(".demo"), help="the demo's cache: base/, experts/")
    arguments = parser.parse_args()
    rows, data = [], []
    for expert in sorted(path for path in (arguments.models / "experts").iterdir() if (path / "config.json").exists()):
        got = compare(arguments.models, expert, arguments.rounds)
        plain, *others = (1e3 * got[who] for who in ("forward", "with the base", "without"))
        added = [text for took in others for text in (f"{took:.0f}", f"{took / plain - 1:+.0%}")]
        name = expert.name.rsplit("-", 1)[0]
        rows.append([name, f"{got['tokens']:.0f}", f"{got['padded']:.0f}", f"{plain:.0f}", *added])
        data.append({"expert": name, **got})
        print(*rows[-1], flush=True)
    title = f"MiniLM-L6 on {TEXTS} texts, milliseconds, median of {arguments.rounds} interleaved rounds"
    print(measure.save("capture-cpu", title, [measure.table(COLUMNS, rows)], {"rows": data}))


if __name__ == "__main__":
    main()
