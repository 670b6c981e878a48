"""Reading torch.save files lazily, held to torch.load byte by byte, and every way they can be wrong."""

from __future__ import annotations

import argparse
import io
import os
import pickle
import random
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoints import DTYPES, pickles, random_tensor, same, small_state_dict, write_sharded

from isomerge.checkpoint import from_state_dict, open_checkpoint, reader
from isomerge.errors import InputError


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def views() -> dict[str, torch.Tensor]:
    """Every kind of view on a few storages: shared, shifted, transposed, strided, expanded, permuted."""
    base = random_tensor(torch.float32, (20, 30))
    cube = random_tensor(torch.bfloat16, (4, 5, 6), 1)
    return {
        "whole": base,
        "tied": base.view(20, 30),
        "rows": base[3:9],
        "columns": base[:, 4:7],
        "transposed": base.t(),
        "steps": base[::3, ::7],
        "reshaped": base.view(30, 20),
        "element": base[2, 5],
        "expanded": base[0:1].expand(4, 30),
        "permuted": cube.permute(2, 0, 1),
        "nothing": base[5:5],
    }


@pytest.mark.parametrize("buffer", [64 << 20, 40, 4], ids=["one read", "halves", "elements"])
def test_views_read_as_torch_loads_them(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(reader, "_BUFFER", buffer)
    path = saved(tmp_path / "v.pt", views())
    loaded = torch.load(path, weights_only=True)
    with open_checkpoint(path) as checkpoint, from_state_dict(loaded, "memory") as memory:
        assert dict(checkpoint.aliases) == {"tied": "whole"} == dict(memory.aliases)
        assert set(checkpoint.tensors) == set(loaded) - {"tied"}
        for name, tensor in loaded.items():
            for source in (checkpoint, memory):
                assert same(source.read(name), tensor), name
                assert source.read(name).is_contiguous()
                for start in range(0, tensor.numel(), 13):
                    for count in {0, 1, min(37, tensor.numel() - start), tensor.numel() - start}:
                        assert same(source.read(name, start, count), tensor.flatten()[start : start + count]), name


def test_every_dtype(tmp_path):
    tensors = {str(dtype): random_tensor(dtype, (3, 5)) for dtype in filter(pickles, DTYPES)}
    with open_checkpoint(saved(tmp_path / "d.pt", tensors)) as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())
        assert all(checkpoint.read(name, 4, 3).dtype == tensor.dtype for name, tensor in tensors.items())


def test_module_state_with_parameters_and_attributes(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    model[0].weight.marked = "by its author"
    tensors = dict(model.named_parameters())
    for content in (model.state_dict(), tensors, OrderedDict(model.state_dict(keep_vars=True))):
        with open_checkpoint(saved(tmp_path / "m.pth", content)) as checkpoint:
            assert set(checkpoint.tensors) == set(content)
            assert all(same(checkpoint.read(name), tensor.detach()) for name, tensor in content.items())


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "module"])
def test_wrapped_state_dict(tmp_path, wrapper):
    extras = {"epoch": 3, "lr": 0.1, "name": "x", "done": True, "hyper": {"a": [1, 2]}, "raw": b"\x80", "ids": {1, 2}}
    state = small_state_dict()
    extras["optimizer"] = {"state": {0: {"exp_avg": torch.ones(2)}}, "groups": [{"betas": (0.9, 0.99)}]}
    with open_checkpoint(saved(tmp_path / "w.ckpt", {**extras, wrapper: {**state, "count": 5}})) as checkpoint:
        assert set(checkpoint.tensors) == set(state)
        assert all(same(checkpoint.read(name), tensor) for name, tensor in state.items())


def test_folders_with_bin_files(tmp_path):
    tensors = small_state_dict()
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    write_sharded(tmp_path / "sharded", {f"pytorch_model-{i}.bin": part for i, part in enumerate(parts)})
    (tmp_path / "single").mkdir()
    saved(tmp_path / "single" / "pytorch_model.bin", tensors)
    for folder in ("single", "sharded"):
        with open_checkpoint(tmp_path / folder) as checkpoint:
            assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_file_zipped_again_is_read_at_its_new_offsets(tmp_path):
    original = saved(tmp_path / "o.pt", small_state_dict())
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(tmp_path / "again.pt", "w") as target:
        for entry in reversed(source.infolist()):
            target.writestr(entry.filename, source.read(entry))
    with open_checkpoint(tmp_path / "again.pt") as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in small_state_dict().items())


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


