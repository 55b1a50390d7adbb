"""The network that holds every candidate, and the way between a candidate and its pathway.

A *base* is where norms and gate come from: the root pathway, that of a near task or of a task drawn by chance, or the
mean of the near ones. All bases fill the same arrays, so one compiled network runs them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experts.kinds import get_kind
from pathways.adding.search import Choice, Slot, by_kind
from pathways.adding.start import (
    Start,
    columns_of,
    fresh_kind,
    fresh_places,
    gate_components,
    gate_sources,
    joined,
    overlay,
    prepare,
)
from pathways.assemble import Part, components, from_layers, parts
from pathways.model import Model
from pathways.network.routed import BalanceBias
from pathways.pathway import ADAPTER_LEAVES, BASE, GATE_LEAVES, EncoderCopy, Experts, GateSpec
from pathways.search.arena import Rates, with_params
from pathways.search.genotype import TRAINED_EXPERTS, Cost, Genotype
from pathways.search.head import Head
from pathways.submodel import SubModel, TaskEntry, read_submodel

ROOT, MIXTURE = "root", "mixture"
NEAR, CHANCE = 5, 2
"""Pathways of other tasks that are bases: near ones, and ones drawn by chance."""

Values = dict[str, np.ndarray]
Rows = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Ground:
    """All candidates of one task.

    Attributes:
        model: where it is added to.
        reference: the root pathway.
        start: the network that holds all candidates.
        choice: the candidate experts, ranked.
        bases: name -> norms and gate, by their names in the store.
        users: tasks that share the root pathway's experts.
    """

    model: Model
    reference: SubModel
    start: Start
    choice: Choice
    bases: Mapping[str, Values]
    users: int

    def allowed(self, genotype: Genotype, layer: int) -> tuple[list[Slot], list[Slot], list[Slot]]:
        """Of a layer: experts that are reused, own ones, and those that the first of the own ones are copies of."""
        gene, kept = genotype.genes[layer], list(self.choice.ranked[layer][: genotype.experts[layer]])
        if gene == "skip":
            return [], [], []
        if gene not in TRAINED_EXPERTS:
            return kept, [], []
        own = [(kind, i) for kind, index in self.start.fresh[layer].items() for i in index]
        kind = fresh_kind(self.model)
        copied = [slot for slot in kept if slot[0] == kind][: len(own)] if gene == "copy" else []
        return [slot for slot in kept if slot not in copied], own, copied

    def candidate(self, genotype: Genotype, head: Head | None = None) -> SubModel:
        """The network as a candidate has it before training."""
        whole, rows = dict(self.bases[genotype.base]), {}
        for layer, number in enumerate(self.model.routed_layers):
            _, own, copied = self.allowed(genotype, layer)
            columns = columns_of(self.start.gate.candidates[layer])
            _copy_columns(whole, f"gates/{self.start.entry.pathway.gate}/layer{number}/", columns, own, copied)
            rows |= self._copied_rows(number, own, copied)
        if head is not None:
            whole |= head.components(self.start.entry.name)
        return self.grown(genotype, laid_over(self.start.sub, whole, rows))

    def grown(self, genotype: Genotype, sub: SubModel) -> SubModel:
        """The parameters as they are, routed as `genotype` says: what it adds to a trained candidate is silent."""
        slots = []
        for layer in range(len(genotype.genes)):
            reused, own, _ = self.allowed(genotype, layer)
            columns = columns_of(self.start.gate.candidates[layer])
            table = self.start.sub.layout.slots[layer]
            on = [columns[slot] for slot in (*reused, *own)]
            masked = np.full_like(table, sum(n for _, n in self.start.sub.layout.size.experts[layer]))
            masked[:, on] = table[:, on]
            slots.append(jnp.asarray(masked))
        made = with_params(sub, sub.params)
        made.table = made.table._replace(slots=tuple(slots))
        return made

    def rates(self, genotype: Genotype) -> Rates:
        """Which leaves a candidate trains."""
        routed = {str(number): layer for layer, number in enumerate(self.model.routed_layers)}

        def rate(path: tuple[str, ...]) -> float:
            if path[0] == "encoders":
                return float(genotype.encoder or path[1] in self.start.made_encoders)
            gene = genotype.genes[routed[path[1]]] if path[0] == "blocks" and path[1] in routed else None
            if "banks" in path:
                return float(gene in TRAINED_EXPERTS)
            if path[-1].startswith("adapter"):
                return float(gene == "adapter")
            return 1.0

        return rate

    def cost(self, genotype: Genotype) -> Cost:
        """Of the pathway that the candidate would become; `private` is what a commit of it would add."""
        config = self.model.config.model
        width, rank = config.width, max(self.start.entry.pathway.adapters, default=0)
        private = sum(self._private(genotype, name, shape) for name, shape in self._shapes.items())
        shared, operations = 0.0, float(config.layers * 8 * width * width)
        for layer, gene in enumerate(genotype.genes):
            reused, own, _ = self.allowed(genotype, layer)
            private += sum(get_kind(kind).parameters(width, config.hidden) for kind, _ in own)
            each = [get_kind(kind).parameters(width, config.hidden) for kind, _ in reused]
            shared += sum(each) / (self.users + 1)
            busy = [get_kind(kind).operations(width, config.hidden) for kind, _ in (*reused, *own)]
            operations += config.gate.top_k * float(np.mean(busy)) if busy else 0.0
            operations += 4.0 * width * rank if gene == "adapter" else 0.0
        return Cost(private, shared, operations)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all whole components that a candidate may own."""
        return {name: value.shape for name, value in _own_values(self.start, lambda name: True).items()}

    def _private(self, genotype: Genotype, name: str, shape: tuple[int, ...]) -> int:
        """Numbers of one of them that the candidate keeps."""
        pathway, size = self.start.entry.pathway, math.prod(shape)
        if name.startswith(f"encoders/{pathway.encoders}/"):
            return size if genotype.encoder else 0
        if not name.startswith("gates/"):
            return size
        number, leaf = name.split("/")[-2:]
        layer = self.model.routed_layers.index(int(number.removeprefix("layer")))
        if leaf in ADAPTER_LEAVES:
            return size if genotype.genes[layer] == "adapter" else 0
        reused, own, _ = self.allowed(genotype, layer)
        return size // shape[-1] * (len(reused) + len(own))

    def compact(self, genotype: Genotype, trained: SubModel) -> Start:
        """The candidate's own small network, without what it does not use."""
        pathway = self.start.entry.pathway
        numbers = [len(self.allowed(genotype, i)[1]) for i in range(len(genotype.genes))]
        owned = fresh_places(self.model, numbers)
        kinds = list(self.model.config.model.experts)
        spec = GateSpec(tuple(joined(by_kind(self.allowed(genotype, i)[0], kinds), new) for i, new in enumerate(owned)))
        copied: EncoderCopy = self.start.copied if genotype.encoder else {}
        rank = max(pathway.adapters, default=0)
        adapters = tuple(rank if gene == "adapter" else 0 for gene in genotype.genes)
        pathway = replace(
            pathway,
            encoders=pathway.encoders if copied else BASE,
            parents=self.parents(genotype),
            owned=owned,
            adapters=adapters if any(adapters) else (),
        )
        entry = TaskEntry(self.start.entry.fitted, pathway, {})
        whole = _own_values(replace(self.start, sub=trained), lambda found: not found.startswith("banks/"))
        rows: Rows = {}
        for layer, number in enumerate(self.model.routed_layers):
            columns = columns_of(self.start.gate.candidates[layer])
            chosen = [columns[slot] for slot in columns_of(spec.candidates[layer])]
            for leaf in GATE_LEAVES:
                if (key := f"gates/{pathway.gate}/layer{number}/{leaf}") in whole:
                    whole[key] = whole[key][..., chosen]
            rows |= self._own_rows(trained, number, owned[layer])
        used: list[Part] = []
        layout = self.model.layout([entry], {pathway.gate: spec}, copied)
        read = overlay(self.model.read, whole, rows, used)
        sub = read_submodel(self.model.config, [entry], layout, self.model.tokenizer, read)
        return Start(sub, spec, owned, self.start.made_encoders, copied, tuple(used))

    def parents(self, genotype: Genotype) -> tuple[str, ...]:
        """The task whose pathway it starts from, then the nearest."""
        first = () if genotype.base in (ROOT, MIXTURE) else (genotype.base,)
        return tuple(dict.fromkeys((*first, *self.choice.nearest)))

    def _copied_rows(self, number: int, own: Sequence[Slot], copied: Sequence[Slot]) -> Rows:
        """Own experts that start as copies: bank -> (places, values)."""
        if not copied:
            return {}
        kind, index = copied[0][0], np.array([i for _, i in copied])
        banks = sorted(self.model.view.names(f"banks/layer{number}/{kind}/"))
        places = np.array([i for _, i in own[: len(copied)]])
        return {bank: (places, self.model.view.read(bank, index.tolist())) for bank in banks}

    def _own_rows(self, trained: SubModel, number: int, owned: Experts) -> Rows:
        prefix = f"banks/layer{number}/"
        flat, layout, config = trained.flat(), trained.layout, trained.config.model
        found: Rows = {}
        for name, (index, value) in components(flat, layout, config, lambda n: n.startswith(prefix)).items():
            places = np.array(owned.get(name.split("/")[2], ()), np.int64)
            if len(places) and index is not None:
                found[name] = (places, value[np.searchsorted(index, places)])
        return found


