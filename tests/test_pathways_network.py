"""The network: every gate gives finite gradients, scanning and remat change nothing, no example sees another."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import prepared_model
from tolerance import assert_close

from pathways.assemble import by_layer, components
from pathways.config import BalanceOptions, GateOptions
from pathways.network.encoders import LOOKUPS, make_encoder
from pathways.network.layers import Attention, add_neighbours, dropout, segment_mean
from pathways.predictions import packed, predict_examples, run_shape
from pathways.submodel import abstract_network, fitting
from pathways.training.joint import examples_of
from pathways.training.step import per_example_loss
from routing.gates import gate_logits
from tasks.batch import CATEGORY, MISSING, NUMBER, STREAMS, stream_fields
from tasks.encoded import EncoderSettings
from tasks.pack import Packer

KINDS = ("noisy_top_k", "softmax_top_k", "sigmoid_top_k")
SCOPES = ("shared", "task_embedding", "task")
UNITS = ("token", "example")
ALL = BalanceOptions(importance=0.1, load=0.1, load_balancing=0.1, z=0.01)
PAIRS = [("noisy_top_k", "task", "example"), ("sigmoid_top_k", "task_embedding", "token")]


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache_folder):
    """`made(**sections)` gives `tiny.prepared_model`, once for each choice."""
    folder = tmp_path_factory.mktemp("network")

    @cache
    def make(model: tuple = (), names: tuple = ("wine", "mood", "words", "price")):
        fields = dict(model)
        if "experts" in fields:
            fields["experts"] = dict(fields["experts"])
        return prepared_model(folder, names=names, model=fields)

    return lambda names=("wine", "mood", "words", "price"), **model: make(tuple(sorted(model.items())), names)


def loss_and_grad(sub, batch, key=None):
    """Loss and gradient of a batch, all balance losses on; outputs beside."""
    (loss, out), grads = compiled(sub)(sub.params, sub.bias, batch, sub.table, key)
    return loss, out, by_layer(nnx.to_pure_dict(grads), sub.config.model)


@cache
def compiled(sub):
    @jax.jit
    def run(params, bias, batch, table, key):
        def loss(params):
            out = nnx.merge(sub.graph, params, bias)(batch, table, ALL, key=key, statistics=True)
            each, _ = per_example_loss(out, batch, table)
            return jnp.sum(each) + sum(layer.loss for layer in out.layers), out

        return jax.value_and_grad(loss, has_aux=True)(params)

    return run


BOTH = ({"scan_layers": True, "remat": True},)


def check_variants(made, gate: GateOptions, variants=BOTH, **model) -> None:
    _, sub, batch = made(gate=gate, **model)
    loss, out, grads = loss_and_grad(sub, batch, jax.random.key(3))
    assert np.isfinite(loss)
    for path, grad in grads.items():
        assert np.isfinite(np.asarray(grad)).all(), path
    assert any(np.any(np.asarray(grad)) for path, grad in grads.items() if path[-1] == "gate")
    for variant in variants:
        _, other, _ = made(gate=gate, **model, **variant)
        other_loss, other_out, other_grads = loss_and_grad(other, batch, jax.random.key(3))
        assert_close(other_loss, loss, scale=0)
        assert_close(other_out.logits, out.logits)
        assert_close(other_out.token_logits, out.token_logits)
        for mine, theirs in zip(out.layers, other_out.layers, strict=True):
            jax.tree.map(np.testing.assert_array_equal, theirs.routed.slot, mine.routed.slot)
            assert_close(theirs.loss, mine.loss)
        assert other_grads.keys() == grads.keys()
        for path, grad in grads.items():
            assert_close(other_grads[path], grad)


@pytest.mark.parametrize(("kind", "scope", "unit"), PAIRS)
def test_scanned_and_rematerialised_equal_plain(made, kind, scope, unit):
    check_variants(made, GateOptions(kind=kind, scope=scope, top_k=2, unit=unit))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scope", "unit"), [combo for combo in itertools.product(KINDS, SCOPES, UNITS) if combo not in PAIRS]
)
def test_every_gate_scanned_and_rematerialised_equals_plain(made, kind, scope, unit):
    check_variants(made, GateOptions(kind=kind, scope=scope, top_k=2, unit=unit))


@pytest.mark.slow
def test_dense_layers_between_and_shared_experts_scan_too(made):
    model = {"layers": 4, "routed_every": 2, "shared_experts": 1}
    variants = ({"scan_layers": True}, {"remat": True}, *BOTH)
    check_variants(made, GateOptions(kind="sigmoid_top_k"), variants, **model)


def test_no_example_sees_its_neighbours_or_its_place(made):
    """The logits of an example are the same alone, in a crowd, and at another place, to float32's tolerance.

    They are not promised to be the same bits: in which bucket or block an expert's product runs, and so the order of
    its sums, follows the whole batch.
    """
    prepared, sub, _ = made()
    held = examples_of(sub.names, prepared.data.valid, 3)
    flat = [(sub.number(name), example) for name, items in held.items() for example in items]
    shape = run_shape(sub, sub.layout.size.streams)
    orders = [flat, flat[::-1], [flat[i] for i in np.random.default_rng(0).permutation(len(flat))]]
    found = []
    for order in orders:
        outputs, packer = {}, Packer(shape)
        for task, example in order:
            assert packer.add(task, example)
        batch = packer.batch()
        out = sub.run(batch)
        for i, (_, example) in enumerate(order):
            row, col = np.nonzero(batch["segment"] == i + 1)
            outputs[id(example)] = (np.asarray(out.logits[i]), np.asarray(out.token_logits)[row, col])
        found.append(outputs)
    alone = {}
    for task, example in flat[::5]:
        packer = Packer(shape)
        packer.add(task, example)
        batch = packer.batch()
        out = sub.run(batch)
        row, col = np.nonzero(batch["segment"] == 1)
        alone[id(example)] = (np.asarray(out.logits[0]), np.asarray(out.token_logits)[row, col])
    for other in (*found[1:], alone):
        for key, (logits, token_logits) in other.items():
            assert_close(logits, found[0][key][0])
            assert_close(token_logits, found[0][key][1])


def test_attention_has_no_gradient_across_segments():
    attention = Attention(8, 2, 2, nnx.Rngs(0))
    attention.neighbours[...] = jnp.ones((4, 8))
    x = jax.random.normal(jax.random.key(0), (1, 6, 8))
    segment = jnp.array([[1, 1, 2, 2, 2, 0]])
    jacobian = jax.jacobian(lambda x: attention(x, segment)[0])(x)[:, :, 0]
    reach = np.abs(np.asarray(jacobian)).max(axis=(1, 3)) > 0
    expected = np.equal.outer(segment[0], segment[0])
    np.testing.assert_array_equal(reach, expected)


def test_neighbours_by_hand():
    x = jnp.array([[1.0, 2.0, 4.0, 8.0, 16.0]])[..., None]
    segment = jnp.array([[1, 1, 1, 2, 2]])
    scale = jnp.array([[0.5], [10.0], [100.0]])  # of the one two before, the one before, the one after
    mixed = add_neighbours(x, segment, scale, (-2, -1, 1))[0, :, 0]
    assert mixed.tolist() == [1 + 200, 2 + 10 + 400, 4 + 20 + 0.5, 8 + 1600, 16 + 80]


def test_an_example_that_fits_no_batch_is_told_and_not_tried_for_ever(made):
    prepared, sub, _ = made()
    examples = [(sub.names[0], prepared.data.train[0].example(i)) for i in range(2)]
    shape = run_shape(sub, sub.layout.size.streams)
    assert [len(held) for _, held in packed(sub, shape, examples)] == [2]
    assert [len(held) for _, held in packed(sub, replace(shape, examples=1), examples)] == [1, 1]
    with pytest.raises(ValueError, match=f"an example of task {sub.names[0]} fits no batch"):
        list(packed(sub, replace(shape, length=1), examples))


@pytest.mark.parametrize("stream", STREAMS)
def test_lookups_name_the_rows_that_an_encoder_reads(stream):
    """Every leaf with a gradient in some rows only is a table of `LOOKUPS`, and those rows are its field's values."""
    options = EncoderSettings(vocab_size=300, max_length=12, column_buckets=11, category_buckets=13, image_tokens=9)
    shape = replace(options.window_shape(), **{stream: 6})
    rng = np.random.default_rng(0)
    fields = {}
    for name, (tail, dtype) in stream_fields(stream, shape).items():
        whole = np.issubdtype(dtype, np.integer)
        fields[name] = rng.integers(0, 8, (6, *tail), dtype) if whole else rng.normal(size=(6, *tail)).astype(dtype)
    if stream == "table":
        fields["state"] = np.array([NUMBER, CATEGORY, MISSING] * 2, np.int32)
    graph, params = nnx.split(make_encoder(stream, options, 300, 8, nnx.Rngs(0)))
    mix = rng.normal(size=(6, 8)).astype(np.float32)
    grads = nnx.to_pure_dict(jax.grad(lambda p: jnp.sum(nnx.merge(graph, p)(fields) * mix))(params))
    for leaf, grad in grads.items():
        rows = set(np.flatnonzero(np.abs(np.asarray(grad)).reshape(grad.shape[0], -1).max(axis=1)))
        if leaf in LOOKUPS[stream]:
            read = set(fields[LOOKUPS[stream][leaf]].tolist())
            assert 0 < len(rows) <= len(read) < grad.shape[0], leaf
            assert rows <= read, leaf
            assert rows == read or stream == "table", leaf  # a number reads no category, a category no gain
        else:
            assert len(rows) == grad.shape[0], leaf


