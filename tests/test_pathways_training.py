"""The optimizer, the step and the loop: oracles for gradients, what a bad step leaves, what is kept as the best."""

from __future__ import annotations

import gzip
import json
import logging
import os
import signal
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import first_batch, make_config, make_family, make_tasks, prepared_model
from tolerance import assert_close

from pathways.config import GateOptions, TrainConfig
from pathways.monitor import Monitor, read_metrics
from pathways.network.network import Outputs, TaskTable
from pathways.submodel import abstract_network
from pathways.training import joint, loop
from pathways.training.checkpoint import Checkpoints
from pathways.training.optimizer import decay_mask, make_optimizer, make_schedule, names
from pathways.training.profiler import Profiler
from pathways.training.step import Metrics, TrainState, initial_state, make_step, per_example_loss
from pathways.training.trainable import Trainable
from tasks.batch import STREAMS
from tasks.errors import UserError
from tasks.losses import LOSS_CODE
from tasks.pipeline import TrainStream

# Every leaf of a network with all kinds of everything, by its owner; True where weight decay shrinks it.
DECAYS = {
    **{f"text/{name}": False for name in ("token", "position", "column")},
    **{f"table/{name}": False for name in ("column", "gain", "category", "missing", "frequency", "b_in")},
    **{f"table/{name}": True for name in ("w_in", "w_out")},
    **{f"image/{name}": True for name in ("conv1", "conv2", "project")},
    **{f"image/{name}": False for name in ("bias", "row", "col", "column")},
    **{f"audio/{name}": True for name in ("w_in", "w_out")},
    **{f"audio/{name}": False for name in ("b_in", "position", "column")},
    "attention/qkv": True,
    "attention/output": True,
    "attention/neighbours": False,
    **{f"dense/{name}": True for name in ("w_in", "w_out")},
    **{f"dense/{name}": False for name in ("b_in", "b_out")},
    **{f"{owner}/{name}": True for owner in ("mlp", "shared") for name in ("w_in", "w_out")},
    **{f"{owner}/{name}": False for owner in ("mlp", "shared") for name in ("b_in", "b_out")},
    **{f"swiglu/{name}": True for name in ("w_gate", "w_up", "w_down")},
    **{f"{norm}/scale": False for norm in ("attention_norm", "norm", "final_norm")},
    **{f"routed/{name}": False for name in ("gate", "noise")},
    **{f"{heads}/kernel": True for heads in ("heads", "token_heads")},
    **{f"{heads}/bias": False for heads in ("heads", "token_heads")},
    "task_embedding": False,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, cache_folder):
    return prepared_model(tmp_path_factory.mktemp("training"))


def same_bits(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def kept(state):
    """A copy on the host: a step is given the state's buffers."""
    return jax.tree.map(np.array, state)


def stacked(*batches):
    return jax.tree.map(lambda *leaves: np.stack(leaves), *batches)


def test_weight_decay_shrinks_matrices_only(tiny):
    prepared, _, _ = tiny
    gate = GateOptions(kind="noisy_top_k", scope="task_embedding")
    experts = {"mlp": 2, "swiglu": 2, "identity": 1}
    model = replace(prepared.config.model, gate=gate, experts=experts, shared_experts=1, routed_every=2)
    layer = (tuple(experts.items()),)
    size = replace(prepared.layout.size, streams=STREAMS, experts=layer, candidates=(5,))
    layout = replace(prepared.layout, size=size)
    state = nnx.state(abstract_network(replace(prepared.config, model=model), layout), nnx.Param)
    found = {}
    for path, decays in jax.tree_util.tree_flatten_with_path(decay_mask(state))[0]:
        found.setdefault("/".join(names(path)[-2:]), decays)
    assert found == DECAYS


def test_weight_decay_by_hand():
    config = TrainConfig(steps=10, learning_rate=0.5, schedule="cosine", warmup=0.0, weight_decay=0.1)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    optimizer = make_optimizer(config)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    # No gradient: the kernel moves by -rate * decay * value = -0.5 * 0.1 * 2; the bias stays.
    assert_close(updates["kernel"], [-0.1])
    assert_close(updates["bias"], [0.0])


def test_the_gradient_is_clipped_before_adam():
    config = TrainConfig(clip=1.0, beta1=0.9)
    params = {"kernel": jnp.array([0.0, 0.0])}
    optimizer = make_optimizer(config)
    _, state = optimizer.update({"kernel": jnp.array([30.0, 40.0])}, optimizer.init(params), params)
    # Norm 50, clipped to 1: (0.6, 0.8); Adam's first moment is a tenth of it.
    assert_close(state[1].mu["kernel"], [0.06, 0.08])


def test_rates_of_single_leaves():
    config = TrainConfig(steps=10, schedule="cosine", warmup=0.0)
    params = {"heads": {"kernel": jnp.ones(2)}, "trunk": {"kernel": jnp.ones(2)}}
    factors = {"heads": 3.0, "trunk": 0.0}
    updates = []
    for rate_of in (None, lambda path: factors[path[0]]):
        optimizer = make_optimizer(config, rate_of=rate_of)
        updates.append(optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)[0])
    assert_close(updates[1]["heads"]["kernel"], 3.0 * updates[0]["heads"]["kernel"])
    assert_close(updates[1]["trunk"]["kernel"], [0.0, 0.0])


