"""Columns to tokens: every kind, its odd cells, and the cut to the longest example."""

from __future__ import annotations

import io
import wave

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import wavfile
from tolerance import assert_close

from tasks.audio import encode_sounds, log_mel, mel_filters, read_wav, resample
from tasks.batch import CATEGORY, MISSING, NUMBER
from tasks.encode import encode_batch
from tasks.encoded import EncoderSettings, bucket, share_out
from tasks.errors import UserError
from tasks.fitted import FittedTask
from tasks.image import cut_windows, encode_images, fit, fitting_size, open_image
from tasks.spec import Input, Target, Task
from tasks.table import encode_table
from tasks.text import encode_texts, encode_words
from tasks.tokenizer import Tokenizer, train_tokenizer

SETTINGS = EncoderSettings()
SMALL = EncoderSettings(max_length=6)
BYTES = Tokenizer(train_tokenizer([], 256))


def a_task(inputs, target=None, **fields):
    task = Task(
        name="t",
        train="t.csv",
        target=target or Target(("y",), "classification"),
        inputs=tuple(Input(name, kind) for name, kind in inputs.items()),
        on_bad=fields.pop("on_bad", "stop"),
        group=fields.pop("group", None),
    )
    fields.setdefault("classes", ("a", "b"))
    return FittedTask(task, **fields)


# text


def test_text_tokens_know_their_place_and_column():
    ragged, cut = encode_texts(["ab", None, "abcdefgh"], "note", BYTES, SMALL)
    assert ragged.lengths.tolist() == [2, 1, 6]
    assert cut.tolist() == [False, False, True]
    assert ragged.fields["position"].tolist() == [0, 1, 0, 0, 1, 2, 3, 4, 5]
    assert set(ragged.fields["column"]) == {bucket("note", SMALL.column_buckets)}
    assert BYTES.decode(ragged.fields["id"]) == "ab\x00abcdef"


def test_a_text_of_ten_megabytes_is_cut_before_it_is_encoded():
    ragged, cut = encode_texts(["x" * 10_000_000], "note", BYTES, SETTINGS)
    assert ragged.lengths.tolist() == [128]
    assert cut.all()


def test_words_keep_their_numbers_and_say_what_was_cut():
    # with bytes as tokens " ab" takes 3 tokens and " c" takes 2: of 6 tokens, words 0 and 1 and the start of 2
    ragged, cut, words = encode_words([["ab", "c", "d", "e"], [], ["f"]], "tokens", BYTES, SMALL)
    assert words.tolist() == [4, 0, 1]
    assert cut.tolist() == [True, False, False]
    assert ragged.lengths.tolist() == [6, 1, 2]
    assert ragged.fields["word"].tolist() == [0, -1, -1, 1, -1, 2, -1, 0, -1]


def test_tags_stand_on_the_first_token_of_each_word():
    fitted = a_task({"tokens": "text"}, Target(("tags",), "tagging"), classes=("N", "V"))
    batch = pa.RecordBatch.from_pydict({"tokens": [["ab", "c", "d"], ["e"]], "tags": [["V", "N", "V"], ["?!"]]})
    rows = encode_batch(fitted, BYTES, batch, SMALL)
    assert rows.streams["text"].fields["tag"].tolist() == [1, -1, -1, 0, -1, 1, -1, -1]
    assert [tags.tolist() for tags in rows.word_tags] == [[1, 0, 1], [-1]]
    assert rows.unseen == {"?!": 1}
    assert rows.y.shape == (2, 0)


# tables


