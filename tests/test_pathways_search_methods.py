"""Candidates as data, how the space is walked, and when a difference is believed. No network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathways.search.find import EFFORTS, METHODS, Options, budget
from pathways.search.folds import FOLDS, Folds, lower_bound
from pathways.search.genotype import GENES, TRAINED_EXPERTS, Cost, Genotype, Space, reward
from pathways.search.methods import RUNGS, Rung, evolve, reinforce, steps_of
from tasks.encoded import Example
from tasks.fitted import FittedTask
from tasks.spec import Target, Task

SPACE = Space(("root", "near"), GENES, (8, 8, 4), 2, True)


@given(seed=st.integers(0, 999))
def test_a_mutation_changes_one_thing_and_stays_in_the_space(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parent = SPACE.random(rng)
    child = SPACE.mutated(parent, rng)
    changes = [
        *(a != b for a, b in zip(parent.genes, child.genes, strict=True)),
        *(a != b for a, b in zip(parent.experts, child.experts, strict=True)),
        parent.base != child.base,
        parent.encoder != child.encoder,
    ]
    assert sum(changes) == 1
    assert set(child.genes) <= set(GENES)
    assert all(2 <= kept <= most for kept, most in zip(child.experts, SPACE.ranked, strict=True))


def test_experts_are_left_out_down_to_the_fewest() -> None:
    space = Space(("root",), ("reuse",), (4, 3, 1), 2, False)
    one, seen = space.plain("reuse"), []
    while (fewer := space.fewer(one)) is not None:
        one = fewer
        seen.append(one.experts)
    assert seen == [(3, 3, 1), (2, 3, 1), (2, 2, 1)]


def test_a_space_of_one_candidate_is_walked_without_end() -> None:
    alone = Space(("root",), ("reuse",), (2,), 2, False)
    one = alone.plain("reuse")
    assert alone.mutated(one, np.random.default_rng(0)) == one
    assert evolve([one], alone, RUNGS["low"], 8, lambda *_: 1.0, 0) == one


def test_the_reward_by_hand() -> None:
    root = Cost(private=100, shared=100.0, operations=50.0)
    # Twice the parameters and the same operations: 0.99 ** (2 + 1), of exp(0) = 1.
    assert reward(0.0, Cost(300, 100.0, 50.0), root) == pytest.approx(0.99**3)
    assert reward(np.log(2.0), root, root) == pytest.approx(2 * 0.99**2)
    assert reward(float("nan"), root, root) == reward(float("-inf"), root, root) == 0.0


def rewarding(one: Genotype) -> float:
    """Rises with every layer that has experts of its own, and with the other base."""
    return 1.0 + 0.2 * sum(gene in TRAINED_EXPERTS for gene in one.genes) + 0.1 * (one.base == "near")


@pytest.mark.parametrize("walk", [evolve, reinforce])
@pytest.mark.parametrize("effort", EFFORTS)
def test_both_walks_find_better_than_they_are_given_within_the_budget(walk: Any, effort: str) -> None:
    asked: list[tuple[Genotype, int, int]] = []

    def attempt(one: Genotype, rung: int, steps: int) -> float:
        asked.append((one, rung, steps))
        return rewarding(one)

    first = [SPACE.plain("reuse"), SPACE.plain("adapter")]
    best = walk(first, SPACE, RUNGS[effort], 160, attempt, 3)
    assert rewarding(best) == max(rewarding(one) for one, rung, _ in asked if rung == max(r for _, r, _ in asked))
    if effort != "low":
        assert rewarding(best) > rewarding(first[0])
    spent = sum(steps for *_, steps in asked)
    assert spent <= 160 * sum(rung.candidates * rung.part for rung in RUNGS[effort])
    again: list[Any] = []
    assert walk(first, SPACE, RUNGS[effort], 160, lambda *a: (again.append(a), rewarding(a[0]))[1], 3) == best
    assert again == asked


def test_a_hopeless_candidate_is_cut() -> None:
    good, bad = SPACE.plain("reuse"), SPACE.plain("skip")
    seen: list[tuple[Genotype, int]] = []

    def attempt(one: Genotype, rung: int, steps: int) -> float:
        seen.append((one, rung))
        return 1.0 if one == good else 0.1

    assert evolve([good, bad], SPACE, (Rung(2, 0.1), Rung(2, 0.2)), 10, attempt, 0) == good
    assert (bad, 0) in seen
    assert (bad, 1) not in seen


def test_the_controller_learns_what_is_rewarded() -> None:
    drawn: list[Genotype] = []

    def attempt(one: Genotype, rung: int, steps: int) -> float:
        drawn.append(one)
        return 1.0 + sum(gene == "adapter" for gene in one.genes)

    reinforce([], SPACE, (Rung(60, 1 / 60), Rung(1, 0.1)), 60, attempt, 1)
    share = [np.mean([gene == "adapter" for one in part for gene in one.genes]) for part in (drawn[:15], drawn[-15:])]
    assert share[1] > share[0] + 0.1


def test_no_search_costs_more_than_five_fine_tunings() -> None:
    for method in METHODS:
        for effort in EFFORTS:
            for few in (False, True):
                assert budget(Options(method, effort), few) <= 5
    assert steps_of(Rung(1, 1 / 16), 4) == 1


def test_the_lower_bound_of_a_gain() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    assert lower_bound(noise + 1.0, noise) == pytest.approx(1.0)
    assert lower_bound(noise, rng.normal(size=200)) < 0
    assert lower_bound(np.ones(1), np.zeros(1)) == -np.inf


class Rows:
    """A split of so many rows with classes in turn."""

    def __init__(self, n: int, classes: int = 3) -> None:
        self.y = np.eye(classes, dtype=np.float32)[np.arange(n) % classes]

    def __len__(self) -> int:
        return len(self.y)

    def example(self, i: int) -> Example:
        return Example({}, {}, self.y[i], np.ones_like(self.y[i]))


def folds(train: int, valid: int, classes: int = 3) -> Folds:
    names = tuple("abcdefgh"[:classes])
    fitted = FittedTask(Task("t", "t.csv", Target(("c",), "classification")), classes=names)
    splits: Any = (Rows(train, classes), Rows(valid, classes))
    return Folds(fitted, *splits, eval_rows=500, seed=0)


@pytest.mark.parametrize(
    ("train", "valid", "few", "tiny"),
    [
        (12, 2, True, True),
        (12, 3, True, False),
        (350, 40, True, False),
        (900, 150, False, False),
        (900, 0, True, False),
    ],
)
def test_how_rows_are_used_follows_from_their_number(train: int, valid: int, few: bool, tiny: bool) -> None:
    # 12 + 2 rows of 3 classes are fewer than 5 a class, 12 + 3 are not.
    found = folds(train, valid)
    assert (found.few, found.tiny) == (few, tiny)


def test_folds_hold_out_every_row_once_and_each_has_all_classes() -> None:
    found = folds(30, 6)
    assert len(found.folds) == FOLDS
    out = np.concatenate([np.setdiff1d(np.arange(36), fold.places) for fold in found.folds])
    assert sorted(out) == list(range(36))
    for fold in found.folds:
        assert len(fold.train) == len(fold.places) == 24
        assert np.sum([one.y for one in fold.held], axis=0).tolist() == [4, 4, 4]


def test_with_many_rows_validation_judges() -> None:
    found = folds(1000, 200)
    assert len(found.folds) == 1
    assert (len(found.rows), len(found.folds[0].train), len(found.folds[0].held)) == (1000, 1000, 200)
