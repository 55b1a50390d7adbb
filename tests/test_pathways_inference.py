"""Predictions for rows in any form: one row out for each row in, in order, or an error that says what is missing."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pathways.inference import output_table, predict, predict_many, read_rows, to_table
from pathways.inference_files import format_of, joined, predict_file
from pathways.model import Model
from tasks.encoded import EncoderSettings
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.spec import Input, Target, Task
from tasks.tokenizer import Tokenizer, train_tokenizer

SETTINGS = EncoderSettings(vocab_size=320, max_length=8)


def fitted(kind: str, *inputs: tuple[str, str], classes: tuple[str, ...] = ("a", "b"), **more: object) -> FittedTask:
    columns = tuple(Input(name, form) for name, form in inputs)  # type: ignore[arg-type]
    task = Task("t", "t.csv", Target(("y",), kind), inputs=columns)  # type: ignore[arg-type]
    return FittedTask(task, classes, **more)  # type: ignore[arg-type]


NUMBERS = fitted("classification", ("x", "number"), ("z", "category"), number_mean={"x": 0.0}, number_std={"x": 1.0})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(["a b c"], 320))


@pytest.mark.parametrize(
    "rows",
    [
        [{"x": 1, "z": "u", "other": 3}, {"x": None, "z": "v"}],
        {"x": [1, None], "z": ["u", "v"], "other": [0, 0]},
        {"x": np.array([1.0, np.nan]), "z": np.array(["u", "v"])},
        pa.table({"x": [1, None], "z": ["u", "v"]}),
        pa.RecordBatch.from_pydict({"z": ["u", "v"], "x": [1, None]}),
        SimpleNamespace(to_dict=lambda form: {"x": [1.0, float("nan")], "z": ["u", "v"]}),
    ],
)
def test_rows_come_in_many_forms(rows: object) -> None:
    table = to_table(NUMBERS, rows)
    assert table.column_names == ["x", "z"]
    assert table.to_pydict() == {"x": [1, None], "z": ["u", "v"]}


def test_mixed_types_are_read_as_a_file_would() -> None:
    assert to_table(NUMBERS, [{"x": 1, "z": 1}, {"x": "?", "z": "u"}]).column("x").to_pylist() == ["1", "?"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"X": 1, "z": 2}], "is 'X' meant"),
        ({"z": [1]}, "there is no column 'x'"),
        ({"x": 1, "z": 2}, "single values"),
        ({"x": [1], "z": [1, 2]}, "different lengths"),
        ([1, 2], "not every row is a dict"),
        ("rows.csv", "a str"),
    ],
)
def test_what_cannot_be_rows_is_told(rows: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        to_table(NUMBERS, rows)


def test_an_undecodable_image_gives_nulls_and_its_reason(tokenizer: Tokenizer) -> None:
    task = fitted("classification", ("picture", "image"))
    good = Image.fromarray(np.full((8, 8), 200, np.uint8))
    file = io.BytesIO()
    good.save(file, format="PNG")
    table = to_table(task, {"picture": [file.getvalue(), b"no image", None, good, np.zeros((8, 8), np.uint8)]})
    rows = read_rows(task, table, tokenizer, SETTINGS, ".")
    assert rows.place == [0, 3, 4]
    assert sorted(rows.errors) == [1, 2]
    # A picture given as an object is read as its PNG is.
    assert np.array_equal(rows.examples[0].streams["image"]["patch"], rows.examples[1].streams["image"]["patch"])
    out = output_table(task, rows, np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]]))
    assert out.column("prediction").to_pylist() == ["a", None, None, "b", "b"]
    assert out.column("confidence").to_pylist() == [0.9, None, None, 0.8, 0.6]
    assert out.column("error")[1].as_py().startswith("picture: ")
    assert out.column("error")[0].as_py() is None


def test_outputs_of_each_kind(tokenizer: Tokenizer) -> None:
    number = {"number_mean": {"x": 0.0}, "number_std": {"x": 1.0}}
    inputs = ("x", "number")
    rows = read_rows(NUMBERS, to_table(NUMBERS, {"x": [1, 2], "z": ["u", "u"]}), tokenizer, SETTINGS, ".")
    labels = output_table(fitted("multilabel", inputs, **number), rows, np.array([[0.5, 0.49], [0.1, 0.2]]))
    assert labels.to_pydict() == {"prediction": [["a"], []], "p_a": [0.5, 0.1], "p_b": [0.49, 0.2]}
    numbers = output_table(fitted("regression", inputs, classes=(), **number), rows, np.array([[3.5], [4.0]]))
    assert numbers.to_pydict() == {"y": [3.5, 4.0]}


def test_words_past_the_longest_example_have_no_tag(tokenizer: Tokenizer) -> None:
    task = fitted("tagging", ("tokens", "text"))
    words = [["a", "b"], list("abcabcabcabc"), None, []]
    rows = read_rows(task, to_table(task, {"tokens": words}), tokenizer, SETTINGS, ".")
    assert rows.words == [2, 12, 0, 0]
    kept = [int((e.streams["text"]["word"] >= 0).sum()) for e in rows.examples]
    assert kept[0] == 2
    assert 0 < kept[1] <= SETTINGS.max_length
    out = output_table(task, rows, [np.tile([0.3, 0.7], (n, 1)) for n in kept])
    tags = out.column("tags").to_pylist()
    assert tags[0] == ["b", "b"]
    assert tags[1] == ["b"] * kept[1] + [None] * (12 - kept[1])
    assert tags[2:] == [[], []]
    assert out.column("confidence")[0].as_py() == [0.7, 0.7]


def test_no_rows_give_an_empty_table(tiny_model: Model) -> None:
    for task, columns in (("wine", 5), ("words", 2), ("price", 1)):
        table = predict(tiny_model, task, [])
        assert (table.num_rows, table.num_columns) == (0, columns)


def test_many_tasks_in_one_call_equal_each_alone(tiny_model: Model) -> None:
    rows = {
        "wine": [{"alcohol": 2.0, "acid": 0.0, "hue": 1, "style": "dry"}, {"alcohol": -2, "hue": None, "style": "x"}],
        "price": [{"area": 50, "age": 3, "city": "north"}],
    }
    together = predict_many(tiny_model, rows)
    assert tiny_model.predict(rows)["price"].equals(together["price"])
    for task, given in rows.items():
        alone = tiny_model.predict(task, given)
        assert alone.num_rows == len(given)
        for name in alone.column_names:
            a, b = alone.column(name).to_pylist(), together[task].column(name).to_pylist()
            assert a == b if name == "prediction" else a == pytest.approx(b, rel=1e-4)


def test_more_rows_than_are_encoded_at_once_keep_their_order(tiny_model: Model) -> None:
    file = Path(tiny_model.entry("wine").fitted.task.test or "")
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    few = tiny_model.predict("wine", rows).column("prediction").to_pylist()
    times = 1100 // len(rows) + 1
    many = tiny_model.predict("wine", rows * times).column("prediction").to_pylist()
    assert many == few * times


def test_unknown_task_is_an_error_never_another_task(tiny_model: Model) -> None:
    with pytest.raises(UserError, match="did you mean 'wine'"):
        tiny_model.predict("wein", [{}])
    with pytest.raises(UserError, match="there is no column 'text'"):
        tiny_model.predict("mood", [{"txt": "a good day"}])


def test_predictions_never_replace_the_rows_they_are_made_from(tiny_model: Model, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(Path(tiny_model.entry("wine").fitted.task.test or "").read_text())
    before = file.read_bytes()
    with pytest.raises(UserError, match="would replace the rows they are made from"):
        predict_file(tiny_model, "wine", str(file), str(tmp_path / "." / "rows.csv"))
    assert file.read_bytes() == before


def test_a_kept_column_keeps_its_name() -> None:
    kept = pa.RecordBatch.from_pydict({"y": ["1"], "id": ["7"]})
    assert joined(kept, pa.table({"y": [2.0]})).to_pydict() == {"y": ["1"], "id": ["7"], "predicted_y": [2.0]}


@pytest.mark.parametrize(
    ("head", "form"),
    [
        (b'\n {"a": 1}', "jsonl"),
        (b"a,b\n1,2", "csv"),
        (b"a\tb\n1\t2", "tsv"),
        (b"PAR1....", "parquet"),
        (b"a\n1", "csv"),
    ],
)
def test_standard_input_is_recognised(head: bytes, form: str, tmp_path: Path) -> None:
    (tmp_path / "stdin").write_bytes(head)
    assert format_of(tmp_path / "stdin") == form


def test_nothing_on_standard_input_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "stdin").write_bytes(b" \n")
    with pytest.raises(UserError, match="nothing on standard input"):
        format_of(tmp_path / "stdin")


def test_a_task_that_stops_at_bad_rows_still_predicts_them(tokenizer: Tokenizer) -> None:
    task = fitted("classification", ("picture", "image"))
    stopping = replace(task, task=replace(task.task, on_bad="stop"))
    rows = read_rows(stopping, to_table(stopping, {"picture": [b"x"]}), tokenizer, SETTINGS, ".")
    assert (rows.place, rows.count) == ([], 1)
    assert output_table(stopping, rows, np.zeros((0, 2))).num_rows == 1
