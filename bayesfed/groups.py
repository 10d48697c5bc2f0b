"""A group of the configuration and the class that its ``_target_`` names: values, types, construction."""

from __future__ import annotations

import inspect
import types
from collections.abc import Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from bayesfed.errors import InputError, did_you_mean

_RESERVED = {"_target_", "name", "default_client", "handler"}


def plain_section(section: DictConfig) -> dict[str, Any]:
    """A group's keys and values as plain Python."""
    return {str(key): value for key, value in OmegaConf.to_container(section, resolve=True).items()}  # type: ignore[union-attr]


def check_types(section: DictConfig, group: str) -> None:
    """Check a group's keys and values against the constructor its ``_target_`` names.

    Raises:
        InputError: an unknown key or a value of the wrong type.
    """
    target = resolve(section, group)
    parameters = inspect.signature(target.__init__).parameters  # type: ignore[misc]
    hints = get_type_hints(target.__init__)  # type: ignore[misc]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in plain_section(section).items():
        if key in _RESERVED:
            continue
        if key not in parameters:
            if open_ended:
                continue
            names = [name for name in parameters if name != "self"]
            raise InputError(
                f"{group}.{key}", value, f"no such key; {did_you_mean(str(key), names)}valid: {', '.join(names)}"
            )
        if key in hints and not fits(value, hints[key]):
            raise InputError(f"{group}.{key}", value, f"must be {_describe(hints[key])}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain configuration value is of the annotated type (an int is a float; a bool is not a number)."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in get_args(hint))
    if origin in (list, Sequence, tuple) or getattr(origin, "__name__", "") == "Sequence":
        return isinstance(value, list) and all(fits(item, get_args(hint)[0]) for item in value)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    return True


def _describe(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", type(None): "null"}
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in get_args(hint))
    if get_args(hint):
        like = " like [a,b]" if get_args(hint)[0] is str else ""
        return f"a list of {_describe(get_args(hint)[0])}{like}"
    return names.get(hint, str(hint))


def resolve(section: DictConfig, group: str) -> type:
    """The class a group's ``_target_`` names.

    Raises:
        InputError: it can't be imported.
    """
    try:
        return get_class(section["_target_"])
    except Exception as error:
        raise InputError(f"{group}._target_", section.get("_target_"), str(error).splitlines()[0]) from error


def build(section: DictConfig, group: str, **extra: Any) -> Any:
    """Instantiate a group: its class with its keys (and ``extra``) as arguments.

    Raises:
        InputError: from the constructor, with the group's name before the field.
    """
    settings = {key: value for key, value in plain_section(section).items() if key not in _RESERVED}
    try:
        return resolve(section, group)(**settings, **extra)
    except InputError as error:
        named = error.field == group or error.field.startswith(f"{group}.")
        raise (error if named else error.within(group)) from error
