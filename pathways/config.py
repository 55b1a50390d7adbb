"""Configuration: typed, frozen, validated when read, written back fully resolved.

The same dataclasses validate a TOML file, give the command line its `--section.field` overrides with their help, and
are stored with the model. Reading a configuration runs no code from it.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from tasks.encoded import EncoderSettings
from tasks.errors import UserError
from tasks.spec import Task


@dataclass(frozen=True)
class GateOptions:
    """How rows choose experts.

    Attributes:
        kind: `noisy_top_k` (Shazeer 2017), `softmax_top_k`, `sigmoid_top_k` with a balance bias (loss-free), or
            `gumbel_matrix` (Maziarz 2019), which chooses per gate and not per row: per task where scope is `task`.
        scope: one gate `shared` by all tasks, shared but conditioned on a `task_embedding`, or one per `task`.
        top_k: experts per row; for `gumbel_matrix` the most.
        renormalize: make the chosen weights of a row sum to one (`softmax_top_k` and `gumbel_matrix`; the others
            always do).
        temperature: of the samples of `gumbel_matrix`.
        unit: route each `token`, or each whole `example` (all its tokens take the same experts).
    """

    kind: Literal["noisy_top_k", "softmax_top_k", "sigmoid_top_k", "gumbel_matrix"] = "softmax_top_k"
    scope: Literal["shared", "task_embedding", "task"] = "shared"
    top_k: int = 2
    renormalize: bool = True
    temperature: float = 1.0
    unit: Literal["token", "example"] = "token"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the trunk and its banks.

    Attributes:
        trunk: transformer layers over `tokens`, or `conv`: routed layers of image experts over whole images. `heads`,
            `neighbours`, `hidden`, `shared_experts`, `routed_every` and `scan_layers` are of tokens only.
        width: D, the width of a row, or the channels of an image.
        layers: transformer layers, or layers of image experts.
        strides: of each layer of `conv`.
        heads: attention heads; must divide `width`.
        neighbours: tokens on either side that a token takes in before attention, scaled per channel; 0 for none.
        hidden: F, the hidden width of one expert (and of a dense feed-forward layer, times `top_k`).
        experts: experts per bank of a routed layer, by kind, e.g. `{mlp = 32, identity = 1}`, or, of images,
            `{conv3x3 = 2, max_pool = 1}`.
        shared_experts: experts of the first kind that every row visits besides those it chooses.
        routed_every: every n-th layer is routed, the others are dense; 1 routes all.
        dropout: on the output of attention and feed-forward, or on what the heads of `conv` read, in training.
        dtype: compute type; parameters, router and losses stay float32.
        remat: recompute each layer in the backward pass, to save memory.
        scan_layers: one compiled layer for all, so that compile time does not grow with depth.
    """

    trunk: Literal["tokens", "conv"] = "tokens"
    width: int = 128
    layers: int = 4
    strides: tuple[int, ...] = ()
    heads: int = 4
    neighbours: int = 2
    hidden: int = 256
    experts: dict[str, int] = field(default_factory=lambda: {"mlp": 16})
    shared_experts: int = 0
    routed_every: int = 1
    gate: GateOptions = field(default_factory=GateOptions)
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    scan_layers: bool = False

    def __hash__(self) -> int:
        # The generated one would fail on the dict; networks carry their configuration as a compiled-in constant.
        return hash(repr(self))

    def routed(self, layer: int) -> bool:
        """Whether the layer (from 0) has routed experts."""
        return layer % self.routed_every == self.routed_every - 1

    @property
    def routed_layers(self) -> list[int]:
        """The numbers of the layers that have routed experts."""
        return [layer for layer in range(self.layers) if self.routed(layer)]

    @property
    def num_experts(self) -> int:
        """E, experts of one routed layer, all kinds together."""
        return sum(self.experts.values())


