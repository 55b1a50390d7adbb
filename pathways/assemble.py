"""Between the model's named components and the arrays of a network that holds some of its pathways.

`plan_network` decides what a network for some tasks holds; `read_arrays` fills it from the components; `components`
takes a trained network apart again. Joint training, a new task's sub-model and prediction all pass through here.

Axis letters: D width, P stacks of norms, G gates, M candidates of the widest gate, E experts, L layers, O head rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pathways.config import ModelConfig
from pathways.network.network import NetworkSize
from pathways.pathway import EncoderCopy, GateSpec, Pathway
from tasks.batch import STREAMS
from tasks.fitted import FittedTask

Path = tuple[Any, ...]
Tree = dict[Any, Any]


@dataclass(frozen=True)
class Layout:
    """What a network holds and where it stands.

    Attributes:
        size: the sizes it is built with.
        tasks, norms, gates: names, in the order of their integers.
        experts: per routed layer, kind -> indices in the model's bank, in the order of the network's bank.
        slots: per routed layer `[G, M]` int32.
        head_first, head_rows, token_level: per task.
        pathway, gate: per task, its row in the stacks of norms and of gates.
        encoders: name of the encoders.
        copied: what of them stands apart under that name.
        taps: per task, whether its head has them.
        ranks: per gate and routed layer, the rank of its adapter.
    """

    size: NetworkSize
    tasks: tuple[str, ...]
    norms: tuple[str, ...]
    gates: tuple[str, ...]
    experts: tuple[dict[str, np.ndarray], ...]
    gate_sizes: tuple[tuple[int, ...], ...]
    slots: tuple[np.ndarray, ...]
    head_first: np.ndarray
    head_rows: np.ndarray
    token_level: np.ndarray
    pathway: np.ndarray
    gate: np.ndarray
    encoders: str
    copied: EncoderCopy
    taps: tuple[bool, ...]
    ranks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Part:
    """`array[at]` of the network is the component `name`, or its `rows` where those are given.

    Of two parts of an array, the later lies over the earlier.
    """

    name: str
    at: tuple[Any, ...] = ()
    rows: np.ndarray | int | None = None


def plan_network(
    config: ModelConfig,
    vocab_size: int,
    pathways: Sequence[Pathway],
    gates: Mapping[str, GateSpec],
    fitted: Sequence[FittedTask],
    copied: EncoderCopy | None = None,
) -> Layout:
    """Lays out a network for these tasks: the union of their experts, the slots of each gate, the heads in a row.

    Args:
        copied: what the tasks have of the encoders as a copy of their own.

    Raises:
        ValueError: tasks whose encoders differ, which cannot stand in one network.
    """
    encoders = {p.encoders for p in pathways}
    if len(encoders) > 1:
        raise ValueError(f"one network has one set of encoders, got {sorted(encoders)}")
    norm_names = tuple(dict.fromkeys(p.norms for p in pathways))
    gate_names = tuple(dict.fromkeys(p.gate for p in pathways))
    experts, slots, sizes = [], [], []
    routed_layers = len(config.routed_layers)
    for layer in range(routed_layers):
        chosen = [gates[name].candidates[layer] for name in gate_names]
        union = {
            kind: np.unique(np.concatenate([np.asarray(c.get(kind, ()), np.int64) for c in chosen]))
            for kind in config.experts
            if any(c.get(kind) for c in chosen)
        }
        experts.append(union)
        slots.append(_slot_table(union, chosen, config.gate.top_k))
        sizes.append(tuple(sum(len(v) for v in c.values()) for c in chosen))
    adapted = {p.gate: p.adapters for p in pathways if p.adapters}
    ranks = tuple(adapted.get(name, (0,) * routed_layers) for name in gate_names)
    token_level = np.array([f.is_token_level for f in fitted], bool)
    rows = np.array([f.num_outputs for f in fitted], np.int32)
    first = np.zeros(len(fitted), np.int32)
    for level in (False, True):
        mine = token_level == level
        first[mine] = np.cumsum(rows[mine]) - rows[mine]
    size = NetworkSize(
        streams=tuple(s for s in STREAMS if any(s in p.streams for p in pathways)),
        vocab_size=vocab_size,
        tasks=len(pathways),
        pathways=len(norm_names),
        gates=len(gate_names),
        experts=tuple(tuple((kind, len(index)) for kind, index in union.items()) for union in experts),
        candidates=tuple(table.shape[1] for table in slots),
        heads=int(rows[~token_level].sum()),
        token_heads=int(rows[token_level].sum()),
        outputs=int(rows[~token_level].max(initial=0)),
        token_outputs=int(rows[token_level].max(initial=0)),
        taps=any(p.taps for p in pathways),
        adapters=tuple(max(of_layer) for of_layer in zip(*ranks, strict=True)) if any(map(any, ranks)) else (),
    )
    return Layout(
        size,
        tuple(p.task for p in pathways),
        norm_names,
        gate_names,
        tuple(experts),
        tuple(sizes),
        tuple(slots),
        first,
        rows,
        token_level,
        np.array([norm_names.index(p.norms) for p in pathways], np.int32),
        np.array([gate_names.index(p.gate) for p in pathways], np.int32),
        encoders.pop(),
        copied or {},
        tuple(p.taps for p in pathways),
        ranks,
    )


def _slot_table(union: dict[str, np.ndarray], chosen: Sequence[Mapping[str, Sequence[int]]], least: int) -> np.ndarray:
    """`[G, M]`, M at least `least`: the slot of each logit; the number of slots pads gates with fewer candidates."""
    starts, total = {}, 0
    for kind, index in union.items():
        starts[kind] = total
        total += len(index)
    widest = max(least, *(sum(len(v) for v in c.values()) for c in chosen))
    table = np.full((len(chosen), widest), total, np.int32)
    for g, candidates in enumerate(chosen):
        found = [starts[k] + np.searchsorted(union[k], np.asarray(v)) for k, v in candidates.items() if len(v)]
        row = np.concatenate(found) if found else np.zeros(0, np.int32)
        table[g, : len(row)] = row
    return table


def parts(path: Path, layout: Layout, config: ModelConfig) -> list[Part]:
    """The components that one array of a network is made of. `path` starts with `layers, i` for arrays of a layer."""
    match path:
        case ("encoders", stream, leaf):
            return _encoder_parts(layout, f"{stream}/{leaf}")
        case ("layers", i, ("attention" | "dense") as part, leaf):
            return [Part(f"trunk/layer{i}/{part}/{leaf}")]
        case ("layers", i, "routed", "shared", leaf):
            return [Part(f"trunk/layer{i}/shared/{leaf}")]
        case ("layers", i, "routed", "banks", kind, leaf):
            return [Part(f"banks/layer{i}/{kind}/{leaf}", rows=layout.experts[_routed_index(config, i)][kind])]
        case ("layers", i, "routed", ("adapter_in" | "adapter_out") as leaf):
            return _adapter_parts(layout, _routed_index(config, i), f"layer{i}/{leaf}")
        case ("layers", i, "routed", leaf):
            sizes = layout.gate_sizes[_routed_index(config, i)]
            names = zip(layout.gates, sizes, strict=True)
            return [Part(f"gates/{g}/layer{i}/{leaf}", (n, ..., slice(size))) for n, (g, size) in enumerate(names)]
        case ("layers", i, ("attention_norm" | "norm") as which, "scale"):
            row = 2 * i + (which == "norm")
            return [Part(f"norms/{p}", (n,), row) for n, p in enumerate(layout.norms)]
        case ("final_norm", "scale"):
            return [Part(f"norms/{p}", (n,), 2 * config.layers) for n, p in enumerate(layout.norms)]
        case (("heads" | "token_heads") as which, leaf):
            return list(_head_parts(layout, which == "token_heads", leaf))
        case ("taps", "kernel"):
            return list(_head_parts(layout, False, "taps", layout.taps))
        case ("task_embedding",):
            return [Part(f"heads/{task}/embedding", (n,)) for n, task in enumerate(layout.tasks)]
    raise KeyError(f"no component holds the array {'/'.join(map(str, path))}")


def _encoder_parts(layout: Layout, leaf: str) -> list[Part]:
    shared, own = Part(f"encoders/{leaf}"), f"encoders/{layout.encoders}/{leaf}"
    if leaf not in layout.copied:
        return [shared]
    rows = layout.copied[leaf]
    return [Part(own)] if rows is None else [shared, Part(own, (np.asarray(rows, np.int64),))]


def _adapter_parts(layout: Layout, layer: int, leaf: str) -> list[Part]:
    """Each gate's own, at the front of the widest rank."""
    ranks = [(n, gate, layout.ranks[n][layer]) for n, gate in enumerate(layout.gates)]
    across = leaf.endswith("adapter_in")
    return [
        Part(f"gates/{gate}/{leaf}", (n, slice(None), slice(rank)) if across else (n, slice(rank)))
        for n, gate, rank in ranks
        if rank
    ]


