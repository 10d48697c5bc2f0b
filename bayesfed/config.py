"""From command-line overrides to a checked configuration."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from bayesfed import composing
from bayesfed.composing import ROOT, conf_dir, run_dir_of
from bayesfed.configured import GROUPS, build, check, resolve
from bayesfed.earlier import HANDLERS, of_today
from bayesfed.errors import InputError, choice, did_you_mean, integer, number, settings_of
from bayesfed.host import own_packages
from bayesfed.overrides import parse
from bayesfed.schedule import Schedule

NAMING = ("data", "partition", "model", "likelihood", "strategy", "client")  # groups that make a run another one
RESUMABLE = (
    "rounds", "engine", "eval", "logger", "device", "accelerate", "resume", "display", "figures", "profile", "hydra",
)  # fmt: skip


@dataclass
class CheckpointSchema:
    every: int = MISSING


@dataclass
class RunSchema:
    """Types of the top-level keys, whose defaults stand in ``conf/bayesfed.yaml``; groups and sections are checked
    against the classes that take them."""

    seed: int = MISSING
    rounds: int = MISSING
    dtype: str = MISSING
    accelerate: str = MISSING
    wire: str = MISSING
    device: str = MISSING
    resume: str | None = None
    display: bool = MISSING
    figures: bool = MISSING
    profile: bool = MISSING
    eval: dict[str, Any] = field(default_factory=dict)
    shift: dict[str, Any] = field(default_factory=dict)
    system: dict[str, Any] = field(default_factory=dict)
    checkpoint: CheckpointSchema = field(default_factory=CheckpointSchema)
    limits: dict[str, Any] = field(default_factory=dict)


def import_from_here() -> None:
    """Let a strategy or solver of the user's be imported from the working directory, after everything installed."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def compose_config(overrides: Sequence[str], run_dir: str | None = None) -> DictConfig:
    """Compose the configuration for these overrides, validated; ``cfg.hydra`` is included, with ``hydra.run.dir``
    resolved.

    Composes twice, which takes most of a small run's time: once to see strategy and experiment, then again with the
    client that fits and the experiment's tuned values, before the user's own overrides.

    Args:
        overrides: Hydra overrides.
        run_dir: the run directory, where Hydra chose it already (a job of a sweep).

    Raises:
        InputError: an unknown key, group or value.
    """
    import_from_here()
    own_packages()
    given = list(overrides)
    if any(text.startswith("resume=") and text != "resume=null" for text in given):
        overrides = [text for text in given if not text.startswith("data.path=")]  # of the stored run's data
    overrides = with_tuned(overrides)
    cfg = _with_whole_paths(_compose(overrides))
    refuse_chdir(cfg.hydra.job.chdir)
    with read_write(cfg.hydra):
        cfg.hydra.overrides.task = given  # as in Hydra's own main function
    run_dir = os.path.expanduser(run_dir or run_dir_of(cfg))
    with read_write(cfg.hydra):
        cfg.hydra.run.dir = run_dir
    if isinstance(cfg.resume, str):
        cfg.resume = os.path.expanduser(cfg.resume)
    if cfg.client.get("schedule_rounds", 0) is None:
        OmegaConf.update(cfg, "client.schedule_rounds", cfg.rounds)
    validate(cfg)
    if _learning_asked(overrides) and not getattr(resolve(cfg.client, "client"), "learns_precision", True):
        raise InputError(
            "strategy.covariance", "learned",
            f"client={cfg.client.name} keeps the server's precision; use a client that learns it "
            "(ivon for isotropic and diagonal, von for full), or covariance=fixed",
        )  # fmt: skip
    return cfg


