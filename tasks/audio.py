"""Audio columns to tokens: WAV -> mono at one sample rate -> log-mel -> patches of a few frames.

The mel scale is O'Shaughnessy's, mel = 2595 log10(1 + f / 700) (Speech Communication, 1987); filters are triangles of
height 1 between neighbouring centres. Frames are Hann windows of 25 ms, one every 10 ms; each clip is brought to mean 0
and standard deviation 1.

Axis letters: f frames, m mels, k frequencies.
"""

from __future__ import annotations

import functools
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tasks.encoded import EncoderSettings, Ragged, bucket
from tasks.image import Undecodable

FLOOR = 1e-6
"""Added to every band's energy before the logarithm."""

QUIETEST_STD = 1e-2
"""A clip whose log-mel varies less than this is silence and is not blown up."""


def encode_sounds(
    values: Sequence[str | bytes | None], column: str, folder: Path, settings: EncoderSettings
) -> tuple[Ragged, np.ndarray, dict[int, str]]:
    """Patches of one column of WAV files, as paths (relative to `folder`) or as bytes, at most `max_length` each.

    Returns:
        (tokens, cut `[n]` bool where the end of a clip was left out, bad: row -> why it could not be decoded).
    """
    pieces, cut, bad = [], np.zeros(len(values), bool), {}
    for i, value in enumerate(values):
        try:
            patches, cut[i] = _patches(value, folder, settings)
        except Undecodable as error:
            bad[i] = str(error)
            patches = np.zeros((0, settings.frames, settings.mels), np.float16)
        pieces.append(patches)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    total = int(lengths.sum())
    fields = {
        "patch": np.concatenate([np.zeros((0, settings.frames, settings.mels), np.float16), *pieces]),
        "position": (np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)).astype(np.int32),
        "column": np.full(total, bucket(column, settings.column_buckets), np.int32),
    }
    return Ragged(fields, lengths), cut, bad


def read_wav(source: Path | bytes) -> tuple[int, np.ndarray]:
    """Samples per second and the mono samples `[s]` float32 in -1..1 of a WAV of 8, 16, 24, 32 bits or floats.

    Raises:
        Undecodable: for a missing, empty or broken file, or one with no samples.
    """
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rate, samples = wavfile.read(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Exception as error:  # scipy raises ValueError, struct.error, OSError and more for broken files
        raise Undecodable(f"{type(error).__name__}: {error}") from error
    if samples.size == 0 or rate <= 0:
        raise Undecodable("the file holds no samples")
    if samples.dtype == np.uint8:
        scaled = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        scaled = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    else:
        scaled = np.nan_to_num(samples.astype(np.float32))
    return int(rate), scaled if scaled.ndim == 1 else scaled.mean(axis=1)


def log_mel(samples: np.ndarray, rate: int, mels: int) -> np.ndarray:
    """Log-mel energies `[f, m]` float32 of samples `[s]`; a clip shorter than one window is padded with zeros."""
    window, hop, size = _frame_sizes(rate)
    frames = 1 + max(0, -(-(len(samples) - window) // hop))
    padded = np.pad(samples, (0, window + (frames - 1) * hop - len(samples)))
    framed = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    spectrum = np.fft.rfft(framed * _hann(window), size)
    power = spectrum.real**2 + spectrum.imag**2
    # einsum, not a BLAS product: these are too small for its threads, which cost ten times more on a busy machine.
    return np.log(np.einsum("fk,km->fm", power, mel_filters(rate, size, mels)) + FLOOR).astype(np.float32)


@functools.lru_cache(16)
def mel_filters(rate: int, size: int, mels: int) -> np.ndarray:
    """Triangular filters `[k, m]` from 0 to half the sample rate, k = size / 2 + 1 frequencies."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, mels + 2) / 2595) - 1)
    frequencies = np.arange(size // 2 + 1)[:, None] * rate / size
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Polyphase resampling of `[s]` samples from `rate` to `target` per second."""
    if rate == target:
        return samples
    from scipy.signal import resample_poly

    common = math.gcd(rate, target)
    return resample_poly(samples, target // common, rate // common).astype(np.float32)


def _patches(value: str | bytes | None, folder: Path, settings: EncoderSettings) -> tuple[np.ndarray, bool]:
    if not value:
        raise Undecodable("no sound in this row")
    rate, samples = read_wav(value if isinstance(value, bytes) else folder / value)
    window, hop, _ = _frame_sizes(settings.sample_rate)
    most_frames = settings.max_length * settings.frames
    reach = math.ceil((window + most_frames * hop) / settings.sample_rate * rate)
    energies = log_mel(resample(samples[:reach], rate, settings.sample_rate), settings.sample_rate, settings.mels)
    cut = len(samples) > reach or len(energies) > most_frames
    energies = energies[:most_frames]
    energies = (energies - energies.mean()) / max(float(energies.std()), QUIETEST_STD)
    energies = np.pad(energies, ((0, -len(energies) % settings.frames), (0, 0)))
    return energies.reshape(-1, settings.frames, settings.mels).astype(np.float16), cut


def _frame_sizes(rate: int) -> tuple[int, int, int]:
    """Window and hop in samples, and the Fourier size: twice the window or more, so that no low filter is empty."""
    window = max(1, round(0.025 * rate))
    return window, max(1, round(0.010 * rate)), 1 << (2 * window - 1).bit_length()


@functools.lru_cache(16)
def _hann(size: int) -> np.ndarray:
    return np.hanning(size + 2)[1:-1].astype(np.float32)
