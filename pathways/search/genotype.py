"""What a candidate pathway is, as data: per routed layer what is done there and with which experts.

The reward is muNet's (Gesmundo and Dean 2022): quality, times 0.99 to the power of what the candidate costs relative to
the root pathway, in private parameters (a shared one divided by its users) and in operations for one row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

Gene = Literal["reuse", "adapter", "copy", "fresh", "skip"]
"""What is done in a layer: experts as they are; beside them a low-rank branch; copies of the first of them, trained;
new experts beside them; no experts at all."""
GENES: tuple[Gene, ...] = get_args(Gene)
TRAINED_EXPERTS = ("copy", "fresh")
DISCOUNT = 0.99
FEWEST_STAY = 0.5
"""Of the candidate experts of a layer, the part that a mutation leaves at least."""


@dataclass(frozen=True)
class Genotype:
    """One candidate.

    Attributes:
        base: the pathway whose norms and gate it starts from: `root`, a task's name, or `mixture`.
        genes: per routed layer.
        experts: per routed layer, how many of the ranked candidate experts it keeps.
        encoder: whether it trains a copy of what its rows touch of the encoders.
    """

    base: str
    genes: tuple[Gene, ...]
    experts: tuple[int, ...]
    encoder: bool

    def __str__(self) -> str:
        layers = " ".join(f"{gene}/{kept}" if gene != "skip" else gene for gene, kept in self.steps)
        return f"{self.base}: {layers}" + (" + encoder" if self.encoder else "")

    @property
    def steps(self) -> list[tuple[Gene, int]]:
        """(gene, experts kept) of each layer."""
        return list(zip(self.genes, self.experts, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain lists and strings."""
        genes, experts = list(self.genes), list(self.experts)
        return {"base": self.base, "genes": genes, "experts": experts, "encoder": self.encoder}


@dataclass(frozen=True)
class Space:
    """What a search may choose from.

    Attributes:
        bases: names of pathways to start from, the root first.
        genes: what may be done in a layer.
        layers: number of routed layers.
        ranked: per routed layer, the number of candidate experts.
        least: the fewest experts that a layer keeps: the gate's `top_k`.
        encoder: whether a copy of the encoders may be trained.
    """

    bases: tuple[str, ...]
    genes: tuple[Gene, ...]
    ranked: tuple[int, ...]
    least: int
    encoder: bool

    @property
    def layers(self) -> int:
        return len(self.ranked)

    def plain(self, gene: Gene, base: str | None = None, encoder: bool | None = None) -> Genotype:
        """The same gene in every layer, with all candidate experts."""
        encoder = self.encoder if encoder is None else encoder and self.encoder
        return Genotype(base or self.bases[0], (gene,) * self.layers, self.ranked, encoder)

    def fewer(self, one: Genotype) -> Genotype | None:
        """With one expert fewer, in the layer that keeps most; None where every layer keeps the fewest."""
        spare = [
            kept if kept > min(self.least, most) else 0 for kept, most in zip(one.experts, self.ranked, strict=True)
        ]
        if not any(spare):
            return None
        layer = int(np.argmax(spare))
        return replace(one, experts=_put(one.experts, layer, one.experts[layer] - 1))

    def random(self, rng: np.random.Generator) -> Genotype:
        """Any candidate."""
        genes: tuple[Gene, ...] = tuple(self.genes[i] for i in rng.integers(len(self.genes), size=self.layers).tolist())
        experts = tuple(int(rng.integers(min(self.least, most), most + 1)) for most in self.ranked)
        base = self.bases[int(rng.integers(len(self.bases)))]
        return Genotype(base, genes, experts, self.encoder and bool(rng.integers(2)))

    def mutated(self, parent: Genotype, rng: np.random.Generator) -> Genotype:
        """The parent with one thing another: a layer's gene, a layer's experts, the base or the encoder."""
        while True:
            what = int(rng.integers(6))
            layer = int(rng.integers(self.layers)) if self.layers else 0
            child = parent
            if what <= 2 and self.layers:
                gene = self.genes[int(rng.integers(len(self.genes)))]
                child = replace(parent, genes=_put(parent.genes, layer, gene))
            elif what == 3 and self.layers:
                most = self.ranked[layer]
                least = min(max(self.least, int(most * FEWEST_STAY)), most)
                kept = int(rng.integers(least, most + 1))
                child = replace(parent, experts=_put(parent.experts, layer, kept))
            elif what == 4:
                child = replace(parent, base=self.bases[int(rng.integers(len(self.bases)))])
            elif self.encoder:
                child = replace(parent, encoder=not parent.encoder)
            if child != parent or self._alone:
                return child

    @property
    def _alone(self) -> bool:
        """Whether there is nothing to change."""
        return len(self.bases) == 1 and not self.encoder and (not self.layers or len(self.genes) == 1)


@dataclass(frozen=True)
class Cost:
    """Of one candidate: private parameters, shared ones each divided by their users, operations for one row."""

    private: int
    shared: float
    operations: float

    def factor(self, root: Cost) -> float:
        """What its quality is multiplied by."""
        parameters = (self.private + self.shared) / max(root.private + root.shared, 1.0)
        return DISCOUNT ** (parameters + self.operations / max(root.operations, 1.0))


def reward(score: float, cost: Cost, root: Cost) -> float:
    """`exp(score) * factor`: positive and rising with the score, whatever its sign."""
    return float(np.exp(score)) * cost.factor(root) if np.isfinite(score) else 0.0


def _put(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])
