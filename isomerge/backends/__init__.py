"""The table of backends: who answers which op, where, and in which order `auto` asks.

A backend is a module with one function per op, all with the op's name and one calling convention, stated in
`reference.py`. An explicit backend either runs or raises `BackendUnavailable` with the reason; only `auto` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

OPS = (
    "polar",
    "polar_product",
    "rsvd",
    "subspace",
    "principal",
    "shift_cov",
    "project_scale",
    "delta_sum",
    "finalize",
    "matmul",
    "subtract",
    "frobenius",
    "count_digits",
    "kth_largest",
    "votes",
    "elect",
    "drop",
)
"""Every op of `isomerge.ops` that is dispatched."""

_ELECTION = ("count_digits", "kth_largest", "votes", "elect")
_PASSES = ("subtract", "frobenius", *_ELECTION, "drop")  # for which a GPU has no kernels but torch's own


class Backend(NamedTuple):
    """One row of `BACKENDS`: the module, the ops it answers, and where it runs.

    With `devices`, the module has a function `availability() -> str | None`: why it cannot run on this machine.
    """

    module: str
    ops: tuple[str, ...]
    devices: tuple[str, ...] | None  # device types; None = every device
    automatic: bool  # whether `auto` may choose it


BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {  # in the order in which `auto` asks
        "triton": Backend(
            "isomerge.backends.triton",
            tuple(op for op in OPS if op not in _PASSES),
            devices=("cuda",),
            automatic=True,
        ),
        # Chosen by name alone, until a measurement on a device puts it before triton.
        "cuda": Backend("isomerge.backends.cuda", ("shift_cov", "project_scale"), devices=("cuda",), automatic=False),
        "native": Backend("isomerge.backends.native", ("finalize", *_PASSES), devices=("cpu",), automatic=True),
        "eager": Backend("isomerge.backends.eager", OPS, devices=None, automatic=True),
        "reference": Backend("isomerge.backends.reference", OPS, devices=None, automatic=False),
    }
)


class BackendUnavailable(RuntimeError):
    """An explicitly named backend cannot run this call; the message says why and what to do."""


def refusal(op: str, backend: str, device: torch.device) -> str | None:
    """Why `backend` cannot run `op` on `device`, or None when it can."""
    row = BACKENDS[backend]
    if op not in row.ops:
        answering = ", ".join(name for name, other in BACKENDS.items() if op in other.ops)
        return f"{backend} does not provide {op}; it is provided by: {answering}"
    if row.devices is None:
        return None
    unavailable = _unavailable(row.module)
    if unavailable is None and device.type not in row.devices:
        return f"expected a tensor on {' or '.join(row.devices)}, got {device}"
    return unavailable


@cache
def _unavailable(module: str) -> str | None:
    reason: str | None = import_module(module).availability()
    return reason


def resolve(op: str, backend: str, A: Tensor) -> Callable[..., Any]:
    """The function that computes `op` for `A`: of the named backend, or for "auto" of the first that can.

    Raises ValueError for an unknown name, BackendUnavailable when the named backend cannot run this call.
    """
    if backend == "auto":
        chosen = next(name for name, row in BACKENDS.items() if _automatic(op, name, row, A.device))
    elif backend in BACKENDS:
        reason = refusal(op, backend, A.device)
        if reason is not None:
            raise BackendUnavailable(f'{op}[{backend}] cannot run: {reason}. Use backend="auto" or move the tensor.')
        chosen = backend
    else:
        raise ValueError(f"{op}: unknown backend {backend!r}; expected one of: auto, {', '.join(BACKENDS)}")
    function: Callable[..., Any] = getattr(import_module(BACKENDS[chosen].module), op)
    return function


def _automatic(op: str, backend: str, row: Backend, device: torch.device) -> bool:
    if row.devices is not None and device.type not in row.devices:
        return False  # known without importing what the backend is made of
    return row.automatic and refusal(op, backend, device) is None


def table(device: torch.device | str = "cpu") -> list[tuple[str, str, str | None]]:
    """(op, backend, None or the reason why not) for every cell of the table on `device`."""
    return [(op, backend, refusal(op, backend, torch.device(device))) for op in OPS for backend in BACKENDS]
