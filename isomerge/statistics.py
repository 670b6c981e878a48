"""The statistics file of an expert: for each layer's matrix, YᵀY [d, d] of what the layer saw on a few samples.

Y are the layer's inputs X (space "input", d = n), or its feature shifts X Δᵀ (space "output", d = m). Inputs of fewer
tokens than d may stand there themselves, [tokens, d]: they are less to store, and give every moment. One safetensors
file: a tensor per distinct moment, and one JSON object under `isomerge_statistics` in the metadata for the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from isomerge import ops
from isomerge.checkpoint import Checkpoint, write_safetensors
from isomerge.checkpoint.files import memory_of
from isomerge.checkpoint.format import read_json, show
from isomerge.checkpoint.reader import FileCheckpoint, TensorInfo, scan_safetensors
from isomerge.errors import InputError

KEY = "isomerge_statistics"
FORMAT = 1
SPACES = ("input", "output")

_AGAIN = "capture the statistics again"
_INPUTS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_RUNS, _RUN = 4, 64  # values of a tensor in its fingerprint: evenly spaced runs, and the length of each
_ROWS = 512  # rows of a moment that are compared with its columns at a time
_ASYMMETRY = 1024  # eps * the largest entry: what sums in different orders leave between M[i, j] and M[j, i]


@dataclass(frozen=True, slots=True)
class Layer:
    """What is known of one matrix: `tokens` rows of Y were seen, d = `size`; `stored` names the tensor with YᵀY or Y.

    Layers that read the same input share one stored tensor. `space` is "input" or "output".
    """

    tokens: int
    space: str
    size: int
    stored: str


class Statistics:
    """An open statistics file, a context manager; moments are read on request.

    path              the file
    digest            sha256 (hex) of its header and size
    samples           how many samples the expert was run on
    fingerprint       of the expert, over the names of `layers`
    base_fingerprint  of the base in Δ = expert - base, over the layers in output space; None without any
    layers            tensor name of the expert's checkpoint -> Layer
    version           the isomerge that wrote the file
    """

    def __init__(self, path: Path, file: Checkpoint, header: Mapping[str, object]) -> None:
        """Use `open_statistics`."""
        self.path = path
        self._file = file
        self.digest = file.digest
        self.samples = _count(path, "samples", header.get("samples"))
        self.fingerprint = _hex(path, "fingerprint", header.get("fingerprint"))
        base = header.get("base_fingerprint")
        self.base_fingerprint = None if base is None else _hex(path, "base_fingerprint", base)
        self.version = str(header.get("isomerge", ""))
        layers = header.get("layers")
        if not isinstance(layers, dict) or not layers:
            raise InputError(f"{path}: layers is {show(layers)}, expected at least one layer; {_AGAIN}")
        self.layers: Mapping[str, Layer] = {name: _layer(path, file, name, value) for name, value in layers.items()}
        unused = set(file.tensors) - {layer.stored for layer in self.layers.values()}
        if unused:
            raise InputError(f"{path}: tensor {show(min(unused))} belongs to no layer; {_AGAIN}")
        if self.base_fingerprint is None and any(layer.space == "output" for layer in self.layers.values()):
            raise InputError(f"{path}: base_fingerprint is missing, expected one for space output; {_AGAIN}")

    def moment(self, name: str) -> Tensor:
        """YᵀY [d, d] of a layer, on the CPU, in float32 or float64. Raises as `stored`, and if it overflows."""
        value = self.stored(name)
        try:
            return as_moment(value)
        except ValueError:
            raise InputError(f"{self.path}: {name}: its second moment overflows float32; {_AGAIN}") from None

    def holds_inputs(self, name: str) -> bool:
        """Whether the inputs of a layer are stored and not their moment."""
        layer = self.layers[name]
        return self._file.tensors[layer.stored].shape[0] < layer.size

    def stored(self, name: str) -> Tensor:
        """YᵀY [d, d] of a layer, or its inputs Y [tokens, d], tokens < d; on the CPU, as stored.

        KeyError for an unknown layer; InputError unless it is finite and, if a moment, symmetric to rounding and
        without a negative diagonal entry.
        """
        value = self._file.read(self.layers[name].stored)
        fault = fault_of(value)
        if fault is not None:
            raise InputError(f"{self.path}: {name}: {fault}; {_AGAIN}")
        return value

    def close(self) -> None:
        """Let go of the file; no moment can be read afterwards."""
        self._file.close()

    def __enter__(self) -> Statistics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_statistics(path: str | Path) -> Statistics:
    """The statistics file at `path`; its header is read and proved, moments are read on request.

    InputError for a file that is missing, damaged, of another kind or of a newer format, whose layers and tensors do
    not belong together, or in which a layer saw no token.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: this is a folder, expected a statistics file as `isomerge capture` writes it")
    scan = scan_safetensors(path)
    text = scan.metadata.get(KEY)
    if text is None:
        raise InputError(f"{path}: not a statistics file, {KEY} is not in its metadata; make one with isomerge capture")
    header = read_json(path, text.encode("utf-8", "surrogatepass"), KEY)
    if header.get("format") != FORMAT:
        raise InputError(
            f"{path}: the format of the statistics is {show(header.get('format'))}, expected {FORMAT}; update isomerge,"
            f" or {_AGAIN}"
        )
    return Statistics(path, FileCheckpoint(path, [scan]), header)


