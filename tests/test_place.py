"""Computing elsewhere: what a merge asks of a device, on one that the CPU plays; budgets of memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
import torch
from command_line import Run
from test_esm_merge import esm_recipe, save
from torch import Tensor

from isomerge import schedule
from isomerge.errors import InputError
from isomerge.merge import merge, open_job
from isomerge.methods import METHODS
from isomerge.place import Place, open_place
from isomerge.schedule import process_bytes


class Elsewhere(Place):
    """A device that is the CPU. Uploads outside `reading` fail; what was computed there is poison for whoever did not
    take it, and downloads are poison until they are waited for.
    """

    def __init__(self) -> None:
        self.uploaded, self.taken, self.down_loaded = 0, 0, 0
        self._inside = threading.local()

    def memory(self) -> int:
        return 10**12

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._inside.yes = True
        try:
            yield
        finally:
            self._inside.yes = False

    def up(self, values: Tensor) -> Tensor:
        assert getattr(self._inside, "yes", False)
        self.uploaded += 1
        return values.clone()

    def mark(self) -> Callable[[Iterable[Tensor]], None]:
        assert self._inside.yes

        def take(tensors: Iterable[Tensor]) -> None:
            assert not getattr(self._inside, "yes", False)
            self.taken += len(list(tensors))

        return take

    def down(self, values: Tensor) -> Callable[[], Tensor]:
        host = torch.full_like(values, torch.nan if values.is_floating_point() else -1)

        def wait() -> Tensor:
            self.down_loaded += 1
            return host.copy_(values)

        return wait


def recipe(folder: Path, method: str) -> Path:
    save(folder)
    return tiny.write_recipe(folder, esm_recipe() if method == "esm" else tiny.recipe_for(method))


@pytest.mark.parametrize("method", ["iso_cts", "dare_ties", "esm"])
def test_everything_goes_up_and_comes_down_and_the_bytes_are_those_of_the_cpu(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, method)
    merge(path, tmp_path / "here")
    place = Elsewhere()
    monkeypatch.setattr(sys.modules["isomerge.merge"], "open_place", lambda name, where: place)
    report = merge(path, tmp_path / "there", device="cuda")
    here, there = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("here", "there"))
    assert here == there
    tensors = [r for r in report.tensors if r.method is not None]
    # Every tensor of four models; with moments those of three experts, and for layer factors updates and base again.
    spooled = sum(r.layer_factor is not None for r in tensors)
    moments = 3 * sum(r.method == "esm" for r in tensors)
    assert place.uploaded == 4 * len(tensors) + moments + 2 * spooled
    assert place.down_loaded == len(report.tensors) + spooled
    assert place.taken > 0


@pytest.mark.parametrize("method", ["iso_c", "ties", "esm"])
def test_groups_do_not_depend_on_the_memory_of_the_gpu(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, method)
    monkeypatch.setattr(sys.modules["isomerge.merge"], "open_place", lambda name, where: Elsewhere())
    with open_job(path, device="cuda") as job:
        steps, least = job.plan.steps, job.plan.gpu_bytes
        assert job.plan.peak_bytes < 500_000_000
    assert max(len(step.group.units) for step in steps) > 1
    for bounds in ({"max_gpu_memory": least}, {"group_bytes": 1}):
        with open_job(path, device="cuda", **bounds) as job:
            assert job.plan.steps == steps
    with (
        pytest.raises(InputError, match=r"MB of GPU memory is too little: \S+ by \w+ takes \d"),
        open_job(path, device="cuda", max_gpu_memory=least - 1),
    ):
        pass
    monkeypatch.setattr(schedule, "GPU_GROUP_BYTES", 1)
    with open_job(path, device="cuda", max_gpu_memory=least - 1) as job:
        assert all(len(step.group.units) == 1 for step in job.plan.steps)


def test_a_budget_that_one_matrix_passes_is_refused_with_the_least_that_suffices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(tmp_path, "iso_cts")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(sys.modules["isomerge.merge"], "open_place", lambda name, where: Elsewhere())
    with pytest.raises(
        InputError, match=r"^0\.0 MB of GPU memory is too little: \S+ by iso_cts takes 0\.7 MB, give at"
    ):
        merge(path, tmp_path / "out", device="cuda", max_gpu_memory=1000)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(
        InputError, match=r"^200\.0 MB of memory is too little: \S+ by iso_cts takes 415\.3 MB, give at"
    ):
        merge(path, tmp_path / "out", max_memory=200_000_000)
    assert not (tmp_path / "out").exists()
    merge(path, tmp_path / "out", max_memory=415_300_000)


def test_bytes_do_not_depend_on_the_memory(tmp_path: Path) -> None:
    path = recipe(tmp_path, "esm")
    least = process_bytes(torch.get_num_threads()) + 120_000  # of the process itself, and a few units of these models
    with open_job(path, max_memory=least) as tight, open_job(path) as roomy:
        assert len(tight.plan.steps) > len(roomy.plan.steps)
        assert tight.plan.peak_bytes <= least
    merge(path, tmp_path / "tight", max_memory=least)
    merge(path, tmp_path / "roomy")
    files = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("tight", "roomy")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpu", r"device: expected cpu, cuda or cuda:N, got 'gpu'"),
        ("meta", r"device: expected cpu, cuda or cuda:N, got 'meta'"),
        ("cuda:99", r"device: cuda:99: .*"),
    ],
)
def test_a_device_that_is_not_here_is_an_input_error(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=f"^{expected}"):
        open_place(name, "device")


def test_options_of_the_command(tmp_path: Path, run: Run) -> None:
    path = recipe(tmp_path, "iso_c")
    done = run("merge", path, tmp_path / "out", "--max-memory", "100MB")
    assert (done.returncode, done.stdout) == (2, "")
    assert "100.0 MB of memory is too little" in done.stderr
    done = run("plan", path, "--max-memory", "many")
    assert done.returncode == 2
    assert "--max-memory many: expected a size such as 5GB" in done.stderr
    if not torch.cuda.is_available():
        done = run("merge", path, tmp_path / "out", "--device", "cuda")
        assert done.returncode == 2
        assert "finds no CUDA device; use cpu" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run("merge", path, tmp_path / "out", "--max-memory", "1GB", "--quiet").returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["iso_c", "iso_cts", "tsvm", "esm", "ties"])
def test_a_gpu_gives_what_the_cpu_gives(tmp_path: Path, method: str) -> None:
    path = recipe(tmp_path, method)
    merge(path, tmp_path / "cpu")
    for number, memory in enumerate((None, 10**9)):
        report = merge(path, tmp_path / f"gpu{number}", device="cuda", max_gpu_memory=memory)
        assert report.totals.planned_gpu_bytes is not None
    cpu, gpu, again = (tiny.load_output(tmp_path / out) for out in ("cpu", "gpu0", "gpu1"))
    if METHODS[method].elementwise:
        tiny.assert_same(gpu, cpu)
    else:
        tiny.assert_near(gpu, cpu, tiny.load_output(tmp_path / "base"))
    tiny.assert_same(again, gpu)
