"""Hydra's compose API on ``conf``: where groups are looked for, and errors as one line."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import hydra
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from bayesfed.errors import InputError, did_you_mean
from bayesfed.foreign import plain_text
from bayesfed.overrides import given_for, readable

ROOT = "bayesfed"  # conf/bayesfed.yaml; a user's own Hydra application may have a config.yaml in its conf folder
OWN = ("bayesfed", "strategies", "clients")  # where our classes are
_HYDRA = threading.RLock()  # Hydra has one global instance


def conf_dir() -> Path:
    """The folder ``conf``: beside the package in a checkout or app bundle, inside it in a wheel."""
    for base in (Path(str(resources.files("bayesfed"))), Path(__file__).resolve().parent.parent):
        if (base / "conf" / f"{ROOT}.yaml").is_file():
            return base / "conf"
    raise FileNotFoundError("bayesfed's conf folder is missing from the installation")


def conf_dirs() -> list[Path]:
    """Where a group's files are looked for, in this order: ``conf`` in the working directory, then the built-in
    ones."""
    local = Path.cwd() / "conf"
    own = local.is_dir() and local.resolve() != conf_dir().resolve()
    return [local, conf_dir()] if own else [conf_dir()]


def options(group: str) -> list[str]:
    """The names to choose from in ``group``."""
    return sorted({path.stem for folder in conf_dirs() for path in (folder / group).glob("*.yaml")})


class LocalFirst(SearchPathPlugin):
    """A ``conf`` folder in the working directory goes before bayesfed's (and adds nothing to other Hydra
    applications)."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Put the local folder before ours."""
        *local, built_in = conf_dirs()
        main = [element.path for element in search_path.get_path() if element.provider == "main"]
        if local and main and main[0].removeprefix("file://") == str(built_in):
            search_path.prepend("bayesfed", f"file://{local[0]}", SearchPathQuery(provider="main"))


Plugins.instance().register(LocalFirst)


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra set up for ``conf``, one thread at a time; an application that it belongs to gets it back as it was."""
    with _HYDRA:
        outer, job, base = (
            GlobalHydra.instance().hydra,
            copy.copy(JobRuntime.instance().conf),
            VersionBase.instance().getbase(),
        )
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="bayesfed"):
                yield
        finally:
            GlobalHydra.instance().hydra = outer
            JobRuntime.instance().conf = job
            VersionBase.instance().version_base = base


def compose(overrides: Sequence[str]) -> DictConfig:
    """The configuration for these overrides, with Hydra's own section; nothing is checked but that all references
    resolve.

    Raises:
        InputError: an unknown key, group or option, or a reference to nothing.
    """
    try:
        with _hydra():
            cfg = hydra.compose(ROOT, overrides=[*map(readable, overrides)], return_hydra_config=True)
        OmegaConf.to_container(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True)
        return cfg
    except (HydraException, OmegaConfBaseException) as error:
        raise explain(error, overrides) from error
    except YAMLError as error:
        raise unreadable(error) from error


def unreadable(error: YAMLError) -> InputError:
    """A YAML file with a mistake in it, as one line with file and line number."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    file = getattr(mark, "name", None) or getattr(error, "name", "conf")
    where = f", line {mark.line + 1}" if mark else ""
    problem = plain_text(getattr(error, "problem", None) or error)
    return InputError("conf", f"{file}{where}", f"is no valid YAML: {problem}")


def run_dir_of(cfg: DictConfig) -> str:
    """``hydra.run.dir`` with ``${hydra:...}`` resolved, which Hydra leaves to its own main function.

    Raises:
        InputError: a reference to nothing.
    """
    with _HYDRA:
        settings = HydraConfig.instance()
        before = settings.cfg
        try:
            settings.set_config(cfg)
            return str(cfg.hydra.run.dir)
        except OmegaConfBaseException as error:
            asked = OmegaConf.to_container(cfg.hydra.overrides.hydra, resolve=False)  # they hold the reference, too
            written = given_for("hydra.run.dir", [str(text) for text in asked or ()]) or "(its value)"
            raise InputError("hydra.run.dir", written, str(error).splitlines()[0]) from error
        finally:
            settings.cfg = before


def without_values(overrides: Sequence[str], groups: Sequence[str]) -> DictConfig:
    """The configuration with only those of ``overrides`` that choose ``groups``."""
    chosen = [o for o in overrides if o.partition("=")[0] in (*groups, "experiment", "hydra.searchpath")]
    with _hydra():
        return hydra.compose(ROOT, overrides=[*map(readable, chosen)])


def explain(error: Exception, overrides: Sequence[str]) -> InputError:
    """Turn Hydra's report into one line with the nearest valid name."""
    text = str(error)
    if match := re.search(r"Could not find '([\w/]+)'", text):
        group, _, name = match[1].rpartition("/")
        valid = options(group)
        return InputError(group, name, f"no such option; {did_you_mean(name, valid)}valid: {', '.join(valid)}")
    if match := re.search(r"Could not override '([\w./@]+)'", text):
        return _unknown_key(match[1], overrides)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("See https:")]
    key = getattr(error, "full_key", None)
    if key:
        literally = "; a literal ${ is written \\${" if "nterpolation" in text else ""
        return InputError(key, given_for(key, overrides) or "(its value)", lines[0] + literally)
    blamed = [o for o in overrides if o in text or readable(o) in text]
    return InputError("override", (blamed or [" ".join(overrides) or "(none)"])[0], "; ".join(lines))


def _unknown_key(key: str, overrides: Sequence[str]) -> InputError:
    parent, _, leaf = key.rpartition(".")
    composed = without_values(overrides, [path.name for path in conf_dir().iterdir() if path.is_dir()])
    node = OmegaConf.select(composed, parent) if parent else composed
    names = [str(k) for k in node if not str(k).startswith("_")] if OmegaConf.is_config(node) else []
    if not parent or not names:
        names = ["experiment", *(str(k) for k in without_values([], []))]
        leaf = key.partition(".")[0]
    value = given_for(key, overrides) or ""
    target = str(node.get("_target_")) if OmegaConf.is_dict(node) else ""
    more = (
        ""
        if target.partition(".")[0] in ("", "None", *OWN)
        else f"; what {target} takes besides goes with +{key}={value}"
    )
    if parent == "eval" and any(override.startswith("eval.probes=") for override in overrides):
        more = f"; a key of a probe of your own goes with +{key}={value}"
    return InputError(key, value, f"no such key; {did_you_mean(leaf, names)}valid: {', '.join(sorted(names))}{more}")
