"""Elements merged on their way from files: the bits of reading them first, or None, and never those of another file."""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isomerge import deltas, merge, ops
from isomerge import direct as module
from isomerge.backends import native
from isomerge.backends.native import Finalized
from isomerge.checkpoint import Checkpoint, from_state_dict, open_checkpoint
from isomerge.deltas import Group, Unit
from isomerge.direct import Direct
from isomerge.errors import InputError

pytestmark = pytest.mark.skipif(native.availability() is not None, reason=str(native.availability()))

STORED = (torch.float32, torch.bfloat16, torch.float16)
FIRST = 3  # flat index of the unit's first element
BLOCK = 640 * 2**10  # bytes of all arrays that are in use at a time
WEIGHTS = [1.0, 0.3, -2.0]


def values_of(count: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(FIRST + count + 2, generator=generator)
    return [(base + 0.01 * t * torch.randn(base.shape, generator=generator)).to(d) for t, d in enumerate(dtypes)]


def saved(folder: Path, models: Sequence[Tensor]) -> list[Path]:
    for t, values in enumerate(models):
        # Elements that do not stand at a multiple of their size: headers of other writers are as long as they come.
        entry = {"dtype": {torch.bfloat16: "BF16", torch.float16: "F16"}.get(values.dtype, "F32")}
        nbytes = values.nbytes
        header = json.dumps({"x": {**entry, "shape": list(values.shape), "data_offsets": [0, nbytes]}}).encode()
        header += b" " * (1 - len(header) % 2)
        raw = bytes(values.view(torch.uint8).tolist())
        (folder / f"{t}.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + raw)
    return [folder / f"{t}.safetensors" for t in range(len(models))]


def group_of(count: int, reduction: str = "sum", transposed: bool = False, dtype: torch.dtype = torch.float32) -> Group:
    return Group(1, count, transposed, dtype, (), reduction=reduction)


def direct(
    models: Sequence[Checkpoint], count: int, group: Group, *, start: int = FIRST, weights: Sequence[float] = WEIGHTS
) -> Direct:
    unit = Unit("x", ("x",) * (len(models) - 1), start, count, False)
    return Direct(tuple((model, "x") for model in models), weights[: len(models) - 1], unit, group)


def blended(
    models: Sequence[Checkpoint],
    count: int,
    *,
    start: int = FIRST,
    weights: Sequence[float] = WEIGHTS,
    scales: Sequence[float] = (1.0,),
    dtype: torch.dtype = torch.bfloat16,
    group: Group | None = None,
) -> Finalized | None:
    group = group or group_of(count)
    return direct(models, count, group, start=start, weights=weights).to(scales, dtype).blend(group.reduction)


def ordinary(
    models: Sequence[Tensor], weights: Sequence[float], reduction: str, scales: Sequence[float], dtype: torch.dtype
) -> tuple[list[Tensor], float, float]:
    """What `blend` has to give, by reading everything and eager's operations."""
    base, *tuned = models
    out, base_out = torch.empty(1, len(base)), torch.empty(len(base))
    square = ops.subtract(base, tuned, weights, base_out=base_out, out=out, reduction=reduction, backend="eager")
    merged = [ops.finalize(base_out[None], out, s, out_dtype=dtype, backend="eager")[0] for s in scales]
    return merged, square, ops.frobenius(out, backend="eager") ** 2


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[[Sequence[Tensor]], list[Checkpoint]]]:
    with ExitStack() as stack:

        def open_all(models: Sequence[Tensor]) -> list[Checkpoint]:
            return [stack.enter_context(open_checkpoint(path)) for path in saved(tmp_path, models)]

        yield open_all


# ---- what it gives
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("stored", "dtype"), list(itertools.product(STORED, STORED)))
def test_the_bits_are_those_of_reading_everything_first(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]], reduction: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    dtypes = (stored, torch.bfloat16, stored, torch.float32)
    block = BLOCK // sum(d.itemsize for d in dtypes)
    for count, scales in ((1, [1.0]), (1025, [0.3, -2.0, 0.0]), (block, [1.0]), (2 * block + 1, [0.8, 1.2])):
        models = values_of(count, dtypes)
        found = blended(opened(models), count, scales=scales, dtype=dtype, group=group_of(count, reduction))
        merged, square, update = ordinary(
            [model[FIRST : FIRST + count] for model in models], WEIGHTS, reduction, scales, dtype
        )
        assert found is not None
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found.values, merged, strict=True))
        assert len(found.values) == len(scales)
        # eager sums pairs in float32, in an order of its own: count roundings at worst, far fewer in truth
        assert found.sum_square == pytest.approx(square, rel=1e-5)
        assert found.update_square == pytest.approx(update, rel=1e-5)


