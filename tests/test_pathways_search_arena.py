"""The network of all candidates: what each computes, what each trains, and what is left of it as a small pathway."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pathways_adding_add import clouds
from tiny import make_config, make_tasks

from pathways.adding import plan_task, search, start
from pathways.adding.commit import new_parameters, take_apart
from pathways.adding.fit import make_recipe, own_part
from pathways.config import GateOptions
from pathways.data import encode_tasks, fit_tasks, streams_of
from pathways.model import Model
from pathways.predictions import predict_examples
from pathways.quality import Chosen
from pathways.search.arena import Arena, Look, best_of, between, with_params
from pathways.search.features import activations
from pathways.search.find import Method, Options, Search
from pathways.search.folds import Folds
from pathways.search.genotype import Genotype
from pathways.search.ground import ROOT, Ground, laid_over, make_ground
from pathways.search.head import head_start
from pathways.training.joint import train
from tasks.errors import UserError

MIXED = Genotype(ROOT, ("copy", "adapter"), (3, 2), True)
OTHER = Genotype(ROOT, ("skip", "fresh"), (3, 3), False)
PLAIN = Genotype(ROOT, ("reuse", "reuse"), (3, 3), False)


def lay_out(model: Model, folder: Path, cache: Path) -> tuple[Ground, Folds, Arena]:
    """The clouds as a new task of a model."""
    fitted = fit_tasks([clouds(folder)])[0]
    train, valid = (
        encode_tasks([fitted], split, model.tokenizer, model.config.encoders, cache)[0] for split in ("train", "valid")
    )
    borrowed = start.reference_submodel(model, fitted, streams_of(fitted), ("base", "base"), 0)
    choice = search.choose(model, borrowed, train, per_layer=3, seed=0)
    copied = start.touched(model, train)
    ground = make_ground(model, borrowed, choice, copied, new_experts=2, rank=2, users=4, seed=0)
    arena = Arena(ground.start, make_recipe(model.config, train, 8, 0.01, 0))
    return ground, Folds(fitted, train, valid, 50, 0), arena


@pytest.fixture(scope="module")
def made(
    tiny_model: Model, tmp_path_factory: pytest.TempPathFactory, cache_folder: Path
) -> tuple[Ground, Folds, Arena]:
    return lay_out(tiny_model, tmp_path_factory.mktemp("clouds"), cache_folder)


def rows(folds: Folds) -> Chosen:
    return Chosen(folds.train, range(20))


def said(sub: Any, folds: Folds) -> np.ndarray:
    return predict_examples(sub, {sub.names[0]: rows(folds)})[sub.names[0]].values


def test_the_network_says_what_the_head_start_said(made: tuple[Ground, Folds, Arena]) -> None:
    ground, folds, _ = made
    found = activations(ground.candidate(PLAIN), rows(folds))
    head = head_start(folds.fitted, found)
    logits = head.logits(found)
    expected = np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    assert head.taps.any()
    assert np.allclose(said(ground.candidate(PLAIN, head), folds), expected, atol=1e-4)


def test_what_is_silent_changes_nothing(made: tuple[Ground, Folds, Arena]) -> None:
    ground, folds, _ = made
    head = head_start(folds.fitted, activations(ground.candidate(PLAIN), rows(folds)))
    plain = said(ground.candidate(PLAIN, head), folds)
    for genes in (("adapter", "adapter"), ("copy", "copy")):
        assert np.allclose(said(ground.candidate(replace(PLAIN, genes=genes), head), folds), plain, atol=1e-5)
    skipped = said(ground.candidate(replace(PLAIN, genes=("skip", "skip")), head), folds)
    assert np.abs(skipped - plain).max() > 1e-3


@pytest.mark.parametrize("one", [MIXED, OTHER, PLAIN], ids=str)
def test_training_moves_what_the_candidate_may_and_its_small_pathway_says_the_same(
    made: tuple[Ground, Folds, Arena], one: Genotype
) -> None:
    ground, folds, arena = made
    begin = ground.candidate(one, head_start(folds.fitted, activations(ground.candidate(one), rows(folds))))
    looks = arena.train(begin, ground.rates(one), rows(folds), rows(folds), 8, [8])
    assert [look.step for look in looks] == [8]
    trained = with_params(begin, looks[-1].params)
    before, after = ({p: np.asarray(v) for p, v in sub.flat().items()} for sub in (begin, trained))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert ("taps", "kernel") in moved
    assert any("adapter_out" in path for path in moved) == ("adapter" in one.genes)
    assert any("banks" in path for path in moved) == bool({"copy", "fresh"} & set(one.genes))
    assert any(path[0] == "encoders" for path in moved) == one.encoder
    for path in moved:
        if "banks" in path:
            assert np.array_equal(before[path][:3], after[path][:3]), path
    small = ground.compact(one, trained)
    assert np.allclose(said(small.sub, folds), said(trained, folds), atol=1e-5)
    assert [sorted(layer.get("mlp", ())) for layer in small.gate.candidates] == {
        MIXED: [[search_slot(ground, 0, 2), 4, 5], sorted(search_slot(ground, 1, i) for i in range(2))],
        OTHER: [[], [*sorted(search_slot(ground, 1, i) for i in range(3)), 4, 5]],
        PLAIN: [sorted(search_slot(ground, layer, i) for i in range(3)) for layer in range(2)],
    }[one]
    numbers = new_parameters(*take_apart(small, small.sub))
    assert numbers == ground.cost(one).private
    # A layer without experts still has the columns of its gate that the network's shape asks for.
    padding = 2 * 32 * one.genes.count("skip")
    assert own_part(small).count(small.sub.params) == numbers + padding


def search_slot(ground: Ground, layer: int, rank: int) -> int:
    return ground.choice.ranked[layer][rank][1]


def test_a_copy_starts_as_its_parent(made: tuple[Ground, Folds, Arena]) -> None:
    ground = made[0]
    reused, own, copied = ground.allowed(MIXED, 0)
    assert (len(reused), own) == (1, [("mlp", 4), ("mlp", 5)])
    assert copied == list(ground.choice.ranked[0][:2])
    flat, experts = ground.candidate(MIXED).flat(), ground.start.sub.layout.experts[0]["mlp"].tolist()
    bank = np.asarray(flat["layers", 0, "routed", "banks", "mlp", "w_in"])
    for (_, new), (_, old) in zip(own, copied, strict=True):
        assert np.array_equal(bank[experts.index(new)], bank[experts.index(old)])


def test_all_candidates_share_one_compiled_step(made: tuple[Ground, Folds, Arena]) -> None:
    ground, folds, arena = made
    for one, steps in ((MIXED, 2), (OTHER, 3), (PLAIN, 2)):
        arena.train(ground.candidate(one), ground.rates(one), rows(folds), (), steps, [steps])
    assert arena._step._cache_size() == 1


def test_a_candidate_over_the_limit_is_not_trained(made: tuple[Ground, Folds, Arena]) -> None:
    ground, folds, arena = made
    limit = ground.cost(PLAIN).private
    hunt = Search(ground, arena, folds, Options(max_parameters=limit))
    spent = arena.spent
    assert hunt.attempt(MIXED, 0, 2) == 0.0
    assert arena.spent == spent
    assert hunt.permitted(PLAIN)
    assert not replace(hunt, options=Options(max_parameters=limit - 1)).permitted(PLAIN)


def limited(made: tuple[Ground, Folds, Arena], most: int) -> Search:
    return Search(made[0], made[2], made[1], Options(max_parameters=most))


def test_the_frozen_pathway_leaves_out_experts_until_it_keeps_the_limit(made: tuple[Ground, Folds, Arena]) -> None:
    ground = made[0]
    # Of three ranked experts in each of two layers, four are the fewest in all: the gate takes two of a row.
    kept = {(3, 3): 0, (2, 3): 1, (2, 2): 2}
    for experts, left_out in kept.items():
        most = ground.cost(PLAIN).private - left_out * 32
        assert limited(made, most).plain(ROOT) == replace(PLAIN, experts=experts)
        assert limited(made, most).first(ROOT) == [limited(made, most).plain(ROOT)]
    least = ground.cost(replace(PLAIN, experts=(2, 2))).private
    with pytest.raises(UserError, match=f"at least {least}") as refused:
        limited(made, least - 1).plain(ROOT)
    assert (refused.value.where, refused.value.got) == ("--max-parameters", str(least - 1))


@pytest.mark.parametrize("method", ["none", "evolution", "reinforce"])
def test_whatever_is_chosen_keeps_the_limit(
    made: tuple[Ground, Folds, Arena], method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    hunt = limited(made, made[0].cost(replace(PLAIN, experts=(2, 2))).private)
    hunt.options = replace(hunt.options, method=method)
    # A walk that likes best what is over the limit.
    monkeypatch.setattr(hunt, "attempt", lambda one, *_: float(not hunt.permitted(one)))
    assert hunt.permitted(hunt.choose(ROOT))


def test_too_small_a_limit_is_refused_before_anything_is_trained(
    tiny_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Arena, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match="at least"):
        plan_task(tiny_model.path, clouds(tmp_path), max_parameters=1)


GATES = [GateOptions("noisy_top_k", "task_embedding", 2), GateOptions("sigmoid_top_k", "shared", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.kind)
def test_the_cost_is_what_a_commit_adds(gate: GateOptions, tmp_path: Path, cache_folder: Path) -> None:
    # A model of text alone: the clouds' encoder is made for them.
    config = make_config(make_tasks(tmp_path / "data", ["mood"]), train={"steps": 1})
    config = replace(config, model=replace(config.model, gate=gate))
    ground, _, _ = lay_out(train(config, tmp_path / "model", quiet=True), tmp_path / "clouds", cache_folder)
    extra = {"noisy_top_k": "noise", "sigmoid_top_k": "bias"}[gate.kind]
    for one in (replace(MIXED, encoder=False), OTHER, PLAIN):
        small = ground.compact(one, ground.candidate(one))
        whole, own = take_apart(small, small.sub)
        assert {name.split("/")[-1] for name in whole} >= {"gate", extra}
        assert any(name.startswith("encoders/table/") for name in whole)
        assert (f"heads/{small.entry.name}/embedding" in whole) == (gate.scope == "task_embedding")
        assert ground.cost(one).private == new_parameters(whole, own)


def test_only_the_best_look_keeps_its_parameters(
    made: tuple[Ground, Folds, Arena], monkeypatch: pytest.MonkeyPatch
) -> None:
    ground, folds, arena = made
    scores = {1: 0.2, 2: 0.7, 3: 0.1, 4: 0.7}

    def look(candidate: Any, held: Any, step: int = 0) -> Look:
        return Look(step, scores[step], 0.0, np.zeros(0), candidate.params)

    monkeypatch.setattr(arena, "look", look)
    looks = arena.train(ground.candidate(PLAIN), ground.rates(PLAIN), rows(folds), rows(folds), 4, [1, 2, 3, 4])
    assert [look.score for look in looks] == list(scores.values())
    assert [look.step for look in looks if look.params is not None] == [2] == [best_of(looks).step]


def test_the_way_between_two_parameters(made: tuple[Ground, Folds, Arena]) -> None:
    zero, one = {"a": np.zeros(3, np.float32)}, {"a": np.ones(3, np.float32)}
    assert np.allclose(between(zero, one, 0.25)["a"], 0.25)
    assert between(zero, one, 1.0) is one


def test_values_are_laid_over_a_copy(made: tuple[Ground, Folds, Arena]) -> None:
    sub = made[0].start.sub
    name = f"heads/{sub.names[0]}/bias"
    laid = laid_over(sub, {name: np.full(2, 3.0, np.float32)}, {})
    assert np.asarray(laid.flat()["heads", "bias"]).tolist() == [3.0, 3.0]
    assert not np.asarray(sub.flat()["heads", "bias"]).any()
