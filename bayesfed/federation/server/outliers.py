"""No client decides alone: replies that claim far more weight than the round's others are left out."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from statistics import median
from typing import Any, TypeVar

from bayesfed import wire
from bayesfed.families import ExponentialFamily

HELD = 5  # replies that wait for each other at first: two liars among them can't move the median to their side
LEAST = 3  # replies without which there is no majority
Found = TypeVar("Found")


class Outliers:
    """Compares what clients claim with the round's median, as replies stream in.

    Precisions grow with the number of examples, so a simulated client that has more of them than the median client may
    claim that much more; a deployed one says its number itself, so there it makes no difference.
    The first ``HELD`` replies are kept until there is a median; later ones are compared with that of all so far, so
    that memory stays O(P).

    Args:
        precision: how many times the median's a client's mean precision may be; its largest entry, which differs more
            among honest clients, the square of that.
        examples: how many times those of the federation's median client a client's examples may be.
        sizes: examples of each client, as it said when it connected.
        trusted: whether the sizes are the simulation's own.
    """

    def __init__(self, precision: float, examples: float, sizes: Mapping[int, int], trusted: bool):
        self.precision, self.examples, self.sizes, self.trusted = precision, examples, sizes, trusted
        self.usual = median(sizes.values()) if len(sizes) >= LEAST else 0.0
        self._claims: tuple[list[float], list[float]] = [], []

    def check_examples(self, client: int, num_examples: float) -> None:
        """A client has the examples it said it has, and not incomparably more than the others.

        Raises:
            wire.BadMessage: it claims more.
        """
        size = self.sizes.get(client, 0)
        if size and num_examples > size:
            raise wire.BadMessage(f"num-examples is {num_examples:.15g}, it was {size} when the client connected")
        most = self.examples * self.usual
        if not self.trusted and most and max(size, num_examples) > most:
            raise wire.BadMessage(
                f"num-examples is {max(size, num_examples):.15g}, "
                f"more than limits.relative_examples={self.examples:g} times that of the median client"
            )

    def vetted(self, replies: Iterable[tuple[int, Found | ValueError]]) -> Iterator[tuple[int, Found | ValueError]]:
        """The replies in their order; in the place of one that claims too much, what is wrong with it."""
        held: deque[tuple[int, Any, tuple[float, float] | None]] = deque()
        for client, found in replies:
            claim = self._claim(client, getattr(found, "posterior", None))
            held.append((client, found, claim))
            if claim is None and len(held) == 1:
                yield held.popleft()[:2]
            elif claim is not None and len(self._claims[0]) >= HELD:
                while held:
                    yield self._judged(*held.popleft())
        while held:
            yield self._judged(*held.popleft())

    def _claim(self, client: int, posterior: object) -> tuple[float, float] | None:
        """Mean and largest precision, for as many examples as the median client has; None for what has no precision."""
        if not isinstance(posterior, ExponentialFamily):
            return None
        precision = posterior.precision.diagonal() if posterior.precision.dim() == 2 else posterior.precision
        share = max(1.0, self.sizes.get(client, 0) / self.usual) if self.usual and self.trusted else 1.0
        claim = float(precision.mean()) / share, float(precision.max()) / share
        for claims, value in zip(self._claims, claim, strict=True):
            insort(claims, value)
        return claim

    def _judged(self, client: int, found: Any, claim: tuple[float, float] | None) -> tuple[int, Any]:
        if claim is None or len(self._claims[0]) < LEAST:
            return client, found
        most = self.precision, self.precision * self.precision  # inf, if that is too large
        for kind, claims, value, factor in zip(("mean", "largest"), self._claims, claim, most, strict=True):
            usual = claims[(len(claims) - 1) // 2]
            if value > factor * usual:
                return client, wire.BadMessage(
                    f"its {kind} precision is {value / usual:.3g} times the median of the round's clients, "
                    f"at most {factor:g} are taken (limits.relative_precision={self.precision:g})"
                )
        return client, found
