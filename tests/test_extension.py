"""setup.py builds isomerge._C and isomerge._cpu without torch, for every machine that is promised, or says why not."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from isomerge.backends import native

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or next(map(str, sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)), None)
ABSENT = [name for name, found in (("nvcc", NVCC), ("pybind11", find_spec("pybind11"))) if not found]
buildable = pytest.mark.skipif(bool(ABSENT), reason=f"needs {' and '.join(ABSENT)}")


def setup(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", *map(str, arguments)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ISOMERGE_")}
    chosen = {**inherited, "ISOMERGE_CPU": "0", **environment}
    return subprocess.run(command, cwd=cwd, env=chosen, capture_output=True, text=True, timeout=300)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Its own lines; setuptools has more to say."""
    return [line for line in done.stderr.splitlines() if "isomerge" in line or "ISOMERGE" in line]


def tool(name: str) -> str:
    """One of CUDA's tools: of the toolkit, or of the ones that come with Triton."""
    triton = find_spec("triton")
    bundled = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    places = [os.environ["PATH"], str(Path(NVCC or "").resolve().parent), "/usr/local/cuda/bin", *map(str, bundled)]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        pytest.skip(f"needs {name}")
    return path


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from, and next to it what is built."""
    directory = tmp_path_factory.mktemp("extension")
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, directory)
    for name in ("csrc", "isomerge"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, directory / name, ignore=ignored)
    return directory


def build(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    done = setup("build_ext", "--build-temp", "out/temp", *options, cwd=directory, ISOMERGE_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def extension(directory: Path) -> Path:
    before = files(directory)
    done = build(directory, "--build-lib", "out/lib")
    assert "warning" not in done.stdout.lower(), done.stdout
    assert all(name.startswith("out/") for name in files(directory) - before)
    (built,) = (directory / "out/lib/isomerge").iterdir()
    return built


@buildable
def test_there_is_code_for_every_device(extension: Path) -> None:
    listed = subprocess.run([tool("cuobjdump"), "-lelf", "-lptx", str(extension)], capture_output=True, text=True)
    kernels = {path.stem for path in (ROOT / "csrc").glob("*.cu")}
    for suffix in ("sm_90a.cubin", "sm_80.cubin", "sm_80.ptx"):
        assert set(re.findall(rf"(\w+)\.{suffix}", listed.stdout)) == kernels
    assert not re.search(r"sm_(?!90a|80)", listed.stdout)


@buildable
def test_kernels_keep_to_registers_and_shared_memory(extension: Path) -> None:
    done = subprocess.run([tool("cuobjdump"), "-res-usage", str(extension)], capture_output=True, text=True)
    lines = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout + done.stderr)
    assert len(lines) >= 2 * 8  # four variants of either small core, on two architectures
    for registers, stack, shared, local in lines:
        assert (int(stack), int(local)) == (0, 0)
        assert int(registers) <= 255
        assert int(shared) <= 1024  # what sm_90 reserves: all else is dynamic


@buildable
def test_it_depends_on_nothing_but_the_c_library(extension: Path) -> None:
    needed = subprocess.run(["ldd", str(extension)], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in needed
    assert not re.search("cudart|stdc|torch|not found", needed)
    symbols = subprocess.run(["nm", "-D", "--defined-only", str(extension)], capture_output=True, text=True).stdout
    assert "PyInit__C" in symbols
    assert not re.search(r" cuda\w+$|_launch$", symbols, re.MULTILINE)  # the runtime of another module is not replaced


def loaded(extension: Path, code: str) -> str:
    """What `code` prints in a fresh interpreter where the package has this extension."""
    return python(f"import isomerge; isomerge.__path__.append({str(extension.parent)!r})\n{code}")


@buildable
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_driver_it_loads_and_says_so(extension: Path) -> None:
    code = "from isomerge import _C; print(_C.device_count(), _C.status(), _C.cuda_version >= 12000)"
    assert re.fullmatch(r"0 no device: cudaError\w+ True", loaded(extension, code))
    reason = loaded(extension, "from isomerge.backends import cuda; print(cuda.availability())")
    assert reason.startswith("no device: cudaError")
    code = """
from isomerge import _C
try:
    _C.small_eigh(0, 0, 0, 0, batch=3, s=38, stream=0)
except RuntimeError as error:
    print(error)
"""
    assert re.fullmatch(r"small_eigh\(batch=3, s=38\): cudaError\w+, .+", loaded(extension, code))


@buildable
def test_calls_are_checked(extension: Path) -> None:
    code = """
from isomerge import _C
print(_C.small_eigh(0, 0, 0, 0, 0, 0, 0), _C.shift_cov_workspace_bytes(1, 100, 32, 0) > 0)
try:
    _C.cholesky_inverse(0, 0, 0, 0, batch=1, s=129, shift=0.5, stream=0)
except RuntimeError as error:
    print(error)
