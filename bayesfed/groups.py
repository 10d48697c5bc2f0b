"""A group of the configuration and the class that its ``_target_`` names: values, types, construction."""

from __future__ import annotations

import importlib
import inspect
import traceback
import types
from collections.abc import Collection, Iterable, Mapping, MutableMapping, MutableSequence, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from bayesfed.errors import InputError, did_you_mean
from bayesfed.foreign import plain_text
from bayesfed.schedule import Schedule
from bayesfed.seeding import global_generators

GROUPS = ("data", "partition", "model", "likelihood", "strategy", "client", "engine", "logger")
MISSING = "???"  # OmegaConf's value of a key that has none
_RESERVED = {"_target_", "name", "default_client"}
_GIVEN = {"model": ("input_shape", "num_outputs")}  # arguments that don't come from the configuration
_NEEDED = {  # what is used of a class, and what has it all
    "strategy": ("family client asks setup start prepare combine", "strategies.FederatedStrategy"),
    "client": ("families lacks batches stepwise check require solve solve_many", "bayesfed.federation.local.Solver"),
    "engine": ("run", "bayesfed.engine.inline.InlineEngine"),
    "logger": ("begin log end", "bayesfed.runs.loggers.NoLogger"),
}
_LISTS = (list, tuple, set, frozenset, Sequence, MutableSequence, Collection, Iterable, Set)
_MAPPINGS = (dict, Mapping, MutableMapping)


def plain_section(section: DictConfig) -> dict[str, Any]:
    """A group's keys and values as plain Python."""
    return {str(key): value for key, value in OmegaConf.to_container(section, resolve=True).items()}  # type: ignore[union-attr]


def check_types(section: DictConfig, group: str) -> None:
    """Check a group's keys and values against the constructor its ``_target_`` names.

    Annotations that can't be evaluated (names known to type checkers only) or aren't of plain values check nothing.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type.
    """
    target = resolve(section, group)
    try:
        parameters = dict(inspect.signature(target.__init__).parameters)  # type: ignore[misc]
    except (TypeError, ValueError):  # some classes that are written in C don't say
        return
    parameters.pop(next(iter(parameters), ""), None)  # self
    hints = _hints(target.__init__)  # type: ignore[misc]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    values = {key: value for key, value in plain_section(section).items() if key not in _RESERVED}
    if group == "client" and getattr(target, "stepwise", True):
        of_run = inspect.signature(Schedule.of_run).parameters
        parameters |= {key: p for key, p in of_run.items() if key in Schedule.KEYS and key not in parameters}
        hints = _hints(Schedule.of_run) | hints
    for key, value in values.items():
        if key not in parameters:
            if open_ended:
                continue
            names = [name for name in parameters if name not in _GIVEN.get(group, ())]
            raise InputError(
                f"{group}.{key}", value, f"no such key; {did_you_mean(str(key), names)}valid: {', '.join(names)}"
            )
        if value == MISSING or (value is None and parameters[key].default is None):
            continue
        if key in hints and not fits(value, hints[key]):
            raise InputError(f"{group}.{key}", value, f"must be {_describe(hints[key])}")
    for key, p in parameters.items():
        needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if key not in _GIVEN.get(group, ()) and values.get(key, MISSING if needed else None) == MISSING:
            fix = f"missing: {section['_target_']} needs it, set it in the YAML file of {group}={section.get('name')}"
            raise InputError(f"{group}.{key}", None, fix)


