"""Networks taken apart into components and put together again, whole, in part and in other layouts."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from tiny import prepared_model, random_submodel, read_from
from tolerance import assert_close

from pathways.assemble import by_layer, components, from_layers, plan_network, read_arrays
from pathways.config import GateOptions
from pathways.pathway import GateSpec
from pathways.predictions import run_shape
from pathways.submodel import read_submodel
from pathways.training.joint import examples_of
from tasks.pack import Packer

VARIANTS = {
    "plain": {},
    "scanned": {"scan_layers": True, "layers": 4, "routed_every": 2},
    "mixed": {"experts": {"mlp": 2, "swiglu": 3, "identity": 1}, "shared_experts": 1, "layers": 3, "routed_every": 2},
    "sigmoid per task": {"gate": GateOptions(kind="sigmoid_top_k", scope="task")},
    "noisy, embedded": {"gate": GateOptions(kind="noisy_top_k", scope="task_embedding"), "scan_layers": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cache_folder):
    return tmp_path_factory.mktemp("assemble")


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert np.asarray(a[key]).tobytes() == np.asarray(b[key]).tobytes(), key


@pytest.mark.parametrize("name", VARIANTS)
def test_taken_apart_and_read_again_bit_for_bit(folder, name):
    prepared, sub, _ = prepared_model(folder, model=VARIANTS[name])
    model, flat = prepared.config.model, sub.flat()
    found = components(flat, prepared.layout, model)
    same(read_arrays(flat, prepared.layout, model, read_from(found)), flat)
    tree = nnx.to_pure_dict(nnx.merge_state(sub.params, sub.bias))
    again = from_layers(by_layer(tree, model), model)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    same(by_layer(again, model), flat)
    copy = read_submodel(prepared.config, prepared.entries, prepared.layout, prepared.tokenizer, read_from(found))
    same(copy.flat(), flat)
    names = {component.split("/")[0] for component in found}
    assert names == {"encoders", "trunk", "banks", "gates", "norms", "heads"}
    assert not any("identity" in component for component in found)


def test_scanned_and_unscanned_are_the_same_components(folder):
    found = []
    for scan in (False, True):
        prepared, sub, _ = prepared_model(folder, model={"scan_layers": scan})
        found.append(components(sub.flat(), prepared.layout, prepared.config.model))
    same(*({name: value for name, (_, value) in one.items()} for one in found))


def test_a_component_of_another_shape_is_refused(folder):
    prepared, sub, _ = prepared_model(folder)
    for name in ("trunk/layer0/attention/qkv", "heads/wine/kernel", "norms/base", "banks/layer0/mlp/b_in"):
        found = components(sub.flat(), prepared.layout, prepared.config.model)
        rows, value = found[name]
        # One row or column that numpy would broadcast silently.
        found[name] = (rows, value[..., :1])
        with pytest.raises(ValueError, match=f"component {name}: expected shape"):
            read_arrays(sub.flat(), prepared.layout, prepared.config.model, read_from(found))


@pytest.mark.parametrize("scope", ["shared", "task"])
@pytest.mark.parametrize("unit", ["token", "example"])
def test_a_sub_model_of_some_tasks_gives_their_logits(folder, scope, unit):
    """In the same packed batch, the logits of tasks in a sub-model of them are those in the whole model.

    Bit for bit with a shared gate, whose arrays are then the same; with one gate per task to float32's tolerance, as
    the stack of gates is smaller and its rows are laid out in other blocks.
    """
    prepared, sub, _ = prepared_model(folder, model={"gate": GateOptions(scope=scope, unit=unit)})
    found = components(sub.flat(), prepared.layout, prepared.config.model)
    kept = ("words", "wine")
    entries = [prepared.entries[sub.number(name)] for name in kept]
    layout = plan_network(
        prepared.config.model,
        prepared.config.encoders.vocab_size,
        [entry.pathway for entry in entries],
        prepared.gates,
        [entry.fitted for entry in entries],
    )
    part = read_submodel(prepared.config, entries, layout, prepared.tokenizer, read_from(found))
    assert part.num_parameters < sub.num_parameters
    held = examples_of(sub.names, prepared.data.valid, 6)
    packers = [Packer(run_shape(model, sub.layout.size.streams)) for model in (sub, part)]
    for model, packer in zip((sub, part), packers, strict=True):
        for name in kept:
            assert all(packer.add(model.number(name), example) for example in held[name])
    whole, small = sub.run(packers[0].batch()), part.run(packers[1].batch())
    compare = np.testing.assert_array_equal if scope == "shared" else assert_close
    segment = packers[0].batch()["segment"]
    tokens = (segment > 0) & (segment <= 6)
    compare(np.asarray(small.pooled), np.asarray(whole.pooled))
    compare(np.asarray(small.logits)[6:12, :3], np.asarray(whole.logits)[6:12, :3])
    compare(np.asarray(small.token_logits)[tokens][:, :4], np.asarray(whole.token_logits)[tokens][:, :4])


def test_slots_of_gates_with_different_candidates(folder):
    prepared, _, _ = prepared_model(folder, model={"experts": {"mlp": 6, "identity": 2}})
    pathways = [
        replace(entry.pathway, gate=gate) for entry, gate in zip(prepared.entries, ("a", "b", "a", "c"), strict=True)
    ]
    gates = {
        "a": GateSpec(({"mlp": (1, 4)}, {"mlp": (0,), "identity": (1,)})),
        "b": GateSpec(({"identity": (0,), "mlp": (4, 5, 2)}, {"mlp": (0, 3)})),
        "c": GateSpec(({"mlp": (2,)}, {"identity": (1,)})),
    }
    fitted = [entry.fitted for entry in prepared.entries]
    layout = plan_network(prepared.config.model, 320, pathways, gates, fitted)
    # Layer 0 holds mlp 1, 2, 4, 5 as slots 0-3 and identity 0 as slot 4; 5 is nowhere.
    assert {kind: index.tolist() for kind, index in layout.experts[0].items()} == {"mlp": [1, 2, 4, 5], "identity": [0]}
    np.testing.assert_array_equal(layout.slots[0], [[0, 2, 5, 5], [4, 2, 3, 1], [1, 5, 5, 5]])
    # Layer 1 holds mlp 0, 3 and identity 1: 3 slots.
    np.testing.assert_array_equal(layout.slots[1], [[0, 2], [0, 1], [2, 3]])
    assert layout.gate.tolist() == [0, 1, 0, 2]
    assert layout.gate_sizes == ((2, 4, 1), (2, 2, 1))
    prepared = replace(prepared, layout=layout)
    sub = random_submodel(prepared)
    found = components(sub.flat(), layout, prepared.config.model)
    assert found["gates/c/layer0/gate"][1].shape == (32, 1)
    assert found["banks/layer0/mlp/w_in"][0].tolist() == [1, 2, 4, 5]


def test_a_gate_with_fewer_candidates_than_choices_takes_all_it_has(folder):
    prepared, _, batch = prepared_model(folder)
    only = GateSpec(({"mlp": (2,)}, {"mlp": (0, 3)}))
    fitted = [entry.fitted for entry in prepared.entries]
    pathways = [entry.pathway for entry in prepared.entries]
    layout = plan_network(prepared.config.model, 320, pathways, {"base": only}, fitted)
    np.testing.assert_array_equal(layout.slots[0], [[0, 1]])
    sub = random_submodel(replace(prepared, layout=layout))
    out = sub.run(batch, statistics=True)
    assert np.isfinite(np.asarray(out.logits)).all()
    tokens = float((batch["segment"] > 0).sum())
    assert out.layers[0].load.tolist() == [tokens]
    assert float(sub.count(out)[0].drops.sum()) == tokens
    assert out.layers[1].load.tolist() == [tokens, tokens]
