"""What a model remembers of each task, for finding the nearest tasks of a new one: mean embedding and expert shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pathways.predictions import packed, run_shape
from pathways.submodel import SubModel
from tasks.encoded import Example

PROFILE_ROWS = 64
"""Examples of each task that its profile is made from."""


def profiles(sub: SubModel, examples: Mapping[str, Sequence[Example]]) -> dict[str, dict[str, Any]]:
    """Per task `{"embedding": [D], "usage": per routed layer {kind: [share of each expert of the model's bank]}}`.

    The embedding is the mean over examples of the pooled rows after the last norm; usage is the share of the task's
    choices that each expert took. `usage` lists the experts of this sub-model: `{kind: {index: share}}`.
    """
    named = ((task, example) for task, items in examples.items() for example in items)
    total = np.zeros((len(sub.names), sub.pooled_width))
    seen = np.zeros(len(sub.names))
    rows: list[np.ndarray] = []
    for batch, _ in packed(sub, run_shape(sub, sub.layout.size.streams), named):
        out = sub.run(batch, statistics=True)
        pooled, counters = jax.device_get((out.pooled, [layer.rows for layer in sub.count(out)]))
        task = np.asarray(batch["task"])
        present = task >= 0
        np.add.at(total, task[present], pooled[present])
        np.add.at(seen, task[present], 1)
        rows = [a + b for a, b in zip(rows, counters, strict=True)] if rows else list(counters)
    found = {}
    for number, task in enumerate(sub.names):
        if task not in examples or not seen[number]:
            continue
        usage = [_shares(experts, layer[number]) for experts, layer in zip(sub.layout.experts, rows, strict=True)]
        found[task] = {"embedding": (total[number] / seen[number]).tolist(), "usage": usage}
    return found


def _shares(experts: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, dict[str, float]]:
    share = rows / max(rows.sum(), 1.0)
    found, start = {}, 0
    for kind, index in experts.items():
        part = share[start : start + len(index)]
        found[kind] = {str(int(i)): round(float(s), 6) for i, s in zip(index, part, strict=True) if s > 0}
        start += len(index)
    return found
