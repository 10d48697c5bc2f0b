"""What a client keeps from round to round, and how it lies in a record of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from bayesfed import wire
from bayesfed.families import NaturalParameters
from bayesfed.families.natural import all_finite
from bayesfed.federation import duals
from bayesfed.federation.client.sites import Record
from bayesfed.federation.local import Posterior

_STATE = "state."  # before the names of what `Trainer.settle` keeps


@dataclass(frozen=True)
class Memory:
    """On the CPU, as of the last round that the server accepted.

    Attributes:
        site: ``eta_k`` in float64; None if there are no duals.
        state: of the method's client half.
        solver: of the solver.
    """

    site: NaturalParameters | None = None
    state: Record = field(default_factory=dict)
    solver: Record = field(default_factory=dict)

    @classmethod
    def of(cls, record: Record | None, zero: NaturalParameters | None) -> Memory:
        """The memory in a record; of a client that has none yet, or never was accepted, the site is ``zero``."""
        own = dict(record) if record else {}
        site = zero
        if own and zero is not None:
            site = NaturalParameters(zero.family, own.pop("site.first"), own.pop("site.second"))
        state = {n.removeprefix(_STATE): own.pop(n) for n in list(own) if n.startswith(_STATE)}
        return cls(site, state, own)

    def record(self) -> Record:
        """What :meth:`of` reads."""
        site = {} if self.site is None else {"site.first": self.site.linear, "site.second": self.site.quadratic}
        solver = {name: value.cpu() for name, value in self.solver.items()}
        return solver | site | {f"{_STATE}{name}": value for name, value in self.state.items()}

    def moved(self, kind: str, sent: Posterior, server: Posterior, step: float) -> Memory:
        """With ``eta_k + step (x_k - x_g)`` as its site, in coordinates ``kind``: see :mod:`bayesfed.federation.duals`.

        Raises:
            wire.Diverged: the site is not finite. Once accepted it would stay in the server's sum.
        """
        if self.site is None:
            return self
        own, other = (duals.coordinates(kind, q) for q in (sent, server))
        site = self.site.clone().add_(duals.change(own, other), step)
        if not bool(site.isfinite()):
            raise wire.Diverged("the site is not finite; use a smaller damping or learning rate, or a larger rho")
        return replace(self, site=site)

    def check(self) -> None:
        """Refuse a state that the next round could not go on with.

        Raises:
            wire.Diverged: it is not finite.
            ValueError: it is no tensors by name.
        """
        if not isinstance(self.state, Mapping) or not all(isinstance(v, Tensor) for v in self.state.values()):
            raise ValueError(f"settle() must return a dict of tensors, not {self.state!r:.60}")
        if not all(all_finite(value) for value in self.state.values()):
            raise wire.Diverged("the client's state is not finite; use a smaller learning rate")