def _compose(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes, each group with a ``name``: that of its file, where the file gives none."""
    cfg = composing.compose(overrides)
    for group in GROUPS:
        chosen = cfg.hydra.runtime.choices.get(group)
        if not isinstance(cfg.get(group), DictConfig):
            fix = "its YAML file holds no mapping: it needs _target_ and the options of that class"
            raise InputError(group, chosen, fix)
        with open_dict(cfg):
            cfg[group].setdefault("name", chosen)
    return cfg


def with_defaults(stored: DictConfig) -> DictConfig:
    """The configuration of a stored run, with today's defaults for the keys that its bayesfed did not know, and without
    those that are gone (:mod:`bayesfed.earlier`).

    Raises:
        InputError: it doesn't go together with them.
    """
    known = OmegaConf.load(conf_dir() / f"{ROOT}.yaml")
    kept = [key for key in RunSchema.__dataclass_fields__ if key != "resume"]
    try:
        own = {key: value for key, value in stored.items() if key != "handler" or value not in HANDLERS}
        cfg = OmegaConf.merge(OmegaConf.masked_copy(known, kept), own)  # type: ignore[arg-type]
        assert isinstance(cfg, DictConfig)
        for group in GROUPS:
            file = conf_dir() / group / f"{cfg[group].name}.yaml"
            ours = OmegaConf.load(file) if file.is_file() else None
            if isinstance(ours, DictConfig) and ours.get("_target_") == cfg[group].get("_target_"):
                cfg[group] = OmegaConf.merge(ours, of_today(group, cfg[group], ours))
        return _with_whole_paths(cfg)
    except OmegaConfBaseException as error:
        raise InputError("resume", "config.yaml", str(error).splitlines()[0]) from error


def whole_path(path: str) -> str:
    """``path`` with the home folder for ``~``, from the root: it means the same in every process and later."""
    return os.path.abspath(os.path.expanduser(path))


def _with_whole_paths(cfg: DictConfig) -> DictConfig:
    """Make the groups' files and folders (keys ``path`` and ``..._path``) absolute; those with a scheme (``s3://``)
    stay."""
    for group in GROUPS:
        section = cfg.get(group)
        for key in section if isinstance(section, DictConfig) else ():
            if str(key).split("_")[-1] == "path" and isinstance(value := section[key], str) and "://" not in value:
                section[key] = whole_path(value).replace("${", "\\${")  # literally, not a reference once more
    return cfg


def refuse_chdir(chdir: object) -> None:
    """Refuse ``hydra.job.chdir=true``: relative paths would mean other files.

    Raises:
        InputError: it is true.
    """
    if chdir:
        raise InputError("hydra.job.chdir", chdir, "bayesfed stays in the folder where it was started; leave it out")


def _run_name(experiment: str, overrides: Sequence[str]) -> str:
    """What a run is called: its experiment, and what was chosen by name on top of it
    (``digits_het10+cifar10+cnn_zenke``)."""
    chosen = {o.key_or_group: o.value() for o in parse(overrides) if o.key_or_group in NAMING}
    return "+".join([experiment, *(str(name) for name in chosen.values())])


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)  # for conf/bayesfed.yaml


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
    if settings.keys() & {"family", "covariance"}:  # they decide which client fits
        first = _compose([*extra, *overrides])
    family = tuned.get(f"{strategy}/{first.strategy.get('family')}") or {}
    extra += _as_overrides("strategy", family)
    client = first.client.name
    if not any(o.key_or_group == "client" for o in parse(overrides)):
        client = preferred or _default_client(first, _learning_asked(extra + overrides))
        extra.insert(0, f"client={client}")
    for key in (client, f"{client}/{first.likelihood.name}", f"{strategy}/{client}"):
        extra += _as_overrides("client", tuned.get(key) or {})
    for group in ("data", "partition", "model", "likelihood"):
        extra += _as_overrides(group, tuned.get(f"{group}/{first[group].name}") or {})
    return extra + overrides


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


# -- validation --------------------------------------------------------------------------------------------------------


def validate(cfg: DictConfig) -> None:
    """Check types and ranges of everything that can be checked without loading data.

    Raises:
        InputError: the first value that is not usable.
    """
    # what Hydra says of a wrong key needs none of these, nor torch
    from bayesfed.accelerate import MODES
    from bayesfed.evaluation.probes import make_probes
    from bayesfed.federation.server.limits import Limits
    from bayesfed.problem.shift import Shift
    from bayesfed.system import System
    from bayesfed.wire import FORMATS

    if named := cfg.strategy.get("handler", cfg.get("handler")):  # bayesfed's own went with `with_defaults`
        fix = "name it in the strategy's class (client = MyClient) and leave the key out"
        raise InputError("strategy.handler", named, fix)
    known = {*RunSchema.__dataclass_fields__, *GROUPS, "hydra", "tuned"}
    for key in cfg:
        if key not in known:
            names = sorted({*known, "experiment"})
            raise InputError(
                str(key), cfg[key], f"no such key; {did_you_mean(str(key), names)}valid: {', '.join(names)}"
            )
    plain = [key for key in RunSchema.__dataclass_fields__ if key not in ("limits", "shift", "system")]
    for key in plain:
        try:
            OmegaConf.merge(OmegaConf.structured(RunSchema), {key: cfg.get(key)})  # a stored run has no `resume`
        except OmegaConfBaseException as error:
            full = getattr(error, "full_key", None) or key
            raise InputError(full, OmegaConf.select(cfg, full), str(error).splitlines()[0]) from error
    integer("seed", cfg.seed, at_least=0)
    integer("rounds", cfg.rounds, at_least=0)
    choice("dtype", cfg.dtype, ("float32", "float64"))
    choice("accelerate", cfg.accelerate, MODES)
    choice("wire", cfg.wire, FORMATS)
    choice("device", cfg.device.partition(":")[0], ("auto", "cpu", "cuda"))
    make_probes(cfg.eval)
    number("eval.validation", cfg.eval.validation, at_least=0, at_most=0.9)
    integer("checkpoint.every", cfg.checkpoint.every, at_least=0)
    Shift.of(cfg.get("shift"))  # a run stored before they existed has neither
    System.of(cfg.get("system"))
    Limits(**settings_of(cfg.get("limits"), Limits, "limits"))
    for group in GROUPS:
        check(cfg[group], group)
    Schedule.of(cfg)
    for group in ("strategy", "client", "engine", "logger"):
        build(cfg[group], group, cfg.seed)
