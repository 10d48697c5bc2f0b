"""Numbers that strategies and solvers report for the log."""

from __future__ import annotations

import numbers
from collections.abc import Mapping

from bayesfed.errors import python_number
from bayesfed.foreign import plain_text


def plain_numbers(found: object, source: str) -> dict[str, float]:
    """The metrics that ``source`` returned, as Python's numbers: NumPy's, and arrays or tensors of no dimension, are
    numbers too.

    Raises:
        ValueError: it is no dict, a name is no string or ``round``, or a value is no number; names the metric.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{source} must return a dict of numbers, not {type(found).__name__}")
    plain: dict[str, float] = {}
    for name, value in found.items():
        if not isinstance(name, str) or name == "round":
            raise ValueError(f"{source}: {plain_text(repr(name), 60)} can't be the name of a metric")
        value = python_number(value)
        if not isinstance(value, numbers.Real):
            raise ValueError(
                f"{source}: metric '{plain_text(name, 60)}' must be a number, not of type {type(value).__name__}"
            )
        plain[name] = int(value) if isinstance(value, numbers.Integral) else float(value)
    return plain
