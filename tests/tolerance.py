"""The one place where tolerances live; they are never relaxed to make a test pass."""

from __future__ import annotations

import numpy as np

RELATIVE = {"float64": 1e-12, "float32": 2e-5, "bfloat16": 2e-2, "float16": 2e-3}


def assert_close(actual, desired, dtype="float32", scale: float = 1.0) -> None:
    """Asserts `|actual - desired| <= tol * (max|desired| + scale)` with tol by dtype, elementwise.

    `scale` is the natural size of the quantity (1 for normalised activations), so zeros have a meaningful bound.
    """
    tol = RELATIVE[np.dtype(dtype).name if not isinstance(dtype, str) else dtype]
    actual, desired = np.asarray(actual, np.float64), np.asarray(desired, np.float64)
    assert actual.shape == desired.shape, f"shape {actual.shape}, expected {desired.shape}"
    bound = tol * (np.max(np.abs(desired), initial=0.0) + scale)
    worst = np.max(np.abs(actual - desired), initial=0.0)
    assert worst <= bound, f"largest difference {worst:.3e} exceeds {bound:.3e} ({dtype})"