"""
    assert loaded(extension, code).splitlines() == [
        "None True",
        "cholesky_inverse(batch=1, s=129, shift=0.500000): cudaErrorInvalidValue, invalid argument",
    ]


@buildable
def test_in_place_it_adds_one_file_to_the_package(extension: Path, directory: Path) -> None:
    before = files(directory)
    done = build(directory, "--inplace", "--build-lib", "out/lib")
    if shutil.which("ninja"):
        assert "no work to do" in done.stdout  # but to link: what has not changed is not compiled again
    assert files(directory) - before == {f"isomerge/{extension.name}"}


def test_without_nvcc_the_package_is_pure_python(tmp_path: Path) -> None:
    done = setup("build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib", CUDA_HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert said(done) == [
        "isomerge: without CUDA kernels (isomerge._C): nvcc not found; install the CUDA toolkit, or set CUDA_HOME"
    ]
    assert list(tmp_path.iterdir()) == []


def test_demanded_it_fails_with_what_is_missing() -> None:
    done = setup("--version", ISOMERGE_CUDA="1", CUDA_HOME="/nowhere")
    assert done.returncode != 0
    assert said(done) == [
        "ISOMERGE_CUDA=1, but isomerge._C cannot be built: nvcc not found; install the CUDA toolkit, or set CUDA_HOME"
    ]


def test_an_old_nvcc_is_not_enough(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    nvcc.chmod(0o755)
    (line,) = said(setup("--version", CUDA_HOME=str(tmp_path)))
    assert "expected nvcc 12 or newer, got" in line
    assert "release 11.8" in line


def test_declined_it_is_not_built(tmp_path: Path) -> None:
    options = ["--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib"]
    done = setup("build_ext", *options, ISOMERGE_CUDA="0")
    assert done.returncode == 0
    assert said(done) == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_choice_is_an_error() -> None:
    done = setup("--version", ISOMERGE_CUDA="yes")
    assert done.returncode != 0
    assert said(done) == ["ISOMERGE_CUDA: expected 0, 1 or auto, got 'yes'"]


# ---- the passes on the CPU
COMPILER = shutil.which(shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0])
compilable = pytest.mark.skipif(not COMPILER or not find_spec("pybind11"), reason="needs a C++ compiler and pybind11")


@compilable
def test_where_there_is_a_compiler_the_passes_are_built() -> None:
    assert native.availability() is None, "install the package: pip install -e ."


@pytest.fixture(scope="session")
def plainest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an isomerge._cpu for any processor of its kind."""
    directory = tmp_path_factory.mktemp("plainest")
    done = setup(
        *("build_ext", "--build-temp", directory / "temp", "--build-lib", directory),
        ISOMERGE_CUDA="0",
        ISOMERGE_CPU="1",
        CFLAGS="-DISOMERGE_CLONES= -Wall -Wextra",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stderr.replace("SetuptoolsDeprecationWarning", "").lower(), done.stderr
    return directory / "isomerge"


PASSES = """
import sys, torch
from isomerge import ops
generator = torch.Generator().manual_seed(0)
count = 40_007
base, *tuned = (torch.randn(count, generator=generator).to(d) for d in (torch.float16, torch.bfloat16, torch.float32))
out, base_out = torch.empty(2, count), torch.empty(count)
square = ops.subtract(base, tuned, [0.7, 1.0], base_out=base_out, out=out, backend="native")
kth = torch.stack([ops.kth_largest(delta, count // 5, backend="native") for delta in out])
votes = ops.votes(out, kth, backend="native")
elected = ops.elect(out, kth, int(votes.sign()), backend="native")
merged = [ops.finalize(base_out[None], elected[None], 0.3, out_dtype=d, backend="native")
          for d in (torch.float16, torch.bfloat16, torch.float32)]
merged.append(ops.drop(elected, 0.3, seed=1, backend="native"))
sums = torch.tensor([square, ops.frobenius(out, backend="native")], dtype=torch.float64)
torch.save([sums, out, kth, votes, elected, *merged], sys.argv[1])
from isomerge import _cpu
print(_cpu.__file__)
"""


@compilable
def test_every_version_of_the_passes_gives_the_same_bits(plainest: Path, tmp_path: Path) -> None:
    results = []
    for index, first in enumerate(("", f"import isomerge; isomerge.__path__.insert(0, {str(plainest)!r})")):
        (tmp_path / "passes.py").write_text(f"{first}\n{PASSES}")
        command = [sys.executable, str(tmp_path / "passes.py"), str(tmp_path / f"{index}.pt")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(plainest)) is bool(first)
        results.append(torch.load(tmp_path / f"{index}.pt"))
    for mine, plain in zip(*results, strict=True):
        assert torch.equal(mine, plain)


@pytest.mark.parametrize("choice", ["auto", "1"])
def test_without_a_compiler_the_reason_is_given(tmp_path: Path, choice: str) -> None:
    environment = {"ISOMERGE_CUDA": "0", "ISOMERGE_CPU": choice, "CXX": "/nowhere/g++"}
    done = setup("build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib", **environment)
    reason = "no C++ compiler: /nowhere/g++ not found; install one, or set CXX"
    assert (done.returncode == 0) is (choice == "auto")
    assert said(done) == [
        f"isomerge: without passes in C++ (isomerge._cpu): {reason}"
        if choice == "auto"
        else f"ISOMERGE_CPU=1, but isomerge._cpu cannot be built: {reason}"
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("pybind11") is None, reason="needs pybind11")
@pytest.mark.parametrize("what", ["ISOMERGE_CPU", "ISOMERGE_CUDA"])
@pytest.mark.parametrize("choice", ["auto", "1"])
def test_a_compiler_that_fails_ends_what_was_demanded_alone(tmp_path: Path, what: str, choice: str) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("c++", "nvcc"):
        compiler = tmp_path / "bin" / name
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && echo release 13.0, || exit 1\n')
        compiler.chmod(0o755)
    failing = {"CXX": str(tmp_path / "bin/c++"), "CC": str(tmp_path / "bin/c++"), "CUDA_HOME": str(tmp_path)}
    chosen = {"ISOMERGE_CPU": "0", "ISOMERGE_CUDA": "0", what: choice}
    done = setup("build_ext", "--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib", **chosen, **failing)
    assert (done.returncode == 0) is (choice == "auto"), done.stderr
    assert not list(tmp_path.rglob("*.so"))
