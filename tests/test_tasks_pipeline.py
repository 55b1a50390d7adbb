"""The stream of batches: true to its weights, every example in every epoch, resumable bit for bit."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from tasks import pipeline
from tasks.cache import EncodedSplit, write_split
from tasks.encoded import EncodedRows, EncoderSettings, Ragged
from tasks.pack import shape_for
from tasks.pipeline import Mixture, TrainStream, sampling_weights

SETTINGS = EncoderSettings(max_length=16)


def a_split(folder, size: int, seed: int, longest: int = 16) -> EncodedSplit:
    """Text examples whose `y` holds the example's own number."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, size=size)
    total = int(lengths.sum())
    fields = {name: rng.integers(0, 99, size=total).astype(np.int32) for name in ("id", "position", "column")}
    fields |= {name: np.full(total, -1, np.int32) for name in ("tag", "word")}
    y = np.arange(size, dtype=np.float32)[:, None]
    rows = EncodedRows({"text": Ragged(fields, lengths)}, np.arange(size), y, np.ones_like(y), np.zeros(size, np.int32))
    write_split(folder, [rows], SETTINGS)
    return EncodedSplit(folder)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("splits")
    return [a_split(folder / str(i), size, i) for i, size in enumerate([500, 40, 7])]


WEIGHTS = [0.6, 0.3, 0.1]


@pytest.fixture(scope="module")
def shape(splits):
    return shape_for([split.token_use() for split in splits], WEIGHTS, rows=8, length=16, settings=SETTINGS)


def same(a, b) -> bool:
    return all(
        np.array_equal(a[n], b[n]) if n != "text" else all(np.array_equal(a[n][f], b[n][f]) for f in a[n]) for n in a
    )


def take(stream, count):
    return list(itertools.islice(stream, count))


def test_weights_by_hand():
    # sizes 100 and 400: temperature 1 -> 1 : 4; temperature 2 -> 10 : 20; weight 2 on the first -> 20 : 20
    assert np.allclose(sampling_weights([100, 400]), [0.2, 0.8])
    assert np.allclose(sampling_weights([100, 400], 2), [1 / 3, 2 / 3])
    assert np.allclose(sampling_weights([100, 400], 2, [2, 1]), [0.5, 0.5])
    assert np.allclose(sampling_weights([1, 10**9], float("inf")), [0.5, 0.5])
    for bad in ([[]], [[0, 1]], [[1, 2], 0.5], [[1, 2], 1, [1, 0]], [[1, 2], float("nan")]):
        with pytest.raises(ValueError, match="sampling needs"):
            sampling_weights(*bad)


def test_each_epoch_of_each_task_uses_every_example_once():
    mixture = Mixture([50, 7, 1], [0.7, 0.2, 0.1], seed=3)
    period = len(mixture._task)
    drawn = [[], [], []]
    for position in range(2 * period):
        task, index = mixture[position]
        drawn[task].append(index)
    orders = set()
    # the ranks of a task come in order, so each run of `size` draws is an epoch
    for task, size in enumerate([50, 7, 1]):
        for epoch in range(len(drawn[task]) // size):
            order = drawn[task][epoch * size : (epoch + 1) * size]
            assert sorted(order) == list(range(size))
            if task == 0:
                orders.add(tuple(order))
    assert len(orders) == len(drawn[0]) // 50


def test_a_large_task_is_permuted_too(monkeypatch):
    monkeypatch.setattr(pipeline, "PERMUTED_WHOLE", 50)
    mixture = Mixture([80], [1.0], seed=3)
    epochs = [[mixture[position][1] for position in range(80 * e, 80 * e + 80)] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(80))] * 2
    assert epochs[0] != epochs[1]


