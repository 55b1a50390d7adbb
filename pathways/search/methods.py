"""How the space of candidates is walked: successive halving with mutations of the leaders, or a REINFORCE controller.

Both only ask for candidates to be tried and look at rewards, so they are tested without a network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pathways.search.genotype import Gene, Genotype, Space

Try = Callable[[Genotype, int, int], float]
"""`(candidate, rung, steps) -> reward`; 0 for one that breaks a limit."""


@dataclass(frozen=True)
class Rung:
    """So many candidates are trained for so large a part of a fine-tuning."""

    candidates: int
    part: float


RUNGS: dict[str, tuple[Rung, ...]] = {
    "low": (Rung(4, 1 / 8), Rung(2, 1 / 4)),
    "medium": (Rung(8, 1 / 16), Rung(4, 1 / 8), Rung(2, 1 / 4)),
    "high": (Rung(16, 1 / 16), Rung(6, 1 / 8), Rung(2, 1 / 4)),
}
"""By effort; in all 1, 1.5 and 2.25 fine-tunings."""
HOPELESS = 0.8
"""A candidate is not carried further below so much of the leader's reward."""
STEP, DECAY = 0.5, 0.8
"""Of the controller: its learning rate, and how much of the old mean reward its baseline keeps."""


def steps_of(rung: Rung, steps: int) -> int:
    """Optimizer steps of a trial, given those of a whole fine-tuning."""
    return max(1, round(rung.part * steps))


def evolve(
    first: Sequence[Genotype], space: Space, rungs: Sequence[Rung], steps: int, attempt: Try, seed: int
) -> Genotype:
    """Successive halving (Jamieson and Talwalkar 2016) in which half of each rung's places go to mutated leaders.

    Args:
        first: candidates of the first rung, the best guesses first; filled up with mutations of them.
        steps: of a whole fine-tuning.

    Returns:
        the leader of the last rung.
    """
    rng = np.random.default_rng([seed, 17])
    population = _filled(list(first)[: rungs[0].candidates], rungs[0].candidates, space, rng, ())
    seen = set(population)
    ranked = population
    for number, rung in enumerate(rungs):
        if number:
            kept = max(1, rung.candidates // 2) if number + 1 < len(rungs) else rung.candidates
            population = _filled(ranked[:kept], rung.candidates, space, rng, seen)
            seen |= set(population)
        rewards = {one: attempt(one, number, steps_of(rung, steps)) for one in population}
        ranked = sorted(population, key=lambda one: -rewards[one])
        ranked = [one for one in ranked if rewards[one] >= HOPELESS * rewards[ranked[0]]]
    return ranked[0]


def _filled(
    leaders: list[Genotype], size: int, space: Space, rng: np.random.Generator, seen: Sequence[Genotype] | set[Genotype]
) -> list[Genotype]:
    """Leaders and mutations of them in turn, none twice; fewer where the space is exhausted."""
    found = list(dict.fromkeys(leaders))
    parents = list(found)
    for turn in range(20 * size):
        if len(found) >= size:
            break
        child = space.mutated(parents[turn % len(parents)], rng)
        if child not in found and child not in seen:
            found.append(child)
    return found


def reinforce(
    first: Sequence[Genotype], space: Space, rungs: Sequence[Rung], steps: int, attempt: Try, seed: int
) -> Genotype:
    """A controller with one categorical per choice, trained by REINFORCE (Williams 1992) with a moving baseline.

    It is given as many steps as the rungs of `evolve` take: all but the last rung's for drawn candidates, each for as
    long as one of the first rung, then the last rung's for those it has rewarded most.
    """
    rng = np.random.default_rng([seed, 19])
    sizes = [len(space.bases), 2 if space.encoder else 1]
    sizes += [len(space.genes)] * space.layers + [2] * space.layers
    logits, baseline = [np.zeros(size) for size in sizes], None
    draws = round(sum(rung.candidates * rung.part for rung in rungs[:-1]) / rungs[0].part)
    rewards: dict[Genotype, float] = {}
    for turn in range(draws):
        if turn < len(first):
            picks = _picks(first[turn], space)
        else:
            picks = [int(rng.choice(len(row), p=_softmax(row))) for row in logits]
        one = _genotype(picks, space)
        if one not in rewards:
            rewards[one] = attempt(one, 0, steps_of(rungs[0], steps))
        found = rewards[one]
        baseline = found if baseline is None else DECAY * baseline + (1 - DECAY) * found
        spread = max(float(np.std(list(rewards.values()))), 1e-6)
        for row, pick in zip(logits, picks, strict=True):
            slope = -_softmax(row)
            slope[pick] += 1.0
            row += STEP * (found - baseline) / spread * slope
    leaders = sorted(rewards, key=lambda one: -rewards[one])[: rungs[-1].candidates]
    last = {one: attempt(one, len(rungs) - 1, steps_of(rungs[-1], steps)) for one in leaders}
    return max(leaders, key=lambda one: last[one])


def _genotype(picks: Sequence[int], space: Space) -> Genotype:
    """Of a layer's experts the controller keeps all, or the better half."""
    layers = space.layers
    halves = [max(min(space.least, most), (most + 1) // 2) for most in space.ranked]
    experts = [(most, half)[pick] for most, half, pick in zip(space.ranked, halves, picks[2 + layers :], strict=True)]
    genes: tuple[Gene, ...] = tuple(space.genes[pick] for pick in picks[2 : 2 + layers])
    return Genotype(space.bases[picks[0]], genes, tuple(experts), space.encoder and picks[1] == 0)


def _picks(one: Genotype, space: Space) -> list[int]:
    fewer = [int(kept < most) for kept, most in zip(one.experts, space.ranked, strict=True)]
    genes = [space.genes.index(gene) for gene in one.genes]
    return [space.bases.index(one.base), int(space.encoder and not one.encoder), *genes, *fewer]


def _softmax(row: np.ndarray) -> np.ndarray:
    wide = np.exp(row - row.max())
    return wide / wide.sum()
