"""Somebody's own strategy, solver or client half that misbehaves: one line before the directory exists, or the reason
in its summary.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf, read_write
from safetensors.torch import load_file

from bayesfed.config import compose_config
from bayesfed.errors import InputError, RunDiverged, RunFailed
from bayesfed.families import DiagonalGaussian, PointMass
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.local import LocalSolution
from bayesfed.federation.server.strategy import Reply, Sent
from bayesfed.runs.launch import RunResult, run_config
from bayesfed.runs.status import status
from clients.exact import ExactSolver
from strategies import BayesADMM

BASE = (
    "experiment=linreg",
    "strategy.family=diagonal",
    "strategy.damping=0.3",
    "eval.samples=2",
    "display=false",
    "figures=false",
    "rounds=2",
    "data.num_clients=3",
)
KEYS = ("family", "damping")
NAN = float("nan")


@lru_cache
def composed(*overrides: str) -> DictConfig:
    return compose_config(overrides)


@pytest.fixture
def attempt(tmp_path, monkeypatch) -> Callable[..., RunResult | Exception]:
    """``attempt(strategy=Kind)``: the result of a run with that class (``client=`` likewise), or its error, with what
    every error owes: nothing written, or the reason; and nothing broken in checkpoint and posterior file either way."""

    def start(**own: Any) -> RunResult | Exception:
        module = types.ModuleType("own_classes")
        monkeypatch.setitem(sys.modules, "own_classes", module)
        cfg = copy.deepcopy(composed(*BASE))
        OmegaConf.set_struct(cfg, False)
        for group, kind in own.items():
            setattr(module, group, kind)
            target = f"own_classes.{group}" if kind.__module__ != "builtins" else f"builtins.{kind.__name__}"
            kept = {key: cfg[group][key] for key in (("name", *KEYS) if group == "strategy" else ("name",))}
            cfg[group] = {"_target_": target, **kept}
        with read_write(cfg.hydra):
            cfg.hydra.run.dir = str(tmp_path / "run")
        outcome: RunResult | Exception
        try:
            outcome = run_config(cfg, list(BASE), time.perf_counter())
        except Exception as error:
            outcome = error
        owed(tmp_path / "run", outcome)
        return outcome

    return start


def owed(folder: Path, outcome: RunResult | Exception) -> None:
    if isinstance(outcome, InputError):
        assert not folder.exists()
        assert len(str(outcome).splitlines()) == 1
        return
    for file in [*folder.glob("checkpoint/*.safetensors"), *folder.glob("posterior.safetensors")]:
        assert all(bool(value.isfinite().all()) for value in load_file(file).values()), file
    summary = json.loads((folder / "summary.json").read_text())
    if isinstance(outcome, RunResult):
        assert (summary["status"], summary["rounds"]) == ("finished", 2)
        assert "reason" not in summary
        return
    assert summary["status"] == "failed"
    assert len(summary["reason"].splitlines()) == 1
    assert summary["reason"].isprintable()
    logged = [json.loads(line)["message"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert f"failed: {summary['reason']}" in logged
    lines = [json.loads(line)["round"] for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert lines == list(range(summary["rounds"] + 1))


def raises(error: Exception) -> Callable[..., Any]:
    def act(self, *arguments: Any) -> Any:
        raise error

    return act


def returns(value: Any) -> Callable[..., Any]:
    return lambda self, *arguments: value


def leaves(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """The method as it should be, and then another posterior."""

    def act(self, *arguments: Any) -> Any:
        found = original(BayesADMM, act)(self, *arguments)
        self.posterior = change(getattr(self, "posterior", None))
        return found

    return act


def original(base: type, act: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(base, act.__dict__["hook"])


def subclass(base: type, hook: str, act: Callable[..., Any]) -> type:
    act.__dict__["hook"] = hook
    return type("Mine", (base,), {hook: act})


def with_client(half: type) -> type:
    return type("Mine", (BayesADMM,), {"client": half})


HOOKS = ("__init__", "prepare", "local_settings", "empty", "accumulate", "extra", "combine", "tensors")
POSTERIORS: dict[str, Callable[[Any], Any]] = {
    "no posterior": lambda q: None,
    "nan mean": lambda q: DiagonalGaussian(q.mean * NAN, q.precision),
    "infinite precision": lambda q: DiagonalGaussian(q.mean, q.precision * float("inf")),
    "negative precision": lambda q: DiagonalGaussian(q.mean, -q.precision),
    "wrong shape": lambda q: DiagonalGaussian(q.mean[:-1], q.precision[:-1]),
    "another family": lambda q: PointMass(q.mean),
    "a dict": lambda q: q.arrays(),
}
ACTS: dict[str, Callable[[], Callable[..., Any]]] = {
    "KeyError": lambda: raises(KeyError("two\nlines\x1b[31m")),
    "ValueError": lambda: raises(ValueError("no")),
    "None": lambda: returns(None),
    "text": lambda: returns("text"),
}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("hook", HOOKS)
def test_a_method_of_a_strategy_that_raises_or_returns_rubbish(attempt, hook, act) -> None:
    outcome = attempt(strategy=subclass(BayesADMM, hook, ACTS[act]()))
    assert isinstance(outcome, Exception)
    if hook in ("__init__", "prepare") or (hook == "extra" and act != "text"):
        assert isinstance(outcome, InputError)


@pytest.mark.parametrize(
    ("hook", "before"),
    [("combine", lambda self, sums, replies: {}), ("accumulate", lambda self, sums, posterior, num_examples: {})],
)
def test_a_method_with_the_arguments_of_an_earlier_version(attempt, hook, before) -> None:
    outcome = attempt(strategy=subclass(BayesADMM, hook, before))
    assert isinstance(outcome, InputError)
    assert f"{hook} must take (sums, " in str(outcome)


@pytest.mark.parametrize("change", POSTERIORS)
@pytest.mark.parametrize("hook", ["prepare", "combine"])
def test_the_server_checks_its_own_posterior(attempt, tmp_path, hook, change) -> None:
    outcome = attempt(strategy=subclass(BayesADMM, hook, leaves(POSTERIORS[change])))
    if hook == "prepare":
        assert isinstance(outcome, InputError)
        assert "after prepare() the server's" in str(outcome)
        return
    assert isinstance(outcome, RunDiverged)
    assert str(outcome).startswith("diverged: round 1: the server's ")
    assert "resuming repeats the same steps and diverges again" in str(outcome)
    (newest,) = (tmp_path / "run" / "checkpoint").glob("server-*.safetensors")
    assert newest.stem == "server-000000"
    if change == "nan mean":
        assert "the server's mean is not finite" in str(outcome)


def test_the_server_checks_what_a_strategy_keeps(attempt, tmp_path) -> None:
    def combine(self, *arguments):
        found = original(BayesADMM, combine)(self, *arguments)
        self.hsum = self.hsum * NAN
        return found

    outcome = attempt(strategy=subclass(BayesADMM, "combine", combine))
    assert isinstance(outcome, RunDiverged)
    assert str(outcome).startswith("diverged: round 1: the server's state hsum.first is not finite")
    assert status(tmp_path / "run")[0].row_count > 3
    assert "go on with" not in [str(cell) for cell in status(tmp_path / "run")[0].columns[0].cells]


def test_a_run_whose_strategy_was_mended_goes_on(attempt, tmp_path) -> None:
    """Resumed with the class in order, it ends with the posterior of a run that nothing happened to."""
    whole = attempt(strategy=BayesADMM).posterior
    (tmp_path / "run").rename(tmp_path / "whole")
    attempt(strategy=subclass(BayesADMM, "combine", raises(KeyError("x"))))
    sys.modules["own_classes"].strategy = BayesADMM  # type: ignore[attr-defined]
    cfg = copy.deepcopy(composed("resume=folder"))
    cfg.resume = str(tmp_path / "run")
    result = run_config(cfg, [f"resume={cfg.resume}"], time.perf_counter())
    assert torch.equal(result.posterior.mean, whole.mean)
    assert "reason" not in result.summary


def test_a_posterior_in_another_dtype_is_taken() -> None:
    scale = 1.0

    def wide(self, *arguments):
        found = BayesADMM.combine(self, *arguments)
        self.posterior = DiagonalGaussian(self.posterior.mean.double() + scale, self.posterior.precision.double())
        return found

    made = subclass(BayesADMM, "combine", wide)()
    made.setup(torch.zeros(3), 2)
    sums, sent = made.empty(), Sent(made.posterior)
    made.accumulate(sums, Reply(sent.wide, 1, {}, {}, sent))
    assert set(made.combined(sums, sent, 1, 1)) == {"guard/count", "dual/norm", "admm/dual"}
    assert made.posterior.mean.dtype == torch.float32
    scale = 1e39  # beyond float32
    with pytest.raises(RunFailed, match="the server's mean is not finite"):
        made.combined(sums, sent, 1, 2)


NUMBERS = {
    "tensor": torch.tensor(0.5),
    "numpy": np.float32(0.5),
    "0-d": np.array(0.5),
    "int64": np.int64(3),
    "nan": NAN,
}
OTHERS = {"string": "good", "none": None, "list": [1.0], "array": np.ones(2), "object": object()}


@pytest.mark.parametrize("hook", ["combine", "accumulate"])
@pytest.mark.parametrize("value", [*NUMBERS, *OTHERS])
def test_metrics_of_a_strategy(attempt, hook, value) -> None:
    def act(self, *arguments: Any) -> dict[str, Any]:
        return {**original(BayesADMM, act)(self, *arguments), "mine": (NUMBERS | OTHERS)[value]}

    outcome = attempt(strategy=subclass(BayesADMM, hook, act))
    if value in OTHERS:
        assert isinstance(outcome, RunFailed)
        assert f"Mine.{hook}: metric 'mine' must be a number" in str(outcome)
    elif hook == "combine":
        assert isinstance(outcome, RunResult)
        found = outcome.rounds[-1]["mine"]
        assert found is None if value == "nan" else found == float(NUMBERS[value])
    else:
        assert isinstance(outcome, RunResult)


def test_a_metric_cannot_take_the_rounds_name(attempt) -> None:
    outcome = attempt(strategy=subclass(BayesADMM, "combine", lambda self, *arguments: {"round": 7}))
    assert isinstance(outcome, RunFailed)


class Abstract(BayesADMM):
    combine = BayesADMM.__mro__[1].__mro__[1].combine  # the abstract method


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"strategy": dict}, "derive it from strategies.FederatedStrategy"),
        ({"strategy": ExactSolver}, "its constructor fails"),
        (
            {"strategy": subclass(BayesADMM, "__init__", lambda self, **settings: None)},
            r"must call super\(\).__init__\(\)",
        ),
        ({"strategy": Abstract}, "abstract"),
        ({"client": dict}, "derive it from bayesfed.federation.local.Solver"),
        ({"client": type("Mine", (), {})}, "derive it from bayesfed.federation.local.Solver"),
        ({"client": subclass(ExactSolver, "__init__", raises(KeyError("x")))}, "its constructor fails: KeyError"),
        ({"client": subclass(ExactSolver, "check", raises(KeyError("x")))}, "KeyError"),
        ({"strategy": with_client(type("Mine", (), {}))}, "derive it from bayesfed.federation.client.handler.Trainer"),
        (
            {"strategy": with_client(subclass(Trainer, "__init__", lambda self, name: None))},
            "unexpected keyword argument",
        ),
    ],
)
def test_what_is_no_strategy_solver_or_client_half(attempt, own, said) -> None:
    with pytest.raises(InputError, match=said):
        raise attempt(**own)


def solution(change: Callable[[LocalSolution], Any]) -> Callable[..., Any]:
    return lambda self, problem: change(ExactSolver.solve(self, problem))


def with_metric(value: Any) -> Callable[..., Any]:
    return solution(lambda found: replace(found, metrics={**found.metrics, "mine": value}))


SOLUTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "raises": (raises(KeyError("x")), "KeyError"),
    "None": (returns(None), "must return a LocalSolution, not NoneType"),
    "posterior": (solution(lambda found: found.posterior), "must return a LocalSolution, not DiagonalGaussian"),
    **{
        name: (solution(lambda found, change=change: replace(found, posterior=change(found.posterior))), said)
        for (name, change), said in zip(
            POSTERIORS.items(),
            ("NoneType", "not finite", "not finite", "not positive", "shape", "PointMass", "dict"),
            strict=True,
        )
    },
    **{f"metric {name}": (with_metric(value), "metric 'mine' must be a number") for name, value in OTHERS.items()},
    "metrics None": (solution(lambda found: replace(found, metrics=None)), "dict of numbers"),
}


@pytest.mark.parametrize("name", SOLUTIONS)
def test_what_a_solver_returns(attempt, name) -> None:
    act, said = SOLUTIONS[name]
    outcome = attempt(client=subclass(ExactSolver, "solve", act))
    assert isinstance(outcome, RunFailed)
    assert said in str(outcome)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_a_solver(attempt, name) -> None:
    assert isinstance(attempt(client=subclass(ExactSolver, "solve", with_metric(NUMBERS[name]))), RunResult)


def test_a_solver_that_changes_a_fixed_precision(attempt, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "KEYS", (*KEYS, "covariance"))
    fixed = composed("strategy.covariance=fixed", *BASE)
    monkeypatch.setattr(sys.modules[__name__], "composed", lambda *overrides: fixed)

    def learns(self, problem):
        return ExactSolver.solve(self, replace(problem, learn_precision=True))

    outcome = attempt(client=subclass(ExactSolver, "solve", learns))
    assert isinstance(outcome, RunFailed)
    assert "Mine.solve changed the precision, which is fixed" in str(outcome)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("hook", ["pose", "answer", "settle", "_read"])
def test_a_client_half_that_misbehaves(attempt, hook, act) -> None:
    kind = subclass(Trainer, hook, ACTS[act]())
    kind.remembers = True  # type: ignore[attr-defined]
    assert isinstance(attempt(strategy=with_client(kind)), RunFailed)


def test_a_client_half_whose_constructor_raises(attempt) -> None:
    def act(self, **settings: Any) -> None:
        raise KeyError("x")

    assert isinstance(attempt(strategy=with_client(subclass(Trainer, "__init__", act))), RunFailed)


def test_a_client_half_that_would_keep_nothing(attempt) -> None:
    outcome = attempt(strategy=with_client(subclass(Trainer, "settle", lambda self, *given: {"kept": torch.ones(1)})))
    assert isinstance(outcome, InputError)
    assert "settle() keeps nothing without remembers = True" in str(outcome)


def test_a_client_half_whose_constructor_takes_other_arguments(attempt) -> None:
    def takes_a_rate(self, rate: float = 1.0) -> None:
        raise AssertionError

    outcome = attempt(strategy=with_client(subclass(Trainer, "__init__", takes_a_rate)))
    assert isinstance(outcome, InputError)
    assert "bayesfed gives name, family, " in str(outcome)
    assert "local_settings" in str(outcome)
