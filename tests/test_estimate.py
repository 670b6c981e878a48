"""The estimate of a merge's time: its arithmetic on given rates, what is sampled, and that nothing is left behind."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import tiny
import torch
from command_line import Run

from isomerge import deltas, surveys
from isomerge.backends import native
from isomerge.checkpoint import Checkpoint
from isomerge.checkpoint.shard_files import FLUSH_BYTES
from isomerge.deltas import Unit
from isomerge.estimate import Estimate, disks, estimate
from isomerge.estimate.calibration import MOST, _Known, _next
from isomerge.estimate.disks import Disks
from isomerge.estimate.pieces import GROUPS, small_job
from isomerge.estimate.probes import Sample, sample
from isomerge.estimate.totals import Seconds, at_full_size, finish_seconds
from isomerge.estimate.work import KEPT, Work, gather
from isomerge.merge import open_job
from isomerge.methods import METHODS
from isomerge.methods.survey import Survey
from isomerge.run import Job
from isomerge.schedule import Step

QUERY = "encoder.layer.0.attention.self.query.weight"
RATES = Disks(read=100.0, write=50.0, checksum=200.0, cached=0.25)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile(buffering=0, dir=tmp_path) as file:
        yield file


@contextmanager
def job_of(
    folder: Path, method: str, dtype: torch.dtype = torch.bfloat16, group_bytes: int | None = None, **keys: object
) -> Iterator[Job]:
    """An open job over tiny models, with statistics where the method needs them."""
    states = tiny.bert_models(folder, 3, dtype)
    recipe = tiny.recipe_for(method, **keys)
    if METHODS[method].moments:
        for i, state in enumerate(states[1:]):
            tiny.save_statistics(folder / f"s{i}", states[0], state, tiny.second_moments(states[0], state, i))
        recipe["models"] = [{"model": f"e{i}", "statistics": f"s{i}"} for i in range(3)]
    with open_job(tiny.write_recipe(folder, recipe), group_bytes=group_bytes) as job:
        yield job


def tree(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def took(share: float, compute: float, read: float = 0.0, spent: float = 0.0) -> Sample:
    return Sample(share, compute + read, read, compute, 0.0, spent)


# The arithmetic


def test_elementwise_work_grows_with_the_elements() -> None:
    seconds = at_full_size([took(0.25, 9.0), Sample(0.5, 5.0, 2.0, 3.0, 1.0, 0.0)], cubic=False)
    assert seconds == Seconds(20.0, 8.0, 12.0, 4.0)  # the last sample alone, 1 / 0.5² times


@pytest.mark.parametrize("power", [3.0, 2.5, 2.0])
def test_matrices_approach_the_third_power(power: float) -> None:
    """log2 of the growth per doubling after two samples that differ by 2^p: 3 - (3 - p) / 4, 3 - (3 - p) / 16, ..."""
    samples = [took(0.125, 1.0), took(0.25, 2.0**power)]
    growth = sum(3 - (3 - power) / 4**j for j in (1, 2))
    assert math.isclose(at_full_size(samples, cubic=True).compute, 2 ** (power + growth))


def test_a_single_sample_of_matrices() -> None:
    seconds = at_full_size([took(0.5**20, 1.0)], cubic=True).compute
    assert math.isclose(seconds, 2.0**59, rel_tol=1e-5)  # n³, less one doubling


def test_powers_that_no_algorithm_has_are_noise() -> None:
    for measured, taken in ((8.0, 3.0), (0.5, 2.0)):
        noisy = at_full_size([took(0.25, 1.0), took(0.5, 2.0**measured)], cubic=True)
        plain = at_full_size([took(0.25, 1.0), took(0.5, 2.0**taken)], cubic=True)
        assert math.isclose(noisy.compute / 2.0**measured, plain.compute / 2.0**taken)


def test_a_whole_unit_is_not_extrapolated() -> None:
    last = took(1.0, 7.0, read=2.0)
    assert at_full_size([took(0.5, 1.0), last], cubic=True) == Seconds(9.0, 2.0, 7.0, 0.0)
    assert at_full_size([last], cubic=False).engine == 9.0


def test_reading_takes_time_of_its_own_only_from_cores_that_compute() -> None:
    samples = [took(1.0, 7.0, read=2.0)]
    assert at_full_size(samples, cubic=True, shared=False).engine == 7.0
    assert at_full_size([took(1.0, 1.0, read=2.0)], cubic=True, shared=False).engine == 2.0


def test_smaller_samples_of_equal_time_mean_longer_merges() -> None:
    for cubic in (True, False):
        totals = [at_full_size([took(share, 1.0, read=0.1)], cubic).engine for share in (1.0, 0.5, 0.25, 0.125)]
        assert totals == sorted(totals)
        assert len(set(totals)) == 4


def test_what_waits_for_the_disk_at_the_end() -> None:
    written = 4 * FLUSH_BYTES
    assert math.isclose(finish_seconds(1000, 1.0, RATES, 2), 1000 / 50 + 1000 / 200)  # too little to be flushed before
    summed = FLUSH_BYTES / 200 + 3 * FLUSH_BYTES / 200 / 2  # three of four flushes by one of two cores
    assert math.isclose(finish_seconds(written, 0.0, RATES, 2), written / 50 + summed)
    assert math.isclose(finish_seconds(written, written / 100, RATES, 2), written / 100 + summed)
    assert math.isclose(finish_seconds(written, written, RATES, 2), FLUSH_BYTES / 50 + summed)
    assert math.isclose(finish_seconds(written, written, RATES, 0), FLUSH_BYTES / 50 + FLUSH_BYTES / 200)
    assert finish_seconds(0, 0.0, RATES, 2) == 0.0


def test_totals() -> None:
    methods = {"iso_c": Seconds(8.0, 2.0, 6.0, 1.0), "average": Seconds(2.0, 1.0, 0.5, 0.5)}
    short = Estimate(methods, start=1.0, fetch=4.0, finish=3.0, disks=RATES, share=1.0)
    assert short.units == Seconds(10.0, 3.0, 6.5, 1.5)
    assert short.from_memory == short.from_disk == short.expected == 14.0  # 3 + 4 s of reading are hidden in 10 s
    long = replace(short, fetch=40.0)
    assert (long.from_memory, long.from_disk) == (14.0, 1.0 + 3.0 + 40.0 + 3.0)
    assert long.expected == 1.0 + 3.0 + 0.75 * 40.0 + 3.0
    assert replace(long, disks=replace(RATES, cached=None)).expected == long.from_disk


# What is sampled


def test_every_unit_and_every_element_is_in_one_work(tmp_path: Path) -> None:
    rules = [
        {"filter": "*.query.*", "keep_base": True},
        {"filter": "*.key.weight", "merge_method": "ties"},
        {"filter": "*.value.weight", "parameters": {"common_space_fraction": 0.5}},
    ]
    with job_of(tmp_path, "iso_cts", group_bytes=3 * 2 * 16 * 16 * 4, rules=rules) as job:
        works = gather(job)
        plan = job.plan
        assert len(plan.steps) > len(works)  # several groups of one work
        assert max(w.length for w in works if w.method == "iso_cts") == 2
        assert sum(w.units for w in works if w.step) == sum(len(step.group.units) for step in plan.steps)
        assert sum(w.units * w.m * w.n for w in works) == sum(a.numel for a in plan.assignments)
        spectral = {(w.m, w.n, str(w.step.call.parameters)): w.units for w in works if w.step and w.method == "iso_cts"}
        assert spectral == {
            (16, 16, "{'common_space_fraction': 0.8}"): 3,
            (16, 16, "{'common_space_fraction': 0.5}"): 2,
            (24, 16, "{'common_space_fraction': 0.8}"): 2,
            (16, 24, "{'common_space_fraction': 0.8}"): 2,
        }
        assert {w.method for w in works} == {"iso_cts", "ties", "average", KEPT}
        assert sum(w.n for w in works if w.method == KEPT) == 12 + 2 * (
            16 * 16 + 16
        )  # positions, queries and their biases


def query_work(job: Job) -> Work:
    return next(w for w in gather(job) if w.method == job.plan.settings.method and w.m == w.n)


def test_pieces_are_the_first_values_of_the_models(tmp_path: Path) -> None:
    with job_of(tmp_path, "iso_c", parameters={"alpha": [0.5, 1e30]}, out_dtype="float16") as job:
        work = query_work(job)
        small = small_job(job, work, 0.5, tmp_path)
        assert [(s.group.m, s.group.n, s.call.alphas) for s in small.plan.steps] == [(8, 8, (1.0, 1.0))]
        for model, piece in zip((job.base, *job.experts), (small.base, *small.experts), strict=True):
            assert torch.equal(piece.read("unit 0"), model.read(work.assignment.name, 0, 64).view(8, 8))
            assert piece.aliases == {}
        elementwise = next(w for w in gather(job) if w.method == "average")
        small = small_job(job, elementwise, 1.0, tmp_path)
        assert len(small.plan.steps) == GROUPS
        for model, piece in zip((job.base, *job.experts), (small.base, *small.experts), strict=True):
            assert torch.equal(
                piece.read("unit 0"), model.read(elementwise.assignment.name, 0, elementwise.n).view(1, -1)
            )
            piece.close()


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_noise_stands_in_for_updates_that_are_zero_or_not_finite(tmp_path: Path, value: float) -> None:
    with job_of(tmp_path, "iso_c"):
        pass
    state = tiny.load_output(tmp_path / "base" if value == 0 else tmp_path / "e1")
    tiny.save_model(
        tmp_path / "e1", {name: v * (1 + value) if v.is_floating_point() else v for name, v in state.items()}
    )
    with open_job(tmp_path / "recipe.yaml") as job:
        small = small_job(job, query_work(job), 1.0, tmp_path)
        base = small.base.read("unit 0").float()
        for expert in small.experts:
            assert 0 < float((expert.read("unit 0").float() - base).norm()) < 1


@pytest.mark.parametrize("method", METHODS)
def test_every_work_of_every_method_is_sampled(tmp_path: Path, scratch: IO[bytes], method: str) -> None:
    rules = [{"filter": "*.bias", "keep_base": True}]
    with job_of(tmp_path, method, rules=rules) as job:
        for work in gather(job):
            for share in (0.5, 1.0):
                found = sample(job, work, share, scratch)
                seconds = (found.engine, found.read, found.compute, found.write, found.spent)
                assert all(0 <= value < math.inf for value in seconds)
                assert found.spent > found.engine > 0
        assert os.fstat(scratch.fileno()).st_size == 0


@pytest.mark.parametrize("extension", [True, False])
def test_what_is_surveyed_is_surveyed_in_a_sample(
    tmp_path: Path, scratch: IO[bytes], extension: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deltas, "PIECE_ELEMENTS", 100)
    passes, real = [], surveys.Surveys._see

    def see(self: surveys.Surveys, step: Step, units: Sequence[Unit], surveyed: Mapping[str, Survey]) -> None:
        passes.append([unit.name for unit in units])
        real(self, step, units, surveyed)

    monkeypatch.setattr(surveys.Surveys, "_see", see)
    if not extension:
        monkeypatch.setattr(native, "availability", lambda: "not built")
    with job_of(tmp_path, "ties") as job:
        works = {work.step.group.units[0].whole: work for work in gather(job) if work.step is not None}
        sample(job, works[True], 1.0, scratch)
        assert passes == []
        sample(job, works[False], 1.0, scratch)
        seen = Counter(name for names in passes for name in names)
        assert len(seen) >= GROUPS
        assert set(seen.values()) == {3}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_dtypes(tmp_path: Path, scratch: IO[bytes], dtype: torch.dtype) -> None:
    with job_of(tmp_path, "iso_c", dtype) as job:
        assert all(sample(job, work, 0.5, scratch).engine > 0 for work in gather(job))


def test_transposed_matrices(tmp_path: Path) -> None:
    state = {
        "wte.weight": torch.randn(9, 8),
        "h.0.attn.c_attn.weight": torch.randn(8, 24),
        "h.0.attn.c_proj.weight": torch.randn(8, 8),
        "h.0.mlp.c_fc.weight": torch.randn(8, 32),
    }
    for seed, name in enumerate(("base", "e0", "e1", "e2")):
        tiny.save_model(tmp_path / name, tiny.tuned(state, seed))
    with open_job(tiny.write_recipe(tmp_path, tiny.recipe_for("tsvm"))) as job:
        work = next(w for w in gather(job) if w.m == 32)
        assert work.transposed
        small = small_job(job, work, 0.5, tmp_path)
        assert small.plan.assignments[0].shape == (4, 16)
        assert (small.plan.steps[0].group.m, small.plan.steps[0].group.n) == (16, 4)


def test_the_longest_work_that_is_affordable_is_sampled_next() -> None:
    def known(units: int, share: float, spent: float) -> _Known:
        work = Work(object(), None, 64, 64, units, 1)  # type: ignore[arg-type]  # no step: elements, not matrices
        return _Known(work, [took(share, 0.01, spent=spent)], True)

    whole, small, large = known(1000, 1.0, 0.0), known(10, 0.25, 0.01), known(20, 0.25, 0.01)
    costly = known(1000, 0.25, MOST)
    assert _next([whole, small, large, costly], 0.0) is large
    assert _next([whole, small, large, costly], MOST) is None
    assert _next([], 0.0) is None


def test_an_estimate_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    models = tmp_path / "models"
    models.mkdir()
    with job_of(models, "iso_cts") as job:
        before = tree(models)
        found = estimate(job, models, start=0.5)
        assert tree(models) == before
        assert list(temporary.iterdir()) == []
    assert set(found.methods) == {"iso_cts", "average", KEPT}
    assert all(seconds.engine > 0 for seconds in found.methods.values())
    assert found.share == 1  # matrices this small are sampled whole
    assert 0.5 < found.from_memory <= found.expected <= found.from_disk < math.inf
    assert found.fetch == job.plan.bytes_read / found.disks.read
    data = json.loads(json.dumps(found.as_data()))
    assert data["expected"] == found.expected
    assert data["merge"]["engine"] == pytest.approx(sum(s["engine"] for s in data["methods"].values()))


def test_nothing_to_merge(tmp_path: Path) -> None:
    with job_of(tmp_path, "iso_c", rules=[{"filter": "*", "keep_base": True}]) as job:
        found = estimate(job, tmp_path)
        assert list(found.methods) == [KEPT]


# The disks


def test_rates_are_positive_and_the_files_as_before(tmp_path: Path, scratch: IO[bytes]) -> None:
    files = [tmp_path / "one", tmp_path / "empty", tmp_path / "two"]
    for file, size in zip(files, (3 << 20, 0, 5), strict=True):
        file.write_bytes(bytes(size))
    before = tree(tmp_path)
    found = disks.measure(files, scratch)
    assert all(0 < rate < math.inf for rate in (found.read, found.write, found.checksum))
    assert found.cached in (None, 1.0)  # they were written just now
    assert tree(tmp_path) == before
    assert os.fstat(scratch.fileno()).st_size == 0


def test_files_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert disks.cached_share({tmp_path / "empty": 0}) is None
    assert disks.read_rate({}) > 0


@pytest.mark.skipif(not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"), reason="Linux alone tells")
def test_what_the_kernel_forgot_is_not_in_memory(tmp_path: Path) -> None:
    file, half = tmp_path / "half", 32 << 20
    file.write_bytes(bytes(2 * half))
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, half, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(opened.fileno(), [bytearray(1)], half // 2, os.RWF_NOWAIT)
            pytest.skip("this file system keeps its files in memory")
        except BlockingIOError:
            pass
        except OSError as error:
            pytest.skip(f"this file system does not tell: {error.strerror}")
    share = disks.cached_share({file: 2 * half})
    assert share is not None
    # Of 256 pages chosen at random half are there: 6 standard errors of 1 / 32.
    assert abs(share - 0.5) < 6 / 32


# The command


def test_plan_tells_the_time(tmp_path: Path, run: Run) -> None:
    tiny.bert_models(tmp_path)
    recipe = tiny.write_recipe(tmp_path, tiny.recipe_for("iso_c"))
    before = tree(tmp_path)
    shown = run("plan", recipe, tmp_path / "new" / "out").stdout
    for part in ("time: about ", "to start", "side by side", "time by method: keep ", "iso_c ", "from the disk, which"):
        assert part in shown
    data = json.loads(run("plan", recipe, "--json").stdout)["time"]
    assert 0 < data["from_memory"] <= data["from_disk"]
    assert set(data["methods"]) == {"keep", "average", "iso_c"}
    assert tree(tmp_path) == before


def test_plan_without_time_reads_no_tensor(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.bert_models(tmp_path)
    recipe = tiny.write_recipe(tmp_path, tiny.recipe_for("iso_c"))

    def read(self: Checkpoint, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        raise AssertionError(f"the plan read {name}")

    monkeypatch.setattr(Checkpoint, "read", read)
    done = run("plan", recipe, "--no-time")
    assert done.returncode == 0
    assert "time" not in done.stdout
    assert json.loads(run("plan", recipe, "--no-time", "--json").stdout)["time"] is None
