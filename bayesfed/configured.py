"""From a group of the configuration to an object: ``_target_`` names its class, the other keys are the arguments."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence, Set
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from bayesfed.errors import InputError, RunFailed, did_you_mean
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

Section = Mapping[str, Any]  # a dict, or OmegaConf's DictConfig


def plain_section(section: Section) -> dict[str, Any]:
    """A group's keys and values as plain Python."""
    values: Any = section
    if not isinstance(section, dict):
        from omegaconf import OmegaConf  # a learner in somebody's own loop needs none

        values = OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section
    return {str(key): value for key, value in values.items()}  # type: ignore[union-attr]


def group_of(cfg: Section, group: str) -> dict[str, Any]:
    """The keys and values of ``group`` in a configuration.

    Raises:
        InputError: there is no such group.
    """
    section = cfg.get(group)
    if section is None:
        raise InputError(group, None, f"the configuration has no group '{group}'")
    if not isinstance(section, Mapping):
        raise InputError(group, section, "must be a mapping with _target_ and options")
    return plain_section(section)


# -- the class ---------------------------------------------------------------------------------------------------------


def resolve(section: Section, group: str, kind: type = object) -> type:
    """The class a group's ``_target_`` names.

    Raises:
        InputError: it can't be imported (the reason is in the line), or is no ``kind``.
    """
    path = section.get("_target_")
    if not isinstance(path, str):
        raise InputError(f"{group}._target_", path, "must be the dotted path of a class, as my_module.MyClass")
    try:
        target = _imported(path)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise InputError(f"{group}._target_", path, f"cannot be imported ({reason(error)})") from error
    if not isinstance(target, type):
        raise InputError(f"{group}._target_", path, f"is a {type(target).__name__}, must be a class")
    if not issubclass(target, kind):
        raise InputError(f"{group}._target_", path, f"must be a subclass of {kind.__module__}.{kind.__name__}")
    return target


def _imported(path: str) -> Any:
    parts = path.split(".")
    for count in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:count])
        try:
            target: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if count > 1 and error.name == module:  # the name of a class, perhaps
                continue
            raise
        for part in parts[count:]:
            if not hasattr(target, part):
                where = getattr(target, "__file__", None)
                raise ImportError(f"no {part} in {getattr(target, '__name__', module)}{f' ({where})' if where else ''}")
            target = getattr(target, part)
        return target
    raise ImportError("no module before its name")


def look_at(thing: object, group: str, target: str) -> None:
    """Whether an object, or a class, has what is used of one of its group.

    Raises:
        InputError: naming what it lacks.
    """
    needed, base = _NEEDED.get(group, ("", ""))
    if missing := [name for name in needed.split() if not hasattr(thing, name)]:
        raise InputError(f"{group}._target_", target, f"has no {', '.join(missing)}; derive it from {base}")


# -- its arguments -----------------------------------------------------------------------------------------------------


def check(section: Section, group: str) -> None:
    """Check a group's keys and values against the constructor its ``_target_`` names.

    Annotations that can't be evaluated (names known to type checkers only) or aren't of plain values check nothing.

    Raises:
        InputError: an unknown or missing key, or a value of the wrong type.
    """
    target = resolve(section, group)
    values = _arguments(section)
    parameters, hints = _checked_keys(target, values, group, _GIVEN.get(group, ()))
    for key, value in values.items():
        if key not in parameters or value == MISSING or (value is None and parameters[key].default is None):
            continue
        if key in hints and not fits(value, hints[key]):
            raise InputError(f"{group}.{key}", value, f"must be {describe(hints[key])}")
    for key, p in parameters.items():
        needed = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if values.get(key, MISSING if needed else None) == MISSING:
            fix = f"missing: {section['_target_']} needs it, set it in the YAML file of {group}={section.get('name')}"
            raise InputError(f"{group}.{key}", None, fix)


def _arguments(section: Section) -> dict[str, Any]:
    return {key: value for key, value in plain_section(section).items() if key not in _RESERVED}