def test_short_spans_are_close_to_the_weights():
    weights = np.array([0.5, 0.3, 0.15, 0.05])
    mixture = Mixture([1000] * 4, weights, seed=0)
    tasks = np.array([mixture[i][0] for i in range(8000)])
    for start in range(0, 8000, 200):
        share = np.bincount(tasks[start : start + 200], minlength=4) / 200
        assert np.abs(share - weights).max() < 0.03
    half = np.bincount(tasks[::2], minlength=4) / 4000
    assert np.abs(half - weights).max() < 0.03


def test_the_seed_decides_the_order(splits, shape):
    streams = [TrainStream(splits, WEIGHTS, shape, seed) for seed in (1, 1, 2)]
    one, again, other = (take(stream, 3) for stream in streams)
    assert all(same(a, b) for a, b in zip(one, again, strict=True))
    assert not same(one[0], other[0])


def test_resuming_gives_the_same_batches_whatever_was_made_ahead(splits, shape):
    stream = TrainStream(splits, WEIGHTS, shape, seed=5)
    states, batches = [stream.state()], []
    for _ in range(12):
        batches.append(next(stream))
        states.append(json.loads(json.dumps(stream.state())))
    stream.close()
    assert stream.state() == states[-1]
    with pytest.raises(ValueError, match="closed"):
        next(stream)
    for at in (0, 1, 5, 11):
        resumed = TrainStream(splits, WEIGHTS, shape, seed=5, start_state=states[at])
        assert resumed.state() == states[at]
        follow = take(resumed, 12 - at)
        assert all(same(a, b) for a, b in zip(follow, batches[at:], strict=True))
        assert resumed.state() == states[12]
        resumed.close()


def test_batches_are_full_and_lose_no_example(splits, shape):
    stream = TrainStream(splits, WEIGHTS, shape, seed=0)
    counts = [np.zeros(len(split), int) for split in splits]
    filled = []
    for batch in take(stream, 150):
        filled.append((batch["segment"] > 0).mean())
        for i, task in enumerate(batch["task"]):
            if task >= 0:
                counts[task][int(batch["y"][i, 0])] += 1
    assert np.mean(filled) > 0.9
    assert all(count.max() - count.min() <= 1 for count in counts)
    share = np.array([count.sum() for count in counts]) / sum(count.sum() for count in counts)
    assert np.abs(share - WEIGHTS).max() < 0.02
    first = stream.state()
    assert len(first["waiting"]) <= 16
    stream.close()


def test_processes_share_the_examples_and_overlap_in_none(splits, shape):
    seen = []
    for process in range(2):
        stream = TrainStream(splits, WEIGHTS, shape, 0, process_index=process, process_count=2)
        drawn = [(int(t), int(y)) for b in take(stream, 20) for t, y in zip(b["task"], b["y"][:, 0], strict=True)]
        seen.append([index for task, index in drawn if task == 0])
        stream.close()
    assert len(seen[0]) > 100
    assert not set(seen[0][:200]) & set(seen[1][:200])


def test_a_stream_left_open_does_not_trouble_the_end_of_the_program(splits):
    program = f"""
from tasks.cache import EncodedSplit
from tasks.batch import BatchShape
from tasks.pipeline import TrainStream
stream = TrainStream([EncodedSplit({str(splits[0].folder)!r})], [1.0], BatchShape(4, 16, 8, 1, text=64), 0)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_state_of_another_process_is_refused(splits, shape):
    for state in ({"next": 1, "waiting": []}, {"position": 0}):
        with pytest.raises(ValueError, match="does not belong"):
            TrainStream(splits, WEIGHTS, shape, 0, process_index=0, process_count=2, start_state=state)


def test_an_example_that_fits_no_batch_is_told(splits, tmp_path):
    small = shape_for([splits[0].token_use()], [1.0], rows=1, length=16, settings=SETTINGS)
    long = a_split(tmp_path / "long", 3, 0, longest=40)
    with pytest.raises(ValueError, match="a row of the batch holds 16"):
        take(TrainStream([long], [1.0], small, 0), 3)