def test_table_cells_by_hand():
    # age: mean 40, std 10: 50 -> 1, 1000 -> clipped 10; "flat" never varies: 0; missing ones are a state
    ragged = encode_table(
        {"age": np.array([50.0, np.nan, 1000]), "flat": np.array([7.0, 7, np.inf])},
        {"city": ["Rome", None, "Oslo"]},
        ["age", "city", "flat"],
        {"age": 40.0, "flat": 7.0},
        {"age": 10.0, "flat": 0.0},
        SETTINGS,
    )
    shape = (3, 3)
    states = [[NUMBER, CATEGORY, NUMBER], [MISSING, MISSING, NUMBER], [NUMBER, CATEGORY, MISSING]]
    assert ragged.fields["state"].reshape(shape).tolist() == states
    assert_close(ragged.fields["number"].reshape(shape), [[1, 0, 0], [0, 0, 0], [10, 0, 0]])
    assert ragged.fields["category"][1] == bucket("city=Rome", SETTINGS.category_buckets)
    assert ragged.fields["column"][:3].tolist() == [bucket(n, 16384) for n in ("age", "city", "flat")]


def test_buckets_never_change():
    # `printf age | b2sum -l 64` begins db e7, and 0xe7db mod 2^14 = 10203; of city=Rome it begins d7 f2: 0xf2d7 = 62167
    assert [bucket("age", 16384), bucket("city=Rome", 65536)] == [10203, 62167]


# images


