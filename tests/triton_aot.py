"""Triton kernels without a GPU, in two ways that exclude each other in one process.

Numerics: in this process, by Triton's interpreter on CPU tensors. TRITON_INTERPRET must be set before triton is first
imported, by whomever: `conftest.py` imports this module, which sets it where there is no CUDA device. With a device
the same tests run compiled, on `DEVICE`.

Code generation: `compile_all` compiles in a process of its own, without that variable and with a cache of its own, and
returns what the compiler said. `Source` names a kernel and what is constant in it; nothing is launched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and __name__ != "__main__":
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "import triton_aot before triton"
    os.environ["TRITON_INTERPRET"] = "1"

SHARED_LIMIT = {90: 227 * 1024, 80: 99 * 1024}
"""Bytes of shared memory that one block may have, by compute capability; 8.6, 8.9 and 12.0 have less than 8.0."""


@dataclass(frozen=True)
class Source:
    """One compilation: `kernel` is "module:name"; signature as Triton spells it: {"X": "*fp32", "m": "i32"}.

    Arguments in `aligned` are promised to be divisible by 16, as the launcher finds out by itself at run time.
    `constants` holds the constexprs, and the arguments that happen to be 1 there (unit strides).
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    options: Mapping[str, int]
    aligned: Sequence[str] = ()
    capability: int = 90


@dataclass(frozen=True)
class Compiled:
    """What came out: the texts, and the resources of one thread (registers, bytes of stack and of spills) and block."""

    ptx: str = field(repr=False)
    ttir: str = field(repr=False)
    shared: int
    registers: int
    stack: int
    local: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))


def compile_all(sources: Sequence[Source], folder: Path) -> list[Compiled]:
    """Compiles every source, in order; about a second each. Writes only below `folder`."""
    request = folder / "sources.json"
    request.write_text(json.dumps([asdict(source) for source in sources]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, __file__, str(request)], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [Compiled(**entry) for entry in json.loads((folder / "compiled.json").read_text())]


def compile_one(source: Source, folder: Path) -> Compiled:
    """In a process without the interpreter."""
    from importlib import import_module

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = source.kernel.split(":")
    kernel = getattr(import_module(module), name)
    signature = {arg: "constexpr" if arg in source.constants else source.signature[arg] for arg in kernel.arg_names}
    attrs = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in source.aligned}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=dict(source.constants), attrs=attrs),
        target=GPUTarget("cuda", source.capability, 32),
        options=dict(source.options),
    )
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = resources(cubin)
    return Compiled(
        ptx=compiled.asm["ptx"],
        ttir=compiled.asm["ttir"],
        shared=compiled.metadata.shared,
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
    )


def resources(cubin: Path) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL, ... of the one kernel in a cubin, by the cuobjdump that Triton ships."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([cuobjdump, "-res-usage", cubin], capture_output=True, text=True, check=True)
    usage = done.stdout.split("Function")[-1]
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", usage)}


def main(request: Path) -> None:
    sources = [Source(**entry) for entry in json.loads(request.read_text())]
    compiled = [asdict(compile_one(source, request.parent)) for source in sources]
    (request.parent / "compiled.json").write_text(json.dumps(compiled))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
