"""A small search per method, the same number of trials for each, on a validation split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep
from omegaconf import OmegaConf

from bayesfed import scores, seeding
from bayesfed.compare.grid import Run
from bayesfed.compare.options import Options
from bayesfed.compare.results import Trace
from bayesfed.compare.runner import Outcome, Runner
from bayesfed.composing import conf_dirs
from bayesfed.config import compose_config
from bayesfed.errors import InputError
from bayesfed.overrides import parse
from bayesfed.runs.directory import RunDirectory

VALIDATION = 0.2  # of the training data, where the configuration keeps none
Space = dict[str, IntervalSweep | ChoiceSweep]


@dataclass
class Tuned:
    """The search of one method in one setting.

    Attributes:
        setting, method: as in :class:`Run`.
        trials: (values, score) of each trial; the first one has the configuration's own values; nan where it failed.
    """

    setting: str
    method: str
    trials: list[tuple[dict[str, str], float]] = field(default_factory=list)

    @property
    def best(self) -> tuple[dict[str, str], float] | None:
        """The trial with the best score, the earliest of equals; None if all failed."""
        scored = [trial for trial in self.trials if math.isfinite(trial[1])]
        return max(scored, key=lambda trial: trial[1]) if scored else None


def check_tuning(options: Options, runs: Sequence[Run]) -> dict[tuple[str, str], Space]:
    """The search space of every setting and method.

    Raises:
        InputError: Optuna is missing, the trials' seed is one that is reported, or a method has nothing to search.
    """
    try:
        import optuna  # noqa: F401
    except ImportError:
        fix = 'needs Optuna: pip install "bayesfed[tune]" (or hydra-optuna-sweeper)'
        raise InputError("tune", options.tune, fix) from None
    if any(run.seed == options.tune_seed for run in runs):
        raise InputError("tune_seed", options.tune_seed, "is among the reported seeds; tune on another one")
    return {(run.setting, run.method): search_space(run) for run in runs}


def search_space(run: Run) -> Space:
    """``conf/tune/STRATEGY.yaml`` and ``conf/tune/CLIENT.yaml``, without keys that the command line sets.

    Raises:
        InputError: nothing is left to search, or an entry is neither an interval nor a choice.
    """
    space: Space = {}
    keys = {override.key_or_group for override in parse(run.overrides)}
    for name in (run.cfg.strategy.name, run.cfg.client.name):
        for key, text in _entries(name).items():
            if key in keys:
                continue
            (override,) = parse([f"{key}={text}"])
            value = override.value()
            if not isinstance(value, IntervalSweep | ChoiceSweep):
                raise InputError(f"tune/{name}.{key}", text, "must be interval(low, high) or choice(...)")
            space[key] = value
    if not space:
        names = f"{run.cfg.strategy.name}.yaml or {run.cfg.client.name}.yaml"
        raise InputError("tune", run.method, f"has no search space: add conf/tune/{names}, or leave tune= out")
    return space


def missing_spaces(runs: Sequence[Run]) -> list[str]:
    """Strategies without a search space of their own, as notes: only their client's values are tuned."""
    names = dict.fromkeys(run.cfg.strategy.name for run in runs)
    return [f"{n} has no search space of its own (conf/tune/{n}.yaml)" for n in names if _file(n) is None]


def tune(
    options: Options, runs: Sequence[Run], spaces: dict[tuple[str, str], Space], runner: Runner
) -> dict[tuple[str, str], Tuned]:
    """Search ``options.tune`` trials for each setting and method; trials of different methods run side by side.

    A method's proposals depend on nothing but its earlier trials, so a search that was interrupted goes on with the
    same ones.

    Args:
        options: trials, their seed and what they are judged by.
        runs: of the comparison; one for each setting and method is enough.
        spaces: from :func:`check_tuning`.
        runner: where trials run.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    first = {(run.setting, run.method): run for run in reversed(runs)}
    keys = list(dict.fromkeys((run.setting, run.method) for run in runs))
    searches = {key: Tuned(*key) for key in keys}
    studies = {key: optuna.create_study(direction="maximize", sampler=_sampler(key, options)) for key in keys}
    for number in range(options.tune):
        proposed: dict[tuple[str, str], tuple[Any, dict[str, str]]] = {}
        for key in keys:
            trial = studies[key].ask() if number else None
            proposed[key] = trial, _proposal(trial, spaces[key]) if trial else {}
        trials = [_trial(first[key], proposed[key][1], options.tune_seed) for key in keys]
        outcomes = runner.run(trials, f"tuning, trial {number + 1}/{options.tune}")
        for key, outcome in zip(keys, outcomes, strict=True):
            trial, values = proposed[key]
            value = score(outcome, options.tune_for)
            searches[key].trials.append((values, value))
            if trial and math.isfinite(value):
                studies[key].tell(trial, value)
            elif trial:
                studies[key].tell(trial, state=optuna.trial.TrialState.FAIL)
    return searches


def apply(runs: Sequence[Run], searches: dict[tuple[str, str], Tuned]) -> list[Run]:
    """The runs with the values that were chosen; without those of methods whose trials all failed."""
    tuned = []
    for run in runs:
        best = searches[run.setting, run.method].best
        if best is not None:
            overrides = (*run.overrides, *_lines(best[0]))
            tuned.append(replace(run, overrides=overrides, cfg=compose_config(overrides)))
    return tuned


def score(outcome: Outcome, metric: str) -> float:
    """What a trial is judged by, larger is better; RMSE where there is no accuracy. nan if it failed."""
    if outcome.status != "finished":
        return math.nan
    try:
        trace = Trace.read(RunDirectory(outcome.directory), outcome.run.seed)
    except InputError:  # damaged
        return math.nan
    metric = metric if metric in trace.metrics else next(iter(trace.metrics), metric)
    return trace.final(metric) * (1 if scores.score(metric).higher_is_better else -1)


def _sampler(key: tuple[str, str], options: Options) -> Any:
    import optuna

    seed = seeding.derive(options.tune_seed, "tune", *key) % 2**32
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, options.tune // 3))


def _proposal(trial: Any, space: Space) -> dict[str, str]:
    values = {}
    for key, sweep in space.items():
        if isinstance(sweep, ChoiceSweep):
            values[key] = str(trial.suggest_categorical(key, [str(item) for item in sweep.list]))
        else:
            low, high = float(sweep.start or 0.0), float(sweep.end or 0.0)
            values[key] = f"{trial.suggest_float(key, low, high, log='log' in sweep.tags):.4g}"
    return values


def _trial(run: Run, values: dict[str, str], seed: int) -> Run:
    held = run.cfg.eval.validation or VALIDATION
    last = max(run.cfg.rounds, 1)
    overrides = (
        *run.overrides, *_lines(values), f"seed={seed}", f"eval.validation={held}", f"eval.every={last}",
        f"eval.bayes_every={last}",
    )  # fmt: skip
    return replace(run, seed=seed, overrides=overrides, cfg=compose_config(overrides))


def _lines(values: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in values.items()]


def _entries(name: str) -> dict[str, str]:
    path = _file(name)
    entries = OmegaConf.to_container(OmegaConf.load(path)) if path else {}
    return {str(key): str(value) for key, value in entries.items()} if isinstance(entries, dict) else {}


def _file(name: str) -> Path | None:
    for folder in conf_dirs():
        path = folder / "tune" / f"{name}.yaml"
        if path.is_file():
            return path
    return None
