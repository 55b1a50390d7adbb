"""The routed feed-forward layer: gates, plan, exchange, experts, combine; beside them balance and counters.

Axis letters: T rows (tokens), N examples, D width, G gates, M candidates of a gate, K experts per row, E slots of the
layer's banks, kinds one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from experts.compute import apply_experts
from experts.image_kinds import IMAGE_KINDS, get_image_kind
from experts.kinds import get_kind
from pathways.config import BalanceOptions, ModelConfig
from pathways.devices import over_rows
from pathways.network.layers import segment_mean
from routing import balance
from routing.counters import Routed, routed
from routing.gates import GateConfig, Routing, gate_logits, route, sum_by_slot, to_slots
from routing.gumbel import gumbel_matrix
from routing.plan import Plan


class BalanceBias(nnx.Variable):
    """The bias of loss-free balancing: updated by a rule, not by a gradient."""


Fetch = Callable[[str, jax.Array], dict[str, jax.Array]]
"""How a layer gets a few experts: `(kind, index [A]) -> leaves [A, ...]`; an index of E wants none."""


class RowContext(NamedTuple):
    """What a routed layer knows of its rows.

    `example [T]` index of the row's example, -1 for padding; `task [T]`, `gate [T]`, `pathway [T]` integers (0 for
    padding); `example_gate [N]`, `example_task [N]` the same per example; `embedding [N, D]` of the examples' tasks, or
    None.
    """

    example: jax.Array
    task: jax.Array
    gate: jax.Array
    pathway: jax.Array
    example_task: jax.Array
    example_gate: jax.Array
    embedding: jax.Array | None

    @property
    def valid(self) -> jax.Array:
        return self.example >= 0


class LayerOutput(NamedTuple):
    """Beside the rows: `loss` (the weighted balance losses), `load [E]` (choices per slot), `routed` (what there is to
    count) if asked for, and `fetched`, the index `[A]` of the experts that were fetched of each kind; empty where banks
    are used whole."""

    loss: jax.Array
    load: jax.Array
    routed: Routed | None
    fetched: dict[str, jax.Array]


MATRIX_SPREAD = 3.0
"""Standard deviation of a Gumbel matrix's first logits; that of its noise is 1.8."""
MATRIX_GAIN = 10.0
"""Logits of a Gumbel matrix for one of its parameters: it moves ten times as fast as weights do at the same rate."""


