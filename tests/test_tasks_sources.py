"""From a file to learned facts: registry, splits, inference, fitting, target encoding, config."""

from __future__ import annotations

import json
import math
import time
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close

from tasks.check import check_name, check_task
from tasks.config import task_from_flags, tasks_from_toml
from tasks.errors import UserError
from tasks.fitted import FittedTask, Moments, fit, fit_all
from tasks.infer import infer
from tasks.registry import Registry, distinct_values, expand
from tasks.spec import Input, Split, Target, Task
from tasks.splits import ROW, SPLITS, assign, rows, rows_by_split
from tasks.target import decode_outputs, encode_target, unseen_warning
from tasks.values import natural_order, parse_number, target_numbers, text_column


def csv_task(tmp_path: Path, text: str, target: str | tuple[str, ...], name: str = "a.csv", **keys) -> Task:
    path = tmp_path / name
    path.write_text(text)
    keys.setdefault("split", Split(valid=0.0, test=0.0))
    kind = keys.pop("kind", None)
    return Task("t", str(path), Target((target,) if isinstance(target, str) else target, kind), **keys)


def jsonl(tmp_path: Path, name: str, objects: list[dict]) -> str:
    (tmp_path / name).write_text("".join(json.dumps(o) + "\n" for o in objects))
    return str(tmp_path / name)


def encode_all(fitted: FittedTask, split="train"):
    (batch,) = rows(fitted.task, split)
    return encode_target(fitted, batch)


def refusal(call, *arguments, **keys) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments, **keys)
    return str(caught.value)


# Registry


def test_registry_knows_names_and_suggests():
    registry = Registry("task", [("income", 1), ("irony", 2)])
    assert registry.get("income") == 1
    assert "irony" in registry
    assert registry.names() == ("income", "irony")
    assert "did you mean 'income'" in refusal(registry.get, "incone")
    assert "already a task 'irony'" in refusal(registry.register, "irony", 3)
    assert list(registry) == [1, 2]


def test_ten_thousand_tasks_register_in_well_under_a_second():
    task = Task("base", "a.csv", Target(("y",)), each="school")
    start = time.perf_counter()
    registry = Registry("task", ((t.name, t) for t in expand(task, (f"school {i}" for i in range(10_000)))))
    assert time.perf_counter() - start < 1.0
    assert len(registry) == 10_000
    assert registry.get("base/school_77").where == ("school", "school 77")


@pytest.mark.parametrize("name", ["", "a b", "/a", "a/", "a//b", "..", "a/../b", "a\n", "a:b"])
def test_names_that_are_not_valid(name):
    assert "not a valid name" in refusal(check_name, name)


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "school/school-1", "été"])
def test_names_that_are_valid(name):
    assert check_name(name) == name


def test_expand_keeps_values_apart_whose_names_collide():
    task = Task("base", "a.csv", Target(("y",)), each="c")
    assert [(t.name, t.where) for t in expand(task, ["a b", "a_b"])] == [
        ("base/a_b", ("c", "a b")),
        ("base/a_b-2", ("c", "a_b")),
    ]
    assert "each" in refusal(expand, replace(task, each=None), ["x"])


def test_distinct_values_stream_in_natural_order(tmp_path):
    task = csv_task(tmp_path, "c,y\n10,1\n9,1\n,1\n10,0\n", "y", each="c")
    assert distinct_values(task, "c") == ["9", "10"]
    assert "more than 1 values" in refusal(distinct_values, task, "c", limit=1)


# Splits


@pytest.mark.parametrize("rows_per_batch", [1, 7, 4096])
def test_splits_cut_from_one_file_share_it_out_whatever_the_batch_size(tmp_path, rows_per_batch):
    task = csv_task(tmp_path, "y\n" + "".join(f"{i}\n" for i in range(1000)), "y", split=Split(0.1, 0.2, seed=3))
    found = {
        s: [r for b in rows(task, s, rows_per_batch=rows_per_batch) for r in b.column(ROW).to_pylist()] for s in SPLITS
    }
    assert sorted(found["train"] + found["valid"] + found["test"]) == list(range(1000))
    place = assign(np.arange(1000), task.split)
    assert found["test"] == np.flatnonzero(place < 0.2).tolist()
    # Binomial: 200 +- 12.6 and 100 +- 9.5 rows; four deviations.
    assert 150 <= len(found["test"]) <= 250
    assert 62 <= len(found["valid"]) <= 138


