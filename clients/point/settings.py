"""What can be set of the clients that solve for a point."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from bayesfed.errors import choice, number
from clients.side_by_side import BatchingSolver


@dataclass(kw_only=True, eq=False)
class PointSettings(BatchingSolver):
    """The settings of :class:`PointSolver`, checked.

    Args:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        momentum: of SGD; ignored by Adam.
        beta1, beta2: of Adam; ignored by SGD.
        weight_decay: coupled (L2) for SGD and Adam, decoupled for AdamW.
        clip_norm: bound on the norm of the whole gradient; null for none.
        keep_momentum: keep the optimizer's state between rounds instead of restarting it.

    Raises:
        InputError: a value out of range.
    """

    families: ClassVar[frozenset[str]] = frozenset({"point", "isotropic", "diagonal", "full"})
    learns_precision: ClassVar[bool] = False
    lacks = MappingProxyType({})

    optimizer: str
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip_norm: float | None = None
    keep_momentum: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("optimizer", self.optimizer, ("sgd", "adam", "adamw"))
        for name in ("momentum", "beta1", "beta2"):
            number(name, getattr(self, name), at_least=0, at_most=1 - 1e-9)
        number("weight_decay", self.weight_decay, at_least=0)
        number("clip_norm", self.clip_norm, above=0, optional=True)
