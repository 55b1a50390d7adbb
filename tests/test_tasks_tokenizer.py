"""Byte-level tokens: every text, whatever its bytes, comes back; training is repeatable."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.errors import UserError
from tasks.tokenizer import BYTES, MAX_TOKEN_BYTES, Tokenizer, train_tokenizer

TEXTS = ["the cat sat on the mat", "The Cat sat, the dog ran", "naïve café ☕ naïve café ☕"] * 4
TRAINED = Tokenizer(train_tokenizer(TEXTS, 320))
PLAIN = Tokenizer(train_tokenizer([], 4096))


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=60))
def test_any_text_comes_back(text):
    for tokenizer in (TRAINED, PLAIN):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text


@given(st.binary(max_size=60))
def test_any_bytes_come_back(raw):
    text = raw.decode("utf-8", "surrogateescape")
    for tokenizer in (TRAINED, PLAIN):
        assert tokenizer.decode(tokenizer.encode(text)).encode("utf-8", "surrogateescape") == raw


def test_a_stray_surrogate_is_three_bytes():
    assert len(PLAIN.encode("a\ud800b")) == 5


def test_no_texts_give_the_bytes_alone():
    assert PLAIN.vocab_size == BYTES
    assert len(PLAIN.encode("héllo\x00")) == 7


def test_training_merges_and_keeps_case():
    assert BYTES < TRAINED.vocab_size <= 320
    assert len(TRAINED.encode("the cat sat")) < len("the cat sat")
    assert not np.array_equal(TRAINED.encode("the"), TRAINED.encode("The"))


def test_training_is_repeatable():
    assert train_tokenizer(TEXTS, 320) == train_tokenizer(iter(TEXTS), 320)


def test_no_token_is_longer_than_the_bound():
    tokenizer = Tokenizer(train_tokenizer(["-" * 1000] * 50, 1000))
    assert len(tokenizer.encode("-" * 1600)) >= 1600 // MAX_TOKEN_BYTES
    assert max(len(tokenizer.decode([i])) for i in range(tokenizer.vocab_size)) <= MAX_TOKEN_BYTES


@given(st.lists(st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=8), max_size=8))
def test_words_begin_where_they_are_said_to(words):
    ids, first = TRAINED.encode_words(words)
    assert len(first) == len(words)
    ends = [*first, len(ids)][1:]
    assert [TRAINED.decode(ids[a:b]) for a, b in zip(first, ends, strict=True)] == [" " + w for w in words]


def test_a_broken_tokenizer_is_told():
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        Tokenizer("{}")
    with pytest.raises(ValueError, match="256"):
        train_tokenizer([], 10)
