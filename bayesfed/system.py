"""Simulated system heterogeneity: stragglers, dropouts, and replies that come after the deadline.

Nothing here looks at a clock: every draw is keyed by (seed, purpose, client, round), so a run is the same on every
engine, and after resuming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayesfed import seeding
from bayesfed.errors import InputError, number, settings_of


@dataclass(frozen=True)
class Fate:
    """What happens to a sampled client in a round.

    Attributes:
        work: share of its local steps that it does, in (0, 1].
        arrival: simulated time of its reply, see :class:`System`.
        lost: why its reply doesn't count; empty if it does.
    """

    work: float = 1.0
    arrival: float = 0.0
    lost: str = ""


@dataclass(frozen=True)
class System:
    """How clients differ in what they manage.

    The simulated time of a reply is ``n_k / mean(n) * work / speed_k * jitter``: 1 is what a client of median speed and
    average size takes for all of its steps. Speeds are drawn once for each client, log-normal with median 1.

    Args:
        stragglers: probability in [0, 1] that a client does part of its steps (FedProx, Li et al. 2020).
        least_work, most_work: bounds of the uniform share of its steps that a straggler does, in (0, 1].
        fixed: draw stragglers and shares once for each client instead of in every round.
        dropout: probability in [0, 1) that a client sends nothing.
        deadline: simulated time after which a reply is left out; None = never.
        speed_spread: sigma of the speeds.
        jitter: sigma of the log-normal factor of each reply's time.

    Raises:
        InputError: a value out of range.
    """

    stragglers: float = 0.0
    least_work: float = 0.1
    most_work: float = 1.0
    fixed: bool = False
    dropout: float = 0.0
    deadline: float | None = None
    speed_spread: float = 0.5
    jitter: float = 0.1

    def __post_init__(self) -> None:
        number("system.stragglers", self.stragglers, at_least=0, at_most=1)
        number("system.least_work", self.least_work, above=0, at_most=1)
        number("system.most_work", self.most_work, at_least=self.least_work, at_most=1)
        if not isinstance(self.fixed, bool):
            raise InputError("system.fixed", self.fixed, "must be true or false")
        number("system.dropout", self.dropout, at_least=0)
        if self.dropout >= 1:
            raise InputError("system.dropout", self.dropout, "must be below 1, or no client ever replies")
        number("system.deadline", self.deadline, above=0, optional=True)
        number("system.speed_spread", self.speed_spread, at_least=0)
        number("system.jitter", self.jitter, at_least=0)

    @classmethod
    def of(cls, section: Mapping[str, Any] | None) -> System:
        """From the configuration; nothing there is everything off.

        Raises:
            InputError: an unknown key or a value out of range.
        """
        return cls(**settings_of(section, cls, "system"))

    @property
    def active(self) -> bool:
        """Whether anything is switched on."""
        return bool(self.stragglers or self.dropout or self.deadline is not None)

    def fate(self, seed: int, client: int, round: int, relative_size: float = 1.0) -> Fate:
        """What happens to a client.

        Args:
            seed: of the run.
            client: partition id.
            round: communication round, from 1.
            relative_size: its number of examples over the mean of all clients.
        """
        generator = seeding.numpy_generator(seed, "system", "dropout", client, round)
        if self.dropout and generator.random() < self.dropout:
            return Fate(lost="dropped out (system.dropout)")
        work = self._work(seed, client, round)
        if self.deadline is None:
            return Fate(work)
        speed = math.exp(self.speed_spread * seeding.numpy_generator(seed, "system", "speed", client).standard_normal())
        noise = seeding.numpy_generator(seed, "system", "jitter", client, round).standard_normal()
        arrival = relative_size * work / speed * math.exp(self.jitter * noise)
        late = arrival > self.deadline
        return Fate(work, arrival, f"late: {arrival:.3g} > system.deadline={self.deadline:g}" if late else "")

    def fates(self, seed: int, clients: Sequence[int], round: int, sizes: Sequence[int]) -> dict[int, Fate]:
        """:meth:`fate` of the ``clients`` sampled in a round; ``sizes`` (K,) are the examples of *all* clients."""
        mean = sum(sizes) / len(sizes)
        return {client: self.fate(seed, client, round, sizes[client] / mean) for client in clients}

    def _work(self, seed: int, client: int, round: int) -> float:
        if not self.stragglers:
            return 1.0
        generator = seeding.numpy_generator(seed, "system", "work", client, 0 if self.fixed else round)
        if generator.random() >= self.stragglers:
            return 1.0
        return float(generator.uniform(self.least_work, self.most_work))