def write_statistics(
    path: str | Path,
    stored: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
    *,
    samples: int,
    fingerprint: str,
    base_fingerprint: str | None = None,
) -> int:
    """Writes a statistics file, which appears whole or not at all; the number of bytes written.

    `stored` are the tensors by name: moments [d, d] in float32 or float64, or inputs [tokens, d], tokens < d, in any
    floating dtype; `layers` as in `Statistics`. Equal input gives equal bytes. ValueError for layers and tensors that
    do not belong together, InputError for values that can be neither.
    """
    if set(stored) != {layer.stored for layer in layers.values()}:
        raise ValueError("write_statistics: the names of the tensors are not those that the layers are stored in")
    for name, layer in layers.items():
        value = stored[layer.stored]
        if layer.space not in SPACES or layer.tokens < 1:
            raise ValueError(f"write_statistics: {name}: expected one of {SPACES} and at least one token, got {layer}")
        if not _belongs(layer, tuple(value.shape), value.dtype):
            raise ValueError(
                f"write_statistics: {name}: expected {_expected(layer)}, got {value.dtype} {tuple(value.shape)}"
            )
    for name, value in stored.items():
        fault = fault_of(value)
        if fault is not None:
            raise InputError(f"{path}: {name}: {fault}; nothing was written")
    from isomerge import __version__

    header = {
        "format": FORMAT,
        "isomerge": __version__,
        "samples": samples,
        "fingerprint": fingerprint,
        "base_fingerprint": base_fingerprint,
        "layers": {name: asdict(layers[name]) for name in sorted(layers)},
    }
    ordered = {name: stored[name] for name in sorted(stored)}
    return write_safetensors(Path(path), ordered, {KEY: json.dumps(header, ensure_ascii=False)})


def fingerprint(checkpoint: Checkpoint, names: Iterable[str]) -> str:
    """sha256 (hex) over the sorted names, their shapes and up to 256 values of each in float32.

    A checkpoint has the same fingerprint in bfloat16 and
    loaded as float32, two experts of one base have different ones. InputError if a name is not in the checkpoint.
    """
    total = hashlib.sha256()
    for name in sorted(names):
        info = checkpoint.tensors.get(checkpoint.aliases.get(name, name))
        if info is None:
            raise InputError(f"{checkpoint.label}: {name} is missing, expected it as the statistics have it; {_AGAIN}")
        total.update(json.dumps([name, list(info.shape)]).encode())
        total.update(sample_values(checkpoint, name))
    return total.hexdigest()


