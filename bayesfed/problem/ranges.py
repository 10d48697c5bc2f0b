"""Values that a run's numbers don't hold, and values that learn badly."""

from __future__ import annotations

import math
from logging import getLogger

import numpy as np
import torch

from bayesfed.errors import InputError
from bayesfed.problem.data.own import place
from bayesfed.problem.data.source import Loaded
from bayesfed.problem.likelihood import Categorical, Likelihood
from bayesfed.problem.scaling import Scaling

log = getLogger("bayesfed")
FAR = 30.0  # from 1: what learning rates and priors of the usual size don't cope with
LOOKED_AT = 2000  # rows, for the typical size
ROWS_AT_ONCE = 4096


def check_ranges(data: Loaded, scaling: Scaling, kind: str, likelihood: Likelihood, dtype: str) -> None:
    """Refuse what isn't finite in the run's ``dtype`` after scaling.

    Raises:
        InputError: naming the array, its first bad row and the column.
    """
    if not bool((scaling.offset.isfinite() & scaling.factor.isfinite() & (scaling.factor != 0)).all()):
        raise InputError("data.scaling", kind, "the values spread too far for float64; rescale the data")
    sets = [("x", data.x)] + ([] if data.test_x is data.x else [("x_test", data.test_x)])
    for name, array in sets:
        _check(name, array, scaling, dtype, data)
    if not isinstance(likelihood, Categorical):
        for name, array in [("y", data.y)] + ([] if data.test_y is data.y else [("y_test", data.test_y)]):
            _check(name, array, Scaling.identity(), dtype, data)


def _check(name: str, array: np.ndarray, scaling: Scaling, dtype: str, data: Loaded) -> None:
    if array.dtype.kind != "f" or (scaling.is_identity and array.dtype.itemsize <= np.dtype(dtype).itemsize):
        return
    limit = float(np.finfo(dtype).max)
    for start in range(0, len(array), ROWS_AT_ONCE):
        part = torch.from_numpy(array[start : start + ROWS_AT_ONCE])
        scaled = scaling.convert(part, torch.float64, "cpu", owned=False).abs()
        if not bool(scaled.max() <= limit):
            row, position = divmod(int(torch.argmax((~(scaled <= limit)).flatten().to(torch.uint8))), scaled[0].numel())
            value = float(part[row].flatten()[position])
            fix = place(array, position, data.columns if name[0] == "x" else None)
            fix += f"beyond what {dtype} holds ({limit:.3g}); rescale it" + (
                ", or use dtype=float64" * (dtype == "float32")
            )
            raise InputError(f"data.{name}", f"{value:.4g} in row {start + row}", fix)


def warn_of_sizes(data: Loaded, scaling: Scaling, likelihood: Likelihood, train: np.ndarray) -> None:
    """One line in the log if inputs or targets are of another size than 1."""
    rows = train[:: max(1, len(train) // LOOKED_AT)]
    x = scaling(torch.from_numpy(data.x[rows]), torch.float64).flatten(1)
    sizes = x.square().mean(0).sqrt().numpy()
    advice = []
    position = int(sizes.argmax())
    if not 1 / FAR <= sizes[position] <= FAR and sizes[position] > 0:
        column = place(data.x, position, data.columns).removesuffix(": ") if sizes[position] > FAR else ""
        of = f" ({column})" if column else ""
        advice.append(f"inputs are of size {sizes[position]:.3g}{of}, use data.scaling=standardize or unit")
    if not isinstance(likelihood, Categorical):
        size = math.sqrt(float(np.square(data.y[rows].astype(np.float64)).mean()))
        if not 1 / FAR <= size <= FAR and size > 0:
            advice.append(
                f"targets are of size {size:.3g}, divide them by that "
                "(and give likelihood.precision in the new units, 1 / variance)"
            )
    if advice:
        log.warning("models learn well from numbers around 1: %s", "; ".join(advice))
