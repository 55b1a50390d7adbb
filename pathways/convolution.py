"""What a configuration with a convolutional trunk must be, and what follows from its numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from experts.image_kinds import GROUPS
from tasks.encoded import EncoderSettings
from tasks.errors import UserError

if TYPE_CHECKING:
    from pathways.config import Config, ModelConfig


def places(config: ModelConfig, options: EncoderSettings) -> tuple[int, ...]:
    """The places that are left after each layer's stride."""
    side, found = options.patch, []
    for stride in config.strides:
        side = -(-side // stride)
        found.append(side * side)
    return tuple(found)


def feature_width(config: ModelConfig, options: EncoderSettings) -> int:
    """What a head reads: all places that the strides leave, times the channels."""
    return places(config, options)[-1] * config.width


def pooled_width(config: Config) -> int:
    """Width of `Outputs.pooled`, which the heads of examples read, with either trunk."""
    model = config.model
    return feature_width(model, config.encoders) if model.trunk == "conv" else model.width


def mistakes(config: Config) -> Iterator[tuple[str, str, str]]:
    """What a convolutional trunk cannot be: the problem, what was expected, what came."""
    model, encoders = config.model, config.encoders
    if len(model.strides) != model.layers or min(model.strides, default=1) < 1:
        yield (
            "Each layer of a convolutional trunk needs a stride.",
            f"model.strides of {model.layers} numbers from 1 on, as model.layers says",
            f"model.strides = {list(model.strides)}",
        )
    if model.width % GROUPS:
        got = f"model.width = {model.width}"
        yield "The groups of the group norm do not divide the channels.", f"model.width a multiple of {GROUPS}", got
    if encoders.patch != encoders.stride or encoders.image_tokens != 1 or encoders.max_length != 1:
        yield (
            "A convolutional trunk reads an image as one window.",
            "encoders.patch = encoders.stride, the side of an image; encoders.image_tokens = encoders.max_length = 1",
            f"patch = {encoders.patch}, stride = {encoders.stride}, image_tokens = {encoders.image_tokens}, "
            f"max_length = {encoders.max_length}",
        )
    of_tokens = {
        "gate.unit": (model.gate.unit, "example"),
        "shared_experts": (model.shared_experts, 0),
        "routed_every": (model.routed_every, 1),
        "scan_layers": (model.scan_layers, False),
    }
    for name, (value, only) in of_tokens.items():
        if value != only:
            yield "A convolutional trunk does not have this.", f"model.{name} = {only}", f"model.{name} = {value}"


def refuse_adding(config: ModelConfig, where: str) -> None:
    """Refuses to train one task of a model, new or old, whose parts cannot be taken apart yet.

    Raises:
        UserError: for a convolutional trunk, or a gate that is a matrix.
    """
    trunk, kind = config.trunk, config.gate.kind
    if trunk == "conv" or kind == "gumbel_matrix":
        raise UserError(
            "One task of such a model cannot be trained alone yet; nothing was changed.",
            where=where,
            expected='model.trunk = "tokens" and a gate that looks at rows',
            got=f"model.trunk = {trunk}, model.gate.kind = {kind}",
            fix="train all tasks jointly",
        )
