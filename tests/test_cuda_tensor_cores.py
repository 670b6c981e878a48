"""The tensor-core kernels shift_cov and project_scale: run on the CPU by the emulator, and their machine code.

The instructions are held to formulas written here from the PTX ISA, apart from the emulator; the kernels to float64.
Bounds are twice torch's own float32 error on the same data, plus float32's eps for each product that enters.
"""

from __future__ import annotations

import importlib.util
import mmap
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import emulate
import pytest
import torch
from spectra import relative
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
TILE_BYTES = 128 * 128 * 4  # partial sums of one tile of a moment

pytestmark = pytest.mark.skipif(emulate.COMPILER is None, reason="g++ compiles the kernels for the emulator")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def instructions() -> emulate.Library:
    return emulate.library("instructions.cu")


# ---- instructions: formulas of the PTX ISA, element by element
def pairs(elements: Tensor) -> Tensor:
    """[32, 2 k] 16-bit elements to [32, k] registers, the first of each two in the lower half."""
    low, high = elements.contiguous().view(torch.int16).to(torch.int32).unflatten(1, (-1, 2)).unbind(-1)
    return ((high & 0xFFFF) << 16 | low & 0xFFFF).contiguous()


def a_place(lane: int, i: int) -> tuple[int, int]:
    """Row and column of element a_i of mma.m16n8k16."""
    row = lane >> 2 if i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane: int, i: int) -> tuple[int, int]:
    return (lane % 4) * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def c_place(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def fragment(matrix: Tensor, place: Callable[[int, int], tuple[int, int]], count: int) -> Tensor:
    return torch.stack([torch.stack([matrix[place(lane, i)] for i in range(count)]) for lane in range(32)])


def multiply_add(A: Tensor, B: Tensor, C: Tensor, count: int = 1) -> Tensor:
    """C + `count` A B by the emulated instruction; A [16, 16], B [16, 8] bfloat16, C [16, 8] float32."""
    c = fragment(C, c_place, 4).contiguous()
    instructions().run("emulate_multiply_add", pairs(fragment(A, a_place, 8)), pairs(fragment(B, b_place, 4)), c, count)
    result = torch.full((16, 8), torch.nan)
    for lane in range(32):
        for i in range(4):
            result[c_place(lane, i)] = c[lane, i]
    return result


def test_mma_multiplies_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B, C = (torch.randint(-8, 9, shape, generator=generator) for shape in ((16, 16), (16, 8), (16, 8)))
    assert torch.equal(multiply_add(A.bfloat16(), B.bfloat16(), C.float()), (A @ B + C).float())
    A, B, C = normal(16, 16).bfloat16(), normal(16, 8, seed=1).bfloat16(), normal(16, 8, seed=2)
    exact = A.double() @ B.double() + C.double()
    largest = torch.maximum((A.double().abs()[:, :, None] * B.double().abs()).amax(1), C.double().abs())
    cut = 17 * 2.0**-24 * largest + EPS * exact.abs()  # 17 terms at two bits more than float32, and the result
    assert ((multiply_add(A, B, C).double() - exact).abs() <= cut).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("product", "result"),
    [
        (0.75, 0.0),  # of the last bit of 1: rounding to nearest would give one bit
        (1.75, 1.0),
        (0.125, 0.0),  # sixteen of these would be two bits, but each is cut by itself
        (0.25, 4.0),  # sixteen of these survive
    ],
)
def test_mma_cuts_terms_as_a_tensor_core_does(product: float, result: float, sign: float) -> None:
    count = 1 if product > 0.5 else 16
    A, B = torch.zeros(16, 16), torch.zeros(16, 8)
    A[:, :count], B[:count] = sign, product * 2.0**-23
    C = torch.full((16, 8), sign)
    assert multiply_add(A.bfloat16(), B.bfloat16(), C).eq(sign * (1 + result * 2.0**-23)).all()


