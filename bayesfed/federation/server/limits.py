"""How large a client's answer may be, in bytes and in value."""

from __future__ import annotations

from dataclasses import dataclass

from bayesfed.settings import check_settings, setting


@dataclass(kw_only=True)
class Limits:
    """Bounds on a reply, the section ``limits`` of the configuration; one that exceeds them is refused.

    The defaults of the absolute ones only keep the server's posterior and sums from overflow (float32 ends at 3e38), so
    that no run that works is stopped by them; tighten them to what the problem allows.

    Args:
        mean_norm: largest Euclidean norm of a posterior mean.
        precision: largest entry of a posterior precision.
        relative_precision: how many times the round's median client a client's mean precision may be; its largest entry
            the square of that, see :class:`bayesfed.federation.server.outliers.Outliers`.
        relative_examples: how many times those of the median client the examples of a deployed client may be.
        reply_bytes: largest reply; null = twice what the arrays need, plus 1 MiB for names and metrics.

    Raises:
        InputError: a bound that is not positive.
    """

    mean_norm: float = setting(1e30, above=0)
    precision: float = setting(1e30, above=0)
    relative_precision: float = setting(100.0, above=1)
    relative_examples: float = setting(100.0, above=1)
    reply_bytes: int | None = setting(None, at_least=1)

    def __post_init__(self) -> None:
        check_settings(self, "limits")
