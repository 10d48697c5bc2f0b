"""Probes: what a run measures of its posterior, one file each. A file here is all that a new probe and its ``eval.*``
keys need.

A probe is a keyword-only dataclass derived from :class:`Probe`; its fields, with their defaults, are keys of the
section ``eval``. A
user's own: ``eval.probes=[my_module.MyProbe] +eval.my_key=3``.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import Any

from bayesfed.configured import build, check, plain_section, resolve
from bayesfed.errors import InputError, did_you_mean
from bayesfed.evaluation.probes.base import PredictiveProbe, Probe, Subject

__all__ = ["PredictiveProbe", "Probe", "Subject", "built_in", "make_probes"]
OTHERS = ("probes", "validation")  # keys of the section that are no probe's


def built_in() -> list[type[Probe]]:
    """The probes in the modules of this package, by module."""
    modules = [import_module(f"{__name__}.{module.name}") for module in pkgutil.iter_modules(__path__)]
    return [kind for m in modules for kind in vars(m).values() if _is_probe(kind) and kind.__module__ == m.__name__]


def make_probes(section: Mapping[str, Any]) -> list[Probe]:
    """The built-in probes and those that ``eval.probes`` names, with their keys of the section ``eval``.

    Raises:
        InputError: a key that no probe has, or a value that its probe refuses.
    """
    values = plain_section(section)
    kinds = [*built_in(), *map(_own, values.get("probes") or ())]
    keys = {kind: [f.name for f in fields(kind) if f.init] for kind in kinds}
    known = sorted({*OTHERS, *(key for own in keys.values() for key in own)})
    for key, value in values.items():
        if key not in known:
            raise InputError(f"eval.{key}", value, f"no such key; {did_you_mean(key, known)}valid: {', '.join(known)}")
    probes = []
    for kind, own in keys.items():
        target = f"{kind.__module__}.{kind.__qualname__}"
        settings = {"_target_": target, **{key: values[key] for key in own if key in values}}
        check(settings, "eval")
        probes.append(build(settings, "eval"))
    return probes


def _own(path: Any) -> type[Probe]:
    try:
        return resolve({"_target_": path}, "eval.probes", Probe)
    except InputError as error:
        raise InputError("eval.probes", path, error.fix) from error


def _is_probe(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Probe) and kind not in (Probe, PredictiveProbe)
