"""Tiny checkpoints with the key names of real ones, for tests of whole merges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from spectra import relative
from torch import Tensor

from isomerge.checkpoint import from_state_dict
from isomerge.methods import METHODS
from isomerge.statistics import Layer, fingerprint, write_statistics

WITHOUT_STATISTICS = [name for name, row in METHODS.items() if not row.moments]
WIDTH, INNER, WORDS, LAYERS = 16, 24, 40, 2


def bert_state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A BERT-like state dict: embeddings, two layers, a pooler and a buffer of positions."""
    random = torch.Generator().manual_seed(seed)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    state = {
        "embeddings.position_ids": torch.arange(12)[None],
        "embeddings.word_embeddings.weight": new(WORDS, WIDTH),
        "embeddings.position_embeddings.weight": new(12, WIDTH),
        "embeddings.LayerNorm.weight": new(WIDTH),
        "embeddings.LayerNorm.bias": new(WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}"
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            state[f"{prefix}.{name}.weight"] = new(WIDTH, WIDTH)
            state[f"{prefix}.{name}.bias"] = new(WIDTH)
        state[f"{prefix}.intermediate.dense.weight"] = new(INNER, WIDTH)
        state[f"{prefix}.output.dense.weight"] = new(WIDTH, INNER)
        state[f"{prefix}.output.LayerNorm.weight"] = new(WIDTH)
    state["pooler.dense.weight"] = new(WIDTH, WIDTH)
    return state


def tuned(base: Mapping[str, Tensor], seed: int, size: float = 0.1) -> dict[str, Tensor]:
    """The base with a random update of relative size `size` on every floating tensor."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: (value + size * torch.randn(value.shape, generator=random)).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in base.items()
    }


def matrices(state: Mapping[str, Tensor]) -> list[str]:
    """The names of the linear layers' weights."""
    return [name for name, value in state.items() if value.dim() == 2 and name.startswith(("encoder", "pooler"))]


def read_from(name: str) -> str:
    """The layer whose inputs the layer `name` reads: query, key and value share theirs."""
    return name.replace(".self.key.", ".self.query.").replace(".self.value.", ".self.query.")


def random_inputs(base: Mapping[str, Tensor], seed: int, *, tokens: int = 30) -> dict[str, Tensor]:
    """Random inputs [tokens, n] of each linear layer; layers that read the same have the same."""
    found = {}
    for name in matrices(base):
        n, source = base[name].shape[1], sorted(matrices(base)).index(read_from(name))
        random = torch.Generator().manual_seed(1000 * seed + source)
        found[name] = torch.randn(tokens, n, generator=random) * torch.linspace(0.2, 2, n)
    return found


def second_moments(
    base: Mapping[str, Tensor], expert: Mapping[str, Tensor], seed: int, *, tokens: int = 30, output: str = ""
) -> dict[str, Tensor]:
    """XᵀX of random inputs of each linear layer, of X Δᵀ where `output` is in its name and it is not square."""
    moments = {}
    for name, X in random_inputs(base, seed, tokens=tokens).items():
        shape = base[name].shape
        if output and output in name and shape[0] != shape[1]:
            X = X @ (expert[name].float() - base[name].float()).mT
        moments[name] = X.mT @ X
    return moments


def save_statistics(
    path: Path,
    base: Mapping[str, Tensor],
    expert: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    *,
    tokens: int = 30,
) -> Path:
    """A statistics file of `expert`, of moments or inputs; the space of a moment is told by its size, layers with equal
    ones share one."""
    layers = {}
    for name, moment in moments.items():
        space = "input" if moment.shape[1] == base[name].shape[1] else "output"
        stored = read_from(name) if space == "input" and read_from(name) in moments else name
        layers[name] = Layer(tokens, space, moment.shape[1], stored)
    shifts = [name for name, layer in layers.items() if layer.space == "output"]
    write_statistics(
        path,
        {layer.stored: moments[layer.stored] for layer in layers.values()},
        layers,
        samples=4,
        fingerprint=fingerprint(from_state_dict(expert, "expert"), layers),
        base_fingerprint=fingerprint(from_state_dict(base, "base"), shifts) if shifts else None,
    )
    return path


def save_model(folder: Path, state: Mapping[str, Tensor], **config: object) -> Path:
    """A Hugging Face folder with one safetensors file, a config and a tokenizer file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "torch_dtype": "float32", **config}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def bert_models(folder: Path, experts: int = 3, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Saves `base`, `e0`, `e1`, ... below `folder`; the state dicts, the base first."""
    states = [bert_state(0, dtype)]
    states += [tuned(states[0], seed + 1) for seed in range(experts)]
    for name, state in zip(["base", *(f"e{i}" for i in range(experts))], states, strict=True):
        save_model(folder / name, state)
    return states


def recipe_for(method: str, experts: int = 3, **keys: object) -> dict[str, object]:
    """The recipe that merges what `bert_models` saved."""
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": f"e{i}"} for i in range(experts)],
        **keys,
    }


def write_recipe(folder: Path, recipe: Mapping[str, object], name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False))
    return path


def load_output(folder: Path) -> dict[str, Tensor]:
    """All tensors of a merged model, read by the safetensors library."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    shards = {shard: load_file(folder / shard) for shard in sorted(set(weight_map.values()))}
    assert sum(map(len, shards.values())) == len(weight_map)
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal names, dtypes and bits."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    """Equal names and dtypes; updates of the base that both may have in error by 1e-4, other values equal."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        if value.is_floating_point():
            assert relative(found[name] - base[name], value - base[name]) <= 2e-4, name
        else:
            assert torch.equal(found[name], value), name
