"""Which tasks a free Ray worker gets next; Ray itself hands out calls in the order it gets them."""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Sequence

BATCH_SECONDS = 0.02  # short units share a call, which costs about a millisecond by itself
LEAST_SECONDS = 0.002  # and take at least as long, or an equal share of the round, but for the last ones
LARGEST_BATCH = 256
LOOK_AHEAD = 2048  # units looked at for the longest


class Schedule:
    """Units of one round, handed out longest first within a window that bounds how many answers have to wait.

    The server consumes answers in the order of units. A unit is handed out only if it lies less than ``window`` units
    after the oldest that is not done, so however unequal the clients are, at most that many answers are kept. Short
    units go out together, in order.

    Args:
        seconds: expected time of each unit; infinite where nothing is known (such units go first).
        owners: the worker that served the unit's clients before, or None: a worker that has their state at hand gets
            them where it makes no difference to the order.
        workers: how many there are.
        window: units, >= 1.
        batch: most units in one call.
    """

    def __init__(
        self,
        seconds: Sequence[float],
        owners: Sequence[int | None],
        workers: int,
        window: int,
        batch: int = LARGEST_BATCH,
    ):
        self.seconds, self.owners, self.workers, self.batch = list(seconds), owners, workers, max(batch, 1)
        self.window = min(max(window, 1), LOOK_AHEAD)
        self.alone: set[int] = set()  # units that were in a call that killed its worker
        self._ready: list[int] = []  # may be handed out now, ascending
        self._next = 0  # the first unit that was never ready
        self._oldest = 0
        self._done: set[int] = set()  # beyond the oldest
        self._unknown = [unit for unit, expected in enumerate(self.seconds) if math.isinf(expected)]
        self._guess = math.inf  # for the unknown ones

    @property
    def left(self) -> int:
        """Units that still have to be handed out."""
        return len(self._ready) + len(self.seconds) - self._next

    def _open(self) -> None:
        """Let the window follow the oldest unit that is not done."""
        last = min(self._oldest + self.window, len(self.seconds))
        self._ready.extend(range(self._next, last))
        self._next = max(self._next, last)

    def outlasts(self, seconds: float) -> bool:
        """Whether what may be handed out now keeps all other workers busy for ``seconds``.

        A worker may then have as much in hand without delaying the end of the round, or of the window. Where nothing is
        known about units
        they count as equal: two for each worker are enough.
        """
        self._open()
        if self._unknown:
            return len(self._ready) >= 2 * self.workers
        return sum(self.seconds[unit] for unit in self._ready) >= (self.workers - 1) * seconds

    def next(self, worker: int) -> list[int]:
        """The units that ``worker`` is to serve in one call; none if all that is left has to wait."""
        self._open()
        if not self._ready:
            return []
        longest = max(self.seconds[unit] for unit in self._ready)
        if longest >= BATCH_SECONDS or self.alone.intersection(self._ready):
            near = [unit for unit in self._ready if unit in self.alone or self.seconds[unit] >= 0.8 * longest]
            own = [unit for unit in near if self.owners[unit] == worker]
            chosen = [(own or near)[0]]
            self._ready.remove(chosen[0])
            return chosen
        share = min(math.ceil(self.left / (2 * self.workers)), self.batch)
        even = min(math.ceil(len(self.seconds) / self.workers), self.batch)
        count, total = 0, 0.0
        for unit in self._ready[: max(share, even)]:
            if total >= (LEAST_SECONDS if count >= share else BATCH_SECONDS):
                break
            count += 1
            total += self.seconds[unit]
        chosen, self._ready = self._ready[:count], self._ready[count:]
        return chosen

    def done(self, unit: int, seconds: float | None = None) -> None:
        """A unit is answered; the shortest time of a round stands for the units of which nothing is known."""
        self._done.add(unit)
        while self._oldest in self._done:
            self._done.remove(self._oldest)
            self._oldest += 1
        if self._unknown and seconds is not None and seconds < self._guess / 2:  # a worker's first unit loads data
            self._guess = seconds
            for other in self._unknown:
                self.seconds[other] = seconds

    def again(self, units: Sequence[int]) -> None:
        """Hand these out once more, each on its own."""
        self.alone.update(units)
        for unit in units:
            insort(self._ready, unit)
