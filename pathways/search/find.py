"""The search for a new task's pathway: shortlist, candidates, fine-tuning, growth; each step's cost is counted.

What is found is never worse, on the rows that judge, than the head start on the frozen root pathway: every step is
accepted only against what stood before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from pathways.adding.search import Slot
from pathways.adding.start import Start, fresh_kind
from pathways.search.arena import Arena, Look, best_of, between, with_params
from pathways.search.features import Features, activations
from pathways.search.folds import FOLDS, Fold, Folds, lower_bound
from pathways.search.genotype import GENES, Gene, Genotype, Space, reward
from pathways.search.ground import ROOT, Ground, laid_over
from pathways.search.head import Head, head_start
from pathways.search.methods import RUNGS, evolve, reinforce
from pathways.submodel import SubModel
from tasks.errors import UserError

Method = Literal["none", "evolution", "reinforce"]
Effort = Literal["low", "medium", "high"]
METHODS: tuple[Method, ...] = get_args(Method)
EFFORTS: tuple[Effort, ...] = get_args(Effort)

HEAD_ROWS, TRIAL_ROWS = 5000, 1000
"""Rows that a head start is fitted on, at most: of what is fine-tuned, and of a candidate."""
LOOKS, PATIENCE = 12, 6
PARTS = (0.25, 0.5, 0.75, 1.0)
"""Of the way from the head start to the trained parameters, what is tried."""
GROWTHS = {"low": 0, "medium": 2, "high": 4}
GROWTH_PART = 0.25
"""Of a fine-tuning, what a trial of growth costs."""
REFUSALS = 2


@dataclass(frozen=True)
class Options:
    """What a search may spend and what it may find.

    Attributes:
        method: how candidates are chosen; `none` tries the plain one alone.
        effort: how many candidates and growths are tried.
        max_parameters: the most private parameters; None for no limit.
    """

    method: Method = "evolution"
    effort: Effort = "medium"
    max_parameters: int | None = None


@dataclass(frozen=True)
class Tried:
    """One candidate and what came of it.

    Attributes:
        stage: `shortlist`, `rung 1`, ..., `fine-tune`, `grow`.
        candidate: in words.
        steps: optimizer steps spent on it.
        score: higher is better; within a stage they are comparable.
        reward: the score discounted by its cost.
        parameters: private ones.
        seconds: wall clock.
        note: why it was taken or refused.
    """

    stage: str
    candidate: str
    steps: int
    score: float
    reward: float
    parameters: int
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Found:
    """A pathway.

    Attributes:
        start: its own network, with its parameters.
        genotype: what it is.
        tried: every candidate in the order it was tried.
        steps, whole: optimizer steps in all, and of a whole fine-tuning.
        why: in one sentence.
        copies: per routed layer, the experts that the first of its own ones are copies of.
    """

    start: Start
    genotype: Genotype
    tried: tuple[Tried, ...]
    steps: int
    whole: int
    why: str
    copies: tuple[tuple[Slot, ...], ...]


def budget(options: Options, few: bool) -> float:
    """The most fine-tunings that a search takes.

    With few rows every fold takes one and so do all rows together; else growth comes after the one.
    """
    effort: Effort = "low" if few else options.effort
    rungs = RUNGS[effort] if options.method != "none" else ()
    tuning = FOLDS + 1 if few else 1 + GROWTHS[options.effort] * GROWTH_PART
    return sum(rung.candidates * rung.part for rung in rungs) + tuning


@dataclass
class Search:
    """A search under way.

    Args:
        ground: all candidates.
        arena: where they are trained.
        folds: the rows.
        told: gets every candidate when it has been tried.
    """

    ground: Ground
    arena: Arena
    folds: Folds
    options: Options
    told: Callable[[Tried], None] = lambda tried: None
    tried: list[Tried] = field(default_factory=list)
    _seen: dict[Any, Features] = field(default_factory=dict)

    @property
    def whole(self) -> int:
        """Steps of a whole fine-tuning."""
        return self.arena.recipe.config.steps

    @property
    def space(self) -> Space:
        """What may be chosen from: nothing that trains experts where there is too little to train them on."""
        start, config = self.ground.start, self.ground.model.config.model
        missing = set() if fresh_kind(self.ground.model) and any(start.fresh) else {"copy", "fresh"}
        missing |= set() if start.entry.pathway.adapters else {"adapter"}
        genes: tuple[Gene, ...] = tuple(gene for gene in GENES if gene not in missing)
        ranked = tuple(len(layer) for layer in self.ground.choice.ranked)
        return Space(tuple(self.ground.bases), genes, ranked, config.gate.top_k, bool(start.copied))

    def run(self) -> Found:
        """Finds a pathway; see the module.

        Raises:
            UserError: no pathway keeps the limit of private parameters.
        """
        base = self.shortlist()
        plain = self.plain(base)
        if self.folds.tiny:
            sub = self.ground.candidate(plain, self.head(plain))
            return self._found(plain, sub, "too few labels to train anything but the head")
        chosen = self.choose(base)
        genotype, sub, why = self.tune(chosen, plain)
        if genotype != plain and not self.folds.few:
            genotype, sub, why = self.grow(genotype, sub, why)
        return self._found(genotype, sub, why)

    def shortlist(self) -> str:
        """The base whose frozen rows serve a head best; another than the root only if that is real."""
        heads: dict[str, Head] = {}
        for base in self.ground.bases:
            began = time.monotonic()
            plain = self.plain(base)
            head = self.head(plain, np.arange(min(TRIAL_ROWS, len(self.folds.rows))))
            if head is None:
                return ROOT
            heads[base] = head
            self._note("shortlist", plain, 0, -float(head.losses.mean()), began, head.features)
        best = min(heads, key=lambda base: float(heads[base].losses.mean()))
        return best if lower_bound(heads[ROOT].losses, heads[best].losses, self.folds.seed) > 0 else ROOT

    def choose(self, base: str) -> Genotype:
        """The candidate that is worth a fine-tuning."""
        space, steps, first = self.space, self.whole, self.first(base)
        if self.options.method == "none":
            return first[0]
        walk = evolve if self.options.method == "evolution" else reinforce
        effort: Effort = "low" if self.folds.few else self.options.effort
        found = walk(first, space, RUNGS[effort], steps, self.attempt, self.folds.seed)
        return found if self.permitted(found) else first[0]

    def first(self, base: str) -> list[Genotype]:
        """The candidates that a search begins with, the usual one first; those over the limit are left out."""
        space = self.space
        order: tuple[Gene, ...] = ("fresh", "adapter", "copy", "reuse")
        kinds: list[Gene] = [gene for gene in order if gene in space.genes]
        usual = kinds[0]
        found = [space.plain(gene, base) for gene in kinds]
        found += [space.plain(usual, base, encoder=False)]
        return [one for one in dict.fromkeys(found) if self.permitted(one)] or [self.plain(base)]

    def plain(self, base: str) -> Genotype:
        """Reuse of as many of the ranked experts as the limit of private parameters permits.

        Raises:
            UserError: not even the fewest are permitted.
        """
        one = self.space.plain("reuse", base, encoder=False)
        while not self.permitted(one):
            fewer = self.space.fewer(one)
            if fewer is None:
                raise UserError(
                    "No pathway is so small: a head, norms and a gate of its own are the least that a task adds.",
                    where="--max-parameters",
                    expected=f"at least {self.ground.cost(one).private}",
                    got=str(self.options.max_parameters),
                    fix="raise the limit or leave it out; nothing was committed",
                )
            one = fewer
        return one

    def attempt(self, one: Genotype, rung: int, steps: int) -> float:
        """The reward of a candidate after so many steps; see `methods.Try`."""
        began = time.monotonic()
        if not self.permitted(one):
            return 0.0
        fold = self.folds.folds[rung % len(self.folds.folds)]
        look = self.train(one, fold, steps, [steps])[-1]
        return self._note(f"rung {rung + 1}", one, look.step, look.score, began)

    def permitted(self, one: Genotype) -> bool:
        """Whether it keeps the limit of private parameters."""
        most = self.options.max_parameters
        return most is None or self.ground.cost(one).private <= most

    def train(self, one: Genotype, fold: Fold, steps: int, looks: Sequence[int], seed: int = 0) -> list[Look]:
        """Trains a candidate on a fold from its head start."""
        head = self.head(one, _some(fold.places, TRIAL_ROWS if looks[-1] < self.whole else HEAD_ROWS))
        sub, rates = self.ground.candidate(one, head), self.ground.rates(one)
        begin = self.arena.look(sub, fold.held)
        patience = PATIENCE if len(fold.held) else None
        found = self.arena.train(sub, rates, fold.train, fold.held, steps, looks, seed=seed, patience=patience)
        return [begin, *found]

    def tune(self, one: Genotype, plain: Genotype) -> tuple[Genotype, SubModel, str]:
        """Fine-tunes the chosen candidate, and keeps of it what the rows that judge say is better than the head start
        on the frozen pathway."""
        return self._tune_few(one, plain) if self.folds.few else self._tune_many(one, plain)

    def _tune_many(self, one: Genotype, plain: Genotype) -> tuple[Genotype, SubModel, str]:
        began, fold = time.monotonic(), self.folds.folds[0]
        frozen = self.ground.candidate(plain, self.head(plain, _some(fold.places, HEAD_ROWS)))
        before = self.arena.look(frozen, fold.held)
        self._note("head start", plain, 0, before.score, began)
        began = time.monotonic()
        looks = self.train(one, fold, self.whole, _looks(self.whole))
        sub, last = self.ground.candidate(one), best_of(looks[1:])

        def seen() -> Iterator[tuple[str, Look]]:
            for part in PARTS:
                made = with_params(sub, between(looks[0].params, last.params, part))
                yield f"{part:.0%} of the way", self.arena.look(made, fold.held, last.step)
            refitted = self.refitted(with_params(sub, last.params), _some(fold.places, HEAD_ROWS))
            if refitted is not None:
                yield "its head refitted", self.arena.look(refitted, fold.held, last.step)

        way, best = max(seen(), key=lambda pair: pair[1].score)
        taken = self.better(before.score, best.score)
        self._note("fine-tune", one, looks[-1].step, best.score, began, f"step {best.step}, {way}")
        if not taken:
            return plain, frozen, "no training was better on validation than the head start on the frozen pathway"
        return one, with_params(sub, best.params), f"fine-tuned for {best.step} steps, {way}"

    def _tune_few(self, one: Genotype, plain: Genotype) -> tuple[Genotype, SubModel, str]:
        """Every fold says what training would give on rows that it did not see; then all rows are trained on."""
        began = time.monotonic()
        losses: dict[bool, list[np.ndarray]] = {}
        before: list[np.ndarray] = []
        for fold in self.folds.folds:
            frozen = self.ground.candidate(plain, self.head(plain, fold.places))
            before.append(self.arena.look(frozen, fold.held).losses)
            look = self.train(one, fold, self.whole, [self.whole])[-1]
            losses.setdefault(False, []).append(look.losses)
            refitted = self.refitted(with_params(self.ground.candidate(one), look.params), fold.places)
            if refitted is not None:
                losses.setdefault(True, []).append(self.arena.look(refitted, fold.held).losses)
        start = -float(np.concatenate(before).mean())
        means = {refit: -float(np.concatenate(parts).mean()) for refit, parts in losses.items()}
        refit = max(means, key=lambda way: means[way])
        self._note("head start", plain, 0, start, began, "cross-validated")
        note = "head refitted; cross-validated" if refit else "cross-validated"
        self._note("fine-tune", one, FOLDS * self.whole, means[refit], began, note)
        every = np.arange(len(self.folds.rows))
        if not self.better(start, means[refit]):
            frozen = self.ground.candidate(plain, self.head(plain, every))
            return plain, frozen, "on rows held out no training was better than the head start"
        last = self.train(one, Fold(self.folds.rows, (), every), self.whole, [self.whole])[-1]
        sub = with_params(self.ground.candidate(one), last.params)
        why = f"fine-tuned for {self.whole} steps on all rows"
        return (one, self.refitted(sub, every) or sub, f"{why}, then the head refitted") if refit else (one, sub, why)

    def refitted(self, sub: SubModel, places: np.ndarray) -> SubModel | None:
        """A trained candidate with its head fitted once more, in closed form; None for tagging."""
        if self.folds.fitted.is_token_level:
            return None
        found = activations(sub, [self.folds.rows[i] for i in places])
        return laid_over(sub, head_start(self.folds.fitted, found).components(sub.names[0]), {})

    @staticmethod
    def better(before: float, after: float) -> bool:
        """Whether training is taken over the head start, by their scores."""
        return after > before

    def grow(self, one: Genotype, sub: SubModel, why: str) -> tuple[Genotype, SubModel, str]:
        """Gives more capacity, a layer at a time from the top, where validation says that it is worth it."""
        refused: list[Genotype] = []
        fold = self.folds.folds[0]
        before = self.arena.look(sub, fold.held)
        for _ in range(GROWTHS[self.options.effort]):
            larger = next((it for it in self._larger(one) if it not in refused and self.permitted(it)), None)
            if larger is None or len(refused) >= REFUSALS:
                break
            began, steps = time.monotonic(), max(1, round(GROWTH_PART * self.whole))
            grown = self.ground.grown(larger, sub)
            rates = self.ground.rates(larger)
            look = self.arena.train(grown, rates, fold.train, fold.held, steps, [steps], seed=1)[-1]
            real = lower_bound(before.losses, look.losses, self.folds.seed) > 0 and look.score > before.score
            self._note("grow", larger, steps, look.score, began, "taken" if real else "refused")
            if real:
                one, sub, before, why = larger, with_params(grown, look.params), look, f"{why}; grown"
            else:
                refused.append(larger)
        return one, sub, why

    def _larger(self, one: Genotype) -> list[Genotype]:
        """Candidates with more: own encoder rows, or an adapter or new experts in a layer that only reuses."""
        found = [replace(one, encoder=True)] if self.space.encoder and not one.encoder else []
        for layer in reversed(range(len(one.genes))):
            for gene in ("adapter", "fresh"):
                if one.genes[layer] == "reuse" and gene in self.space.genes:
                    found.append(replace(one, genes=(*one.genes[:layer], gene, *one.genes[layer + 1 :])))
        return found

    def head(self, one: Genotype, places: np.ndarray | None = None) -> Head | None:
        """The head start of a candidate on some of the rows, all by default; None for tagging."""
        if self.folds.fitted.is_token_level:
            return None
        places = _some(np.arange(len(self.folds.rows)), HEAD_ROWS) if places is None else places
        layers = tuple((gene if gene in ("skip", "fresh") else "", kept) for gene, kept in one.steps)
        key = (one.base, layers, places.tobytes())
        if key not in self._seen:
            rows = [self.folds.rows[i] for i in places]
            self._seen[key] = activations(self.ground.candidate(one), rows)
        return head_start(self.folds.fitted, self._seen[key])

    def _note(self, stage: str, one: Genotype, steps: int, score: float, began: float, note: str = "") -> float:
        cost = self.ground.cost(one)
        value = reward(score, cost, self.ground.cost(self.space.plain("reuse", ROOT, encoder=False)))
        seconds = time.monotonic() - began
        self.tried.append(Tried(stage, str(one), steps, float(score), value, cost.private, seconds, note))
        self.told(self.tried[-1])
        return value

    def _found(self, one: Genotype, sub: SubModel, why: str) -> Found:
        start = self.ground.compact(one, sub)
        copies = tuple(tuple(self.ground.allowed(one, layer)[2]) for layer in range(len(one.genes)))
        return Found(start, one, tuple(self.tried), self.arena.spent, self.whole, why, copies)


def _some(places: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the places, evenly spread."""
    return places[np.linspace(0, len(places) - 1, most).astype(int)] if len(places) > most else places


def _looks(steps: int) -> list[int]:
    return sorted({max(1, round(steps * (i + 1) / LOOKS)) for i in range(LOOKS)})
