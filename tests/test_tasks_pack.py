"""Packing loses nothing: every example comes back from the batch; capacities suit the mix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.batch import STREAMS, BatchShape, empty_batch, stream_fields
from tasks.encoded import EncoderSettings, Example
from tasks.pack import Packer, TokenUse, pack, shape_for, unpack

SHAPE = BatchShape(
    rows=4, length=12, examples=8, outputs=3, table=16, text=32, image=8, audio=8, patch=2, channels=1, frames=2, mels=3
)


def example(lengths: dict[str, int], outputs: int, rng: np.random.Generator, shape: BatchShape = SHAPE) -> Example:
    """Random contents in the stored dtypes: pixels as bytes, sound as half floats."""
    streams = {}
    for stream, count in lengths.items():
        fields = {}
        for name, (tail, dtype) in stream_fields(stream, shape).items():
            values = rng.integers(0, 256, size=(count, *tail))
            small = {"image": np.uint8, "audio": np.float16}.get(stream, dtype) if name == "patch" else dtype
            fields[name] = values.astype(small)
        if stream == "text":
            fields["tag"] = rng.integers(-1, 5, size=count).astype(np.int32)
            fields["word"] = np.arange(count, dtype=np.int32)
        streams[stream] = fields
    y = rng.random(outputs).astype(np.float32)
    return Example(streams, lengths, y, (rng.random(outputs) < 0.5).astype(np.float32))


def check_same(got: Example, wanted: Example) -> None:
    assert got.lengths == wanted.lengths
    for stream, fields in wanted.streams.items():
        for name, values in fields.items():
            if name == "word":
                continue
            expected = values.astype(np.float32) * np.float32(1 / 255) if values.dtype == np.uint8 else values
            assert np.array_equal(got.streams[stream][name], expected), (stream, name)
    width = len(wanted.y)
    assert np.array_equal(got.y[:width], wanted.y)
    assert np.array_equal(got.y_mask[:width], wanted.y_mask)
    assert not got.y_mask[width:].any()


LENGTHS = st.dictionaries(st.sampled_from(STREAMS), st.integers(1, 4), min_size=1, max_size=4)


@settings(max_examples=100)
@given(st.lists(st.tuples(LENGTHS, st.integers(0, 3), st.integers(0, 9)), max_size=12), st.integers(0, 2**31))
def test_every_example_that_was_taken_comes_back(specs, seed):
    rng = np.random.default_rng(seed)
    packer, taken = Packer(SHAPE), []
    for lengths, outputs, task in specs:
        lengths = {stream: lengths[stream] for stream in STREAMS if stream in lengths}
        if sum(lengths.values()) > SHAPE.length:
            continue
        one = example(lengths, outputs, rng)
        if packer.add(task, one):
            taken.append((task, one))
    batch = packer.batch()
    assert batch["task"].tolist() == [task for task, _ in taken] + [-1] * (SHAPE.examples - len(taken))
    for i, (_, one) in enumerate(taken):
        check_same(unpack(batch, SHAPE, i), one)
    assert (batch["segment"] > 0).sum() == sum(one.length for _, one in taken)
    assert (batch["tag"][batch["segment"] == 0] == -1).all()
    padding = empty_batch(SHAPE)
    assert {name: np.shape(v) for name, v in batch.items() if name not in STREAMS} == {
        name: np.shape(v) for name, v in padding.items() if name not in STREAMS
    }
    for stream in STREAMS:
        assert {n: (v.shape, v.dtype) for n, v in batch[stream].items()} == {
            n: (v.shape, v.dtype) for n, v in padding[stream].items()
        }


def test_examples_stand_whole_in_one_row_with_streams_in_order():
    rng = np.random.default_rng(0)
    one, two = example({"text": 3, "table": 2}, 1, rng), example({"text": 8}, 1, rng)
    batch = pack([(0, one), (1, two), (2, one)], SHAPE)
    # rows of 12: one takes 5 of row 0, two (8) does not fit there and takes row 1, the third goes back to row 0
    assert batch["segment"][0].tolist() == [1] * 5 + [3] * 5 + [0] * 2
    assert batch["segment"][1].tolist() == [2] * 8 + [0] * 4
    # table tokens come first; text begins at 16, after the table's capacity
    assert batch["source"][0, :10].tolist() == [0, 1, 16, 17, 18, 2, 3, 27, 28, 29]


def test_a_full_packer_refuses_and_stays_as_it_was():
    rng = np.random.default_rng(0)
    packer = Packer(SHAPE)
    for _ in range(2):
        assert packer.add(0, example({"image": 4}, 1, rng))
    before = packer.batch()
    assert not packer.add(0, example({"image": 1}, 1, rng))
    assert not packer.add(0, example({"text": 13}, 1, rng))
    after = packer.batch()
    assert all(np.array_equal(before[name], after[name]) for name in ("source", "segment", "task", "y"))
    with pytest.raises(ValueError, match="9 image tokens, the batch holds 8"):
        pack([(0, example({"image": 9}, 1, rng))], SHAPE)
    with pytest.raises(ValueError, match="13 tokens, a row of the batch holds 12"):
        pack([(0, example({"text": 13}, 1, rng))], SHAPE)


def test_a_stream_that_is_absent_takes_no_place():
    shape = BatchShape(rows=1, length=4, examples=2, outputs=1, text=4, audio=4, frames=2, mels=3)
    rng = np.random.default_rng(0)
    batch = pack([(0, example({"text": 1, "audio": 2}, 1, rng, shape))], shape)
    assert batch["source"][0].tolist() == [0, 4, 5, 0]
    assert "table" not in batch
    assert "image" not in batch


def test_capacities_follow_the_mix():
    # 75% of the examples have 10 text tokens and 25% have 30 table tokens: per example 7.5 and 7.5, so each stream
    # expects half of 1,024 tokens, and 25% slack makes 640; 1,024 / 15 * 1.25 = 85.3 examples -> 88
    uses = [TokenUse({"text": 10.0}, {"text": 64}, outputs=4), TokenUse({"table": 30.0}, {"table": 30}, outputs=0)]
    shape = shape_for(uses, [0.75, 0.25], rows=8, length=128, settings=EncoderSettings(patch=6))
    assert (shape.text, shape.table, shape.image, shape.audio) == (640, 640, 0, 0)
    assert (shape.examples, shape.outputs, shape.patch) == (88, 4, 6)


def test_a_rare_stream_still_holds_its_largest_example():
    uses = [TokenUse({"text": 10.0}, {"text": 64}), TokenUse({"audio": 100.0}, {"audio": 120})]
    shape = shape_for(uses, [1 - 1e-6, 1e-6], rows=8, length=128, settings=EncoderSettings())
    assert shape.audio == 128
    assert shape.outputs == 1
    with pytest.raises(ValueError, match="length >= 120"):
        shape_for(uses, [0.5, 0.5], rows=8, length=100, settings=EncoderSettings())