@dataclass(frozen=True)
class BalanceOptions:
    """Weights of the balance losses and the step of the balance bias.

    Attributes:
        importance, load: CV squared of the gate values and of the smooth load per expert (Shazeer 2017, eq. 7, 11).
        load_balancing: the Switch loss (Fedus et al. 2021, eq. 4).
        z: router z-loss (ST-MoE, eq. 5).
        bias_rate: u of loss-free balancing; used by `sigmoid_top_k` only.
    """

    importance: float = 0.0
    load: float = 0.0
    load_balancing: float = 0.01
    z: float = 0.001
    bias_rate: float = 0.001


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        steps: optimizer steps.
        rows: B, packed rows of `max_length` tokens in a batch.
        accumulate: batches whose gradients are summed for one step.
        learning_rate: the peak.
        schedule: `one_cycle` or `cosine` (linear warm-up, then cosine to zero).
        warmup: fraction of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices only.
        clip: global norm of the gradient.
        beta1, beta2, epsilon: of Adam.
        temperature: tasks are sampled in proportion to `weight * rows ** (1 / temperature)`.
        moments: how the optimizer keeps what it remembers of experts: in `float32`, in `bfloat16` (half the memory), or
            `factored` (nearly none: Shazeer 2017, appendix D).
        lazy: let the AdamW of idle experts wait until a row wakes them, which ends in the same weights; `auto`: where a
            step's rows can reach half of every bank at most.
        seed: of parameters, order of data, noise and dropout.
        eval_every: steps between validations; 0 only at the end.
        eval_rows: the most validation rows of a task looked at in training; the end uses all. Each task weighs as many
            in the mean that says which parameters were best.
        patience: validations without a better mean before training stops; 0 never.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of `metrics.jsonl`.
        statistics: count routing while training.
        statistics_every: steps between records of routing statistics.
        max_bad_steps: stop after so many steps in a row with a loss or gradient that is not finite.
    """

    steps: int = 1000
    rows: int = 32
    accumulate: int = 1
    learning_rate: float = 2e-3
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.98
    epsilon: float = 1e-8
    temperature: float = 2.0
    moments: Literal["float32", "bfloat16", "factored"] = "float32"
    lazy: Literal["auto", "on", "off"] = "auto"
    seed: int = 0
    eval_every: int = 200
    eval_rows: int = 500
    patience: int = 0
    checkpoint_every: int = 500
    log_every: int = 20
    statistics: bool = True
    statistics_every: int = 200
    max_bad_steps: int = 20


@dataclass(frozen=True)
class MeshOptions:
    """The devices of a run.

    Attributes:
        data: devices that share the rows of each batch; -1 takes all there are. `train.rows` must be a multiple.
    """

    data: int = 1


@dataclass(frozen=True)
class Config:
    """Everything a run needs."""

    model: ModelConfig = field(default_factory=ModelConfig)
    encoders: EncoderSettings = field(default_factory=EncoderSettings)
    balance: BalanceOptions = field(default_factory=BalanceOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshOptions = field(default_factory=MeshOptions)
    tasks: tuple[Task, ...] = ()


SECTIONS = ("model", "encoders", "balance", "train", "mesh")
LEAST = {
    **dict.fromkeys(("model.width", "model.layers", "model.heads", "model.hidden", "model.routed_every"), 1),
    **dict.fromkeys(("train.steps", "train.rows", "train.accumulate", "train.log_every", "train.temperature"), 1),
    **dict.fromkeys(("train.statistics_every", "train.max_bad_steps"), 1),
    **dict.fromkeys(("train.eval_every", "train.eval_rows", "train.patience", "train.checkpoint_every"), 0),
    **dict.fromkeys(("model.neighbours", "model.shared_experts", "train.seed", "train.weight_decay"), 0),
    **dict.fromkeys(("balance.importance", "balance.load", "balance.load_balancing", "balance.z"), 0),
    "balance.bias_rate": 0,
}
"""The least value of a field; 0 often means "never"."""
T = typing.TypeVar("T")


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Reads a TOML file and applies `{"train.steps": 50}` overrides.

    Raises:
        UserError: the file is missing or not TOML, a key is unknown (the nearest is named), a value has the wrong
            type or an impossible size.
    """
    from tasks.config import tasks_from_toml

    path = Path(path)
    table = read_toml(path)
    task_tables = table.pop("tasks", [])
    if not isinstance(task_tables, list):
        raise UserError("The tasks must be a list of tables.", where=str(path), expected="[[tasks]]", got="[tasks]")
    for key, value in (overrides or {}).items():
        _put(table, key, value)
    config = from_dict(Config, table, where=str(path))
    return check(dataclasses.replace(config, tasks=tuple(tasks_from_toml(task_tables, path.parent))), str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, or a UserError that names the place."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], 1)
        fix = f"did you mean {path.parent / near[0]}?" if near else "give the path of a TOML file"
        raise UserError("The configuration file does not exist.", where=str(path), fix=fix) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("The configuration is not valid TOML.", where=str(path), got=str(error)) from None
    except OSError as error:
        raise UserError("The configuration cannot be read.", where=str(path), got=str(error)) from None


def from_dict(kind: type[T], table: dict[str, Any], where: str) -> T:
    """Converts nested plain tables to a configuration dataclass, strictly."""
    check_keys(kind, table, where)
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise UserError("A configuration value is wrong.", where=where, got=str(error)) from None


def check_keys(kind: Any, table: dict[str, Any], where: str, prefix: str = "") -> None:
    """Raises for a key that no field has, naming the nearest field."""
    hints = typing.get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1)
            fix = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(hints)}"
            raise UserError("Unknown configuration key.", where=where, got=f"{prefix}{key}", fix=fix)
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            check_keys(hints[key], value, where, f"{prefix}{key}.")


