"""Learning-rate schedules, over communication rounds and inside a round."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from bayesfed.errors import choice, number


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
