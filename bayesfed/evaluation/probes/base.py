"""What a probe is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bayesfed import seeding
from bayesfed.errors import integer
from bayesfed.evaluation.outputs import Posterior, Progress
from bayesfed.problem import Problem
from bayesfed.problem.flat import FlatModel

ClientScores = Sequence[dict[str, float] | None]  # of each client; None: it has no tests, or gave no answer
Ask = Callable[
    [int], Mapping[int, Mapping[str, float]]
]  # from posterior samples to scores by client, see `Probe.at_end`


@dataclass(frozen=True)
class Subject:
    """The run that is looked at.

    Attributes:
        problem: data and likelihood.
        data: name of the data set.
        model: its parameters may be overwritten.
        seed: of the run.
        rounds: that the run has in the end.
        append: writes a line of ``client_tests.jsonl``.
        progress: to be told of each draw from the posterior that is evaluated.
    """

    problem: Problem
    data: str
    model: FlatModel
    seed: int
    rounds: int
    append: Callable[[dict[str, Any]], None]
    progress: Progress

    def generator(self, round: int, *purpose: str) -> torch.Generator:
        """Of random draws: keyed by seed, round and purpose, so that what is evaluated changes nothing else."""
        return seeding.torch_generator(self.seed, "evaluation", *purpose, round, device=self.model.vector.device)

    def record(self, round: int, name: str, scores: ClientScores) -> None:
        """A line ``NAME/...`` in ``client_tests.jsonl`` for each client that has scores."""
        for client, (own, tests) in enumerate(zip(scores, self.problem.client_tests, strict=True)):
            if own is not None:
                line = {f"{name}/{metric}": value for metric, value in own.items()}
                who = {"client": client, **self.problem.named(client)}
                self.append({"round": round, **who, "examples": len(tests), **line})


@dataclass(kw_only=True)
class Probe:
    """Something that is measured; the fields are keys of the section ``eval``, checked in ``__post_init__``.

    A name that several probes have is one key.

    Attributes:
        subject: the run, from :meth:`begin` on.
    """

    subject: Subject = field(init=False, repr=False)

    def begin(self, subject: Subject) -> None:
        """Look at the run before any work.

        Raises:
            InputError: the probe doesn't fit the problem.
        """
        self.subject = subject

    def after_round(self, round: int, posterior: Posterior) -> dict[str, float]:
        """What goes into the line of ``rounds.jsonl``; round 0 is before training, ``posterior`` is where the model
        is.
        """
        return {}

    def at_end(self, round: int, posterior: Posterior, ask: Ask) -> dict[str, float]:
        """What goes into ``summary.json`` after the last round, while the clients are there.

        Args:
            round: the last one.
            posterior: the server's.
            ask: lets every client solve its local problem once more and test the result with so many posterior samples,
                see the question `personalize` of :func:`bayesfed.federation.server.ask.ask`.
        """
        return {}

    def in_summary(self, records: Sequence[dict[str, Any]]) -> dict[str, float | None]:
        """What ``summary.json`` says of the rounds, however the run ended; ``records`` are those of
        ``rounds.jsonl``.
        """
        return {}


@dataclass(kw_only=True)
class PredictiveProbe(Probe):
    """One that predicts with the posterior.

    Args:
        samples: posterior draws of a model average, >= 1.
        batch_size: examples in one forward pass; None is 512 on a CPU, 2048 elsewhere.
        at_once: draws evaluated together (``torch.func.vmap``); None is 8 on a GPU, 1 elsewhere.
    """

    samples: int = 32
    batch_size: int | None = None
    at_once: int | None = None

    def __post_init__(self) -> None:
        integer("samples", self.samples, at_least=1)
        integer("batch_size", self.batch_size, at_least=1, optional=True)
        integer("at_once", self.at_once, at_least=1, optional=True)

    @property
    def options(self) -> dict[str, int | None]:
        """What functions of :mod:`bayesfed.evaluation` are called with."""
        return {"batch_size": self.batch_size, "at_once": self.at_once}