@pytest.mark.parametrize(("stored", "dtype"), [*zip(STORED, STORED, strict=True), (torch.bfloat16, torch.float32)])
def test_elections_are_those_of_reading_everything_first(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]], stored: torch.dtype, dtype: torch.dtype
) -> None:
    dtypes = (stored, torch.bfloat16, stored, torch.float32)
    block = BLOCK // (sum(d.itemsize for d in dtypes) + 4 * len(dtypes))
    for count, scales in ((1, [1.0]), (1025, [0.3, -2.0, 0.0]), (block, [1.0]), (2 * block + 1, [0.8, 1.2])):
        models = values_of(count, dtypes)
        files = direct(opened(models), count, group_of(count, "none"))
        base, *tuned = (model[FIRST : FIRST + count] for model in models)
        base_out, out = torch.empty(count), torch.empty(3, count)
        square = ops.subtract(base, tuned, WEIGHTS, base_out=base_out, out=out, backend="eager")
        higher: list[tuple[int, ...]] = [()] * 3
        for _ in range(2):
            counts = files.count_digits(higher)
            assert counts is not None
            for t, known in enumerate(higher):
                assert torch.equal(counts[t], ops.count_digits(out[t], known, backend="eager"))
                higher[t] = (*known, int(counts[t].argmax()))
        limits = out.abs().median(dim=1).values
        assert files.votes(limits) == ops.votes(out, limits, backend="eager")
        for majority in (-1, 1):
            update = ops.elect(out, limits, majority, backend="eager")
            merged = [ops.finalize(base_out[None], update[None], s, out_dtype=dtype, backend="eager") for s in scales]
            found = files.to(scales, dtype).elect(limits, majority)
            assert found is not None
            assert all(torch.equal(mine, theirs[0]) for mine, theirs in zip(found.values, merged, strict=True))
            assert found.sum_square == pytest.approx(square, rel=1e-5)
            assert found.update_square == pytest.approx(float(update.double().square().sum()), rel=1e-12)


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_what_is_left_is_that_of_reading_everything_first(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]], density: float
) -> None:
    dtypes, apart, first, seed = [torch.bfloat16] * 4, 2**48, 12345, 2**63 + 7
    count = 3 * BLOCK // 24 + 1
    models = values_of(count, dtypes)
    files = direct(opened(models), count, group_of(count, "none")).to([0.7], torch.bfloat16)
    left = files.dropped(density, seed, first, apart)
    base, *tuned = (model[FIRST : FIRST + count] for model in models)
    base_out, out = torch.empty(count), torch.empty(3, count)
    square = ops.subtract(base, tuned, WEIGHTS, base_out=base_out, out=out, backend="eager")
    kept = [ops.drop(d, density, seed=seed, first=first + t * apart, backend="eager") for t, d in enumerate(out)]
    total, limits = torch.zeros(count), torch.zeros(3)
    for values in kept:
        total += values
    assert left.votes(limits) == ops.votes(torch.stack(kept), limits, backend="eager")
    for update, found in (
        (total, left.blend("sum")),
        (ops.elect(torch.stack(kept), limits, 1, backend="eager"), left.elect(limits, 1)),
    ):
        assert found is not None
        merged = ops.finalize(base_out[None], update[None], 0.7, out_dtype=torch.bfloat16, backend="eager")
        assert torch.equal(found.values[0], merged[0])
        assert found.sum_square == pytest.approx(square, rel=1e-5)
        assert found.update_square == pytest.approx(float(update.double().square().sum()), rel=1e-12)


def test_forty_models_and_a_single_one(opened: Callable[[Sequence[Tensor]], list[Checkpoint]]) -> None:
    for experts in (1, 40):
        models, weights = values_of(70_001, [torch.bfloat16] * (1 + experts)), [0.5] * experts
        found = blended(opened(models), 70_001, weights=weights, group=group_of(70_001, "mean"))
        merged, *_ = ordinary([m[FIRST:-2] for m in models], weights, "mean", [1.0], torch.bfloat16)
        assert found is not None
        assert torch.equal(found.values[0], merged[0])


