"""What can be set of IVON as a client solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from bayesfed.errors import choice, integer, number
from bayesfed.federation.local import LEARNS, NO_PATH
from clients.side_by_side import BatchingSolver


@dataclass(kw_only=True, eq=False)
class IVONSettings(BatchingSolver):
    """The settings of :class:`IVONSolver`, checked.

    Args:
        lr: multiplies the Newton direction (``rescale_lr=False``, as the federated settings assume).
        beta1, beta2: decay of momentum and of the curvature estimate. A round of T steps learns a fraction ``1 -
            beta2**T``.
        hess_init: curvature ``h`` at the start of round 1, in mean-loss units.
        mc_samples: posterior samples (gradients) per step.
        min_precision: smallest precision a client may reach, relative to the server's. Where the local problem asks for
            less (expected Hessians are indefinite, and the site can exceed the curvature), the precision is held there
            and counted (``guard/clients``).
        clip_radius: elementwise bound on the preconditioned step, before ``lr``.
        clip_norm: bound on the norm of each sampled gradient; null for none.
        noise: ``quantile`` (fast on CPUs) or ``normal``, see :mod:`clients.noise`.
        keep_momentum: keep momentum and debias counter between rounds instead of restarting them.
        antithetic: every second sample mirrors the one before, see :class:`clients.optim.IVON`.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"diagonal", "isotropic"})
    lacks = MappingProxyType({"path": NO_PATH, "fixed": LEARNS})

    beta1: float = 0.9
    beta2: float = 0.999
    hess_init: float = 0.01
    mc_samples: int = 1
    clip_radius: float = math.inf
    clip_norm: float | None = None
    min_precision: float = 0.1
    noise: str = "quantile"
    keep_momentum: bool = False
    antithetic: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta1", self.beta1, at_least=0, at_most=1 - 1e-9)
        number("beta2", self.beta2, at_least=0, at_most=1 - 1e-12)
        number("hess_init", self.hess_init, above=0)
        integer("mc_samples", self.mc_samples, at_least=1)
        number("clip_radius", self.clip_radius, above=0, finite=False)
        number("clip_norm", self.clip_norm, above=0, optional=True)
        number("min_precision", self.min_precision, at_least=0, at_most=0.99)
        choice("noise", self.noise, ("quantile", "normal"))