@pytest.mark.parametrize("unit", UNITS)
def test_padding_goes_nowhere_and_is_counted_nowhere(made, unit):
    prepared, sub, _ = made(gate=GateOptions(unit=unit))
    held = examples_of(sub.names, prepared.data.valid, 2)
    packer = Packer(run_shape(sub, sub.layout.size.streams))
    tokens = np.zeros(len(sub.names))
    for name, items in held.items():
        for example in items:
            assert packer.add(sub.number(name), example)
            tokens[sub.number(name)] += example.length
    batch = packer.batch()
    out = sub.run(batch, statistics=True)
    examples = sum(map(len, held.values()))
    for layer, counted in zip(out.layers, sub.count(out), strict=True):
        # Each token makes top_k = 2 choices; the balance counts routed units: tokens, or whole examples.
        np.testing.assert_array_equal(counted.rows.sum(axis=1), 2 * tokens)
        np.testing.assert_array_equal(counted.drops, 0)
        assert float(layer.load.sum()) == 2 * (tokens.sum() if unit == "token" else examples)
    junk = {**batch, "source": np.where(batch["segment"] == 0, 3, batch["source"])}
    np.testing.assert_array_equal(np.asarray(sub.run(junk).logits), np.asarray(sub.run(batch).logits))


def test_the_order_and_the_size_of_batches_do_not_matter_for_predictions(made):
    prepared, sub, _ = made()
    held = examples_of(sub.names, prepared.data.valid, 0)
    found = predict_examples(sub, held)
    back = predict_examples(sub, {name: items[::-1] for name, items in reversed(held.items())})
    for name, items in held.items():
        assert len(found[name].values) == len(items) == 24
        for mine, theirs in zip(found[name].values, back[name].values[::-1], strict=True):
            scale = np.abs(np.asarray(mine)).max(initial=1.0)
            assert_close(theirs, mine, scale=scale)


