"""The whole network: streams to rows, rows through the trunk, examples and tokens to logits.

Straight through: no layer knows a task's name, only the integer that its rows carry.

Axis letters: B packed rows, S tokens of a row, T = B*S, N examples, D width, P pathways (stacks of norms), G gates,
M candidates, O rows of all heads together, Y outputs of the widest head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from pathways.config import BalanceOptions, ModelConfig
from pathways.network.encoders import make_encoder
from pathways.network.layers import EPSILON, Attention, DenseFeedForward, RMSNorm, dropout, segment_mean
from pathways.network.routed import Fetch, LayerOutput, RoutedFeedForward, RowContext
from tasks.batch import STREAMS
from tasks.encoded import EncoderSettings

FULL_HEADS = 4096
"""Up to so many rows of heads in all, logits of all heads are computed and each example's are picked."""


class TaskTable(NamedTuple):
    """What the integer a row carries means. One row a task; arrays, so that their values are never compiled in.

    Attributes:
        pathway, gate: `[tasks]` index into the stacks of norms and of gates.
        head: `[tasks]` first row of the task's head in `heads` or, if `token_level`, in `token_heads`.
        outputs: `[tasks]` rows of that head.
        token_level: `[tasks]` bool.
        loss: `[tasks]` code of `tasks.losses.LOSS_CODE`.
        slots: per routed layer `[G, M]`, the slot each logit means; the number of slots where there is no candidate.
    """

    pathway: jax.Array
    gate: jax.Array
    head: jax.Array
    outputs: jax.Array
    token_level: jax.Array
    loss: jax.Array
    slots: tuple[jax.Array, ...]


@dataclass(frozen=True)
class NetworkSize:
    """Sizes that a network has beyond its configuration; all follow from the pathways it holds.

    Attributes:
        streams: the encoders it has.
        vocab_size: of its tokenizer.
        tasks, pathways, gates: numbers of.
        experts: per routed layer, the size of each bank by kind.
        candidates: per routed layer, M.
        heads, token_heads: O of each.
        outputs, token_outputs: Y of each; 0 where no task has such a head.
        taps: whether heads look at the rows before every layer too.
        adapters: per routed layer, the widest rank of an adapter; empty for none.
    """

    streams: tuple[str, ...]
    vocab_size: int
    tasks: int
    pathways: int
    gates: int
    experts: tuple[tuple[tuple[str, int], ...], ...]
    candidates: tuple[int, ...]
    heads: int
    token_heads: int
    outputs: int
    token_outputs: int
    taps: bool = False
    adapters: tuple[int, ...] = ()

    @property
    def slots(self) -> tuple[int, ...]:
        """Per routed layer, the experts of all its banks: E."""
        return tuple(sum(num for _, num in layer) for layer in self.experts)


class Outputs(NamedTuple):
    """`logits [N, Y]`, `token_logits [B, S, Yt]` or None, `pooled [N, D]`, each routed layer's accounts, and where
    heads have taps `levels [N, L D]`: the mean of each example's rows before every layer, each of unit mean square."""

    logits: jax.Array
    token_logits: jax.Array | None
    pooled: jax.Array
    layers: tuple[LayerOutput, ...]
    levels: jax.Array | None = None


class Block(nnx.Module):
    """Norm, attention; norm, feed-forward (routed or dense); each added to the rows."""

    def __init__(self, config: ModelConfig, size: NetworkSize, routed_index: int | None, rngs: nnx.Rngs) -> None:
        self.attention_norm = RMSNorm(size.pathways, config.width)
        self.attention = Attention(config.width, config.heads, config.neighbours, rngs)
        self.norm = RMSNorm(size.pathways, config.width)
        if routed_index is None:
            self.dense = DenseFeedForward(config.width, config.hidden * config.gate.top_k, rngs)
            self.routed = None
        else:
            experts = dict(size.experts[routed_index])
            self.dense = None
            rank = size.adapters[routed_index] if size.adapters else 0
            self.routed = RoutedFeedForward(config, experts, size.gates, size.candidates[routed_index], rngs, rank)
        self.rate = config.dropout

    def __call__(
        self,
        x: jax.Array,
        segment: jax.Array,
        rows: RowContext,
        slots: jax.Array | None,
        balance: BalanceOptions,
        *,
        key: jax.Array | None,
        statistics: bool,
        fetch: Fetch | None = None,
    ) -> tuple[jax.Array, LayerOutput | None]:
        """`x [B, S, D]` -> the same, and the routed layer's accounts."""
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        pathway = rows.pathway.reshape(segment.shape)
        x = x + dropout(self.attention(self.attention_norm(x, pathway), segment), self.rate, keys[0])
        h = self.norm(x, pathway)
        output = None
        if self.routed is not None:
            flat = h.reshape(-1, h.shape[-1])
            assert slots is not None
            flat, output = self.routed(flat, rows, slots, balance, key=keys[1], statistics=statistics, fetch=fetch)
            h = flat.reshape(h.shape)
        else:
            assert self.dense is not None
            h = self.dense(h)
        return x + dropout(h, self.rate, keys[2]), output


