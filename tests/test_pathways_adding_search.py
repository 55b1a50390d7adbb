"""The search's arithmetic, by hand, and the linear probe's on tables whose answer is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pathways.adding import baselines, fit, search, start
from pathways.catalogue import Catalogue
from pathways.data import encode_tasks, fit_tasks, streams_of
from pathways.model import Model
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.spec import Target, Task


def test_the_nearest_tasks_are_those_of_the_same_direction_from_the_mean() -> None:
    # The mean of a, b, c, d is (10, 10); less it they are (1, 0), (0, 1), (-1, 0), (0, -1), the new one (3, 4):
    # cosines 0.6, 0.8, -0.6, -0.8.
    points = {"a": (11, 10), "b": (10, 11), "c": (9, 10), "d": (10, 9)}
    others = {name: np.array(point, float) for name, point in points.items()}
    found = search.nearest_tasks(np.array([13.0, 14.0]), others)
    assert list(found) == ["b", "a"]
    assert np.allclose(list(found.values()), [0.8, 0.6], atol=1e-12)


def test_of_one_or_two_tasks_no_mean_is_taken_off() -> None:
    found = search.nearest_tasks(np.array([3.0, 4.0]), {"a": np.array([6.0, 8.0])})
    assert found == pytest.approx({"a": 1.0})
    assert search.nearest_tasks(np.ones(2), {}) == {}


def test_equal_scores_go_to_the_lowest_index() -> None:
    slots = [("mlp", 0), ("mlp", 1), ("mlp", 2), ("identity", 0)]
    best = search._best([np.array([0.1, 0.4, 0.1, 0.4])], [slots], 3, alike=False)
    assert best == ((("mlp", 1), ("identity", 0), ("mlp", 0)),)


def test_scanned_layers_take_the_same_number_of_each_kind() -> None:
    slots = [("mlp", 0), ("mlp", 1), ("identity", 0)]
    first, second = np.array([0.5, 0.4, 0.1]), np.array([0.1, 0.2, 0.7])
    assert search._best([first, second], [slots, slots], 2, alike=False)[1] == (("identity", 0), ("mlp", 1))
    assert search._best([first, second], [slots, slots], 2, alike=True)[1] == (("mlp", 1), ("mlp", 0))


def test_the_score_is_the_own_share_plus_that_of_the_nearest(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = {"own": (0.5, 0.5, 0.0, 0.0), "near": (0.0, 0.0, 0.3, 0.7), "far": (0.9, 0.1, 0.0, 0.0)}
    known = {
        name: {
            "embedding": [1.0 if name != "far" else -1.0],
            "usage": [{"mlp": {str(i): s for i, s in enumerate(row)}}],
        }
        for name, row in usage.items()
    }
    model: Any = SimpleNamespace(
        entries=lambda names: [SimpleNamespace(name=name, notes={"profile": known[name]}) for name in names],
        bank_sizes=[{"mlp": 4}],
        manifest={},
        config=tiny_model.config,
        routed_layers=[0],
    )
    others = {name: np.array(known[name]["embedding"]) for name in ("near", "far")}
    monkeypatch.setattr(search, "embeddings", lambda model: others)
    monkeypatch.setattr(search, "profiles", lambda sub, examples: {"new": known["own"]})
    sub: Any = SimpleNamespace(names=("new",))
    rows: Any = SimpleNamespace(__len__=lambda self: 0)
    monkeypatch.setattr(search, "subset", lambda split, most, seed: [])
    choice = search.choose(model, sub, rows, per_layer=3, seed=0)
    # own + near: 0.5, 0.5, 0.3, 0.7; far points the other way and says nothing.
    assert choice.ranked == ((("mlp", 3), ("mlp", 0), ("mlp", 1)),)
    assert choice.experts == ({"mlp": (0, 1, 3)},)
    assert choice.nearest == ("near",)
    assert {one.expert: one.from_tasks for one in choice.reused} == {3: ("near",), 0: ("far",), 1: ("far",)}


def test_without_any_task_or_base_there_is_nothing_to_start_from() -> None:
    view: Any = SimpleNamespace(has=lambda name: False)
    empty = Catalogue(view, {"catalogue": {"count": 0, "next": 0, "groups": []}})
    model: Any = SimpleNamespace(catalogue=empty, view=view, path="m")
    with pytest.raises(UserError, match="no task left"):
        search.reference(model)


def test_the_recipe_suits_the_size_of_the_data(tiny_model: Model) -> None:
    # Rows hold 32 tokens. 256 examples of 8 tokens: 4 a row, at most the model's own 4 rows a batch: 16 batches;
    # 10 epochs x 16 = 160 steps.
    def split(n: int) -> Any:
        from tasks.pack import TokenUse

        class Rows:
            def __len__(self) -> int:
                return n

            def token_use(self) -> TokenUse:
                return TokenUse({"table": 8.0}, {"table": 8}, 1)

        return Rows()

    small = fit.make_recipe(tiny_model.config, split(256), None, None, 0).config
    assert (small.rows, small.steps, small.learning_rate) == (4, 160, tiny_model.config.train.learning_rate)
    assert fit.make_recipe(tiny_model.config, split(10), None, None, 0).config.steps == fit.LEAST_STEPS
    assert fit.make_recipe(tiny_model.config, split(10**6), None, None, 0).config.steps == fit.MOST_STEPS
    asked = fit.make_recipe(tiny_model.config, split(64), 7, 0.1, 3).config
    assert (asked.steps, asked.learning_rate, asked.seed) == (7, 0.1, 3)


def fitted(kind: Any, columns: tuple[str, ...] = ("t",), **fields: Any) -> FittedTask:
    return FittedTask(Task("x", "x.csv", Target(columns, kind)), **fields)


def test_the_linear_probe_finds_a_linear_rule_of_each_kind() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 4)).astype(np.float32)
    held = x[:50]
    value = 2 * x[:, :1] - x[:, 1:2]
    wide = fitted("regression", target_mean=(10.0,), target_std=(2.0,))
    out = baselines._linear(wide, x, value, np.ones_like(value), held)
    assert np.abs(out - (10 + 2 * value[:50])).max() < 0.2
    label = (value > 0).astype(np.float32)
    classes = np.concatenate([1 - label, label], axis=1)
    out = baselines._linear(fitted("classification"), x, classes, np.ones_like(classes), held)
    assert ((out[:, 1] > 0.5) == (label[:50, 0] > 0)).mean() > 0.9
    assert np.allclose(out.sum(axis=1), 1)
    labels = np.concatenate([label, np.ones_like(label)], axis=1)
    known = np.ones_like(labels)
    known[::3, 0] = 0
    out = baselines._linear(fitted("multilabel", ("a", "b")), x, labels, known, held)
    assert ((out[:, 0] > 0.5) == (label[:50, 0] > 0)).mean() > 0.9
    assert (out[:, 1] == 1).all()
    shares = np.concatenate([0.2 + 0.6 * label, 0.8 - 0.6 * label], axis=1)
    out = baselines._linear(fitted("distribution", ("a", "b")), x, shares, np.ones_like(shares), held)
    assert ((out[:, 0] > 0.5) == (label[:50, 0] > 0)).mean() > 0.9


def test_the_linear_probe_of_a_sample_that_says_little() -> None:
    x = np.random.default_rng(0).normal(size=(6, 4))
    one = np.tile([[0.0, 1.0]], (6, 1))
    assert baselines._linear(fitted("classification"), x, one, np.ones_like(one), x[:2]).tolist() == [[0, 1], [0, 1]]
    wide = fitted("regression", ("a", "b"), target_mean=(10.0, 7.0), target_std=(2.0, 3.0))
    known = np.tile([[1.0, 0.0]], (6, 1))
    # The second column is known nowhere: its mean, 7, for every row.
    assert baselines._linear(wide, x, np.zeros((6, 2)), known, x[:2]).tolist() == [[10, 7], [10, 7]]


@pytest.mark.parametrize(
    ("task", "y", "mask", "expected"),
    [
        # The most common class, 1, is right for 2 of 3 rows.
        (
            replace(fitted("classification"), classes=("a", "b"), class_counts=(1, 9)),
            [[0, 1], [1, 0], [0, 1]],
            [[1, 1]] * 3,
            2 / 3,
        ),
        # The mean 10 against 10 + 2 * (1, -1) = 12 and 8: an RMSE of 2.
        (fitted("regression", target_mean=(10.0,), target_std=(2.0,)), [[1.0], [-1.0]], [[1], [1]], 2.0),
    ],
)
def test_the_constant_baseline_by_hand(task: FittedTask, y: Any, mask: Any, expected: float) -> None:
    class Rows:
        def __init__(self) -> None:
            self.y, self.y_mask = np.array(y, np.float32), np.array(mask, np.float32)

        def __len__(self) -> int:
            return len(self.y)

    rows: Any = Rows()
    assert baselines.constant(task, rows) == pytest.approx(expected)


def test_a_tagger_is_probed_by_training_its_head_alone(tiny_model: Model, cache_folder: Path) -> None:
    item = fit_tasks([replace(tiny_model.entry("words").fitted.task, name="again")])[0]
    train, valid = (
        encode_tasks([item], split, tiny_model.tokenizer, tiny_model.config.encoders, cache_folder)[0]
        for split in ("train", "valid")
    )
    borrowed = start.reference_submodel(tiny_model, item, streams_of(item), ("base", "base"), 0)
    before = {path: np.array(leaf) for path, leaf in borrowed.flat().items()}
    recipe = fit.make_recipe(tiny_model.config, train, 30, 0.05, 0)
    assert baselines.probe(borrowed, train, valid, recipe, valid) > baselines.constant(item, valid) + 0.1
    moved = {path[0] for path, leaf in borrowed.flat().items() if not np.array_equal(before[path], leaf)}
    assert moved <= {"token_heads"}
