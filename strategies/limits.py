"""How large a client's answer may be, in bytes and in value."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bayesfed.errors import integer, number
from bayesfed.families import Gaussian, PointMass
from bayesfed.wire import BadMessage, Diverged


@dataclass(frozen=True)
class Limits:
    """Bounds on a reply; one that exceeds them is refused before any state changes.

    The defaults of the absolute ones only keep the server's posterior and sums from overflow (float32 ends at 3e38), so that no run
    that works is stopped by them; tighten them to what the problem allows.

    Args:
        mean_norm: largest Euclidean norm of a posterior mean.
        precision: largest entry of a posterior precision.
        relative: how many times a client's precision may exceed that of the round's median client for as many examples, and in a
            deployed run its number of examples that of the median client, see :class:`strategies.outliers.Outliers`.
        reply_bytes: largest reply; null = twice what the arrays need, plus 1 MiB for names and metrics.

    Raises:
        InputError: a bound that is not positive.
    """

    mean_norm: float = 1e30
    precision: float = 1e30
    relative: float = 100.0
    reply_bytes: int | None = None

    def __post_init__(self) -> None:
        number("limits.mean_norm", self.mean_norm, above=0)
        number("limits.precision", self.precision, above=0)
        number("limits.relative", self.relative, above=1)
        integer("limits.reply_bytes", self.reply_bytes, at_least=1, optional=True)

    def check(self, posterior: Gaussian | PointMass) -> None:
        """Compare values.

        Raises:
            Diverged: one is too large, or not finite.
        """
        norm = float(torch.linalg.vector_norm(posterior.mean))
        if not norm <= self.mean_norm:  # float32 may have overflowed
            norm = float(torch.linalg.vector_norm(posterior.mean, dtype=torch.float64))
        if not norm <= self.mean_norm:
            raise Diverged(f"the mean has norm {norm:g}, limits.mean_norm={self.mean_norm:g}")
        if isinstance(posterior, Gaussian):
            largest = float(posterior.precision.max())  # of a positive definite matrix, too: it is on the diagonal
            if not largest <= self.precision:
                raise Diverged(f"a precision is {largest:g}, limits.precision={self.precision:g}")

    def check_size(self, size: int, arrays: int) -> None:
        """Compare a reply's bytes; ``arrays`` is what its arrays need.

        Raises:
            BadMessage: it is too large.
        """
        most = self.reply_bytes or 2 * arrays + (1 << 20)
        if size > most:
            raise BadMessage(f"the reply has {size:,} bytes, at most {most:,} are taken (limits.reply_bytes)")