@pytest.mark.parametrize("name", ["one_cycle", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 1.0])
def test_every_schedule_is_finite_and_never_above_its_peak(name, steps, warmup):
    schedule = make_schedule(TrainConfig(steps=steps, warmup=warmup, schedule=name, learning_rate=0.5))
    rates = np.array([float(schedule(step)) for step in range(steps + 1)])
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert rates.max() <= 0.5 * (1 + 1e-6)
    if steps > 1 and (name == "one_cycle" or warmup < 1):
        assert_close(rates.max(), 0.5)
    if name == "one_cycle" or warmup < 1:
        assert rates[-1] <= 0.021


def test_schedules_at_known_steps():
    one_cycle = make_schedule(TrainConfig(steps=100, warmup=0.1, learning_rate=1.0))
    # It begins at a 25th of the peak, peaks after a tenth of the steps, ends at a 10,000th of where it began.
    assert_close([one_cycle(0), one_cycle(10), one_cycle(100)], [0.04, 1.0, 4e-6], scale=0)
    cosine = make_schedule(TrainConfig(steps=100, warmup=0.1, learning_rate=1.0, schedule="cosine"))
    # Half-way up after 5 of 10 steps; half-way down in the middle of the other 90.
    assert_close([cosine(0), cosine(5), cosine(10), cosine(55), cosine(100)], [0.0, 0.5, 1.0, 0.5, 0.0])


def test_losses_of_examples_and_tokens_by_hand():
    """Task 0 tags tokens, task 1 classifies, task 2 is regression; padding and what has no target have no loss."""
    table = TaskTable(
        pathway=jnp.zeros(3, jnp.int32),
        gate=jnp.zeros(3, jnp.int32),
        head=jnp.array([0, 0, 2]),
        outputs=jnp.array([2, 2, 1]),
        token_level=jnp.array([True, False, False]),
        loss=jnp.array([LOSS_CODE[n] for n in ("softmax_cross_entropy", "softmax_cross_entropy", "squared_error")]),
        slots=(),
    )
    batch = {
        "task": jnp.array([0, 1, 2, 2, -1]),
        "segment": jnp.array([[1, 1, 1, 2, 3, 0]]),
        "tag": jnp.array([[0, -1, 1, 1, -1, 0]]),
        "y": jnp.array([[0.0, 0], [0, 1], [3, 0], [9, 0], [0, 0]]),
        "y_mask": jnp.array([[0.0, 0], [1, 1], [1, 0], [0, 0], [1, 1]]),
    }
    logits = jnp.array([[9.0, 9], [0, 0], [1, 77], [1, 1], [5, 5]])
    token_logits = jnp.array([[[0.0, 0, 50], [9, 9, 9], [0, np.log(3.0), 50], [9, 9, 9], [9, 9, 9], [9, 9, 9]]])
    loss, known = per_example_loss(Outputs(logits, token_logits, jnp.zeros((5, 1)), ()), batch, table)
    # Tags: token 0 has ln 2; token 2 has class 1 of logits (0, ln 3): -ln(3/4); their sum. The third column is past
    # the task's outputs. Class: ln 2. Regression: (1 - 3)^2 = 4.
    assert_close(loss, [np.log(2) + np.log(4 / 3), np.log(2), 4.0, 0.0, 0.0])
    np.testing.assert_array_equal(known, [True, True, True, False, False])


def sgd_step(prepared, sub, **options):
    step = make_step(sub, optax.sgd(1.0), prepared.config.balance, seed=0, statistics=True, **options)
    return step, lambda: initial_state(sub, optax.sgd(1.0), statistics=True)