def test_rows_by_split_gives_what_rows_gives_in_one_pass(tmp_path):
    task = csv_task(tmp_path, "c,y\n" + "".join(f"{'ab'[i % 2]},{i}\n" for i in range(200)), "y", split=Split(0.2, 0.3))
    (tmp_path / "v.csv").write_text("c,y\na,7\nb,8\n")
    for one in (task, replace(task, where=("c", "b"), max_rows=90), replace(task, valid=str(tmp_path / "v.csv"))):
        together = {split: [] for split in SPLITS}
        for split, batch in rows_by_split(one, columns=["y"], rows_per_batch=33):
            together[split] += batch.to_pylist()
        assert together == {s: [r for b in rows(one, s, columns=["y"]) for r in b.to_pylist()] for s in SPLITS}


def test_assignment_is_uniform_and_differs_by_seed():
    place = assign(np.arange(100_000), Split(seed=0))
    counts = np.histogram(place, bins=20, range=(0, 1))[0]
    # 5,000 a bin with a deviation of 69; five deviations.
    assert np.abs(counts - 5000).max() < 345
    other = assign(np.arange(100_000), Split(seed=1))
    assert abs(np.corrcoef(place, other)[0, 1]) < 0.02
    np.testing.assert_array_equal(place, assign(np.arange(100_000), Split(seed=0)))


def test_a_split_with_its_own_file_is_not_cut(tmp_path):
    task = csv_task(tmp_path, "y\n" + "".join(f"{i}\n" for i in range(100)), "y", split=Split(0.3, 0.3))
    (tmp_path / "v.csv").write_text("y\n1\n2\n")
    task = replace(task, valid=str(tmp_path / "v.csv"))
    sizes = {s: sum(b.num_rows for b in rows(task, s)) for s in SPLITS}
    assert sizes["valid"] == 2
    assert sizes["train"] + sizes["test"] == 100


def test_where_and_max_rows(tmp_path):
    task = csv_task(tmp_path, "c,y\n" + "".join(f"{'ab'[i % 2]},{i}\n" for i in range(20)), "y", max_rows=10)
    task = replace(task, where=("c", "b"))
    (batch,) = rows(task, "train", columns=["y"])
    assert batch.to_pydict() == {"y": ["1", "3", "5", "7", "9"], ROW: [1, 3, 5, 7, 9]}


def test_where_matches_numbers_by_their_text(tmp_path):
    path = jsonl(tmp_path, "a.jsonl", [{"c": 1, "y": 5}, {"c": 2.5, "y": 6}, {"c": None, "y": 7}])
    task = Task("t", path, Target(("y",)), split=Split(0, 0), where=("c", "1"))
    assert [b.column("y").to_pylist() for b in rows(task, "train")] == [[5]]


# Values


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_parse_number_reads_back_any_float(value):
    assert parse_number(repr(value)) == value


@pytest.mark.parametrize(
    "text", ["", " ", "?", "NA", "nan", "inf", "-Infinity", "1_000", "1,5", "0x1f", "1e999", "abc", None]
)
def test_what_is_not_a_number(text):
    assert parse_number(text) is None


def test_columns_as_numbers_tell_missing_from_bad():
    read = target_numbers(pa.array(["1.5", " 2 ", "?", None, "nan", "-inf", "abc", "+3", ".5"]))
    np.testing.assert_array_equal(read.value, [1.5, 2, *[math.nan] * 5, 3, 0.5])
    np.testing.assert_array_equal(np.flatnonzero(read.missing), [2, 3])
    np.testing.assert_array_equal(np.flatnonzero(read.bad), [4, 5, 6])
    read = target_numbers(pa.array([1.0, math.nan, None, math.inf]))
    np.testing.assert_array_equal(np.flatnonzero(read.missing), [2])
    np.testing.assert_array_equal(np.flatnonzero(read.bad), [1, 3])


