"""Tiny checkpoints for tests, whole and broken ones, written without the code under test."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes read as `dtype` (so NaNs and all other patterns occur); booleans are 0 or 1."""
    high = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    count = dtype.itemsize * torch.Size(shape).numel()
    return torch.randint(0, high, (count,), generator=generator, dtype=torch.uint8).view(dtype).reshape(shape)


@cache
def pickles(dtype: torch.dtype) -> bool:
    """Whether torch can save tensors of `dtype`: 2.4 cannot save unsigned integers of more than 8 bits."""
    try:
        torch.save(torch.empty(1, dtype=dtype), BytesIO())
    except KeyError:
        return False
    return True


def same(left: Tensor, right: Tensor) -> bool:
    """Equal dtype, shape and bytes; NaNs are equal to themselves."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def small_state_dict(seed: int = 0) -> dict[str, Tensor]:
    """Names as in a language model, several dtypes, a scalar and an empty tensor."""
    return {
        "embed.weight": random_tensor(torch.bfloat16, (7, 4), seed),
        "layers.0.proj.weight": random_tensor(torch.float32, (4, 6), seed + 1),
        "layers.0.norm.weight": random_tensor(torch.float32, (5,), seed + 2),
        "layers.1.proj.weight": random_tensor(torch.float16, (3, 2, 4), seed + 3),
        "step": random_tensor(torch.int64, (), seed + 4),
        "empty": torch.empty(0, 3),
    }


def write_raw(path: Path, header: bytes | Mapping[str, object], data: bytes = b"") -> Path:
    """A file in the shape of safetensors, with any header and any data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def write_sharded(folder: Path, shards: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """A Hugging Face folder with these shards (by file name), an index and a config."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in shards.items():
        if name.endswith(".bin"):
            torch.save(dict(tensors), folder / name)
        else:
            save_file(dict(tensors), folder / name, metadata={"format": "pt"})
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    base = "pytorch_model.bin" if any(name.endswith(".bin") for name in shards) else "model.safetensors"
    (folder / f"{base}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    return folder


def model_files(parent: Path) -> list[Path]:
    """Every file below `parent`, hidden folders included, that makes a folder load as a model."""
    found = [Path(folder) / name for folder, _, names in os.walk(parent) for name in names]
    return [file for file in found if file.suffix == ".safetensors" or file.name == "config.json"]
