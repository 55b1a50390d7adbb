"""What a frozen pathway makes of a task's rows: computed once, used by every candidate that reads them.

Axis letters: n examples, D width, L layers, F = (L + 1) D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from pathways.predictions import is_little, packed, run_shape
from pathways.submodel import SubModel
from tasks.encoded import Example

LITTLE = 256
"""Examples whose tokens are counted to see whether there are few."""


@dataclass(frozen=True)
class Features:
    """Cached activations of some rows, with their targets.

    Attributes:
        levels: `[n, L D]`, mean rows before every layer; `[n, 0]` of a pathway without taps.
        pooled: `[n, D]`, mean rows after the last norm.
        y, y_mask: `[n, Y]`.
    """

    levels: np.ndarray
    pooled: np.ndarray
    y: np.ndarray
    y_mask: np.ndarray

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def all(self) -> np.ndarray:
        """`[n, F]`: the levels, then the pooled rows."""
        return np.concatenate([self.levels, self.pooled], axis=1)

    def take(self, places: Any) -> Features:
        """Some of the rows."""
        return Features(self.levels[places], self.pooled[places], self.y[places], self.y_mask[places])


def activations(sub: SubModel, examples: Sequence[Example], *, statistics: bool = False) -> Features:
    """Runs rows through the first task of a sub-model.

    Args:
        statistics: with counters, which are not used: where that program is compiled already.
    """
    task, outputs = sub.names[0], sub.entries[0].fitted.num_outputs
    levels, pooled, y, mask = [], [], [], []
    # The shape that `predict_examples` would take, so that both share a program.
    little = is_little(sub, len(examples), sum(example.length for example in examples[:LITTLE]))
    shape = run_shape(sub, sub.entries[0].pathway.streams, little)
    for batch, held in packed(sub, shape, ((task, example) for example in examples)):
        out = jax.device_get(sub.run(batch, statistics=statistics)._replace(layers=()))
        pooled.append(out.pooled[: len(held)])
        levels.append(out.pooled[: len(held), :0] if out.levels is None else out.levels[: len(held)])
        y.append(np.stack([example.y[:outputs] for example in held]))
        mask.append(np.stack([example.y_mask[:outputs] for example in held]))
    return Features(*(np.concatenate(part) for part in (levels, pooled, y, mask)))
