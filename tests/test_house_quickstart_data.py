"""The quickstart's data: whole, the same every time, no text in two splits."""

from __future__ import annotations

import csv
import hashlib
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
quickstart_data = pytest.importorskip("quickstart_data")

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return quickstart_data.make_data(tmp_path_factory.mktemp("data"))


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return [json.loads(line) for line in file] if path.suffix == ".jsonl" else list(csv.DictReader(file))


def test_every_file_is_there_and_has_its_target(made: dict[str, dict]) -> None:
    assert list(made) == ["digits", "wine", "breast_cancer", "diabetes", "library_area", "library_returns"]
    for name, files in made.items():
        for split in SPLITS:
            if name == "digits":
                assert sorted(path.name for path in files[split].iterdir()) == [str(digit) for digit in range(10)]
            else:
                rows = _rows(files[split])
                assert len(rows) > 20, (name, split)
                assert all(row[files["target"]] for row in rows)


def test_rows_are_all_of_the_set_once(made: dict[str, dict]) -> None:
    # The sizes scikit-learn documents: 1,797 digits, 178 wines, 569 tumours, 442 patients.
    for name, size in (("wine", 178), ("breast_cancer", 569), ("diabetes", 442)):
        assert sum(len(_rows(made[name][split])) for split in SPLITS) == size
    drawings = [path.name for split in SPLITS for path in made["digits"][split].glob("*/*.png")]
    assert len(drawings) == len(set(drawings)) == 1797


@pytest.mark.parametrize("name", ["library_area", "library_returns"])
def test_no_text_is_in_two_splits_and_no_class_is_missing(made: dict[str, dict], name: str) -> None:
    rows = {split: _rows(made[name][split]) for split in SPLITS}
    texts = [row["text"] for split in SPLITS for row in rows[split]]
    assert len(texts) == len(set(texts))
    assert len(rows["train"]) > 2000
    classes = {split: {row[made[name]["target"]] for row in rows[split]} for split in SPLITS}
    assert classes["train"] == classes["valid"] == classes["test"]


def test_a_file_is_dealt_to_one_split_only() -> None:
    sources = [quickstart_data._Source(f"{area}/{i}.py", area, [None] * (i + 1)) for area in "ab" for i in range(20)]
    dealt = list(quickstart_data._deal(sources, seed=0))
    assert sorted(source.path for source, _ in dealt) == sorted(source.path for source in sources)
    assert {split for _, split in dealt} == set(SPLITS)
    assert dealt == list(quickstart_data._deal(sources, seed=0))
    assert dealt != list(quickstart_data._deal(sources, seed=1))


def test_the_same_seed_makes_the_same_bytes(made: dict[str, dict], tmp_path: Path) -> None:
    again = quickstart_data.make_data(tmp_path)
    for name in ("wine", "library_returns"):
        for split in SPLITS:
            first, second = (hashlib.sha256(files[name][split].read_bytes()).digest() for files in (made, again))
            assert first == second, (name, split)


@pytest.mark.parametrize(
    ("body", "returns"),
    [
        ("return 1", True),
        ("return", False),
        ("return None", False),
        ("yield", True),
        ("if a:\n  return a", True),
        ("def g():\n  return 1", False),
        ("f = lambda: (yield)", False),
        ("pass", False),
    ],
)
def test_returning_is_told_from_not_returning(body: str, returns: bool) -> None:
    import ast

    source = "def f(a):\n" + "\n".join("  " + line for line in body.split("\n"))
    assert quickstart_data._returns_value(ast.parse(source).body[0]) == returns