class Network(nnx.Module):
    """Encoders, trunk and heads. See `Outputs` for what a call gives."""

    def __init__(self, config: ModelConfig, options: EncoderSettings, size: NetworkSize, rngs: nnx.Rngs) -> None:
        self.config, self.size = config, size
        self.encoders = nnx.Dict(
            {s: make_encoder(s, options, size.vocab_size, config.width, rngs) for s in STREAMS if s in size.streams}
        )
        routed = config.routed_layers
        index = {layer: i for i, layer in enumerate(routed)}
        blocks = [Block(config, size, index.get(i), rngs) for i in range(config.layers)]
        self.blocks = nnx.List(_stacked(blocks, config.routed_every) if config.scan_layers else blocks)
        self.final_norm = RMSNorm(size.pathways, config.width)
        self.heads = Head(size.heads, config.width) if size.heads else None
        self.token_heads = Head(size.token_heads, config.width) if size.token_heads else None
        self.taps = Head(size.heads, config.layers * config.width, bias=False) if size.taps and size.heads else None
        scoped = config.gate.scope == "task_embedding"
        self.task_embedding = nnx.Param(jnp.zeros((size.tasks, config.width))) if scoped else None

    def __call__(
        self,
        batch: dict[str, Any],
        table: TaskTable,
        balance: BalanceOptions,
        *,
        key: jax.Array | None = None,
        statistics: bool = False,
        fetch: Callable[[int], Fetch] | None = None,
    ) -> Outputs:
        """Runs a packed batch (`tasks.batch`). With a key: dropout and gate noise; without: deterministic.

        `fetch` gives, for a block's number, where its experts come from, if not from the block; not for scanned layers.
        """
        segment = batch["segment"]
        rows = self.context(batch, table)
        x = self.embed(batch)
        before: list[jax.Array] | None = [] if self.taps is not None else None
        x, layers = self.trunk(x, segment, rows, table, balance, key, statistics, fetch, before)
        x = self.final_norm(x, rows.pathway.reshape(segment.shape))
        num = batch["task"].shape[0]
        pooled = segment_mean(x.reshape(-1, x.shape[-1]), rows.example, num)
        task = jnp.maximum(batch["task"], 0)
        logits = jnp.zeros((num, 0))
        if self.heads is not None:
            logits = self.heads(pooled, table.head[task], self.size.outputs)
        levels = None
        if self.taps is not None and before is not None:
            levels = jnp.concatenate([_level(rows_, rows.example, num) for rows_ in before], axis=-1)
            logits = logits + self.taps(levels, table.head[task], self.size.outputs)
        token_logits = None
        if self.token_heads is not None:
            flat = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
            token_logits = self.token_heads(flat, table.head[rows.task], self.size.token_outputs)
            token_logits = token_logits.reshape(*segment.shape, -1)
        return Outputs(logits, token_logits, pooled, layers, levels)

    def context(self, batch: dict[str, Any], table: TaskTable) -> RowContext:
        """The integers of each token and each example."""
        example = batch["segment"].reshape(-1) - 1
        example_task = batch["task"]
        safe = jnp.maximum(example_task, 0)
        task = jnp.where(example >= 0, safe[jnp.maximum(example, 0)], 0)
        embedding = None if self.task_embedding is None else self.task_embedding[...][safe]
        return RowContext(
            example, task, table.gate[task], table.pathway[task], example_task, table.gate[safe], embedding
        )

    @jax.named_scope("encoders")
    def embed(self, batch: dict[str, Any]) -> jax.Array:
        """Each stream through its encoder, then every token to its place: `[B, S, D]` in the compute type."""
        dtype = jnp.dtype(self.config.dtype)
        encoded = [self.encoders[s](batch[s]).astype(dtype) for s in STREAMS if s in batch and s in self.encoders]
        rows = jnp.concatenate(encoded)[batch["source"].reshape(-1)]
        rows = rows.reshape(*batch["segment"].shape, -1)
        return jnp.where((batch["segment"] > 0)[..., None], rows, jnp.zeros((), dtype))

    def trunk(
        self,
        x: jax.Array,
        segment: jax.Array,
        rows: RowContext,
        table: TaskTable,
        balance: BalanceOptions,
        key: jax.Array | None,
        statistics: bool,
        fetch: Callable[[int], Fetch] | None = None,
        before: list[jax.Array] | None = None,
    ) -> tuple[jax.Array, tuple[LayerOutput, ...]]:
        """All layers, one after the other or as a scan over periods of layers.

        `before` gets the rows that enter each layer; not of scanned layers.
        """
        config = self.config

        def run(graph: Any, state: Any, x: jax.Array, slots: Any, key: Any, fetch: Fetch | None = None):
            block = nnx.merge(graph, state)
            options = {"key": key, "statistics": statistics, "fetch": fetch}
            return block(x, segment, rows, slots, balance, **options)

        run = jax.checkpoint(run, static_argnums=(0, 5)) if config.remat else run
        keys = None if key is None else jax.random.split(key, config.layers)
        if config.scan_layers:
            return self._scan(run, x, table, keys)
        outputs, routed = [], 0
        for i, block in enumerate(self.blocks):
            graph, state = nnx.split(block)
            slots = table.slots[routed] if config.routed(i) else None
            own = fetch(i) if fetch is not None and slots is not None else None
            if before is not None:
                before.append(x)
            x, output = run(graph, state, x, slots, None if keys is None else keys[i], own)
            if output is not None:
                outputs.append(output)
                routed += 1
        return x, tuple(outputs)

    def _scan(self, run: Any, x: jax.Array, table: TaskTable, keys: jax.Array | None):
        period = self.config.routed_every
        split = [nnx.split(block) for block in self.blocks]
        length = self.config.layers // period
        by_period = None if keys is None else keys.reshape(length, period, *keys.shape[1:])

        def body(x: jax.Array, carried: Any):
            states, slots, keys = carried
            output = None
            for j, (graph, _) in enumerate(split):
                last = slots if j == period - 1 else None
                x, output = run(graph, states[j], x, last, None if keys is None else keys[j], None)
            return x, output

        x, stacked = jax.lax.scan(body, x, ([s for _, s in split], jnp.stack(table.slots), by_period))
        return x, tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(length))


