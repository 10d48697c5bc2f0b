"""What distinguishes one strategy from another: what clients are asked to solve, and what is made of their answers."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, cast

import torch
from torch import Tensor

from bayesfed.errors import InputError, RunDiverged, RunFailed
from bayesfed.families import FAMILIES, PointMass
from bayesfed.families.natural import all_finite
from bayesfed.federation.client.handler import Trainer
from bayesfed.federation.server.ledger import Ledger
from bayesfed.federation.server.reading import Reply
from bayesfed.federation.server.replies import Sums
from bayesfed.federation.server.round import Posterior, Sent
from bayesfed.foreign import plain_text
from bayesfed.metrics import plain_numbers

# what a local problem has where Method.local_settings says nothing
NEUTRAL: dict[str, float | bool | str] = {
    "damping": 0.0, "proximal": 0.0, "rho": 0.0, "temperature": 1.0, "learn_precision": True,
}  # fmt: skip


class Method(ABC, Generic[Posterior]):
    """The part of a strategy that a subclass of :class:`bayesfed.federation.server.strategy.FederatedStrategy` writes.

    Attributes:
        name: of the method.
        family: of its posterior, see ``bayesfed.families``.
        received: names of further vectors (P,) in replies.
        streams: False if it needs all replies at once, so that no engine may sum them.
        client: its client half: found by the strategy's name in local configuration, never by a message.
        asks: what it needs of clients besides solving for its family, see ``Solver.lacks``.
        posterior: the server's.
        ledger: which of their rounds counted, for each client.
        dtype: of models and server.
        num_clients: K.
        sizes: examples of each client that connected, by partition id.
    """

    name: str
    family: str = PointMass.name
    received: ClassVar[tuple[str, ...]] = ()
    streams: ClassVar[bool] = True
    asks: frozenset[str] = frozenset()
    client: ClassVar[type[Trainer]] = Trainer
    posterior: Posterior
    ledger: Ledger
    dtype: torch.dtype
    num_clients: int
    sizes: dict[int, int]

    @abstractmethod
    def prepare(self, initial: Tensor) -> None:
        """Set ``self.posterior`` (and sums) before round 1 from the network initialisation (P,)."""

    def prepared(self, initial: Tensor) -> None:
        """:meth:`prepare`, and the posterior it left is seen to be one.

        Raises:
            InputError: it is not, the constructor did not call the base class's, or a method takes other arguments.
        """
        if not hasattr(self, "ledger"):
            raise InputError("strategy", type(self).__name__, "its constructor must call super().__init__()")
        for hook in ("accumulate", "combine"):
            asked = [name for name in inspect.signature(getattr(Method, hook)).parameters if name != "self"]
            try:
                inspect.signature(getattr(self, hook)).bind(*asked)
            except TypeError as error:
                raise InputError("strategy", self.name, f"{hook} must take ({', '.join(asked)}): {error}") from error
        self.prepare(initial)
        try:
            self.posterior = _sound(getattr(self, "posterior", None), self.family, initial.numel(), initial.dtype)
        except ValueError as error:
            raise InputError("strategy", self.name, f"after prepare() the server's {error}") from error

    @abstractmethod
    def local_settings(self) -> dict[str, float | bool | str]:
        """Values of the local problem (the keys of ``NEUTRAL``), and what the method's client half reads."""

    @abstractmethod
    def empty(self) -> Sums:
        """Sums over no clients: named float64 tensors that add up, on the CPU."""

    @abstractmethod
    def accumulate(self, sums: Sums, reply: Reply[Posterior]) -> dict[str, float]:
        """Add one client's reply to ``sums`` in place; returns numbers to log for this client.

        Raises:
            wire.BadMessage: what the method needs is not there; ``sums`` is as before.
        """

    def extra(self) -> dict[str, Tensor]:
        """Vectors (P,) that go to clients with the posterior."""
        return {}

    @abstractmethod
    def combine(self, sums: Sums, sent: Sent[Posterior], replies: int) -> dict[str, float]:
        """Update ``self.posterior`` from what was sent and the sums over ``replies`` clients; numbers to log."""

    def combined(self, sums: Sums, sent: Sent[Posterior], replies: int, server_round: int) -> dict[str, float]:
        """:meth:`combine`; its numbers, and the posterior and :meth:`tensors` it left, are seen to be sound.

        Raises:
            RunDiverged: they are not.
            RunFailed: the numbers are none.
        """
        dim = self.posterior.dim
        numbers = self.combine(sums, sent, replies)
        try:
            metrics = plain_numbers(numbers, f"{type(self).__name__}.combine")
        except ValueError as error:
            raise RunFailed(f"round {server_round}: {error}") from error
        try:
            self.posterior = _sound(self.posterior, self.family, dim, self.dtype)
            for name, value in self.tensors().items():
                if isinstance(value, Tensor) and value.is_floating_point() and not all_finite(value):
                    raise ValueError(f"state {plain_text(name)} is not finite")
        except ValueError as error:
            raise RunDiverged(
                f"diverged: round {server_round}: the server's {error}; what was saved before is kept, but resuming "
                f"repeats the same steps and diverges again: start a new run with smaller steps (client.lr, "
                f"strategy.damping, ...), or mend {type(self).__name__}.combine"
            ) from error
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """The method's state besides the posterior."""
        return {}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of :meth:`tensors`; called after :meth:`prepare`."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint needs: tensors, and plain values. Once it is saved, call :meth:`saved`."""
        posterior = {f"posterior.{name}": value for name, value in self.posterior.arrays().items()}
        return posterior | self.tensors(), self.ledger.state()

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take up what :meth:`state` gave, after :meth:`setup`.

        Raises:
            KeyError, ValueError: it is not of this strategy and model.
        """
        rest = dict(tensors)
        arrays = {name: rest.pop(f"posterior.{name}") for name in self.posterior.arrays()}
        posterior = type(self.posterior).from_arrays(arrays)
        if posterior.dim != self.posterior.dim:
            raise ValueError(f"{posterior.dim} parameters, the model has {self.posterior.dim}")
        self.posterior = cast(Posterior, posterior)
        self.load_tensors(rest)
        self.ledger.load(values)

    def saved(self) -> None:
        """The present :meth:`state` is safe on the disk."""
        self.ledger.saved()

    @property
    def num_examples(self) -> int:
        """N of all clients, as they said when they connected.

        Raises:
            RunFailed: some never connected; the objective would change with them.
        """
        if len(self.sizes) < self.num_clients:
            missing = self.num_clients - len(self.sizes)
            raise RunFailed(
                f"{missing} of {self.num_clients} clients have not connected; "
                f"{self.name} needs the size of every client"
            )
        return sum(self.sizes.values())

    @property
    def size_scale(self) -> float:
        """``K/N``: with this weight the clients' summed losses average to the pooled mean loss."""
        return self.num_clients / self.num_examples


def _sound(posterior: Any, family: str, dim: int, dtype: torch.dtype) -> Any:
    """A server's posterior in ``dtype``.

    Raises:
        ValueError: it is none of this family over ``dim`` parameters, finite and with a positive precision; as "mean is
            not finite ...".
    """
    kind = FAMILIES[family]
    if not isinstance(posterior, kind) or posterior.name != family:
        raise ValueError(
            f"posterior is of type {type(posterior).__name__}, for family={family} it must be {kind.__name__}"
        )
    arrays = posterior.arrays()
    for name, shape in kind.array_shapes(dim).items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {tuple(arrays[name].shape)}, expected {shape}")
    posterior = posterior if posterior.mean.dtype == dtype else posterior.to(dtype)
    kind.from_arrays(posterior.arrays())
    return posterior