def _head_parts(layout: Layout, token_level: bool, leaf: str, having: Sequence[bool] | None = None) -> Iterator[Part]:
    for n, task in enumerate(layout.tasks):
        if layout.token_level[n] == token_level and (having is None or having[n]):
            first = int(layout.head_first[n])
            yield Part(f"heads/{task}/{leaf}", (slice(first, first + int(layout.head_rows[n])),))


def _routed_index(config: ModelConfig, layer: int) -> int:
    return sum(config.routed(i) for i in range(layer))


def read_arrays(
    abstract: Mapping[Path, Any], layout: Layout, config: ModelConfig, read: Callable[[list[Part]], list[np.ndarray]]
) -> dict[Path, np.ndarray]:
    """Fills every array of a network from components.

    Args:
        abstract: path -> anything with `shape` and `dtype`, in per-layer form (see `by_layer`).
        read: gives the values of many parts at once, so that a store can fetch them together.

    Raises:
        ValueError: a component of another shape than its place in the network.
    """
    wanted = [(path, part) for path in abstract for part in parts(path, layout, config)]
    values = read([part for _, part in wanted])
    arrays: dict[Path, np.ndarray] = {}
    laid_over = {path for path, part in wanted if part.at}
    for (path, part), value in zip(wanted, values, strict=True):
        leaf = abstract[path]
        if part.at == ():
            # What was read may be somebody else's array: it is copied before another part is laid over it.
            arrays[path] = np.array(value, leaf.dtype) if path in laid_over else np.asarray(value, leaf.dtype)
        else:
            arrays.setdefault(path, np.zeros(leaf.shape, leaf.dtype))
        expected = arrays[path][part.at].shape if part.at else leaf.shape
        if value.shape != expected:
            raise ValueError(f"component {part.name}: expected shape {expected}, got {value.shape}")
        if part.at:
            arrays[path][part.at] = value
    return arrays


