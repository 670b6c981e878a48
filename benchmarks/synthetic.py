"""Llama-shaped bfloat16 models on disk: a base and experts of it, as Hugging Face folders.

    python benchmarks/synthetic.py FOLDER --size 1b --experts 4     # 2.1 GB each, written in seconds
    python benchmarks/synthetic.py FOLDER --size 70b --sparse       # headers over holes: for isomerge plan

An expert is the base plus noise and a change of low rank, both about a twentieth of the weights. Equal options give
equal bytes. Noise is not drawn for every tensor, which would take minutes: each takes a stretch of one long sequence,
at a place that its name chooses; rows of a matrix differ, so that its rank is full.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isomerge.checkpoint.format import Entry, TensorSpec, build_header

WEIGHT, CHANGE = 0.02, 1e-3  # standard deviations
RANK = 8  # of the change that stands out of the noise
SEQUENCE = 2**24 + 43  # numbers drawn; odd, so that no two rows of a matrix start at the same place
SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Llama:
    """What config.json says of a model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "torch_dtype": "bfloat16",
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor in the order of the file."""
        hidden, narrow = self.hidden, self.hidden * self.key_value_heads // self.heads
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (narrow, hidden),
            "self_attn.v_proj": (narrow, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (self.intermediate, hidden),
            "mlp.up_proj": (self.intermediate, hidden),
            "mlp.down_proj": (hidden, self.intermediate),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, hidden)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
        shapes["model.norm.weight"] = (hidden,)
        return shapes if self.tied else {**shapes, "lm_head.weight": (self.vocabulary, hidden)}


SIZES: Mapping[str, Llama] = {
    "tiny": Llama(64, 160, 2, 4, 2, 256, True),  # 0.1e6 parameters, for tests
    "1b": Llama(2048, 8192, 16, 32, 8, 32000, True),  # 1.04e9: Llama-3.2-1B with a vocabulary of Llama 2
    "70b": Llama(8192, 28672, 80, 64, 8, 128256, False),  # 70.6e9: Llama-3.1-70B
}


def write_set(folder: Path, llama: Llama, experts: int, *, sparse: bool = False) -> None:
    """FOLDER/base and FOLDER/expert0 ...; with `sparse` the files hold headers alone and otherwise holes."""
    shapes, noise = llama.shapes(), None if sparse else _Noise()
    for name in ("base", *(f"expert{t}" for t in range(experts))):
        specs = [TensorSpec(key, torch.bfloat16, shape) for key, shape in shapes.items()]
        values = None if noise is None else (lambda spec, name=name: noise.weight(name, spec))
        write_model(folder / name, specs, llama.config(), values)


def write_model(
    folder: Path, specs: list[TensorSpec], config: Mapping[str, object], values: Callable[[TensorSpec], Tensor] | None
) -> None:
    """A folder with config.json, shards of at most 1 GB, or of one tensor, and their index; without values no data."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    shards = list(_shards(specs))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {spec.name: name for spec in shard}
        entries, end = [], 0
        for spec in shard:
            entries.append(Entry(spec.name, spec.dtype, spec.shape, end, end + spec.nbytes))
            end += spec.nbytes
        header = build_header(entries, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            for spec in shard if values is not None else ():
                file.write(memoryview(values(spec).view(torch.int16).numpy()).cast("B"))
            file.truncate(len(header) + end)
    index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(specs: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
    shard: list[TensorSpec] = []
    for spec in specs:
        if shard and sum(s.nbytes for s in shard) + spec.nbytes > SHARD_BYTES:
            yield shard
            shard = []
        shard.append(spec)
    yield shard


class _Noise:
    """A long sequence of normal numbers, read from places that names choose, and what is made of it."""

    def __init__(self) -> None:
        self._sequence = torch.randn(SEQUENCE, generator=torch.Generator().manual_seed(0))

    def weight(self, model: str, spec: TensorSpec) -> Tensor:
        """The tensor of the base, or of an expert: the base's, noise, and for matrices a change of low rank."""
        weight = self._take(spec.name, spec.numel).mul_(WEIGHT)
        if len(spec.shape) == 1:  # of a norm
            weight += 1
        if model != "base":
            weight.add_(self._take(f"{model} {spec.name}", spec.numel), alpha=CHANGE)
            if len(spec.shape) == 2:
                m, n = spec.shape
                factors = self._take(f"{model} {spec.name} factors", RANK * (m + n))
                A, B = factors[: RANK * m].view(m, RANK), factors[RANK * m :].view(RANK, n)
                weight.view(m, n).addmm_(A, B, alpha=CHANGE / RANK**0.5)
        return weight.view(spec.shape).bfloat16()

    def _take(self, name: str, count: int) -> Tensor:
        """The next `count` numbers from the name's place on, from the beginning again after the end; a copy."""
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % SEQUENCE
        parts = []
        while count:
            part = self._sequence[start : start + count]
            parts.append(part)
            count, start = count - len(part), 0
        return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--sparse", action="store_true", help="headers alone, the data are holes")
    arguments = parser.parse_args()
    write_set(arguments.folder, SIZES[arguments.size], arguments.experts, sparse=arguments.sparse)


if __name__ == "__main__":
    main()
