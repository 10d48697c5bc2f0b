"""Errors a user can act on: each names the field, the value and the fix."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from bayesfed.foreign import plain_text


class InputError(ValueError):
    """A setting or input file that cannot be used.

    The command line turns it into exit code 2 and one line; it is raised before any work starts.

    Args:
        field: what the user wrote, e.g. ``rho`` or ``data.path``.
        value: the value given.
        fix: what would be accepted, as a phrase.
    """

    def __init__(self, field: str, value: object, fix: str):
        self.field, self.value, self.fix = field, value, fix
        super().__init__(f"{field}={value}: {fix}")

    def within(self, group: str) -> InputError:
        """The same error for a field of the configuration group ``group``."""
        return type(self)(f"{group}.{self.field}", self.value, self.fix)

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        return type(self), (self.field, self.value, self.fix)


class RunFailed(RuntimeError):
    """A run that cannot go on; its last checkpoint can be resumed (exit code 1)."""


class RunDiverged(RunFailed):
    """A run that whose numbers ran away ("diverged: ..."): resumed, it takes the same steps again."""


class BadMessage(ValueError):
    """A message whose content is not what the protocol says; the text says what was wrong, in one printable line.

    It may quote the other side (names, values), which is why it is cut and escaped here, whoever shows or keeps it.
    """

    def __init__(self, text: str):
        super().__init__(plain_text(text))


class Diverged(BadMessage):
    """Numbers that ran away: they are not finite, or beyond what the server takes."""


def reason_of(error: BaseException) -> str:
    """What ended a run, as one printable line."""
    known = isinstance(error, InputError | RunFailed)
    return plain_text(error if known else f"{type(error).__name__}: {error}")


def number(
    field: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    finite: bool = True,
    optional: bool = False,
) -> Any:
    """``value`` as a Python number, if it is one in the given range; NumPy's numbers and arrays or tensors of no
    dimension are.

    Raises:
        InputError: naming ``field``, the value and the range.
    """
    bounds = []
    if above is not None:
        bounds.append(f"> {above:g}")
    if at_least is not None:
        bounds.append(f">= {at_least:g}")
    if at_most is not None:
        bounds.append(f"<= {at_most:g}")
    if below is not None:
        bounds.append(f"< {below:g}")
    fix = "must be a" + (" finite" if finite else "") + " number"
    fix += f" {' and '.join(bounds)}" if bounds else ""
    fix += " (or null for the default)" if optional else ""
    if value is None and optional:
        return None
    result = python_number(value)
    if isinstance(result, bool) or not isinstance(result, numbers.Real) or result != result:
        raise InputError(field, value, fix)
    result = result if isinstance(result, int) else float(result)
    outside = (
        (finite and abs(result) == math.inf)
        or (above is not None and not result > above)
        or (at_least is not None and not result >= at_least)
        or (at_most is not None and not result <= at_most)
        or (below is not None and not result < below)
    )
    if outside:
        raise InputError(field, value, fix)
    return result


def integer(field: str, value: Any, *, at_least: int, optional: bool = False) -> Any:
    """``value`` as a Python int, if it is a whole number of at least ``at_least``; NumPy's and 0-d tensors are."""
    if value is None and optional:
        return None
    result = python_number(value)
    if isinstance(result, bool) or not isinstance(result, numbers.Integral) or result < at_least:
        fix = f"must be a whole number >= {at_least}"
        raise InputError(field, value, fix + (" (or null)" if optional else ""))
    return result


def python_number(value: Any) -> Any:
    """NumPy's and torch's numbers (arrays and tensors of no dimension) as Python's."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def choice(field: str, value: object, valid: Iterable[str]) -> None:
    """Check that ``value`` is one of ``valid``; the error proposes the nearest one."""
    names = sorted(valid)
    if value not in names:
        raise InputError(field, value, f"{did_you_mean(str(value), names)}valid: {', '.join(names)}")


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` for the nearest of ``names``, or nothing."""
    near = get_close_matches(word, list(names), n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'? " if near else ""


def settings_of(section: Mapping[str, Any] | None, kind: type, name: str) -> dict[str, Any]:
    """The keys of configuration section ``name``, as arguments of the dataclass ``kind``; none if there is no such
    section.

    Raises:
        InputError: a key that ``kind`` doesn't have.
    """
    values = {str(key): value for key, value in (section or {}).items()}
    known = [f.name for f in fields(kind)]
    for key, value in values.items():
        if key not in known:
            raise InputError(
                f"{name}.{key}", value, f"no such key; {did_you_mean(key, known)}valid: {', '.join(known)}"
            )
    return values