def make_ground(
    model: Model,
    reference: SubModel,
    choice: Choice,
    copied: EncoderCopy,
    *,
    new_experts: int,
    rank: int,
    users: int,
    seed: int,
) -> Ground:
    """Lays out the network for all candidates, and reads the bases."""
    start = prepare(model, reference, choice, new_experts, seed, copied, rank)
    root = reference.entries[0].pathway
    private = (f"norms/{start.entry.pathway.norms}", f"gates/{start.entry.pathway.gate}/")
    bases = {ROOT: _own_values(start, lambda name: name.startswith(private) and "adapter" not in name)}
    sources = gate_sources(model, choice, root.gate)
    for task in _base_tasks(model, choice, (root.norms, root.gate), seed):
        theirs = model.entry(task).pathway
        first = list(dict.fromkeys((theirs.gate, *sources)))
        bases[task] = gate_components(model, start.entry.pathway, start.gate, choice, first, seed)
        bases[task][private[0]] = model.view.read(f"norms/{theirs.norms}")
    if len(bases) > 1:
        bases[MIXTURE] = {name: np.mean([b[name] for b in bases.values()], axis=0) for name in bases[ROOT]}
    return Ground(model, reference, start, choice, bases, users)


def laid_over(
    sub: SubModel, whole: Mapping[str, np.ndarray], rows: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> SubModel:
    """The same network with other values for some components.

    Args:
        whole: by name.
        rows: bank -> (places in the model's bank, values).
    """
    config, flat = sub.config.model, {}
    for path, leaf in sub.flat().items():
        for part in parts(path, sub.layout, config):
            if part.name in whole:
                value = whole[part.name] if part.rows is None else whole[part.name][part.rows]
                leaf = _put(leaf, part.at or ..., value)
            elif part.name in rows and isinstance(part.rows, np.ndarray):
                places, value = rows[part.name]
                leaf = _put(leaf, np.searchsorted(part.rows, places), value)
        flat[path] = jnp.asarray(leaf)
    # Copied, as the leaves of a state are put in place.
    state = jax.tree.map(lambda leaf: leaf, nnx.merge_state(sub.params, sub.bias))
    nnx.replace_by_pure_dict(state, from_layers(flat, config))
    made = with_params(sub, sub.params)
    _, made.params, made.bias = nnx.split(nnx.merge(sub.graph, state), nnx.Param, BalanceBias)
    return made


def _put(leaf: Any, at: Any, value: np.ndarray) -> np.ndarray:
    # In numpy: as operations of jax each shape would be compiled.
    copied = np.array(leaf)
    copied[at] = value
    return copied


def _base_tasks(model: Model, choice: Choice, root: tuple[str, str], seed: int) -> list[str]:
    """Tasks with another pathway than the root: the nearest, then two drawn from those of a page of the catalogue."""
    rng = np.random.default_rng([seed, 3])
    known = [line.task for line in model.catalogue.sample(rng, 1)]
    drawn = rng.permutation(len(known))[: 2 * CHANCE].tolist()

    def other(task: str) -> bool:
        pathway = model.entry(task).pathway
        return (pathway.norms, pathway.gate) != root

    near = [task for task in choice.nearest if other(task)][:NEAR]
    return [*near, *[known[i] for i in drawn if known[i] not in near and other(known[i])][:CHANCE]]


def _copy_columns(
    whole: Values, prefix: str, columns: Mapping[Slot, int], own: Sequence[Slot], copied: Sequence[Slot]
) -> None:
    """Gives the gate's columns of copies the values of those that they are copies of."""
    for leaf in GATE_LEAVES:
        if copied and (key := prefix + leaf) in whole:
            whole[key] = whole[key].copy()
            for new, old in zip(own, copied, strict=False):
                whole[key][..., columns[new]] = whole[key][..., columns[old]]


def _own_values(start: Start, keep: Callable[[str], bool]) -> Values:
    """The task's own whole components, as its network has them."""
    pathway = start.entry.pathway
    mine = (f"norms/{pathway.norms}", f"gates/{pathway.gate}/", f"heads/{pathway.task}/")
    prefixes = (*mine, *(f"encoders/{stream}/" for stream in start.made_encoders), f"encoders/{pathway.encoders}/")
    if pathway.encoders == BASE:
        prefixes = prefixes[:-1]
    flat, layout, config = start.sub.flat(), start.sub.layout, start.sub.config.model
    found = components(flat, layout, config, lambda name: name.startswith(prefixes) and keep(name))
    return {name: value for name, (_, value) in found.items()}