def test_text_of_numbers_is_the_label_one_expects():
    assert text_column(pa.array([1.0, 2.5, math.nan, None])).to_pylist() == ["1", "2.5", None, None]
    assert text_column(pa.array([True, None])).to_pylist() == ["true", None]
    assert natural_order(["10", "9", "1"]) == ["1", "9", "10"]
    assert natural_order(["10", "9", "x"]) == ["10", "9", "x"]


# Inference


def kinds(task: Task) -> tuple[dict[str, str | None], str | None, list[str]]:
    closed, lines = infer(task)
    return {column.column: column.kind for column in closed.inputs}, closed.target.kind, lines


def test_infer_inputs_of_a_mixed_table(tmp_path):
    lines = ["user_id,age,job,bio,photo,clip,same,void,y"]
    for i in range(40):
        age = "?" if i == 3 else i * 1.5
        lines.append(f"u{i},{age},{'abc'[i % 3]},likes thing number {i} very much,p/{i}.PNG,c/{i}.wav,k,,{i % 2}")
    found, target, told = kinds(csv_task(tmp_path, "\n".join(lines) + "\n", "y"))
    assert found == {"age": "number", "job": "category", "bio": "text", "photo": "image", "clip": "audio"}
    assert target == "classification"
    text = "\n".join(told)
    assert "job category (3 values)" in text
    for reason in ("user_id (an identifier", "same ('k' in each", "void (no value"):
        assert reason in text


def test_infer_keeps_what_was_said(tmp_path):
    task = csv_task(
        tmp_path, "a,b,y\n1,2,0\n3,4,1\n", "y", inputs=(Input("b"), Input("a", "category")), kind="regression"
    )
    closed, _ = infer(replace(task, metrics=("mae",)))
    assert closed.inputs == (Input("b", "number"), Input("a", "category"))
    assert (closed.target.kind, closed.loss, closed.metrics) == ("regression", "squared_error", ("mae",))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", "b", "a"], "classification"),
        (["0", "1", "0"], "classification"),
        ([str(i % 20) for i in range(60)], "classification"),
        ([str(i % 21) for i in range(60)], "regression"),
        (["0.5", "1", "2"], "regression"),
        (["1", "2", "x"], "classification"),
    ],
)
def test_infer_one_target_column(tmp_path, values, kind):
    text = "x,y\n" + "".join(f"{i},{value}\n" for i, value in enumerate(values))
    assert kinds(csv_task(tmp_path, text, "y"))[1] == kind


def test_one_odd_value_far_down_decides_between_classes_and_numbers(tmp_path):
    text = "x,y\n" + "".join(f"{i},{i}\n" for i in range(5000))
    assert kinds(csv_task(tmp_path, text, "y"))[1] == "regression"
    assert kinds(csv_task(tmp_path, text + "5000,many\n", "y"))[1] == "classification"


def test_infer_says_how_many_rows_have_no_label(tmp_path):
    _, _, told = kinds(csv_task(tmp_path, "x,y\n1,a\n2,b\n3,NA\n4,\n", "y"))
    assert "2 classes: a, b (2 rows have none and are left out)" in told[-1]


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["0,1", "1,1", ",0"], "multilabel"),
        (["0.25,0.75", "1,0"], "distribution"),
        (["0.25,1.75", "1,"], "regression"),
    ],
)
def test_infer_several_target_columns(tmp_path, cells, kind):
    text = "x,p,q\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))
    assert kinds(csv_task(tmp_path, text, ("p", "q")))[1] == kind


def test_infer_tagging_and_lists_of_labels(tmp_path):
    rows_ = [{"tokens": ["a", "b"], "tags": ["X", "Y"], "intent": "p"}, {"tokens": ["c"], "tags": ["X"], "intent": "q"}]
    path = jsonl(tmp_path, "a.jsonl", rows_)
    task = Task("t", path, Target(("tags",)), split=Split(0, 0))
    assert kinds(task)[:2] == ({"tokens": "text"}, "tagging")
    assert kinds(replace(task, target=Target(("intent",))))[:2] == ({"tokens": "text"}, "classification")
    path = jsonl(tmp_path, "b.jsonl", [{"text": "one two", "labels": ["X", "Y"]}, {"text": "three", "labels": ["X"]}])
    assert kinds(replace(task, train=path, target=Target(("labels",))))[1] == "multilabel"


