"""Learning-rate schedules, over communication rounds and inside a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from bayesfed.errors import InputError, choice, number


@dataclass(frozen=True)
class Schedule:
    """Factor on the learning rate over ``horizon`` units (rounds, or steps inside a round).

    ``constant``: 1; ``cosine``: ``(1 + cos(pi t/horizon))/2``; ``step``: times ``decay`` at 1/2 and 3/4 of the horizon;
    ``inverse``: ``1/(1 + 0.1 t)``.
    """

    kind: str
    horizon: int
    decay: float = 0.1

    KINDS: ClassVar[tuple[str, ...]] = ("constant", "cosine", "step", "inverse")
    KEYS: ClassVar[tuple[str, ...]] = ("schedule", "schedule_rounds", "schedule_decay")  # of a run's configuration

    def __post_init__(self) -> None:
        choice("schedule", self.kind, self.KINDS)
        number("schedule_decay", self.decay, above=0, at_most=1)

    def __call__(self, t: int) -> float:
        """The factor at time ``t`` = 0, 1, ...; constant after the horizon."""
        t = min(t, self.horizon)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * t / self.horizon))
        if self.kind == "step":
            return self.decay ** ((2 * t >= self.horizon) + (4 * t >= 3 * self.horizon))
        if self.kind == "inverse":
            return 1 / (1 + 0.1 * t)
        return 1.0

    @classmethod
    def of_run(
        cls, rounds: int, schedule: str = "constant", schedule_rounds: int | None = None, schedule_decay: float = 0.1
    ) -> Schedule:
        """A run's schedule over its rounds; a horizon of None is ``rounds``.

        Raises:
            InputError: an unknown kind, or a decay that is not in (0, 1].
        """
        return cls(schedule, schedule_rounds or max(rounds, 1), schedule_decay)

    @classmethod
    def of(cls, cfg: Mapping[str, Any]) -> Schedule:
        """The schedule that a configuration's section ``client`` describes (clients that take no steps have none).

        Raises:
            InputError: see :meth:`of_run`.
        """
        try:
            return cls.of_run(cfg["rounds"], **{key: cfg["client"][key] for key in cls.KEYS if key in cfg["client"]})
        except InputError as error:
            raise error.within("client") from error