def test_accumulation_is_the_mean_gradient(tmp_path_factory, cache_folder):
    gate = GateOptions(kind="sigmoid_top_k")
    prepared, sub, first = prepared_model(tmp_path_factory.mktemp("sum"), model={"gate": gate})
    second = first_batch(prepared, seed=5)
    step, start = sgd_step(prepared, sub)
    before = kept(start())
    ones = [kept(step(start(), stacked(batch))[0]) for batch in (first, second)]
    both, metrics = step(start(), stacked(first, second))
    both = kept(both)
    moved = [jax.tree.map(lambda new, old: new - old, one.params, before.params) for one in ones]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *moved)
    found = jax.tree.map(lambda new, old: new - old, both.params, before.params)
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)) > 1e-2
    jax.tree.map(assert_close, found, expected)
    assert float(metrics.examples) == (first["task"] >= 0).sum() + (second["task"] >= 0).sum()
    for one, two, sums in zip(ones[0].counts, ones[1].counts, both.counts, strict=True):
        np.testing.assert_array_equal(one.rows + two.rows, sums.rows)
    # The bias moves once, by the load of both batches: up where the load is below its mean.
    rate = prepared.config.balance.bias_rate
    biases = zip(jax.tree.leaves(both.bias), jax.tree.leaves(before.bias), strict=True)
    for (new, old), counts in zip(biases, both.counts, strict=True):
        load = counts.rows.sum(axis=0)
        assert_close((new - old)[0] / rate, np.sign(load.mean() - load), scale=1e3)


def test_the_balance_bias_of_a_single_scanned_layer(tmp_path_factory, cache_folder):
    sections = {"model": {"gate": GateOptions(kind="sigmoid_top_k"), "scan_layers": True, "layers": 1}}
    prepared, sub, batch = prepared_model(tmp_path_factory.mktemp("one"), **sections)
    step, start = sgd_step(prepared, sub)
    state, metrics = step(start(), stacked(batch))
    assert bool(metrics.finite)
    (old,), (new,) = jax.tree.leaves(sub.bias), jax.tree.leaves(state.bias)
    assert new.shape == old.shape == (1, 1, 4)
    assert np.any(np.asarray(new) != np.asarray(old))


def test_a_bad_step_changes_nothing_and_is_counted(tiny):
    prepared, sub, batch = tiny
    optimizer = make_optimizer(prepared.config.train)
    step = make_step(sub, optimizer, prepared.config.balance, seed=0, statistics=True)
    state = initial_state(sub, optimizer, statistics=True)
    state, _ = step(state, stacked(batch))
    before = kept(state)
    example = np.flatnonzero(batch["task"] == sub.number("price"))[0]
    poisoned = {**batch, "y": batch["y"].copy()}
    poisoned["y"][example, 0] = np.nan
    state, metrics = step(state, stacked(poisoned))
    after = kept(state)
    for name in ("params", "bias", "opt_state", "counts"):
        assert same_bits(getattr(before, name), getattr(after, name)), name
    assert (int(after.step), int(after.bad), int(after.bad_total)) == (2, 1, 1)
    assert not bool(metrics.finite)
    np.testing.assert_array_equal(np.isnan(metrics.task_loss), [name == "price" for name in sub.names])
    state, metrics = step(state, stacked(batch))
    assert bool(metrics.finite)
    assert (int(state.bad), int(state.bad_total)) == (0, 1)
    assert not same_bits(before.params, state.params)


def test_the_step_leaves_the_sub_models_own_arrays(tiny):
    prepared, sub, batch = tiny
    step, start = sgd_step(prepared, sub)
    before = kept(sub.params)
    step(start(), stacked(batch))
    assert same_bits(before, sub.params)