CONTENTS = {
    "needs code": (
        lambda: {"w": torch.ones(2), "args": argparse.Namespace(x=1)},
        ["argparse.Namespace", "safetensors"],
    ),
    "whole model": (lambda: torch.nn.Linear(2, 2), ["torch.nn.modules.linear.Linear"]),
    "a tensor": (lambda: torch.ones(2), ["one tensor", "state dict"]),
    "a list": (lambda: [torch.ones(2)], ["list"]),
    "no tensors": (lambda: {"epoch": 3, "lr": 0.1}, ["no tensors", "'epoch', 'lr'"]),
    "empty": (dict, ["no tensors", "none"]),
    "unknown wrapper": (lambda: {"net": {"w": torch.ones(2)}}, ["'net'", "of tensors"]),
    "two wrappers": (lambda: {"model": {"w": torch.ones(2)}, "state_dict": {}}, ["'state_dict', 'model'"]),
    "key not a name": (lambda: {3: torch.ones(2)}, ["key 3"]),
    "sparse": (lambda: {"w": torch.eye(3).to_sparse()}, ["'w'", "sparse"]),
    "quantized": (lambda: {"w": quantized()}, ["'w'", "quantized"]),
    "meta": (lambda: {"w": torch.ones(2, device="meta")}, ["'w'", "without data"]),
    "conjugate": (lambda: {"w": torch.ones(2, dtype=torch.complex64).conj()}, ["'w'", "resolve_conj"]),
    "complex128": (lambda: {"w": torch.ones(2, dtype=torch.complex128)}, ["'w'", "complex128"]),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(("content", "fragments"), CONTENTS.values(), ids=CONTENTS.keys())
def test_not_a_state_dict(tmp_path, content, fragments):
    path = saved(tmp_path / "c.pt", content())
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(fragment in message for fragment in [str(path), *fragments]), message


class Raw:
    """Pickles as a call of torch._utils._rebuild_tensor_v2 with arguments that torch itself would never write."""

    def __init__(self, **arguments: object) -> None:
        self.arguments = arguments

    def __reduce__(self):
        values = {"offset": 0, "shape": (2,), "stride": (1,), **self.arguments}
        rest = (values["offset"], values["shape"], values["stride"], False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, (values.get("storage", Raw), *rest)


def write_zip(path: Path, value: object, *, numel: int = 2, data: bytes = bytes(8), **records: bytes) -> Path:
    """A torch file with one storage of float32, and a pickle of `value` in which the class Raw means that storage."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if item is Raw else None

    text = io.BytesIO()
    Pickler(text, protocol=2).dump(value)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": text.getvalue(), "data/0": data, **records}.items():
            archive.writestr(f"archive/{name}", content)
    return path


HOSTILE = {
    "beyond the storage": (Raw(shape=(3,)), ["'w'", "(3,)", "outside its storage"]),
    "shifted beyond": (Raw(offset=1), ["'w'", "outside"]),
    "stride beyond": (Raw(stride=(9,)), ["'w'", "outside"]),
    "negative stride": (Raw(stride=(-1,)), ["'w'", "no sense"]),
    "negative offset": (Raw(offset=-1), ["'w'", "no sense"]),
    "huge shape": (Raw(shape=(2**62, 2**62), stride=(0, 0)), ["'w'", "outside"]),
    "ranks differ": (Raw(shape=(1, 2)), ["'w'", "no sense"]),
    "boolean shape": (Raw(shape=(True,)), ["'w'", "no sense"]),
    "no storage": (Raw(storage=None), ["'w'", "no sense"]),
}


@pytest.mark.parametrize(("tensor", "fragments"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_tensor(tmp_path, tensor, fragments):
    with open_checkpoint(write_zip(tmp_path / "good.pt", {"w": Raw()})) as checkpoint:
        assert torch.equal(checkpoint.read("w"), torch.zeros(2))
    path = write_zip(tmp_path / "h.pt", {"w": tensor})
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    assert all(fragment in str(caught.value) for fragment in [str(path), *fragments]), caught.value


def test_storage_shorter_than_its_pickle_says(tmp_path):
    path = write_zip(tmp_path / "s.pt", {"w": Raw()}, data=bytes(4))
    with pytest.raises(InputError, match=r"'w'.*data/0 has 4 bytes, expected 8"):
        open_checkpoint(path)


def test_nothing_of_a_pickle_runs(tmp_path):
    class Runs:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(InputError, match=r"mkdir"):
        open_checkpoint(write_zip(tmp_path / "r.pt", {"w": Runs()}))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_cannot_reach_into_this_process(tmp_path):
    # BUILD on what a global gives sets attributes of it: here on every callable the reader knows.
    before = repr(small_state_dict())
    for module, name in [
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        ("torch", "FloatStorage"),
    ]:
        text = f"\x80\x02c{module}\n{name}\n".encode() + b"N}X\x08\0\0\0functionNs\x86b."
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            archive.writestr("archive/data.pkl", text)
        with pytest.raises(InputError, match="damaged"):
            open_checkpoint(tmp_path / "b.pt")
    assert repr(small_state_dict()) == before
    with open_checkpoint(write_zip(tmp_path / "good.pt", {"w": Raw()})) as checkpoint:
        assert list(checkpoint.tensors) == ["w"]


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def script(path: Path) -> None:
    write_zip(path, {"w": Raw()}, **{"constants.pkl": b""})


FILES = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "not a zip": (lambda path: path.write_bytes(b"hello" * 20), "no zip file"),
    "git lfs pointer": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "legacy": (
        lambda path: torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "before 1.6",
    ),
    "compressed": (compressed, "compressed"),
    "another zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a/b", b"c"), r"damaged|no data\.pkl"),
    "TorchScript": (script, "TorchScript"),
    "big-endian": (lambda path: write_zip(path, {"w": Raw()}, byteorder=b"big"), "big-endian"),
    "bad pickle": (lambda path: write_zip(path, {"w": Raw()}, **{"data.pkl": b"\x80\x02}"}), "pickle is damaged"),
}


@pytest.mark.parametrize(("write", "pattern"), FILES.values(), ids=FILES.keys())
def test_wrong_file(tmp_path, write, pattern):
    path = tmp_path / "f.pt"
    write(path)
    with pytest.raises(InputError, match=pattern) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_truncated_or_mutated_raises_nothing_but_input_errors(tmp_path):
    content = saved(tmp_path / "whole.pt", small_state_dict()).read_bytes()
    path = tmp_path / "m.pt"
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=str(path)):
            open_checkpoint(path)
    chance = random.Random(0)
    messages = []
    for _ in range(400):
        mutated = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            mutated[chance.randrange(len(mutated))] = chance.randrange(256)
        path.write_bytes(mutated)
        try:
            with open_checkpoint(path) as checkpoint:
                for name in checkpoint.tensors:
                    checkpoint.read(name)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert all(message.startswith(str(path)) and "\n" not in message for message in messages)


MEMORY = {
    "not a tensor": (lambda: {"w": 3}, "int"),
    "sparse": (lambda: {"w": torch.eye(2).to_sparse()}, "sparse"),
    "meta": (lambda: {"w": torch.ones(2, device="meta")}, "meta"),
    "complex128": (lambda: {"w": torch.ones(2, dtype=torch.complex128)}, "complex128"),
}


@pytest.mark.parametrize(("content", "fragment"), MEMORY.values(), ids=MEMORY.keys())
def test_not_a_state_dict_in_memory(content, fragment):
    with pytest.raises(InputError, match=fragment) as caught:
        from_state_dict(content(), "expert 1")
    assert str(caught.value).startswith("expert 1: ")
    assert "'w'" in str(caught.value)