def _hints(function: Any) -> dict[str, Any]:
    """The annotations of ``function`` that can be evaluated."""
    function = inspect.unwrap(function)
    hints: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        holder = type("_", (), {"__annotations__": {name: annotation}})
        with suppress(Exception):
            hints |= get_type_hints(holder, globalns=getattr(function, "__globals__", {}))
    return hints


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain configuration value is of the annotated type (an int is a float; a bool is not a number)."""
    origin, options = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (str, bool):
        return isinstance(value, hint)
    if origin in _LISTS:
        if origin is tuple and options and options[-1] is not ...:
            return isinstance(value, list) and len(value) == len(options) and all(map(fits, value, options))
        return isinstance(value, list) and all(fits(item, option) for option in options[:1] for item in value)
    if origin in _MAPPINGS:
        return isinstance(value, dict)
    return True


def _describe(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", type(None): "null"}
    origin, options = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in options)
    if origin is Literal:
        return " or ".join(map(str, options))
    if origin in _MAPPINGS:
        return "a mapping"
    if origin in _LISTS:
        if origin is tuple and options and options[-1] is not ...:
            return f"a list [{', '.join(map(_describe, options))}]"
        like = " like [a,b]" if options[:1] == (str,) else ""
        return f"a list of {_describe(options[0])}{like}" if options else "a list"
    return names.get(hint, str(hint))


def resolve(section: Mapping[str, Any] | DictConfig, group: str) -> type:
    """The class a group's ``_target_`` names.

    Raises:
        InputError: it can't be imported; the reason is in the line.
    """
    target = section.get("_target_")
    if not isinstance(target, str):
        raise InputError(f"{group}._target_", target, "must be the dotted path of a class, as my_module.MyClass")
    try:
        found = _imported(target)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(f"{group}._target_", target, f"cannot be imported ({reason(error)})") from error
    if not isinstance(found, type):
        raise InputError(f"{group}._target_", target, f"is a {type(found).__name__}, must be a class")
    return found


def _imported(target: str) -> Any:
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if count > 1 and error.name == module:  # the name of a class, perhaps
                continue
            raise
        for part in parts[count:]:
            if not hasattr(found, part):
                where = getattr(found, "__file__", None)
                raise ImportError(f"no {part} in {getattr(found, '__name__', module)}{f' ({where})' if where else ''}")
            found = getattr(found, part)
        return found
    raise ImportError("no module before its name")


def called(group: str, target: type, arguments: Mapping[str, Any]) -> Any:
    """``target(**arguments)``.

    Raises:
        InputError: its own, or one that tells what else the constructor raised.
    """
    try:
        return target(**arguments)
    except InputError:
        raise
    except Exception as error:  # a stranger's constructor may raise anything
        name = f"{target.__module__}.{target.__qualname__}"
        raise InputError(f"{group}._target_", name, f"its constructor fails: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What a stranger's code raised, and the last line of it that was at work, in one line."""
    text = " ".join(str(error).split())
    told = plain_text(f"{type(error).__name__}{': ' if text else ''}{text}")
    if isinstance(error, SyntaxError | ImportError):  # these say where
        return told
    ours = str(Path(__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    frames = [f for f in frames if not f.filename.startswith((ours, "<frozen"))]
    return told + "".join(f" ({Path(f.filename).name}, line {f.lineno})" for f in frames[-1:])


def build(section: DictConfig, group: str, seed: int = 0) -> Any:
    """Instantiate a group: its class with its keys as arguments.

    Args:
        seed: of what the constructor draws from global generators, so that all processes that build it get the same.

    Raises:
        InputError: from the constructor, with the group's name before the field.
    """
    settings = {key: value for key, value in plain_section(section).items() if key not in _RESERVED}
    target = resolve(section, group)
    if group == "client":  # the schedule over rounds is the run's; a class that takes it itself gets it, too
        takes = inspect.signature(target).parameters
        settings = {key: value for key, value in settings.items() if key not in Schedule.KEYS or key in takes}
    try:
        with global_generators(seed, group):
            made = called(group, target, settings)
    except InputError as error:
        named = error.field == group or error.field.startswith(f"{group}.")
        raise (error if named else error.within(group)) from error
    look_at(made, group, section["_target_"])
    return made


def look_at(made: object, group: str, target: str) -> None:
    """Whether an object, or a class, has what is used of one of its group.

    Raises:
        InputError: naming what it lacks.
    """
    needed, base = _NEEDED.get(group, ("", ""))
    if missing := [name for name in needed.split() if not hasattr(made, name)]:
        raise InputError(f"{group}._target_", target, f"has no {', '.join(missing)}; derive it from {base}")
