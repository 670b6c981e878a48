"""The optional extensions, behind pybind11, without torch: CUDA kernels, `isomerge._C`, and passes over memory for the
CPU, `isomerge._cpu`. All else is in pyproject.toml.

ISOMERGE_CUDA=0 never builds the first, =1 fails where it cannot, and by default it is built where nvcc 12 or newer (in
CUDA_HOME, on PATH, or in /usr/local/cuda*) and pybind11 are found, and left out with one line where they are not.
ISOMERGE_CPU does the same for the second, which takes a C++17 compiler (CXX, or the one that Python was built with).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CUDA_SOURCES = sorted(str(path) for path in Path("csrc").iterdir() if path.suffix in (".cu", ".cpp"))
CUDA_HEADERS = sorted(str(path) for path in Path("csrc").glob("*.cuh"))
CPU_SOURCES = sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))
CPU_HEADERS = sorted(str(path) for path in Path("csrc/cpu").glob("*.h"))

# Every operation is rounded by itself, as torch does it: no fused products. Nobody asks for errno or trapped NaNs.
CPU_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]

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


def missing_for_cuda() -> str | None:
    """What keeps `isomerge._C` from being built here, or None."""
    if sys.platform != "linux":
        return f"expected Linux, got {sys.platform}"
    if nvcc() is None:
        return "nvcc not found; install the CUDA toolkit, or set CUDA_HOME"
    version = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.", version)
    if release is None or int(release[1]) < 12:
        return f"expected nvcc 12 or newer, got {nvcc()}: {version.strip().splitlines()[-1:]}; set CUDA_HOME"
    return None if find_spec("pybind11") else "pybind11 not found; pip install pybind11"


def missing_for_cpu() -> str | None:
    """What keeps `isomerge._cpu` from being built here, or None."""
    if sys.platform not in ("linux", "darwin"):
        return f"expected Linux or macOS, got {sys.platform}"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler} not found; install one, or set CXX"
    return None if find_spec("pybind11") else "pybind11 not found; pip install pybind11"


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    installed = sorted(Path("/usr/local").glob("cuda*/bin"), reverse=True)
    places = [str(Path(home, "bin"))] if home else [os.environ.get("PATH", ""), *map(str, installed)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


class Build(build_ext):
    """CUDA one object per source, side by side: by ninja, which also skips what has not changed, or else by threads."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        if ext.name != "isomerge._C":
            ext.include_dirs.append(pybind11.get_include())
            super().build_extension(ext)
            return
        try:
            self.build_cuda(ext, [pybind11.get_include(), sysconfig.get_paths()["include"]])
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{ext.name}: {error}") from None

    def build_cuda(self, ext: Extension, includes: list[str]) -> None:
        directory, target = Path(self.build_temp).resolve(), Path(self.get_ext_fullpath(ext.name)).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        flags, compiles = [*FLAGS, *(f"-I{path}" for path in includes)], {}
        for source in ext.sources:
            out = str(directory / f"{Path(source).name}.o")
            compiles[source, out] = [str(nvcc()), *flags, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
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


def wanted(variable: str, missing: Callable[[], str | None], what: str, extension: Extension) -> list[Extension]:
    """The extension, if it is to be built; the program ends where it was demanded in vain."""
    choice = os.environ.get(variable, "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"{variable}: expected 0, 1 or auto, got {choice!r}")
    reason = None if choice == "0" else missing()
    if choice == "1" and reason:
        sys.exit(f"{variable}=1, but {extension.name} cannot be built: {reason}")
    if reason:
        print(f"isomerge: without {what} ({extension.name}): {reason}", file=sys.stderr)
    extension.optional = choice == "auto"  # a compiler that fails then costs speed alone
    return [] if choice == "0" or reason else [extension]


built = wanted(
    "ISOMERGE_CUDA",
    missing_for_cuda,
    "CUDA kernels",
    Extension("isomerge._C", CUDA_SOURCES, depends=CUDA_HEADERS),
) + wanted(
    "ISOMERGE_CPU",
    missing_for_cpu,
    "passes in C++",
    Extension("isomerge._cpu", CPU_SOURCES, depends=CPU_HEADERS, language="c++", extra_compile_args=CPU_FLAGS),
)
setup(ext_modules=built, cmdclass={"build_ext": Build})
