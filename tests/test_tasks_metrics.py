"""Metrics against scikit-learn and against cases worked by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sk
from tolerance import assert_close

from tasks import metrics
from tasks.spec import METRICS, Target, Task


def fitted(kind, classes=(), names=()):
    task = Task(name="t", train="t.csv", target=Target(("y",), kind), metrics=names)
    return SimpleNamespace(task=task, classes=tuple(classes))


def probabilities(rng, n, c):
    p = rng.random((n, c))
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("c", [2, 5])
def test_classification_equals_scikit_learn(c):
    rng = np.random.default_rng(c)
    p, true = probabilities(rng, 200, c), rng.integers(c, size=200)
    task = fitted("classification", [f"c{i}" for i in range(c)])
    got = metrics.compute(task, p, np.eye(c)[true], names=["accuracy", "macro_f1", "roc_auc", "cross_entropy"])
    auc = sk.roc_auc_score(true, p[:, 1]) if c == 2 else sk.roc_auc_score(true, p, multi_class="ovr", average="macro")
    desired = {
        "accuracy": sk.accuracy_score(true, p.argmax(1)),
        "macro_f1": sk.f1_score(true, p.argmax(1), average="macro"),
        "roc_auc": auc,
        "cross_entropy": sk.log_loss(true, p),
    }
    assert got.keys() == desired.keys()
    assert_close(list(got.values()), list(desired.values()), "float64")
    rows = metrics.per_class(task, p, np.eye(c)[true])
    table = np.array([[r["precision"], r["recall"], r["f1"], r["support"]] for r in rows]).T
    assert_close(table, sk.precision_recall_fscore_support(true, p.argmax(1), zero_division=0), "float64")
    assert np.array_equal(metrics.confusion(task, p, np.eye(c)[true])[:, :-1], sk.confusion_matrix(true, p.argmax(1)))


def test_several_labels_equal_scikit_learn_on_the_known_ones():
    rng = np.random.default_rng(0)
    p, t, mask = rng.random((300, 4)), rng.integers(2, size=(300, 4)), rng.integers(2, size=(300, 4))
    task = fitted("multilabel", "abcd")
    got = metrics.compute(task, p, t, mask)
    known = [mask[:, i] > 0 for i in range(4)]
    auc = np.mean([sk.roc_auc_score(t[k, i], p[k, i]) for i, k in enumerate(known)])
    macro = np.mean([sk.f1_score(t[k, i], p[k, i] >= 0.5) for i, k in enumerate(known)])
    flat = mask > 0
    assert_close(list(got.values()), [auc, macro, sk.f1_score(t[flat], p[flat] >= 0.5)], "float64")
    unmasked = metrics.compute(task, p, t, names=["macro_f1", "micro_f1"])
    desired = [sk.f1_score(t, p >= 0.5, average=average) for average in ("macro", "micro")]
    assert_close(list(unmasked.values()), desired, "float64")


def test_regression_is_a_mean_over_targets_of_the_known_values():
    # target 0: errors 1, -1, known rows 0 and 1 of values 1, 3: rmse 1, mae 1, r2 = 1 - 2/2 = 0
    # target 1: errors 0, 0, 3 of values 0, 0, 3: rmse sqrt(3), mae 1, r2 = 1 - 9/6 = -0.5
    t = np.array([[1.0, 0], [3, 0], [99, 3]])
    p = np.array([[2.0, 0], [2, 0], [0, 0]])
    mask = np.array([[1, 1], [1, 1], [0, 1]])
    got = metrics.compute(fitted("regression"), p, t, mask)
    assert_close([got["rmse"], got["mae"], got["r2"]], [(1 + 3**0.5) / 2, 1, -0.25], "float64")


def test_spans_as_conlleval_counts_them():
    assert metrics.spans(["B-a", "I-a", "O", "I-b", "I-b", "I-a", "B-a"]) == {
        (0, 2, "a"),
        (3, 5, "b"),
        (5, 6, "a"),
        (6, 7, "a"),
    }


def test_tagging_counts_cut_words_as_wrong_and_skips_untagged_ones():
    # words: right, wrong, cut off, without a tag, right: 2 of 4.
    # spans wanted {(0,1,x), (2,3,x)}, found {(0,1,x), (1,2,x)} -> F1 = 2 * 1 / 4
    task = fitted("tagging", ["O", "B-x"])
    true = [np.array([1, 0, 1, -1, 0])]
    guess = [np.array([1, 1, -1, 1, 0])]
    assert metrics.compute(task, guess, true) == {"token_accuracy": 0.5, "span_f1": 0.5}
    for named in ((), METRICS["tagging"]):
        assert metrics.metric_names(fitted("tagging", ["NOUN", "VERB"], named)) == ("token_accuracy",)
    assert metrics.confusion(task, guess, true).tolist() == [[1, 1, 0], [0, 1, 1]]


@given(st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b", "I-b"]), max_size=12))
def test_a_sequence_has_its_own_spans(tags):
    task = fitted("tagging", ["O", "B-a", "I-a", "B-b", "I-b"])
    row = [np.array([task.classes.index(tag) for tag in tags], int)]
    value = metrics.compute(task, row, row)["span_f1"]
    assert value == 1 if any(tag != "O" for tag in tags) else np.isnan(value)
    covered = sum(end - begin for begin, end, _ in metrics.spans(tags))
    assert covered == sum(tag != "O" for tag in tags)


@pytest.mark.parametrize(
    ("kind", "p", "t", "names"),
    [
        ("classification", [[0.9, 0.1]] * 3, [[1, 0]] * 3, {"roc_auc"}),
        ("multilabel", [[0.1]] * 3, [[0]] * 3, {"roc_auc", "micro_f1"}),
        ("regression", [[1.0]] * 3, [[1.0]] * 3, {"r2"}),
        ("classification", np.zeros((0, 2)), np.zeros((0, 2)), {"accuracy", "macro_f1", "roc_auc"}),
    ],
)
def test_an_undefined_metric_is_nan_with_a_reason(kind, p, t, names):
    values, reasons = metrics.compute_with_reasons(fitted(kind, "ab"[: np.shape(t)[1]]), np.array(p), np.array(t))
    assert {name for name, value in values.items() if np.isnan(value)} == names == set(reasons)
    assert all(len(reason) > 10 for reason in reasons.values())


def test_every_metric_a_task_may_name_can_be_computed():
    for kind, names in METRICS.items():
        assert set(names) <= set(metrics._FUNCTIONS[kind])


def test_groups_and_worst_and_score():
    task = fitted("classification", "ab")
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.99, 0.01]])
    t = np.eye(2)[[0, 0, 1, 1]]
    rows = metrics.per_group(task, p, t, ["x", "y", "x", "x"], names=["accuracy"])
    assert rows == [{"group": "x", "examples": 3, "accuracy": 2 / 3}, {"group": "y", "examples": 1, "accuracy": 1.0}]
    assert metrics.worst(task, p, t, count=2).tolist() == [3, 1]
    assert metrics.score(task, {"accuracy": 0.75}) == 0.75
    assert metrics.score(fitted("regression"), {"rmse": 2.0}) == -2.0
    assert metrics.score(task, {"accuracy": float("nan")}) == float("-inf")
