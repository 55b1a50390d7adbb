"""Evaluation: figures by hand, unseen labels and cut words count as wrong, statistics are recorded without loss."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from tolerance import assert_close

import pathways as pw
from pathways.adding import baselines, fit, remove_task
from pathways.counting import free_step, to_counts
from pathways.evaluation import evaluate
from pathways.model import STATISTICS, Model, beside
from pathways.quality import mean_quality
from routing.counters import Counters
from tasks.cache import encode_split
from tasks.errors import UserError


@pytest.fixture
def model(tiny_model: Model, tmp_path: Path) -> Model:
    shutil.copytree(tiny_model.path, tmp_path / "model")
    return Model.open(tmp_path / "model")


def _rows(model: Model, task: str) -> list[dict[str, Any]]:
    path = Path(model.entry(task).fitted.task.test or "")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_text())))
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_are_those_of_the_predictions(tiny_model: Model) -> None:
    wine, words, price = (evaluate(tiny_model, [name], statistics=False)[0] for name in ("wine", "words", "price"))
    rows = _rows(tiny_model, "wine")
    said = tiny_model.predict("wine", rows).column("prediction").to_pylist()
    right = [row["cultivar"] == guess for row, guess in zip(rows, said, strict=True)]
    assert wine.metrics["accuracy"] == pytest.approx(np.mean(right))
    assert wine.examples == len(rows)
    assert wine.confusion is not None
    assert np.trace(wine.confusion[:, :-1]) == sum(right)
    rows = _rows(tiny_model, "words")
    tags = tiny_model.predict("words", rows).column("tags").to_pylist()
    pairs = [(a, b) for row, guess in zip(rows, tags, strict=True) for a, b in zip(row["tags"], guess, strict=True)]
    assert words.metrics["token_accuracy"] == pytest.approx(np.mean([a == b for a, b in pairs]))
    rows = _rows(tiny_model, "price")
    guess = np.array(tiny_model.predict("price", rows).column("price").to_pylist())
    error = guess - np.array([float(row["price"]) for row in rows])
    assert price.metrics["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert price.per_class == []


def test_the_worst_are_mistakes_worst_first(tiny_model: Model) -> None:
    (wine,) = evaluate(tiny_model, ["wine"], statistics=False, worst=5)
    rows = _rows(tiny_model, "wine")
    assert len(wine.worst) == min(5, round(wine.examples * (1 - wine.metrics["accuracy"])))
    losses = [one.loss for one in wine.worst]
    assert losses == sorted(losses, reverse=True)
    for one in wine.worst:
        assert one.truth == rows[one.row - 1]["cultivar"] != one.prediction
        assert f"style={rows[one.row - 1]['style']}" in one.inputs
        assert 1 / 3 <= (one.confidence or 0) <= 1


def test_an_unseen_label_counts_as_wrong(tiny_model: Model, tmp_path: Path) -> None:
    rows = _rows(tiny_model, "wine")
    path = tmp_path / "other.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows([*rows, *({**row, "cultivar": "merlot"} for row in rows[:8])])
    (known,) = evaluate(tiny_model, ["wine"], statistics=False)
    (found,) = evaluate(tiny_model, ["wine"], data=path, statistics=False)
    assert found.unseen == {"merlot": 8}
    assert found.counts["unseen"] == 8
    # 24 known rows and 8 unseen: right / 24 becomes right / 32.
    assert found.metrics["accuracy"] == pytest.approx(known.metrics["accuracy"] * 24 / 32)
    assert found.metrics["macro_f1"] == pytest.approx(known.metrics["macro_f1"])


def test_unseen_tags_and_cut_words_count_as_wrong(tiny_model: Model, tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    lines = [
        {"tokens": ["the", "book", "ran"], "tags": ["DET", "NOUN", "NEW"]},
        {"tokens": ["the"] * 60, "tags": ["DET"] * 60},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = evaluate(tiny_model, ["words"], data=path, statistics=False)
    tags = tiny_model.predict("words", lines).column("tags").to_pylist()
    right = sum(a == b for line, row in zip(lines, tags, strict=True) for a, b in zip(line["tags"], row, strict=True))
    assert None in tags[1]
    assert found.metrics["token_accuracy"] == pytest.approx(right / 63)
    assert found.confusion is not None
    assert found.confusion[:, -1].sum() == tags[1].count(None)


def test_the_mean_over_tasks_weighs_them_by_their_rows() -> None:
    # (0.9 * 300 + 0.5 * 100 - 1 * 5) / 405: an R2 of -40 counts as -1, and what is not known in nothing.
    figures = {"large": 0.9, "middling": 0.5, "tiny": -40.0, "unknown": float("nan"), "empty": 0.3}
    rows = {"large": 300, "middling": 100, "tiny": 5, "unknown": 50, "empty": 0}
    assert_close(mean_quality(figures, rows), 315 / 405)
    assert mean_quality({"unknown": float("nan")}, rows) == float("-inf")


def test_cut_words_count_as_wrong_in_what_is_noted_too(tiny_model: Model, tmp_path: Path, cache_folder: Path) -> None:
    # 60 words that all are the most common tag; the constant is right for those that were not cut.
    path = tmp_path / "words.jsonl"
    sub = tiny_model.submodel("words")
    known = sub.entries[0].fitted
    common = known.classes[int(np.argmax(known.class_counts))]
    lines = [{"tokens": ["the"] * 60, "tags": [common] * 60}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tags,) = tiny_model.predict("words", lines).column("tags").to_pylist()
    kept = sum(tag is not None for tag in tags)
    assert 0 < kept < 60
    item = replace(known, task=replace(known.task, test=str(path)))
    split = encode_split(item, "test", tiny_model.text_tokenizer, tiny_model.config.encoders, cache_folder)
    assert fit.metrics_of(sub, split)["token_accuracy"] == pytest.approx(tags.count(common) / 60)
    assert baselines.constant(item, split) == pytest.approx(kept / 60)
    # What joint training noted is what an evaluation finds.
    (found,) = evaluate(tiny_model, ["words"], "valid", statistics=False)
    noted = tiny_model.entry("words").notes["valid"]["token_accuracy"]
    assert found.metrics["token_accuracy"] == pytest.approx(noted)


def test_limit_takes_a_seeded_choice(tiny_model: Model) -> None:
    first, again = (evaluate(tiny_model, ["wine"], limit=7, statistics=False)[0] for _ in range(2))
    assert first.examples == 7
    assert first.metrics == again.metrics


def test_unknown_task_and_missing_file(tiny_model: Model, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'wine'"):
        evaluate(tiny_model, ["wein"])
    with pytest.raises(UserError, match="does not exist"):
        evaluate(tiny_model, ["wine"], data=tmp_path / "none.csv")


def test_json_has_no_nan(tiny_model: Model) -> None:
    (words,) = evaluate(tiny_model, ["words"], statistics=False)
    assert words.chief[0] == "token_accuracy"
    assert "span_f1" in words.reasons or "span_f1" not in words.metrics
    json.dumps(words.to_json(), allow_nan=False)


def test_routing_of_an_evaluation_is_recorded(model: Model) -> None:
    model.evaluate("wine")
    found = pw.stats(model, "test")
    assert found.task_names == ["wine"]
    rows = sum(found.routing.filter(pc.equal(found.routing["phase"], "test"))["rows"].to_pylist())
    tokens = sum(found.entropy.filter(pc.equal(found.entropy["phase"], "test"))["rows"].to_pylist())
    assert rows == 2 * tokens  # each row chose two experts
    model.evaluate("price")
    assert pw.stats(model, "test").task_names == ["price", "wine"]
    before = pw.stats(model, "test").entropy.num_rows
    model.evaluate("price")
    assert pw.stats(model, "test").entropy.num_rows == before


def test_training_records_are_not_replaced(model: Model) -> None:
    before = pw.stats(model, "train").routing.num_rows
    model.evaluate("wine", "train")
    assert pw.stats(model).phase == "train"
    assert pw.stats(model, "train").routing.num_rows == before
    assert free_step(beside(model.path, STATISTICS), "test", ["wine"], 999) == 20


def test_a_folder_that_cannot_be_written_is_a_warning(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathways.evaluation.StatisticsWriter", full)
    with pytest.warns(UserWarning, match="No space left"):
        (found,) = evaluate(model, ["wine"])
    assert found.examples == 24


def test_damaged_statistics_are_a_warning(model: Model) -> None:
    model.evaluate("wine")
    parts = [p for p in Path(beside(model.path, STATISTICS)).rglob("*") if p.is_file() and p.name != "layers.json"]
    assert parts
    for path in parts:
        path.write_bytes(b"not a table")
    with pytest.warns(UserWarning, match="were not recorded"):
        (found,) = evaluate(model, ["price"])
    assert found.examples == 24


def test_a_removed_task_does_not_count(model: Model) -> None:
    remove_task(model.path, "price")
    for given in (model.path, Model.open(model.path)):
        assert pw.stats(given).task_names == ["mood", "wine", "words"]
    assert "price" in pw.stats(model).task_names  # which is the version before


def test_the_last_few_sub_models_are_kept(tiny_model: Model) -> None:
    first = tiny_model.submodel("wine")
    for names in ("mood", "words", "price"):
        tiny_model.submodel(names)
    assert tiny_model.submodel("wine") is first
    tiny_model.submodel(("wine", "mood"))
    assert tiny_model.submodel("wine") is first
    assert len(tiny_model._submodels) == 4


def test_slots_become_experts_of_the_banks(tiny_model: Model) -> None:
    sub = tiny_model.submodel("wine")
    (slots,) = {sum(len(index) for index in layer.values()) for layer in sub.layout.experts}
    rows = np.zeros((1, slots))
    rows[0, slots - 1] = 3.0
    zero = np.zeros(1)
    one = Counters(rows, rows / 2, zero, np.zeros((slots, slots)), zero, zero + 3)  # type: ignore[arg-type]
    counts = to_counts(sub, [one, one], 5, "valid")
    assert [layer.layer for layer in counts.layers] == [0, 1]
    last = counts.layers[1].experts[-1]
    assert (last.kind, last.index) == ("mlp", 3)
    assert counts.layers[0].rows.dtype == np.int64
    assert counts.layers[0].rows[0].tolist() == [0, 0, 0, 3]