class RoutedFeedForward(nnx.Module):
    """Gates `[G, D, M]`, or `[G, M]` where they do not look at rows, over slots of banks `[E, ...]`.

    Args:
        config: sizes and the gate's kind.
        experts: size of each bank, by kind.
        gates: G.
        candidates: M.
        rank: R, of the low-rank branch that each gate has beside the experts: `x @ adapter_in @ adapter_out`, zero at
            the start (Houlsby et al. 2019, in the parallel form of He et al. 2022); 0 for none.
    """

    def __init__(
        self, config: ModelConfig, experts: dict[str, int], gates: int, candidates: int, rngs: nnx.Rngs, rank: int = 0
    ) -> None:
        noisy, matrix = config.gate.kind == "noisy_top_k", config.gate.kind == "gumbel_matrix"
        shape = (gates, config.width, candidates)
        scale = 0.0 if noisy else config.width**-0.5
        if matrix:
            # All gates start alike, each layer with some candidates well ahead: tasks share until it pays to part.
            # From zero every step would draw other experts, and the heads would have nothing to hold on to.
            first = MATRIX_SPREAD / MATRIX_GAIN * jax.random.normal(rngs.params(), (1, candidates))
            self.gate = nnx.Param(jnp.repeat(first, gates, axis=0))
        else:
            self.gate = nnx.Param(scale * jax.random.normal(rngs.params(), shape))
        self.noise = nnx.Param(jnp.zeros(shape)) if noisy else None
        self.bias = BalanceBias(jnp.zeros((gates, candidates))) if config.gate.kind == "sigmoid_top_k" else None
        self.sizes = tuple(experts.items())
        self.num_slots = sum(experts.values())
        self.banks = nnx.Dict(
            {kind: nnx.Dict(_params(kind, rngs, num, config)) for kind, num in experts.items() if has_leaves(kind)}
        )
        # Of the configuration, not of `experts`: a pathway may use no expert of the first kind.
        first = next(iter(config.experts))
        self.shared_kind = first
        self.shared = nnx.Dict(_params(first, rngs, config.shared_experts, config)) if config.shared_experts else None
        self.options = config.gate
        down = (gates, config.width, rank)
        self.adapter_in = nnx.Param(config.width**-0.5 * jax.random.normal(rngs.params(), down)) if rank else None
        self.adapter_out = nnx.Param(jnp.zeros((gates, rank, config.width))) if rank else None

    def __call__(
        self,
        x: jax.Array,
        rows: RowContext,
        slots: jax.Array,
        weights: BalanceOptions,
        *,
        key: jax.Array | None,
        statistics: bool,
        fetch: Fetch | None = None,
    ) -> tuple[jax.Array, LayerOutput]:
        """`x [T, D]`, `slots [G, M]` -> `[T, D]` and the layer's accounts. Noise is drawn only with a key.

        With `fetch`, the experts that rows chose are fetched, and the layer's own banks are not touched.
        """
        routing, plan = self.plan(x, rows, slots, key)
        banks, chosen, fetched = self.placed(), plan, {}
        if fetch is not None:
            banks, chosen, fetched = fetch_chosen(self.sizes, plan, fetch)

        def compute(leaves: Any, x: jax.Array, plan: Plan) -> jax.Array:
            return apply_experts({kind: (leaves[kind], start, num) for kind, (_, start, num) in banks.items()}, x, plan)

        y = over_rows(compute, {kind: leaves for kind, (leaves, *_) in banks.items()}, x, chosen)
        if self.shared is not None:
            y = y + self._shared(x)
        if self.adapter_in is not None:
            y = y + self._adapted(x, rows.gate)
        return y, self.account(routing, plan, rows, slots, weights, statistics=statistics, fetched=fetched)

    def account(
        self,
        routing: Routing,
        plan: Plan,
        rows: RowContext,
        slots: jax.Array,
        weights: BalanceOptions,
        *,
        statistics: bool,
        fetched: dict[str, jax.Array] | None = None,
    ) -> LayerOutput:
        """What the layer did, as `LayerOutput` says."""
        load, loss = self._balance(routing, rows, slots, weights)
        facts = None
        if statistics:
            facts = routed(plan, _row_probs(routing, rows, self.options.unit), rows.task, self.num_slots)
            if self.options.kind == "gumbel_matrix":  # a candidate that is off was not dropped
                facts = facts._replace(drops=jnp.zeros_like(facts.drops))
        return LayerOutput(loss, load, facts, fetched or {})

    @jax.named_scope("gate")
    def plan(self, x: jax.Array, rows: RowContext, slots: jax.Array, key: jax.Array | None) -> tuple[Routing, Plan]:
        """Routes each row, or each example for all of its rows. The routing returned is per routed unit."""
        options = self.options
        config = GateConfig(
            options.kind, options.top_k, renormalize=options.renormalize, temperature=options.temperature
        )
        whole = self.options.unit == "example"
        num = rows.example_task.shape[0]
        unit = segment_mean(x, rows.example, num) if whole else x
        gate = rows.example_gate if whole else rows.gate
        valid = rows.example_task >= 0 if whole else rows.valid
        embedding = None
        if rows.embedding is not None:
            embedding = rows.embedding if whole else rows.embedding[jnp.maximum(rows.example, 0)]
        bias = None if self.bias is None else self.bias[...][gate]
        if config.kind == "gumbel_matrix":
            exists = slots < self.num_slots
            routing = gumbel_matrix(config, MATRIX_GAIN * self.gate[...], gate, valid=valid, candidates=exists, key=key)
            return routing, self._by_row(to_slots(routing, slots, gate, self.num_slots), rows)
        routing = route(
            config,
            gate_logits(unit, self.gate[...], gate, task_embedding=embedding),
            valid=valid,
            candidates=(slots < self.num_slots)[gate],
            key=key,
            noise_logits=None
            if self.noise is None
            else gate_logits(unit, self.noise[...], gate, task_embedding=embedding),
            balance_bias=bias,
            deterministic=key is None,
        )
        return routing, self._by_row(to_slots(routing, slots, gate, self.num_slots), rows)

    def _by_row(self, plan: Plan, rows: RowContext) -> Plan:
        """The plan of the routed units, for each row: as it is, or each example's for all of its rows."""
        if self.options.unit == "token":
            return plan
        index, on = jnp.maximum(rows.example, 0), rows.valid[:, None]
        return Plan(jnp.where(on, plan.slot[index], self.num_slots), jnp.where(on, plan.weight[index], 0.0))

    def placed(self) -> PlacedBanks:
        """The banks, each with the slots that it owns."""
        banks, start = {}, 0
        for kind, num in self.sizes:
            leaves = {name: leaf[...] for name, leaf in self.banks[kind].items()} if kind in self.banks else {}
            banks[kind] = (leaves, start, num)
            start += num
        return banks

    @jax.named_scope("experts")
    def _shared(self, x: jax.Array) -> jax.Array:
        """The always-on experts, each on every row, added up."""
        assert self.shared is not None
        leaves = {name: leaf[...].astype(x.dtype) for name, leaf in self.shared.items()}
        num = next(iter(leaves.values())).shape[0]
        everywhere = jnp.broadcast_to(x, (num, *x.shape))
        return jnp.sum(get_kind(self.shared_kind).apply(leaves, everywhere), axis=0).astype(x.dtype)

    def _adapted(self, x: jax.Array, gate: jax.Array) -> jax.Array:
        """Each row through the low-rank branch of its gate."""
        assert self.adapter_in is not None
        assert self.adapter_out is not None
        down, up = self.adapter_in[...].astype(x.dtype), self.adapter_out[...].astype(x.dtype)
        if down.shape[0] == 1:
            return (x @ down[0]) @ up[0]
        hidden = jnp.einsum("td,gdr->tgr", x, down)[jnp.arange(x.shape[0]), gate]
        return jnp.einsum("tr,grd->tgd", hidden, up)[jnp.arange(x.shape[0]), gate]

    @jax.named_scope("balance")
    def _balance(
        self, routing: Routing, rows: RowContext, slots: jax.Array, weights: BalanceOptions
    ) -> tuple[jax.Array, jax.Array]:
        """Load and loss over the routed units: examples, or tokens; padding counts in neither."""
        whole = self.options.unit == "example"
        gate = rows.example_gate if whole else rows.gate
        valid = rows.example_task >= 0 if whole else rows.valid
        unit_plan = to_slots(routing, slots, gate, self.num_slots)
        num_rows = jnp.maximum(jnp.sum(valid), 1)
        load = balance.count_by_slot(unit_plan, self.num_slots)
        loss = jnp.zeros(())
        if weights.importance:
            importance = balance.weight_by_slot(unit_plan, self.num_slots)
            loss += weights.importance * balance.importance_loss_from_sums(importance)
        if weights.load:
            smooth = sum_by_slot(routing.load, slots, gate, self.num_slots)
            loss += weights.load * balance.load_loss_from_sums(smooth)
        if weights.load_balancing:
            # Sigmoids do not sum to one: without this the loss would only shrink them (DeepSeek-V3, eq. 19).
            share = routing.probs / jnp.maximum(jnp.sum(routing.probs, axis=1, keepdims=True), 1e-20)
            probs = sum_by_slot(jnp.where(valid[:, None], share, 0.0), slots, gate, self.num_slots)
            loss += weights.load_balancing * balance.load_balancing_loss_from_sums(
                load, probs, num_rows, self.options.top_k
            )
        if weights.z:
            loss += weights.z * balance.router_z_loss(routing.logits, valid)
        return load, loss