def sample_values(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> bytes:
    """Up to 256 values of a tensor, rounded to `dtype`, as bytes in float32: all, or 4 evenly spaced runs of 64."""
    info = checkpoint.tensors[checkpoint.aliases.get(name, name)]
    values = torch.cat([checkpoint.read(name, start, count) for start, count in _runs(info)])
    values = values.to(dtype).float()
    return bytes(memory_of(values))


def as_moment(value: Tensor) -> Tensor:
    """YᵀY [d, d] in float32 or float64, of itself or of inputs Y [tokens, d] with tokens < d."""
    return ops.shift_cov(value) if value.shape[0] < value.shape[1] else value


def fault_of(value: Tensor) -> str | None:
    """Why a tensor is neither a second moment [d, d] nor finite inputs [tokens, d], tokens < d; None if it is one."""
    if value.shape[0] == value.shape[1]:
        return moment_fault(value)
    if bool(torch.isfinite(value.sum(dtype=torch.float64))) or bool(torch.isfinite(value).all()):
        return None
    return f"the inputs have {int((~torch.isfinite(value)).sum())} non-finite values, expected none"


def moment_fault(moment: Tensor) -> str | None:
    """Why a matrix is no second moment, or None: it must be finite, symmetric to rounding, its diagonal not negative.

    Compared in blocks of rows, so that a moment is never in memory twice.
    """
    if not bool(torch.isfinite(moment.sum())) and not bool(torch.isfinite(moment).all()):
        return f"the moment has {int((~torch.isfinite(moment)).sum())} non-finite values, expected none"
    if bool((moment.diagonal() < 0).any()):
        return "the moment has negative values on its diagonal, expected a sum of squares"
    bound = _ASYMMETRY * torch.finfo(moment.dtype).eps * float(moment.diagonal().max())
    for start in range(0, len(moment), _ROWS):
        rows = slice(start, start + _ROWS)
        worst = float((moment[rows] - moment[:, rows].mT).abs().max())
        if worst > bound:
            return f"the moment is not symmetric, M[i, j] and M[j, i] differ by {worst:.3g}"
    return None


def _runs(info: TensorInfo) -> list[tuple[int, int]]:
    """(flat index, length) of the values of a tensor that its fingerprint covers."""
    if info.numel <= _RUNS * _RUN:
        return [(0, info.numel)]
    return [(i * (info.numel - _RUN) // (_RUNS - 1), _RUN) for i in range(_RUNS)]


def _layer(path: Path, file: Checkpoint, name: str, value: object) -> Layer:
    where = f"{path}: layer {show(name)}:"
    if not isinstance(value, dict):
        raise InputError(f"{where} is {show(value)}, expected tokens, space, size and stored; {_AGAIN}")
    space, stored = value.get("space"), value.get("stored")
    if space not in SPACES:
        raise InputError(f"{where} space is {show(space)}, expected one of {', '.join(SPACES)}; {_AGAIN}")
    size = _count(where, "size", value.get("size"))
    info = file.tensors.get(stored) if isinstance(stored, str) else None
    if info is None:
        raise InputError(f"{where} its moment {show(stored)} is not in the file; {_AGAIN}")
    tokens = value.get("tokens")
    if tokens == 0:
        raise InputError(f"{where} it saw 0 tokens; {_AGAIN} with samples that reach it")
    assert isinstance(stored, str)
    layer = Layer(_count(where, "tokens", tokens), space, size, stored)
    if not _belongs(layer, info.shape, info.dtype):
        raise InputError(
            f"{where} its tensor has {info.dtype} and shape {list(info.shape)}, expected {_expected(layer)}; {_AGAIN}"
        )
    return layer


def _belongs(layer: Layer, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a tensor can be what is stored of a layer."""
    if shape == (layer.size, layer.size):
        return dtype in (torch.float32, torch.float64)
    inputs = layer.space == "input" and layer.tokens < layer.size
    return inputs and shape == (layer.tokens, layer.size) and dtype in _INPUTS


def _expected(layer: Layer) -> str:
    moment = f"a moment [{layer.size}, {layer.size}] in float32 or float64"
    inputs = f", or inputs [{layer.tokens}, {layer.size}]" if layer.space == "input" else ""
    return moment + (inputs if layer.tokens < layer.size else "")


def _count(where: object, name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(
            f"{str(where).rstrip(':')}: {name} is {show(value)}, expected a whole number above 0; {_AGAIN}"
        )
    return value


def _hex(path: Path, name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{path}: {name} is {show(value)}, expected a digest; {_AGAIN}")
    return value
