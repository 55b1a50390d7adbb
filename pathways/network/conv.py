"""The convolutional network: an image an example, through layers of routed image experts, to a linear head per task.

The second trunk, chosen by `model.trunk = "conv"`. It stands behind the same interface as `Network`: the same batch and
table go in, the same `Outputs` come out, and heads, counters and balance are shared. Each layer is routed and has a
stride; an example takes the same experts at all of its places. The shape is that of Maziarz et al. 2019
(arXiv:1910.04915): a 1x1 convolution, the layers, dropout, the head over all places and channels that are left. No
statistics across examples.

Axis letters: N examples, H, W height and width, P side of an image, D channels, G gates, M candidates, K experts per
example, E slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experts.convolution import convolve
from experts.image_kinds import group_norm, he_normal
from experts.images import apply_image_experts
from pathways.config import BalanceOptions, ModelConfig
from pathways.convolution import feature_width
from pathways.devices import over_rows
from pathways.network.layers import dropout
from pathways.network.network import Head, NetworkSize, Outputs, TaskTable
from pathways.network.routed import LayerOutput, RoutedFeedForward, RowContext
from routing.plan import Plan
from tasks.encoded import EncoderSettings
from tasks.errors import UserError


class ImageStem(nnx.Module):
    """Pixels to channels: a 1x1 convolution, group norm, ReLU."""

    def __init__(self, options: EncoderSettings, width: int, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(he_normal(rngs.params(), (1, 1, 1, options.channels, width), jnp.float32)[0])
        self.scale = nnx.Param(jnp.ones((width,)))
        self.bias = nnx.Param(jnp.zeros((width,)))

    def __call__(self, images: jax.Array, dtype: Any) -> jax.Array:
        """`[N, P, P, channels]` in 0..1 -> `[N, P, P, D]` of a compute type."""
        x: jax.Array = convolve((images * 2.0 - 1.0).astype(dtype), self.kernel[...].astype(dtype), (1, 1))
        return jax.nn.relu(group_norm(x, self.scale[...], self.bias[...]))


class RoutedImages(RoutedFeedForward):
    """Gates over slots of banks of image experts. What a gate sees of an example is the mean over its places."""

    def images(
        self,
        x: jax.Array,
        rows: RowContext,
        slots: jax.Array,
        weights: BalanceOptions,
        *,
        stride: int,
        key: jax.Array | None,
        statistics: bool,
    ) -> tuple[jax.Array, LayerOutput]:
        """`x [N, H, W, D]`, `slots [G, M]` -> `[N, H', W', D]` and the layer's accounts, which count examples."""
        routing, plan = self.plan(jnp.mean(x, axis=(1, 2)), rows, slots, key)
        banks = self.placed()

        def compute(leaves: Any, x: jax.Array, plan: Plan) -> jax.Array:
            placed = {kind: (leaves[kind], start, num) for kind, (_, start, num) in banks.items()}
            return apply_image_experts(placed, x, plan, stride=stride)

        y = over_rows(compute, {kind: leaves for kind, (leaves, *_) in banks.items()}, x, plan)
        return y, self.account(routing, plan, rows, slots, weights, statistics=statistics)


class ConvBlock(nnx.Module):
    """One layer: the routed image experts and their stride."""

    def __init__(self, config: ModelConfig, size: NetworkSize, layer: int, rngs: nnx.Rngs) -> None:
        self.routed = RoutedImages(config, dict(size.experts[layer]), size.gates, size.candidates[layer], rngs)
        self.stride = config.strides[layer]

    def __call__(self, x: jax.Array, rows: RowContext, slots: jax.Array, weights: BalanceOptions, **options: Any):
        """See `RoutedImages.images`."""
        return self.routed.images(x, rows, slots, weights, stride=self.stride, **options)


class ConvNetwork(nnx.Module):
    """Stem, routed layers and heads. See `Outputs` for what a call gives; `pooled` is what the heads read.

    Raises:
        UserError: tasks with other inputs than images.
    """

    def __init__(self, config: ModelConfig, options: EncoderSettings, size: NetworkSize, rngs: nnx.Rngs) -> None:
        if size.streams != ("image",):
            raise UserError(
                "A convolutional trunk reads images only.",
                where="model.trunk",
                expected="tasks whose one input is an image column",
                got=f"inputs of the kinds {', '.join(size.streams)}",
                fix='use model.trunk = "tokens"',
            )
        self.config, self.size = config, size
        self.encoders = nnx.Dict({"image": ImageStem(options, config.width, rngs)})
        self.blocks = nnx.List([ConvBlock(config, size, i, rngs) for i in range(config.layers)])
        self.heads = Head(size.heads, feature_width(config, options))
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
        fetch: None = None,
    ) -> Outputs:
        """Runs a batch (`tasks.batch`) whose examples are one image each. With a key: dropout and samples of gates."""
        del fetch
        rows = self.context(batch, table)
        dtype = jnp.dtype(self.config.dtype)
        x = self.encoders["image"](images_of(batch), dtype)
        keys = [None] * (len(self.blocks) + 1) if key is None else list(jax.random.split(key, len(self.blocks) + 1))
        layers = []
        for block, slots, own in zip(self.blocks, table.slots, keys, strict=False):
            x, output = self._run(block, x, rows, slots, balance, own, statistics)
            layers.append(output)
        features = x.reshape(x.shape[0], -1).astype(jnp.float32)
        task = jnp.maximum(batch["task"], 0)
        logits = self.heads(dropout(features, self.config.dropout, keys[-1]), table.head[task], self.size.outputs)
        return Outputs(logits, None, features, tuple(layers))

    def _run(self, block: Any, x: Any, rows: RowContext, slots: Any, balance: Any, key: Any, statistics: bool):
        graph, state = nnx.split(block)

        def run(state: Any, x: jax.Array, slots: jax.Array, key: Any):
            options = {"key": key, "statistics": statistics}
            return nnx.merge(graph, state)(x, rows, slots, balance, **options)

        return (jax.checkpoint(run) if self.config.remat else run)(state, x, slots, key)

    def context(self, batch: dict[str, Any], table: TaskTable) -> RowContext:
        """The integers of each example, which is its own only row."""
        task, safe = batch["task"], jnp.maximum(batch["task"], 0)
        example = jnp.where(task >= 0, jnp.arange(task.shape[0]), -1)
        embedding = None if self.task_embedding is None else self.task_embedding[...][safe]
        gate = table.gate[safe]
        return RowContext(example, safe, gate, table.pathway[safe], task, gate, embedding)


def images_of(batch: dict[str, Any]) -> jax.Array:
    """The image of each example, `[N, P, P, channels]`; of padding, some image."""
    segment, source = batch["segment"].reshape(-1), batch["source"].reshape(-1)
    num = batch["task"].shape[0]
    token = jnp.zeros((num + 1,), jnp.int32).at[jnp.where(segment > 0, segment - 1, num)].max(source)
    return batch["image"]["patch"][token[:num]]
