"""AdamW with a schedule, clipping and a mask of what decays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from pathways.config import TrainConfig
from pathways.training.moments import scale_by_factored, scale_by_stored_adam

DECAYED = (
    "qkv",
    "output",
    "w_in",
    "w_out",
    "w_gate",
    "w_up",
    "w_down",
    "project",
    "conv1",
    "conv2",
    "kernel",
    "kernel2",
)
"""Names of matrices. Norms, biases, embeddings and gates do not decay."""


def make_schedule(config: TrainConfig) -> Callable[[Any], Any]:
    """Step -> learning rate: one-cycle (Smith and Topin 2017), or linear warm-up then cosine to zero.

    The peak comes after `warmup * steps` steps, at the latest with the last step.
    """
    if config.schedule == "one_cycle":
        latest = 1.0 - 0.5 / config.steps
        return optax.cosine_onecycle_schedule(config.steps, config.learning_rate, min(max(config.warmup, 1e-3), latest))
    warmup = int(config.warmup * config.steps)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(config.steps, warmup + 1))


def make_optimizer(
    config: TrainConfig,
    schedule: Callable[[Any], Any] | None = None,
    rate_of: Callable[[tuple[str, ...]], float] | None = None,
) -> optax.GradientTransformation:
    """AdamW as configured.

    Args:
        schedule: instead of the configured one.
        rate_of: multiplies the rate of a leaf, by its path; 0 freezes it.
    """
    steps = [
        optax.clip_by_global_norm(config.clip),
        _scale_by_moments(config),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule or make_schedule(config)),
    ]
    if rate_of is not None:
        steps.append(_scale_leaves(rate_of))
    return optax.chain(*steps)


def _scale_by_moments(config: TrainConfig) -> optax.GradientTransformation:
    """Adam, with the moments of banks of experts kept as `train.moments` says."""
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.moments == "float32":
        return adam
    if config.moments == "bfloat16":
        experts = scale_by_stored_adam(config.beta1, config.beta2, config.epsilon, jnp.bfloat16)
    else:
        experts = scale_by_factored(config.beta2, config.epsilon, _matrix)
    return optax.partition({"experts": experts, "others": adam}, _owners)


def _matrix(path: Any) -> bool:
    return names(path)[-1] in DECAYED


def _owners(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: "experts" if bank_leaf(names(path)) else "others", params)


def bank_leaf(path: Sequence[str]) -> bool:
    """Whether a parameter is one of a bank of routed experts."""
    return "banks" in path


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay shrinks."""
    return jax.tree_util.tree_map_with_path(lambda path, _: names(path)[-1] in DECAYED, params)


def names(path: Any) -> tuple[str, ...]:
    """A jax key path as names, without the wrappers that NNX puts around a value."""
    found = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
    return tuple(name for name in found if name != "value")


def _scale_leaves(rate_of: Callable[[tuple[str, ...]], float]) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree_util.tree_map_with_path(lambda path, u: u * rate_of(names(path)), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