PlacedBanks = dict[str, tuple[dict[str, jax.Array], int, int]]
"""Kind -> (leaves, first slot, number of slots)."""


def fetch_chosen(
    sizes: tuple[tuple[str, int], ...], plan: Plan, fetch: Fetch
) -> tuple[PlacedBanks, Plan, dict[str, jax.Array]]:
    """Banks of the experts that a plan names, the plan over their slots, and the index of the fetched ones by kind.

    A kind of E experts gets room for `A = min(E, T K)` of them, in their order. Kinds without leaves stay as they are.
    """
    banks: PlacedBanks = {}
    fetched: dict[str, jax.Array] = {}
    slot, first, start = jnp.zeros_like(plan.slot), 0, 0
    nowhere = jnp.ones(plan.slot.shape, bool)
    for kind, num in sizes:
        local = plan.slot - first
        mine = (local >= 0) & (local < num)
        room, leaves = num, {}
        if has_leaves(kind) and num:
            room = min(num, plan.slot.size)
            index = jnp.unique(jnp.where(mine, local, num), size=room, fill_value=num)
            leaves, fetched[kind] = fetch(kind, index), index
            local = jnp.searchsorted(index, local).astype(slot.dtype)
        slot, nowhere = jnp.where(mine, start + local, slot), nowhere & ~mine
        banks[kind] = (leaves, start, room)
        first, start = first + num, start + room
    return banks, Plan(jnp.where(nowhere, start, slot), plan.weight), fetched


def _params(kind: str, rngs: nnx.Rngs, num: int, config: ModelConfig) -> dict[str, nnx.Param]:
    if config.trunk == "conv":
        leaves = get_image_kind(kind).init(rngs.params(), num, config.width, jnp.float32)
    else:
        leaves = get_kind(kind).init(rngs.params(), num, config.width, config.hidden, jnp.float32)
    return {name: nnx.Param(leaf) for name, leaf in leaves.items()}


def has_leaves(kind: str) -> bool:
    """Whether experts of this kind, of rows or of images, have parameters."""
    return get_image_kind(kind).parameters(1) > 0 if kind in IMAGE_KINDS else get_kind(kind).parameters(1, 1) > 0


def _row_probs(routing: Routing, rows: RowContext, unit: str) -> jax.Array:
    if unit == "token":
        return routing.probs
    return routing.probs[jnp.maximum(rows.example, 0)]
