"""The pickle inside a torch file, read with an allow-list that only builds inert descriptions of tensors.

No class of torch and no code of the file's choosing comes to life. Everything the pickle can name is an immutable
tuple, so that it cannot change this process either, and the unpickler is Python's own in Python: the one in C
allocates 64 GiB for a memo index of four bytes. What makes a few bytes of a file cost memory or hours is refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class ForbiddenGlobal(Exception):
    """The pickle asks for the Python object `str(self)`."""


class Storage(NamedTuple):
    """A stored block of bytes, in the zip record `data/<key>`."""

    dtype: torch.dtype
    key: str
    nbytes: int


class Record(NamedTuple):
    """A strided tensor, with the fields as the file has them, unchecked."""

    storage: object
    offset: object
    shape: object
    stride: object
    dtype: object  # None: the storage's
    flags: object  # {"conj": True} and the like, or None


class Foreign(NamedTuple):
    """Something known that is of no use as weights, such as "a sparse tensor"."""

    what: str


class Table(dict[object, object]):
    """An OrderedDict of the file, made empty and filled; the attributes it carries (`_metadata`) are dropped."""

    def __init__(self) -> None:  # a copy of another table, and one of that, would cost a few bytes each
        super().__init__()

    def __setstate__(self, state: object) -> None:
        del state


class _StorageType(NamedTuple):
    dtype: torch.dtype


class _Call(NamedTuple):
    function: Callable[..., object]

    def __call__(self, *arguments: object) -> object:
        return self.function(*arguments)


_TENSOR_TYPE = Foreign("a tensor type")


def _tensor(storage: object, offset: object, shape: object, stride: object, *rest: object) -> Record:
    # Version 2 goes on with requires_grad, hooks and, at times, flags.
    return Record(storage, offset, shape, stride, None, rest[2] if len(rest) > 2 else None)


def _tensor_v3(storage: object, offset: object, shape: object, stride: object, *rest: object) -> Record:
    # requires_grad, hooks, dtype and, at times, flags.
    return Record(storage, offset, shape, stride, rest[2], rest[3] if len(rest) > 3 else None)


def _typed(rebuild: object, kind: object, arguments: Any, state: object) -> object:
    """A tensor with attributes of its own, which are dropped."""
    return rebuild(*arguments) if kind == _TENSOR_TYPE and isinstance(rebuild, _Call) else Foreign("a tensor subclass")


def _foreign(what: str) -> _Call:
    return _Call(lambda *arguments: Foreign(what))


_ALLOWED: Mapping[str, object] = {
    "collections.OrderedDict": _Call(Table),
    "collections.Counter": _foreign("a counter"),
    "builtins.set": _foreign("a set"),
    "builtins.bytearray": _foreign("a bytearray"),
    "builtins.complex": _foreign("a complex number"),
    "_codecs.encode": _foreign("bytes"),  # how protocol 2 spells them
    "torch.Size": _Call(lambda sizes=(): sizes),
    "torch.device": _foreign("a device"),
    "torch.serialization._get_layout": _foreign("a layout"),
    "torch.Tensor": _TENSOR_TYPE,
    "torch._tensor.Tensor": _TENSOR_TYPE,
    "torch.nn.parameter.Parameter": _TENSOR_TYPE,
    "torch._utils._rebuild_tensor": _Call(_tensor),
    "torch._utils._rebuild_tensor_v2": _Call(_tensor),
    "torch._utils._rebuild_tensor_v3": _Call(_tensor_v3),
    "torch._utils._rebuild_parameter": _Call(lambda data, *rest: data),
    "torch._utils._rebuild_parameter_with_state": _Call(lambda data, *rest: data),
    "torch._tensor._rebuild_from_type_v2": _Call(_typed),
    "torch._utils._rebuild_sparse_tensor": _foreign("a sparse tensor"),
    "torch._utils._rebuild_qtensor": _foreign("a quantized tensor"),
    "torch._utils._rebuild_nested_tensor": _foreign("a nested tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": _foreign("a tensor without data"),
    "torch._utils._rebuild_wrapper_subclass": _foreign("a tensor subclass"),
    "torch._utils._rebuild_device_tensor_from_numpy": _foreign("a device's own tensor"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _foreign("a device's own tensor"),
    **{
        f"{home}.{name}": _StorageType(dtype)
        for home in ("torch", "torch.storage")
        for name, dtype in _STORAGES.items()
    },
    **{f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    **{f"torch.{name}": Foreign(name) for name, value in vars(torch).items() if isinstance(value, torch.qscheme)},
    **{f"torch.{name}Storage": _StorageType(torch.uint8) for name in ("QInt8", "QUInt8", "QInt32")},
}


_HASHED = {  # opcode -> the keys among the items of the stack since the last mark
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(0, None, 2),
    pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}


def _check_key(key: object) -> None:
    """UnpicklingError for a key that is long to hash. A tuple is hashed anew each time, and all that it holds: one that
    holds the same tuple twice, and so on forty levels deep, for ever.
    """
    parts = key if isinstance(key, tuple) else (key,)
    numbers = [part for part in parts if isinstance(part, int)]
    if len(parts) > 8 or any(isinstance(part, tuple) for part in parts) or any(n.bit_length() > 64 for n in numbers):
        raise pickle.UnpicklingError("a key that is long to hash")


def _checking(load: Callable[[Any], None], keys: slice) -> Callable[[Any], None]:
    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[keys]:
            _check_key(key)
        load(unpickler)

    return checked


def _load_bytearray(unpickler: Any) -> None:
    """Python's own makes the bytearray before it looks whether the file has as many bytes."""
    unpickler.read(int.from_bytes(unpickler.read(8), "little"))
    unpickler.append(Foreign("a bytearray"))


def _load_reduce(unpickler: Any) -> None:
    """Python, where it cannot make a call, shows in its message what was to be called, however long that is."""
    function, arguments = unpickler.stack[-2:]
    if not isinstance(function, _Call) or not isinstance(arguments, tuple):
        raise pickle.UnpicklingError("not a call")
    pickle._Unpickler.dispatch[pickle.REDUCE[0]](unpickler)


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **pickle._Unpickler.dispatch,
        **{code[0]: _checking(pickle._Unpickler.dispatch[code[0]], keys) for code, keys in _HASHED.items()},
        pickle.BYTEARRAY8[0]: _load_bytearray,
        pickle.REDUCE[0]: _load_reduce,
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        try:
            return _ALLOWED[full]
        except KeyError:
            raise ForbiddenGlobal(full) from None

    def persistent_load(self, pid: Any) -> Storage:
        kind, storage_type, key, _location, numel = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or not isinstance(key, str):
            raise pickle.UnpicklingError("not a storage")
        if type(numel) is not int or not 0 <= numel < 2**63:
            raise pickle.UnpicklingError("not the size of a storage")
        return Storage(storage_type.dtype, key, numel * storage_type.dtype.itemsize)


def describe(text: bytes) -> object:
    """What the pickle `text` holds, with its tensors as `Record`.

    Raises ForbiddenGlobal if it needs code, and any other Exception if it is damaged.
    """
    return _Unpickler(io.BytesIO(text), encoding="utf-8").load()
