"""Byte-level byte-pair encoding: any text has tokens, and the text comes back from them.

Source: Sennrich, Haddow, Birch 2016 (https://arxiv.org/abs/1508.07909) on the bytes of UTF-8, as in GPT-2. The 256
bytes are always in the vocabulary, so nothing is unknown; case is kept. A byte that is not UTF-8 arrives as a lone
surrogate (`errors="surrogateescape"`) and becomes that one byte's token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tasks.errors import UserError

BYTES = 256
"""The smallest vocabulary: one token for every byte."""

MAX_TOKEN_BYTES = 16
"""No learned token is longer, so `n` tokens never need more than `16 n` characters of a text."""

_TRAINING_CHARACTERS = 4096
_SURROGATES = re.compile("([\ud800-\udfff]+)")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Learns merges from `texts` (each read up to 4,096 characters) and returns the tokenizer as JSON.

    The vocabulary holds the 256 bytes and at most `vocab_size - 256` merges of pairs seen at least twice; with no texts
    it holds the bytes alone. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < BYTES:
        raise ValueError(f"a byte-level vocabulary needs at least {BYTES} tokens, got vocab_size={vocab_size}")
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=MAX_TOKEN_BYTES,
        show_progress=False,
    )
    core.train_from_iterator((_SURROGATES.sub(" ", text[:_TRAINING_CHARACTERS]) for text in texts), trainer)
    return core.to_str()


class Tokenizer:
    """A trained tokenizer, opened from its JSON; encoding is deterministic and keeps every byte.

    Raises:
        UserError: if the JSON is not a byte-level tokenizer.
    """

    def __init__(self, json_text: str) -> None:
        from tokenizers import Tokenizer as Core

        try:
            vocab = json.loads(json_text)["model"]["vocab"]
            self._core: Any = Core.from_str(json_text)
            self._byte_ids = np.array([vocab[character] for character in _byte_alphabet()], np.int32)
        except Exception as error:  # the library raises plain Exception for a text that it cannot read
            raise UserError(
                "the tokenizer cannot be read",
                expected="the JSON of a byte-level tokenizer that holds all 256 bytes",
                got=f"{type(error).__name__}: {error}",
            ) from error
        self.json = json_text
        self.vocab_size: int = self._core.get_vocab_size()
        values = {character: byte for byte, character in enumerate(_byte_alphabet())}
        self._token_bytes = {i: bytes(values[c] for c in token) for token, i in vocab.items()}

    def encode(self, text: str) -> np.ndarray:
        """The tokens of one text, `[n]` int32."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of each text, `[n]` int32; faster than one by one."""
        broken = [i for i, text in enumerate(texts) if not text.isascii() and _SURROGATES.search(text)]
        if broken:
            clean = list(texts)
            for i in broken:
                clean[i] = ""
        else:
            clean = texts if isinstance(texts, list) else list(texts)
        encoded = [np.array(e.ids, np.int32) for e in self._core.encode_batch_fast(clean)]
        for i in broken:
            encoded[i] = self._encode_broken(texts[i])
        return encoded

    def encode_words(self, words: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a list of words, each read with a space before it, and where each word begins.

        Returns:
            (ids `[n]` int32, first `[len(words)]` int32): `ids[first[w]]` is the first token of word `w`; every word,
            the empty one too, has at least one token.
        """
        pieces = self.encode_many([" " + word for word in words])
        lengths = np.array([len(piece) for piece in pieces], np.int64)
        ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
        return ids, (np.cumsum(lengths) - lengths).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some tokens; bytes that are not UTF-8 come back as lone surrogates (`surrogateescape`)."""
        return b"".join(self._token_bytes[int(i)] for i in ids).decode("utf-8", "surrogateescape")

    def _encode_broken(self, text: str) -> np.ndarray:
        pieces = []
        for part in _SURROGATES.split(text):
            if _SURROGATES.match(part):
                raw = b"".join(_surrogate_bytes(character) for character in part)
                pieces.append(self._byte_ids[np.frombuffer(raw, np.uint8)])
            else:
                pieces.append(np.array(self._core.encode(part).ids, np.int32))
        return np.concatenate(pieces)


def _surrogate_bytes(character: str) -> bytes:
    code = ord(character)
    return bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else character.encode("utf-8", "surrogatepass")


def _byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(BYTES) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(BYTES + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(BYTES)]