def _checked_keys(
    target: type, values: Mapping[str, Any], group: str, given: Iterable[str]
) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """The parameters that a configuration may set, and their types; raises InputError if one of ``values`` is none of
    them."""
    try:
        parameters = dict(inspect.signature(target.__init__).parameters)  # type: ignore[misc]
    except (TypeError, ValueError):  # some classes that are written in C don't say
        return {}, {}
    parameters.pop(next(iter(parameters), ""), None)  # self
    hints = _hints(target.__init__, *target.__mro__[::-1] if is_dataclass(target) else ())  # type: ignore[misc]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if missing := [name for name in given if name not in parameters and not open_ended]:
        path = f"{target.__module__}.{target.__qualname__}"
        raise InputError(f"{group}._target_", path, f"its constructor must take {' and '.join(given or missing)}")
    parameters = {name: p for name, p in parameters.items() if name not in given}
    if group == "client" and getattr(target, "stepwise", True):  # keys of the run's, see `build`
        of_run = inspect.signature(Schedule.of_run).parameters
        parameters |= {key: of_run[key] for key in Schedule.KEYS if key not in parameters}
        hints = _hints(Schedule.of_run) | hints
    for key in values:
        if key not in parameters and not open_ended:
            valid = ", ".join(parameters) or "none"
            fix = f"no such key; {did_you_mean(key, parameters)}valid: {valid}"
            raise InputError(f"{group}.{key}", values[key], fix)
    return parameters, hints


def _hints(function: Any, *bases: type) -> dict[str, Any]:
    """The annotations of ``function`` that can be evaluated, and those of ``bases``: fields that a dataclass
    inherits."""
    function = inspect.unwrap(function)
    scopes = [(base, getattr(sys.modules.get(base.__module__), "__dict__", {})) for base in bases]
    scopes.append((function, getattr(function, "__globals__", {})))
    hints: dict[str, Any] = {}
    for holder, names in scopes:
        for name, annotation in getattr(holder, "__annotations__", {}).items():
            alone = type("_", (), {"__annotations__": {name: annotation}})
            with suppress(Exception):
                hints |= get_type_hints(alone, globalns=names)
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


def describe(hint: Any) -> str:
    """An annotated type in words."""
    names = {float: "a number", int: "a whole number", str: "a string", bool: "true or false", type(None): "null"}
    origin, options = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is Literal:
        return " or ".join(map(str, options))
    if origin in _MAPPINGS:
        return "a mapping"
    if origin in _LISTS:
        if origin is tuple and options and options[-1] is not ...:
            return f"a list [{', '.join(map(describe, options))}]"
        like = " like [a,b]" if options[:1] == (str,) else ""
        return f"a list of {describe(options[0])}{like}" if options else "a list"
    return names.get(hint, str(hint))


# -- the object --------------------------------------------------------------------------------------------------------


def build(section: Section, group: str, seed: int | None = 0, kind: type = object, **given: Any) -> Any:
    """Instantiate a group: its class with its keys as arguments.

    Args:
        seed: of what the constructor draws from global generators, so that all processes that build it get the same;
            None leaves these alone.
        kind: what the class must be derived from.
        given: arguments that don't come from the configuration.

    Raises:
        InputError: naming ``group.key``: an unknown key, or what the constructor raises.
    """
    target, arguments = resolve(section, group, kind), _arguments(section)
    _checked_keys(target, arguments, group, given)
    if group == "client":  # the schedule over rounds is the run's; a class that takes it itself gets it, too
        takes = inspect.signature(target.__init__).parameters  # type: ignore[misc]
        arguments = {key: value for key, value in arguments.items() if key not in Schedule.KEYS or key in takes}
    seeded = nullcontext() if seed is None else global_generators(seed, group)
    with naming(group), seeded, own_code(group, f"{target.__module__}.{target.__qualname__}", "its constructor"):
        thing = target(**arguments, **given)
    look_at(thing, group, section["_target_"])
    return thing


@contextmanager
def naming(group: str) -> Iterator[None]:
    """Put the name of the group before the field of an ``InputError``."""
    try:
        yield
    except InputError as error:
        if "." in error.field or error.field == group:
            raise
        raise error.within(group) from error


@contextmanager
def own_code(group: str, target: str, what: str) -> Iterator[None]:
    """What a class of the group raises in the block becomes one line."""
    try:
        yield
    except (InputError, RunFailed):
        raise
    except Exception as error:
        raise InputError(f"{group}._target_", target, f"{what} fails: {reason(error)}") from error


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