def test_offsets_beyond_four_gigabytes(tmp_path: Path) -> None:
    count, far = 1000, 2**32 + 7
    models = values_of(count, [torch.bfloat16] * 3)
    for t, values in enumerate(models):
        size = 2 * (far + len(values))
        header = json.dumps({"x": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
        with (tmp_path / f"{t}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.seek(2 * far, os.SEEK_CUR)
            file.write(bytes(values.view(torch.uint8).tolist()))
    checkpoints = [open_checkpoint(tmp_path / f"{t}.safetensors") for t in range(3)]
    found = blended(checkpoints, count, start=far + FIRST)
    merged, *_ = ordinary([m[FIRST:-2] for m in models], WEIGHTS[:2], "sum", [1.0], torch.bfloat16)
    assert found is not None
    assert torch.equal(found.values[0], merged[0])


# ---- what it leaves to others
def test_a_block_without_an_update_or_with_what_is_not_finite(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]],
) -> None:
    block = BLOCK // 6
    count = 2 * block
    usual = values_of(count, [torch.bfloat16] * 3)
    assert blended(opened(usual), count) is not None
    for model, value in itertools.product(range(3), (math.nan, math.inf)):
        models = [values.clone() for values in usual]
        models[model][FIRST + block + 5] = value
        assert blended(opened(models), count) is None
    models = [values.clone() for values in usual]
    for expert in models[1:]:
        expert[FIRST + block :] = models[0][FIRST + block :]
    assert blended(opened(models), count) is None
    assert blended(opened(models), block) is not None


def test_an_election_without_an_update_or_with_what_is_not_finite(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]],
) -> None:
    count, limits = 200_000, torch.zeros(2)
    group = group_of(count, "none")
    usual = values_of(count, [torch.bfloat16] * 3)
    for model, value in itertools.product(range(3), (math.nan, -math.inf)):
        models = [values.clone() for values in usual]
        models[model][FIRST + count - 5] = value
        files = direct(opened(models), count, group)
        assert files.count_digits([(), ()]) is None
        assert files.votes(limits) is None
        assert files.to([1.0], torch.bfloat16).elect(limits, 1) is None
    files = direct(opened(usual), count, group).to([1.0], torch.bfloat16)
    assert files.elect(limits, 1) is not None
    assert files.elect(torch.full((2,), math.inf), 1) is None
    assert files.votes(torch.full((2,), math.inf)) == 0


def test_an_update_that_a_scale_could_lift_beyond_float32(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]],
) -> None:
    models = [torch.zeros(FIRST + 14), torch.full((FIRST + 14,), 1e30)]
    for scale, fits in ((1e7, True), (-1e7, True), (1e8, False), (-1e8, False)):
        # 12 elements: the norm is 3.46e30, the largest number 3.40e38
        found = blended(opened(models), 12, scales=[1.0, scale], dtype=torch.float32)
        assert (found is not None) is fits


