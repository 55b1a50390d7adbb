"""Arms of `few_labels` that the project itself does not offer: everything trained, and muNet's rule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pathways.adding.baselines import silent
from pathways.adding.fit import fit, make_recipe, metric_of
from pathways.adding.search import choose, reference
from pathways.adding.start import reference_submodel, touched
from pathways.data import cache_folder, encode_tasks, fit_tasks, streams_of
from pathways.model import Model
from pathways.search.arena import Arena, with_params
from pathways.search.folds import Fold, Folds
from pathways.search.genotype import Genotype
from pathways.search.ground import make_ground
from tasks.cache import EncodedSplit
from tasks.fitted import FittedTask
from tasks.spec import Task

TRAININGS = 16
CLONE_CHANCE = 0.2
"""That muNet's mutation turns a layer from frozen to cloned and trained, or back."""


def _prepared(trunk: Path, task: Task) -> tuple[Model, FittedTask, list[EncodedSplit]]:
    model, fitted = Model.open(trunk), fit_tasks([task])[0]
    folder, settings = cache_folder() / "encoded", model.config.encoders
    return (
        model,
        fitted,
        [encode_tasks([fitted], split, model.tokenizer, settings, folder)[0] for split in ("train", "valid", "test")],
    )


def full_fine_tuning(trunk: Path, task: Task, seed: int) -> float:
    """Every parameter of the root pathway trains, experts and trunk too, in as many steps as one fine-tuning."""
    model, fitted, (train, valid, test) = _prepared(trunk, task)
    sub = reference_submodel(model, fitted, streams_of(fitted), reference(model), seed)
    recipe = make_recipe(model.config, train, None, None, seed)
    with silent(recipe) as monitor:
        trained, _ = fit(sub, train, valid, recipe, monitor)
    return metric_of(trained, test)


def munet(trunk: Path, task: Task, seed: int) -> float:
    """muNet's rule (Gesmundo and Dean 2022), given 16 whole trainings: a parent drawn by chance, each layer frozen or
    cloned and trained, an untrained head, survival by validation score."""
    model, fitted, (train, valid, test) = _prepared(trunk, task)
    borrowed = reference_submodel(model, fitted, streams_of(fitted), reference(model), seed)
    choice = choose(model, borrowed, train, per_layer=8, seed=seed)
    recipe = make_recipe(model.config, train, None, None, seed)
    ground = make_ground(model, borrowed, choice, touched(model, train), new_experts=8, rank=0, users=1, seed=seed)
    arena = Arena(ground.start, replace(recipe, config=recipe.config))
    folds, rng = Folds(fitted, train, valid, model.config.train.eval_rows, seed), np.random.default_rng(seed)
    fold: Fold = folds.folds[0]
    ranked = tuple(len(layer) for layer in choice.ranked)
    bases, best, leader = list(ground.bases), None, None
    for _ in range(TRAININGS):
        if leader is None:
            one = Genotype(bases[int(rng.integers(len(bases)))], ("copy",) * len(ranked), ranked, True)
        else:
            genes = tuple(_flipped(gene) if rng.random() < CLONE_CHANCE else gene for gene in leader.genes)
            one = replace(leader, genes=genes, encoder=leader.encoder != (rng.random() < CLONE_CHANCE))
        steps = recipe.config.steps
        looks = sorted({max(1, steps * i // 4) for i in range(1, 5)})
        found = arena.train(ground.candidate(one), ground.rates(one), fold.train, fold.held, steps, looks)
        look = max(found, key=lambda look: look.score)
        if best is None or look.score > best.score:
            best, leader = look, one
    assert best is not None
    assert leader is not None
    return metric_of(with_params(ground.candidate(leader), best.params), test)


def _flipped(gene: str) -> str:
    return "reuse" if gene == "copy" else "copy"
