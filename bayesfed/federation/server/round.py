"""One round as the server sees it: what was sent, who was asked, what came back."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from bayesfed.families import ExponentialFamily, NaturalParameters, PointMass
from bayesfed.federation.server.outliers import Outliers

Posterior = TypeVar("Posterior", bound=ExponentialFamily | PointMass)


@dataclass(frozen=True)
class Sent(Generic[Posterior]):
    """The server's posterior as the clients of a round got it, to which their answers are relative.

    Attributes:
        posterior: rounded to what travels (with ``wire=full`` the server's own), on the CPU.
    """

    posterior: Posterior

    @cached_property
    def wide(self) -> Posterior:
        """In float64."""
        return cast(Posterior, self.posterior.to(torch.float64))

    @property
    def mean(self) -> Tensor:
        """``w_g`` or ``m_g`` (P,), float64."""
        return self.wide.mean

    @cached_property
    def natural(self) -> NaturalParameters:
        """``lambda_g`` of an exponential family, float64."""
        return cast(ExponentialFamily, self.wide).natural


@dataclass
class Round(Generic[Posterior]):
    """A round from its messages to the server's step.

    Attributes:
        number: from 1.
        sent: what clients got.
        drawn: how many clients were drawn, whether or not they are connected.
        sampled: partition ids that were asked, ascending, with the node each lives on.
        outliers: compares the replies with each other.
        folds: whether the grid sums groups of replies where clients run.
        replied: accepted clients with their metrics.
        failed: refused or missing clients with the reason.
        diverged: those of them whose numbers are not finite or beyond the limits.
        down, up: bytes of the messages sent, and of all replies that came, refused ones too.
    """

    number: int
    sent: Sent[Posterior]
    drawn: int
    sampled: dict[int, int]
    outliers: Outliers
    folds: bool = False
    replied: dict[int, dict[str, float]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    diverged: list[int] = field(default_factory=list)
    down: int = 0
    up: int = 0

    def shortage(self, least: int) -> str:
        """Why fewer than ``least`` accepted replies end the run, and what to do about it."""
        if self.diverged and len(self.replied) + len(self.diverged) >= least:
            first, more = self.diverged[0], ", ..." if len(self.diverged) > 10 else ""
            return (
                f"diverged: round {self.number}: the answers of {len(self.diverged)} of {self.drawn} clients are not "
                f"finite or beyond the limits (clients {', '.join(map(str, self.diverged[:10]))}{more}; "
                f"client {first}: "
                f"{self.failed[first]}); start a new run with smaller steps (client.lr, strategy.damping) or, if such "
                f"values are right, with larger limits.*"
            )
        reasons = "; ".join(f"client {c}: {r}" for c, r in sorted(self.failed.items())[:3])
        return (
            f"round {self.number}: {len(self.replied)} of {self.drawn} clients replied, "
            f"strategy.min_replies={least} ({reasons})"
        )

    def counts(self) -> dict[str, float]:
        """Clients and bytes, for the log of rounds."""
        return {
            "clients/sampled": self.drawn,
            "clients/replied": len(self.replied),
            "clients/failed": len(self.failed),
            "bytes/down": self.down,
            "bytes/up": self.up,
        }