def test_what_is_others_business(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = values_of(50, [torch.bfloat16] * 3)
    files = opened(models)
    for group in (group_of(50, "none"), group_of(50, transposed=True), group_of(50, dtype=torch.float64)):
        assert blended(files, 50, group=group) is None
    left = direct(files, 50, group_of(50, "none")).to([1.0], torch.bfloat16).dropped(0.5, 0, 0, 2**48)
    assert left.blend("sum") is not None
    assert left.blend("mean") is None
    assert blended(files, 50, dtype=torch.float64) is None
    memory = from_state_dict({"x": models[1]}, "memory")
    assert blended([files[0], memory, files[2]], 50) is None
    torch.save({"x": torch.stack([models[1], models[1]], 1)[:, 0]}, tmp_path / "gaps.pt")
    with open_checkpoint(tmp_path / "gaps.pt") as gaps:
        assert blended([files[0], gaps, files[2]], 50) is None
    save_file({"x": models[1].double()}, tmp_path / "double.safetensors")
    with open_checkpoint(tmp_path / "double.safetensors") as double:
        assert blended([files[0], double, files[2]], 50) is None
    assert blended(files, 50) is not None
    monkeypatch.setattr(native, "availability", lambda: "not built")
    assert blended(files, 50) is None


# ---- files
def test_where_a_tensor_lies(tmp_path: Path) -> None:
    values = torch.arange(20.0)
    torch.save({"x": values, "y": values, "gaps": values[::2]}, tmp_path / "e.pt")
    with open_checkpoint(tmp_path / "e.pt") as expert:
        for name in ("x", "y"):  # tied: the same bytes
            with expert.stretch(name, 5) as place:
                assert place is not None
                assert os.pread(place[0], 12, place[1]) == struct.pack("<3f", 5, 6, 7)
        with expert.stretch("gaps") as place:
            assert place is None
    with from_state_dict({"x": values}, "memory").stretch("x") as place:
        assert place is None


def test_a_torch_file_with_its_elements_in_order(tmp_path: Path) -> None:
    models = values_of(50, [torch.bfloat16] * 3)
    torch.save({"x": models[1]}, tmp_path / "e.pt")
    base, _, other = (open_checkpoint(path) for path in saved(tmp_path, models))
    found = blended([base, open_checkpoint(tmp_path / "e.pt"), other], 50, dtype=torch.float32)
    merged, *_ = ordinary([m[FIRST:-2] for m in models], WEIGHTS[:2], "sum", [1.0], torch.float32)
    assert found is not None
    assert torch.equal(found.values[0], merged[0])


@pytest.mark.parametrize("change", ["truncated", "longer", "touched", "another", "gone"])
def test_a_file_that_is_not_the_one_that_was_opened(
    opened: Callable[[Sequence[Tensor]], list[Checkpoint]], tmp_path: Path, change: str
) -> None:
    models = opened(values_of(50, [torch.bfloat16] * 3))
    file = tmp_path / "1.safetensors"
    if change == "truncated":
        os.truncate(file, file.stat().st_size - 10)
    elif change == "longer":
        os.truncate(file, file.stat().st_size + 10)
    elif change == "touched":
        os.utime(file, ns=(0, 0))
    else:  # of a file that was opened before, the old one would be read, which is as good
        models[1].close()
        models[1] = open_checkpoint(file)
        content = file.read_bytes()
        file.unlink()
        if change == "another":
            file.write_bytes(content)
    with pytest.raises(InputError, match=r"1\.safetensors: the file changed while it was being read"):
        blended(models, 50)


# ---- in a merge
RECIPES = {
    "average": "merge_method: average\n",
    "alphas": "merge_method: task_arithmetic\nparameters: {alpha: [0.3, 1.0]}\nout_dtype: float16\n",
    "ties": "merge_method: ties\n",
    "dare_linear": "merge_method: dare_linear\n",
    "dare_ties": "merge_method: dare_ties\n",
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_a_merge_gives_the_same_bytes_and_report_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    for t, model in enumerate(("base", "e0", "e1")):
        tensors = {
            "usual.weight": torch.randn(300, 200, generator=generator).to(torch.bfloat16 if t else torch.float32),
            "double.weight": torch.randn(20, 30, generator=generator).double(),
            "frozen.weight": -torch.zeros(70, 70),
            "spoilt.weight": torch.ones(900) + 0.1 * t,
            "norm.weight": torch.randn(37, generator=generator).half(),
        }
        if t == 2:
            tensors["spoilt.weight"][5] = math.nan
        save_file(tensors, tmp_path / f"{model}.safetensors")
    models = "".join(f"  - model: {tmp_path}/e{t}.safetensors\n" for t in (0, 1))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{RECIPES[name]}base_model: {tmp_path}/base.safetensors\nmodels:\n{models}")
    monkeypatch.setattr(deltas, "PIECE_ELEMENTS", 25_000)
    done = []

    def counted(*arguments: object, **options: object) -> object:
        done.append(real(*arguments, **options))
        return done[-1]

    function = "elect" if name.endswith("ties") else "blend"
    real = getattr(module.FileModels, function)
    monkeypatch.setattr(module.FileModels, function, counted)
    mine = merge(recipe, tmp_path / "mine", allow_nonfinite=True)
    if name.endswith("ties"):  # of what is merged in pieces
        assert [found is not None for found in done] == [True] * 3
    else:  # usual and norm; not what has no update, what is spoilt, nor float64
        assert [found is not None for found in done].count(True) == 4
        assert len(done) == 6
    asked = len(done)
    monkeypatch.setattr(native, "availability", lambda: "not built")
    theirs = merge(recipe, tmp_path / "theirs", allow_nonfinite=True)
    assert len(done) == asked
    files = sorted(path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*.safetensors"))
    assert len(files) == (2 if name == "alphas" else 1)
    for file in files:
        assert (tmp_path / "mine" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
        assert bool(torch.signbit(load_file(tmp_path / "mine" / file)["frozen.weight"]).all())
    for a, b in zip(mine.tensors, theirs.tensors, strict=True):
        assert (a.name, a.frozen, a.nonfinite) == (b.name, b.frozen, b.nonfinite)
        # squares are added in float64, in another order
        assert a.delta_sum_norm == pytest.approx(b.delta_sum_norm, rel=1e-12)
        assert a.update_norm == pytest.approx(b.update_norm, rel=1e-12)
    assert (mine.totals.bytes_read, mine.totals.bytes_written) == (
        theirs.totals.bytes_read,
        theirs.totals.bytes_written,
    )