class Head(nnx.Module):
    """The linear heads of many tasks, one after the other: a task owns a run of rows."""

    def __init__(self, rows: int, width: int, bias: bool = True) -> None:
        self.kernel = nnx.Param(jnp.zeros((rows, width)))
        self.bias = nnx.Param(jnp.zeros((rows,))) if bias else None

    @jax.named_scope("heads")
    def __call__(self, x: jax.Array, first: jax.Array, outputs: int) -> jax.Array:
        """`x [R, D]`, `first [R]` (each row's first head row) -> `[R, outputs]` float32.

        Columns past a task's own outputs hold another task's logits: mask them by the task's number of outputs.
        """
        kernel, bias = self.kernel[...], jnp.zeros(()) if self.bias is None else self.bias[...]
        last = kernel.shape[0] - 1
        index = jnp.minimum(first[:, None] + jnp.arange(outputs), last)
        if kernel.shape[0] <= FULL_HEADS:
            return jnp.take_along_axis(x @ kernel.T + bias, index, axis=1)
        return jnp.einsum("rd,rod->ro", x, kernel[index]) + (bias[index] if bias.ndim else bias)


def _level(x: jax.Array, example: jax.Array, num: int) -> jax.Array:
    """`[N, D]`: the mean over each example of its rows `x [B, S, D]`, each divided by its root mean square."""
    wide = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return segment_mean(wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPSILON), example, num)


def _stacked(blocks: list[Block], period: int) -> list[Block]:
    """Blocks at the same place of each period, their leaves stacked on a new leading axis."""
    groups = [blocks[j::period] for j in range(period)]
    stacked = []
    for group in groups:
        graph, first = nnx.split(group[0])
        states = [first, *(nnx.split(block)[1] for block in group[1:])]
        stacked.append(nnx.merge(graph, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)))
    return stacked