def test_many_bad_steps_stop_the_run_by_name(tmp_path, cache_folder, monkeypatch):
    class Poisoned(TrainStream):
        count = 0

        def __next__(self):
            batch = super().__next__()
            self.count += 1
            if self.count > 6:
                batch["y"][batch["task"] == 3] = np.inf
            return batch

    monkeypatch.setattr(joint, "TrainStream", Poisoned)
    config = make_config(make_tasks(tmp_path / "data"), train={"max_bad_steps": 4, "log_every": 2, "eval_every": 0})
    with pytest.raises(UserError, match=r"4 steps in a row") as caught:
        joint.train(config, tmp_path / "run", quiet=True)
    assert caught.value.where == "steps 7 to 10; tasks of the last batch: price"
    rows = {row["step"]: row for row in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert sorted(rows) == [2, 4, 6, 8, 10]
    assert rows[6]["loss"] > 0
    assert rows[6]["rows_per_second"] > 0
    assert rows[8]["loss"] is None
    assert rows[10]["bad_steps"] == 4
    events = [json.loads(line)["message"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert sum("step 7 was skipped" in message for message in events) == 1


# The loop around a step that only counts: parameters are the number of the step that made them.


class Counting:
    """A stream that knows its position, and that it was closed."""

    def __init__(self, position=None):
        self.position, self.closed = (position or {"next": 0})["next"], False

    def __next__(self):
        self.position += 1
        return {"task": np.array([0]), "number": np.array(self.position)}

    def state(self):
        return {"next": self.position}

    def close(self):
        self.closed = True


def counting_step(state, batch):
    number = jnp.asarray(batch["number"][-1], jnp.float32)
    step = state.step + 1
    one = jnp.ones(())
    metrics = Metrics(one, one, one, one > 0, state.bad, state.bad, one, jnp.ones(1), jnp.ones(1), jnp.ones(1))
    return state._replace(params=number, step=step), metrics


def run_counting(folder, qualities, step_fn=counting_step, checkpoints=None, **train):
    """`(sub, progress, streams)` of a run whose k-th validation gives `qualities(step)`."""
    config = TrainConfig(**{"steps": 10, "eval_every": 2, "log_every": 1, "checkpoint_every": 3, **train})
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), zero, zero, zero, ())
    sub, streams = SimpleNamespace(params=None, bias=None), []

    def stream(position):
        streams.append(Counting(position))
        return streams[-1]

    hooks = loop.Hooks(
        lambda sub: {"quality": qualities(int(sub.params) // config.accumulate)}, lambda step, counts: None, str
    )
    with Monitor(folder, config.steps, quiet=True) as monitor:
        _, progress = loop.train(sub, step_fn, state, config, hooks, monitor, stream, checkpoints)
    return sub, progress, streams


@pytest.mark.parametrize(("accumulate", "best"), [(1, 6), (2, 6)])
def test_the_best_on_validation_is_kept(tmp_path, accumulate, best):
    sub, progress, streams = run_counting(tmp_path, lambda step: -abs(step - 6.0), accumulate=accumulate)
    assert (float(sub.params), progress.best_step, progress.best) == (best * accumulate, 6, 0.0)
    assert [stream.closed for stream in streams] == [True]


def test_the_newest_is_kept_where_validation_has_no_figure(tmp_path):
    sub, progress, _ = run_counting(tmp_path, lambda step: -np.inf, patience=1)
    assert (float(sub.params), progress.best_step, progress.best) == (10.0, 10, None)


def test_patience_stops_the_run(tmp_path):
    sub, progress, streams = run_counting(tmp_path, lambda step: -abs(step - 2.0), patience=2, steps=100)
    # Best at 2; 4 and 6 are no better: stopped before step 7.
    assert (float(sub.params), progress.best_step, streams[0].position) == (2.0, 2, 6)
    assert "stopped early" in (tmp_path / "events.jsonl").read_text()


def test_metrics_come_in_order_and_whole(tmp_path):
    run_counting(tmp_path, lambda step: float(step), steps=7, log_every=3)
    steps = [(row["step"], "loss" in row) for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [(2, False), (3, True), (4, False), (6, True), (6, False), (7, True), (7, False)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, number):
    def interrupted(state, batch):
        if int(state.step) == 4:
            os.kill(os.getpid(), number)
        return counting_step(state, batch)

    quality = lambda step: -abs(step - 4.0)  # noqa: E731
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"train": {"steps": 10}})
    handlers = signal.getsignal(number)
    with pytest.raises(loop.Interrupted, match=f"stopped by {number.name} after step 5; saved"):
        run_counting(tmp_path, quality, interrupted, checkpoints)
    assert signal.getsignal(number) is handlers
    assert checkpoints.latest() == 5
    sub, progress, streams = run_counting(tmp_path, quality, counting_step, checkpoints)
    assert (float(sub.params), progress.best_step, streams[0].position) == (4.0, 4, 10)


def test_the_stream_is_closed_when_a_step_fails(tmp_path):
    closed = []

    class Watched(Counting):
        def close(self):
            closed.append(True)

    def failing(state, batch):
        raise RuntimeError("boom")

    config = TrainConfig(steps=2)
    state = TrainState(jnp.zeros(()), jnp.zeros(()), jnp.zeros(()), jnp.zeros((), jnp.int32), 0, 0, ())
    sub = SimpleNamespace(params=None, bias=None)
    with Monitor(tmp_path, 2, quiet=True) as monitor, pytest.raises(RuntimeError, match="boom"):
        loop.train(sub, failing, state, config, loop.Hooks(None, None, str), monitor, lambda position: Watched())
    assert closed == [True]


def test_a_profile_of_ten_steps(tmp_path):
    with Monitor(tmp_path, 40, quiet=True) as monitor:
        profiler = Profiler(tmp_path / "profile", 3, 40, monitor)
        for step in range(4, 41):
            profiler.before(step)
            out = jax.jit(jnp.cumsum)(jnp.arange(step % 2 + 3.0))
            profiler.after(step, out)
    (trace,) = (tmp_path / "profile").rglob("perfetto_trace.json.gz")
    assert json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    profiler.close()
    assert (tmp_path / "events.jsonl").read_text().count(f"profile from step 14 on: {trace}") == 1


def test_a_run_that_ends_while_it_is_profiled_leaves_a_profile(tmp_path):
    with Monitor(tmp_path, 40, quiet=True) as monitor:
        profiler = Profiler(tmp_path / "profile", 0, 40, monitor)
        with closing(profiler):
            profiler.before(11)
    assert list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))
    jax.profiler.start_trace(tmp_path / "another")
    jax.profiler.stop_trace()


