"""From comma lists to runs: every configuration composed and checked before the first one starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from bayesfed.app import plain
from bayesfed.compare.options import Options
from bayesfed.config import compose_config, validate
from bayesfed.configured import build
from bayesfed.errors import InputError, did_you_mean, integer

# a method may not choose its own budget: swept, these make settings, in which all methods are equal
BUDGET_KEYS = ("rounds", "strategy.fraction", "client.epochs")
_PRESENTATION = ("hydra", "display", "figures", "profile", "logger", "resume", "tuned")


@dataclass(frozen=True)
class Run:
    """One run of the grid.

    Attributes:
        setting: what the method is tried on: the experiment and the swept keys that are not the method's.
        method: strategy, told apart by family, client and swept values where several are compared.
        seed: of the run.
        overrides: that compose it; the seed is among them.
        cfg: composed and validated.
    """

    setting: str
    method: str
    seed: int
    overrides: tuple[str, ...]
    cfg: DictConfig = field(repr=False)

    @property
    def digest(self) -> str:
        """Eight hex digits of everything that decides the result."""
        return digest(plain(self.cfg))

    @property
    def name(self) -> str:
        """Of its directory: readable, and another one for another configuration."""
        words = re.sub(r"[^A-Za-z0-9_.=-]+", "-", f"{self.setting}-{self.method}")[:120]
        return f"{words}-seed{self.seed}-{self.digest}"


def digest(config: dict[str, Any]) -> str:
    """Eight hex digits of everything in a (plain) configuration that decides the result."""
    decisive = {key: value for key, value in config.items() if key not in _PRESENTATION}
    return hashlib.blake2b(json.dumps(decisive, sort_keys=True).encode(), digest_size=4).hexdigest()


@dataclass
class _Draft:
    """A combination of swept values that composed."""

    cfg: DictConfig
    overrides: list[str]
    swept: dict[str, str]


def grid(overrides: Sequence[Override], extra: Sequence[str] = ()) -> list[Run]:
    """All runs of the comma lists in ``overrides``, in their order, seeds last; each is composed and validated.

    A ``strategy.*`` or ``client.*`` key that one of several methods does not have is left out for that method.

    Args:
        overrides: parsed, comma lists included.
        extra: overrides without lists, for all runs.

    Raises:
        InputError: the first combination that is not usable, or a key that no method has.
    """
    axes = [(o.get_key_element(), _values(o), o.is_sweep_override()) for o in overrides]
    seeds = [1]
    for key, values, _ in axes:
        if key == "seed":
            seeds = [_seed(value) for value in values]
    others = [axis for axis in axes if axis[0] != "seed"]
    several = any(len(values) > 1 and _is_method(key) for key, values, _ in others)
    missing: dict[str, InputError] = {}
    met: set[str] = set()
    drafts: dict[str, _Draft] = {}
    for combination in product(*(values for _, values, _ in others)):
        pairs = {key: value for (key, _, _), value in zip(others, combination, strict=True)}
        cfg, valid = _compose(pairs, [f"seed={seeds[0]}", *extra], several, missing)
        met |= valid.keys()
        swept = {key: value for (key, _, is_swept) in others if is_swept and (value := valid.get(key)) is not None}
        lines = [f"{key}={value}" for key, value in valid.items()]
        draft = _Draft(cfg, [*lines, *extra], swept)
        drafts.setdefault(json.dumps([_experiment(cfg), swept, plain(cfg)], sort_keys=True), draft)
    for key, error in missing.items():
        if key not in met:
            raise error
    return [
        Run(setting, method, seed, (*draft.overrides, f"seed={seed}"), _with_seed(draft.cfg, seed))
        for (setting, method), draft in _labelled(list(drafts.values())).items()
        for seed in dict.fromkeys(seeds)
    ]


def check_budget(runs: Sequence[Run]) -> list[str]:
    """What a reader should know about equal budgets where the methods' settings allow a comparison at all.

    Raises:
        InputError: the methods of a setting differ in rounds, local epochs or the share of clients sampled.
    """
    notes = []
    for setting in dict.fromkeys(run.setting for run in runs):
        methods = {run.method: run.cfg for run in runs if run.setting == setting}
        for key in BUDGET_KEYS:
            group, _, leaf = key.rpartition(".")
            values = {name: _value(cfg, group, leaf) for name, cfg in methods.items()}
            if len(set(values.values())) > 1:
                listed = ", ".join(f"{name} {'-' if value is None else value}" for name, value in values.items())
                raise InputError(
                    key,
                    listed,
                    f"methods would not have the same budget in {setting}; set {key} for all, "
                    "or say budget=none to compare them anyway",
                )
        samples = {name: cfg.client.get("mc_samples") or 1 for name, cfg in methods.items()}
        if len(set(samples.values())) > 1:
            listed = ", ".join(f"{name} {count}" for name, count in samples.items())
            notes.append(f"{setting}: equal epochs, but gradients a step differ ({listed}): see gradient_evaluations")
    return notes


def _value(cfg: DictConfig, group: str, leaf: str) -> object:
    """The key's value; where a class of somebody's own leaves it out of its YAML, what its constructor made of it."""
    if not group:
        return cfg.get(leaf)
    section = cfg[group]
    return section[leaf] if leaf in section else getattr(build(section, group, cfg.seed), leaf, None)


def check_fit(runs: Sequence[Run]) -> None:
    """Check that data load and that model, strategy and client fit together, once for each method and setting.

    Raises:
        InputError: they don't.
    """
    from bayesfed.runs.session import Session

    seen: set[tuple[str, str]] = set()
    for run in runs:
        if (run.setting, run.method) not in seen:
            seen.add((run.setting, run.method))
            Session(run.cfg)


def baseline_of(options: Options, runs: Sequence[Run]) -> str:
    """The method the others are tested against.

    Raises:
        InputError: it is not one of the methods.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    if options.baseline is None:
        return methods[0]
    if options.baseline not in methods:
        fix = f"{did_you_mean(options.baseline, methods)}must be one of the methods: {', '.join(methods)}"
        raise InputError("baseline", options.baseline, fix)
    return options.baseline


