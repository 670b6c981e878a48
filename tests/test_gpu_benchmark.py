"""benchmarks/gpu.py on the CPU: a table comes out whatever happens in a case, and a wrong answer is called wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_measure
import gpu_ops
import pytest
import test_gpu
import torch
from gpu_measure import Candidate, Case, Clock, Problem, rows_of
from gpu_setting import Setting
from spectra import matrix

from isomerge.backends import BACKENDS, OPS, eager, refusal

CPU = torch.device("cpu")
SCRIPT = Path(gpu.__file__)


def case(**candidates: object) -> Case:
    """Candidates for the square of 3, the first of them the baseline."""
    run = {name: Candidate(function) for name, function in candidates.items()}  # type: ignore[arg-type]
    exact = torch.tensor([9.0], dtype=torch.float64)
    return Case("square", "1", lambda: Problem(run, next(iter(run)), lambda x: x, lambda: exact, 1e-4))


def nine(error: float = 0.0) -> object:
    return lambda: torch.tensor([9.0 * (1 + error)])


def failing() -> torch.Tensor:
    raise RuntimeError("out of\n memory | of all")


def test_the_script_writes_both_tables(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path), "--minutes", "1"]
    done = subprocess.run([*command, "--only", "ceilings,ops"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "gpu-cpu.json").read_text("utf-8"), parse_constant=pytest.fail)  # NaN is not JSON
    assert {"device", "torch", "commit", "processor"} <= set(data["machine"])
    assert list(data["sections"]) == ["ceilings", "ops"]
    rows = data["sections"]["ops"]["rows"]
    assert {row["case"] for row in rows} == set(BACKENDS["triton"].ops)
    built = {"native"} if refusal("finalize", "native", torch.device("cpu")) is None else set()
    assert {row["who"] for row in rows} == {"torch", "eager", "reference", *built}
    for row in rows:
        assert "failure" not in row, row
        assert row["least"] <= row["seconds"] <= row["most"]
        assert row["calls"] >= 1
        if row["who"] != "torch":
            assert not row["wrong"], row
            assert row["ratio"] > 0
    assert {row["roof"] for row in rows if "roof" in row} <= {"fp32", "fp64", "copy"}
    assert any(0 < row["share"] for row in rows if "share" in row)
    lines = (tmp_path / "gpu-cpu.md").read_text("utf-8").splitlines()
    assert lines[0] == "# cpu"
    assert [line for line in lines if line.startswith("## ")] == ["## ceilings", "## ops"]
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {len(gpu.COLUMNS) + 1}
    assert len(tables) == len(rows) + len(data["sections"]["ceilings"]["rows"]) + 2 * 2


def test_a_wrong_answer_is_recorded_as_wrong() -> None:
    given = case(torch=nine(), good=nine(9e-5), bad=nine(2e-4), nan=nine(float("nan")), shape=lambda: torch.ones(2, 2))
    rows = {row["who"]: row for row in rows_of(given, Clock(CPU), 0.0, {})}
    assert [who for who, row in rows.items() if row.get("wrong")] == ["bad", "nan", "shape"]
    assert "**wrong**" in gpu.cells(rows["nan"])[-1]  # type: ignore[operator]
    assert rows["nan"]["error"] is None
    assert rows["bad"]["error"] == pytest.approx(2e-4, rel=1e-2)
    assert rows["bad"]["allowed"] == 1e-4


def test_twice_the_error_of_the_baseline_is_allowed() -> None:
    rows = rows_of(case(torch=nine(1e-3), good=nine(1.9e-3), bad=nine(2.1e-3)), Clock(CPU), 0.0, {})
    assert [row.get("wrong") for row in rows] == [None, False, True]


def test_a_wrong_op_is_recorded_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    setting, delta_sum = Setting(CPU, quick=True), eager.delta_sum
    monkeypatch.setattr(
        eager, "delta_sum", lambda tuned, base: (delta_sum(tuned, base)[0], *delta_sum(tuned, 0 * base)[1:])
    )
    given = next(case for case in gpu_ops.op_cases(setting) if case.name == "delta_sum")
    wrong = {row["who"]: row.get("wrong") for row in rows_of(given, Clock(CPU), 0.0, {})}
    assert wrong == {"torch": None, "eager": True, "reference": False}


def test_what_raises_is_a_row_and_the_others_are_measured() -> None:
    rows = rows_of(case(torch=nine(), broken=failing, good=nine()), Clock(CPU), 0.0, {})
    assert [("seconds" in row, row.get("failure")) for row in rows] == [
        (True, None),
        (False, "RuntimeError: out of memory | of all"),
        (True, None),
    ]
    assert gpu.cells(rows[1])[-1] == "failed: RuntimeError: out of memory \\| of all"
    rows = rows_of(case(torch=failing, good=nine()), Clock(CPU), 0.0, {})
    assert rows[1]["wrong"] is False
    assert "ratio" not in rows[1]


def test_a_case_that_cannot_be_set_up_is_a_row() -> None:
    assert rows_of(Case("a", "b", failing), Clock(CPU), 0.0, {}) == [  # type: ignore[arg-type]
        {"case": "a", "shape": "b", "failure": "RuntimeError: out of memory | of all"}
    ]


def test_a_baseline_on_fewer_layers_counts_for_all() -> None:
    def sleep() -> torch.Tensor:
        time.sleep(0.01)
        return torch.ones(1)

    run = {"torch": Candidate(sleep, layers=0.5, once=True), "all": Candidate(sleep)}
    problem = Problem(run, "torch", lambda x: x, None, 1e-4, layers=2)
    first, second = rows_of(Case("a", "b", lambda: problem), Clock(CPU), 0.0, {})
    assert first["calls"] == 1
    assert first["seconds"] >= 0.04
    assert second["ratio"] == pytest.approx(first["seconds"] / second["seconds"])


def test_the_roof_is_what_binds() -> None:
    rates = {"copy": 10.0, "bf16": 100.0, "fp64": 1.0}
    assert gpu_measure.roof({"bf16": 200.0}, 10.0, rates) == (2.0, "bf16")
    assert gpu_measure.roof({"bf16": 200.0}, 30.0, rates) == (3.0, "copy")
    assert gpu_measure.roof({"bf16": 200.0, "fp64": 3.0}, 30.0, rates) == (5.0, "bf16+fp64")
    assert gpu_measure.roof({"tf32": 200.0}, 30.0, rates) == (0.0, "")  # not measured: no roof rather than a wrong one


def test_the_fastest_driver_that_is_accurate() -> None:
    def row(m: int, n: int, who: str, seconds: float, error: float) -> gpu_measure.Row:
        return {"m": m, "n": n, "who": who, "seconds": seconds, "error": error}

    rows = [row(64, 64, "gesvd", 3, 1e-6), row(64, 64, "gesvdj", 2, 9e-6), row(64, 64, "gesvda", 1, 2e-5)]
    rows += [row(512, 64, "gesvda", 1, 1e-6), {"m": 512, "n": 64, "who": "gesvd", "failure": "RuntimeError"}]
    driver = gpu.fastest_drivers(rows)
    assert driver(64, 64) == driver(80, 80) == "gesvdj"
    assert driver(512, 64) == "gesvda"
    assert gpu.fastest_drivers([])(64, 64) is None


def test_totals_are_of_whole_models_with_right_answers() -> None:
    common = {"case": "iso_c", "model": "two", "shapes": 2, "layers": 4}
    rows = [
        {**common, "who": who, "shape": shape, "seconds": seconds, "matrices": matrices}
        for who, scale in (("papers", 10.0), ("isomerge", 1.0))
        for shape, seconds, matrices in (("a", 4 * scale, 8), ("b", 8 * scale, 4))
    ]
    assert [(row["who"], row["seconds"], row.get("ratio")) for row in gpu.totals(rows)] == [
        ("papers", 160.0, None),
        ("isomerge", 16.0, 10.0),
    ]
    assert [row["who"] for row in gpu.totals([*rows[:3], {**rows[3], "wrong": True}])] == ["papers"]
    assert gpu.totals(rows[1:2]) == []


WORKER = """
import json, os, sys
with open(sys.argv[1]) as file:
    data = json.load(file)