def test_dropout_only_with_a_key(made):
    _, plain, batch = made()
    _, sub, _ = made(dropout=0.5)
    np.testing.assert_array_equal(np.asarray(sub.run(batch).logits), np.asarray(plain.run(batch).logits))
    one, again = (loss_and_grad(sub, batch, jax.random.key(1))[0] for _ in range(2))
    assert one == again
    assert one != loss_and_grad(sub, batch, jax.random.key(2))[0]
    assert one != loss_and_grad(sub, batch)[0]
    x = jnp.ones((100, 100), jnp.bfloat16)
    y = dropout(x, 0.25, jax.random.key(0))
    # 10,000 draws with p = 0.75: a standard error of 0.0043; the kept ones are 1 / 0.75.
    assert abs(float((y > 0).mean()) - 0.75) < 0.02
    assert y.dtype == jnp.bfloat16
    assert float(y.max()) == float(jnp.bfloat16(1 / 0.75))
    assert dropout(x, 0.25, None) is x


def test_bfloat16_is_near_float32_and_routes_in_float32(made):
    # All four experts are chosen: no choice can flip, so that outputs are comparable one by one.
    gate = GateOptions(top_k=4)
    _, sub, batch = made(gate=gate)
    _, half, _ = made(gate=gate, dtype="bfloat16")
    wide, narrow = sub.run(batch), half.run(batch)
    assert narrow.logits.dtype == narrow.pooled.dtype == jnp.float32
    assert_close(narrow.logits, wide.logits, dtype="bfloat16", scale=float(jnp.abs(wide.logits).max()))
    loss, out, grads = loss_and_grad(half, batch)
    assert np.isfinite(loss)
    assert all(grad.dtype == jnp.float32 and np.isfinite(grad).all() for grad in grads.values())
    assert out.layers[0].loss.dtype == jnp.float32
    # The router's product keeps float32's digits of bfloat16 rows: a bfloat16 product would be off by 1e-2.
    x = jax.random.normal(jax.random.key(0), (64, 32)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (1, 32, 4))
    exact = np.asarray(x, np.float64) @ np.asarray(kernel[0], np.float64)
    assert_close(gate_logits(x, kernel, jnp.zeros(64, jnp.int32)), exact)


