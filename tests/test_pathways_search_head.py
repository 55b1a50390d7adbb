"""The head start: ridge in closed form against refits, its choice of penalty, and its place in a head with taps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathways.search import head as heads
from pathways.search.features import Features
from pathways.search.head import head_start, row_losses
from pathways.search.ridge import ridge_path
from tasks.fitted import FittedTask
from tasks.spec import Target, Task


def fitted(kind: Any, outputs: int) -> FittedTask:
    names = tuple(f"c{i}" for i in range(outputs))
    columns = names if kind in ("regression", "multilabel") else ("c",)
    return FittedTask(Task("x", "x.csv", Target(columns, kind)), classes=() if kind == "regression" else names)


def features(n: int, outputs: int, seed: int = 0, levels: int = 6, width: int = 3) -> Features:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, levels + width))
    y = (x @ rng.normal(size=(levels + width, outputs))).astype(np.float32)
    return Features(x[:, :levels], x[:, levels:], y, np.ones_like(y))


@given(n=st.integers(3, 12), f=st.integers(1, 12), penalty=st.floats(1e-3, 10), seed=st.integers(0, 99))
def test_leave_one_out_is_what_a_refit_without_the_row_says(n: int, f: int, penalty: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, f)), rng.normal(size=(n, 2))
    found = next(ridge_path(x, y, [penalty]))
    weight = penalty * np.mean(np.sum((x - x.mean(axis=0)) ** 2, axis=1))
    for i in range(n):
        rest = np.arange(n) != i
        mean, target = x[rest].mean(axis=0), y[rest].mean(axis=0)
        centred = x[rest] - mean
        kernel = np.linalg.solve(centred.T @ centred + weight * np.eye(f), centred.T @ (y[rest] - target))
        assert np.allclose(found.out[i], (x[i] - mean) @ kernel + target, atol=1e-8)


def test_the_fit_itself_solves_the_normal_equations_whichever_side_is_longer() -> None:
    rng = np.random.default_rng(1)
    for n, f in ((20, 4), (4, 20)):
        x, y = rng.normal(size=(n, f)), rng.normal(size=(n, 3))
        found = next(ridge_path(x, y, [0.5]))
        centred = x - x.mean(axis=0)
        weight = 0.5 * np.mean(np.sum(centred**2, axis=1))
        kernel = np.linalg.solve(centred.T @ centred + weight * np.eye(f), centred.T @ (y - y.mean(axis=0)))
        assert np.allclose(found.kernel, kernel, atol=1e-10)
        assert np.allclose(found.bias, y.mean(axis=0) - x.mean(axis=0) @ kernel, atol=1e-10)


def test_a_regression_of_two_rows_by_hand() -> None:
    # x = -1, 1 and y = 0, 2: centred y is -1, 1. A penalty of 1 is of the mean squared row, 1: the kernel is
    # 2 / (2 + 1) = 2/3, the bias 1. Without either row only the other's value is left: 2 and 0.
    found = next(ridge_path(np.array([[-1.0], [1.0]]), np.array([[0.0], [2.0]]), [1.0]))
    assert found.kernel == pytest.approx(np.array([[2 / 3]]))
    assert found.bias == pytest.approx([1.0])
    assert found.out == pytest.approx(np.array([[2.0], [0.0]]))


def test_a_linear_rule_is_found_and_its_arrays_say_what_the_fit_says() -> None:
    found = features(80, 2)
    head = head_start(fitted("regression", 2), found)
    assert head.features == "all layers"
    assert head.taps.shape == (2, 6)
    assert head.kernel.shape == (2, 3)
    assert np.abs(head.logits(found) - found.y).mean() < 0.1 * np.abs(found.y).mean()
    parts = head.components("t")
    assert {name: value.shape for name, value in parts.items()} == {
        "heads/t/kernel": (2, 3),
        "heads/t/bias": (2,),
        "heads/t/taps": (2, 6),
    }


def test_noise_is_met_with_a_strong_penalty() -> None:
    found = replace(features(40, 1, seed=3), y=np.random.default_rng(4).normal(size=(40, 1)).astype(np.float32))
    assert head_start(fitted("regression", 1), found).penalty >= heads.USUAL


def test_classes_are_told_apart_and_levels_that_are_not_there_are_not_used() -> None:
    found = features(90, 3)
    y = np.eye(3, dtype=np.float32)[found.y.argmax(axis=1)]
    head = head_start(fitted("classification", 3), replace(found, y=y))
    assert (head.logits(found).argmax(axis=1) == y.argmax(axis=1)).mean() > 0.85
    assert head.losses.mean() < 0.7 * np.log(3)
    bare = head_start(fitted("classification", 3), replace(found, y=y, levels=found.levels[:, :0]))
    assert bare.features == "last rows"
    assert bare.taps.shape == (3, 0)


def test_labels_that_are_not_known_say_nothing() -> None:
    found = features(60, 2)
    y = (found.y > 0).astype(np.float32)
    mask = np.ones_like(y)
    mask[::3, 1] = 0
    wild = np.where(mask > 0, y, 1 - y)
    ours, theirs = (head_start(fitted("multilabel", 2), replace(found, y=v, y_mask=mask)) for v in (y, wild))
    assert np.array_equal(ours.kernel, theirs.kernel)
    assert ours.losses.mean() < np.log(2)
    nothing = mask * [1, 0]
    silent = head_start(fitted("multilabel", 2), replace(found, y=y, y_mask=nothing))
    assert not silent.taps[1].any()


def test_one_row_and_rows_of_one_class_have_a_head() -> None:
    one = features(1, 2)
    head = head_start(fitted("classification", 2), replace(one, y=np.array([[0, 1]], np.float32)))
    assert head.logits(one).argmax() == 1
    assert np.isfinite(head.logits(one)).all()


def test_losses_by_hand() -> None:
    # -log softmax of equal logits is log 2; a label at logit 0 costs log 2 whatever it is; (3 - 1)^2 = 4.
    one, both = np.array([[1.0, 0.0]]), np.ones((1, 2))
    assert row_losses("classification", np.zeros((1, 2)), one, both) == pytest.approx([np.log(2)])
    assert row_losses("multilabel", np.zeros((1, 2)), one, both) == pytest.approx([2 * np.log(2)])
    assert row_losses("multilabel", np.zeros((1, 2)), one, one) == pytest.approx([np.log(2)])
    assert row_losses("regression", np.array([[3.0, 9.0]]), np.ones((1, 2)), one) == pytest.approx([4.0])