def test_mma_does_not_hide_what_is_not_finite() -> None:
    A, B, C = torch.ones(16, 16), torch.ones(16, 8), torch.zeros(16, 8)
    A[3, 5], B[7, 2] = torch.inf, torch.nan
    result = multiply_add(A.bfloat16(), B.bfloat16(), C)
    assert (~result.isfinite()).sum() == 8 + 16 - 1


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_deals_out_rows(transposed: bool) -> None:
    memory = torch.arange(64 * 8, dtype=torch.int16)  # 64 rows of 16 bytes
    chosen = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32].int()
    out = torch.zeros(32, 4, dtype=torch.int32)
    instructions().run(
        "emulate_load_matrices", memory, memory.numel() * 2, (chosen * 16).contiguous(), int(transposed), out
    )
    rows = memory.view(64, 8)[chosen.long()]  # threads 8i..8i+7 address rows 0..7 of matrix i
    for matrix in range(4):
        M = rows[8 * matrix : 8 * matrix + 8]
        M = M.T if transposed else M
        for lane in range(32):
            low, high = M[lane // 4, lane % 4 * 2].item(), M[lane // 4, lane % 4 * 2 + 1].item()
            assert out[lane, matrix] == high << 16 | low


def test_cp_async_fills_with_zeros_and_lands_no_earlier_than_its_wait() -> None:
    memory = torch.arange(512).to(torch.uint8)
    counts = (torch.arange(32) % 17).int()
    expected = memory.view(32, 16).clone()
    for lane in range(32):
        expected[lane, counts[lane] :] = 0

    def compute(order: str, faulty: int = 0) -> Sequence[Tensor]:
        out = torch.zeros(32, 16, dtype=torch.uint8)
        instructions().run("emulate_copy", memory, counts, faulty, out, order=order)
        return [out]

    (out,) = instructions().in_every_order(compute)
    assert torch.equal(out, expected.flip(0))
    with pytest.raises(AssertionError, match="depends on the order"):
        instructions().in_every_order(lambda order: compute(order, faulty=1))


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    special = [
        0.0,
        -0.0,
        1 + 2.0**-8,
        1 + 3 * 2.0**-8,
        3.4e38,
        torch.inf,
        -torch.inf,
        1e-40,
        2.0**-133,
        1.5 * 2.0**-134,
    ]
    x = torch.cat([torch.tensor(special), normal(500), normal(250) * 1e-39, normal(224) * 1e30])
    out = torch.zeros(x.numel(), dtype=torch.int32)
    instructions().run("emulate_pack", x, x.flip(0).contiguous(), x.numel(), out)
    bits = x.bfloat16().view(torch.int16).int() & 0xFFFF
    assert torch.equal(out & 0xFFFF, bits)
    assert torch.equal(out >> 16 & 0xFFFF, bits.flip(0))


# ---- shared memory: no two lanes of one access meet in a bank
def bank_conflicts(addresses: Sequence[int], width: int) -> int:
    """Most accesses to one bank (4 bytes) within what is served at a time: 128 bytes."""
    worst, together = 0, 128 // width
    for start in range(0, len(addresses), together):
        words = {word for a in addresses[start : start + together] for word in range(a // 4, (a + width) // 4)}
        worst = max(worst, max(sum(word % 32 == bank for word in words) for bank in range(32)))
    return worst


@pytest.mark.parametrize(
    ("tile", "width", "warps", "along", "depths"),
    [  # width: bytes per lane; warps: extents at which warps begin; along: steps between their fragments
        ("bfloat16_rows", 16, (0, 16), (0, 32, 96), (0, 16, 48)),
        ("bfloat16_rows_right", 16, (0, 16, 32, 48), (0, 64), (0, 16, 48)),
        ("bfloat16_columns", 16, (0, 16), (0, 32, 96), (0, 16)),
        ("float32_rows", 4, (0, 16, 32, 48), (0, 64), (0, 16)),
        ("float32_rows_right", 4, (0, 16), (0, 32, 64), (0, 16)),
        ("float32_columns", 8, (0, 16), (0, 32, 96), (0, 16)),
        ("float32_columns_right", 8, (0, 16, 32, 48), (0, 64), (0, 16)),
    ],
)
def test_fragments_are_read_without_bank_conflicts(
    tile: str, width: int, warps: Sequence[int], along: Sequence[int], depths: Sequence[int]
) -> None:
    matrices = 1 if width == 16 else 4
    seen: set[int] = set()
    for warp in warps:
        for extent in along:
            for depth in depths:
                out = torch.zeros(matrices, 32, dtype=torch.int32)
                instructions().run(f"addresses_{tile}", warp, extent, depth, out)
                for addresses in out.tolist():
                    assert bank_conflicts(addresses, width) == 1
                    assert seen.isdisjoint(addresses)  # every fragment has places of its own
                seen.update(out.flatten().tolist())
    assert bank_conflicts([256 * (i % 8) + 16 * (i // 8) for i in range(32)], 16) == 8  # rows as they lie


# ---- shift_cov
def shift_cov(X: Tensor, delta: Tensor | None = None, out: Tensor | None = None, order: str = "forward") -> Tensor:
    """out + YᵀY by the emulated kernels, every buffer guarded by pages that may not be touched; X [batch, N, n]."""
    kernels = emulate.library("shift_cov.cu")
    batch, tokens, n = X.shape
    m = 0 if delta is None else delta.shape[-2]
    d = m or n
    out = torch.zeros(batch, d, d) if out is None else out
    result = emulate.guarded(out)
    floats = kernels.value("shift_cov_workspace_bytes", batch, tokens, n, m) // 4
    workspace = emulate.guarded(torch.full((floats,), torch.nan))
    strides = (0, 0) if delta is None else (delta.stride(0), delta.stride(1))
    sizes = (X.element_size(), batch, tokens, n, X.stride(0), X.stride(1))
    kernels.run(
        "shift_cov_launch", X, *sizes, delta, m, *strides, result, out.element_size(), workspace, None, order=order
    )
    for launch in kernels.launches:
        assert launch.threads <= 1024
        assert launch.shared_bytes <= 163 * 1024  # what sm_80 gives a block
    return result.clone()


def moment(X: Tensor, delta: Tensor | None = None) -> Tensor:
    Y = X if delta is None else X @ delta.mT
    return Y.mT @ Y


def assert_second_moment(result: Tensor, X: Tensor, delta: Tensor | None) -> None:
    exact = moment(X.double(), None if delta is None else delta.double())
    own = relative(moment(X.float(), delta), exact)
    products = 1 if delta is None else 3  # Y is one product that enters twice
    assert relative(result, exact) <= 2 * own + products * EPS
    assert torch.equal(result, result.mT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "tokens", "n", "m"),
    [
        (1, 1, 5, 0),
        (2, 70, 133, 0),
        (1, 70, 136, 0),
        (1, 40, 260, 0),
        (3, 65, 1, 0),
        (1, 40, 33, 50),
        (1, 40, 32, 50),
        (2, 37, 7, 1),
        (1, 33, 130, 140),
    ],
)
def test_shift_cov_is_the_second_moment(dtype: torch.dtype, batch: int, tokens: int, n: int, m: int) -> None:
    X = emulate.guarded(normal(batch, tokens, n).to(dtype))
    delta = emulate.guarded(normal(batch, m, n, seed=1)) if m else None
    (result,) = emulate.library("shift_cov.cu").in_every_order(lambda order: [shift_cov(X, delta, order=order)])
    assert_second_moment(result, X, delta)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("width", [48, 49])
def test_shift_cov_of_strided_inputs(dtype: torch.dtype, offset: int, width: int) -> None:
    wide, deltas = normal(2, 260, width).to(dtype), normal(2, 200, width, seed=1)
    before = wide.clone()
    X, delta = wide[:, ::2, offset : offset + 39], deltas[:, ::2, offset : offset + 39]
    for given in (None, delta):
        assert_second_moment(shift_cov(X, given), X, given)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shift_cov_adds_to_out(dtype: torch.dtype) -> None:
    X = normal(2, 24, 40)
    out = normal(2, 40, 40, seed=1).to(dtype)
    out = out + out.mT
    result = shift_cov(X, out=out)
    assert result.dtype == dtype
    assert relative(result, out.double() + moment(X.double())) <= 2 * EPS
    assert torch.equal(result, result.mT)
    assert torch.equal(shift_cov(X[:, :0], out=out), out)


def test_tokens_are_split_and_shifts_chunked_without_a_trace() -> None:
    """More than 512 tokens are split over blocks; shifts of a batch of 4 are stored 512 tokens at a time."""
    X, delta = normal(4, 600, 20).bfloat16(), normal(4, 9, 20, seed=1)
    kernels = emulate.library("shift_cov.cu")
    result = shift_cov(X)
    assert kernels.launches[0].grid == (4, 2, 1)
    assert_second_moment(result, X, None)
    result = shift_cov(X, delta)
    assert [launch.grid[0] for launch in kernels.launches] == [4 * 4, 4, 4, 4, 4]  # shift, Gram, twice, and the sum
    assert_second_moment(result, X, delta)


def test_long_sums_do_not_lose_what_one_chain_of_the_tensor_core_loses() -> None:
    repeats = 128
    block = normal(16, 16).abs().bfloat16()  # 16 tokens, of one sign: all cuts are in one direction
    exact = repeats * moment(block.double())
    chain = multiply_add(block.mT, block[:, :8], torch.zeros(16, 8), count=repeats)
    assert relative(chain, exact[:, :8]) > 8 * EPS
    X = block.repeat(repeats, 1).unsqueeze(0)
    for dtype in (torch.bfloat16, torch.float32):
        assert relative(shift_cov(X.to(dtype))[0], exact) <= 2 * EPS


@pytest.mark.parametrize("d", [768, 1024, 2304, 3072, 4096])
def test_splits_fill_the_machine(d: int) -> None:
    tiles = (d // 128) * (d // 128 + 1) // 2
    needed = emulate.library("shift_cov.cu").value("shift_cov_workspace_bytes", 1, 131072, d, 0)
    splits, rest = divmod(needed, tiles * TILE_BYTES)
    assert rest == 0
    assert splits * tiles / (132 * -(-splits * tiles // 132)) >= 0.93


def test_offsets_are_64_bit() -> None:
    stride = 2**31 + 8
    try:
        memory = mmap.mmap(-1, 2 * (2 * stride + 64), flags=mmap.MAP_PRIVATE | 0x4000)  # 0x4000: MAP_NORESERVE
    except OSError as error:
        pytest.skip(f"8 GiB of address space: {error}")
    X = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((1, 3, 16), (0, stride, 1))
    X.copy_(normal(1, 3, 16))
    assert_second_moment(shift_cov(X), X, None)


@pytest.mark.parametrize(
    "wrong", [{"x_bytes": 8}, {"out_bytes": 2}, {"tokens": -1}, {"m": 3}, {"tokens": 2**31}], ids=str
)
def test_shift_cov_refuses_what_it_cannot_run(wrong: dict[str, int]) -> None:
    call = {"x_bytes": 4, "tokens": 4, "m": 0, "out_bytes": 4} | wrong
    X, out = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    with pytest.raises(emulate.EmulationError, match="cudaError 1"):
        emulate.library("shift_cov.cu").run(
            "shift_cov_launch",
            *(X, call["x_bytes"], 1, call["tokens"], 4, 16, 4, None, call["m"], 0, 0),
            *(out, call["out_bytes"], None, None),
        )


# ---- project_scale
def project_scale(Q: Tensor, W: Tensor, row_scale: Tensor, order: str = "forward") -> tuple[Tensor, Tensor]:
    """Rows [batch, T s, n] and column squares [batch, n] by the emulated kernels; Q and W [batch, T, m, ...]."""
    kernels = emulate.library("project_scale.cu")
    (batch, T, m, s), n = Q.shape, W.shape[-1]
    assert T == 0 or (Q.stride(0), W.stride(0)) == (T * Q.stride(1), T * W.stride(1))
    C = emulate.guarded(torch.full((batch, T * s, n), torch.nan))
    squares = emulate.guarded(torch.full((batch, n), torch.nan, dtype=torch.float64))
    doubles = kernels.value("project_scale_workspace_bytes", batch, T, n, s) // 8
    workspace = emulate.guarded(torch.full((doubles,), torch.nan, dtype=torch.float64))
    kernels.run(
        "project_scale_launch",
        *(Q, Q.stride(1), Q.stride(2), W, W.element_size(), W.stride(1), W.stride(2), row_scale),
        *(batch, T, m, n, s, C, squares, workspace, None),
        order=order,
    )
    assert all(launch.shared_bytes <= 163 * 1024 for launch in kernels.launches)
    return C.clone(), squares.clone()


def assert_projection(C: Tensor, squares: Tensor, Q: Tensor, W: Tensor, row_scale: Tensor) -> None:
    exact = (row_scale.double().unsqueeze(-1) * (Q.double().mT @ W.double())).flatten(1, 2)
    own = relative((row_scale.unsqueeze(-1) * (Q.mT @ W.float())).flatten(1, 2), exact)
    assert relative(C, exact) <= 2 * own + EPS
    torch.testing.assert_close(squares, C.double().square().sum(1), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("batch", "T", "m", "n", "s"),
    [
        (1, 1, 5, 7, 5),
        (2, 3, 40, 133, 38),
        (1, 2, 40, 136, 40),
        (1, 2, 33, 20, 96),
        (1, 2, 50, 30, 97),
        (2, 1, 1, 1, 1),
        (1, 2, 40, 9, 192),
    ],
)
def test_project_scale_is_the_scaled_concatenation(
    dtype: torch.dtype, batch: int, T: int, m: int, n: int, s: int
) -> None:
    Q, W = emulate.guarded(normal(batch, T, m, s)), emulate.guarded(normal(batch, T, m, n, seed=1).to(dtype))
    row_scale = emulate.guarded(normal(batch, T, s, seed=2))
    C, squares = emulate.library("project_scale.cu").in_every_order(
        lambda order: project_scale(Q, W, row_scale, order=order)
    )
    assert_projection(C, squares, Q, W, row_scale)


@pytest.mark.parametrize("offset", [0, 1])
def test_project_scale_of_strided_inputs(offset: int) -> None:
    Q = normal(2, 2, 60, 48)[:, :, ::2, offset : offset + 30]
    W = normal(2, 2, 60, 72, seed=1).bfloat16()[:, :, ::2, offset : offset + 64]
    row_scale = normal(2, 2, 30, seed=2)
    assert_projection(*project_scale(Q, W, row_scale), Q, W, row_scale)


@pytest.mark.parametrize(("T", "m", "s"), [(2, 0, 5), (2, 6, 0), (0, 6, 5)])
def test_project_scale_without_elements_is_zero(T: int, m: int, s: int) -> None:
    C, squares = project_scale(torch.zeros(2, T, m, s), torch.zeros(2, T, m, 9), torch.ones(2, T, s))
    assert not C.any()
    assert torch.equal(squares, torch.zeros(2, 9, dtype=torch.float64))


def test_planes_carry_float32() -> None:
    """Products of float32 numbers by one plane of bfloat16 are off by 2e-3, by three by no more than float32's own."""
    Q, W, row_scale = normal(1, 1, 16, 8), normal(1, 1, 16, 8, seed=1), torch.ones(1, 1, 8)
    exact = Q[0, 0].double().mT @ W[0, 0].double()
    assert relative(project_scale(Q, W, row_scale)[0][0], exact) <= 2 * EPS
    one_plane = project_scale(Q.bfloat16().float(), W.bfloat16().float(), row_scale)[0][0]
    assert relative(one_plane, exact) > 1e-3


# ---- on a device
def extension() -> ModuleType:
    from isomerge.backends import cuda

    reason = cuda.availability()
    if reason is not None:
        pytest.skip(reason)
    return cuda


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("tokens", "n", "m"), [(5000, 770, 0), (131, 33, 0), (5000, 300, 260), (777, 129, 40)])
def test_shift_cov_on_a_device(dtype: torch.dtype, tokens: int, n: int, m: int) -> None:
    X = normal(2, tokens, n).to(dtype).cuda()
    delta = normal(2, m, n, seed=1).cuda() if m else None
    first, again = (
        extension().shift_cov(X, delta, out=X.new_zeros(2, m or n, m or n, dtype=torch.float32), precision="default")
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert_second_moment(first, X, delta)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("s", [5, 38, 96, 200])
def test_project_scale_on_a_device(dtype: torch.dtype, s: int) -> None:
    Q, W, row_scale = (
        normal(2, 3, 500, s).cuda(),
        normal(2, 3, 500, 301, seed=1).to(dtype).cuda(),
        normal(2, 3, s).cuda(),
    )
    first, again = (extension().project_scale(Q, W, row_scale=row_scale) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert_projection(*first, Q, W, row_scale)


# ---- machine code
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc compiles the kernels")
def test_kernels_run_on_tensor_cores_without_spills(tmp_path: Path) -> None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(str(triton.origin)).parent / "backends/nvidia/bin/cuobjdump" if triton else Path()
    cuobjdump = shutil.which("cuobjdump") or (str(bundled) if bundled.is_file() else None)
    if cuobjdump is None:
        pytest.skip("cuobjdump, of CUDA or triton, reads the machine code")
    csrc = emulate.ROOT / "csrc"
    flags = ["-std=c++20", "-O3", f"-I{csrc}", "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v", "-cubin"]
    builds = {
        name: subprocess.Popen(
            ["nvcc", *flags, str(csrc / f"{name}.cu"), "-o", str(tmp_path / name)], stderr=subprocess.PIPE, text=True
        )
        for name in ("shift_cov", "project_scale")
    }
    for name, build in builds.items():
        _, log = build.communicate()
        assert build.returncode == 0, log
        assert set(re.findall(r"(\d+) bytes (?:stack frame|spill \w+)", log)) == {"0"}
        sass = subprocess.run([cuobjdump, "-sass", tmp_path / name], capture_output=True, text=True, check=True).stdout
        kernels = {text.split("\n")[0]: text for text in sass.split("Function : ")[1:]}
        products = [
            text for title, text in kernels.items() if re.search("gram|feature_shift|project_scale_kernel", title)
        ]
        assert len(products) == 4
        for text in products:
            assert "HMMA.16816.F32.BF16" in text
            assert re.search(r"LDGSTS\.E\.BYPASS\S*\.128", text)
            assert not re.search(r"\b(LDL|STL)\b", text)
        assert sum("LDSM" in text for text in products) == 2  # those with a bfloat16 operand
