"""Ridge regression with its leave-one-out predictions in closed form: a whole path of penalties from one eigenvalue
problem, in float64.

With an intercept that is not penalised, the prediction for a row by the fit without it is
`y_i - (y_i - f_i) / (1 - h_i)`, where `h` is the diagonal of the hat matrix (Allen 1974; Golub, Heath and Wahba 1979).

Axis letters: n examples, F features, Y outputs, P penalties.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ridge:
    """One fit: `x @ kernel + bias`.

    Attributes:
        penalty: as given.
        kernel: `[F, Y]`; bias: `[Y]`.
        out: `[n, Y]`, for each row the prediction of the fit to all others.
    """

    penalty: float
    kernel: np.ndarray
    bias: np.ndarray
    out: np.ndarray


def ridge_path(x: np.ndarray, y: np.ndarray, penalties: Sequence[float]) -> Iterator[Ridge]:
    """A fit for each penalty, in their order.

    Args:
        x: `[n, F]`, n at least 1.
        y: `[n, Y]`, all known.
        penalties: of the squared norm of the kernel, in units of the mean squared norm of a centred row; above 0.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    n = len(x)
    mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x, y = x - mean, y - y_mean
    unit = max(float(np.mean(np.sum(x * x, axis=1))), 1e-12)
    wide = x.shape[1] > n
    squared, basis = np.linalg.eigh(x @ x.T if wide else x.T @ x)
    squared = np.maximum(squared, 0.0)
    # left: the scores' directions times their lengths; `back` takes coefficients of `left` to the kernel.
    left = basis * np.sqrt(squared) if wide else x @ basis
    seen = left.T @ y
    for penalty in penalties:
        shrunk = squared + penalty * unit
        weight = 1.0 / shrunk
        fitted = left @ (weight[:, None] * seen)
        # Rounding may take the hat value of a row that stands alone in its direction to one.
        hat = np.minimum(1.0 / n + (left * left) @ weight, 1.0 - 1e-9)
        out = y + y_mean - (y - fitted) / (1.0 - hat)[:, None]
        if wide:
            kernel = x.T @ (basis @ (weight[:, None] * (basis.T @ y)))
        else:
            kernel = basis @ (weight[:, None] * seen)
        yield Ridge(penalty, kernel, y_mean - mean @ kernel, out)