def test_shared_experts_are_of_the_first_kind_of_the_configuration(made):
    """Also in the sub-model of a pathway that has no expert of that kind."""
    prepared, _, _ = made(experts=(("mlp", 2), ("swiglu", 2)), shared_experts=1)
    size = replace(prepared.layout.size, experts=((("swiglu", 2),), (("swiglu", 2),)), candidates=(2, 2))
    narrow = abstract_network(prepared.config, replace(prepared.layout, size=size))
    flat = by_layer(nnx.to_pure_dict(nnx.state(narrow)), prepared.config.model)
    assert {path[-1] for path in flat if "shared" in path} == {"w_in", "b_in", "w_out", "b_out"}


def test_a_model_without_routed_layers_is_an_ordinary_transformer(made):
    _, sub, batch = made(routed_every=3)
    loss, out, grads = loss_and_grad(sub, batch)
    assert np.isfinite(loss)
    assert out.layers == ()
    assert not any("routed" in path for path in grads)


def test_segment_mean_by_hand():
    x = jnp.array([[1.0], [3.0], [10.0], [99.0]])
    # Example 0 has rows 1 and 3: mean 2; example 1 has 10; example 2 has none: 0; padding is left out.
    np.testing.assert_array_equal(segment_mean(x, jnp.array([0, 0, 1, -1]), 3), [[2.0], [10.0], [0.0]])


def test_layers_of_different_sizes_are_not_scanned(made):
    prepared, scanned, _ = made(scan_layers=True)
    assert scanned.config.model.scan_layers
    size = replace(prepared.layout.size, experts=((("mlp", 4),), (("mlp", 3),)))
    assert not fitting(prepared.config, replace(prepared.layout, size=size)).model.scan_layers


def test_a_task_reads_its_own_head(made):
    """Logits are the pooled rows, or the tokens, times the task's own rows of the stacked heads."""
    prepared, sub, batch = made()
    out = sub.run(batch)
    heads = {name: value for name, (_, value) in components(sub.flat(), prepared.layout, sub.config.model).items()}
    for i, task in enumerate(batch["task"]):
        if task >= 0 and not prepared.layout.token_level[task]:
            kernel, bias = (heads[f"heads/{sub.names[task]}/{leaf}"] for leaf in ("kernel", "bias"))
            expected = np.asarray(out.pooled[i], np.float64) @ kernel.T + bias
            assert_close(out.logits[i, : len(bias)], expected)
