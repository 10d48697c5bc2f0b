"""From a configuration group to an object, with errors that name what the user wrote."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from bayesfed.errors import InputError, did_you_mean

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
    target = config.get("_target_")
    if not isinstance(target, str):
        raise InputError(f"{group}._target_", target, "must be the dotted path of a class")
    try:
        found = get_class(target)
    except Exception as error:  # importing a user's module may raise anything
        raise InputError(f"{group}._target_", target, f"cannot be imported ({str(error).splitlines()[0]})") from error
    if not issubclass(found, kind):
        raise InputError(f"{group}._target_", target, f"must be a subclass of {kind.__module__}.{kind.__name__}")
    return found


def construct(group: str, config: Mapping[str, Any], kind: type[T], **given: Any) -> T:
    """Build the class of ``config['_target_']`` from the other keys (``name`` left out) and ``given``.

    Raises:
        InputError: naming ``group.option``, also for options the class does not have.
    """
    found = locate(group, config, kind)
    options = {key: value for key, value in config.items() if key not in ("_target_", "name")}
    parameters = inspect.signature(found).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = sorted(set(parameters) - set(given))
        for key in options:
            if key not in known:
                fix = f"no such option: {did_you_mean(key, known)}valid: {', '.join(known) or 'none'}"
                raise InputError(f"{group}.{key}", options[key], fix)
    with naming(group):
        return found(**options, **given)