def test_missing_column_suggests_and_lists(tmp_path):
    told = refusal(infer, csv_task(tmp_path, "age,income\n1,2\n", "incom"))
    assert "did you mean 'income'" in told
    assert "age, income" in told


def test_nothing_left_to_be_an_input(tmp_path):
    assert "no column is left" in refusal(infer, csv_task(tmp_path, "x,y\n1,a\n1,b\n", "y"))


def test_all_targets_missing(tmp_path):
    task = csv_task(tmp_path, "x,y\n1,\n2,?\n", "y")
    assert "no value in any training row" in refusal(infer, task)
    closed = replace(task, inputs=(Input("x", "number"),), target=Target(("y",), "classification"))
    assert "missing in every training row" in refusal(fit, closed)
    assert "missing in every training row" in refusal(fit, replace(closed, target=Target(("y",), "regression")))


def test_where_that_matches_nothing(tmp_path):
    assert "no training rows in which x is '7'" in refusal(
        infer, csv_task(tmp_path, "x,y\n1,a\n", "y", where=("x", "7"))
    )


# Fitting


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=20), min_size=1, max_size=6))
def test_moments_of_a_stream_equal_those_of_the_whole(batches):
    moments = Moments()
    for batch in batches:
        moments.update(np.array([*batch, math.nan, math.inf]))
    whole = np.array([value for batch in batches for value in batch])
    assert moments.count == len(whole)
    if len(whole):
        assert_close(moments.mean, whole.mean(), dtype="float64", scale=1e6)
        assert_close(moments.std if moments.varies else 0.0, whole.std(), dtype="float64", scale=1e6)


def test_fit_learns_from_the_training_split_alone(tmp_path):
    task = csv_task(tmp_path, "x,y,g\n1,10,p\n3,9,q\n,10,\ninf,10,p\n", "y", group="g", kind="classification")
    (tmp_path / "v.csv").write_text("x,y,g\n1000,11,r\n")
    fitted = fit(replace(task, valid=str(tmp_path / "v.csv")))
    assert (fitted.classes, fitted.class_counts, fitted.known_counts) == (("9", "10"), (1, 3), (4, 4))
    # x over its finite values 1 and 3: mean 2, deviation sqrt(((1-2)^2 + (3-2)^2) / 2) = 1.
    assert (fitted.number_mean, fitted.number_std) == ({"x": 2.0}, {"x": 1.0})
    assert (fitted.train_rows, fitted.valid_rows, fitted.test_rows, fitted.groups) == (4, 1, 0, ("p", "q"))
    assert FittedTask.from_json(json.loads(json.dumps(fitted.to_json()))) == fitted
    encoded = encode_all(fitted, "valid")
    assert (encoded.keep.tolist(), encoded.unseen) == ([False], Counter({"11": 1}))
    assert "1 rows of valid" in str(unseen_warning(fitted, "valid", encoded.unseen))


def test_one_class_only(tmp_path):
    told = refusal(fit, csv_task(tmp_path, "x,y\n1,a\n2,a\n3,\n", "y"))
    assert "one class only" in told
    assert "'a' in all of 2" in told


def test_one_target_value_only(tmp_path):
    told = refusal(fit, csv_task(tmp_path, "x,y\n1,0.1\n2,0.1\n3,0.1\n", "y", kind="regression"))
    assert "one value only" in told
    assert "every known label is the same" in refusal(
        fit, csv_task(tmp_path, "x,p,q\n1,0,0\n2,0,\n", ("p", "q"), kind="multilabel")
    )


def test_tasks_of_one_file_fit_in_one_pass_as_they_do_alone(tmp_path):
    text = "c,x,y\n" + "".join(f"{'pqr'[i % 3]},{i * i % 17},{i * 0.5}\n" for i in range(300))
    base = csv_task(tmp_path, text, "y", each="c", split=Split(0.2, 0.2))
    closed, _ = infer(base)
    tasks = expand(closed, distinct_values(closed, "c"))
    together = fit_all(tasks)
    assert [f.task.name for f in together] == ["t/p", "t/q", "t/r"]
    for one, alone in zip(together, map(fit, tasks), strict=True):
        assert one.task == alone.task
        assert (one.train_rows, one.valid_rows, one.test_rows) == (alone.train_rows, alone.valid_rows, alone.test_rows)
        assert_close(one.target_mean, alone.target_mean, dtype="float64", scale=100)
        assert_close(one.target_std, alone.target_std, dtype="float64", scale=100)
    assert "expand it first" in refusal(fit, base)


