"""What distinguishes one strategy from another: what clients are asked to solve, and what is made of their answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic

from torch import Tensor

from bayesfed.errors import RunFailed
from bayesfed.families import PointMass
from strategies.reading import Posterior, Reply
from strategies.replies import Sums

# what a local problem has where Method.local_settings says nothing
NEUTRAL: dict[str, float | bool | str] = {
    "damping": 0.0, "proximal": 0.0, "rho": 0.0, "temperature": 1.0, "learn_precision": True,
}  # fmt: skip


class Method(ABC, Generic[Posterior]):
    """The part of a strategy that a subclass of :class:`strategies.base.FederatedStrategy` writes.

    Attributes:
        name: of the method.
        family: of its posterior, see ``bayesfed.families``.
        received: names of further vectors (P,) in replies.
        streams: False if it needs all replies at once, so that no engine may sum them.
        asks: what it needs of clients besides solving for its family, see ``Solver.lacks``.
        posterior: the server's.
        num_clients: K.
        sizes: examples of each client that connected, by partition id.
    """

    name: str
    family: str = PointMass.name
    received: ClassVar[tuple[str, ...]] = ()
    streams: ClassVar[bool] = True
    asks: frozenset[str] = frozenset()
    posterior: Posterior
    num_clients: int
    sizes: dict[int, int]

    @abstractmethod
    def prepare(self, initial: Tensor) -> None:
        """Set ``self.posterior`` (and sums) before round 1 from the network initialisation (P,)."""

    @abstractmethod
    def local_settings(self) -> dict[str, float | bool | str]:
        """Values of the local problem: rho, damping, temperature, proximal, learn_precision, and what the method's handler reads."""

    @abstractmethod
    def begin(self) -> None:
        """Get ready for the replies to ``self.posterior`` as it was sent."""

    @abstractmethod
    def empty(self) -> Sums:
        """Sums over no clients: named float64 tensors that add up, on the CPU."""

    @abstractmethod
    def accumulate(self, sums: Sums, posterior: Posterior, num_examples: int) -> dict[str, float]:
        """Add one client's posterior (see :class:`Reply`) to ``sums`` in place; returns numbers to log for this client."""

    def add(self, sums: Sums, reply: Reply[Posterior]) -> dict[str, float]:
        """The same, for methods that need more of the reply.

        Raises:
            wire.BadMessage: what they need is not there; ``sums`` is as before.
        """
        return self.accumulate(sums, reply.posterior, reply.num_examples)

    def extra(self) -> dict[str, Tensor]:
        """Vectors (P,) that go to clients with the posterior."""
        return {}

    @abstractmethod
    def combine(self, sums: Sums, replies: int) -> dict[str, float]:
        """Update ``self.posterior`` from the sums over ``replies`` clients; returns numbers to log."""

    def tensors(self) -> dict[str, Tensor]:
        """Server state besides the posterior, for checkpoints."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`; called after :meth:`prepare`."""

    @property
    def num_examples(self) -> int:
        """N of all clients, as they said when they connected.

        Raises:
            RunFailed: some never connected; the objective would change with them.
        """
        if len(self.sizes) < self.num_clients:
            missing = self.num_clients - len(self.sizes)
            raise RunFailed(
                f"{missing} of {self.num_clients} clients have not connected; {self.name} needs the size of every client"
            )
        return sum(self.sizes.values())

    @property
    def size_scale(self) -> float:
        """``K/N``: with this weight the clients' summed losses average to the pooled mean loss."""
        return self.num_clients / self.num_examples
