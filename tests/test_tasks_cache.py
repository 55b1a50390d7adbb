"""Encoded splits on disk: whole or absent, keyed by all they depend on, the same examples as in memory."""

from __future__ import annotations

import csv
import os
from dataclasses import replace

import numpy as np
import pytest

from tasks import cache
from tasks.cache import EncodedSplit, cache_key, encode_split
from tasks.cache_size import mark_used, trim
from tasks.encode import encode_batch
from tasks.encoded import EncoderSettings
from tasks.errors import UserError
from tasks.fitted import fit
from tasks.spec import Input, Split, Target, Task
from tasks.splits import rows
from tasks.tokenizer import Tokenizer, train_tokenizer

SETTINGS = EncoderSettings(max_length=16)
BYTES = Tokenizer(train_tokenizer([], 256))


@pytest.fixture
def fitted(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["n", "x", "c", "y"])
        for i in range(3000):
            out.writerow([rng.normal(), "w" * int(rng.integers(0, 30)), "pq"[i % 2], "ab"[i % 2]])
    inputs = (Input("n", "number"), Input("x", "text"))
    return fit(Task("t", str(path), Target(("y",), "classification"), inputs, split=Split(0.2, 0.2), group="c"))


def test_examples_are_those_of_memory_and_the_cache_is_used_again(fitted, tmp_path, monkeypatch):
    split = encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "cache")
    batch = next(rows(fitted.task, "train", rows_per_batch=5000))
    whole = encode_batch(fitted, BYTES, batch, SETTINGS)
    assert len(split) == len(whole) == batch.num_rows
    assert split.counts == whole.counts
    assert split.groups == whole.groups
    assert np.array_equal(split.row_numbers, whole.row_numbers)
    assert np.array_equal(split.y, whole.y)
    for stream in ("table", "text"):
        assert np.array_equal(np.diff(split.offsets[stream]), whole.streams[stream].lengths)
        for name, values in whole.streams[stream].fields.items():
            assert np.array_equal(split.fields[stream][name], values)
    one = split.example(7)
    assert one.length == split.lengths[7] == sum(one.lengths.values())
    start = int(split.offsets["text"][7])
    assert np.array_equal(one.streams["text"]["id"], split.fields["text"]["id"][start : start + one.lengths["text"]])
    monkeypatch.setattr(cache, "encode_batch", None)
    again = encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "cache")
    assert again.folder == split.folder


def test_the_key_depends_on_what_changes_the_content_and_on_nothing_else(fitted):
    def key(fitted=fitted, split="train", fingerprint="f", tokenizer=BYTES, settings=SETTINGS):
        return cache_key(fitted, split, fingerprint, tokenizer, settings)

    other = Tokenizer(train_tokenizer(["aa aa aa"], 300))
    others = [
        key(fitted=replace(fitted, number_mean={"n": 1.0})),
        key(fitted=replace(fitted, task=replace(fitted.task, on_bad="skip"))),
        key(split="valid"),
        key(fingerprint="g"),
        key(tokenizer=other),
        key(settings=replace(SETTINGS, max_length=17)),
    ]
    assert len({key(), *others}) == 7
    assert key(fitted=replace(fitted, task=replace(fitted.task, name="u", weight=2.0))) == key()


def test_a_failure_leaves_nothing_behind(fitted, tmp_path, monkeypatch):
    calls = []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("killed")
        return encode_batch(*args, **kwargs)

    monkeypatch.setattr(cache, "encode_batch", breaks)
    with pytest.raises(RuntimeError, match="killed"):
        encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_damaged_cache_is_made_again(fitted, tmp_path):
    split = encode_split(fitted, "valid", BYTES, SETTINGS, tmp_path / "cache")
    wanted = split.fields["text"]["id"].copy()
    path = split.folder / "text.id.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cannot be read"):
        EncodedSplit(split.folder)
    assert np.array_equal(
        encode_split(fitted, "valid", BYTES, SETTINGS, tmp_path / "cache").fields["text"]["id"], wanted
    )


def test_large_arrays_are_mapped_and_equal(fitted, tmp_path, monkeypatch):
    small = encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "cache")
    monkeypatch.setattr(cache, "READ_WHOLE", 0)
    mapped = EncodedSplit(small.folder)
    assert isinstance(mapped.fields["text"]["id"].base, np.memmap)
    assert all(np.array_equal(small.fields["text"][n], mapped.fields["text"][n]) for n in small.fields["text"])


def test_a_full_disk_is_told_and_nothing_stays(fitted, tmp_path, monkeypatch):
    def full(self, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache._Growing, "append", full)
    with pytest.raises(UserError, match=r"cannot be kept[\s\S]*No space left"):
        encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_folder_that_cannot_be_made_is_told(fitted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_told(fitted, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot be kept"):
        encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "cache")


def test_tags_of_words_that_were_cut_are_kept(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"w": ["aaaa", "bbbb", "cccc", "dddd"], "t": ["X", "Y", "X", "Y"]}\n' * 40)
    fitted = fit(Task("t", str(tmp_path / "t.jsonl"), Target(("t",), "tagging"), (Input("w", "text"),)))
    split = encode_split(fitted, "train", BYTES, SETTINGS, tmp_path / "cache")
    tags = split.example(0).tags
    assert tags is not None
    assert tags[tags >= 0].tolist() == [0, 1, 0, 1]
    assert split.word_tags(0).tolist() == [0, 1, 0, 1]
    short = encode_split(fitted, "train", BYTES, EncoderSettings(max_length=7), tmp_path / "cache")
    tags = short.example(3).tags
    assert tags is not None
    assert tags[tags >= 0].tolist() == [0, 1]
    assert short.word_tags(3).tolist() == [0, 1, 0, 1]
    assert short.words[3] == 4
    assert short.token_use().outputs == 0


def test_the_cache_is_kept_within_its_size(tmp_path):
    now = 1_000_000_000.0
    for days, name in ((9, "old"), (5, "older than a day"), (0.5, "fresh"), (0, "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "id.npy").write_bytes(b"x" * 100)
        (tmp_path / name / "meta.json").write_text("")
        os.utime(tmp_path / name / "meta.json", (now - days * 86_400,) * 2)
    (tmp_path / ".writing-1").mkdir()

    def left() -> set[str]:
        return {path.name for path in tmp_path.iterdir()} - {".writing-1"}

    assert trim(tmp_path / "absent", 0) == 0
    assert trim(tmp_path, 400, now) == 0
    assert trim(tmp_path, 350, now) == 100
    assert left() == {"older than a day", "fresh", "new"}
    mark_used(tmp_path / "older than a day")
    os.utime(tmp_path / "fresh" / "meta.json", (now - 2 * 86_400,) * 2)
    assert trim(tmp_path, 0, (tmp_path / "older than a day" / "meta.json").stat().st_mtime) == 200
    assert left() == {"older than a day"}
    assert (tmp_path / ".writing-1").exists()