def test_a_run_too_short_for_a_profile_says_so(tmp_path):
    with Monitor(tmp_path, 8, quiet=True) as monitor:
        profiler = Profiler(tmp_path / "profile", 0, 8, monitor)
        for step in range(1, 9):
            profiler.before(step)
            profiler.after(step, jnp.zeros(()))
    assert not (tmp_path / "profile").exists()
    assert "it needs more than 10 steps, 8 are left" in (tmp_path / "events.jsonl").read_text()


def test_a_checkpoint_of_another_run_is_refused_by_name(tmp_path):
    Checkpoints(tmp_path / "c", {"train": {"steps": 5, "seed": 1}, "tasks": {"a": {"weight": 1.0}}}).save(1, {}, {})
    other = Checkpoints(tmp_path / "c", {"train": {"steps": 6, "seed": 1}, "tasks": {"a": {"weight": 1.0}, "b": {}}})
    with pytest.raises(UserError) as caught:
        other.check()
    assert (caught.value.expected, caught.value.got) == ("train.steps = 5", "train.steps = 6")
    assert "--restart" in caught.value.fix


def compiled_in(caplog, config, out) -> list[str]:
    """Names of the functions compiled by a run that starts with nothing compiled."""
    jax.clear_caches()
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        joint.train(config, out, quiet=True)
    lines = [record.getMessage() for record in caplog.records]
    return sorted(line.split()[1] for line in lines if line.startswith("Compiling "))


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["shared", "task"])
def test_as_many_functions_are_compiled_for_3_tasks_as_for_300(tmp_path, cache_folder, caplog, scope):
    found = []
    for members in (3, 300):
        family = make_family(tmp_path / str(members), members, rows=40)
        config = make_config((family,), model={"gate": GateOptions(scope=scope)}, train={"steps": 6, "eval_every": 3})
        found.append(compiled_in(caplog, config, tmp_path / f"run{members}"))
    few, many = found
    assert few.count("jit(step)") == many.count("jit(step)") == 1
    assert few.count("jit(_forward)") == many.count("jit(_forward)") > 0
    assert many == few


def test_rows_that_do_not_train_keep_their_bits() -> None:
    network = nnx.Dict(
        bank=nnx.Dict(w=nnx.Param(jnp.array([[-0.0, 5.0], [1.0, 1.0], [2.0, 2.0]]))),
        stacked=nnx.Param(jnp.arange(12.0).reshape(2, 3, 2)),
        gate=nnx.Param(jnp.zeros(2)),
        trunk=nnx.Param(jnp.array([-0.0, 1.0])),
    )
    params = nnx.state(network, nnx.Param)
    rows = {("bank", "w"): np.array([1]), ("stacked",): np.array([[2, 0], [1, 2]])}
    trainable = Trainable(lambda path: path[-1] != "trunk", rows)
    trained, rest = trainable.split(params)
    assert {"/".join(names(path)): leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(trained)[0]} == {
        "bank/w": (1, 2),
        "stacked": (2, 2, 2),
        "gate": (2,),
    }
    assert trainable.count(params) == 2 + 8 + 2
    found = nnx.to_pure_dict(trainable.join(jax.tree.map(lambda leaf: leaf + 100.0, trained), rest))
    assert np.asarray(found["bank"]["w"]).tolist() == [[0.0, 5.0], [101.0, 101.0], [2.0, 2.0]]
    assert np.signbit(np.asarray(found["bank"]["w"])[0, 0])
    assert np.signbit(np.asarray(found["trunk"])[0])
    added = np.asarray(found["stacked"]) - np.arange(12.0).reshape(2, 3, 2)
    assert added[:, :, 0].tolist() == [[100.0, 0.0, 100.0], [0.0, 100.0, 100.0]]
    assert np.asarray(found["gate"]).tolist() == [100.0, 100.0]
