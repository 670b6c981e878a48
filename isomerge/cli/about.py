"""`isomerge methods` and `isomerge doctor`: what there is, and what runs here."""

from __future__ import annotations

import os
import platform

from rich.table import Table

from isomerge import __version__
from isomerge.cli.console import screen


def methods_command() -> None:
    """List the merge methods, their parameters and their papers."""
    from isomerge.methods import METHODS

    for method in METHODS.values():
        applies = "tensors of any shape" if method.elementwise else "matrices; other tensors are averaged"
        screen.print(f"[bold]{method.name}[/bold]  {method.title}", highlight=False)
        screen.print(f"    {method.paper}" if method.paper else "    no paper", markup=False)
        screen.print(f"    applies to {applies}", markup=False)
        for p in method.parameters:
            low = "-inf" if p.minimum is None else f"{p.minimum:g}"
            high = "inf" if p.maximum is None else f"{p.maximum:g}"
            limits = "" if p.minimum is None and p.maximum is None else f", {low} to {high}"
            screen.print(f"    {p.name}: {p.type.__name__}{limits}, default {p.default}. {p.help}", markup=False)
    screen.print("Every method takes alpha (or lambda, scaling_factor): the multiplier of its update, default 1.")


def doctor_command() -> None:
    """Show versions, devices and which backend can run which op here, with the reasons."""
    import torch

    from isomerge.backends import BACKENDS, lapack, table

    screen.print(f"isomerge {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    screen.print(f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    screen.print(f"devices: {', '.join(['cpu', *devices])}", markup=False)
    screen.print(f"partial eigensolves on the CPU: {lapack.availability() or 'yes, by scipy'}", markup=False)
    for device in ("cpu", *["cuda"] * bool(devices)):
        alike: dict[tuple[str, str | None], list[str]] = {}
        for op, backend, reason in sorted(table(device), key=lambda cell: list(BACKENDS).index(cell[1])):
            if op in BACKENDS[backend].ops:
                alike.setdefault((backend, reason), []).append(op)
        rows = Table("backend", f"runs on {device}", "ops", box=None, pad_edge=False)
        for (backend, reason), found in alike.items():
            every = len(found) == len(BACKENDS["reference"].ops)
            rows.add_row(backend, "yes" if reason is None else f"no: {reason}", "all" if every else ", ".join(found))
        screen.print(rows)
