"""What a run evaluates, and when."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from omegaconf import DictConfig

from bayesfed import seeding
from bayesfed.config import BUILT_IN, named_group
from bayesfed.errors import InputError
from bayesfed.evaluation import evaluate, evaluate_clients, fairness, ood_auroc
from bayesfed.evaluation.outputs import Progress
from bayesfed.problem import Examples, Problem
from bayesfed.problem.flat import FlatModel
from bayesfed.problem.likelihood import Predictive
from bayesfed.problem.likelihood.metrics import reliability
from bayesfed.problem.ood import ood_examples
from bayesfed.profiling import timed

Scores = Sequence[dict[str, float] | None]


class Evaluator:
    """Scores the server's posterior on the test set, on each client's own test distribution and on inputs of another kind.

    Random draws are keyed by the seed, the round and the purpose, so that what is evaluated changes nothing else.

    Args:
        cfg: validated configuration.
        problem: gives the data.
        model: its parameters are overwritten.
        append: writes a line of ``client_tests.jsonl``.
        progress: told of each draw from the posterior that is to be evaluated.

    Raises:
        InputError: ``eval.ood`` names what doesn't fit the problem.
    """

    def __init__(
        self,
        cfg: DictConfig,
        problem: Problem,
        model: FlatModel,
        append: Callable[[dict[str, Any]], None],
        progress: Progress,
    ):
        self.cfg, self.problem, self.model, self._append, self._progress = cfg, problem, model, append, progress
        self._outside = self._other_inputs()
        self._predictions: dict[str, Predictive] = {}  # of the last round, on the test set
        self._options = {"batch_size": cfg.eval.batch_size, "at_once": cfg.eval.at_once, "samples": cfg.eval.samples}

    @timed("evaluation")
    def after_round(self, round: int, posterior: Any) -> dict[str, float]:
        """The metrics that are due after ``round``; ``posterior`` is on the model's device."""
        if len(self.problem.test) == 0:
            return {}
        settings, last = self.cfg.eval, round == self.cfg.rounds
        found: dict[str, float] = {}
        if self._clients_due(round):
            found |= self._clients(round, posterior)
        if last and self._outside is not None:
            scores = ood_auroc(
                self.model, posterior, self.problem.test, self._outside, self.problem.likelihood,
                generator=self._generator(round, "ood"), **self._options,
            )  # fmt: skip
            found |= {f"ood/auroc_{kind}": value for kind, value in scores.items()}
        if last or round % settings.every == 0:
            found |= self._test(round, posterior, bayes=last or round % settings.bayes_every == 0)
        return found

    @timed("evaluation")
    def reliability(self, round: int, posterior: Any) -> dict[str, Any]:
        """Calibration bins after the last round, see :func:`bayesfed.problem.likelihood.metrics.reliability`."""
        if not self._predictions:  # an earlier process evaluated that round
            self._test(round, posterior, bayes=True)
        return reliability(self._predictions, self.problem.test.targets().cpu())

    def personalized(self, round: int, answers: Mapping[int, Mapping[str, float]], kind: str) -> dict[str, float]:
        """Summarise what clients said of their local posteriors, see :func:`bayesfed.federation.server.personalize.personalize`.

        Args:
            round: the last one.
            answers: scores by client.
            kind: ``mean`` or ``bayes``: which of the scores count.
        """
        scores: list[dict[str, float] | None] = [None] * len(self.problem.clients)
        for client, numbers in answers.items():
            scores[client] = {k.removeprefix(f"{kind}/"): v for k, v in numbers.items() if k.startswith(f"{kind}/")}
        self._record(round, "personalized", scores)
        return {f"personalized/{name}": value for name, value in fairness(scores).items()}

    # -- details ------------------------------------------------------------------------------------------------------

    def _test(self, round: int, posterior: Any, bayes: bool) -> dict[str, float]:
        """Scores on the test set; the predictions of the last round are kept."""
        return evaluate(
            self.model, posterior, self.problem.test, self.problem.likelihood, generator=self._generator(round), bayes=bayes,
            progress=self._progress, predictions=self._predictions if round == self.cfg.rounds else None, **self._options,
        )  # fmt: skip

    def _clients_due(self, round: int) -> bool:
        every, last = self.cfg.eval.get("clients_every", 0), round == self.cfg.rounds
        if every is None:
            return last
        return bool(every) and round > 0 and (last or round % every == 0)

    def _clients(self, round: int, posterior: Any) -> dict[str, float]:
        """Model-averaged under ``clients/``; at the mean under ``clients/at_mean/``, where that is another predictive."""
        found: dict[str, float] = {}
        kinds = {"": self.cfg.eval.samples} | ({} if posterior.is_point else {"at_mean/": 0})
        scores: list[dict[str, float]] = [{} for _ in self.problem.client_tests]
        for kind, samples in kinds.items():
            each = evaluate_clients(
                self.model, posterior, self.problem.client_tests, self.problem.likelihood,
                generator=self._generator(round, "clients"), progress=self._progress, **self._options | {"samples": samples},
            )  # fmt: skip
            found |= {f"clients/{kind}{name}": value for name, value in fairness(each).items()}
            for own, values in zip(scores, each, strict=True):
                own |= {f"{kind}{metric}": value for metric, value in (values or {}).items()}
        self._record(round, "test", [own or None for own in scores])
        return found

    def _record(self, round: int, name: str, scores: Scores) -> None:
        for client, (found, tests) in enumerate(zip(scores, self.problem.client_tests, strict=True)):
            if found is not None:
                line = {f"{name}/{metric}": value for metric, value in found.items()}
                who = {"client": client, **self.problem.named(client)}
                self._append({"round": round, **who, "examples": len(tests), **line})

    def _other_inputs(self) -> Examples | None:
        """Out-of-distribution inputs, if the run is to look at some."""
        kind = self.cfg.eval.get("ood")
        if kind is None:
            return None
        if kind == self.cfg.data.name:
            raise InputError("eval.ood", kind, "is what the model is trained on; name another data set")
        data = None if kind in BUILT_IN else named_group("data", kind)
        return ood_examples(kind, self.problem, self.cfg.seed, data)

    def _generator(self, round: int, *purpose: str) -> torch.Generator:
        return seeding.torch_generator(self.cfg.seed, "evaluation", *purpose, round, device=self.model.vector.device)