def components(
    arrays: Mapping[Path, Any], layout: Layout, config: ModelConfig, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, tuple[np.ndarray | None, np.ndarray]]:
    """Takes a network apart: name -> (rows or None for the whole, values), for the names that `keep` accepts."""
    found: dict[str, tuple[np.ndarray | None, np.ndarray]] = {}
    norm_rows: dict[str, dict[int, np.ndarray]] = {}
    for path, leaf in arrays.items():
        for part in parts(path, layout, config):
            if not keep(part.name):
                continue
            value = np.asarray(leaf)[part.at] if part.at else np.asarray(leaf)
            if isinstance(part.rows, int):
                norm_rows.setdefault(part.name, {})[part.rows] = value
            else:
                found[part.name] = (part.rows, value)
    for name, rows in norm_rows.items():
        found[name] = (None, np.stack([rows[i] for i in range(2 * config.layers + 1)]))
    return found


def by_layer(tree: Tree, config: ModelConfig) -> dict[Path, Any]:
    """Flattens a network's tree; arrays of blocks, stacked by scanning or not, become `("layers", i, ...)`."""
    flat: dict[Path, Any] = {}
    for path, leaf in _flatten(tree):
        if path[0] != "blocks":
            flat[path] = leaf
        elif not config.scan_layers:
            flat[("layers", *path[1:])] = leaf
        else:
            for i in range(path[1], config.layers, config.routed_every):
                flat[("layers", i, *path[2:])] = _unstacked(leaf, i // config.routed_every)
    return flat


def from_layers(flat: Mapping[Path, Any], config: ModelConfig) -> Tree:
    """The inverse of `by_layer`."""
    tree: Tree = {}
    stacks: dict[Path, dict[int, Any]] = {}
    for path, leaf in flat.items():
        if path[0] != "layers":
            _put(tree, path, leaf)
        elif not config.scan_layers:
            _put(tree, ("blocks", *path[1:]), leaf)
        else:
            i = path[1]
            stacks.setdefault(("blocks", i % config.routed_every, *path[2:]), {})[i] = leaf
    for path, leaves in stacks.items():
        _put(tree, path, np.stack([leaves[i] for i in sorted(leaves)]))
    return tree


def _unstacked(leaf: Any, i: int) -> Any:
    if hasattr(leaf, "__array__"):
        return leaf[i]
    return type(leaf)(leaf.shape[1:], leaf.dtype)


def _flatten(tree: Tree, prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, (*prefix, key))
        elif value is not None:
            yield (*prefix, key), value


def _put(tree: Tree, path: Path, leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
