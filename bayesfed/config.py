"""From command-line overrides to a checked configuration."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from bayesfed.errors import InputError, choice, did_you_mean, integer, number
from bayesfed.groups import build, check_types, plain_section, resolve
from bayesfed.problem.shift import Shift
from bayesfed.system import System
from bayesfed.wire import FORMATS

GROUPS = ("data", "partition", "model", "likelihood", "strategy", "client", "engine", "logger")
NAMING = ("data", "partition", "model", "likelihood", "strategy", "client")  # groups that make a run another one
RESUMABLE = ("rounds", "engine", "eval", "logger", "device", "resume", "display", "figures", "profile", "hydra")
BUILT_IN = ("noise", "inverted")  # out-of-distribution inputs that need no other data


@dataclass
class EvalSchema:
    every: int = 1
    bayes_every: int = 1
    samples: int = 32
    validation: float = 0.0
    batch_size: int | None = None
    at_once: int | None = None
    clients_every: int | None = 0
    personalized: bool = False
    ood: str | None = None
    target_accuracy: list[float] = field(default_factory=list)


@dataclass
class CheckpointSchema:
    every: int = 1


@dataclass
class LimitsSchema:
    mean_norm: float = 1e30
    precision: float = 1e30
    relative_precision: float = 20.0
    relative_examples: float = 100.0
    reply_bytes: int | None = None


@dataclass
class RunSchema:
    """Types of the top-level keys; the groups are checked against the constructors they name."""

    seed: int = 1
    rounds: int = 20
    dtype: str = "float32"
    wire: str = "full"
    device: str = "auto"
    resume: str | None = None
    display: bool = True
    figures: bool = True
    profile: bool = False
    eval: EvalSchema = field(default_factory=EvalSchema)
    shift: dict[str, Any] = field(default_factory=dict)  # checked by the classes that take them
    system: dict[str, Any] = field(default_factory=dict)
    checkpoint: CheckpointSchema = field(default_factory=CheckpointSchema)
    limits: LimitsSchema = field(default_factory=LimitsSchema)


def conf_dir() -> Path:
    """The folder ``conf``: beside the package in a checkout or app bundle, inside it in a wheel."""
    for base in (Path(str(resources.files("bayesfed"))), Path(__file__).resolve().parent.parent):
        if (base / "conf" / "config.yaml").is_file():
            return base / "conf"
    raise FileNotFoundError("bayesfed's conf folder is missing from the installation")


def search_path() -> list[str]:
    """A ``conf`` folder in the working directory adds to (and goes before) the built-in groups."""
    local = Path.cwd() / "conf"
    return [f"file://{local}"] if local.is_dir() and local.resolve() != conf_dir().resolve() else []


def import_from_here() -> None:
    """Let a strategy or solver of the user's be imported from the working directory, after everything installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def compose_config(overrides: Sequence[str], run_dir: str | None = None) -> DictConfig:
    """Compose the configuration for these overrides, validated; ``cfg.hydra`` is included, with ``hydra.run.dir`` resolved.

    Composes twice: once to see strategy and experiment, then again with the client that fits and the experiment's tuned
    values, before the user's own overrides.

    Args:
        overrides: Hydra overrides.
        run_dir: the run directory, where Hydra chose it already (a job of a sweep).

    Raises:
        InputError: an unknown key, group or value.
    """
    import_from_here()
    given, overrides = list(overrides), with_tuned(overrides)
    cfg = _compose(overrides)
    with read_write(cfg.hydra):
        cfg.hydra.overrides.task = given  # as in Hydra's own main function
    run_dir = run_dir or _resolved_run_dir(cfg)
    with read_write(cfg.hydra):
        cfg.hydra.run.dir = run_dir
    if cfg.client.get("schedule_rounds", 0) is None:
        OmegaConf.update(cfg, "client.schedule_rounds", cfg.rounds)
    validate(cfg)
    if _learning_asked(overrides) and not getattr(resolve(cfg.client, "client"), "learns_precision", True):
        raise InputError(
            "strategy.covariance", "learned", f"client={cfg.client.name} keeps the server's precision; use a client that "
            "learns it (ivon for isotropic and diagonal, von for full), or covariance=fixed",
        )  # fmt: skip
    return cfg