# -- details -----------------------------------------------------------------------------------------------------------


def _values(override: Override) -> list[str]:
    """The values of an override as Hydra writes them."""
    key = override.key_or_group
    if override.is_delete():
        raise InputError(key, "~", "compare can't delete keys")
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    if not override.is_discrete_sweep():
        raise InputError(
            key, str(override.input_line).partition("=")[2], "compare takes lists of values; search with tune=N"
        )
    return list(dict.fromkeys(str(value) for value in override.sweep_string_iterator()))


def _seed(value: str) -> int:
    try:
        seed = int(value)
    except ValueError:
        raise InputError("seed", value, "must be a whole number >= 0") from None
    integer("seed", seed, at_least=0)
    return seed


def _bare(key: str) -> str:
    return key.lstrip("+")


def _is_method(key: str) -> bool:
    key = _bare(key)
    return key.partition(".")[0] in ("strategy", "client") and key not in BUDGET_KEYS


def _compose(
    pairs: dict[str, str], extra: list[str], lenient: bool, missing: dict[str, InputError]
) -> tuple[DictConfig, dict[str, str]]:
    """The configuration, and the pairs that hold for it (see :func:`grid`)."""
    valid = dict(pairs)
    while True:
        try:
            return compose_config([*(f"{key}={value}" for key, value in valid.items()), *extra]), valid
        except InputError as error:
            optional = lenient and error.field in valid and "." in error.field and _is_method(error.field)
            if not (optional and error.fix.startswith("no such key")):
                raise
            missing[error.field] = error  # the last: the first method may have few keys to propose
            del valid[error.field]


def _experiment(cfg: DictConfig) -> str:
    return str(cfg.hydra.runtime.choices.experiment)


def _labelled(drafts: list[_Draft]) -> dict[tuple[str, str], _Draft]:
    """The drafts by (setting, method)."""
    families: dict[str, set[str]] = {}
    clients: dict[tuple[str, str], set[str]] = {}
    for draft in drafts:
        name, family = draft.cfg.strategy.name, build(draft.cfg.strategy, "strategy").family
        families.setdefault(name, set()).add(family)
        clients.setdefault((name, family), set()).add(draft.cfg.client.name)
    named: dict[tuple[str, str], _Draft] = {}
    for draft in drafts:
        name, family = draft.cfg.strategy.name, build(draft.cfg.strategy, "strategy").family
        method = name + (f"/{family}" if len(families[name]) > 1 else "")
        method += f"/{draft.cfg.client.name}" if len(clients[name, family]) > 1 else ""
        setting = _experiment(draft.cfg)
        for key, value in draft.swept.items():
            if _bare(key) in ("strategy", "client", "strategy.family", "experiment"):
                continue
            if _is_method(key):
                method += f" {key.rpartition('.')[2]}={value}"
            else:
                setting += f" {_bare(key)}={value}"
        named[setting, method] = draft
    return named


def _with_seed(cfg: DictConfig, seed: int) -> DictConfig:
    cfg = cfg.copy()
    cfg.seed = seed
    validate(cfg)
    return cfg