def check(config: Config, where: str = "configuration") -> Config:
    """Refuses sizes that cannot work together, naming both numbers."""
    # Imported here: the kinds are arrays' business, and reading the types of a configuration must stay light.
    from experts.image_kinds import IMAGE_KINDS
    from experts.kinds import KINDS
    from pathways.convolution import mistakes

    model, train = config.model, config.train

    def need(ok: bool, problem: str, expected: str, got: str) -> None:
        if not ok:
            raise UserError(problem, where=where, expected=expected, got=got)

    for name, least in LEAST.items():
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        need(value >= least, "A value is too small.", f"{name} >= {least}", f"{name} = {value}")
    need(
        model.width % model.heads == 0,
        "The heads do not divide the width.",
        f"model.width a multiple of model.heads = {model.heads}",
        f"model.width = {model.width}",
    )
    need(
        1 <= model.gate.top_k <= model.num_experts,
        "A row cannot choose that many experts.",
        f"1 <= model.gate.top_k <= {model.num_experts}, the experts of a layer",
        f"model.gate.top_k = {model.gate.top_k}",
    )
    need(
        not model.scan_layers or model.layers % model.routed_every == 0,
        "Scanning needs whole periods of layers.",
        f"model.layers a multiple of model.routed_every = {model.routed_every}",
        f"model.layers = {model.layers}",
    )
    kinds = IMAGE_KINDS if model.trunk == "conv" else KINDS
    for kind, number in model.experts.items():
        names = ", ".join(kinds)
        need(kind in kinds, "Unknown kind of expert.", f"model.experts of the kinds {names}", f"model.experts.{kind}")
        need(number >= 0, "A number of experts is negative.", f"model.experts.{kind} >= 0", f"{number}")
    for problem, expected, got in mistakes(config) if model.trunk == "conv" else ():
        need(False, problem, expected, got)
    gumbel = model.gate.kind == "gumbel_matrix"
    need(
        not gumbel or model.gate.scope != "task_embedding",
        "A Gumbel matrix does not look at embeddings.",
        "model.gate.scope task or shared",
        "task_embedding",
    )
    need(model.gate.temperature > 0, "A value must be positive.", "model.gate.temperature > 0", "0 or less")
    first = next(iter(model.experts))
    need(
        not model.shared_experts or bool(KINDS[first].parameters(1, 1)),
        "Shared experts are of the first kind, which must have parameters.",
        "another kind first in model.experts",
        f"model.shared_experts = {model.shared_experts} of the kind {first}",
    )
    need(
        config.encoders.vocab_size >= 256,
        "A byte-level vocabulary holds at least the 256 bytes.",
        "encoders.vocab_size >= 256",
        f"encoders.vocab_size = {config.encoders.vocab_size}",
    )
    for name in ("train.learning_rate", "train.clip", "train.epsilon"):
        value = getattr(train, name.split(".")[1])
        need(value > 0, "A value must be positive.", f"{name} > 0", f"{name} = {value}")
    need(
        train.moments != "bfloat16" or 1 - train.beta2 >= 2**-8,
        "bfloat16 cannot hold an average that moves so slowly.",
        "train.beta2 <= 0.996 with train.moments = bfloat16",
        f"train.beta2 = {train.beta2}",
    )
    need(0 <= train.warmup <= 1, "A fraction is needed.", "0 <= train.warmup <= 1", f"train.warmup = {train.warmup}")
    for name in ("model.dropout", "train.beta1", "train.beta2"):
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        need(0 <= value < 1, "A fraction below one is needed.", f"0 <= {name} < 1", f"{name} = {value}")
    return config


def fields_of(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields `(dotted name, type, default)` of every leaf field, for the command line."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield from fields_of(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            default = item.default if item.default is not dataclasses.MISSING else None
            yield f"{prefix}{item.name}", hint, default


def _put(table: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UserError("An override names a key inside a plain value.", where=dotted, got=f"{name} = {table!r}")
    table[last] = value
