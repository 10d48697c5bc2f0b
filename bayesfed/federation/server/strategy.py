"""The loop that all strategies share: seeded sampling, streamed replies in client order, resume, callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import getLogger
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from torch import Tensor

from bayesfed import seeding, wire
from bayesfed.errors import RunDiverged, RunFailed, integer
from bayesfed.federation.server.asking import encoded, train_messages
from bayesfed.federation.server.callbacks import Callbacks
from bayesfed.federation.server.ledger import Ledger
from bayesfed.federation.server.limits import Limits
from bayesfed.federation.server.method import NEUTRAL
from bayesfed.federation.server.outliers import Outliers
from bayesfed.federation.server.reading import Reader, Reply
from bayesfed.federation.server.replies import GroupSums, Sums, group_size, reported, stream
from bayesfed.federation.server.roster import Roster
from bayesfed.federation.server.round import Posterior, Round, Sent
from bayesfed.federation.server.summing import Summing
from bayesfed.profiling import span
from bayesfed.settings import check_settings, setting
from bayesfed.system import Fate

__all__ = ["FederatedStrategy", "Reply", "Sent", "Sums"]  # what a strategy is written with

log = getLogger("bayesfed")


@dataclass(kw_only=True, eq=False)
class FederatedStrategy(Summing[Posterior], Strategy):
    """Base of bayesfed's strategies: a subclass says what it sends and how it combines what comes back.

    A subclass implements the abstract methods of :class:`bayesfed.federation.server.method.Method` and names its
    ``family``; vectors that travel besides posteriors are given by ``extra`` and named in ``received``. Its settings
    are fields (see :func:`bayesfed.settings.setting`), or arguments of a constructor of its own that calls
    ``super().__init__()``. Replies are consumed one at a time **in the order of partition ids**, whatever the order of
    arrival, in groups whose size depends only on how many clients are sampled, so that floating-point sums don't depend
    on the engine; memory is O(P) plus the replies that arrived early. An engine may sum a group where its clients run
    (:meth:`fold`).

    Args:
        fraction: share of the clients sampled each round, in (0, 1].
        min_replies: a round with fewer accepted replies stops the run.
        timeout: seconds to wait for the replies of a round.

    Attributes:
        ledger: which of their rounds counted, for each client.
        round: the one under way, or the last.
        shape: what every node's data have in common.
        lr_factor: of a round, on the clients' learning rate.
        fates: simulated: what clients manage in a round.
        callbacks: the run's.

    Raises:
        InputError: a value out of range.
    """

    fraction: float = setting(1.0, above=0, at_most=1)
    min_replies: int = setting(1, at_least=1)
    timeout: float = setting(86400.0, above=0)

    def __post_init__(self) -> None:
        check_settings(self)
        self.num_clients, self.sizes, self.shape = 0, {}, cast(dict[str, int], {})
        self.seed = 0
        self.ledger = Ledger()
        self.round: Round[Posterior]
        self.callbacks: Callbacks | None = None
        self.lr_factor: Callable[[int], float] = lambda round: 1.0
        self.fates: Callable[[Sequence[int], int], dict[int, Fate]] | None = None
        self._roster: Roster | None = None
        self._gone: set[int] = set()  # nodes that are not waited for
        self._held = 0  # precisions at their floor

    # -- set-up ----------------------------------------------------------------------------------------------------

    def setup(
        self,
        initial: Tensor,
        num_clients: int,
        seed: int = 0,
        wire_format: str = "full",
        limits: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell the strategy the size of the problem; ``initial`` (P,) has the dtype of models and server.

        ``limits`` are the arguments of :class:`bayesfed.federation.server.limits.Limits`.

        Raises:
            InputError: ``wire_format`` can't carry this posterior.
        """
        integer("num_clients", num_clients, at_least=1)
        self.num_clients, self.seed = num_clients, seed
        self.dtype = initial.dtype
        self.prepared(initial.detach().cpu())
        shapes = {name: tuple(value.shape) for name, value in self.posterior.arrays().items()}
        self.codec = wire.Codec(wire_format, shapes, self.dtype)
        self._extra_out = wire.Codec(wire_format, dict.fromkeys(self.extra(), (initial.numel(),)), self.dtype)
        extra_in = wire.Codec(wire_format, dict.fromkeys(self.received, (initial.numel(),)), self.dtype)
        self.reader = Reader(type(self.posterior), self.codec, extra_in, Limits(**(limits or {})))

    def summary(self) -> None:
        """Log the settings, as Flower's strategies do."""
        settings = {k: v for k, v in vars(self).items() if not k.startswith("_") and isinstance(v, int | float | str)}
        log.info("%s: %s", type(self).__name__, ", ".join(f"{k}={v}" for k, v in sorted(settings.items())))

    # -- the loop ---------------------------------------------------------------------------------------------------

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
        *,
        first_round: int = 1,
        callbacks: Callbacks | None = None,
    ) -> Result:
        """Run rounds ``first_round`` ... ``num_rounds``.

        Flower's signature and result; in addition the loop can begin anywhere (resume) and reports to ``callbacks``. If
        :meth:`setup` was not called, ``initial_arrays`` must hold one array ``mean`` (P,), and every node is a client.

        Raises:
            RunFailed: fewer than ``min_replies`` clients replied in a round.
        """
        self.callbacks = callbacks
        with span("start-up"), span("roster"):
            roster = self._roster = Roster(self.num_clients, self.sizes, self.shape)
            roster.gather(grid, self.timeout)
        if not self.num_clients:
            if initial_arrays is None or "mean" not in initial_arrays:
                raise ValueError("call setup() first or give initial_arrays with an array 'mean'")
            self.setup(torch.from_numpy(initial_arrays["mean"].numpy()), len(roster.nodes))
        self.summary()
        result = Result()
        arrays = wire.pack(self.posterior.arrays())
        for current in range(first_round, num_rounds + 1):
            with span("round"):
                with span("messages"):
                    messages = self.configure_train(current, arrays, train_config or ConfigRecord(), grid)
                replies = stream(grid, messages, timeout or self.timeout, self._group_size, self._gone)
                updated, metrics = self.aggregate_train(current, replies)
            if updated is not None:
                arrays = result.arrays = updated
            if metrics is not None:
                result.train_metrics_clientapp[current] = metrics
            if evaluate_fn is not None and (evaluated := evaluate_fn(current, arrays)) is not None:
                result.evaluate_metrics_serverapp[current] = evaluated
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a round: one message a sampled client, with the posterior and the values of the local problem."""
        nodes, clients = self.connect(grid), self.sample(server_round)
        if self.callbacks:
            self.callbacks.begin_round(server_round, clients)
        sent, records = Sent(self.posterior), {"posterior": arrays}
        if self.codec.format != "full":
            records["posterior"], values = encoded(self.codec, self.posterior.arrays(), server_round)
            sent = Sent(cast(Posterior, type(self.posterior).from_arrays(values)))
        if vectors := self.extra():
            vectors = {name: value.to(self.dtype) for name, value in vectors.items()}
            records["extra"] = encoded(self._extra_out, vectors, server_round)[0]
        reached = {client: nodes[client] for client in clients if client in nodes}
        local = hasattr(grid, "stream")
        compared = not local or group_size(len(reached)) == 1  # else engines may sum where clients run
        limits = self.reader.limits
        self.round = Round(
            number=server_round, sent=sent, drawn=len(clients), sampled=dict(reached),
            outliers=Outliers(
                limits.relative_precision if compared else math.inf, limits.relative_examples, self.sizes, trusted=local
            ),
            folds=self.streams and bool(getattr(grid, "folds", False)),
            failed={client: "not connected" for client in clients if client not in nodes},
        )  # fmt: skip
        fates = self.fates(clients, server_round) if self.fates else {}
        settings = {
            **config, **NEUTRAL, **self.local_settings(), "name": self.name, "lr_factor": self.lr_factor(server_round),
        }  # fmt: skip
        messages = []
        for client, message, size in train_messages(server_round, records, settings, reached, self.ledger, fates):
            self.round.down += size  # a client whose reply is lost was sent the model all the same
            if client in fates and fates[client].lost:
                self._lose(client, fates[client].lost)
            else:
                messages.append(message)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close the round: consume the replies in client order as they come, then update the posterior.

        Raises:
            RunFailed: too few replies.
        """
        round, exact = self.round, self.posterior
        sums = GroupSums(self.empty, self._group_size)
        for client, read in round.outliers.vetted(self.read_all(replies)):
            sums.next()
            metrics: dict[str, float] | None = None
            refusal = ""
            try:
                if isinstance(read, ValueError):
                    raise read
                round.replied[client] = metrics = self.absorb(sums, read, server_round)
            except ValueError as error:  # wire.BadMessage, or what a method can't add
                round.failed[client] = refusal = str(error)
                if isinstance(error, wire.Diverged):
                    round.diverged.append(client)
            self._report(client, metrics, refusal)
        sums.close()

        if len(round.replied) < self.min_replies:
            shortage = round.shortage(self.min_replies)
            raise (RunDiverged if round.diverged and shortage.startswith("diverged: ") else RunFailed)(shortage)
        with span("combine"):
            numbers = self.combined(sums.total, round.sent, len(round.replied), server_round)
            if round.sent.posterior is not exact:
                arrays = self.codec.keep_rounding(
                    self.posterior.arrays(), exact.arrays(), round.sent.posterior.arrays()
                )
                self.posterior = cast(Posterior, type(self.posterior).from_arrays(arrays))
        self.ledger.accept(round.replied, server_round)
        numbers |= reported(list(round.replied.values()), self.posterior.dim) | round.counts()
        held = int(numbers["guard/clients"])
        if held > 2 * self._held:  # every count is in the log of rounds; say it again only when it grows
            self._held = held
            log.warning("round %d: %d client precisions held at their floor (client.min_precision)", server_round, held)
        if self.callbacks:
            self.callbacks.end_round(server_round, numbers)
        return wire.pack(self.posterior.arrays()), MetricRecord(dict(numbers))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation happens on the server."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Evaluation happens on the server."""
        return None

    def sample(self, server_round: int) -> list[int]:
        """The partition ids that take part, ascending: keyed by (seed, round), never by node ids."""
        count = max(1, round(self.fraction * self.num_clients))
        if count >= self.num_clients:
            return list(range(self.num_clients))
        generator = seeding.numpy_generator(self.seed, "participants", server_round)
        return sorted(generator.choice(self.num_clients, count, replace=False).tolist())

    def connect(self, grid: Grid) -> dict[int, int]:
        """The node of each client that is connected."""
        if self._roster is None:
            self._roster = Roster(self.num_clients, self.sizes, self.shape)
            self._roster.gather(grid, self.timeout)
        self._roster.update(grid)
        return self._roster.nodes

    # -- details ----------------------------------------------------------------------------------------------------

    @property
    def _group_size(self) -> int:
        return group_size(len(self.round.sampled)) if self.streams else 1

    def _lose(self, client: int, reason: str) -> None:
        """A sampled client whose reply never counts (simulated): it is not asked to work."""
        del self.round.sampled[client]
        self.round.failed[client] = reason
        if self.callbacks:
            self.callbacks.client_done(self.round.number, client, None, reason)

    def _report(self, client: int, metrics: dict[str, float] | None, reason: str) -> None:
        if metrics is None:
            log.warning("round %d: client %d left out: %s", self.round.number, client, reason)
        if self.callbacks:
            self.callbacks.client_done(self.round.number, client, metrics, reason)