def _resolved_run_dir(cfg: DictConfig) -> str:
    """``hydra.run.dir`` with ``${hydra:...}`` resolved, which Hydra leaves to its own main function."""
    hydra = HydraConfig.instance()
    before = hydra.cfg
    hydra.set_config(cfg)
    try:
        return str(cfg.hydra.run.dir)
    finally:
        hydra.cfg = before


def _run_name(experiment: str, overrides: Sequence[str]) -> str:
    """What a run is called: its experiment, and what was chosen by name on top of it (``digits_het10+cifar10+cnn_zenke``)."""
    chosen = {o.key_or_group: o.value() for o in parse(overrides) if o.key_or_group in NAMING}
    return "+".join([experiment, *(str(name) for name in chosen.values())])


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)  # for conf/config.yaml


def with_tuned(overrides: Sequence[str]) -> list[str]:
    """``overrides`` preceded by the fitting client and the experiment's tuned values for strategy and client."""
    overrides = list(overrides)
    first = _compose(overrides)
    tuned = OmegaConf.to_container(first.tuned)
    assert isinstance(tuned, dict)
    strategy = first.strategy.name
    settings = dict(tuned.get(strategy) or {})
    preferred = settings.pop("client", None)
    extra = _as_overrides("strategy", settings)
    if extra:  # the tuned values may choose the family
        first = _compose([*extra, *overrides])
    family = tuned.get(f"{strategy}/{first.strategy.get('family')}") or {}
    extra += _as_overrides("strategy", family)
    client = first.client.name
    if not any(o.key_or_group == "client" for o in parse(overrides)):
        client = preferred or _default_client(first, _learning_asked(extra + overrides))
        extra.insert(0, f"client={client}")
    for key in (client, f"{strategy}/{client}"):
        extra += _as_overrides("client", tuned.get(key) or {})
    for group in ("data", "partition", "model", "likelihood"):
        extra += _as_overrides(group, tuned.get(f"{group}/{first[group].name}") or {})
    return extra + overrides


def parse(overrides: Sequence[str]) -> list[Override]:
    """Hydra's parse of ``overrides``.

    Raises:
        InputError: bad syntax.
    """
    try:
        return OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise InputError("override", " ".join(overrides), str(error).splitlines()[0]) from error


def _default_client(cfg: DictConfig, learning_asked: bool) -> str:
    default = cfg.strategy.get("default_client", "adam")
    if isinstance(default, str):
        return default
    if cfg.strategy.get("covariance") == "fixed" and "fixed" in default:
        return default["fixed"]
    family = cfg.strategy.get("family")
    if learning_asked and f"{family}/learned" in default:
        return default[f"{family}/learned"]
    return default.get(family, "adam")


def _learning_asked(overrides: Sequence[str]) -> bool:
    """Whether ``strategy.covariance=learned`` is among the overrides (not just the default), so that it has to hold."""
    asked = [o for o in parse(overrides) if o.key_or_group == "strategy.covariance"]
    return bool(asked) and asked[-1].value() == "learned"


def _as_overrides(group: str, settings: dict[str, Any]) -> list[str]:
    def text(value: Any) -> str:
        if value is None:
            return "null"
        if isinstance(value, list):
            return "[" + ",".join(text(item) for item in value) + "]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    return [f"{group}.{key}={text(value)}" for key, value in settings.items()]


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra's compose API on ``conf``; also inside a job of a sweep, where ``hydra.main`` holds the one global instance."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="bayesfed"):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


