"""BLAS and LAPACK routines that torch does not offer, from scipy, called on torch's memory, each call on one thread.

scipy publishes their addresses for compilers (`scipy.linalg.cython_lapack`, `cython_blas`); through ctypes a call
leaves the interpreter free, so that solves run side by side. Its functions for Python hold the interpreter: two solves
at once took 2.0 times the time of one. OpenBLAS, which its packages hold, has threads of its own: they fight with the
workers of `side_by_side.py` and change the bits of results, so it is set to one while a routine runs here, and back.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from functools import lru_cache
from os import register_at_fork
from threading import Lock

import torch
from torch import Tensor

ROUTINES = ("dsytrd", "dsterf", "dstein", "dstedc", "dormtr")
BLAS = ("ssyrk", "dsyrk")
SIGNATURE = re.compile(r"void \(((char|int|\w+_[sd]) \*(, )?)+\)")  # 32-bit integers, no hidden lengths of strings
PTHREADS = 1  # openblas_get_parallel(): one pool for the process; with OpenMP every thread has a number of its own

_Argument = Tensor | ctypes.c_char | ctypes.c_int | ctypes.c_float | ctypes.c_double


class _Library:
    """The routines by name. Inside `with` OpenBLAS has one thread; the last one out restores the number before."""

    def __init__(self) -> None:
        from scipy.linalg import cython_blas, cython_lapack

        capsules = {name: cython_lapack.__pyx_capi__[name] for name in ROUTINES}
        capsules |= {name: cython_blas.__pyx_capi__[name] for name in BLAS}
        self.routines = {name: _function(name, capsule) for name, capsule in capsules.items()}
        library = ctypes.CDLL(cython_lapack.__file__)  # looks through the libraries that this one was linked with
        for prefix in ("scipy_openblas_", "openblas_"):
            if hasattr(library, f"{prefix}get_parallel") and library[f"{prefix}get_parallel"]() == PTHREADS:
                self._get, self._set = library[f"{prefix}get_num_threads"], library[f"{prefix}set_num_threads"]
                break
        else:
            raise ImportError(
                "scipy's LAPACK is not an OpenBLAS whose threads can be set, as its packages on PyPI have"
            )
        self._lock, self._running, self._before = Lock(), 0, 1

    def __enter__(self) -> None:
        with self._lock:
            if self._running == 0:
                self._before = self._get()
                self._set(1)
            self._running += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._running -= 1
            if self._running == 0:
                self._set(self._before)


def _function(name: str, capsule: object) -> Callable[..., None]:
    """The C function in a capsule, whose name is its signature: a pointer for every argument."""
    python = ctypes.pythonapi
    get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", python))
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    signature = get_name(capsule)
    if not SIGNATURE.fullmatch(signature.decode()):
        raise ImportError(f"scipy's {name} has an interface that is not known here: {signature.decode()}")
    address = prototype(("PyCapsule_GetPointer", python))(capsule, signature)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (signature.count(b",") + 1))(address)


@lru_cache(maxsize=1)
def _load() -> _Library | str:
    try:
        return _Library()
    except (ImportError, KeyError, AttributeError) as error:
        return f"{type(error).__name__}: {error}; pip install scipy from PyPI"


_loading = Lock()


def _library() -> _Library | str:
    with _loading:  # workers come here at once, and there must be one count of those inside
        return _load()


def _forget() -> None:
    global _loading
    _loading = Lock()
    _load.cache_clear()


register_at_fork(after_in_child=_forget)  # a lock may be held by a thread that the child does not have


def availability() -> str | None:
    """Why `call` cannot be used here, None where it can. The first time loads scipy (0.3 s)."""
    library = _library()
    return library if isinstance(library, str) else None


def call(name: str, *arguments: str | int | Tensor) -> int:
    """Run one of `ROUTINES`; returns LAPACK's info. That is the last argument, which is not given.

    Letters and integers are passed as LAPACK wants them, tensors by their address, matrices stored by columns. The
    caller sees to dtypes (float64, int32) and sizes. RuntimeError with what `availability` says.
    """
    info = ctypes.c_int(0)
    _run(name, *map(_held, arguments), info)
    return info.value


def add_syrk(B: Tensor, out: Tensor) -> None:
    """out += BᵀB in the lower triangle [r, r] by rows, for B [p, r] by rows or columns, both float32 or float64."""
    single = B.dtype == torch.float32
    number = ctypes.c_float if single else ctypes.c_double
    (p, r), one = B.shape, number(1)
    by_rows = B.stride(1) == 1
    # By columns, as BLAS sees it, the lower triangle is the upper, and what stands by rows its own transpose.
    letters, sizes = map(_held, ("U", "N" if by_rows else "T")), map(_held, (r, p))
    steps = _held(max(1, r, B.stride(0)) if by_rows else max(1, p, B.stride(1))), _held(max(1, r, out.stride(0)))
    _run("ssyrk" if single else "dsyrk", *letters, *sizes, one, B, steps[0], one, out, steps[1])


def _held(value: str | int | Tensor) -> _Argument:
    if isinstance(value, Tensor):
        return value
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_char(value.encode())


def _run(name: str, *arguments: _Argument) -> None:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    addresses = [a.data_ptr() if isinstance(a, Tensor) else ctypes.addressof(a) for a in arguments]
    with library:
        library.routines[name](*addresses)
