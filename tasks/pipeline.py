"""From encoded splits to batches of training: an endless, resumable mix of the tasks.

The mix is a function of a position: position -> (task, which of its examples). A period of positions holds every task
as often as its weight says, spread evenly; within a task a permutation, new each epoch, orders the examples. So a
position costs the same with three tasks or a thousand, the state is a few integers, and processes share one sequence:
process p of P takes positions p, p + P, p + 2P, ...

Axis letters: L positions in a period.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np

from tasks.batch import Batch, BatchShape
from tasks.cache import EncodedSplit
from tasks.encoded import Example
from tasks.pack import Packer

MISFITS = 16
"""How many examples that do not fit any more are set aside (for the next batch) before a batch is closed."""

PREFETCH = 2
"""Batches made ahead, by one thread."""

PERMUTED_WHOLE = 1 << 16
"""Tasks of at most this many examples keep their epoch's permutation; of larger ones each place is computed by grain's
`index_shuffle`, which walks cycles of 2^16 and more and so is slow for small tasks."""


def sampling_weights(
    sizes: Sequence[int], temperature: float = 1.0, task_weights: Sequence[float] | None = None
) -> np.ndarray:
    """Probabilities of the tasks, `p_i` proportional to `w_i * n_i ** (1 / temperature)`.

    Temperature 1 is proportional to size, infinity is uniform (Arivazhagan et al. 2019, https://arxiv.org/abs/1907.05019).

    Raises:
        ValueError: an empty task, a weight not above 0, a temperature below 1.
    """
    n = np.asarray(sizes, np.float64)
    w = np.ones(len(n)) if task_weights is None else np.asarray(task_weights, np.float64)
    if len(n) == 0 or len(w) != len(n) or not (n > 0).all() or not (w > 0).all() or not temperature >= 1:
        raise ValueError(
            "sampling needs a positive size and weight for each task and a temperature of at least 1, "
            f"got sizes {list(sizes)}, weights {w.tolist()}, temperature {temperature}"
        )
    log = np.log(w) + np.log(n) / temperature
    p = np.exp(log - log.max())
    return p / p.sum()


class Mixture:
    """The endless sequence of (task, example) that `sizes`, `weights` and `seed` determine; any position in O(1).

    Each period, task `i` comes `round(p_i L)` times (at least once), at jittered even distances, so that short spans
    are close to the weights too, and each of its epochs uses every example once.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | np.ndarray, seed: int) -> None:
        p = np.asarray(weights, np.float64)
        if len(sizes) != len(p) or len(p) == 0 or min(sizes) < 1 or not (p > 0).all():
            raise ValueError(f"a mixture needs as many sizes as weights, all above 0, got {len(sizes)} and {len(p)}")
        counts = np.maximum(1, np.rint(p / p.sum() * max(4096, 64 * len(p)))).astype(np.int64)
        rng = np.random.default_rng(seed)
        owner = np.repeat(np.arange(len(counts)), counts)
        rank = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        order = np.argsort((rank + rng.random(len(owner))) / counts[owner], kind="stable")
        self._task, self._rank = owner[order].tolist(), rank[order].tolist()
        self._counts, self._sizes, self._seed = counts.tolist(), [int(size) for size in sizes], int(seed)
        self._orders: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        """(task, example) at a position."""
        period, place = divmod(position, len(self._task))
        task = self._task[place]
        size = self._sizes[task]
        epoch, index = divmod(period * self._counts[task] + self._rank[place], size)
        return task, self._shuffled(task, epoch, index, size)

    def _shuffled(self, task: int, epoch: int, index: int, size: int) -> int:
        """Where `index` stands in the epoch's permutation of `size` examples."""
        if size > PERMUTED_WHOLE:
            from grain.experimental import index_shuffle

            seed = int(np.random.SeedSequence([self._seed, task, epoch]).generate_state(1)[0])
            return index_shuffle(index, max_index=size - 1, seed=seed, rounds=4)
        known = self._orders.get(task)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng([self._seed, task, epoch])
            known = self._orders[task] = (epoch, rng.permutation(size).astype(np.int32))
        return int(known[1][index])


class _PackedBatches:
    """Fills batches from a mixture; grain's prefetching thread drives it and keeps its state beside each batch."""

    def __init__(
        self,
        splits: Sequence[EncodedSplit],
        mixture: Mixture,
        shape: BatchShape,
        process_index: int,
        process_count: int,
    ) -> None:
        self._splits, self._mixture, self._shape = splits, mixture, shape
        self._count = process_count
        self._state: dict[str, Any] = {"next": process_index, "waiting": []}

    def __next__(self) -> Batch:
        packer = Packer(self._shape)
        waiting = list(self._state["waiting"])
        position = int(self._state["next"])
        misfits: list[int] = []
        while len(misfits) < MISFITS and len(packer) < self._shape.examples:
            if waiting:
                at = waiting.pop(0)
            else:
                at, position = position, position + self._count
            task, example = self._example(at)
            if packer.add(task, example):
                continue
            if not len(packer):
                raise ValueError(f"an example does not fit even an empty batch: {packer.explain(task, example)}")
            misfits.append(at)
        self._state = {"next": position, "waiting": misfits + waiting}
        return packer.batch()

    def get_state(self) -> dict[str, Any]:
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        self._state = {"next": int(state["next"]), "waiting": [int(at) for at in state["waiting"]]}

    def _example(self, position: int) -> tuple[int, Example]:
        task, index = self._mixture[position]
        return task, self._splits[task].example(index)


class TrainStream:
    """An endless iterator of training batches, made ahead in a thread.

    Args:
        splits: the training split of each task; its place is the task's number.
        weights: the tasks' sampling probabilities.
        shape: of every batch.
        seed: of the order; the same seed gives the same batches.
        process_index, process_count: which share of the sequence this process takes.
        start_state: a `state()` to go on from; the batches that follow are the same, bit for bit.

    Raises:
        ValueError: an example that no batch of this shape can hold; a state of another kind.
    """

    def __init__(
        self,
        splits: Sequence[EncodedSplit],
        weights: Sequence[float] | np.ndarray,
        shape: BatchShape,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        start_state: dict[str, Any] | None = None,
    ) -> None:
        from grain.experimental import ThreadPrefetchDatasetIterator

        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
        mixture = Mixture([len(split) for split in splits], weights, seed)
        batches = _PackedBatches(splits, mixture, shape, process_index, process_count)
        if start_state is not None:
            if set(start_state) != {"next", "waiting"} or int(start_state["next"]) % process_count != process_index:
                raise ValueError(
                    f"this state does not belong to process {process_index} of {process_count}: {start_state}"
                )
            batches.set_state(start_state)
        self._held = [ThreadPrefetchDatasetIterator(batches, prefetch_buffer_size=PREFETCH)]
        # In an ending interpreter the thread's native code would abort and grain's __del__ complain: stop before it.
        self._stop = weakref.finalize(self, _stop, self._held)

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Batch:
        if not self._held:
            raise ValueError("this stream is closed")
        return next(self._held[0])

    def state(self) -> dict[str, Any]:
        """Where the stream stands after the batches already taken (those made ahead do not count); plain JSON."""
        return dict(self._held[0].get_state() if self._held else self._last_state)

    def close(self) -> None:
        """Stops the thread; `state` still answers."""
        self._last_state = self.state()
        self._stop()


def _stop(held: list[Any]) -> None:
    while held:
        held.pop().close()