section, end = data["sections"]["ops"], {end}
if section["next"] == 0 and end < 0:
    section["begun"] = {{"case": "polar", "shape": "2x2"}}
elif section["next"] == 0:
    section["next"] = 1
else:
    section["done"], end = True, 0
with open(sys.argv[1], "w") as file:
    json.dump(data, file)
os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)
"""


@pytest.mark.parametrize(
    ("end", "failures"),
    [
        (-signal.SIGALRM, ["ended its process: more than 90 s, or than was left"]),
        (-signal.SIGSEGV, ["ended its process: status -11"]),
        (gpu.LOST, []),  # after the row of the case that lost the device
    ],
)
def test_a_case_that_ends_its_process_is_a_row_and_work_goes_on(end: int, failures: list[str], tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "table.json")
    results.section("ops")
    results.save()
    command = [sys.executable, "-c", WORKER.format(end=int(end)), str(results.path)]
    gpu.supervise(results.path, command, ["ops"], time.time() + 60)
    section = gpu.Results(results.path).section("ops")
    assert [row["failure"] for row in section["rows"]] == failures
    assert (section["next"], section["lines"], section["done"]) == (1, [], True)
    assert results.path.with_suffix(".md").exists()


def test_a_worker_that_cannot_start_ends_its_section(tmp_path: Path) -> None:
    gpu.supervise(
        tmp_path / "table.json", [sys.executable, "-c", "import sys; sys.exit(7)"], ["svd", "ops"], time.time() + 60
    )
    results = gpu.Results(tmp_path / "table.json")
    assert [results.section(name)["lines"] for name in ("svd", "ops")] == [
        ["Its process ended with status 7, outside any case."]
    ] * 2


def test_time_that_is_up_is_said(tmp_path: Path) -> None:
    results = gpu.Results(tmp_path / "table.json")
    gpu.work(results, Setting(CPU, quick=True), ["ops"], time.time() - 1)
    section = gpu.Results(tmp_path / "table.json").section("ops")
    count = len(list(gpu_ops.op_cases(Setting(CPU, quick=True))))
    assert section["lines"] == [f"Out of time: {count} of {count} cases were not measured."]
    assert section["done"]


def test_a_command_that_takes_too_long_is_ended_and_its_output_kept() -> None:
    status, output = gpu.ran(["sh", "-c", "echo begun; sleep 60"], 1.0)
    assert (status, output) == (None, "begun\n")


@pytest.mark.parametrize(
    ("status", "output", "built", "tested"),
    [
        (0, "x\n== 3 passed in 1s ==\n", "isomerge._C was built", "3 passed in 1s"),
        (1, "FAILED tests/a.py::b\nnvcc not found\n", "not built: nvcc not found", "nvcc not found"),
        (None, "FAILED tests/a.py::b\n", "isomerge._C was not built in time", "stopped after 9 s"),
    ],
)
def test_what_building_and_testing_came_to_is_said(
    status: int | None, output: str, built: str, tested: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ran", lambda *command, **variables: (status, output))
    section = gpu.Results(Path("none")).section("build")
    gpu.build(section, 9.0)
    assert section["lines"][0].startswith(f"{built}, ")
    section = gpu.Results(Path("none")).section("tests")
    gpu.tests(section, 9.0)
    assert section["lines"] == [f"`pytest -m gpu`: {tested}", *["- FAILED tests/a.py::b"] * ("FAILED" in output)]
    assert section["output"] == output


def test_sizes_and_counts_of_the_models() -> None:
    models = {model.name: model for model in Setting(CPU).models}
    assert sum(m * n * count for (m, n), count in models["ViT-B/32"].counts.items()) == 12 * 12 * 768**2
    assert sum(m * n * count for (m, n), count in models["ViT-L/14"].counts.items()) == 24 * 12 * 1024**2
    per_block = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336
    assert sum(m * n * count for (m, n), count in models["Llama-3-8B"].counts.items()) == 32 * per_block


# ---- the helpers of tests/test_gpu.py, which themselves run on a GPU alone
@pytest.mark.parametrize("op", OPS)
def test_the_gpu_tests_accept_the_eager_backend_and_refuse_a_thousandth_more(op: str) -> None:
    for dtype in test_gpu.DTYPES:
        A = matrix("decay", 65, 37).to(dtype)
        answers = test_gpu.answers(op, A, "eager")
        test_gpu.check(op, A, answers)
    for i, answer in enumerate(answers):
        if answer.dtype == torch.bfloat16:
            continue  # of which a thousandth is below the rounding
        for factor in (1.001, float("nan")):
            with pytest.raises(AssertionError, match=f"answer {i}"):
                test_gpu.check(op, A, (*answers[:i], answer * factor, *answers[i + 1 :]))
