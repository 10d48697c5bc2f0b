"""From a configuration group to an object, with errors that name what the user wrote."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from bayesfed.errors import InputError, did_you_mean
from bayesfed.groups import called, resolve
from bayesfed.seeding import global_generators

T = TypeVar("T")


def plain(group: str, config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """The configuration ``group`` as a plain dict.

    Raises:
        InputError: if there is no such group.
    """
    if group not in config or config[group] is None:
        raise InputError(group, None, f"the configuration has no group '{group}'")
    value = config[group]
    resolved = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    if not isinstance(resolved, dict):
        raise InputError(group, resolved, "must be a mapping with _target_ and options")
    return {str(key): item for key, item in resolved.items()}


@contextmanager
def naming(group: str) -> Iterator[None]:
    """Prefix the option an ``InputError`` names with its group."""
    try:
        yield
    except InputError as error:
        if "." in error.field or error.field == group:
            raise
        raise error.within(group) from error


def locate(group: str, config: Mapping[str, Any], kind: type[T]) -> type[T]:
    """The class that ``_target_`` names.

    Raises:
        InputError: if it does not exist or is not a ``kind``.
    """
    found = resolve(config, group)
    if not issubclass(found, kind):
        fix = f"must be a subclass of {kind.__module__}.{kind.__name__}"
        raise InputError(f"{group}._target_", config["_target_"], fix)
    return found


def construct(group: str, config: Mapping[str, Any], kind: type[T], seed: int | None = None, **given: Any) -> T:
    """Build the class of ``config['_target_']`` from the other keys (``name`` left out) and ``given``.

    Args:
        seed: of what the constructor draws from global generators; None leaves these alone.

    Raises:
        InputError: naming ``group.option``, also for options the class does not have, and for whatever the constructor raises.
    """
    found = locate(group, config, kind)
    options = {key: value for key, value in config.items() if key not in ("_target_", "name")}
    parameters = inspect.signature(found).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if not set(given) <= set(parameters):
            fix = f"its constructor must take {' and '.join(given)}"
            raise InputError(f"{group}._target_", config["_target_"], fix)
        known = sorted(set(parameters) - set(given))
        for key in options:
            if key not in known:
                fix = f"no such option: {did_you_mean(key, known)}valid: {', '.join(known) or 'none'}"
                raise InputError(f"{group}.{key}", options[key], fix)
    with naming(group), nullcontext() if seed is None else global_generators(seed, group):
        return called(group, found, {**options, **given})
