"""Which rows to label next: the arithmetic by hand, then files and commands on the tiny model."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathways.cli import main
from pathways.model import Model
from pathways.suggesting.candidates import Candidates, merge, objects
from pathways.suggesting.choice import groups, most_doubtful, unlike
from pathways.suggesting.doubt import answers, doubt, label_doubt, margin_doubt, sureness, word_doubt
from pathways.suggesting.known import digests, has_target, known_rows
from pathways.suggesting.scan import cells_of
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.spec import Input, Target, Task


def fitted(kind: str, classes: tuple[str, ...] = ("a", "b", "c"), *inputs: tuple[str, str]) -> FittedTask:
    columns = tuple(Input(name, form) for name, form in inputs)  # type: ignore[arg-type]
    return FittedTask(Task("t", "t.csv", Target(("y",), kind), inputs=columns), classes)  # type: ignore[arg-type]


def test_doubt_by_hand() -> None:
    # 1 - (0.7 - 0.2), 1 - (0.4 - 0.4), 1 - (1 - 0); where stands which class does not matter.
    rows = np.array([[0.1, 0.7, 0.2], [0.4, 0.2, 0.4], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(margin_doubt(rows), [0.5, 1.0, 0.0], atol=1e-12)
    # A coin is one bit, certainty none: (1 + 0) / 2. And 0.25: 0.25 * 2 + 0.75 * log2(4/3) = 0.811278.
    np.testing.assert_allclose(label_doubt(np.array([[0.5, 1.0], [0.25, 0.25]])), [0.5, 0.8112781], atol=1e-7)
    # Words with margins 0.8 and 0.2 are doubted 0.2 and 0.8: 0.5 for the row.
    words = [np.array([[0.9, 0.1], [0.6, 0.4]]), np.zeros((0, 2))]
    np.testing.assert_allclose(word_doubt(words), [0.5, 0.0], atol=1e-12)
    assert margin_doubt(np.ones((2, 1))).tolist() == [0.0, 0.0]
    assert doubt(fitted("regression", ()), rows) is None
    assert doubt(fitted("distribution"), rows) is None


def test_answers_and_how_sure_they_are() -> None:
    p = np.array([[0.1, 0.7, 0.2]])
    assert answers(fitted("classification"), p) == ["b"]
    assert sureness(fitted("classification"), p) == [0.7]
    # Labels: only b holds; the least certain of (not a 0.9, b 0.7, not c 0.8) is b.
    assert answers(fitted("multilabel"), p) == [["b"]]
    assert sureness(fitted("multilabel"), p) == [pytest.approx(0.7)]
    words = [np.array([[0.9, 0.1, 0.0], [0.2, 0.5, 0.3]]), np.zeros((0, 3))]
    assert answers(fitted("tagging"), words) == [["a", "b"], []]
    assert sureness(fitted("tagging"), words) == [0.5, None]
    assert answers(fitted("regression", ()), np.array([[2.5]])) == [2.5]
    assert answers(fitted("regression", ()), np.array([[2.5, 1.0]])) == [[2.5, 1.0]]
    assert sureness(fitted("regression", ()), np.array([[2.5]])) == [None]


LINE = np.array([[0.0], [0.2], [5.0], [5.3], [9.0]])


@pytest.mark.parametrize("seed", range(5))
def test_the_most_doubtful_of_each_group_by_hand(seed: int) -> None:
    # Three groups on a line: {0, 0.2}, {5, 5.3}, {9}. The most doubtful of each: 1 (0.8), 2 (0.9), 4 (0.1).
    doubt = np.array([0.7, 0.8, 0.9, 0.85, 0.1])
    assert most_doubtful(LINE, doubt, 3, seed).tolist() == [2, 1, 4]
    assert most_doubtful(LINE, doubt, 9, seed).tolist() == [2, 3, 1, 0, 4]
    # Doubt alone would name 2, 3, 1. Rows that coincide leave groups empty: the next in doubt of the full one stand in.
    assert most_doubtful(np.zeros((4, 1)), np.array([0.1, 0.3, 0.3, 0.2]), 3, seed).tolist() == [1, 2, 3]


def test_more_rows_than_groups_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathways.suggesting.choice.MOST_GROUPS", 2)
    # Groups {0, 0.2, 0.4} and {9, 9.1}, with doubts 0.9, 0.8, 0.7 and 0.2, 0.1: the first of each, the second of each.
    x, doubt = np.array([[0.0], [0.2], [0.4], [9.0], [9.1]]), np.array([0.9, 0.8, 0.7, 0.1, 0.2])
    assert most_doubtful(x, doubt, 3, 0).tolist() == [0, 1, 4]
    assert most_doubtful(x, doubt, 4, 0).tolist() == [0, 1, 4, 3]


@pytest.mark.parametrize("seed", range(4))
def test_every_row_ends_in_the_group_whose_mean_is_nearest(seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(40, 2))
    group = groups(x, 3, seed)
    mean = np.stack([x[group == g].mean(axis=0) for g in range(3)])
    distance = np.linalg.norm(x[:, None] - mean[None], axis=2)
    np.testing.assert_array_equal(np.argmin(distance, axis=1), group)


def test_unlike_rows_by_hand() -> None:
    # Known rows at 0 and 9, so rows 0 and 4 can never be drawn before the others. Row 2, 4 from 9, comes first in
    # 16 of 16 + 13.69 + 0.04 draws, 0.538 of them; 3 standard deviations of 400 draws are 0.075.
    first = [unlike(LINE, 1, np.array([[0.0], [9.0]]), seed) for seed in range(400)]
    assert abs(np.mean([place[0] == 2 for place, _ in first]) - 0.538) < 0.075
    assert {float(distance[0]) for place, distance in first if place[0] == 2} == {4.0}
    place, distance = unlike(LINE, 9, np.array([[0.0], [9.0]]), 0)
    assert place.tolist()[-2:] == [0, 4]
    assert distance[-2:].tolist() == [0.0, 0.0]
    place, distance = unlike(LINE, 2, None, 3)
    assert distance.tolist() == [np.inf, abs(LINE[place[0], 0] - LINE[place[1], 0])]


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=12),
    st.integers(1, 15),
    st.integers(0, 99),
)
def test_a_choice_names_no_row_twice_and_the_most_doubtful_first(rows: list[Any], n: int, seed: int) -> None:
    x, doubt = np.array([[float(a)] for a, _ in rows]), np.array([w for _, w in rows])
    for order in (most_doubtful(x, doubt, n, seed), unlike(x, n, None, seed)[0]):
        assert len(order) == len(set(order.tolist())) == min(n, len(rows))
    order = most_doubtful(x, doubt, n, seed)
    assert order[0] == int(np.argmax(doubt))
    assert (np.diff(doubt[order]) <= 0).all()
    np.testing.assert_array_equal(most_doubtful(x, doubt, n, seed), order)


def candidates(*rows: tuple[int, int, float]) -> Candidates:
    row, digest, key = (np.array(part) for part in zip(*rows, strict=True))
    none = objects([None] * len(rows))
    return Candidates(row, digest.astype(np.uint64), key, key, np.zeros((len(rows), 1), np.float32), none, none)


def test_candidates_are_the_most_doubted_and_no_row_twice() -> None:
    # (row, digest, key): row 2 is row 0 again; of the rest the three largest, and of the two with 0.5 the earlier.
    old = merge(Candidates.none(1), candidates((0, 7, 0.9), (1, 8, 0.5)), 3)
    new = merge(old, candidates((2, 7, 0.9), (3, 9, 0.5), (4, 10, 0.6)), 3)
    assert new.row.tolist() == [0, 1, 4]


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), max_size=30), st.integers(1, 8), st.integers(1, 7))
def test_candidates_do_not_depend_on_the_batches(rows: list[Any], most: int, size: int) -> None:
    # Rows with equal inputs get equal doubts from a model, whichever batch they come in.
    keys = dict(rows)
    whole = [(i, digest, keys[digest]) for i, (digest, _) in enumerate(rows)]
    found = Candidates.none(1)
    for begin in range(0, len(whole), size):
        found = merge(found, candidates(*whole[begin : begin + size]), most)
        assert len(found) <= most
    first = {digest: i for i, digest, _ in reversed(whole)}
    best = sorted(first.items(), key=lambda item: (-keys[item[0]], item[1]))[:most]
    assert found.row.tolist() == sorted(i for _, i in best)


def test_rows_are_the_same_however_they_are_spelled() -> None:
    task = fitted("classification", ("a", "b"), ("x", "number"), ("z", "category"), ("s", "text"))
    one = pa.RecordBatch.from_pydict({"x": ["1.0", "", "1"], "z": ["u", "NA", "v"], "s": ["hi ", "a", "hi"]})
    two = pa.RecordBatch.from_pydict({"s": ["hi", "a", "hi"], "x": [1, None, 1], "z": ["u", None, "u"]})
    assert (digests(task, one) == digests(task, two)).tolist() == [True, True, False]


def test_what_counts_as_filled_in() -> None:
    batch = pa.RecordBatch.from_pydict({"y": ["a", "", None, " NA "], "l": [["u"], [], None, None]})
    assert has_target(batch, ["y"]).tolist() == [True, False, False, False]
    assert has_target(batch, ["l"]).tolist() == [True, True, False, False]
    assert has_target(batch, ["y", "l"]).tolist() == [True, True, False, False]
    assert has_target(batch, []).tolist() == [False] * 4


def test_the_rows_of_a_pool_are_fetched_in_the_order_wanted(tmp_path: Path) -> None:
    task = fitted("classification", ("a", "b"), ("i", "image"))
    names = [f"{i}.png" if i else None for i in range(5)]
    table = pa.table({"n": range(5), "i": pa.array(names, pa.string())})
    batches = table.replace_schema_metadata({b"folder": str(tmp_path).encode()}).to_batches(max_chunksize=2)
    found = cells_of(task, iter(batches), np.array([4, 0, 3]), ["n", "i"])
    assert found.to_pydict() == {"n": [4, 0, 3], "i": [str(tmp_path / "4.png"), None, str(tmp_path / "3.png")]}


def test_files_that_are_gone_are_told(tmp_path: Path) -> None:
    task = Task("t", str(tmp_path / "gone.csv"), Target(("y",), "classification"), inputs=(Input("x", "number"),))
    known = known_rows(FittedTask(task, ("a", "b")))
    assert len(known.digests) == 0
    assert known.unread is not None
    assert "gone.csv" in known.unread


WINE = "alcohol,acid,hue,style"


def wine_pool(folder: Path, rows: int = 40, seed: int = 5) -> Path:
    rng = np.random.default_rng(seed)
    lines = [f"{i}," + ",".join(f"{v:.3f}" for v in 2 * rng.normal(size=3)) + ",dry" for i in range(rows)]
    path = folder / "pool.csv"
    path.write_text("\n".join([f"id,{WINE}", *lines]) + "\n")
    return path


def test_a_pool_without_target_is_ranked_by_doubt_and_difference(tiny_model: Model, tmp_path: Path) -> None:
    pool = wine_pool(tmp_path)
    found = tiny_model.suggest("wine", pool, 5, keep=["id"])
    assert found.table.column_names == ["row", "score", "prediction", "probability"]
    assert found.cells.column_names == ["id", *WINE.split(",")]
    rows = found.table.column("row").to_pylist()
    assert [str(row - 1) for row in rows] == found.cells.column("id").to_pylist()
    said = tiny_model.predict("wine", list(csv.DictReader(io.StringIO(pool.read_text()))))
    p = np.stack([said.column(name) for name in said.column_names if name.startswith("p_")], axis=1)
    expected = margin_doubt(p)
    np.testing.assert_allclose(found.table.column("score"), expected[np.array(rows) - 1], rtol=1e-5)
    assert rows[0] == int(np.argmax(expected)) + 1
    assert found.table.column("prediction").to_pylist() == [said.column("prediction")[row - 1].as_py() for row in rows]
    assert tiny_model.suggest("wine", pool, 5, keep=["id"]).table == found.table
    assert tiny_model.suggest("wine", list(csv.DictReader(io.StringIO(pool.read_text()))), 5).table == found.table


@pytest.mark.parametrize("task", ["mood", "words", "price"])
def test_every_kind_of_task_has_suggestions(tiny_model: Model, tmp_path: Path, task: str) -> None:
    data = Path(tiny_model.path).parent / "data"
    suffix = "csv" if task == "price" else "jsonl"
    pool = tmp_path / f"pool.{suffix}"
    text = (data / f"{task}-test.{suffix}").read_text()
    changed = text.replace("room", "garden").replace("walk", "pond").replace(".", ".3")
    pool.write_text(changed)
    found = tiny_model.suggest(task, pool, 4)
    assert 0 < len(found.table) <= 4
    assert np.isfinite(found.table.column("score").to_numpy()).all()
    assert any("cannot doubt" in note for note in found.notes) == (task == "price")
    if task == "price":
        assert found.table.column("probability").null_count == len(found.table)
        assert tiny_model.suggest(task, pool, 4).table == found.table


def test_rows_with_a_label_are_passed_over(tiny_model: Model, tmp_path: Path) -> None:
    data = Path(tiny_model.path).parent / "data"
    known = (data / "wine-train.csv").read_text().splitlines()[1:4]
    fresh = ["0.1,0.2,0.3,dry,", "0.1,0.20,0.3,dry,", "9.0,-3.0,1.0,sweet,", "1.5,-3.0,1.0,sweet,barolo"]
    blank = [",".join([*line.split(",")[:4], ""]) for line in known]
    pool = tmp_path / "pool.csv"
    pool.write_text("\n".join([f"{WINE},cultivar", *blank, *fresh]) + "\n")
    found = tiny_model.suggest("wine", pool, 10)
    # Rows 1 to 3 are training rows, 5 is 4 again, 7 is filled in.
    assert sorted(found.table.column("row").to_pylist()) == [4, 6]
    assert found.tally.labelled == 4
    assert "no more than 2 different rows are left to label" in found.notes
    pool.write_text("\n".join([f"{WINE},cultivar", *(line + "barolo" for line in fresh[:3])]) + "\n")
    # Filled in throughout, a target says nothing of what is left to do, and is ignored.
    assert sorted(tiny_model.suggest("wine", pool, 10).table.column("row").to_pylist()) == [1, 3]
    pool.write_text("\n".join([f"{WINE},cultivar", *known]) + "\n")
    with pytest.raises(UserError, match="No row of the pool is left"):
        tiny_model.suggest("wine", pool, 10)


def test_the_command_prints_and_writes_a_sheet_to_fill_in(
    tiny_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pool, out = wine_pool(tmp_path), tmp_path / "todo.csv"
    words = ["suggest", tiny_model.path, "wine", "--pool", str(pool), "-n", "3", "--keep", "id"]
    assert main([*words, "--format", "csv", "-o", str(out)]) == 0
    printed, told = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert list(rows[0]) == ["row", "score", "prediction", "probability", "id"]
    sheet = list(csv.DictReader(io.StringIO(out.read_text())))
    assert list(sheet[0]) == ["id", *WINE.split(","), "cultivar"]
    assert [row["id"] for row in sheet] == [row["id"] for row in rows]
    assert {row["cultivar"] for row in sheet} == {""}
    assert "fill in cultivar" in told
    assert main([*words, "--format", "json"]) == 0
    assert [row["row"] for row in json.loads(capsys.readouterr().out)] == [int(row["row"]) for row in rows]
    assert main(words) == 0
    assert "3 of 40 rows to label next" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["wine", "-n", "0"], "at least 1"),
        (["wine", "--keep", "idd"], "did you mean 'id'"),
        (["whine"], "did you mean 'wine'"),
        (["price"], "there is no column 'area'"),
        (["wine", "-o", "todo.xlsx"], "The ending tells no format"),
        (["wine", "-o", "pool.csv"], "it may hold labels"),
        (["wine", "-o", "nowhere/todo.csv"], "a folder nowhere"),
        (["wine", "--at", "nobody"], "No version has this name"),
        (["wine", "--poool", "x"], "did you mean --pool"),
    ],
)
def test_mistakes_are_told(
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    before = wine_pool(tmp_path).read_text()
    monkeypatch.chdir(tmp_path)
    assert main(["suggest", tiny_model.path, "--pool", "pool.csv", *words]) == 2
    assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pool.csv"]
    assert (tmp_path / "pool.csv").read_text() == before