def picture(mode: str, size=(12, 9)) -> Image.Image:
    grey = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    if mode == "I;16":
        return Image.fromarray((grey * 257).astype(np.uint16))
    if mode == "F":
        return Image.fromarray((grey / 255).astype(np.float32))
    return Image.fromarray(grey.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_kind_of_image_becomes_the_same_channels(mode, channels):
    settings = EncoderSettings(channels=channels)
    pixels = fit(picture("L").convert("I") if mode == "I" else picture(mode), settings)
    assert pixels.shape == (9, 12, channels)
    assert pixels.dtype == np.uint8
    if mode not in ("1", "I", "P"):
        desired = np.asarray(picture("L"), np.float64)
        assert np.abs(pixels[..., 0] - desired).max() <= 1


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (fit(image, SETTINGS) == 255).all()


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 100))
def test_scaling_down_fits_and_keeps_proportions(h, w, tokens):
    height, width = fitting_size(h, w, 4, tokens)
    assert -(-height // 4) * -(-width // 4) <= tokens
    assert 1 <= height <= h
    assert 1 <= width <= w
    if -(-h // 4) * -(-w // 4) <= tokens:
        assert (height, width) == (h, w)
    if min(height, width) > 8:
        assert 0.8 < (height / width) / (h / w) < 1.25


def test_windows_overlap_and_repeat_the_edge():
    # 5 x 6 pixels at stride 4: 2 x 2 windows of 8 that begin at -2 and 2; pixel (y, x) is 10 y + x
    pixels = (10 * np.arange(5)[:, None] + np.arange(6))[..., None].astype(np.uint8)
    windows = cut_windows(pixels, 8, 4)
    assert windows.shape == (2, 2, 8, 8, 1)
    assert windows[0, 0, 0, :, 0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    assert windows[1, 1, :, 0, 0].tolist() == [22, 32, 42, 42, 42, 42, 42, 42]
    assert windows[0, 1, 2, :, 0].tolist() == [2, 3, 4, 5, 5, 5, 5, 5]


def encoded_bytes(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def test_images_come_as_paths_bytes_and_raw_arrays(tmp_path):
    picture("L").save(tmp_path / "a.png")
    values = ["a.png", encoded_bytes(picture("L"))]
    ragged, bad = encode_images(values, "image", tmp_path, None, SETTINGS)
    raw, _ = encode_images([picture("L").tobytes()], "image", tmp_path, (9, 12), SETTINGS)
    assert not bad
    assert ragged.lengths.tolist() == [9, 9]
    assert ragged.fields["row"][:9].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert ragged.fields["col"][:9].tolist() == [0, 1, 2] * 3
    for part in (ragged.fields["patch"][:9], ragged.fields["patch"][9:]):
        assert np.array_equal(part, raw.fields["patch"])


@pytest.mark.parametrize("value", [None, "", b"", "no_such.png", b"not an image", encoded_bytes(picture("L"))[:60]])
def test_what_does_not_decode_is_told(value, tmp_path):
    with pytest.raises(ValueError, match=r"."):
        open_image(value, tmp_path, None)
    ragged, bad = encode_images([value], "image", tmp_path, None, SETTINGS)
    assert list(bad) == [0]
    assert ragged.lengths.tolist() == [0]


def test_a_raw_array_of_the_wrong_size_is_bad(tmp_path):
    _, bad = encode_images([b"abc"], "image", tmp_path, (2, 2), SETTINGS)
    assert "3 bytes" in bad[0]


# audio


def tone(seconds=0.5, rate=8000, hertz=1000.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write_pcm(path, samples, rate, width, channels=1):
    scaled = np.round(samples.astype(np.float64) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        raw = (scaled + 128).astype(np.uint8).tobytes()
    else:
        raw = b"".join(int(v).to_bytes(width, "little", signed=True) * channels for v in scaled)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)


@pytest.mark.parametrize(("width", "channels"), [(1, 1), (2, 1), (2, 2), (3, 1), (4, 1)])
def test_every_width_of_sample_reads_alike(tmp_path, width, channels):
    write_pcm(tmp_path / "a.wav", tone(), 8000, width, channels)
    rate, samples = read_wav(tmp_path / "a.wav")
    assert rate == 8000
    assert np.abs(samples - tone()).max() < 2.0 ** (2 - 8 * width)
    wavfile.write(tmp_path / "f.wav", 8000, tone())
    assert_close(read_wav(tmp_path / "f.wav")[1], tone())


def test_a_tone_is_loudest_in_its_own_band_after_resampling():
    high = resample(tone(rate=44100), 44100, 8000)
    assert_close(high[200:-200], tone()[200 : len(high) - 200], scale=500)
    energies = log_mel(high, 8000, 64)
    # mel(1000 Hz) = 1000.0, mel(4000 Hz) = 2146.1; 65 steps up to it: band 1000 / 33.02 - 1 = 29.3
    assert set(energies[2:-2].argmax(axis=1)) == {29}
    assert energies.shape == (1 + (4000 - 200) // 80 + 1, 64)


def test_no_mel_filter_is_empty():
    for rate in (8000, 16000):
        assert (mel_filters(rate, 512 * rate // 8000, 64).sum(axis=0) > 0.3).all()


def test_clips_are_normalised_cut_and_padded(tmp_path):
    write_pcm(tmp_path / "short.wav", tone(0.01), 8000, 2)
    write_pcm(tmp_path / "long.wav", tone(3), 8000, 2)
    write_pcm(tmp_path / "quiet.wav", 0 * tone(), 8000, 2)
    values = ["short.wav", "long.wav", "quiet.wav", "none.wav", None]
    ragged, cut, bad = encode_sounds(values, "wav", tmp_path, EncoderSettings(max_length=20))
    assert ragged.lengths.tolist() == [1, 20, 13, 0, 0]
    assert cut.tolist() == [False, True, False, False, False]
    assert sorted(bad) == [3, 4]
    clip = ragged.fields["patch"][1:21].astype(np.float64)
    assert abs(clip.mean()) < 0.01
    assert abs(clip.std() - 1) < 0.01
    assert (ragged.fields["patch"][21:] == 0).all()
    assert ragged.fields["position"][:4].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("content", [b"", b"RIFF", b"RIFF\x00\x00\x00\x00WAVEfmt ", b"hello" * 20])
def test_a_broken_sound_stops_or_is_skipped(tmp_path, content):
    (tmp_path / "a.wav").write_bytes(content)
    write_pcm(tmp_path / "b.wav", tone(), 8000, 2)
    schema = pa.schema([("wav", pa.string()), ("y", pa.string()), ("__row__", pa.int64())])
    schema = schema.with_metadata({"file": "sounds.csv", "folder": str(tmp_path)})
    batch = pa.RecordBatch.from_arrays(
        [pa.array(["b.wav", "a.wav"]), pa.array(["a", "b"]), pa.array([6, 7])], schema=schema
    )
    with pytest.raises(UserError, match=r"sounds.csv, data row 8, column wav"):
        encode_batch(a_task({"wav": "audio"}), BYTES, batch, SETTINGS)
    rows = encode_batch(a_task({"wav": "audio"}, on_bad="skip"), BYTES, batch, SETTINGS)
    assert rows.counts["bad"] == 1
    assert rows.row_numbers.tolist() == [6]
    assert rows.y.tolist() == [[1, 0]]


# all together


def test_shares_of_the_budget_by_hand():
    # 10 tokens for columns of 2, 9, 9: the short one stays whole, the others take 4 each; 30 for all is enough
    lengths = np.array([[2, 2], [9, 9], [9, 9]])
    assert share_out(lengths, np.array([10, 30])).T.tolist() == [[2, 4, 4], [2, 9, 9]]


@given(st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 40))
def test_shares_use_the_whole_budget_or_all_there_is(lengths, budget):
    lengths = np.array(lengths)
    kept = share_out(lengths, np.full(3, budget))
    assert (kept <= lengths).all()
    assert (kept.sum(axis=0) == np.minimum(lengths.sum(axis=0), budget)).all()


def test_mixed_inputs_are_cut_to_the_longest_example():
    fitted = a_task(
        {"n": "number", "one": "text", "c": "category", "two": "text"},
        number_mean={"n": 0.0},
        number_std={"n": 1.0},
        group="c",
    )
    columns = {"n": ["1.5", "?"], "one": ["a", "abc"], "c": ["x", None], "two": ["abcdefgh", ""], "y": ["b", "a"]}
    batch = pa.RecordBatch.from_pydict(columns)
    rows = encode_batch(fitted, BYTES, batch, SMALL)
    assert rows.streams["table"].lengths.tolist() == [2, 2]
    assert rows.streams["text"].lengths.tolist() == [4, 4]
    assert BYTES.decode(rows.streams["text"].fields["id"]) == "aabcabc\x00"
    assert rows.streams["text"].fields["position"].tolist() == [0, 0, 1, 2, 0, 1, 2, 0]
    assert rows.counts["truncated"] == 1
    assert rows.groups == ["x", ""]
    assert rows.streams["table"].fields["state"].tolist() == [NUMBER, CATEGORY, MISSING, MISSING]
    without = encode_batch(fitted, BYTES, batch.select(["n", "one", "c", "two"]), SMALL, with_target=False)
    assert without.y_mask.sum() == 0
    assert np.array_equal(without.streams["text"].fields["id"], rows.streams["text"].fields["id"])


def test_rows_without_a_known_target_are_left_out_and_counted():
    batch = pa.RecordBatch.from_pydict({"x": ["p", "q", "r"], "y": ["a", None, "zebra"]})
    rows = encode_batch(a_task({"x": "text"}), BYTES, batch, SETTINGS)
    assert rows.row_numbers.tolist() == [0]
    assert rows.counts["missing_target"] == 1
    assert rows.unseen == {"zebra": 1}


def test_a_missing_column_and_a_large_tokenizer_are_told():
    batch = pa.RecordBatch.from_pydict({"z": ["p"], "y": ["a"]})
    with pytest.raises(UserError, match="no column 'x'"):
        encode_batch(a_task({"x": "text"}), BYTES, batch, SETTINGS)
    with pytest.raises(ValueError, match="256 tokens, the model reads 100"):
        encode_batch(a_task({"z": "text"}), BYTES, batch, EncoderSettings(vocab_size=100))
    with pytest.raises(ValueError, match="even"):
        EncoderSettings(patch=8, stride=5)
