"""From a path a user gives to the files that hold the weights: single files, Hugging Face folders, shards."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from isomerge.checkpoint.files import read_bytes
from isomerge.checkpoint.format import MAX_HEADER, read_json
from isomerge.checkpoint.reader import Checkpoint, FileCheckpoint, Scan, open_header, scan_safetensors
from isomerge.checkpoint.show import show
from isomerge.checkpoint.torch_file import scan_torch_file
from isomerge.errors import InputError

# Looked for in a folder, in the order of transformers: the single file before the index, safetensors before pickles.
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = "model.safetensors.index.json"
CHECKSUMS = "SHA256SUMS"
_NAMES = (SAFETENSORS, SAFETENSORS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")

_SCANNERS: Mapping[str, Callable[[Path], Scan]] = {
    ".safetensors": scan_safetensors,
    ".pt": scan_torch_file,
    ".pth": scan_torch_file,
    ".bin": scan_torch_file,
    ".ckpt": scan_torch_file,
}
_WEIGHTS = (*_SCANNERS, ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz", ".npy", ".pkl", ".tflite", ".mlmodel")
_NOT_CARRIED = ("README.md", "trainer_state.json", CHECKSUMS)  # they speak of another model, or of its training
_SMALL = 64 << 20  # bytes; the largest tokenizer.json in use has 33 MB


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Read and prove the headers of a model: a Hugging Face folder, a safetensors file, or a torch state dict.

    Folders hold model.safetensors, pytorch_model.bin, or shards with an index. Raises InputError, before any tensor
    is read, for whatever is missing, damaged or ambiguous.
    """
    path = Path(path)
    try:
        is_folder, exists = path.is_dir(), os.path.lexists(path)
    except ValueError:
        raise InputError(f"{show(str(path))}: not a path, it has a null byte in it; check the path") from None
    except OSError as error:  # a name longer than the file system's, a folder above that may not be searched
        raise InputError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    if is_folder:
        try:
            weights, side_files = _find_weights(path), _side_files(path)
        except OSError as error:
            raise InputError(f"{path}: the folder cannot be read: {error.strerror}") from None
        scans = _scan_shards(weights) if weights.suffix == ".json" else [_scan(weights)]
        return FileCheckpoint(path, scans, side_files)
    if not exists:
        raise InputError(f"{path}: no such file or folder; check the path")
    if path.name.endswith(".index.json"):
        raise InputError(f"{path}: this is the index of a sharded model; give its folder, {path.parent}")
    return FileCheckpoint(path, [_scan(path)])


def _scan(path: Path) -> Scan:
    scanner = _SCANNERS.get(path.suffix)
    if scanner is None:
        known = ", ".join(_SCANNERS)
        raise InputError(f"{path}: unknown kind of file {show(path.suffix)}, expected one of {known}, or a folder")
    return scanner(path)


def _find_weights(folder: Path) -> Path:
    for name in _NAMES:
        if os.path.lexists(folder / name):
            return folder / name
    message = f"{folder}: no weights in this folder, looked for {', '.join(_NAMES)}"
    others = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _SCANNERS)
    raise InputError(message + (f"; to read {others[0]}, give the file itself" if others else "; check the path"))


def _scan_shards(index: Path) -> list[Scan]:
    """The shards an index names, in the order of their names; InputError unless they hold exactly its tensors."""
    weight_map = _read_index(index)
    home: dict[str, Path] = {}  # tensor -> the shard it was found in
    scans = []
    for shard in sorted(set(weight_map.values())):
        file = index.parent / shard
        if not os.path.lexists(file):
            raise InputError(f"{file}: no such file, {index.name} names it; download the missing shard")
        scan = _scan(file)
        for name in (*(info.name for info in scan.tensors), *scan.aliases):
            if name in home:
                raise InputError(f"{file}: tensor {show(name)} is also in {home[name].name}, expected it in one shard")
            if name not in weight_map:
                raise InputError(f"{file}: tensor {show(name)} is not in {index.name}; the shard is of another model")
            home[name] = file
        scans.append(scan)
    for name, shard in weight_map.items():
        if name not in home:
            raise InputError(f"{index.parent / shard}: tensor {show(name)} is not in it, {index.name} says it is")
        if home[name].name != shard:
            raise InputError(f"{home[name]}: tensor {show(name)} is here, {index.name} has it in {show(shard)}")
    return scans


def _read_index(index: Path) -> dict[str, str]:
    with open_header(index) as file:
        text = read_bytes(file.fileno(), 0, MAX_HEADER + 1)
    if not text:
        raise InputError(f"{index}: the file is empty, expected an index of shards; download it again")
    weight_map = read_json(index, text, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: weight_map is {show(weight_map)}, expected shard names by tensor; fetch it again")
    suffix = ".safetensors" if index.name == SAFETENSORS_INDEX else ".bin"
    for name, shard in weight_map.items():
        # Judged by the name alone: in a Hugging Face cache every shard is a link to somewhere else.
        inside = isinstance(shard, str) and Path(shard).name == shard and len(shard) < 256
        if not inside or "\\" in shard or not shard.isprintable():
            raise InputError(f"{index}: tensor {show(name)}: shard {show(shard)} is not the name of a file beside it")
        if not shard.endswith(suffix):
            raise InputError(f"{index}: tensor {show(name)}: shard {show(shard)} does not end in {suffix}")
    return weight_map


def _side_files(folder: Path) -> tuple[Path, ...]:
    """Configuration, tokenizer, code and licence: small files that are not weights, in the folder and one level below.

    Subfolders that hold weights of their own are other models (checkpoint-500, onnx) and are left alone.
    """
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            inner = sorted(entry.iterdir())
            if not any(file.suffix in _WEIGHTS for file in inner):
                found += [file for file in inner if _is_side_file(file)]
        elif _is_side_file(entry):
            found.append(entry)
    return tuple(found)


def _is_side_file(file: Path) -> bool:
    name = file.name
    ours = name.startswith("isomerge_") and file.suffix in (".json", ".yaml")
    if ours or name.startswith(".") or name.endswith(".index.json") or name in _NOT_CARRIED or file.suffix in _WEIGHTS:
        return False
    return file.is_file() and file.stat().st_size <= _SMALL
