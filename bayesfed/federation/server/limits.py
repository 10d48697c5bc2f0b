"""How large a client's answer may be, in bytes and in value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bayesfed.errors import integer, number
from bayesfed.families import ExponentialFamily, PointMass
from bayesfed.federation.server.outliers import Outliers
from bayesfed.wire import BadMessage, Diverged


@dataclass(frozen=True)
class Limits:
    """Bounds on a reply; one that exceeds them is refused before any state changes.

    The defaults of the absolute ones only keep the server's posterior and sums from overflow (float32 ends at 3e38), so that no run
    that works is stopped by them; tighten them to what the problem allows.

    Args:
        mean_norm: largest Euclidean norm of a posterior mean.
        precision: largest entry of a posterior precision.
        relative_precision: how many times the round's median client a client's mean precision may be; its largest entry the
            square of that, see :class:`bayesfed.federation.server.outliers.Outliers`.
        relative_examples: how many times those of the median client the examples of a deployed client may be.
        reply_bytes: largest reply; null = twice what the arrays need, plus 1 MiB for names and metrics.

    Raises:
        InputError: a bound that is not positive.
    """

    mean_norm: float = 1e30
    precision: float = 1e30
    relative_precision: float = 100.0
    relative_examples: float = 100.0
    reply_bytes: int | None = None

    def __post_init__(self) -> None:
        number("limits.mean_norm", self.mean_norm, above=0)
        number("limits.precision", self.precision, above=0)
        number("limits.relative_precision", self.relative_precision, above=1)
        number("limits.relative_examples", self.relative_examples, above=1)
        integer("limits.reply_bytes", self.reply_bytes, at_least=1, optional=True)

    def outliers(self, sizes: Mapping[int, int], compared: bool, trusted: bool) -> Outliers:
        """The relative ones, for the replies of one round; ``compared``: also precisions, ``trusted``: not the numbers of examples."""
        return Outliers(self.relative_precision if compared else math.inf, self.relative_examples, sizes, trusted)

    def check(self, posterior: ExponentialFamily | PointMass) -> None:
        """Compare values.

        Raises:
            Diverged: one is too large, or not finite.
        """
        norm = float(torch.linalg.vector_norm(posterior.mean))
        if not norm <= self.mean_norm:  # float32 may have overflowed
            norm = float(torch.linalg.vector_norm(posterior.mean, dtype=torch.float64))
        if not norm <= self.mean_norm:
            raise Diverged(f"the mean has norm {norm:g}, limits.mean_norm={self.mean_norm:g}")
        if isinstance(posterior, ExponentialFamily):
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
