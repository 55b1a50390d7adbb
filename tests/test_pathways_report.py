"""What commands print: numbers, tables in three forms, cards."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pathways.report import (
    Card,
    Column,
    Reused,
    arrow_table,
    count,
    duration,
    integer,
    number,
    percent,
    size,
    table,
    to_csv,
    to_json,
)
from tasks.errors import UserError

CARD = Card(
    task="wine/quality",
    metric="rmse",
    value=0.61,
    baselines={"mean": 0.8, "linear probe": 0.61, "from scratch": 0.6},
    seconds=73.2,
    trainable_parameters=123_456,
    new_parameters=4_096,
    reused=(Reused(1, "swiglu", 12), Reused(0, "mlp", 3, ("digits", "abalone|x"))),
    notes=("2 fresh experts per layer",),
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (98.76, "98.8"),
        (999.6, "1,000"),
        (9.996, "10.0"),
        (123_456, "123,000"),
        (999_999, "1.00e+06"),
        (-0.5, "-0.500"),
        (1.23456e-5, "1.23e-05"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (np.float32(0.25), "0.250"),
    ],
)
def test_numbers_have_three_significant_digits(value, text):
    assert number(value) == text


@given(st.floats(1e-300, 1e300))
def test_a_written_number_is_within_half_a_percent(value):
    assert abs(float(number(value).replace(",", "")) - value) <= 0.00501 * value


def test_units():
    assert [count(v) for v in (0, 7, 999, 1000, 12_345_678, 999_999, 3e9)] == [
        "0",
        "7",
        "999",
        "1.00K",
        "12.3M",
        "1.00M",
        "3.00B",
    ]
    assert [size(v) for v in (12, 1_234_567)] == ["12 B", "1.23 MB"]
    assert percent(0.1234) == "12.3%"
    assert integer(1234567) == "1,234,567"
    assert [duration(v) for v in (0.25, 12.34, 59.99, 125, 3600 + 7 * 60, 2 * 86400 + 4 * 3600)] == [
        "0.250 s",
        "12.3 s",
        "1 min 00 s",
        "2 min 05 s",
        "1 h 07 min",
        "2 d 04 h",
    ]


def printed(**options) -> str:
    console = Console(file=io.StringIO(), width=100)
    columns = [Column("task"), Column("parameters", "count"), Column("share", "percent"), Column("dead")]
    table(
        "Tasks",
        columns,
        [["a[b]", 12_345_678, 0.5, True], ["c,d", None, float("nan"), False]],
        console=console,
        **options,
    )
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_table_on_the_terminal():
    text = printed()
    assert "Tasks" in text
    first = next(line for line in text.splitlines() if "a[b]" in line)
    assert first.split() == ["a[b]", "12.3M", "50.0%", "yes"]
    second = next(line for line in text.splitlines() if "c,d" in line)
    assert second.split() == ["c,d", "–", "nan%"]


def test_csv_and_json_keep_the_values():
    rows = list(csv.DictReader(io.StringIO(printed(format="csv"))))
    assert rows[0] == {"task": "a[b]", "parameters": "12345678", "share": "0.5", "dead": "True"}
    assert rows[1]["task"] == "c,d"
    assert rows[1]["parameters"] == ""
    objects = json.loads(printed(format="json"))
    assert objects == [
        {"task": "a[b]", "parameters": 12345678, "share": 0.5, "dead": True},
        {"task": "c,d", "parameters": None, "share": None, "dead": False},
    ]
    assert json.loads(to_json(["a"], [[np.float32(0.5)]])) == [{"a": 0.5}]
    assert to_csv(["a"], [[np.int64(3)]]) == "a\n3\n"


def test_an_unknown_format_is_a_users_error():
    with pytest.raises(UserError, match="table, csv or json"):
        printed(format="xml")


def test_an_arrow_table():
    console = Console(file=io.StringIO(), width=100)
    data = pa.table({"expert": [1, 2], "share": [0.25, 0.5], "task": ["a", None]})
    arrow_table("Experts", data, {"share": "percent"}, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert [line.split() for line in text.splitlines() if "%" in line] == [["1", "25.0%", "a"], ["2", "50.0%", "–"]]
    console = Console(file=io.StringIO())
    arrow_table("Experts", data.slice(0, 0), format="csv", console=console)


def test_an_empty_table_keeps_its_columns():
    console = Console(file=io.StringIO(), width=100)
    arrow_table("Experts", pa.table({"expert": pa.array([], pa.int64())}), format="csv", console=console)
    assert console.file.getvalue() == "expert\n"  # type: ignore[attr-defined]


def test_a_card_comes_back_from_json():
    assert Card.from_json(CARD.to_json()) == CARD
    broken = Card("t", "accuracy", float("nan"), {"majority": float("nan")}, 1.0, 1, 1)
    back = Card.from_json(broken.to_json())
    assert np.isnan(back.value)
    assert np.isnan(back.baselines["majority"])
    assert "NaN" not in broken.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "task": "a"}'])
def test_what_is_not_a_card_is_a_users_error(text):
    with pytest.raises(UserError, match="card"):
        Card.from_json(text)


def test_a_card_says_which_way_is_better():
    # rmse: lower is better, so 0.61 beats 0.8 by 0.19 and loses to 0.6 by 0.01; equal to itself.
    text = CARD.markdown()
    assert "| mean | 0.800 | this model is better by 0.190 |" in text
    assert "| linear probe | 0.610 | this model is equal |" in text
    assert "| from scratch | 0.600 | this model is worse by 0.0100 |" in text
    higher = Card("t", "accuracy", 0.9, {"majority": 0.5}, 1.0, 1, 1).markdown()
    assert "this model is better by 0.400" in higher


def test_a_card_in_full():
    console = Console(file=io.StringIO(), width=100)
    CARD.render(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for word in (
        "wine/quality",
        "0.610",
        "1 min 13 s",
        "123K",
        "4.10K",
        "mlp 3",
        "digits, abalone|x",
        "2 fresh experts",
    ):
        assert word in text
    assert text.index("mlp 3") < text.index("swiglu 12")
    assert "| 0 | mlp 3 | digits, abalone\\|x |" in CARD.markdown()
