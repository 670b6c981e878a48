"""The optional extension `isomerge._C`: CUDA kernels behind pybind11, without torch. All else is in pyproject.toml.

ISOMERGE_CUDA=0 never builds it, =1 fails where it cannot, and by default it is built where nvcc 12 or newer (in
CUDA_HOME, on PATH, or in /usr/local/cuda*) and pybind11 are found, and left out with one line where they are not.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").iterdir() if path.suffix in (".cu", ".cpp"))
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.cuh"))

# sm_90a for Hopper (its PTX would run nowhere else), sm_80 for Ampere and Ada, sm_80 PTX for whatever comes later.
TARGETS = ("arch=compute_90a,code=sm_90a", "arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80")
FLAGS = ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "-Icsrc"]
FLAGS += [flag for target in TARGETS for flag in ("-gencode", target)]

# Everything static but the driver: the module works beside any torch. Its CUDA runtime stays invisible to others.
LINK = ["-shared", "-nodlink", "-cudart=static", "-Xcompiler", "-static-libstdc++", "-Xlinker", "--exclude-libs,ALL"]

RULE = """rule run
  command = $command
  depfile = $out.d
  deps = gcc
"""


def missing() -> str | None:
    """What keeps the extension from being built here, or None."""
    if sys.platform != "linux":
        return f"expected Linux, got {sys.platform}"
    if nvcc() is None:
        return "nvcc not found; install the CUDA toolkit, or set CUDA_HOME"
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None or int(release[1]) < 12:
        return f"expected nvcc 12 or newer, got {nvcc()}: {version.strip().splitlines()[-1:]}; set CUDA_HOME"
    return None if find_spec("pybind11") else "pybind11 not found; pip install pybind11"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    installed = sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    places = [str(Path(home, "bin"))] if home else [os.environ.get("PATH", ""), *map(str, installed)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


class BuildCuda(build_ext):
    """One object per source, side by side: by ninja, which also skips what has not changed, or else by threads."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        directory, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        compiles = {}
        for source in ext.sources:
            out = str(directory / f"{Path(source).name}.o")
            compiles[source, out] = [str(nvcc()), *FLAGS, *includes, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        if shutil.which("ninja"):
            rules = [f"builddir = {escaped(str(directory))}\n", RULE]
            for (source, out), command in compiles.items():
                rules.append(f"build {escaped(out)}: run {escaped(source)}\n  command = {shlex.join(command)}\n")
            (directory / "build.ninja").write_text("\n".join(rules))
            subprocess.run(["ninja", "-f", str(directory / "build.ninja")], check=True)
        else:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda command: subprocess.run(command, check=True), compiles.values()))
        objects = [out for _, out in compiles]
        subprocess.run([str(nvcc()), *LINK, "-o", str(target), *objects], check=True)


def escaped(path: str) -> str:
    return re.sub(r"([$ :])", r"$\1", path)


choice, reason = os.environ.get("ISOMERGE_CUDA", "auto"), missing()
if choice not in ("auto", "0", "1"):
    sys.exit(f"ISOMERGE_CUDA: expected 0, 1 or auto, got {choice!r}")
if choice == "1" and reason:
    sys.exit(f"ISOMERGE_CUDA=1, but isomerge._C cannot be built: {reason}")
if choice == "auto" and reason:
    print(f"isomerge: without CUDA kernels (isomerge._C): {reason}", file=sys.stderr)
built = [] if choice == "0" or reason else [Extension("isomerge._C", SOURCES, depends=HEADERS)]
setup(ext_modules=built, cmdclass={"build_ext": BuildCuda})