def _compose(overrides: Sequence[str]) -> DictConfig:
    try:
        with _hydra():
            return compose("config", overrides=_searched(overrides), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise _explain(error, overrides) from error


def _searched(overrides: Sequence[str]) -> list[str]:
    """``overrides``, and where the user's own configuration lies."""
    local = search_path()
    if not local or any("searchpath" in o for o in overrides):
        return list(overrides)
    return [*overrides, f"hydra.searchpath={local}"]


def _explain(error: Exception, overrides: Sequence[str]) -> InputError:
    """Turn Hydra's report into one line with the nearest valid name."""
    text = str(error)
    if match := re.search(r"Could not find '([\w/]+)'", text) or re.search(r"In '.*': Could not find '([\w/]+)'", text):
        group, _, name = match[1].rpartition("/")
        valid = _options(group)
        return InputError(group, name, f"no such option; {did_you_mean(name, valid)}valid: {', '.join(valid)}")
    if match := re.search(r"Could not override '([\w./@]+)'", text):
        key = match[1]
        given = next((o for o in overrides if o.lstrip("+~").split("=")[0] == key), key)
        value = given.partition("=")[2]
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(_plain(overrides), parent) if parent else _plain(overrides)
        names = [str(k) for k in node if not str(k).startswith("_")] if OmegaConf.is_config(node) else []
        if not parent or not names:
            names = ["experiment", *(str(k) for k in _plain([]))]
            leaf = key.partition(".")[0]
        return InputError(key, value, f"no such key; {did_you_mean(leaf, names)}valid: {', '.join(sorted(names))}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return InputError("override", " ".join(overrides) or "(none)", "; ".join(lines[:2]))


def _plain(overrides: Sequence[str]) -> DictConfig:
    """The configuration with only the group choices among ``overrides`` (for listing valid keys)."""
    groups = [o for o in overrides if o.partition("=")[0] in (*GROUPS, "experiment", "hydra.searchpath")]
    with _hydra():
        return compose("config", overrides=_searched(groups))


def _options(group: str) -> list[str]:
    folders = [conf_dir(), Path.cwd() / "conf"]
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


# -- validation -----------------------------------------------------------------------------------------------------------


def validate(cfg: DictConfig) -> None:
    """Check types and ranges of everything that can be checked without loading data.

    Raises:
        InputError: the first value that is not usable.
    """
    known = {*RunSchema.__dataclass_fields__, *GROUPS, "hydra", "handler", "tuned"}
    for key in cfg:
        if key not in known:
            names = sorted({*known, "experiment"})
            raise InputError(
                str(key), cfg[key], f"no such key; {did_you_mean(str(key), names)}valid: {', '.join(names)}"
            )
    plain = [key for key in RunSchema.__dataclass_fields__ if key not in ("shift", "system")]
    for key in plain:
        try:
            OmegaConf.merge(OmegaConf.structured(RunSchema), {key: cfg.get(key)})  # a stored run has no `resume`
        except OmegaConfBaseException as error:
            full = getattr(error, "full_key", None) or key
            raise InputError(full, OmegaConf.select(cfg, full), str(error).splitlines()[0]) from error
    integer("seed", cfg.seed, at_least=0)
    integer("rounds", cfg.rounds, at_least=0)
    choice("dtype", cfg.dtype, ("float32", "float64"))
    choice("wire", cfg.wire, FORMATS)
    choice("device", cfg.device.partition(":")[0], ("auto", "cpu", "cuda"))
    integer("eval.every", cfg.eval.every, at_least=1)
    integer("eval.bayes_every", cfg.eval.bayes_every, at_least=1)
    integer("eval.samples", cfg.eval.samples, at_least=1)
    integer("eval.batch_size", cfg.eval.batch_size, at_least=1, optional=True)
    integer("eval.at_once", cfg.eval.at_once, at_least=1, optional=True)
    number("eval.validation", cfg.eval.validation, at_least=0, at_most=0.9)
    integer("checkpoint.every", cfg.checkpoint.every, at_least=0)
    integer("eval.clients_every", cfg.eval.get("clients_every"), at_least=0, optional=True)
    for target in cfg.eval.get("target_accuracy", ()):
        number("eval.target_accuracy", target, at_least=0, at_most=100)
    ood = cfg.eval.get("ood")
    if ood is not None:
        choice("eval.ood", ood, [*BUILT_IN, *_options("data")])
    Shift.of(cfg.get("shift"))  # a run stored before they existed has neither
    System.of(cfg.get("system"))
    number("limits.mean_norm", cfg.limits.mean_norm, above=0)
    number("limits.precision", cfg.limits.precision, above=0)
    number("limits.relative_precision", cfg.limits.relative_precision, above=1)
    number("limits.relative_examples", cfg.limits.relative_examples, above=1)
    integer("limits.reply_bytes", cfg.limits.reply_bytes, at_least=1, optional=True)
    for group in GROUPS:
        check_types(cfg[group], group)
    for group in ("strategy", "client", "engine", "logger"):
        build(cfg[group], group)


def named_group(group: str, name: str) -> dict[str, Any]:
    """The built-in (or local) settings of ``group=name``, as plain values."""
    return plain_section(_plain([f"{group}={name}"])[group])
