"""A sub-model: an ordinary small network that holds only the components of some tasks' pathways.

Training, evaluation, search and export run on it, so their cost follows the pathway, not the model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pathways.assemble import Layout, Part, Path, by_layer, from_layers, read_arrays
from pathways.config import BalanceOptions, Config
from pathways.convolution import pooled_width
from pathways.network.conv import ConvNetwork
from pathways.network.network import Network, NetworkSize, Outputs, TaskTable
from pathways.network.routed import BalanceBias
from pathways.pathway import Pathway
from routing import counters
from tasks.fitted import FittedTask
from tasks.losses import LOSS_CODE
from tasks.spec import LOSSES

KEPT_SKELETONS = 64
_SKELETONS: OrderedDict[tuple[str, str, NetworkSize], tuple[Any, Any]] = OrderedDict()


@dataclass(frozen=True)
class TaskEntry:
    """A task as the model keeps it: what it wants, the path it takes, and notes such as when it came and its card."""

    fitted: FittedTask
    pathway: Pathway
    notes: dict[str, Any]

    @property
    def name(self) -> str:
        return self.pathway.task


class SubModel:
    """A network on the device with what its integers mean.

    Attributes:
        config: of the model it comes from; its layers are scanned only where all hold as many experts.
        entries: its tasks, in the order of their integers.
        layout: where its arrays stand in the model.
        tokenizer: JSON of the model's tokenizer.
        params, bias: its state; a trainer replaces them.
    """

    def __init__(
        self, config: Config, entries: Sequence[TaskEntry], layout: Layout, tokenizer: str, state: Any
    ) -> None:
        self.config, self.layout, self.tokenizer = config, layout, tokenizer
        self.entries = tuple(entries)
        self.graph, self.params, self.bias = nnx.split(state, nnx.Param, BalanceBias)
        self.table = task_table(layout, [entry.fitted for entry in entries])

    @property
    def names(self) -> tuple[str, ...]:
        return self.layout.tasks

    def number(self, task: str) -> int:
        """The integer that the task's rows carry."""
        return self.names.index(task)

    def flat(self) -> dict[Path, Any]:
        """Its arrays by path, layers unstacked."""
        tree = nnx.to_pure_dict(nnx.merge_state(self.params, self.bias))
        return by_layer(tree, self.config.model)

    def run(self, batch: dict[str, Any], *, statistics: bool = False) -> Outputs:
        """Deterministic forward pass of one packed batch; compiled once per batch shape."""
        return _forward(self.graph, self.params, self.bias, batch, self.table, statistics)

    def count(self, outputs: Outputs) -> tuple[counters.Counters, ...]:
        """The counters of a batch that `run` gave with statistics, one per routed layer."""
        layers = tuple(layer.routed for layer in outputs.layers)
        return _count(layers, self.layout.size.tasks, self.layout.size.slots)

    @property
    def pooled_width(self) -> int:
        """Width of `Outputs.pooled`, which the heads of examples read."""
        return pooled_width(self.config)

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self.params))


@functools.partial(jax.jit, static_argnums=(0, 5))
def _forward(graph: Any, params: Any, bias: Any, batch: dict[str, Any], table: TaskTable, statistics: bool) -> Outputs:
    network = nnx.merge(graph, params, bias)
    return network(batch, table, BalanceOptions(load_balancing=0.0, z=0.0), statistics=statistics)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _count(layers: tuple[counters.Routed, ...], tasks: int, slots: tuple[int, ...]) -> tuple[counters.Counters, ...]:
    return tuple(counters.count(counters.zeros(tasks, num), layer) for layer, num in zip(layers, slots, strict=True))


def fitting(config: Config, layout: Layout) -> Config:
    """The configuration of a sub-model: layers that hold different numbers of experts, or that a task treats each in
    its own way, cannot be scanned as one."""
    size = layout.size
    alike = len(set(zip(size.experts, size.candidates, strict=True))) <= 1 and not size.taps and not size.adapters
    if not config.model.scan_layers or alike:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=False))


def abstract_network(config: Config, layout: Layout) -> Any:
    """The network's structure without arrays."""
    return nnx.eval_shape(lambda: make_network(config, layout, nnx.Rngs(0)))


def make_network(config: Config, layout: Layout, rngs: nnx.Rngs) -> Network | ConvNetwork:
    """The network with the trunk that the configuration names."""
    trunk = ConvNetwork if config.model.trunk == "conv" else Network
    return trunk(config.model, config.encoders, layout.size, rngs)


def skeleton(config: Config, layout: Layout) -> tuple[Any, Any]:
    """Graph and state of the network without arrays; those of the last sizes are kept, as tracing takes a while."""
    key = (repr(config.model), repr(config.encoders), layout.size)
    if key not in _SKELETONS:
        _SKELETONS[key] = nnx.split(abstract_network(config, layout))
        if len(_SKELETONS) > KEPT_SKELETONS:
            _SKELETONS.popitem(last=False)
    _SKELETONS.move_to_end(key)
    graph, state = _SKELETONS[key]
    return graph, jax.tree.map(lambda leaf: leaf, state)  # a state of its own: the caller fills it


def initial_submodel(
    config: Config, entries: Sequence[TaskEntry], layout: Layout, tokenizer: str, seed: int
) -> SubModel:
    """A sub-model with fresh parameters, all made in one compiled call."""
    config = fitting(config, layout)

    @jax.jit
    def make(key: jax.Array) -> Any:
        return nnx.state(make_network(config, layout, nnx.Rngs(params=key)))

    graph = nnx.graphdef(abstract_network(config, layout))
    return SubModel(config, entries, layout, tokenizer, nnx.merge(graph, make(jax.random.key(seed))))


def read_submodel(
    config: Config,
    entries: Sequence[TaskEntry],
    layout: Layout,
    tokenizer: str,
    read: Callable[[list[Part]], list[np.ndarray]],
) -> SubModel:
    """A sub-model filled from components."""
    config = fitting(config, layout)
    graph, state = skeleton(config, layout)
    abstract = by_layer(nnx.to_pure_dict(state), config.model)
    tree = from_layers(read_arrays(abstract, layout, config.model, read), config.model)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, tree))
    return SubModel(config, entries, layout, tokenizer, nnx.merge(graph, state))


def task_table(layout: Layout, fitted: Sequence[FittedTask]) -> TaskTable:
    """The arrays that say what each task's integer means."""
    codes = []
    for item in fitted:
        kind = item.task.target.kind
        assert kind is not None
        codes.append(LOSS_CODE[item.task.loss or LOSSES[kind][0]])
    return TaskTable(
        pathway=jnp.asarray(layout.pathway),
        gate=jnp.asarray(layout.gate),
        head=jnp.asarray(layout.head_first),
        outputs=jnp.asarray(layout.head_rows),
        token_level=jnp.asarray(layout.token_level),
        loss=jnp.asarray(codes, jnp.int32),
        slots=tuple(jnp.asarray(table) for table in layout.slots),
    )