# Targets


def test_encode_classes(tmp_path):
    encoded = encode_all(fit(csv_task(tmp_path, "x,y\n1,b\n2,a\n3,?\n", "y")))
    np.testing.assert_array_equal(encoded.y, [[0, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(encoded.y_mask, [[1, 1], [1, 1], [0, 0]])
    assert (encoded.keep.tolist(), encoded.missing, encoded.bad) == ([True, True, False], 1, 0)


def test_encode_several_labels_with_blanks(tmp_path):
    encoded = encode_all(fit(csv_task(tmp_path, "x,p,q\n1,0,1\n2,true,\n3,,\n", ("p", "q"), kind="multilabel")))
    np.testing.assert_array_equal(encoded.y, [[0, 1], [1, 0], [0, 0]])
    np.testing.assert_array_equal(encoded.y_mask, [[1, 1], [1, 0], [0, 0]])
    assert encoded.keep.tolist() == [True, True, False]
    told = refusal(fit, csv_task(tmp_path, "x,p,q\n1,0,1\n2,2,\n", ("p", "q"), kind="multilabel"))
    assert "data row 2, column p" in told


def test_encode_lists_of_labels(tmp_path):
    train = jsonl(tmp_path, "a.jsonl", [{"t": "a b", "l": ["X", "Y"]}, {"t": "c", "l": []}, {"t": "d", "l": None}])
    valid = jsonl(tmp_path, "v.jsonl", [{"t": "a", "l": ["Z", "Y"]}])
    fitted = fit(Task("t", train, Target(("l",), "multilabel"), valid=valid, split=Split(0, 0)))
    encoded = encode_all(fitted)
    np.testing.assert_array_equal(encoded.y, [[1, 1], [0, 0], [0, 0]])
    np.testing.assert_array_equal(encoded.y_mask, [[1, 1], [1, 1], [0, 0]])
    encoded = encode_all(fitted, "valid")
    np.testing.assert_array_equal(encoded.y, [[0, 1]])
    assert (encoded.keep.tolist(), encoded.unseen) == ([True], Counter({"Z": 1}))


def test_encode_regression_and_back(tmp_path):
    fitted = fit(csv_task(tmp_path, "x,u,v\n1,0,10\n2,4,\n3,,30\n4,,\n", ("u", "v"), kind="regression"))
    # u: 0 and 4, mean 2, deviation 2; v: 10 and 30, mean 20, deviation 10.
    encoded = encode_all(fitted)
    np.testing.assert_array_equal(encoded.y, [[-1, -1], [1, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(encoded.y_mask, [[1, 1], [1, 0], [0, 1], [0, 0]])
    assert (encoded.keep.tolist(), encoded.missing) == ([True, True, True, False], 1)
    np.testing.assert_array_equal(decode_outputs(fitted, np.array([[-1.0, 1.0]])), [[0.0, 30.0]])


@pytest.mark.parametrize("bad", ["nan", "inf", "-Infinity", "1e999"])
def test_not_finite_regression_target_is_named_or_skipped(tmp_path, bad):
    task = csv_task(tmp_path, f"x,y\n1,0.5\n2,{bad}\n3,1.5\n", "y", kind="regression")
    told = refusal(fit, task)
    assert "data row 2, column y" in told
    assert repr(bad) in told
    fitted = fit(replace(task, on_bad="skip"))
    assert (fitted.target_mean, fitted.dropped_rows) == ((1.0,), 1)
    encoded = encode_all(fitted)
    assert (encoded.keep.tolist(), encoded.bad, encoded.missing) == ([True, False, True], 1, 0)


def test_encode_distribution_normalises_counts(tmp_path):
    task = csv_task(tmp_path, "x,p,q\n1,3,1\n2,0,7\n3,,1\n", ("p", "q"), kind="distribution")
    encoded = encode_all(fit(task))
    np.testing.assert_array_equal(encoded.y, [[0.75, 0.25], [0, 1], [0, 0]])
    assert encoded.keep.tolist() == [True, True, False]
    for cell in ("-1,2", "0,0"):
        text = f"x,p,q\n1,3,1\n2,{cell}\n"
        assert "data row 2" in refusal(fit, csv_task(tmp_path, text, ("p", "q"), kind="distribution"))


def test_encode_tags(tmp_path):
    train = jsonl(
        tmp_path, "a.jsonl", [{"w": ["a", "b"], "t": ["Y", "X"]}, {"w": [], "t": []}, {"w": ["c"], "t": ["None"]}]
    )
    valid = jsonl(tmp_path, "v.jsonl", [{"w": ["a", "b"], "t": ["Z", "Y"]}])
    fitted = fit(Task("t", train, Target(("t",), "tagging"), (Input("w", "text"),), valid=valid, split=Split(0, 0)))
    assert (fitted.classes, fitted.is_token_level, fitted.num_outputs) == (("None", "X", "Y"), True, 3)
    encoded = encode_all(fitted)
    assert [tags.tolist() for tags in encoded.tags or ()] == [[2, 1], [], [0]]
    assert encoded.keep.tolist() == [True, False, True]
    encoded = encode_all(fitted, "valid")
    assert [tags.tolist() for tags in encoded.tags or ()] == [[-1, 2]]
    assert encoded.unseen == Counter({"Z": 1})


def test_words_and_tags_that_differ_in_number(tmp_path):
    path = jsonl(tmp_path, "a.jsonl", [{"w": ["a"], "t": ["Y"]}, {"w": ["a", "b"], "t": ["X"]}])
    task = Task("t", path, Target(("t",), "tagging"), (Input("w", "text"),), split=Split(0, 0))
    told = refusal(encode_all, fit(task))
    assert "data row 2" in told
    assert "2 tags" in told
    encoded = encode_all(fit(replace(task, on_bad="skip")))
    assert (encoded.keep.tolist(), encoded.bad) == ([True, False], 1)


# Config

TOML = """
[[tasks]]
name = "income"
train = "adult/train.csv"
test = "/data/test.csv"
target = "income"
inputs = ["age", {column = "sex", kind = "category"}]
where = {country = 7}
split = {valid = 0.2}

[[tasks]]
name = "tox"
train = "tox.csv"
target = {columns = ["a", "b"], kind = "multilabel"}
"""


def test_tasks_from_toml():
    income, tox = tasks_from_toml(tomllib.loads(TOML)["tasks"], Path("/base/configs"))
    assert (income.train, income.test, income.valid) == ("/base/configs/adult/train.csv", "/data/test.csv", None)
    assert income.inputs == (Input("age"), Input("sex", "category"))
    assert (income.where, income.split) == (("country", "7"), Split(valid=0.2))
    assert tox.target == Target(("a", "b"), "multilabel")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('tragte = "x"', ["no key 'tragte'", "did you mean 'target'", "'bad'"]),
        ('weight = "heavy"', ["key weight", "`float`"]),
        ("weight = 0", ["weight"]),
        ('on_bad = "ignore"', ["key on_bad"]),
        ("split = {vaild = 0.1}", ["did you mean 'valid'", "split"]),
        ("split = {valid = 0.6, test = 0.4}", ["no training rows"]),
        ('inputs = [{colum = "x"}]', ["did you mean 'column'"]),
        ('where = {a = "1", b = "2"}', ["where names one column", "a, b"]),
        ('valid = "a.csv"', ["the valid file is the training file"]),
        ('inputs = ["y"]', ["'y' is used twice"]),
        ("max_rows = 0", ["max_rows"]),
    ],
)
def test_toml_mistakes_are_named(change, words):
    table = tomllib.loads(f'name = "bad"\ntrain = "a.csv"\ntarget = "y"\n{change}')
    told = refusal(tasks_from_toml, [table], Path())
    for word in words:
        assert word in told, told


def test_toml_without_a_target_or_with_a_name_twice():
    assert "the key 'target' is missing" in refusal(tasks_from_toml, [{"name": "a", "train": "b"}], Path())
    table = {"name": "a", "train": "b", "target": "c"}
    assert "already a task 'a'" in refusal(tasks_from_toml, [table, table], Path())


def test_task_from_flags():
    task = task_from_flags(
        "n",
        "a.csv",
        ["p", "q"],
        kind="regression",
        inputs=["x:number", "odd:name"],
        where="c = d",
        valid=None,
        weight=2.0,
    )
    assert task == Task(
        "n",
        str(Path("a.csv").absolute()),
        Target(("p", "q"), "regression"),
        (Input("x", "number"), Input("odd:name")),
        where=("c", "d"),
        weight=2.0,
    )
    assert "COLUMN=VALUE" in refusal(task_from_flags, "n", "a.csv", "y", where="c")


def test_loss_and_metric_must_fit_the_kind():
    task = Task("t", "a.csv", Target(("y",), "regression"))
    assert "huber" in refusal(check_task, replace(task, loss="hubber"))
    assert "rmse" in refusal(check_task, replace(task, metrics=("accuracy",)))


# Real files

TOX21 = ("NR-AR", "NR-AR-LBD", "NR-AhR", "NR-Aromatase", "NR-ER", "NR-ER-LBD", "NR-PPAR-gamma", "SR-ARE", "SR-ATAD5")


@pytest.mark.parametrize(
    ("path", "target", "kind", "outputs", "inputs"),
    [
        ("adult/train.csv", "income", "classification", 2, {"age": "number", "workclass": "category"}),
        ("california_housing/train.csv", "median_house_value", "regression", 1, {"total_bedrooms": "number"}),
        ("bike_sharing/train.csv", ("casual", "registered", "cnt"), "regression", 3, {"hr": "number"}),
        ("tox21/train.csv", TOX21, "multilabel", 9, {"smiles": "text"}),
        ("goemotions/valid.jsonl", "labels", "multilabel", 28, {"text": "text"}),
        ("clinc150/train.jsonl", "label", "classification", None, {"text": "text"}),
        ("snips/valid.jsonl", "tags", "tagging", None, {"tokens": "text"}),
        ("ud_english_ewt/valid.conllu", "upos", "tagging", None, {"tokens": "text"}),
        ("fashion_mnist", "label", "classification", 10, {"image": "image"}),
        ("omniglot20/Keble/train", "label", "classification", 26, {"image": "image"}),
        ("fsdd/train.csv", "digit", "classification", 10, {"audio": "audio", "speaker": "category"}),
        ("lipophilicity/train.csv", "exp", "regression", 1, {"smiles": "text"}),
    ],
)
def test_real_tasks(shared_data, path, target, kind, outputs, inputs):
    columns = (target,) if isinstance(target, str) else target
    fitted = fit(Task("real", str(shared_data / path), Target(columns), max_rows=4000))
    assert fitted.task.target.kind == kind
    assert inputs.items() <= {column.column: column.kind for column in fitted.task.inputs}.items()
    assert outputs is None or fitted.num_outputs == outputs
    kept = 0
    for batch in rows(fitted.task, "train"):
        encoded = encode_target(fitted, batch)
        assert not encoded.unseen
        kept += int(encoded.keep.sum())
    assert kept == fitted.train_rows - fitted.dropped_rows > 0


def test_the_139_schools_as_tasks_of_their_own(shared_data):
    files = {s: str(shared_data / "school" / f"{s}.csv") for s in SPLITS}
    closed, _ = infer(Task("school", target=Target(("score",)), each="school", **files))
    assert closed.target.kind == "regression"
    assert "school" not in {column.column for column in closed.inputs}
    tasks = expand(closed, distinct_values(closed, "school"))
    fitted = fit_all(tasks)
    assert len(fitted) == 139
    assert sum(f.train_rows for f in fitted) == 10_754
    assert sum(f.test_rows for f in fitted) == 3_072


def test_a_column_is_no_identifier_because_its_name_ends_like_one(tmp_path: Path) -> None:
    rows = "\n".join(f"{0.1 * i:.2f},{i},{'a' if i % 2 else 'b'}" for i in range(50))
    (tmp_path / "wine.csv").write_text(f"acid,rowid,y\n{rows}\n")
    task, _ = infer(Task("wine", str(tmp_path / "wine.csv"), Target(("y",))))
    assert [column.column for column in task.inputs] == ["acid"]
